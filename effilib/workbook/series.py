"""The series: its chapters in order, what each attacks, and what was recorded of it."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effilib import paths, provenance

if TYPE_CHECKING:
    import pandas as pd

    from effilib.tuning import Sweep

__all__ = [
    "ATTACKS",
    "CHAPTERS",
    "OLDER",
    "SCHEMA",
    "Chapter",
    "answer",
    "chapter",
    "drawn",
    "headlines",
    "mark_survivors",
    "older",
    "picture",
    "readme_table",
    "recorded",
    "runs",
    "say",
    "tunable",
    "update",
    "update_picture",
    "update_runs",
    "with_table",
]

SCHEMA = 2  # of `notebook.Book.record`: speed-up at equal accuracy, from curves
OLDER = "older protocol"  # a record of schema 1: time to one target accuracy
OLDER_NOTE = f"*{OLDER}*: time to one target accuracy, which is another measure; to be repeated."
CLAIMS = ("faster", "slower", "depends on the budget", "out of reach")  # verdicts that claim a difference
JUDGED = (*CLAIMS, "no difference", "undecided")  # verdicts that come with a test
ENVIRONMENT = ("notebook", "preset", "dataset", "network", "machine", "threads", "torch", "commit", "date")

ATTACKS = {  # training time = steps x images per step x operations per image x seconds per operation
    "operations": "seconds per operation",
    "arithmetic": "operations per image",
    "images": "images needed",
    "structure": "operations per image, by another network",
    "steps": "steps to the same accuracy",
}


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A chapter: its notebook, number, titles, module, and the factor of time it attacks.

    >>> CHAPTERS[0].number, CHAPTERS[0].title, CHAPTERS[0].exists
    ('2', 'Where training time goes', True)
    """

    stem: str
    number: str
    title: str
    title_de: str
    module: str = ""
    attacks: str = ""

    @property
    def info(self):
        """Return the method's `INFO`, or None."""
        if not self.module or not importlib.util.find_spec(f"effilib.methods.{self.module}"):
            return None
        return importlib.import_module(f"effilib.methods.{self.module}").INFO

    @property
    def exists(self):
        """Whether its notebook is written."""
        return (paths.notebooks() / f"{self.stem}.ipynb").is_file()


CHAPTERS = tuple(
    Chapter(**dict(zip(("stem", "number", "title", "title_de", "module", "attacks"), row, strict=False)))
    for row in (
        ("02_overview", "2", "Where training time goes", "Überblick"),
        ("03_1_convolution_cost", "3.1", "What a convolution costs", "Kosten einer Faltung"),
        ("03_2_mixed_precision", "3.2", "Mixed precision",
         "Halbierung der Bits", "mixed_precision", "operations"),
        ("03_3_dynamic_fixed_point", "3.3", "Dynamic fixed point",
         "Dynamisches Festkomma", "dynamic_fixed_point", "operations"),
        ("03_4_approximate_tensor_operations", "3.4", "Approximate tensor operations",
         "Approximative Tensoroperationen", "column_row_sampling", "arithmetic"),
        ("04_1_activation_gradient_pruning", "4.1", "Pruning the activation gradient",
         "Verdünnung des Aktivierungsgradienten", "gradient_pruning", "arithmetic"),
        ("04_2_gradient_approximation", "4.2", "Gradient approximation",
         "Gradientenapproximation", "gradient_approximation", "arithmetic"),
        ("05_1_stochastic_pooling", "5.1", "Stochastic pooling",
         "Stochastisches Pooling", "stochastic_pooling", "images"),
        ("05_2_structure_and_strength", "5.2", "Structure and strength of filters",
         "Struktur und Stärke von Filtern", "structure_and_strength", "images"),
        ("06_1_prune_train", "6.1", "PruneTrain",
         "Beschneiden während des Trainings", "prune_train", "structure"),
        ("06_2_net2net", "6.2", "Net2Net", "Net2Net", "net2net", "steps"),
        ("06_3_kernel_rescaling", "6.3", "Kernel rescaling",
         "Skalierung der Filter", "kernel_rescaling", "arithmetic"),
        ("06_4_layer_replacement", "6.4", "Resource-aware layer replacement",
         "Ressourcenbewusste Schichten", "layer_replacement", "structure"),
        ("07_1_tree_cnn", "7.1", "Tree-CNN", "Tree-CNN", "tree_cnn", "structure"),
        ("07_2_standardization_loss", "7.2", "Standardization loss",
         "Standardisierungsverlust", "standardization_loss", "operations"),
        ("07_3_wavelet", "7.3", "Wavelets", "Wavelets", "wavelet", "arithmetic"),
        ("08_practical_setting", "II.8", "Setting of the practical part", "Rahmen des praktischen Teils"),
        ("09_prune_then_grow", "II.9", "Prune while training, then grow",
         "Beschneiden, dann wachsen", "prune_then_grow", "structure"),
        ("10_comparison", "10", "Every method side by side", "Vergleich"),
        ("11_speed_run", "11", "The speed run", "Schnelllauf", "speed_run", "steps"),
    )
)  # fmt: skip


