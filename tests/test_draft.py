"""Drafts are made, saved and read as SGLang reads them, and serve what was loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_help import change_config, change_tensors, hf_model, read_config, rope, token_ids
from safetensors.torch import load_file
from torch import Tensor

import specrl
from specrl.models.draft import Draft, ServingDraft, load_draft, new_draft
from specrl.models.target import Target

AUX_LAYERS = (1, 2, 3)
VOCABULARY = torch.tensor([0, 3, 4, 10, 11, 12, 40, 66])
# As SGLang's LlamaForCausalLMEagle3 names them, for hidden 32, 4 heads and 2 key-value heads of 8, MLP 24.
SHAPES = {
    "fc.weight": (32, 96),
    "midlayer.self_attn.q_proj.weight": (32, 64),
    "midlayer.self_attn.k_proj.weight": (16, 64),
    "midlayer.self_attn.v_proj.weight": (16, 64),
    "midlayer.self_attn.o_proj.weight": (32, 32),
    "midlayer.mlp.gate_proj.weight": (24, 32),
    "midlayer.mlp.up_proj.weight": (24, 32),
    "midlayer.mlp.down_proj.weight": (32, 24),
    "midlayer.input_layernorm.weight": (32,),
    "midlayer.hidden_norm.weight": (32,),
    "midlayer.post_attention_layernorm.weight": (32,),
    "norm.weight": (32,),
    "lm_head.weight": (8, 32),
    "d2t": (8,),
    "t2d": (67,),
}


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


def assert_same(ours: Draft, theirs: Draft) -> None:
    assert ours.config == theirs.config and set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor) and ours.tensors[name].dtype == tensor.dtype, name


def test_a_new_draft_is_random_but_for_the_targets_head_and_reproducible(target: Target) -> None:
    made = new_draft(target, vocabulary=VOCABULARY, intermediate_size=24, aux_layers=AUX_LAYERS, seed=3)
    assert_same(made, new_draft(target, vocabulary=VOCABULARY, intermediate_size=24, aux_layers=AUX_LAYERS, seed=3))
    other = new_draft(target, vocabulary=VOCABULARY, intermediate_size=24, aux_layers=AUX_LAYERS, seed=4)
    assert not torch.equal(made.tensors["fc.weight"], other.tensors["fc.weight"])
    assert torch.equal(made.tensors["lm_head.weight"], target.head_weight[VOCABULARY])
    assert torch.equal(made.tensors["norm.weight"], target.norm_weight)
    assert made.config.rope == target.config.rope


def test_names_and_shapes_are_those_that_sglang_reads(draft: Draft, target: Target) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()} == SHAPES
    whole = new_draft(target, intermediate_size=24, aux_layers=AUX_LAYERS)
    shapes = {name: shape for name, shape in SHAPES.items() if name not in ("d2t", "t2d")}
    assert {name: tuple(t.shape) for name, t in whole.tensors.items()} == {**shapes, "lm_head.weight": (67, 32)}
    assert whole.target_ids is None


def test_the_vocabulary_is_written_as_offsets(draft: Draft, target: Target) -> None:
    assert torch.equal(draft.tensors["d2t"], VOCABULARY - torch.arange(8)) and draft.tensors["d2t"].dtype == torch.int64
    assert draft.target_ids is not None and torch.equal(draft.target_ids, VOCABULARY)
    assert draft.tensors["t2d"].dtype == torch.bool
    assert torch.equal(draft.tensors["t2d"].nonzero()[:, 0], VOCABULARY)
    first = new_draft(target, draft_vocab_size=5, aux_layers=AUX_LAYERS)
    assert first.target_ids is not None and first.target_ids.tolist() == [0, 1, 2, 3, 4]
    assert new_draft(target, draft_vocab_size=67, vocabulary=torch.arange(67), aux_layers=AUX_LAYERS).target_ids is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_vocab_size": 0}, r"draft_vocab_size must be in \[1, 67\] .* got 0"),
        ({"draft_vocab_size": -1}, r"draft_vocab_size must be in \[1, 67\] .* got -1"),
        ({"draft_vocab_size": 68}, r"draft_vocab_size must be in \[1, 67\] .* got 68"),
        ({"draft_vocab_size": 7, "vocabulary": VOCABULARY}, "equal to the length of vocabulary, but got 7"),
        ({"vocabulary": torch.tensor([], dtype=torch.int64)}, r"draft_vocab_size must be in \[1, 67\] .* got 0"),
        ({"vocabulary": torch.tensor([3, 1, 2])}, "vocabulary must be ascending token ids"),
        ({"vocabulary": torch.tensor([1, 1])}, "vocabulary must be ascending token ids"),
        ({"vocabulary": torch.arange(67).flip(0)}, "vocabulary must be ascending token ids"),
        ({"vocabulary": torch.tensor([-1, 1])}, "vocabulary must be ascending token ids"),
        ({"vocabulary": torch.tensor([0.0, 1.0])}, r"ascending token ids \[Vd\] int64, but got torch.float32 \[2\]"),
        ({"vocabulary": torch.tensor([[0, 1]])}, r"ascending token ids \[Vd\] int64, but got torch.int64 \[1, 2\]"),
        ({"vocabulary": torch.tensor([0, 67])}, r"vocabulary must be token ids in \[0, 67\), but got 67"),
        ({"intermediate_size": 0}, "intermediate_size must be a positive whole number, but got 0"),
        ({"aux_layers": ()}, r"aux_layers must be three different layers .* got \(\)"),
        ({"aux_layers": (1, 2)}, r"aux_layers must be three different layers"),
        ({"aux_layers": (3, 2, 1)}, r"aux_layers must be .* ascending from 1 on, but got \(3, 2, 1\)"),
        ({"aux_layers": (0, 1, 2)}, r"ascending from 1 on, but got \(0, 1, 2\)"),
        (
            {"aux_layers": (1, 2, 4)},
            r"aux_layers \(1, 2, 4\) must be layers of the target, which has 4",
        ),
        (
            {"aux_layers": None},
            r"default aux_layers .* a target of 4 layers gives \[2, 2, 1\]",
        ),
    ],
)
def test_new_drafts_must_fit_the_target(arguments: dict[str, Any], message: str, target: Target) -> None:
    with pytest.raises(ValueError, match=message):
        new_draft(target, **{"aux_layers": AUX_LAYERS, **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_draft_reads_back_as_it_was(draft: Draft, target: Target, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = new_draft(target, aux_layers=AUX_LAYERS)
    for made in (draft, whole):
        made.save(tmp_path / "draft", dtype)
        kept = {n: t.to(dtype).float() if t.is_floating_point() else t for n, t in made.tensors.items()}
        assert_same(load_draft(tmp_path / "draft"), Draft(made.config, kept))
    assert read_config(tmp_path / "draft")["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_the_file_holds_what_sglang_reads_and_nothing_of_the_targets_embedding(draft: Draft, tmp_path: Path) -> None:
    draft.save(tmp_path / "draft")
    assert {path.name for path in (tmp_path / "draft").iterdir()} == {"config.json", "model.safetensors"}
    found = load_file(tmp_path / "draft" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert found["d2t"].dtype == torch.int64
    assert not any("embed" in name for name in found)
    config = read_config(tmp_path / "draft")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 8
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]


def test_saving_replaces_a_draft_but_nothing_else(draft: Draft, tmp_path: Path) -> None:
    draft.save(tmp_path / "draft")
    (tmp_path / "draft" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"draft' holds 'notes.txt', which would be lost; name another directory"):
        draft.save(tmp_path / "draft")
    assert (tmp_path / "draft" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file' is a file"):
        draft.save(tmp_path / "file")


def test_the_membership_is_worked_out_where_it_is_missing(draft: Draft) -> None:
    assert_same(Draft(draft.config, changed(draft, t2d=None)), draft)


WRONG: list[tuple[dict[str, Tensor | None], str]] = [
    ({"model__embed_tokens__weight": torch.ones(67, 32)}, r"extra: model\.embed_tokens\.weight$"),
    ({"fc__bias": torch.ones(32)}, r"extra: fc\.bias$"),
    ({"norm__weight": torch.full((32,), torch.nan)}, r"NaN or infinity: norm\.weight$"),
    ({"lm_head__weight": torch.full((8, 32), torch.inf)}, r"NaN or infinity: lm_head\.weight$"),
    ({"norm__weight": torch.ones(32, dtype=torch.int64)}, r"must be floating .* norm\.weight is torch\.int64"),
    ({"d2t": torch.zeros(8)}, r"d2t, t2d whole numbers, but d2t is torch\.float32"),
    ({"d2t": torch.zeros(7, dtype=torch.int64)}, r"d2t is \(7,\) instead of \(8,\)"),
    ({"t2d": torch.zeros(8, dtype=torch.bool)}, r"t2d is \(8,\) instead of \(67,\)"),
]
for _name in SHAPES:
    if _name != "t2d":
        WRONG.append(({_name.replace(".", "__"): None}, f"these are missing: {_name}$"))
        WRONG.append(({_name.replace(".", "__"): torch.ones(3, 3)}, rf"{_name} is \(3, 3\) instead of"))


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_tensors_are_named(
    changes: dict[str, Tensor | None], message: str, draft: Draft, target: Target, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Draft(draft.config, changed(draft, **changes))
    serving = ServingDraft(draft, target)
    before = served(serving, target)
    with pytest.raises(ValueError, match=f"^draft version 7: .*{message}"):
        serving.load(changed(draft, **changes), version=7)
    assert serving.version == 0 and torch.equal(served(serving, target), before)
    draft.save(tmp_path / "draft")
    drop = tuple(name.replace("__", ".") for name, tensor in changes.items() if tensor is None)
    change_tensors(tmp_path / "draft", drop, **{name: t for name, t in changes.items() if t is not None})
    with pytest.raises(ValueError, match=f"^draft: .*{message}"):
        load_draft(tmp_path / "draft")


@pytest.mark.parametrize(
    ("d2t", "got"),
    [
        ([0, 0, 0, 0, 0, 0, 0, 60], r"0\.\.67"),  # one past the last
        ([-1, 0, 0, 0, 0, 0, 0, 0], r"-1\.\.7"),
        ([0, 0, 0, 0, 0, 0, 0, -1], r"0\.\.6"),  # twice the same
        ([0, 3, 4, 10, 11, 12, 40, 66], r"0\.\.73"),  # ids instead of offsets
    ],
)
def test_a_map_that_is_none_is_refused(d2t: list[int], got: str, draft: Draft) -> None:
    with pytest.raises(ValueError, match=rf"d2t must hold offsets .* but got ids {got}; target id = i \+ d2t\[i\]"):
        Draft(draft.config, changed(draft, d2t=torch.tensor(d2t)))


def test_damaged_configurations_and_tensors_do_not_load(draft: Draft, tmp_path: Path) -> None:
    draft.save(tmp_path)
    change_config(tmp_path, draft_vocab_size=9)
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(8, 32\) instead of \(9, 32\)"):
        load_draft(tmp_path)
    change_config(tmp_path, draft_vocab_size=67)
    with pytest.raises(ValueError, match="these are extra: d2t, t2d"):
        load_draft(tmp_path)
    with pytest.raises(ValueError, match="must hold config.json"):
        load_draft(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 70}, "vocab_size must be the target's 70, but got 67; is it for another model?"),
        ({"hidden_size": 64}, "hidden_size must be the target's 64, but got 32"),
        (
            {"num_hidden_layers": 3},
            r"aux_layers \(1, 2, 3\) must be layers of the target, which has 3",
        ),
    ],
)
def test_a_draft_for_another_target_is_refused(
    changes: dict[str, Any], message: str, draft: Draft, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ServingDraft(draft, make_target(tmp_path, **changes))


def test_a_draft_that_reads_another_width_is_refused(draft: Draft, target: Target) -> None:
    wide = Draft(replace(draft.config, target_hidden_size=40), changed(draft, fc__weight=torch.ones(32, 120)))
    with pytest.raises(ValueError, match="target_hidden_size must be the target's 32, but got 40"):
        ServingDraft(wide, target)


def served(serving: ServingDraft, target: Target, steps: int = 2) -> Tensor:
    """Draft logits [b, steps, Vd] after 9 tokens: from the features, then from the draft's own output."""
    ids = token_ids(2, 9 + steps)
    slots, out = torch.arange(8).expand(2, 8), []
    with torch.inference_mode():
        features = target.prefill(ids[:, :8], target.new_cache(2, 8), aux_layers=AUX_LAYERS).aux_hidden_states
        assert features is not None
        cache = serving.new_cache(2, 8 + steps)
        hidden = serving.decode(ids[:, 1:9], serving.fuse(features), cache, slots, length=8)[:, -1:]
        for step in range(steps):
            out.append(serving.logits(hidden[:, 0]))
            at = torch.full((2, 1), 8 + step)
            hidden = serving.decode(ids[:, 9 + step : 10 + step], hidden, cache, at, length=9 + step)
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


