"""What a notebook calls first and last: resolve the parameters, show what was measured, write the record.

book = notebook.start("03_2_mixed_precision", preset=preset, dataset=dataset, network=network, seeds=seeds)
...
book.record(comparison, figure=figure, caption="...")
"""

import ast
import html
import inspect
import numbers
import os
import sys
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from effilib import clock, experiment, paths, provenance
from effilib.data import Dataset
from effilib.errors import BadInput, choose
from effilib.figures import png
from effilib.tasks import Task
from effilib.tasks import task as make_task
from effilib.workbook import series


def start(name, *, preset="", dataset="", network="", seeds=0, device="auto", **own):
    """Check the parameters and return the notebook's `Book`. own: the notebook's further parameters.

    Raises `BadInput` in the notebook's first second for a parameter that it does not have, or a value of
    another type.

    >>> book = start("02_overview", preset="smoke", dataset="synthetic")
    >>> book.chapter.title, book.smoke, book.folder.parts[-2:]
    ('Where training time goes', True, ('play', '02_overview'))
    """
    defaults = dict(preset="", dataset="", network="", seeds=0, device="auto")
    values = dict(preset=preset, dataset=dataset, network=network, seeds=seeds, device=device)
    given = injected()
    for parameter in given:
        choose(f"parameter of {name}", parameter, [*defaults, *own])
    for parameter, value in values.items():
        if type(value) is not type(defaults[parameter]):
            kind = type(defaults[parameter]).__name__
            raise BadInput(
                f"parameter {parameter} of {name} is {value!r} ({type(value).__name__}), expected {kind}"
            )
    if seeds < 0:
        raise BadInput(f"parameter seeds of {name} is {seeds}, expected 0 (the preset's) or more")
    clock.steady_memory()
    _show_tables()
    task = make_task(preset, dataset, network, device=device, **({"seeds": seeds} if seeds else {}))
    dataset = task.load()
    task.build(dataset)  # a network that does not fit the data stops the notebook here
    out = os.environ.get("EFFILIB_OUT")
    folder = paths.make(Path(out) if out else paths.results() / "play" / name)
    return Book(
        name=name, task=task, parameters={**values, **own}, dataset=dataset, folder=folder, begun=clock.now()
    )


