"""The series: its chapters in order, what each attacks, and what was recorded of it."""

import importlib
import importlib.util
from dataclasses import dataclass

from effilib import paths, provenance

ATTACKS = {  # training time = steps x images per step x operations per image x seconds per operation
    "operations": "seconds per operation",
    "arithmetic": "operations per image",
    "images": "images needed",
    "structure": "operations per image, by another network",
    "steps": "steps to the target",
}


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A chapter: notebook's stem, number in the thesis, titles, the module with its method, and the factor of
    time it attacks.

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
        """The method's `INFO`, or None where the chapter has none or it is not written yet."""
        if not self.module or not importlib.util.find_spec(f"effilib.methods.{self.module}"):
            return None
        return importlib.import_module(f"effilib.methods.{self.module}").INFO

    @property
    def exists(self):
        """Whether its notebook is written."""
        return (paths.notebooks() / f"{self.stem}.ipynb").is_file()


def _chapter(stem, number, title, title_de, module="", attacks=""):
    return Chapter(stem=stem, number=number, title=title, title_de=title_de, module=module, attacks=attacks)


CHAPTERS = (
    _chapter("02_overview", "2", "Where training time goes", "Überblick"),
    _chapter("03_1_convolution_cost", "3.1", "What a convolution costs", "Kosten einer Faltung"),
    _chapter(
        "03_2_mixed_precision",
        "3.2",
        "Mixed precision",
        "Halbierung der Bits",
        "mixed_precision",
        "operations",
    ),
    _chapter(
        "03_3_dynamic_fixed_point",
        "3.3",
        "Dynamic fixed point",
        "Dynamisches Festkomma",
        "dynamic_fixed_point",
        "operations",
    ),
    _chapter(
        "03_4_approximate_tensor_operations",
        "3.4",
        "Approximate tensor operations",
        "Approximative Tensoroperationen",
        "column_row_sampling",
        "arithmetic",
    ),
    _chapter(
        "04_1_activation_gradient_pruning",
        "4.1",
        "Pruning the activation gradient",
        "Verdünnung des Aktivierungsgradienten",
        "gradient_pruning",
        "arithmetic",
    ),
    _chapter(
        "04_2_gradient_approximation",
        "4.2",
        "Gradient approximation",
        "Gradientenapproximation",
        "gradient_approximation",
        "arithmetic",
    ),
    _chapter(
        "05_1_stochastic_pooling",
        "5.1",
        "Stochastic pooling",
        "Stochastisches Pooling",
        "stochastic_pooling",
        "images",
    ),
    _chapter(
        "05_2_structure_and_strength",
        "5.2",
        "Structure and strength of filters",
        "Struktur und Stärke von Filtern",
        "structure_and_strength",
        "images",
    ),
    _chapter(
        "06_1_prune_train",
        "6.1",
        "PruneTrain",
        "Beschneiden während des Trainings",
        "prune_train",
        "structure",
    ),
    _chapter("06_2_net2net", "6.2", "Net2Net", "Net2Net", "net2net", "steps"),
    _chapter(
        "06_3_kernel_rescaling",
        "6.3",
        "Kernel rescaling",
        "Skalierung der Filter",
        "kernel_rescaling",
        "arithmetic",
    ),
    _chapter(
        "06_4_layer_replacement",
        "6.4",
        "Resource-aware layer replacement",
        "Ressourcenbewusste Schichten",
        "layer_replacement",
        "structure",
    ),
    _chapter("07_1_tree_cnn", "7.1", "Tree-CNN", "Tree-CNN", "tree_cnn", "structure"),
    _chapter(
        "07_2_standardization_loss",
        "7.2",
        "Standardization loss",
        "Standardisierungsverlust",
        "standardization_loss",
        "operations",
    ),
    _chapter("07_3_wavelet", "7.3", "Wavelets", "Wavelets", "wavelet", "arithmetic"),
    _chapter("08_practical_setting", "II.8", "Setting of the practical part", "Rahmen des praktischen Teils"),
    _chapter(
        "09_prune_then_grow",
        "II.9",
        "Prune while training, then grow",
        "Beschneiden, dann wachsen",
        "prune_then_grow",
        "structure",
    ),
    _chapter("10_comparison", "10", "Every method side by side", "Vergleich"),
)


