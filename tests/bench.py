"""Benchmarks, not tests: `make bench`, or `python -m tests.bench loop pooling ...`. Ratios of interleaved
medians.
"""

import functools
import statistics as stats
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from effilib import data, tasks, timing
from effilib.clock import elapsed, interleaved, steady_memory
from effilib.dataset import Batches
from effilib.methods import column_row_sampling
from effilib.methods.gradient_pruning import GradientPruning
from effilib.methods.muon import Muon
from effilib.own_loop import attach
from effilib.recipe import autocast, resolve_precision
from effilib.seeds import stream
from effilib.training import train


def _plain(task, dataset):
    """(model, optimizer, batches) of a hand-written loop with the settings of `train()`."""
    model, recipe = task.build(dataset).to(memory_format=torch.channels_last).train(), task.recipe
    settings = dict(lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), nesterov=True, fused=True, **settings)
    return model, optimizer, Batches(dataset, recipe.batch_size, stream(0, "data"))


def _ratio(words, before, after, aim):
    """Print the median ratio of two functions' seconds a step, in pairs."""
    steady_memory()
    before(), after()
    pairs = [(before(), after()) if i % 2 else (after(), before())[::-1] for i in range(12)]
    ratio = stats.median(b / a for a, b in pairs)
    a, b = (f"{1e3 * stats.median(v):.2f} ms" for v in zip(*pairs, strict=True))
    print(f"{words.format(a, b)} a step, median ratio {ratio:.3f} (aim <= {aim}, n={len(pairs)} pairs)")


