"""PruneTrain (Lym et al. 2019, arXiv:1901.09290): prune channels while training, from the first step, and
really take them out.

A group-lasso penalty on whole channels drives the weights of some of them to zero; every few epochs the
network is cut to the channels that live ("reconfigured"), so that the rest of the training is cheaper. The
penalty's coefficient comes from one number, the share r of the loss that it makes up on the first batch.

The published form adds the penalty to the loss and lets SGD follow its sub-gradient; weights then only come
near zero, and a threshold decides. A proximal step (the default here) reaches exact zeros, and cuts are then
exact. Physical cuts are at multiples that pay on the device: a CPU's convolutions work in blocks of 16
channels, and a width of 31 is slower than 32."""

import math
from dataclasses import dataclass

import torch

from effilib import surgery
from effilib.convolution import probe
from effilib.errors import BadInput, NoEffect, choose
from effilib.methods import Info
from effilib.training import Method

INFO = Info(
    name="PruneTrain",
    name_de="Beschneiden während des Trainings",
    chapter="6.1",
    paper="Lym et al. 2019, arXiv:1901.09290",
    claim="Pruning channels by group lasso from the first step, and reconfiguring the network every few epochs, cuts training FLOPs of "
    "ResNet-50 on ImageNet by 40 % and its training time by 39 %.",
    cost_model="The penalty adds a pass over the weights per step; a layer's FLOPs shrink with the product of its live input and output "
    "channels; a reconfiguration costs milliseconds. FLOPs become time only where the narrower layers run as efficiently.",
)

THRESHOLD = 1e-4  # of the published form: a group is dead where all of its weights are smaller
PUBLISHED_LR_STEPS = 390 * (
    91 * 0.1 + 45 * 0.01 + 46 * 0.001
)  # sum of the learning rate over CIFAR's 182 epochs of 390 steps


