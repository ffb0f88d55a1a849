"""Learn the structure of filters without labels, train their strength with labels (SSF-CNN).

Keshari, Vatsa, Singh & Noore, CVPR 2018, arXiv:1803.11405. Structure: the filters' shapes are learned without
labels, layer by layer, as a dictionary of the patches that each layer sees, or as the centres of k-means,
which takes a fraction of the time. Strength: the shapes are frozen and only their size t is trained, with
biases, normalisation and classifier: few parameters for few images.

Per filter, t is applied behind the convolution, per input channel in front of it: frozen filters then need no
gradient dW, a third of the products. Per kernel, t sits inside the weight, and dW is computed. Directly in
front of a normalisation a strength per filter has no gradient: what it multiplies is divided out again. There
the normalisation's own weight is it. The paper's body was not at hand: scopes, whitening and rescaling are
made precise here.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from effilib import cost
from effilib.errors import BadInput, NoEffect, choose, within
from effilib.hooks import Method
from effilib.inspection import cut_patches, followers
from effilib.methods import Info
from effilib.run import Run
from effilib.surgery import forget_

__all__ = [
    "StrengthConv2d", "StructureAndStrength", "dictionary", "he_gain", "kmeans", "learn_filters",
    "learn_structure_", "merge_", "strengthen_", "whiten",
]  # fmt: skip

INFO = Info(
    name="Structure and strength of filters",
    name_de="Struktur und Stärke von Filtern",
    chapter="5.2",
    paper="Keshari et al. 2018, arXiv:1803.11405",
    claim="With filters whose structure comes from a dictionary of patches, training only their strength "
    "needs fewer images and far fewer trainable parameters.",
    cost_model="Frozen filters save dW, a third of the convolutions' products; the dictionary costs seconds "
    "before the first step.",
    applies="few labelled images",
)
STRUCTURES, SCOPES = ("random", "dictionary", "kmeans"), ("filter", "kernel", "input", "auto")
DEAD = 1e-6  # norm below which an atom is none


# Structure


def whiten(patches: torch.Tensor) -> torch.Tensor:
    """Give each patch mean 0 and about unit contrast.

    It is (x - mean) / (std + 0.1). Else the first atom is the mean grey.

    >>> [round(v, 2) for v in whiten(torch.tensor([[1.0, 3.0]]))[0].tolist()]
    [-0.91, 0.91]
    """
    return (patches - patches.mean(1, keepdim=True)) / (patches.std(1, keepdim=True, correction=0) + 0.1)


def dictionary(
    patches: torch.Tensor, atoms: int, generator: torch.Generator, alpha: float = 1.0, passes: int = 2
) -> np.ndarray:
    """Return the dictionary D (atoms, d) of patches X (M, d).

    By mini-batches (Mairal et al. 2009). It minimises 1/2 |X - A D|^2 + alpha |A|_1 with |d_j| <= 1.

    >>> dictionary(whiten(torch.rand(50, 9)), 4, torch.Generator()).shape
    (4, 9)
    """
    from sklearn.decomposition import MiniBatchDictionaryLearning

    first = patches[torch.randperm(len(patches), generator=generator)[:atoms]]
    first = (first / first.norm(dim=1, keepdim=True)).numpy()
    learner = MiniBatchDictionaryLearning(
        n_components=atoms, alpha=alpha, max_iter=passes, batch_size=256, fit_algorithm="cd",
        dict_init=first, random_state=_seed(generator),
    )  # fmt: skip
    return _fit(learner, patches).components_


def kmeans(patches: torch.Tensor, atoms: int, generator: torch.Generator) -> np.ndarray:
    """Return the centres (atoms, d) of mini-batch k-means (Coates & Ng 2012).

    They are a dictionary of which each patch uses one atom.

    >>> kmeans(whiten(torch.rand(50, 9)), 4, torch.Generator()).shape
    (4, 9)
    """
    from sklearn.cluster import MiniBatchKMeans

    learner = MiniBatchKMeans(
        n_clusters=atoms, init="k-means++", n_init=1, max_iter=10, batch_size=1024,
        random_state=_seed(generator),
    )  # fmt: skip
    return _fit(learner, patches).cluster_centers_


def _seed(generator):
    return int(torch.randint(2**31 - 1, (), generator=generator))


def _fit(learner, patches):
    """Fit with PyTorch's threads; that a mini-batch has not converged is the rule, and no warning."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return learner.fit(patches.numpy())


