"""The plugin's parts beside a stand-in for SGLang; tests/sglang runs them in the real one."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.core.clock import VirtualClock, WallClock
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.sglang.client.trace_subscriber import Subscriber
from specrl.sglang.plugin import entry
from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.hooks import Seam
from specrl.sglang.plugin.lookahead import Lookahead, make_lookahead, make_policy
from specrl.sglang.plugin.policy import LearnedPolicy
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.traces import Hooks, Tracer
from specrl.sglang.plugin.wire import Frame, decode, encode

V, H3, N = 7, 6, 4
UNION = [0, 1, 3]


class SGLangParams:
    """As SGLang's AdaptiveSpeculativeParams: always one step."""

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self.told: list[list[int]] = []
        self._cuda_graph_bs: list[int] | None = None

    @property
    def candidate_steps(self) -> list[int]:
        return UNION

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._cuda_graph_bs = cuda_graph_bs

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 1

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        self.told.append(num_correct_drafts_per_req)
        return 1

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return [step]


def policy(directory: Path, table: dict[int, Plan], *, learns: bool = False) -> Path:
    plans = (Plan(0), Plan(1), Plan(3), Plan(3, 2, 6))
    state = AdaptiveChooser(plans).state_dict() if learns else None
    LearnedPolicy(table, plans, state).save(directory)
    return directory


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


# The policy.


def test_a_table_decides_and_sglangs_rule_is_not_asked(tmp_path: Path) -> None:
    settings = Settings(policy=policy(tmp_path, {1: Plan(3), 8: Plan(0)}))
    params = make_policy(SGLangParams, settings, lambda: 4)(3)  # a table may serve several ranks
    assert isinstance(params, SGLangParams)
    assert [params.get_steps_for_batch(b) for b in (1, 7, 8, 30)] == [3, 3, 0, 0]
    assert params.on_verify_complete([2], 1) is None and params.told == []
    assert params.cuda_graph_bs_for_step(3) is None
    params.set_cuda_graph_bs([1, 2])
    assert params.cuda_graph_bs_for_step(3) == [1, 2], "a graph for any batch size at which the plan may be chosen"


