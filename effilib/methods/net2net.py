"""Net2Net (Chen, Goodfellow & Shlens 2016, arXiv:1511.05641): a larger network starts from a smaller one.

Net2WiderNet: new channels are copies of old ones, and what reads them divides its weights among the copies.
Net2DeeperNet: new layers begin as the identity. Either way the student computes at first exactly what the
teacher does, so training goes on from there. Exact copies receive exact copies of each other's gradients:
something has to break the symmetry.

Beside it GradMax (Evci et al. 2022, arXiv:2201.05125): new channels read with zero weights, and write into
the direction in which the gradient of those weights is largest.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, surgery
from effilib.convolution import evaluating
from effilib.data import Dataset
from effilib.errors import BadInput, NoEffect, choose
from effilib.methods import Info
from effilib.tasks import Task
from effilib.training import History, Method, Recipe, Run, stream, train

__all__ = [
    "BREAKERS",
    "Grown",
    "Net2Net",
    "deepen_",
    "gradmax_",
    "gradmax_directions",
    "grow_",
    "replication",
    "thin_",
    "uneven_shares",
    "widen_",
]

INFO = Info(
    name="Net2Net",
    name_de="Net2Net",
    chapter="6.2",
    paper="Chen, Goodfellow & Shlens 2016, arXiv:1511.05641",
    claim="A wider or deeper network that starts from a trained smaller one converges faster than from a "
    "random start, to the same accuracy; the smaller one's own training is not counted.",
    cost_model="Same FLOPs a step as the larger network from scratch, fewer steps to the same accuracy. The "
    "teacher's training is free only where the teacher was there anyway.",
)

BREAKERS = ("noise", "uneven", "pair", "none", "random")
# GradMax: norm of a new channel's outgoing weights over the mean of the old ones (authors' code)
SHARE_OF_NORM = 0.5
SPARK = 1e-2  # GradMax: shift of new channels, because the derivative of ReLU at 0 is 0


def replication(n: int, q: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return the map g: which old channel each of q new ones copies, (q,).

    The first n are themselves, the rest drawn (section 3.2).

    >>> g = replication(2, 4, torch.Generator().manual_seed(0))
    >>> g[:2].tolist(), set(g[2:].tolist()) <= {0, 1}
    ([0, 1], True)
    """
    return torch.cat([torch.arange(n), torch.randint(n, (q - n,), generator=generator)])


