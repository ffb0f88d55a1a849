"""The stopwatch against real work, real stalls and real neighbours, and that nothing else reads time."""

import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch

import effilib
from effilib import clock
from effilib.clock import Measuring, Stopwatch
from tests.common import work

SHORT = 0.004  # seconds


def lap(watch, seconds, kind="step", **settings):
    work(seconds)
    watch.lap(kind, **settings)


def running():
    watch = Stopwatch()
    watch.start()
    return watch


class Replayed(Stopwatch):
    """A stopwatch that is told its segments, (kind, wall seconds, seconds at work): the arithmetic alone."""

    def __init__(self, *epochs):
        super().__init__()
        self.now, self.busy = 0.0, 0.0
        self.start()
        self.cumulative = []
        for epoch in epochs:
            for kind, wall, *busy in epoch:
                self.now += wall or 0.0
                self.busy += busy[0] if busy else wall or 0.0
                self.lap(kind, substitute=wall is None)
            self.cumulative.append(self.end_epoch())

    def _read(self):
        return self.now, self.busy, {}


def test_a_lap_lasts_as_long_as_what_happened_in_it():
    watch = running()
    for _ in range(3):
        lap(watch, 0.03)
    cumulative = watch.end_epoch()
    assert 0.09 <= watch.seconds <= watch.raw
    assert cumulative == sorted(cumulative)
    assert cumulative[-1] == watch.seconds
    assert watch.kinds["step"] == [3, watch.seconds]


def test_only_time_without_a_processor_is_taken_off_whatever_the_work_was():
    watch = Replayed(
        [("step", 1.0), ("step", 9.0, 1.0), ("step", 9.0), ("reconfigure", 40.0, 2.0), ("step", 3.0, 5.0)]
    )
    assert watch.raw == 62
    assert watch.seconds == 1 + 1 + 9 + 2 + 3  # two threads have more than the wall's seconds: no stall
    assert watch.kinds == {"step": [4, 14], "reconfigure": [1, 2]}
    assert watch.cumulative == [[1, 2, 11, 13, 16]]


def test_what_a_context_switch_costs_is_no_stall():
    watch = Replayed([("step", 0.03, 0.02)] * 3)
    assert watch.seconds == watch.raw == pytest.approx(0.09)


def test_pauses_are_left_out():
    watch = running()
    lap(watch, SHORT)
    work(0.01)
    with watch.paused():
        time.sleep(0.3)
    work(0.01)
    with watch.paused():
        work(0.3)
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


def test_a_substituted_lap_takes_the_median_of_its_kind_and_keeps_its_place():
    watch = Replayed([("step", 2.0), ("step", None), ("other", 7.0), ("step", 4.0), ("other", None)])
    assert watch.kinds == {"step": [3, 9], "other": [2, 14]}
    assert watch.cumulative == [[2, 5, 12, 16, 23]]


def test_a_substituted_lap_alone_in_its_epoch_takes_the_mean_of_those_before():
    watch = Replayed([("step", 2.0), ("step", 4.0)], [("step", None)], [("new", None)])
    assert watch.cumulative == [[2, 6], [9], [9]]


def test_a_paused_and_substituted_lap_leaves_nothing_to_the_next():
    watch = running()
    with watch.paused():
        pass
    watch.lap(substitute=True)
    lap(watch, 0.01)
    watch.end_epoch()
    assert watch.kinds["step"][0] == 2
    assert watch.seconds >= 0.02


def test_an_epoch_without_laps_changes_nothing():
    watch = running()
    assert watch.end_epoch() == []
    assert watch.totals() == {"raw": 0.0, "seconds": 0.0, "kinds": {}, "steps": []}


def test_a_resumed_watch_goes_on_from_the_totals():
    first = Replayed([("step", 1.0)] * 6)
    second = Replayed()
    second.now, second.busy = 100.0, 100.0
    second.lap("set up again")
    second.forget(**first.totals())
    second.now, second.busy = 103.0, 103.0
    second.lap()
    assert second.end_epoch() == [9.0]
    assert second.kinds == {"step": [7, 9.0]}


MEASURE = """
    import os, sys, time, torch
    from effilib.clock import Stopwatch
    torch.set_num_threads(1)
    def work(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end: pass
    watch = Stopwatch()
    watch.start()
    print("ready", flush=True)
    for i in range(100):
        work(0.01 + 0.2 * (i % 25 == 24))
        watch.lap()
    watch.end_epoch()
    print(watch.raw, watch.seconds)
"""


