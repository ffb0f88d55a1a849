"""Chapter 10's last table: what a practitioner should use, computed from what was measured there and from the
records.
"""

import pandas as pd

from effilib.chapters import records as recorded
from effilib.chapters.comparison import MIXED
from effilib.chapters.contenders import GIVEN
from effilib.statistics import FASTER, LEAST, Verdict
from effilib.workbook import series


def recommended(verdicts):
    """(what to use, what was measured): of the `Verdict`s that are faster at equal accuracy the one with the
    best lower bound.
    """
    judged = [v for v in verdicts if v.n >= LEAST]
    faster = [v for v in judged if v.verdict == FASTER]
    if faster:
        v = max(faster, key=lambda v: v.low)
        return v.arm, f"{v.text}, {v.accuracy_difference:+.2f} points"
    ratios = [v for v in judged or verdicts if v.ratio is not None]
    nearest = max(ratios, key=lambda v: v.ratio, default=None)
    what = (
        f"the fastest: {nearest.arm}, {nearest.text}, {nearest.accuracy_difference:+.2f} points"
        if nearest
        else "none reached the target"
    )
    if not verdicts:
        return "not measured here", ""
    if not judged:
        return f"no verdict here: fewer than {LEAST} seeds", what
    return "plain training", f"of {len(judged)} none was faster at equal accuracy; {what}" + (
        f" ({nearest.verdict})" if nearest else ""
    )


def table(result, records):
    """Use this: on a CPU, on a GPU, with little data, with a network to be improved. Computed from what was
    measured here and recorded.
    """
    rows, mixed = {}, result.mixed()
    for kind, name in (("cpu", "on a CPU"), ("cuda", "on a GPU")):
        use, what = recommended(verdicts_on(result, records, kind))
        others = recorded.on_device(records, kind)
        where = (
            f"chapters {recorded.numbers(others)}"
            if others
            else f"none of {len(records)} records comes from such a device"
        )
        if result.task.device.startswith(kind):
            where = "this notebook"
            what += f"; {MIXED}, in all arms: {mixed.text}, against fp32" if mixed else ""
        rows[name] = use, what, where
    few = {c.stem: records[c.stem][0] for c in series.CHAPTERS if c.attacks == "images" and c.stem in records}
    images = sorted({r["task"]["images"] or 0 for r in few.values()})
    where = f"chapters {recorded.numbers(few)}: {' and '.join(f'{n:,}' for n in images)} training images"
    use, what = recommended([v for r in few.values() for v in recorded.verdicts(r)])
    rows["with little data"] = use, what, where if few else "no record of a chapter on few images"
    own = [result.of(GIVEN).verdict(GIVEN)] if result.of(GIVEN) else []
    older = {
        s: records[s][0]
        for s in ("06_2_net2net", "09_prune_then_grow")
        if s in records and records[s][0].get("headline")
    }
    use, what = recommended([*own, *(Verdict(**r["headline"]) for r in older.values())])
    places = ["this notebook"] * bool(own) + [f"chapters {recorded.numbers(older)}"] * bool(older)
    rows["with a network to be improved"] = (
        use,
        what,
        " and ".join(places) or "no such arm here, and no record",
    )
    return pd.DataFrame(rows, index=["use", "measured", "where"]).T.rename_axis("situation")


def verdicts_on(result, records, kind):
    """All verdicts on a kind of device: this notebook's where it ran on one, else those of the records. No
    student with a given teacher.
    """
    if result.task.device.startswith(kind):
        return [v for c in result.comparisons for v in c.verdicts() if v.arm != GIVEN]
    return [v for r in recorded.on_device(records, kind).values() for v in recorded.verdicts(r)]
