"""The plugin's parts with a small stand-in for SGLang; tests/sglang runs them in SGLang itself."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.draft.sequences import Assembler
from specrl.core.clock import VirtualClock
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.sglang.client.http import ServerFailed
from specrl.sglang.client.trace_subscriber import Subscriber
from specrl.sglang.plugin import entry
from specrl.sglang.plugin.hooks import HookTarget
from specrl.sglang.plugin.lookahead import Lookahead, make_lookahead, make_policy
from specrl.sglang.plugin.policy import LearnedPolicy
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.traces import TraceHooks
from specrl.sglang.plugin.transport import Message, bind, decode, encode, parse_address

V, H3, N = 7, 6, 4
CANDIDATES = [0, 1, 3]


class SGLangParams:
    """As SGLang's AdaptiveSpeculativeParams: always one step."""

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self.reports: list[list[int]] = []
        self._cuda_graph_bs: list[int] | None = None

    @property
    def candidate_steps(self) -> list[int]:
        return CANDIDATES

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._cuda_graph_bs = cuda_graph_bs

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 1

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        self.reports.append(num_correct_drafts_per_req)
        return 1

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return [step]


def policy(directory: Path, table: dict[int, Plan], *, learns: bool = False) -> Path:
    plans = (Plan(0), Plan(1), Plan(3), Plan(3, 2, 6), Plan(2))
    state = AdaptiveChooser(plans).state_dict() if learns else None
    LearnedPolicy(table, plans, state).save(directory)
    return directory


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


# The policy.


def test_a_table_decides_and_sglangs_rule_is_not_asked(tmp_path: Path) -> None:
    settings = Settings(policy=policy(tmp_path, {1: Plan(3), 8: Plan(0)}))
    params = make_policy(SGLangParams, settings, lambda: 4)(3)  # a table may serve several ranks
    assert isinstance(params, SGLangParams)
    assert [params.get_steps_for_batch(b) for b in (1, 7, 8, 30)] == [3, 3, 0, 0]
    assert params.on_verify_complete([2], 1) is None and params.reports == []
    assert params.cuda_graph_bs_for_step(3) is None
    params.set_cuda_graph_bs([1, 2])
    assert params.cuda_graph_bs_for_step(3) == [1, 2], "a graph for any batch size at which the plan may be chosen"


