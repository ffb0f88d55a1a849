"""Chapter 6.4, the paper itself: published networks cut, the simulator over workers and bandwidths, and the
real run over processes.
"""

import copy
import functools
import itertools

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from effilib import figures, models
from effilib.data import Batches
from effilib.distributed import processes
from effilib.errors import BadInput
from effilib.methods.layer_placement import (
    BYTES,
    Chain,
    Cluster,
    Job,
    Layer,
    alone,
    best_cut,
    bubble,
    estimate,
    measure,
    pipeline,
    pipelined,
    profile,
    server_bytes,
    several,
    step_seconds,
    take_part,
    traffic,
)
from effilib.training import stream

PUBLISHED = {
    "VGG-16": ("vgg16", 32),
    "AlexNet": ("alexnet", 128),
    "ResNet-50": ("resnet50", 32),
}  # torchvision's name, images a worker
# FLOP/s of every machine in the simulator: an assumption, of the order of what a GPU of 2019 kept up in fp32
RATE = 5e12
GBIT = 1e9 / 8  # bytes/s
BANDWIDTHS = {"1 Gbit/s": GBIT, "10 Gbit/s": 10 * GBIT, "100 Gbit/s": 100 * GBIT}
WORKERS = 2
STEPS = 20
LR = 0.002
SLOW_STEPS = 4  # of the runs with a slowed-down link
SIZES = {
    "smoke": dict(batch=4, width=4),
    "quick": dict(batch=8, width=32),
    "study": dict(batch=32, width=32),
    "full": dict(batch=32, width=32),
}


@functools.cache
def published_layers(name):
    """(layers, how many lie before the first fully connected one) of a published network at 224 x 224 pixels,
    on the meta device.
    """
    import torchvision

    with torch.device("meta"):
        model = getattr(torchvision.models, PUBLISHED[name][0])()
    chain = Chain(model)
    first = next(i for i, n in enumerate(chain.names) if isinstance(chain.traced.get_submodule(n), nn.Linear))
    return profile(chain, (3, 224, 224)), first


def published():
    """The networks cut before their first fully connected layer, as text: it is the same on every machine."""
    lines = []
    for name, (_, b) in PUBLISHED.items():
        layers, k = published_layers(name)
        P, far = (sum(layer.parameters for layer in part) for part in (layers, layers[k:]))
        ratio = traffic(layers, len(layers), 1, b) / traffic(layers, k, 1, b)
        A = layers[k - 1].outputs
        lines.append(
            f"{name:10} batch {b:3}: {P / 1e6:5.1f} M parameters, {far / 1e6:5.1f} M behind the cut, A = {A:6,}: {ratio:5.2f}x less"
        )
    return "\n".join(lines)


def toy():
    """Three layers and one image on each of two workers: the bytes of every cut, by hand."""
    layers = [Layer(name="conv", parameters=2, outputs=8), Layer(name="conv", parameters=10, outputs=4)]
    layers.append(Layer(name="fc", parameters=100, outputs=3))
    rows = []
    for k in (1, 2, 3):
        P, A = sum(layer.parameters for layer in layers[:k]), layers[k - 1].outputs if k < 3 else 0
        rows.append(
            {"cut behind layer": k, "by hand": f"4 (2 2 {P} + 2 2 1 {A})", "bytes": traffic(layers, k, 2, 1)}
        )
    return pd.DataFrame(rows).set_index("cut behind layer")


