"""Chapter II.9: what is trained: the procedure in its three modes, with and without resizing, and the
controls, all for the same time.

What was decided is shown by `decisions`, what came out of it by `answers`: finished runs stay in the cache
where only these two change."""

import copy
import itertools
from dataclasses import dataclass, replace

from torch import nn

from effilib import models, surgery
from effilib.chapters import kernel_rescaling, prune_train
from effilib.chapters.net2net import shared
from effilib.experiment import PILOT_SEEDS, Arm, measure
from effilib.methods.decision import GROWTH, MODES
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.prune_then_grow import GENTLE, PruneThenGrow, plan, step_flops
from effilib.training import stream, train
from effilib.tuning import swept

# All that was chosen, by preset: starting points, not findings. task: what differs from chapter II.8's;
# decisions come at epochs' ends, so that the quick preset takes fewer images and more epochs. start: the
# network that grows, blocks of a stage and the share of the baseline's channels inside of them. method: of
# `PruneThenGrow`; smoke grows wherever it can (low), so that tests see it on any machine. budget: the
# predicted cost that all arms share is time, FLOPs are what it is held by; of the baseline's FLOPs, those
# that take its time on the small network, on images resized as chapter 6.3 does, and on both, for the
# processor makes less of all that is small. Study: from an earlier run of all arms (n = 5), which with 1,
# 0.82 and 0.82 of the FLOPs took 1.10, 1.05 and 1.19 of the time. Study, trial runs with seeds that are not
# measured (n = 2). In 0.55 of 0.88 of the FLOPs: the baseline's network on resized images with 40, 50 and 60
# % of the steps at half the side 69.9, 70.6 and 70.8 %; the procedure 69.3 % with idle = 0.12, 70.5 % with
# 0.25, from the baseline's own network 69.7 %. In 0.55 of the time: the procedure 68.8 %, from half the
# channels 68.2 %, growing after every epoch 67.7 %, both 67.2 %; the small network 69.4 %, with batches of
# 128 67.2 % and at twice the learning rate 68.6 %, in 0.91 of that time. In all of the time (n = 5), to the
# letter of the thesis on the baseline's own network: 74.4 %, from the small one 74.4 % too. On images in full
# size windowed did not grow once in five runs, so its controls take small images, as the arm of the aim does.
SETTINGS = {
    "smoke": dict(
        task=dict(epochs=5, evaluations=5),
        start=dict(depth=1, share=0.5),
        method=dict(prune=replace(GENTLE, multiple=2), idle=0.1, patience=1, tau=1.0, progress=1.0, period=1, window=1, cooldown=1,
                    search=0.7, full=101.0, gap=100.0, low=1.0, high=1.0),
        budget={"resized": 0.88, "small, resized": 0.88},
    ),
    "quick": dict(
        task=dict(images=1200, epochs=16, evaluations=12),
        start=dict(depth=1, share=1.0),
        method=dict(idle=0.1, tau=0.05, progress=0.1, period=3, search=0.6),
        budget={"resized": 0.88, "small, resized": 0.88},
    ),
    "study": dict(
        task=dict(epochs=8, evaluations=9),
        start=dict(depth=1, share=1.0),
        method=dict(idle=0.25, tau=0.05, progress=0.1, period=2, search=0.5),
        budget={"small": 0.91, "resized": 0.78, "small, resized": 0.7},
    ),
    "full": dict(
        task={},
        start=dict(depth=1, share=1.0),
        method=dict(idle=0.1, patience=3, tau=0.01, period=4, search=0.7),
        budget={"resized": 0.88, "small, resized": 0.88},
    ),
}  # fmt: skip
FAST = 0.55  # the aim: the baseline's accuracy in this share of its time
MODERATE = 0.75  # where the aim is out of reach: is this enough?

DENSE, PRUNED = "dense baseline", "PruneTrain alone"
GROWN, RANDOM = "growth alone, resizing", "growth at random stages, resizing"
SCRATCH, ON = "final architecture from scratch, resizing", "same checkpoint trained on, resizing"
DENSE_RESIZED, SMALL = "dense, resizing", "smaller network, resizing"
SHORT = {
    share: f", {share:g} of the time" for share in (FAST, MODERATE)
}  # how the names of arms end that have less than all of it


