"""Chapter 6.2: its arms at every length, the ways to grow, and where one more layer goes."""

from torch import nn

from effilib import models
from effilib.chapters import net2net as chapter
from effilib.tasks import task

TASK = task("smoke", "synthetic").sized(chapter.SIZES)
DATA = TASK.load()


def test_students_of_a_given_teacher_have_the_baselines_lengths_and_one_teacher():
    found = chapter.arms(TASK)
    assert [a.role for a in found] == ["baseline", "method", "method", "method", "control"]
    scratch, given, counted, *_ = found
    assert given.lengths == TASK.lengths
    assert counted.lengths == ()
    assert given.fit.given == TASK.recipe
    short, long = (given.run(TASK, DATA, 0, length) for length in (0.5, 1.0))
    assert short.events[0] == long.events[0]
    assert long.structure == scratch.run(TASK, DATA, 0).structure
    assert counted.run(TASK, DATA, 0).seen > long.seen


def test_every_preset_has_its_students():
    for preset in chapter.STUDENT:
        names = [a.name for a in chapter.arms(TASK.but(preset=preset))]
        assert names[:3] == [chapter.SCRATCH, chapter.GIVEN, chapter.COUNTED]
    assert len(chapter.arms(TASK.but(preset="quick"))) == 3


def test_the_grid_has_every_way_to_grow():
    places = chapter.deeper_places(TASK, DATA)
    assert places == ("stages.2.0",)
    *_, random, deeper = chapter.grid(TASK, places)
    assert random.fit.breaker == "random"
    assert deeper.run(TASK, DATA, 0).structure["blocks"] == [[8], [8], [8, 8]]
    assert not [a for a in chapter.grid(TASK, ()) if a.name == "deeper"]


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
