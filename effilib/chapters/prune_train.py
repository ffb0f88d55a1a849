"""Chapter 6.1: PruneTrain's arms and controls, widths over epochs, what narrower layers really save, and the
checks.
"""

import copy
import statistics as stats
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import figures, surgery, tasks
from effilib.chapters.products import step_table
from effilib.data import Batches
from effilib.experiment import PILOT_SEEDS, Arm, measure
from effilib.methods.prune_train import (
    PruneTrain,
    coefficient,
    group_lasso,
    group_norms,
    places,
    shrink_,
    shrink_steps,
    weights,
)
from effilib.training import stream, train

RATIOS = (0.0, 0.1, 0.2, 0.3)
# the control "dense, stopped early" trains for this share of the epochs: the time that the aim allows the
# method
SHORTER = 0.8

# What a preset changes of the published settings, and why: chosen in trial runs with seeds that are not
# measured.
SHORT = dict(scale="schedule", weigh="norm", rule="readers", keep_scale=True)
SETTINGS = {
    "smoke": dict(SHORT, until=0.6, multiple=2),
    "quick": dict(SHORT, until=0.5),
    "study": dict(SHORT, until=0.15),
    "full": dict(scale="schedule", every=5),
}
RATIO = {"smoke": 0.2, "quick": 0.1, "study": 0.2, "full": 0.2}  # of the judged arm; published is 0.2
SIZES = {"quick": dict(images=2500, epochs=2, evaluations=8), "study": dict(epochs=10, evaluations=10)}


def wide(book):
    """The task from which pruning starts: the wide network, fewer epochs in the short presets, a margin of 1
    point.
    """
    t = book.task
    task = tasks.task(
        t.preset,
        t.dataset,
        "" if t.network == "resnet" else t.network,
        "wide",
        device=t.device,
        seeds=t.seeds,
    )
    return task.but(**SIZES.get(t.preset, {}), margin=1.0, target=None)


def method(preset, ratio=None):
    """PruneTrain as this preset runs it; without a ratio the judged one."""
    return PruneTrain(ratio=RATIO[preset] if ratio is None else ratio, **SETTINGS[preset])


def name(ratio):
    """The name of the arm with this ratio."""
    return f"PruneTrain, r = {ratio:g}" if ratio else "dense"


def judged(task):
    """Name of the judged arm."""
    return name(RATIO[task.preset])


def pruned(task, ratio):
    """An arm of PruneTrain."""
    return Arm(name=name(ratio), methods=(method(task.preset, ratio),))


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """Trains from scratch a network cut to given widths before the first step; for networks that have no
    settings of their own.
    """

    widths: tuple  # (node, width)
    removed: tuple = ()

    def __call__(self, task, seed):
        dataset = task.load()
        model = task.build(dataset, seed)
        for path in self.removed:
            surgery.remove_path_(surgery.trace(model).path(path))
        found = surgery.trace(model)
        for node, width in self.widths:
            surgery.select_(found[node], range(width))
        return train(model, dataset, task.recipe, (), seed)


def pilot(task):
    """The history of the judged arm with a seed that is never measured: it says which network is left in the
    end.
    """
    arm = Arm(name="pilot", role="baseline", methods=(method(task.preset),))
    return measure(task, [arm], [PILOT_SEEDS[0]], title="pilot for the smaller network")[0]["arms"]["pilot"]


def smaller(pilot):
    """The control that could beat the method: the network that pruning ends with, from scratch and from the
    first step.
    """
    arm = Arm(name="the smaller network from scratch", role="control")
    if pilot.structure:
        return replace(arm, network=pilot.structure)
    final = pilot.events[-1]["widths"][-1]
    removed = tuple(
        d.split()[2] for e in pilot.events for d in e.get("pruned", ()) if d.startswith("residual path")
    )  # fmt: skip
    fit = Smaller(widths=tuple((n, w) for n, (w, _) in final.items()), removed=removed)
    return replace(arm, fit=fit)


def arms(task, pilot):
    """The judged arms: dense, PruneTrain, the smaller network; in the longer presets also dense with fewer
    epochs.
    """
    found = [Arm(name="dense", role="baseline"), pruned(task, RATIO[task.preset]), smaller(pilot)]
    if task.preset != "quick":
        early = Arm(
            name=f"dense, {SHORTER:g}x the epochs",
            role="control",
            changes={"epochs": SHORTER * task.recipe.epochs},
        )
        found.append(early)
    return found


def grid(task):
    """One arm a ratio; r = 0 is the baseline."""
    return [pruned(task, r) if r else Arm(name=name(r), role="baseline") for r in RATIOS]


