"""`specrl watch`: frames of a run, and when it ends."""

from __future__ import annotations

import io
import os
from pathlib import Path
from threading import Timer

import pytest
from rich.console import Console

from specrl.cli import main
from specrl.commands.watch import ended, follow, frame, sparkline
from specrl.core.clock import WallClock
from specrl.io.output import OutputDir


def a_run(directory: Path, lines: int = 3) -> OutputDir:
    out = OutputDir(directory)
    rows: list[dict[str, object]] = []
    for n in range(1, lines + 1):
        row: dict[str, object] = {"seconds": 10.0 * n, "requests": 16 * n, "draft_version": n, "serve_s": 6.0 * n}
        row |= {
            "learn_s": 2.0 * n,
            "tokens_per_s": 9000.0,
            "loss": 7.5,
            "alpha": 0.5,
            "held": 40.0,
            "dropped": 3.0,
            "passed_over": 2.0,
        }
        row |= {"plan_4": "2/1/3", "speedup_4": 1.0 + 0.1 * n, "accept_length_4": 1.5 + 0.1 * n}
        row |= {"speedup_4_low": 1.05 * n, "speedup_4_high": 1.5 * n} if n == lines else {}
        rows.append(row)
    out.write_csv("log.csv", rows)
    decided = {"look": "trial", "harmful": False, "reason": "why"}
    gate = [{"requests": 16 * n, "version": n, "passed": n != 4, **decided} for n in range(1, 5)]
    out.write_csv("gate.csv", gate)
    out.write_csv("drift.csv", [{"requests": 40.0, "before": 0.6, "after": 0.4}])
    return out


def test_one_frame_says_how_the_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    said = capsys.readouterr().out
    for part in (
        "running; 48 requests in 30 s (1.6 a second), draft 3",
        "2/1/3",
        "1.30× [3.15, 4.50]",
        "1.80 (no interval)",
        "█ 1.60 to 1.80",
        "9,000 tokens/s, 25% of the time, loss 7.50, alpha 0.50",
        "sequences held 40; dropped 3, passed over 2",
        "draft 3 passed a trial",
        "draft 4 refused",
        "first drafts stood 60%, now 40%",
    ):
        assert part in said
    assert "draft 1 passed" not in said  # the last three decisions only


def test_a_run_has_ended_when_its_results_are_newer_than_its_log(tmp_path: Path) -> None:
    out = a_run(tmp_path)
    assert not ended(tmp_path)
    at = out.write_json("plans.json", {"plans": {"4": "2/1/3"}}).stat().st_mtime
    assert ended(tmp_path)
    a_run(tmp_path, 4)  # resumed
    os.utime(tmp_path / "log.csv", (at + 1.0, at + 1.0))  # what is written at once may have one time
    assert not ended(tmp_path)


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    out, text = a_run(tmp_path), io.StringIO()
    end = Timer(0.3, lambda: out.write_json("plans.json", {"plans": {}}))
    clock = WallClock()
    began = clock.now()
    end.start()
    follow(tmp_path, Console(file=text, width=160), clock, every_s=0.05, give_up_s=60.0)
    end.join()
    assert 0.25 < clock.now() - began < 50.0 and ": ended; 48 requests" in text.getvalue()


def test_watching_gives_up_on_a_run_that_says_nothing(tmp_path: Path) -> None:
    a_run(tmp_path)
    follow(tmp_path, Console(file=io.StringIO()), WallClock(), every_s=0.02, give_up_s=0.2)


def test_a_run_without_a_line_and_one_without_a_learner_have_frames(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    console = Console(file=io.StringIO(), width=160)
    console.print(frame(tmp_path, silent_s=90.0))
    OutputDir(tmp_path).write_csv("log.csv", [{"seconds": 1, "requests": 2, "draft_version": 0, "plan_1": "0"}])
    console.print(frame(tmp_path))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "nothing new for 90 s; no line of its log yet" in said and "does not learn" in said


def test_sparklines_leave_gaps() -> None:
    assert sparkline([1.0, None, 2.0]) == "▁ █ 1.00 to 2.00"
    assert sparkline([3.0, 3.0]) == "▁▁ 3.00 to 3.00" and sparkline([None]) == ""


@pytest.mark.parametrize("words", [["nowhere"], [".", "--every_s", "0"], ["."]])
def test_what_is_no_run_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
