"""Chapter 6.2: its arms at every length, the ways to grow, and where one more layer goes."""

from dataclasses import replace

from torch import nn

from effilib import models
from effilib.chapters import net2net as chapter
from effilib.tasks import task

TASK = chapter.deep(task("smoke", "synthetic"))
DATA = TASK.load()


def test_a_given_teacher_is_one_and_the_run_that_grows_ends_as_the_baselines_network():
    scratch, given, one, small = chapter.arms(TASK)
    assert [a.role for a in (scratch, given, one, small)] == ["baseline", "method", "method", "control"]
    assert given.lengths == TASK.lengths
    assert one.lengths == ()
    assert given.fit.given == TASK.recipe
    short, long = (given.run(TASK, DATA, 0, length) for length in (0.5, 1.0))
    assert short.events[0] == long.events[0]
    whole, grown, begun = (a.run(TASK, DATA, 0) for a in (scratch, one, small))
    assert long.structure == grown.structure == whole.structure != begun.structure
    assert begun.flops < grown.flops < whole.flops
    assert grown.steps == whole.steps


def test_images_are_small_until_it_grows_and_as_long_without_a_growth():
    *_, one, halved, resized = (
        a for a in chapter.arms(replace(TASK, preset="full")) if a.name != chapter.SMALL
    )
    plain, small, without = (a.run(TASK, DATA, 0) for a in (one, halved, resized))
    switched = {h.kinds["step at 4 x 4"]["count"] for h in (small, without)}
    assert switched == {round(0.4 * small.steps)}
    assert small.structure == without.structure == plain.structure
    assert small.flops < plain.flops
    assert small.flops < without.flops


def test_where_there_is_no_shallower_network_the_teacher_is_narrower():
    vgg = TASK.but(network="vgg", widths={"widths": ((8,), (16,))})
    assert chapter.teacher(vgg) == ()
    scratch, given, one, small = chapter.arms(vgg)
    assert one.run(vgg, DATA, 0).structure == scratch.run(vgg, DATA, 0).structure
    assert small.run(vgg, DATA, 0).structure["widths"] == [[4], [8]]
    assert given.run(vgg, DATA, 0).structure == scratch.run(vgg, DATA, 0).structure


def test_a_teacher_by_depth_has_a_block_a_stage():
    study = chapter.deep(task("study", "cifar10"))
    assert study.widths == chapter.DEEP["study"]
    assert dict(chapter.growth(study)["small"]) == {"blocks": (1, 1, 1)}
    assert chapter.growth(study)["deeper"] == ("stages.0.0", "stages.1.0", "stages.2.0")
    assert chapter.growth(chapter.deep(task("quick", "synthetic")))["deeper"] == ("stages.2.0",)


def test_the_grid_has_every_way_to_grow():
    places = chapter.deeper_places(TASK, DATA)
    assert places == ("stages.2.1",)
    found = {a.name: a for a in chapter.grid(TASK, places)}
    assert found["wider: random"].fit.breaker == "random"
    assert found["one layer more"].run(TASK, DATA, 0).structure["blocks"] == [[8], [8], [8, 8, 8]]
    assert "one layer more" not in [a.name for a in chapter.grid(TASK, ())]


def test_places_in_users_networks():
    assert chapter.deeper_places(TASK.but(network="vgg", widths={}), DATA) == ("features.13",)

    class Rgb:
        network = "torchvision.models:resnet18"

        def build(self, dataset):
            return models.build(self.network, 4, (3, 32, 32))

    assert chapter.deeper_places(Rgb(), None) == ("layer4.1",)
    deep = Rgb()
    deep.network = "torchvision.models:vgg11_bn"
    (place,) = chapter.deeper_places(deep, None)
    assert isinstance(deep.build(None).get_submodule(place), nn.ReLU)
    assert place.startswith("features.")