def check(trials=200):
    """The automatic cut and the pipeline against trying everything, on random chains."""
    g = stream(0, "random chains")

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    wrong = {"cut": 0, "pipeline": 0}
    for _ in range(trials):
        layers = [
            Layer(name=str(i), parameters=draw(0, 9), outputs=draw(1, 9), seconds=draw(0, 9)) for i in range(draw(2, 9))
        ]  # fmt: skip
        cluster = Cluster(
            workers=draw(1, 5),
            batch=draw(1, 4),
            bandwidth=draw(1, 300),
            memory=1000 * draw(1, 9),
            overlap=bool(draw(0, 2)),
        )
        fitting = [k for k in range(1, len(layers) + 1) if server_bytes(layers, k, cluster) <= cluster.memory]
        wrong["cut"] += best_cut(layers, cluster)[1] != min(step_seconds(layers, k, cluster) for k in fitting)
        stages = draw(1, len(layers) + 1)
        slow = min(
            _slowest(layers, c, 3, 50.0) for c in itertools.combinations(range(1, len(layers)), stages - 1)
        )
        found, cuts = pipeline(layers, stages, 3, 50.0)
        wrong["pipeline"] += found != slow or _slowest(layers, cuts, 3, 50.0) != slow
    return pd.DataFrame(
        {"random chains": [trials, trials], "not the best": [wrong["cut"], wrong["pipeline"]]},
        index=["the cut, against trying every cut", "the pipeline, against trying every partition"],
    )


def _slowest(layers, cuts, batch, bandwidth):
    """Seconds of the slowest stage or link of one partition."""
    pieces = [
        sum(batch * layer.seconds for layer in layers[i:j])
        for i, j in itertools.pairwise((0, *cuts, len(layers)))
    ]
    return max(pieces + [2 * BYTES * batch * layers[i - 1].outputs / bandwidth for i in cuts])


# The simulator


def ring_seconds(layers, cluster):
    """The control: data parallelism without a server, gradients summed in a ring over the workers' own links:
    2 (W - 1) / W P each.
    """
    W, P = cluster.workers, sum(layer.parameters for layer in layers)
    return (
        cluster.batch * sum(layer.seconds for layer in layers)
        + BYTES * 2 * (W - 1) / W * P / cluster.bandwidth
    )


def simulate(workers=range(1, 9)):
    """Every published network, number of workers and bandwidth: seconds a step of plain server, best
    placement and ring.
    """
    rows = []
    for name, (_, b) in PUBLISHED.items():
        layers = estimate(published_layers(name)[0], RATE)
        for (label, bandwidth), W in itertools.product(BANDWIDTHS.items(), workers):
            cluster = Cluster(workers=W, batch=b, bandwidth=bandwidth)
            k, seconds = best_cut(layers, cluster)
            plain, ring = step_seconds(layers, len(layers), cluster), ring_seconds(layers, cluster)
            cut = f"before {layers[k].name}" if k < len(layers) else "none"
            rows.append(
                {
                    "network": name,
                    "bandwidth": label,
                    "workers": W,
                    "plain server s": plain,
                    "placed s": seconds,
                    "ring s": ring,
                    "cut": cut,
                }
            )
    frame = pd.DataFrame(rows)
    return frame.assign(
        **{
            "speed-up": frame["plain server s"] / frame["placed s"],
            "ring": frame["plain server s"] / frame["ring s"],
        }
    )


def simulation_table(frame, workers=4):
    """The rows of one number of workers."""
    part = frame[frame["workers"] == workers].drop(columns="workers")
    return part.rename(columns={"ring": "ring's speed-up"}).set_index(["network", "bandwidth"])


def simulation_figure(frame):
    """(figure, caption): speed-up against the plain parameter server over the workers, a panel a network."""
    figure, axes = figures.new(len(PUBLISHED), width=9.6, height=3.7, sharey=True)
    for ax, name in zip(axes, PUBLISHED, strict=True):
        for i, label in enumerate(BANDWIDTHS):
            part = frame[(frame["network"] == name) & (frame["bandwidth"] == label)]
            ax.plot(
                part["workers"],
                part["speed-up"],
                "o-",
                ms=4,
                color=figures.COLOURS[i],
                label=f"placed, {label}",
            )
            part = part[part["workers"] > 1]  # one worker alone has nobody to send to
            ax.plot(
                part["workers"], part["ring"], "--", lw=1.2, color=figures.COLOURS[i], label=f"ring, {label}"
            )
        ax.axhline(1, color="black", lw=0.8)
        ax.set_yscale("log")
        figures.plain_log(ax.yaxis, values=(0.5, 1, 2, 5, 10, 20))
        ax.set_title(name)
        ax.set_xlabel("workers")
        ax.set_xticks(sorted(set(frame["workers"])))
    axes[0].set_ylabel("speed-up of a step (x, log scale)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure, (
        f"Simulated: {RATE / 1e12:g} TFLOP/s on every machine, nothing overlaps. Solid: the best placement against the plain server; "
        "it gains where the head is heavy and the link slow. Dashed: the control without a server, a ring of the workers."
    )


