import subprocess
import sys

import pytest

from specrl.core.clock import Clock, VirtualClock, WallClock


def test_the_wall_clock_never_runs_backwards() -> None:
    clock: Clock = WallClock()
    readings = [clock.now() for _ in range(100)]
    assert readings == sorted(readings)


def test_virtual_time_passes_only_when_told_to() -> None:
    clock = VirtualClock(5.0)
    assert [clock.now(), clock.now()] == [5.0, 5.0]
    clock.advance(1.5)
    clock.advance(0.0)
    assert clock.now() == 6.5
    later: Clock = clock
    assert later.now() == 6.5


@pytest.mark.parametrize("seconds", [-1e-9, float("nan")])
def test_virtual_time_moves_forward_only(seconds: float) -> None:
    clock = VirtualClock()
    with pytest.raises(ValueError, match=f"seconds must be at least 0, but got {seconds}"):
        clock.advance(seconds)
    assert clock.now() == 0.0


def test_reading_the_processors_clock_needs_no_torch() -> None:
    code = (
        "import sys; from specrl.core.clock import WallClock; WallClock('cpu').now(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
