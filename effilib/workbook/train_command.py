"""`effilib train`: one training without a notebook, with any methods, on any data set. It goes on where it
was interrupted.

A method is named as its class is, in lower case (`prune_train`), or by the path of a user's own
(`mine.py:Mine`); its settings are the fields of its dataclass, `name=value`. Under `torchrun` the processes
train together, and rank 0 speaks and writes.
"""

import ast
import dataclasses
import enum
import importlib
import inspect
import io
import math
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from effilib import checkpoint, clock, distributed, models, paths, provenance, tasks, training
from effilib import methods as package
from effilib.caveats import LOPSIDED, caveats
from effilib.chapters import speed_run
from effilib.data import check_name, folder_name
from effilib.dataset import Dataset
from effilib.distributed import Ranks
from effilib.errors import BadInput, NoEffect, choose, out_of_memory
from effilib.history import History
from effilib.hooks import Method, check_methods
from effilib.progress import say_seconds
from effilib.recipe import Recipe, resolve_layout
from effilib.statistics import binomial_error
from effilib.tasks import Task

__all__ = ["cautions", "make", "make_task", "method", "methods", "name_of", "run"]

FILES = ("history.csv", "model.pt")  # beside record.json, which says that they are complete

# Methods and settings, from words


def methods() -> dict[str, type[Method]]:
    """Return the methods of the library by name: "prune_train" -> `PruneTrain`.

    >>> methods()["prune_train"].__name__
    'PruneTrain'
    """
    names = [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]
    found = [getattr(m, n) for m in map(importlib.import_module, names) for n in m.__all__]
    own = [c for c in found if inspect.isclass(c) and c.__module__ in names]
    return {snake(c.__name__): c for c in own if issubclass(c, Method)}


