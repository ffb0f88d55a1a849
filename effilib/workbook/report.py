"""What a person reads: an executed notebook as one HTML page, a folder of results as one scoreboard.

Every page is a single file without scripts and without remote addresses: pictures are data URIs, formulas are
MathML. How the pages look is in `pages/`, whose templates escape what comes from records and errors; here is
what they say.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html as markup
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import effilib
from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import series

__all__ = [
    "filled", "index", "light_imports", "mathml", "recorded_index", "render", "scoreboard_rows", "speedup",
]  # fmt: skip

# The scoreboard

BADGES = {  # how a verdict or status begins -> tone (its colour in style.css), symbol
    "faster": ("good", "✓"),
    "slower": ("bad", "▼"),
    "no difference": ("none", "="),
    "undecided": ("none", "?"),
    "depends on the budget": ("mixed", "±"),
    "out of reach": ("bad", "✗"),
    "diverged": ("bad", "✗"),
    "saturated": ("none", "~"),
    "smoke: not a measurement": ("none", "○"),
    "shared machine: no verdict": ("none", "○"),
    "stalls": ("none", "○"),
    "uneven": ("none", "○"),
    "illustration": ("none", "○"),
    "too few held-out images": ("none", "○"),
    series.OLDER: ("none", "○"),
    "failed": ("failed", "✗"),
    "unreadable": ("failed", "✗"),
    "skipped": ("none", "○"),
    "not run": ("none", "○"),
    "not recorded": ("none", "○"),
}
EQUAL = {"seconds": "time", "flops": "FLOPs"}
SKIPPED = "skipped: "  # how the reason begins of a notebook that does not apply to the network or the data
SMOKE = "Preset smoke: this shows that every cell runs. It is not a measurement."
SHARED = "Shared machine: something else was measured at the same time, so there is no verdict on times."
HOLM = (
    "★ marks what is still significant when all {} tests of this page are judged together "
    "(Holm's correction at 5 %)."
)
ALONE = "★ marks what is significant at 5 %; this page has one test, so that there is nothing to correct for."

RECORD_TEXT = ("chapter", "title", "title_de", "paper", "claim", "preset", "dataset", "network", "commit")
RECORD_TEXT = (*RECORD_TEXT, "date", "caption")
VERDICT_TEXT = ("arm", "against", "verdict", "aim_verdict", "text", "kind", "cost")
VERDICT_NUMBERS = ("ratio", "low", "high", "n", "lengths", "points", "points_low", "points_high", "aim", "p")
EMPTY = {
    **dict.fromkeys(("notebook", "status", "reason", "report", *RECORD_TEXT, "machine", *VERDICT_TEXT), ""),
    **dict.fromkeys((*VERDICT_NUMBERS, "seconds", "range", "survives")),
    **dict.fromkeys(("shared_machine", "older"), False),
    "notes": (),
    "beware": (),
}
UNEXPECTED = (
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
)  # what values of the wrong type raise here


def scoreboard_rows(folder: str | Path, notebooks: Any = ()) -> list[dict]:
    """Return what a folder of results knows of each notebook.

    folder: holds `<notebook>/record.json` and, where the runner wrote it, `<notebook>/run.json`. notebooks:
    names that get a row even where nothing was run. Returns flat dicts with the same keys, ready for
    `pandas.DataFrame`. `status` is "complete", "skipped", "failed", "unreadable" or "not run", and `reason`
    says why it is not complete; `survives` whether a verdict survives Holm's correction over all rows.
    Nothing that a file contains raises.

    >>> rows = scoreboard_rows("nothing was run here", ["03_2_mixed_precision"])
    >>> rows[0]["chapter"], rows[0]["status"]
    ('3.2', 'not run')
    """
    folder = Path(folder)
    found = {file.parent.name for name in ("record.json", "run.json") for file in folder.glob(f"*/{name}")}
    rows = [_row(folder / name) for name in sorted(found | set(notebooks), key=_chapter_order)]
    series.mark_survivors(rows)
    return rows


def speedup(row: dict) -> str:
    """Return a row's measured ratio as text, "" where there is none.

    >>> speedup({"ratio": 1.342, "low": 1.291, "high": 1.4, "kind": "gap"})
    '1.34x [1.29, 1.40]'
    >>> speedup({"ratio": 0.41, "low": None, "high": None, "kind": "at most"})
    'at most 0.41x'
    """
    if row["ratio"] is None:
        return ""
    bound = f"{row['kind']} " if row["kind"].startswith("at ") else ""
    interval = "" if None in (row["low"], row["high"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{bound}{row['ratio']:.2f}x{interval}"


def _conditions(row):
    """Under what a ratio was measured, in a line; what is said where there is none."""
    where = []
    if row["range"]:
        low, high = row["range"]
        digits = 0 if high - low >= 2 else 1
        where.append(f"at {low:.{digits}f}–{high:.{digits}f} % accuracy")
    if row["ratio"] is None and row["text"]:
        where.append(row["text"])
    elif row["n"]:
        where.append(f"n = {row['n']} × {row['lengths']}")
        where += [f"by {row['cost']}"] * (row["cost"] != "seconds")
    return ", ".join(where)


def _points(row):
    """Accuracy above the baseline's at equal cost, and its interval, a line each; empty where unknown."""
    if row["points"] is None:
        return []
    values = [row["points"], row["points_low"], row["points_high"]]
    mean, low, high = (None if v is None else f"{v:+.2f}".replace("-", "−") for v in values)
    return [f"{mean} points"] + ([f"[{low}, {high}]"] if low and high else [])


