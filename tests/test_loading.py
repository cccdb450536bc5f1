"""Large targets are loaded tensor by tensor, without a second copy of all weights."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from models_help import SIZES, change_config, change_tensors, hf_config, hf_logits, hf_model, token_ids
from safetensors.torch import load_file, save_file

import specrl
from specrl.models.checkpoint import Checkpoint, expected_target_tensors
from specrl.models.hf_config import read_target_config

MIB = 1 << 20
SLACK = 96 * MIB  # twice the largest matrices as they are fused (38 MB), and unused memory of the allocator
LOAD = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from specrl.models.checkpoint import check_tensors, expected_target_tensors, read_tensors
from specrl.models.hf_config import read_target_config
from specrl.models.target import Target, load_target

def peak():  # not ru_maxrss, which a process inherits from its parent
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
    config = hf_config("llama", **sizes, num_attention_heads=16, num_key_value_heads=4)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    noise, shards = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)), {}
    for name, shape in expected_target_tensors(read_target_config(directory)).items():
        tensor = noise.repeat(-(-prod(shape) // len(noise)))[: prod(shape)].view(shape)
        shards[name] = f"model-{name.split('.')[2] if 'layers' in name else 'rest'}.safetensors"
        path = directory / shards[name]
        save_file({**(load_file(path) if path.exists() else {}), name: tensor}, path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return directory


def grown(way: str, directory: Path) -> int:
    """Return the largest growth in bytes of a new process that loads this."""
    run = subprocess.run([sys.executable, "-c", LOAD, way, directory], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_loading_needs_little_more_memory_than_the_loaded_model(large: Path) -> None:
    """It holds every weight, the head with the norm folded in, and matrices up to 2^22 entries twice."""
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


def test_a_loaded_target_does_not_depend_on_its_files(tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    target, ids = specrl.load_target(tmp_path), token_ids(1, 9)
    before, file = target(ids), tmp_path / "model.safetensors"
    with file.open("r+b") as written:
        written.write(b"\0" * file.stat().st_size)
    assert torch.equal(target(ids), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_named_in_any_shard(bad: float, tmp_path: Path) -> None:
    hf_model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    name = "model.layers.3.self_attn.k_norm.weight"
    shard = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][3] = bad
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=rf"target .*finite.*{name}$"):
        specrl.load_target(tmp_path)


def test_shapes_are_checked_before_any_tensor_is_read(tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    change_config(tmp_path, intermediate_size=SIZES["intermediate_size"] + 1)
    change_tensors(tmp_path, model__embed_tokens__weight=torch.full((SIZES["vocab_size"], 32), torch.nan))
    with pytest.raises(ValueError, match=r"gate_proj.* instead of .*and 7 more"):
        specrl.load_target(tmp_path)
