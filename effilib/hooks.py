"""Define how a method takes part in training: its hooks, and what is checked of them."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from effilib.errors import BadInput

if TYPE_CHECKING:
    from effilib.run import Run

__all__ = ["HOOKS", "Method", "check_methods"]


class Method:
    """What takes part in training. A frozen dataclass of settings; its state lives in `run.state[self]`, made
    in `on_fit_start`.

    Override what is needed; every hook takes the `Run`. Hooks are called in the order of the methods.

    >>> class Noise(Method):
    ...     def on_after_backward(self, run):
    ...         for p in run.model.parameters():
    ...             p.grad += 0.01 * torch.randn(p.shape, generator=run.generator(self))
    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [Noise()]).steps
    2
    """

    def on_fit_start(self, run: "Run") -> None:
        """Before the first step: install, convert layers, make the state."""

    def on_epoch_start(self, run: "Run") -> None:
        """Before an epoch's first step."""

    def on_batch(self, run: "Run", x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (x, y) to train on: x (N, C, H, W), y (N,)."""
        return x, y

    def loss_terms(self, run: "Run") -> torch.Tensor | None:
        """Return a scalar to add to the loss, or None.

        `run.logits` and `run.loss` are there.
        """

    def on_after_backward(self, run: "Run") -> None:
        """Act on unscaled gradients, before the optimizer's step."""

    def on_step_end(self, run: "Run") -> None:
        """Act after the optimizer's step."""

    def on_epoch_end(self, run: "Run") -> None:
        """After an epoch's last step, before its evaluation."""

    def on_evaluation(self, run: "Run") -> None:
        """Before an evaluation for the record, off the clock: make the model what evaluation expects, without
        training it.
        """

    def on_fit_end(self, run: "Run") -> None:
        """After the last step, before the last evaluation: leave a plain model behind."""


HOOKS = [name for name in vars(Method) if name.startswith("on_") or name == "loss_terms"]


def check_methods(methods: Iterable[Method]) -> tuple[Method, ...]:
    """Return the methods; raise `BadInput` for what could not take part in a run.

    That is a hook that nobody would call, or settings by which no state could be kept.

    >>> class Misspelt(Method):
    ...     def on_epoch_begin(self, run): ...
    >>> check_methods([Misspelt()])
    Traceback (most recent call last):
    effilib.errors.BadInput: nothing calls Misspelt.on_epoch_begin: ... (did you mean 'on_epoch_start'?)
    """
    methods = tuple(methods)
    for m in methods:
        cls = m if isinstance(m, type) else type(m)
        name = cls.__name__
        if not issubclass(cls, Method) or cls is m:
            raise BadInput(f"expected a method with its settings, an instance of effilib.Method, got {m!r}")
        for word in sorted({*dir(cls)} - {*dir(Method)}):
            meant = word.replace("begin", "start").replace("train", "fit")  # as other libraries say
            near = difflib.get_close_matches(meant, HOOKS, n=1, cutoff=0.85)
            if (near or word.startswith("on_")) and callable(getattr(cls, word)):
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise BadInput(f"nothing calls {name}.{word}: the hooks are {', '.join(HOOKS)}{hint}")
        try:
            hash(m)
        except TypeError as error:
            held = {k: type(v).__name__ for k, v in vars(m).items() if type(v).__hash__ is None}
            said = ", ".join(f"{k!r} is a {kind}: make it a tuple" for k, kind in held.items())
            frozen = "write @dataclass(frozen=True, kw_only=True) above it"
            raise BadInput(f"the settings of {name} could change in mid-run; {said or frozen}") from error
    if len(set(methods)) < len(methods):
        raise BadInput(f"two methods are equal and would share their state: {', '.join(map(repr, methods))}")
    return methods


def checked_hook(method, name):
    """A method's hook, which is named in what it raises, and whose answer is checked."""
    own, said = getattr(method, name), f"{type(method).__name__}.{name}"

    def hook(run, *batch):
        before, run.calling = _shared(), said
        try:
            answer = own(run, *batch)
        except SystemExit as error:
            raise BadInput(f"{said} ends the program at step {run.step}: exit({error.code!r})") from error
        except Exception as error:
            error.add_note(f"{said} raised this, at step {run.step}")
            raise
        if changed := [s for s, value in _shared().items() if value != before[s]]:
            for setting in changed:
                getattr(torch, setting)(before[setting])
            raise BadInput(
                f"{said} left torch.{changed[0]}({before[changed[0]]}) changed, which other runs share:"
                " it has to set that back"
            )
        if name == "on_batch" and not _is_batch(answer):
            raise BadInput(
                f"{said} has to return the (x, y) to train on, a label for each image; it returned"
                f" {_kind(answer)}"
            )
        if name == "loss_terms" and answer is not None and getattr(answer, "ndim", isinstance(answer, str)):
            raise BadInput(f"{said} has to return one number, it returned {_kind(answer)}")
        return answer

    hook.__qualname__ = said
    return hook


def _shared():
    """PyTorch's settings of the whole process, each by the function that sets it."""
    return {
        "set_grad_enabled": torch.is_grad_enabled(),
        "set_num_threads": torch.get_num_threads(),
        "set_default_dtype": torch.get_default_dtype(),
        "set_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _kind(answer):
    """What a hook returned, in words."""
    if isinstance(answer, tuple | list):
        return f"({', '.join(map(_kind, answer))})"
    shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else ""
    return f"{'None' if answer is None else type(answer).__name__}{shape}"


def _is_batch(answer):
    tensors = isinstance(answer, tuple | list) and all(isinstance(t, torch.Tensor) for t in answer)
    return tensors and len(answer) == 2 and 0 < len(answer[0]) == len(answer[1])
