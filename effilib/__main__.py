"""The command line, also as `python -m effilib`.

`run` executes the series, `record` keeps its results, `list` shows it, `train` trains once without a
notebook, `predict` tells what a network says of new pictures, `advise` finds which methods save time on your
data, `tune` tunes a baseline. What is heavy is imported by the command that needs it: `--help` is instant.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import effilib
from effilib.errors import BadInput, choose

__all__ = ["main"]

EPILOG = """\
examples:
  effilib run                                   the whole series, preset quick, embedded data
  effilib run 02 3_1 03_2_mixed_precision       some of it
  effilib run -p dataset fashion_mnist          on another data set (mnist5k, cifar10, ..., or a path)
  effilib run 3_2 -p network mine.py:net        on your own network
  effilib run --preset study --compare recorded the recorded experiment again

A second call runs only what is missing, failed or changed.
"""

TRAIN = """\
examples:
  effilib train                                               the baseline, preset quick, embedded data
  effilib train --method prune_train ratio=0.3 every=2        one method, two of its settings changed
  effilib train --method kernel_rescaling --method net2net at=0.5 wider=1.5         two at once
  effilib train --dataset cifar10 --preset study --set epochs=10 batch_size=128 --seed 3
  effilib train --dataset photos --size 64 --out mine         your own pictures, in photos/train/<class>/ ...
  effilib predict mine/model.pt new/ IMG_1.jpg                ... and then what it says of others
  effilib train --recipe recipe.toml --seed 1                 what effilib advise found
  effilib train --preset speed_run                            chapter 11's recipe for CIFAR-10
  effilib train --method mine.py:Mine rate=0.1 --network mine.py:net                your own
  torchrun --nproc-per-node=4 -m effilib train --preset full  one training over four GPUs

Settings are Python literals; an unknown name is answered with the choices. A training that was interrupted,
or killed, goes on from its last whole epoch when the same command is given again.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `BadInput`: one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} ({self.prog} --help shows what there is)")


