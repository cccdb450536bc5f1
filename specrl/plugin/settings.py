"""What the plugin is asked for, read from the environment; nothing set, nothing done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SOCKET = "unix:"


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment's variables.

    Attributes:
        policy: SPECRL_POLICY, a directory with policy.json; None: not asked for.
        plans: SPECRL_POLICY=unix:PATH, a socket on which plans are given; None: not asked for.
        pin: SPECRL_POLICY_PIN=1, serve the policy's table and learn nothing; needed with tensor parallelism.
        traces: SPECRL_TRACES=unix:PATH, a socket on which traces are handed out; None: not asked for.
        rate: SPECRL_TRACES_RATE, the share of requests that are traced, in (0, 1].
        ring: SPECRL_TRACES_RING, rounds and prefills that may wait for the subscriber.
    """

    policy: Path | None = None
    plans: Path | None = None
    pin: bool = False
    traces: Path | None = None
    rate: float = 1.0
    ring: int = 64

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"SPECRL_TRACES_RATE must be in (0, 1], but got {self.rate}; unset SPECRL_TRACES for none")
        if self.ring < 1:
            raise ValueError(f"SPECRL_TRACES_RING must be at least 1, but got {self.ring}")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """The settings; None where neither a policy nor traces are asked for.

        Raises:
            ValueError: a value that is not one.
        """
        policy, traces = environment.get("SPECRL_POLICY", ""), environment.get("SPECRL_TRACES", "")
        if not policy and not traces:
            return None
        if traces and not traces.startswith(_SOCKET):
            raise ValueError(f"SPECRL_TRACES must be written unix:/path/of/socket, but got {traces!r}")
        pin, rate, ring = (environment.get(f"SPECRL_{n}", "") for n in ("POLICY_PIN", "TRACES_RATE", "TRACES_RING"))
        if pin not in ("", "0", "1"):
            raise ValueError(f"SPECRL_POLICY_PIN must be 0 or 1, but got {pin!r}")
        followed = policy.startswith(_SOCKET)
        return cls(
            policy=Path(policy) if policy and not followed else None,
            plans=Path(policy.removeprefix(_SOCKET)) if followed else None,
            pin=pin == "1",
            traces=Path(traces.removeprefix(_SOCKET)) if traces else None,
            rate=_number(float, rate, "SPECRL_TRACES_RATE", 1.0),
            ring=int(_number(int, ring, "SPECRL_TRACES_RING", 64)),
        )


def _number(kind: type[float], text: str, name: str, default: float) -> float:
    try:
        return kind(text) if text else default
    except ValueError as error:
        raise ValueError(f"{name} must be a number, but got {text!r}") from error
