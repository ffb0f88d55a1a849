"""Train the last layers of a network only: what is adapted to new classes, and how many weights that are."""

from dataclasses import dataclass

import torch
from torch import nn

from effilib.convolution import probe
from effilib.dataset import Dataset
from effilib.errors import NoEffect
from effilib.hooks import Method
from effilib.run import Run

__all__ = ["FineTune", "layers", "weights"]


def weights(model: nn.Module) -> int:
    """Return the number of trained weights as the paper counts them.

    Those of convolutions and linear layers with their biases, without normalisation's.

    >>> weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))  # 18 and 2 biases
    20
    """
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in norms)


@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Train only what the forward pass reaches from a late layer on.

    depth: of that layer, counted from the end over convolutions and linear layers. All before it stays as it
    is: frozen BatchNorms keep their statistics, frozen dropout is off, and nothing is kept for their backward
    pass. Raises `NoEffect` if nothing comes before it.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> first = net.features[0].weight.clone()
    >>> history = train(net, data, Recipe(epochs=1), [FineTune(depth=1)])
    >>> torch.equal(net.features[0].weight, first), history.events[0]["weights"]
    (True, 36)
    """

    depth: int = 1

    def on_fit_start(self, run: Run) -> None:
        frozen = _before(run.model, run.dataset, self.depth)
        for name in frozen:
            for p in run.model.get_submodule(name).parameters(recurse=False):
                p.requires_grad_(False)
        group = run.optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p.requires_grad]

        def whole(name):
            inside = [f"{name}.{n}" for n, _ in run.model.get_submodule(name).named_modules() if n]
            return name and all(n in frozen for n in inside)

        run.state[self] = {"still": [name for name in frozen if whole(name)]}
        for name in run.state[self]["still"]:
            run.model.get_submodule(name).training = False
        text = f"all but the last {self.depth} layers frozen"
        run.log(self, text, weights=weights(run.model), samples=len(run.dataset.train))

    def on_fit_end(self, run: Run) -> None:
        for name in run.state[self]["still"]:
            run.model.get_submodule(name).training = True
        for p in run.model.parameters():
            p.requires_grad_(True)


def _reached(model, dataset):
    """Names of leaf modules, and others with tensors of their own, as the forward pass reaches them."""
    order, hooks = [], []
    for name, m in model.named_modules():
        if not any(m.children()) or any(True for _ in m.parameters(recurse=False)):
            hooks.append(m.register_forward_pre_hook(lambda module, inputs, name=name: order.append(name)))
    probe(model, dataset.normalize(dataset.train.x[:2]), hooks)
    return list(dict.fromkeys(order))


def _layer_places(model, names):
    matrices = [getattr(model.get_submodule(n), "weight", None) for n in names]
    return [i for i, w in enumerate(matrices) if isinstance(w, torch.Tensor) and w.dim() > 1]


def layers(model: nn.Module, dataset: Dataset) -> int:
    """Return how many convolutions and linear layers the forward pass reaches.

    >>> data = load("synthetic")
    >>> layers(build("convnet", data.classes, data.shape, widths=(4, 8)), data)
    3
    """
    return len(_layer_places(model, _reached(model, dataset)))


def _before(model, dataset, depth):
    """Names of the modules before the `depth`-th last layer: all but those reached from it on, and theirs."""
    names = _reached(model, dataset)
    places = _layer_places(model, names)
    if not 0 < depth <= len(places) or not places[-depth]:
        raise NoEffect(
            f"fine-tuning: the network has {len(places)} layers, with depth {depth} none stays as it is"
        )
    later = names[places[-depth] :]
    every = [name for name, _ in model.named_modules()]
    return [name for name in every if not any(name == n or name.startswith(f"{n}.") for n in later)]