@pytest.mark.parametrize(
    ("table", "learns", "ranks", "why"),
    [
        ({1: Plan(2)}, False, 1, "chains of 0, 1, 3"),
        ({1: Plan(3, 2, 6)}, False, 1, "chains of 0, 1, 3"),
        ({1: Plan(3)}, True, 2, "SPECRL_POLICY_PIN=1"),
    ],
)
def test_a_policy_that_cannot_serve_is_refused_and_sglang_goes_on(
    table: dict[int, Plan], learns: bool, ranks: int, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_policy(SGLangParams, Settings(policy=policy(tmp_path, table, learns=learns)), lambda: ranks)(3)
    assert params.get_steps_for_batch(1) == 1 and params.on_verify_complete([1], 1) == 1 and params.reports == [[1]]
    assert params.cuda_graph_bs_for_step(3) == [3]
    (line,) = errors(caplog)
    assert line.startswith("SPECRL PLUGIN: the policy is switched off") and why in line


def test_a_pinned_policy_may_serve_several_ranks(tmp_path: Path) -> None:
    settings = Settings(policy=policy(tmp_path, {1: Plan(3)}, learns=True), pin=True)
    assert make_lookahead(settings, CANDIDATES, 2, VirtualClock()).steps(1) == 3


def test_a_failure_while_serving_ends_the_policy_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = make_policy(SGLangParams, Settings(policy=policy(tmp_path, {1: Plan(3)})), lambda: 1)(3)

    def fails(observation: object) -> Plan:
        raise RuntimeError("a bug\nof two lines")

    params.controller.chooser.choose = fails
    assert [params.get_steps_for_batch(1) for _ in range(3)] == [1, 1, 1]
    assert params.on_verify_complete([0], 1) == 1
    (line,) = errors(caplog)
    assert "RuntimeError: a bug of two lines" in line


@pytest.mark.parametrize("late", [0, 2])
def test_the_chooser_learns_the_best_plan_even_from_late_results(late: int, tmp_path: Path) -> None:
    """Three steps cost as much as none here, and all drafts are accepted: the chooser must settle on three."""
    settings, clock = Settings(policy=policy(tmp_path, {1: Plan(0)}, learns=True)), VirtualClock()
    lookahead = make_lookahead(settings, CANDIDATES, 1, clock)
    assert lookahead.chooser.plans == (Plan(0), Plan(1), Plan(3)), "no tree, and only what SGLang has buffers for"
    begun: list[int] = []
    for _ in range(400):
        begun.append(lookahead.steps(2))
        clock.advance(0.01)
        if len(begun) > late:
            steps = begun.pop(0)
            lookahead.report([steps, steps], 2)
    assert [lookahead.steps(2) for _ in range(50)].count(3) >= 45
    assert isinstance(lookahead.chooser, AdaptiveChooser)
    seconds = {e.plan.num_steps: e.seconds for e in lookahead.chooser.estimates(2)}
    assert seconds[3] == pytest.approx(0.01, rel=0.05)


def test_a_report_that_fits_no_round_is_ignored() -> None:
    learned: list[object] = []
    chooser = LearnedPolicy({1: Plan(1)}, (Plan(1),)).chooser()
    chooser.learn = learned.append  # type: ignore[method-assign, assignment]
    lookahead = Lookahead(chooser, VirtualClock())
    lookahead.report([1], 1)  # nothing begun
    lookahead.steps(2)
    lookahead.report([1], 1)  # another batch size
    lookahead.steps(1)
    lookahead.report([3], 1)  # more drafts than the plan has
    assert learned == []
    lookahead.steps(1)
    lookahead.report([1], 1)
    assert len(learned) == 1


def test_plans_are_taken_from_a_socket(short: Path) -> None:
    params = make_policy(SGLangParams, Settings(plans=f"ipc://{short}/p"), lambda: 1)(3)
    assert params.get_steps_for_batch(1) == 1 and params.on_verify_complete([1], 1) == 1, "SGLang's rule before plans"
    assert (short / "p").stat().st_mode & 0o777 == 0o600
    requests: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
    with requests as client:
        client.linger, client.rcvtimeo = 0, 60_000
        client.connect(f"ipc://{short}/p")

        def answer(text: str) -> Any:
            client.send_string(text)
            return client.recv_json()

        assert answer('{"plans": {"1": 3, "8": "0"}}') == {"ok": True, "rounds": 1}
        assert [params.get_steps_for_batch(b) for b in (1, 9)] == [3, 0]
        for wrong in ("nonsense", "[]", '{"plans": {}}', '{"plans": {"1": 2}}', '{"plans": {"1": "3/2/6"}}'):
            assert "error" in answer(wrong)
    assert params.get_steps_for_batch(1) == 3, "the last valid table stays, also without its sender"
    params.controller.close()


# Settings, entry point and hooked functions.


def test_without_settings_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLICY", "TRACES", "ROUNDS"):
        monkeypatch.delenv(f"SPECRL_{name}", raising=False)
    monkeypatch.setitem(sys.modules, "sglang", None)  # any import of it would fail
    before = set(sys.modules)
    entry.register()
    assert set(sys.modules) == before


def test_without_the_hooked_functions_one_line_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECRL_TRACES", f"unix:{tmp_path}/t")
    monkeypatch.setitem(sys.modules, "sglang", None)
    entry.register()
    (line,) = errors(caplog)
    assert "tracing is switched off" in line and "sglang" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SPECRL_TRACES", "/no/scheme"),
        ("SPECRL_TRACES", "unix:relative"),
        ("SPECRL_TRACES", "tcp://0.0.0.0:5000"),
        ("SPECRL_TRACES", "unix:/" + 120 * "x"),
        ("SPECRL_TRACES_RATE", "0"),
        ("SPECRL_TRACES_RATE", "much"),
        ("SPECRL_TRACES_MAX_BYTES", "0"),
        ("SPECRL_TRACES_RING", "64"),
        ("SPECRL_POLICY_PIN", "yes"),
        ("SPECRL_LOCKSTEP", "900"),
        ("SPECRL_LOCKSTEP", "9"),  # without SPECRL_ROUNDS
    ],
)
def test_wrong_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        Settings.from_environment({"SPECRL_TRACES": "unix:/t", name: value})


