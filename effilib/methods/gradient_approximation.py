"""Gradient approximation (Wang et al. 2019, arXiv:1908.05460): some layers' dW is replaced in some batches.

One of a convolution's three products, dW, is replaced in a quarter of all (layer, batch) pairs; forward and
dX stay exact. So at most a third of a quarter, 8 %, of the convolutions' time can be saved. Replacements:
zero, random numbers, or a gradient from one location per sample and output channel, the one where |dy| is
largest, weighed by the sum of dy over the map.

The paper calls the last one unbiased. It is not: the location is no random draw. The unbiased variant beside
it draws the location in proportion to |dy|. A gradient of zeros is not the same as no gradient: with zeros
momentum and weight decay go on, without one the optimizer skips the parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution as conv
from effilib.convolution import Approximation
from effilib.errors import BadInput, choose
from effilib.hooks import Method
from effilib.methods import Info
from effilib.run import Run

__all__ = ["INFO", "GradientApproximation", "dw_at", "locations", "replacement", "scheduled"]

INFO = Info(
    name="Gradient approximation",
    name_de="Gradientenapproximation",
    chapter="4.2",
    paper="Wang et al. 2019, arXiv:1908.05460; FreezeOut: Brock et al. 2017, arXiv:1706.04983",
    claim="With the weight gradient of a quarter of the convolutions set to zero, ResNet-20 on CIFAR-10 "
    "trains 7.1 % faster and loses 1.5 points; approximated from one location it trains 3.5 % faster and "
    "loses 0.75 (Titan Xp).",
    cost_model="dW, a third of a convolution's products, is saved in a quarter of the layers and batches: at "
    "most 8 %; added for the location: a search and a gather of N O C k^2 numbers.",
    applies="networks whose first maps are large",
)

REPLACEMENTS = ("zero", "skip", "random", "top", "unbiased")
SCHEDULES = ("S1", "S2", "S3", "always")


def locations(
    dy: torch.Tensor, how: str = "top", generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one location per sample and output channel, and its factor.

    (index (N, O) into H' W', v (N, O) in fp32). "top": where |dy| is largest, v the signed sum of the map.
    "unbiased": drawn with probability |dy| / sum |dy|, v = sign(dy there) sum |dy|, so that E[v at the
    location] = dy.

    >>> index, v = locations(torch.tensor([[[[1.0, -5.0], [2.0, 0.0]]]]))
    >>> index.item(), v.item()
    (1, -2.0)
    """
    maps = dy.flatten(2).float()  # (N, O, H' W')
    if how == "top":
        return maps.abs().argmax(2), maps.sum(2)
    ends = maps.abs().cumsum(2)
    u = torch.rand(
        maps.shape[:2], generator=generator and conv.on_device(generator, dy.device), device=dy.device
    )
    index = torch.searchsorted(ends, (u * ends[..., -1])[..., None], right=True).clamp(max=maps.shape[2] - 1)
    return index[..., 0], maps.gather(2, index)[..., 0].sign() * ends[..., -1]


