"""Chapter 3.4: what is trained, and what sampled products cost and get wrong."""

from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import figures
from effilib.convolution import approx_conv2d
from effilib.experiment import Arm
from effilib.methods.column_row_sampling import (
    ColumnRowSampling,
    choose_terms,
    forward_sampling,
    inclusion,
    norms,
    sample_columns_,
    squared_error,
)
from effilib.models import stream
from effilib.tasks import Task
from effilib.timing import Variant, formats, layer_times, layers_of, pass_times, say_conv

VARIANTS = {
    "top-k": dict(scheme="topk"),
    "norm, no replacement, unscaled": dict(scheme="norm"),
    "norm, no replacement, scaled": dict(scheme="norm", scaled=True),
    "norm, replacement, scaled": dict(scheme="norm", replacement=True, scaled=True),
    "Bernoulli, scaled": dict(scheme="bernoulli", scaled=True),
    "uniform, no replacement, unscaled": dict(scheme="uniform"),
    "uniform, replacement, scaled": dict(scheme="uniform", replacement=True, scaled=True),
}
RATIOS = (0.75, 0.5, 0.3)
HALF = "top-k, 50% of the channels"
# A plain network of wide convolutions on small maps, which bound a step: 128 to 256 channels in the study.
# Its step takes several times as long as that of the task's own network, so the runs are short.
WIDE = {
    "smoke": ((16,), (32,)),
    "quick": ((32,), (64,), (128,)),
    "study": ((32,), (128, 128), (256, 256)),
    "full": ((128, 128), (256, 256), (256, 256)),
}
SIZES = {p: dict(network="vgg", widths={"widths": w}, tuned={}) for p, w in WIDE.items()}
SIZES["quick"] |= dict(epochs=1)
SIZES["study"] |= dict(epochs=2)
GRID = {p: dict(size) for p, size in SIZES.items()}
GRID["quick"] |= dict(epochs=0.4)
GRID["study"] |= dict(epochs=1)