def test_settings_are_read_from_the_environment() -> None:
    found = Settings.from_environment(
        {"SPECRL_ROUNDS": "unix:/x", "SPECRL_LOCKSTEP": "30", "SPECRL_POLICY": "tcp://127.0.0.1:5000"}
    )
    assert found == Settings(rounds="ipc:///x", lockstep_s=30.0, plans="tcp://127.0.0.1:5000")
    found = Settings.from_environment(
        {"SPECRL_POLICY": "/p", "SPECRL_TRACES": "ipc:///t", "SPECRL_TRACES_MAX_BYTES": "9"}
    )
    assert found == Settings(policy=Path("/p"), traces="ipc:///t", traces_max_bytes=9)
    assert Settings.from_environment({"SPECRL_POLICY_PIN": "1"}) is None


def test_a_hooked_function_that_changed_is_named() -> None:
    assert HookTarget("json.dumps", ("obj",)).check() is not None
    for target, name in (
        (HookTarget("json.no_such_thing", ()), "json.no_such_thing"),
        (HookTarget("json.dumps", ("batch",)), "json.dumps must take batch, but takes obj"),
        (HookTarget("pathlib.Path", (), (("vanish", ()),)), "pathlib.Path must have vanish"),
    ):
        with pytest.raises(ValueError, match=name):
            target.check()


def test_the_plugin_runs_with_the_packages_that_sglang_has() -> None:
    code = """
import sys
for name in ("gymnasium", "rich", "matplotlib", "jsonargparse", "transformers", "stable_baselines3", "yaml"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gymnasium" else found(name, *rest)
import specrl.sglang.plugin.entry, specrl.sglang.plugin.lookahead, specrl.sglang.plugin.traces
import specrl.sglang.plugin.rounds, specrl.sglang.plugin.hooks, specrl.sglang.client.trace_subscriber
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# The transport.


def test_messages_are_json_and_raw_tensors() -> None:
    tensors = {
        "x": torch.arange(3),
        "y": torch.tensor([[0.5, -1.0], [3.0, 0.0]]).T,
        "z": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
    }
    parts = [bytes(part) for part in encode(Message({"kind": "round", "requests": ["a"]}, tensors))]
    again = decode(parts)
    assert again.header == {"kind": "round", "requests": ["a"]}
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())
    assert decode([b'{"kind": "finished"}']) == Message({"kind": "finished"}, {})
    for damaged in ([], [b"\x80\x04pickle"], [b"[]"], parts[:2], [parts[0], parts[1][:-1], *parts[2:]]):
        with pytest.raises(ValueError, match="a message must be"):
            decode(damaged)


def test_an_address_in_use_or_a_file_is_not_taken(short: Path) -> None:
    (short / "file").write_text("precious")
    with bind(zmq.ROUTER, f"ipc://{short}/t", 1), bind(zmq.ROUTER, "tcp://127.0.0.1:0", 1) as tcp:
        for endpoint in (
            f"ipc://{short}/t",
            f"ipc://{short}/file",
            str(tcp.getsockopt_string(zmq.LAST_ENDPOINT)),
            f"ipc://{short}/no/t",
        ):
            with pytest.raises(ValueError, match="choose another"):
                bind(zmq.ROUTER, endpoint, 1)
    assert (short / "file").read_text() == "precious"
    assert parse_address("unix:/a", "x") == parse_address("ipc:///a", "x") == "ipc:///a"


# Traces.


class Request:
    def __init__(self, rid: str, **custom: object) -> None:
        self.rid, self.over = rid, False
        self.sampling_params = types.SimpleNamespace(custom_params=custom or None, temperature=0.7, top_k=50)

    def finished(self) -> bool:
        return self.over


class Serving:
    """SGLang's side of a few requests that decode a chain of three, deterministically."""

    def __init__(self, hooks: TraceHooks, requests: list[Request], prompt: int = 5) -> None:
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


def turn(hooks: TraceHooks) -> None:
    """A turn of SGLang's scheduler with nothing to do."""
    assert hooks.around_ingest(lambda *_: [], "scheduler") == []


@pytest.fixture
def hooks(short: Path) -> Iterator[TraceHooks]:
    made = TraceHooks(Settings(traces=f"ipc://{short}/t", traces_max_bytes=20_000), lambda: 0)
    turn(made)
    yield made
    assert made.queue is not None
    made.queue.close()


Subscribe = Callable[[TraceHooks], Subscriber]


