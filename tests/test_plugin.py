"""The plugin's parts with a small stand-in for SGLang; tests/sglang runs them in SGLang itself."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from traced import put_request

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.draft.sequences import Assembler
from specrl.core.clock import VirtualClock
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.sglang.client.http import ServerFailed
from specrl.sglang.client.plugin_client import Plans
from specrl.sglang.client.trace_subscriber import Subscriber
from specrl.sglang.plugin import entry
from specrl.sglang.plugin.hooks import HookTarget
from specrl.sglang.plugin.lookahead import Lookahead, make_lookahead, make_policy
from specrl.sglang.plugin.policy import LearnedPolicy
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.traces import TraceHooks, TraceQueue
from specrl.sglang.plugin.transport import Message, bind, decode, encode, parse_address

V, H3, N = 7, 6, 4
CANDIDATES = [0, 1, 3]


class SGLangParams:
    """The interface of SGLang's AdaptiveSpeculativeParams: always one step."""

    candidate_steps = CANDIDATES

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        self.reports: list[list[int]] = []
        self._cuda_graph_bs: list[int] | None = None

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._cuda_graph_bs = cuda_graph_bs

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 1

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        self.reports.append(num_correct_drafts_per_req)
        return 1

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return [step]


def settings_of(directory: Path, table: dict[int, Plan], *, learns: bool = False, pin: bool = False) -> Settings:
    plans = (Plan(0), Plan(1), Plan(3), Plan(3, 2, 6), Plan(2))
    LearnedPolicy(table, plans, AdaptiveChooser(plans).state_dict() if learns else None).save(directory)
    return Settings(policy=directory, pin=pin)


