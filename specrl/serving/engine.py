"""The engine `sglang`: rounds of a stock SGLang server, launched here or found running."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specrl.clock import Clock, WallClock
from specrl.engines.base import Session, Workload
from specrl.models.draft import Draft, new_draft
from specrl.models.embedded import target_directory
from specrl.models.target import load_target
from specrl.plan import Plan, parse_plans
from specrl.serving.flags import command_line, serving_of, words
from specrl.serving.launch import PLANS, ROUNDS, TRACES, Server, check_version
from specrl.serving.plain import PlainServer
from specrl.serving.session import LockstepSession

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("specrl.serving")
Baseline = Literal["alternate", "none"]


class SGLangEngine:
    """An SGLang server as an engine (see `specrl.engines.base.Engine`); `launch_engine` makes one.

    It has one session at a time: starting another ends the one before, but for one with `plain=True`, which is on the
    server without speculation. Greedy output is the target's whatever is drafted; of sampling, SGLang keeps no seed.

    Args:
        server: that serves.
        plans: that it can run.
        fixed: the only one of them, that of its flags; None: its plugin follows plans.
        plain: measures decoding without speculation on the same device; None: `measure_plain` gives None.
        draft: that it serves, for `load_draft` to compare with; None: unknown.
        timeout_s: for a round.
    """

    def __init__(
        self,
        server: Server,
        plans: Sequence[Plan],
        *,
        fixed: Plan | None = None,
        plain: PlainServer | None = None,
        draft: Path | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.server, self.plans, self.plain = server, tuple(plans), plain
        self._fixed, self._draft, self._timeout_s = fixed, draft, timeout_s
        self._clock = WallClock()
        self._version = 0
        self._sessions: dict[bool, Session] = {}  # by whether they are plain

    def __deepcopy__(self, memo: dict[int, object]) -> SGLangEngine:
        """Itself: an engine stands for its server (Gymnasium copies the arguments of environments)."""
        return self

    @property
    def clock(self) -> Clock:
        """This machine's clock; rounds are timed on the server's host."""
        return self._clock

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve; 0 before any was loaded."""
        return self._version

    def supports(self, plan: Plan) -> bool:
        """Whether the server was launched for `plan`."""
        return plan in self.plans

    def start(
        self,
        workload: Workload,
        *,
        batch_size: int,
        seed: int,
        max_batch_size: int | None = None,
        plain: bool = False,
        trace: bool = False,
    ) -> Session:
        """Send `batch_size` requests of `workload` and be ready for the first round.

        Raises:
            ValueError: no server without speculation, for `plain`.
            ServerError: the server does not.
        """
        before = self._sessions.pop(plain, None)
        if before is not None:
            before.close()
        if plain and self.plain is None:
            raise ValueError("plain decoding needs a server without speculation; launch with baseline='alternate'")
        server = self.plain.server if plain and self.plain is not None else self.server
        session = LockstepSession(
            server,
            workload,
            batch_size=batch_size,
            most=batch_size if max_batch_size is None else max_batch_size,
            seed=seed,
            plans=(Plan(0),) if plain else self.plans,
            fixed=Plan(0) if plain else self._fixed,
            version=lambda: self._version,
            plain=None if plain else self.plain,
            trace=trace and not plain,
            timeout_s=self._timeout_s,
        )
        self._sessions[plain] = session
        return session

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on; requests in flight go on.

        Raises:
            ValueError: the weights do not fit the draft that serves.
            SwapError: the server did not take them.
        """
        from specrl.serving.hot_swap import push

        client = self.server.client
        push(client.url, weights, version=version, like=self._draft, api_key=client.api_key, timeout_s=self._timeout_s)
        self._version = version

    def close(self) -> None:
        """End sessions and the servers that were launched; idempotent."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self.server.close()
        if self.plain is not None:
            self.plain.close()


