"""Freeze the first layers in mid-training (FreezeOut: Brock et al. 2017, arXiv:1706.04983).

A weight gradient that is left out, chapter 4.2's idea, saves one of a convolution's three products. If the
layers that are left out are the first ones, nobody needs their dX either: the whole backward pass of that
prefix is gone, BatchNorm's and ReLU's too. As its BatchNorms then take their running statistics, they are
folded into the convolutions. Evaluation computes the same as before, and a plain model is left behind.

Autograd does the rest: what is computed from images and parameters without a gradient is not recorded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effilib import convolution as conv
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.inspection import followers
from effilib.methods import Info
from effilib.run import Run

__all__ = ["INFO", "FrozenPrefix", "freeze_", "prefix", "thaw_"]

INFO = Info(
    name="Frozen prefix",
    name_de="Eingefrorener Anfang",
    chapter="4.2",
    paper="Brock, Lim, Ritchie & Weston 2017, arXiv:1706.04983 (FreezeOut)",
    claim="Freezing the first layers one by one during training saves 20 % of the time, for ResNets on CIFAR "
    "without loss of accuracy.",
    cost_model="From then on the prefix costs its forward pass only, with BatchNorm folded in: about a third "
    "of what it did.",
    applies="networks whose first maps are large",
)


class _Folded(nn.Conv2d):
    """A frozen convolution that does what the BatchNorm behind it did; `folded` is its (weight, bias)."""

    folded: tuple[torch.Tensor, torch.Tensor]

    def forward(self, x):
        return self._conv_forward(x, *self.folded)


class _Passed(nn.BatchNorm2d):
    """A frozen BatchNorm that is folded into the convolution before it."""

    def forward(self, x):
        return x


class _Fixed(nn.BatchNorm2d):
    """A frozen BatchNorm that has nothing to be folded into: its running statistics stay, in training too."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


PLAIN = {_Folded: nn.Conv2d, _Passed: nn.BatchNorm2d, _Fixed: nn.BatchNorm2d}


def prefix(model: nn.Module, x: torch.Tensor, depth: int = 1) -> list[str]:
    """Return the layers that work on the first `depth` sizes of maps.

    Their names, in the order in which a batch of images x calls them (in eval mode, nothing is learned). They
    end before a layer that is called twice, and before one whose output is no map. Raises `NoEffect` where
    there are none, or none are left to be trained.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(4, 8), blocks=(1, 1))
    >>> prefix(net, torch.zeros(1, 1, 8, 8))
    ['stem', 'bn', 'stages.0.0.conv1', 'stages.0.0.bn1', 'stages.0.0.conv2', 'stages.0.0.bn2']
    """
    leaves = {m: n for n, m in model.named_modules() if not list(m.children())}
    called, sizes, hooks = [], {}, []

    def note_size(m, inputs, output):
        sizes[m] = output.shape[2:] if isinstance(output, torch.Tensor) and output.dim() == 4 else None

    for m in leaves:  # a parameter of a block's own is called with what is in it
        if isinstance(m, _BatchNorm) or next(m.parameters(recurse=False), None) is not None:
            hooks.append(m.register_forward_pre_hook(lambda m, inputs: called.append(m)))
            hooks.append(m.register_forward_hook(note_size))
    conv.probe(model, x, hooks)
    found, seen = [], set()
    for m in called:
        seen.add(sizes[m])
        if sizes[m] is None or len(seen) > depth or called.count(m) > 1:
            break
        found.append(leaves[m])
    if not found:
        raise NoEffect("frozen prefix: no layer comes before one that has no maps, or is called again")
    if len(found) == len(called):
        raise NoEffect(f"frozen prefix: behind {depth} sizes of maps no layer would be left to be trained")
    return found


