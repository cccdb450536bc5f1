"""The command line: options, configuration files, errors and help, with commands that only record their arguments."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

import specrl
from specrl.cli import Command, main
from specrl.core.plan import Plan
from specrl.io.output import OutputDir, show, table

CALLS: list[dict[str, object]] = []


@dataclass(frozen=True)
class ModelConfig:
    """The model.

    Args:
        name: of the model. This sentence is not in the help.
        dtype: of its weights.
        layers: to read.
        fast: whether it is fast.
    """

    name: str = "small"
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: tuple[int, ...] | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("model.name must not be empty")


def toy(
    *,
    batch_sizes: tuple[int, ...] = (1, 4),
    plans: tuple[str, ...] | None = None,
    split: Literal["train", "held_out"] = "train",
    seconds: float = 20.0,
    resume: bool = False,
    model: ModelConfig = ModelConfig(),
    output_dir: Path | None = None,
) -> None:
    """Do next to nothing.

    Args:
        batch_sizes: requests decoded together.
        seconds: how long.

    Example:
        specrl toy --seconds 3
    """
    if seconds < 0:
        raise ValueError(f"seconds must be\nat least 0, but got {seconds}")
    if seconds == 13:
        raise KeyboardInterrupt
    if seconds == 14:
        assert output_dir is not None and (output_dir / "config.yaml").exists()
        raise FileNotFoundError(2, "No such file or directory", "no such file")
    CALLS.append(dict(locals()))


def show_all(*, runs: tuple[Path, ...], other: int = 0) -> None:
    """Show runs.

    Args:
        runs: directories.
    """
    CALLS.append(dict(locals()))


TOY = {
    "toy": Command(f"{__name__}:toy", "does next to nothing"),
    "toy again": Command(f"{__name__}:show_all", "does as little"),
}


@pytest.fixture(autouse=True)
def _new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPECRL_DEBUG", raising=False)
    CALLS.clear()


def run(line: str) -> dict[str, object]:
    assert main(line.split(), TOY) == 0
    return CALLS.pop()


def test_options_reach_the_function() -> None:
    defaults = {"batch_sizes": (1, 4), "plans": None, "split": "train", "seconds": 20.0, "resume": False}
    assert run("toy") == {**defaults, "model": ModelConfig(), "output_dir": next(Path("runs").glob("toy-*"))}
    assert run("toy again a b --other 2") == {"runs": (Path("a"), Path("b")), "other": 2}


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("--split held_out", "split", "held_out"),
        ("--seconds=3", "seconds", 3.0),
        ("--batch_sizes 1,4,16", "batch_sizes", (1, 4, 16)),
        ("--batch_sizes=8", "batch_sizes", (8,)),
        ("--batch_sizes [2,3]", "batch_sizes", (2, 3)),
        ("--plans 0,3/1/4", "plans", ("0", "3/1/4")),
        ("--resume", "resume", True),
        ("--resume --seconds 1", "resume", True),
        ("--resume false", "resume", False),
        ("--model.dtype bfloat16", "model", ModelConfig(dtype="bfloat16")),
        ("--model large", "model", ModelConfig("large")),
        ("--model=large --model.layers 1,2", "model", ModelConfig("large", layers=(1, 2))),
        ("--model.fast --model.name=--x", "model", ModelConfig("--x", fast=True)),
        ("--config c.yaml", "seconds", 0.001),
        ("--seconds 6 --config c.yaml", "seconds", 6.0),
        ("--config c.yaml", "plans", ("0", "3/1/4")),
        ("--model.layers 2 --config c.yaml", "model", ModelConfig("large", layers=(2,))),
        ("--model.fast --config short.yaml", "model", ModelConfig("large", fast=True)),
    ],
)
def test_options_have_short_forms_and_override_configuration_files(options: str, name: str, value: object) -> None:
    Path("c.yaml").write_text("seconds: 1e-3\nplans: ['0', 3/1/4]\nmodel: {name: large, layers: [1]}\n")
    Path("short.yaml").write_text("model: large\nmodel.layers: null\n")
    assert run(f"toy {options}")[name] == value


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("tou", ["a command must be one of toy", "'tou'", "did you mean 'toy'?"]),
        ("watch", ["'watch' was removed", "tensorboard"]),
        ("toy --second 1", ["--second", "did you mean '--seconds'?"]),
        ("toy extra --seconds 1", ["'extra'", "--name value", "see 'specrl toy --help'"]),
        ("toy --seconds", ["--seconds must have a value"]),
        ("toy --seconds x", ["--seconds must be a number", "got x", "see 'specrl toy --help'"]),
        ("toy --split both", ["--split must be one of train, held_out", "got both"]),
        ("toy --batch_sizes 1,x", ["--batch_sizes must be a whole number", "got x"]),
        ("toy --model=", ["model.name must not be empty"]),
        ("toy --config none.yaml", ["--config", "none.yaml"]),
        ("toy --config wrong.yaml", ["second must be an option", "did you mean 'seconds'?"]),
        ("toy --config damaged.yaml", ["damaged.yaml must be YAML"]),
        ("toy --config list.yaml", ["list.yaml must be a YAML mapping"]),
        ("toy --config value.yaml", ["--model.dtype must be one of float32, bfloat16", "got fp8"]),
        ("toy again", ["runs"]),
        ("toy --seconds -1", ["seconds must be at least 0, but got -1.0"]),
        ("toy --seconds 14", ["No such file or directory: no such file"]),
        ("toy --output_dir /proc/nothing", ["output_dir must be a writable directory", "'/proc/nothing'"]),
    ],
)
def test_wrong_input_ends_in_one_line(line: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    files = {"wrong": "second: 5\n", "damaged": "a: [\n", "list": "[1]\n", "value": "model: {dtype: fp8}\n"}
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    assert main(line.split(), TOY) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("specrl") and err.count("\n") == 1
    assert all(part in err for part in parts)
    assert "14" in line or not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("train --dtype bfloat16", "--target.dtype"),
        ("train --prompt_tokens 64", "--workload.prompt_tokens"),
        ("train --sync_every 4", "--serving.weight_sync_interval"),
        ("train --traces t", "specrl train offline"),
        ("train --ray auto", "specrl train ray"),
        ("train server a b c --sync_every 2", "--weight_sync_interval"),
        ("train --config old.yaml", "serving.batch_schedule"),
        ("rl --live", "specrl rl live"),
    ],
)
def test_an_old_option_gets_its_new_name(line: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.yaml").write_text("target: embedded\ntraffic: 8\n")
    assert main(line.split()) == 2
    assert f"has moved, use {new}" in capsys.readouterr().err.replace("'", "")


def test_debug_shows_the_traceback_and_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["toy", "--seconds", "13"], TOY) == 130
    assert capsys.readouterr().err == "specrl toy: interrupted\n"
    monkeypatch.setenv("SPECRL_DEBUG", "1")
    with pytest.raises(ValueError, match="at least 0"):
        main(["toy", "--seconds", "-1"], TOY)


def test_help_has_groups_defaults_and_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        main(["toy", "--help"], TOY)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("model (The model):", "--model.dtype {float32,bfloat16}", "of its weights (default: float32)"):
        assert part in text
    assert "example:\n  specrl toy" in text and "This sentence" not in text
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 120


def test_the_list_of_commands_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], TOY) == 0 and main(["--version"], TOY) == 0
    text = capsys.readouterr().out
    assert "toy        does next to nothing" in text and text.endswith(f"\nspecrl {specrl.__version__}\n")


def test_the_configuration_is_saved_and_repeats_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    first = run("toy --batch_sizes 3,5 --seconds 7 --model large --output_dir out")
    assert run("toy --config out/config.yaml") == first
    with pytest.raises(SystemExit) as end:
        main(["toy", "--config", "out/config.yaml", "--print_config"], TOY)
    assert end.value.code == 0 and not CALLS
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(Path("out/config.yaml").read_text())
    assert printed["batch_sizes"] == [3, 5] and printed["model"]["name"] == "large"


def test_help_needs_no_torch() -> None:
    code = "import sys; from specrl.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    root = Path(specrl.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).returncode == 0


def test_results_are_written_whole(tmp_path: Path) -> None:
    out = OutputDir(tmp_path / "a" / "b")
    value = {"plan": Plan(3), "nan": float("nan"), "array": np.arange(2), "sample": specrl.PlainSample(2, 1.0, 0.5)}
    out.write_json("x.json", value)
    sample = {"batch_size": 2, "context": 1.0, "seconds": 0.5}
    expected = {"plan": "3/1/4", "nan": None, "array": [0, 1], "sample": sample}
    assert json.loads((out.path / "x.json").read_text()) == expected
    out.write_csv("x.csv", [{"a": 1, "b": 2.5}, {"a": 3, "c": Plan(0)}])
    assert (out.path / "x.csv").read_text() == "a,b,c\n1,2.5,\n3,,0\n"
    with pytest.raises(TypeError):
        out.write_json("x.json", object())
    assert sorted(path.name for path in out.path.iterdir()) == ["x.csv", "x.json"]


def test_tables_show_numbers_with_three_digits_and_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show(table([{"a": 1.23456, "b": "[0.9, 1.1]"}, {"a": 12345.6, "b": None}], {"a": "first", "b": "interval"}))
    text = capsys.readouterr().out
    assert all(part in text for part in ("first", "interval", "1.23 ", "12,346", "[0.9, 1.1]", "–"))
