"""Surgery on trial: what must not change is computed before and after, and undone where it does.

`undoing` makes a change all or nothing: an error inside leaves networks and optimizer as they were. `keeping`
also compares the outputs on a batch of images, in eval and in training mode. No list of what may stand before
or behind a layer can replace that: an activation, a scale, a second sum.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from effilib import models, seeds
from effilib.convolution import evaluating
from effilib.errors import BadInput

__all__ = ["keeping", "undoing"]

TOLERANCE = 1e-3  # of the largest output


@contextlib.contextmanager
def undoing(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Undo the changes made inside if they end in an error.

    Modules, their attributes, weights and buffers, and the optimizer's groups and state come back.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> try:
    ...     with undoing(net):
    ...         del net[1]
    ...         raise BadInput("no")
    ... except BadInput:
    ...     len(net)
    2
    """
    inner = ("_modules", "_parameters", "_buffers")
    attributes = [(m, {**vars(m), **{k: dict(vars(m)[k]) for k in inner}}) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    groups = [(g, {**g, "params": list(g["params"])}) for g in optimizer.param_groups] if optimizer else []
    state = {p: dict(s) for p, s in optimizer.state.items()} if optimizer else {}
    try:
        yield
    except Exception:
        for m, was in attributes:
            vars(m).clear()
            vars(m).update(was)
        with torch.no_grad():
            for t, value in zip(tensors, values, strict=True):
                if not t.is_meta and not torch.equal(t, value):
                    t.copy_(value)
        if optimizer:
            for group, was in groups:
                group.clear()
                group.update(was)
            optimizer.param_groups[:] = [group for group, _ in groups]
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


@contextlib.contextmanager
def keeping(
    what: str,
    model: nn.Module,
    x: torch.Tensor | None,
    optimizer: torch.optim.Optimizer | None = None,
    modes: tuple[str, ...] = ("eval", "training"),
) -> Iterator[None]:
    """Undo and refuse changes to what the network computes.

    what: the change, in words. x: (N, C, H, W), images to compute, in these modes, dropout off in both; None:
    nothing is compared. Outputs may move by a thousandth of the largest, or three times as far as by other
    draws and noise of a millionth (or of its numbers' rounding) on the images, where BatchNorms of few values
    magnify rounding, or a network draws at random. Raises `BadInput` after an undone change.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid())
    >>> with keeping("a second sigmoid", net, torch.rand(4, 2)):
    ...     net.append(nn.Sigmoid())
    Traceback (most recent call last):
    effilib.errors.BadInput: a second sigmoid would change what Sequential computes in eval mode (by ...
    >>> len(net)
    2
    """
    modes = () if x is None else modes
    noise = max([1e-6, *(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())])
    before = {mode: _computed(model, x, mode) for mode in modes}
    near = {mode: _apart(_computed(model, x, mode, noise), before[mode]) for mode in modes}
    name = type(model).__name__
    with undoing(model, optimizer):
        yield
        for mode in modes:
            try:
                off = _apart(_computed(model, x, mode), before[mode])
            except Exception as error:  # whatever a user's network raises
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise BadInput(f"{what}: {name} would fail in {mode} mode ({reason}); undone") from error
            if not off <= max(TOLERANCE, 3 * near[mode]):
                raise BadInput(
                    f"{what} would change what {name} computes in {mode} mode (by {off:.1%} of the largest "
                    "output); undone"
                )


@torch.no_grad()
def _computed(model, x, mode, nudge=0.0):
    """The network's outputs in a row, however they are packed; nothing is learned. nudge: noise on x, with
    another seed for what the network draws.
    """
    with (
        models.untouched(model) if mode == "training" else evaluating(model),
        seeds.seeded(int(nudge > 0), x.device),
        _fp32(),
    ):
        for m in model.modules():
            m.training &= not isinstance(m, _DropoutNd)
        found = model(x + nudge * torch.randn_like(x) if nudge else x)
        return torch.cat([t.flatten() for t in tree_leaves(found) if isinstance(t, torch.Tensor)])


@contextlib.contextmanager
def _fp32():
    """No products in TF32, whose rounding comes near the tolerance."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _apart(now, before):
    """The largest difference, over the largest output; 0 where there are no numbers to compare."""
    if now.shape != before.shape:
        return math.inf
    if before.is_meta or not before.isfinite().all():
        return 0.0
    return float((now - before).abs().max() / (before.abs().max() or 1.0))
