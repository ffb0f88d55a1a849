"""`effilib advise DATA`: which methods save time on a user's own images, network and machine.

It looks at the network and the pace of a step, plans what fits into the time, tunes the baseline, screens the
contenders of chapter 10, and measures the best of them and their combination as a chapter does. It ends in a
page, a recipe file and a snippet for one's own loop. Its folder holds all that it needs to go on.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path

from effilib import clock, data, distributed, paths, provenance, search, statistics, tasks, training, tuning
from effilib.caveats import FEW_STEPS
from effilib.chapters.comparison import CONTENDERS
from effilib.dataset import Dataset
from effilib.errors import BadInput, choose, within
from effilib.experiment import Arm
from effilib.hooks import Method
from effilib.networks import NETWORKS
from effilib.progress import say_seconds
from effilib.recipe import Recipe, resolve_layout, resolve_precision
from effilib.results import Comparison, compare
from effilib.search import Found
from effilib.tasks import Task
from effilib.workbook import recipes, series
from effilib.workbook.train_command import file_name

__all__ = ["Plan", "make_plan", "run", "snippet"]

FEW_IMAGES = 200  # training images, below which accuracies say nothing of a method
LRS, DECAYS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), (5e-4, 2e-3)
ROUNDS = ((0.25, 12, 1), (0.5, 4, 1), (1.0, 2, 2))  # of tuning: length, settings, seeds
SCREENED = (0.25, 0.5)  # lengths of the two rounds of screening
LENGTHS = (0.5, 0.71, 1.0)  # of the measurement
SCREENING, MEASURED, ADDITIONS = 2, 3, 2  # seeds; methods besides the baseline; parts that are added
SLOWEST = 3  # times the baseline's step
EPOCHS = 30  # of the longest training, at most
FIRST = (  # tried where time is short: what paid in the chapters; the last ones emulate faster hardware
    "resizing", "whitening stem", "gradient approximation", "data pruning", "wavelet stem", "PruneTrain",
    "smaller network", "kernel rescaling", "column-row sampling", "stochastic pooling", "prune, then grow",
)  # fmt: skip
JUDGED = (
    statistics.FASTER, statistics.SLOWER, statistics.NO_DIFFERENCE, statistics.UNDECIDED, statistics.DEPENDS,
    statistics.OUT_OF_REACH, statistics.SATURATED, statistics.DIVERGED,
)  # fmt: skip
NO_TIME = "not tried, there is no time for it; more --minutes take it in"
STAGES = "it is more than one training, which a recipe cannot hold; its notebook shows it"
ASKING = 0.2  # of the time, in which it is seen who can take part
SHARE = 0.9  # of the time that is planned with


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fits into the time: epochs of the longest training, seeds, contenders, seconds of each part.

    >>> plan = Plan(epochs=3.0, seeds=3, contenders=4, tuning=60.0, screening=90.0, measuring=120.0)
    >>> plan.seconds
    270.0
    """

    epochs: float
    seeds: int  # a length of the measurement
    contenders: int
    tuning: float
    screening: float
    measuring: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.tuning + self.screening + self.measuring


def _work(contenders, seeds):
    """(trainings, longest trainings that they are as long as) of tuning, screening and measuring."""
    k, (short, longer) = contenders, SCREENED
    second = math.ceil(k / 2)
    return {
        "tuning": (sum(n * s for _, n, s in ROUNDS), sum(length * n * s for length, n, s in ROUNDS)),
        "screening": (
            SCREENING * (k + 2 + second + 1 + 2 * ADDITIONS),
            SCREENING * (short * (k + 1) + longer + longer * (second + 1 + 2 * ADDITIONS)),
        ),
        "measuring": (
            (1 + MEASURED) * (1 + seeds * len(LENGTHS)),
            (1 + MEASURED) * (min(LENGTHS) + seeds * sum(LENGTHS)),
        ),
    }


