import json
from collections.abc import Iterator
from itertools import chain, count, cycle, repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from specrl.commands.doctor import doctor
from specrl.config import TargetConfig
from specrl.core.clock import VirtualClock
from specrl.measure import checks
from specrl.measure.machine import keep_large_blocks, malloc_is_configured, torch_threads
from specrl.measure.plain import PlainSetting, settings_table, thread_counts


class SteppedClock:
    """A clock whose readings advance by one step each, rounded down to multiples of a quantum."""

    def __init__(self, step_s: float, quantum_s: float = 0.0) -> None:
        self.times = (i * step_s // quantum_s * quantum_s if quantum_s else i * step_s for i in count())

    def now(self) -> float:
        return next(self.times)


def test_check_clock_refuses_imprecise_and_backward_clocks() -> None:
    fine = checks.check_clock(SteppedClock(1e-7))
    assert fine.good and "resolution 100 ns, a reading 100 ns" in fine.found
    assert not checks.check_clock(SteppedClock(1e-7, quantum_s=1e-3), readings=50_000).good
    assert not checks.check_clock(SteppedClock(-1e-7)).good


def test_check_steadiness_finds_spikes_and_drift() -> None:
    def check(durations: Iterator[float]) -> checks.Finding:
        clock = VirtualClock()
        return checks.check_steadiness(clock, 1, lambda: clock.advance(next(durations)))

    assert check(cycle([1e-3, 1.01e-3, 0.99e-3])).good
    spiky = check(cycle(chain(repeat(1e-3, 9), [5e-3])))
    assert not spiky.good and "P95/P50 5.00" in spiky.found and spiky.advice
    assert not check(iter(np.linspace(1e-3, 1.2e-3, checks.REPETITIONS * 11 // 10))).good


@pytest.mark.parametrize(
    ("finding", "good"),
    [
        (checks.check_load(0.1, 2), True),
        (checks.check_load(1.7, 2), False),
        (checks.check_openmp(10**6), True),
        (checks.check_openmp(0), False),
        *((checks.check_sglang(version), True) for version in (None, "0.5.23", "0.5.23.post1")),
        *((checks.check_sglang(version), False) for version in ("0.5.2", "0.5.230")),
    ],
)
def test_load_threads_and_sglang_are_judged(finding: checks.Finding, good: bool) -> None:
    assert finding.good == good and (good or finding.advice)


def test_malloc_is_judged_by_cost_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "uses_glibc", lambda: True)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    slow = checks.check_malloc({"default_ms": 20.0, "kept_ms": 2.0})
    assert slow.good and "10.0×" in slow.found and "keep_large_blocks" in slow.advice
    for name, value in (("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536"), ("MALLOC_TRIM_THRESHOLD_", "1024")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert malloc_is_configured() and not keep_large_blocks()
            assert not checks.check_malloc({"default_ms": 20.0, "kept_ms": 20.0}).advice
            assert not checks.check_malloc({"default_ms": 20.0, "kept_ms": 2.0}).good


def test_torch_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("cores", "counts"), [(1, (1,)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))])
def test_thread_counts_are_powers_of_two_and_all_cores(cores: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(cores) == counts


def test_fastest_setting_depends_on_the_batch_size() -> None:
    one, two = ("float32", 1), ("bfloat16", 2)
    settings = [PlainSetting(*one, 1, 2e-3), PlainSetting(*one, 8, 8e-3)]  # type: ignore[arg-type]
    settings += [PlainSetting(*two, 1, 4e-3), PlainSetting(*two, 8, 4e-3)]  # type: ignore[arg-type]
    assert checks.check_fastest(settings, 1).found == "float32, threads 1: 500 tokens/s"
    assert checks.check_fastest(settings, 8).found == "bfloat16, threads 2: 2,000 tokens/s"
    rows, headings = settings_table(settings, (1, 8))
    assert [(row["ms 8"], row["tps 8"]) for row in rows] == [(8.0, 1000.0), (4.0, 2000.0)]
    assert set(headings) == set(rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds must be a finite number above 0"),
        ({"threads": (0,)}, "threads must be .* at least 1"),
        ({"batch_sizes": ()}, "batch_sizes must be .* at least 1"),
        ({"dtypes": ()}, "dtypes must be at least one"),
        ({"target": TargetConfig(device="tpu")}, "device must be one of"),
    ],
)
def test_doctor_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doctor(**options)  # type: ignore[arg-type]


def test_doctor_reports_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = TargetConfig(device="cpu")
    findings = doctor(
        target=target, dtypes=("float32",), threads=(1,), batch_sizes=(1, 2), seconds=0.1, output_dir=tmp_path
    )
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "doctor.json").read_text())
    assert [f.check for f in findings] == [f["check"] for f in results["findings"]]
    assert [row["batch_size"] for row in results["decoding"]] == [1, 2] and results["environment"]["cpu"]
    for word in ("Plain decoding of embedded", "clock", "steadiness", "malloc", "OpenMP", "SGLang", "doctor.json"):
        assert word in text