def _equal(row):
    """At equal what the points are."""
    return f"at equal {EQUAL.get(row['cost'], row['cost'])}"


def _aim(row):
    return f"aim {row['aim']:g}x: {row['aim_verdict']}" if row["aim"] is not None else ""


def _chapter_order(name):
    """`03_2_x` before `03_10_y` before `10_z`: by the numbers that a notebook's name begins with."""
    return [int(number) for number in re.findall(r"\d+", re.match(r"[\d_]*", name)[0])] or [math.inf], name


def _from_name(name):
    """What a notebook's name alone tells: `03_2_mixed_precision` is chapter 3.2, "Mixed precision"."""
    number, title = re.match(r"([\d_]*)(.*)", name).groups()
    chapter = ".".join(str(int(n)) for n in re.findall(r"\d+", number))
    return {"notebook": name, "chapter": chapter, "title": title.replace("_", " ").capitalize() or name}


def _row(folder):
    """One row. Its files may be missing, half-written or nonsense: then the row says so."""
    row = EMPTY | _from_name(folder.name)
    try:
        row |= _read(folder)
    except UNEXPECTED as error:
        row |= {"status": "unreadable", "reason": _unexpected(error)}
    # Where an earlier complete result was kept, the last run has its report beside it.
    places = [f"failed/{folder.name}"] * (row["status"] in ("failed", "skipped")) + [folder.name]
    reports = (f"{place}/report.html" for place in places)
    return row | {"report": next((report for report in reports if (folder.parent / report).exists()), "")}


def _unexpected(error):
    if isinstance(error, BadInput):
        return str(error)
    return f"record.json does not hold what was expected: {error}"


def _read(folder):
    """What `run.json` and `record.json` say. The run's word comes first: a failed run left no result."""
    run, record = _json(folder / "run.json"), _json(folder / "record.json")
    if run is None and record is None:
        return {"status": "not run", "reason": "not run"}
    if run is not None and run.get("status") != "complete":
        reason = _text(run.get("reason")) or "no reason given"
        status = "skipped" if run.get("status") == "skipped" else "failed"
        return {"status": status, "reason": reason, "date": _text(run.get("date"))}
    if record is None:
        raise BadInput("record.json is missing, though the run ended well")
    if record.get("schema") not in (1, series.SCHEMA):
        raise BadInput(
            f"record.json has schema {record.get('schema')!r}; this effilib reads schema {series.SCHEMA}"
        )
    if record.get("status") != "complete":
        reason = "record.json does not say complete: the notebook did not reach its end"
        return {"status": "failed", "reason": reason}
    return {
        "status": "complete",
        **_facts(record),
        **_verdict(record.get("headline") or {}, series.older(record)),
    }