def uneven_shares(index: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return shares of the outgoing weights that add up to 1 over a channel's copies, (q,).

    Drawn from [0.5, 1.5) and scaled. index: (q,), whose copy each channel is.

    >>> shares = uneven_shares(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))
    >>> shares[0].item(), round(shares[1:].sum().item(), 6), (shares[1] == shares[2]).item()
    (1.0, 1.0, False)
    """
    u = torch.rand(len(index), generator=generator, dtype=torch.double) + 0.5
    total = torch.zeros(int(index.max()) + 1, dtype=torch.double).index_add_(0, index, u)
    return u / total[index]


@torch.no_grad()
def widen_(
    node: surgery.Node,
    q: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    breaker: str = "noise",
    noise: float = 0.05,
    generator: torch.Generator | None = None,
    ema: nn.Module | None = None,
) -> torch.Tensor:
    """Give a node q channels in place (Net2Wider); the function is kept, but for the noise.

    breaker: how copies become different. "noise": a share `noise` of each producer's standard deviation is
    added to the weights of the new copies (the paper: "a small amount"). "uneven": the copies share the
    outgoing weights unevenly. "pair": new channels are no copies but come in pairs that read alike, with
    random weights, and write with opposite signs (variance transfer, Yuan et al. 2023). "none". "random": the
    paper's baseline "random pad", random weights in and out, which does not keep the function. Returns g,
    (q,): whose copy each channel is (-1: nobody's). Raises `BadInput` if q is below the width.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> g = widen_(surgery.trace(net)["features.0"], 6, breaker="uneven")
    >>> g[:4].tolist(), torch.allclose(net(x), before, atol=1e-5)
    ([0, 1, 2, 3], True)
    """
    choose("symmetry breaker", breaker, BREAKERS)
    n = node.width
    if q < n:
        raise BadInput(f"{node.name} has {n} channels, it cannot be widened to {q}")
    if q == n:
        return torch.arange(n)
    if breaker in ("pair", "random"):
        _append_(node, q - n, optimizer, ema=ema)
        _draw_(node, n, breaker, generator)
        _follow_(node, n, ema)
        return torch.cat([torch.arange(n), torch.full((q - n,), -1)])
    index = replication(n, q, generator)
    surgery.select_(
        node,
        index,
        optimizer,
        share=uneven_shares(index, generator) if breaker == "uneven" else None,
        ema=ema,
    )
    if breaker == "noise" and noise:
        for name in node.producers:
            W = getattr(node.layer(name), "weight", None)
            if W is not None:
                W[n:] += noise * W[:n].std() * _randn(W[n:].shape, generator, W)
        _follow_(node, n, ema)
    return index


def _randn(shape, generator, like):
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _append_(node, k, optimizer, ema=None):
    """k channels that read and write with zero weights; BatchNorm's values are the first ones of a new layer,
    momentum is 0.
    """
    n = node.width
    surgery.select_(node, [*range(n), *[0] * k], optimizer, share=[1.0] * n + [0.0] * k, ema=ema)
    for name in node.producers:
        m = node.layer(name)
        for p in (getattr(m, "weight", None), getattr(m, "bias", None)):
            if p is not None:
                p[n:] = 0
    for name, per in node.bns.items():
        m = node.layer(name)
        for t, value in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0), (m.running_var, 1)):
            if t is not None:
                t[n * per :] = value
    for name, per in node.consumers.items():  # producers' state was scaled by the share, 0
        W = node.layer(name).weight
        for t in optimizer.state.get(W, {}).values() if optimizer else ():
            if isinstance(t, torch.Tensor) and t.shape == W.shape:
                t[:, n * per :] = 0


def _draw_(node, n, breaker, generator):
    """Random weights for the channels from n on: "random" in and out; "pair": equal in, opposite out, an odd
    one out writes nothing.
    """
    half = (node.width - n) // 2
    for name in node.producers:
        W = getattr(node.layer(name), "weight", None)
        if W is not None:
            nn.init.kaiming_normal_(
                new := torch.empty_like(W[n:], device="cpu"), nonlinearity="relu", generator=generator
            )
            W[n:] = new
            if breaker == "pair":
                W[n + half : n + 2 * half] = W[n : n + half]
    for name, per in node.consumers.items():
        W = node.layer(name).weight
        old, new = W[:, : n * per], W[:, n * per :]
        new.copy_(old.std() * _randn(new.shape, generator, W))
        if breaker == "pair":
            new[:, half * per : 2 * half * per] = -new[:, : half * per]
            new[:, 2 * half * per :] = 0


def _follow_(node, n, ema):
    """Give the running average the same new channels."""
    if ema is None:
        return
    ema = surgery.copies(node.model, ema)[1]
    for name in [*node.producers, *node.bns]:
        per = node.bns.get(name, 1)
        for mine, theirs in zip(
            node.layer(name).state_dict().values(), node.layer(name, ema).state_dict().values(), strict=True
        ):
            if mine.dim():
                theirs[n * per :] = mine[n * per :]
    for name, per in node.consumers.items():
        node.layer(name, ema).weight[:, n * per :] = node.layer(name).weight[:, n * per :]


@torch.no_grad()
def deepen_(
    model: nn.Module,
    where: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    ema: nn.Module | None = None,
) -> str:
    """Add a layer or block behind `where` in place (Net2Deeper); it changes nothing.

    Returns the new one's name. where: a residual block (a block with zero in its last BatchNorm's scale
    follows: exact in eval and in training), or a ReLU in a Sequential (an identity convolution, BatchNorm and
    ReLU follow: exact in eval; in training on the batch x: (N, C, H, W), whose moments BatchNorm is set to
    undo, and nearly so on others).

    >>> net, x = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> deepen_(net, "stages.0.0"), torch.allclose(net(x), before, atol=1e-6)
    ('stages.0.1', True)
    """
    modules = dict(model.named_modules())
    if isinstance(modules.get(where), nn.ReLU):
        moments = {} if x is None else dict(zip(("mean", "var"), _moments(model, where, x), strict=True))
        return surgery.insert_layer_(model, where, optimizer, ema=ema, **moments)
    return surgery.append_block_(model, where, optimizer, generator=generator, ema=ema)


def _moments(model, where, x):
    """Mean and variance per channel, (C,), of what comes out of a layer in training mode; no statistic
    moves.
    """
    seen = []
    hook = model.get_submodule(where).register_forward_hook(
        lambda m, inputs, output: seen.append(output.detach().clone())
    )
    norms = [m for m in model.modules() if isinstance(m, surgery.NORMS)]
    buffers, was = [{k: b.clone() for k, b in m.named_buffers()} for m in norms], model.training
    models.in_training(model)(x)
    if not was:
        model.eval()
    hook.remove()
    for m, before in zip(norms, buffers, strict=True):
        for k, b in m.named_buffers():
            b.copy_(before[k])
    h = seen[-1]
    return h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)


def gradmax_directions(M: torch.Tensor, k: int, k1: int, k2: int, stride: int = 1) -> torch.Tensor:
    """Return GradMax's outgoing weights for k new channels.

    They make the gradient of zero incoming weights largest. M: (c_out, c_in, K, K), the gradient of the loss
    with respect to the kernel of one convolution that would go from the new channels' input straight to their
    readers' output; K = k1 + stride (k2 - 1). As dL/dV = A Omega with A[(i, a), (o, b)] = M[o, i, a + stride
    b], they are the right singular vectors of A with the largest singular values. Returns (k, c_out, k2, k2),
    of norm 1, orthogonal.

    >>> directions = gradmax_directions(torch.rand(4, 2, 5, 5), k=3, k1=3, k2=3)
    >>> directions.shape, directions.flatten(1).norm(dim=1).round().tolist()
    (torch.Size([3, 4, 3, 3]), [1.0, 1.0, 1.0])
    """
    windows = M.unfold(2, k1, stride).unfold(3, k1, stride)  # (o, i, b, b, a, a)
    o, i = M.shape[:2]
    A = windows.permute(1, 4, 5, 0, 2, 3).reshape(i * k1 * k1, o * k2 * k2)
    V = torch.linalg.svd(A.double(), full_matrices=False).Vh
    if k > len(V):  # more channels than directions: these are used again
        V = V.repeat(-(-k // len(V)), 1)
    return V[:k].view(k, o, k2, k2).to(M.dtype)


def gradmax_(
    node: surgery.Node,
    q: int,
    x: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    spark: float = SPARK,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Give a node q channels in GradMax's way, in place.

    x: (N, C, H, W), y: (N,): the batch whose gradient counts. New channels read with zero weights and write
    in the directions of `gradmax_directions`, scaled to half of the old ones' mean norm. PyTorch's ReLU has
    derivative 0 at 0, so that such a channel would be dead: it gets a shift `spark`. To keep the function all
    the same, channels come in pairs that write with opposite signs; an odd one out writes nothing. A
    BatchNorm on an all-zero channel multiplies gradients by scale / sqrt(eps), so its scale is sqrt(eps).
    Returns the singular directions used, (pairs, c_out, k2, k2). Raises `BadInput` unless the node has one
    producer and one consumer, both convolutions, with nothing between that changes the size, and a bias or
    BatchNorm for the shift.

    >>> net = build("vgg", 4, (1, 8, 8), widths=((4,), (8, 8)))
    >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    >>> directions = gradmax_(surgery.trace(net)["features.4"], 12, x, y)
    >>> directions.shape, net.settings()["widths"]  # two pairs
    (torch.Size([2, 8, 3, 3]), [[4], [12, 8]])
    """
    model, n = node.model, node.width
    names = [*node.producers, *node.consumers]
    layers = [node.layer(name) for name in names]
    if len(layers) != 2 or not all(isinstance(m, nn.Conv2d) and m.stride[0] == m.stride[1] for m in layers):
        raise BadInput(
            f"GradMax: {node.name} is no node between two convolutions, one that writes it and one that "
            "reads it"
        )
    first, second = layers
    if first.bias is None and not node.bns:
        raise BadInput(
            f"GradMax: {node.name} has neither bias nor BatchNorm, so that new channels would stay dead "
            "behind ReLU"
        )
    if q < n:
        raise BadInput(f"{node.name} has {n} channels, it cannot be widened to {q}")
    inside, outside = _around(model, first, second, x, y)
    if outside["x"].shape[-2:] != inside["out"].shape[-2:]:
        raise BadInput(f"GradMax: between {names[0]} and {names[1]} the size changes")
    k1, k2, s = first.kernel_size[0], second.kernel_size[0], first.stride[0]
    size = k1 + s * (k2 - 1)
    pad = [
        m.padding[0] if isinstance(m.padding, tuple) else m.kernel_size[0] // 2 * (m.padding == "same")
        for m in layers
    ]
    M = nn.grad.conv2d_weight(
        inside["x"],
        (second.out_channels, first.in_channels, size, size),
        outside["dy"],
        s * second.stride[0],
        pad[0] + s * pad[1],
    )
    pairs = (q - n) // 2
    directions = gradmax_directions(M, pairs, k1, k2, s)
    with torch.no_grad():
        norm = SHARE_OF_NORM * second.weight.movedim(1, 0).flatten(1).norm(dim=1).mean()
        _append_(node, q - n, optimizer)
        new = second.weight[:, n:]
        new[:, :pairs] = norm * directions.movedim(0, 1)
        new[:, pairs : 2 * pairs] = -new[:, :pairs]
        for m in [node.layer(b) for b in node.bns] or [first]:
            m.bias[n:] = spark
            if m is not first:
                m.weight[n:] = m.eps**0.5
    return directions