def learn_filters(
    patches: torch.Tensor, filters: int, structure: str, generator: torch.Generator
) -> torch.Tensor:
    """Return filters (filters, d) learned from patches (M, d).

    Their norm is sqrt(2), as He's have in the mean. What a dictionary cannot give, because there are too few
    patches or an atom died, is a random direction.

    >>> w = learn_filters(torch.rand(50, 9), 4, "kmeans", torch.Generator())
    >>> [round(v, 3) for v in w.norm(dim=1).tolist()]
    [1.414, 1.414, 1.414, 1.414]
    """
    learner = {"dictionary": dictionary, "kmeans": kmeans}[structure]
    patches = whiten(patches)
    patches = patches[patches.norm(dim=1) > DEAD]  # flat ones tell nothing
    d = torch.zeros(filters, patches.shape[1])
    learned = min(filters, len(patches))
    if learned:
        d[:learned] = torch.as_tensor(learner(patches, learned, generator), dtype=torch.float32)
    dead = d.norm(dim=1) < DEAD
    d[dead] = torch.randn(int(dead.sum()), d.shape[1], generator=generator)
    return d * (2**0.5 / d.norm(dim=1, keepdim=True))


def he_gain(w: torch.Tensor, patches: torch.Tensor) -> float:
    """Return the factor that gives filters He's mean square response.

    w: (O, d). patches: (M, d). Random filters answer with 2 mean(x^2). Learned ones point where the patches
    lie and answer several times as strongly: layer upon layer activations would grow, and training diverge,
    although every filter has He's norm.

    >>> round(he_gain(2 * torch.eye(2), torch.eye(2)), 3)  # filters along the patches answer too strongly
    0.707
    """
    response, he = (patches @ w.T).square().mean(), 2 * patches.square().mean()
    return float((he / response).sqrt()) if response > 0 else 1.0


def plain_convolutions(model):
    """The `nn.Conv2d` layers by name, but those that the user froze. Raises `NoEffect` without any."""
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Conv2d}
    convs = {name: m for name, m in found.items() if m.weight.requires_grad}
    if not convs:
        which = "that is not frozen" if found else "layer"
        raise NoEffect(f"structure and strength: {type(model).__name__} has no nn.Conv2d {which}")
    return convs


@torch.no_grad()
def learn_structure_(
    model: nn.Module, images: torch.Tensor, structure: str, generator: torch.Generator, patches: int = 10_000
) -> dict[str, int]:
    """Set all convolutions' filters to what is learned from their input.

    images: (N, C, H, W), normalised, of the *training* set. One forward pass: a layer's filters are learned
    when its input arrives, so all layers before it have theirs. They get He's norm, and per layer one factor
    that keeps the variance as He's would (`he_gain`). Biases, frozen filters and all else stay. Returns
    {layer: number of patches}.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> learn_structure_(net, torch.rand(8, 1, 8, 8), "kmeans", torch.Generator(), patches=100)
    {'features.0': 100, 'features.4': 100}
    """
    choose("structure of filters", structure, STRUCTURES[1:])
    convs, seen, hooks = plain_convolutions(model), {}, []

    def learn(name):
        def hook(conv, inputs):
            if name not in seen:
                found = cut_patches(inputs[0], conv, patches, generator).float().cpu()
                seen[name] = len(found)
                w = learn_filters(found, conv.out_channels, structure, generator)
                conv.weight.copy_((he_gain(w, found) * w).view_as(conv.weight))

        return hook

    was = {m: m.training for m in model.modules()}
    buffers = {b: b.clone() for b in model.buffers()}
    try:
        model.eval()
        for m in model.modules():
            m.training = isinstance(m, _NormBase)  # statistics of these images: running ones mean nothing yet
        hooks += [conv.register_forward_pre_hook(learn(name)) for name, conv in convs.items()]
        model(images)
    finally:
        for h in hooks:
            h.remove()
        for m, training in was.items():
            m.training = training
        for b, value in buffers.items():
            b.copy_(value)
    return seen


# Strength


