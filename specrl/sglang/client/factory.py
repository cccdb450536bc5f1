"""How the engine `sglang` comes about: servers launched for it, or one that runs."""

from __future__ import annotations

import json
import logging
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from specrl.core.plan import Plan, parse_plans
from specrl.models.draft import Draft, new_draft
from specrl.models.embedded import target_directory
from specrl.models.target import load_target
from specrl.sglang.client.engine import SGLangEngine
from specrl.sglang.client.flags import command_line, serving_of, words
from specrl.sglang.client.launch import PLANS, ROUNDS, TRACES, Server, check_version
from specrl.sglang.client.plain_server import PlainServer
from specrl.sglang.client.plugin_client import Rounds
from specrl.sglang.client.streamed import StreamedPlain, check_baseline
from specrl.sglang.plugin.hooks import CHECKED

log = logging.getLogger("specrl.sglang.client")
Baseline = Literal["alternate", "none"]


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
    log_dir: str | Path | None = None,
    start_s: float = 600.0,
    timeout_s: float = 60.0,
    lockstep_s: float = 120.0,
) -> SGLangEngine:
    """Launch SGLang on this machine, with our plugin in lock-step.

    Args:
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: None: random initialisation; else an EAGLE3 directory or a `Draft`.
        plans: that it is to run: chains, 0 among them if wanted, or one tree.
        python: of an environment with SGLang 0.5.23 and this package; None: this one.
        flags: further ones for sglang.launch_server, for both servers; paths are absolute.
        plain_flags: those for the server without speculation alone. It overlaps its rounds, as SGLang does by default;
            sessions with `plain=True` need '--disable-overlap-schedule' here.
        baseline: 'alternate': a second server without speculation on the same device, which takes turns with the
            first; 'none': plain decoding is not measured.
        trace: hand out traces.
        log_dir: where the servers' logs are kept; None: they go with the engine.
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
    logs = folder if log_dir is None else Path(log_dir)
    logs.mkdir(parents=True, exist_ok=True)
    server = Server.launch(
        line, folder, log=logs / "server.log", python=python, environment=environment, timeout_s=timeout_s
    )
    plain = None
    if baseline == "alternate":
        line = [*words({"model-path": home}), "--sleep-on-idle", *flags, *plain_flags]
        told = {"SPECRL_ROUNDS": f"unix:{beside / ROUNDS}", "SPECRL_LOCKSTEP": f"{lockstep_s:g}"}
        beside_it = Server.launch(
            line, beside, log=logs / "plain.log", python=python, environment=told, timeout_s=timeout_s
        )
        plain = PlainServer(beside_it, timeout_s)
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


def attach_engine(
    url: str,
    *,
    api_key: str | None = None,
    sockets: str | Path | None = None,
    plain_url: str | None = None,
    plain_api_key: str | None = None,
    timeout_s: float = 60.0,
) -> SGLangEngine:
    """Use a server that runs; closing the engine leaves it running.

    Of the two servers one stands still while the other is measured: the first waits for leave, or is paused where it
    has no plugin, and the second is asked for nothing otherwise. Nobody else may use either meanwhile.

    Args:
        url: 'http://host:port'.
        api_key: that it wants; None: none.
        sockets: the folder with its plugin's sockets, 'rounds' (with SPECRL_LOCKSTEP), 'plans' and 'traces', on this
            machine; None: it is seen by the request only, and what is lost is said.
        plain_url: of a server of the same model without speculation on the same device, the plain baseline; its
            plugin is not needed. None: there is none, and only the ratio over rounds of plan 0 can be reported.
        plain_api_key: that it wants; None: `api_key`.
        timeout_s: seconds that a round, or a call, may take.

    Raises:
        ValueError: a version of SGLang that was not checked and has no plugin to check itself, no lock-step, or a
            `plain_url` that speculates or serves something else.
        ServerError: it does not answer.
    """
    server = Server(url, api_key=api_key, timeout_s=timeout_s, sockets=None if sockets is None else Path(sockets))
    told = server.socket(ROUNDS)
    if told is None and server.version not in CHECKED:
        raise ValueError(
            f"SGLang must be {', '.join(CHECKED)}, or have our plugin, which checks its seams, but {url} is "
            f"{server.version} without it"
        )
    plan, steps = _plans_of(server.info)
    plain = None
    if plain_url is not None:
        beside = Server(plain_url, api_key=plain_api_key or api_key, timeout_s=timeout_s)
        check_baseline(server, beside)
        plain = StreamedPlain(beside, timeout_s)
    if told is None:
        return SGLangEngine(server, (plan,), fixed=plan, plain=plain, timeout_s=timeout_s, coarse=True)
    rounds = Rounds(told, server.check, timeout_s)
    rounds.close()
    if not rounds.lockstep_s:
        raise ValueError(
            f"{url} must allow lock-step, but does not; set SPECRL_LOCKSTEP=120 there, or leave out sockets="
        )
    follows = server.socket(PLANS) is not None and steps
    plans = tuple(Plan(count) for count in steps) if follows else (plan,)
    return SGLangEngine(server, plans, fixed=None if follows else plan, plain=plain, timeout_s=timeout_s)


def _plans_of(info: Mapping[str, Any]) -> tuple[Plan, tuple[int, ...]]:
    """The plan that a server was launched with, and the steps that it may change to."""
    if not info.get("speculative_algorithm"):
        return Plan(0), ()
    names = ("num_steps", "eagle_topk", "num_draft_tokens")
    plan = Plan(*(int(info[f"speculative_{name}"]) for name in names))
    path = info.get("speculative_adaptive_config")
    if not info.get("speculative_adaptive") or not path or not Path(path).is_file():
        return plan, ()
    tiers = json.loads(Path(path).read_text(encoding="utf-8"))
    return plan, tuple(sorted({s for bound, tier in tiers.items() if bound.isdigit() for s in tier["candidate_steps"]}))


def open_engine(
    *,
    target: str | Path = "embedded",
    draft: Draft | str | Path | None = None,
    plans: Sequence[Plan],
    trace: bool = False,
    server: str | None = None,
    **options: Any,
) -> SGLangEngine:
    """The engine as environments ask for it by name.

    Where chains and trees are wanted, it is launched for the chains: SGLang cannot switch to a tree.

    Args:
        target: see `launch_engine`; a running server has its own.
        draft: the same.
        plans: on offer.
        trace: hand out traces.
        server: URL of a running one; None: launch.
        options: of `attach_engine` or `launch_engine`.
    """
    if server is not None:
        return attach_engine(server, **options)
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
