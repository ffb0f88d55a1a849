"""Presets, tasks and their recipes: defaults, changes, and names that do not exist."""

import itertools
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effilib import data, paths, tasks, tuning
from effilib.errors import BadInput
from effilib.recipe import Recipe
from effilib.seeds import stream
from effilib.tasks import PRESETS, task


@pytest.fixture
def mine(tmp_path):
    """A user's own small data set."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(
        tmp_path / "mine.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:9],
        test_labels=labels[:9],
    )
    return str(tmp_path / "mine.npz")


# --- presets and defaults


def test_the_preset_comes_from_the_environment_else_it_is_quick(monkeypatch):
    monkeypatch.setenv("EFFILIB_PRESET", "study")
    assert task(dataset="mnist5k").preset == "study"
    assert task("smoke").preset == "smoke"  # an explicit value wins
    monkeypatch.setenv("EFFILIB_PRESET", "")
    assert task().preset == "quick"
    monkeypatch.delenv("EFFILIB_PRESET")
    assert task().preset == "quick"
    monkeypatch.setenv("EFFILIB_PRESET", "quikc")
    with pytest.raises(
        BadInput,
        match=r"unknown preset 'quikc': choose one of smoke, quick, study, full \(did you mean 'quick'\?\)",
    ):
        task()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_data_set_and_sizes(preset, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path))  # no file is needed to make a task
    t = task(preset)
    assert (
        t.dataset
        == {"smoke": "mnist5k", "quick": "mnist5k", "study": "fashion_mnist", "full": "cifar10"}[preset]
    )
    assert t.seeds == {"smoke": 1, "quick": 3}.get(preset, 5)
    assert len(t.lengths) == {"smoke": 2, "quick": 2, "study": 3, "full": 5}[preset]
    assert t.network == "resnet"


def test_study_takes_cifar10_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path))
    assert tasks.default_dataset("study") == "fashion_mnist"
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert tasks.default_dataset("study") == "cifar10"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", ["base", "wide"])
def test_every_task_builds_its_network_for_its_images(preset, variant):
    t = task(preset, "synthetic", variant=variant, device="cpu")
    dataset = t.load()
    model = t.build(dataset)
    x, _ = next(dataset.batches(dataset.validation))
    assert model(x[:4]).shape == (4, 4)
    assert t.recipe.batch_size <= len(dataset.train)
    if variant == "wide" and preset != "smoke":
        assert tuple(model.settings()["widths"]) == (32, 64, 128)  # leaves room to prune


# --- what differs from the defaults


@pytest.mark.parametrize(
    "changes", [{"lr": 0.3}, {"images": 200}, {"epochs": 1, "widths": {}}, {"batch_size": 50, "seeds": 2}]
)
def test_what_the_user_asks_for_is_what_is_trained(changes):
    t = task("quick", "mnist5k", **changes)
    for name, value in changes.items():
        assert getattr(t.recipe if hasattr(t.recipe, name) else t, name) == value
    assert set(t.given) == set(changes)
    sized = t.sized({"quick": dict(lr=0.9, images=100, epochs=9, batch_size=7, seeds=1, validation=50)})
    for name, value in changes.items():  # a chapter does not change it
        assert getattr(sized.recipe if hasattr(sized.recipe, name) else sized, name) == value
    assert sized.validation == 50
    assert t.sized({"study": dict(images=7)}) == t


def test_a_network_that_nobody_tuned_takes_the_presets_recipe(mine):
    assert task("quick", "mnist5k", "vgg").widths == {}
    assert task("quick", "mnist5k", "vgg").tuned == {}
    assert task("quick", "mnist5k", "resnet").but(given=()) == task("quick", "mnist5k")
    assert set(task("quick", "mnist5k", "vgg").given) == {
        "network",
        "widths",
    }  # no chapter puts another in its place
    assert task("quick", mine).recipe == Recipe(epochs=3, batch_size=64, lr=0.2)


def test_a_length_is_a_share_of_the_epochs_at_what_is_tuned_for_as_many():
    t = task("quick", "mnist5k").but(
        epochs=8, tuned={2.0: {"lr": 0.4}, 8.0: {"lr": 0.1, "weight_decay": 0.01}}
    )
    lengths = 1.0, 0.55, 0.45, 0.25, 0.1
    assert [t.at(x).recipe.epochs for x in lengths] == pytest.approx([8 * x for x in lengths])
    assert [t.at(x).recipe.lr for x in lengths] == [
        0.1,
        0.1,
        0.4,
        0.4,
        0.4,
    ]  # the nearest by its ratio: from 4 epochs
    assert t.at(1.0).recipe.weight_decay == 0.01
    assert t.but(lr=0.7).at(0.1).recipe.lr == 0.7  # set by hand it is not tuned
    assert t.but(lr=0.7).at(1.0).recipe.weight_decay == 0.01


def test_a_length_may_be_a_share_of_the_images_at_as_many_updates(mine):
    t = task("smoke", "synthetic", images=200, device="cpu").but(axis="images", epochs=3)
    assert (t.at(0.1).images, t.at(0.1).recipe.epochs) == (20, 30)
    whole = task("quick", mine, device="cpu").but(axis="images", images=None, epochs=3)
    assert (whole.at(0.5).images, whole.at(1.0).images) == (26, 51)


def test_lengths_are_shares_of_the_images_that_are_there(mine):
    t = task("quick", mine).but(axis="images", images=10**6, lengths=(0.5, 1.0))
    there = len(t.load().train)
    assert [t.at(x).images for x in t.lengths] == [round(0.5 * there), there]
    assert [len(t.at(x).load().train) for x in t.lengths] == [round(0.5 * there), there]


def test_the_wide_task_keeps_what_the_user_asked_for():
    asked = dict(epochs=7, batch_size=50, lr=0.3, seeds=2, images=400)
    wide = task("quick", "mnist5k", **asked).wide().sized({"quick": dict(epochs=1, lr=9, images=1)})
    assert wide.variant == "wide"
    assert wide.widths["widths"] == (32, 64, 128)
    recipe, at = wide.recipe, wide.at(0.5).recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (7, 50, 0.3)
    assert (at.epochs, at.lr, wide.seeds, wide.images) == (3.5, 0.3, 2, 400)


def test_a_size_of_the_images_goes_into_the_load(tmp_path):
    from PIL import Image

    for i, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(30):
            Image.new("RGB", (12, 12), (50 * i, n, 0)).save(tmp_path / folder / f"{n}.png")
    assert task("smoke", str(tmp_path), size=8).load().shape == (3, 8, 8)
    with pytest.raises(BadInput, match="size is 0, it must be a whole number of pixels"):
        task("smoke", str(tmp_path), size=0)


def test_what_a_data_set_is_too_small_for_is_said(mine):
    t = task("quick", mine, epochs=1)
    sentences = t.beware(t.load())
    assert any(s.startswith("A training of ") and "too short" in s for s in sentences)
    assert any("held-out images is" in s for s in sentences)
    t = task("study", "mnist5k")
    assert t.beware(t.load()) == []


def test_changes_return_a_new_task():
    t = task("smoke", "mnist5k")
    changed = t.but(lr=0.5, images=64)
    assert (changed.recipe.lr, changed.images) == (0.5, 64)
    assert t == task("smoke", "mnist5k") != changed
    with pytest.raises(FrozenInstanceError):
        t.images = 3


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (dict(preset="fast"), "unknown preset 'fast': choose one of smoke, quick, study, full"),
        (dict(dataset="mnist5"), r"unknown data set 'mnist5': .*did you mean 'mnist5k'"),
        (dict(dataset="no/where.npz"), r"data set 'no/where\.npz': there is no such file or folder"),
        (dict(network="resnext"), "unknown network 'resnext': choose one of resnet, vgg, convnet"),
        (dict(variant="narrow"), "unknown variant 'narrow': choose one of base, wide"),
        (dict(lrr=0.1), r"unknown setting of a task 'lrr': choose one of .*"),
        (dict(schedule="step"), "unknown schedule 'step': choose one of linear, cosine, constant"),
        (dict(precision="fp8"), "unknown precision 'fp8': choose one of auto, fp32, tf32, bf16, fp16"),
        (dict(memory_format="nchw"), "unknown memory format 'nchw'"),
        (dict(lr=0), "lr is 0, it must be above 0"),
        (dict(batch_size=-1), "batch_size is -1, it must be a whole number above 0"),
        (dict(epochs=0), "epochs is 0, it must be above 0"),
        (dict(lr=float("nan")), "lr is nan, it must be above 0"),
        (dict(lengths=()), "lengths must be shares above 0"),
        (dict(lengths=(0.5, 0)), "a length is 0, it must be above 0"),
        (dict(lengths=(0.5, 0.5)), "lengths must differ from each other"),
        (dict(seeds=0), "seeds is 0, it must be a whole number above 0"),
        (dict(images=0), "images is 0, it must be a whole number above 0"),
        (dict(images=0.5), "images is 0.5, it must be a whole number above 0"),
        (dict(validation=-1), "validation is -1, it must be a whole number above 0"),
        (dict(lengths=1.0), "lengths must be shares above 0, got 1.0"),
        (dict(preset="big"), "unknown preset 'big'"),
        (dict(momentum=2), "momentum is 2, it must be from 0 to below 1"),
        (dict(axis="steps"), "unknown axis of lengths 'steps': choose one of epochs, images"),
        (dict(device="gpu"), "unknown device 'gpu': choose one of auto, cpu, cuda"),
    ],
)
def test_what_is_unknown_is_named(wanted, sentence):
    with pytest.raises(BadInput, match=sentence):
        task(**{"preset": "smoke", "dataset": "mnist5k"} | wanted)


def test_devices():
    assert tasks.pick_device("cpu") == "cpu"
    assert tasks.pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:1"):
            with pytest.raises(
                BadInput, match=f"device '{device}': this machine has no CUDA; choose auto or cpu"
            ):
                tasks.pick_device(device)


# --- data and weights of a task


def test_a_task_takes_the_presets_share_of_the_images():
    d = task("smoke", "mnist5k", images=100, validation=20, device="cpu").load()
    assert [len(s) for s in (d.train, d.decide, d.validation, d.test)] == [100, 250, 20, 60]
    assert torch.bincount(d.train.y).tolist() == [10] * 10
    whole = task("smoke", "mnist5k", images=None, validation=None, device="cpu").load()
    assert whole.digest == data.load("mnist5k").digest


def test_a_small_data_set_is_taken_whole(mine):
    d = task("quick", mine, device="cpu").load()
    assert [len(s) for s in (d.train, d.decide, d.validation, d.test)] == [51, 3, 6, 9]


def test_weights_depend_on_the_seed_alone():
    t = task("smoke", "synthetic", device="cpu")
    d = t.load()

    def weights(seed):
        return torch.cat([p.detach().flatten() for p in t.build(d, seed).parameters()])

    first = weights(0)
    torch.rand(5)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_a_network_may_have_other_widths_than_the_tasks():
    t = task("smoke", "synthetic", device="cpu")
    assert t.build(t.load(), widths=(4, 5, 6)).settings()["widths"] == [4, 5, 6]


def test_random_streams_of_a_seed_are_independent():
    """Initial weights, data order and methods' draws: none is another's continuation, nor correlated with
    it.
    """
    draws = {
        (seed, name): torch.rand(20_000, generator=stream(seed, name))
        for seed in (0, 1)
        for name in ("data", "dropout", "method 0", "method 1")
    }
    for (a, x), (b, y) in ((i, j) for i in draws.items() for j in draws.items() if i[0] < j[0]):
        assert not np.isin(x[:100].numpy(), y.numpy()).all(), (a, b)
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(x)), (a, b)
    assert torch.equal(torch.rand(5, generator=stream(0, "data")), draws[0, "data"][:5])


# --- the recipe's schedule


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.floats(0, 0.9),
    st.integers(1, 300),
    st.floats(1e-3, 2),
)
def test_the_learning_rate_rises_then_falls_and_stays_between_0_and_its_highest(schedule, warmup, steps, lr):
    recipe = Recipe(lr=lr, schedule=schedule, warmup=warmup)
    rates = [recipe.lr_at(step, steps) for step in range(steps)]
    top = int(np.argmax(rates))
    assert all(0 < r <= lr * (1 + 1e-9) for r in rates)
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(rates[top:]))
    assert abs(top - warmup * steps) <= 1
    if steps >= 20:
        assert rates[top] > 0.85 * lr


@pytest.mark.parametrize(
    ("schedule", "fall"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("constant", [1.0, 1.0, 1.0, 1.0])]
)
def test_the_schedule_by_hand(schedule, fall):
    recipe = Recipe(lr=1.0, schedule=schedule, warmup=0.5)
    assert [recipe.lr_at(step, 8) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, *fall])


def test_the_sweeps_lie_with_the_recorded_results():
    assert tasks.recorded_tuning() == paths.recorded() / "tuning"


SWEPT = [key for key in tasks.TUNED if tuning.sweep_file(task(*key[:2], variant=key[2])).exists()]


@pytest.mark.parametrize("key", SWEPT, ids="-".join)
def test_a_tuned_task_is_what_its_sweep_says(key):
    preset, dataset, variant = key
    t = task(preset, dataset, variant=variant)
    rows = tuning.read(tuning.sweep_file(t))
    best = {b["epochs"]: b for b in tuning.best(rows)}
    if (left := 32 - sum(r["epochs"] == max(best, default=0) for r in rows)) > 0:
        pytest.skip(f"the sweep is not finished: {left} runs of its longest length are left")
    for length in t.lengths:
        at = t.at(length).recipe
        mine = [
            r["accuracy"]
            for r in rows
            if r["epochs"] == pytest.approx(at.epochs, abs=1e-4)
            and r["setting"] == {"lr": at.lr, "weight_decay": at.weight_decay}
        ]
        assert len(mine) >= 2
        assert (
            np.mean(mine) >= best[round(at.epochs, 4)]["accuracy"] - 0.25
        )  # what two seeds cannot tell apart
    longest = max(best)
    tried = {tuple(sorted(r["setting"].items())) for r in rows if r["epochs"] == longest}
    assert len(tried) >= 16
    assert all(
        len({tuple(sorted(r["setting"].items())) for r in rows if r["epochs"] == e}) >= 4 for e in best
    )


def test_the_quick_presets_baselines_were_swept():
    assert {("quick", "mnist5k", "base"), ("quick", "mnist5k", "wide")} <= set(SWEPT)
