"""What chapter 6.2 shows beyond its method: teachers, students, controls and tables."""

import pytest
from torch import nn

from effilib import models
from effilib.chapters import net2net as chapter
from effilib.chapters.net2net import COUNTED, GIVEN, Grown
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


def test_a_student_starts_where_its_teacher_ended_and_the_teachers_time_can_be_counted():
    given, counted = Grown(breaker="none")(TASK, 0), Grown(breaker="none", counted=True)(TASK, 0)
    model, before, teacher = Grown().teacher(TASK, DATA, 0, {})
    assert given.rows[0]["accuracy"] == pytest.approx(teacher.rows[-1]["accuracy"], abs=2)  # an image of 51
    assert given.structure == models.describe(TASK.build(DATA))
    assert models.describe(model)["widths"] == [4, 4, 4]
    assert dict(before)["stem"] == 8
    assert counted.steps == teacher.steps + given.steps
    assert [r["accuracy"] for r in counted.rows] == [r["accuracy"] for r in [*teacher.rows, *given.rows]]
    assert counted.seconds > given.seconds
    assert given.steps == TASK.recipe.epochs * 4 / 2
    assert max(r["lr"] for r in given.rows) == pytest.approx(TASK.recipe.lr / 2)


def test_arms_of_one_block_share_teacher_and_student_and_a_block_that_is_run_again_has_its_own():
    given, counted = Grown(breaker="none"), Grown(breaker="none", counted=True)
    a, b = given(TASK, 0), counted(TASK, 0)
    assert b.seconds - a.seconds == chapter._latest["kept"][given.factor, given.taught][1].seconds
    kept = chapter.shared(TASK, 0, "another arm")
    assert Grown(breaker="pair").teacher(TASK, DATA, 0, kept)[2] is given.teacher(TASK, DATA, 0, kept)[2]
    again = given(TASK, 0)
    assert again is not a
    assert again.rows[-1]["loss"] == a.rows[-1]["loss"]
    assert given(TASK, 1).rows[-1]["loss"] != a.rows[-1]["loss"]


def test_every_arm_runs_and_is_counted():
    arms = chapter.with_epochs(TASK, chapter.arms("smoke"))
    assert [a.role for a in arms] == ["baseline", "method", "method", "method", "control", "control"]
    assert arms[4].changes == {"epochs": 1.0}
    found = compare(TASK.but(target=30.0), arms, seeds=1)
    table = chapter.teachers(found)
    assert table.loc[0, "teacher s"] > 0
    assert table.loc[0, "student's last %"] == found.histories(GIVEN)[0].accuracy
    assert chapter.mean_times(found).count(";") == 5
    assert found.histories(COUNTED)[0].flops > found.histories(GIVEN)[0].flops
    assert [a.name for a in chapter.arms("quick")] == [
        "from scratch",
        GIVEN,
        COUNTED,
        "from scratch, the student's epochs",
    ]


def test_the_grid_has_every_way_to_grow():
    places = chapter.deeper_places(TASK, DATA)
    assert places == ("stages.2.0",)
    arms = chapter.breakers("smoke", places)
    found = compare(TASK, arms[:1] + arms[-2:], seeds=1, quantity="training time", illustration=True)
    assert found.histories("deeper")[0].structure["blocks"] == [[8], [8], [8, 8]]
    figure, caption = chapter.grid_figure(found)
    assert len(figure.axes[0].lines) == 3
    assert "illustration" in caption
    assert chapter.say_grid(found).endswith("(one seed).")
    assert chapter.subset(TASK.but(preset="quick")).images == TASK.images // 3
    assert chapter.subset(TASK.but(preset="study")).recipe.epochs == TASK.recipe.epochs / 4
    assert chapter.subset(TASK.but(preset="full")).recipe.epochs == TASK.recipe.epochs


def test_places_in_users_networks():
    assert chapter.deeper_places(TASK.but(network="vgg", widths={}), DATA) == ("features.13",)
    rgb = task("smoke", "synthetic")

    class Rgb:
        def build(self, dataset):
            return models.build("torchvision.models:resnet18", 4, (3, 32, 32))

    assert chapter.deeper_places(Rgb(), rgb) == ("layer4.1",)

    class Deep(Rgb):
        def build(self, dataset):
            return models.build("torchvision.models:vgg11_bn", 4, (3, 32, 32))

    (place,) = chapter.deeper_places(Deep(), rgb)
    assert isinstance(Deep().build(None).get_submodule(place), nn.ReLU)
    assert place.startswith("features.")


def test_preservation_says_which_ways_keep_the_function():
    table = chapter.preservation(TASK, DATA, steps=4).astype(float)
    for way in (
        "wider: none",
        "wider: uneven",
        "wider: pair",
        "GradMax, where it applies",
        "deeper, behind stages.2.0",
    ):
        assert table.loc[way].max() < 1e-4, way
    assert table.loc["wider: random", "eval"] > 1e-2
    assert 1e-4 < table.loc["wider: noise", "eval"] < table.loc["wider: random", "eval"]


def test_the_toy_case_is_the_one_in_the_text():
    table = chapter.toy()
    assert (
        table.loc["teacher", "output for (1, 1)"]
        == table.loc["student, g = (1, 2, 1)", "output for (1, 1)"]
        == "53"
    )
    assert table.loc["student, g = (1, 2, 1)", "outgoing"] == "[[3.0, 5.0, 3.0]]"


def test_copies_stay_copies_without_a_symmetry_breaker():
    figure, _ = chapter.symmetry_figure(TASK, DATA, steps=10)
    ends = {line.get_label(): line.get_ydata()[-1] for line in figure.axes[0].lines}
    assert ends["none"] < 1e-5 < 1e-3 < min(ends["noise"], ends["uneven"])


def test_the_cost_table_adds_up():
    table = chapter.cost_table(TASK, DATA, {"epochs": 0.5, "factor": 0.5})
    rho = float(table.loc["teacher", "training FLOPs"])
    assert 0.2 < rho < 0.6
    assert float(table.loc["teacher and student", "training FLOPs"]) == pytest.approx(rho + 0.5, abs=0.011)
