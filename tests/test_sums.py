"""Sums of rounds, and the windows.csv of a run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from specrl.cli import main
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.core.round_stats import WINDOW, RoundSums, Windows, read_windows
from specrl.training.loop import STRETCH, Tally


def a_round(correct: list[int], plan: str = "3", verify_s: float = 0.002) -> Round:
    drafts = np.array(correct, dtype=np.int64)
    ids, lengths = np.arange(len(drafts)), np.full(len(drafts), 9)
    return Round(Plan.parse(plan), ids, drafts + 1, drafts, lengths, draft_s=0.001, verify_s=verify_s, other_s=0.0005)


def test_sums_count_what_stood_to_each_position() -> None:
    sums = RoundSums()
    sums.add(a_round([0, 1, 3, 3]), plain_s=0.01)
    sums.add(a_round([2, 0, 0, 0], verify_s=0.004), plain_s=0.01)
    row = sums.row()
    assert (row["stood_1"], row["stood_2"], row["stood_3"]) == (4, 3, 2)
    assert (row["rounds"], row["verified"], row["tokens"]) == (2, 8, 17)
    assert row["verify_s"] == pytest.approx(0.006) and row["draft_s"] == pytest.approx(0.002)
    assert row["plain_s"] == pytest.approx(17 / 4 * 0.01)


def test_windows_start_anew_after_their_rows_and_hand_rounds_on() -> None:
    seen: list[float] = []
    windows = Windows(lambda done, plain_s: seen.append(plain_s))
    windows.take(a_round([1, 1]), 0.5)
    windows.take(a_round([0]), 0.25)
    windows.take(a_round([0], "0"), 0.25)
    rows = windows.rows(7)
    assert [(row["batch_size"], row["plan"], row["requests"]) for row in rows] == [
        (1, "0", 7), (1, "3/1/4", 7), (2, "3/1/4", 7),
    ]  # fmt: skip
    assert seen == [0.5, 0.25, 0.25] and windows.rows(8) == []
    for _ in range(WINDOW + 1):
        windows.take(a_round([2]), 0.25)
    assert [row["rounds"] for row in windows.rows(9)] == [WINDOW, 1]


def test_a_tally_gives_intervals_that_hold_its_values() -> None:
    tally, rng = Tally(), np.random.default_rng(0)
    for n in range(12 * STRETCH):
        assert (tally.intervals() is None) == (n < 8 * STRETCH)
        tally.add(a_round(rng.integers(0, 4, 2).tolist(), verify_s=0.002 + 0.001 * rng.random()), 0.003, 0.0)
    found = tally.intervals()
    assert found is not None
    speedup, accept_length = found
    assert speedup.value == pytest.approx(tally.speedup) and speedup.low < tally.speedup < speedup.high
    assert accept_length.value == pytest.approx(tally.accept_length) and 0.0 < accept_length.half_width < 0.5


def test_a_resumed_run_goes_on_with_its_windows(tmp_path: Path) -> None:
    line = (
        "train --workload.max_new_tokens 16 --workload.prompt_tokens 24 --serving.batch_schedule 4x8,1x4 --learn false"
    )
    line += f" --checkpoint 4 --log.tensorboard false --output_dir {tmp_path}"
    assert main([*line.split(), "--serving.requests", "8"]) == 0
    first = list(csv.DictReader((tmp_path / "windows.csv").read_text().splitlines()))
    assert main([*line.split(), "--serving.requests", "12", "--resume"]) == 0
    rows = list(csv.DictReader((tmp_path / "windows.csv").read_text().splitlines()))
    assert len(rows) > len(first) and [r["draft_s"] for r in rows[: len(first)]] == [r["draft_s"] for r in first]
    assert all(float(row["verify_s"]) > 0 and int(row["verified"]) >= int(row["rounds"]) for row in rows)
    assert len(read_windows(tmp_path, 8)) == len(first) and read_windows(tmp_path, 0) == []
