"""Published drafts: their figures, sources and launch commands."""

import shlex

import pytest

from specrl.cli import main
from specrl.core.plan import Plan
from specrl.export.presets import load_preset, preset_names
from specrl.simulation.profile import load_profile

MILLIONS = {"minimax-m2.1": 797, "qwen3-coder-next": 145, "qwen3-8b": 400, "llama-3.1-8b": 425}


@pytest.mark.parametrize("name", preset_names())
def test_every_figure_has_a_source(name: str) -> None:
    preset = load_preset(name)
    for key, figure in {**preset.draft, **preset.recipe, **preset.results}.items():
        assert (figure.value is None) == (figure.source is None), key
    profile = preset.about["profile"]
    if profile is not None:
        published = preset.results["accept_length"].value
        plan = Plan.parse(preset.results["plan"].value)
        assert load_profile(profile).accept_length(plan) == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize("name", preset_names())
def test_parameters_are_counted_if_the_shape_is_known(name: str) -> None:
    counted = load_preset(name).count_parameters()
    assert (None if counted is None else round(counted / 1e6)) == MILLIONS.get(name)


@pytest.mark.parametrize("name", preset_names())
def test_launch_commands_are_consistent(name: str) -> None:
    words = shlex.split(load_preset(name).launch_command("a target", "d"))
    flags = dict(zip(words[3:-1:2], words[4:-1:2], strict=True))
    assert flags["--model-path"] == "a target" and flags["--speculative-draft-model-path"] == "d"
    steps, topk, tokens = (
        int(flags[f"--speculative-{key}"]) for key in ("num-steps", "eagle-topk", "num-draft-tokens")
    )
    assert (tokens == steps + 1) if topk == 1 else tokens > steps


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in preset_names())
    assert main(["presets", "minimax-m2.1", "--target", "here"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "797,061,120" in printed and "--model-path here" in printed and "aurora-minimax-m2.1" in printed
    assert main(["presets", "minimax-m21"]) == 2
    assert "name must be one of the presets" in capsys.readouterr().err
