"""`specrl report`: runs on one page, and how a browser takes it."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from specrl.cli import main, options_of, split_command
from specrl.core.statistics import Interval
from specrl.io.output import OutputDir
from specrl.reports.data import LEAST, ratio, read_run
from specrl.reports.figures import THEMES
from specrl.reports.page import said

SECTIONS = [
    "overview", "learning", "speedups", "acceptance", "breakdown", "costs", "regret", "leaderboard", "environment",
]  # fmt: skip
ODD = "<script>alert(1)</script> & $x^2$".replace("/", "∕")


class Page(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def serving(directory: Path) -> Path:
    """A run that served, as `specrl train --update better` leaves it."""
    out = OutputDir(directory)
    log, windows = list[dict[str, object]](), list[dict[str, object]]()
    rng = np.random.default_rng(0)
    for n in range(1, 13):
        row: dict[str, object] = {"seconds": 10.0 * n, "requests": 16 * n, "draft_version": n // 3, "tokens_per_s": 9e3}
        row |= {"dropped": 1.0, "held": 16.0 * n, "alpha": 0.5}
        for batch in (1, 4):
            speedup = 0.8 + 0.04 * n + 0.01 * batch
            row |= {f"plan_{batch}": "2/1/3", f"speedup_{batch}": speedup, f"accept_length_{batch}": 1.0 + 0.1 * n}
            if n > 1:
                row |= {f"speedup_{batch}_low": speedup - 0.05, f"speedup_{batch}_high": speedup + 0.06}
            for plan in ("0", "2/1/3"):
                spent, jitter = 0.06, float(rng.normal(1.0, 0.05))
                sums = {"rounds": 64, "verified": 64 * batch, "tokens": 120 * batch, "plain_s": 0.08 * jitter}
                sums |= {"draft_s": 0.3 * spent, "verify_s": 0.6 * spent, "other_s": 0.1 * spent}
                sums |= {"stood_1": 40 * batch + n, "stood_2": 20 * batch + n % 3} if plan != "0" else {}
                windows.append({"requests": 16 * n, "batch_size": batch, "plan": plan, **sums})
        log.append(row)
    out.write_csv("log.csv", log)
    out.write_csv("windows.csv", windows)
    decided = {"version": 3, "look": "trial", "passed": True, "harmful": False, "reason": f"passed {ODD}"}
    out.write_csv(
        "gate.csv", [{**decided, "requests": 48}, {**decided, "passed": False, "harmful": True, "requests": 90}]
    )
    out.write_csv("drift.csv", [{"requests": 100.0, "before": 0.6, "after": 0.4}])
    out.write_json("plans.json", {"plans": {"1": "2/1/3", "4": "0"}, "requests": 192})
    out.write_json("environment.json", {"cpu": "Abacus", "cores": 2, "commit": "0123456789abcdef"})
    out.write_text("config.yaml", "target: embedded\nseed: 3\n")
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    simulated = "--profile embedded-fp32 --engine simulated --batch_sizes 1,8 --plans 1/1/2,3/1/4 --seconds 1"
    assert main(["bench", *simulated.split(), "--precision", "0.1", "--output_dir", str(base / "bench")]) == 0
    played = "--profiles embedded-fp32 --choosers adaptive,sglang-same --seeds 2 --rounds 120"
    to = ["--output_dir", str(base / "evaluate"), "--leaderboard", str(base / "board.csv")]
    assert main(["evaluate", *played.split(), *to]) == 0
    (base / "profile").mkdir()
    shipped = Path(__file__).parent.parent / "specrl/simulation/profiles/embedded-fp32.json"
    shutil.copy(shipped, base / "profile/profile.json")
    return {"train": serving(base / ODD), **{name: base / name for name in ("bench", "evaluate", "profile")}}


@pytest.fixture(scope="module")
def everything(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    assert main(["report", *map(str, runs.values()), "--output_dir", str(out)]) == 0
    return out


def test_every_section_is_there_and_filled(everything: Path) -> None:
    page = Page(everything / "report.html")
    assert [attributes["id"] for attributes in page.all("section")] == SECTIONS
    assert len(page.all("figure")) == len(page.all("img")) == len(page.all("source")) >= 9
    assert {a["href"] for a in page.all("a")} == {"#content", *(f"#{name}" for name in SECTIONS)}
    for name in ("adaptive", "sglang-same", "0123456789ab", "alarms of drift", "1 harmful", "batch 4: 0"):
        assert name in page.text
    assert "This makes it:" in page.text and "Not recorded by" in page.text


def test_numbers_carry_the_intervals_that_the_runs_recorded(runs: dict[str, Path], everything: Path) -> None:
    page = Page(everything / "report.html")
    for row in rows(runs["bench"] / "bench.csv"):
        if row["speedup"] and not row["plan"].startswith("plain"):
            low, high = (float(row[name]) for name in ("low", "high"))
            assert f"{float(row['speedup']):.3f}× [{low:.3f}, {high:.3f}]" in page.text
    assert "simulated in turns" in page.text and "measured in turns" not in page.text  # the bench was of a profile
    board = rows(runs["evaluate"] / "evaluate.csv")[0]
    assert f"{float(board['share']):.3f} [{float(board['share_low']):.3f}" in page.text
    assert "1.320× [1.270, 1.380]" in page.text  # speedup_4 at the end of the log: 0.8 + 0.04 · 12 + 0.04
    cells = [c for c in read_run(runs["train"]).cells if c.plan == "2/1/3" and c.batch_size == 4]
    late = [row for row in rows(runs["train"] / "windows.csv") if row["plan"] == "2/1/3" and row["batch_size"] == "4"][
        6:
    ]
    share = sum(int(row["stood_1"]) for row in late) / sum(int(row["verified"]) for row in late)
    first = cells[0].standing[0]
    assert first.value == pytest.approx(share) and first.low < share < first.high
    assert f"{100 * share:.1f} % [{100 * first.low:.1f}, {100 * first.high:.1f}]" in page.text
    assert cells[0].parts_ms["verify"].value == pytest.approx(0.6 * 60.0 / 64)


def test_the_page_loads_nothing_and_escapes_what_files_say(everything: Path) -> None:
    page = Page(everything / "report.html")
    assert not page.all("script") and "<script" not in page.source and "alert(1)" in page.text
    assert "default-src 'none'" in next(
        m["content"] for m in page.all("meta") if "content" in m and "src" in m["content"]
    )
    used = [a[name] for _, a in page.tags for name in ("src", "srcset", "href") if name in a]
    assert used and all(value.startswith(("data:", "#")) for value in used)
    assert not re.search(r"url\(|@import", page.source)


def test_the_page_can_be_read_by_ear_and_by_keyboard(everything: Path) -> None:
    page = Page(everything / "report.html")
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1 and page.all("main")
    assert page.tags[[tag for tag, _ in page.tags].index("body") + 1] == ("a", {"class": "skip", "href": "#content"})
    for image in page.all("img"):
        assert re.search(r"\d", image["alt"]) and len(image["alt"]) > 40
    assert len(page.all("table")) == len(page.all("caption")) >= 10
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    boxes = [attributes for attributes in page.all("div") if attributes.get("role") == "region"]
    assert len(boxes) == len(page.all("table")) and all(b["tabindex"] == "0" and b["aria-label"] for b in boxes)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_pictures_lie_beside_the_page_in_both_variants(everything: Path) -> None:
    light, dark = (sorted(everything.glob(f"*-{theme}.png")) for theme in ("light", "dark"))
    assert len(light) == len(dark) == len(Page(everything / "report.html").all("img"))
    for paths, theme in ((light, "light"), (dark, "dark")):
        paper = np.array([int(THEMES[theme].paper[n : n + 2], 16) for n in (1, 3, 5)]) / 255
        for path in paths:
            pixels = imread(path)[..., :3]
            assert np.allclose(pixels[0, 0], paper, atol=0.01) and pixels.std() > 0.02


def test_what_is_missing_comes_with_a_command_that_parses(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(runs["evaluate"])]) == 0
    page = Page(next(tmp_path.glob("runs/report-*/report.html")))
    assert "This run has not recorded a log of serving." in page.text
    commands = re.findall(r"<code>(.*?)</code>", page.source)
    assert len(commands) >= 4
    for command in commands:
        name, rest = split_command(shlex.split(command)[1:])
        assert str(options_of(name).parse(rest).arguments["output_dir"]).startswith("runs/")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (None, "", "a run must be a directory"),
        ("notes.txt", "hello", "a run must hold one of log.csv"),
        ("log.csv", "seconds,requests\n1,many\n", "must hold numbers under 'requests', but has 'many'"),
        ("bench.csv", "a,b\n1,2\n", "but lacks batch_size, plan"),
        ("plans.json", "[1]", "must be a JSON object, but is list"),
        ("plans.json", "{", "must be JSON"),
        ("profile.json", "{}", "profile"),
        ("config.yaml", "a: [", "must be YAML"),
    ],
)
def test_a_foreign_or_damaged_directory_is_refused_in_one_line(
    file: str | None,
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if file is not None:
        run = tmp_path / "run"
        run.mkdir()
        if file in ("plans.json", "config.yaml"):
            (run / "log.csv").write_text("seconds\n1\n")
        (run / file).write_text(text)
    assert main(["report", "run"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_interval_needs_enough_stretches() -> None:
    few, many = ratio([1.0, 2.0], [1.0, 1.0]), ratio([1.0, 2.0] * LEAST, [1.0, 1.0] * LEAST)
    assert few is not None and many is not None
    assert said(few, "×", 2) == "1.50× (no interval)" and many.low < 1.5 < many.high
    assert said(Interval(1.5, 1.25, 1.75), " ms", 2) == "1.50 ms [1.25, 1.75]" and said(None) == "–"


SPOILT = """<!doctype html><title>x</title><style>:focus { outline: none }</style><body>
<main id="content" tabindex="-1"><p style="color: #999; width: 2000px">faint and wide</p>
<nav><a href="#content">x</a></nav>
<details><summary>y</summary>z</details><img src="nowhere.png"></main><script>console.log("a word")</script>"""
TRAP = """<!doctype html><title>x</title><a href="#a" id="a">one</a><a href="#b">two</a><a href="#c">three</a>
<script>document.links[2].onfocus = () => document.links[0].focus()</script>"""


def in_a_browser(page: Path) -> tuple[int, str]:
    """What tools/check_report.py says of a page."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent.parent / "tools/check_report.py"), str(page)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    return done.returncode, done.stdout + done.stderr


def test_it_can_be_used_by_keyboard_in_light_and_dark_wide_and_on_a_phone(everything: Path) -> None:
    status, text = in_a_browser(everything / "report.html")
    assert status == 0, text
    assert text.count("all right") == 4 and text.count(" 0 pictures") == 0


def test_what_is_wrong_in_a_browser_is_found(tmp_path: Path) -> None:
    (tmp_path / "spoilt.html").write_text(SPOILT)
    status, text = in_a_browser(tmp_path / "spoilt.html")
    assert status == 1
    for wrong in ("focus cannot be seen", "too little contrast: p faint", "wider than the window", "1 of 1 pictures"):
        assert wrong in text
    assert "on the console" in text and "loaded: file:" in text and "nowhere.png" in text
    (tmp_path / "trap.html").write_text(TRAP)
    status, text = in_a_browser(tmp_path / "trap.html")
    assert status == 1 and "Tab goes to a one, not 'a three'" in text