# The real run


class FatHead(nn.Module):
    """Six convolutions and three fully connected layers, like VGG: few weights compute much, many compute
    little. No BatchNorm.
    """

    def __init__(self, classes, channels=3, width=32):
        super().__init__()
        self.features, c = nn.Sequential(), channels
        for w in (width, 2 * width, 4 * width):
            for _ in range(2):
                self.features.extend([nn.Conv2d(c, w, 3, padding=1), nn.ReLU()])
                c = w
            self.features.append(nn.MaxPool2d(2))
        self.features.append(nn.AdaptiveAvgPool2d(4))
        hidden = 32 * width
        self.head = nn.Sequential(
            nn.Linear(16 * c, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        models.initialize_(self)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def fat_head(classes, channels=3, width=32):
    """A `FatHead`, made by its import path."""
    return FatHead(classes, channels, width)


def maker(task, dataset):
    """() -> the network of the real run, the same in every process."""
    width = SIZES[task.preset]["width"]
    return functools.partial(
        models.build,
        f"{__name__}:fat_head",
        dataset.classes,
        dataset.shape,
        seed=stream(0, "placement").initial_seed(),
        width=width,
    )


def batches(task, dataset, steps=STEPS):
    """The batches of the real run, for all workers together."""
    size = WORKERS * SIZES[task.preset]["batch"]
    source = Batches(dataset, size, stream(0, "placement"))
    endless = itertools.chain.from_iterable(itertools.repeat(source))
    return tuple((x.cpu().contiguous(), y.cpu()) for x, y in itertools.islice(endless, steps))


def own_layers(task, dataset):
    """The real network's layers with measured seconds, on one thread as in the processes."""
    chain, (x, _) = Chain(maker(task, dataset)()), batches(task, dataset, 1)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(chain, profile(chain, dataset.shape), x.chunk(WORKERS)[0], repeats=5, seconds=3)
    finally:
        torch.set_num_threads(threads)


def layer_table(layers, task):
    """The chain with its profile, and what each cut would send in a step."""
    b = SIZES[task.preset]["batch"]
    rows = {
        layer.name: {
            "parameters": layer.parameters,
            "A, numbers an image": layer.outputs,
            "ms an image": 1e3 * layer.seconds,
            "kB a step if cut here": traffic(layers, k, WORKERS, b) / 1e3,
        }
        for k, layer in enumerate(layers, 1)
    }
    return pd.DataFrame(rows).T.rename_axis("layer")


def real(task, dataset, layers):
    """Train over three processes, plain and placed, at full speed and with a slowed-down link, and take
    pipeline steps. All in one start.

    Returns {"cut", "pipeline", "stages", "runs": {name: results by rank}, "times": rows, "checks": rows}.
    """
    make, everything, b = maker(task, dataset), batches(task, dataset), SIZES[task.preset]["batch"]
    slow = {n: w for n, w in BANDWIDTHS.items() if not n.startswith("100")}
    cluster = Cluster(workers=WORKERS, batch=b, bandwidth=GBIT)
    cut = min(range(1, len(layers)), key=lambda k: step_seconds(layers, k, cluster))
    stages = min(3, len(layers))
    _, cuts = pipeline(layers, stages, b, GBIT)
    where = {"plain server": None, "placed": cut}
    jobs = {
        (name, "full speed"): Job(make=make, batches=everything, cut=k, lr=LR) for name, k in where.items()
    }
    few = everything[:SLOW_STEPS]
    jobs |= {
        (n, label): Job(make=make, batches=few, cut=k, lr=LR, bandwidth=w)
        for label, w in slow.items()
        for n, k in where.items()
    }
    double, precise = functools.partial(_double, make), tuple((x.double(), y) for x, y in everything)
    jobs |= {(name, "float64"): Job(make=double, batches=precise, cut=k, lr=LR) for name, k in where.items()}
    x, y = everything[0]
    calls = [(take_part, (job,)) for job in jobs.values()] + [
        (pipelined, (make, c, x, y, WORKERS)) for c in ((cut,), cuts)
    ]
    by_rank = processes.run(several, WORKERS + 1, calls)
    runs = {name: [r[i] for r in by_rank] for i, name in enumerate(jobs)}
    gradients = [{n: g for r in by_rank for n, g in r[len(jobs) + i].items()} for i in range(2)]
    return {
        "cut": cut,
        "cuts": cuts,
        "runs": runs,
        "steps": len(everything),
        "checks": _checks(make, jobs, runs, layers, cut, cuts, b, gradients, (x, y)),
        "times": _times(runs, layers, where, b, slow),
    }


def _double(make):
    """The network in float64, in which the rounding of 20 steps does not grow to where nothing is equal any
    more.
    """
    return make().double()


def _difference(a, b):
    """Largest difference of two dicts of tensors; nan where their names differ."""
    return max(float((a[n] - b[n]).abs().max()) for n in a) if a.keys() == b.keys() else float("nan")


def _checks(make, jobs, runs, layers, cut, cuts, b, gradients, batch):
    plain, placed = runs["plain server", "full speed"], runs["placed", "full speed"]
    job = jobs["plain server", "full speed"]
    start = dict(_double(make).named_parameters())
    one = alone(jobs["plain server", "float64"])
    moved = _difference(one, {n: p.detach() for n, p in start.items()})
    exact_plain, exact_placed = (
        runs[name, "float64"][0]["parameters"] for name in ("plain server", "placed")
    )
    rows = []
    for name, ranks, k in (("plain server", plain, len(layers)), ("placed", placed, cut)):
        counted, formula = (
            ranks[0]["sent"] + ranks[0]["received"],
            len(job.batches) * traffic(layers, k, WORKERS, b),
        )
        there = sum(r["sent"] + r["received"] for r in ranks[1:])
        rows.append(
            (
                f"{name}: bytes at the server, {len(job.batches)} steps",
                f"{counted:,}",
                "equal" if counted == formula == there else "differ",
            )
        )
        rows.append(("... by the formula", f"{formula:,}", ""))
    for text, a, c in (
        ("placed against plain server", exact_placed, exact_plain),
        ("placed against one process", exact_placed, one),
    ):
        d = _difference(a, c)
        what = f"weights after {len(job.batches)} steps in float64, {text}: largest difference"
        rows.append((what, f"{d:.1e}", "equal" if d <= 1e-10 else "differ"))
    rows.append(
        (
            "... the same in fp32, placed against plain server",
            f"{_difference(placed[0]['parameters'], plain[0]['parameters']):.1e}",
            "",
        )
    )
    rows.append(("... largest change of a weight in these steps", f"{moved:.1e}", ""))
    model = make().train()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    exact = {n: p.grad for n, p in model.named_parameters()}
    for c, found in zip(((cut,), cuts), gradients, strict=True):
        d = _difference(found, exact) / max(float(g.abs().max()) for g in exact.values())
        text = f"pipeline of {len(c) + 1} stages (cut behind {', '.join(layers[i - 1].name for i in c)}): gradients, relative difference"
        rows.append((text, f"{d:.1e}", "equal" if d <= 1e-5 else "differ"))
    return rows


def _times(runs, layers, where, b, slow):
    rows = []
    for label, bandwidth in {"full speed": float("inf"), **slow}.items():
        for name, k in where.items():
            foreseen = step_seconds(
                layers, k or len(layers), Cluster(workers=WORKERS, batch=b, bandwidth=bandwidth)
            )
            rows.append(
                {
                    "link": label,
                    "placement": name,
                    "foreseen ms": 1e3 * foreseen,
                    "ms": 1e3 * runs[name, label][0]["seconds"],
                }
            )
    return rows


def checks(found):
    """What the real run proves, as a table."""
    return pd.DataFrame(found["checks"], columns=["what", "result", ""]).set_index("what")


def times_figure(found):
    """(figure, caption): milliseconds a step over the processes, measured and foreseen, per link."""
    rows = found["times"]
    links = list(dict.fromkeys(r["link"] for r in rows))
    figure, axes = figures.new(width=8.0, height=3.4)
    for i, name in enumerate(dict.fromkeys(r["placement"] for r in rows)):
        mine = [r for r in rows if r["placement"] == name]
        at = [links.index(r["link"]) + 0.36 * (i - 0.5) for r in mine]
        axes.bar(
            at,
            [r["ms"] for r in mine],
            width=0.32,
            color=(figures.GREY, figures.COLOURS[0])[i],
            label=f"{name}, measured",
        )
        axes.plot(
            at,
            [r["foreseen ms"] for r in mine],
            "D",
            mfc="none",
            mec=figures.COLOURS[1],
            mew=1.5,
            label="foreseen" if i else None,
        )
        for x, r in zip(at, mine, strict=True):
            axes.annotate(
                f"{r['ms']:.0f}", (x, r["ms"]), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(range(len(links)), [f"link: {link}" for link in links])
    axes.set_ylabel("ms a step")
    axes.margins(y=0.15)
    axes.legend(fontsize=9)
    return figure, (
        "Median step of three processes on this machine. A slower link is imitated by waiting for the counted bytes. Diamonds: the "
        "time model with the profile of one process; it knows nothing of copying, and of processes that share two cores."
    )


def own_cut(task, dataset):
    """The task's own network as a chain: the best cut at 1 Gbit/s, what it saves, and what would not stay
    equal; or why it is no chain.
    """
    model = task.build(dataset).cpu()
    try:
        chain = Chain(copy.deepcopy(model))
    except BadInput as error:
        return pd.DataFrame({"": [str(error)]}, index=["cannot be cut"])
    layers = estimate(profile(chain, dataset.shape), RATE)
    cluster = Cluster(workers=4, batch=task.recipe.batch_size, bandwidth=GBIT)
    k, seconds = best_cut(layers, cluster)
    plain = step_seconds(layers, len(layers), cluster)
    doubts = chain.doubts(k)
    facts = {
        "layers": f"{len(layers)}: {layers[0].name} ... {layers[-1].name}",
        "best cut, 4 workers, 1 Gbit/s": f"before {layers[k].name}"
        if k < len(layers)
        else "none: the plain parameter server",
        "speed-up foreseen": f"{plain / seconds:.2f}x",
        "would not stay equal": "; ".join(doubts[:3])
        + (f"; and {len(doubts) - 3} more" if len(doubts) > 3 else "")
        if doubts
        else "nothing",
    }
    return pd.DataFrame({"": facts.values()}, index=list(facts))


def say_bubble(stages=3, microbatches=4):
    """Why a pipeline needs many small batches, in a sentence."""
    many = 8 * microbatches
    waits = f"{bubble(stages, microbatches):.0%} with {microbatches} micro-batches, {bubble(stages, many):.0%} with {many}"
    return f"{stages} stages wait (S - 1) / (M + S - 1) of the time: {waits}."


def say(found):
    """The checks in a sentence, for the record."""
    verdicts = [v for _, _, v in found["checks"] if v]
    speed = {r["link"]: r["ms"] for r in found["times"] if r["placement"] == "plain server"}
    placed = {r["link"]: r["ms"] for r in found["times"] if r["placement"] == "placed"}
    ratios = ", ".join(f"{link} {speed[link] / placed[link]:.1f}x" for link in speed)
    return f"Placement over 3 processes: {verdicts.count('equal')} of {len(verdicts)} checks equal; step against the plain server: {ratios}."
