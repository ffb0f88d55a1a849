"""Structured subsets of the activation gradients (chapter 4.1), which save time on dense kernels.

Zeros in a gradient are multiplied like any number; output channels, or samples, that are left out are not.
Each layer draws its own, and the sums are scaled so that their expectation stays.
"""

from dataclasses import dataclass

import torch
from torch import nn

from effilib import convolution as conv
from effilib.convolution import Approximation
from effilib.errors import choose, within
from effilib.hooks import Method
from effilib.run import Run

__all__ = ["GradientSubsets", "subset_gradients_"]


def random_subset(
    n: int, keep: float, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, float]:
    """Return (index, scale): k = round(keep n) >= 1 of n slices, and n / k.

    Scaled by it their sum is unbiased.

    >>> index, scale = random_subset(8, 0.25, torch.Generator().manual_seed(0))
    >>> len(index), scale
    (2, 4.0)
    """
    k = max(1, round(keep * n))
    return torch.randperm(n, generator=generator)[:k].sort().values.to(device), n / k


SUBSETS = {
    "outputs": (conv.dx_of_outputs, conv.dw_of_outputs, 1),
    "samples": (conv.dx_of_samples, conv.dw_of_samples, 0),
}


def subset_gradients_(
    model: nn.Module,
    keep: float,
    generator: torch.Generator,
    *,
    dx: str | None = "outputs",
    dw: str | None = "outputs",
    x: torch.Tensor | None = None,
    owner: object = "gradient subsets",
) -> list[str]:
    """Compute dX and dW of convolutions from random subsets, in place.

    Of all but the stem, scaled without bias. keep: share of the slices. dx, dw: of what: "outputs"
    (channels), "samples", or None: exact. If both name the same, they share the subset. Grouped convolutions
    stay exact. Returns the names; raises `NoEffect` if no layer matched.

    >>> subset_gradients_(build("convnet", 4, (1, 8, 8), widths=(4, 8)), 0.5, torch.Generator())
    ['features.4']
    """
    for of in (dx, dw):
        choose("subset", of, (*SUBSETS, None))
    within("gradient subsets: keep", keep, "above 0, to 1")

    def made():
        drawn = {}

        def draw(dy):  # one draw a layer and batch, for dX and dW
            drawn.clear()
            for of in dict.fromkeys(filter(None, (dx, dw))):
                drawn[of] = random_subset(dy.shape[SUBSETS[of][2]], keep, generator, dy.device)
            return dy

        def part(of, which):
            return lambda dy, x, w, product: SUBSETS[of][which](dy, x, w, product, *drawn[of])

        return Approximation(output_gradient=draw, dx=dx and part(dx, 0), dw=dw and part(dw, 1))

    chosen = {n: m for n, m in conv.layers(model, x).items() if m.groups == 1}
    wanted = chosen if keep < 1 and (dx or dw) else {}
    return conv.convert_(chosen, {n: made() for n in wanted}, owner, "gradient subsets")


@dataclass(frozen=True, kw_only=True)
class GradientSubsets(Method):
    """Train with structured, unbiased subsets of the activation gradients.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [GradientSubsets(keep=0.5)])
    >>> history.events[-1]["text"]
    '1 layers: dX from 50% of outputs, dW from 50% of outputs'
    """

    keep: float = 0.5  # share of the slices
    dx: str | None = "outputs"  # of what dX is computed: "outputs" (channels), "samples", None: exact
    dw: str | None = "outputs"  # the same for dW; if both name the same, they share the subset

    def on_fit_start(self, run: Run) -> None:
        x = run.dataset.normalize(run.dataset.train.x[:2])
        names = subset_gradients_(
            run.model, self.keep, run.generator(self, share=True), dx=self.dx, dw=self.dw, x=x, owner=self
        )
        run.state[self] = {"layers": names}

    def on_fit_end(self, run: Run) -> None:
        conv.revert_(run.model, self)
        run.log(
            self,
            f"{len(run.state[self]['layers'])} layers: dX from {self.keep:.0%} of {self.dx}, "
            f"dW from {self.keep:.0%} of {self.dw}",
        )
