"""FLOPs of a whole run against a count of every step: methods that change batch, image size, structure.

The slow oracle counts each step by itself, afterwards, on a copy of the network and of the images that the
step had.
"""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F

from effilib import cost, models, surgery
from effilib.data import synthetic
from effilib.hooks import Method
from effilib.recipe import Recipe
from effilib.training import train

DATA = synthetic(images=200)  # 140 to train on: 4 batches an epoch
RECIPE = Recipe(epochs=4, batch_size=32, precision="fp32")
STEPS = 16


def network(width=16):
    return models.build("convnet", 4, (1, 8, 8), widths=(width, 12))


@dataclass(frozen=True)
class Count(Method):
    """The last of the methods: keeps what every step is of."""

    kept: list = field(default_factory=list, compare=False)

    def on_batch(self, run, x, y):
        self.kept.append((copy.deepcopy(run.model), x.clone()))
        return x, y

    @property
    def images(self):
        return [len(x) for _, x in self.kept]

    @property
    def steps(self):
        return [cost.count_flops(lambda net=net, x=x: net(x).sum().backward()) for net, x in self.kept]


@dataclass(frozen=True)
class FewerImages(Method):
    """Trains on a share of each batch from a step on."""

    at: int = 8
    share: float = 0.5

    def on_batch(self, run, x, y):
        n = round(self.share * len(x)) if run.step >= self.at else len(x)
        return x[:n], y[:n]


@dataclass(frozen=True)
class SmallerImages(Method):
    """Trains on images of half the size from a step on."""

    at: int = 8

    def on_batch(self, run, x, y):
        return (F.avg_pool2d(x, 2) if run.step >= self.at else x), y


@dataclass(frozen=True)
class EveryImageCount(Method):
    """Trains on another number of images in every step."""

    def on_batch(self, run, x, y):
        n = len(x) - run.step
        return x[:n], y[:n]


@dataclass(frozen=True)
class Narrow(Method):
    """Takes a channel of the first layer away at the end of some steps."""

    every: int = 1

    def on_step_end(self, run):
        if (run.step + 1) % self.every == 0:
            run.restructure(self.change)

    def change(self, model, optimizer):
        node = surgery.trace(model)["features.0"]
        surgery.select_(node, range(node.width - 1), optimizer)


@dataclass(frozen=True)
class Anew(Method):
    """Says at the end of every step that the structure has changed, and changes nothing."""

    def on_step_end(self, run):
        run.restructure(lambda model, optimizer: model)


def outcome(*methods, recipe=RECIPE, width=16):
    count = Count()
    return train(network(width), DATA, recipe, [*methods, count]), count


@pytest.mark.parametrize(
    "methods",
    [
        (),
        (FewerImages(),),
        (FewerImages(at=15),),  # the last step alone
        (FewerImages(at=1, share=0.25),),
        (SmallerImages(),),
        (FewerImages(at=4), SmallerImages(at=12)),
        (Anew(),),
        (Anew(), FewerImages()),
        (Narrow(every=4), SmallerImages()),
    ],
    ids=str,
)
def test_flops_of_a_run_are_those_of_its_steps(methods):
    history, count = outcome(*methods)
    assert history.steps == len(count.steps) == STEPS
    assert len(set(count.steps)) > 1 or methods in ((), (Anew(),))
    assert history.flops == sum(count.steps)
    assert history.seen == sum(count.images)


def test_flops_follow_the_number_of_images_where_it_is_another_one_in_every_step():
    history, count = outcome(EveryImageCount())
    assert len(set(count.steps)) == STEPS
    assert history.flops == pytest.approx(sum(count.steps), rel=1e-9)
    assert history.seen == sum(count.images)


@pytest.mark.parametrize(("every", "error"), [(1, 0.05), (2, 1e-9), (3, 0.005)])
def test_flops_follow_a_structure_that_is_another_one_after_every_step_or_two(every, error):
    history, count = outcome(Narrow(every=every), width=24)
    assert count.steps[-1] < 0.8 * count.steps[0]
    assert history.flops == pytest.approx(sum(count.steps), rel=error)


def test_flops_are_near_where_structure_and_images_change_at_once():
    for methods in ((Anew(), FewerImages(), SmallerImages(at=12)), (Narrow(every=5), FewerImages())):
        history, count = outcome(*methods)
        assert history.flops == pytest.approx(sum(count.steps), rel=0.005)


@pytest.mark.parametrize("epochs", [0.01, 0.25, 0.5])
def test_a_run_of_a_step_or_two_is_counted(epochs):
    history, count = outcome(FewerImages(at=1), recipe=replace(RECIPE, epochs=epochs))
    assert history.steps == len(count.steps) == (2 if epochs == 0.5 else 1)
    assert history.flops == sum(count.steps) > 0
    assert history.seconds > 0 or history.steps == 1
    assert history.step_seconds == history.seconds / history.steps


def test_a_grown_batch_is_counted_as_it_is():
    @dataclass(frozen=True)
    class Grows(Method):
        def on_epoch_end(self, run):
            if run.epoch == 1:
                run.grow_batch(2)

    history, count = outcome(Grows())
    assert sorted(set(count.images)) == [32, 64]
    assert history.flops == sum(count.steps)
    assert history.seen == sum(count.images)
    assert torch.isfinite(torch.tensor(history.flops))
