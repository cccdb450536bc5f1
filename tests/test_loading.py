"""Large targets are loaded tensor by tensor: no copy of the whole is ever made beside the model."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from models_help import change_config, hf_config, hf_logits, hf_model, read_config, token_ids
from safetensors.torch import load_file, save_file

import specrl
from specrl.models.checkpoint import Checkpoint, check_tensors, expected_target_tensors
from specrl.models.hf_config import read_target_config

MIB = 1 << 20
SLACK = 96 * MIB  # twice the largest matrices as they are fused (38 MB), and what the allocator keeps
LOAD = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from specrl.models.checkpoint import check_tensors, expected_target_tensors, read_tensors
from specrl.models.hf_config import read_target_config
from specrl.models.target import Target, load_target

def peak():  # not ru_maxrss, which a process takes over from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

way, directory = sys.argv[1], Path(sys.argv[2])
read_target_config(directory)  # imports transformers
before = peak()
if way == "streamed":
    load_target(directory)
else:  # all tensors at once, checked, then the model made of them
    config, tensors = read_target_config(directory), read_tensors(directory)
    check_tensors(tensors, expected_target_tensors(config), what="this")
    Target(config, tensors)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 63 million random weights in four shards."""
    directory = tmp_path_factory.mktemp("large")
    sizes = {"vocab_size": 6144, "hidden_size": 1024, "intermediate_size": 4608, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    config = hf_config("llama", **sizes, **heads)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    some = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in expected_target_tensors(read_target_config(directory)).items():
        part = name.split(".")[2] if "layers" in name else "rest"
        tensor = some.repeat(-(-prod(shape) // len(some)))[: prod(shape)].view(shape)
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    owners = {name: shard for shard, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    return directory


def grown(way: str, directory: Path) -> int:
    """By how many bytes a process of its own grew at most as it loaded this."""
    run = subprocess.run([sys.executable, "-c", LOAD, way, directory], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_loading_needs_little_more_memory_than_the_loaded_model(large: Path) -> None:
    """It holds every weight, the head with the norm folded in besides, and matrices up to 2^22 entries twice."""
    weights = {name: tensor.nbytes for name, tensor in Checkpoint(large).layout.items()}
    twice = ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj")
    model = sum(size * (2 if any(part in name for part in twice) else 1) for name, size in weights.items())
    assert sum(weights.values()) > 200 * MIB
    assert 0.9 * sum(weights.values()) < grown("streamed", large) < model + SLACK
    assert grown("at once", large) > model + SLACK + 50 * MIB


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_compute_what_transformers_computes(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = hf_model(family, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ids = token_ids(2, 40)
    read = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(specrl.load_target(tmp_path)(ids), hf_logits(read, ids), atol=1e-4, rtol=0.0)


def test_a_target_does_not_hang_on_its_files(tmp_path: Path) -> None:
    """Whatever stood in the file later, what was loaded is in memory."""
    hf_model("llama").save_pretrained(tmp_path)
    target, ids = specrl.load_target(tmp_path), token_ids(1, 9)
    before, file = target(ids), tmp_path / "model.safetensors"
    with file.open("r+b") as written:
        written.write(b"\0" * file.stat().st_size)
    assert torch.equal(target(ids), before)


def test_the_first_tensor_that_is_not_finite_is_named_whatever_its_shard(tmp_path: Path) -> None:
    hf_model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    name = "model.layers.3.self_attn.k_norm.weight"
    shard = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    for bad in (torch.nan, torch.inf, -torch.inf):
        tensors[name][3] = bad
        save_file(tensors, shard)
        with pytest.raises(ValueError, match=rf"target .*: every weight must be finite, .* infinity: {name}$"):
            specrl.load_target(tmp_path)


def test_shapes_are_checked_before_any_tensor_is_read(tmp_path: Path) -> None:
    """So that a wrong configuration of a large checkpoint is told at once."""
    hf_model("llama").save_pretrained(tmp_path)
    change_config(tmp_path, intermediate_size=read_config(tmp_path)["intermediate_size"] + 1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"shapes must fit its config.json, but .*and 7 more"):
        specrl.load_target(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_only_weights_of_16_bits_or_more_are_read(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"a is {dtype}; quantised checkpoints are not supported"):
        check_tensors({"a": torch.ones(2).to(dtype)}, {"a": (2,)}, what="this")
