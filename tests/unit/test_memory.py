import json
import mmap
import subprocess
import sys
from typing import Any

from finetune_study.measure.memory import data_memory_bytes, peak_rss_bytes

MIB = 2**20


def in_a_process(script: str) -> Any:
    """What the script prints: limits and torch's allocations are of a process that ends."""
    head = (
        "import json, resource, time, torch\n"
        "from finetune_study import oom\n"
        "from finetune_study.measure.memory import DataMemoryMeter\n"
        "from finetune_study.measure.phases import Phases\n"
        "torch.set_num_threads(1)\n"
        "MIB = 2**20\n"
        "def take(mib): return torch.ones(mib * MIB // 4)\n"
        "phases = Phases()\n"
    )
    done = subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_budget_makes_torch_itself_run_out_of_memory() -> None:
    said = in_a_process(
        """
meter = DataMemoryMeter(phases, 200 * MIB)
before = resource.getrlimit(resource.RLIMIT_DATA)
meter.start()
kept = take(100)
held = meter.held_bytes()
try:
    take(150)
except RuntimeError as error:
    found = oom.recognise(error)
refused = meter.held_bytes_when_refused(found.bytes_requested)
meter.lift_budget()
more = take(150)
print(json.dumps({
    "message": found.message, "asked": found.bytes_requested, "held": held, "refused": refused,
    "lifted": resource.getrlimit(resource.RLIMIT_DATA) == before, "after": meter.held_bytes(),
}))
"""
    )
    assert "DefaultCPUAllocator" in said["message"]
    assert said["asked"] == 150 * MIB
    assert 100 * MIB <= said["held"] < 110 * MIB
    assert said["held"] <= said["refused"] <= 200 * MIB
    assert said["lifted"]
    assert said["after"] >= 250 * MIB


def test_what_was_held_when_memory_ran_out_outlives_its_release() -> None:
    """The error's way up frees what the failing function held; the refusal itself says how much that was."""
    said = in_a_process(
        """
meter = DataMemoryMeter(phases, 200 * MIB)
meter.start()
def grow(): return [take(50) for _ in range(10)]
try:
    grow()
except RuntimeError as error:
    asked = oom.recognise(error).bytes_requested
print(json.dumps([asked, meter.held_bytes_when_refused(asked), meter.held_bytes_when_refused(None)]))
"""
    )
    asked, refused, unknown = said
    assert asked == 50 * MIB
    assert 150 * MIB <= refused <= 200 * MIB
    assert unknown <= refused


def test_peaks_belong_to_the_phase_that_made_them() -> None:
    report = in_a_process(
        """
early = take(64)  # before the start: in the baseline
meter = DataMemoryMeter(phases, None)
meter.start()
phases.enter("forward")
kept = take(40)
phases.enter("backward")
passing = take(120)
time.sleep(0.1)  # whether short peaks are seen is another test's
del passing
phases.enter("optimizer")
phases.enter("evaluate")
large = take(300)
time.sleep(0.1)
del large
phases.enter("forward")
report = meter.report()
meter.close()
print(json.dumps(report))
"""
    )
    by_phase = report["peak_device_used_bytes_by_phase"]
    assert by_phase.pop("load", 0) < 10 * MIB
    peaks = {phase: round(peak / MIB, -1) for phase, peak in by_phase.items()}
    assert peaks == {"forward": 40, "backward": 160, "optimizer": 40, "evaluate": 340}
    assert round(report["peak_device_used_bytes"] / MIB, -1) == 160  # evaluation is left out
    assert report["baseline_bytes"] > 64 * MIB


def test_a_peak_within_a_phase_is_sampled() -> None:
    """Nothing tells the meter of the tensor that comes and goes: a thread sees it."""
    report = in_a_process(
        """
meter = DataMemoryMeter(phases, None)
meter.start()
phases.enter("backward")
for _ in range(20):
    take(200)
report = meter.report()
meter.close()
print(json.dumps(report))
"""
    )
    assert report["peak_device_used_bytes"] >= 200 * MIB


def test_timed_steps_are_sampled_seldom_and_others_often() -> None:
    looks = in_a_process(
        """
meter = DataMemoryMeter(phases, None)
looks = []
meter._look = looks.append
meter.start()
counts = []
for timed in (False, True, False):
    meter.pace(timed=timed)
    looks.clear()
    time.sleep(1)
    counts.append(len(looks))
meter.close()
print(json.dumps(counts))
"""
    )
    often, seldom, again = looks
    assert 1 <= seldom <= 51
    assert min(often, again) > 2 * seldom


def test_a_closed_meter_leaves_no_limit() -> None:
    lifted = in_a_process(
        """
before = resource.getrlimit(resource.RLIMIT_DATA)
meter = DataMemoryMeter(phases, 10 * MIB)
meter.start()
meter.close()
print(json.dumps([resource.getrlimit(resource.RLIMIT_DATA) == before, take(100).numel()]))
"""
    )
    assert lifted == [True, 25 * MIB]


def test_readings_of_this_process() -> None:
    """In mapped pages: a block of the C library may come out of what earlier tests have freed."""
    before = data_memory_bytes()
    with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        assert data_memory_bytes() - before >= 60 * MIB
    assert peak_rss_bytes() > 10 * MIB
