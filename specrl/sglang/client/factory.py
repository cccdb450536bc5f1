"""Opens the engine `sglang`: launches its servers, or uses a running one."""

from __future__ import annotations

import json
import logging
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from specrl.config import DraftConfig
from specrl.core.checks import require
from specrl.core.plan import Plan, parse_plans
from specrl.export.serving_flags import ADAPTIVE, Serving, flag_words
from specrl.models.draft import Draft
from specrl.models.embedded import target_directory
from specrl.models.target import load_target
from specrl.sglang.client.engine import SGLangEngine
from specrl.sglang.client.launch import PLANS, ROUNDS, TRACES, Server, check_version
from specrl.sglang.client.plain_server import PlainServer, StreamedPlainServer, check_baseline
from specrl.sglang.client.plugin_client import Rounds
from specrl.sglang.plugin.hooks import CHECKED

log = logging.getLogger("specrl.sglang.client")


def open_engine(
    *,
    target: str | Path = "embedded",
    draft: Draft | str | Path | None = None,
    plans: Sequence[Plan],
    trace: bool = False,
    server: str | None = None,
    **options: Any,
) -> SGLangEngine:
    """Open the engine, for `specrl.core.registry`.

    With chains and trees among the plans, it is launched for the chains: SGLang cannot switch to a tree.

    Args:
        target, draft, plans, trace: see `launch_engine`; not used with a running server.
        server: URL of a running server; None: launch one.
        options: options of `attach_engine` or `launch_engine`.
    """
    if server is not None:
        return attach_engine(server, **options)
    chains = [plan for plan in plans if plan.is_chain]
    if any(plan.num_steps for plan in chains):
        plans = chains
    return launch_engine(target, draft, plans=plans, trace=trace, **options)


def launch_engine(
    target: str | Path = "embedded",
    draft: Draft | str | Path | None = None,
    *,
    plans: str | Sequence[str] | Sequence[Plan] = "0,1/1/2,2/1/3,3/1/4",
    python: str | Path | None = None,
    flags: Sequence[str] = (),
    plain_flags: Sequence[str] = (),
    baseline: Literal["alternate", "none"] = "alternate",
    trace: bool = False,
    log_dir: str | Path | None = None,
    start_s: float = 600.0,
    timeout_s: float = 60.0,
    lockstep_s: float = 120.0,
) -> SGLangEngine:
    """Launch SGLang on this machine, with our plugin in lock-step.

    Args:
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: an EAGLE3 directory or a `Draft`; None: a new draft with random weights.
        plans: plans that it can run: chains, which may include 0, or one tree.
        python: Python of an environment with SGLang 0.5.23 and this package; None: this one.
        flags: further flags of sglang.launch_server, for both servers; paths are absolute.
        plain_flags: flags for the server without speculation only. It overlaps its rounds, as SGLang does by default;
            sessions with `plain=True` need '--disable-overlap-schedule' here.
        baseline: 'alternate': launch a second server without speculation on the same device, which takes turns with
            the first; 'none': plain decoding is not measured.
        trace: send traces.
        log_dir: directory for the servers' logs; None: they are deleted with the engine.
        start_s: seconds that starting may take.
        timeout_s: seconds that a round, or a call, may take.
        lockstep_s: seconds that the server waits for the next plan before it goes on by itself, which ends the session.

    Raises:
        ValueError: plans that no server can run, or no SGLang there that the plugin works with.
        ServerError: a server did not start; with the end of its log.
    """
    require(baseline in ("alternate", "none"), "baseline", "'alternate' or 'none'", baseline)
    offered = parse_plans(plans)
    serving = serving_of(offered)
    note = check_version(python)
    if note is not None:
        log.warning("%s", note)
    temporary = tempfile.TemporaryDirectory(prefix="specrl-", ignore_cleanup_errors=True)  # short, for socket paths
    folder = Path(temporary.name)
    logs = folder if log_dir is None else Path(log_dir)
    logs.mkdir(parents=True, exist_ok=True)
    model, draft_directory = str(target_directory(target).resolve()), _draft_directory(draft, target, folder)
    launch = partial(Server.launch, lockstep_s=lockstep_s, python=python, timeout_s=timeout_s)
    sockets = [ROUNDS, *([PLANS] if len(offered) > 1 else []), *([TRACES] if trace else [])]
    words = [*command_line(serving, model, str(draft_directory), folder), "--disable-overlap-schedule", *flags]
    servers, plain = [launch(words, logs / "server.log", folder / "server", sockets=sockets)], None
    if baseline == "alternate":
        words = [*flag_words({"model-path": model}), "--sleep-on-idle", *flags, *plain_flags]
        servers.append(launch(words, logs / "plain.log", folder / "plain", sockets=[ROUNDS]))
        plain = PlainServer(servers[1])
    engine = SGLangEngine(servers[0], offered, plain=plain, draft=draft_directory)
    weakref.finalize(engine, temporary.cleanup)
    first = {"input_ids": [1, 2, 3], "sampling_params": {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True}}
    try:
        for server in servers:
            server.wait(start_s)
            server.client.post("/generate", first)  # the plugin listens once it has served a request
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
    """Use a running server; closing the engine leaves it running.

    While one of the two servers is measured, the other one does nothing: the first waits for a permit, or is paused if
    it has no plugin, and the second gets no other requests. Neither of them may have other clients.

    Args:
        url: 'http://host:port'.
        api_key: API key of the server; None: it needs none.
        sockets: folder with the sockets of its plugin, 'rounds' (with SPECRL_LOCKSTEP), 'plans' and 'traces', on this
            machine; None: only whole requests are reported, with a warning.
        plain_url: URL of a server of the same model without speculation on the same device, the baseline. It needs no
            plugin. None: there is none, and only the ratio over rounds of plan 0 can be reported.
        plain_api_key: its API key; None: `api_key`.
        timeout_s: seconds that a round, or a call, may take.

    Raises:
        ValueError: an unchecked version of SGLang without the plugin; no lock-step; or a `plain_url` that speculates
            or serves another model.
        ServerError: a server does not answer.
    """
    server = Server(url, api_key=api_key, timeout_s=timeout_s, sockets=None if sockets is None else Path(sockets))
    plugin = server.has_socket(ROUNDS)
    if not plugin and server.version not in CHECKED:
        raise ValueError(
            f"SGLang must be {', '.join(CHECKED)}, or have our plugin with its checks, but {url} is {server.version} "
            "without it; give the folder of its sockets"
        )
    plain = None
    if plain_url is not None:
        plain = StreamedPlainServer(Server(plain_url, api_key=plain_api_key or api_key, timeout_s=timeout_s))
        check_baseline(server, plain.server)
    if plugin:
        with Rounds(server.socket(ROUNDS), server.check, timeout_s) as rounds:
            lockstep_s = rounds.lockstep_s
        if not lockstep_s:
            raise ValueError(
                f"{url} must allow lock-step, but does not; set SPECRL_LOCKSTEP=120 there, or leave out sockets="
            )
    else:
        log.warning(
            "the server has no plugin that we can reach, so only whole requests are reported: no plan per round, no "
            "traces, no split of seconds, and the server never waits for us"
        )
        if plain is None:
            log.warning(
                "no speedup can be measured: the server has no plugin, and no plain_url names a server without "
                "speculation on its device"
            )
    plans = _plans_of(server.info, adaptive=server.has_socket(PLANS))
    return SGLangEngine(server, plans, plain=plain, request_level=not plugin)


