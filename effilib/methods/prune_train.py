"""PruneTrain (Lym et al. 2019, arXiv:1901.09290): prune channels while training, and really cut them out.

A group-lasso penalty on whole channels drives the weights of some of them to zero; every few epochs the
network is cut to the channels that live ("reconfigured"), so that the rest of the training is cheaper. The
penalty's coefficient comes from one number, the share r of the loss that it makes up on the first batch.

The published form adds the penalty to the loss and lets SGD follow its sub-gradient; weights then only come
near zero, and a threshold decides. A proximal step (the default here) reaches exact zeros, and cuts are then
exact. Physical cuts are at multiples that pay on the device: a CPU's convolutions work in blocks of 16
channels, and a width of 31 is slower than 32.
"""

import math
from dataclasses import dataclass

import torch

from effilib import surgery
from effilib.convolution import probe
from effilib.cost import channel_block
from effilib.errors import BadInput, NoEffect, choose
from effilib.hooks import Method
from effilib.methods import Info
from effilib.methods.group_lasso import Group, coefficient, group_lasso, places, shrink_, weights
from effilib.run import Run

__all__ = ["PruneTrain", "anything_dead", "kept", "live", "prune_"]

Spare = dict[str, torch.Tensor]  # a node's name -> (width,) bool

INFO = Info(
    name="PruneTrain",
    name_de="Beschneiden während des Trainings",
    chapter="6.1",
    paper="Lym et al. 2019, arXiv:1901.09290",
    claim="Pruning channels by group lasso from the first step, and reconfiguring the network every few "
    "epochs, cuts training FLOPs of ResNet-50 on ImageNet by 40 % and its training time by 39 %.",
    cost_model="The penalty adds a pass over the weights per step; a layer's FLOPs shrink with the product "
    "of its live input and output channels; a cut costs milliseconds. FLOPs become time only where "
    "the narrower layers run as efficiently.",
    applies="networks wider than they need to be",
)

THRESHOLD = 1e-4  # of the published form: a group is dead where all of its weights are smaller
# sum of the learning rate over CIFAR's 182 epochs of 390 steps
PUBLISHED_LR_STEPS = 390 * (91 * 0.1 + 45 * 0.01 + 46 * 0.001)


@torch.no_grad()
def live(node: surgery.Node, threshold: float = 0.0, rule: str = "union") -> torch.Tensor:
    """Return which channels of a node live: (width,) bool.

    By the rule "union" a channel lives if any producer writes it or any consumer reads it with a weight above
    the threshold; by "readers" if any consumer reads it. What nobody reads changes nothing, whatever is
    written.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> with torch.no_grad():
    ...     net.features[0].weight[1:] = net.features[4].weight[:, 2:] = 0  # channel 1 is read, not written
    >>> live(surgery.trace(net)["features.0"]).tolist()
    [True, True, False, False]
    """
    alive = torch.zeros(node.width, dtype=torch.bool)
    for W, axis, _ in weights(node.model, places([node], rule)):
        largest = W.movedim(axis, 0).reshape(node.width, -1).abs().amax(1)
        alive |= (largest > threshold).cpu()
    return alive


