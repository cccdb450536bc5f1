"""Whatever fails in the plugin ends the part that failed, with one loud line, and never SGLang."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("specrl.sglang.plugin")


class Failsafe:
    """Calls what belongs to one part of the plugin until it fails once.

    Args:
        part: its name, for the log.
        instead: what SGLang does from then on, for the log.
    """

    def __init__(self, part: str, instead: str) -> None:
        self.part, self.instead, self.on = part, instead, True

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """What the function returns; None from its first failure on."""
        if not self.on:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # SGLang must go on serving, whatever it was
            self.off(f"{type(error).__name__}: {error}")
            return None

    def off(self, why: str) -> None:
        """End this part, and say so once."""
        if self.on:
            self.on = False
            log.error("SPECRL PLUGIN: %s is switched off (%s); %s", self.part, " ".join(why.split()), self.instead)
