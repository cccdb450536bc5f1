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
from specrl.io.output import OutputDir, show, table, to_json
from specrl.measure.machine import environment

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
    plans: list[str] | None = None,
    temperature: float | list[float] = 0.7,
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
    CALLS.append(
        {"batch_sizes": batch_sizes, "plans": plans, "temperature": temperature, "split": split, "seconds": seconds}
        | {"resume": resume, "model": model, "output_dir": output_dir}
    )


def show_all(*, runs: list[Path], other: int = 0) -> None:
    """Show runs.

    Args:
        runs: directories.
    """
    CALLS.append({"runs": runs, "other": other})


TOY = {
    "toy": Command(f"{__name__}:toy", "does next to nothing"),
    "toy again": Command(f"{__name__}:show_all", "does as little"),
}


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPECRL_DEBUG", raising=False)
    CALLS.clear()


def run(line: str) -> dict[str, object]:
    assert main(line.split(), TOY) == 0
    return CALLS.pop()


def test_options_reach_the_function() -> None:
    assert run("toy") == {
        "batch_sizes": (1, 4),
        "plans": None,
        "temperature": 0.7,
        "split": "train",
        "seconds": 20.0,
        "resume": False,
        "model": ModelConfig(),
        "output_dir": next(Path("runs").glob("toy-*")),
    }
    assert run("toy again a b --other 2") == {"runs": [Path("a"), Path("b")], "other": 2}


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("--split held_out", "split", "held_out"),
        ("--seconds=3", "seconds", 3.0),
        ("--batch_sizes 1,4,16", "batch_sizes", (1, 4, 16)),
        ("--batch_sizes=8", "batch_sizes", (8,)),
        ("--batch_sizes [2,3]", "batch_sizes", (2, 3)),
        ("--plans 0,3/1/4", "plans", ["0", "3/1/4"]),
        ("--plans 0", "plans", ["0"]),
        ("--temperature 1", "temperature", 1.0),
        ("--temperature 0,1", "temperature", [0.0, 1.0]),
        ("--resume", "resume", True),
        ("--resume --seconds 1", "resume", True),
        ("--resume false", "resume", False),
        ("--model.dtype bfloat16", "model", ModelConfig(dtype="bfloat16")),
        ("--model large", "model", ModelConfig("large")),
        ("--model=large --model.layers 1,2", "model", ModelConfig("large", layers=(1, 2))),
        ("--model.fast --model.name=--x", "model", ModelConfig("--x", fast=True)),
        ("--model a --model.name b", "model", ModelConfig("b")),
    ],
)
def test_options_have_short_forms(options: str, name: str, value: object) -> None:
    assert run(f"toy {options}")[name] == value


@pytest.mark.parametrize(
    ("text", "options", "name", "value"),
    [
        ("seconds: 5", "", "seconds", 5.0),
        ("seconds: 5", "--seconds 6", "seconds", 6.0),
        ("seconds: 1e-3", "", "seconds", 0.001),
        ("batch_sizes: [2]", "", "batch_sizes", (2,)),
        ("plans: ['0', 3/1/4]", "", "plans", ["0", "3/1/4"]),
        ("model: {name: large, layers: [1]}", "--model.layers 2", "model", ModelConfig("large", layers=(2,))),
        ("model: large", "--model.fast", "model", ModelConfig("large", fast=True)),
        ("model.name: large", "", "model", ModelConfig("large")),
    ],
)
def test_options_take_precedence_over_a_configuration_file(text: str, options: str, name: str, value: object) -> None:
    Path("c.yaml").write_text(text)
    assert run(f"toy {options} --config c.yaml")[name] == value


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("tou", ["a command must be one of toy", "'tou'", "did you mean 'toy'?"]),
        ("gone", ["a command must be one of toy", "'gone'"]),
        ("watch", ["'watch' was removed", "tensorboard"]),
        ("--versio", ["did you mean '--version'?"]),
        ("toy --second 1", ["--second", "did you mean '--seconds'?"]),
        ("toy --model.nam x", ["--model.nam", "did you mean '--model.name'?"]),
        ("toy extra", ["'extra'", "see 'specrl toy --help'"]),
        ("toy --seconds 1 extra", ["'extra'", "--name value"]),
        ("toy --seconds", ["--seconds must have a value", "see 'specrl toy --help'"]),
        ("toy --seconds x", ["--seconds must be a number", "got x", "see 'specrl toy --help'"]),
        ("toy --split both", ["--split must be one of 'train', 'held_out'", "got both"]),
        ("toy --batch_sizes 1,x", ["--batch_sizes must be integers with commas", "got x"]),
        ("toy --temperature x", ["--temperature must be a number or numbers with commas", "got x"]),
        ("toy --model.dtype fp8", ["--model.dtype must be one of 'float32', 'bfloat16'", "got fp8"]),
        ("toy --model=", ["model.name must not be empty"]),
        ("toy --config none.yaml", ["--config", "No such file", "none.yaml"]),
        ("toy --config wrong.yaml", ["second must be an option", "did you mean 'seconds'?"]),
        ("toy --config damaged.yaml", ["--config must be YAML", "damaged.yaml"]),
        ("toy --config list.yaml", ["--config must hold options by name", "list"]),
        ("toy --config value.yaml", ["--model.dtype must be one of", "got fp8"]),
        ("toy again", ["runs"]),
        ("toy --seconds -1", ["seconds must be at least 0, but got -1.0"]),
        ("toy --seconds 14", ["No such file or directory: no such file"]),
        ("toy --output_dir /proc/nothing", ["output_dir must be a writable directory", "'/proc/nothing'"]),
    ],
)
def test_wrong_input_ends_in_one_line(line: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("second: 5\n")
    Path("damaged.yaml").write_text("a: [\n")
    Path("list.yaml").write_text("[1]\n")
    Path("value.yaml").write_text("model: {dtype: fp8}\n")
    assert main(line.split(), TOY) == 2
    out, err = capsys.readouterr()
    prog = "specrl toy" if line.startswith("toy") else "specrl"
    assert out == "" and err.startswith(prog) and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert "14" in line or not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("train --dtype bfloat16", "--target.dtype"),
        ("train --prompt_tokens 64", "--workload.prompt_tokens"),
        ("train --traffic 8", "--serving.batch_schedule"),
        ("train --sync_every 4", "--serving.weight_sync_interval"),
        ("train --traces t", "specrl train offline"),
        ("train --server http://x", "specrl train server"),
        ("train --ray auto", "specrl train ray"),
        ("train ray --in_flight 2", "--ray.max_pending_calls"),
        ("train server a b c --sync_every 2", "--weight_sync_interval"),
        ("train --config old.yaml", "serving.batch_schedule"),
        ("record --max_new_tokens 3", "--workload.max_new_tokens"),
        ("rl --algo ppo", "--agent.algo"),
        ("rl --live", "specrl rl live"),
    ],
)
def test_an_old_option_gets_its_new_name(line: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.yaml").write_text("target: embedded\ntraffic: 8\n")
    assert main(line.split()) == 2
    assert f"has moved, use {new}" in capsys.readouterr().err.replace("'", "")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECRL_DEBUG", "1")
    with pytest.raises(ValueError, match="at least 0"):
        main(["toy", "--seconds", "-1"], TOY)


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--seconds", "13"], TOY) == 130
    assert capsys.readouterr().err == "specrl toy: interrupted\n"


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of whatever terminal: lines break elsewhere in a narrow one
    with pytest.raises(SystemExit) as end:
        main(["toy", "--help"], TOY)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Do next to nothing.",
        "requests decoded together",
        "--config",
        "--print_config",
        "model (The model):",
        "--model.dtype {float32,bfloat16}",
        "of its weights (default: float32)",
        "example:\n  specrl toy",
    ):
        assert part in text
    assert "This sentence" not in text


