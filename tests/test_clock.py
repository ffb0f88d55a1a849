"""The stopwatch against real sleeps, and that nothing else reads time."""

import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import effilib
from effilib import clock
from effilib.clock import CAP, RECURRING, Stopwatch

SHORT, LONG = (
    0.004,
    0.12,
)  # seconds; sleeps only ever last longer, so bounds below are safe and those above are wide


def lap(watch, seconds, kind="step", **settings):
    time.sleep(seconds)
    watch.lap(kind, **settings)


def running():
    watch = Stopwatch()
    watch.start()
    return watch


class Replayed(Stopwatch):
    """A stopwatch that is told its segments: the arithmetic without the sleeping."""

    def __init__(self, *epochs):
        super().__init__()
        self.now = 0.0
        self.start()
        self.cumulative = []
        for epoch in epochs:
            for kind, seconds in epoch:
                self.now += seconds or 0.0
                self.lap(kind, substitute=seconds is None)
            self.cumulative.append(self.end_epoch())

    def _read(self):
        return self.now


def plain_total(epochs):
    """Slow oracle: capped seconds, capped steps."""
    total, capped = 0.0, 0
    for epoch in epochs:
        for kind, seconds in epoch:
            same = [s for k, s in epoch if k == kind and s is not None]
            seconds = statistics.median(same or [0.0]) if seconds is None else seconds
            limit = CAP * statistics.median(same) if len(same) >= RECURRING else float("inf")
            total += min(seconds, limit)
            capped += seconds > limit
    return total, capped


def test_a_lap_lasts_as_long_as_what_happened_in_it():
    watch = running()
    for _ in range(3):
        lap(watch, 0.02)
    cumulative = watch.end_epoch()
    assert 0.06 <= watch.seconds == watch.raw
    assert cumulative == sorted(cumulative)
    assert cumulative[-1] == watch.seconds
    assert len(watch.kinds["step"]) == 3
    assert all(s >= 0.02 for s in watch.kinds["step"])


def test_a_stalled_step_is_capped_at_five_times_the_median_of_its_kind():
    watch = running()
    for seconds in [SHORT] * 8 + [LONG] + [SHORT] * 8:
        lap(watch, seconds)
    watch.end_epoch()
    steps = watch.kinds["step"]
    assert watch.capped >= 1
    assert watch.raw == pytest.approx(sum(steps))
    assert watch.seconds == pytest.approx(sum(min(s, CAP * statistics.median(steps)) for s in steps))
    assert watch.raw - watch.seconds >= LONG - CAP * statistics.median(steps) - 1e-9
    assert watch.steps == 17


def test_one_off_work_is_never_capped():
    watch = running()
    for _ in range(8):
        lap(watch, SHORT)
    lap(watch, LONG, "reconfigure")
    for _ in range(8):
        lap(watch, SHORT)
    watch.end_epoch()
    assert watch.seconds >= LONG + 16 * SHORT
    assert watch.steps == 16  # what recurs; the reconfiguration is no step


def test_a_kind_has_a_median_of_its_own():
    epoch = [("step", 1.0), ("evaluate", 30.0)] * 6
    watch = Replayed(epoch)
    assert watch.capped == 0
    assert watch.seconds == 186


def test_the_median_is_the_epochs_own():
    watch = Replayed([("step", 1.0)] * 6, [("step", 10.0)] * 6)  # a network that grew is not a stall
    assert watch.capped == 0
    assert watch.seconds == 66
    assert watch.cumulative == [[1, 2, 3, 4, 5, 6], [16, 26, 36, 46, 56, 66]]


def test_four_of_a_kind_are_not_enough_for_a_median():
    assert Replayed([("step", 1.0)] * 3 + [("step", 100.0)]).seconds == 103
    assert Replayed([("step", 1.0)] * 4 + [("step", 100.0)]).seconds == 4 + CAP


def test_pauses_are_left_out():
    watch = running()
    lap(watch, SHORT)
    time.sleep(0.01)
    with watch.paused():
        time.sleep(0.3)
    time.sleep(0.01)
    with watch.paused():
        time.sleep(0.3)
    watch.lap()
    watch.end_epoch()
    assert 0.02 + SHORT <= watch.raw < 0.3


