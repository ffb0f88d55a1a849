"""Chapter 11: what is trained: the published recipe, ours, and the workbook's ResNet with its tricks."""

from dataclasses import replace

from effilib.experiment import Arm
from effilib.hooks import Method
from effilib.methods.data_pruning import DataPruning
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.muon import Muon
from effilib.methods.speed_run import FastBiases, Lookahead, PartialIdentity, published
from effilib.methods.whitening import Whitening
from effilib.tasks import Task, task

NETWORK = "speed_run"
PEER, OURS = "published", "ours"
CLASSIC, TRICKS = "ResNet", "ResNet, with the tricks"
SMALL = {"widths": (8, 16, 16), "stem": 8}
SIZES = {  # epochs are the published recipe's
    "smoke": dict(epochs=2, batch_size=32, widths=SMALL),
    "quick": dict(epochs=3, batch_size=64, images=1000, widths={"widths": (16, 32, 32)}, lengths=(0.5, 1.0)),
    "study": dict(epochs=9.9, batch_size=1024, widths={}, lengths=(0.6, 1.0), whole=True),
    "full": dict(epochs=9.9, batch_size=1024, widths={}, lengths=(0.6, 0.8, 1.0), whole=True),
}
ABLATION = {
    "smoke": dict(lengths=(1.0,)),
    "quick": dict(lengths=(0.5,), seeds=1, images=640),
    "study": dict(lengths=(0.25, 0.5), seeds=3, whole=False),  # 24 arms: most of a day
    "full": dict(lengths=(0.5, 1.0), seeds=3, whole=False),
}
STEM = Whitening(learns=0.3)  # the bias learns for the first three of ten epochs
TRICK = {  # each of them can be left out
    "whitening stem": STEM,
    "partial identity": PartialIdentity(),
    "fast biases": FastBiases(),
    "lookahead": Lookahead(),
}
# Recipe fields that are tricks too, at what the other chapters have.
WITHOUT = {
    "alternating flips": dict(flips="random"),
    "multi-crop evaluation": dict(multi_crop=0.0),
    "label smoothing": dict(label_smoothing=0.0),
}
# Half of the images' side, three quarters, all of it: a step costs about a quarter, half, all.
RESIZING = KernelRescaling(kernels=False, schedule=((0.3, 0.5), (0.35, 0.75), (0.35, 1.0)))
OWN = {"resizing": RESIZING, "Muon": Muon()}  # what ours has beyond the published tricks
# Candidates for ours. On a CPU 32 filters cost what 24 do, and SiLU takes a tenth off a step; what they do
# to the accuracy is open (results/LOG.md).
NETWORKS = {"stem of 32": {"stem": 32}, "SiLU": {"activation": "silu"}}
BATCH = {"smoke": 32, "quick": 64, "study": 512, "full": 1024}  # of ours: on a CPU an image costs the same


def with_recipe(task: Task) -> Task:
    """Return the task with the published recipe, but for what the user asked for."""
    task = task.on(NETWORK if task.network == "resnet" else task.network).sized(SIZES)
    return _published(task, task.recipe.batch_size)


def _published(task, batch_size):
    recipe = {k: v for k, v in vars(published(batch_size)).items() if k not in ("epochs", *task.given)}
    return task.but(**recipe, tuned={})


def tricks(*without: str) -> tuple[Method, ...]:
    """Return the published recipe's methods, but for those named."""
    return tuple(m for name, m in TRICK.items() if name not in without)


def arms(task: Task) -> list[Arm]:
    """Return the published recipe and ours."""
    batch = BATCH[task.preset] if "batch_size" not in task.given else task.recipe.batch_size
    changes = {k: getattr(published(batch), k) for k in ("batch_size", "lr") if k not in task.given}
    selective = {"multi_crop": 0.25}
    ours = (OWN["resizing"], *tricks("lookahead"), OWN["Muon"])
    return [
        Arm(name=PEER, role="baseline", methods=tricks()),
        Arm(name=OURS, methods=ours, changes=changes | selective),
    ]


def recipe(device: str = "auto") -> tuple[Task, tuple[Method, ...]]:
    """Return our recipe on CIFAR-10 as it is measured: for `effilib train --preset speed_run`."""
    chosen = with_recipe(task("study", "cifar10", device=device))
    return arms(chosen)[1].task(chosen), arms(chosen)[1].methods


def classic(task: Task) -> list[Arm]:
    """Return the other chapters' ResNet at its tuned recipe, and with the tricks that it can take.

    task: the preset's own.
    """
    recipe = {"label_smoothing": 0.2, "flips": "alternating", "multi_crop": 1.0, "pad": 2}
    return [
        Arm(name=CLASSIC, role="baseline"),
        Arm(name=TRICKS, methods=(RESIZING, *tricks()), changes=recipe, network={"stem": 32}),
    ]


def ablation(task: Task) -> list[Arm]:
    """Return the published recipe with tricks left out, each alone, ours without its own, and candidates.

    quick: each method left out, and none. All have the same epochs.
    """
    every, ours = arms(task)
    plain = dict(k for w in WITHOUT.values() for k in w.items())
    judged = replace(every, role="method")
    found = [replace(judged, name=f"without {n}", methods=tricks(n)) for n in TRICK]
    if task.preset != "quick":
        found += [replace(judged, name=f"without {n}", changes=c) for n, c in WITHOUT.items()]
        found += [Arm(name=f"only {n}", methods=(m,), changes=plain) for n, m in (TRICK | OWN).items()]
        for n, c in WITHOUT.items():
            found.append(Arm(name=f"only {n}", changes={k: v for k, v in plain.items() if k not in c}))
        for n, own in OWN.items():
            rest = tuple(m for m in ours.methods if m is not own)
            found.append(replace(ours, name=f"{OURS} without {n}", methods=rest))
        found += [ours, *candidates(task)]
    none = Arm(name="none of them", role="control", changes=plain)
    return [every, *(replace(a, lengths=task.lengths) for a in [*found, none])]


def candidates(task: Task) -> list[Arm]:
    """Return ours with what might improve it and has not been measured; a user's network is as it is."""
    ours = arms(task)[1]
    found = []
    if task.network == NETWORK:
        found += [replace(ours, name=f"{OURS}, {n}", network=how) for n, how in NETWORKS.items()]
    if min(task.lengths) * task.recipe.epochs > 1:  # in its first epoch data pruning learns whom to leave out
        found.append(replace(ours, name=f"{OURS}, data pruning", methods=(*ours.methods, DataPruning())))
    return found