def _plans_of(info: Mapping[str, Any], *, adaptive: bool) -> tuple[Plan, ...]:
    """Return the plans that a running server can follow: its own one, or all candidates of its adaptive config."""
    if not info.get("speculative_algorithm"):
        return (Plan(0),)
    path = info.get("speculative_adaptive_config")
    if adaptive and info.get("speculative_adaptive") and path and Path(path).is_file():
        tiers = json.loads(Path(path).read_text(encoding="utf-8"))
        steps = {s for bound, tier in tiers.items() if bound.isdigit() for s in tier["candidate_steps"]}
        if steps:
            return tuple(map(Plan, sorted(steps)))
    return (Plan(*(int(info[f"speculative_{name}"]) for name in ("num_steps", "eagle_topk", "num_draft_tokens"))),)


def serving_of(plans: Sequence[Plan]) -> Serving:
    """Return how to serve these plans; a ValueError unless they are one tree, or chains with a draft."""
    if not any(plan.num_steps for plan in plans):
        raise ValueError("plans must include one that drafts, but got only 0; for example '0,1/1/2,3/1/4'")
    trees = [plan for plan in plans if not plan.is_chain]
    if trees and len(plans) > 1:
        raise ValueError(
            f"plans must be chains, among which SGLang can switch, or one tree, but got {', '.join(map(str, plans))}; "
            f"leave out {', '.join(map(str, trees))}, or use it alone"
        )
    if trees:
        return Serving(None, trees[0])
    steps = tuple(sorted({plan.num_steps for plan in plans}))
    return Serving({1: steps}, Plan(steps[-1]))


def command_line(serving: Serving, target: str, draft: str, folder: Path) -> list[str]:
    """Return the flags of sglang.launch_server; the adaptive config is written to `folder`."""
    flags = {**serving.flags(target), "speculative-draft-model-path": draft}
    config = serving.adaptive_config()
    if config is not None:
        path = folder / ADAPTIVE
        path.write_text(json.dumps(config) + "\n", encoding="utf-8")
        flags["speculative-adaptive-config"] = str(path)
    return flag_words(flags)


def _draft_directory(draft: Draft | str | Path | None, target: str | Path, folder: Path) -> Path:
    if draft is None:
        draft = DraftConfig().load(load_target(target))
    if isinstance(draft, Draft):
        draft.save(folder / "draft")
        return folder / "draft"
    return Path(draft).resolve()