def test_what_serves_is_eagle3(draft: Draft, target: Target) -> None:
    ours, theirs = served(ServingDraft(draft, target), target, 3), reference(draft, target, 3)
    assert ours.shape == (2, 3, 8) and theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("d2t", "t2d")])
def test_every_tensor_matters_so_that_the_comparison_would_notice(name: str, draft: Draft, target: Target) -> None:
    before, serving = reference(draft, target), ServingDraft(draft, target)
    generator = torch.Generator().manual_seed(5)
    shaken = draft.tensors[name] + 0.2 * torch.randn(draft.tensors[name].shape, generator=generator)
    tensors = changed(draft, **{name: shaken})
    serving.load(tensors, version=1)
    assert serving.version == 1
    after = served(serving, target)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, reference(Draft(draft.config, tensors), target), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_drafts_serve_targets_of_every_family(family: str, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", family)
    made = new_draft(target, draft_vocab_size=20, intermediate_size=24, aux_layers=AUX_LAYERS)
    made.save(tmp_path / "draft")
    ours = served(ServingDraft(load_draft(tmp_path / "draft"), target), target)
    torch.testing.assert_close(ours, reference(made, target), atol=1e-4, rtol=0.0)


def test_another_vocabulary_is_refused_while_a_draft_serves(draft: Draft, target: Target) -> None:
    serving = ServingDraft(draft, target)
    before = served(serving, target)
    for ids in (VOCABULARY - torch.tensor([0] * 7 + [1]), VOCABULARY.flip(0)):
        d2t = ids - torch.arange(8)
        with pytest.raises(ValueError, match=r"vocabulary \(d2t\) is fixed while a draft serves, .*; start anew"):
            serving.load(changed(draft, d2t=d2t), version=1)
    assert serving.version == 0 and torch.equal(served(serving, target), before)
    serving.load(changed(draft, t2d=None), version=2)
    assert serving.version == 2 and torch.equal(served(serving, target), before)


def test_bfloat16_serving_is_close(draft: Draft, target: Target, tmp_path: Path) -> None:
    make_target(tmp_path, **rope("linear", factor=2.0))  # the same weights
    low = specrl.load_target(tmp_path, dtype="bfloat16")
    ours, exact = served(ServingDraft(draft, low), low), reference(draft, target)
    assert ours.dtype == torch.float32 and 0 < (ours - exact).square().mean().sqrt() < 0.05 * exact.std()