def _around(model, first, second, x, y):
    """Input and output of `first`, input of `second` and the gradient of its output, on a batch; nothing else
    is left behind.
    """
    seen = {first: {}, second: {}}

    def keep(m, inputs, output):
        seen[m] |= {"x": inputs[0].detach().float(), "out": output.detach()}
        output.register_hook(lambda dy: seen[m].__setitem__("dy", dy.detach().float()))

    hooks = [m.register_forward_hook(keep) for m in seen]
    with evaluating(model), torch.enable_grad():  # no statistic moves
        loss = F.cross_entropy(model(x).float(), y)
        torch.autograd.grad(loss, list(second.parameters()))
    for h in hooks:
        h.remove()
    return seen[first], seen[second]


@dataclass(frozen=True, kw_only=True)
class Net2Net(Method):
    """Grow the network in the run. Raises `NoEffect` if nothing was to grow.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))  # a trained one, in earnest
    >>> history = train(net, data, Recipe(epochs=1), [Net2Net(wider=1.5)])
    >>> net.settings()["widths"], history.events[0]["text"]
    ([[6], [12]], '384 -> 790 parameters: features.0 4 -> 6; features.4 8 -> 12')
    """

    at: float = 0.0  # share of the steps, at the next epoch's start; 0: before the first step, for a teacher
    wider: float | tuple = 1.0  # factor on the width of every node, or ((node, width), ...)
    deeper: tuple = ()  # blocks, or ReLUs, behind which a new one comes
    breaker: str = "noise"  # see `widen_`; or "gradmax" where a node allows it, else "pair"
    noise: float = 0.05  # see `widen_`
    lr_factor: float = 1.0  # on the learning rate from then on (the paper advises 1/10 for a student)

    def __post_init__(self):
        choose("symmetry breaker", self.breaker, (*BREAKERS, "gradmax"))
        if not 0 <= self.at < 1:
            raise BadInput(f"Net2Net: growth at {self.at} of the steps, it must lie in [0, 1)")

    def on_fit_start(self, run: Run) -> None:
        run.state[self] = {"grown": False}
        if self.at == 0 and not run.resumed:
            self._grow(run)

    def on_epoch_start(self, run: Run) -> None:
        if not run.state[self]["grown"] and run.step >= self.at * run.steps:
            self._grow(run)

    def on_fit_end(self, run: Run) -> None:
        if not run.state[self]["grown"]:
            raise NoEffect("Net2Net: training ended before the growth; it comes at an epoch's start")

    def _grow(self, run):
        run.state[self]["grown"] = True
        done, before = [], sum(p.numel() for p in run.model.parameters())
        generator = run.generator(self)
        x, y = next(iter(run.dataset.shuffled(run.batches.batch_size, generator)))

        how = dict(wider=self.wider, deeper=self.deeper, breaker=self.breaker, noise=self.noise)

        def change(model, optimizer):
            done.extend(grow_(model, optimizer, x, y, **how, generator=generator))

        run.restructure(change)
        if not done:
            raise NoEffect("Net2Net: no node was to become wider and no layer was to be added")
        run.schedule.scale *= self.lr_factor
        after = sum(p.numel() for p in run.model.parameters())
        run.log(self, f"{before:,} -> {after:,} parameters: {'; '.join(done)}", parameters=[before, after])


