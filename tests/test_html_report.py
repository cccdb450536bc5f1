"""`specrl report`: the page for each kind of run, alone and side by side."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest

from specrl.cli import main, options_of, split_command
from specrl.io.output import OutputDir

PROFILE = Path(__file__).parent.parent / "specrl/simulation/profiles/embedded-fp32.json"
MARKUP = "<script>alert(1)<∕script> & $x^2$"  # a run's name


def serving(directory: Path, lines: int = 12) -> Path:
    """Write a run as `specrl train --serving.deploy better` does."""
    out = OutputDir(directory)
    log, windows = list[dict[str, object]](), list[dict[str, object]]()
    for n in range(1, lines + 1):
        row: dict[str, object] = {"seconds": 10.0 * n, "requests": 16 * n, "draft_version": n // 3, "part": "a"}
        for batch in (1, 4):
            row |= {f"plan_{batch}": "2/1/3", f"speedup_{batch}": 1 + n / 100, f"accept_length_{batch}": 1 + n / 10}
            row |= {f"speedup_{batch}_low": 0.9, f"speedup_{batch}_high": 1.5} if n > 1 else {}
            sums = {"rounds": 64, "requests": 64 * batch, "tokens": 120 * batch, "plain_s": 0.08 + n / 1e3}
            window = {"served": 16 * n, "batch_size": batch, **sums, "draft_s": 0.016, "verify_s": 0.032}
            windows.append({**window, "plan": "0", "other_s": 0.016})
            accepted = {"accepted_1": 40 * batch + n, "accepted_2": 20 * batch}
            windows.append({**window, "plan": "2/1/3", "other_s": 0.016, **accepted})
        log.append(row)
    out.write_csv("log.csv", log)
    out.write_csv("windows.csv", windows)
    gate = {"version": 3, "check": "trial", "passed": True, "harmful": False, "reason": "passed <b> & co"}
    out.write_csv("gate.csv", [{**gate, "requests": 48}, {**gate, "passed": False, "harmful": True, "requests": 90}])
    out.write_json("plans.json", {"plans": {"1": "2/1/3", "4": "0"}})
    out.write_json("environment.json", {"cpu": "Abacus", "cores": 2, "commit": "0123456789abcdef"})
    out.write_text("config.yaml", "target: {name: embedded, dtype: null}\nseed: 3\n")
    (directory / "draft").mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    bench = "--profile embedded-fp32 --batch_sizes 1,8 --plans 1/1/2,3/1/4 --measure.seconds 1 --measure.precision 0.1"
    assert main(["bench", *bench.split(), "--output_dir", str(base / "bench")]) == 0
    evaluate = "--profiles embedded-fp32 --choosers adaptive,sglang-same --seeds 2 --schedule.rounds 120"
    outputs = ["--output_dir", str(base / "evaluate"), "--leaderboard", str(base / "board.csv")]
    assert main(["evaluate", *evaluate.split(), *outputs]) == 0
    (base / "profile").mkdir()
    shutil.copy(PROFILE, base / "profile/profile.json")
    return {"train": serving(base / MARKUP), **{name: base / name for name in ("bench", "evaluate", "profile")}}


def page(*paths: Path, output_dir: Path) -> str:
    assert main(["report", *map(str, paths), "--output_dir", str(output_dir)]) == 0
    return (output_dir / "report.html").read_text(encoding="utf-8")


def sections(html: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)"(.*?)</section>', html, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("name", "figures", "texts"),
    [
        ("train", {"learning": 2, "speedups": 1, "acceptance": 1, "breakdown": 1}, ["harmful", "Abacus"]),
        ("bench", {"speedups": 1, "acceptance": 1, "breakdown": 1}, ["simulated", "1/1/2"]),
        ("evaluate", {"regret": 1}, ["adaptive", "sglang-same", "share of the best table"]),
        ("profile", {"speedups": 1, "breakdown": 1}, ["profile", "spread of a round"]),
    ],
)
def test_each_kind_of_run_has_its_figures_and_tables(
    name: str, figures: dict[str, int], texts: list[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    html = page(runs[name], output_dir=tmp_path)
    found = {section: text.count("<svg") for section, text in sections(html).items() if "<svg" in text}
    assert found == figures and len(list(tmp_path.glob("*.svg"))) == sum(figures.values())
    assert all(text in html for text in texts)
    assert "Not recorded by" in html and "differs" not in html


def test_runs_are_shown_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    html = page(*runs.values(), output_dir=tmp_path)
    entries = {section: text.count("<h3>") for section, text in sections(html).items()}
    assert [entries[section] for section in ("learning", "speedups", "costs", "regret")] == [1, 3, 3, 1]
    assert "differs" in sections(html)["environment"]
    for row in csv.DictReader((runs["bench"] / "bench.csv").read_text().splitlines()):
        if row["speedup"]:
            low, high = (float(row[name]) for name in ("low", "high"))
            assert f"{float(row['speedup']):.3f}× [{low:.3f}, {high:.3f}]" in html
    assert "1.120× [0.900, 1.500]" in html  # the last speedup in the log
    assert html == page(*runs.values(), output_dir=tmp_path / "again")


def test_a_benchmark_of_a_run_s_draft_marks_the_plans_of_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    run, bench = serving(tmp_path / "day0"), tmp_path / "bench"
    shutil.copytree(runs["bench"], bench)
    (bench / "config.yaml").write_text(f"draft:\n  path: {run / 'draft'}\n")
    html = page(run, bench, output_dir=tmp_path / "page")
    assert "chosen by the run" in html and "chosen by day0, which trained this draft" in html
    assert "draft.path" in sections(html)["environment"] and "target.name" in html and "target.dtype" not in html


def test_live_results_are_of_the_second_half_of_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    acceptance = sections(page(runs["train"], output_dir=tmp_path))["acceptance"]
    accepted = sum(160 + n for n in range(7, 13)) / (6 * 256)
    assert f"{100 * accepted:.1f} % [" in acceptance and "31.2 %" in acceptance  # 80 of 256 at position 2


def test_an_interrupted_run_and_a_long_run_are_shown(tmp_path: Path) -> None:
    run = serving(tmp_path / "run", lines=3)
    for name in ("plans.json", "environment.json"):  # written when a run ends
        (run / name).unlink()
    html = page(run, output_dir=tmp_path / "page")
    assert "batch size 1: 2/1/3" in html and ">48<" in html
    html = page(serving(run, lines=2000), output_dir=tmp_path / "page")
    assert len(html) < 1_000_000 and ">32,000<" in html, "the last row of the log"


def test_the_page_is_one_accessible_file_and_escapes_text(runs: dict[str, Path], tmp_path: Path) -> None:
    html = page(*runs.values(), output_dir=tmp_path)
    assert "<script" not in html and "<b>" not in html and "alert(1)" in html
    links = re.findall(r'\b(?:src|href)="([^"]*)"', html)
    assert links and all(link.startswith(("#", "data:")) for link in links) and "@import" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:aria-labelledby="|href="#|url\(#)([^")]*)', html)
    assert set(references) <= set(ids)
    assert len(re.findall(r'<svg role="img" aria-labelledby', html)) == html.count("<figcaption") == html.count("<svg")
    assert html.count("<table>") == html.count("<caption>") and "<th>" not in html
    assert 'fill="#' not in html and 'stroke="#' not in html
    assert all(re.match(r"none|var\(--|url\(#", colour) for colour in re.findall(r"(?:fill|stroke): ([^;\"]*)", html))


def test_missing_data_comes_with_a_command_that_records_it(runs: dict[str, Path], tmp_path: Path) -> None:
    commands = [
        *re.findall(r"<code>(.*?)</code>", page(runs["evaluate"], output_dir=tmp_path)),
        *re.findall(r"<code>(.*?)</code>", page(runs["train"], runs["profile"], output_dir=tmp_path)),
    ]
    assert any("--draft.path" in command for command in commands)
    for command in commands:
        name, rest = split_command(shlex.split(unescape(command))[1:])
        assert str(options_of(name).parse(rest).arguments["output_dir"]).startswith("runs/")


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("notes.txt", b"hello", ["must contain one of log.csv"]),
        ("log.csv", b"seconds,requests\n1,many\n", ["log.csv", "'requests'", "'many'"]),
        ("bench.csv", b"a,b\n1,2\n", ["bench.csv", "batch_size, plan"]),
        ("evaluate.csv", b"\xff\xfe", ["evaluate.csv", "CSV in UTF-8"]),
        ("plans.json", b"[1]", ["plans.json", "mapping", "list"]),
        ("plans.json", b"{", ["plans.json", "must be JSON"]),
        ("profile.json", b"{}", ["profile.json"]),
        ("config.yaml", b"a: [", ["config.yaml", "must be YAML"]),
        ("", b"", ["'RUN/nowhere' is not"]),
        ("twice", b"", ["runs must be one or more different directories"]),
    ],
)
def test_unusable_runs_are_named_in_one_line(
    file: str, text: bytes, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file in ("plans.json", "config.yaml"):
        (tmp_path / "log.csv").write_text("seconds\n1\n")
    (tmp_path / (file or "notes")).write_bytes(text)
    runs = {"": [tmp_path / "nowhere"], "twice": [tmp_path, tmp_path]}.get(file, [tmp_path])
    assert main(["report", *map(str, runs), "--output_dir", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error.replace(str(tmp_path), "RUN") for part in parts)