def make_plan(
    seconds: float, *, step: float, extra: float, steps: int, contenders: int, most: float, tune: bool = True
) -> Plan | None:
    """Return what fits into so many seconds, None if nothing does.

    step: seconds of one. extra: seconds of a training besides its steps. steps: in an epoch. contenders: how
    many there are. most: epochs at most. tune: whether the baseline is.

    >>> plan = make_plan(480, step=0.01, extra=0.5, steps=50, contenders=8, most=30)
    >>> plan.contenders, plan.seconds <= 480, plan.tuning <= 480 / 3
    (8, True, True)
    >>> make_plan(20, step=0.01, extra=0.5, steps=50, contenders=8, most=30) is None
    True
    """
    found = None
    for seeds in (3, 4, 5):
        for k in range(contenders, min(2, contenders) - 1, -1):
            work = _work(k, seeds) if tune else _work(k, seeds) | {"tuning": (0, 0.0)}
            trainings, lengths = (sum(part) for part in zip(*work.values(), strict=True))
            longest = (SHARE * seconds - trainings * extra) / lengths
            if tune:
                runs, length = work["tuning"]
                longest = min(longest, (SHARE * seconds / 3 - runs * extra) / length)
            epochs = min(most, longest / (step * steps))
            if epochs * steps * SCREENED[0] < FEW_STEPS:
                continue
            parts = {n: runs * extra + length * epochs * steps * step for n, (runs, length) in work.items()}
            if found is None or (k >= found.contenders and epochs >= found.epochs):  # more seeds for nothing
                found = Plan(epochs=_digits(epochs), seeds=seeds, contenders=k, **parts)
            break
    return found


def _digits(x):
    return math.floor(x * 100) / 100 if x >= 1 else round(x, 3)


class _Say:
    """Lines with how much of the time is spent and about how much is left."""

    def __init__(self, spent, planned=0.0):
        self.begun, self.planned = clock.now() - spent, planned

    @property
    def spent(self):
        return clock.now() - self.begun

    def __call__(self, line):
        left = self.planned - self.spent
        ahead = f", about {say_seconds(left)} left" if left > 0 else ""
        print(f"[{say_seconds(self.spent)}{ahead}] {line}", flush=True)


def run(
    *,
    dataset: str,
    network: str = "",
    minutes: float = 10,
    size: int | None = None,
    recipe: str = "",
    methods: Sequence[str] = (),
    device: str = "auto",
    out: str = "",
) -> int:
    """Advise, and write advice.html, recipe.toml, snippet.py, history.csv and, last, advice.json into `out`.

    methods: names of chapter 10's contenders (default: all). recipe: a recipe file, in place of a tuned
    baseline. Interrupted, the same call goes on. Returns the exit code. Raises `BadInput`.

    >>> run(dataset="synthetic", minutes=0.01, out="advice")
    synthetic: 360 training images of 8 x 8, 4 classes; resnet; 0.01 minutes; into advice
    [...] 0.01 minutes are too few for trainings that say something, ...
    advice: recipe.toml, snippet.py
    0
    """
    within("minutes", minutes, "above 0")
    if distributed.several():
        raise BadInput("advise measures in one process")
    for name in methods:
        choose("method", name, [c.name for c in CONTENDERS])
    task, own = _task(dataset, network, size, recipe, device)
    loaded = task.load()
    words = [data.folder_name(task.dataset), task.network, f"{minutes:g}min", *methods]
    words += [f"size={size}"] * bool(size) + [Path(recipe).stem] * bool(recipe)
    folder = paths.make(Path(out) if out else paths.results() / "play" / file_name("advise", *words))
    what = {"task": provenance.settings(task) | {"dataset": loaded.name}, "minutes": minutes}
    what = _plain(what | {"methods": list(methods), "data": loaded.digest})
    state = paths.read_json(folder / "state.json") or {"what": what, "spent": 0.0}
    if not isinstance(state, dict) or state.get("what") != what:
        raise BadInput(f"{folder} holds other advice: name another folder with --out, or delete it")
    side = f"{loaded.shape[2]} x {loaded.shape[1]}"
    images = f"{len(loaded.train)} training images of {side}, {loaded.classes} classes"
    print(f"{loaded.name}: {images}; {task.network}; {minutes:g} minutes; into {folder}", flush=True)
    if (done := paths.read_json(folder / "advice.json")) and isinstance(done, dict):
        print(f"{done['answer']} (it was complete; {folder / 'advice.html'})")
        return 0
    say = _Say(state["spent"])
    advice = _Advice(task, own, loaded, 60 * minutes, tuple(methods), folder, state, say)
    try:
        advice.all()
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    finally:
        if not (folder / "advice.json").exists():
            paths.write(folder / "state.json", {**state, "spent": say.spent})
    return 0