def launch_engine(
    target: str | Path = "embedded",
    draft: Draft | str | Path | None = None,
    *,
    plans: str | Sequence[str] | Sequence[Plan] = "0,1/1/2,2/1/3,3/1/4",
    python: str | Path | None = None,
    flags: Sequence[str] = (),
    plain_flags: Sequence[str] = (),
    baseline: Baseline = "alternate",
    trace: bool = False,
    start_s: float = 600.0,
    timeout_s: float = 60.0,
    lockstep_s: float = 120.0,
) -> SGLangEngine:
    """Launch SGLang on this machine, with our plugin in lock-step.

    Args:
        target: checkpoint directory, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: None: random initialisation; else an EAGLE3 directory or a `Draft`.
        plans: that it is to run: chains, 0 among them if wanted, or one tree.
        python: of an environment with SGLang 0.5.23 and this package; None: this one.
        flags: further ones for sglang.launch_server, for both servers; paths are absolute.
        plain_flags: those for the server without speculation alone. It overlaps its rounds, as SGLang does by default;
            sessions with `plain=True` need '--disable-overlap-schedule' here.
        baseline: 'alternate': a second server without speculation on the same device, which takes turns with the
            first; 'none': plain decoding is not measured.
        trace: hand out traces.
        start_s: seconds that starting may take.
        timeout_s: seconds that a round, or a call, may take.
        lockstep_s: seconds that the server waits for the next plan before it goes on by itself, which ends the session.

    Raises:
        ValueError: plans that no server can run, no SGLang there, or one whose seams are not as they were checked.
        ServerError: a server did not start; with the end of its log.
    """
    if baseline not in ("alternate", "none"):
        raise ValueError(f"baseline must be 'alternate' or 'none', but got {baseline!r}")
    wanted = parse_plans(plans)
    serving = serving_of(wanted)
    note = check_version(python)
    if note is not None:
        log.warning("%s", note)
    keep = tempfile.TemporaryDirectory(prefix="specrl-", ignore_cleanup_errors=True)  # its name must be short
    folder, beside = Path(keep.name), Path(keep.name) / "plain"
    beside.mkdir()
    path = _draft_directory(draft, target, folder)
    fixed = None if serving.tiers is not None else serving.plan
    home = str(target_directory(target).resolve())
    environment = {"SPECRL_ROUNDS": f"unix:{folder / ROUNDS}", "SPECRL_LOCKSTEP": f"{lockstep_s:g}"}
    if fixed is None:
        environment["SPECRL_POLICY"] = f"unix:{folder / PLANS}"
    if trace:
        environment |= {"SPECRL_TRACES": f"unix:{folder / TRACES}", "SPECRL_TRACES_RING": "1024"}
    line = [*command_line(serving, home, str(path), folder), "--disable-overlap-schedule", *flags]
    server = Server.launch(line, folder, python=python, environment=environment, timeout_s=timeout_s)
    plain = None
    if baseline == "alternate":
        line = [*words({"model-path": home}), "--sleep-on-idle", *flags, *plain_flags]
        told = {"SPECRL_ROUNDS": f"unix:{beside / ROUNDS}", "SPECRL_LOCKSTEP": f"{lockstep_s:g}"}
        plain = PlainServer(
            Server.launch(line, beside, python=python, environment=told, timeout_s=timeout_s), timeout_s
        )
    engine = SGLangEngine(server, wanted, fixed=fixed, plain=plain, draft=path, timeout_s=timeout_s)
    weakref.finalize(engine, keep.cleanup)
    try:
        for each in (server, *([] if plain is None else [plain.server])):
            each.wait(start_s)
            _warm(each)
    except BaseException:
        engine.close()
        raise
    return engine


def open_engine(
    *,
    target: str | Path = "embedded",
    draft: Draft | str | Path | None = None,
    plans: Sequence[Plan],
    trace: bool = False,
    **options: Any,
) -> SGLangEngine:
    """The engine as environments ask for it by name, with the options of `launch_engine`.

    Where chains and trees are wanted, it is launched for the chains: SGLang cannot switch to a tree.
    """
    chains = [plan for plan in plans if plan.is_chain]
    if any(plan.num_steps for plan in chains):
        plans = chains
    return launch_engine(target, draft, plans=plans, trace=trace, **options)


def _warm(server: Server) -> None:
    """One request, with which the plugin's sockets are there."""
    sampling = {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True}
    server.client.post("/generate", {"input_ids": [1, 2, 3], "sampling_params": sampling})


def _draft_directory(draft: Draft | str | Path | None, target: str | Path, folder: Path) -> Path:
    if draft is None:
        model = load_target(target)
        draft = new_draft(model, intermediate_size=min(256, model.config.intermediate_size))
    if isinstance(draft, Draft):
        draft.save(folder / "draft")
        return folder / "draft"
    return Path(draft).resolve()
