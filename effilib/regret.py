"""What is right for a patient, and how well a diagnosis finds it: frames in, frames out.

The truth is brute force: every candidate trained for the same time, with several seeds. Its regret is how
many points it stays behind the best. A point is worth time too: trained longer, the network as it is would
have won it; how much longer, its own curve tells.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from statsmodels.stats.proportion import proportion_confint

__all__ = ["chosen", "exchange", "halves", "regrets", "runs", "scores"]

KEEP = "keep"


def runs(rows: Iterable[dict]) -> pd.DataFrame:
    """Return a sweep's rows as a frame.

    Columns: patient, candidate, length, seed, accuracy (%). The arms are called "patient: candidate". length:
    share of the candidate's longest training. A run that diverged counts as 0 %.

    >>> rows = [dict(arm="a: keep", epochs=e, seed=0.0, accuracy=60 + e) for e in (1.0, 2.0)]
    >>> runs(rows)["length"].tolist()
    [0.5, 1.0]
    """
    frame = pd.DataFrame(list(rows), columns=["arm", "epochs", "seed", "accuracy"])
    names = [arm.rpartition(": ") for arm in frame["arm"]]
    frame["patient"], frame["candidate"] = ([name[i] for name in names] for i in (0, 2))
    frame["length"] = frame["epochs"] / frame.groupby("arm")["epochs"].transform("max")
    frame["accuracy"] = frame["accuracy"].fillna(0.0)
    return frame.reindex(columns=["patient", "candidate", "length", "seed", "accuracy"])


def halves(seeds: Iterable) -> tuple[list, list]:
    """Return the seeds that choose patients and those that judge.

    Patients are chosen by the first, diagnoses judged by the others. Every second one, so that a sweep that
    goes on keeps both; of an odd number the judging half is larger.

    >>> halves([0, 1, 2, 3, 4])
    ([1, 3], [0, 2, 4])
    """
    seeds = sorted(set(seeds))
    return seeds[1::2], seeds[::2]


def exchange(runs: pd.DataFrame) -> pd.Series:
    """Return what an e-fold of time is worth to each patient.

    In points, to the patient as it is. From the lengths at which it was kept; NaN where there is one only.

    >>> rows = [("a", "keep", 0.5, 0, 60.0), ("a", "keep", 1.0, 0, 67.0)]
    >>> frame = pd.DataFrame(rows, columns=["patient", "candidate", "length", "seed", "accuracy"])
    >>> exchange(frame).round(1).to_dict()  # 7 points for twice the time
    {'a': 10.1}
    """
    kept = runs[runs["candidate"] == KEEP].groupby(["patient", "length"])["accuracy"].mean()
    slopes = {}
    for patient, curve in kept.groupby(level="patient"):
        x, y = np.log(curve.index.get_level_values("length").to_numpy(float)), curve.to_numpy()
        slopes[patient] = np.polyfit(x, y, 1)[0] if len(x) > 1 else np.nan
    return pd.Series(slopes, dtype=float, name="points an e-fold")


def regrets(runs: pd.DataFrame, seeds: Sequence | None = None) -> pd.DataFrame:
    """Return every candidate's regret, the best first.

    A row for each (patient, candidate). Columns: accuracy (mean, %), se (standard error of a mean; the spread
    is pooled over all candidates), n, points (of regret), time % (what these are worth by `exchange`, NaN if
    that is not known), right (within one standard error of the best). seeds: those that count (None: all).

    >>> rows = [("a", c, 1.0, s, 60 + d + s) for c, d in (("keep", 0), ("widen stage 1", 4)) for s in (0, 1)]
    >>> frame = pd.DataFrame(rows, columns=["patient", "candidate", "length", "seed", "accuracy"])
    >>> regrets(frame)[["accuracy", "points", "right"]].to_dict("list")
    {'accuracy': [64.5, 60.5], 'points': [0.0, 4.0], 'right': [True, False]}
    """
    slope = exchange(runs)
    full = runs[np.isclose(runs["length"], 1.0)]
    full = full[full["seed"].isin(seeds)] if seeds is not None else full
    cells = full.groupby(["patient", "candidate"], sort=False)["accuracy"]
    table = cells.agg(accuracy="mean", n="count")
    degrees = (table["n"] - 1).sum()
    pooled = np.sqrt((cells.var(ddof=0) * table["n"]).sum() / degrees) if degrees else np.nan
    table["se"] = pooled / np.sqrt(table["n"])
    best = table["accuracy"].groupby(level="patient").transform("max")
    table["points"] = best - table["accuracy"]
    per = table.index.get_level_values("patient").map(slope).to_numpy(float)
    with np.errstate(over="ignore"):  # of a curve that is nearly flat: infinite
        table["time %"] = 100 * np.expm1(table["points"].to_numpy() / np.where(per > 0, per, np.nan))
    table["right"] = table["points"] <= table["se"].fillna(0.0)
    order = {p: i for i, p in enumerate(dict.fromkeys(runs["patient"]))}
    table = table.reset_index()
    table["order"] = table["patient"].map(order)
    table = table.sort_values(["order", "points"], kind="stable").set_index(["patient", "candidate"])
    return table.reindex(columns=["accuracy", "se", "n", "points", "time %", "right"])


def chosen(runs: pd.DataFrame, cures: dict[str, str], seeds: Sequence) -> list[str]:
    """Return the patients whose planted defect matters, by these seeds.

    Its cure is right, and to keep the network is not, but for a healthy one. cures: patient -> candidate,
    "keep" for a healthy one.

    >>> rows = [(p, c, 1.0, 0, a) for p, c, a in (("a", "keep", 60), ("a", "x", 65), ("b", "keep", 61))]
    >>> frame = pd.DataFrame(rows, columns=["patient", "candidate", "length", "seed", "accuracy"])
    >>> chosen(frame, {"a": "keep", "b": "keep"}, seeds=[0])
    ['b']
    """
    right = regrets(runs, seeds)["right"]
    matters = {p for p, c in cures.items() if c == KEEP or not right.get((p, KEEP))}
    return [p for p, c in cures.items() if p in matters and right.get((p, c))]


def scores(trials: pd.DataFrame, table: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Return how well each diagnosis did, a row each.

    trials: a row for each (diagnosis, patient, seed, candidate): score, seconds (of the whole diagnosis).
    table: of `regrets`; what it does not hold is left out. Columns: trials, hits (share in which what it
    ranked first is right), low and high (Wilson's interval, as if trials were independent; those of a patient
    are not quite), rank correlation (Spearman, of scores with true accuracies, mean), points and time % (of
    regret, mean), seconds (median). Ties for the first place count by their mean.

    >>> index = pd.MultiIndex.from_tuples([("a", "keep"), ("a", "x")], names=["patient", "candidate"])
    >>> table = pd.DataFrame({"accuracy": [60.0, 65], "points": [5.0, 0]}, index=index)
    >>> table = table.assign(right=table["points"] == 0, **{"time %": 10 * table["points"]})
    >>> told = [("good", "a", 0, "keep", 0.0, 1.5), ("good", "a", 0, "x", 2.0, 1.5)]
    >>> columns = ["diagnosis", "patient", "seed", "candidate", "score", "seconds"]
    >>> scores(pd.DataFrame(told, columns=columns), table)[["hits", "points", "seconds"]].iloc[0].tolist()
    [1.0, 0.0, 1.5]
    """
    joined = trials.join(table[["accuracy", "points", "time %", "right"]], on=["patient", "candidate"])
    joined = joined.dropna(subset=["accuracy"])
    found = {}
    for name, mine in joined.groupby("diagnosis", sort=False):
        each = [_trial(t) for _, t in mine.groupby(["patient", "seed"], sort=False)]
        frame = pd.DataFrame(each)
        n, hits = len(frame), frame["hit"].sum()
        low, high = proportion_confint(hits, n, alpha=1 - level, method="wilson")
        found[name] = {"trials": n, "hits": hits / n, "low": low, "high": high}
        means = frame[["rank correlation", "points", "time %"]].mean()
        found[name] |= {**means.to_dict(), "seconds": frame["seconds"].median()}
    return pd.DataFrame(found).T.rename_axis("diagnosis")


def _trial(told):
    """What one ranking came to."""
    first = told[told["score"] == told["score"].max()]
    varied = told["score"].nunique() > 1 and told["accuracy"].nunique() > 1
    return {
        "hit": first["right"].astype(float).mean(),
        "rank correlation": spearmanr(told["score"], told["accuracy"])[0] if varied else 0.0,
        "points": first["points"].mean(),
        "time %": first["time %"].mean(),
        "seconds": told["seconds"].iloc[0],
    }
