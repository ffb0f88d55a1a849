"""A penalty in milliseconds: what is worth its time survives.

The thesis looks at what was pruned lately to tell where a network needs its channels. A penalty that counts
channels alike answers another question than the one that is asked, which is about time: a channel of the
first stage costs many times as much of a step as one of the last. Here everything that could go is priced in
the milliseconds that it takes, the channels inside of blocks and the blocks themselves:

    loss + lambda * sum over channels c of p_c |W_c| / m + mu * sum over blocks b of P_b |gamma_b| / sqrt(n_b)

W_c are the weights that read a channel, m their layer's mean norm, gamma_b the n_b scales of a block's last
BatchNorm, which begin at 1. Under BatchNorm a layer's own scale is free, so that the layer is scaled back
after each proximal step and only its channels' shares of it tell. lambda and mu follow from `goes`, the share
of all priced channels, and of all priced blocks, that is to go by the end of the run: each proximal step is
as strong as it has to be for the share that is due by then (`strength`). What gradients hold comes back in
between. A block whose scales begin at 0 is newborn: it has to earn them, and what is inside is left alone.
"""

from dataclasses import dataclass
from typing import cast

import torch

from effilib.errors import BadInput, within
from effilib.hooks import Method
from effilib.methods.group_lasso import Group, group_norms, shrink_
from effilib.networks import Block, ResNet
from effilib.run import Run

__all__ = ["Pressure", "norms", "parts", "strength", "survival"]


def parts(model: torch.nn.Module) -> list[tuple[int, Group, Group]]:
    """Return what can go of a ResNet, for each block.

    As (stage's number, channels of the block, the block). The last two are groups as in `prune_train`: the
    weights by which the channels between its two convolutions are read, and the scale of its last BatchNorm,
    as one group. Raises `BadInput` for another network.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1))
    >>> [(stage, W.shape, gamma.shape) for stage, (W, *_), (gamma, *_) in parts(net)][1]
    (1, torch.Size([16, 16, 3, 3]), torch.Size([1, 16]))
    """
    if not isinstance(model, ResNet):
        raise BadInput(f"a priced penalty knows our ResNets' blocks, this network is {type(model).__name__}")
    return [
        (i, (cast(torch.Tensor, block.conv2.weight), 1, 1), (block.bn2.weight.view(1, -1), 0, 1))
        for i, stage in enumerate(model.stages)
        for block in stage
        if isinstance(block, Block) and block.inner
    ]


@torch.no_grad()
def norms(model: torch.nn.Module) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Return the norms of all `parts`: (stage, (channels,), (1,)) for each block.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(4,), blocks=(1,))
    >>> stage, channels, block = norms(net)[0]
    >>> channels.shape, block  # four scales of 1
    (torch.Size([4]), tensor([2.]))
    """
    return [
        (i, group_norms(*channels).cpu(), group_norms(*block).cpu()) for i, channels, block in parts(model)
    ]


def survival(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the share of each norm that is left, at most 1.

    The continuous pruning rate is 1 less it.

    >>> survival(torch.tensor([0.5, 3.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])).tolist()
    [0.5, 1.0, 0.0]
    """
    return (now / before.clamp_min(1e-12)).clamp_max(1.0)


def strength(
    now: list[torch.Tensor],
    before: list[torch.Tensor],
    prices: list[float],
    goes: float,
    keep_scale: bool = False,
) -> float:
    """Return the kappa after which a share of what's priced has gone.

    Of one proximal step. now, before: norms per layer, (n,), as they are and as they began. prices: of a
    norm, per layer; the step takes kappa times it off, see `shrink_`. Found by bisection; 0 where as much has
    gone already.

    >>> two = [torch.ones(4), torch.ones(4)]
    >>> round(strength(two, two, prices=[3.0, 1.0], goes=0.5), 3)  # (3 * 0.6 + 1 * 0.2) / 4
    0.2
    """
    whole = sum(price * n.sum().item() for n, price in zip(before, prices, strict=True))

    def gone(kappa):
        lost = 0.0
        for n, first, price in zip(now, before, prices, strict=True):
            left = (n - kappa * price).clamp_min(0)
            if keep_scale:
                left = left * n.norm() / left.norm().clamp_min(1e-12)
            lost += price * (first - left).clamp_min(0).sum().item()
        return lost / whole

    if gone(0.0) >= goes:
        return 0.0
    low, high = 0.0, max(n.max().item() / price for n, price in zip(now, prices, strict=True) if price)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if gone(middle) < goes else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Pressure(Method):
    """Shrink channels and blocks of a ResNet by their price.

    Nothing is cut: `norms` tells what has gone.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=2), [Pressure(prices=((1.0, 8.0), (0.5, 8.0)))])
    >>> history.events[-1]["text"]
    '30% of the priced channels, and of the blocks, have gone'
    """

    # per stage, milliseconds (of a channel inside of a block, of a block); (): all cost the same
    prices: tuple[tuple[float, float], ...] = ()
    goes: float = 0.3  # share of the priced channels, and of the blocks, that is to go
    every: int = 4  # steps between two proximal steps

    def __post_init__(self):
        within("Pressure: goes", self.goes, "from 0 to below 1")
        within("Pressure: every", self.every, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        found = norms(run.model)
        stages = 1 + max(i for i, *_ in found)
        prices = self.prices or ((1.0, 1.0),) * stages
        if len(prices) < stages or min(p for pair in prices for p in pair) <= 0:
            raise BadInput(
                f"Pressure: {stages} stages need a price above 0 each, of a channel and of a block"
            )
        # of a norm: of channels, none inside of a newborn block, and of blocks
        channels = [prices[i][0] / c.mean().item() if scale > 0 else 0.0 for i, c, scale in found]
        blocks = [prices[i][1] / gamma.numel() ** 0.5 for i, _, (gamma, *_) in parts(run.model)]
        run.state[self] = {"before": found, "prices": (channels, blocks), "kappas": [0.0, 0.0]}

    @torch.no_grad()
    def on_step_end(self, run: Run) -> None:
        state, now = run.state[self], run.step + 1
        if now % self.every and now < run.steps:
            return
        for kind, keep in ((1, True), (2, False)):
            before, after = ([part[kind] for part in found] for found in (state["before"], norms(run.model)))
            prices = state["prices"][kind - 1]
            kappa = run.ranks.agree(strength(after, before, prices, self.goes * now / run.steps, keep))
            for groups, price in zip(parts(run.model), prices, strict=True):
                shrink_([groups[kind]], kappa * price, keep_scale=keep)
            state["kappas"][kind - 1] += kappa

    def on_fit_end(self, run: Run) -> None:
        kappas = run.state[self]["kappas"]
        run.log(self, f"{self.goes:.0%} of the priced channels, and of the blocks, have gone", kappas=kappas)
