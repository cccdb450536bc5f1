"""What the plugin is asked for, read from the environment; nothing set, nothing done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LONGEST_S = 240.0
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
        rounds: SPECRL_ROUNDS=unix:PATH, a socket that tells of every round; None: not asked for.
        lockstep: SPECRL_LOCKSTEP, seconds that a round waits at most for whoever is connected there to let it go; 0:
            no round waits.
    """

    policy: Path | None = None
    plans: Path | None = None
    pin: bool = False
    traces: Path | None = None
    rate: float = 1.0
    ring: int = 64
    rounds: Path | None = None
    lockstep: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"SPECRL_TRACES_RATE must be in (0, 1], but got {self.rate}; unset SPECRL_TRACES for none")
        if self.ring < 1:
            raise ValueError(f"SPECRL_TRACES_RING must be at least 1, but got {self.ring}")
        if not 0.0 <= self.lockstep <= LONGEST_S:  # SGLang's watchdog ends a server that stands still for longer
            raise ValueError(f"SPECRL_LOCKSTEP must be in [0, {LONGEST_S:g}] seconds, but got {self.lockstep}")
        if self.lockstep and self.rounds is None:
            raise ValueError("SPECRL_LOCKSTEP needs a socket to take leave from, but SPECRL_ROUNDS is not set")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """The settings; None where nothing is asked for.

        Raises:
            ValueError: a value that is not one.
        """
        policy = environment.get("SPECRL_POLICY", "")
        traces, rounds = (_socket(environment, f"SPECRL_{name}") for name in ("TRACES", "ROUNDS"))
        if not policy and traces is None and rounds is None:
            return None
        pin, rate, ring = (environment.get(f"SPECRL_{n}", "") for n in ("POLICY_PIN", "TRACES_RATE", "TRACES_RING"))
        if pin not in ("", "0", "1"):
            raise ValueError(f"SPECRL_POLICY_PIN must be 0 or 1, but got {pin!r}")
        followed = policy.startswith(_SOCKET)
        return cls(
            policy=Path(policy) if policy and not followed else None,
            plans=Path(policy.removeprefix(_SOCKET)) if followed else None,
            pin=pin == "1",
            traces=traces,
            rate=_number(float, rate, "SPECRL_TRACES_RATE", 1.0),
            ring=int(_number(int, ring, "SPECRL_TRACES_RING", 64)),
            rounds=rounds,
            lockstep=_number(float, environment.get("SPECRL_LOCKSTEP", ""), "SPECRL_LOCKSTEP", 0.0),
        )


def _socket(environment: Mapping[str, str], name: str) -> Path | None:
    text = environment.get(name, "")
    if text and not text.startswith(_SOCKET):
        raise ValueError(f"{name} must be written unix:/path/of/socket, but got {text!r}")
    return Path(text.removeprefix(_SOCKET)) if text else None


def _number(kind: type[float], text: str, name: str, default: float) -> float:
    try:
        return kind(text) if text else default
    except ValueError as error:
        raise ValueError(f"{name} must be a number, but got {text!r}") from error
