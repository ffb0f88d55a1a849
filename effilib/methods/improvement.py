"""Improve a given network in little time: diagnose and grow, and what that has to beat (chapter II.9).

All begin with the same checkpoint: the network, trained for some epochs at a held learning rate. That is
given and on nobody's clock. On the clock is all that follows: searches, diagnoses, the trainings of
candidates that lose, and what setting up all of these takes, but for one warm-up. A plan is what is done to
the network in one restructure: one of `patients.candidates`, or several, so that a stage that is narrowed
pays for one that grows. The last training begins at the learning rate that was held, which falls to 0, and
takes the same time whatever the plan is: a table of step times says for how many epochs. With T for it the
whole takes

    T_search + T            `Diagnosed`
    n T                     `AllTried`, n candidates
    about (r + 2) T / 2     `Halving`, r = log2(n) rounds

A run says what it saw and did in its first event; with `plan` it goes the same way again without a decision.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from effilib.clock import Stopwatch, elapsed
from effilib.errors import BadInput
from effilib.history import History
from effilib.hooks import Method
from effilib.methods.diagnosis import Case, Forks, examine, few
from effilib.methods.kernel_rescaling import shrunk
from effilib.methods.net2net import Net2Net, fresh
from effilib.methods.patients import KEEP, treat_, treated
from effilib.run import Run
from effilib.seeds import stream
from effilib.tasks import Task
from effilib.training import train

__all__ = ["AllTried", "Diagnosed", "Halving", "Improvement", "Oracle", "Treatment", "planned", "step_time"]

Plan = tuple[str, ...]


def planned(scores: dict[str, float], pays: bool = True) -> Plan:
    """Return the plan that a diagnosis' scores ask for.

    Its first choice, in one restructure with another. pays: a growth is joined by the narrowing of another
    stage, or the other way round, if both are above "keep".

    >>> scores = {"keep": 0.0, "widen stage 3": 0.2, "deepen stage 3": 0.1, "narrow stage 1": 0.1}
    >>> planned(scores), planned(scores, pays=False)
    (('narrow stage 1', 'widen stage 3'), ('widen stage 3',))
    """
    first = max(scores, key=scores.__getitem__)
    if first == KEEP or not pays:
        return (first,)

    def joins(candidate):
        narrow = [c.startswith("narrow") for c in (first, candidate)]
        stage = [c.rpartition(" ")[2] for c in (first, candidate)]
        return narrow[0] != narrow[1] and stage[0] != stage[1]

    others = [c for c in scores if scores[c] > scores[KEEP] and joins(c)]
    both = [first, *sorted(others, key=scores.__getitem__)[-1:]]
    return tuple(sorted(both, key=lambda c: not c.startswith("narrow")))


def step_time(times: dict[str, float], plan: Plan) -> float:
    """Return the milliseconds of a step after a plan.

    What several treatments add, or save, is added up.

    >>> times = {"keep": 10.0, "widen stage 3": 12.0, "narrow stage 1": 7.0}
    >>> step_time(times, ("narrow stage 1", "widen stage 3"))
    9.0
    """
    if unknown := [c for c in plan if c not in times]:
        raise BadInput(f"no step time for {', '.join(unknown)}; there are {', '.join(times)}")
    return times[KEEP] + sum(times[c] - times[KEEP] for c in plan)


@dataclass(frozen=True, kw_only=True)
class Treatment(Net2Net):
    """Carry out a plan before the first step.

    See `patients.treat_`; `newborn` and the rest are Net2Net's.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16, 16), blocks=(1, 1))
    >>> method = Treatment(plan=("widen stage 1", "deepen stage 2"), newborn=2.0)
    >>> train(net, data, Recipe(epochs=1), [method]).events[0]["text"]
    '9,876 -> 19,188 parameters: widen stage 1; deepen stage 2'
    """

    plan: Plan = ()
    multiple: int = 16  # of channels

    def change(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        x: torch.Tensor,
        y: torch.Tensor,
        generator: torch.Generator,
    ) -> list[str]:
        """Change the network in place; return the plan."""
        if not self.plan:
            raise BadInput("a treatment needs a plan, such as ('widen stage 1',)")
        for candidate in self.plan:
            treat_(model, candidate, x, optimizer, multiple=self.multiple, generator=generator)
        return list(self.plan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Continued(Method):
    """Go on where the training before stopped.

    With its momentum, and its learning rate of what is new. One for all trainings of a network; the first of
    them has the `Treatment`.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> method = Continued(shapes={n: p.shape for n, p in net.named_parameters()}, newborn=2.0)
    >>> for methods in ([Treatment(plan=("widen stage 1",), newborn=2.0), method], [method]):
    ...     steps = train(net, data, Recipe(epochs=1), methods).steps
    >>> sorted(method.momentum) == sorted(name for name, _ in net.named_parameters())
    True
    """

    shapes: dict  # parameter -> its shape before the treatment
    newborn: float = 1.0
    momentum: dict = field(default_factory=dict)  # parameter -> its momentum, as the last training left it

    def on_fit_start(self, run: Run) -> None:
        for name, p in run.model.named_parameters() if self.momentum else ():
            run.optimizer.state[p]["momentum_buffer"] = self.momentum[name]

    def on_after_backward(self, run: Run) -> None:
        if self.momentum and self.newborn != 1:
            named = run.model.named_parameters()
            new = [view for n, p in named for view in fresh(p.grad, self.shapes.get(n))]
            if new:
                torch._foreach_mul_(new, self.newborn)

    def on_fit_end(self, run: Run) -> None:
        named = run.model.named_parameters()
        self.momentum.update({n: run.optimizer.state[p]["momentum_buffer"] for n, p in named})


_checkpoints = {}  # key -> a given network: the last one only, which all arms of a cell share


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """Carry out a plan on a given network, and train it.

    For `Arm.fit`: (task, seed) -> `History`. The task's epochs are those of the last training of the network
    as it is. Its subclasses find a plan. Raises `BadInput` where a step time is not known.

    >>> network, times = {"widths": (16, 16), "blocks": (1, 1)}, {"keep": 1.0, "widen stage 2": 2.0}
    >>> wider = Improvement(network=network, times=times, plan=("widen stage 2",))
    >>> history = wider(task("smoke", "synthetic"), seed=0)
    >>> history.steps, history.structure["blocks"]  # of 8, as a step takes twice as long
    (4, [[16], [32]])
    """

    network: dict  # settings of our ResNet
    times: dict[str, float]  # candidate -> milliseconds of a step, "keep" among them
    plan: Plan = ()  # what is done; for a subclass (): find it
    given: float = 2.0  # epochs of the checkpoint's training, at the learning rate that is held
    newborn: float = 1.0  # on the learning rate of what is new
    multiple: int = 16  # of channels

    def __post_init__(self):
        object.__setattr__(self, "plan", tuple(self.plan))  # lists come from JSON
        step_time(self.times, self.plan)

    def __call__(self, task: Task, seed: int) -> History:
        """Train it at the task's length."""
        return self.improve(self.case(task, seed))[1]

    def case(self, task: Task, seed: int) -> Case:
        """Return the given network with all that belongs to it; the recipe is of the last training."""
        dataset, recipe = task.load(), replace(task.recipe, schedule="constant")
        begin = replace(recipe, epochs=self.given)
        order = stream(seed, "checkpoint").initial_seed()
        key = repr((replace(task, recipe=begin), seed, self.network))
        if key not in _checkpoints:
            model = task.build(dataset, seed, **self.network)
            train(model, few(dataset), begin, (), order, evaluations=1)
            _checkpoints.clear()
            _checkpoints[key] = model
        model = copy.deepcopy(_checkpoints[key])
        return Case(
            model=model, dataset=dataset, recipe=recipe, times=self.times, seed=seed, multiple=self.multiple
        )

    def improve(self, case: Case) -> tuple[nn.Module, History]:
        """Return the improved network and its history; the case's own network may be it."""
        if not self.plan:
            raise BadInput("an improvement needs a plan, such as ('keep',)")
        history = self.train(case, case.model, self.plan)
        return case.model, self.said(History(), self.plan) + history

    def train(
        self,
        case: Case,
        model: nn.Module,
        plan: Plan,
        share: float = 1.0,
        *,
        part: int | None = None,
        treat: bool = True,
        methods: tuple[Method, ...] = (),
    ) -> History:
        """Treat a network, in place, and train it.

        share: of the last training's time. part: of a training in several, at the held rate, at whose end
        nobody looks at the accuracy; None: the last. Each has its own order of images. treat: False where it
        was done. methods: others.
        """
        epochs = share * case.recipe.epochs * case.times[KEEP] / step_time(case.times, plan)
        treatment = Treatment(plan=plan, newborn=self.newborn, multiple=self.multiple)
        methods = (*([treatment] if treat and set(plan) != {KEEP} else []), *methods)
        if part is not None:
            return case.train(model, epochs, methods, order=f"part {part}")
        recipe = replace(case.recipe, epochs=epochs, warmup=0.0, schedule="linear")
        seed = stream(case.seed, "last part").initial_seed()
        return train(model, case.dataset, recipe, methods, seed, evaluations=1)

    def said(self, history: History, plan: Plan, text: str = "", **seen) -> History:
        """Return a history whose only event says the plan and why."""
        event = {"step": 0, "epoch": 0, "method": type(self).__name__, "plan": list(plan), **seen}
        return replace(history, rows=[], events=[event | {"text": f"{' + '.join(plan)}{text}"}])


