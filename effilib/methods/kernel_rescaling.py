"""Kernel rescaling: begin training with small images and small kernels.

Porto Buarque de Gusmao, Francini, Lepsoy & Magli 2016, arXiv:1610.03623. If an image is enlarged by s, a
kernel enlarged by s responds alike: (f_s * h_s)(x) = s^2 (f * h)(x / s). So a network is trained first on
small images with small kernels; then its kernels are enlarged, with the amplitude factor that takes s^2 back,
and it is refined at full size. We had only the abstract: kernel sizes, schedule and treatment of momentum are
choices made here. Without the kernels it is progressive resizing, the control.

Beside it PI-resize (Beyer et al. 2023, FlexiViT, arXiv:2212.08013) for patch embeddings, whose stride is
their kernel's size."""

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from effilib import models, surgery
from effilib.convolution import ApproxConv2d
from effilib.errors import BadInput, NoEffect, NotApplicable, choose
from effilib.methods import Info
from effilib.training import Method, Run

__all__ = [
    "KernelRescaling", "kernels", "matrix", "pi_resize", "recalibrate_", "rescale_", "rescale_kernel",
    "resize",
]  # fmt: skip

INFO = Info(
    name="Kernel rescaling",
    name_de="Skalierung der Filter",
    chapter="6.3",
    paper="Porto Buarque de Gusmao et al. 2016, arXiv:1610.03623",
    claim="Training that begins with smaller images and smaller kernels, rescaled for the last epochs at "
    "full size, takes nearly 20 % less time at the same test accuracy (OverFeat and ResNet; abstract).",
    cost_model="On images of s times the side a step costs s^2 of a full one, a layer whose kernels are as "
    "much smaller s^4. Added are resizing the images and a few forward passes for BatchNorm's statistics "
    "at each switch.",
)

SMALLEST = 5  # a 3x3 kernel has no smaller one that means anything: 3 to 2 taps misses the response by 40 %


# The equations