def dw_at(
    index: torch.Tensor, v: torch.Tensor, x: torch.Tensor, w: torch.Tensor, product: conv.Convolution
) -> torch.Tensor:
    """Return dW from one location per sample and output channel.

    As if dy were v (N, O) at the locations `index` (N, O) and 0 elsewhere: dW[o] = sum_n v[n, o] patch(x[n],
    index[n, o]). Needs one row of channels per filter tap, sample and output channel; the size of the maps
    does not matter.

    >>> x, w = torch.arange(9.0).view(1, 1, 3, 3), torch.zeros(1, 1, 2, 2)
    >>> dw_at(torch.tensor([[3]]), torch.tensor([[2.0]]), x, w, conv.Convolution()).tolist()  # below right
    [[[[8.0, 10.0], [14.0, 16.0]]]]
    """
    (N, C, H, W), (outputs, _, height, width) = x.shape, w.shape
    (sh, sw), (ph, pw), (dh, dw) = product.stride, product.padding, product.dilation
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))  # (N, H + 2p, W + 2p, C)
    padded_width = W + 2 * pw
    out_width = (padded_width - dw * (width - 1) - 1) // sw + 1
    corner = (index // out_width) * sh * padded_width + (index % out_width) * sw  # (N, O), of the patch
    corner = corner + torch.arange(N, device=x.device)[:, None] * (H + 2 * ph) * padded_width
    flat, v = rows.reshape(-1, C), v.T[:, None].to(x.dtype)  # (N (H+2p)(W+2p), C) and (O, 1, N)
    gradient = torch.empty_like(w)
    for i in range(height):
        for j in range(width):
            patch = flat.index_select(0, (corner + i * dh * padded_width + j * dw).T.flatten())  # (O N, C)
            gradient[:, :, i, j] = torch.bmm(v, patch.view(outputs, N, C))[:, 0]
    return gradient


def replacement(
    how: str,
    *,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    size: Callable[[], int] | None = None,
) -> Callable:
    """Return the function that replaces dW.

    (dy, x, w, product) -> dW. "zero": zeros. "skip": none at all, the optimizer leaves the parameter alone.
    "random": N(0, 1 / N^2), new each time. "top", "unbiased": from one location per sample and channel, see
    `locations`. scale: factor of the last two; None is the published one for "top", 1 / N on top of the mean
    over the batch that dy carries already, and 1 for "unbiased". size: () -> N, where x is only one process's
    share of the batch.

    >>> x, w = torch.ones(1, 2), torch.ones(3, 2, requires_grad=True)
    >>> conv.approx_linear(x, w, dw=replacement("zero")).sum().backward()
    >>> w.grad.abs().sum().item()
    0.0
    """
    choose("gradient", how, REPLACEMENTS)

    def dw(dy, x, w, product):
        N = len(x) if size is None else size()
        if how == "skip":
            return None
        if how == "zero":
            return torch.zeros_like(w)
        if how == "random":
            g = generator and conv.on_device(generator, w.device)
            return torch.empty_like(w, dtype=torch.float32).normal_(std=1 / N, generator=g).to(w.dtype)
        factor = scale if scale is not None else 1.0 if how == "unbiased" else 1 / N
        index, v = locations(dy, how, generator)
        return dw_at(index, factor * v, x, w, product)

    return dw


def scheduled(schedule: str, layer: int, step: int) -> bool:
    """Return whether a convolution's dW is replaced in this batch.

    layer: its number; 0 is the stem, which never is. S1: every fourth layer from the second on, in every
    batch. S2: every other layer, in every other batch. S3: every layer, in every fourth batch. Each is a
    quarter of all pairs. "always": every layer, in every batch.

    >>> [scheduled("S1", layer, step=0) for layer in range(6)]
    [False, True, False, False, False, True]
    >>> [scheduled("S3", 2, step) for step in range(4)]
    [True, False, False, False]
    """
    if not layer:
        return False
    return {
        "S1": layer % 4 == 1,
        "S2": layer % 2 == 1 and step % 2 == 0,
        "S3": step % 4 == 0,
        "always": True,
    }[schedule]


def approximate_gradients_(model, how, schedule, step, *, x=None, owner="gradient approximation", **options):
    """Replace the dW of a model's convolutions by schedule, in place.

    step: () -> int, the number of the batch. Convolutions are numbered in their true order if x, a batch of
    images, is given; 1x1 filters neither count nor are replaced, as with the authors. "top" and "unbiased"
    leave grouped convolutions exact. options: of `replacement`. Returns the names; raises `NoEffect` if no
    layer is ever replaced.

    >>> net = build("vgg", 10, (3, 32, 32), widths=((16,), (32, 32)))
    >>> approximate_gradients_(net, "zero", "S1", step=lambda: 0)
    ['features.4']
    """
    choose("schedule", schedule, SCHEDULES)
    dw = replacement(how, **options)
    counted = {n: m for n, m in conv.layers(model, x).items() if max(m.kernel_size) > 1}

    def made(number):
        def scheduled_dw(dy, x, w, product):
            if scheduled(schedule, number, step()):
                return dw(dy, x, w, product)
            return product.backward(dy, x, w, (False, True))[1]

        return Approximation(dw=scheduled_dw)

    numbers = {n: i + 1 for i, n in enumerate(counted)}
    wanted = [n for n, i in numbers.items() if any(scheduled(schedule, i, s) for s in range(4))]
    wanted = [n for n in wanted if how in ("zero", "skip", "random") or counted[n].groups == 1]
    return conv.convert_(counted, {n: made(numbers[n]) for n in wanted}, owner, "gradient approximation")


@dataclass(frozen=True, kw_only=True)
class GradientApproximation(Method):
    """Train with replaced weight gradients.

    how: one of `REPLACEMENTS`; schedule: see `scheduled`; scale: see `replacement`.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [GradientApproximation(how="zero", schedule="S1")])
    >>> history.events[-1]["text"]
    'dW replaced (zero, S1) in 1 of 2 convolutions: features.4'
    """

    how: str = "zero"
    schedule: str = "S1"
    scale: float | None = None

    def on_fit_start(self, run: Run) -> None:
        if self.how == "skip" and run.ranks.size > 1:
            raise BadInput(
                "gradient approximation: 'skip' needs one process, for among several every parameter gets a "
                "gradient"
            )
        x = run.dataset.normalize(run.dataset.train.x[:2])
        # random numbers stand for the whole batch: in all processes they are the same ones
        generator = run.generator(self, share=self.how != "random")
        names = approximate_gradients_(
            run.model, self.how, self.schedule, lambda: run.step, x=x, owner=self,
            scale=self.scale, generator=generator, size=lambda: run.batches.batch_size,
        )  # fmt: skip
        run.state[self] = {"layers": names}

    def on_fit_end(self, run: Run) -> None:
        conv.revert_(run.model, self)
        names = run.state[self]["layers"]
        convs = sum(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in run.model.modules())
        run.log(
            self,
            f"dW replaced ({self.how}, {self.schedule}) in {len(names)} of {convs} convolutions: "
            + ", ".join(names),
        )