def test_the_list_of_commands_names_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], TOY) == 0
    text = capsys.readouterr().out
    assert "toy        does next to nothing" in text
    assert main(["--version"], TOY) == 0
    assert capsys.readouterr().out == f"specrl {specrl.__version__}\n"


def test_the_configuration_is_saved_and_repeats_the_run(tmp_path: Path) -> None:
    first = run("toy --batch_sizes 3,5 --seconds 7 --model large --output_dir out")
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["batch_sizes"] == [3, 5] and saved["model"]["name"] == "large"
    assert run("toy --config out/config.yaml") == first


def test_print_config_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["toy", "--seconds", "3", "--print_config"], TOY)
    assert end.value.code == 0 and not CALLS and not Path("runs").exists()
    assert yaml.safe_load(capsys.readouterr().out)["seconds"] == 3.0


def test_help_needs_no_torch() -> None:
    code = "import sys; from specrl.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    root = Path(specrl.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).returncode == 0


def test_the_help_of_train_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert len(capsys.readouterr().out.splitlines()) < 115


def test_results_are_written_whole(tmp_path: Path) -> None:
    out = OutputDir(tmp_path / "a" / "b")
    out.write_json("x.json", {"plan": Plan(3), "nan": float("nan"), "array": np.arange(2), "at": Path("p")})
    assert json.loads((out.path / "x.json").read_text()) == {"plan": "3/1/4", "nan": None, "array": [0, 1], "at": "p"}
    out.write_csv("x.csv", [{"a": 1, "b": 2.5}, {"a": 3, "c": Plan(0)}])
    assert (out.path / "x.csv").read_text() == "a,b,c\n1,2.5,\n3,,0\n"
    with pytest.raises(TypeError):
        out.write_json("x.json", object())
    assert sorted(path.name for path in out.path.iterdir()) == ["x.csv", "x.json"]


def test_frozen_values_are_json() -> None:
    assert to_json(specrl.PlainSample(2, 10.0, 0.5)) == '{"batch_size": 2, "context": 10.0, "seconds": 0.5}'


def test_tables_show_numbers_shortly_and_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show(table([{"a": 1.23456, "b": "[0.9, 1.1]"}, {"a": 12345.6, "b": None}], {"a": "first", "b": "interval"}))
    text = capsys.readouterr().out
    for part in ("first", "interval", "1.23 ", "12,346", "[0.9, 1.1]", "–"):
        assert part in text
    assert "1.234" not in text


def test_the_environment_is_recorded() -> None:
    record = environment()
    assert {"cpu", "cores", "memory_gib", "python", "torch", "torch_threads", "commit", "date_utc"} <= set(record)
    json.loads(to_json(record))
