"""Shrink groups of weights by group lasso (Yuan & Lin 2006): penalty, proximal step, steps until one is gone.

A group is what one channel owns of a layer: the rows that write it, or the columns that read it.
"""

from typing import cast

import torch

from effilib import surgery

__all__ = [
    "coefficient", "group_lasso", "group_norms", "group_weight", "places", "shrink_", "shrink_steps",
    "weights",
]  # fmt: skip

Place = tuple[str, int, int]  # a layer's name, the axis of its groups, neighbouring columns of a group
Group = tuple[torch.Tensor, int, int]  # the same with the layer's weight


def group_norms(W: torch.Tensor, axis: int, per: int = 1) -> torch.Tensor:
    """Return the norms of the groups of W along `axis`: (n,).

    A group is what one channel owns: `per` neighbouring columns of a linear layer behind a flattened picture.

    >>> group_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 0)
    tensor([5., 1.])
    """
    return _squares(W, axis, per).sqrt()


def _squares(W, axis, per):
    """Squares of the groups' norms: finite gradients at 0, in half the time of PyTorch's norm."""
    squares = W.square().sum([a for a in range(W.dim()) if a != axis])
    return squares if per == 1 else squares.view(-1, per).sum(1)


def group_weight(W: torch.Tensor, axis: int, per: int = 1, weigh: str = "equal") -> float | torch.Tensor:
    """Return what the norms of a layer's groups count.

    1; by "size" the root of a group's size (Yuan & Lin 2006); by "norm" their mean. Small groups, as a
    classifier's columns, have small norms and die first where all count alike; by "norm" every layer shrinks
    by the same share.

    >>> group_weight(torch.ones(2, 9), 0), group_weight(torch.ones(2, 9), 0, weigh="size")
    (1.0, 3.0)
    """
    if weigh == "norm":
        return group_norms(W, axis, per).detach().mean()
    return (W.numel() // W.shape[axis] * per) ** 0.5 if weigh == "size" else 1.0


def group_lasso(groups: list[Group], eps: float = 1e-8, weigh: str = "equal") -> torch.Tensor:
    """Return the group lasso of all groups.

    G(W) = sum_g sqrt(||W_g||^2 + eps), differentiable. groups: (W, axis, per) of each layer and side.

    >>> W = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> group_lasso([(W, 0, 1)]).item()  # 5 + 1
    6.0
    """
    sums = [group_weight(*g, weigh) * (_squares(*g) + eps).sqrt().sum() for g in groups]
    return torch.stack(sums).sum()


def coefficient(ratio: float, loss: float, penalty: float) -> float:
    """Return lambda, which makes the penalty's share r.

    lambda = r L / (G (1 - r)). loss, penalty: L and G, of the first batch.

    >>> coefficient(0.2, loss=2.0, penalty=10.0)  # 0.05 x 10 is a fifth of 2 + 0.5
    0.05
    """
    return ratio * loss / (penalty * (1 - ratio))


@torch.no_grad()
def shrink_(groups: list[Group], kappa: float, weigh: str = "equal", keep_scale: bool = False) -> None:
    """Take the proximal step: W_g <- W_g max(0, 1 - kappa / ||W_g||).

    For every group, in their order: producers' rows first, then consumers' columns. keep_scale: each layer is
    scaled back to the norm that it had, so that only the groups' shares of it change.

    >>> W = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> shrink_([(W, 0, 1)], kappa=2.5)
    >>> W.tolist()
    [[1.5, 2.0], [0.0, 0.0]]
    """
    for W, axis, per in groups:
        norm = group_norms(W, axis, per)
        weight = norm.mean() if weigh == "norm" else group_weight(W, axis, per, weigh)  # not taken twice
        factor = (1 - kappa * weight / norm.clamp_min(1e-12)).clamp_min_(0)
        if keep_scale:
            factor *= norm.norm() / (factor * norm).norm().clamp_min(1e-12)
        W.mul_(factor.repeat_interleave(per).view([-1 if a == axis else 1 for a in range(W.dim())]))


def shrink_steps(
    norm: float, lam: float, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> float:
    """Return the steps until a group without a gradient is gone.

    (1 - mu) / (eta wd) ln(1 + wd ||W|| / lambda); without weight decay (1 - mu) ||W|| / (eta lambda).

    >>> round(shrink_steps(norm=1.0, lam=0.1, lr=0.1), 6)
    10.0
    """
    rate = lam * lr / (1 - momentum)
    if weight_decay == 0:
        return norm / rate
    decay = weight_decay * lr / (1 - momentum)
    return float(torch.log1p(torch.tensor(decay * norm / rate, dtype=torch.double))) / decay


def places(nodes: list[surgery.Node], rule: str = "union") -> list[Place]:
    """Return where the groups of these nodes lie.

    (layer, axis, columns a channel) of all producers' rows, then of all consumers' columns. A network's input
    channels and its outputs belong to no node, so they are not penalised; nor are biases and BatchNorms.
    rule: "readers" leaves the producers' rows out.

    >>> places(surgery.nodes(build("convnet", 4, (1, 8, 8), widths=(4, 8))))
    [('features.0', 0, 1), ('features.4', 0, 1), ('features.4', 1, 1), ('head', 1, 1)]
    """
    rows = [
        (name, 0, 1)
        for node in nodes
        for name in node.producers
        if hasattr(node.layer(name), "weight") and rule == "union"
    ]
    return rows + [(name, 1, per) for node in nodes for name, per in node.consumers.items()]


def weights(model: torch.nn.Module, places: list[Place]) -> list[Group]:
    """Return the groups at these places: (W, axis, columns a channel).

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> [(W.shape, axis) for W, axis, _ in weights(net, [("head", 1, 1)])]
    [(torch.Size([4, 8]), 1)]
    """
    return [(cast(torch.Tensor, model.get_submodule(n).weight), axis, per) for n, axis, per in places]
