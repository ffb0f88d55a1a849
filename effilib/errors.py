"""The errors of effilib that a person is meant to read: one clear sentence each."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["BadInput", "NoEffect", "NotApplicable", "choose"]

T = TypeVar("T")


class BadInput(ValueError):
    """Something that the user gave cannot be used. The message names the thing and the choices.

    >>> Recipe(lr=0)
    Traceback (most recent call last):
    effilib.errors.BadInput: recipe: lr is 0, it must be above 0
    """


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