def chapter(stem):
    """The chapter of a notebook, also of one that a user added to the folder.

    >>> chapter("06_1_prune_train").title_de
    'Beschneiden während des Trainings'
    """
    return next((c for c in CHAPTERS if c.stem == stem), None) or _chapter(
        stem, stem.split("_")[0], stem.replace("_", " "), ""
    )


def recorded():
    """The committed record of every chapter: dict stem -> list of records, newest last.

    >>> "03_2_mixed_precision" in recorded()
    True
    """
    found = {}
    for file in sorted(paths.recorded().glob("*-*/*/record.json")):
        record = paths.read_json(file)
        if isinstance(record, dict) and record.get("status") == "complete":
            found.setdefault(file.parent.name, []).append(record | {"folder": file.parent})
    return {stem: sorted(records, key=lambda r: r.get("date", "")) for stem, records in found.items()}


def readme_table():
    """The README's table of chapters, in Markdown: it comes from here and from the methods' `INFO`, never
    typed.

    >>> print(readme_table().splitlines()[0])
    | chapter | notebook | attacks | source | recorded |
    """
    rows = ["| chapter | notebook | attacks | source | recorded |", "|---|---|---|---|---|"]
    found = recorded()
    for c in CHAPTERS:
        name = f"[{c.title}](notebooks/{c.stem}.ipynb)" if c.exists else f"{c.title} (to come)"
        head = (found.get(c.stem, [{}])[-1] or {}).get("headline")
        result = f"{head['text']}: {head['verdict']}" if head else ""
        rows.append(
            f"| {c.number} | {name} | {ATTACKS.get(c.attacks, '')} | {c.info.paper if c.info else ''} | {result} |"
        )
    return "\n".join(rows)


def with_table(readme):
    """The README's text with its table of chapters brought up to date.

    >>> text = with_table("before <!-- chapters --> old <!-- /chapters --> after")
    >>> "old" in text, text.endswith("<!-- /chapters --> after")
    (False, True)
    """
    begin, end = "<!-- chapters -->", "<!-- /chapters -->"
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{readme_table()}\n{end}{rest.split(end)[1]}"


def headlines():
    """What was recorded last of every chapter, in order, where a verdict came of it: plain values for
    `figures.scoreboard`.

    >>> row = headlines()[0]
    >>> row["chapter"], row["title"]
    ('3.2', 'Mixed precision')
    """
    found, rows = recorded(), []
    for c in CHAPTERS:
        record = found.get(c.stem, [{}])[-1]
        if record.get("headline"):
            head = {
                k: record["headline"].get(k)
                for k in ("arm", "against", "quantity", "ratio", "low", "high", "verdict", "text")
            }
            rows.append(
                {
                    "chapter": c.number,
                    "title": c.title,
                    "preset": record.get("preset"),
                    "dataset": record.get("dataset"),
                    **head,
                }
            )
    return rows


def picture():
    """The scoreboard's file among the recorded results, which the README shows.

    >>> picture().name
    'scoreboard.png'
    """
    return paths.recorded() / "scoreboard.png"


def drawn(file):
    """The digest of the `headlines` that a picture shows, which `update_picture` writes into it; "" where
    there is none.

    >>> drawn("nowhere.png")
    ''
    """
    from PIL import Image  # it comes with matplotlib

    try:
        with Image.open(file) as image:
            return image.info.get("Description", "")
    except OSError:
        return ""


def update_picture():
    """Draw the scoreboard anew where it shows other results than the recorded ones. Returns whether it was
    drawn.

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


def update_readme():
    """Bring the checkout's README up to date: its table of chapters, and its picture.

    >>> update_readme()  # python -m effilib.workbook.series
    >>> with_table(text := (paths.root() / "README.md").read_text()) == text
    True
    """
    file = paths.root() / "README.md"
    if file.exists():
        paths.write(file, with_table(file.read_text(encoding="utf-8")))
        update_picture()


if __name__ == "__main__":  # python -m effilib.workbook.series
    update_readme()
