"""What may stand in BatchNorm's place: nothing but a bias, or GroupNorm (the controls of chapter 7.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from effilib.errors import NoEffect, choose, within
from effilib.hooks import Method
from effilib.run import Run
from effilib.surgery import adopt_, forget_

__all__ = ["Bias", "OtherNorm", "replace_norms_"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Bias(nn.Module):
    """Add a bias per channel, (C,), where a BatchNorm stood.

    >>> Bias(torch.tensor([1.0, 2.0]))(torch.zeros(1, 2, 1, 1)).flatten().tolist()
    [1.0, 2.0]
    """

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def replace_norms_(
    model: nn.Module, make: Callable, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, nn.Module]:
    """Replace each BatchNorm of `model` by `make(norm)`, in place.

    Returns dict name -> new module; a shared one stays shared. The function changes. A parameter `bias` or
    `weight` of the new module takes the value of the old one, where both have it; the optimizer follows, the
    new ones without momentum. Raises `NoEffect` where there is no BatchNorm.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> list(replace_norms_(net, lambda norm: nn.GroupNorm(1, norm.num_features)))
    ['features.1', 'features.5']
    """
    found, made = {}, {}
    for prefix, parent in list(model.named_modules()):
        for child, norm in list(parent._modules.items()):  # `named_children` leaves out repetitions
            if not isinstance(norm, NORMS):
                continue
            if norm not in made:
                made[norm] = new = make(norm).to(_like(norm, model)).train(norm.training)
                old = dict(norm.named_parameters())
                for name, p in new.named_parameters():
                    if name in old:
                        p.data.copy_(old[name].data)
                if old:  # behind one of the old parameters, in its group
                    adopt_(optimizer, list(new.parameters()), next(iter(old.values())))
                elif optimizer is not None:
                    optimizer.param_groups[0]["params"].extend(new.parameters())
                forget_(optimizer, old.values())
            setattr(parent, child, made[norm])
            found[f"{prefix}.{child}".lstrip(".")] = made[norm]
    if not found:
        raise NoEffect(f"standardization loss: {type(model).__name__} has no BatchNorm layer to replace")
    return found


def _like(norm, model):
    """A tensor of the old module, whose device and format are the new one's too."""
    held = [*norm.parameters(), *norm.buffers(), *model.parameters()]
    return next((t for t in held if t.is_floating_point()), torch.empty(0))


@dataclass(frozen=True, kw_only=True)
class OtherNorm(Method):
    """Train with something else in every BatchNorm's place: the controls.

    kind: a bias ("none") or a GroupNorm ("group"). groups: at most so many, of equal size.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [OtherNorm(kind="group")]).events[0]["text"]
    '2 BatchNorms are now: group'
    """

    kind: str = "none"
    groups: int = 8

    def __post_init__(self):
        choose("normalisation", self.kind, ("none", "group"))
        within("normalisation: groups", self.groups, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        def make(norm):
            c = norm.num_features
            if self.kind == "none":
                return Bias(nn.Parameter(torch.zeros(c)))
            return nn.GroupNorm(max(g for g in range(1, min(self.groups, c) + 1) if c % g == 0), c)

        found = {}
        run.restructure(lambda model, optimizer: found.update(replace_norms_(model, make, optimizer)))
        run.log(self, f"{len(found)} BatchNorms are now: {self.kind}")
