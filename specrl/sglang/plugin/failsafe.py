"""A failure in the plugin switches off the part that failed, logs one line, and never stops SGLang."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("specrl.sglang.plugin")


class Failsafe:
    """Calls the functions of one part of the plugin until one of them fails; then `on` is False.

    Args:
        part: its name, for the log.
        fallback: what SGLang does without it, for the log.
    """

    def __init__(self, part: str, fallback: str) -> None:
        self.part, self.fallback, self.on = part, fallback, True

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return the function's result; None from the first failure on, which is logged."""
        if not self.on:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # SGLang must go on serving after any error
            self.on = False
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.error("SPECRL PLUGIN: %s is switched off (%s); %s", self.part, reason, self.fallback)
            return None
