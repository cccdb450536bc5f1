"""Published drafts: their figures, sources and launch commands."""

import shlex

import pytest

from specrl.cli import main
from specrl.core.plan import Plan
from specrl.export.presets import load_preset, preset_names
from specrl.simulation.profile import load_profile

MILLIONS = {"minimax-m2.1": 797, "qwen3-coder-next": 145, "qwen3-8b": 400, "llama-3.1-8b": 425}


@pytest.mark.parametrize("name", preset_names())
def test_every_figure_has_a_source_and_parameters_and_commands_follow_from_them(name: str) -> None:
    preset = load_preset(name)
    for key, figure in {**preset.draft, **preset.recipe, **preset.results}.items():
        assert (figure.value is None) == (figure.source is None), key
    plan, profile = Plan.parse(preset.results["plan"].value), preset.about["profile"]
    if profile is not None:
        published = preset.results["accept_length"].value
        assert load_profile(profile).accept_length(plan) == pytest.approx(published, abs=0.02)
    counted = preset.count_parameters()
    assert (None if counted is None else round(counted / 1e6)) == MILLIONS.get(name)
    words = shlex.split(preset.launch_command("a target", "d"))
    flags = dict(zip(words[3:-1:2], words[4:-1:2], strict=True))
    assert flags["--model-path"] == "a target" and flags["--speculative-draft-model-path"] == "d"
    assert flags["--speculative-num-draft-tokens"] == str(plan.num_draft_tokens)


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in preset_names())
    assert main(["presets", "minimax-m2.1", "--target", "here"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "797,061,120" in printed and "--model-path here" in printed and "aurora-minimax-m2.1" in printed
    assert main(["presets", "minimax-m21"]) == 2
    assert "did you mean 'minimax-m2.1'" in capsys.readouterr().err
