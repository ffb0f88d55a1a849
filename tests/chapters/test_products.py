"""What chapters 3.3 to 4.2 share: the wide network, and how passes are timed."""

import pytest
import torch

from effilib.chapters import products
from effilib.chapters.products import Variant, against_exact, layer_times, layers_of, pass_times, wide
from effilib.convolution import Approximation
from effilib.cost import Conv
from effilib.experiment import Arm, compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", epochs=1)
DATA = TASK.load()


@pytest.mark.parametrize("preset", ["quick", "study", "full"])
def test_the_wide_networks_sampled_convolutions_have_128_to_256_channels(preset):
    t = wide(task(preset, "mnist5k"))
    model = t.build(t.load())
    outputs = [m.out_channels for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)][1:]
    assert set(outputs) <= {128, 256}
    assert t.target is None
    assert wide(t, "mine.py:net") is not None
    assert wide(task("smoke"), "convnet").network == task("smoke").network  # the user's own stays


def test_judged_tasks_have_a_target_of_their_own():
    study = products.judged(task("study", "cifar10"))
    assert (study.recipe.epochs, study.recipe.lr, study.recipe.weight_decay) == (
        10,
        0.4,
        5e-4,
    )  # as the recorded sweep has it
    own = products.judged(task("study", "cifar10", "torchvision.models:resnet18"))
    assert (own.recipe.epochs, own.recipe.lr) == (
        10,
        task("study", "cifar10", "torchvision.models:resnet18").recipe.lr,
    )
    assert {study.target, own.target, products.judged(task("quick")).target} == {None}
    assert products.judged(TASK) == TASK


def test_passes_are_timed_apart_and_variants_are_converted():
    converted = []
    variants = [Variant(name="exact"), Variant(name="changed", convert=converted.append, precision="fp32")]
    times = pass_times(TASK, DATA, variants)
    assert len(converted) == 1
    for t in times.values():
        assert 0 < t["forward"] < t["step"]
        assert 0 < t["backward"] < t["step"]
        assert t["forward"] + t["backward"] <= 1.5 * t["step"]
    table = against_exact(times, {"fp32": ["exact", "changed"]})
    assert table.loc[("fp32", "exact"), "backward speed-up"] == "1.00x"
    assert table.loc[("fp32", "exact"), "step, share of the exact one"] == "1.00"


def test_layers_are_timed_with_their_approximations():
    seen = []

    def skip(dy, x, w, product):
        seen.append(1)

    convs = {"a": Conv(N=2, C=4, O=4, H=6, W=6, stride=2), "b": Conv(N=2, C=4, O=4, H=6, W=6, groups=2)}
    times = layer_times(
        convs, {"skip": Approximation(dx=lambda dy, x, w, product: torch.zeros_like(x))}, repeats=2, seconds=1
    )
    assert set(times) == {(n, how) for n in convs for how in ("exact", "skip")}
    assert all(t > 0 for parts in times.values() for t in parts.values())
    assert not seen


def test_the_tasks_layers_are_those_that_methods_approximate():
    names = list(layers_of(TASK, DATA))
    assert names
    assert "stem" not in names


def test_the_final_table_and_figure_have_every_arm(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    arms = [Arm(name="exact", role="baseline"), Arm(name="shorter", role="control", changes={"epochs": 0.5})]
    found = compare(TASK, arms, quantity="time per step", seeds=1, illustration=True)
    table = products.final_table(found, lambda history: {"steps": history.steps})
    assert list(table.index) == ["exact", "shorter"]
    assert table.loc["shorter", "FLOPs of a step"] == "1.00"
    assert table.loc["exact", "steps"] > table.loc["shorter", "steps"]
    figure, caption = products.accuracy_figure(found)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["exact", "shorter"]
    assert caption.startswith("One seed")
