"""Wavelet-like auto-encoder: the two half-resolution images of a picture are learned.

WAE, Chen et al. 2018, arXiv:1712.07493. An encoder makes a low and a high image of a quarter of the pixels
each; a large network reads the low one, one with a quarter of the channels the high one. A decoder, for
training alone, keeps the picture's content; an energy term pushes it into the low image. Layers and loss
follow the paper's figures and the authors' prototxt, made small for pictures of 32 pixels. BatchNorm inside
of encoder and decoder is ours: without it their loss diverged at the learning rate that suits the classifier.
The paper's lambda, gamma and lengths of its three stages could not be read; those here are our own."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, networks, seeds
from effilib.convolution import evaluating
from effilib.dataset import Dataset
from effilib.errors import BadInput
from effilib.history import History
from effilib.hooks import Method
from effilib.methods.wavelet_stem import keep_sizes_
from effilib.networks import conv3x3
from effilib.normalization import norm_relu
from effilib.recipe import autocast
from effilib.run import Run
from effilib.seeds import stream
from effilib.tasks import Task
from effilib.training import train

__all__ = ["WAE", "AutoEncoder", "Decoder", "WaveletAutoEncoder", "energy_share", "wae_of"]

STAGES = ("encoder", "classifier", "joint")


class Decoder(nn.Module):
    """Bring a half-resolution image back to full size.

    (N, C, h, w) -> (N, C, 2h, 2w).

    >>> Decoder(3, 8)(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.out = conv3x3(width, channels, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(norm_relu(self.norm, self.up(x)))


class WAE(nn.Module):
    """Classify pictures from two half-resolution images that an encoder makes.

    Encoder, two trunks, two classifiers whose logits add up, and a decoder per image that only training uses.
    x: (N, C, H, W) -> logits (N, classes). low, high: trunks from (N, C, ceil(H/2), ceil(W/2)) to features
    (N, F). features: their two F. width: channels of encoder and decoder. stage: one of `STAGES`. In training
    `terms` holds the two parts of the auto-encoder's loss, means over elements: reconstruction ||I - I'||^2
    and energy ||I_H||^2.

    >>> def trunk():
    ...     return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> model = WAE(1, 4, trunk(), trunk(), features=(1, 1))
    >>> model(torch.rand(2, 1, 8, 8)).shape, [i.shape[2:] for i in model.images(torch.rand(2, 1, 8, 8))]
    (torch.Size([2, 4]), [torch.Size([4, 4]), torch.Size([4, 4])])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        low: nn.Module,
        high: nn.Module,
        features: tuple[int, int],
        width: int = 8,
    ):
        super().__init__()
        self.encoder = nn.Sequential(
            conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            conv3x3(width, 2 * channels, stride=2, bias=True),
        )  # fmt: skip
        # behind the energy term: in front of it, it would make that a constant
        self.norm = nn.BatchNorm2d(2 * channels)
        self.low, self.high = low, high
        self.head_low, self.head_both = nn.Linear(features[0], classes), nn.Linear(sum(features), classes)
        self.decode_low, self.decode_high = Decoder(channels, width), Decoder(channels, width)
        self.classes, self.stage, self.terms = classes, "joint", None

    def images(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (I_L, I_H), each (N, C, ceil(H/2), ceil(W/2))."""
        return self.encoder(x).chunk(2, 1)

    def reconstruct(self, I_L: torch.Tensor, I_H: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the picture, (N, C, H, W), from its two images."""
        return (self.decode_low(I_L) + self.decode_high(I_H))[..., : size[0], : size[1]]

    def classify(self, I: torch.Tensor) -> torch.Tensor:  # noqa: E741  (the paper's symbol)
        """Return logits (N, classes) from both images, (N, 2C, h, w)."""
        I_L, I_H = self.norm(I).chunk(2, 1)
        F_L, F_H = self.low(I_L), self.high(I_H)
        return self.head_low(F_L) + self.head_both(torch.cat([F_L, F_H], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.classify(self.encoder(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "classifier"):
            I = self.encoder(x)  # noqa: E741
        self.terms = None
        if self.stage != "classifier":
            I_L, I_H = I.chunk(2, 1)
            self.terms = (
                F.mse_loss(self.reconstruct(I_L, I_H, x.shape[2:]).float(), x.float()),
                I_H.float().square().mean(),
            )
        return self.classify(I) if self.stage != "encoder" else x.new_zeros(len(x), self.classes)


@torch.no_grad()
def energy_share(model: WAE, x: torch.Tensor) -> tuple[float, float]:
    """Return the high image's energy share, and reconstruction in dB.

    x: (N, C, H, W). dB: signal-to-noise ratio.

    >>> model = WAE(1, 4, nn.Flatten(), nn.Flatten(), features=(16, 16))
    >>> share, ratio = energy_share(model, torch.rand(2, 1, 8, 8))
    >>> 0 <= share <= 1
    True
    """
    with evaluating(model):
        I_L, I_H = model.images(x)
        low, high = (i.float().square().sum() for i in (I_L, I_H))
        error = F.mse_loss(model.reconstruct(I_L, I_H, x.shape[2:]).float(), x.float())
    return (high / (low + high)).item(), 10 * math.log10(x.var().item() / max(error.item(), 1e-12))


@dataclass(frozen=True, kw_only=True)
class WaveletAutoEncoder(Method):
    """Train a `WAE`: cross-entropy + gamma (reconstruction + lambda energy).

    At once or in the paper's three stages. stages: shares of the steps for the auto-encoder alone, for the
    classifier on frozen images, and for both; (0, 0, 1) is joint from the start. All of it is on the clock.
    Raises `BadInput` for another network, or shares that are not >= 0 with a sum of 1.

    >>> data = load("synthetic")
    >>> model = WAE(1, data.classes, nn.Flatten(), nn.Flatten(), features=(16, 16))
    >>> history = train(model, data, Recipe(epochs=1), [WaveletAutoEncoder()])
    >>> history.events[-1]["text"]
    '... of the energy is in the high image; reconstruction ... dB'
    """

    gamma: float = 0.1
    lam: float = 1.0
    stages: tuple = (0.0, 0.0, 1.0)

    def on_fit_start(self, run: Run) -> None:
        if not isinstance(run.model, WAE):
            raise BadInput(
                f"wavelet-like auto-encoder: {type(run.model).__name__} is not a WAE; build one from two "
                "trunks"
            )
        if len(self.stages) != 3 or min(self.stages) < 0 or abs(sum(self.stages) - 1) > 1e-6:
            raise BadInput(
                f"wavelet-like auto-encoder: stages are {self.stages}, expected three shares >= 0 with a sum "
                "of 1"
            )
        if run.ranks.size > 1 and self.stages[2] != 1:
            raise BadInput(
                "wavelet-like auto-encoder: over several processes all parameters train in all steps; "
                "choose stages (0, 0, 1)"
            )
        run.state[self] = {}
        run.model.stage = self.stage(run, 0)

    def stage(self, run: Run, step: int) -> str:
        """Return the stage of a step."""
        share, first, second = (step + 0.5) / run.steps, self.stages[0], sum(self.stages[:2])
        return STAGES[(share > first) + (share > second)]

    def on_epoch_start(self, run: Run) -> None:
        run.model.stage = self.stage(run, run.step)  # also of a run that is resumed

    def loss_terms(self, run: Run) -> torch.Tensor | None:
        if run.model.terms is None:
            return None
        reconstruction, energy = run.model.terms
        run.model.terms = None
        return self.gamma * (reconstruction + self.lam * energy)

    def on_step_end(self, run: Run) -> None:
        new = self.stage(run, run.step + 1)
        if new != run.model.stage and run.step + 1 < run.steps:
            run.log(self, f"stage {new} begins", stage=new)
            run.model.stage = new
            run.structures += 1  # another step to count

    def on_fit_end(self, run: Run) -> None:
        with run.clock.paused(), autocast(run.precision, run.device):
            x, _ = next(run.dataset.batches(run.decide))
            share, ratio = energy_share(run.model, x)
        run.log(
            self,
            f"{share:.1%} of the energy is in the high image; reconstruction {ratio:.1f} dB",
            energy_share=share,
            snr=ratio,
        )


def wae_of(task: Task, dataset: Dataset, seed: int = 0) -> WAE:
    """Return a `WAE` whose trunks are the task's network.

    Without its first halving. The high image's trunk has a quarter of the channels. For our networks only,
    whose widths are lists: raises `BadInput` for another.

    >>> t = task("smoke", "synthetic", widths={"widths": (8, 8), "blocks": (1, 1)})
    >>> wae_of(t, t.load()).high.settings()["widths"]
    [4, 4]
    """
    if task.network not in networks.NETWORKS:
        raise BadInput(f"wavelet-like auto-encoder: nobody knows how to make {task.network} narrower")
    c, height, width = dataset.shape
    half = (c, (height + 1) // 2, (width + 1) // 2)
    init = stream(seed, "initial weights").initial_seed()

    def quarter(w):
        return [quarter(v) for v in w] if isinstance(w, list) else max(4, w // 4)

    def trunk(settings):
        net = models.build(task.network, dataset.classes, half, seed=init, **settings)
        keep_sizes_(net, half)
        features, net.head = net.head.in_features, nn.Identity()
        return net, features

    low, F_L = trunk(task.widths)
    high, F_H = trunk(task.widths | {"widths": quarter(low.settings()["widths"])})
    with seeds.seeded(init):
        return WAE(c, dataset.classes, low, high, (F_L, F_H)).to(dataset.device)


@dataclass(frozen=True, kw_only=True)
class AutoEncoder:
    """Train a `WAE` on the task's network.

    For `Arm.fit`: (task, seed) -> `History`. stages: see `WaveletAutoEncoder`.

    >>> AutoEncoder()(task("smoke", "synthetic").at(0.5), seed=0).steps
    4
    """

    stages: tuple = (0.0, 0.0, 1.0)

    def __call__(self, task: Task, seed: int) -> History:
        dataset = task.load()
        method = WaveletAutoEncoder(stages=self.stages)
        return train(wae_of(task, dataset, seed), dataset, task.recipe, [method], seed)
