"""Targets compute what transformers computes, whole and in pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_help import LLAMA3, YARN, change_config, change_tensors, hf_logits, hf_model, rope, token_ids
from torch import Tensor

import specrl
from specrl.models.attention import TokenSlots
from specrl.models.checkpoint import read_tensors
from specrl.models.rope import RopeConfig
from specrl.models.target import PREFILL_CHUNK, Target

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 14, "rms_norm_eps": 1e-2}),
    "llama-llama3": ("llama", rope("llama3", 500.0, **LLAMA3)),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, **rope("yarn", **YARN)}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-mqa": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1, "attention_bias": True}),
    "qwen3-yarn": ("qwen3", {"rms_norm_eps": 1e-2, **rope("yarn", 1e6, attention_factor=1.3, **YARN)}),
}
every_case = pytest.mark.parametrize("case", CASES)
one_of_each_family = pytest.mark.parametrize("case", ["llama-attention-bias", "qwen2", "qwen3"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Target]]:
    """By case: transformers' model, its checkpoint, and ours read from it."""
    found = {}
    for case, (family, changes) in CASES.items():
        model, directory = hf_model(family, **changes), tmp_path_factory.mktemp(case)
        model.save_pretrained(directory)
        found[case] = (model, directory, specrl.load_target(directory))
    return found


Pairs = dict[str, tuple[Any, Path, Target]]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


@every_case
def test_logits_and_features_equal_those_of_transformers(pairs: Pairs, case: str) -> None:
    model, _, target = pairs[case]
    ids = token_ids(3, 60)
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True)
        ours = target.prefill(ids, target.new_cache(3, 60), aux_layers=(1, 2, 3))
    assert_close(target(ids), theirs.logits)
    assert_close(ours.logits, theirs.logits)
    assert ours.aux_hidden_states is not None
    assert_close(ours.aux_hidden_states, torch.cat(theirs.hidden_states[1:4], -1))  # [i] is the input of layer i
    assert theirs.logits.std() > 0.5 and theirs.logits.diff(dim=1).std() > 0.5  # else the comparison shows little


