"""What prune, then grow does to a network and reads off it: growth, a penalty's price, dying channels.

The method itself is `effilib.methods.prune_then_grow`, its decisions are `effilib.methods.decision`.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, surgery
from effilib.convolution import evaluating
from effilib.errors import BadInput, choose
from effilib.methods import net2net
from effilib.methods.decision import GROWTH
from effilib.methods.group_lasso import group_norms, group_weight, places, weights
from effilib.recipe import at_least_fp32, autocast
from effilib.run import Run
from effilib.surgery import stages

__all__ = ["going", "grow_", "price", "step_flops", "strengths", "validate"]


def price(steps: float, norm: float, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> float:
    """Return the penalty that removes an idle group in some steps.

    Returns its coefficient. norm: of the group. This is `shrink_steps` solved for lambda.

    >>> from effilib.methods.group_lasso import shrink_steps
    >>> round(shrink_steps(norm=1.0, lam=price(steps=100, norm=1.0, lr=0.1), lr=0.1), 3)
    100.0
    """
    decay = steps * lr * weight_decay / (1 - momentum)
    return norm * (1 - momentum) / (steps * lr) * (decay / math.expm1(decay) if decay else 1.0)


@torch.no_grad()
def strengths(node: surgery.Node, rule: str = "union", weigh: str = "equal") -> torch.Tensor:
    """Return the norm of each channel's strongest group.

    (width,), in the penalty's units. rule, weigh: as in `PruneTrain`.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(2, 4))
    >>> with torch.no_grad():
    ...     net.features[0].weight[1] = net.features[4].weight[:, 1] = 0
    >>> (strengths(surgery.trace(net)["features.0"]) > 0).tolist()
    [True, False]
    """
    groups = weights(node.model, places([node], rule))
    return torch.stack([(group_norms(*g) / group_weight(*g, weigh)).cpu() for g in groups]).amax(0)


def going(now: torch.Tensor, before: torch.Tensor, epochs: float) -> torch.Tensor:
    """Return which channels will be gone after so many epochs.

    (width,) bool. now, before: strengths at the end of this epoch and of the last one, whose pace they keep.

    >>> going(now=torch.tensor([0.1, 0.9]), before=torch.tensor([0.5, 1.0]), epochs=1).tolist()
    [True, False]
    """
    return now < epochs * (before - now)


def grow_(
    model: nn.Module,
    layout: dict,
    stage: int,
    growth: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    factor: float = 1.5,
    multiple: int = 16,
    trunk: bool = False,
    breaker: str = "pair",
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Widen or deepen a stage in place; return what was done.

    stage: its number in the layout of `effilib.surgery.stages`. "widen": every node
    inside of its residual paths (of a plain stage every node, with `trunk` the trunk too) gets `factor` times
    its channels, rounded up to a multiple. "deepen": one more block or layer at its end. breaker: see
    `widening.widen_`; "pair" is exact. x, y: a batch at the size that the network trains on, see
    `net2net.grow_`. Raises `BadInput` where it cannot be, with the network as it was.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(16, 16), blocks=(1, 1))
    >>> layout, x = stages.find(net, (1, 8, 8)), torch.rand(2, 1, 8, 8)
    >>> grow_(net, layout, 1, "widen", x=x), grow_(net, layout, 1, "deepen", x=x)
    (['stages.1.0.conv1 16 -> 32'], ['stages.1.1 added'])
    """
    choose("growth", growth, GROWTH)
    if growth == "deepen":
        deeper = (stages.deepenable(model, layout, stage),)
        return net2net.grow_(model, optimizer, x, y, deeper=deeper, generator=generator)
    nodes = stages.widenable(surgery.trace(model), layout, stage, trunk)
    if not nodes:
        raise BadInput(f"{stages.names(layout)[stage]} has nothing that could become wider")
    wider = tuple((n.name, math.ceil(factor * n.width / multiple) * multiple) for n in nodes)
    return net2net.grow_(model, optimizer, x, y, wider=wider, breaker=breaker, generator=generator)


def step_flops(model: nn.Module, size: tuple[int, ...], batch_size: int) -> int:
    """Count the FLOPs of a training step without computing it.

    size: of an image, (C, H, W).

    >>> step_flops(nn.Conv2d(1, 2, 3), (1, 5, 5), batch_size=2)
    1296
    """
    return cost.step_flops(copy.deepcopy(model).to("meta"), size, batch_size)


@torch.no_grad()
def validate(run: Run, images: int, size: tuple[int, int]) -> tuple[float, float]:
    """Return loss and accuracy on images that decide.

    Mean cross entropy, and %, of the split's first images. size: (H, W) to which they are resized, as those
    of the training are.

    >>> from effilib.run import Run
    >>> data = load("synthetic")
    >>> run = Run(build("convnet", data.classes, data.shape, widths=(4, 8)), data, Recipe(), (), seed=0)
    >>> loss, accuracy = validate(run, 20, (6, 6))
    >>> 0 <= accuracy <= 100
    True
    """
    model, part, loss, correct = run.model, run.decide[:images], 0.0, 0
    with evaluating(model), autocast(run.precision, run.device):
        for x, y in run.dataset.batches(part):
            if x.shape[2:] != size:
                x = F.interpolate(x, size, mode="bilinear", antialias=True)
            logits = at_least_fp32(model(x.contiguous(memory_format=run.layout)))
            loss += F.cross_entropy(logits, y, reduction="sum").double()
            correct += (logits.argmax(1) == y).sum()
    return float(loss) / len(part), 100 * float(correct) / len(part)