def test_a_pause_ends_also_where_something_fails_in_it():
    watch = running()

    def fail():
        with watch.paused():
            time.sleep(0.3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    lap(watch, 0.01)
    watch.end_epoch()
    assert 0.01 <= watch.raw < 0.3


def test_a_substituted_lap_takes_the_median_of_its_kind():
    watch = running()
    lap(watch, LONG, substitute=True)
    for _ in range(7):
        lap(watch, SHORT)
    watch.end_epoch()
    steps = watch.kinds["step"]
    assert steps[0] == statistics.median(steps[1:])
    assert len(steps) == 8
    assert watch.raw == pytest.approx(sum(steps))


def test_a_substituted_lap_keeps_its_place_among_the_others():
    watch = Replayed([("step", 2.0), ("step", None), ("other", 7.0), ("step", 4.0), ("other", None)])
    assert watch.kinds == {"step": [2, 3, 4], "other": [7, 7]}
    assert watch.cumulative == [[2, 5, 12, 16, 23]]


def test_a_paused_and_substituted_lap_leaves_nothing_to_the_next():
    watch = running()
    with watch.paused():
        pass
    watch.lap(substitute=True)
    lap(watch, 0.01)
    watch.end_epoch()
    assert watch.kinds["step"][0] == watch.kinds["step"][1] >= 0.01


@pytest.mark.parametrize("seed", range(20))
def test_capping_agrees_with_the_obvious_slow_way(seed):
    rng = random.Random(seed)
    durations = [None, 1.0, 1.1, 0.9, 1.2, 40.0, 4.9]
    epochs = [
        [
            (rng.choice(["step", "step", "step", "grow"]), rng.choice(durations))
            for _ in range(rng.randrange(30))
        ]
        for _ in range(4)
    ]
    watch = Replayed(*epochs)
    total, capped = plain_total(epochs)
    assert watch.seconds == pytest.approx(total)
    assert watch.capped == capped
    assert sum(map(len, watch.cumulative)) == sum(map(len, epochs))
    assert watch.raw >= watch.seconds


def test_an_epoch_without_laps_changes_nothing():
    watch = running()
    assert watch.end_epoch() == []
    assert watch.totals() == {"raw": 0.0, "seconds": 0.0, "steps": 0, "capped": 0, "kinds": {}}


def test_a_resumed_watch_goes_on_from_the_totals():
    first = Replayed([("step", 1.0)] * 6)
    second = Replayed()
    second.now += 100.0
    second.lap("set up again")
    second.forget(**first.totals())
    second.now += 3.0
    second.lap()
    assert second.end_epoch() == [9.0]
    assert second.kinds["step"] == [1.0] * 6 + [3.0]
    assert "set up again" not in second.kinds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_lap_lasts_as_long_as_its_kernels():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    torch.cuda.synchronize()
    watch = Stopwatch("cuda")
    watch.start()
    with clock.elapsed() as seconds:
        for _ in range(20):
            a @ a
        watch.lap()
        with watch.paused():
            torch.cuda.synchronize()
            time.sleep(0.3)
    watch.lap()
    watch.end_epoch()
    assert 0 < watch.kinds["step"][0] < seconds() - 0.3 + 0.05
    assert watch.kinds["step"][1] < 0.05


def test_interleaved_takes_turns_after_a_warm_up():
    calls = []
    times = clock.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, repeats=4, warm_up=2)
    assert calls == ["a", "b"] * 6
    assert {n: len(t) for n, t in times.items()} == {"a": 4, "b": 4}


def test_interleaved_measures_each_by_itself():
    times = clock.interleaved(
        {"short": lambda: time.sleep(SHORT), "long": lambda: time.sleep(0.03)}, repeats=3, warm_up=0
    )
    assert all(t >= SHORT for t in times["short"])
    assert all(t >= 0.03 for t in times["long"])
    assert min(times["short"]) < 0.03


def test_interleaved_stops_early_but_not_before_three_rounds():
    calls = []
    times = clock.interleaved(
        {"a": lambda: (time.sleep(0.02), calls.append(1))}, repeats=100, warm_up=1, seconds=0.001
    )
    assert len(times["a"]) == 3
    assert len(calls) == 4


def test_elapsed_goes_on():
    with clock.elapsed() as seconds:
        first = seconds()
        time.sleep(0.01)
        assert seconds() >= first + 0.01


def test_steady_memory_keeps_what_was_freed():
    """With glibc a freed large tensor's pages are taken again without page faults."""
    code = (
        "import resource, torch, sys\n"
        "from effilib.clock import steady_memory\n"
        "if sys.argv[1] == 'steady':\n"
        "    print(steady_memory())\n"
        "for _ in range(12): torch.ones(10**7)\n"  # 40 MB: more than glibc keeps by itself
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): torch.ones(10**7)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    root = Path(effilib.__file__).parents[1]

    def printed(mode):
        return subprocess.run(
            [sys.executable, "-c", code, mode], cwd=root, capture_output=True, text=True, check=True
        ).stdout.split()

    set_, faults = printed("steady")
    if set_ == "False":
        pytest.skip("no glibc here")
    assert int(faults) < 0.2 * int(printed("as it is")[0])


def test_the_machine_is_described_in_plain_values():
    machine = clock.machine()
    assert re.fullmatch(r"\d+-core CPU", machine["summary"])
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert set(machine["bf16"]) <= {"avx512_bf16", "amx_bf16"}
    assert all(isinstance(v, str | int | float | list | None) for v in machine.values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", clock.date())
    assert clock.now() <= clock.now()


def test_time_is_read_in_the_clock_alone():
    reads = re.compile(
        r"^\s*(import|from)\s+(time|timeit|datetime)\b|\b(perf_counter|monotonic|process_time|default_timer)\b|cuda\.Event|\btime\.time\b|benchmark\.Timer",
        re.MULTILINE,
    )
    folder = Path(effilib.__file__).parent
    sources = {
        str(f.relative_to(folder)): f.read_text(encoding="utf-8") for f in sorted(folder.rglob("*.py"))
    }
    offenders = {name: found.group() for name, text in sources.items() if (found := reads.search(text))}
    assert set(offenders) == {"clock.py"}, offenders