def only_error(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    return line


# The policy.


def test_a_table_decides_and_sglangs_rule_is_not_asked(tmp_path: Path) -> None:
    params = make_policy(SGLangParams, settings_of(tmp_path, {1: Plan(3), 8: Plan(0)}), lambda: 4)(3)
    assert isinstance(params, SGLangParams)
    assert [params.get_steps_for_batch(b) for b in (1, 7, 8, 30)] == [3, 3, 0, 0]
    assert params.on_verify_complete([2], 1) is None and params.reports == []
    assert params.cuda_graph_bs_for_step(3) is None
    params.set_cuda_graph_bs([1, 2])
    assert params.cuda_graph_bs_for_step(3) == [1, 2], "a graph for any batch size at which the plan may be chosen"
    pinned = settings_of(tmp_path, {1: Plan(3)}, learns=True, pin=True)
    assert make_lookahead(pinned, CANDIDATES, 2, VirtualClock()).steps(1) == 3, "it may serve several ranks"


@pytest.mark.parametrize(
    ("table", "learns", "ranks", "rule"),
    [
        ({1: Plan(2)}, False, 1, "chains of 0, 1, 3"),
        ({1: Plan(3, 2, 6)}, False, 1, "chains of 0, 1, 3"),
        ({1: Plan(3)}, True, 2, "SPECRL_POLICY_PIN=1"),
    ],
)
def test_a_policy_that_cannot_serve_is_refused_and_sglang_goes_on(
    table: dict[int, Plan], learns: bool, ranks: int, rule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_policy(SGLangParams, settings_of(tmp_path, table, learns=learns), lambda: ranks)(3)
    assert params.get_steps_for_batch(1) == 1 and params.on_verify_complete([1], 1) == 1 and params.reports == [[1]]
    assert params.cuda_graph_bs_for_step(3) == [3]
    assert "the policy is switched off" in only_error(caplog) and rule in caplog.text


def test_a_failure_while_serving_ends_the_policy_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = make_policy(SGLangParams, settings_of(tmp_path, {1: Plan(3)}), lambda: 1)(3)

    def fails(observation: object) -> Plan:
        raise RuntimeError("a bug\nof two lines")

    params.controller.chooser.choose = fails
    assert [params.get_steps_for_batch(1) for _ in range(3)] == [1, 1, 1]
    assert params.on_verify_complete([0], 1) == 1
    assert "RuntimeError: a bug of two lines" in only_error(caplog)


@pytest.mark.parametrize("late", [0, 2])
def test_the_chooser_learns_the_best_plan_even_from_late_results(late: int, tmp_path: Path) -> None:
    """Three steps cost as much as none here, and all drafts are accepted: the chooser must settle on three."""
    clock = VirtualClock()
    lookahead = make_lookahead(settings_of(tmp_path, {1: Plan(0)}, learns=True), CANDIDATES, 1, clock)
    assert lookahead.chooser.plans == (Plan(0), Plan(1), Plan(3)), "no tree, and only plans with buffers in SGLang"
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
    for begun, reported in ((2, [1]), (1, [3])):  # another batch size, more drafts than the plan has
        lookahead.steps(begun)
        lookahead.report(reported, 1)
    assert learned == []
    lookahead.steps(1)
    lookahead.report([1], 1)
    assert len(learned) == 1


def test_plans_are_taken_from_a_socket(short: Path) -> None:
    params = make_policy(SGLangParams, Settings(plans=f"ipc://{short}/p"), lambda: 1)(3)
    assert params.get_steps_for_batch(1) == 1 and params.on_verify_complete([1], 1) == 1, "SGLang's rule before plans"
    assert (short / "p").stat().st_mode & 0o777 == 0o600
    with Plans(f"ipc://{short}/p", lambda: None, 60.0) as client:
        client.send({"plans": {"1": 3, "8": "0"}})
        assert client.receive().header == {"ok": True, "rounds": 1}
        assert [params.get_steps_for_batch(b) for b in (1, 9)] == [3, 0]
        wrong: dict[str, Any]
        for wrong in ({}, {"plans": []}, {"plans": {}}, {"plans": {"1": 2}}, {"plans": {"1": "3/2/6"}}):
            client.send(wrong)
            assert "error" in client.receive().header
        client.set(Plan(1))
        client.set(Plan(1))
        with pytest.raises(ValueError, match="plan must be"):
            client.set(Plan(2))
        client.set(Plan(3))
    assert params.get_steps_for_batch(1) == 3, "the last valid table stays, also without its sender"
    params.controller.close()


# Settings, entry point and hooked functions.


@pytest.mark.parametrize("traces", ["", "unix:/tmp/t"])
def test_without_settings_or_sglang_nothing_is_hooked(
    traces: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPECRL_TRACES", traces)
    monkeypatch.setitem(sys.modules, "sglang", None)  # any import of it fails
    before = set(sys.modules)
    entry.register()
    if traces:
        assert "tracing is switched off" in only_error(caplog) and "sglang" in caplog.text
    else:
        assert set(sys.modules) == before and not caplog.text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("SPECRL_TRACES", ("/no/scheme", "unix:relative", "tcp://0.0.0.0:5000", "unix:/" + 120 * "x")),
        ("SPECRL_TRACES_RATE", ("0", "much")),
        ("SPECRL_TRACES_MAX_BYTES", ("0",)),
        ("SPECRL_TRACES_RING", ("64",)),
        ("SPECRL_POLICY_PIN", ("yes",)),
        ("SPECRL_LOCKSTEP", ("900", "9")),  # the second one without SPECRL_ROUNDS
    ],
)
def test_wrong_settings_are_named(name: str, values: tuple[str, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            Settings.from_environment({"SPECRL_TRACES": "unix:/t", name: value})


def test_settings_are_read_from_the_environment() -> None:
    values = {"ROUNDS": "unix:/x", "LOCKSTEP": "30", "POLICY": "/p", "POLICY_PIN": "1", "TRACES_MAX_BYTES": "9"}
    settings = Settings.from_environment({f"SPECRL_{name}": text for name, text in values.items()})
    assert settings == Settings(rounds="ipc:///x", lockstep_s=30.0, policy=Path("/p"), pin=True, traces_max_bytes=9)
    assert Settings.from_environment({"SPECRL_POLICY": "tcp://127.0.0.1:5000"}).plans == "tcp://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        (HookTarget("json.no_such_thing", ()), "json.no_such_thing"),
        (HookTarget("json.dumps", ("batch",)), "json.dumps must take batch, but takes obj"),
        (HookTarget("pathlib.Path", (), (("vanish", ()),)), "pathlib.Path must have vanish"),
    ],
)
def test_a_hooked_function_that_changed_is_named(target: HookTarget, rule: str) -> None:
    assert HookTarget("json.dumps", ("obj",)).check() is not None
    with pytest.raises(ValueError, match=rule):
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


Subscribe = Callable[[], Subscriber]


@pytest.fixture
def queue(short: Path) -> Iterator[TraceQueue]:
    made = TraceQueue(f"ipc://{short}/t", 20_000)
    yield made
    made.close()


@pytest.fixture
def subscribe(queue: TraceQueue, short: Path) -> Iterator[Subscribe]:
    with ExitStack() as opened, ThreadPoolExecutor(1) as pool:

        def connect() -> Subscriber:
            connecting = pool.submit(Subscriber, short / "t", 60.0)
            while not connecting.done():
                queue.send()
            return opened.enter_context(connecting.result())

        yield connect


def collect(queue: TraceQueue, subscriber: Subscriber, requests: int) -> list[Trace]:
    """Return the traces until this number of requests have ended."""
    traces: list[Trace] = []
    ended = 0
    while ended < requests:
        queue.send()
        for message in subscriber.messages(0.01):
            traces += subscriber.take(message)
            ended += message.header["kind"] == "finished"
    return traces


def test_every_request_is_traced_from_its_prompt_to_its_end(queue: TraceQueue, subscribe: Subscribe) -> None:
    subscriber = subscribe()
    expected = [put_request(queue, rid, V, H3) for rid in ("a", "bb")]
    traces = collect(queue, subscriber, 2)
    for number, tokens in enumerate(expected):
        prefill, *rounds = (trace for trace in traces if trace.request_ids[0] == number)
        assert [t.plan for t in rounds] == [Plan(1)] * 4 and rounds[-1].finished == (number,)
        assert [int(t.positions[0]) for t in (prefill, *rounds)] == [0, 4, 5, 6, 7]
        assert prefill.features.shape == (1, 4, H3) and prefill.logits[0].argmax(-1).tolist() == tokens[1:5]
        assert rounds[0].parents.tolist() == [[-1, 0]] and rounds[0].temperatures == (0.7,)
    assert subscriber.incomplete == subscriber.dropped == 0
    assembler = Assembler()
    assert [s.tokens.tolist() for s in assembler.add(traces)] == expected and assembler.counts["skipped"] == 0


def test_requests_with_a_cached_prompt_or_a_dropped_round_are_left_out(queue: TraceQueue, subscribe: Subscribe) -> None:
    subscriber = subscribe()
    put_request(queue, "cached", V, H3, start=2)
    put_request(queue, "dropped", V, H3, rounds=(4, 6, 7))
    assert Assembler().add(collect(queue, subscriber, 2)) == [] and subscriber.incomplete == 2


def test_messages_are_stored_for_a_client_only_and_up_to_the_bound(
    queue: TraceQueue, subscribe: Subscribe, caplog: pytest.LogCaptureFixture
) -> None:
    put_request(queue, "a", V, H3)
    queue.send()
    assert queue.waiting_bytes == queue.dropped == 0
    client = subscribe()
    for _ in range(2):
        queue.put({"kind": "prefill"}, {"tokens": torch.zeros(2_501, dtype=torch.int64)})
    assert queue.dropped == 2 and caplog.text.count("raise SPECRL_TRACES_MAX_BYTES") == 1
    client.close()
    while queue.wanted:
        put_request(queue, "b", V, H3)
        queue.send()
    assert queue.waiting_bytes == 0


@pytest.mark.parametrize("reads_later", [True, False])
def test_a_client_that_does_not_read_is_not_waited_for(
    queue: TraceQueue, subscribe: Subscribe, reads_later: bool
) -> None:
    """It fills the socket, then the queue up to its bytes; the rest is dropped, and counted."""
    slow, sent = subscribe(), 0
    while queue.dropped < 10:
        put_request(queue, str(sent), 300, 600)
        queue.send()
        assert queue.waiting_bytes <= 20_000
        sent += 1
    if reads_later:
        collect(queue, slow, sent)
        assert slow.dropped == queue.dropped and queue.waiting_bytes == 0
    else:
        other = subscribe()
        tokens = put_request(queue, "other", V, H3)
        (sequence,) = Assembler().add(collect(queue, other, 1))
        assert sequence.tokens.tolist() == tokens
        with pytest.raises(ServerFailed, match="another client"):
            collect(queue, slow, sent)


# Hooks around SGLang's functions.


def request(rid: str, **custom: object) -> Any:
    sampling = SimpleNamespace(custom_params=custom or None, temperature=0.7, top_k=50)
    return SimpleNamespace(rid=rid, sampling_params=sampling, finished=lambda: False)


def connect(hooks: TraceHooks, path: Path) -> Subscriber:
    hooks.around_ingest(lambda *_: [], "scheduler")
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(Subscriber, path, 60.0)
        while not connecting.done():
            assert hooks.around_ingest(lambda *_: [], "scheduler") == []
        return connecting.result()


def test_prefills_and_trees_are_sent_without_requests_that_opted_out(short: Path) -> None:
    hooks = TraceHooks(Settings(traces=f"ipc://{short}/t", traces_rate=0.5), lambda: 0, lambda: "7")
    requests = [request(f"r{i}") for i in range(20)] + [request(f"no{i}", specrl_traces=False) for i in range(5)]
    mode, rows, count = SimpleNamespace(is_idle=lambda: False), torch.arange(25), 25
    batch = SimpleNamespace(reqs=requests, forward_mode=mode, seq_lens=torch.full((count,), 2))
    batch.extend_lens, batch.prefix_lens, batch.input_ids = [2] * count, [0] * count, torch.arange(2 * count)
    verified = SimpleNamespace(draft_token=torch.arange(N * count), draft_token_num=N, topk=2, spec_steps=2)
    verified.retrieve_next_token = torch.tensor([1, 3, -1, -1]).repeat(count)  # 0 -> 1, 2; 1 -> 3
    verified.retrieve_next_sibling = torch.tensor([-1, 2, -1, -1]).repeat(count)
    output = SimpleNamespace(next_token_logits=torch.zeros(N * count, 100), hidden_states=torch.zeros(N * count, H3))
    result = ("predict", "lengths", rows[:, None] * N + torch.tensor([0, 1, 3]))
    with connect(hooks, short / "t") as subscriber:
        assert hooks.around_prefill(lambda *_: "drafted", "", batch, torch.zeros(2 * count, H3), "") == "drafted"
        assert hooks.around_verify(lambda *_: result, verified, batch, output) is result
        traces = list[Trace]()
        while not traces:
            hooks.around_ingest(lambda *_: [], "scheduler")
            for message in subscriber.messages(0.01):
                traces += subscriber.take(message)
        header = message.header
        last = subscriber.take(Message({"kind": "finished", "requests": header["requests"]}))
    chosen = [int(rid.removeprefix("r")) for rid in header["requests"]]
    assert 5 < len(chosen) < 15, "half of 20 by their fixed ids, and none that opted out"
    assert [prompt.tokens[0].tolist() for prompt in traces] == [[2 * row, 2 * row + 1] for row in chosen]
    for row, trace in zip(chosen, last, strict=True):
        assert trace.tokens[0].tolist() == [N * row + i for i in range(N)] and trace.plan == Plan(2, 2, 4)
        assert (trace.parents[0].tolist(), trace.path[0].tolist()) == ([-1, 0, 0, 1], [0, 1, 3])
        assert (trace.draft_version, int(trace.positions[0])) == (7, 2)
    assert hooks.queue is not None
    hooks.queue.close()


def test_our_failures_end_tracing_and_sglangs_errors_are_passed_on(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("SGLang's")

    hooks, broken = TraceHooks(Settings(traces=f"ipc://{short}/t"), lambda: 0, str), SimpleNamespace()
    with pytest.raises(RuntimeError, match="SGLang's"):
        hooks.around_verify(fails, broken, broken, broken)
    assert hooks.safe.on and hooks.queue is not None
    with connect(hooks, short / "t"):
        assert hooks.around_verify(lambda *_: "result", broken, broken, broken) == "result"
        assert hooks.around_prefill(lambda *_: "drafted", broken, broken, broken, broken) == "drafted"
    assert "tracing is switched off (AttributeError" in only_error(caplog)
    hooks.queue.close()
    other_rank = TraceHooks(Settings(traces=f"ipc://{short}/other"), lambda: 1, str)
    other_rank.around_ingest(lambda *_: [], "scheduler")
    assert other_rank.queue is None and not (short / "other").exists()