def group_norms(W, axis, per=1):
    """Norms of the groups of W along `axis`: (n,). A group is what one channel owns, `per` neighbouring
    columns of a linear layer.

    >>> group_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 0)
    tensor([5., 1.])
    """
    W = W.movedim(axis, 0)
    return torch.linalg.vector_norm(W.reshape(W.shape[0] // per, -1), dim=1)


def group_weight(W, axis, per=1, weigh="equal"):
    """What the norms of a layer's groups count: 1; by "size" the root of a group's size (Yuan & Lin 2006); by
    "norm" their mean.

    Small groups, as a classifier's columns, have small norms and die first where all count alike; by "norm"
    every layer shrinks by the same share.

    >>> group_weight(torch.ones(2, 9), 0), group_weight(torch.ones(2, 9), 0, weigh="size")
    (1.0, 3.0)
    """
    if weigh == "norm":
        return group_norms(W, axis, per).detach().mean()
    return (W.numel() // W.shape[axis] * per) ** 0.5 if weigh == "size" else 1.0


def group_lasso(groups, eps=1e-8, weigh="equal"):
    """G(W) = sum over all groups of sqrt(||W_g||^2 + eps), differentiable. groups: (W, axis, per) of each layer and side.

    >>> W = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> group_lasso([(W, 0, 1)]).item()  # 5 + 1
    6.0
    """
    return sum(group_weight(*g, weigh) * (group_norms(*g).square() + eps).sqrt().sum() for g in groups)


def coefficient(ratio, loss, penalty):
    """lambda = r L / (G (1 - r)): the penalty makes up the share r of the whole loss. loss, penalty: of the
    first batch.

    >>> coefficient(0.2, loss=2.0, penalty=10.0)  # 0.05 x 10 is a fifth of 2 + 0.5
    0.05
    """
    return ratio * loss / (penalty * (1 - ratio))


@torch.no_grad()
def shrink_(groups, kappa, weigh="equal", keep_scale=False):
    """The proximal step: W_g <- W_g max(0, 1 - kappa / ||W_g||) for every group, producers' rows first, then consumers' columns.

    keep_scale: each layer is scaled back to the norm that it had, so that only the groups' shares of it
    change.

    >>> W = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> shrink_([(W, 0, 1)], kappa=2.5)
    >>> W.tolist()
    [[1.5, 2.0], [0.0, 0.0]]
    """
    for W, axis, per in groups:
        norm = group_norms(W, axis, per)
        factor = (
            (1 - kappa * group_weight(W, axis, per, weigh) / norm.clamp_min(1e-12))
            .clamp_min_(0)
            .repeat_interleave(per)
        )
        if keep_scale:
            factor *= norm.norm() / (factor.view(-1, per)[:, 0] * norm).norm().clamp_min(1e-12)
        W.mul_(factor.view([-1 if a == axis else 1 for a in range(W.dim())]))


def shrink_steps(norm, lam, lr, momentum=0.9, weight_decay=0.0):
    """Steps until a group of this norm without a gradient is gone: (1 - mu) / (eta wd) ln(1 + wd ||W|| / lambda).

    >>> round(shrink_steps(norm=1.0, lam=0.1, lr=0.1), 6)
    10.0
    """
    rate = lam * lr / (1 - momentum)
    if weight_decay == 0:
        return norm / rate
    decay = weight_decay * lr / (1 - momentum)
    return float(torch.log1p(torch.tensor(decay * norm / rate, dtype=torch.double))) / decay


def places(nodes, rule="union"):
    """Where the groups of these nodes lie: (layer, axis, columns per channel), all producers' rows, then all
    consumers' columns.

    A network's input channels and its outputs belong to no node, so they are not penalised; nor are biases
    and BatchNorms. rule: "readers" leaves the producers' rows out.

    >>> places(surgery.nodes(build("convnet", 4, (1, 8, 8), widths=(4, 8))))
    [('features.0', 0, 1), ('features.4', 0, 1), ('features.4', 1, 1), ('head', 1, 1)]
    """
    rows = [
        (name, 0, 1)
        for node in nodes
        for name in node.producers
        if hasattr(node.layer(name), "weight") and rule == "union"
    ]
    return rows + [(name, 1, per) for node in nodes for name, per in node.consumers.items()]


def weights(model, places):
    """The groups at these places: (W, axis, columns per channel).

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> [(W.shape, axis) for W, axis, _ in weights(net, [("head", 1, 1)])]
    [(torch.Size([4, 8]), 1)]
    """
    return [(model.get_submodule(name).weight, axis, per) for name, axis, per in places]


@torch.no_grad()
def live(node, threshold=0.0, rule="union"):
    """(width,) bool: a channel lives if any producer writes it or any consumer reads it with a weight above
    the threshold (union rule).

    rule: by "readers" it lives if any consumer reads it. What nobody reads changes nothing, whatever is still
    written.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> with torch.no_grad():
    ...     net.features[0].weight[1:] = net.features[4].weight[:, 2:] = 0  # channel 1 is read, but not written
    >>> live(surgery.trace(net)["features.0"]).tolist()
    [True, True, False, False]
    """
    alive = torch.zeros(node.width, dtype=torch.bool)
    for W, axis, _ in weights(node.model, places([node], rule)):
        largest = W.movedim(axis, 0).reshape(node.width, -1).abs().amax(1)
        alive |= (largest > threshold).cpu()
    return alive


def kept(alive, multiple):
    """Indices to keep: the living, filled up to a multiple with the first dead ones, never fewer than one
    multiple.

    >>> kept(torch.tensor([False, True, False, True]), multiple=3).tolist()  # filled up with the first dead one
    [0, 1, 3]
    """
    n = min(len(alive), multiple * max(1, -(-int(alive.sum()) // multiple)))
    return (~alive).int().argsort(stable=True)[:n].sort().values


def stays(node, threshold=0.0, rule="union", spare=None):
    """(width,) bool: the channels of a node that live, and those that are spared. spare: node's name ->
    (width,) bool.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(2, 8))
    >>> with torch.no_grad():
    ...     net.features[0].weight[1:] = net.features[4].weight[:, 1:] = 0
    >>> node = surgery.trace(net)["features.0"]
    >>> stays(node).tolist(), stays(node, spare={"features.0": torch.tensor([False, True])}).tolist()
    ([True, False], [True, True])
    """
    alive = live(node, threshold, rule)
    return alive | spare[node.name] if spare and node.name in spare else alive


def dead_paths(structure, threshold=0.0, rule="union", spare=None):
    """Residual paths through which nothing flows, because all channels of a node inside are dead.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(2,))
    >>> with torch.no_grad():
    ...     zeroed = net.stages[0][1].conv1.weight.zero_(), net.stages[0][1].conv2.weight.zero_()
    >>> [path.name for path in dead_paths(surgery.trace(net))]
    ['stages.0.1']
    """
    return [
        path for path in structure.paths
        if any(not stays(node, threshold, rule, spare).any() for node in structure.inner(path)) and surgery.can_remove(path)
    ]  # fmt: skip


def anything_dead(model, threshold=0.0, multiple=1, rule="union", spare=None):
    """Whether `prune_` would do anything.

    >>> anything_dead(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    False
    """
    found = surgery.trace(model)
    if dead_paths(found, threshold, rule, spare):
        return True
    return any(len(kept(stays(n, threshold, rule, spare), multiple)) < n.width for n in found.nodes)


def prune_(model, optimizer=None, *, threshold=0.0, multiple=1, rule="union", spare=None, cuts=None):
    """Cut the dead channels of `model`, and remove the residual paths that are dead as a whole. In place.

    spare: channels that are not cut, see `stays`. cuts: a dict that gets the indices kept of every node that
    is cut. Exact for exact zeros (threshold 0). Returns what was done, in words; [] where nothing was dead
    enough.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> with torch.no_grad():
    ...     net.features[0].weight[2:] = net.features[4].weight[:, 2:] = 0
    >>> prune_(net)
    ['features.0 4 -> 2']
    """
    done = []
    for path in dead_paths(surgery.trace(model), threshold, rule, spare):
        surgery.remove_path_(path, optimizer)
        done.append(f"residual path {path.name} removed")
    for node in surgery.trace(model).nodes:
        index = kept(stays(node, threshold, rule, spare), multiple)
        if len(index) < node.width:
            done.append(f"{node.name} {node.width} -> {len(index)}")
            surgery.select_(node, index, optimizer)
            if cuts is not None:
                cuts[node.name] = index
    return done


def widths(model, rule="union"):
    """Channels of every node, and how many of them live: dict name -> (width, live channels).

    >>> widths(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    {'features.0': (4, 4), 'features.4': (8, 8)}
    """
    return {node.name: (node.width, int(live(node, rule=rule).sum())) for node in surgery.trace(model).nodes}


def lr_steps(run, until=1.0):
    """Sum of the learning rate over a share of the run's steps: how far a penalty shrinks groups, in units of
    lambda / (1 - mu).

    >>> from types import SimpleNamespace
    >>> lr_steps(SimpleNamespace(planned=3, lr_at=Recipe(lr=0.5, warmup=0, schedule="constant").lr_at))
    1.5
    """
    return sum(
        run.schedule.lr_at(step, run.schedule.planned)
        for step in range(math.ceil(until * run.schedule.planned))
    )


@dataclass(frozen=True, kw_only=True)
class PruneTrain(Method):
    """Penalise, and reconfigure every `every` epochs. Raises `NoEffect` if the network has no channels that
    could be cut.

    Published are the first four and `every` (10 epochs on CIFAR, 5 on ImageNet); what follows is for runs far
    shorter than theirs. ratio: r, the penalty's share of the loss on the first batch. mode: "published"
    (sub-gradient through the loss, and a threshold) or "proximal". rule: "union", or "readers", see `live`;
    by readers only their columns are penalised. weigh: see `group_weight` ("equal", or "size", an option of
    the authors' code). multiple: cuts leave multiples of it; "auto" is 16 on a CPU, 8 on CUDA. grow_batch:
    enlarge the batch by how much smaller a step's activations have become, and the learning rate with it.

    scale: factor on lambda. The penalty shrinks a group by lambda times the sum of the learning rate, so a
    short run prunes nothing with the published lambda; "schedule" multiplies it by the published sum over
    that of this run's steps under the penalty. until: share of the steps after which the penalty ends, so
    that what is left recovers. keep_scale: see `shrink_`; without it a strong penalty also shrinks what
    lives, and under BatchNorm smaller weights mean a larger effective learning rate.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=2), [PruneTrain(ratio=0.3)])
    >>> history.events[0]["text"], len(history.events[-1]["widths"])
    ('lambda = ... (ratio 0.3 on the first batch, times 1)', 2)
    """

    ratio: float = 0.2
    mode: str = "proximal"
    rule: str = "union"
    weigh: str = "equal"
    keep_scale: bool = False
    scale: float | str = 1.0
    every: int = 1
    multiple: int | str = "auto"
    until: float = 1.0
    grow_batch: bool = False

    def __post_init__(self):
        choose("mode", self.mode, ("proximal", "published"))
        choose("rule", self.rule, ("union", "readers"))
        choose("weighing", self.weigh, ("equal", "size", "norm"))
        if not 0 <= self.ratio < 1:
            raise BadInput(f"PruneTrain: the ratio is {self.ratio}, it must lie in [0, 1)")
        if isinstance(self.scale, str):
            choose("scale", self.scale, ("schedule",))
        if (
            not (self.multiple == "auto" or (isinstance(self.multiple, int) and self.multiple > 0))
            or self.every < 1
        ):
            raise BadInput(
                "PruneTrain: multiple is a whole number above 0 or 'auto', every a whole number of epochs above 0"
            )

    def on_fit_start(self, run):
        if not surgery.trace(run.model).nodes:
            raise NoEffect(f"PruneTrain: {type(run.model).__name__} has no channels that could be cut")
        run.state[self] = {
            "lambda": None,
            "history": [],
            "activations": activations(run.model, run.dataset.shape),
            "structure": -1,
        }

    def groups(self, run):
        """The groups as they are now, found anew after every change of structure."""
        state = run.state[self]
        if state["structure"] != run.structures:
            state["structure"], state["places"] = (
                run.structures,
                places(surgery.trace(run.model).nodes, self.rule),
            )
        return weights(run.model, state["places"])

    def loss_terms(self, run):
        state, groups = run.state[self], self.groups(run)
        if state["lambda"] is None:
            state["lambda"], scale = self.price(run, groups)
            run.log(
                self,
                f"lambda = {state['lambda']:.3g} (ratio {self.ratio:g} on the first batch, times {scale:.3g})",
                lam=state["lambda"],
            )
        if self.mode == "published" and state["lambda"] and self.active(run):
            return state["lambda"] * group_lasso(groups, weigh=self.weigh)

    @torch.no_grad()
    def price(self, run, groups):
        """(lambda, the factor in it), from the first batch."""
        scale = PUBLISHED_LR_STEPS / lr_steps(run, self.until) if self.scale == "schedule" else self.scale
        return run.ranks.agree(
            scale * float(coefficient(self.ratio, run.loss, group_lasso(groups, weigh=self.weigh)))
        ), scale

    def blocks(self, run):
        """The multiple that cuts leave on this device."""
        return {"cpu": 16, "cuda": 8}[run.device.type] if self.multiple == "auto" else self.multiple

    def active(self, run):
        """Whether the penalty still acts."""
        return run.schedule.position < self.until * run.schedule.planned

    def on_step_end(self, run):
        lam = run.state[self]["lambda"]
        if self.mode == "proximal" and lam and self.active(run):
            shrink_(self.groups(run), run.lr * lam / (1 - run.recipe.momentum), self.weigh, self.keep_scale)

    def on_epoch_end(self, run):
        state = run.state[self]
        if (run.epoch + 1) % self.every == 0 and run.step < run.steps:
            threshold = THRESHOLD if self.mode == "published" else 0.0
            how = dict(threshold=threshold, multiple=self.blocks(run), rule=self.rule)
            if anything_dead(run.model, **how):
                done = []
                run.restructure(lambda model, optimizer: done.extend(prune_(model, optimizer, **how)))
                run.log(self, "; ".join(done), pruned=done)
                self.enlarge(run, state)
        with run.clock.paused():  # for the record
            state["history"].append(widths(run.model, self.rule))

    def enlarge(self, run, state):
        """The published rule's aim: what the smaller network saves in memory, a larger batch takes up; lr
        grows with it.
        """
        if self.grow_batch:
            now = activations(run.model, run.dataset.shape)
            factor = state["activations"] / now
            size = int(factor * run.batches.batch_size) // 8 * 8  # whole multiples of 8 images
            size = min(size, len(run.dataset.train))
            if size > run.batches.batch_size:
                before = run.batches.batch_size
                run.grow_batch(size / before, size / before)
                state["activations"] = now * size / before
                run.log(
                    self, f"batch {before} -> {size}, learning rate times {size / before:.3g}", batch=size
                )

    def on_fit_end(self, run):
        run.log(self, "widths by epoch", widths=run.state[self]["history"], lam=run.state[self]["lambda"])


def activations(model, shape):
    """Numbers that all convolutions and linear layers write for one image (C, H, W) = `shape`: what a step
    keeps for backward, roughly.

    >>> activations(build("convnet", 4, (1, 8, 8), widths=(4, 8)), (1, 8, 8))  # 4 x 64 + 8 x 16 + 4
    388
    """
    total, hooks = [], []
    for m in model.modules():
        if isinstance(m, surgery.CONVS):
            hooks.append(m.register_forward_hook(lambda m, inputs, output: total.append(output[0].numel())))
    p = next(model.parameters())
    probe(model, torch.zeros(1, *shape, device=p.device, dtype=p.dtype), hooks)
    return sum(total)
