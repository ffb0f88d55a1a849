"""effilib: time-efficient training of convolutional neural networks, method by method, measured under one
protocol.

    from effilib import Arm, compare, task

The names below are imported when they are first used: `import effilib` itself loads nothing.
"""

import importlib

__version__ = "0.2.0"

_WHERE = {
    "load": "data",
    "build": "models",
    "task": "tasks",
    "Recipe": "recipe",
    "Method": "hooks",
    "History": "history",
    "train": "training",
    "evaluate": "evaluation",
    "attach": "own_loop",
    "Arm": "experiment",
    "compare": "results",
    "BadInput": "errors",
    "NoEffect": "errors",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'effilib' has no attribute {name!r}")
    return getattr(importlib.import_module(f"effilib.{_WHERE[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
