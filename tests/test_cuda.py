"""On a GPU, graphs decode the same tokens as live shapes, and a round waits for the device once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.decoding import engine as local
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.engine import LocalEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLANS = parse_plans("0,1/1/2,3/1/4,5/1/6,2/2/4,3/4/10")


def engine(static: bool | None = None, device: str = "cuda", dtype: torch.dtype = torch.float32) -> LocalEngine:
    return LocalEngine(tiny_target(device, dtype), tiny_draft(), max_context=400, static=static, clock=VirtualClock())


def decoded(engine: LocalEngine, rounds: int = 60, temperature: float = 0.0) -> dict[int, tuple[int, ...]]:
    """Decode requests while plan and batch size change every round."""
    listed = [Request(text, 24, temperature, ignore_eos=True) for n in (1, 5) for text in prompts(8, n, seed=n)]
    session = engine.start(Listed(listed), batch_size=3, max_batch_size=7, seed=0)
    draws = np.random.default_rng(0)
    done: dict[int, tuple[int, ...]] = {}
    for _ in range(rounds):
        session.resize(int(draws.integers(1, 8)))
        session.measure_plain()
        finished = session.round(PLANS[draws.integers(len(PLANS))]).finished
        done |= {c.request_id: c.tokens for c in finished}
    return done


def test_graphs_decode_the_same_tokens_as_live_shapes() -> None:
    ours = decoded(engine())
    assert ours == decoded(engine(static=False)) == decoded(engine(device="cpu")) and len(ours) > 8


def test_they_do_if_few_graphs_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "Graphs", lambda device, pool: Graphs(device, max_graphs=3, pool=pool))
    assert decoded(engine()) == decoded(engine(static=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
def test_a_round_has_no_hidden_synchronisation(temperature: float, dtype: torch.dtype) -> None:
    listed = [Request(text, 380, temperature, ignore_eos=True) for text in prompts(3, 5)]
    session = engine(dtype=dtype).start(Listed(listed), batch_size=3, max_batch_size=4, seed=0)
    for plan in PLANS:
        for _ in range(3):  # capture
            session.round(plan)
        session.measure_plain()
        torch.cuda.set_sync_debug_mode("error")
        try:
            session.round(plan)
            session.measure_plain()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_graphs_serve_new_weights_without_another_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs("cuda")
    monkeypatch.setattr(local, "Graphs", lambda device, pool: graphs)
    other = {name: t * (1.0 if name in ("d2t", "t2d") else 0.5) for name, t in tiny_draft().tensors.items()}
    listed = Listed([Request(text, 300, ignore_eos=True) for text in prompts(4, 6)])
    results = []
    for captured in (True, False):  # loaded between rounds that replay, or before the first
        graphs.clear()
        ours = engine()
        if not captured:
            ours.load_draft(other, version=1)
        session = ours.start(listed, batch_size=4, seed=0)
        session.prepare(Plan(4))
        before = len(graphs)
        if captured:
            ours.load_draft(other, version=1)
        results.append([session.round(Plan(4)).correct_drafts.tolist() for _ in range(10)])
        assert before and len(graphs) - before <= 1  # a wider catch-up
    assert results[0] == results[1]
