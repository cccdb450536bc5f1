from __future__ import annotations

import pytest
import torch
from tiny import AUX_LAYERS, Listed, prompts, tiny_draft, tiny_target, with_vocabulary

from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Completion, Trace
from specrl.decoding.engine import LocalEngine
from specrl.testing.agent import made_up_round

PLANS = parse_plans("3/1/4,0,3/4/10,1/1/2,2/2/4,5/1/6")


def test_the_values_of_a_round_agree_with_its_correct_drafts() -> None:
    done = made_up_round(Plan(3), 4, [3, 0, 1, 1], seconds=0.5)
    assert done.batch_size == 4 and done.seconds == 0.5
    assert done.accept_length == pytest.approx(1 + 5 / 4)
    assert done.histogram().tolist() == [1, 2, 0, 1]
    assert done.reached() == [4, 3, 1, 1]
    with pytest.raises(AssertionError, match="more drafts accepted than proposed"):
        made_up_round(Plan(2), 1, [3])


class Ticking(VirtualClock):
    """A clock on which every reading takes a second."""

    def now(self) -> float:
        self.advance(1.0)
        return super().now()


def test_the_parts_of_a_round_add_up_and_exclude_prefill() -> None:
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64, clock=Ticking())
    session = engine.start(Listed([Request((1, 2), 4, ignore_eos=True)]), batch_size=2, seed=0)
    rounds = [session.round(plan) for plan in PLANS * 2]
    for done in rounds:
        assert (done.draft_s, done.verify_s, done.other_s) == (1.0, 1.0, 1.0) and done.seconds == 3.0
        assert done.prefill_s == (1.0 if done.finished else 0.0)
    assert any(done.finished for done in rounds)


def serve(temperature: float, reduced: bool) -> tuple[dict[int, tuple[int, ...]], list[Trace]]:
    """The texts of finished requests, and the traces of 18 rounds of 3 requests."""
    draft = with_vocabulary(tiny_draft(), (1, 2, 4, 5, 8)) if reduced else tiny_draft()
    listed = [Request(p, 16, temperature) for n in (1, 6) for p in prompts(4, n, seed=n)]
    engine = LocalEngine(tiny_target(), draft, max_context=128)
    session = engine.start(Listed(listed), batch_size=3, seed=0, trace=True)
    finished: list[Completion] = []
    for index in range(18):
        finished += session.round(PLANS[index % len(PLANS)]).finished
    return {c.request_id: c.prompt + c.tokens for c in finished}, session.drain()


@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_traces_hold_the_targets_outputs_at_every_verified_node(temperature: float, reduced: bool) -> None:
    """Features and logits of accepted and rejected nodes equal a forward pass over the node's whole text."""
    target = tiny_target()
    texts, traces = serve(temperature, reduced)
    rejected = branched = 0
    for trace in traces:
        nodes = trace.tokens.shape[1]
        if trace.plan is not None:
            assert nodes == trace.plan.num_draft_tokens and trace.path.shape[1] == trace.plan.num_steps + 1
        for b, request in enumerate(trace.request_ids.tolist()):
            start, parents = int(trace.positions[b]), trace.parents[b].tolist()
            path = [row for row in trace.path[b].tolist() if row >= 0]
            assert path[0] == 0 and all(parents[row] == before for before, row in zip(path, path[1:], strict=False))
            rejected += nodes - len(path)
            branched += path != list(range(len(path)))
            if request not in texts:
                continue
            text = texts[request]
            committed = text[start : start + len(path)]  # shorter where the request ended
            assert tuple(trace.tokens[b][path].tolist())[: len(committed)] == committed
            for node in range(nodes):
                branch, row = [], node
                while row >= 0:
                    branch.append(int(trace.tokens[b, row]))
                    row = parents[row]
                ids = torch.tensor([[*text[:start], *reversed(branch)]])
                alone = target.prefill(ids, target.new_cache(1, ids.shape[1]), aux_layers=AUX_LAYERS)
                assert alone.aux_hidden_states is not None
                torch.testing.assert_close(trace.logits[b, node], alone.logits[0, -1], rtol=0, atol=1e-3)
                torch.testing.assert_close(trace.features[b, node], alone.aux_hidden_states[0, -1], rtol=0, atol=1e-3)
    assert len(texts) >= 4 and rejected > 50 and branched > 0


def test_a_trace_names_its_temperatures_its_draft_and_finished_requests() -> None:
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    listed = Listed([Request((1, 2), 3, 0.5, ignore_eos=True), Request((3,), 9, ignore_eos=True)])
    session = engine.start(listed, batch_size=2, seed=0, trace=True)
    rounds = [session.round(Plan(1)), session.round(Plan(2, 2, 4))]
    engine.load_draft(tiny_draft().state_dict(), version=7)
    rounds.append(session.round(Plan(0)))
    traces = session.drain()
    prefills, of_rounds = ([t for t in traces if (t.plan is None) == prefill] for prefill in (True, False))
    first = [(t.temperatures, t.tokens.tolist()) for t in prefills[:2]]
    assert first == [((0.5,), [[1, 2]]), ((0.0,), [[3]])]
    for done, trace in zip(rounds, of_rounds, strict=True):
        assert set(trace.finished) == {c.request_id for c in done.finished}
    assert [t.draft_version for t in of_rounds] == [0, 0, 7]
