"""What a notebook calls first and last: resolve the parameters, show what was measured, write the record.

    book = notebook.start("03_2_mixed_precision", preset=preset, dataset=dataset, ...)
    ...
    book.record(comparison, caption="...")

Cells work with numbers; here they become text, in tables and behind a cell's last line.
"""

import ast
import html
import inspect
import math
import numbers
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from effilib import clock, experiment, figures, paths, provenance
from effilib.dataset import Dataset
from effilib.errors import BadInput, choose
from effilib.recipe import Recipe, resolve_layout, resolve_precision
from effilib.tasks import Task
from effilib.tasks import task as make_task
from effilib.workbook import series

if TYPE_CHECKING:  # they take a second
    import pandas as pd
    from IPython.display import Code
    from matplotlib.figure import Figure

    from effilib.results import Comparison
    from effilib.statistics import Verdict

__all__ = ["Book", "facts", "header", "injected", "source", "start", "table_html"]


DEFAULTS = {  # the parameters of every notebook
    **dict(preset="", dataset="", network="", seeds=0, epochs=0.0, batch_size=0, lr=0.0, size=0),
    "device": "auto",
}


def start(
    name: str,
    *,
    preset: str = "",
    dataset: str = "",
    network: str = "",
    seeds: int = 0,
    epochs: float = 0.0,
    batch_size: int = 0,
    lr: float = 0.0,
    size: int = 0,
    device: str = "auto",
    **own,
) -> "Book":
    """Check the parameters and return the notebook's `Book`.

    "" and 0 stand for the preset's; what is asked for is not changed by the chapter. own: the notebook's
    further parameters. Raises `BadInput` in the notebook's first second for a parameter that it does not
    have, or a value of another type.

    >>> book = start("02_overview", preset="smoke", dataset="synthetic")
    >>> book.chapter.title, book.smoke, book.folder.parts[-2:]
    ('Where training time goes', True, ('play', '02_overview'))
    """
    numbers = dict(seeds=seeds, epochs=epochs, batch_size=batch_size, lr=lr, size=size)
    values = dict(preset=preset, dataset=dataset, network=network, **numbers, device=device)
    given = injected()
    for parameter in given:
        choose(f"parameter of {name}", parameter, [*DEFAULTS, *own])
    for parameter, value in values.items():
        kind, own_kind = type(DEFAULTS[parameter]), type(value)
        if own_kind is not kind and (kind, own_kind) != (float, int):
            is_ = f"is {value!r} ({own_kind.__name__})"
            raise BadInput(f"parameter {parameter} of {name} {is_}, expected {kind.__name__}")
        if kind in (int, float) and not 0 <= value < math.inf:
            raise BadInput(f"parameter {parameter} of {name} is {value}, expected 0 (the preset's) or more")
    clock.steady_memory()
    _show_numbers()
    task = make_task(preset, dataset, network, device=device, **{k: v for k, v in numbers.items() if v})
    dataset = task.load()
    if (batch := task.recipe.batch_size) > len(dataset.train):
        raise BadInput(
            f"{dataset.name} has {len(dataset.train)} training images, fewer than a batch of {batch}: "
            "batch_size sets a smaller one"
        )
    task.build(dataset)  # a network that does not fit the data stops the notebook here
    out = os.environ.get("EFFILIB_OUT")
    folder = paths.make(Path(out) if out else paths.results() / "play" / name)
    return Book(
        name=name, task=task, parameters={**values, **own}, dataset=dataset, folder=folder, begun=clock.now()
    )


