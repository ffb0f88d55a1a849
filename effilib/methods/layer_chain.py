"""A network as a chain of layers that can be cut, for their placement on several machines.

What the layers weigh, send and take is counted or measured here; where to cut is `layer_placement`'s.
"""

import copy
import itertools
import statistics as stats
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from effilib import cost, seeds
from effilib.clock import interleaved
from effilib.errors import BadInput
from effilib.methods.layer_placement import Layer
from effilib.surgery.channels import Tracer

__all__ = ["Chain", "measure", "profile", "trainable"]


class Chain:
    """Follow a network as a chain of layers.

    It can be cut wherever a single tensor flows on, so a residual block is one link. A link begins at a layer
    with weights and takes along what follows without (BatchNorm, ReLU, pooling). `part(i, j)` is the network
    of links i..j-1 with the same parameters under the same names. Raises `BadInput` if the forward pass
    cannot be followed.

    >>> chain = Chain(build("resnet", 4, (1, 8, 8), widths=(4, 8), blocks=(1, 1)))
    >>> chain.names, chain.part(0, 2)(torch.rand(2, 1, 8, 8)).shape
    (['stem', 'stages.0.0', 'stages.1.0', 'head'], torch.Size([2, 4, 8, 8]))
    """

    def __init__(self, model: nn.Module):
        try:
            self.traced = fx.GraphModule(model, Tracer().trace(model))
        except Exception as error:  # a user's forward may raise anything when it meets a symbol
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(
                f"the forward pass of {type(model).__name__} cannot be followed, so it cannot be cut: "
                f"{reason}"
            ) from error
        self.nodes = [n for n in self.traced.graph.nodes if n.op != "output"]
        if [n.op for n in self.nodes].count("placeholder") != 1:
            raise BadInput(f"{type(model).__name__} does not take one tensor of images, so it is no chain")
        place = {n: i for i, n in enumerate(self.traced.graph.nodes)}
        # (how many nodes lie before it, the one tensor that flows over it)
        cuts, alive = [(1, self.nodes[0])], set()
        for i, n in enumerate(self.nodes):
            alive = {v for v in (*alive, n) if any(place[u] > i for u in v.users)}
            if i and len(alive) == 1:
                cuts.append((i + 1, *alive))
        if cuts[-1][0] != len(self.nodes):
            raise BadInput(f"{type(model).__name__} does not return one tensor of logits, so it is no chain")
        self.borders, links = [cuts[0], cuts[0]], [[]]
        for (begin, _), end in itertools.pairwise(cuts):
            weights = self._weights(begin, end[0])
            if weights and links[-1]:
                links.append([])
                self.borders.append(end)
            self.borders[-1] = end
            links[-1] += weights
        self.names = [self._say(names) for names in links]

    def __len__(self):
        return len(self.names)

    def _weights(self, begin, end):
        """Names of the layers with weights, and of such parameters, among some nodes."""
        heavy = [n for n, p in self.traced.named_parameters(remove_duplicate=False) if p.dim() > 1]
        called = [n.target for n in self.nodes[begin:end] if n.op in ("call_module", "get_attr")]
        return [t for t in called if any(h == t or h.startswith(f"{t}.") for h in heavy)]

    @staticmethod
    def _say(names):
        """What a link is called: its layer, or what holds all of its layers."""
        common = [
            parts[0]
            for parts in itertools.takewhile(
                lambda p: len(set(p)) == 1, zip(*(n.split(".") for n in names), strict=False)
            )
        ]
        return ".".join(common) or f"{names[0]} ... {names[-1]}" if names else "no weights"

    def part(self, first: int, last: int) -> nn.Module:
        """Return the network of links first..last-1; it shares its layers with the whole."""
        if not 0 <= first < last <= len(self):
            raise BadInput(f"no part {first}..{last} in a chain of {len(self)} layers")
        (begin, entrance), (end, exit_) = self.borders[first], self.borders[last]
        graph = fx.Graph()
        copied = {entrance: graph.placeholder("x")}
        for n in self.nodes[begin:end]:
            copied[n] = graph.node_copy(n, copied.__getitem__)
        graph.output(copied[exit_])
        return fx.GraphModule(self.traced, graph)

    def stages(self, cuts: Sequence[int]) -> list[nn.Module]:
        """Return the parts between the cuts: a pipeline's stages."""
        return [self.part(i, j) for i, j in itertools.pairwise((0, *cuts, len(self)))]

    def doubts(self, k: int) -> list[str]:
        """Return why a cut behind k would change the weights, in sentences."""
        found = []
        if k < len(self):
            near, far = self.part(0, k), self.part(k, len(self))
            shared = {id(p) for p in near.parameters()}
            found = [
                f"the parameter {n} is used on both sides of the cut"
                for n, p in far.named_parameters()
                if id(p) in shared
            ]
            for name, m in far.named_modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    found.append(
                        f"BatchNorm {name} behind the cut takes its statistics over the images of all workers"
                    )
        drawn = [
            n
            for n, m in self.traced.named_modules()
            if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
        ]
        return found + [f"dropout {n} draws other numbers in every process" for n in drawn]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that travel and are trained.

    >>> frozen = nn.Linear(2, 2).requires_grad_(False)
    >>> len(trainable(nn.Sequential(frozen, nn.Linear(2, 2))))
    2
    """
    return [p for p in module.parameters() if p.requires_grad]


def profile(chain: Chain, shape: tuple[int, int, int], *, images: int = 2) -> list[Layer]:
    """Count the chain's layers: parameters, numbers at each cut, FLOPs per image.

    FLOPs of forward and backward. Works on the meta device. shape: (C, H, W) of the images.

    >>> chain = Chain(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    >>> [(layer.name, layer.parameters, layer.outputs) for layer in profile(chain, (1, 8, 8))]
    [('features.0', 44, 64), ('features.4', 304, 8), ('head', 36, 4)]
    """
    model, found = chain.traced, []
    p = next(model.parameters())
    x, was = torch.zeros(images, *shape, device=p.device), model.training
    model.eval()  # BatchNorm's statistics stay as they are
    try:
        for i, name in enumerate(chain.names):
            part = copy.deepcopy(chain.part(i, i + 1))  # backward writes gradients

            def step(part=part, x=x, first=i == 0):
                part(x.detach().requires_grad_(not first)).sum().backward()

            parameters = sum(p.numel() for p in trainable(part))
            flops = cost.count_flops(step) / images
            with torch.no_grad():
                x = part(x)
            found.append(Layer(name=name, parameters=parameters, outputs=x.numel() // images, flops=flops))
    finally:
        model.train(was)
    return found


def measure(
    chain: Chain,
    layers: Sequence[Layer],
    x: torch.Tensor,
    *,
    repeats: int = 9,
    seconds: float | None = None,
) -> list[Layer]:
    """Return the layers with measured seconds per image, interleaved medians.

    Forward and backward of each on a batch like x (N, C, H, W).

    >>> chain = Chain(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    >>> layers = measure(chain, profile(chain, (1, 8, 8)), torch.rand(4, 1, 8, 8), repeats=3)
    >>> all(layer.seconds > 0 for layer in layers)
    True
    """
    functions = {}
    with seeds.seeded(0, x.device):  # dropout draws from the global generator
        for i in range(len(chain)):
            part = copy.deepcopy(chain.part(i, i + 1)).train()  # BatchNorm's statistics stay as they are

            def step(part=part, x=x, first=i == 0):
                x = x.detach().requires_grad_(not first)
                y = part(x)
                torch.autograd.grad(
                    y, [*trainable(part), *([] if first else [x])], torch.ones_like(y), allow_unused=True
                )

            functions[i] = step
            with torch.no_grad():
                x = part(x)
        times = interleaved(functions, repeats=repeats, warm_up=2, device=x.device, seconds=seconds)
    return [replace(layer, seconds=stats.median(times[i]) / len(x)) for i, layer in enumerate(layers)]