@pytest.fixture
def subscribe(short: Path) -> Iterator[Subscribe]:
    with ExitStack() as opened, ThreadPoolExecutor(1) as pool:

        def connect(hooks: TraceHooks) -> Subscriber:
            connecting = pool.submit(Subscriber, short / "t", 60.0)
            while not connecting.done():
                turn(hooks)
            return opened.enter_context(connecting.result())

        yield connect


def messages(hooks: TraceHooks, subscriber: Subscriber) -> Iterator[Message]:
    while True:
        turn(hooks)
        yield from subscriber.messages(0.01)


def collect(hooks: TraceHooks, subscriber: Subscriber, requests: int) -> list[Trace]:
    """Traces until so many requests have ended."""
    out: list[Trace] = []
    for message in messages(hooks, subscriber):
        out += subscriber.take(message)
        if sum(len(trace.finished) for trace in out) == requests:
            return out
    raise AssertionError


def test_every_request_comes_from_its_prompt_to_its_end(hooks: TraceHooks, subscribe: Subscribe) -> None:
    subscriber = subscribe(hooks)
    serving = Serving(hooks, [Request("a"), Request("b")])
    serving.prefill()
    for accepted in (2, 0, 3):
        serving.round(accepted)
    serving.finish()
    traces = collect(hooks, subscriber, 2)
    for number, request in enumerate(serving.requests):
        own = [trace for trace in traces if trace.request_ids[0] == number]
        assert [t.plan for t in own] == [None, Plan(3), Plan(3), Plan(3)] and own[-1].finished == (number,)
        tokens = [int(t.tokens[0, row]) for t in own for row in t.path[0].tolist() if row >= 0]
        assert tokens == serving.tokens[request.rid]
        assert [int(t.positions[0]) for t in own] == [0, 5, 8, 9]
        prefill = own[0]
        assert prefill.features.shape == (1, 5, H3) and prefill.logits[0].argmax(-1).tolist() == tokens[1:6]
        assert own[1].parents.tolist() == [[-1, 0, 1, 2]] and own[1].temperatures == (0.7,)
    assert subscriber.incomplete == subscriber.dropped == 0
    assembler = Assembler()
    sequences = assembler.add(traces)
    assert [s.tokens.tolist() for s in sequences] == [*serving.tokens.values()] and assembler.counts["skipped"] == 0


def test_the_links_of_a_tree_become_parents(hooks: TraceHooks, subscribe: Subscribe) -> None:
    # 0 -> 1, 2; 1 -> 3; 2 -> 4, 5
    tensors = {
        "tokens": torch.arange(6)[None],
        "features": torch.zeros(1, 6, H3),
        "logits": torch.zeros(1, 6, V),
        "path": torch.tensor([[0, 2, 5, -1]]),
        "positions": torch.tensor([1]),
        "children": torch.tensor([[1, 3, 4, -1, -1, -1]]),
        "siblings": torch.tensor([[-1, 2, -1, -1, 5, -1]]),
    }
    subscriber = subscribe(hooks)
    prompt = {"tokens": torch.zeros(1, dtype=torch.int64), "features": torch.zeros(1, H3)}
    header = {"kind": "round", "requests": ["a"], "plan": "3/2/6", "temperatures": [0.0]}
    subscriber.take(Message({"kind": "prefill", "requests": ["a"], "start": 0}, prompt))
    subscriber.take(Message(header, tensors))
    (trace,) = subscriber.take(Message({"kind": "finished", "requests": ["a"]}))
    assert trace.parents.tolist() == [[-1, 0, 0, 1, 2, 2]]


def test_without_a_client_nothing_is_kept(hooks: TraceHooks) -> None:
    serving = Serving(hooks, [Request("a")])
    serving.prefill()
    for _ in range(10):
        serving.round()
    assert hooks.queue is not None and hooks.queue.waiting_bytes == hooks.queue.dropped == 0


def test_serving_waits_for_no_client_and_drops_are_counted(hooks: TraceHooks, subscribe: Subscribe) -> None:
    """A client that does not read fills the socket, then the queue up to its bytes; the rest is dropped."""
    subscriber = subscribe(hooks)
    serving = Serving(hooks, [Request(str(i)) for i in range(32)])
    serving.prefill()
    queue = hooks.queue
    assert queue is not None
    while queue.dropped < 10:
        serving.round()
        assert queue.waiting_bytes <= 20_000
    serving.finish()
    for message in messages(hooks, subscriber):  # now it reads
        subscriber.take(message)
        if message.header["kind"] == "finished":
            break
    assert subscriber.dropped == queue.dropped and subscriber.incomplete > 0
    assert queue.waiting_bytes == 0


