"""Net2Net (Chen, Goodfellow & Shlens 2016, arXiv:1511.05641): a larger network starts from a smaller one.

Net2WiderNet widens layers (`effilib.methods.widening`, and beside it `gradmax`); Net2DeeperNet adds layers
that begin as the identity. Either way the student computes at first exactly what the teacher does, so
training goes on from there: with a teacher that was there before, or, in one run, with the network's own
first part.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from effilib import surgery
from effilib.dataset import Dataset
from effilib.errors import BadInput, NoEffect, choose, within
from effilib.history import History
from effilib.hooks import Method
from effilib.methods import Info
from effilib.methods.gradmax import gradmax_
from effilib.methods.narrower import narrow
from effilib.methods.widening import BREAKERS, jitter_, widen_
from effilib.recipe import Recipe
from effilib.run import Run
from effilib.tasks import Task
from effilib.training import train

__all__ = ["Grown", "Net2Net", "OneRun", "deepen_", "fresh", "grow_"]

INFO = Info(
    name="Net2Net",
    name_de="Net2Net",
    chapter="6.2",
    paper="Chen, Goodfellow & Shlens 2016, arXiv:1511.05641",
    claim="A wider or deeper network that starts from a trained smaller one converges faster than from a "
    "random start, to the same accuracy; the smaller one's own training is not counted.",
    cost_model="Same FLOPs a step as the larger network from scratch, fewer steps to the same accuracy. The "
    "teacher's training is free only where the teacher was there anyway.",
    applies="networks of which a smaller one learns too",
)


def deepen_(
    model: nn.Module,
    where: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor,
    generator: torch.Generator | None = None,
) -> str:
    """Add a layer or block behind `where` in place (Net2Deeper); it changes nothing.

    where: a residual block (a block with zero in its last BatchNorm's scale follows), or a ReLU in a
    Sequential (an identity convolution, BatchNorm and ReLU follow). x: (N, C, H, W), images on which that is
    seen to keep the function; else it is undone and refused. Returns the new one's name.

    >>> net, x = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> deepen_(net, "stages.0.0", x=x), torch.allclose(net(x), before, atol=1e-6)
    ('stages.0.1', True)
    """
    if isinstance(dict(model.named_modules()).get(where), nn.ReLU):
        return surgery.insert_layer_(model, where, optimizer, x=x)
    return surgery.append_block_(model, where, optimizer, x=x, generator=generator)


def grow_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    x: torch.Tensor,
    y: torch.Tensor | None,
    *,
    wider: float | tuple = 1.0,
    deeper: tuple = (),
    breaker: str = "noise",
    noise: float = 0.05,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Widen nodes and add layers, in place. Returns what was done, in words.

    x, y: a batch as in training, on which the function is seen to be kept (before noise is added; random
    padding does not keep it), and whose gradient GradMax takes. Else all is undone, and `BadInput` raised.
    The settings are those of `Net2Net`.

    >>> net, x = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)), torch.rand(4, 1, 8, 8)
    >>> grow_(net, None, x, None, wider=(("stages.0.0.conv1", 12),), deeper=("stages.0.0",))
    ['stages.0.0.conv1 8 -> 12', 'stages.0.1 added']
    """
    done, found, grown = [], surgery.trace(model), []
    if isinstance(wider, tuple):
        goal = [(found[name], width) for name, width in wider]
    else:
        goal = [(node, round(wider * node.width)) for node in found.nodes]
    goal = [(node, q) for node, q in goal if q != node.width]
    kept = x if goal and breaker != "random" else None
    with surgery.undoing(model, optimizer):
        with surgery.keeping("more channels", model, kept, optimizer):
            for node, q in goal:
                n, how = node.width, breaker
                if how == "gradmax":
                    try:
                        gradmax_(node, q, x, y, optimizer)
                    except BadInput:
                        how = "pair"
                if how != "gradmax":
                    exact = "none" if how == "noise" else how
                    widen_(node, q, optimizer, breaker=exact, generator=generator)
                grown.append((node, n))
                done.append(f"{node.name} {n} -> {q}" + (f" ({how})" if how != breaker else ""))
        for node, n in grown if breaker == "noise" else ():
            jitter_(node, n, noise, generator)
        for where in deeper:
            done.append(f"{deepen_(model, where, optimizer, x=x, generator=generator)} added")
    return done


def fresh(t: torch.Tensor, before: torch.Size | None) -> list[torch.Tensor]:
    """Return views of what is new in a tensor.

    before: the shape that it had; None: all of it is new.

    >>> [view.tolist() for view in fresh(torch.tensor([[1, 2], [3, 4]]), (1, 1))]
    [[[3, 4]], [[2]]]
    """
    if before is None:
        return [t]
    views = []
    for axis, n in enumerate(before):
        if t.shape[axis] > n:
            views.append(t.narrow(axis, n, t.shape[axis] - n))
            t = t.narrow(axis, 0, n)
    return views


@dataclass(frozen=True, kw_only=True)
class Net2Net(Method):
    """Grow the network in the run. Raises `NoEffect` if nothing was to grow.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))  # a trained one, in earnest
    >>> history = train(net, data, Recipe(epochs=1), [Net2Net(wider=1.5)])
    >>> net.settings()["widths"], history.events[0]["text"]
    ([[6], [12]], '384 -> 790 parameters: features.0 4 -> 6; features.4 8 -> 12')
    """

    at: float = 0.0  # share of the run; 0: before the first step, for a teacher
    wider: float | tuple = 1.0  # factor on the width of every node, or ((node, width), ...)
    deeper: tuple = ()  # blocks, or ReLUs, behind which a new one comes
    breaker: str = "noise"  # see `widen_`; or "gradmax" where a node allows it, else "pair"
    noise: float = 0.05  # see `widen_`
    lr_factor: float = 1.0  # on the learning rate from then on (the paper advises 1/10 for a student)
    # Share of the run until which the learning rate stays at its height, then linearly to 0; 0: the recipe's
    # schedule. What is born where it has fallen learns nothing.
    hold: float = 0.0
    # On the learning rate of what is new, as long as the structure stays (variance transfer, Yuan et al.
    # 2023, arXiv:2306.12700, has one for each generation)
    newborn: float = 1.0

    def __post_init__(self):
        choose("symmetry breaker", self.breaker, (*BREAKERS, "gradmax"))
        if not 0 <= self.at < 1 or not 0 <= self.hold < 1:
            raise BadInput(
                f"Net2Net: growth at {self.at} of the run, a learning rate held until {self.hold}: both must "
                "lie in [0, 1)"
            )
        within("Net2Net: newborn", self.newborn, "above 0")

    def on_fit_start(self, run: Run) -> None:
        run.state[self] = {"grown": False, "new": [], "structure": -1}
        if self.hold:
            run.schedule.lr_at = partial(self._lr_at, run.recipe)
        if self.at == 0 and not run.resumed:
            self._grow(run)

    def on_after_backward(self, run: Run) -> None:
        state = run.state[self]
        if self.newborn != 1 and state["structure"] == run.structures:
            named = dict(run.model.named_parameters())
            views = [view for name, was in state["new"] for view in fresh(named[name].grad, was)]
            torch._foreach_mul_(views, self.newborn)

    def on_step_end(self, run: Run) -> None:
        done = run.schedule.after
        due = done >= self.at * run.schedule.planned and run.step + 1 < run.steps
        if due and not run.state[self]["grown"]:
            run.level()  # in mid-epoch several processes are equal up to rounding only
            self._grow(run)

    def on_fit_end(self, run: Run) -> None:
        if not run.state[self]["grown"]:
            raise NoEffect("Net2Net: training ended before the growth")

    def _lr_at(self, recipe, position, planned):
        flat = replace(recipe, schedule="constant").lr_at(position, planned)
        return flat * min(1.0, (planned - position) / (planned - math.floor(self.hold * planned)))

    def change(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        x: torch.Tensor,
        y: torch.Tensor,
        generator: torch.Generator,
    ) -> list[str]:
        """Change the network in place; return what was done, in words."""
        how = dict(wider=self.wider, deeper=self.deeper, breaker=self.breaker, noise=self.noise)
        return grow_(model, optimizer, x, y, **how, generator=generator)

    def _grow(self, run):
        state, model = run.state[self], run.model
        generator, before = run.generator(self), sum(p.numel() for p in model.parameters())
        x, y = next(iter(run.dataset.shuffled(run.batches.batch_size, generator)))
        shapes = {(m, k): p.shape for m in model.modules() for k, p in m._parameters.items() if p is not None}
        done = []
        run.restructure(lambda m, optimizer: done.extend(self.change(m, optimizer, x, y, generator)))
        if not done:
            raise NoEffect("Net2Net: no node was to become wider and no layer was to be added")
        state |= {"grown": True, "structure": run.structures}
        for path, m in model.named_modules():
            for k, p in m._parameters.items():
                was = shapes.get((m, k))
                if p is not None and p.requires_grad and was != p.shape:
                    state["new"].append((f"{path}.{k}".lstrip("."), was and tuple(was)))
        run.schedule.scale *= self.lr_factor
        after = sum(p.numel() for p in model.parameters())
        run.log(self, f"{before:,} -> {after:,} parameters: {'; '.join(done)}", parameters=[before, after])


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """Train a network that begins small and grows once, in one run: (task, seed) -> `History`.

    Its teacher is its own first part. The smaller network is the task's with other settings (fewer blocks),
    or with narrower layers.

    >>> t = task("smoke", "synthetic")
    >>> history = OneRun(factor=0.5, at=0.25, hold=0.5)(t, seed=0)
    >>> history.structure["widths"], history.steps == t.recipe.epochs * 4
    ([8, 8, 8], True)
    """

    small: tuple = ()  # settings of the smaller network that are not the task's, as items
    factor: float = 1.0  # its share of every width
    multiple: int = 1  # of which its widths are: 12 of 16 channels can be slower than 16
    deeper: tuple = ()  # layers or blocks that come at the growth
    at: float = 0.4  # these are settings of `Net2Net`
    hold: float = 0.6
    newborn: float = 1.0
    breaker: str = "pair"
    methods: tuple = ()  # of the whole run, beside the growth

    def __call__(self, task: Task, seed: int) -> History:
        """Train it at the task's length."""
        dataset = task.load()
        model, before = narrow(task, dataset, seed, self.factor, self.multiple, **dict(self.small))
        how = dict(at=self.at, hold=self.hold, newborn=self.newborn, breaker=self.breaker)
        method = Net2Net(wider=before or 1.0, deeper=self.deeper, **how)
        return train(model, dataset, task.recipe, [*self.methods, method], seed)


_taught = {}  # key -> what a given teacher has learnt, and its history: the last one only


@dataclass(frozen=True, kw_only=True)
class Grown:
    """Train a student that grows out of a teacher: (task, seed) -> `History`.

    The teacher is the task's network with other settings (fewer blocks), or with narrower layers. The student
    grows to full size before its first step, on its clock. The teacher was there anyway: the students of a
    cell share it (`OneRun` counts it).

    >>> Grown(factor=0.5)(task("smoke", "synthetic"), seed=0).steps  # the teacher's 8 are not counted
    4
    """

    breaker: str = "noise"  # of symmetry, see `widen_`; or "gradmax"
    factor: float = 1.0  # the teacher's share of every width
    multiple: int = 1  # of which the teacher's widths are: 12 of 16 channels can be slower than 16
    small: tuple = ()  # the teacher's settings that are not the task's, as items
    deeper: tuple = ()  # layers or blocks that the student has more
    epochs: float = 0.5  # the student's share of the recipe's epochs
    lr: float = 0.5  # and of its learning rate
    taught: float = 1.0  # the teacher's share of the epochs
    given: Recipe | None = None  # of the teacher, where it is not the student's at its length

    def __call__(self, task: Task, seed: int) -> History:
        """Train the student, and the teacher where it was not trained before."""
        dataset = task.load()
        model, before, teacher = self.teacher(task, dataset, seed)
        epochs, lr = self.epochs * task.recipe.epochs, self.lr * task.recipe.lr
        wider = before if self.factor < 1 else 1.0
        method = Net2Net(wider=wider, breaker=self.breaker, deeper=self.deeper)
        recipe = replace(task.recipe, epochs=epochs, lr=lr, warmup=0.0)
        student = train(model, dataset, recipe, [method], seed)
        event = {"step": 0, "epoch": 0, "method": "teacher", "text": f"teacher: {teacher.accuracy:.2f} %"}
        student.events.insert(0, event | {"accuracy": teacher.accuracy, "seconds": teacher.seconds})
        return student

    def teacher(
        self, task: Task, dataset: Dataset, seed: int
    ) -> tuple[nn.Module, tuple[tuple[str, int], ...], History]:
        """Return the trained teacher, its nodes' full widths, and its history."""
        recipe = self.given or task.recipe
        recipe = replace(recipe, epochs=self.taught * recipe.epochs)
        model, before = narrow(task, dataset, seed, self.factor, self.multiple, **dict(self.small))
        key = repr((replace(task, recipe=recipe), seed, self.factor, self.multiple, self.small))
        if key not in _taught:
            history = train(model, dataset, recipe, (), seed)
            _taught.clear()
            _taught[key] = copy.deepcopy(model.state_dict()), history
        weights, history = _taught[key]
        model.load_state_dict(weights)
        return model, before, history
