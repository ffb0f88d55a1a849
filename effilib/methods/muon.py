"""Muon: update a layer's filters by the nearest orthogonal matrix (Jordan et al. 2024).

The gradient G of a convolution, as a matrix of one filter a row (C_out, C_in k k), goes into a momentum
B = m B + G, and the filters follow its orthogonal factor, all of whose singular values are 1:

    G + m B = U S V^T,    O ~ U V^T,    W = W sqrt(C_out) / |W| - lr O

so that directions with a small gradient are learned as fast as those with a large one. O comes without an
SVD, by a few Newton-Schulz steps on X = G / |G|, which only need products of matrices:

    X <- a X + (b A + c A A) X,    A = X X^T,    (a, b, c) = (3.4445, -4.7750, 2.0315)

That takes every singular value to about 0.7 ... 1.2, near enough. Before a step filters are scaled back to
the norm sqrt(C_out): behind a BatchNorm their scale means nothing but their learning rate. `torch.optim.Muon`
takes matrices only, and does not scale back.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from effilib.errors import NoEffect, within
from effilib.hooks import Method
from effilib.run import Run

__all__ = ["Muon", "orthogonalize"]
STEP = (3.4445, -4.7750, 2.0315)  # a, b, c


def orthogonalize(g: torch.Tensor, steps: int = 3, eps: float = 1e-7) -> torch.Tensor:
    """Return about U V^T, by Newton-Schulz steps.

    g = U S V^T: (..., M, K); a batch of matrices is worked on at once. The result has its type.

    >>> g = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    >>> values = torch.linalg.svdvals(orthogonalize(g, steps=5))
    >>> bool((values > 0.6).all() and (values < 1.3).all())
    True
    """
    a, b, c = STEP
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + eps)
    tall = g.shape[-2] > g.shape[-1]
    x = x.mT if tall else x  # A is square of the smaller side
    for _ in range(steps):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x


def _filters(model):
    """name -> weight of the convolutions behind the first one that learn and see more than a pixel."""
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    return {
        f"{n}.weight": m.weight
        for n, m in convs
        if m.weight.requires_grad and m.groups == 1 and m.kernel_size != (1, 1)
    }


@dataclass(frozen=True, kw_only=True)
class Muon(Method):
    """Train convolutions behind the first one by Muon.

    All else is trained by the recipe's SGD. Their learning rate follows the recipe's schedule. There is no
    weight decay: the norm is held.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [Muon()]).events[0]["text"]
    '1 convolutions are trained by Muon'
    """

    lr: float = 0.24  # at the schedule's top: the step's length in singular values
    momentum: float = 0.6
    steps: int = 3  # of Newton-Schulz
    renormalize: bool = True  # whether filters are scaled back before a step

    def __post_init__(self):
        within("Muon: lr", self.lr, "above 0")
        within("Muon: momentum", self.momentum, "from 0 to below 1")
        within("Muon: steps", self.steps, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        found = _filters(run.model)
        if not found:
            raise NoEffect("Muon: no convolution behind the first one learns")
        run.state[self] = {"momentum": {}}
        run.log(self, f"{len(found)} convolutions are trained by Muon")

    @torch.no_grad()
    def on_after_backward(self, run: Run) -> None:
        momenta, lr = run.state[self]["momentum"], self.lr * run.lr / run.recipe.lr
        for name, w in _filters(run.model).items():
            if w.grad is None:
                continue
            old = momenta.get(name)
            old = momenta[name] = torch.zeros_like(w) if old is None or old.shape != w.shape else old
            old.mul_(self.momentum).add_(w.grad)
            g = w.grad.add(old, alpha=self.momentum).flatten(1)  # Nesterov
            low = torch.bfloat16 if run.precision in ("bf16", "fp16") else g.dtype
            o = orthogonalize(g.to(low), self.steps).to(w.dtype).view_as(w)
            if self.renormalize:
                w.mul_(math.sqrt(len(w)) / w.norm())
            w.add_(o, alpha=-lr)
            w.grad = None  # so that the optimizer leaves it