def test_a_message_beyond_the_bound_is_logged_once(
    hooks: TraceHooks, subscribe: Subscribe, caplog: pytest.LogCaptureFixture
) -> None:
    subscribe(hooks)
    serving = Serving(hooks, [Request(str(i)) for i in range(200)])
    serving.round()
    serving.round()
    assert hooks.queue is not None and hooks.queue.dropped == 2
    assert caplog.text.count("raise SPECRL_TRACES_MAX_BYTES") == 1


def test_a_client_that_went_is_forgotten_and_the_next_is_served(hooks: TraceHooks, subscribe: Subscribe) -> None:
    first = subscribe(hooks)
    serving = Serving(hooks, [Request("a")])
    serving.prefill()
    queue = hooks.queue
    assert queue is not None
    first.close()
    while queue.wanted:
        serving.round()
    assert queue.waiting_bytes == 0
    again = subscribe(hooks)
    fresh = Serving(hooks, [Request("b")])
    fresh.prefill()
    fresh.round()
    fresh.finish()
    serving.finish()
    traces = collect(hooks, again, 1)
    tokens = [int(t.tokens[0, row]) for t in traces for row in t.path[0].tolist() if row >= 0]
    assert tokens == fresh.tokens["b"] and hooks.safe.on


def test_a_client_that_never_reads_does_not_keep_the_next_one_out(hooks: TraceHooks, subscribe: Subscribe) -> None:
    stuck = subscribe(hooks)
    serving = Serving(hooks, [Request(str(i)) for i in range(32)])
    queue = hooks.queue
    assert queue is not None
    while not queue.dropped:
        serving.round()
    again = subscribe(hooks)
    serving.round()
    serving.finish()
    kinds = [next(messages(hooks, again)).header["kind"] for _ in range(2)]
    assert kinds == ["round", "finished"]
    with pytest.raises(ServerFailed, match="another client"):
        for _ in messages(hooks, stuck):
            pass


def test_requests_opt_out_and_sampling_takes_requests_whole(short: Path, subscribe: Subscribe) -> None:
    hooks = TraceHooks(Settings(traces=f"ipc://{short}/t", traces_rate=0.5), lambda: 0)
    turn(hooks)
    subscriber = subscribe(hooks)
    requests = [Request(f"r{i}") for i in range(200)] + [Request(f"no{i}", specrl_traces=False) for i in range(50)]
    serving = Serving(hooks, requests)
    serving.round()
    serving.round()
    first, second = (next(messages(hooks, subscriber)).header["requests"] for _ in range(2))
    assert first == second and not any(rid.startswith("no") for rid in first)
    assert 70 < len(first) < 130  # of 200 at one half: the ids are fixed, so this never changes
    assert hooks.queue is not None
    hooks.queue.close()


def test_a_prompt_that_was_read_from_a_cache_is_left_out(hooks: TraceHooks, subscribe: Subscribe) -> None:
    subscriber = subscribe(hooks)
    serving = Serving(hooks, [Request("a")])
    serving.prefill(cached=2)
    serving.round()
    serving.finish()
    assert [trace for _ in range(3) for trace in subscriber.take(next(messages(hooks, subscriber)))] == []
    assert subscriber.incomplete == 1


def test_a_failure_ends_tracing_and_not_serving(hooks: TraceHooks, caplog: Any, subscribe: Subscribe) -> None:
    subscribe(hooks)
    broken = types.SimpleNamespace()  # nothing that the hooks read
    assert hooks.around_verify(lambda *_: "result", broken, broken, broken) == "result"
    assert hooks.around_prefill(lambda *_: "drafted", broken, broken, broken, broken) == "drafted"
    (line,) = errors(caplog)
    assert line.startswith("SPECRL PLUGIN: tracing is switched off (AttributeError")


def test_sglangs_own_errors_are_passed_on(hooks: TraceHooks) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("SGLang's")

    with pytest.raises(RuntimeError, match="SGLang's"):
        hooks.around_verify(fails, None, None, None)
    assert hooks.safe.on


def test_other_ranks_send_nothing(short: Path) -> None:
    hooks = TraceHooks(Settings(traces=f"ipc://{short}/t"), lambda: 1)
    turn(hooks)
    assert hooks.queue is None and not (short / "t").exists()