def parser() -> Parser:
    """Return the command line's parser."""
    top = Parser(
        prog="effilib",
        description="Time-efficient training of convolutional neural networks: every method measured "
        "under one protocol.",
        epilog="effilib COMMAND --help says what a command does, and how.",
    )
    top.add_argument("--version", action="version", version=f"effilib {effilib.__version__}")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="{run,record,list,train,predict,advise,tune}"
    )

    formatter = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser(
        "run",
        help="execute notebooks and build their report",
        description="Execute notebooks, all or some, and build a page with their verdicts.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    _which(run)
    run.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="notebooks at a time; above 1 time verdicts are withheld (default: 1)",
    )
    run.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="run on the workers of this dask scheduler (tcp://head:8786) instead: a notebook a GPU "
        "(dask worker --resources GPU=1), else a notebook a thread, and one a machine if times are to count; "
        "they need the same versions, but no shared files",
    )
    run.add_argument(
        "--timeout", type=int, metavar="SECONDS", help="for one cell (default: by preset, 1200 for quick)"
    )
    run.add_argument(
        "--compare",
        choices=["recorded"],
        help="say whether each ratio lies where a repetition of the recorded run would",
    )
    run.set_defaults(call=run_series)

    record = commands.add_parser(
        "record",
        help="copy a run's results into results/recorded and update the README",
        description="Copy a run's results into results/recorded, to be committed, and update the README.",
    )
    _which(record)
    record.set_defaults(call=keep_results)

    said = "show the series, and what is recorded of it"
    show = commands.add_parser("list", help=said, description=f"{said.capitalize()}.")
    show.set_defaults(call=show_series)

    train = commands.add_parser(
        "train",
        help="train once, without a notebook",
        description="Train a network once, with any methods, and keep the model and its history.",
        epilog=TRAIN,
        formatter_class=formatter,
    )
    train.add_argument(
        "--method",
        dest="methods",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "SETTING=VALUE"),
        help="a method and settings of it; may be repeated (default: none, the baseline)",
    )
    _task(train, more=", or speed_run: chapter 11's own network and recipe, which excludes --network")
    train.add_argument(
        "--network",
        default="",
        help="resnet, vgg, convnet, speed_run, or a path such as torchvision.models:resnet18 or mine.py:net",
    )
    train.add_argument(
        "--epochs", type=float, metavar="N", help="length of the schedule (default: the preset's)"
    )
    train.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the initial weights, the data's order and all draws (default: 0)",
    )
    train.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the recipe (lr=0.1, batch_size=128, precision=fp32, augmentation=none, ...), "
        "or images, validation, widths",
    )
    train.add_argument(
        "--recipe",
        default="",
        type=os.path.expanduser,
        metavar="FILE",
        help="a recipe file, as advise writes them: data, network, settings and methods",
    )
    train.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    train.add_argument(
        "--checkpoint",
        default="",
        type=os.path.expanduser,
        metavar="FILE",
        help="written after every epoch (default: in --out, until the end)",
    )
    train.add_argument(
        "--out",
        default="",
        type=os.path.expanduser,  # of --out=~/mine no shell does it
        metavar="FOLDER",
        help="for history.csv, model.pt and record.json (default: in results/play)",
    )
    train.set_defaults(call=train_once)

    said = "classify new pictures with a trained network"
    predict = commands.add_parser("predict", help=said, description=f"{said.capitalize()}.")
    predict.add_argument("model", type=os.path.expanduser, help="the model.pt that train wrote")
    predict.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="files, or folders with all below them"
    )
    predict.add_argument(
        "--network", default="", help="the path of your own, as it was trained (mine.py:net)"
    )
    predict.add_argument(
        "--out",
        default="",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="for predictions.csv and predictions.png (default: the model's)",
    )
    predict.set_defaults(call=predict_classes)

    advise = commands.add_parser(
        "advise",
        help="find which methods save time on your images, network and machine; goes on if interrupted",
        description="Find which methods save time on your images, network and machine: tune a baseline, "
        "try the methods, and measure the best and their combination. It ends in a page, a recipe for "
        "`effilib train` and a snippet for your own loop. If it is interrupted, run the same command again.",
    )
    advise.add_argument("dataset", metavar="DATA", help="mnist5k, cifar10, ..., or the path of your own")
    advise.add_argument("--network", default="", help="as for train (default: resnet)")
    advise.add_argument("--minutes", type=float, default=10, metavar="N", help="time budget (default: 10)")
    advise.add_argument("--size", type=int, metavar="PX", help="side in pixels to which images are resized")
    advise.add_argument(
        "--recipe",
        default="",
        type=os.path.expanduser,
        metavar="FILE",
        help="your own recipe, as the baseline: it is not tuned then",
    )
    advise.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help='try only these contenders, e.g. resizing "whitening stem" (default: all of chapter 10)',
    )
    advise.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    advise.add_argument(
        "--out",
        default="",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="for advice.html, recipe.toml and snippet.py (default: in results/play)",
    )
    advise.set_defaults(call=advise_once)

    tune = commands.add_parser(
        "tune",
        help="tune a baseline, or a chapter's arms: a grid, several seeds; goes on where it stopped",
        description="Tune a task's baseline, or all arms of a chapter alike: train every setting of a grid "
        "with several seeds, or what is missing of it, and say what is best at each length. The baseline's "
        "grid has 16 learning rates x weight decays, a chapter's half, once and twice the baseline's rate.",
    )
    tune.add_argument("chapter", nargs="?", default="", metavar="NN", help="a chapter, such as 04_2")
    _task(tune)
    tune.add_argument(
        "--epochs",
        type=float,
        nargs="+",
        metavar="N",
        help="lengths of the schedule in epochs (default: those of the preset)",
    )
    tune.add_argument("--lr", dest="lrs", type=float, nargs="+", metavar="LR", help="learning rates")
    tune.add_argument(
        "--weight-decay", dest="decays", type=float, nargs="+", metavar="WD", help="weight decays"
    )
    tune.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="seeds, which are not those of measurements"
    )
    tune.set_defaults(call=tune_arms)
    return top


def _task(command, more=""):
    """The options that say what is trained. more: about presets."""
    what = "smoke, quick, study or full: network and recipe (default: EFFILIB_PRESET, else quick)"
    command.add_argument("--preset", default="", help=what + more)
    command.add_argument(
        "--dataset",
        default="",
        help="mnist5k, fashion_mnist, cifar10, ..., or a path (default: the preset's)",
    )
    command.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="side in pixels to which images are resized (default: theirs; of large pictures 32)",
    )
    command.add_argument(
        "--variant", default="base", help="base, or wide: what pruning and growing start from (default: base)"
    )


def _which(command):
    """The options that say which notebooks, and which results."""
    command.add_argument(
        "selectors",
        nargs="*",
        metavar="NN",
        help="notebooks by the beginning of their names: 02, 3_1, 03_2_mixed (default: all)",
    )
    command.add_argument(
        "--preset", default="", help="smoke, quick, study or full (default: EFFILIB_PRESET, else quick)"
    )
    command.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks, such as a dataset; may be repeated",
    )
    command.add_argument(
        "--name",
        default="",
        help="name of the folder below results/ (default: made of preset, data set and parameters)",
    )
    command.add_argument(
        "--notebooks", type=os.path.expanduser, metavar="FOLDER", help="the notebooks of another folder"
    )