def _json(file):
    """A JSON object, None where there is no such file. Raises `BadInput` where it is damaged."""
    content = paths.read_json(file)
    if file.exists() and not isinstance(content, dict):
        raise BadInput(f"{file.name} is damaged or only half-written")
    return content


def _facts(record):
    machine = record.get("machine") or {}
    return {
        **{key: _text(record[key]) for key in RECORD_TEXT if record.get(key)},
        "machine": _text(machine.get("summary")),
        "seconds": _number(record.get("duration_s")),
        "shared_machine": bool(record.get("shared_machine")),
        "beware": [_text(note) for note in record.get("beware") or ()],
    }


def _verdict(verdict, older=False):
    """A record's headline, or one of its verdicts, as plain columns: text, and finite numbers or None.

    Of an older protocol there is no verdict, and no ratio that could be compared, but what was said of it.
    """
    if older:
        text = _text(verdict.get("text")) if verdict.get("ratio") else ""
        return {"older": True, "verdict": series.OLDER, "text": text} if verdict else {}
    row = {key: _text(verdict.get(key)) for key in VERDICT_TEXT}
    row |= {key: _number(verdict.get(key)) for key in VERDICT_NUMBERS}
    row["notes"] = [_text(note) for note in verdict.get("notes") or ()]
    row["range"] = verdict.get("range") and [float(a) for a in verdict["range"]]
    if any(row[key] is not None and row[key] <= 0 for key in ("ratio", "low", "high")):
        raise BadInput(f"record.json has a speed-up that is not a positive factor: {speedup(row)}")
    whole = {key: row[key] and int(row[key]) for key in ("n", "lengths")}
    return row | whole | {"p": None if row["p"] is None else min(max(row["p"], 0.0), 1.0)}


def _text(value):
    return "" if value is None else str(value)


def _number(value):
    return None if value is None or not math.isfinite(float(value)) else float(value)


def index(folder: str | Path, notebooks: Any = ()) -> Path:
    """Write `<folder>/index.html`, the scoreboard of the notebooks run into it.

    Beside each of its figures it shows the recorded one. notebooks: names that get a row even where nothing
    was run. Returns its path.

    >>> "No notebook has been run" in index(".").read_text()
    True
    """
    folder = Path(folder)
    rows, recorded = scoreboard_rows(folder, notebooks), series.recorded()
    for row in rows:
        row["recorded"] = _recorded(recorded.get(row["notebook"]), row["date"], folder)
    return _scoreboard(folder, rows, {row["notebook"]: folder / row["notebook"] for row in rows})


def recorded_index(folder: str | Path | None = None, links: dict[str, str] | None = None) -> Path:
    """Write the scoreboard of all recorded results: a row for each chapter.

    folder: where it goes, by default among the records; the reports lie below it as they do there. links:
    words -> address of what else there is. Returns its path.

    >>> "Mixed precision" in recorded_index().read_text()
    True
    """
    places = {stem: records[-1]["folder"] for stem, records in series.recorded().items()}
    there = [chapter for chapter in series.CHAPTERS if chapter.exists and chapter.stem not in places]
    rows = []
    for place in places.values():
        row = _row(place)
        rows.append(row | {"report": row["report"] and f"{place.parent.name}/{row['report']}"})
    for chapter in there:
        row = {"notebook": chapter.stem, "chapter": chapter.number, "title": chapter.title}
        row |= {"title_de": chapter.title_de, "status": "not run", "verdict": "not recorded"}
        rows.append(EMPTY | row)
    rows.sort(key=lambda row: _chapter_order(row["notebook"]))
    series.mark_survivors(rows)
    notes = [series.OLDER_NOTE.replace("*", "")] if any(row["older"] for row in rows) else []
    found = sorted({row["commit"] for row in rows if row["status"] == "complete" and not row["older"]})
    if len(found) > 1:
        notes.append(
            f"The rows were measured with different code, commits {', '.join(c or '?' for c in found)}."
        )
    return _scoreboard(Path(folder or paths.recorded()), rows, places, links=links or {}, notes=notes)


