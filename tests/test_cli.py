import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

import specrl
from specrl.cli import COMMANDS, Command, main
from specrl.core.plan import Plan
from specrl.io.output import OutputDir, environment, show, table, to_json

CALLS: list[dict[str, object]] = []


def toy(
    *,
    batch_sizes: tuple[int, ...] = (1, 4),
    plans: list[str] | None = None,
    temperature: float | list[float] = 0.7,
    split: Literal["train", "held_out"] = "train",
    seconds: float = 20.0,
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
        | {"output_dir": output_dir}
    )


TOY = {
    "toy": Command(f"{__name__}:toy", "does next to nothing"),
    "gone": Command("specrl.commands.no_such_module:gone", "is not written yet"),
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
        "output_dir": next(Path("runs").glob("toy-*")),
    }
    got = run("toy --split held_out --seconds=3")
    assert (got["split"], got["seconds"]) == ("held_out", 3.0)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--batch_sizes 1,4,16", "batch_sizes", (1, 4, 16)),
        ("--batch_sizes=8", "batch_sizes", (8,)),
        ("--batch_sizes [2,3]", "batch_sizes", (2, 3)),
        ("--plans 0,3/1/4", "plans", ["0", "3/1/4"]),
        ("--plans 0", "plans", ["0"]),
        ("--temperature 1", "temperature", 1.0),
        ("--temperature 0,1", "temperature", [0.0, 1.0]),
    ],
)
def test_lists_may_be_written_with_commas(option: str, name: str, value: object) -> None:
    assert run(f"toy {option}")[name] == value


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("tou", ["a command must be one of toy", "'tou'", "did you mean 'toy'?"]),
        ("gone", ["a command must be one of toy", "'gone'"]),
        ("--versio", ["did you mean '--version'?"]),
        ("toy --second 1", ["'--second 1'", "did you mean '--seconds'?"]),
        ("toy extra", ["'extra'", "see 'specrl toy --help'"]),
        ("toy --seconds", ["--seconds", "expected one argument", "see 'specrl toy --help'"]),
        ("toy --seconds x", ["--seconds must be float", "got x", "see 'specrl toy --help'"]),
        ("toy --split both", ["--split must be one of 'train', 'held_out'", "got both"]),
        ("toy --batch_sizes 1,x", ["--batch_sizes must be int", "got x"]),
        ("toy --temperature x", ["--temperature must be float or float,float,...", "got x"]),
        ("toy --config none.yaml", ["--config", "does not exist", "none.yaml"]),
        ("toy --seconds -1", ["seconds must be at least 0, but got -1.0"]),
        ("toy --seconds 14", ["No such file or directory: no such file"]),
        ("toy --output_dir /proc/nothing", ["output_dir must be a writable directory", "'/proc/nothing'"]),
    ],
)
def test_wrong_input_ends_in_one_line(line: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split(), TOY) == 2
    out, err = capsys.readouterr()
    prog = "specrl toy" if line.startswith("toy") else "specrl"
    assert out == "" and err.startswith(f"{prog}: error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert "14" in line or not list(Path().glob("runs/*"))


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
        "example:\n  specrl toy",
    ):
        assert part in text


def test_the_list_of_commands_names_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], TOY) == 0
    text = capsys.readouterr().out
    assert "toy  does next to nothing" in text and "gone" not in text
    assert main(["--version"], TOY) == 0
    assert capsys.readouterr().out == f"specrl {specrl.__version__}\n"


def test_a_configuration_file_gives_way_to_options(tmp_path: Path) -> None:
    Path("c.yaml").write_text("seconds: 5\nbatch_sizes: [2]\nplans: ['0', 3/1/4]\n")
    got = run("toy --config c.yaml --seconds 6")
    assert (got["seconds"], got["batch_sizes"], got["plans"]) == (6.0, (2,), ["0", "3/1/4"])


def test_a_wrong_key_in_a_configuration_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("second: 5\n")
    assert main(["toy", "--config", "c.yaml"], TOY) == 2
    assert "'second'; did you mean 'seconds'?" in capsys.readouterr().err


def test_the_configuration_is_saved_and_repeats_the_run(tmp_path: Path) -> None:
    first = run("toy --batch_sizes 3,5 --seconds 7 --output_dir out")
    assert yaml.safe_load(Path("out/config.yaml").read_text())["batch_sizes"] == [3, 5]
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if main([name, "--no_such_option"]) == 2 and "a command must be" in capsys.readouterr().err:
        pytest.skip(f"{name} is not written yet")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert f"example:\n  specrl {name}" in text
    assert ("--output_dir" in text) == (name != "watch")  # which only looks


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