def injected() -> list[str]:
    """Return the names of the parameters that papermill passed: it assigns them in a cell of its own.

    >>> injected()  # outside of a notebook
    []
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    cells = [c for c in (shell.user_ns.get("In", []) if shell else []) if c.startswith("# Parameters")]
    return [
        t.id
        for c in cells
        for node in ast.parse(c).body
        if isinstance(node, ast.Assign)
        for t in node.targets
    ]


@dataclass(kw_only=True)
class Book:
    """A notebook that runs: its task and data, and where its results go.

    >>> book = start("02_overview", preset="smoke", dataset="synthetic")
    >>> book.settings().loc["data", ""]
    'synthetic (1, 8, 8), 128 train / 25 decide / 51 validation / 76 test'
    """

    name: str
    task: Task
    dataset: Dataset
    parameters: dict
    folder: Path
    begun: float

    @property
    def preset(self) -> str:
        """The task's preset."""
        return self.task.preset

    @property
    def smoke(self) -> bool:
        """Whether this is a test of the notebook, not a measurement."""
        return self.preset == "smoke"

    @cached_property
    def chapter(self) -> series.Chapter:
        """Return the notebook's place in the series."""
        return series.chapter(self.name)

    def settings(self, task: Task | None = None) -> "pd.DataFrame":
        """Return the resolved parameters and the machine, as a table.

        task: what the chapter trains, where that is not the preset's task.
        """
        t, d, m = task or self.task, task.load() if task else self.dataset, clock.machine(self.task.device)
        images = " / ".join(f"{len(getattr(d, s)):,} {s}" for s in ("train", "decide", "validation", "test"))
        lengths, recipe = _recipes(t)
        bf16 = " ".join(m["bf16"]) or "no native bf16"
        return facts(
            {
                "preset": t.preset + (" (not a measurement)" if self.smoke else ""),
                "data": f"{d.name} {d.shape}, {images}" + (f" ({d.note})" if d.note else ""),
                "network": t.network + "".join(f", {k} {v}" for k, v in t.widths.items()),
                "lengths": lengths,
                "seeds a length": t.seeds,
                "recipe": recipe,
                **({"beware": beware} if (beware := " ".join(t.beware(d))) and not self.smoke else {}),
                "machine": f"{m['device']} ({m['summary']}), {m['threads']} threads, {bf16}, "
                f"torch {m['torch']}",
                "results": self._short(self.folder),
            }
        )

    @staticmethod
    def _short(folder):
        base = paths.results()
        inside = (
            [p for p in folder.relative_to(base).parts if p != ".partial"]
            if folder.is_relative_to(base)
            else [folder.name]
        )
        return "/".join(["results", *inside])

    def show(self, figure: "Figure", caption: str) -> None:
        """Show a figure with a caption that says what to see."""
        from IPython.display import Image, Markdown, display

        image = Image(figures.png(figure), width=int(figure.get_figwidth() * 100))
        display(image, Markdown(f"*{caption}*"))

    def record(
        self,
        comparisons: "Comparison | Sequence[Comparison]" = (),
        *,
        caption: str,
        figure: "Figure | None" = None,
        headline: str = "",
        verdicts: "Sequence[Verdict]" = (),
        notes: Sequence[str] = (),
        kept: object = None,
    ) -> dict:
        """Write history.csv, figure.png and, last, record.json: the notebook's last act.

        comparisons: one or several, with titles of their own; the first that is judged has the headline.
        headline: the arm whose verdict stands in the scoreboard (default: the first method). figure: by
        default the curves of that comparison. verdicts: further `Verdict`s, such as on images for the same
        accuracy. kept: further plain values, such as what a method decided. Returns the record. Raises
        `BadInput` for comparisons of the same title, for an arm that has no verdict, or where there is
        nothing to draw.
        """
        compared = list(comparisons or ()) if isinstance(comparisons or (), Sequence) else [comparisons]
        titles = [c.title for c in compared]
        if len(set(titles)) < len(titles):
            raise BadInput(
                f"comparisons of a record need titles of their own, got {', '.join(titles)}: compare(..., "
                "title=...)"
            )
        judged = [c for c in compared if not c.illustration]
        found = [v for c in judged for v in c.verdicts()] + list(verdicts)
        if headline:
            choose("arm with a verdict", headline, [v.arm for v in found])
        methods = [a.name for c in judged for a in c.arms if a.role == "method"]
        wanted = headline or next(iter(methods), "")
        main = next((v for v in found if v.arm == wanted), found[0] if found else None)
        if figure is None:
            figure = _picture(judged or compared, main)
        info = self.chapter.info
        record = {
            "schema": series.SCHEMA,
            "status": "complete",
            "notebook": self.name,
            "chapter": self.chapter.number,
            "title": self.chapter.title,
            "title_de": self.chapter.title_de,
            "paper": info.paper if info else "",
            "claim": info.claim if info else "",
            "preset": self.preset,
            "dataset": self.dataset.name,
            "network": self.task.network,
            "parameters": self.parameters,
            "task": provenance.settings((judged or compared)[0].task if compared else self.task),
            "machine": clock.machine(self.task.device),
            "commit": provenance.commit(),
            "date": clock.date(),
            "duration_s": round(clock.now() - self.begun, 1),
            "shared_machine": experiment.shared_machine()
            or any(x["shared"] for c in compared for x in c.cells),
            "headline": main.record() if main else None,
            "verdicts": [v.record() for v in found],
            "caption": caption,
            "notes": self._notes(compared, notes),
            "beware": list(dict.fromkeys(n for c in compared for n in c.beware())),
            **({} if kept is None else {"kept": kept}),
        }
        if compared:
            import pandas as pd

            history = pd.concat([c.history() for c in compared], ignore_index=True)
            paths.write(self.folder / "history.csv", history.to_csv(index=False, float_format="%.6g"))
        paths.write(self.folder / "figure.png", figures.png(figure))
        record = paths.finite(record)
        paths.write(self.folder / "record.json", record)
        return record

    def _notes(self, comparisons, notes):
        note = [self.dataset.note] if self.dataset.note else []
        found = [*note, *(n for c in comparisons for n in c.notes()), *notes]
        return list(dict.fromkeys(found))


