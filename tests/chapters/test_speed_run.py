"""What chapter 11 trains: the tricks left out and alone, and what might improve our recipe."""

from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from scipy import stats

from effilib import paths
from effilib.chapters import speed_run as chapter
from effilib.experiment import check_arms
from effilib.tasks import task


def ablated(preset, network="", **settings):
    t = chapter.with_recipe(task(preset, "cifar10", network, device="cpu", **settings)).sized(
        chapter.ABLATION
    )
    arms = chapter.ablation(t)
    check_arms(t, arms)
    return t, {a.name: a for a in arms}


def test_every_trick_is_left_out_and_tried_alone_at_the_same_lengths():
    t, arms = ablated("study")
    tricks = [*chapter.TRICK, *chapter.WITHOUT]
    own = [f"ours without {n}" for n in chapter.OWN]
    assert {*(f"without {n}" for n in tricks), *own, "ours", "none of them"} < set(arms)
    assert {f"only {n}" for n in (*tricks, *chapter.OWN)} < set(arms)
    assert len(t.lengths) == 2  # of one length no epochs saved can follow
    assert {a.lengths for a in arms.values()} == {(), t.lengths}
    plain, flips = arms["none of them"].task(t).recipe, arms["only alternating flips"].task(t).recipe
    assert [plain.flips, plain.label_smoothing, plain.multi_crop] == ["random", 0.0, 0.0]
    assert [flips.flips, flips.label_smoothing, flips.multi_crop] == ["alternating", 0.0, 0.0]
    assert [type(m).__name__ for m in arms["only Muon"].methods] == ["Muon"]
    whole = arms["ours"].methods
    assert [len(whole) - len(arms[name].methods) for name in own] == [1, 1]
    assert list(ablated("quick")[1]) == [
        "published", *(f"without {n}" for n in chapter.TRICK), "none of them"
    ]  # fmt: skip


def test_what_might_improve_our_recipe_is_tried():
    _, arms = ablated("study")
    found = {n: a for n, a in arms.items() if n.startswith("ours, ")}
    assert [a.network for a in found.values()] == [{"stem": 32}, {"activation": "silu"}, {}]
    assert type(found["ours, data pruning"].methods[-1]).__name__ == "DataPruning"
    assert not [n for n in ablated("study", "vgg", epochs=2)[1] if n.startswith("ours, ")]


@pytest.mark.parametrize(
    ("dataset", "published", "ours", "said"),
    [
        ("cifar10", (94.1, 900), (94.1, 500), ["met", "met"]),
        ("cifar10", (93.5, 900), (94.1, 700), ["missed", "missed"]),
        ("cifar10", (94.0, 900), (94.0, 500), ["not decided", "not decided"]),
        ("mnist5k", (99.0, 1), (99.0, 1), ["not decided (it needs CIFAR-10, on a machine of its own)"] * 2),
    ],
)
def test_the_notebook_judges_its_aims_on_cifar10_alone(dataset, published, ours, said):
    runs = {
        name: [SimpleNamespace(test_accuracy=a + 0.02 * i, seconds=s + i) for i in range(-2, 3)]
        for name, (a, s) in (("published", published), ("ours", ours))
    }
    arms = [SimpleNamespace(name=name) for name in runs]
    main = SimpleNamespace(
        arms=arms, lengths=[1.0], cells=[{"shared": False}], histories=lambda name, length: runs[name]
    )
    book = SimpleNamespace(dataset=SimpleNamespace(name=dataset))
    names = dict(main=main, book=book, chapter=chapter, pd=pd, stats=stats)
    cells = nbformat.read(paths.notebooks() / "11_speed_run.ipynb", 4).cells
    exec(next(c.source for c in cells if c.source.startswith("def decide")), names)
    assert [aim.split(": ")[-1] for aim in names["aims"]] == [f"{word}." for word in said]