def _scoreboard(folder, rows, places, links=(), notes=()):
    """Write `index.html` of `rows`; places: notebook -> folder of its picture."""
    for row in rows:
        place = places.get(row["notebook"])
        row |= _badge(row) | {"thumbnail": _thumbnail(place / "figure.png") if place else ""}
    counts = [row["status"] for row in rows]
    tests = sum(row["survives"] is not None for row in rows)
    content = filled(
        "index.html",
        title="Time-efficient training of CNNs",
        links=links,
        facts=[
            *_distinct(rows, "dataset", "preset", "machine"),
            *_date(max((row["date"] for row in rows), default="")),
            *_commits(rows),
        ]
        or [folder.name],
        complete=counts.count("complete"),
        skipped=counts.count("skipped"),
        failed=counts.count("failed") + counts.count("unreadable"),
        notes=[*notes, *_warnings(rows), *dict.fromkeys(note for row in rows for note in row["beware"])],
        holm=(HOLM if tests > 1 else ALONE).format(tests) if any(row["survives"] for row in rows) else "",
        with_recorded=any(row.get("recorded") for row in rows),
        ticks=_place(rows),
        rows=rows,
    )
    return paths.write(folder / "index.html", content)


def _badge(row):
    word = row["verdict"] or row["status"]
    tone, symbol = next((badge for begin, badge in BADGES.items() if word.startswith(begin)), ("none", "·"))
    return {"tone": tone, "symbol": symbol}


def _recorded(records, date, folder, width=320):
    """What was recorded of a chapter, to stand beside a new run; None if nothing was, or this very run."""
    record = (records or [{}])[-1]
    said = series.say(record) or _text(record.get("caption"))
    if not said or record.get("date") == date:
        return None
    report, link = record["folder"] / "report.html", ""
    with contextlib.suppress(ValueError):  # another drive
        link = Path(os.path.relpath(report, folder)).as_posix() if report.exists() else ""
    return {
        "text": said,
        "from": ", ".join(_text(record.get(key)) for key in ("preset", "dataset")),
        "thumbnail": "" if series.older(record) else _thumbnail(record["folder"] / "figure.png", width),
        "link": link,
    }


def _warnings(rows):
    smoke = any(row["preset"] == "smoke" for row in rows)
    shared = any(row["shared_machine"] for row in rows)
    return [note for note, applies in ((SMOKE, smoke), (SHARED, shared)) if applies]


def _distinct(rows, *keys):
    """For each key the values that occur, joined, without the empty ones."""
    values = [", ".join(dict.fromkeys(row[key] for row in rows if row[key])) for key in keys]
    return [value for value in values if value]


def _date(date):
    """A record's date for people, to the minute; an empty list where there is none."""
    return [date[:16].replace("T", " ") + " UTC"] if date else []


def _commits(rows):
    """The commit that everything was measured with, or how many; "+" means changed files."""
    found = {row["commit"][:10] for row in rows if row["commit"]}
    return [f"commit {found.pop()}" if len(found) == 1 else f"{len(found)} commits"] if found else []