def grow_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    x: torch.Tensor | None,
    y: torch.Tensor | None,
    *,
    wider: float | tuple = 1.0,
    deeper: tuple = (),
    breaker: str = "noise",
    noise: float = 0.05,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Widen nodes and add layers, in place. Returns what was done, in words.

    x, y: a batch as in training, see `deepen_` and `gradmax_`; the settings are those of `Net2Net`.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,))
    >>> grow_(net, None, None, None, wider=(("stages.0.0.conv1", 12),), deeper=("stages.0.0",))
    ['stages.0.0.conv1 8 -> 12', 'stages.0.1 added']
    """
    done, found = [], surgery.trace(model)
    if isinstance(wider, tuple):
        goal = [(found[name], width) for name, width in wider]
    else:
        goal = [(node, round(wider * node.width)) for node in found.nodes]
    for node, q in goal:
        n, how = node.width, breaker
        if q == n:
            continue
        if breaker == "gradmax":
            try:
                gradmax_(node, q, x, y, optimizer, generator=generator)
            except BadInput:
                how = "pair"
        if how != "gradmax":
            widen_(node, q, optimizer, breaker=how, noise=noise, generator=generator)
        done.append(f"{node.name} {n} -> {q}" + (f" ({how})" if how != breaker else ""))
    for where in deeper:
        done.append(f"{deepen_(model, where, optimizer, x=x, generator=generator)} added")
    return done


@torch.no_grad()
def thin_(model: nn.Module, factor: float = 0.5, multiple: int = 1) -> tuple[tuple[str, int], ...]:
    """Make a smaller network of the same kind in place, before it is trained: a teacher.

    Keeps the first channels of every node. Returns ((node, width before), ...), which `Net2Net(wider=...)`
    takes to make the larger one of it again.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> thin_(net, 0.5), net.settings()["widths"]
    ((('features.0', 4), ('features.4', 8)), [[2], [4]])
    """
    before = []
    for node in surgery.nodes(model):
        before.append((node.name, node.width))
        q = min(node.width, max(1, round(factor * node.width / multiple)) * multiple)
        surgery.select_(node, range(q))
    return tuple(before)


_taught = {}  # key -> what a given teacher has learnt, and its history: the last one only


@dataclass(frozen=True, kw_only=True)
class Grown:
    """Train a student that grows out of a teacher: (task, seed) -> `History`.

    The teacher is the task's network with narrower layers. The student grows back to the full widths before
    its first step, on its clock. Students whose teacher is given share it within a cell.

    >>> t = task("smoke", "synthetic")
    >>> student, both = Grown()(t, seed=0), Grown(counted=True)(t, seed=0)
    >>> student.steps, both.steps, both.seconds > student.seconds
    (4, 12, True)
    """

    breaker: str = "noise"  # of symmetry, see `widen_`; or "gradmax"
    factor: float = 0.5  # the teacher's share of every width
    epochs: float = 0.5  # the student's share of the recipe's epochs
    lr: float = 0.5  # and of its learning rate
    taught: float = 1.0  # the teacher's share of the epochs
    counted: bool = False  # put the teacher's training on the clock
    deeper: tuple = ()  # layers or blocks to add as well
    given: Recipe | None = None  # of the teacher, where it is not the student's at its length

    def __call__(self, task: Task, seed: int) -> History:
        """Train both, or the student alone where the teacher was trained before."""
        dataset = task.load()
        model, before, teacher = self.teacher(task, dataset, seed)
        epochs, lr = self.epochs * task.recipe.epochs, self.lr * task.recipe.lr
        wider = before if self.factor < 1 else 1.0
        method = Net2Net(wider=wider, breaker=self.breaker, deeper=self.deeper)
        recipe = replace(task.recipe, epochs=epochs, lr=lr, warmup=0.0)
        student = train(model, dataset, recipe, [method], seed)
        event = {"step": 0, "epoch": 0, "method": "teacher", "text": f"teacher: {teacher.accuracy:.2f} %"}
        student.events.insert(0, event | {"accuracy": teacher.accuracy, "seconds": teacher.seconds})
        return teacher + student if self.counted else student

    def teacher(
        self, task: Task, dataset: Dataset, seed: int
    ) -> tuple[nn.Module, tuple[tuple[str, int], ...], History]:
        """Return the trained teacher, the full network's widths, and the teacher's history."""
        recipe = self.given or task.recipe
        recipe = replace(recipe, epochs=self.taught * recipe.epochs)
        model = task.build(dataset, seed)
        before = thin_(model, self.factor)
        key = repr((replace(task, recipe=recipe), seed, self.factor))
        if self.counted or key not in _taught:
            if task.network in models.NETWORKS:  # as wide as it is now
                models.initialize_(model, stream(seed, "initial weights").initial_seed())
            history = train(model, dataset, recipe, (), seed)
            if self.counted:
                return model, before, history
            _taught.clear()
            _taught[key] = copy.deepcopy(model.state_dict()), history
        weights, history = _taught[key]
        model.load_state_dict(weights)
        return model, before, history
