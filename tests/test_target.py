"""Targets compute what transformers computes, whole and in pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_help import (
    LLAMA3,
    YARN,
    change_config,
    change_tensors,
    hf_logits,
    hf_model,
    rope,
    token_ids,
)
from torch import Tensor

import specrl
from specrl.models.checkpoint import read_tensors
from specrl.models.hf_config import read_target_config
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


@every_case
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_and_single_tokens_give_the_same_logits(pairs: Pairs, case: str, batch: int) -> None:
    model, _, target = pairs[case]
    ids = token_ids(batch, 30)
    cache, start, parts = target.new_cache(batch, 32), 0, []
    with torch.inference_mode():
        for size in (9, 1, 5, 1, 1, 2, 8, 1, 1, 1):
            slots = torch.arange(start, start + size).expand(batch, size)
            tokens, start = ids[:, start : start + size], start + size
            parts.append(target.decode(tokens, cache, slots, length=start, equal_lengths=size == 1).logits)
    assert_close(torch.cat(parts, 1), hf_logits(model, ids))


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
            ours = target.decode(ids.gather(1, slots), cache, slots, length=int(slots.max()) + 1, aux_layers=(2,))
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
    seen = torch.zeros(1, 4, 12, dtype=torch.bool)
    seen[:, :, :9] = True
    for query, others in ((1, [9]), (2, [10]), (3, [10, 11])):
        seen[0, query, others] = True
    with torch.inference_mode():
        target.prefill(prompt, cache)
        tree, slots, positions = (torch.tensor([x]) for x in ([root, a, b, c], [8, 9, 10, 11], [8, 9, 9, 10]))
        ours = target.decode(tree, cache, slots, length=12, positions=positions, attention_mask=seen).logits[0]
        for query, path in enumerate(([root], [root, a], [root, b], [root, b, c])):
            assert_close(ours[query], hf_logits(model, torch.cat([prompt, torch.tensor([path])], 1))[0, -1])
        cache.move(torch.tensor([0, 0]), torch.tensor([10, 11]), torch.tensor([9, 10]))
        last = target.decode(torch.tensor([[after]]), cache, torch.tensor([[11]]), length=12).logits[0, 0]
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
    """From 2^17 entries on a matrix is held in another layout, for one row."""
    model = hf_model("qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    for weight in model.parameters():
        weight.data *= 0.25 if weight.ndim == 2 else 1.0
    model.save_pretrained(tmp_path)
    target, ids = specrl.load_target(tmp_path), token_ids(1, 4)
    cache = target.new_cache(1, 4)
    with torch.inference_mode():
        parts = [target.decode(ids[:, i : i + 1], cache, torch.tensor([[i]]), length=i + 1).logits for i in range(4)]
    assert_close(torch.cat(parts, 1), hf_logits(model, ids))


def test_the_norm_over_heads_keeps_its_epsilon_where_queries_are_small(tmp_path: Path) -> None:
    model = hf_model("qwen3", rms_norm_eps=1e-5)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 2e-3
        layer.self_attn.k_proj.weight.data *= 2e-3
    model.save_pretrained(tmp_path)
    assert_close(specrl.load_target(tmp_path)(token_ids(2, 40)), hf_logits(model, token_ids(2, 40)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_one_file_and_shards_load_alike(family: str, tmp_path: Path) -> None:
    model = hf_model(family)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    ids = token_ids(2, 20)
    one, many = (specrl.load_target(tmp_path / name)(ids) for name in ("one", "many"))
    assert torch.equal(one, many)
    assert_close(many, hf_logits(model, ids))


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
        ("llama-attention-bias", "q_proj.bias"),
        ("llama-attention-bias", "k_proj.bias"),
        ("llama-attention-bias", "v_proj.bias"),
        ("llama-attention-bias", "o_proj.bias"),
        ("llama-mlp-bias", "gate_proj.bias"),
        ("llama-mlp-bias", "up_proj.bias"),
        ("llama-mlp-bias", "down_proj.bias"),
        ("llama-gqa", "input_layernorm"),
        ("llama-gqa", "post_attention_layernorm"),
        ("llama-gqa", "model.norm"),
        ("llama-llama3", "rope scaling"),
        ("llama-linear", "rope scaling"),
        ("qwen2", "q_proj.bias"),
        ("qwen2", "v_proj.bias"),
        ("qwen2-tied-yarn", "rope scaling"),
        ("qwen3", "q_norm"),
        ("qwen3", "k_norm"),
        ("qwen3-yarn", "rope scaling"),
    ],
)
def test_every_part_matters_so_that_the_comparisons_above_would_notice(pairs: Pairs, case: str, part: str) -> None:
    _, directory, target = pairs[case]
    ids = token_ids(2, 60)
    assert (without(target, read_tensors(directory), part)(ids) - target(ids)).abs().max() > 0.05


def test_eos_tokens_and_biases_are_read_from_the_checkpoint(pairs: Pairs) -> None:
    config = read_target_config(pairs["qwen2"][1])
    assert config.attention_bias and not config.attention_output_bias and not config.qk_norm
    config = read_target_config(pairs["qwen3"][1])
    assert config.qk_norm and config.head_dim == 12 and not config.attention_bias


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    hf_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def test_an_untied_head_must_be_there(checkpoint: Path) -> None:
    change_config(checkpoint, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        specrl.load_target(checkpoint)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(checkpoint: Path) -> None:
    ids, tied = token_ids(1, 9), specrl.load_target(checkpoint)
    embedding = read_tensors(checkpoint)["model.embed_tokens.weight"]
    change_tensors(checkpoint, lm_head__weight=embedding.clone())
    assert torch.equal(specrl.load_target(checkpoint)(ids), tied(ids))
    change_tensors(checkpoint, lm_head__weight=embedding + 0.1)
    with pytest.raises(ValueError, match=r"lm_head\.weight must be absent or equal .*tie_word_embeddings to false"):
        specrl.load_target(checkpoint)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"int64 \[B, T\].*got torch.int64 \[4\]"),
        (torch.zeros(1, 4), r"got torch.float32 \[1, 4\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"T in \[1, 128\]"),
        (torch.zeros(1, 129, dtype=torch.int64), r"T in \[1, 128\].*\[1, 129\]"),
        (torch.tensor([[0, 67]]), r"must be in \[0, 67\), but got 0\.\.67"),
        (torch.tensor([[-1, 3]]), r"must be in \[0, 67\), but got -1\.\.3"),
    ],
)
def test_calls_with_other_than_token_ids_are_refused(pairs: Pairs, ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs["llama-gqa"][2](ids)


@pytest.mark.parametrize("dtype", ["int8", "float16x", torch.int8, None])
def test_an_unknown_dtype_is_refused(checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be one of bf16, bfloat16, float32, fp32, but got"):
        specrl.load_target(checkpoint, dtype=dtype)