def _place(rows, width=200, margin=14, limit=32):
    """Give each row with a ratio its place on a log axis that all share, in pixels. Returns its ticks."""
    values = [row[key] for row in rows for key in ("ratio", "low", "high") if row[key]]
    low, high = max(min(values, default=1) / 1.1, 1 / limit), min(max(values, default=1) * 1.1, limit)
    low, high = math.log2(min(low, 0.45)), math.log2(max(high, 2.2))

    def x(value):
        place = (min(max(math.log2(value), low), high) - low) / (high - low) if value else None
        return place if place is None else round(margin + (width - 2 * margin) * place, 1)

    for row in rows:
        row["plot"] = row["ratio"] and {key: x(row[key]) for key in ("ratio", "low", "high")}
    step = 1 if high - low < 4 else 2  # labels need 40 pixels
    powers = [power for power in range(-10, 11, step) if low <= power <= high]
    return [{"value": 2.0**power, "x": x(2.0**power)} for power in powers]


def _thumbnail(file, width=320):
    """A picture as a small data URI; "" where there is none or it is damaged."""
    try:
        return _shrunk(str(file), Path(file).stat().st_mtime_ns, width)
    except OSError:
        return ""


@functools.lru_cache(256)  # an index is written after every notebook
def _shrunk(file, changed, width):
    return _small(file, width, 64)


def _small(file, width, colours):
    """A picture, by its name or as a file, as a small data URI; "" where it is damaged."""
    from PIL import Image  # comes with matplotlib

    try:
        with Image.open(file) as picture:
            small = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError):
        return ""
    small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    small.thumbnail((width, 2 * width))
    buffer = io.BytesIO()
    small.quantize(colours).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _with_small_pictures(html, width=1200):
    """A page whose pictures are as wide as a screen shows them, in few colours, where that is less."""

    def smaller(match):
        small = _small(io.BytesIO(base64.b64decode(match[1])), width, 128)
        return small if small and len(small) < len(match[0]) else match[0]

    return re.sub(r"data:image/png;base64,([\w+/=]+)", smaller, html)


def filled(template: str, **content: Any) -> str:
    """Return a template of `pages/` as a page. Whatever is not marked as HTML is escaped.

    >>> "<title>5 &lt; 6</title>" in filled("page.html", title="5 < 6")
    True
    """
    from markupsafe import Markup

    style = Markup(_source("style.css"))
    return (
        _templates()
        .get_template(template)
        .render(style=style, kind=template.split(".")[0], version=effilib.__version__, **content)
    )