def task(book):
    """The notebook's task in the size of its preset, at the recorded sweep's best setting. Where that
    differs, a pilot finds the target.
    """
    changes = dict(SETTINGS[book.preset]["task"])
    if "images" in changes:
        changes["images"] = min(changes["images"], len(book.dataset.train))
    return (
        book.task.but(**changes, **swept(book.task, changes["epochs"]), target=None) if changes else book.task
    )


def start(task):
    """Settings of the network that the procedure starts from: our ResNet with fewer blocks or channels in
    them, others as they are.
    """
    if task.network != "resnet":
        return {}
    how = SETTINGS[task.preset]["start"]
    widths = task.widths.get("widths", (16, 32, 64))
    return {"blocks": tuple((max(2, round(how["share"] * w)),) * how["depth"] for w in widths)}


def resizing(task, dataset):
    """Progressive resizing, by chapter 6.3's schedule: images of half the side, then of three quarters, then
    in full.
    """
    return kernel_rescaling.method(task, dataset, kernels=False)


def procedure(task, dataset, **changes):
    """The method as this preset runs it, with all of the baseline's time to spend."""
    given = {
        "baseline": baseline_flops(task, dataset),
        "spend": True,
        "budget": budget(task, small=bool(start(task))),
    }
    return PruneThenGrow(**{**given, **SETTINGS[task.preset]["method"], **changes})


# Cost


def steps(task, dataset):
    """Training steps an epoch."""
    return len(dataset.train) // task.recipe.batch_size


def budget(task, small=False, resized=False):
    """FLOPs, relative to the baseline's, that take its time: on a smaller network, on smaller images."""
    return SETTINGS[task.preset]["budget"].get(", ".join(["small"] * small + ["resized"] * resized), 1.0)


def baseline_flops(task, dataset):
    """FLOPs of training the baseline."""
    one = step_flops(task.build(dataset), dataset.shape, task.recipe.batch_size)
    return max(1, round(task.recipe.epochs * steps(task, dataset))) * one


def epochs_for(task, dataset, model, share=1.0, resizer=None):
    """Epochs that a network may train for at this share of the baseline's FLOPs, on images that are resized
    or not.
    """
    phases = (
        [*resizer.phases(dataset.shape, 1000), (1000, None)]
        if resizer
        else [(0, dataset.shape[1:]), (1000, None)]
    )  # of 1000 steps
    mean = 0.0
    for (first, size, *_), (last, *_) in itertools.pairwise(phases):
        mean += (last - first) / 1000 * step_flops(model, (dataset.shape[0], *size), task.recipe.batch_size)
    return share * baseline_flops(task, dataset) / (steps(task, dataset) * mean)


# Arms


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Trains what rests on the procedure's run with the same seed: (task, seed) -> `History`.

    what: "run", the procedure itself; "trained on", it again with every growth left out of its plan; "from
    scratch", the network that it ends with, from new weights and by the recipe, for the epochs that the
    budget allows. The run itself is made once a block."""

    method: PruneThenGrow
    start: tuple  # settings of the network, as items
    resizer: KernelRescaling
    what: str = "run"

    def __call__(self, task, seed):
        dataset, kept = task.load(), shared(task, seed, self)
        if self.method not in kept:
            kept[self.method] = self.train(task, dataset, seed, self.method)
        model, history = kept[self.method]
        if self.what == "run":
            return history
        if self.what == "trained on":
            without = tuple(step for step in plan(history) if step[1] not in GROWTH)
            return self.train(task, dataset, seed, replace(self.method, plan=without))[1]
        model = renewed(model, stream(seed, "initial weights").initial_seed())
        recipe = replace(
            task.recipe, epochs=epochs_for(task, dataset, model, self.method.budget, self.resizer)
        )
        return train(model, dataset, recipe, [self.resizer], seed, evaluations=task.evaluations)

    def train(self, task, dataset, seed, method):
        """(model, history) of the procedure."""
        model = task.build(dataset, seed, **dict(self.start))
        return model, train(
            model, dataset, task.recipe, [self.resizer, method], seed, evaluations=task.evaluations
        )


def renewed(model, seed):
    """The same network with new weights."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, surgery.NORMS):
            m.reset_parameters()
        elif isinstance(m, models.Constant):
            nn.init.zeros_(m.bias)
    models.initialize_(model, seed)
    return model


def mode_name(mode, resized=False):
    """The name of the arm that decides in this mode."""
    return f"prune, then grow ({mode}{', resizing' if resized else ''})"