def freeze_(model: nn.Module, x: torch.Tensor, names: list[str]) -> list[str]:
    """Freeze layers in place, and fold BatchNorms into their convolutions.

    names: of `prefix`. Parameters, names and objects stay. BatchNorms take their running statistics from now
    on; what they are folded into is checked on a batch of images x, and undone if an output changes. What
    other layers use too stays trainable. Returns the names of the frozen parameters, for `thaw_`.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.rand(2, 1, 8, 8)
    >>> expected = net.eval()(x)
    >>> freeze_(net, x, prefix(net, x))
    ['features.0.weight', 'features.1.weight', 'features.1.bias']
    >>> type(net.features[1]).__name__, torch.allclose(net(x), expected, atol=1e-5)
    ('_Passed', True)
    """
    layers = [model.get_submodule(n) for n in names]
    others = {p for m in model.modules() if m not in layers for p in m.parameters(recurse=False)}
    mine = {p for m in layers for p in m.parameters(recurse=False) if p.requires_grad} - others
    own = [m for m in layers if mine.issuperset(p for p in m.parameters(recurse=False) if p.requires_grad)]
    pairs = [map(model.get_submodule, pair) for pair in followers(model, x).items()]
    before = _logits(model, x)
    frozen = [n for n, p in model.named_parameters() if p in mine]
    for p in mine:
        p.requires_grad_(False)
    fixed = [m for m in own if type(m) is nn.BatchNorm2d and m.running_mean is not None]
    for bn in fixed:
        bn.__class__ = _Fixed
    folded = {c: bn for c, bn in pairs if type(c) is nn.Conv2d and c in own and bn in fixed}
    for c, bn in folded.items():
        weights = fuse_conv_bn_weights(
            c.weight, c.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        c.folded, c.__class__, bn.__class__ = tuple(w.detach() for w in weights), _Folded, _Passed
    if not torch.allclose(_logits(model, x), before, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
        for c, bn in folded.items():
            _plain_(c)
            bn.__class__ = _Fixed
    return frozen


def _logits(model, x):
    """Logits of images x in eval mode."""
    with torch.no_grad(), conv.evaluating(model):
        return model(x).float()


def _plain_(m):
    if type(m) in PLAIN:
        m.__class__ = PLAIN[type(m)]
        m.__dict__.pop("folded", None)


def thaw_(model: nn.Module, frozen: list[str]) -> None:
    """Undo `freeze_` in place.

    Layers are plain again, and the parameters `frozen` have gradients.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.rand(2, 1, 8, 8)
    >>> thaw_(net, freeze_(net, x, prefix(net, x)))
    >>> type(net.features[0]).__name__, all(p.requires_grad for p in net.parameters())
    ('Conv2d', True)
    """
    for m in model.modules():
        _plain_(m)
    for name, p in model.named_parameters():
        if name in frozen:
            p.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class FrozenPrefix(Method):
    """Train the first layers for the first part of the run only.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=2), [FrozenPrefix(at=(0.5,))])
    >>> history.events[-1]["text"]
    'after 50% of the run, 2 layers are frozen, up to features.1'
    """

    # Shares of the run: at the first the layers on the largest maps are frozen, at the second those on the
    # next size of maps, and so on.
    at: tuple[float, ...] = (0.5,)
    # Whether their learning rate has fallen to 0 by then, as in FreezeOut: on the recipe's schedule, which
    # ends there.
    anneal: bool = False

    def __post_init__(self):
        if not self.at or not all(a < b for a, b in zip((0, *self.at), (*self.at, 1), strict=True)):
            raise BadInput(
                f"frozen prefix: at is {self.at}, it must be shares of a run, between 0 and 1 and rising"
            )

    def on_fit_start(self, run: Run) -> None:
        names = [prefix(run.model, self._images(run), depth) for depth in range(1, len(self.at) + 1)]
        run.state[self] = {"depth": 0, "frozen": []}
        if self.anneal:
            for share, layers in reversed(list(zip(self.at, names, strict=True))):  # the deeper hold the rest
                mine = {p for n in layers for p in run.model.get_submodule(n).parameters(recurse=False)}
                run.group(mine, ends=share)

    def on_epoch_start(self, run: Run) -> None:
        state, named = run.state[self], dict(run.model.named_parameters())
        if any(named[n].requires_grad for n in state["frozen"]):  # resumed, with a network that is as built
            run.restructure(lambda model, optimizer: self._freeze(run, state["depth"]))

    def on_step_end(self, run: Run) -> None:
        done = run.schedule.after / run.schedule.planned
        depth = sum(done >= a for a in self.at)
        if depth > run.state[self]["depth"] and run.step + 1 < run.steps:
            run.restructure(lambda model, optimizer: self._freeze(run, depth))
            layers, share = run.state[self]["layers"], self.at[depth - 1]
            run.log(
                self, f"after {share:.0%} of the run, {len(layers)} layers are frozen, up to {layers[-1]}"
            )

    def _freeze(self, run, depth):
        state, x = run.state[self], self._images(run)
        run.ranks.statistics_(run.model)  # several processes fold the same
        thaw_(run.model, state["frozen"])
        layers = prefix(run.model, x, depth)
        state |= {"depth": depth, "layers": layers, "frozen": freeze_(run.model, x, layers)}

    @staticmethod
    def _images(run):
        return run.dataset.normalize(run.dataset.train.x[:2])

    def on_fit_end(self, run: Run) -> None:
        thaw_(run.model, run.state[self]["frozen"])
