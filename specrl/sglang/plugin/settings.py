"""The plugin's settings, read from environment variables. Without them the plugin does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specrl.core.checks import require
from specrl.sglang.plugin.transport import parse_address

MAX_LOCKSTEP_S = 240.0  # SGLang's watchdog ends a server that does nothing for 300 s


@dataclass(frozen=True)
class Settings:
    """Settings of the plugin. Addresses of sockets are unix:PATH or tcp://127.0.0.1:PORT.

    Attributes:
        policy: SPECRL_POLICY, a directory with policy.json; None: no policy.
        plans: SPECRL_POLICY, if it is the address of a socket that receives plans; None: no such socket.
        pin: SPECRL_POLICY_PIN=1: use the policy's table and learn nothing; required with tensor parallelism.
        traces: SPECRL_TRACES, address of the socket that sends traces; None: no traces.
        traces_rate: SPECRL_TRACES_RATE, the share of the requests that are traced, in (0, 1].
        traces_max_bytes: SPECRL_TRACES_MAX_BYTES, bytes of host memory in which traces may wait for the client. A
            new round or prefill that does not fit is dropped as a whole, and counted.
        rounds: SPECRL_ROUNDS, address of the socket that reports every round; None: no reports.
        lockstep_s: SPECRL_LOCKSTEP, the longest time in seconds that a round waits for a client's permit; 0: no round
            waits.

    Raises:
        ValueError: a value out of range.
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
        require(0.0 < self.traces_rate <= 1.0, "SPECRL_TRACES_RATE", "in (0, 1]", self.traces_rate)
        require(self.traces_max_bytes >= 1, "SPECRL_TRACES_MAX_BYTES", "at least 1", self.traces_max_bytes)
        seconds = f"in [0, {MAX_LOCKSTEP_S:g}] seconds"
        require(0.0 <= self.lockstep_s <= MAX_LOCKSTEP_S, "SPECRL_LOCKSTEP", seconds, self.lockstep_s)
        if self.lockstep_s and self.rounds is None:
            raise ValueError("SPECRL_LOCKSTEP needs a socket for permits; set SPECRL_ROUNDS too")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Return the settings.

        Raises:
            ValueError: a variable has a wrong value.
        """
        prefix = "SPECRL_"
        values = {name[len(prefix) :]: text for name, text in environment.items() if name.startswith(prefix) and text}

        def number(name: str, default: float) -> float:
            try:
                return type(default)(values.get(name, default))
            except ValueError as error:
                raise ValueError(f"SPECRL_{name} must be a number, but got {values[name]!r}") from error

        def address(name: str) -> str | None:
            return parse_address(values[name], f"SPECRL_{name}") if name in values else None

        if "TRACES_RING" in values:
            raise ValueError("SPECRL_TRACES_RING was replaced; set SPECRL_TRACES_MAX_BYTES, in bytes, instead")
        policy, pin = values.get("POLICY", ""), values.get("POLICY_PIN", "0")
        require(pin in ("0", "1"), "SPECRL_POLICY_PIN", "0 or 1", pin)
        takes_plans = policy.startswith(("unix:", "ipc://", "tcp://"))
        return cls(
            policy=Path(policy) if policy and not takes_plans else None,
            plans=address("POLICY") if takes_plans else None,
            pin=pin == "1",
            traces=address("TRACES"),
            traces_rate=number("TRACES_RATE", cls.traces_rate),
            traces_max_bytes=int(number("TRACES_MAX_BYTES", cls.traces_max_bytes)),
            rounds=address("ROUNDS"),
            lockstep_s=number("LOCKSTEP", cls.lockstep_s),
        )
