"""Chapter 7.3: what is trained: stems at half the resolution, and the wavelet-like auto-encoder."""

from collections.abc import Sequence

from effilib import networks, tuning
from effilib.dataset import Dataset
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm, Contender
from effilib.inspection import first_convolution
from effilib.methods.wavelet_auto_encoder import AutoEncoder
from effilib.methods.wavelet_bands import Precomputed
from effilib.methods.wavelet_stem import WaveletStem, wavelet_stem_
from effilib.tasks import Task

FULL, BANDS, S2D, STRIDED = "full resolution", "wavelet stem", "space-to-depth stem", "strided stem"
LOW, RAW, WIDE = "low band only", "wavelet stem, bands as they are", "wavelet stem, first stage twice as wide"
PHASE, SHARE = "wavelet stem for a start", 0.4  # of the run
PUSHED, READY = "wavelet, all maps halved", "wavelet stem, precomputed"
JOINT, STAGED = "WAE, joint", "WAE, three stages"
CONTROLS = (S2D, STRIDED, LOW)

SIZES = {  # of the judged arms
    "quick": dict(epochs=2, images=1000),
    "study": dict(seeds=3),  # five arms
}
EVERY = {  # of the run of all arms, which is shown and not judged
    "smoke": dict(lengths=(1.0,)),
    "quick": dict(lengths=(1.0,), seeds=1, images=700, epochs=2),
    "study": dict(lengths=(1.0,), seeds=1, epochs=2),
    "full": dict(lengths=(1.0,), seeds=1),
}
FEW = (BANDS, LOW, PHASE, WIDE, PUSHED, JOINT)  # of them in the preset quick
THREE_STAGES = (0.2, 0.5, 0.3)  # of the steps; the order is the paper's, the shares are ours


def _encoder(task):
    if not ours(task):
        raise BadInput("its trunks are networks of ours, whose widths are lists")
    return Arm(name="", fit=AutoEncoder())


CONTENDERS = (
    Contender(BANDS, "7.3", ("the stem",), lambda task: Arm(name="", methods=(WaveletStem(),))),
    Contender("wavelet auto-encoder", "7.3", ("the stem", "the network"), _encoder),
)


def ours(task: Task) -> bool:
    """Return whether the task's network is one of ours, whose widths the chapter can set."""
    return task.network in networks.NETWORKS


def why_not(task: Task, dataset: Dataset, kind: str = "bands", keep: bool = True) -> str:
    """Return why the task's network cannot take such a stem, in words; "" if it can."""
    try:
        wavelet_stem_(task.build(dataset), dataset, kind=kind, keep=keep)
    except (NoEffect, BadInput) as error:
        return str(error)
    return ""


def judged(task: Task, dataset: Dataset) -> list[str]:
    """Return the arms of the headline's comparison: what the preset has time for and the network can take."""
    kinds = [BANDS, S2D]
    if task.preset in ("study", "full") and not why_not(task, dataset):
        first = first_convolution(task.build(dataset), dataset.shape)[1]
        kinds[1:1] = ([PHASE] if first.stride == (1, 1) else []) + ([WIDE] if ours(task) else [])
    return kinds


def arms(task: Task, dataset: Dataset, kinds: Sequence[str] = ()) -> list[Arm]:
    """Return the full resolution and the arms of these names (none: the judged ones).

    Where no stride can be taken out, the stems halve all of the network's maps.
    """
    keep, kinds = not why_not(task, dataset), kinds or judged(task, dataset)
    made = {
        BANDS: dict(methods=(WaveletStem(keep=keep),)),
        PHASE: dict(methods=(WaveletStem(keep=keep, share=SHARE),)),
        S2D: dict(methods=(WaveletStem(kind="space-to-depth", keep=keep),)),
        STRIDED: dict(methods=(WaveletStem(kind="strided", keep=keep),)),
        LOW: dict(methods=(WaveletStem(kind="low", keep=keep),)),
        RAW: dict(methods=(WaveletStem(keep=keep, standardize=False),)),
        WIDE: dict(methods=(WaveletStem(keep=keep),), network=wider(task, dataset)),
        PUSHED: dict(methods=(WaveletStem(keep=False),)),
        READY: dict(fit=Precomputed()),
        JOINT: dict(fit=AutoEncoder()),
        STAGED: dict(fit=AutoEncoder(stages=THREE_STAGES)),
    }
    found, own = [Arm(name=FULL, role="baseline")], task.lengths if len(task.lengths) == 1 else ()
    for kind in kinds:  # of one length there is no curve: then all have as many epochs
        role = "control" if kind in CONTROLS else "method"
        found.append(Arm(name=kind, role=role, lengths=own, **made[kind]))
    return tuning.settled(task, found, SWEEP.name)


def wider(task: Task, dataset: Dataset) -> dict:
    """Return settings of our networks with twice the channels in the first stage.

    A quarter of the pixels times four are as many products.
    """
    if not ours(task):
        return {}
    first, *rest = task.build(dataset).settings()["widths"]
    return {"widths": [[2 * w for w in first] if isinstance(first, list) else 2 * first, *rest]}


def every_arm(task: Task, dataset: Dataset) -> tuple[list[Arm], list[str]]:
    """Return (arms, sentences): all that the task's network can take, and why others are left out."""
    why = why_not(task, dataset)
    kinds, left_out = [BANDS, S2D, RAW], [f"All stems halve all maps: {why}."] if why else []
    keep = not why
    for name, how in (
        (STRIDED, dict(kind="strided", keep=keep)),
        (LOW, {"keep": keep}),
        (PUSHED, {"keep": False}),
    ):
        why = why_not(task, dataset, **how)
        if why:
            left_out.append(f"Left out: {name}. {why}.")
        elif name != PUSHED or keep:
            kinds.append(name)
    if ours(task) and keep:
        kinds += [PHASE, WIDE, READY, JOINT, STAGED]
        if task.preset == "quick":
            kinds = [kind for kind in kinds if kind in FEW]
    else:
        names = f"{PHASE}, {WIDE}, {READY}, {JOINT} and {STAGED}"
        left_out.append(f"Left out: {names}, which are built for our networks, whose widths are lists.")
    return arms(task, dataset, kinds), left_out


SWEEP = tuning.Sweep("07_3", lambda t: t.sized(SIZES), lambda t: arms(t, t.load()))