def _plain(value):
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _task(dataset, network, size, recipe, device):
    """(the task, whether its recipe is the user's own)."""
    if recipe:
        if network:
            raise BadInput(f"the network is said by the recipe {recipe}: leave out --network")
        task, methods = recipes.read(recipe, device)
        if methods:
            raise BadInput(
                f"{recipe} has methods: advise starts from the recipe without, leave them out of it"
            )
        task = task.but(dataset=dataset, **({"size": size} if size else {}))
        data.check_name(dataset)
    else:
        task = tasks.task("quick", dataset, network, device=device, size=size)
    # chosen by validation images, so that none of them is trained on
    cut = dict(images=None, validation=1000, whole=False, lengths=LENGTHS, tuned={})
    return task.but(**cut), bool(recipe)


class _Advice:
    """The steps from a task to its advice; what was decided is in `state`, which a later call reads."""

    def __init__(self, task, own, loaded, seconds, methods, folder, state, say):
        self.task, self.own, self.data, self.seconds = task, own, loaded, seconds
        self.methods, self.folder, self.state, self.say = methods, folder, state, say
        batch = min(task.recipe.batch_size, max(1, len(loaded.train) // 8))
        if batch < task.recipe.batch_size:
            self.task = task.but(batch_size=batch)

    def keep(self, **what):
        self.state.update(what, spent=self.say.spent)
        paths.write(self.folder / "state.json", self.state)

    def all(self):
        n = len(self.data.train)
        if n < FEW_IMAGES:
            why = f"{n} training images are too few to compare methods, {FEW_IMAGES} or more are needed"
            return self.only_recipe(why)
        able = self.who()
        plan = self.plan(len(able)) if able else None
        if not able or plan is None:
            return self.only_recipe(self.too_short(2 if able is None else len(able)))
        for c in able[plan.contenders :]:
            self.state["left_out"][c.name] = NO_TIME
        self.task = self.task.but(epochs=plan.epochs, seeds=plan.seeds)
        self.say.planned = self.state["asked"] + plan.seconds
        longest = f"the longest training is {plan.epochs:g} epochs"
        parts = [f"tuning {say_seconds(plan.tuning)}"] * (not self.own)
        parts += [f"screening {plan.contenders} methods {say_seconds(plan.screening)}"]
        parts += [f"measuring the best {say_seconds(plan.measuring)}"]
        self.say(f"plan: {', '.join(parts)}; {longest}, {plan.seeds} seeds a length")
        if not self.own:
            self.tune()
        found = self.screen(able[: plan.contenders])
        self.finish(found, self.measure(found))

    def who(self):
        """The contenders that can take part, from the state if it was asked before."""
        wanted = [c for c in CONTENDERS if (c.name in self.methods if self.methods else c.name != "fp32")]
        wanted.sort(key=lambda c: FIRST.index(c.name) if c.name in FIRST else len(FIRST))
        if "able" in self.state:
            return [c for c in wanted if c.name in self.state["able"]]
        single = [c for c in wanted if not self._stages(c)]
        self.keep(left_out={c.name: STAGES for c in wanted if c not in single})
        if not single:
            self.keep(able=[])
            return []
        few = self.task.but(epochs=2)
        short = search.few(few)
        for _ in range(2):  # what a process does only once is no part of a training
            begun = clock.now()
            base = search.BASELINE.run(short, short.load(), seed=0)
            trial = clock.now() - begun
            extra = trial - base.raw_seconds
            if trial > ASKING * self.seconds / 4:
                break
        images = min(1000, len(self.data.validation)), min(3000, len(self.data.test))
        forward = base.step_seconds / (3 * self.task.recipe.batch_size)
        extra += forward * ((training.EVALUATIONS + 1) * images[0] + images[1])
        self.keep(step=base.step_seconds, extra=extra, asked=self.say.spent)
        if self.plan(min(2, len(single)), self.seconds - self.say.spent) is None:
            return None  # whoever applies, there is no time for them
        some = max(2, int(ASKING * self.seconds / trial))
        asked = f"asking {len(single[:some])} methods if they apply"
        self.say(f"a step takes {1e3 * base.step_seconds:.3g} ms; {asked}")
        able, left_out = search.applicable(few, single[:some], SLOWEST * base.step_seconds)
        left_out |= self.state["left_out"] | {c.name: NO_TIME for c in single[some:]}
        self.keep(able=[c.name for c in able], left_out=left_out, asked=self.say.spent)
        return able

    def _stages(self, contender):
        try:
            return bool(contender.make(self.task).fit)
        except BadInput:
            return False  # said when it is asked

    def plan(self, contenders, seconds=None):
        s, most = self.state, self.task.recipe.epochs if self.own else EPOCHS
        how = dict(step=s["step"], extra=s["extra"], contenders=contenders, most=most, tune=not self.own)
        steps = max(1, len(self.data.train) // self.task.recipe.batch_size)
        if seconds is not None:
            return make_plan(seconds, steps=steps, **how)
        if "plan" not in s:
            left = self.seconds - s["asked"]
            plan = make_plan(left, steps=steps, **how) if contenders else None
            self.keep(plan=plan and asdict(plan))
        return s["plan"] and Plan(**s["plan"])

    def too_short(self, contenders):
        """Why nothing can be planned, and what would do."""
        if not contenders:
            return "no method applies here"
        found = (m for m in (1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 240, 480) if self.plan(contenders, 60 * m))
        minutes = next(found, None)
        if minutes is None and self.own:
            return (
                f"a quarter of the {self.task.recipe.epochs:g} epochs of your recipe is too short to compare"
            )
        need = f"about {minutes + math.ceil(self.state['asked'] / 60)} minutes" if minutes else "many hours"
        return f"{self.seconds / 60:g} minutes are too few for trainings that say something, {need} would do"

    def tune(self):
        """Learning rate x weight decay by successive halving: ever fewer settings, ever longer."""
        settings = [{"lr": lr, "weight_decay": wd} for lr in LRS for wd in DECAYS]
        file, base = self.folder / "tuning.csv", Arm(name="baseline", role="baseline")
        self.say(f"tuning the baseline: {len(settings)} settings")
        workers = 1 if self.data.device.type == "cuda" or self.state["plan"]["tuning"] < 40 else None
        for length, number, seeds in ROUNDS:
            how = dict(file=file, seeds=tuning.SEEDS[:seeds], workers=workers, report=self.say)
            rows = tuning.sweep(self.task.but(lengths=(length,)), base, settings[:number], **how)
            means = {}
            for row in rows:
                value = -math.inf if row["diverged"] or math.isnan(row["accuracy"]) else row["accuracy"]
                means.setdefault(tuple(row["setting"].items()), []).append(value)
            ranked = sorted(means, key=lambda s: -sum(means[s]) / len(means[s]))
            settings = [dict(s) for s in ranked]
        self.task = self.task.but(**settings[0])
        self.keep(tuned=settings[0])
        self.say("tuned: " + ", ".join(f"{k} {v:g}" for k, v in settings[0].items()))

    def screen(self, able):
        found = search.search(
            self.task, able, lengths=SCREENED, seeds=SCREENING, most=ADDITIONS, report=self.say
        )
        self.keep()
        return found

    def measure(self, found) -> Comparison | None:
        """The best methods and their combination against the baseline, at three lengths."""
        singles = found.gainers or found.second
        arms = [c.arm(self.task) for c in singles[:MEASURED]]
        if len(found.parts) > 1:
            arms = [found.best(self.task), *arms[: MEASURED - 1]]
        if not arms:
            return None
        arms = [replace(a, role="method") for a in arms]
        self.say(f"measuring {', '.join(a.name for a in arms)}")
        return compare(self.task, [search.BASELINE, *arms], title="advice")

    def finish(self, found: Found, comparison: Comparison | None):
        arm, answer = (
            search.BASELINE,
            "No method was shown to save time here; the recipe is the tuned baseline.",
        )
        if self.own:
            answer = answer.replace("the tuned baseline", "your own")
        if comparison is not None:
            faster = [v for v in comparison.verdicts() if v.verdict.startswith("faster")]
            if faster:
                use = max(faster, key=lambda v: v.low)
                arm = next(a for a in comparison.arms if a.name == use.arm)
                answer = f"Use {use.arm}: {use.text}."
            else:  # a verdict on times may be withheld, as on a machine that others use
                whys = [v.verdict for v in comparison.verdicts() if not v.verdict.startswith(JUDGED)]
                answer = f"No verdict ({whys[0]}); the recipe is the baseline's." if whys else answer
        task = _as_task(self.task, arm)
        self.write(task, arm.methods, answer)
        whys = {**self.state["left_out"], **found.left_out}
        _page(self.folder, self.data, self.task, found, comparison, arm.name, whys, answer)
        record = {"schema": series.SCHEMA, "status": "complete", "answer": answer, "date": clock.date()}
        record |= {"use": arm.name, "seconds": round(self.say.spent, 1), "left_out": self.state["left_out"]}
        record |= {"verdicts": [v.record() for v in comparison.verdicts()] if comparison else []}
        record |= {"machine": clock.machine(self.task.device), "commit": provenance.commit()}
        record |= {"search": found.rows, "what": self.state["what"], "plan": self.state["plan"]}
        if comparison:
            table = comparison.history().to_csv(index=False, float_format="%.6g")
            paths.write(self.folder / "history.csv", table)
        paths.write(self.folder / "advice.json", record)
        (self.folder / "state.json").unlink(missing_ok=True)
        self.say.planned = 0.0
        said = [comparison.say(a.name) for a in comparison.arms[1:]] if comparison else []
        print(*said, *(f"left out: {name} ({why})" for name, why in whys.items()), sep="\n")
        self.say(answer)
        print(f"{self.folder}: advice.html, recipe.toml, snippet.py, history.csv, advice.json")

    def write(self, task, methods, comment):
        recipes.write(self.folder / "recipe.toml", task, methods, f"effilib train --recipe FILE\n{comment}")
        paths.write(self.folder / "snippet.py", snippet(task, self.data, methods))

    def only_recipe(self, why):
        """Say in a sentence why no more can be said, and write what there is."""
        why += "; the recipe is your own" if self.own else "; the recipe is the preset's, untuned"
        self.write(self.task, (), why)
        self.say(f"{why}.")
        for name, reason in self.state.get("left_out", {}).items():
            print(f"left out: {name} ({reason})")
        print(f"{self.folder}: recipe.toml, snippet.py")


def _as_task(task: Task, arm: Arm) -> Task:
    """The task as an arm trains it at full length, its network's settings among the task's."""
    task = arm.task(task)
    return task.but(widths=task.widths | arm.network)


def snippet(task: Task, dataset: Dataset, methods: Sequence[Method]) -> str:
    """Return Python for one's own loop: network, recipe and methods, and where these take part.

    >>> from effilib.methods.freezing import FrozenPrefix
    >>> task = tasks.task("smoke", "synthetic")
    >>> print(snippet(task, task.load(), [FrozenPrefix()]))
    import torch
    ...
    net = build('resnet', 4, (1, 8, 8), widths=(8, 8, 8), blocks=(1, 1, 1))
    ...
    methods = [FrozenPrefix(at=(0.5,), anneal=False)]
    ...
    """
    imports = sorted({f"from {c.__module__} import {c.__name__}" for m in methods for c in _classes(m)})
    r, plain = task.recipe, Recipe()
    changed = [f"{f.name}={v!r}" for f in fields(r) if (v := getattr(r, f.name)) != getattr(plain, f.name)]
    precision = resolve_precision(r.precision, task.device)
    layout = resolve_layout(r, task.device, task.build(dataset))
    settings = "".join(f", {k}={v!r}" for k, v in task.widths.items())
    ours = task.network in NETWORKS
    build = f"net = build({task.network!r}, {dataset.classes}, {dataset.shape}{settings})"
    more = [f"    # measured in {precision}: GradScaler, or switches of PyTorch, are yours to add"]
    decide = any(type(m).__name__ == "PruneThenGrow" for m in methods)  # looks at images apart
    lines = [
        "import torch", "import torch.nn.functional as F", "",
        f"from effilib import Recipe, attach{', build' * ours}", *imports, "",
        build if ours else f"# net is what {task.network} makes",
        f"recipe = Recipe({', '.join(changed)})  # its schedule sets the learning rate",
        f"methods = [{', '.join(map(repr, methods))}]",
        "", "",
        f"def train(net, loader{', decide' * decide}):  # any network, any DataLoader",
        f"    net.to({task.device!r}, memory_format=torch.{layout})",
        "    epochs = max(1, round(recipe.epochs))",
        "    how = dict(momentum=recipe.momentum, nesterov=recipe.momentum > 0)",
        "    how |= dict(weight_decay=recipe.weight_decay)",
        "    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, **how)",
        *more * (precision not in ("fp32", "bf16")),
        f"    how = dict(recipe=recipe, precision={precision!r}{', decide=decide' * decide})",
        "    run = attach(net, optimizer, methods, steps=epochs * len(loader), loader=loader, **how)",
        "    for _ in range(epochs):",
        "        for x, y in run.read():",
        "            with run.autocast():",
        "                logits = run.model(x).float()",
        "            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)",
        "            run.add_terms(loss, logits).backward()",
        "            run.update()",
        "    return run.model",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _classes(value):
    """The dataclasses by which a method's repr is written."""
    found = {type(value)}
    for f in fields(value):
        if is_dataclass(inner := getattr(value, f.name)):
            found |= _classes(inner)
    return found


def _page(folder, dataset, task, found, comparison, use, whys, answer):
    """Write advice.html: a page as a chapter's, its cells without code. use: the arm that is advised."""
    from effilib import figures, notebook
    from effilib.workbook import report

    with report.light_imports():
        from nbformat import v4, write
    import base64

    import pandas as pd

    def table(frame):
        return v4.new_output("display_data", data={"text/html": notebook.table_html(frame), "text/plain": ""})

    def cell(*outputs):
        return v4.new_code_cell("", outputs=list(outputs), metadata={"tags": ["remove-input"]})

    cells = [v4.new_markdown_cell(f"# What saves time on {dataset.name}\n\n**{answer}**")]
    record = {"status": "complete", "dataset": dataset.name, "network": task.network, "date": clock.date()}
    record |= {"machine": clock.machine(task.device), "schema": series.SCHEMA, "notes": [], "verdicts": []}
    if comparison is not None:
        arm = None if use == search.BASELINE.name else use  # else all of them are shown
        png = base64.b64encode(figures.png(figures.curves(comparison, arm))).decode()
        picture = v4.new_output("display_data", data={"image/png": png, "text/plain": ""})
        words = "\n".join(f"- {line}" for line in (comparison.say(a.name) for a in comparison.arms[1:]))
        cells += [
            v4.new_markdown_cell("## Accuracy over time\n\nEvery mark is a whole training."),
            cell(picture),
        ]
        cells += [v4.new_markdown_cell(f"## Verdicts\n\n{words}"), cell(table(comparison.table()))]
        record |= {"verdicts": [v.record() for v in comparison.verdicts()], "notes": comparison.notes()}
    cells += [v4.new_markdown_cell("## The search that led there"), cell(table(found.table()))]
    if whys:
        frame = pd.DataFrame({"why": whys}).rename_axis("left out")
        cells += [v4.new_markdown_cell("## What was left out, and why"), cell(table(frame))]
    for title, name, kind in (
        ("The recipe", "recipe.toml", "toml"),
        ("Your own loop", "snippet.py", "python"),
    ):
        text = (folder / name).read_text(encoding="utf-8")
        cells.append(v4.new_markdown_cell(f"## {title}: {name}\n\n```{kind}\n{text}```"))
    buffer = io.StringIO()
    write(v4.new_notebook(cells=cells), buffer)
    book = paths.write(folder / ".advice.ipynb", buffer.getvalue())
    report.render(book, folder / "advice.html", record, alone=True)
    book.unlink()