def by_hand():
    """A product of three terms, two of which are computed: the terms, their norms, and what each choice
    gives.
    """
    A, B = (
        torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]),
        torch.tensor([[4.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
    )
    w, terms = norms(A, 1) * norms(B, 0), A.T[:, :, None] * B[:, None, :]
    index, _ = choose_terms(w, 2, "topk")

    def say(matrix):
        return str([[f"{v:g}" for v in row] for row in matrix.tolist()]).replace("'", "")

    rows = {f"term {i + 1}": (say(t), f"{w[i]:.3f}") for i, t in enumerate(terms)}
    rows |= {
        "A B": (say(A @ B), ""),
        "the two largest": (say(terms[index].sum(0)), ""),
        "left out": (say(A @ B - terms[index].sum(0)), ""),
    }
    return pd.DataFrame(rows, index=["matrix", "|A^(i)| |B_(i)|"]).T


def error_curves(preset, n=100):
    """Relative error |AB - estimate| / (|A| |B|) of n x n products over k.

    dict mean -> (ks, dict variant -> errors). Entries are N(1, 1) and N(0, 1); averages over runs (the paper:
    1,000), a few matrices, new draws.
    """
    runs = {"smoke": 2, "quick": 20}.get(preset, 1000)
    ks = [5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100] if preset != "smoke" else [10, 50, 100]
    g, curves = stream(0, "error curves"), {}
    for mean in (1.0, 0.0):
        errors = {v: torch.zeros(len(ks)) for v in VARIANTS}
        for run in range(runs):
            if run % 20 == 0:  # new matrices
                A, B = (torch.randn(n, n, generator=g) + mean for _ in range(2))
                w, exact, size = norms(A, 1) * norms(B, 0), A @ B, A.norm() * B.norm()
            for name, how in VARIANTS.items():
                for i, k in enumerate(ks):
                    index, scale = choose_terms(w, k, generator=g, **how)
                    part = A[:, index] if scale is None else A[:, index] * scale
                    errors[name][i] += ((exact - part @ B[index]).norm() / size).item() / runs
        curves[f"N({mean:g}, 1)"] = ks, errors
    return curves


def error_figure(curves):
    """(figure, caption) of `error_curves`."""
    figure, panels = figures.new(len(curves), width=9.0, height=4.6)
    for axes, (title, (ks, errors)) in zip(panels, curves.items(), strict=True):
        for i, (name, e) in enumerate(errors.items()):
            axes.plot(
                ks, e, "o-", ms=3.5, lw=1.5, color=figures.COLOURS[i % len(figures.COLOURS)], label=name
            )
        axes.set_title(f"entries {title}")
        axes.set_xlabel("k, terms computed of 100")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("|AB - estimate| / (|A| |B|)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure, (
        "The error of a sampled product over the number of terms. Where the entries have a mean, leaving "
        "terms out without scaling costs that mean; where they have none, scaling blows up what was drawn."
    )


def check_estimates(draws=2000):
    """Bias and mean squared error of the scaled estimates against the formulas, on a convolution; and top-k's
    error against its bound.
    """
    g = stream(0, "numerics")
    x, w = (
        torch.randn(4, 16, 8, 8, generator=g, dtype=torch.float64).relu(),
        torch.randn(8, 16, 3, 3, generator=g, dtype=torch.float64),
    )
    x *= torch.logspace(-1, 0.5, 16, dtype=torch.float64)[:, None, None]  # channels that differ
    terms = torch.stack([F.conv2d(x[:, c : c + 1], w[:, c : c + 1]) for c in range(16)])  # (C, N, O, H', W')
    exact, score, k, rows = terms.sum(0), (norms(x, 1) * norms(w, 1)).double(), 6, {}
    formula = {
        "uniform, replacement, scaled": squared_error(
            terms, k, "replacement", p=torch.full((16,), 1 / 16, dtype=torch.float64)
        ),
        "norm, replacement, scaled": squared_error(terms, k, "replacement", p=score / score.sum()),
        "Bernoulli, scaled": squared_error(terms, k, "bernoulli", p=inclusion(score, k)),
    }
    for name, expected in formula.items():
        mean, squared = torch.zeros_like(exact), []
        for _ in range(draws):
            index, scale = choose_terms(score, k, generator=g, **VARIANTS[name])
            estimate = torch.einsum("c,cnohw->nohw", scale, terms[index])
            mean += estimate / draws
            squared.append((estimate - exact).square().sum())
        error = (expected / draws).sqrt() / exact.norm()
        measured = torch.stack(squared).mean()
        rows[name] = {
            "|mean - exact| / |exact|": f"{(mean - exact).norm() / exact.norm():.4f}",
            "of an unbiased one, root mean square": f"{error:.4f}",
            "mean squared error": f"{measured:.1f}",
            "by formula": f"{expected:.1f}",
        }
    index = score.topk(k).indices
    rest = torch.ones(16, dtype=torch.bool).index_fill_(0, index, False)
    rows["top-k"] = {
        "|mean - exact| / |exact|": f"{(terms[rest].sum(0)).norm() / exact.norm():.4f}",
        "of an unbiased one, root mean square": "biased",
        "mean squared error": f"{terms[rest].sum(0).square().sum():.1f}",
        "by formula": f"at most {(3 * score[rest].sum()) ** 2:.1f}",
    }
    return pd.DataFrame(rows).T


def check_products():
    """The fast path (gather, smaller product, scatter) against a slow one (a mask on the input): largest
    differences, in float64.
    """
    g = stream(0, "numerics")
    x = torch.randn(4, 16, 8, 8, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(8, 16, 3, 3, generator=g, dtype=torch.float64).requires_grad_()
    fast = approx_conv2d(x, w, padding=1, approximation=forward_sampling(0.5, 1, scheme="topk"))
    index = (norms(x.detach(), 1) * norms(w.detach(), 1)).topk(8).indices
    mask = torch.zeros(16, dtype=x.dtype).index_fill_(0, index, 1.0)[:, None, None]
    slow, exact = F.conv2d(x * mask, w, padding=1), F.conv2d(x, w, padding=1)
    dy = torch.randn(fast.shape, generator=g, dtype=x.dtype)
    three = [(y, *torch.autograd.grad(y, (x, w), dy)) for y in (fast, slow, exact)]
    rows = {}
    for i, name in enumerate(("y", "dX", "dW")):
        a, b, c = (t[i].detach() for t in three)
        rows[name] = {
            "fast against slow": f"{(a - b).abs().max():.1e}",
            "against the exact product": f"{((a - c).norm() / c.norm()):.2f}",
        }
    every = approx_conv2d(x, w, padding=1, approximation=forward_sampling(1.0, 1, scheme="topk"))
    rows["y with all channels"] = {
        "fast against slow": "",
        "against the exact product": "bit-equal" if torch.equal(every, exact) else "DIFFERS",
    }
    return pd.DataFrame(rows).T.rename_axis("largest, relative difference")


def layer_table(task, dataset):
    """What sampling half of the channels saves layer by layer, in every format; FLOPs predict 2x."""
    convs = {}
    for c in layers_of(task, dataset).values():
        convs.setdefault(say_conv(c), c)
    half, rows = {"half": forward_sampling(0.5, 1, scheme="topk")}, {}
    few = {"smoke": dict(repeats=2, seconds=1), "quick": dict(repeats=5, seconds=0.5)}.get(task.preset, {})
    for precision in formats(task.device):
        times = layer_times(convs, half, precision=precision, device=task.device, **few).sum(axis=1)
        for name in convs:
            exact, sampled = (times[name, v] for v in ("exact", "half"))
            rows.setdefault(name, {}).update(
                {
                    f"{precision}, exact ms": exact,
                    f"{precision}, half ms": sampled,
                    f"{precision}, x": exact / sampled,
                }
            )
    return pd.DataFrame(rows).T.rename_axis("layer")


def step_table(task, dataset):
    """Passes and whole training step at each ratio, in every format; x is against the exact step."""
    variants = [
        Variant(
            f"{p}, {r:.0%}",
            precision=p,
            convert=partial(sample_columns_, ratio=r, minimal=4) if r < 1 else None,
        )
        for p in formats(task.device)
        for r in (1, *RATIOS)
    ]
    table = pass_times(task, dataset, variants, repeats=5 if task.preset == "quick" else 15)
    exact = [table.loc[f"{name.split(',')[0]}, 100%", "step ms"] for name in table.index]
    return table.assign(x=exact / table["step ms"])


def step_figure(table):
    """(figure, caption): a step's time over the ratio, measured and as FLOPs predict it."""
    ratios, kinds = [1, *RATIOS], list(dict.fromkeys(n.split(",")[0] for n in table.index))
    measured = pd.DataFrame(
        {p: [table.loc[f"{p}, {r:.0%}", "step ms"] for r in ratios] for p in kinds}, index=ratios
    )
    predicted = pd.DataFrame({p: [r * measured[p].iloc[0] for r in ratios] for p in kinds}, index=ratios)
    figure = figures.lines(
        measured,
        predicted=predicted,
        xlabel="share of the channels that is computed",
        ylabel="ms a training step",
    )
    return figure, (
        "A step over the share of the channels; dashed: if all of it shrank with the share. BatchNorm, ReLU, "
        "the stem, scoring and gathering do not."
    )


def narrower(task: Task, share: float = 0.72) -> list[Arm]:
    """Return the control: `share` of the channels, in multiples of 16: about half of the products."""
    if task.network != "vgg" or "widths" not in task.widths:
        return []
    widths = tuple(
        tuple(max(8, round(c * share / 16) * 16) for c in stage) for stage in task.widths["widths"]
    )
    return [Arm(name="narrower network, exact", role="control", network={"widths": widths})]


def arms(task: Task) -> list[Arm]:
    """Return exact training, top-k of half of the channels, and an exact network of about as many FLOPs."""
    half = ColumnRowSampling(ratio=0.5, minimal=4)
    return [Arm(name="exact", role="baseline"), Arm(name=HALF, methods=(half,)), *narrower(task)]


def grid(task: Task) -> list[Arm]:
    """Return other ratios, and other schemes at half of the channels; all take the same steps."""
    settings = {f"top-k, {r:.0%}": dict(ratio=r) for r in RATIOS if r != 0.5}
    settings["norm, unscaled"] = dict(scheme="norm")
    if task.preset in ("study", "full"):
        settings["uniform, scaled"] = dict(scheme="uniform", replacement=True, scaled=True)
        settings["Bernoulli, scaled"] = dict(scheme="bernoulli", scaled=True)
        settings["backward only, Bernoulli, scaled"] = dict(where="backward", scheme="bernoulli", scaled=True)
    return [
        Arm(name="exact", role="baseline"),
        *(
            Arm(name=n, methods=(ColumnRowSampling(minimal=4, **how),), lengths=task.lengths)
            for n, how in settings.items()
        ),
    ]