def kept(alive: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return the indices to keep: the living, filled up to a multiple.

    The first dead ones fill it up; never fewer than one multiple.

    >>> kept(torch.tensor([False, True, False, True]), multiple=3).tolist()  # the first dead one comes too
    [0, 1, 3]
    """
    n = min(len(alive), multiple * max(1, -(-int(alive.sum()) // multiple)))
    return (~alive).int().argsort(stable=True)[:n].sort().values


def stays(
    node: surgery.Node, threshold: float = 0.0, rule: str = "union", spare: Spare | None = None
) -> torch.Tensor:
    """Return which channels of a node live or are spared: (width,) bool.

    spare: a node's name -> (width,) bool.
    """
    alive = live(node, threshold, rule)
    return alive | spare[node.name] if spare and node.name in spare else alive


def dead_paths(
    structure: surgery.Structure, threshold: float = 0.0, rule: str = "union", spare: Spare | None = None
) -> list[surgery.Path]:
    """Return the residual paths that add nothing but a constant: all that their last layer reads is dead.

    Behind an earlier node that is dead, BatchNorms' shifts and biases still flow on.
    """
    found = []
    for path in structure.paths:
        last = [node for node in structure.inner(path) if path.convs[-1] in node.consumers]
        dead = last and not stays(last[0], threshold, rule, spare).any()
        if dead and surgery.can_remove(path):
            found.append(path)
    return found


def anything_dead(
    model: torch.nn.Module,
    threshold: float = 0.0,
    multiple: int = 1,
    rule: str = "union",
    spare: Spare | None = None,
) -> bool:
    """Return whether `prune_` would do anything.

    >>> anything_dead(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    False
    """
    found = surgery.trace(model)
    if dead_paths(found, threshold, rule, spare):
        return True
    return any(len(kept(stays(n, threshold, rule, spare), multiple)) < n.width for n in found.nodes)


def prune_(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    threshold: float = 0.0,
    multiple: int = 1,
    rule: str = "union",
    spare: Spare | None = None,
    cuts: dict[str, torch.Tensor] | None = None,
    x: torch.Tensor | None = None,
) -> list[str]:
    """Cut the dead channels of `model` in place.

    Residual paths that are dead as a whole are removed. Exact for exact zeros (threshold 0). spare: channels
    that are not cut, see `stays`. cuts: a dict that gets the indices kept of every node that is cut. x: (N,
    C, H, W), some images on which it is seen that the cut changes nothing in training mode, see `keeping` (in
    eval mode a BatchNorm may still remember what died); else all is undone, and `BadInput` raised. Returns
    what was done, in words; [] where nothing was dead enough.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> with torch.no_grad():
    ...     net.features[0].weight[2:] = net.features[4].weight[:, 2:] = 0
    >>> prune_(net)
    ['features.0 4 -> 2']
    """
    done = []
    with surgery.keeping("cutting dead channels", model, x, optimizer, modes=("training",)):
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


def widths(model: torch.nn.Module, rule: str = "union") -> dict[str, tuple[int, int]]:
    """Return the channels of every node, and how many live: (width, live)."""
    return {node.name: (node.width, int(live(node, rule=rule).sum())) for node in surgery.trace(model).nodes}


def lr_steps(run: Run, until: float = 1.0) -> float:
    """Return the sum of the learning rate over a share of the run's steps.

    It is how far a penalty shrinks groups, in units of lambda / (1 - mu).
    """
    schedule = run.schedule
    return sum(schedule.lr_at(step, schedule.planned) for step in range(math.ceil(until * schedule.planned)))


@dataclass(frozen=True, kw_only=True)
class PruneTrain(Method):
    """Penalise channels, and cut out the dead ones every few epochs.

    Published are the first three and `every` (10 epochs on CIFAR, 5 on ImageNet), `mode` "published" and
    `rule` "union"; the rest is for runs that are far shorter. `scale`: the penalty shrinks a group by lambda
    times the sum of the learning rate, so that a short run prunes nothing with the published lambda;
    "schedule" multiplies lambda by the published sum over that of this run's steps under the penalty.
    Raises `NoEffect` if the network has no channels that could be cut.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=2), [PruneTrain(ratio=0.3)])
    >>> history.events[0]["text"], len(history.events[-1]["widths"])
    ('lambda = ... (ratio 0.3 on the first batch, times 1)', 2)
    """

    ratio: float = 0.2  # r, the penalty's share of the loss on the first batch
    mode: str = "proximal"  # or "published": the sub-gradient through the loss, and a threshold
    rule: str = "union"  # or "readers": only their columns are penalised and decide, see `live`
    weigh: str = "equal"  # see `group_weight`; "size" is an option of the authors' code
    keep_scale: bool = False  # see `shrink_`; else what lives shrinks too, and steps grow under BatchNorm
    scale: float | str = 1.0  # factor on lambda, or "schedule"
    every: int = 1  # epochs between reconfigurations
    at: tuple[float, ...] = ()  # instead: the shares of a run's steps after which it is reconfigured
    multiple: int | str = "auto"  # cuts leave multiples of it; "auto" is 16 on a CPU, 8 on CUDA
    until: float = 1.0  # share of the steps after which the penalty ends, so that what is left recovers
    grow_batch: bool = False  # by how much smaller a step's activations became, the learning rate with it

    def __post_init__(self):
        choose("mode", self.mode, ("proximal", "published"))
        choose("rule", self.rule, ("union", "readers"))
        choose("weighing", self.weigh, ("equal", "size", "norm"))
        if not 0 <= self.ratio < 1:
            raise BadInput(f"PruneTrain: the ratio is {self.ratio}, it must lie in [0, 1)")
        if isinstance(self.scale, str):
            choose("scale", self.scale, ("schedule",))
        whole = self.multiple == "auto" or (isinstance(self.multiple, int) and self.multiple > 0)
        if not whole or self.every < 1:
            raise BadInput("PruneTrain: multiple is a whole number or 'auto', every of epochs, both above 0")
        if not all(0 < share < 1 for share in self.at):
            raise BadInput(f"PruneTrain: at is {self.at}, shares of the run's steps between 0 and 1")
        if self.at and self.grow_batch:
            raise BadInput("PruneTrain: a batch grows at an epoch's end, so grow_batch needs every, not at")

    def on_fit_start(self, run: Run) -> None:
        found = surgery.trace(run.model)
        if not found.nodes:
            why = "".join(f": {node.name}: {node.why}" for node in found.refused[:1])
            raise NoEffect(f"PruneTrain: {type(run.model).__name__} has no channels that could be cut{why}")
        start = activations(run.model, run.dataset.shape)
        run.state[self] = {"lambda": None, "widths": [], "epochs": [], "activations": start, "structure": -1}

    def _groups(self, run):
        """The groups as they are now, found anew after every change of structure."""
        state = run.state[self]
        if state["structure"] != run.structures:
            nodes = surgery.trace(run.model).nodes
            state["structure"], state["places"] = run.structures, places(nodes, self.rule)
        return weights(run.model, state["places"])

    def loss_terms(self, run: Run) -> torch.Tensor | None:
        state, groups = run.state[self], self._groups(run)
        if state["lambda"] is None:
            state["lambda"], scale = self.price(run, groups)
            why = f"ratio {self.ratio:g} on the first batch, times {scale:.3g}"
            run.log(self, f"lambda = {state['lambda']:.3g} ({why})", lam=state["lambda"])
        if self.mode == "published" and state["lambda"] and self._active(run):
            return state["lambda"] * group_lasso(groups, weigh=self.weigh)

    @torch.no_grad()
    def price(self, run: Run, groups: list[Group]) -> tuple[float, float]:
        """Return (lambda, the factor in it), from the first batch."""
        scale = self.scale
        if isinstance(scale, str):  # "schedule"
            scale = PUBLISHED_LR_STEPS / lr_steps(run, self.until)
        lam = scale * float(coefficient(self.ratio, run.loss, group_lasso(groups, weigh=self.weigh)))
        return run.ranks.agree(lam), scale

    def blocks(self, run: Run) -> int:
        """Return the multiple that cuts leave on this device."""
        return channel_block(self.multiple, run.device)

    def _active(self, run):
        return run.schedule.position < self.until * run.schedule.planned

    def on_step_end(self, run: Run) -> None:
        lam, schedule = run.state[self]["lambda"], run.schedule
        if self.mode == "proximal" and lam and self._active(run):
            kappa = run.lr * lam / (1 - run.recipe.momentum)
            shrink_(self._groups(run), kappa, self.weigh, self.keep_scale)
        now = schedule.after
        if any(schedule.position < share * schedule.planned <= now for share in self.at):
            run.level()  # in mid-epoch several processes are equal up to rounding only, and zeros decide
            self._reconfigure(run)
            self._note(run, now)

    def on_epoch_end(self, run: Run) -> None:
        if not self.at and (run.epoch + 1) % self.every == 0 and run.step < run.steps:
            self._reconfigure(run)
        self._note(run, run.schedule.position)

    def _reconfigure(self, run):
        """Cut what is dead."""
        threshold = THRESHOLD if self.mode == "published" else 0.0
        how = dict(threshold=threshold, multiple=self.blocks(run), rule=self.rule)
        if anything_dead(run.model, **how):
            done, exact = [], self.mode == "proximal"  # a threshold changes a little
            x = run.dataset.normalize(run.dataset.train.x[:16]) if exact else None
            run.restructure(lambda model, optimizer: done.extend(prune_(model, optimizer, x=x, **how)))
            run.log(self, "; ".join(done), pruned=done)
            self._enlarge(run)

    def _note(self, run, position):
        """Note the widths, off the clock: they are for the record."""
        with run.clock.paused():
            run.state[self]["widths"].append(widths(run.model, self.rule))
            run.state[self]["epochs"].append(run.recipe.epochs * position / run.schedule.planned)

    def _enlarge(self, run):
        """Let a larger batch take up the memory that the smaller network saves."""
        if self.grow_batch:
            state, now = run.state[self], activations(run.model, run.dataset.shape)
            before, most = run.batches.batch_size, len(run.dataset.train)
            size = min(int(state["activations"] / now * before) // 8 * 8, most)  # whole multiples of 8 images
            if size > before:
                run.grow_batch(size / before, size / before)
                state["activations"] = now * size / before
                text = f"batch {before} -> {size}, learning rate times {size / before:.3g}"
                run.log(self, text, batch=size)

    def on_fit_end(self, run: Run) -> None:
        state = run.state[self]
        run.log(self, "widths", widths=state["widths"], epochs=state["epochs"], lam=state["lambda"])


def activations(model: torch.nn.Module, shape: tuple[int, int, int]) -> int:
    """Return how many numbers all layers write for one image.

    Of convolutions and linear layers; shape: the image's (C, H, W). Roughly what a step keeps for backward.
    """
    total, hooks = [], []
    for m in model.modules():
        if isinstance(m, surgery.CONVS):
            hooks.append(m.register_forward_hook(lambda m, inputs, output: total.append(output[0].numel())))
    p = next(model.parameters())
    probe(model, torch.zeros(1, *shape, device=p.device, dtype=p.dtype), hooks)
    return sum(total)
