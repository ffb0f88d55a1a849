"""Tricks of the CIFAR-10 speed runs, each a method of its own (Jordan 2024, arXiv:2404.00498; Page 2019).

They are about optimisation: none makes a step cheaper, together they need a third of the steps. What else the
speed runs do stands where it belongs: the network and its scaled logits in `networks.Groups`, the whitening
stem in `whitening`, alternating flips and the multi-crop evaluation in `Recipe`, Muon in `muon`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from effilib.errors import NoEffect, within
from effilib.hooks import Method
from effilib.methods import Info
from effilib.recipe import Recipe
from effilib.run import Run

__all__ = ["INFO", "FastBiases", "Lookahead", "PartialIdentity", "identity_", "published"]

INFO = Info(
    name="Speed run",
    name_de="Schnelllauf",
    chapter="11",
    paper="Jordan 2024, arXiv:2404.00498 (airbench94)",
    claim="94 % on CIFAR-10 in 3.29 s on an A100, with 9.9 epochs where the same network took 34 without the "
    "tricks.",
    cost_model="A step costs what it did, one of a prefix that is frozen less: time falls with the epochs.",
    applies="short trainings of plain networks with BatchNorm",
)


def published(batch_size: int = 1024, epochs: float = 9.9) -> Recipe:
    """Return the published recipe for batches of any size.

    There the loss is a sum, the learning rate 11.5 per 1024 images and the weight decay 0.0153 are divided by
    1024 (1 + 1 / (1 - momentum)), and the decay does not depend on the rate. For a mean, as here, that is

        lr = 11.5 B / (1024 (1 + 1 / (1 - m))),    weight decay = 0.0153 / 11.5

    >>> round(published().lr, 3), round(published(512).lr, 3), round(published().weight_decay, 5)
    (1.5, 0.75, 0.00133)
    """
    momentum = 0.85
    return Recipe(
        epochs=epochs, batch_size=batch_size, momentum=momentum, label_smoothing=0.2,
        lr=11.5 * batch_size / (1024 * (1 + 1 / (1 - momentum))), weight_decay=0.0153 / 11.5,
        warmup=0.23, lr_start=0.2, lr_end=0.07, pad=2, flips="alternating", multi_crop=1.0,
    )  # fmt: skip


# Partial identity


@torch.no_grad()
def identity_(conv: nn.Conv2d, gain: float = 1.0) -> None:
    """Let a convolution's first filters pass on its channels, in place.

    Filter i is 1 at the centre of channel i, for as many as there are of both; the rest stay, times gain.

    >>> identity_(conv := nn.Conv2d(2, 3, 3, padding=1, bias=False))
    >>> torch.equal(conv(x := torch.rand(1, 2, 4, 4))[:, :2], x)
    True
    """
    conv.weight.mul_(gain)
    nn.init.dirac_(conv.weight[: conv.in_channels])


def _plain(conv):
    """Whether a convolution keeps the size of maps and does not lose channels: what could pass all on."""
    odd = all(k % 2 == 1 and k > 1 for k in conv.kernel_size)
    return odd and set(conv.stride) == {1} and conv.groups == 1 and conv.in_channels <= conv.out_channels


@dataclass(frozen=True, kw_only=True)
class PartialIdentity(Method):
    """Begin with convolutions that pass their input on.

    Jordan 2024, section 3.3.

    Those behind the first layer that keep the size of maps and have no fewer filters than channels.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [PartialIdentity()]).events[0]["text"]
    '1 convolutions begin as the identity on their input channels'
    """

    gain: float = 6**-0.5  # of all other weights: from He's initialisation, as here, to PyTorch's own

    def __post_init__(self):
        within("partial identity: gain", self.gain, "0 or above")

    def on_fit_start(self, run: Run) -> None:
        run.state[self] = {}
        convs = [m for m in run.model.modules() if isinstance(m, nn.Conv2d)][1:]
        found = [m for m in convs if _plain(m) and m.weight.requires_grad]
        if not found:
            raise NoEffect("partial identity: no convolution keeps the size of maps and their channels")
        for m in found:
            identity_(m, self.gain)
        run.log(self, f"{len(found)} convolutions begin as the identity on their input channels")


# BatchNorm


@dataclass(frozen=True, kw_only=True)
class FastBiases(Method):
    """Freeze BatchNorm's scales; let its biases learn faster (Page 2019).

    A scale does little for a network whose next layer is linear after the activation; the bias decides which
    half of the numbers a ReLU passes. Their decay is per step as before: it is divided by the same factor.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [FastBiases()]).events[0]["text"]
    'biases of 2 BatchNorms learn at 64 times the rate, their scales are frozen'
    """

    factor: float = 64.0  # on the learning rate
    frozen: bool = True  # whether the scales stay as they are

    def __post_init__(self):
        within("fast biases: factor", self.factor, "above 0")

    def on_fit_start(self, run: Run) -> None:
        named = {name: m for name, m in run.model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
        norms = [m for m in named.values() if m.bias.requires_grad]
        if not norms:
            raise NoEffect("fast biases: the network has no BatchNorm with a bias that learns")
        biases = {m.bias for m in norms}
        learnt = [name for name, m in named.items() if m in norms and m.weight.requires_grad]
        run.state[self] = {"frozen": learnt if self.frozen else []}  # not those that the user had frozen
        run.group(biases, lr_factor=self.factor)
        for group in run.optimizer.param_groups:
            if biases.issuperset(group["params"]):
                group["weight_decay"] = group.get("weight_decay", 0.0) / self.factor
        for name in run.state[self]["frozen"]:
            named[name].weight.requires_grad_(False)
        scales = ", their scales are frozen" if self.frozen else ""
        run.log(self, f"biases of {len(norms)} BatchNorms learn at {self.factor:g} times the rate{scales}")

    def on_fit_end(self, run: Run) -> None:
        for name, m in run.model.named_modules():
            if name in run.state[self]["frozen"]:
                m.weight.requires_grad_(True)


# Lookahead


@torch.no_grad()
def _follow_(slow: Iterable[torch.Tensor], fast: Iterable[torch.Tensor], decay: float) -> None:
    """slow = decay slow + (1 - decay) fast, and fast = slow, both in place."""
    slow, fast = list(slow), list(fast)
    torch._foreach_lerp_(slow, fast, 1 - decay)
    torch._foreach_copy_(fast, slow)


@dataclass(frozen=True, kw_only=True)
class Lookahead(Method):
    """Set weights back to their running average every few steps.

    Zhang et al. 2019, arXiv:1907.08610. Every k-th step t of T the average takes 1 - decay^k (t / T)^3 of the
    weights, and the weights become the average: at the beginning nothing is held back, at the end much.
    BatchNorm's statistics are averaged too; after the last step the average stays (Jordan 2024, section 3.4).

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=2), [Lookahead(every=2)]).steps
    4
    """

    every: int = 5  # steps, k
    decay: float = 0.95  # of the average, per step, at the end

    def __post_init__(self):
        within("lookahead: every", self.every, "a whole number above 0")
        within("lookahead: decay", self.decay, "from 0 to below 1")

    @staticmethod
    def _state(model):
        return {n: t for n, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}

    def on_fit_start(self, run: Run) -> None:
        slow = {n: t.detach().clone() for n, t in self._state(run.model).items()}
        run.state[self] = {"slow": slow, "averages": 0}

    def on_step_end(self, run: Run) -> None:
        if (run.step + 1) % self.every == 0 and run.step + 1 < run.steps:
            share = run.schedule.after / run.schedule.planned
            self._average(run, self.decay**self.every * share**3)
            run.state[self]["averages"] += 1

    def on_fit_end(self, run: Run) -> None:
        if averages := run.state[self]["averages"]:  # else the average still is the initial weights
            self._average(run, 1.0)
        run.log(self, f"{averages} averages, one every {self.every} steps")

    def _average(self, run, decay):
        slow, fast = run.state[self]["slow"], self._state(run.model)
        if {n: t.shape for n, t in slow.items()} != {n: t.shape for n, t in fast.items()}:  # after surgery
            slow = run.state[self]["slow"] = {n: t.detach().clone() for n, t in fast.items()}
        _follow_(slow.values(), (t.detach() for t in fast.values()), decay)