def arms(task, dataset):
    """Every arm in the baseline's predicted time, and some in less; quick: the first three, smoke: these and
    the last ones.
    """
    found = [Arm(name=DENSE, role="baseline"), *judged(task, dataset)]
    if task.preset == "quick":
        return found
    if task.preset != "smoke":
        found += [*modes(task, dataset), *controls(task, dataset), *resized(task, dataset)]
    return [*found, *shorter(task, dataset)]


def judged(task, dataset):
    """The procedure, and PruneTrain on the baseline's network for as many more epochs as it saved time in a
    pilot run.
    """
    pruning = prune_train.method(task.preset)
    pilots = [Arm(name=DENSE, role="baseline"), Arm(name=PRUNED, role="control", methods=(pruning,))]
    pilot = measure(task, pilots, [PILOT_SEEDS[0]], title="pilot for PruneTrain's epochs")[0]["arms"]
    epochs = round(pilot[DENSE].seconds / pilot[PRUNED].seconds * task.recipe.epochs, 2)
    return [
        Arm(name=mode_name("windowed"), methods=(procedure(task, dataset),), network=start(task)),
        Arm(name=PRUNED, role="control", methods=(pruning,), changes={"epochs": epochs}),
    ]


def modes(task, dataset):
    """The other modes, and all three on resized images."""
    method, run, small = procedure(task, dataset), on_small_images(task, dataset), start(task)
    others = [mode for mode in MODES if mode != "windowed"]
    plain = [Arm(name=mode_name(m), methods=(replace(method, mode=m),), network=small) for m in others]
    cheap = [
        Arm(name=mode_name(m, True), methods=(run.resizer, replace(run.method, mode=m)), network=small)
        for m in others
    ]
    return [*plain, Arm(name=mode_name("windowed", True), fit=run), *cheap]


def on_small_images(task, dataset):
    """The procedure on resized images, on which its controls rest."""
    small = start(task)
    method = procedure(task, dataset, budget=budget(task, small=bool(small), resized=True))
    return Fit(method=method, start=tuple(small.items()), resizer=resizing(task, dataset))


def controls(task, dataset):
    """What the procedure would have to beat: growth without pruning, growth anywhere, its outcome known
    before, its run without growth.
    """
    run, rest = on_small_images(task, dataset), dict(role="control", network=start(task))
    alone = replace(run.method, prune=replace(run.method.prune, ratio=0.0), pressure=False)
    return [
        Arm(name=GROWN, methods=(run.resizer, alone), **rest),
        Arm(name=RANDOM, methods=(run.resizer, replace(run.method, where="random")), **rest),
        Arm(name=SCRATCH, role="control", fit=replace(run, what="from scratch")),
        Arm(name=ON, role="control", fit=replace(run, what="trained on")),
    ]


def resized(task, dataset):
    """Progressive resizing without the procedure, on the baseline's network and on the smaller one."""
    return [without(task, dataset, DENSE_RESIZED, {}), without(task, dataset, SMALL, start(task))]


def shorter(task, dataset):
    """On resized images in less than the baseline's time: the procedure, and beside what may be enough the
    control that it has to beat.
    """
    run, found = on_small_images(task, dataset), []
    for share, suffix in SHORT.items():
        methods = run.resizer, replace(run.method, budget=share * run.method.budget)
        found.append(Arm(name=mode_name("windowed", True) + suffix, methods=methods, network=start(task)))
    return [*found, without(task, dataset, DENSE_RESIZED, {}, MODERATE)]


def without(task, dataset, name, network, share=1.0):
    """The control that trains this network on resized images, in this share of the baseline's time."""
    resizer, most = resizing(task, dataset), budget(task, small=bool(network), resized=True)
    epochs = round(epochs_for(task, dataset, task.build(dataset, **network), share * most, resizer), 2)
    return Arm(
        name=name + SHORT.get(share, ""),
        role="control",
        methods=(resizer,),
        network=network,
        changes={"epochs": epochs},
    )


AIM = {mode_name("windowed", True) + SHORT[FAST]: 1 / FAST}  # arm -> speed-up, fixed before running


def headline(task):
    """The arm whose verdict stands for the chapter: the one that the aim is for; in the quick preset, which
    has it not, the procedure.
    """
    return mode_name("windowed") if task.preset == "quick" else next(iter(AIM))
