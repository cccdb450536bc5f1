"""The plugin's settings, read from environment variables. Without them the plugin does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.sglang.plugin.transport import parse_address

MAX_LOCKSTEP_S = 240.0  # SGLang's watchdog ends a server that does nothing for 300 s
_SOCKETS = ("unix:", "ipc://", "tcp://")
_NUMBERS: dict[str, tuple[str, type[float]]] = {
    "traces_rate": ("TRACES_RATE", float),
    "traces_max_bytes": ("TRACES_MAX_BYTES", int),
    "lockstep_s": ("LOCKSTEP", float),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the plugin is asked to do. Addresses of sockets are unix:PATH or tcp://127.0.0.1:PORT.

    Attributes:
        policy: SPECRL_POLICY, a directory with policy.json; None: no policy.
        plans: SPECRL_POLICY, if it is the address of a socket that takes plans; None: no such socket.
        pin: SPECRL_POLICY_PIN=1: use the policy's table and learn nothing; required with tensor parallelism.
        traces: SPECRL_TRACES, address of the socket that sends traces; None: no traces.
        traces_rate: SPECRL_TRACES_RATE, the share of the requests that are traced, in (0, 1].
        traces_max_bytes: SPECRL_TRACES_MAX_BYTES, bytes of host memory in which traces may wait for the client. A
            new round or prefill that does not fit is dropped as a whole, and counted.
        rounds: SPECRL_ROUNDS, address of the socket that reports every round; None: no reports.
        lockstep_s: SPECRL_LOCKSTEP, the longest time in seconds that a round waits for a client's permit; 0: no round
            waits.
    """

    policy: Path | None = None
    plans: str | None = None
    pin: bool = False
    traces: str | None = None
    traces_rate: float = 1.0
    traces_max_bytes: int = 512 << 20
    rounds: str | None = None
    lockstep_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.traces_rate <= 1.0:
            raise ValueError(
                f"SPECRL_TRACES_RATE must be in (0, 1], but got {self.traces_rate}; unset SPECRL_TRACES for none"
            )
        if self.traces_max_bytes < 1:
            raise ValueError(f"SPECRL_TRACES_MAX_BYTES must be at least 1, but got {self.traces_max_bytes}")
        if not 0.0 <= self.lockstep_s <= MAX_LOCKSTEP_S:
            raise ValueError(f"SPECRL_LOCKSTEP must be in [0, {MAX_LOCKSTEP_S:g}] seconds, but got {self.lockstep_s}")
        if self.lockstep_s and self.rounds is None:
            raise ValueError("SPECRL_LOCKSTEP needs a socket for permits; set SPECRL_ROUNDS too")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings | None:
        """Return the settings; None if no policy, traces or rounds are asked for.

        Raises:
            ValueError: a variable has a wrong value.
        """

        def get(name: str) -> str:
            return environment.get(f"SPECRL_{name}", "")

        policy = get("POLICY")
        if not policy and not get("TRACES") and not get("ROUNDS"):
            return None
        if get("TRACES_RING"):
            raise ValueError("SPECRL_TRACES_RING was replaced; set SPECRL_TRACES_MAX_BYTES, in bytes, instead")
        if get("POLICY_PIN") not in ("", "0", "1"):
            raise ValueError(f"SPECRL_POLICY_PIN must be 0 or 1, but got {get('POLICY_PIN')!r}")
        traces, rounds = (
            parse_address(get(name), f"SPECRL_{name}") if get(name) else None for name in ("TRACES", "ROUNDS")
        )
        numbers: dict[str, Any] = {
            field: _number(kind, get(name), f"SPECRL_{name}") for field, (name, kind) in _NUMBERS.items() if get(name)
        }
        takes_plans = policy.startswith(_SOCKETS)
        return cls(
            policy=Path(policy) if policy and not takes_plans else None,
            plans=parse_address(policy, "SPECRL_POLICY") if takes_plans else None,
            pin=get("POLICY_PIN") == "1",
            traces=traces,
            rounds=rounds,
            **numbers,
        )


def _number(kind: type[float], text: str, name: str) -> float:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, but got {text!r}") from error