@pytest.mark.parametrize(
    ("table", "learns", "ranks", "why"),
    [
        ({1: Plan(2)}, False, 1, "but got 2"),
        ({1: Plan(3, 2, 6)}, False, 1, "must be chains of 0, 1, 3 steps"),
        ({1: Plan(3)}, True, 2, "must be pinned"),
    ],
)
def test_what_cannot_serve_is_refused_and_sglang_goes_on(
    table: dict[int, Plan], learns: bool, ranks: int, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if 2 in {plan.num_steps for plan in table.values()}:
        LearnedPolicy(table, (Plan(2),)).save(tmp_path)
    else:
        policy(tmp_path, table, learns=learns)
    params = make_policy(SGLangParams, Settings(policy=tmp_path), lambda: ranks)(3)
    assert params.get_steps_for_batch(1) == 1 and params.on_verify_complete([1], 1) == 1 and params.told == [[1]]
    assert params.cuda_graph_bs_for_step(3) == [3]
    (line,) = lines(caplog)
    assert line.startswith("SPECRL PLUGIN: the policy is switched off") and (why in line or "must be" in line)


def test_pinned_it_may_serve_several_ranks(tmp_path: Path) -> None:
    settings = Settings(policy=policy(tmp_path, {1: Plan(3)}, learns=True), pin=True)
    assert make_lookahead(settings, UNION, 2, VirtualClock()).steps(1) == 3


def test_a_failure_while_serving_ends_the_policy_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = make_policy(SGLangParams, Settings(policy=policy(tmp_path, {1: Plan(3)})), lambda: 1)(3)

    def fails(observation: object) -> Plan:
        raise RuntimeError("a bug\nof two lines")

    params._mind.chooser.choose = fails
    assert [params.get_steps_for_batch(1) for _ in range(3)] == [1, 1, 1]
    assert params.on_verify_complete([0], 1) == 1
    (line,) = lines(caplog)
    assert "RuntimeError: a bug of two lines" in line and "SGLang's own lookahead goes on" in line


@pytest.mark.parametrize("late", [0, 2])
def test_the_chooser_learns_what_pays_even_from_late_results(late: int, tmp_path: Path) -> None:
    """Three steps cost as much as none here, and all drafts stand: the chooser must settle on three."""
    settings, clock = Settings(policy=policy(tmp_path, {1: Plan(0)}, learns=True)), VirtualClock()
    mind = make_lookahead(settings, UNION, 1, clock)
    assert mind.chooser.plans == (Plan(0), Plan(1), Plan(3)), "no tree, and only what SGLang has buffers for"
    begun: list[int] = []
    for _ in range(400):
        begun.append(mind.steps(2))
        clock.advance(0.01)
        if len(begun) > late:
            steps = begun.pop(0)
            mind.report([steps, steps], 2)
    chosen = [mind.steps(2) for _ in range(50)]
    assert chosen.count(3) >= 45
    assert isinstance(mind.chooser, AdaptiveChooser)
    seconds = {e.plan.num_steps: e.seconds for e in mind.chooser.estimates(2)}
    assert seconds[3] == pytest.approx(0.01, rel=0.05)


def test_a_round_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    learned: list[object] = []
    chooser = LearnedPolicy({1: Plan(1)}, (Plan(1),)).chooser()
    chooser.learn = learned.append  # type: ignore[method-assign, assignment]
    mind = Lookahead(chooser, VirtualClock())
    mind.report([1], 1)  # nothing begun
    mind.steps(2)
    mind.report([1], 1)  # another batch size
    mind.steps(1)
    mind.report([3], 1)  # more drafts than the plan has
    assert learned == []
    mind.steps(1)
    mind.report([1], 1)
    assert len(learned) == 1


def test_plans_are_followed_over_a_socket(short: Path) -> None:
    params = make_policy(SGLangParams, Settings(plans=short / "p"), lambda: 1)(3)
    assert params.get_steps_for_batch(1) == 1 and params.on_verify_complete([1], 1) == 1, "none given: SGLang's rule"
    assert (short / "p").stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(60.0)
        peer.connect(str(short / "p"))
        stream = peer.makefile("rwb")

        def tell(text: str) -> dict[str, Any]:
            stream.write(text.encode() + b"\n")
            stream.flush()
            answer: dict[str, Any] = json.loads(stream.readline())
            return answer

        assert tell('{"plans": {"1": 3, "8": "0"}}') == {"ok": True, "rounds": 1}
        assert [params.get_steps_for_batch(b) for b in (1, 9)] == [3, 0]
        for wrong in ("nonsense", "[]", '{"plans": {}}', '{"plans": {"1": 2}}', '{"plans": {"1": "3/2/6"}}'):
            assert "error" in tell(wrong)
        assert params.get_steps_for_batch(1) == 3
        stream.close()
    assert params.get_steps_for_batch(1) == 3, "the last plan holds when its sender has gone"
    params._mind.close()


# Settings, entry point and seams.


def test_nothing_set_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECRL_POLICY", raising=False)
    monkeypatch.delenv("SPECRL_TRACES", raising=False)
    monkeypatch.setitem(sys.modules, "sglang", None)  # any import of it would fail
    before = set(sys.modules)
    entry.register()
    assert set(sys.modules) == before


def test_without_the_seams_it_says_so_once_and_registers_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECRL_TRACES", f"unix:{tmp_path}/t")
    monkeypatch.setitem(sys.modules, "sglang", None)
    entry.register()
    (line,) = lines(caplog)
    assert "tracing is switched off" in line and "sglang" in line


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("SPECRL_TRACES", "/no/scheme", "must be written unix:"),
        ("SPECRL_TRACES_RATE", "0", "must be in"),
        ("SPECRL_TRACES_RATE", "much", "must be a number"),
        ("SPECRL_TRACES_RING", "0", "at least 1"),
        ("SPECRL_POLICY_PIN", "yes", "0 or 1"),
    ],
)
def test_wrong_settings_are_named(name: str, value: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{why}"):
        Settings.of({"SPECRL_TRACES": "unix:/t", name: value})


def test_a_seam_that_changed_is_named() -> None:
    assert Seam("json.dumps", ("obj",)).check() is json.dumps
    for seam, why in (
        (Seam("json.no_such_thing", ()), "must have json.no_such_thing"),
        (Seam("json.dumps", ("batch",)), "json.dumps must take batch, but takes obj"),
        (Seam("pathlib.Path", (), (("vanish", ()),)), "pathlib.Path must have vanish"),
    ):
        with pytest.raises(ValueError, match=why):
            seam.check()


def test_the_plugin_runs_with_what_sglang_has(tmp_path: Path) -> None:
    """NumPy, torch and safetensors: anything else that we depend on is not even installed here."""
    code = """
import sys
for name in ("gymnasium", "rich", "matplotlib", "jsonargparse", "transformers", "stable_baselines3", "yaml"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gymnasium" else found(name, *rest)
import specrl.sglang.plugin.entry, specrl.sglang.plugin.lookahead, specrl.sglang.plugin.traces
import specrl.sglang.client.trace_subscriber, specrl.sglang.plugin.hooks
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# Traces.


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's (108 bytes)."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        yield Path(name)


class Request:
    def __init__(self, rid: str, **custom: object) -> None:
        self.rid, self.over = rid, False
        self.sampling_params = types.SimpleNamespace(custom_params=custom or None, temperature=0.7, top_k=50)

    def finished(self) -> bool:
        return self.over


class Serving:
    """SGLang's side of a few requests that decode a chain of three, deterministically."""

    def __init__(self, hooks: Hooks, requests: list[Request], prompt: int = 5) -> None:
        self.hooks, self.requests = hooks, requests
        self.lengths = [prompt] * len(requests)
        self.generator = torch.Generator().manual_seed(0)
        self.tokens: dict[str, list[int]] = {r.rid: [] for r in requests}
        self.last = torch.zeros(len(requests), dtype=torch.int64)
        mode = types.SimpleNamespace(is_idle=lambda: False)
        self.batch = types.SimpleNamespace(reqs=requests, forward_mode=mode)

    def prefill(self, cached: int = 0) -> None:
        count = len(self.requests)
        self.batch.extend_lens = [n - cached for n in self.lengths]
        self.batch.prefix_lens = [cached] * count
        self.batch.input_ids = torch.randint(0, V, (sum(self.batch.extend_lens),), generator=self.generator)
        features = torch.randn(len(self.batch.input_ids), H3, generator=self.generator)
        rows = self.batch.input_ids.split(self.batch.extend_lens)
        for request, row in zip(self.requests, rows, strict=True):
            self.tokens[request.rid] += row.tolist()

        def shifts(worker: object, batch: Any, states: object, following: object) -> str:
            batch.input_ids = None
            return "drafted"

        assert self.hooks.around_prefill(shifts, "worker", self.batch, features, "next") == "drafted"
        self.last = torch.randint(0, V, (count,), generator=self.generator)

    def round(self, accepted: int = 2) -> None:
        count = len(self.requests)
        drafts = torch.randint(0, V, (count, N), generator=self.generator)
        drafts[:, 0] = self.last
        index = torch.full((count, N), -1, dtype=torch.int32)
        index[:, : accepted + 1] = torch.arange(count)[:, None] * N + torch.arange(accepted + 1)
        verified = types.SimpleNamespace(draft_token=drafts.flatten(), draft_token_num=N, topk=1, spec_steps=N - 1)
        output = types.SimpleNamespace(
            next_token_logits=torch.randn(count * N, V, generator=self.generator),
            hidden_states=torch.randn(count * N, H3, generator=self.generator),
        )
        self.batch.seq_lens = torch.tensor(self.lengths, dtype=torch.int32)
        result = ("predict", "lengths", index)
        assert self.hooks.around_verify(lambda *_: result, verified, self.batch, output) is result
        for b, request in enumerate(self.requests):
            self.tokens[request.rid] += drafts[b, : accepted + 1].tolist()
            self.lengths[b] += accepted + 1
        self.last = torch.randint(0, V, (count,), generator=self.generator)

    def finish(self) -> None:
        for request in self.requests:
            request.over = True


def until(condition: Any, seconds: float = 120.0) -> None:
    clock = WallClock()
    began = clock.now()
    while not condition():
        assert clock.now() - began < seconds, "it did not happen in time"
        Event().wait(0.001)


@pytest.fixture
def hooks(short: Path) -> Iterator[Hooks]:
    made = Hooks(Settings(traces=short / "t", ring=4), lambda: 0)
    tracer = made.tracer
    assert tracer is not None
    yield made
    tracer.ring.close()


def tracer_of(hooks: Hooks) -> Tracer:
    assert hooks.tracer is not None
    return hooks.tracer


Subscribe = Callable[[Hooks, Path], Subscriber]


@pytest.fixture
def subscribe() -> Iterator[Subscribe]:
    with ExitStack() as opened:

        def connect(hooks: Hooks, path: Path) -> Subscriber:
            ring = tracer_of(hooks).ring
            subscriber = opened.enter_context(Subscriber(path / "t", timeout_s=60.0))
            until(lambda: ring.wanted)
            return subscriber

        yield connect


def collected(subscriber: Subscriber, requests: int) -> list[Trace]:
    """Traces until so many requests have ended."""
    out: list[Trace] = []
    for trace in subscriber.traces():
        out.append(trace)
        requests -= len(trace.finished)
        if not requests:
            break
    return out


def test_every_request_comes_from_its_prompt_to_its_end(hooks: Hooks, short: Path, subscribe: Subscribe) -> None:
    subscriber = subscribe(hooks, short)
    serving = Serving(hooks, [Request("a"), Request("b")])
    serving.prefill()
    for accepted in (2, 0, 3):
        serving.round(accepted)
        until(lambda: not tracer_of(hooks).ring._waiting)
    serving.finish()
    traces = collected(subscriber, 2)
    for number, request in enumerate(serving.requests):
        own = [trace for trace in traces if trace.request_ids[0] == number]
        assert [t.plan for t in own] == [None, Plan(3), Plan(3), Plan(3)] and own[-1].finished == (number,)
        tokens = [int(t.tokens[0, row]) for t in own for row in t.path[0].tolist() if row >= 0]
        assert tokens == serving.tokens[request.rid]
        starts = [int(t.positions[0]) for t in own]
        assert starts == [0, 5, 8, 9]
        prefill = own[0]
        assert prefill.features.shape == (1, 5, H3) and prefill.logits[0].argmax(-1).tolist() == tokens[1:6]
        assert own[1].parents.tolist() == [[-1, 0, 1, 2]] and own[1].temperatures == (0.7,)
    assert subscriber.incomplete == subscriber.dropped == 0


def test_a_learner_takes_the_traces(hooks: Hooks, short: Path, subscribe: Subscribe) -> None:
    from specrl.agents.draft.sequences import Assembler

    subscriber = subscribe(hooks, short)
    serving = Serving(hooks, [Request("a")])
    serving.prefill()
    serving.round(1)
    serving.round(2)
    serving.finish()
    assembler = Assembler()
    (sequence,) = assembler.add(collected(subscriber, 1))
    assert sequence.tokens.tolist() == serving.tokens["a"] and assembler.skipped == 0


def test_the_links_of_a_tree_become_parents() -> None:
    from specrl.sglang.client.trace_subscriber import _trace

    # 0 -> 1, 2; 1 -> 3; 2 -> 4, 5
    row = {
        "tokens": torch.arange(6),
        "features": torch.zeros(6, H3),
        "logits": torch.zeros(6, V),
        "path": torch.tensor([0, 2, 5, -1]),
        "positions": torch.tensor(9),
        "children": torch.tensor([1, 3, 4, -1, -1, -1]),
        "siblings": torch.tensor([-1, 2, -1, -1, 5, -1]),
    }
    assert _trace(0, Plan(3, 2, 6), row, 0.0).parents.tolist() == [[-1, 0, 0, 1, 2, 2]]


def test_nobody_listening_costs_nothing_and_keeps_nothing(hooks: Hooks) -> None:
    serving = Serving(hooks, [Request("a")])
    serving.prefill()
    for _ in range(10):
        serving.round()
    ring = tracer_of(hooks).ring
    assert not ring._waiting and ring.dropped == 0 and not tracer_of(hooks)._live


def test_serving_waits_for_nobody_and_drops_are_counted(hooks: Hooks, short: Path, subscribe: Subscribe) -> None:
    """It does not read at all: the socket's buffer fills, then the ring, and the rest is dropped."""
    subscriber = subscribe(hooks, short)
    serving = Serving(hooks, [Request(str(i)) for i in range(64)])
    serving.prefill()
    ring = tracer_of(hooks).ring
    for _ in range(300):
        serving.round()
    assert len(ring._waiting) <= 4 and ring.dropped > 100
    serving.finish()
    read = []
    for frame in subscriber.frames():  # now it reads: what it missed is told, and what it lacks is left out
        read.append(frame)
        subscriber.take(frame)
        if frame.said["kind"] == "finished":
            break
    assert subscriber.dropped == ring.dropped
    assert subscriber.incomplete > 0


def test_a_subscriber_that_went_is_forgotten_and_served_again(hooks: Hooks, short: Path, subscribe: Subscribe) -> None:
    first = subscribe(hooks, short)
    serving = Serving(hooks, [Request("a")])
    serving.prefill()
    serving.round()
    first.close()
    ring = tracer_of(hooks).ring

    def gone() -> bool:
        serving.round()
        return not ring.wanted

    until(gone)
    assert not ring._waiting
    again = subscribe(hooks, short)
    fresh = Serving(hooks, [Request("b")])
    fresh.prefill()
    fresh.round()
    fresh.finish()
    serving.finish()
    traces = collected(again, 1)
    tokens = [int(t.tokens[0, row]) for t in traces for row in t.path[0].tolist() if row >= 0]
    assert tokens == fresh.tokens["b"] and hooks.safe.on


def test_one_who_never_reads_keeps_nobody_else_from_it(hooks: Hooks, short: Path, subscribe: Subscribe) -> None:
    """The thread that sends is in the middle of a frame, which the first one's buffer does not hold."""
    ring = tracer_of(hooks).ring
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(str(short / "t"))
        until(lambda: ring.wanted)
        ring.put(lambda: Frame({"kind": "round"}, {"logits": torch.zeros(1 << 20)}))
        assert stuck.recv(1)
        first, again = ring._peer, subscribe(hooks, short)
        until(lambda: ring._peer not in (None, first))
        ring.put(lambda: Frame({"kind": "finished"}, {}))
        assert next(again.frames()).said["kind"] == "finished"


def test_a_killed_subscriber_does_not_hurt(hooks: Hooks, short: Path) -> None:
    code = f"""
from specrl.sglang.client.trace_subscriber import Subscriber
for frame in Subscriber({str(short / "t")!r}).frames(): print(frame.said["kind"], flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until(lambda: tracer_of(hooks).ring.wanted)
    serving = Serving(hooks, [Request("a")])
    serving.prefill()
    assert process.stdout is not None and process.stdout.readline() == "prefill\n"
    process.kill()
    process.wait()
    process.stdout.close()

    def gone() -> bool:
        serving.round()
        return not tracer_of(hooks).ring.wanted

    until(gone)
    assert hooks.safe.on


def test_requests_opt_out_and_sampling_takes_requests_whole(short: Path, subscribe: Subscribe) -> None:
    hooks = Hooks(Settings(traces=short / "t", rate=0.5), lambda: 0)
    subscriber = subscribe(hooks, short)
    requests = [Request(f"r{i}") for i in range(200)] + [Request(f"no{i}", specrl_traces=False) for i in range(50)]
    serving = Serving(hooks, requests)
    for _ in range(2):
        serving.round()
    first, second = (next(subscriber.frames()).said["requests"] for _ in range(2))
    assert first == second and not any(rid.startswith("no") for rid in first)
    assert 70 < len(first) < 130  # of 200 at one half: the ids are fixed, so this never changes
    tracer_of(hooks).ring.close()


def test_a_prompt_that_came_from_a_cache_is_left_out(hooks: Hooks, short: Path, subscribe: Subscribe) -> None:
    subscriber = subscribe(hooks, short)
    serving = Serving(hooks, [Request("a")])
    serving.prefill(cached=2)
    serving.round()
    serving.finish()
    frames = subscriber.frames()
    assert [trace for _ in range(3) for trace in subscriber.take(next(frames))] == []
    assert subscriber.incomplete == 1


def test_a_failure_ends_tracing_and_not_serving(hooks: Hooks, short: Path, caplog: Any, subscribe: Subscribe) -> None:
    subscribe(hooks, short)
    broken = types.SimpleNamespace()  # nothing that we read
    assert hooks.around_verify(lambda *_: "result", broken, broken, broken) == "result"
    assert hooks.around_prefill(lambda *_: "drafted", broken, broken, broken, broken) == "drafted"
    (line,) = lines(caplog)
    assert line.startswith("SPECRL PLUGIN: tracing is switched off (AttributeError")


def test_sglangs_own_errors_are_passed_on(hooks: Hooks) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("SGLang's")

    with pytest.raises(RuntimeError, match="SGLang's"):
        hooks.around_verify(fails, None, None, None)
    assert hooks.safe.on


def test_other_ranks_hand_out_nothing(short: Path) -> None:
    hooks = Hooks(Settings(traces=short / "t"), lambda: 1)
    assert hooks.tracer is None and not (short / "t").exists()


def test_a_socket_in_use_or_a_file_is_not_taken(hooks: Hooks, short: Path) -> None:
    (short / "file").write_text("precious")
    for name, why in (("t", "is in use"), ("file", "must not take a file's place")):
        with pytest.raises(ValueError, match=why):
            Tracer(Settings(traces=short / name), Failsafe("a", "b"), VirtualClock())
    assert (short / "file").read_text() == "precious"


def test_frames_are_safetensors() -> None:
    frame = Frame(
        {"kind": "round", "requests": ["a"]}, {"x": torch.arange(3), "y": torch.tensor([[0.5, -1.0], [3.0, 0.0]])}
    )
    again = decode(encode(frame)[8:])
    assert again.said == frame.said and all(torch.equal(again.tensors[n], t) for n, t in frame.tensors.items())
    empty = decode(encode(Frame({"kind": "finished"}, {}))[8:])
    assert empty.said == {"kind": "finished"} and not empty.tensors
    for damaged in (b"", b"\x80\x04pickle", encode(frame)[8:40]):
        with pytest.raises(ValueError, match="must be safetensors"):
            decode(damaged)
