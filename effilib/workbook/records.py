"""Read the records of a run: one row of a scoreboard each, whatever state they are in."""

import math
import re
from pathlib import Path
from typing import Any

from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import series

__all__ = ["scoreboard_rows", "speedup"]

EQUAL = {"seconds": "time", "flops": "FLOPs"}
SKIPPED = "skipped: "  # how the reason begins of a notebook that does not apply to the network or the data
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
# what values of the wrong type raise here
UNEXPECTED = (TypeError, ValueError, AttributeError, OverflowError)


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
    rows = [read_row(folder / name) for name in sorted(found | set(notebooks), key=chapter_order)]
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


def conditions(row):
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


def points(row):
    """Accuracy above the baseline's at equal cost, and its interval, a line each; empty where unknown."""
    if row["points"] is None:
        return []
    values = [row["points"], row["points_low"], row["points_high"]]
    mean, low, high = (None if v is None else f"{v:+.2f}".replace("-", "−") for v in values)
    return [f"{mean} points"] + ([f"[{low}, {high}]"] if low and high else [])


def at_equal(row):
    """At equal what the points are."""
    return f"at equal {EQUAL.get(row['cost'], row['cost'])}"


def aim_words(row):
    return f"aim {row['aim']:g}x: {row['aim_verdict']}" if row["aim"] is not None else ""


def chapter_order(name):
    """`03_2_x` before `03_10_y` before `10_z`: by the numbers that a notebook's name begins with."""
    return [int(number) for number in re.findall(r"\d+", re.match(r"[\d_]*", name)[0])] or [math.inf], name


def from_name(name):
    """What a notebook's name alone tells: `03_2_mixed_precision` is chapter 3.2, "Mixed precision"."""
    number, title = re.match(r"([\d_]*)(.*)", name).groups()
    chapter = ".".join(str(int(n)) for n in re.findall(r"\d+", number))
    return {"notebook": name, "chapter": chapter, "title": title.replace("_", " ").capitalize() or name}


def read_row(folder):
    """One row. Its files may be missing, half-written or nonsense: then the row says so."""
    row = EMPTY | from_name(folder.name)
    try:
        row |= _read(folder)
    except UNEXPECTED as error:
        row |= {"status": "unreadable", "reason": unexpected(error)}
    # Where an earlier complete result was kept, the last run has its report beside it.
    places = [f"failed/{folder.name}"] * (row["status"] in ("failed", "skipped")) + [folder.name]
    reports = (f"{place}/report.html" for place in places)
    return row | {"report": next((report for report in reports if (folder.parent / report).exists()), "")}


def unexpected(error):
    if isinstance(error, BadInput):
        return str(error)
    return f"record.json does not hold what was expected: {error}"


def _read(folder):
    """What `run.json` and `record.json` say. The run's word comes first: a failed run left no result."""
    run, record = _json(folder / "run.json"), _json(folder / "record.json")
    if run is None and record is None:
        return {"status": "not run", "reason": "not run"}
    if run is not None and run.get("status") != "complete":
        reason = as_text(run.get("reason")) or "no reason given"
        status = "skipped" if run.get("status") == "skipped" else "failed"
        return {"status": status, "reason": reason, "date": as_text(run.get("date"))}
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
        **fact_columns(record),
        **verdict_columns(record.get("headline") or {}, series.older(record)),
    }


def _json(file):
    """A JSON object, None where there is no such file. Raises `BadInput` where it is damaged."""
    content = paths.read_json(file)
    if file.exists() and not isinstance(content, dict):
        raise BadInput(f"{file.name} is damaged or only half-written")
    return content


def fact_columns(record):
    machine = record.get("machine") or {}
    return {
        **{key: as_text(record[key]) for key in RECORD_TEXT if record.get(key)},
        "machine": as_text(machine.get("summary")),
        "seconds": _number(record.get("duration_s")),
        "shared_machine": bool(record.get("shared_machine")),
        "beware": [as_text(note) for note in record.get("beware") or ()],
    }


def verdict_columns(verdict, older=False):
    """A record's headline, or one of its verdicts, as plain columns: text, and finite numbers or None.

    Of an older protocol there is no verdict, and no ratio that could be compared, but what was said of it.
    """
    if older:
        text = as_text(verdict.get("text")) if verdict.get("ratio") else ""
        return {"older": True, "verdict": series.OLDER, "text": text} if verdict else {}
    row = {key: as_text(verdict.get(key)) for key in VERDICT_TEXT}
    row |= {key: _number(verdict.get(key)) for key in VERDICT_NUMBERS}
    row["notes"] = [as_text(note) for note in verdict.get("notes") or ()]
    row["range"] = verdict.get("range") and [float(a) for a in verdict["range"]]
    if any(row[key] is not None and row[key] <= 0 for key in ("ratio", "low", "high")):
        raise BadInput(f"record.json has a speed-up that is not a positive factor: {speedup(row)}")
    whole = {key: row[key] and int(row[key]) for key in ("n", "lengths")}
    return row | whole | {"p": None if row["p"] is None else min(max(row["p"], 0.0), 1.0)}


def as_text(value):
    return "" if value is None else str(value)


def _number(value):
    return None if value is None or not math.isfinite(float(value)) else float(value)
