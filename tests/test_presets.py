"""Published drafts: their figures, what they are built into, and what is not known."""

import json
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open

from specrl.cli import main
from specrl.commands.presets import presets
from specrl.core.plan import Plan
from specrl.export.presets import (
    SHAPE,
    checkpoint_header,
    complete,
    count,
    draft_config,
    launch_command,
    load_preset,
    meta_tensors,
    preset_names,
)
from specrl.models.checkpoint import expected_draft_tensors
from specrl.models.config import read_draft_config
from specrl.simulation.profile import load_profile

BUILT = {"minimax-m2.1": 797, "qwen3-coder-next": 145, "qwen3-8b": 400, "llama-3.1-8b": 425}  # millions, as published
TARGET = {
    "hidden_size": 3072,
    "vocab_size": 200064,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_target(**changes: object) -> Path:
    Path("target").mkdir(exist_ok=True)
    Path("target/config.json").write_text(json.dumps(TARGET | changes))
    return Path("target")


def test_the_six_are_there_and_every_figure_has_a_source() -> None:
    six = {"minimax-m2.1", "minimax-m2.5", "minimax-m2.7", "qwen3-coder-next", "qwen3-8b", "llama-3.1-8b"}
    assert set(preset_names()) == six
    for name in six:
        preset = load_preset(name)
        figures = {**preset.draft, **preset.recipe, "plan": preset.plan, "accept": preset.accept_length}
        figures["parameters"] = preset.parameters
        for key, figure in figures.items():
            assert (figure.value is None) == (figure.source is None), (name, key)
        assert (preset.parameters.value is None) == (preset.difference is None)
        if preset.profile is not None:
            assert load_profile(preset.profile).accept_length(Plan.parse(preset.plan.value)) == pytest.approx(
                preset.accept_length.value, abs=0.02
            )


@pytest.mark.parametrize(("name", "millions"), BUILT.items())
def test_drafts_build_on_the_meta_device(name: str, millions: int, tmp_path: Path) -> None:
    tensors = meta_tensors(load_preset(name))
    assert all(tensor.device.type == "meta" for tensor in tensors.values())
    assert round(count(tensors) / 1e6) == millions
    header = checkpoint_header(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with open(tmp_path / "model.safetensors", "wb") as file:  # the data is a hole: it takes no space
        file.write(header)
        file.truncate(len(header) + size)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as checkpoint:
        assert set(checkpoint.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert tuple(checkpoint.get_slice(key).get_shape()) == tuple(tensor.shape)


def test_what_is_unknown_comes_from_the_target_and_says_so() -> None:
    m27 = load_preset("minimax-m2.7")
    assert m27.unknown and not m27.draft["taps"].value[0] == 1
    with pytest.raises(ValueError, match="minimax-m2.7 cannot be built: no source states intermediate_size, num_att"):
        meta_tensors(m27)
    filled = complete(m27, a_target())
    assert not filled.unknown and filled.draft["num_attention_heads"].value == 48
    assert "config.json" in str(filled.draft["num_attention_heads"].source)
    Path("config.json").write_text(json.dumps(draft_config(filled)))
    config = read_draft_config(Path())
    assert config.taps == (2, 31, 59) and config.rope.theta == 5e6 and config.rope.kind == "default"
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_tensors(filled).items()}
    assert shapes == expected_draft_tensors(config) and shapes["d2t"] == (32000,)


def test_rope_is_taken_whole_and_taps_are_sglangs_defaults() -> None:
    bare = load_preset("minimax-m2.5")
    assert set(SHAPE) <= set(bare.unknown)
    assert complete(bare, a_target()).unknown == ("draft_vocab_size",)  # which no target states
    filled = complete(bare, a_target(num_hidden_layers=36), draft_vocab_size=1000)
    Path("config.json").write_text(json.dumps(draft_config(filled)))
    config = read_draft_config(Path())
    assert config.taps == (2, 18, 33) and config.draft_vocab_size == 1000
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 2.0)


@pytest.mark.parametrize("name", preset_names())
def test_launch_commands_are_consistent(name: str) -> None:
    words = shlex.split(launch_command(load_preset(name), "a target", "d"))
    flags = dict(zip(words[3:-1:2], words[4:-1:2], strict=True))
    assert flags["--model-path"] == "a target" and flags["--speculative-draft-model-path"] == "d"
    steps, topk, tokens = (
        int(flags[f"--speculative-{key}"]) for key in ("num-steps", "eagle-topk", "num-draft-tokens")
    )
    assert (tokens == steps + 1) if topk == 1 else tokens > steps


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    listed = presets(output_dir=Path("all"))
    assert [row["preset"] for row in listed] == list(preset_names())
    assert len(json.loads(Path("all/presets.json").read_text())) == 6
    capsys.readouterr()
    assert main(["presets", "minimax-m2.1", "--output_dir", "one"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "797,061,120 parameters; published are 858M, +61M to ours" in printed
    assert "not known, for config.json: taps" in printed and "--speculative-num-draft-tokens 5" in printed
    assert not Path("one/config.json").exists()
    assert main(["presets", "minimax-m2.1", "--target", str(a_target()), "--output_dir", "two"]) == 0
    assert read_draft_config(Path("two")).taps == (2, 31, 59)
    header = Path("two/model.safetensors.header").read_bytes()
    assert len(header) == 8 + int.from_bytes(header[:8], "little")
    assert "fc.weight" in json.loads(header[8:])


WRONG = {
    "presets minimax-m21": "did you mean 'minimax-m2.1'?",
    "presets --target target": "name it, as in",
    "presets minimax-m2.1 --target nowhere": "must be a directory with config.json",
    "presets qwen3-8b --target target": "target must have vocab_size 151936",
    "presets qwen3-8b --draft_vocab_size 7": "draft_vocab_size is 32000",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_wrong_input_ends_in_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    a_target()
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
