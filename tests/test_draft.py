"""Drafts are made, saved and read as SGLang reads them, and serve the loaded weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_help import change_tensors, hf_model, read_config, rope, token_ids
from safetensors.torch import load_file
from torch import Tensor

import specrl
from specrl.models.attention import TokenSlots
from specrl.models.draft import Draft, ServingDraft, load_draft, new_draft
from specrl.models.target import Target

AUX_LAYERS = (1, 2, 3)
VOCABULARY = torch.tensor([0, 3, 4, 10, 11, 12, 40, 66])
# As SGLang's LlamaForCausalLMEagle3 names them, for hidden 32, 4 heads and 2 key-value heads of 8, MLP 24.
ATTENTION = {"q_proj": (32, 64), "k_proj": (16, 64), "v_proj": (16, 64), "o_proj": (32, 32)}
MLP = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
NORMS = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
SHAPES: dict[str, tuple[int, ...]] = {
    "fc.weight": (32, 96),
    **{f"midlayer.self_attn.{name}.weight": shape for name, shape in ATTENTION.items()},
    **{f"midlayer.mlp.{name}.weight": shape for name, shape in MLP.items()},
    **{f"{name}.weight": (32,) for name in NORMS},
    "lm_head.weight": (8, 32),
}
MAPS = {"d2t": (8,), "t2d": (67,)}


def make_target(directory: Path, family: str = "llama", **changes: Any) -> Target:
    hf_model(family, **changes).save_pretrained(directory)
    return specrl.load_target(directory)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(tmp_path_factory.mktemp("target"), **rope("linear", factor=2.0))


@pytest.fixture(scope="module")
def draft(target: Target) -> Draft:
    """Random weights whose every part matters."""
    made = new_draft(target, vocabulary=VOCABULARY, intermediate_size=24, aux_layers=AUX_LAYERS, seed=3)
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, tensor in made.tensors.items():
        if name.endswith("norm.weight"):
            tensor = torch.rand(tensor.shape, generator=generator) + 0.5
        elif tensor.is_floating_point():
            tensor = torch.randn(tensor.shape, generator=generator) * 0.2
        tensors[name] = tensor
    return Draft(made.config, tensors)


def changed(draft: Draft, **changes: Tensor | None) -> dict[str, Tensor]:
    """The draft's tensors, some exchanged or, with None, left out; a dot in a name is spelt as two underscores."""
    tensors: dict[str, Any] = {**draft.tensors, **{name.replace("__", "."): t for name, t in changes.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_same(ours: Draft, theirs: Draft) -> None:
    assert ours.config == theirs.config and set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor) and ours.tensors[name].dtype == tensor.dtype, name


def test_a_new_draft_is_random_except_for_the_targets_head_and_reproducible(target: Target) -> None:
    made, again, other = (
        new_draft(target, vocabulary=VOCABULARY, intermediate_size=24, aux_layers=AUX_LAYERS, seed=s) for s in (3, 3, 4)
    )
    assert_same(made, again)
    assert not torch.equal(made.tensors["fc.weight"], other.tensors["fc.weight"])
    assert torch.equal(made.tensors["lm_head.weight"], target.head_weight[VOCABULARY])
    assert torch.equal(made.tensors["norm.weight"], target.norm_weight)
    assert made.config.rope == target.config.rope and shapes(made.state_dict()) == {**SHAPES, **MAPS}
    whole = new_draft(target, intermediate_size=24, aux_layers=AUX_LAYERS)
    assert shapes(whole.tensors) == {**SHAPES, "lm_head.weight": (67, 32)} and whole.target_ids is None


def test_the_vocabulary_is_written_as_offsets(draft: Draft, target: Target) -> None:
    assert torch.equal(draft.tensors["d2t"], VOCABULARY - torch.arange(8)) and draft.tensors["d2t"].dtype == torch.int64
    assert draft.target_ids is not None and torch.equal(draft.target_ids, VOCABULARY)
    assert draft.tensors["t2d"].dtype == torch.bool
    assert torch.equal(draft.tensors["t2d"].nonzero()[:, 0], VOCABULARY)
    first = new_draft(target, draft_vocab_size=5, aux_layers=AUX_LAYERS)
    assert first.target_ids is not None and first.target_ids.tolist() == [0, 1, 2, 3, 4]
    assert new_draft(target, draft_vocab_size=67, vocabulary=torch.arange(67), aux_layers=AUX_LAYERS).target_ids is None


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        *(({"draft_vocab_size": size}, r"draft_vocab_size must be in \[1, 67\]") for size in (0, -1, 68)),
        ({"draft_vocab_size": 7, "vocabulary": VOCABULARY}, "draft_vocab_size must be the length of vocabulary"),
        *(
            ({"vocabulary": torch.tensor(ids)}, r"vocabulary must be ascending token ids in \[0, 67\)")
            for ids in ([], [3, 1, 2], [1, 1], [-1, 1], [0.0, 1.0], [[0, 1]], [0, 67], [2, 1, 3])
        ),
        ({"intermediate_size": 0}, "intermediate_size must be"),
        *(({"aux_layers": layers}, "aux_layers must be three") for layers in ((), (1, 2), (3, 2, 1), (0, 1, 2))),
        ({"aux_layers": (1, 2, 4)}, "aux_layers must be layers of the target, below 4"),
        ({"aux_layers": None}, "default aux_layers"),
    ],
)
def test_new_drafts_must_fit_the_target(arguments: dict[str, Any], rule: str, target: Target) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        new_draft(target, **{"aux_layers": AUX_LAYERS, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_draft_reads_back_the_same(draft: Draft, target: Target, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = new_draft(target, aux_layers=AUX_LAYERS)
    for made in (whole, draft):
        made.save(tmp_path / "draft", dtype)
        rounded = {n: t.to(dtype).float() if t.is_floating_point() else t for n, t in made.tensors.items()}
        assert_same(load_draft(tmp_path / "draft"), Draft(made.config, rounded))
    assert read_config(tmp_path / "draft")["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]
    assert {path.name for path in (tmp_path / "draft").iterdir()} == {"config.json", "model.safetensors"}
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert shapes(tensors) == {**SHAPES, **MAPS} and tensors["d2t"].dtype == torch.int64


def test_saving_replaces_a_draft_and_nothing_else(draft: Draft, tmp_path: Path) -> None:
    draft.save(tmp_path / "draft")
    (tmp_path / "draft" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, rule in (("draft", "holds 'notes.txt'"), ("file", "is a file")):
        with pytest.raises(ValueError, match=rule):
            draft.save(tmp_path / name)
    assert (tmp_path / "draft" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


WRONG: list[tuple[str, Tensor | None, str]] = [
    ("model.embed_tokens.weight", torch.ones(67, 32), "is extra"),
    ("fc.bias", torch.ones(32), "is extra"),
    ("norm.weight", torch.full((32,), torch.nan), "finite.*norm.weight"),
    ("lm_head.weight", torch.full((8, 32), torch.inf), "finite.*lm_head.weight"),
    ("norm.weight", torch.ones(32, dtype=torch.int64), "is torch.int64, which is not supported"),
    ("d2t", torch.zeros(8), "is torch.float32, which is not supported"),
    ("t2d", torch.zeros(8, dtype=torch.bool), r"is \(8,\) instead of \(67,\)"),
    *((name, None, "is missing") for name in (*SHAPES, "d2t")),
    *((name, torch.ones(3, 3), r"is \(3, 3\) instead of") for name in (*SHAPES, "d2t")),
]


@pytest.mark.parametrize(("name", "tensor", "rule"), WRONG)
def test_wrong_tensors_are_named(
    name: str, tensor: Tensor | None, rule: str, draft: Draft, target: Target, tmp_path: Path
) -> None:
    message, changes = rule if "finite" in rule else f"{name} {rule}", {name.replace(".", "__"): tensor}
    with pytest.raises(ValueError, match=message):
        Draft(draft.config, changed(draft, **changes))
    serving = ServingDraft(draft, target)
    before = served(serving, target)
    with pytest.raises(ValueError, match=f"^draft version 7: .*{message}"):
        serving.load(changed(draft, **changes), version=7)
    assert serving.version == 0 and torch.equal(served(serving, target), before)
    draft.save(tmp_path / "draft")
    change_tensors(tmp_path / "draft", (name,), **{} if tensor is None else {name.replace(".", "__"): tensor})
    with pytest.raises(ValueError, match=f"^draft: .*{message}"):
        load_draft(tmp_path / "draft")


@pytest.mark.parametrize(
    "d2t",
    [
        [0, 0, 0, 0, 0, 0, 0, 60],  # one past the last
        [-1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, -1],  # an id twice
        [0, 3, 4, 10, 11, 12, 40, 66],  # ids instead of offsets
    ],
)
def test_other_maps_are_refused(d2t: list[int], draft: Draft) -> None:
    with pytest.raises(ValueError, match="d2t must be offsets"):
        Draft(draft.config, changed(draft, d2t=torch.tensor(d2t)))


@pytest.mark.parametrize(("name", "size"), [("vocab_size", 70), ("hidden_size", 64), ("num_hidden_layers", 3)])
def test_a_draft_for_another_target_is_refused(name: str, size: Any, draft: Draft, tmp_path: Path) -> None:
    named = "aux_layers" if name == "num_hidden_layers" else name
    with pytest.raises(ValueError, match=f"{named} must be .*target"):
        ServingDraft(draft, make_target(tmp_path, **{name: size}))


def test_a_draft_that_reads_another_width_is_refused(draft: Draft, target: Target) -> None:
    wide = Draft(replace(draft.config, target_hidden_size=40), changed(draft, fc__weight=torch.ones(32, 120)))
    with pytest.raises(ValueError, match="target_hidden_size must be the target's, 32"):
        ServingDraft(wide, target)


def served(serving: ServingDraft, target: Target, steps: int = 2) -> Tensor:
    """Draft logits [b, steps, Vd] after 9 tokens: from the features, then from the draft's own output."""
    ids = token_ids(2, 9 + steps)
    slots, out = torch.arange(8).expand(2, 8), []
    with torch.inference_mode():
        features = target.prefill(ids[:, :8], target.new_cache(2, 8), aux_layers=AUX_LAYERS).aux_hidden_states
        assert features is not None
        cache = serving.new_cache(2, 8 + steps)
        hidden = serving.decode(ids[:, 1:9], serving.fuse(features), cache, TokenSlots(slots, 8))[:, -1:]
        for step in range(steps):
            out.append(serving.logits(hidden[:, 0]))
            where = TokenSlots(torch.full((2, 1), 8 + step), 9 + step)
            hidden = serving.decode(ids[:, 9 + step : 10 + step], hidden, cache, where)
    return torch.stack(out, 1)


def reference(draft: Draft, target: Target, steps: int = 2) -> Tensor:
    """The same from EAGLE-3's equations, as SGLang computes them, without a cache."""
    c, w, ids = draft.config, draft.tensors, token_ids(2, 9 + steps)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (c.hidden_size,), w[name], c.rms_norm_eps)

    def rotate(x: Tensor) -> Tensor:
        frequencies = c.rope.theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim) / c.rope.factor
        angles = torch.outer(torch.arange(x.shape[2]).float(), frequencies)
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def layer(hidden: Tensor, tokens: Tensor) -> Tensor:
        embedded = norm(target.embedding[tokens], "midlayer.input_layernorm.weight")
        x = torch.cat([embedded, norm(hidden, "midlayer.hidden_norm.weight")], -1)
        q, k, v = (
            F.linear(x, w[f"midlayer.self_attn.{n}_proj.weight"]).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for n in "qkv"
        )
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), w["midlayer.self_attn.o_proj.weight"])
        x = norm(hidden, "midlayer.post_attention_layernorm.weight")
        gate, up = (F.linear(x, w[f"midlayer.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        return hidden + F.linear(F.silu(gate) * up, w["midlayer.mlp.down_proj.weight"])

    with torch.inference_mode():
        features = target.prefill(ids[:, :8], target.new_cache(2, 8), aux_layers=AUX_LAYERS).aux_hidden_states
        assert features is not None
        inputs, out = F.linear(features, w["fc.weight"]), []
        for step in range(steps):
            hidden = layer(inputs, ids[:, 1 : 9 + step])[:, -1:]
            out.append(F.linear(norm(hidden, "norm.weight"), w["lm_head.weight"])[:, 0])
            inputs = torch.cat([inputs, hidden], 1)
    return torch.stack(out, 1)


def test_the_serving_draft_computes_eagle3(draft: Draft, target: Target) -> None:
    ours, theirs = served(ServingDraft(draft, target), target, 3), reference(draft, target, 3)
    assert ours.shape == (2, 3, 8) and theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_matters_so_that_the_comparison_would_notice(name: str, draft: Draft, target: Target) -> None:
    before, serving = reference(draft, target), ServingDraft(draft, target)
    noise = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(5))
    tensors = changed(draft, **{name: draft.tensors[name] + 0.2 * noise, "t2d": None})
    serving.load(tensors, version=1)
    after = served(serving, target)
    assert serving.version == 1 and (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, reference(Draft(draft.config, tensors), target), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_drafts_serve_targets_of_every_family(family: str, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", family)
    made = new_draft(target, draft_vocab_size=20, intermediate_size=24, aux_layers=AUX_LAYERS)
    made.save(tmp_path / "draft")
    ours = served(ServingDraft(load_draft(tmp_path / "draft"), target), target)
    torch.testing.assert_close(ours, reference(made, target), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("ids", [VOCABULARY - torch.tensor([0] * 7 + [1]), VOCABULARY.flip(0)])
def test_another_vocabulary_is_refused_while_a_draft_serves(ids: Tensor, draft: Draft, target: Target) -> None:
    serving = ServingDraft(draft, target)
    before = served(serving, target)
    with pytest.raises(ValueError, match="d2t must stay the same while a draft serves"):
        serving.load(changed(draft, d2t=ids - torch.arange(8)), version=1)
    assert serving.version == 0 and torch.equal(served(serving, target), before)


def test_bfloat16_serving_is_close(draft: Draft, target: Target, tmp_path: Path) -> None:
    make_target(tmp_path, **rope("linear", factor=2.0))  # the same weights
    low = specrl.load_target(tmp_path, dtype="bfloat16")
    ours, exact = served(ServingDraft(draft, low), low), reference(draft, target)
    assert ours.dtype == torch.float32 and 0 < (ours - exact).square().mean().sqrt() < 0.05 * exact.std()