def subset(task):
    """What the grid over ratios runs on in the quick preset: half of the images."""
    return task.but(images=task.images // 2) if task.preset == "quick" else task


# Checks


def toy():
    """Two groups, checked by hand: norms 5 and 1, kappa 2."""
    W = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    before, norms = W.clone(), group_norms(W, 0)
    shrink_([(W, 0, 1)], 2.0)
    rows = [
        {
            "group": str(b.tolist()),
            "norm": n,
            "1 - kappa / norm": f"{1 - 2 / n:g}",
            "after": str([round(v, 4) for v in w.tolist()]),
        }
        for b, n, w in zip(before, norms.tolist(), W, strict=True)
    ]
    return pd.DataFrame(rows).set_index("group")


def _batch(dataset, size=64):
    return next(iter(Batches(dataset, min(size, len(dataset.train)), stream(0, "numerics"))))


def check(task, dataset):
    """The penalty against a loop, its share of the loss, cuts against masks, and the prediction of how long a
    group takes to die.
    """
    model, (x, y) = task.build(dataset), _batch(dataset, 32)
    groups = weights(model, places(surgery.trace(model).nodes))
    rows = []
    with torch.no_grad():
        G = float(group_lasso(groups))
        slow = 0.0
        for W, axis, per in groups:
            for g in W.movedim(axis, 0).reshape(W.shape[axis] // per, -1).double():
                slow += float((g.square().sum() + 1e-8).sqrt())
        rows.append(("group lasso against a loop over all groups, relative", f"{abs(G - slow) / slow:.1e}"))
        loss = float(F.cross_entropy(model.eval()(x), y))
        lam = coefficient(0.2, loss, G)
        rows.append(
            ("share of the penalty in the whole loss at r = 0.2", f"{lam * G / (loss + lam * G):.6f}")
        )
    rows += [
        (f"largest change of an output, {what}", f"{change:.1e}") for what, change in cuts(model, x).items()
    ]
    rows.append(
        (
            "steps until an idle group of norm 1.4 is gone (lambda 3e-3, lr 0.1): predicted",
            f"{shrink_steps(1.4, 3e-3, 0.1):.0f}",
        )
    )
    rows.append(("... simulated", f"{_simulate(1.4, 3e-3, 0.1)}"))
    return pd.DataFrame(rows, columns=["what", "result"]).set_index("what")


def cuts(model, x):
    """Largest change of an output (eval) when half of a node's channels are cut: all of their weights zero,
    or only the producers'.
    """
    found = {}
    for what in (
        "all weights of a dead channel are zero",
        "only its producers' are (BatchNorm's shift leaks)",
    ):
        m = copy.deepcopy(model).eval()
        node = surgery.nodes(m)[0]
        dead = torch.arange(node.width) >= node.width // 2
        with torch.no_grad():
            for b in node.bns:
                m.get_submodule(b).bias.fill_(0.1)
            for W, axis, per in weights(m, places([node])):
                if axis == 0 or what.startswith("all"):
                    W.index_fill_(axis, dead.repeat_interleave(per).nonzero().flatten(), 0)
            before = m(x)
            surgery.select_(node, (~dead).nonzero().flatten())
            found[what] = float((m(x) - before).abs().max())
    return found


def _simulate(norm, lam, lr, momentum=0.9):
    W = torch.full((1, 16), norm / 4, dtype=torch.double)
    for step in range(1, 100_000):
        shrink_([(W, 0, 1)], lr * lam / (1 - momentum))
        if not W.any():
            return step


# What narrower layers save


def cost_table(task, dataset):
    """FLOPs and milliseconds of a training step with every node at a share of its width: predicted and
    measured speed-up.
    """
    shares = {
        "as built": lambda n: n,
        "3/4 of every width": lambda n: max(1, 3 * n // 4),
        "1/2 of every width": lambda n: max(1, n // 2),
        "1/2 of every width, less 1": lambda n: max(1, n // 2 - 1),
    }
    networks = {name: task.build(dataset) for name in shares}
    for model, width in zip(networks.values(), shares.values(), strict=True):
        for node in surgery.nodes(model):
            surgery.select_(node, range(width(node.width)))
    return step_table(task, dataset, networks)


# What was pruned


def _widths(history):
    """Per epoch the widths: list of dict node -> (width, live)."""
    return next((e["widths"] for e in reversed(history.events) if "widths" in e), [])


def start_widths(task, dataset):
    """Widths before the first step: dict node -> (width, live)."""
    return {n.name: (n.width, n.width) for n in surgery.trace(task.build(dataset)).nodes}


def widths_figure(comparison, dataset):
    """(figure, caption): channels of every node over the epochs, the first seed of each pruned arm."""
    pruned = [a for a in comparison.arms if _widths(comparison.histories(a.name)[0])]
    begin = start_widths(comparison.task, dataset)
    nodes = list(begin)
    figure, axes = figures.new(
        len(pruned),
        width=max(6.5, 3.6 * len(pruned)),
        height=0.9 + 0.3 * len(nodes),
        squeeze=False,
        sharey=True,
    )
    for ax, arm in zip(axes[0], pruned, strict=True):
        epochs = [begin, *_widths(comparison.histories(arm.name)[0])]
        shares = [[e.get(n, (0, 0))[0] / begin[n][0] for e in epochs] for n in nodes]
        image = ax.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for i, n in enumerate(nodes):
            ax.text(
                len(epochs) - 0.4,
                i,
                f"{begin[n][0]} → {epochs[-1].get(n, (0, 0))[0]}",
                va="center",
                fontsize=8,
            )
        ax.set_title(arm.name)
        ax.set_xlabel("epoch")
        ax.set_xticks(range(0, len(epochs), 1 + len(epochs) // 8))
        ax.grid(False)
        ax.set_yticks(range(len(nodes)), [n if len(n) < 26 else "..." + n[-23:] for n in nodes], fontsize=8)
    figure.colorbar(
        image, ax=axes[0].tolist(), label="share of the channels", pad=0.16 if len(pruned) == 1 else 0.1
    )
    return figure, (
        "Every row is a channel node, every column the end of an epoch (0: the start); dark: cut away. The numbers are its channels at the "
        "start and at the end. A residual trunk (named after its first layer) can lose a channel only where no layer of its stage uses it."
    )


def what_happened(comparison):
    """A row an arm: what was cut, when for the first time, FLOPs and time against dense."""
    base = comparison.histories(comparison.baseline)
    rows = {}
    for arm in comparison.arms[1:]:
        runs = comparison.histories(arm.name)
        cut = [e for h in runs for e in h.events if e.get("pruned")]
        rows[arm.name] = {
            "accuracy, points": f"{stats.mean(h.accuracy for h in runs) - stats.mean(h.accuracy for h in base):+.2f}",
            "FLOPs": f"{stats.mean(h.flops for h in runs) / stats.mean(h.flops for h in base):.2f}",
            "time": f"{stats.mean(h.seconds for h in runs) / stats.mean(h.seconds for h in base):.2f}",
            "first cut after epoch": str(min(e["epoch"] for e in cut) + 1) if cut else "",
            "removed paths": str(sum(d.startswith("residual path") for e in cut for d in e["pruned"]))
            if cut
            else "",
            "seconds for cuts, a run": f"{stats.mean(h.kinds.get('reconfigure', {'seconds': 0})['seconds'] for h in runs):.2f}",
        }
    return pd.DataFrame(rows).T.rename_axis("relative to dense")


def time_figure(comparison):
    """(figure, caption): FLOPs that are left against time that is left, every arm and seed a dot."""
    figure, axes = figures.new(width=6.0, height=4.2)
    colour = figures.colours([a.name for a in comparison.arms])
    base = comparison.histories(comparison.baseline)
    for arm in comparison.arms:
        points = [
            (h.flops / b.flops, h.seconds / b.seconds)
            for h, b in zip(comparison.histories(arm.name), base, strict=True)
        ]
        axes.plot(*zip(*points, strict=True), "o", color=colour[arm.name], label=arm.name, alpha=0.8)
    low = min(0.5, *(v for line in axes.lines for v in (*line.get_xdata(), *line.get_ydata())))
    axes.plot([low, 1.05], [low, 1.05], "--", color="black", lw=1, label="time as FLOPs predict")
    axes.axhline(0.8, color="black", lw=0.8, ls=":", label="aim: 0.8 of the time")
    axes.set_xlabel("FLOPs of the whole training, relative to dense")
    axes.set_ylabel("time of the whole training, relative to dense")
    axes.legend(fontsize=8)
    return figure, "Points above the dashed line saved less time than FLOPs; the dotted line is the aim."


def say_grid(comparison):
    """The grid in a sentence."""
    base = comparison.histories(comparison.baseline)[0]
    parts = []
    for arm in comparison.arms[1:]:
        h = comparison.histories(arm.name)[0]
        left = f"{h.flops / base.flops:.2f} of the FLOPs, {h.seconds / base.seconds:.2f} of the time"
        parts.append(f"{arm.name}: {h.accuracy - base.accuracy:+.2f} points, {left}")
    return "; ".join(parts) + " (one seed)."


def nodes(task, dataset):
    """The channel nodes of the task's network as a table, those that cannot be changed with the reason."""
    found = surgery.trace(task.build(dataset))
    rows = [
        {
            "node": n.name,
            "channels": n.width,
            "producers": ", ".join(n.producers),
            "consumers": ", ".join(
                c if per == 1 else f"{c} ({per} columns a channel)" for c, per in n.consumers.items()
            ),
            "can be cut": n.why or "yes",
        }
        for n in [*found.nodes, *found.refused]
    ]
    return pd.DataFrame(rows).set_index("node")
