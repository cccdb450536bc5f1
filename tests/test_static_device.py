"""The functions of a round run on (fake) CUDA tensors without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from graph_models import OnDevice, fake_cuda
from tiny import AUX_LAYERS, CONFIG
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from specrl.core.plan import Plan
from specrl.decoding import state as state_module
from specrl.decoding.batch import Batch
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.fixed_shape import FixedShapeRunner, Shape
from specrl.decoding.state import SessionConfig, SessionState
from specrl.models import draft as draft_module
from specrl.models.checkpoint import expected_draft_tensors, expected_target_tensors
from specrl.models.config import DraftArchitecture
from specrl.models.draft import Draft, ServingDraft
from specrl.models.target import Target

GREEDY, MIXED, SAMPLED = (True, True), (False, True), (False, False)
CASES = [(Plan(0), SAMPLED), (Plan(2), GREEDY), (Plan(2), MIXED), (Plan(2), SAMPLED), (Plan(2, 2, 4), MIXED)]
CONTEXT = 256


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no entries to check; the batch shares memory with NumPy, so its tensors are real."""
    monkeypatch.setattr(draft_module, "check_tensors", lambda *args, **options: None)
    batch = Batch(4, 1000, "cpu")
    monkeypatch.setattr(state_module, "Batch", lambda *args: batch)


def target(dtype: torch.dtype = torch.float32) -> Target:
    zeros = {name: torch.zeros(shape) for name, shape in expected_target_tensors(CONFIG).items()}
    return Target(CONFIG, zeros, device="cuda:0", dtype=dtype)


def serving(target: Target, reduced: bool) -> ServingDraft:
    shared = {field.name: getattr(CONFIG, field.name, None) for field in fields(DraftArchitecture)}
    size = CONFIG.vocab_size - 2 * reduced
    own = {"draft_vocab_size": size, "target_hidden_size": CONFIG.hidden_size, "aux_layers": AUX_LAYERS}
    config = DraftArchitecture(**{**shared, **own})  # type: ignore[arg-type]
    zeros = {n: torch.zeros(s) for n, s in expected_draft_tensors(config).items() if n not in ("d2t", "t2d")}
    draft = Draft(config, zeros)
    draft.target_ids = torch.zeros(size, dtype=torch.int64) if reduced else None
    return ServingDraft(draft, target)


def functions(target: Target, draft: ServingDraft | None, rejection: bool = True) -> dict[str, Callable[[Shape], Any]]:
    """The functions of a round on fake CUDA tensors; call it within `fake_cuda`."""
    config = SessionConfig(4, 4, 400, 0, rejection, aux_layers=() if draft is None else AUX_LAYERS)
    state = SessionState(target, draft, config, fixed_shapes=True)
    state.batch.padded_temperatures = torch.ones(4, device="cuda:0")
    return FixedShapeRunner(state, Graphs("cpu")).functions  # called, not captured


@pytest.mark.parametrize(
    ("dtype", "reduced", "rejection"),
    [(torch.float32, True, True), (torch.bfloat16, False, False)],
    ids=["fp32-rejection", "bf16-target-only"],
)
def test_functions_of_a_round_do_not_wait(dtype: torch.dtype, reduced: bool, rejection: bool) -> None:
    """They read no entry, have no shape that depends on entries, and use no tensor of the host."""
    with fake_cuda():
        model = target(dtype)
        run = functions(model, serving(model, reduced), rejection)
        for plan, greedy in CASES:
            shape = Shape(plan, 2, CONTEXT, 8 if plan.num_steps else 0, *greedy)
            with OnDevice():
                if plan.num_steps:
                    run["catch_up"](shape)
                    run["draft"](shape)
                outcome, path, logits, hidden_states = run["verify"](shape)
                assert run["plain"](shape).shape == (2,)
            steps, count = plan.num_steps, plan.num_draft_tokens
            assert outcome.shape == (2, steps + 2) and path.shape == (2, steps + 1)
            assert logits.shape == (2, count, CONFIG.vocab_size) and logits.dtype == torch.float32
            assert hidden_states.shape == (2, count, 3 * CONFIG.hidden_size) and hidden_states.dtype == dtype


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
def test_operations_that_wait_raise(hazard: Callable[[torch.Tensor], object]) -> None:
    with fake_cuda():
        x = torch.zeros(3, device="cuda:0")
        with OnDevice(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException, AssertionError)):
            hazard(x)


def test_without_a_draft_the_same_functions_serve_plan_0() -> None:
    with fake_cuda():
        outcome, _, _, hidden = functions(target(), None)["verify"](Shape(Plan(0), 2, 164, 0, False, False))
    assert outcome.shape == (2, 2) and hidden is None