@lru_cache(maxsize=64)  # of a step's images: neither computed nor copied to the device anew
def matrix(
    n: int, m: int, dtype: torch.dtype = torch.double, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Return the map (m, n) that resizes n samples to m.

    Bilinear, pixels are squares, antialiased where m < n. Rows add up to 1.

    >>> matrix(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    old, new = (torch.arange(k, dtype=torch.double) + 0.5 for k in (n, m))
    distance = (old - new[:, None] * n / m).abs() / max(
        n / m, 1
    )  # from centre to centre, in pixels of the coarser side
    R = (1 - distance).clamp(min=0)
    return (R / R.sum(1, keepdim=True)).to(device, dtype)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize images x: (N, C, H, W) -> (N, C, h, w) with (h, w) = `size`.

    R_h x R_w^T, on their device, channels last in memory; the same as `F.interpolate(x, size,
    mode="bilinear", antialias=True)`.

    >>> resize(torch.ones(1, 3, 8, 8), (4, 6)).shape
    torch.Size([1, 3, 4, 6])
    """
    (N, C, H, W), (h, w) = x.shape, size
    if (h, w) == (H, W):
        return x
    rows = x.permute(0, 2, 3, 1).reshape(N, H, W * C)  # as it lies in memory
    rows = matrix(H, h, x.dtype, x.device) @ rows  # (N, h, W * C)
    rows = matrix(W, w, x.dtype, x.device) @ rows.view(N * h, W, C)  # (N * h, w, C)
    return rows.view(N, h, w, C).permute(0, 3, 1, 2)


def rescale_kernel(W: torch.Tensor, k: int, amplitude: bool = True) -> torch.Tensor:
    """Rescale kernels W: (O, C, n, n) -> (O, C, k, k), and their amplitude.

    W' = (n / k)^2 R W R^T, R being the map that resizes n samples to k. Then `conv(resize(x), W')` is
    `resize(conv(x, W))` for band-limited x and W, if x is resized by k / n too. amplitude: the factor (n /
    k)^2; without it the response is (k / n)^2 times as large. Linear in W, the identity for k = n.

    >>> W = rescale_kernel(torch.ones(1, 1, 3, 3), 5)
    >>> W.shape, round(W.sum().item(), 3)  # a kernel's sum stays
    (torch.Size([1, 1, 5, 5]), 9.0)
    """
    n = W.shape[-1]
    R = matrix(n, k).to(W)
    return (R @ W @ R.T) * ((n / k) ** 2 if amplitude else 1)


def pi_resize(W: torch.Tensor, k: int) -> torch.Tensor:
    """Resize patch embeddings W: (O, C, n, n) -> (O, C, k, k) by a pseudo-inverse.

    w' = pinv(B^T) w, B being the map that resizes patches from n x n to k x k. It keeps products with resized
    patches, <x, w> = <B x, w'>: exactly where k >= n, else with the least mean square error over white
    patches (FlexiViT). B is a Kronecker product R x R, and so is its pseudo-inverse: one small matrix a side
    will do.

    >>> W, patch = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)
    >>> torch.allclose((pi_resize(W, 8) * resize(patch, (8, 8))).sum(), (W * patch).sum(), rtol=1e-4)
    True
    """
    P = torch.linalg.pinv(matrix(W.shape[-1], k)).T.to(W)  # (k, n)
    return P @ W @ P.T


# Surgery


def is_patch(conv):
    """Return whether a convolution cuts patches: stride as large as the kernel, no padding.

    >>> is_patch(nn.Conv2d(3, 8, 4, stride=4)), is_patch(nn.Conv2d(3, 8, 3))
    (True, False)
    """
    k = conv.kernel_size
    return k[0] > 1 and conv.stride == k and conv.padding in ("valid", (0, 0)) and conv.dilation == (1, 1)


def kernels(model: nn.Module, smallest: int = SMALLEST) -> dict[str, int]:
    """Return the kernels that can be rescaled, name -> size.

    They are odd, square, of size >= `smallest` and stride 1; the stem may have any stride. The stem is the
    first convolution that the model holds; as a patch embedding it may have any size. Left alone are 1x1
    kernels and even ones (half a pixel would be lost), convolutions of a user's own class, frozen weights,
    and those that two layers share.

    >>> kernels(nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.Conv2d(8, 8, 3, padding=1)))
    {'0': 7}
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    stem = next(iter(convs.values()), None)
    holders = [p for m in model.modules() for p in m._parameters.values()]

    def able(m):
        k = m.kernel_size[0]
        if (
            type(m) not in (nn.Conv2d, ApproxConv2d)
            or not m.weight.requires_grad
            or m.kernel_size != (k, k)
            or sum(p is m.weight for p in holders) > 1
        ):
            return False
        return (m is stem and is_patch(m)) or (
            k % 2 == 1 and k >= max(smallest, 3) and (m is stem or m.stride == (1, 1))
        )

    return {name: m.kernel_size[0] for name, m in convs.items() if able(m)}


def scaled(conv, k, factor):
    """Return the size that a kernel of size k should have on images `factor` times as large.

    Odd and at least 3; of a patch the nearest whole number, at least 2.

    >>> scaled(nn.Conv2d(3, 8, 7), 7, 0.75), scaled(nn.Conv2d(3, 8, 8, stride=8), 8, 0.5)
    (5, 4)
    """
    return max(2, round(k * factor)) if is_patch(conv) else max(3, 2 * math.floor(k * factor / 2) + 1)


@torch.no_grad()
def rescale_(
    model: nn.Module,
    k: int | float | dict[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    smallest: int = SMALLEST,
    amplitude: bool = True,
    ema: nn.Module | None = None,
) -> dict[str, tuple[int, int]]:
    """Rescale a network's kernels, in place.

    Returns what was done: dict name -> (size before, size after). k: a size for every kernel that
    `kernels(model, smallest)` lists (int), a factor on their sizes (float), or dict name -> size. Padding
    follows, so that maps keep their relation to the image; a patch embedding is PI-resized and its stride
    follows as well. amplitude: see `rescale_kernel`. ema: a running average of the model, changed alike.

    The optimizer holds the new Parameters in the place of the old ones. Their momentum begins anew at 0: a
    gradient follows the adjoint of the map that the weights follow, g = A^T g', and to an enlarged kernel
    there are many g' for one g. Other layers keep theirs. Raises `NoEffect` if no kernel changes, `BadInput`
    for a size or name that cannot be.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3))
    >>> rescale_(net, 5), net[0].padding
    ({'0': (7, 5)}, (2, 2))
    """
    able = kernels(model, 1 if isinstance(k, dict) else smallest)
    if isinstance(k, dict):
        wanted = {choose("kernel that can be rescaled", name, list(able)): size for name, size in k.items()}
    elif k > 0:
        wanted = {
            name: k if isinstance(k, int) else scaled(model.get_submodule(name), n, k)
            for name, n in able.items()
        }
    else:
        raise BadInput(f"kernel rescaling: a size or factor of {k}, it must be above 0")
    for name, size in wanted.items():
        patch = is_patch(model.get_submodule(name))
        if not isinstance(size, int) or size < 2 or (size % 2 == 0 and not patch):
            raise BadInput(
                f"kernel rescaling: {name} cannot have size {size}: an even kernel has no centre, and 1x1 "
                f"sees no neighbour"
            )
    done = {name: (able[name], size) for name, size in wanted.items() if size != able[name]}
    if not done:
        what = (
            f"no kernel of at least {smallest} x {smallest} with stride 1"
            if not able
            else "every kernel has its size already"
        )
        raise NoEffect(f"kernel rescaling: {type(model).__name__}: {what}")
    for name, (_, size) in done.items():
        for m in surgery.copies(model, ema):
            _rescale(m.get_submodule(name), size, optimizer if m is model else None, amplitude)
    return done


def _rescale(conv, k, optimizer, amplitude):
    n, patch = conv.kernel_size[0], is_patch(conv)

    def change(t, power):
        if power is not None:  # the optimizer's state
            return t.new_zeros(*t.shape[:2], k, k)
        return pi_resize(t, k) if patch else rescale_kernel(t, k, amplitude)

    surgery.replace_(conv, "weight", change, optimizer)
    if optimizer is not None and "exp_avg" in optimizer.state.get(conv.weight, ()):
        del optimizer.state[conv.weight]  # Adam's bias correction counts steps: it begins anew too
    padding = (
        conv.padding
        if isinstance(conv.padding, str)
        else tuple(round(p * (k - 1) / (n - 1)) for p in conv.padding)
    )
    models.set_kernel_(conv, (k, k), (k, k) if patch else conv.stride, padding)


def recalibrate_(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Set BatchNorm's running statistics to the means over batches, in place.

    batches: images (N, C, H, W). Returns how many layers were set. At another resolution, or behind a
    rescaled kernel, the old statistics are of other numbers. Raises `NoEffect` if the model has none.

    >>> recalibrate_(nn.Sequential(nn.BatchNorm2d(1)), [torch.ones(2, 1, 2, 2)])
    1
    """
    found = models.reestimate_(model, batches, training=True)
    if not found:
        raise NoEffect(f"{type(model).__name__} has no BatchNorm with running statistics")
    return found


# In training


@dataclass(frozen=True, kw_only=True)
class KernelRescaling(Method):
    """Train through a schedule of image and kernel sizes that ends at full size.

    Raises `NoEffect` if nothing was ever smaller. schedule: rows (share of the steps, factor on the images'
    sides[, factor on the kernels]); shares add up to 1, the last row is full size. Without a third number
    kernels follow the images. multiple: images' sides are rounded to multiples of it. kernels: False is
    progressive resizing, the images only. amplitude, smallest: see `rescale_` and `kernels`. recalibrate:
    batches for BatchNorm's statistics after a switch, on the clock; 0: they adapt by themselves. rewarm:
    share of the steps over which the learning rate rises anew from 0 after a switch; 0: it goes on.

    The images that evaluations for the record see are always of full size, and the model is as it stands:
    what it reaches on small images counts for nothing. A step on small images is timed as a kind of its own,
    "step at 16 x 16".

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 8), blocks=(1, 1), kernels=(5, 5, 5))
    >>> method = KernelRescaling(schedule=((0.5, 0.5), (0.5, 1.0)))
    >>> history = train(net, data, Recipe(epochs=1, batch_size=32), [method])
    >>> sorted(kind for kind in history.kinds if kind.startswith("step"))
    ['step', 'step at 4 x 4']
    """

    schedule: tuple = ((0.4, 0.5), (0.3, 0.75), (0.3, 1.0))
    kernels: bool = True
    amplitude: bool = True
    smallest: int = SMALLEST
    multiple: int = 1
    recalibrate: int = 8
    rewarm: float = 0.0

    def __post_init__(self):
        rows = tuple(tuple(row) if isinstance(row, list | tuple) else (row,) for row in self.schedule)
        object.__setattr__(self, "schedule", rows)  # lists come from JSON; settings must be hashable
        if not rows or not all(
            len(r) in (2, 3) and all(isinstance(v, int | float) and v > 0 for v in r) for r in rows
        ):
            raise BadInput(
                "kernel rescaling: the schedule has rows (share of the steps, image factor[, kernel "
                "factor]), all above 0"
            )
        if abs(sum(r[0] for r in rows) - 1) > 1e-6 or set(rows[-1][1:]) != {1}:
            raise BadInput(
                "kernel rescaling: the shares of the schedule must add up to 1, and its last row must be "
                "full size, factor 1"
            )
        if self.multiple < 1 or self.recalibrate < 0 or not 0 <= self.rewarm < 1:
            raise BadInput(
                "kernel rescaling: multiple is at least 1, recalibrate at least 0, rewarm lies in [0, 1)"
            )

    def phases(self, shape: tuple[int, ...], steps: int) -> list[tuple]:
        """Return [(first step, (h, w), factor on the kernels), ...] for a run of so many steps.

        shape: of an image, (C, H, W).
        """
        found, share = [], 0.0
        for row in self.schedule:
            size = tuple(
                n if row[1] == 1 else max(1, round(row[1] * n / self.multiple)) * self.multiple
                for n in shape[1:]
            )
            factor = row[2] if len(row) == 3 else math.sqrt(math.prod(size) / math.prod(shape[1:]))
            found.append((round(share * steps), size, factor if self.kernels else 1.0))
            share += row[0]
        return found

    def sizes(self, model: nn.Module, full: dict[str, int], factor: float) -> dict[str, int]:
        """Return the kernels' sizes in a phase, name -> size; full: those on full-size images."""
        return {
            name: k if factor == 1 else scaled(model.get_submodule(name), k, factor)
            for name, k in full.items()
        }

    def on_fit_start(
        self, run: Run
    ) -> None:  # nothing changes yet: a run that is resumed gets its state only after this
        run.state[self] = {
            "phase": -1,
            "size": tuple(run.dataset.shape[1:]),
            "full": {},
            "since": 0,
            "lr": 1.0,
        }

    def on_epoch_start(self, run: Run) -> None:
        if run.state[self]["phase"] < 0:
            run.state[self]["full"] = self.check(run)
        run.step_kind = self.label(run)
        self.follow(run, run.schedule.position)

    def on_batch(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = run.state[self]
        if self.rewarm and state["phase"] > 0:
            factor = min(
                1.0,
                (run.schedule.position - state["since"] + run.schedule.pace)
                / (self.rewarm * run.schedule.planned),
            )
            run.schedule.scale, state["lr"] = run.schedule.scale * factor / state["lr"], factor
        return resize(x, state["size"]).contiguous(memory_format=run.layout), y

    def on_step_end(self, run: Run) -> None:
        self.follow(run, run.schedule.position + run.schedule.pace)

    def on_fit_end(self, run: Run) -> None:
        self.follow(run, run.schedule.planned)  # where a run ends early, by divergence

    def check(self, run: Run) -> dict[str, int]:
        """Return the sizes of all kernels that are to be rescaled.

        Raises `BadInput` or `NoEffect` where the schedule cannot be followed.
        """
        model, (C, *side) = run.model, run.dataset.shape
        full, phases = (
            kernels(model, self.smallest) if self.kernels else {},
            self.phases(run.dataset.shape, run.schedule.planned),
        )
        starts = [start for start, *_ in phases] + [run.schedule.planned]
        if any(a >= b for a, b in itertools.pairwise(starts)):
            raise NotApplicable(
                f"kernel rescaling: of {run.schedule.planned} steps a phase of the schedule gets none; train "
                f"longer or with fewer phases"
            )
        smaller = [self.sizes(model, full, factor) for *_, factor in phases]
        if self.kernels and all(sizes == full for sizes in smaller):
            least = f"{self.smallest} x {self.smallest}"
            raise NoEffect(
                f"kernel rescaling: {type(model).__name__} has no kernel of at least {least} with stride 1 "
                "that the schedule changes; kernels=False resizes the images only"
            )
        if not self.kernels and all(size == tuple(side) for _, size, _ in phases):
            raise NoEffect(
                f"kernel rescaling: every phase of the schedule has images of full size, {side[0]} x "
                f"{side[1]}"
            )
        for (_, size, _), sizes in zip(phases, smaller, strict=True):
            twin = copy.deepcopy(model).cpu()
            sizes = {name: k for name, k in sizes.items() if k != full[name]}
            if sizes:
                rescale_(twin, sizes, amplitude=self.amplitude)
            try:
                models.fits(twin, type(model).__name__, len(run.dataset.names), (C, *size))
            except BadInput as error:
                raise BadInput(
                    f"kernel rescaling: {error}. A head on a flattened map, or fixed positions, tie a "
                    f"network to {side[0]} x {side[1]}: "
                    "it needs global pooling; and a picture must not shrink to nothing on its way"
                ) from error
        return full

    def label(self, run: Run) -> str:
        """Return what a step of this phase is timed as."""
        size = tuple(run.state[self]["size"])
        return "step" if size == tuple(run.dataset.shape[1:]) else f"step at {size[0]} x {size[1]}"

    def follow(self, run: Run, position: float) -> None:
        """Bring images and kernels to the phase that the step at `position` of the schedule lies in."""
        state, phases = run.state[self], self.phases(run.dataset.shape, run.schedule.planned)
        phase = max(i for i, (start, *_) in enumerate(phases) if start <= position)
        if phase == state["phase"]:
            return
        _, size, factor = phases[phase]
        begun, done, norms = state["phase"] >= 0, {}, []
        state.update(phase=phase, size=size, since=position)
        run.step_kind = self.label(run)

        def change(model, optimizer):
            todo = {
                n: k
                for n, k in self.sizes(model, state["full"], factor).items()
                if k != model.get_submodule(n).kernel_size[0]
            }
            if todo:
                done.update(rescale_(model, todo, optimizer, amplitude=self.amplitude))
            if begun and self.recalibrate:
                norms.append(self.restate(run, model, size))

        run.kind = "reconfigure"  # what is left of this step is none
        run.restructure(change)  # also for the images alone: compiled graphs change
        text = "; ".join(f"{n} {a} -> {b}" for n, (a, b) in done.items()) or "kernels as they were"
        sizes = {n: b for n, (_, b) in done.items()}
        run.log(
            self, f"images {size[0]} x {size[1]}; {text}", size=list(size), kernels=sizes, norms=sum(norms)
        )

    def restate(self, run: Run, model: nn.Module, size: tuple[int, int]) -> int:
        """Set BatchNorm's statistics from a few training batches of the new size."""
        batches = copy.copy(run.batches)
        batches.generator = run.generator(self)  # the order of the training is not touched
        xs = (
            resize(x, size).contiguous(memory_format=run.layout)
            for x, _ in itertools.islice(batches, self.recalibrate)
        )
        with run.autocast():
            return models.reestimate_(model, xs, training=True)
