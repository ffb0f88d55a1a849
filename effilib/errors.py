"""The errors of effilib that a person is meant to read: one clear sentence each."""

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TypeVar

__all__ = ["BadInput", "CannotWrite", "NoEffect", "NotApplicable", "choose", "out_of_memory", "within"]

T = TypeVar("T")


class BadInput(ValueError):
    """Something that the user gave cannot be used. The message names the thing and the choices.

    >>> Recipe(lr=0)
    Traceback (most recent call last):
    effilib.errors.BadInput: recipe: lr is 0, it must be above 0
    """


class CannotWrite(OSError, BadInput):
    """A file cannot be written, such as on a full disk; what was there before is there still.

    >>> import errno, os
    >>> raise CannotWrite(errno.ENOSPC, os.strerror(errno.ENOSPC), "mine.csv")
    Traceback (most recent call last):
    effilib.errors.CannotWrite: cannot write mine.csv: No space left on device
    """

    def __str__(self):
        return f"cannot write {self.filename}: {self.strerror}"


class NotApplicable(BadInput):
    """A method cannot be tried on such a network or such data; nobody typed anything wrong.

    A notebook that raises it, or `NoEffect`, is skipped with this reason, and its series goes on.

    >>> from effilib import data
    >>> from effilib.methods.class_arrival import stages
    >>> stages(data.synthetic(classes=2))
    Traceback (most recent call last):
    effilib.errors.NotApplicable: synthetic has 2 classes: Tree-CNN needs 3 or more, ...
    """


class NoEffect(RuntimeError):
    """A method matched nothing in the model. Silence here would be measured as "no speed-up".

    >>> from effilib.methods.stochastic_pooling import replace_pools_
    >>> replace_pools_(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.AvgPool2d)
    Traceback (most recent call last):
    effilib.errors.NoEffect: stochastic pooling: Sequential has no nn.MaxPool2d layer (...)
    """


def choose(kind: str, value: T, choices: Iterable[T]) -> T:
    """Return `value` if it is one of `choices`; else raise `BadInput` with the choices and a near miss.

    >>> choose("preset", "quikc", ["quick", "study"])
    Traceback (most recent call last):
    effilib.errors.BadInput: unknown preset 'quikc': choose one of quick, study (did you mean 'quick'?)
    """
    choices = list(choices)
    if value in choices:
        return value
    names = [str(c) for c in choices]
    near = difflib.get_close_matches(str(value), names, n=3)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if len(names) > 20:  # nobody reads fifty names: the nearest ones, and how many there are
        names = [*(near or names[:10]), f"... ({len(names)} in all)"]
    raise BadInput(f"unknown {kind} {value!r}: choose one of {', '.join(names)}{hint}")


RANGES = {
    "above 0": lambda n: 0 < n < math.inf,
    "0 or above": lambda n: 0 <= n < math.inf,
    "from 0 to 1": lambda n: 0 <= n <= 1,
    "above 0, to 1": lambda n: 0 < n <= 1,
    "from 0 to below 1": lambda n: 0 <= n < 1,
    "a whole number above 0": lambda n: isinstance(n, Integral) and n > 0,
    "a whole number, 0 or above": lambda n: isinstance(n, Integral) and n >= 0,
}


def within(what: str, value: object, words: str) -> None:
    """Raise `BadInput` unless a number lies in the range in words.

    >>> within("recipe: momentum", 2, "from 0 to below 1")
    Traceback (most recent call last):
    effilib.errors.BadInput: recipe: momentum is 2, it must be from 0 to below 1
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not RANGES[words](value):
        raise BadInput(f"{what} is {value!r}, it must be {'' if number else 'a number, '}{words}")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out.

    >>> out_of_memory(RuntimeError("CUDA out of memory")), out_of_memory(ValueError("no such thing"))
    (True, False)
    """
    said = r"out of memory|(can't|cannot) allocate memory|not enough memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(re.search(said, str(error)))
    )