def chapter(stem: str) -> Chapter:
    """Return a notebook's chapter, also of one that a user added.

    >>> chapter("06_1_prune_train").title_de
    'Beschneiden während des Trainings'
    """
    found = next((c for c in CHAPTERS if c.stem == stem), None)
    return found or Chapter(stem=stem, number=stem.split("_")[0], title=stem.replace("_", " "), title_de="")


def tunable() -> dict[str, Sweep]:
    """Return what of the chapters is tuned, by name.

    >>> list(tunable())[:2]
    ['03_4', '04_1']
    """
    named = [c.module for c in CHAPTERS if c.module]
    modules = [importlib.import_module(f"effilib.chapters.{name}") for name in named]
    return {m.SWEEP.name: m.SWEEP for m in modules if hasattr(m, "SWEEP")}


def recorded() -> dict[str, list[dict]]:
    """Return the committed records of every chapter: stem -> records, the one that stands for it last.

    A record of this protocol comes after an older one, a larger preset after a smaller one; then dates count.

    >>> "03_2_mixed_precision" in recorded()
    True
    """
    found = {}
    for file in sorted(paths.recorded().glob("*-*/*/record.json")):
        record = paths.read_json(file)
        if isinstance(record, dict) and record.get("status") == "complete":
            found.setdefault(file.parent.name, []).append(record | {"folder": file.parent})
    return {stem: sorted(records, key=_rank) for stem, records in found.items()}


def _rank(record):
    size = {"quick": 1, "study": 2, "full": 3}.get(record.get("preset"), 0)
    return not older(record), size, str(record.get("date", ""))


def older(record: dict) -> bool:
    """Return whether a record was measured under an older protocol: its figures mean something else.

    >>> older({"schema": 1}), older({"schema": SCHEMA})
    (True, False)
    """
    return record.get("schema") != SCHEMA


def say(record: dict) -> str:
    """Return a record's headline in a line; "" for a chapter that judges nothing.

    >>> say({"schema": 2, "headline": {"text": "1.38x [1.31, 1.45] at 78-86 %, n=5x3", "verdict": "faster"}})
    '1.38x [1.31, 1.45] at 78-86 %, n=5x3: faster'
    >>> say({"schema": 1, "headline": {"text": "1.57x [1.40, 1.77], n=5 pairs", "verdict": "faster"}})
    'older protocol'
    """
    head = record.get("headline")
    if not isinstance(head, dict):
        return ""
    return OLDER if older(record) else f"{head.get('text', '')}: {head.get('verdict', '')}"


def mark_survivors(rows: list[dict]) -> None:
    """Give each row its "survives": whether its verdict survives Holm's correction.

    The correction is over all rows with a test. None where there is no test: without p, of an older protocol,
    or where the verdict is withheld. "No difference" and "undecided" count among the tests, but never
    survive: p is of a difference, which they don't claim.

    >>> words = ("faster", 0.01), ("slower", 0.2), ("no difference", 0.001), (OLDER, 0.01)
    >>> rows = [dict(verdict=verdict, p=p) for verdict, p in words]
    >>> mark_survivors(rows)
    >>> [row["survives"] for row in rows]
    [True, False, False, None]
    """
    tests = [row for row in rows if row["p"] is not None and str(row["verdict"]).startswith(JUDGED)]
    for row in rows:
        row["survives"] = None
    if tests:
        from effilib.statistics import holm  # brings scipy, which not all who read a title need

        for row, survives in zip(tests, holm([row["p"] for row in tests]), strict=True):
            row["survives"] = survives and str(row["verdict"]).startswith(CLAIMS)


def headlines() -> list[dict]:
    """Return each judged chapter's row, as `figures.scoreboard` draws it.

    survives: whether the verdict survives Holm's correction over all of this protocol. older: measured under
    an older one, so that it has no verdict here.

    >>> row = headlines()[0]
    >>> row["chapter"], row["title"]
    ('3.2', 'Mixed precision')
    """
    found, rows = recorded(), []
    for c in CHAPTERS:
        record = found.get(c.stem, [{}])[-1]
        if head := record.get("headline"):
            old, names = older(record), ("arm", "against", "ratio", "low", "high")
            row = dict(chapter=c.number, title=c.title, preset=record["preset"], dataset=record["dataset"])
            row |= {"older": old, **{name: head.get(name) for name in names}}
            if old:
                text = head["text"].split(", n=")[0] if head.get("ratio") else ""
                row |= dict(verdict=OLDER, text=text, cost="seconds", kind="gap", p=None)
                row |= dict(aim=None, aim_verdict="")
            else:
                names = ("verdict", "text", "cost", "kind", "p", "aim", "aim_verdict")
                row |= {name: head.get(name) for name in names}
            rows.append(row)
    mark_survivors(rows)
    return rows


