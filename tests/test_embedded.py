import json
import math
from itertools import islice
from pathlib import Path

import pretraining
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from pretrain_embedded import CONFIG
from safetensors.torch import load_file

from specrl.core.clock import VirtualClock
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.stdlib import SKIPPED, library_files, library_root
from specrl.workloads.text import load_workload

NAMES = ("embedded-easy", "embedded-strong")


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_is_complete(name: str) -> None:
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "held_out.txt", "log.json"}
    assert {path.name for path in embedded_directory(name).iterdir()} == files


def test_the_default_is_one_of_the_two_and_other_names_are_refused() -> None:
    assert embedded_directory() in map(embedded_directory, NAMES)
    with pytest.raises(ValueError, match="embedded-strong, but got 'embedded-hard'"):
        embedded_directory("embedded-hard")


def test_the_corpus_excludes_the_shifted_traffic() -> None:
    root = library_root()
    files = library_files(root)
    assert len(files) > 300 and files == sorted(files)
    assert not any(SKIPPED & set(path.relative_to(root).parts) for path in files)
    with pytest.raises(ValueError, match="must be installed as .py files"):
        library_files(Path(__file__).parent / "nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_bits_per_byte_of_held_out_python_are_those_of_the_log(name: str) -> None:
    """Bits per byte over 16 windows; the files depend on the interpreter, so the tolerance is wide."""
    directory = embedded_directory(name)
    stages = json.loads((directory / "log.json").read_text()).values()
    logged = [row["bits_per_byte"] for rows in stages for row in rows][-1]
    weights = {key: weight.float() for key, weight in load_file(directory / "model.safetensors").items()}
    workload = load_workload("stdlib", load_tokenizer(directory), prompt_tokens=257, split="held_out")
    prompts = [request.prompt for request in islice(workload.requests(0), 16)]
    ids = torch.tensor(prompts)  # [16, 257]
    with torch.no_grad():
        logits = pretraining.logits(weights, ids[:, :-1], *pretraining.rotary(256, CONFIG), CONFIG)
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    size = sum(len(workload.tokenizer.decode(prompt[1:]).encode()) for prompt in prompts)
    assert nats / math.log(2) / size == pytest.approx(logged, abs=0.3)


def test_the_script_makes_weights_of_the_shipped_shapes() -> None:
    shipped = load_file(embedded_directory() / "model.safetensors")
    made = pretraining.new_weights(CONFIG)
    assert {name: weight.shape for name, weight in made.items()} == {name: w.shape for name, w in shipped.items()}


def test_the_script_learns_and_writes_what_is_read_back(tmp_path: Path) -> None:
    """Training lowers the loss of a text that repeats itself; the checkpoint reads back in bfloat16."""
    made = pretraining.new_weights(CONFIG)
    text = torch.arange(8).repeat(64)
    cos, sin = pretraining.rotary(16, CONFIG)
    clock, log = VirtualClock(), []

    def loss_of(weights: pretraining.Weights, ids: torch.Tensor) -> torch.Tensor:
        clock.advance(1.0)
        return pretraining.loss(pretraining.halved(weights), ids, cos, sin, CONFIG)

    recipe = pretraining.Recipe(minutes=0.25, batch=2, context=16, lr=1e-2)
    pretraining.train(recipe, made, text, loss_of, clock, lambda *entry: log.append(entry))
    assert [(step, seconds) for step, seconds, _ in log] == [(i, float(i)) for i in range(1, 16)]
    assert log[-1][2].item() < 5.0 < math.log(512)  # it starts near ln 512
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded_directory() / "tokenizer.json"))
    pretraining.save(tmp_path, made, tokenizer, CONFIG)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], made[name].detach().bfloat16()) for name in made)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (embedded_directory() / file).read_bytes()


def test_the_rate_warms_up_then_falls() -> None:
    scale = pretraining.learning_rate_scale
    assert scale(0, 0.0) == pytest.approx(0.01) and scale(99, 0.5) == 1.0
    assert scale(1000, 0.8) == pytest.approx(0.5) and scale(1000, 1.0) == pytest.approx(0.02)