def _recipes(task):
    """A task's lengths and its recipe in words; settings tuned by length stand beside each length."""
    at = [task.at(length) for length in task.lengths]
    recipes = [t.recipe for t in at]
    names = [f.name for f in fields(Recipe) if f.name != "epochs"]
    own = [n for n in names if len({getattr(r, n) for r in recipes}) > 1]

    def value(recipe, name):
        return f"{name.replace('batch_size', 'batch').replace('_', ' ')} {_text(getattr(recipe, name))}"

    said = []
    for t, r in zip(at, recipes, strict=True):
        long = f"{t.images:,}" if task.axis == "images" else f"{r.epochs:.3g}"
        said.append(long + (f" ({', '.join(value(r, n) for n in own)})" if own else ""))
    unit = "training images, with as many updates" if task.axis == "images" else "epochs"
    r, same = recipes[-1], [n for n in ("batch_size", "lr", "weight_decay") if n not in own]
    how = [value(r, n) for n in same]
    how += [r.schedule, resolve_precision(r.precision, task.device), resolve_layout(r, task.device)]
    return f"{', '.join(said)} {unit}", ", ".join(how)


def _picture(comparisons, verdict):
    """The curves of the comparison that has the headline."""
    for c in comparisons:
        names = [a.name for a in c.arms]
        if verdict is None or verdict.arm in names:
            first = next((a.name for a in c.arms if a.role == "method"), names[-1])
            other = verdict is not None and verdict.arm != first
            cost = verdict.cost if verdict else "seconds"
            return figures.curves(c, verdict.arm if other else None, cost=cost)
    raise BadInput("a record without a comparison needs a figure: book.record(figure=..., caption=...)")


# What a reader sees


def source(*things: object) -> "Code":
    """Return the source of functions and classes, coloured: a chapter shows its method in full view.

    Examples in docstrings are left out.

    >>> code = source(facts).data
    >>> print(code.splitlines()[0], ">>>" in code)
    def facts(pairs: dict) -> "pd.DataFrame": False
    """
    from IPython.display import Code

    return Code("\n\n".join(_without_examples(inspect.getsource(t)) for t in things), language="python")


def _without_examples(text):
    """Source without the doctests in its docstrings."""
    text = textwrap.dedent(text).rstrip()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or ast.get_docstring(node) is None:
            continue
        begin, end = body[0].lineno - 1, body[0].end_lineno
        doc = re.fullmatch(r'(\s*\w?""")(.*)"""\s*', "\n".join(lines[begin:end]), re.DOTALL)
        if doc and ">>>" in doc[2]:
            examples = re.compile(r"^[ \t]*>>>.*?(\n[ \t]*\n|\Z)", re.DOTALL | re.MULTILINE)
            kept = examples.sub("", doc[2]).rstrip()
            indent = "\n" + doc[1][:-3] if "\n" in kept else ""
            new = f'{doc[1]}{kept}{indent}"""'.split("\n")
            # later nodes keep their line numbers
            lines[begin:end] = [*new, *[None] * (end - begin - len(new))]
    return "\n".join(line for line in lines if line is not None)


def facts(pairs: dict) -> "pd.DataFrame":
    """Return names and values as a table of two columns.

    >>> facts({"device": "CPU", "threads": 2}).loc["threads", ""]
    2
    """
    import pandas as pd

    return pd.DataFrame({"": list(pairs.values())}, index=list(pairs), dtype=object)


def header(info: object) -> "pd.DataFrame":
    """Return what a method's `Info` says, as a table.

    >>> from effilib.methods import prune_train
    >>> header(prune_train.INFO).loc["chapter", ""]
    '6.1'
    """
    return facts({f.name.replace("_", " "): getattr(info, f.name) for f in fields(info)})


DASH = "\N{EN DASH}"
RATIO = re.compile(r"^x\b|[ (]x\)?$|speed-up|^(low|high)$")  # names of columns with factors
PERCENT, POINTS = re.compile(r"%|accuracy"), re.compile(r"\bpoints\b")