def measuring(code=MEASURE):
    """A process that measures, by default 100 steps of 10 ms, every 25th of them 210 ms: 1.8 s at work."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(effilib.__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def measured(process):
    raw, seconds = map(float, process.stdout.readline().split())
    assert process.wait(60) == 0
    return raw, seconds


def test_a_stopped_process_loses_the_stop_and_nothing_of_its_work():
    process = measuring()
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    raw, seconds = measured(process)
    assert raw - seconds >= 1.3
    assert seconds >= 1.75  # heavy work in every 25th step stays on the clock


TWO_THREADS = """
    import time, torch
    from effilib.clock import Stopwatch
    torch.set_num_threads(2)
    a = torch.randn(500, 500)
    a @ a
    watch = Stopwatch()
    watch.start()
    print("ready", flush=True)
    end = time.thread_time() + 0.6
    while time.thread_time() < end: a @ a
    watch.lap()
    watch.end_epoch()
    print(watch.raw, watch.seconds)
"""


def test_a_second_thread_hides_no_stop():
    process = measuring(TWO_THREADS)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    raw, seconds = measured(process)
    assert raw >= 1.9
    assert 0.55 <= seconds < 0.9  # the threads' times add up to twice as much


def test_work_of_a_thread_that_is_waited_for_is_work():
    watch = running()
    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work, 0.15).result()
        work(0.15)
        watch.lap("pool")
        pool.submit(work, 0.15).result()
    work(0.15)
    watch.lap("ended")
    watch.end_epoch()
    assert watch.kinds["pool"][1] >= 0.28
    assert watch.kinds["ended"][1] >= 0.28


def test_a_method_that_works_hard_in_every_25th_step_loses_nothing():
    _, seconds = measured(measuring())
    assert seconds >= 1.75


def test_a_process_that_burns_the_processor_beside_is_no_stall():
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        raw, seconds = measured(measuring())
    finally:
        burner.kill()
        burner.wait()
    assert seconds >= 1.75
    if (os.cpu_count() or 1) > 1 and os.getloadavg()[0] < (os.cpu_count() or 1):
        assert raw - seconds < 0.3 * raw


def test_work_of_a_child_process_that_is_waited_for_is_work():
    burn = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"
    watch = running()
    subprocess.run([sys.executable, "-c", burn], check=True)
    watch.lap("compile")
    going_on = burn + "print('done', flush=True)\ninput()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", going_on], **pipes)
    assert child.stdout.readline() == "done\n"  # it has not ended when the clock is read
    watch.lap("wait")
    child.communicate("\n")
    watch.end_epoch()
    assert watch.kinds["compile"][1] >= 0.38
    assert watch.kinds["wait"][1] >= 0.38


def test_sleeping_is_a_stall():
    watch = running()
    time.sleep(0.3)
    lap(watch, 0.05)
    watch.end_epoch()
    assert watch.raw >= 0.35
    assert 0.04 < watch.seconds < 0.2


def test_on_cuda_only_what_is_slow_with_one_seed_is_taken_off():
    usual = [[1.0] * 10 for _ in range(5)]
    for run in usual:
        run[3] = 9.0  # a method's own heavy step, in all
    usual[2][7] = 31.0
    assert clock.unshared(usual) == [0, 0, 30.0, 0, 0]
    assert clock.unshared(usual[:2]) == [0, 0]
    assert clock.unshared([[1.0], [1.0, 9.0], [1.0]]) == [0, 0, 0]


def test_measurements_on_one_machine_see_each_other(tmp_path):
    code = """if True:
        import sys
        from effilib.clock import Measuring
        with Measuring(sys.argv[1]) as measuring:
            print(measuring.others(), flush=True)
            input()"""
    root = Path(effilib.__file__).parents[1]
    with Measuring(tmp_path) as first:
        assert first.others() == 0
        command = [sys.executable, "-c", code, str(tmp_path)]
        second = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "1\n"
        assert first.others() == 1
        second.kill()  # its note stays, its lock does not
        second.wait()
        assert first.others() == 0
    assert list(tmp_path.iterdir()) == []


def test_measurements_of_other_users_see_each_other(tmp_path):
    old = os.umask(0o077)
    try:
        with Measuring(tmp_path / "notes") as first:
            assert stat.S_IMODE((tmp_path / "notes").stat().st_mode) == 0o1777
            assert stat.S_IMODE(first.name.stat().st_mode) == 0o644
    finally:
        os.umask(old)


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
    assert 0 < watch.steps[0] < seconds() - 0.3 + 0.05
    assert watch.steps[1] < 0.05


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