def _spent(kind, seconds, raw):
    """What work between trainings costs."""
    return History(seconds=seconds, raw_seconds=raw, kinds={kind: {"count": 1, "seconds": seconds}})


def _found(case, seconds):
    """What the case's trainings cost, and all else that went by in so many seconds, as "search"."""
    trained = sum(case.spent, History())
    rest = seconds - trained.raw_seconds - case.warm_up
    return trained + _spent("search", rest, rest)


def _small(case, side):
    """The case with images of a share of their side, those that decide too."""
    size = tuple(max(1, round(side * n)) for n in case.dataset.shape[1:])
    return replace(case, dataset=shrunk(case.dataset, size, ("train", "decide")))


@dataclass(frozen=True, kw_only=True)
class Diagnosed(Improvement):
    """Search, let a diagnosis rank candidates, prune and grow at once, anneal.

    The procedure. Search and diagnosis see small images; the last training goes on from the weights of the
    search.

    >>> network, times = {"widths": (16, 16), "blocks": (1, 1)}, {"keep": 1.0, "widen stage 2": 2.0}
    >>> fit = Diagnosed(network=network, times=times, diagnosis=Forks(steps=2))
    >>> history = fit(task("smoke", "synthetic"), seed=0)
    >>> history.events[0]["text"].split(" by ")[0] in times, sorted(history.events[0]["scores"])
    (True, ['keep', 'widen stage 2'])
    """

    diagnosis: Callable[[Case], dict[str, float]] = field(default_factory=Forks)
    search: float = 0.0  # share of the last training's epochs for which it is trained on before the diagnosis
    side: float = 0.5  # of the images that both see, as a share; 1: whole ones
    pays: bool = True  # see `planned`

    def improve(self, case: Case) -> tuple[nn.Module, History]:
        """Return the improved network and its history."""
        scores = {}
        with elapsed() as seconds:
            looked = _small(case, self.side) if self.side < 1 and (self.search or not self.plan) else case
            if self.search:
                looked.train(case.model, self.search * case.recipe.epochs, order="search")
            if not self.plan:
                scores, _ = examine(looked, self.diagnosis)
            found = _found(looked, seconds())
        plan = self.plan or planned(scores, self.pays)
        text = f" by {type(self.diagnosis).__name__}"
        return case.model, self.said(found, plan, text, scores=scores) + self.train(case, case.model, plan)