@functools.cache
def _templates():
    import jinja2

    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("effilib.workbook", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals |= {"conditions": _conditions, "points": _points, "equal": _equal, "aim": _aim}
    return pages


def _source(name):
    return resources.files("effilib.workbook").joinpath("pages", name).read_text(encoding="utf-8")


# One report


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """Import Jupyter's libraries without a grammar of web addresses.

    jsonschema, which they validate with, compiles it for a check that no notebook needs; that takes 0.8 s.

    >>> with light_imports():
    ...     import nbformat
    >>> sys.modules.get("rfc3987_syntax", "as before") is None
    False
    """
    name = "rfc3987_syntax"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def render(
    notebook: str | Path,
    html: str | Path,
    record: dict | None = None,
    failure: str | None = None,
    *,
    alone: bool = False,
    kept: bool = False,
) -> Path:
    """Write an executed notebook as one HTML file, without scripts.

    notebook: the executed `.ipynb`. html: the file to write. record: the content of its `record.json`, if
    there is one. failure: why the run failed, or was skipped; shown on top, and then even an unreadable
    notebook gives a page. alone: whether there is no scoreboard to go back to. kept: whether it lies among
    the recorded results, whose scoreboard is two folders up: small pictures, and nothing recorded beside.
    Returns `html`'s path. Raises `BadInput` if the notebook can't be read and no failure was given.

    >>> from nbformat import v4, write
    >>> cells = [v4.new_markdown_cell("# Norms"), v4.new_markdown_cell("$x^2 + y^2$")]
    >>> write(v4.new_notebook(cells=cells), "norms.ipynb")
    >>> "<msup>" in render("norms.ipynb", "report.html").read_text()
    True
    """
    with light_imports():
        import nbformat

    html = Path(html).absolute()
    try:
        executed = nbformat.read(notebook, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        if not failure:
            why = getattr(error, "strerror", None) or "it is damaged, or not a notebook"
            raise BadInput(f"cannot read the notebook {notebook}: {why}") from error
        executed = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell("*The executed notebook could not be read.*")]
        )
    row, warnings, notes, verdicts = EMPTY | _from_name(html.parent.name), [], [], []
    if skipped := (failure or "").startswith(SKIPPED):
        for cell in executed.cells:  # the sentence on top stands for the traceback
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.output_type != "error"]
    heading = _take_heading(executed, row["chapter"])
    try:
        row |= {"title": heading or row["title"], **_facts(record or {})}
        notes = [_text(note) for note in (record or {}).get("notes") or []]
        verdicts = [EMPTY | _verdict(verdict, series.older(record)) for verdict in _verdicts(record or {})]
    except UNEXPECTED as error:
        warnings.append(_unexpected(error))
    # From here to the results' folder; the report of a failed run lies in `failed/<notebook>` if there is a
    # complete result.
    up = "../.." if kept or html.parent.parent.name == "failed" else ".."
    others = rf"{up}/index.html#\1" if kept else rf"{up}/\1/report.html\2"
    cells = _cells(executed, Path(notebook).absolute().parent, others)
    earlier = [] if kept else series.recorded().get(html.parent.name)
    content = filled(
        "report.html",
        row=row,
        up=up,
        alone=alone,
        title=row["title"],
        facts=_run_facts(row) or [html.parent.parent.name],
        failure=(failure or "").removeprefix(SKIPPED),
        skipped=skipped,
        warnings=[*_warnings([row]), *warnings],
        notes=notes,
        ticks=_place(verdicts),
        verdicts=[verdict | _badge(verdict) for verdict in verdicts],
        recorded=_recorded(earlier, row["date"], html.parent, width=640),
        cells=cells,
        failing_cell='id="failing-cell"' in cells,
    )
    return paths.write(html, _with_small_pictures(content) if kept else content)


def _run_facts(row):
    seconds = [f"{row['seconds']:.0f} s"] if row["seconds"] else []
    return [
        *_distinct([row], "dataset", "preset", "machine"),
        *_date(row["date"]),
        *seconds,
        *_commits([row]),
    ]


def _verdicts(record):
    """Every arm's verdict; of a record without that list its headline; none of one that judges nothing."""
    return record.get("verdicts") or [headline for headline in [record.get("headline")] if headline]


def _take_heading(notebook, chapter):
    """Remove and return the notebook's first heading, which the page's header shows.

    Papermill's own goes too: the banner stands for it.
    """
    notebook.cells = [
        cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    cell = next(iter(notebook.cells), None)
    heading = cell and cell.cell_type == "markdown" and re.match(r"\s*#[ \t]+(.*)\n?", cell.source)
    if not heading:
        return ""
    cell.source = cell.source[heading.end() :]
    return heading[1].strip().removeprefix(chapter).lstrip(" .:·-")


def _cells(notebook, folder, others):
    """The cells as HTML. folder: where relative pictures are looked for. others: the way to other reports."""
    from markupsafe import Markup

    with light_imports():
        from nbconvert import HTMLExporter
        from nbconvert.preprocessors import TagRemovePreprocessor
    from traitlets.config import Config

    kinds = ["text/html", "text/markdown", "image/svg+xml", "text/latex"]  # no scripts, no widgets
    kinds += ["image/png", "image/jpeg", "text/plain"]
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=_source("cells.html"),
        embed_images=True,
        exclude_anchor_links=True,
        config=Config({"NbConvertBase": {"display_data_priority": kinds}}),
    )
    tags = {
        "remove_cell_tags": {"remove-cell"},
        "remove_input_tags": {"remove-input"},
        "remove_all_outputs_tags": {"remove-output"},
    }
    exporter.register_preprocessor(TagRemovePreprocessor(**tags), enabled=True)
    formulas = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _hide_formulas(cell.source, formulas)
        for output in cell.get("outputs", []):
            for kind in ("text/markdown", "text/latex"):
                if kind in output.get("data", {}):
                    output.data[kind] = _hide_formulas(output.data[kind], formulas)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(folder)}})
    return Markup(_offline(_show_formulas(body, formulas), others))


