import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from specrl.commands.doctor import doctor
from specrl.config import TargetConfig
from specrl.core.clock import VirtualClock
from specrl.measure import machine
from specrl.measure.machine import keep_large_blocks, malloc_is_configured
from specrl.measure.plain import PlainSetting, check_fastest, settings_table, thread_counts


class Ticking:
    """A clock that shows given times, then goes on by the last step."""

    def __init__(self, times: Iterator[float]) -> None:
        self.times = times

    def now(self) -> float:
        return next(self.times)


def ticking(step_s: float, *, quantum_s: float = 0.0) -> Ticking:
    def times() -> Iterator[float]:
        i = 0
        while True:
            yield i * step_s if not quantum_s else (i * step_s) // quantum_s * quantum_s
            i += 1

    return Ticking(times())


def test_a_fine_clock_is_good_and_a_coarse_one_is_not() -> None:
    fine = machine.check_clock(ticking(1e-7))
    assert fine.good and "resolution 100 ns, a reading 100 ns" in fine.found
    assert not machine.check_clock(ticking(1e-7, quantum_s=1e-3), readings=50_000).good
    assert not machine.check_clock(ticking(-1e-7)).good


def test_steady_work_is_good_and_disturbed_work_is_not() -> None:
    def timed(durations: Iterator[float]) -> machine.Finding:
        clock = VirtualClock()
        return machine.check_steadiness(clock, 1, lambda: clock.advance(next(durations)))

    def forever(*pattern: float) -> Iterator[float]:
        while True:
            yield from pattern

    assert timed(forever(1e-3, 1.01e-3, 0.99e-3)).good
    spiky = timed(forever(*[1e-3] * 9, 5e-3))
    assert not spiky.good and "P95/P50 5.00" in spiky.found and spiky.advice
    assert not timed(iter(np.linspace(1e-3, 1.2e-3, machine.REPETITIONS * 11 // 10))).good  # slows down


def test_load_and_threads_are_judged_against_the_cores() -> None:
    assert machine.check_load(0.1, 2).good and not machine.check_load(1.7, 2).good
    assert machine.check_openmp(torch.get_num_threads()).good
    finding = machine.check_openmp(torch.get_num_threads() - 1)
    assert not finding.good and "OMP_NUM_THREADS=" in finding.advice


def test_sglang_is_judged_by_its_version() -> None:
    assert machine.check_sglang(None).good and "not installed" in machine.check_sglang(None).found
    assert machine.check_sglang("0.5.23").good and machine.check_sglang("0.5.23.post1").good
    assert not machine.check_sglang("0.5.2").good and not machine.check_sglang("0.5.230").good


def test_malloc_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "uses_glibc", lambda: True)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    slow = machine.check_malloc({"default_ms": 20.0, "kept_ms": 2.0})
    assert slow.good and "10.0×" in slow.found and "keep_large_blocks" in slow.advice
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1024")
    assert not machine.check_malloc({"default_ms": 20.0, "kept_ms": 20.0}).advice
    assert not machine.check_malloc({"default_ms": 20.0, "kept_ms": 2.0}).good


def test_the_environment_decides_over_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert malloc_is_configured() and not keep_large_blocks()
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536")
    assert malloc_is_configured()


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), machine.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("cores", "counts"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))])
def test_thread_counts_double_up_to_all_cores(cores: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(cores) == counts


def test_the_fastest_setting_is_found_by_batch_size() -> None:
    settings = [
        PlainSetting("float32", 1, 1, 2e-3),
        PlainSetting("float32", 1, 8, 8e-3),
        PlainSetting("bfloat16", 2, 1, 4e-3),
        PlainSetting("bfloat16", 2, 8, 4e-3),
    ]
    assert check_fastest(settings, 1).found == "float32, threads 1: 500 tokens/s"
    assert check_fastest(settings, 8).found == "bfloat16, threads 2: 2,000 tokens/s"
    rows, headings = settings_table(settings, (1, 8))
    assert [(row["dtype"], row["ms 8"], row["tps 8"]) for row in rows] == [
        ("float32", 8.0, 1000.0),
        ("bfloat16", 4.0, 2000.0),
    ]
    assert set(headings) == set(rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds must be a finite number above 0"),
        ({"threads": (0,)}, "threads must be .* at least 1"),
        ({"batch_sizes": ()}, "batch_sizes must be .* at least 1"),
        ({"dtypes": ()}, "dtypes must be at least one"),
        ({"target": TargetConfig(device="tpu")}, "device must be one of this machine's"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doctor(**options)  # type: ignore[arg-type]


def test_doctor_reports_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = doctor(
        target=TargetConfig(device="cpu"),
        dtypes=("float32",),
        threads=(1,),
        batch_sizes=(1, 2),
        seconds=0.1,
        output_dir=tmp_path,
    )
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "doctor.json").read_text())
    assert [f.check for f in findings] == [f["check"] for f in results["findings"]]
    assert [row["batch_size"] for row in results["decoding"]] == [1, 2] and results["environment"]["cpu"]
    for word in ("Plain decoding of embedded", "clock", "steadiness", "malloc", "OpenMP", "SGLang", "doctor.json"):
        assert word in text