def pieces(target: Target, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of `ids`, decoded in pieces of these sizes."""
    batch, length = ids.shape
    cache, start, parts = target.new_cache(batch, length + 2), 0, []
    with torch.inference_mode():
        for size in sizes:
            slots = torch.arange(start, start + size).expand(batch, size)
            tokens, start = ids[:, start : start + size], start + size
            parts.append(target.decode(tokens, cache, TokenSlots(slots, start, equal_lengths=size == 1)).logits)
    return torch.cat(parts, 1)


@every_case
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_and_single_tokens_give_the_same_logits(pairs: Pairs, case: str, batch: int) -> None:
    model, _, target = pairs[case]
    ids = token_ids(batch, 30)
    assert_close(pieces(target, ids, [9, 1, 5, 1, 1, 2, 8, 1, 1, 1]), hf_logits(model, ids))


@one_of_each_family
def test_requests_of_different_lengths_do_not_disturb_each_other(pairs: Pairs, case: str) -> None:
    model, _, target = pairs[case]
    ids, lengths = token_ids(3, 30), torch.tensor([5, 17, 11])
    cache = target.new_cache(3, 30)
    cache.data.fill_(100.0)  # what a slot held before must not matter
    with torch.inference_mode():
        for row, length in enumerate(lengths.tolist()):
            target.prefill(ids[row : row + 1, :length], cache, first_row=row)
        for size in (1, 4, 1, 3):
            slots = lengths[:, None] + torch.arange(size)
            where = TokenSlots(slots, int(slots.max()) + 1)
            ours = target.decode(ids.gather(1, slots), cache, where, aux_layers=(2,))
            lengths += size
            for row, length in enumerate(lengths.tolist()):
                theirs = model(ids[row : row + 1, :length], output_hidden_states=True)
                assert_close(ours.logits[row], theirs.logits[0, -size:])
                assert ours.aux_hidden_states is not None
                assert_close(ours.aux_hidden_states[row], theirs.hidden_states[2][0, -size:])


@one_of_each_family
def test_each_path_of_a_tree_is_a_sequence_and_the_accepted_one_can_be_moved(pairs: Pairs, case: str) -> None:
    """Slots 8.. hold a root, its children a and b, and b's child c; then b and c move up behind the root."""
    model, _, target = pairs[case]
    ids, cache = token_ids(1, 14), target.new_cache(1, 16)
    prompt, (root, a, b, c, after) = ids[:, :8], ids[0, 8:13].tolist()
    visible = torch.zeros(1, 4, 12, dtype=torch.bool)
    visible[:, :, :9] = True
    for query, others in ((1, [9]), (2, [10]), (3, [10, 11])):
        visible[0, query, others] = True
    with torch.inference_mode():
        target.prefill(prompt, cache)
        tree, slots, positions = (torch.tensor([x]) for x in ([root, a, b, c], [8, 9, 10, 11], [8, 9, 9, 10]))
        ours = target.decode(tree, cache, TokenSlots(slots, 12, positions, visible)).logits[0]
        for query, path in enumerate(([root], [root, a], [root, b], [root, b, c])):
            assert_close(ours[query], hf_logits(model, torch.cat([prompt, torch.tensor([path])], 1))[0, -1])
        cache.move(torch.tensor([0, 0]), torch.tensor([10, 11]), torch.tensor([9, 10]))
        last = target.decode(torch.tensor([[after]]), cache, TokenSlots(torch.tensor([[11]]), 12)).logits[0, 0]
    assert_close(last, hf_logits(model, torch.cat([prompt, torch.tensor([[root, b, c, after]])], 1))[0, -1])


def test_prompts_longer_than_a_prefill_chunk(tmp_path: Path) -> None:
    length = PREFILL_CHUNK + 40
    model = hf_model("llama", max_position_embeddings=length)
    model.save_pretrained(tmp_path)
    ids = token_ids(2, length)
    target, expected = specrl.load_target(tmp_path), hf_logits(model, ids)
    assert_close(target(ids), expected)
    for last in (1, 45, length):  # of one chunk, of both, all
        with torch.inference_mode():
            found = target.prefill(ids, target.new_cache(2, length), last=last)
        assert found.logits.shape[1] == last
        assert_close(found.logits, expected[:, -last:])


def test_weights_large_enough_for_two_threads(tmp_path: Path) -> None:
    """From 2^17 entries on, a matrix has another layout for one row."""
    model = hf_model("qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    for weight in model.parameters():
        weight.data *= 0.25 if weight.ndim == 2 else 1.0
    model.save_pretrained(tmp_path)
    target, ids = specrl.load_target(tmp_path), token_ids(1, 4)
    assert_close(pieces(target, ids, [1] * 4), hf_logits(model, ids))


def test_the_norm_over_heads_keeps_its_epsilon_for_small_queries(tmp_path: Path) -> None:
    model = hf_model("qwen3", rms_norm_eps=1e-5)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 2e-3
        layer.self_attn.k_proj.weight.data *= 2e-3
    model.save_pretrained(tmp_path)
    assert_close(specrl.load_target(tmp_path)(token_ids(2, 40)), hf_logits(model, token_ids(2, 40)))


@one_of_each_family
def test_bfloat16_is_as_close_as_that_of_transformers(pairs: Pairs, case: str) -> None:
    model, directory, _ = pairs[case]
    ids = token_ids(4, 40)
    exact = hf_logits(model, ids)
    ours = specrl.load_target(directory, dtype="bfloat16")(ids)
    theirs = hf_logits(hf_model(CASES[case][0], **CASES[case][1]).bfloat16(), ids).float()
    assert ours.dtype == torch.float32
    error, its = (ours - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    assert 0 < error < 1.5 * its < 0.2 * exact.std()


def without(target: Target, tensors: dict[str, Tensor], part: str) -> Target:
    """The target with one part made trivial."""
    config = target.config
    if part == "rope scaling":
        return Target(replace(config, rope=RopeConfig(config.rope.theta)), tensors)
    trivial = torch.zeros_like if part.endswith("bias") else torch.ones_like
    changed = {name: trivial(tensor) if part in name else tensor for name, tensor in tensors.items()}
    assert any(part in name for name in tensors)
    return Target(config, changed)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        *(("llama-attention-bias", f"{name}_proj.bias") for name in "qkvo"),
        *(("llama-mlp-bias", f"{name}_proj.bias") for name in ("gate", "up", "down")),
        *(("llama-gqa", name) for name in ("input_layernorm", "post_attention_layernorm", "model.norm")),
        *((case, "rope scaling") for case in ("llama-llama3", "llama-linear", "qwen2-tied-yarn", "qwen3-yarn")),
        *(("qwen2", f"{name}_proj.bias") for name in "qv"),
        *(("qwen3", f"{name}_norm") for name in "qk"),
    ],
)
def test_every_part_matters_so_that_the_comparisons_above_would_notice(pairs: Pairs, case: str, part: str) -> None:
    _, directory, target = pairs[case]
    ids = token_ids(2, 60)
    assert (without(target, read_tensors(directory), part)(ids) - target(ids)).abs().max() > 0.05


def test_a_tied_head_may_be_saved_if_it_is_the_embedding_and_an_untied_one_must_be(tmp_path: Path) -> None:
    hf_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    ids, tied = token_ids(1, 9), specrl.load_target(tmp_path)
    embedding = read_tensors(tmp_path)["model.embed_tokens.weight"]
    change_tensors(tmp_path, lm_head__weight=embedding.clone())
    assert torch.equal(specrl.load_target(tmp_path)(ids), tied(ids))
    change_tensors(tmp_path, lm_head__weight=embedding + 0.1)
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        specrl.load_target(tmp_path)
    change_tensors(tmp_path, ("lm_head.weight",))
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        specrl.load_target(tmp_path)


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        *((torch.zeros(shape, dtype=torch.int64), r"T in \[1, 128\]") for shape in ((4,), (1, 0), (1, 129))),
        (torch.zeros(1, 4), "int64"),
        *((torch.tensor([pair]), r"in \[0, 67\)") for pair in ([0, 67], [-1, 3])),
    ],
)
def test_calls_with_other_token_ids_are_refused(pairs: Pairs, ids: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=f"input_ids must be {rule}|input_ids must be int64 .*{rule}"):
        pairs["llama-gqa"][2](ids)


@pytest.mark.parametrize("dtype", ["int8", "float16x", torch.int8, None])
def test_an_unknown_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be one of bf16, bfloat16, float32, fp32"):
        specrl.load_target("embedded", dtype=dtype)