def _offline(html, others):
    """Take out what runs or loads: scripts, frames, remote pictures, styles. Tables get a box to scroll."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for element in soup(["script", "iframe", "object", "embed", "link", "meta", "base", "form"]):
        if element.name in ("script", "iframe", "object", "embed"):
            element.insert_before(_left_out(soup, "interactive output: open the notebook"))
        element.decompose()
    for element in soup.find_all(True):
        for name, value in list(element.attrs.items()):
            value = str(value).strip()
            loads = name in ("src", "srcset", "poster", "background", "data", "xlink:href") or (
                name == "href" and element.name != "a"
            )
            if (
                name.startswith("on")
                or (loads and not value.startswith(("data:", "#")))
                or value.lower().startswith("javascript:")
            ):
                del element[name]
                if element.name == "img" and name == "src":
                    element.replace_with(_left_out(soup, f"picture {value}"))
            elif name == "style":
                element[name] = _offline_style(value)
            elif name == "href":  # another notebook of the series is its report here
                element[name] = re.sub(r"^(?:\./)?([\w-]+)\.ipynb(#.*)?$", others, value)
    for style in soup("style"):
        style.string = _offline_style(style.string or "")
    for element in soup("table"):
        element.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    return str(soup)


def _left_out(soup, what):
    note = soup.new_tag("span", attrs={"class": "left-out"})
    note.string = f"[left out of this page: {what}]"
    return note


def _offline_style(css):
    return re.sub(r"""(?i)@import[^;]*;?|url\(\s*['"]?(?!data:|#|['"])[^)]*\)""", "", css)


# Formulas

# Code comes first, so that a dollar sign in it is never taken for a formula; so does an escaped one.
FORMULA = re.compile(
    r"""
      (?P<fence>^[ \t>]*(?P<marks>`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t>]*(?P=marks)|\Z))
    | (?P<span>(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`))
    | (?P<escaped>\\\$)
    | \$\$(?P<dollars>.+?)\$\$
    | \\{1,2}\[(?P<brackets>(?:(?!\n\s*\n).)+?)\\{1,2}\]
    | (?P<environment>\\begin\{(?P<name>[a-z]+\*?)\}.+?\\end\{(?P=name)\})
    | \\{1,2}\((?P<parentheses>(?:(?!\n\s*\n).)+?)\\{1,2}\)
    | \$(?![\s$])(?P<dollar>(?:[^$\\`\n]|\\.|\n(?!\s*\n))+?)(?<!\s)\$(?!\d)
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
HIDDEN = "\ue000{}\ue001"  # private characters, which Markdown leaves alone


def _hide_formulas(text, formulas):
    """Replace each formula of a Markdown text by a placeholder: its underscores are no Markdown."""

    def hide(match):
        if match["fence"] or match["span"] or match["escaped"]:
            return match[0]
        formulas.append((match[0], match))
        return HIDDEN.format(len(formulas) - 1)

    return FORMULA.sub(hide, text)


def _show_formulas(html, formulas):
    """Put MathML for the placeholders; in code and inside tags the formula's source."""

    def show(match):
        if not match["number"]:
            return re.sub(
                "\ue000(\\d+)\ue001", lambda hidden: markup.escape(formulas[int(hidden[1])][0]), match[0]
            )
        found = formulas[int(match["number"])][1]
        block = found["dollars"] or found["brackets"] or found["environment"]
        return mathml(block or found["parentheses"] or found["dollar"], display=bool(block))

    return re.sub("(?s)<pre.*?</pre>|<code.*?</code>|<[^>]*>|\ue000(?P<number>\\d+)\ue001", show, html)


BIG = r"(\\(?:big|Big|bigg|Bigg)[lrm]?)"
REWRITES = (  # what latex2mathml does not know, in words that it does
    (r"\\label\{[^}]*\}|\\(?:nonumber|notag)\b", ""),
    (r"\\(begin|end)\{(?:aligned|split|align|eqnarray|equation)\*?\}(?:\[[tbc]\])?", r"\\\1{align*}"),
    (r"\\(begin|end)\{(?:gathered|gather|multline)\*?\}", r"\\\1{matrix}"),
    (r"\\(?:operatorname\*?|mathrm)\s*\{([^{}\\]*)\}", r"\\text{\1}"),
    (r"\\operatorname\*?\s*\{arg\\[,;]\s*(max|min)\}", r"\\arg\1"),
    (rf"{BIG}\\[lr]?(?:Vert|\|)", r"\1‖"),
    (rf"{BIG}\\[lr]?vert", r"\1|"),
    (r"\\mathbb\s*\{?1\}?", "\U0001d7d9"),
)
CHILDREN = dict(mfrac=2, msub=2, msup=2, mover=2, munder=2, mroot=2, msubsup=3, munderover=3)
LIMITS = {
    "max",
    "min",
    "sup",
    "inf",
    "lim",
    "arg\u2009max",
    "arg\u2009min",
}  # what stands under them in a display


def mathml(latex: str, display: bool = False) -> str:
    """Return LaTeX as MathML, as a block of its own if `display`.

    What can't be converted is shown as code, never lost.

    >>> mathml("x^2")
    '<math display="inline" alttext="x^2"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>'
    """
    from latex2mathml.converter import convert

    source = latex.strip()
    for pattern, replacement in REWRITES:
        source = re.sub(pattern, replacement, source)
    try:
        text = convert(source, display="block" if display else "inline")
        math = ElementTree.fromstring(text.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', ""))
        for element in math.iter():
            _mend(element, display)
    except Exception:  # latex2mathml stumbles in many ways
        html = f'<code class="latex">{markup.escape(latex.strip())}</code>'
    else:
        math.set("alttext", latex.strip())
        html = ElementTree.tostring(math, encoding="unicode")
    return f'<span class="formula">{html}</span>' if display else html


def _mend(element, display):
    """Correct what browsers show badly of latex2mathml. Raises ValueError where a formula is not whole."""
    text = element.text or ""
    if len(element) != CHILDREN.get(element.tag, len(element)) or "\\" in text or element.get("linebreak"):
        raise ValueError(f"<{element.tag}> is not whole")
    if element.tag == "mo" and len(element):  # \mathop{...}
        element.tag = "mrow"
    if display and element.tag in ("msub", "msup") and element[0].text in LIMITS:
        element.tag = {"msub": "munder", "msup": "mover"}[element.tag]
    # norms: no space inside, and tall only where \left or \big asks for it
    if element.tag == "mo" and text in ("‖", "|"):
        element.attrib.update(lspace="0", rspace="0", stretchy=element.get("stretchy", "false"))
    if element.tag == "mover" and element[1].text == "\u2015":  # \overline: few fonts stretch the bar
        element.tag = "mrow"
        element.set("class", "overline")
        del element[1]
    if element.tag == "mi" and text == "~":  # \sim
        element.tag, element.text = "mo", "\u223c"
    if element.tag == "mi" and "\u27f0" <= text <= "\u27ff":  # \iff and other long arrows
        element.tag = "mo"
    if element.tag in ("mi", "mo") and len(text) > 1 and text.replace("\u2009", "").isalpha():  # \log, \max
        element.tag = "mi"
        element.set("class", "function")
    if element.get("width") == "negativethinmathspace":
        element.set("width", "-0.167em")