class StrengthConv2d(nn.Conv2d):
    """Convolve with frozen filters W and a trainable strength t.

    W is the buffer `weight`; t is 1 at first. scope "filter": y = t_o (W * x) + b, t: (O,). "input": y = W *
    (t_c x) + b, t: (C,). "kernel": y = (t_oc W) * x + b, t: (O, C / groups). "norm": no t, the weight of the
    normalisation behind it is the strength. Made by `strengthen_`, undone by `merge_`.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> scopes = strengthen_(net, torch.zeros(1, 1, 8, 8))
    >>> type(net[0]).__name__, [name for name, _ in net.named_parameters()]
    ('StrengthConv2d', ['0.bias', '0.t'])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scope == "norm":
            return self._conv_forward(x, self.weight, self.bias)
        if self.scope == "kernel":
            return self._conv_forward(x, self.weight * self.t[:, :, None, None], self.bias)
        if self.scope == "input":
            return self._conv_forward(x * self.t.to(x.dtype)[:, None, None], self.weight, self.bias)
        y = self._conv_forward(x, self.weight, None)
        t = self.t.to(y.dtype)[:, None, None]  # fp32 would make y fp32 under autocast
        return y * t if self.bias is None else torch.addcmul(self.bias.to(y.dtype)[:, None, None], y, t)

    def merged(self) -> torch.Tensor:
        """Return the weight of the plain convolution that computes the same."""
        o, c = self.weight.shape[:2]
        if self.scope == "norm":
            return self.weight
        t = self.t
        if self.scope == "input":  # every filter sees the channels of its group
            t = t.view(self.groups, 1, c).expand(-1, o // self.groups, -1)
        return self.weight * t.reshape(o, -1, 1, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope={self.scope}"


def place(conv, norm, scope, name="", norm_name=""):
    """The scope that a layer gets: the one asked for, unless it has no gradient in front of a normalisation.

    Raises `BadInput` naming the layer where a strength per filter was asked for there, or can't be moved.
    """
    if norm is None:
        return "filter" if scope == "auto" else scope
    if scope == "filter":
        raise BadInput(
            f"the strength per filter of {name} has no gradient: {norm_name} behind it divides it out again; "
            "choose scope 'kernel' or 'input', or 'auto', which takes the normalisation's own weight as the "
            "strength"
        )
    single = conv.in_channels == conv.groups  # a kernel is the whole filter
    if scope == "auto" or single:
        if norm.weight is not None and norm.weight.requires_grad:
            return "norm"
        if single:
            raise BadInput(
                f"no strength of {name} has a gradient: it has one input channel, and {norm_name} behind it "
                "has no weight to be trained"
            )
        return "input"
    return scope


def strengthen_(model: nn.Module, images: torch.Tensor, scope: str = "filter") -> dict[str, str]:
    """Freeze the filters of all `nn.Conv2d` and give them a strength.

    The function stays. Those that are frozen already are left alone. Returns {layer: its scope}. images: a
    few (N, C, H, W), to see which layers a normalisation follows. scope: "filter", "kernel" (per filter and
    input channel), "input" (per input channel), or "auto": per filter, which in front of a normalisation is
    that one's weight. Raises `NoEffect` without convolutions, `BadInput` where a strength would have no
    gradient.

    >>> strengthen_(build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.zeros(2, 1, 8, 8), scope="auto")
    {'features.0': 'norm', 'features.4': 'norm'}
    """
    choose("scope of strength", scope, SCOPES)
    convs, modules = plain_convolutions(model), dict(model.named_modules())
    behind = followers(model, images)
    scopes = {n: place(c, modules.get(behind.get(n)), scope, n, behind.get(n, "")) for n, c in convs.items()}
    for name, conv in convs.items():
        w, s = conv._parameters.pop("weight").detach(), scopes[name]
        conv.__class__, conv.scope = StrengthConv2d, s
        conv.register_buffer("weight", w)
        shape = {"filter": w.shape[:1], "kernel": w.shape[:2], "input": (conv.in_channels,)}.get(s)
        if shape:
            conv.t = nn.Parameter(torch.ones(shape, dtype=w.dtype, device=w.device))
    return scopes


def merge_(model: nn.Module) -> int:
    """Make the strengthened convolutions plain ones that compute the same.

    Returns how many. Raises `NoEffect` if there is none.

    >>> net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.rand(1, 1, 8, 8)
    >>> before, scopes = net(x), strengthen_(net, x)
    >>> merge_(net), torch.allclose(net(x), before)
    (1, True)
    """
    layers = [m for m in model.modules() if isinstance(m, StrengthConv2d)]
    for m in layers:
        w = nn.Parameter(m.merged().detach().clone())
        del m._buffers["weight"], m.scope
        m._parameters = {"weight": w} | {k: v for k, v in m._parameters.items() if k != "t"}
        m.__class__ = nn.Conv2d
    if not layers:
        raise NoEffect(f"structure and strength: {type(model).__name__} has no convolution with a strength")
    return len(layers)


@dataclass(frozen=True, kw_only=True)
class StructureAndStrength(Method):
    """Learn the filters' structure, then train everything or their strength.

    Without labels, from training images. Afterwards the model is plain again.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> method = StructureAndStrength(structure="kmeans", scope="auto", patches=100)
    >>> train(net, data, Recipe(epochs=1), [method]).events[0]["text"]
    'kmeans of 200 patches for 2 layers'
    """

    structure: str = "dictionary"  # or "kmeans", or "random": as initialised
    train: str = "strength"  # or "all" weights
    scope: str = "filter"  # of the strength: also "kernel", "input" or "auto"
    images: int = 1000  # of the training set, at most, that patches are cut from
    patches: int = 10_000  # a layer
    # of the strength's learning rate; it has no weight decay, which would pull the filters to 0
    lr_factor: float = 1.0

    def __post_init__(self):
        choose("structure of filters", self.structure, STRUCTURES)
        choose("what is trained", self.train, ("all", "strength"))
        choose("scope of strength", self.scope, SCOPES)
        within("structure and strength: images", self.images, "a whole number above 0")
        within("structure and strength: patches", self.patches, "a whole number above 0")
        within("structure and strength: lr_factor", self.lr_factor, "above 0")

    def on_fit_start(self, run: Run) -> None:
        if self.structure == "random" and self.train == "all":
            raise NoEffect(
                "structure and strength: random filters with all weights trained are ordinary training"
            )
        images = run.dataset.normalize(run.dataset.train.x[: self.images])  # no other split ever comes in
        if self.structure != "random":
            run.kind = "structure"
            seen = learn_structure_(run.model, images, self.structure, run.generator(self), self.patches)
            run.kind = "step"
            run.log(self, f"{self.structure} of {sum(seen.values())} patches for {len(seen)} layers")
        if self.train == "strength":
            run.restructure(lambda model, optimizer: self.freeze(run, model, optimizer, images[:2]))

    def freeze(
        self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor
    ) -> None:
        """Freeze the filters; strengths get a group of their own beside each of the optimizer's."""
        convs = plain_convolutions(model)
        weights = {name: conv.weight for name, conv in convs.items()}
        held = [set(group["params"]) for group in optimizer.param_groups]
        groups = [[name for name, w in weights.items() if w in params] for params in held]
        scopes = strengthen_(model, images, self.scope)
        forget_(optimizer, weights.values())
        for group, names in zip(list(optimizer.param_groups), groups, strict=True):
            if strengths := [convs[n].t for n in names if scopes[n] != "norm"]:
                own = dict(weight_decay=0.0, lr_factor=self.lr_factor * group.get("lr_factor", 1.0))
                optimizer.add_param_group({**group, **own, "params": strengths})
        trainable = cost.parameters(model)
        run.state[self] = {"scopes": scopes, "groups": groups}
        run.log(
            self,
            f"strength per {', '.join(sorted(set(scopes.values())))}; {trainable} parameters are trained",
            trainable=trainable,
        )

    def on_fit_end(self, run: Run) -> None:
        if self.train == "strength":
            run.restructure(lambda model, optimizer: self.thaw(run, model, optimizer))

    def thaw(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the convolutions plain again, their weights in their groups."""
        forget_(
            optimizer, [m.t for m in model.modules() if isinstance(m, StrengthConv2d) and m.scope != "norm"]
        )
        merge_(model)
        for group, names in zip(optimizer.param_groups, run.state[self]["groups"], strict=False):
            group["params"] += [model.get_submodule(name).weight for name in names]
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
