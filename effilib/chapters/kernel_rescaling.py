"""Chapter 6.3: what is trained: images that begin small, kernels that do, patches."""

from effilib import tuning
from effilib.dataset import Dataset
from effilib.experiment import Arm, Contender
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.rescaled_kernels import kernels
from effilib.tasks import Task

FULL, IMAGES, WEAK = "full size", "images only", "images, weaker regularisation"
PARTS = "images, weaker regularisation, cut-outs at the end"
BOTH, BARE = "images and kernels", "images and kernels, no factor"
SIZES = {  # of the judged run: the task's own, tuned network
    "quick": dict(images=1200, epochs=1.6),
    "study": dict(epochs=4),
}
FEW = {  # of the run on 5x5 kernels, which cost about twice as much an epoch
    "quick": dict(lengths=(1.0,), seeds=1, images=800, epochs=2),
    "study": dict(lengths=(0.5, 1.0), seeds=3, epochs=3),
}
ONCE = {  # of what is only shown: one run an arm
    "smoke": dict(lengths=(1.0,)),
    "quick": dict(lengths=(1.0,), seeds=1, images=600, epochs=2),
    "study": dict(lengths=(1.0,), seeds=1, epochs=3),
    "full": dict(lengths=(1.0,), seeds=1),
}
# preset -> what is not the method's default. Nobody has tuned it for equal accuracy yet: in single trial runs
# study's, over 1.3 times full size's epochs, ended 0.5 points above it; the default, over 1.1 times, 1.6
# below.
SETTINGS = {
    "quick": dict(recalibrate=2),  # eight batches would be as many as are trained on
    "study": dict(schedule=((0.5, 0.5), (0.35, 0.75), (0.15, 1.0))),
}
WEAKER = dict(crops=False, decay=0.3)  # EfficientNetV2's half: all regularisation at full size only
CUT = dict(cut=0.875)  # FixRes: the last phase trains on cut-outs, tested are whole images
OPTIONS = {  # of the grid: each option alone
    "no crops": dict(crops=False),
    "less weight decay": dict(decay=0.3),
    "cut-outs of 7/8 at the end": CUT,
}
SCHEDULES = (  # of the grid: (share of the steps, factor on the images' sides)
    ((0.5, 0.5), (0.5, 1.0)),
    ((0.7, 0.75), (0.3, 1.0)),
    ((0.5, 0.5), (0.35, 0.75), (0.15, 1.0)),
    ((0.4, 0.5), (0.3, 0.75), (0.3, 1.0)),
)
FIRST = 5  # size of the kernels where pixels are many: the stem's and the first stage's
PATCH = 4  # of the network whose stem cuts the image into patches


def method(task: Task, dataset: Dataset, **changes) -> KernelRescaling:
    """Return the method; sizes are multiples of 8 where images are not tiny, as CPUs compute them best."""
    multiple = 8 if min(dataset.shape[1:]) >= 24 else 1
    return KernelRescaling(multiple=multiple, **changes)


def _contender(task, **how):
    return Arm(name="", methods=(method(task, task.load(), **how),))


CONTENDERS = (
    Contender("resizing", "6.3", ("the images",), lambda task: _contender(task, kernels=False), 1),
    Contender("kernel rescaling", "6.3", ("the images",), _contender, 1),
)


def arms(task: Task) -> list[Arm]:
    """Return full size, images that begin small, and the same with weaker regularisation on small ones.

    In study and full also this with cut-outs in the last phase.
    """
    dataset, own, found = task.load(), SETTINGS.get(task.preset, {}), [Arm(name=FULL, role="baseline")]
    for name, how in {IMAGES: {}, WEAK: WEAKER, PARTS: WEAKER | CUT}.items():
        found.append(Arm(name=name, methods=(method(task, dataset, kernels=False, **own, **how),)))
    return tuning.settled(task, found if task.preset in ("study", "full") else found[:3], SWEEP.name)


def grid(task: Task) -> list[Arm]:
    """Return schedules of image sizes, and each option alone; the same number of epochs each."""
    dataset, found = task.load(), [Arm(name=FULL, role="baseline")]
    few = task.preset in ("smoke", "quick")
    for schedule in SCHEDULES[2:3] if few else SCHEDULES:
        m = method(task, dataset, kernels=False, schedule=schedule)
        sides = ", ".join(str(min(size)) for _, size, _ in m.phases(dataset.shape, 1))
        shares = ", ".join(f"{100 * row[0]:.0f}" for row in schedule)
        found.append(Arm(name=f"{sides} px ({shares} %)", methods=(m,), lengths=task.lengths))
    for name, how in OPTIONS.items():
        m = method(task, dataset, kernels=False, **SETTINGS.get(task.preset, {}), **how)
        found.append(Arm(name=name, methods=(m,), lengths=task.lengths))
    return found


def with_large_kernels(task: Task) -> Task:
    """Return the task on our ResNet with 5x5 kernels in stem and first stage; another network stays."""
    task = task.sized(FEW)
    if task.network != "resnet":
        return task
    stages = len(task.widths.get("widths", (0, 0, 0)))
    return task.but(widths=task.widths | {"kernels": (FIRST, FIRST, *[3] * (stages - 1))})


def kernel_arms(task: Task) -> list[Arm]:
    """Return images only, and kernels with them, with the factor and (not in quick) without.

    Empty where no kernel is large enough.
    """
    dataset = task.load()
    if not kernels(task.build(dataset)):
        return []
    settings = {IMAGES: dict(kernels=False), BOTH: {}, BARE: dict(amplitude=False)}
    own = task.lengths if len(task.lengths) == 1 else ()  # of one length there is no curve
    found = [Arm(name=FULL, role="baseline")]
    for name, how in settings.items():
        role = "method" if name == BOTH else "control"
        m = method(task, dataset, **SETTINGS.get(task.preset, {}), **how)
        found.append(Arm(name=name, role=role, methods=(m,), lengths=own))
    return found[:3] if task.preset == "quick" else found


def with_patches(task: Task) -> Task:
    """Return the task on our ResNet whose stem cuts 4x4 patches."""
    return task.but(network="resnet", widths={"widths": (32, 64), "blocks": (1, 1), "patch": PATCH})


def patch_arms(task: Task) -> list[Arm]:
    """Return images halved for half of the steps, patches as they are or PI-resized to half."""
    how = dict(schedule=((0.5, 0.5), (0.5, 1.0)), multiple=PATCH // 2)
    names = f"images halved, patches of {PATCH} px", f"images halved, patches PI-resized to {PATCH // 2} px"
    found = [Arm(name=FULL, role="baseline")]
    for name, k in zip(names, (False, True), strict=True):
        found.append(Arm(name=name, methods=(KernelRescaling(**how, kernels=k),), lengths=task.lengths))
    return found


SWEEP = tuning.Sweep("06_3", lambda t: t.sized(SIZES), arms)
