"""Evaluate a network on a split: loss and accuracy, hits by class, and logits over several views."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution
from effilib.dataset import Dataset
from effilib.recipe import at_least_fp32, autocast

__all__ = ["class_hits", "crop_logits", "evaluate"]


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, split: str, precision: str = "fp32") -> tuple[float, float]:
    """Return (mean cross entropy, accuracy in %) on a split.

    In eval mode. split: "decide", "validation" or "test".

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> loss, accuracy = evaluate(net, data, "validation")
    >>> 0 <= accuracy <= 100
    True
    """
    total, correct = 0.0, 0
    part = getattr(dataset, split)
    with convolution.evaluating(model), autocast(precision, dataset.device):
        for x, y in dataset.batches(part):
            logits = at_least_fp32(model(x))
            total += F.cross_entropy(logits, y, reduction="sum").double()
            correct += (logits.argmax(1) == y).sum()
    return float(total) / len(part), 100 * float(correct) / len(part)


@torch.no_grad()
def class_hits(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    precision: str = "fp32",
    multi_crop: float = 0.0,
    flip: bool = True,
) -> list[list[int]]:
    """Return [correct, all] by class, in eval mode, on a split.

    multi_crop: see `Recipe`. flip: whether its views are also mirrored, as training images were.

    >>> data = load("synthetic")
    >>> correct, images = class_hits(build("convnet", data.classes, data.shape, widths=(4, 8)), data, "test")
    >>> sum(images) == len(data.test), all(c <= n for c, n in zip(correct, images))
    (True, True)
    """
    counts = torch.zeros(2, dataset.classes, dtype=torch.long, device=dataset.device)
    with convolution.evaluating(model), autocast(precision, dataset.device):
        for x, y in dataset.batches(getattr(dataset, split)):
            right = y[crop_logits(model, x, multi_crop, flip).argmax(1) == y]
            counts += torch.stack(
                [torch.bincount(labels, minlength=dataset.classes) for labels in (right, y)]
            )
    return counts.tolist()


@torch.no_grad()
def crop_logits(model: nn.Module, x: torch.Tensor, share: float = 1.0, flip: bool = True) -> torch.Tensor:
    """Return logits (N, classes) in 32 bits; of the least certain images averaged over six views.

    x: (N, C, H, W). The views are the image and two crops of it, shifted by a pixel along the diagonal, each
    also mirrored if images are flipped; the image itself counts for half. share: of the images that have
    them, those with the smallest margin between their first two classes. (Jordan 2024, arXiv:2404.00498;
    of a share: Hiverge 2025.)

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(4, 1, 8, 8)
    >>> changed = (crop_logits(net, x, share=0.5) != crop_logits(net, x, share=0)).any(1)
    >>> int(changed.sum())
    2
    """
    logits = at_least_fp32(model(x))
    if not share:
        return logits
    first, second = logits.softmax(1).topk(2).values.T
    doubtful = (first - second).argsort()[: math.ceil(share * len(x))]
    x = x[doubtful]
    height, width = x.shape[2:]
    padded = F.pad(x, [1] * 4, mode="reflect")
    shifted = [padded[:, :, d : d + height, d : d + width] for d in (0, 2)]

    def view(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return at_least_fp32(model(x))

    def both(x, plain):
        return (plain + view(x.flip(3))) / 2 if flip else plain

    crops = sum(both(s, view(s)) for s in shifted) / 2
    logits[doubtful] = (both(x, logits[doubtful]) + crops) / 2
    return logits
