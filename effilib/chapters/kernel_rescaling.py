"""Chapter 6.3: what is trained: images and kernels that begin small, images alone, patches."""

from dataclasses import replace

import torch

from effilib.data import Dataset, Split
from effilib.experiment import Arm
from effilib.methods.kernel_rescaling import KernelRescaling, kernels, resize
from effilib.tasks import Task

FULL, IMAGES, BOTH, BARE = "full size", "images only", "images and kernels", "images and kernels, no factor"
SIZES = {
    "quick": dict(images=900, epochs=1.6),
    "study": dict(epochs=3),  # 5x5 kernels cost about twice as much an epoch
}
FEW = {  # of the second run, images alone on the tuned network
    "quick": dict(lengths=(1.0,), seeds=1, images=1100, epochs=2),
    "study": dict(lengths=(0.5, 1.0), seeds=3, epochs=4),
}
ONCE = {  # of what is only shown: one run an arm
    "smoke": dict(lengths=(1.0,)),
    "quick": dict(lengths=(1.0,), seeds=1, images=800, epochs=2),
    "study": dict(lengths=(1.0,), seeds=1, epochs=3),
    "full": dict(lengths=(1.0,), seeds=1),
}
# preset -> what is not the method's default. Nobody has tuned it for equal accuracy yet: in single trial runs
# study's, over 1.3 times full size's epochs, ended 0.5 points above it; the default, over 1.1 times, 1.6
# below.
SETTINGS = {"study": dict(schedule=((0.5, 0.5), (0.35, 0.75), (0.15, 1.0)))}
SCHEDULES = (  # of the grid: (share of the steps, factor on the images' sides)
    ((0.5, 0.5), (0.5, 1.0)),
    ((0.7, 0.75), (0.3, 1.0)),
    ((0.5, 0.5), (0.35, 0.75), (0.15, 1.0)),
    ((0.4, 0.5), (0.3, 0.75), (0.3, 1.0)),
)
FIRST = 5  # size of the kernels where pixels are many: the stem's and the first stage's
PATCH = 4  # of the network whose stem cuts the image into patches


def with_large_kernels(task: Task) -> Task:
    """Return the task on our ResNet with 5x5 kernels in stem and first stage; another network stays."""
    task = task.sized(SIZES)
    if task.network != "resnet":
        return task
    stages = len(task.widths.get("widths", (0, 0, 0)))
    return task.but(widths=task.widths | {"kernels": (FIRST, FIRST, *[3] * (stages - 1))})


def method(task: Task, dataset: Dataset, **changes) -> KernelRescaling:
    """Return the method; sizes are multiples of 8 where images are not tiny, as CPUs compute them best."""
    return KernelRescaling(multiple=8 if min(dataset.shape[1:]) >= 24 else 1, **changes)


def arms(task: Task) -> list[Arm]:
    """Return the judged arms; without a 5x5 kernel only the images are left to be resized."""
    dataset, own = task.load(), SETTINGS.get(task.preset, {})
    images, both, bare = (
        method(task, dataset, **own, **how) for how in (dict(kernels=False), {}, dict(amplitude=False))
    )
    if not kernels(task.build(dataset)):
        return [Arm(name=FULL, role="baseline"), Arm(name=IMAGES, methods=(images,))]
    found = [
        Arm(name=FULL, role="baseline"),
        Arm(name=IMAGES, role="control", methods=(images,)),
        Arm(name=BOTH, methods=(both,)),
        Arm(name=BARE, role="control", methods=(bare,)),
    ]
    return found[:3] if task.preset == "quick" else found


def tuned_arms(task: Task, dataset: Dataset) -> list[Arm]:
    """Return images only against full size: for the task's own network, whose kernels are 3x3."""
    images = method(task, dataset, kernels=False)
    own = task.lengths if len(task.lengths) == 1 else ()  # of one length there is no curve
    return [Arm(name=FULL, role="baseline"), Arm(name=IMAGES, methods=(images,), lengths=own)]


def grid(task: Task) -> list[Arm]:
    """Return schedules of image sizes, the same number of epochs each."""
    dataset, found = task.load(), [Arm(name=FULL, role="baseline")]
    for schedule in SCHEDULES[2:] if task.preset in ("smoke", "quick") else SCHEDULES:
        m = method(task, dataset, kernels=False, schedule=schedule)
        sides = ", ".join(str(min(size)) for _, size, _ in m.phases(dataset.shape, 1))
        shares = ", ".join(f"{100 * row[0]:.0f}" for row in schedule)
        found.append(Arm(name=f"{sides} px ({shares} %)", methods=(m,), lengths=task.lengths))
    return found


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


def shrunk(dataset: Dataset, size: tuple[int, int]) -> Dataset:
    """Return the data set with its images resized to (h, w)."""

    def small(split):
        parts = [resize(x.permute(0, 3, 1, 2).float(), size).round() for x in split.x.split(2000)]
        x = torch.cat(parts).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return Split(x=x, y=split.y)

    names = ("train", "decide", "validation", "test")
    return replace(dataset, **{name: small(getattr(dataset, name)) for name in names})
