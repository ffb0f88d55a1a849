"""What a person reads: an executed notebook as one HTML page, a folder of results as one scoreboard.

Every page is a single file without scripts and without remote addresses: pictures are data URIs, formulas are
MathML. How the pages look is in `pages/`, whose templates escape what comes from records and errors; here is
what they say.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import effilib
from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import records, series
from effilib.workbook.formulas import hide_formulas, show_formulas

__all__ = ["filled", "index", "light_imports", "recorded_index", "render"]

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
SMOKE = "Preset smoke: this shows that every cell runs. It is not a measurement."
SHARED = "Shared machine: something else was measured at the same time, so there is no verdict on times."
HOLM = (
    "★ marks what is still significant when all {} tests of this page are judged together "
    "(Holm's correction at 5 %)."
)
ALONE = "★ marks what is significant at 5 %; this page has one test, so that there is nothing to correct for."


def index(folder: str | Path, notebooks: Any = ()) -> Path:
    """Write `<folder>/index.html`, the scoreboard of the notebooks run into it.

    Beside each of its figures it shows the recorded one. notebooks: names that get a row even where nothing
    was run. Returns its path.

    >>> "No notebook has been run" in index(".").read_text()
    True
    """
    folder = Path(folder)
    rows, recorded = records.scoreboard_rows(folder, notebooks), series.recorded()
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
    places = {stem: found[-1]["folder"] for stem, found in series.recorded().items()}
    there = [chapter for chapter in series.CHAPTERS if chapter.exists and chapter.stem not in places]
    rows = []
    for place in places.values():
        row = records.read_row(place)
        rows.append(row | {"report": row["report"] and f"{place.parent.name}/{row['report']}"})
    for chapter in there:
        row = {"notebook": chapter.stem, "chapter": chapter.number, "title": chapter.title}
        row |= {"title_de": chapter.title_de, "status": "not run", "verdict": "not recorded"}
        rows.append(records.EMPTY | row)
    rows.sort(key=lambda row: records.chapter_order(row["notebook"]))
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


def _recorded(found, date, folder, width=320):
    """What was recorded of a chapter, to stand beside a new run; None if nothing was, or this very run."""
    record = (found or [{}])[-1]
    said = series.say(record) or records.as_text(record.get("caption"))
    if not said or record.get("date") == date:
        return None
    report, link = record["folder"] / "report.html", ""
    with contextlib.suppress(ValueError):  # another drive
        link = Path(os.path.relpath(report, folder)).as_posix() if report.exists() else ""
    return {
        "text": said,
        "from": ", ".join(records.as_text(record.get(key)) for key in ("preset", "dataset")),
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
    pages.globals |= {
        "conditions": records.conditions, "points": records.points, "equal": records.at_equal,
        "aim": records.aim_words,
    }  # fmt: skip
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
    row, warnings, notes, verdicts = records.EMPTY | records.from_name(html.parent.name), [], [], []
    if skipped := (failure or "").startswith(records.SKIPPED):
        for cell in executed.cells:  # the sentence on top stands for the traceback
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.output_type != "error"]
    heading = _take_heading(executed, row["chapter"])
    try:
        row |= {"title": heading or row["title"], **records.fact_columns(record or {})}
        notes = [records.as_text(note) for note in (record or {}).get("notes") or []]
        verdicts = [
            records.EMPTY | records.verdict_columns(verdict, series.older(record))
            for verdict in _verdicts(record or {})
        ]
    except records.UNEXPECTED as error:
        warnings.append(records.unexpected(error))
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
        failure=(failure or "").removeprefix(records.SKIPPED),
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
            cell.source = hide_formulas(cell.source, formulas)
        for output in cell.get("outputs", []):
            for kind in ("text/markdown", "text/latex"):
                if kind in output.get("data", {}):
                    output.data[kind] = hide_formulas(output.data[kind], formulas)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(folder)}})
    return Markup(_offline(show_formulas(body, formulas), others))


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
