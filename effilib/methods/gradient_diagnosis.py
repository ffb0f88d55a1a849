"""GradMax as a diagnosis: where would new weights have the largest gradient for their time?

Evci et al. 2022 (arXiv:2201.05125) grow where the gradient's norm becomes largest, and find the best new
weights by singular vectors. The singular values alone say how much each place would gain. Only the leading
ones count, of the smaller Gram matrix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, networks
from effilib.convolution import evaluating
from effilib.methods.diagnosis import Case, ranked
from effilib.methods.patients import FACTOR, KEEP

__all__ = ["GradMax", "leading_values"]


def leading_values(M: torch.Tensor, k: int, k1: int = 3, k2: int = 3, stride: int = 1) -> torch.Tensor:
    """Return the k largest squared singular values of GradMax's matrix, largest first.

    They are the squared gradient norms that k new channels' incoming weights would have. M: (c_out, c_in, K,
    K) as in `gradmax_directions`. Only the smaller Gram matrix is decomposed.

    >>> leading_values(torch.ones(1, 1, 5, 5), k=2).round().tolist()  # all 81 entries are 1
    [81.0, 0.0]
    """
    o, i = M.shape[:2]
    windows = M.unfold(2, k1, stride).unfold(3, k1, stride)  # (o, i, b, b, a, a)
    A = windows.permute(1, 4, 5, 0, 2, 3).reshape(i * k1 * k1, o * k2 * k2).double()
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    return torch.linalg.eigvalsh(gram).flip(0)[:k].clamp_min(0)


@dataclass(frozen=True)
class GradMax:
    """Score by the squared gradient of new weights per millisecond.

    (d) Evci et al. 2022, arXiv:2201.05125. A step of gradient descent lowers the loss by the squared norm of
    the gradient. A growth is worth its time if what it adds, per millisecond that it adds, is more than what
    the network has per millisecond.

    >>> from effilib.methods.diagnosis import Case
    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(GradMax(images=32)(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    images: int = 256

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates."""
        model, (x, y) = case.treated(), self._images(case)
        models.reestimate_(model, [x])
        seen, squares = _gradients(model, x, y)
        keep = squares["all"] / case.times[KEEP]
        widen, deepen, inside = [], [], []
        for i, stage in enumerate(model.stages):
            names, more = [f"stages.{i}.{j}" for j in range(len(stage))], case.added(i) // len(stage)
            gain = [
                sum(self._wider(seen, n, b, more) for n, b in zip(names, stage, strict=True)),
                self._deeper(seen, names[-1], stage[-1]),
                sum(squares[n] for n in names) * (1 - 1 / FACTOR),
            ]
            actions = [(widen, "widen"), (deepen, "deepen"), (inside, "narrow")]
            for (found, action), value in zip(actions, gain, strict=True):
                name = f"{action} stage {i + 1}"
                found.append(value / case.price(name) if name in case.times else 0.0)
        return ranked(case, widen, deepen, keep, inside)

    def _images(self, case):
        few = case.dataset.train[: self.images]
        return next(case.dataset.batches(few, len(few)))

    def _wider(self, seen, name, block, more):
        """Of so many more channels inside of a block: the gradient of weights that read, for weights that
        write as the old ones do on average.
        """
        stride = block.conv1.stride[0]
        x, dy = seen[f"{name}.conv1"][0], seen[f"{name}.conv2"][1]
        size = 3 + 2 * stride
        shape = (block.width, block.conv1.in_channels, size, size)
        M = nn.grad.conv2d_weight(x, shape, dy, stride, 1 + stride)
        writes = block.conv2.weight.detach().square().sum((0, 2, 3)).mean().item()
        return writes * leading_values(M, more, stride=stride).sum().item()

    def _deeper(self, seen, name, block):
        """Of a block behind this one, which would write as this one does behind its last BatchNorm."""
        h, dh = seen[name]
        M = nn.grad.conv2d_weight(h, (block.width, block.width, 5, 5), dh * (h > 0), 1, 2)
        scale = block.bn2.weight.detach().square() / (block.bn2.running_var + block.bn2.eps)
        writes = (block.conv2.weight.detach().square().sum((2, 3)) * scale[:, None]).sum(0).mean().item()
        return writes * leading_values(M, block.width).sum().item()


def _gradients(model, x, y):
    """What convolutions saw, name -> [input, gradient of the output], and blocks, name -> [output, its
    gradient]. And the squared norms of gradients: of a block's two convolutions, and of "all" weights.
    """
    seen, hooks = {}, []
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d | networks.Block):

            def keep(m, inputs, output, name=name):
                first = output if isinstance(m, networks.Block) else inputs[0]
                seen[name] = [first.detach().clone(), None]
                output.register_hook(lambda dy: seen[name].__setitem__(1, dy.detach()))

            hooks.append(m.register_forward_hook(keep))
    named = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    try:
        with evaluating(model), torch.enable_grad():
            loss = F.cross_entropy(model(x), y)
            found = torch.autograd.grad(loss, list(named.values()))
    finally:
        for h in hooks:
            h.remove()
    squares = {n: g.double().square().sum().item() for n, g in zip(named, found, strict=True)}
    blocks = {n for n, m in model.named_modules() if isinstance(m, networks.Block)}
    inside = {b: sum(squares.get(f"{b}.{c}.weight", 0.0) for c in ("conv1", "conv2")) for b in blocks}
    return seen, {**inside, "all": sum(squares.values())}