def injected():
    """Names of the parameters that papermill passed: those assigned in the cell that it puts in.

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
    def preset(self):
        """The task's preset."""
        return self.task.preset

    @property
    def smoke(self):
        """Whether this is a test of the notebook, not a measurement."""
        return self.preset == "smoke"

    @cached_property
    def chapter(self):
        """The notebook's place in the series."""
        return series.chapter(self.name)

    def settings(self):
        """The resolved parameters and the machine, as a table."""
        t, d, r, m = self.task, self.dataset, self.task.recipe, clock.machine(self.task.device)
        images = " / ".join(f"{len(getattr(d, s))} {s}" for s in ("train", "decide", "validation", "test"))
        recipe = f"{r.epochs:g} epochs, batch {r.batch_size}, lr {r.lr:g} ({r.schedule}), weight decay {r.weight_decay:g}"
        precision = experiment.resolve_precision(r.precision, t.device)
        target = (
            f"{t.target:g} % validation accuracy" if t.target else "from a pilot run, where one is needed"
        )
        bf16 = " ".join(m["bf16"]) or "no native bf16"
        return facts(
            {
                "preset": t.preset + (" (not a measurement)" if self.smoke else ""),
                "data": f"{d.name} {d.shape}, {images}" + (f" ({d.note})" if d.note else ""),
                "network": t.network + "".join(f", {k} {v}" for k, v in t.widths.items()),
                "recipe": f"{recipe}, {precision}, {experiment.resolve_layout(r, t.device)}",
                "target": f"{target}, margin {t.margin:g} points",
                "seeds": str(t.seeds),
                "machine": f"{m['device']} ({m['summary']}), {m['threads']} threads, {bf16}, torch {m['torch']}",
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

    def show(self, figure, caption):
        """Show a figure with a caption that says what to see."""
        from IPython.display import Image, Markdown, display

        display(Image(png(figure), width=int(figure.get_figwidth() * 100)), Markdown(f"*{caption}*"))

    def record(self, comparison=None, *, figure, caption, headline="", verdicts=(), notes=(), kept=None):
        """The notebook's last act: write history.csv, figure.png and, last, record.json with `status:
        complete`.

        comparison: a `Comparison` (or several; the first has the headline). headline: the arm whose verdict
        stands in the scoreboard (default: the first method). verdicts: more `Verdict`s to record. kept:
        further plain values that the record holds, such as what a method decided. Returns the record."""
        comparisons = (
            []
            if comparison is None
            else list(comparison)
            if isinstance(comparison, list | tuple)
            else [comparison]
        )
        found = [v for c in comparisons if not c.illustration for v in c.verdicts()] + list(verdicts)
        main = next((v for v in found if v.arm == headline), found[0] if found else None)
        info, m = self.chapter.info, clock.machine(self.task.device)
        record = {
            "schema": 1,
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
            "task": provenance.settings(comparisons[0].task if comparisons else self.task),
            "machine": m,
            "commit": provenance.commit(),
            "date": clock.date(),
            "duration_s": round(clock.now() - self.begun, 1),
            "shared_machine": experiment.shared_machine(),
            "headline": main.record() if main else None,
            "verdicts": [v.record() for v in found],
            "caption": caption,
            "notes": self._notes(comparisons, notes),
            **({} if kept is None else {"kept": kept}),
        }
        if comparisons:
            import pandas as pd

            history = pd.concat([c.history() for c in comparisons], ignore_index=True).drop_duplicates()
            paths.write(self.folder / "history.csv", history.to_csv(index=False, float_format="%.6g"))
        paths.write(self.folder / "figure.png", png(figure))
        paths.write(self.folder / "record.json", record)
        return record

    def _notes(self, comparisons, notes):
        note = [self.dataset.note] if self.dataset.note else []
        return [*note, *(n for c in comparisons for n in c.notes()), *notes]


def source(*things):
    """The source of functions and classes, coloured: a chapter shows its method in full view.

    >>> print(source(facts).data.splitlines()[0])
    def facts(pairs):
    """
    from IPython.display import Code

    return Code("\n\n".join(inspect.getsource(t).rstrip() for t in things), language="python")


def facts(pairs):
    """Names and values as a table of two columns.

    >>> facts({"device": "CPU", "threads": 2}).loc["threads", ""]
    2
    """
    import pandas as pd

    return pd.DataFrame({"": pairs.values()}, index=list(pairs))


def header(info):
    """What a method's `Info` says, as a table.

    >>> from effilib.methods import prune_train
    >>> header(prune_train.INFO).loc["chapter", ""]
    '6.1'
    """
    return facts({f.name.replace("_", " "): getattr(info, f.name) for f in fields(info)})


def _digits(value):
    if value != value:
        return "–"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def table_html(frame):
    """A DataFrame as notebooks show it: nothing cut off, texts to the left, numbers to the right with at
    least four digits.

    >>> table_html(facts({"threads": 2}))
    '<table class="dataframe"><tbody><tr><th class="text" style="text-align: left">threads</th><td>2</td></tr></tbody></table>'
    """

    def cell(value, tag="td"):
        number = isinstance(value, numbers.Number) and not isinstance(value, bool)
        text = _digits(value) if number else html.escape(str(value))
        return (
            f"<{tag}>{text}</{tag}>"
            if number
            else f'<{tag} class="text" style="text-align: left">{text}</{tag}>'
        )

    names = ["" if n is None else str(n) for n in frame.index.names]
    text_columns = [not hasattr(t, "kind") or t.kind not in "iuf" for t in frame.dtypes]
    heads = [cell(n, "th") for n in names]
    heads += [
        cell(str(c), "th") if text else f"<th>{html.escape(str(c))}</th>"
        for c, text in zip(frame.columns, text_columns, strict=True)
    ]
    head = (
        f"<thead><tr>{''.join(heads)}</tr></thead>"
        if any(names) or any(str(c) for c in frame.columns)
        else ""
    )
    rows = []
    for index, values in zip(frame.index, frame.itertuples(index=False, name=None), strict=True):
        keys = index if isinstance(index, tuple) else (index,)
        rows.append("<tr>" + "".join(cell(str(k), "th") for k in keys) + "".join(map(cell, values)) + "</tr>")
    return f'<table class="dataframe">{head}<tbody>{"".join(rows)}</tbody></table>'


def _show_tables():
    """In a notebook, let DataFrames show as `table_html` writes them."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell and shell.display_formatter:
        shell.display_formatter.formatters["text/html"].for_type_by_name("pandas", "DataFrame", table_html)
        shell.display_formatter.formatters["text/html"].for_type_by_name(
            "pandas.core.frame", "DataFrame", table_html
        )
