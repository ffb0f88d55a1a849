"""Regrets and scores on small tables that were worked out by hand."""

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from effilib.regret import chosen, exchange, halves, regrets, runs, scores

COLUMNS = ["patient", "candidate", "length", "seed", "accuracy"]
TRUTH = pd.DataFrame(
    [
        ("thin", "keep", 0.5, 0, 53.0), ("thin", "keep", 0.5, 1, 55.0),
        ("thin", "keep", 1.0, 0, 60.0), ("thin", "keep", 1.0, 1, 62.0),
        ("thin", "widen stage 1", 1.0, 0, 65.0), ("thin", "widen stage 1", 1.0, 1, 67.0),
        ("thin", "deepen stage 1", 1.0, 0, 64.5), ("thin", "deepen stage 1", 1.0, 1, 66.5),
        ("well", "keep", 1.0, 0, 70.0), ("well", "keep", 1.0, 1, 74.0),
        ("well", "widen stage 1", 1.0, 0, 69.0), ("well", "widen stage 1", 1.0, 1, 69.0),
    ],
    columns=COLUMNS,
)  # fmt: skip


def test_a_sweeps_rows_become_runs():
    rows = [
        dict(arm="stage 1 narrow: widen stage 2", epochs=3.2, seed=7.0, accuracy=60.0, loss=1.0, setting={}),
        dict(arm="stage 1 narrow: keep", epochs=4.0, seed=7.0, accuracy=61.0, loss=1.0, setting={}),
        dict(arm="stage 1 narrow: keep", epochs=2.0, seed=7.0, accuracy=55.0, loss=1.0, setting={}),
    ]
    expected = [
        ("stage 1 narrow", "widen stage 2", 1.0, 7.0, 60.0),
        ("stage 1 narrow", "keep", 1.0, 7.0, 61.0),
        ("stage 1 narrow", "keep", 0.5, 7.0, 55.0),
    ]
    assert_frame_equal(runs(rows), pd.DataFrame(expected, columns=COLUMNS))
    assert runs([]).empty
    assert runs([{**rows[0], "accuracy": float("nan")}])["accuracy"].tolist() == [0.0]


def test_regrets_are_points_behind_the_best_and_right_is_within_a_standard_error():
    table = regrets(TRUTH)
    thin = table.loc["thin"]
    assert thin["accuracy"].to_dict() == {"widen stage 1": 66.0, "deepen stage 1": 65.5, "keep": 61.0}
    assert thin["points"].tolist() == [0.0, 0.5, 5.0]
    # squares within cells: 2 + 2 + 2 + 8 + 0 on 5 degrees of freedom; two runs a mean
    assert table["se"].tolist() == pytest.approx([(14 / 5 / 2) ** 0.5] * 5)
    assert thin["right"].tolist() == [True, True, False]
    assert table.loc["well"]["right"].to_dict() == {"keep": True, "widen stage 1": False}
    assert table["n"].tolist() == [2] * 5


def test_a_point_is_worth_the_time_in_which_the_patient_itself_would_win_it():
    slope = exchange(TRUTH)
    assert slope["thin"] == pytest.approx(7 / 0.693147, rel=1e-5)
    assert pd.isna(slope["well"])
    table = regrets(TRUTH)
    assert table.loc[("thin", "keep"), "time %"] == pytest.approx(100 * (2 ** (5 / 7) - 1))
    assert pd.isna(table.loc[("well", "widen stage 1"), "time %"])


def test_patients_are_chosen_on_one_half_of_the_seeds_and_judged_on_the_other():
    choosing, judging = halves(TRUTH["seed"])
    assert (choosing, judging) == ([1], [0])
    assert halves(range(6)) == ([1, 3, 5], [0, 2, 4])
    cures = {"thin": "widen stage 1", "well": "keep"}
    assert chosen(TRUTH, cures, choosing) == ["thin", "well"]
    assert chosen(TRUTH, {"thin": "keep", "well": "widen stage 1"}, choosing) == []
    near = TRUTH["accuracy"].where(TRUTH["candidate"] != "keep", TRUTH["accuracy"] + 5)
    assert chosen(TRUTH.assign(accuracy=near), cures, [0, 1]) == [
        "well"
    ]  # "thin" is as well off if it is kept
    only = TRUTH.assign(accuracy=TRUTH["accuracy"].where(TRUTH["seed"] == 0, 0.0))
    assert regrets(only, [0])["accuracy"].min() > 0


def trials(**ranked):
    """diagnosis -> its first choice for "thin"; the rest gets 0."""
    rows = [
        (name, patient, seed, candidate, float(candidate == first), 2.0 + seed)
        for name, first in ranked.items()
        for seed in (0, 1, 2)
        for patient, candidate in TRUTH[["patient", "candidate"]].drop_duplicates().to_numpy()
    ]
    return pd.DataFrame(rows, columns=["diagnosis", "patient", "seed", "candidate", "score", "seconds"])


def test_scores_count_hits_regret_ranks_and_seconds():
    table = regrets(TRUTH)
    told = trials(wider="widen stage 1", keeps="keep")
    found = scores(told, table)
    assert found["trials"].tolist() == [6, 6]
    assert found["hits"].to_dict() == {"wider": 0.5, "keeps": 0.5}
    assert found.loc["wider", "points"] == pytest.approx((0 + 3) / 2)
    assert found.loc["keeps", "points"] == pytest.approx((5 + 0) / 2)
    assert found["seconds"].tolist() == [3.0, 3.0]
    # Wilson by hand: (p + z^2 / 2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n)
    z, n = 1.959964, 6
    half = z * (0.25 / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    assert found.loc["keeps", ["low", "high"]].tolist() == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)


def test_a_ranking_by_the_truth_correlates_perfectly_and_one_of_ties_not_at_all():
    table = regrets(TRUTH)
    told = trials(truth="", none="")
    true = told.join(table["accuracy"], on=["patient", "candidate"])["accuracy"]
    told["score"] = true.where(told["diagnosis"] == "truth", 1.0)
    found = scores(told, table)
    assert found["rank correlation"].tolist() == [1.0, 0.0]
    assert found["hits"].tolist() == pytest.approx([1.0, (2 / 3 + 1 / 2) / 2])
    assert scores(told, table.drop("well"))["trials"].tolist() == [3, 3]
