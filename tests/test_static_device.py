"""A round's functions run on CUDA tensors without ever waiting for the device: shown on fake ones, without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_models import OnDevice, fake_cuda
from tiny import CONFIG, TAPS
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from specrl.core.plan import Plan
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.fixed_shape import Shape, StaticRounds
from specrl.decoding.propose import MOST_NODES
from specrl.models import draft as draft_module
from specrl.models.checkpoint import expected_draft_tensors, expected_target_tensors
from specrl.models.config import DraftConfig
from specrl.models.draft import Draft, ServingDraft
from specrl.models.target import Target

GREEDY, MIXED, SAMPLED = (True, True), (False, True), (False, False)
CASES = [(Plan(0), SAMPLED), (Plan(2), GREEDY), (Plan(2), MIXED), (Plan(2), SAMPLED), (Plan(2, 2, 4), MIXED)]
ROOM, CONTEXT = 128, 256


def rounds(dtype: torch.dtype, words: int, rejection: bool) -> StaticRounds:
    """On fake CUDA tensors; call it within `fake_cuda`."""
    made = {name: torch.zeros(shape) for name, shape in expected_target_tensors(CONFIG).items()}
    target = Target(CONFIG, made, device="cuda:0", dtype=dtype)
    c = CONFIG
    config = DraftConfig(
        c.vocab_size, words, c.hidden_size, c.hidden_size, 32, c.num_heads, c.num_kv_heads, c.head_dim, 1e-6, c.rope,
        c.max_position_embeddings, TAPS,
    )  # fmt: skip
    draft = object.__new__(Draft)  # its checks read entries
    draft.config = config
    draft.tensors = {n: torch.zeros(s) for n, s in expected_draft_tensors(config).items() if n not in ("d2t", "t2d")}
    draft.target_ids = None if words == c.vocab_size else torch.zeros(words, dtype=torch.int64)
    serving = ServingDraft(draft, target)
    capacity = StaticRounds.capacity(400)
    return StaticRounds(
        target,
        serving,
        target.new_cache(4, capacity),
        serving.new_cache(4, capacity),
        torch.zeros(4, ROOM + MOST_NODES, 3 * c.hidden_size, dtype=dtype, device="cuda:0"),
        max_context=400,
        taps=TAPS,
        rejection=rejection,
        graphs=Graphs("cpu"),  # calls the functions
    )


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no entries that could be checked."""
    monkeypatch.setattr(draft_module, "check_tensors", lambda *args, **options: None)


@pytest.mark.parametrize(
    ("dtype", "words", "rejection"),
    [(torch.float32, CONFIG.vocab_size - 2, True), (torch.bfloat16, CONFIG.vocab_size, False)],
    ids=["fp32-rejection", "bf16-target-only"],
)
def test_functions_of_a_round_wait_for_nothing(dtype: torch.dtype, words: int, rejection: bool) -> None:
    """Reading an entry, a shape that depends on entries, or a tensor of the host among others would raise here."""
    with fake_cuda():
        static = rounds(dtype, words, rejection)
        for plan, heat in CASES:
            shape = Shape(plan, 2, CONTEXT, 8 if plan.num_steps else 0, *heat)
            with OnDevice():
                if plan.num_steps:
                    static._catch_up(shape)
                    static._draft_tokens(shape)
                verified = static._verify(shape)
                assert static._plain(shape).shape == (2, 1)
            steps, nodes = plan.num_steps, plan.num_draft_tokens
            assert verified.outcome.shape == (2, steps + 2) and verified.path.shape == (2, steps + 1)
            assert verified.logits.shape == (2, nodes, CONFIG.vocab_size) and verified.logits.dtype == torch.float32
            assert verified.features is not None and verified.features.dtype == dtype


HAZARDS: dict[str, Callable[[torch.Tensor], object]] = {
    "an entry is read": lambda x: x.sum().item(),
    "entries become a list": lambda x: x.tolist(),
    "entries decide": lambda x: bool((x > 0).any()),
    "a shape depends on entries": lambda x: x.masked_select(x > 0),
    "a tensor of the host is mixed in": lambda x: x + torch.zeros(3),
    "a copy comes from the host": lambda x: torch.tensor([1, 2], device=x.device),
    "a copy goes to the host": lambda x: x.cpu(),
}


@pytest.mark.parametrize("hazard", HAZARDS.values(), ids=list(HAZARDS))
def test_what_would_wait_does_raise(hazard: Callable[[torch.Tensor], object]) -> None:
    with fake_cuda():
        x = torch.zeros(3, device="cuda:0")
        with OnDevice(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException, AssertionError)):
            hazard(x)


def test_the_plan_of_a_shape_is_all_its_functions_take() -> None:
    """The same functions serve plan 0 without a draft, as plain decoding has it."""
    with fake_cuda():
        made = {name: torch.zeros(shape) for name, shape in expected_target_tensors(CONFIG).items()}
        target = Target(CONFIG, made, device="cuda:0")
        cache = target.new_cache(2, StaticRounds.capacity(100))
        static = StaticRounds(
            target, None, cache, None, None, max_context=100, taps=(), rejection=True, graphs=Graphs("cpu")
        )
        verified = static._verify(Shape(Plan(0), 2, 164, 0, False, False))
    assert verified.outcome.shape == (2, 2) and verified.features is None