def runs() -> pd.DataFrame:
    """Return every run of every record of this protocol, with its environment: what `all.csv` holds.

    A row is one of its history.csv: an evaluation; the last one of a training is its end, which is judged.

    >>> list(runs().columns[:4]), list(runs().columns[-3:])
    (['notebook', 'preset', 'dataset', 'network'], ['accuracy', 'flops', 'images'])
    """
    import pandas as pd

    from effilib.results import COLUMNS

    frames = [pd.DataFrame(columns=[*ENVIRONMENT, *COLUMNS])]
    for record in itertools.chain(*recorded().values()):
        file = record["folder"] / "history.csv"
        if not older(record) and file.exists():
            machine = record.get("machine") or {}
            history = pd.read_csv(file)
            own = {"notebook": record["folder"].name, "machine": machine.get("device")}
            for i, name in enumerate(ENVIRONMENT):
                history.insert(i, name, own.get(name, record.get(name, machine.get(name))))
            frames.append(history)
    return pd.concat([f for f in frames if len(f)] or frames, ignore_index=True)


def update_runs() -> Path:
    """Write `all.csv` beside the records. Returns its path.

    >>> update_runs().name
    'all.csv'
    """
    table = runs().to_csv(index=False, float_format="%.6g")
    return paths.write(paths.recorded() / "all.csv", table)


def readme_table() -> str:
    """Return the README's table of chapters, computed, never typed.

    >>> print(readme_table().splitlines()[0])
    | chapter | notebook | attacks | applies to | source | recorded |
    """
    rows = ["| chapter | notebook | attacks | applies to | source | recorded |", "|---|---|---|---|---|---|"]
    found = recorded()
    for c in CHAPTERS:
        name = f"[{c.title}](notebooks/{c.stem}.ipynb)" if c.exists else f"{c.title} (to come)"
        result = say(found.get(c.stem, [{}])[-1])
        said = (c.info.applies, c.info.paper) if c.info else ("", "")
        rows.append(" | ".join(["| " + c.number, name, ATTACKS.get(c.attacks, ""), *said, result + " |"]))
    if any(row.endswith(f"| {OLDER} |") for row in rows):
        rows += ["", OLDER_NOTE]
    return "\n".join(rows)


def answer() -> str:
    """Return what saves time, by chapter 10's record, in Markdown.

    Three lines.

    >>> answer().count("\\n") in (0, 2)
    True
    """
    record = recorded().get("10_comparison", [{}])[-1]
    head = record.get("headline")
    if older(record) or not head:
        return "*What saves most (chapter 10) is not measured yet under the present protocol.*"
    alone = {}
    for v in record["verdicts"]:
        if (
            v["verdict"].startswith("faster")
            and " + " not in v["arm"]
            and not v["arm"].startswith("without ")
        ):
            alone.setdefault(v["arm"], v["ratio"])  # the first is of all arms, side by side
    named = ", ".join(f"{arm} {alone[arm]:.2f}x" for arm in sorted(alone, key=lambda a: -alone[a])) or "none"
    aim = f" (aim {head['aim']:g}x: {head['aim_verdict']})" if head.get("aim") else ""
    lines = (
        f"**On my {record['machine']['summary']}: {head['arm']}, {head['verdict']}.**",
        f"{head['text']}, on {record['dataset']}{aim}.",
        f"Faster by themselves: {named}.",
    )
    return "  \n".join(lines)


def with_table(readme: str) -> str:
    """Return the README's text with answer and table brought up to date.

    >>> text = with_table("before <!-- chapters --> stale <!-- /chapters --> after")
    >>> "stale" in text, text.endswith("<!-- /chapters --> after")
    (False, True)
    """
    for name, made in (("answer", answer), ("chapters", readme_table)):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in readme:
            head, rest = readme.split(begin)
            readme = f"{head}{begin}\n{made()}\n{end}{rest.split(end)[1]}"
    return readme


def picture() -> Path:
    """Return the scoreboard's file among the recorded results, which the README shows.

    >>> picture().name
    'scoreboard.png'
    """
    return paths.recorded() / "scoreboard.png"


def drawn(file: str | Path) -> str:
    """Return the digest of the `headlines` that a picture shows; "" where there is none.

    >>> drawn("nowhere.png")
    ''
    """
    from PIL import Image  # it comes with matplotlib

    try:
        with Image.open(file) as image:
            return str(image.info.get("Description", ""))
    except OSError:
        return ""


def update_picture() -> bool:
    """Draw the scoreboard anew where other results are recorded than it shows.

    >>> update_picture() and update_picture()  # the second time there is nothing to do
    False
    """
    rows = headlines()
    digest = provenance.digest(rows)
    if not rows or drawn(picture()) == digest:
        return False
    from effilib import figures  # matplotlib takes seconds

    paths.write(picture(), figures.png(figures.scoreboard(rows), Description=digest))
    return True


def update() -> None:
    """Bring all that is made from the records up to date: README, scoreboards, `all.csv`.

    >>> update()  # python -m effilib.workbook.series
    >>> with_table(text := (paths.root() / "README.md").read_text()) == text
    True
    """
    from effilib.workbook import report  # which imports this module

    file = paths.root() / "README.md"
    if file.exists():
        paths.write(file, with_table(file.read_text(encoding="utf-8")))
    if paths.recorded().exists():
        update_picture()
        update_runs()
        report.recorded_index()


if __name__ == "__main__":  # python -m effilib.workbook.series
    update()
