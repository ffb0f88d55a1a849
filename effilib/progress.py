"""A line that says how far long work has come: in a notebook it is rewritten in place, in a terminal a line
each.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from effilib.clock import now

__all__ = ["Progress", "say_seconds", "ticked"]

T = TypeVar("T")


class Progress:
    """`p = Progress("compare", runs)`; after each run `p.done("what")`. Shows the last few lines and the time
    that is left.

    >>> progress = Progress("runs", 2)
    >>> progress.done("seed 0")
    runs: 1 of 2, about ... left: seed 0
    """

    KEEP = 6

    def __init__(self, title: str, total: int, work: float | None = None):
        self.title, self.total, self.count, self.begun, self.lines = title, total, 0, now(), []
        self.work, self.worked = work or total, 0.0
        self.handle = None
        if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
            from IPython.display import display

            self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def done(self, line: str, work: float = 1.0, count: int = 1) -> None:
        """Note that so many more are done, and say `line`.

        work: how much of the work they were."""
        self.count += count
        self.worked += work
        left = (
            (now() - self.begun) / self.worked * (self.work - self.worked) if self.count < self.total else 0
        )
        head = f"{self.title}: {self.count} of {self.total}" + (
            f", about {say_seconds(left)} left" if left else f", {say_seconds(now() - self.begun)}"
        )
        self.lines.append(line)
        if self.handle:
            text = "\n".join([head, *self.lines[-self.KEEP :]])
            self.handle.update({"text/plain": text}, raw=True)
        else:
            print(f"{head}: {line}", flush=True)


def ticked(items: Sequence[T], title: str, every: float = 10) -> Iterator[T]:
    """Yield the items, and say every few seconds how many are done.

    What is over sooner says nothing.

    >>> list(ticked("ab", "letters", every=0))
    letters: 1 of 2, about ... left: a
    letters: 2 of 2, ...: b
    ['a', 'b']
    """
    begun = said = now()
    progress, since = None, 0
    for item in items:
        yield item
        since += 1
        if now() - said >= every:
            if progress is None:
                progress = Progress(title, len(items))
                progress.begun = begun
            progress.done(str(item).encode(errors="backslashreplace").decode(), work=since, count=since)
            said, since = now(), 0


def say_seconds(seconds: float) -> str:
    """Return seconds in words: "3.4 s", "48 s", "5 min", "2 h 5 min".

    >>> say_seconds(3.42), say_seconds(290), say_seconds(7500)
    ('3.4 s', '5 min', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