def loop():
    """`train()` against a minimal hand-written loop with the same settings: aim at most 1.03x a step."""
    task = tasks.task("quick", "mnist5k", epochs=1)
    dataset = task.load()
    recipe = task.recipe
    quiet = replace(dataset, validation=dataset.validation[:1], test=dataset.test[:1])
    precision = resolve_precision(recipe.precision)

    def minimal():
        model, optimizer, batches = _plain(task, dataset)
        times, it = [], iter(batches)
        for step in range(len(batches)):
            with elapsed() as seconds:
                x, y = next(it)
                optimizer.param_groups[0]["lr"] = recipe.lr_at(step, len(batches))
                with autocast(precision, "cpu"):
                    logits = model(x)
                F.cross_entropy(logits.float(), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                times.append(seconds())
        return stats.median(times)

    def ours():
        return train(task.build(dataset), quiet, recipe, evaluations=1).step_seconds

    _ratio("loop: minimal loop {}, train() {}", minimal, ours, 1.03)


def own_loop():
    """Methods attached to a hand-written loop against the same in `train()`: aim at most 1.05x a step."""
    task = tasks.task("quick", "mnist5k", epochs=1)
    dataset, recipe, methods = task.load(), task.recipe, [GradientPruning(), Muon()]
    quiet = replace(dataset, validation=dataset.validation[:1], test=dataset.test[:1])

    def attached():
        model, optimizer, batches = _plain(task, dataset)
        how = dict(recipe=recipe, precision=resolve_precision(recipe.precision))
        run = attach(model, optimizer, methods, steps=len(batches), loader=batches, **how)
        for x, y in run.read():
            with run.autocast():
                logits = run.model(x)
            run.add_terms(F.cross_entropy(logits.float(), y), logits).backward()
            run.update()
        return run.clock.seconds / run.step

    def ours():
        return train(task.build(dataset), quiet, recipe, methods, evaluations=1).step_seconds

    _ratio("own_loop: train() {}, attached {}", ours, attached, 1.05)


class _Images(torch.utils.data.Dataset):
    def __init__(self, x, y, transform):
        self.x, self.y, self.transform = x, y, transform

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.transform(self.x[i]), self.y[i]


def batches(images=20_000, batch_size=128):
    """`Batches` against torchvision transforms and a `DataLoader` with 2 workers, crop and flip at 32 x 32 x
    3: aim 10x.
    """
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, images)
    dataset = replace(data._split("bench", [x, y, x[:100], y[:100]], tuple("0123456789"), pad=4, flip=True))
    ours = Batches(dataset, batch_size, stream(0, "data"))
    crop = [v2.ToImage(), v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    transform = v2.Compose(
        [*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
    )
    theirs = torch.utils.data.DataLoader(
        _Images(x, y, transform),
        batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
    )
    times = interleaved(
        {"ours": lambda: [0 for _ in ours], "theirs": lambda: [0 for _ in theirs]}, repeats=5, warm_up=1
    )
    rate = {
        "ours": len(ours) * batch_size / stats.median(times["ours"]),
        "theirs": len(theirs) * batch_size / stats.median(times["theirs"]),
    }
    ratio = rate["ours"] / rate["theirs"]
    print(
        f"batches: ours {rate['ours']:,.0f}, torchvision + DataLoader {rate['theirs']:,.0f} images/s, ratio "
        f"{ratio:.1f} (aim >= 10)"
    )


def imports():
    """`import effilib`, and all that a notebook's first cell imports, beyond torch's own import: aim 0.3
    s.
    """

    def seconds(code):
        with elapsed() as t:
            subprocess.run([sys.executable, "-c", code], check=True)
        return t()

    what = {
        "nothing": "pass",
        "torch": "import torch",
        "effilib": "import torch, effilib",
        "train": "import torch; from effilib import train",
    }
    times = {k: [] for k in what}
    for _ in range(7):
        for k, code in what.items():
            times[k].append(seconds(code))
    beyond = {k: stats.median(times[k]) - stats.median(times["torch"]) for k in ("effilib", "train")}
    print(
        "import: "
        + ", ".join(f"{k} {v:+.2f} s beyond torch" for k, v in beyond.items())
        + " (aim for effilib <= 0.3 s)"
    )


def series():
    """`effilib run 02 03_1 03_2 --preset quick` from nothing: aim 4 minutes on 2 cores."""
    import os

    with tempfile.TemporaryDirectory() as results, elapsed() as seconds:
        command = [sys.executable, "-m", "effilib", "run", "02", "03_1", "03_2", "--preset", "quick"]
        done = subprocess.run(
            command, env={**os.environ, "EFFILIB_RESULTS": results}, capture_output=True, text=True
        )
        print(f"series: {seconds():.0f} s, exit code {done.returncode} (aim <= 240 s)\n{done.stdout}")


def pooling():
    """Forward and backward of stochastic pooling against `max_pool2d`, 2 x 2: aim at most 3.5x; S3Pool beside
    it.
    """
    from effilib.methods.s3_pooling import S3Pool2d
    from effilib.methods.stochastic_pooling import StochasticPool2d

    def both(layer, x, dy):
        x.grad = None
        layer(x).backward(dy)

    steady_memory()
    g = torch.Generator().manual_seed(0)
    layers = {"max": torch.nn.MaxPool2d(2), "stochastic": StochasticPool2d(2, generator=g)}
    layers["S3Pool"] = S3Pool2d(2, grid=4, generator=g)
    for shape in ((64, 32, 28, 28), (128, 64, 32, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = (
                    torch.rand(*shape, generator=g)
                    .to(dtype)
                    .contiguous(memory_format=layout)
                    .requires_grad_()
                )
                dy = torch.ones_like(layers["max"](x))
                calls = {k: functools.partial(both, layer, x, dy) for k, layer in layers.items()}
                times = interleaved(calls, repeats=40, seconds=6)
                # the least: another process stalls one of two threads for 8 ms
                ms = {k: 1e3 * min(t) for k, t in times.items()}
                what = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {str(layout)[6:]}"
                ratios = [f"{k} {ms[k]:.2f} ms = {ms[k] / ms['max']:.2f}x" for k in ("stochastic", "S3Pool")]
                print(f"pooling {what}: max {ms['max']:.2f} ms, {', '.join(ratios)}")
    print("pooling: aim for stochastic <= 3.5x")


def _wide(size=16):
    """A task and synthetic images (N, 3, size, size) for a network whose convolutions have 128 to 256
    channels.
    """
    task = tasks.task(
        "study", "synthetic", batch_size=64, network="vgg", widths={"widths": ((128, 128), (256, 256))}
    )
    return task, data.synthetic(size=size, channels=3)


def sampling():
    """A step with half of the channels against the exact one, convolutions of 128 to 256 channels: aim at
    most 0.70x.
    """
    task, dataset = _wide()
    halves = {
        "columns": functools.partial(column_row_sampling.sample_columns_, ratio=0.5),
        "channels": functools.partial(column_row_sampling.sample_channels_, ratio=0.5),
    }
    for p in timing.formats():
        variants = [timing.Variant("exact", precision=p)]
        variants += [timing.Variant(n, precision=p, convert=half) for n, half in halves.items()]
        ms = timing.step_times(task, dataset, variants, repeats=41, seconds=30)["ms"]
        aim = f"aim <= 0.70 in {timing.formats()[0]}"
        for name in halves:
            share = ms[name] / ms["exact"]
            print(f"{name}, {p}: {ms[name]:.1f} of {ms['exact']:.1f} ms a step, {share:.2f}x ({aim})")


def subsets():
    """The backward pass with half of the slices against the exact one, the same network: aim at least
    1.3x.
    """
    from effilib.chapters import gradient_pruning

    task, dataset = _wide()
    methods = {"exact": (), **{n: (m,) for n, m in gradient_pruning.subsets(0.5).items()}}
    for p in timing.formats():
        variants = [timing.Variant(n, precision=p, methods=m) for n, m in methods.items()]
        ms = timing.pass_times(task, dataset, variants, repeats=41, seconds=30)["backward ms"]
        for name, t in ms.items():
            print(
                f"subsets, {p}, {name}: backward {t:.1f} ms, {ms['exact'] / t:.2f}x (aim >= 1.3 where dX and "
                "dW are subsets)"
            )


def standardization():
    """Time a step with the standardization loss against BatchNorm's: aim at most 1.15x."""
    from effilib.chapters.standardization_loss import BN, GN, NONE, SL, methods

    task, dataset = tasks.task("study", "synthetic", "vgg"), data.synthetic(size=32, channels=3)
    for p in timing.formats():
        variants = [timing.Variant(k, precision=p, methods=methods(k)) for k in (NONE, BN, SL, GN)]
        ms = timing.step_times(task, dataset, variants, repeats=41, seconds=40)["ms"]
        listed = ", ".join(f"{k} {v:.1f} ms = {v / ms[NONE]:.2f}x of none" for k, v in ms.items())
        print(f"standardization, {p}: {ms[SL] / ms[BN]:.2f}x of BatchNorm's step (aim <= 1.15); {listed}")


def stems():
    """Time a step behind half-resolution stems against full resolution: aim at least 1.3x."""
    from effilib.chapters import wavelet

    task, dataset = tasks.task("study", "synthetic", batch_size=64), data.synthetic(size=32, channels=3)
    variants = [timing.Variant(a.name, methods=a.methods) for a in wavelet.arms(task, dataset)]
    times = timing.step_times(task, dataset, variants)
    print(times.to_string(), "\nstems: aim for the wavelet stem >= 1.3x")


if __name__ == "__main__":
    known = {"loop": loop, "own_loop": own_loop, "batches": batches, "import": imports, "series": series}
    known |= {
        "pooling": pooling,
        "sampling": sampling,
        "subsets": subsets,
        "standardization": standardization,
        "stems": stems,
    }
    for name in sys.argv[1:] or known:
        if name not in known:
            sys.exit(f"unknown benchmark {name!r}: choose one of {', '.join(known)}")
        known[name]()