def table_html(frame: "pd.DataFrame") -> str:
    """Return a DataFrame as notebooks show it: numbers with sensible digits, nothing cut off.

    Columns with "%" in the name and those with factors ("x", "speed-up") have two decimals, differences in
    points a sign, and others about three digits, the same number of decimals in all rows. What is missing is
    a dash.

    >>> "<td>2</td></tr></tbody></table>" in table_html(facts({"threads": 2}))
    True
    """

    def cell(text, number, tag="td"):
        left = "" if number else ' class="text" style="text-align: left"'
        return f"<{tag}{left}>{html.escape(text)}</{tag}>"

    columns = []  # of [(text, whether it is a number), ...]
    for i, name in enumerate(frame.columns):
        values = frame.iloc[:, i].tolist()
        columns.append(list(zip(_column(_key(name), values), map(_is_number, values), strict=True)))
    names = ["" if n is None else str(n) for n in frame.index.names]
    heads = [cell(n, False, "th") for n in names]
    for name, column in zip(frame.columns, columns, strict=True):
        heads.append(cell(_key(name), all(number for _, number in column), "th"))
    titled = any(names) or any(_key(c) for c in frame.columns)
    head = f"<thead><tr>{''.join(heads)}</tr></thead>" if titled else ""
    rows, before = [], ()
    for k, index in enumerate(frame.index):
        keys = index if isinstance(index, tuple) else (index,)
        repeated = [keys[: j + 1] == before[: j + 1] for j in range(len(keys) - 1)] + [False]
        texts = ["" if r else _text(key) for key, r in zip(keys, repeated, strict=True)]
        cells = [cell(t, False, "th") for t in texts] + [cell(*column[k]) for column in columns]
        rows.append(f"<tr>{''.join(cells)}</tr>")
        before = keys
    return f'<table class="dataframe">{head}<tbody>{"".join(rows)}</tbody></table>'


def _key(name):
    return ", ".join(map(_text, name)) if isinstance(name, tuple) else _text(name)


def _is_number(value):
    return value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _column(name, values):
    """The texts of a column's values."""
    found = [v for v in values if _is_number(v) and v is not None and math.isfinite(v)]
    mixed = any(not _is_number(v) for v in values)  # such as `facts`
    counts, sizes = all(isinstance(v, int) for v in found), [abs(v) for v in found if v]
    shown = all(0.005 <= size < 1000 for size in sizes)  # by two decimals
    if POINTS.search(name) and not counts:
        form = "{:+z.2f}".format
    elif (PERCENT.search(name) or RATIO.search(name)) and shown and not counts:
        form = "{:z.2f}".format  # z: no sign before a rounded zero
    elif mixed or all(map(_short, found)):
        form = _text
    else:
        form = _rounded(found)
    return [form(v) if v is not None and _is_number(v) and math.isfinite(v) else _text(v) for v in values]


def _rounded(values):
    """A formatter that gives the values' median three digits, and the others as many decimals."""
    sizes = sorted(abs(v) for v in values if v)
    decimals = max(0, 2 - math.floor(math.log10(sizes[len(sizes) // 2])))

    def form(v):
        lost = abs(v) >= 1e9 or abs(v) < 10**-decimals or decimals > 6
        return _exponent(f"{v:.3g}") if lost else f"{v:z,.{decimals}f}"

    return form


def _short(value):
    """A number with at most four digits, also one such as 0.6000000238 that means 0.6; "" for others."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}" if abs(value) >= 10_000 else f"{int(value)}"
    text = f"{value:.4g}"
    return _exponent(text) if abs(float(text) - value) <= 1e-6 * abs(value) else ""


def _exponent(text):
    """2.5e9 for 2.5e+09."""
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), text)


def _text(value):
    """Any value as text; numbers rounded to four digits, also within lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return DASH
    if isinstance(value, str) or not _is_number(value):
        return str(value)
    if not math.isfinite(value):
        return DASH if math.isnan(value) else "∞" if value > 0 else "-∞"
    return _short(value) or (f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else _exponent(f"{value:.4g}"))


def _show_numbers():
    """In a notebook, let tables show as `table_html` writes them, and other numbers with six digits."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not shell or not shell.display_formatter:
        return
    formatters = shell.display_formatter.formatters
    for module in ("pandas", "pandas.core.frame"):
        formatters["text/html"].for_type_by_name(module, "DataFrame", table_html)
    for module in ("pandas", "pandas.core.series"):
        formatters["text/html"].for_type_by_name(module, "Series", _series_html)
    formatters["text/plain"].float_precision = "%.6g"


def _series_html(series):
    return table_html(series.to_frame("" if series.name is None else series.name))
