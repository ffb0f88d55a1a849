"""The command line: `effilib run` executes the series, `effilib list` shows it. Also `python -m effilib`."""

import argparse
import sys

import effilib
from effilib.errors import BadInput

EPILOG = """\
examples:
  effilib run                                   the whole series, preset quick, embedded data
  effilib run 02 3_1 03_2_mixed_precision       some of it
  effilib run -p dataset fashion_mnist          on another data set (mnist5k, cifar10, ..., or a path)
  effilib run 3_2 -p network mine.py:net        on your own network
  effilib run --preset study --compare recorded the recorded experiment again

A second call runs only what is missing, failed or changed.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `BadInput`: one line, like all others."""

    def error(self, message):
        raise BadInput(f"{message} ({self.prog} --help shows what there is)")


def parser():
    """The command line's parser."""
    top = Parser(prog="effilib", description=effilib.__doc__)
    top.add_argument("--version", action="version", version=f"effilib {effilib.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{run,list}")

    formatter = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser("run", help="execute notebooks and build their report", epilog=EPILOG, formatter_class=formatter)
    run.add_argument(
        "selectors", nargs="*", metavar="NN", help="notebooks by the beginning of their names: 02, 3_1, 03_2_mixed (default: all)"
    )
    run.add_argument("--preset", default="", help="smoke, quick, study or full (default: EFFILIB_PRESET, else quick)")
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks, such as a dataset; may be repeated",
    )
    run.add_argument("--name", default="", help="name of the folder below results/ (default: made of preset, data set and parameters)")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="notebooks at a time; above 1 time verdicts are withheld (default: 1)"
    )
    run.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="run on the workers of this dask scheduler (tcp://head:8786) instead; they need the same folders at the same paths, "
        "and one thread each (dask worker --nthreads 1), one worker a machine, if times are to count",
    )
    run.add_argument("--timeout", type=int, metavar="SECONDS", help="for one cell (default: by preset, 1200 for quick)")
    run.add_argument("--compare", choices=["recorded"], help="say whether each ratio lies inside the recorded interval")
    run.add_argument("--force", action="store_true", help="run what is up to date as well")
    run.add_argument("--notebooks", metavar="FOLDER", help="run the notebooks of another folder")

    show = commands.add_parser("list", help="show the series, and what is recorded of it")
    show.add_argument("--notebooks", metavar="FOLDER", help="show the notebooks of another folder")
    return top


def main(argv=None):
    """Run the command line. Returns the exit code: 0 all complete, 1 something failed, 2 bad input, 130 interrupted."""
    try:
        arguments = vars(parser().parse_args(argv))
        command = arguments.pop("command")
        from effilib import runner  # not before it is needed: --help is instant

        if command == "list":
            print(runner.listing(**arguments))
            return 0
        return runner.run(arguments.pop("selectors"), **arguments | {"compare": bool(arguments["compare"])})
    except BadInput as error:
        print(f"effilib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