@dataclass(frozen=True, kw_only=True)
class AllTried(Improvement):
    """Train every candidate to its end, and keep the best.

    The best on images that only decide. Its event holds the final accuracy of each: what is right is known
    afterwards.

    >>> network, times = {"widths": (16, 16), "blocks": (1, 1)}, {"keep": 1.0, "widen stage 2": 2.0}
    >>> history = AllTried(network=network, times=times)(task("smoke", "synthetic"), seed=0)
    >>> history.steps, sorted(history.events[0]["accuracies"])  # 8 and 4
    (12, ['keep', 'widen stage 2'])
    """

    images: int = 1000  # looked at for a decision, at most: as many as by `Forks`

    def improve(self, case: Case) -> tuple[nn.Module, History]:
        """Return the improved network and its history."""
        nets = {name: copy.deepcopy(case.model) for name in self.plan or case.times}
        runs = {name: self.train(case, net, (name,)) for name, net in nets.items()}
        best, scores = self.ranked(case, nets)
        losers = sum((h for name, h in runs.items() if name != best[0]), History())
        accuracies = {name: h.accuracy for name, h in runs.items()}
        begin = self.said(losers + case.spent[-1], (best[0],), scores=scores, accuracies=accuracies)
        return nets[best[0]], begin + runs[best[0]]

    def ranked(self, case: Case, nets: dict[str, nn.Module]) -> tuple[list[str], dict[str, float]]:
        """Return the candidates, best first, and their scores as by `Forks`; the case counts what it took."""
        watch = Stopwatch(case.dataset.device)
        watch.start()
        scores = {n: -case.loss(copy.deepcopy(net), self.images) for n, net in nets.items()}
        watch.lap("validate")
        watch.end_epoch()
        case.spent.append(_spent("validate", watch.seconds, watch.raw))
        return sorted(nets, key=scores.__getitem__, reverse=True), scores


