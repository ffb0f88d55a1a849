"""What other chapters recorded, as chapter 10 reads it: which record stands for a chapter, whether it is
current, what follows from it.
"""

import functools
import subprocess

import pandas as pd

from effilib import clock, data, paths, provenance
from effilib.statistics import Verdict
from effilib.workbook import series


def records(book):
    """Every other chapter's record, and why it is not current ("" where it is): dict stem -> (record,
    reason).

    One of this preset and data set in the results comes before a committed one.
    """
    here = book.folder.parent.parent  # while the series runs, below its folder's `.partial`
    if book.folder.parent.name != ".partial":
        here = paths.results() / f"{book.preset}-{data.label(book.task.dataset)}"
    committed, found = series.recorded(), {}
    for chapter in series.CHAPTERS:
        mine = paths.read_json(here / chapter.stem / "record.json") or {}
        record = mine if mine.get("status") == "complete" else (committed.get(chapter.stem) or [None])[-1]
        if record and chapter.stem != book.name:
            found[chapter.stem] = record, stale(record, chapter.module, book.task.device)
    return found


def elsewhere(record, device="cpu"):
    """Why a record's times are not this machine's, "" if they are."""
    then, now = record.get("machine", {}), clock.machine(device)
    other = [f"{k} {then.get(k)}" for k in ("device", "threads", "torch") if then.get(k) != now[k]]
    if other:
        return f"another machine ({', '.join(other)})"
    return "measured while other notebooks ran" if record.get("shared_machine") else ""


def stale(record, module, device="cpu"):
    """Why a record does not tell what this code would do on this machine, "" if it does. module: of the
    chapter's method.
    """
    commit, why = record.get("commit") or "", elsewhere(record, device)
    if why:
        return why
    if not commit or commit.endswith("+"):
        return "made from files that were not committed"
    files = differing(commit)
    if files is None:
        return "its commit is not known here"
    runs_on = provenance.imports(
        {"effilib.training", "effilib.experiment", *([f"effilib.methods.{module}"] if module else [])}
    )
    changed = [m for m in sorted(runs_on) if any(f in files and other(commit, f) for f in sources(m))]
    return f"changed since: {', '.join(changed)}" if changed else ""


def sources(module):
    """Where a module may stand in a checkout."""
    name = module.replace(".", "/")
    return f"{name}.py", f"{name}/__init__.py"


def git(*words):
    """What git says of this checkout, None where there is none, or it does not know."""
    try:
        return subprocess.run(
            ["git", "-C", str(paths.root()), *words], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.lru_cache(64)
def differing(commit):
    """The files of effilib that are not as they were at a commit; None where it is not known."""
    names = git("diff", "--name-only", commit, "--", "effilib")
    return None if names is None else set(names.split())


@functools.lru_cache(1024)
def other(commit, file):
    """Whether a file's code, without comments, differs from that at a commit."""
    then, now = git("show", f"{commit}:{file}"), paths.root() / file
    return (
        then is None
        or not now.is_file()
        or provenance.normalized(then) != provenance.normalized(now.read_text(encoding="utf-8"))
    )


def slowdown(record, least, device="cpu"):
    """How many times slower its chapter found a method on this machine, by its headline; 1.0 where that was
    less than `least`.

    It decides how many seeds are spent, not what is said of a method: so it may be a record of code that has
    changed."""
    head = (record or {}).get("headline") or {}
    if not head.get("ratio") or elsewhere(record, device):
        return 1.0
    return 1 / head["ratio"] if head["ratio"] < 1 / least else 1.0


def verdicts(record):
    """The `Verdict`s in a record, without those of single steps, which say nothing of a whole training."""
    return [Verdict(**v) for v in record.get("verdicts", []) if v["quantity"] != "time per step"]


def on_device(found, kind):
    """The records that were made on "cpu" or "cuda": dict stem -> record."""
    return {s: r for s, (r, _) in found.items() if str(r.get("task", {}).get("device", "")).startswith(kind)}


def numbers(stems):
    """The numbers of chapters, in words."""
    return ", ".join(series.chapter(s).number for s in stems)


def own_ground(found):
    """What each method's own chapter found, on the task that it chose."""
    rows = []
    for chapter in (c for c in series.CHAPTERS if c.module):
        record, why = found.get(chapter.stem, ({}, "not run"))
        head = record.get("headline") or {}
        points = head.get("accuracy_difference")
        rows.append(
            {
                "chapter": chapter.number,
                "method": chapter.title,
                "on": f"{record['preset']}, {record['dataset']}, {record['network']}" if record else "",
                "quantity": head.get("quantity", ""),
                "measured": head.get("text", ""),
                "accuracy, points": f"{points:+.2f}" if points is not None else "",
                "verdict": head.get("verdict", ""),
                "current": why or "yes",
            }
        )
    return pd.DataFrame(rows).set_index("chapter")