def snake(name):
    """ "PruneTrain" -> "prune_train".

    >>> snake("PruneTrain")
    'prune_train'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def method(name: str, *texts) -> Method:
    """Return a method by name, with settings such as "ratio=0.2".

    Raises `BadInput` for what is unknown, or of another type.

    >>> method("prune_train", "ratio=0.3").ratio
    0.3
    """
    if ":" in name:
        cls = models.find(name, "method")
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise BadInput(f"{name} is no effilib.Method")
    else:
        known = methods()
        if name not in known and hasattr(package, name):  # the name of a module
            inside = [n for n, c in known.items() if c.__module__.startswith(f"{package.__name__}.{name}")]
            choices = (
                f"choose {' or '.join(inside)}"
                if inside
                else "it is more than one training, see its notebook"
            )
            raise BadInput(f"{name} is no method: {choices}")
        cls = known[choose("method", name, known)]
    return check_methods([make(cls, name, texts)])[0]


def name_of(method: Method) -> str:
    """Return the name by which `--method` and recipe files know a method.

    >>> name_of(methods()["prune_train"]())
    'prune_train'
    """
    cls = type(method)
    if cls.__module__.startswith(package.__name__):
        return snake(cls.__name__)
    return f"{inspect.getsourcefile(cls) or cls.__module__}:{cls.__name__}"


def make(cls: type, what: str, texts: Sequence[str], base: object = None) -> object:
    """Make a dataclass's instance with settings in `texts`, "name=value".

    "name.inner=value" sets what is within another dataclass. base: the instance from which all other settings
    come.

    >>> make(Recipe, "the recipe", ["lr=0.5", "precision=fp32"]).lr
    0.5
    """
    fields = [f.name for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []
    try:
        hints, inner, values = typing.get_type_hints(cls), {}, {}
    except NameError as error:  # of a name that is imported for type checkers only
        raise BadInput(f"{what}: the type of a setting is unknown when it runs ({error})") from error
    for text in texts:
        name, equals, value = text.partition("=")
        name, _, rest = name.strip().partition(".")
        if not equals:
            raise BadInput(f"{what}: {text!r} is no setting, expected name=value")
        choose(f"setting of {what}", name, fields or ["none, it has no settings"])
        if rest:
            inner.setdefault(name, []).append(f"{rest}={value}")
        else:
            values[name] = read(what, name, value, hints[name])
    try:
        new = dataclasses.replace(base, **values) if base else cls(**values)
        for name, texts in inner.items():
            part = getattr(new, name)
            if not dataclasses.is_dataclass(part):
                raise BadInput(f"setting {name!r} of {what} has no settings of its own")
            new = dataclasses.replace(new, **{name: make(type(part), f"{what}'s {name}", texts, part)})
    except BadInput:
        raise
    except Exception as error:  # a user's own class can fail in any way
        raise BadInput(f"{what}: {error}") from error
    return new


def read(what, name, text, hint):
    """The value that `text` writes as a Python literal, or else as a plain word.

    Raises `BadInput` if it is not of the type `hint`.

    >>> read("the recipe", "epochs", "2.5", float)
    2.5
    """
    try:
        value = frozen(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError):
        value = text
    either = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if either else (hint,)
    choices = {str(c): c for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)}
    choices |= {m.name: m for k in kinds if inspect.isclass(k) and issubclass(k, enum.Enum) for m in k}
    if text in choices:
        return choices[text]
    for candidate in (value, text):  # a number may be meant as a word
        for kind in (typing.get_origin(k) or k for k in kinds):
            if type(candidate) is kind or (kind is float and type(candidate) is int) or kind is typing.Any:
                return candidate
    if choices and len(kinds) == 1:
        choose(f"{name} of {what}", text, choices)
    said = " or ".join(
        " or ".join(map(repr, typing.get_args(kind)))
        if typing.get_origin(kind) is typing.Literal
        else getattr(kind, "__name__", str(kind))
        for kind in kinds
    )
    raise BadInput(f"setting {name!r} of {what} takes values of type {said}, not {text!r}")


def frozen(value):
    """Lists as tuples, also within: settings are hashed.

    >>> frozen([1, [2, 3]])
    (1, (2, 3))
    """
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


# The training


def run(
    *,
    methods: Sequence[Sequence[str]] = (),
    dataset: str = "",
    preset: str = "",
    network: str = "",
    variant: str = "base",
    settings: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    checkpoint: str = "",
    out: str = "",
    recipe: str = "",
) -> int:
    """Train, and write history.csv, model.pt and, last, record.json into `out`.

    Returns the exit code: 0 complete, 130 interrupted. methods: a list of [name, "setting=value", ...].
    settings: of the task or its recipe, "name=value". recipe: a file (`recipes`) that says all of it but
    data set and settings, which can be changed; so does the preset "speed_run", chapter 11's recipe. Raises
    `BadInput`.

    >>> run(preset="smoke", dataset="synthetic", settings=["epochs=1"], out="mine")
    synthetic, 128 images of 8 x 8, resnet; no method; 1 epochs, batches of 32; into mine
    epoch 1 of 1: ...
    ...
    mine: history.csv, model.pt, record.json
    0
    """
    if recipe or preset == speed_run.NETWORK:
        from effilib.workbook import recipes

        given = {"method": methods, "network": network, "variant": variant != "base"}
        given["preset"] = recipe and preset
        what = f"--recipe {recipe}" if recipe else f"--preset {preset}"
        for name in (name for name, value in given.items() if value):
            raise BadInput(f"--{name} and {what} exclude each other")
        task, chosen = recipes.read(recipe, device) if recipe else speed_run.recipe(device)
        task = with_settings(task.but(dataset=dataset) if dataset else task, settings)
        check_name(task.dataset)
        methods = [[name_of(m)] for m in chosen]
    else:
        chosen = [method(*words) for words in methods]
        task = make_task(preset, dataset, network, variant, device, settings)
    ranks = distributed.ranks(task.device)
    folder = Path(out) if out else default_folder(task, words_of(methods, recipe), settings, seed, ranks.size)
    file = Path(checkpoint) if checkpoint else folder / "checkpoint.pt"
    data = load(task, ranks)
    asked = task.recipe.flips == "alternating" and any(text.startswith("flips") for text in settings)
    if asked and not data.flipped(task.recipe.augmentation):
        raise BadInput(f"flips=alternating: {data.name} is not mirrored; augmentation=crop+flip mirrors it")
    named = [task.network, *(words[0] for words in methods)]
    what = {
        "methods": provenance.settings(chosen),
        "task": provenance.settings(task) | {"dataset": data.name},  # known by its digest, wherever it lies
        "seed": seed,
        "processes": ranks.size,
        "data": data.digest,
        "code": provenance.digest(
            [provenance.named_source(name) for name in named],
            provenance.source(chosen, always=("effilib.training",)),
        ),
    }
    what = ranks.agree(what)  # the device is each one's own

    def say(words):
        if ranks.rank == 0:
            print(words, flush=True)

    before = ranks.first(lambda: complete(folder, what, file))
    if before:
        say(f"{headline(before)}; it was complete, {folder / 'record.json'} says so")
        return 0
    started = {"schema": 2, "status": "running", "run": what}
    ranks.first(lambda: paths.write(folder / "record.json", started))
    say(f"{plan(task, data, chosen, ranks.size)}; into {folder}")
    if file.exists():
        say(f"goes on from {file}")
    begun = clock.now()
    try:
        model, history = fit(task, data, chosen, seed, file, Epochs(task.recipe.epochs, say, task.whole))
    except KeyboardInterrupt:
        say(
            f"interrupted; the same command goes on from the last whole epoch ({file})"
            if file.exists()
            else "interrupted"
        )
        return 130
    except BadInput:  # nothing was trained, or the checkpoint says how far
        if ranks.rank == 0 and not file.exists():
            (folder / "record.json").unlink(missing_ok=True)
        raise
    record = {**started, "status": "complete", **summary(history, model, data, task)}
    record["duration_s"] = round(clock.now() - begun, 1)
    ranks.first(lambda: write(folder, record, history, model, data, task))
    if not checkpoint:
        ranks.first(lambda: file.unlink(missing_ok=True))
    say("\n".join([headline(record), *cautions(history)]))
    say(f"{folder}: history.csv, model.pt, record.json")
    return 0


def default_folder(
    task: Task, methods: Sequence[str], settings: Sequence[str], seed: int, processes: int
) -> Path:
    """Return where results go if no folder is named: one for each run, below the results' `play`.

    >>> default_folder(tasks.task("smoke", "synthetic"), [], [], seed=0, processes=1).name
    'train-smoke-synthetic-resnet-baseline-seed=0'
    """
    several = [f"processes={processes}"] * (processes > 1)
    words = [
        task.preset,
        folder_name(task.dataset),
        task.network,
        *(methods or ["baseline"]),
        *settings,
        *several,
        f"seed={seed}",
    ]
    files = [w.rpartition(":")[0] for w in [task.network, *methods] if ".py:" in w]
    if files:  # a/mine.py and b/mine.py are two
        words.append(provenance.digest([str(Path(f).expanduser().resolve()) for f in files])[:4])
    return paths.results() / "play" / file_name("train", *words)


def words_of(methods, recipe):
    """What names a run's methods: the words of the command line, or a recipe file's name and content."""
    if recipe:
        return [Path(recipe).stem, provenance.digest(Path(recipe).read_text(encoding="utf-8"))[:6]]
    return [word for words in methods for word in words]


def complete(folder: Path, what: dict, checkpoint: Path) -> dict | None:
    """Return the record of this run if it is complete in `folder`, else None.

    Raises `BadInput` if another run's lies there: of other settings, or of the same with code or data that
    changed since, complete or with a checkpoint to go on from.

    >>> print(complete("mine", what={}, checkpoint=Path("checkpoint.pt")))
    None
    """
    record = paths.read_json(paths.make(folder) / "record.json") or {}
    done = record.get("status") == "complete" and all((folder / name).exists() for name in FILES)
    if record.get("run") == what:
        return record if done else None
    if not record or not (done or checkpoint.exists()):
        return None
    other = {k for k, v in what.items() if record.get("run", {}).get(k) != v}
    if other <= {"code", "data"}:
        said = "the code of a method, the network or effilib" if "code" in other else "the data set"
        raise BadInput(
            f"{folder} holds {'a' if done else 'an interrupted'} run from before {said} was changed: undo"
            " that, name another folder with --out, or delete this one"
        )
    raise BadInput(f"{folder} holds another run: name another folder with --out, or delete it")


def load(task: Task, ranks: Ranks) -> Dataset:
    """Load the data set, on rank 0 first: what is downloaded or cached is written once.

    >>> load(tasks.task("smoke", "synthetic"), distributed.ALONE).name
    'synthetic'
    """
    loaded = []
    ranks.first(lambda: loaded.append(task.load()))
    return loaded[0] if loaded else task.load()


def plan(task: Task, data: Dataset, methods: Sequence[Method], processes: int) -> str:
    """Say what is going to be trained, in a line.

    >>> task = tasks.task("smoke", "synthetic")
    >>> plan(task, task.load(), [], processes=1)
    'synthetic, 128 images of 8 x 8, resnet; no method; 2 epochs, batches of 32'
    """
    shared = f", shared by {processes} processes" if processes > 1 else ""
    how = f"{task.recipe.epochs:g} epochs, batches of {task.recipe.batch_size}{shared}"
    what = ", ".join(map(repr, methods)) or "no method"
    images = f"{len(data.train)} images of {data.shape[2]} x {data.shape[1]}"
    return f"{data.name}, {images}, {task.network}; {what}; {how}"


def fit(
    task: Task,
    data: Dataset,
    methods: Sequence[Method],
    seed: int,
    file: Path | None,
    progress: Callable[[dict], None] | None,
) -> tuple[nn.Module, History]:
    """Return the trained model and its history, with an evaluation an epoch for whoever watches.

    What a user can help is `BadInput`.

    >>> task = tasks.task("smoke", "synthetic", epochs=1)
    >>> model, history = fit(task, task.load(), [], seed=0, file=None, progress=None)
    >>> history.diverged
    False
    """
    model, evaluations = task.build(data, seed), max(1, math.ceil(task.recipe.epochs))
    try:
        history = training.train(
            model,
            data,
            task.recipe,
            methods,
            seed,
            checkpoint=file,
            evaluations=evaluations,
            progress=progress,
        )
    except NoEffect as error:
        raise BadInput(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        why = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        raise BadInput(f"out of memory{why}; a smaller batch needs less: --set batch_size=...") from error
    return model, history


def make_task(
    preset: str, dataset: str, network: str, variant: str, device: str, settings: Sequence[str]
) -> Task:
    """Make the task from words; settings: of it or its recipe.

    >>> make_task("smoke", "synthetic", "", "base", "auto", ["lr=0.5"]).recipe.lr
    0.5
    """
    check_settings(settings)
    return with_settings(tasks.task(preset, dataset, network, variant, device=device), settings)


OWN = ("images", "size", "validation", "widths")  # settings of the task; all others are of its recipe


def check_settings(settings):
    """Raise `BadInput` for a setting that is neither the task's nor its recipe's."""
    for text in settings:
        choose("setting", text.partition("=")[0], [*OWN, *(f.name for f in dataclasses.fields(Recipe))])


def with_settings(task, settings):
    """The task with settings, "name=value"."""
    check_settings(settings)
    own = [text for text in settings if text.partition("=")[0] in OWN]
    task = make(tasks.Task, "the task", own, task)
    rest = [text for text in settings if text not in own]
    return dataclasses.replace(task, recipe=make(Recipe, "the recipe", rest, task.recipe))


def file_name(*words) -> str:
    """Return words as the name of a file or folder, not too long.

    >>> file_name("quick", "mine.py:Mine")
    'quick-mine.py_Mine'
    """
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(words))
    return name if len(name) <= 150 else f"{name[:130]}-{provenance.digest(name)[:8]}"


class Epochs:
    """Says after every evaluation how far a training has come, and how long the rest takes.

    By what was done in this process. whole: the images of these evaluations are trained on.

    >>> Epochs(2, print)({"epoch": 1, "train_loss": 0.5, "loss": 0.6, "accuracy": 80.0})
    epoch 1 of 2: training loss 0.5000, validation loss 0.6000, 80.00 %
    """

    def __init__(self, epochs, say, whole=False):
        self.epochs, self.say, self.first = epochs, say, None
        self.what = "in evaluation of training images" if whole else "validation loss"

    def __call__(self, row):
        now, epoch = clock.now(), row["epoch"]
        self.first = self.first or (now, epoch)
        (begun, start), left = self.first, ""
        if start < epoch < self.epochs:
            left = f"; about {say_seconds((now - begun) / (epoch - start) * (self.epochs - epoch))} left"
        losses = f"training loss {row['train_loss']:.4f}, {self.what} {row['loss']:.4f}"
        whole = max(self.epochs, epoch)  # at least one step is trained
        self.say(f"epoch {epoch:.4g} of {whole:.4g}: {losses}, {row['accuracy']:.2f} %{left}")


# What is written


def summary(history: History, model: nn.Module, data: Dataset, task: Task) -> dict:
    """Return what a record says of a run, as plain values.

    >>> task = tasks.task("smoke", "synthetic", epochs=1)
    >>> data = task.load()
    >>> model, history = fit(task, data, [], seed=0, file=None, progress=None)
    >>> summary(history, model, data, task)["dataset"]
    'synthetic'
    """
    names = (
        "accuracy", "single_crop", "test_accuracy", "balanced_accuracy", "held_out", "majority", "diverged",
        "seconds", "raw_seconds", "steps", "kinds", "flops", "memory", "precision", "structure", "events",
    )  # fmt: skip
    return {
        "dataset": data.name,
        "network": task.network,
        "classes": list(data.names),
        "shape": list(data.shape),
        **{name: getattr(history, name) for name in names},
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": clock.machine(data.device),
        "commit": provenance.commit(),
        "date": clock.date(),
        "notes": [data.note] * bool(data.note) + cautions(history),
    }


def headline(record: dict) -> str:
    """Return a record in a line.

    >>> record = dict(accuracy=90, held_out=200, test_accuracy=89, steps=10, seconds=2.0)
    >>> headline({**record, "parameters": 1234, "diverged": False})
    '90.00 ± 2.12 % of 200 held-out images (89.00 % of those for testing), 10 steps in 2.0 s, ...'
    """
    error = binomial_error(record["accuracy"], record["held_out"])
    end = "diverged: " if record["diverged"] else ""
    accuracy = (
        f"{record['accuracy']:.2f} ± {error:.2f} % of {record['held_out']} held-out images"
        f" ({record['test_accuracy']:.2f} % of those for testing)"
    )
    if record.get("single_crop") is not None:
        accuracy += f", {record['single_crop']:.2f} % without the views"
    cost = f"{record['steps']} steps in {say_seconds(record['seconds'])}"
    return f"{end}{accuracy}, {cost}, {record['parameters']:,} parameters"


def cautions(history: History) -> list[str]:
    """Return what keeps an accuracy from saying much: few steps or images, rare classes.

    >>> uneven = dict(final=82.0, balanced_accuracy=55.0, held_out=50, majority=82.0, classes=2)
    >>> for sentence in cautions(History(steps=100, **uneven)):
    ...     print(sentence)
    One of 50 held-out images is 2.0 points: smaller differences cannot be seen.
    The largest class has 82 % of the images. Always naming it is right as often.
    Accuracy by class is 55.00 % in the mean.
    That is no better than always naming the largest class (82 %).
    """
    share, held_out, classes = history.majority, history.held_out, history.classes
    said = caveats(steps=history.steps, held_out=held_out, majority=share, classes=classes)
    if share > LOPSIDED * 100 / classes:
        said.append(f"Accuracy by class is {history.balanced_accuracy:.2f} % in the mean.")
    if history.accuracy <= share:
        said.append(f"That is no better than always naming the largest class ({share:.0f} %).")
    return said


def write(folder: Path, record: dict, history: History, model: nn.Module, data: Dataset, task: Task) -> None:
    """Write the three files, each atomically; the record, which says that they are complete, is the last.

    >>> task = tasks.task("smoke", "synthetic", epochs=1)
    >>> data = task.load()
    >>> model, history = fit(task, data, [], seed=0, file=None, progress=None)
    >>> write(paths.make("mine"), {"status": "complete"}, history, model, data, task)
    >>> sorted(file.name for file in Path("mine").iterdir())
    ['history.csv', 'model.pt', 'record.json']
    """
    import pandas as pd

    table = io.StringIO()
    columns = ["step", "epoch", "seconds", "lr", "train_loss", "loss", "accuracy"]
    pd.DataFrame(history.rows)[columns].to_csv(table, index=False, float_format="%.6g")
    paths.write(folder / "history.csv", table.getvalue())
    layout = resolve_layout(task.recipe, data.device)
    checkpoint.save_model(folder / "model.pt", model, task.network, data, layout=layout)
    paths.write(folder / "record.json", record)
    try:
        checkpoint.load_model(folder / "model.pt", task.network)
    except BadInput as error:
        print(f"model.pt holds weights that no network by name takes: {error}", file=sys.stderr)