@dataclass(frozen=True, kw_only=True)
class Halving(AllTried):
    """Train all candidates, and drop the worse half in every round.

    Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943). All candidates are trained at the held
    learning rate; from round to round those that are left have been trained for twice the time, and go on
    with their momentum. The last one goes on to its full length while the rate falls.

    >>> network, times = {"widths": (16, 16), "blocks": (1, 1)}, {"keep": 1.0, "widen stage 2": 2.0}
    >>> fit = Halving(network=network, times=times, annealed=0.5)
    >>> [len(scores) for scores in fit(task("smoke", "synthetic"), seed=0).events[0]["rounds"]]
    [2]
    """

    annealed: float = 0.5  # share of its time that is left for the last one
    side: float = 1.0  # of the images of all rounds, as a share; the last one sees whole ones

    def improve(self, case: Case) -> tuple[nn.Module, History]:
        """Return the improved network and its history."""
        rounds = math.ceil(math.log2(len(case.times)))
        left, seen, done = {name: copy.deepcopy(case.model) for name in self.plan or case.times}, [], 0.0
        shapes = {n: p.shape for n, p in case.model.named_parameters()}
        going = {name: Continued(shapes=shapes, newborn=self.newborn) for name in left}
        with elapsed() as seconds:
            looked = _small(case, self.side) if self.side < 1 else case
            for i in range(rounds):
                share = (1 - self.annealed) * 2.0 ** (i + 1 - rounds) - done
                for n, net in left.items():
                    self.train(looked, net, (n,), share, part=i, treat=i == 0, methods=(going[n],))
                if len(left) > 1:
                    names, scores = self.ranked(looked, left)
                    left, seen = {n: left[n] for n in names[: math.ceil(len(names) / 2)]}, [*seen, scores]
                done += share
            found = _found(looked, seconds())
        [(name, net)] = left.items()
        last = self.train(case, net, (name,), 1 - done, treat=rounds == 0, methods=(going[name],))
        return net, self.said(found, (name,), rounds=seen) + last


@dataclass(frozen=True, kw_only=True)
class Oracle(Improvement):
    """Train the network that a plan makes from new weights.

    Its whole training is on the clock. Which plan is right is taken as known. It has the epochs of the
    checkpoint too, in the plan's step times.

    >>> network, times = {"widths": (16, 16), "blocks": (1, 1)}, {"keep": 1.0, "widen stage 2": 2.0}
    >>> fit = Oracle(network=network, times=times, plan=("widen stage 2",), given=2.0)
    >>> fit(task("smoke", "synthetic"), seed=0).steps
    8
    """

    def __call__(self, task: Task, seed: int) -> History:
        """Train it at the task's length."""
        dataset, settings = task.load(), self.network
        for candidate in self.plan:
            settings = treated(settings, candidate, self.multiple)
        epochs = (self.given + task.recipe.epochs) * self.times[KEEP] / step_time(self.times, self.plan)
        model = task.build(dataset, seed, **settings)
        history = train(model, dataset, replace(task.recipe, epochs=epochs), (), seed, evaluations=1)
        return self.said(History(), self.plan, " from scratch") + history
