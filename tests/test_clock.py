import subprocess
import sys

import pytest

from specrl.core.clock import VirtualClock, WallClock


def test_the_wall_clock_never_runs_backwards() -> None:
    clock = WallClock()
    readings = [clock.now() for _ in range(100)]
    assert readings == sorted(readings)


def test_virtual_time_passes_only_in_advance_and_only_forward() -> None:
    clock = VirtualClock(5.0)
    clock.advance(1.5)
    for seconds in (-1e-9, float("nan")):
        with pytest.raises(ValueError, match="seconds must be at least 0"):
            clock.advance(seconds)
    assert clock.now() == clock.now() == 6.5


def test_the_wall_clock_of_the_cpu_needs_no_torch() -> None:
    code = (
        "import sys; from specrl.core.clock import WallClock; WallClock('cpu').now(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