def run_series(compare: str | None, **settings: Any) -> int:
    """Execute notebooks: `effilib run`. Returns the runner's exit code."""
    from effilib.workbook import runner

    return runner.run(compare=bool(compare), **settings)


def keep_results(**which: Any) -> int:
    """Keep results: `effilib record`. Say what was kept where."""
    _needs_checkout("record")
    from effilib.workbook import runner

    for place in runner.keep(**which):
        print(f"recorded: {place}")
    return 0


def _needs_checkout(command):
    """Raise `BadInput` where what is recorded belongs to an installed package."""
    from effilib import paths

    if paths.recorded() == Path(effilib.__file__).with_name("recorded"):
        raise BadInput(
            f"{command} keeps results to be committed, in a checkout of effilib"
            " (EFFILIB_RECORDED names another folder)"
        )


def show_series() -> int:
    """Show each chapter with its notebook and what is recorded of it: `effilib list`."""
    from effilib.workbook import series

    recorded = series.recorded()
    for chapter in series.CHAPTERS:
        records = recorded.get(chapter.stem, []) if chapter.exists else []
        results = [f"{record['folder'].parent.name} {series.say(record)}".strip() for record in records]
        state = ("; ".join(results) or "nothing recorded") if chapter.exists else "no notebook yet"
        print(f"{chapter.number:6}{chapter.title:34}{chapter.stem:37}{state}")
    return 0


def train_once(epochs: float | None, size: int | None, settings: list[str], **words: Any) -> int:
    """Train once: `effilib train`. Returns its exit code."""
    from effilib.workbook import train_command

    more = [f"{k}={v}" for k, v in (("epochs", epochs), ("size", size)) if v is not None]
    return train_command.run(settings=[*settings, *more], **words)


def predict_classes(**words: Any) -> int:
    """Tell the classes of new pictures: `effilib predict`. Returns its exit code."""
    from effilib.workbook import predict

    return predict.run(**words)


def advise_once(**words: Any) -> int:
    """Find which methods save time on a user's data: `effilib advise`. Returns its exit code."""
    from effilib.workbook import advise

    return advise.run(**words)


def tune_arms(
    chapter: str,
    preset: str,
    dataset: str,
    variant: str,
    size: int | None,
    epochs: list[float] | None,
    **grid: Any,
) -> int:
    """Run what is missing of a sweep and say what is best at each length: `effilib tune`."""
    _needs_checkout("tune")
    from effilib import tasks, tuning
    from effilib.workbook import series

    task = tasks.task(preset, dataset, variant=variant, size=size)  # complains before anything is written
    arms, what = [tuning.BASELINE], {}
    if chapter:
        sweeps = series.tunable()
        task = sweeps[choose("chapter to tune", chapter, sweeps)].task(task)
        rates = [factor * task.recipe.lr for factor in tuning.FACTORS]
        what = dict(name=chapter, lrs=rates, decays=[task.recipe.weight_decay])
        arms = sweeps[chapter].arms(task)
    if epochs:
        task = task.but(epochs=max(epochs), lengths=tuple(e / max(epochs) for e in sorted(epochs)))
    rows = tuning.tune(task, arms, **what | {name: values for name, values in grid.items() if values})
    for arm in arms:
        for row in tuning.best([r for r in rows if r["arm"] == arm.name]):
            settings = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
            accuracy = f"{row['accuracy']:.2f} %, at least {row['low']:.2f} % (n={row['n']})"
            print(f"{arm.name}, {row['epochs']:g} epochs: {accuracy} with {settings}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0 all complete or skipped, 1 something failed, 2 bad input, 130 interrupted,
    141 nobody reads what is said.
    """
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    process = int(os.environ["RANK"]) if several else None
    # To be ended is to be interrupted: nothing is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # not every locale has every character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if sys.path[0] in ("", os.getcwd()):  # `python -m` puts it there; no file in it shadows a module
        sys.path.append(sys.path.pop(0))
    try:
        if os.path.expanduser("~") == "~":  # a user id without an account, as containers have
            raise BadInput("this user has no home folder: set HOME to a folder, for caches and settings")
        arguments = vars(parser().parse_args(argv))
        if (command := arguments.pop("command")) != "train" and process is not None:
            raise BadInput(f"{command} is one process: of the commands torchrun starts train alone")
        if sys.platform == "win32" and command in ("run", "record"):
            raise BadInput(
                f"{command} needs Linux or macOS: on Windows use WSL, or open a notebook in Jupyter"
            )
        code = arguments.pop("call")(**arguments)
        sys.stdout.flush()
        return code
    except BadInput as error:
        print(f"effilib: {f'process {process}: ' if process else ''}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read what is said has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
