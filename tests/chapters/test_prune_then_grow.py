"""What chapter II.9 trains: the procedure's settings, its arms and controls, and that all of them may spend
the same.
"""

from dataclasses import replace

import pytest

from effilib import models, notebook
from effilib.chapters import decisions, kernel_rescaling
from effilib.chapters import prune_then_grow as chapter
from effilib.experiment import Arm
from effilib.methods.decision import GROWTH, MODES
from effilib.methods.prune_then_grow import GENTLE, plan, step_flops
from effilib.tasks import task

TASK = task("smoke", "synthetic").but(epochs=6, evaluations=5, target=None)
DATA = TASK.load()
RUN = chapter.mode_name("windowed")


pytestmark = pytest.mark.usefixtures("results")


def test_every_preset_has_its_task_and_its_settings():
    quick = chapter.task(notebook.start("09_prune_then_grow", preset="quick", dataset="synthetic"))
    assert (quick.images, quick.target) == (min(1200, len(quick.load().train)), None)
    smoke = chapter.task(notebook.start("09_prune_then_grow", preset="smoke", dataset="synthetic"))
    assert smoke.recipe.epochs == chapter.SETTINGS["smoke"]["task"]["epochs"]
    for preset in chapter.SETTINGS:
        method = chapter.procedure(TASK.but(preset=preset), DATA)
        assert method.spend
        assert method.baseline == chapter.baseline_flops(TASK, DATA)
        kinds = [
            chapter.budget(TASK.but(preset=preset), small=s, resized=r)
            for s, r in ((0, 0), (1, 0), (0, 1), (1, 1))
        ]
        assert (
            kinds[0] == 1 >= kinds[1] == method.budget
        )  # what is smaller makes less of the processor: fewer FLOPs in the same time
        assert kinds[3] <= kinds[2] < 1


def test_the_start_is_smaller_than_the_baseline():
    small = TASK.build(DATA, **chapter.start(TASK))
    assert models.describe(small)["blocks"] == [[4], [4], [4]]
    assert chapter.start(TASK.but(preset="study", widths={"widths": (16, 32, 64), "blocks": (1, 1, 2)})) == {
        "blocks": ((16,), (32,), (64,))
    }
    assert chapter.start(TASK.but(network="vgg", widths={})) == {}


def test_the_budget_is_what_the_baselines_training_costs():
    assert Arm(name="d").run(TASK, DATA, 0).flops == chapter.baseline_flops(TASK, DATA)
    assert chapter.epochs_for(TASK, DATA, TASK.build(DATA)) == pytest.approx(6)
    assert chapter.epochs_for(TASK, DATA, TASK.build(DATA), 0.5) == pytest.approx(3)
    resizer, small = chapter.resizing(TASK, DATA), TASK.build(DATA)
    _, height, _ = DATA.shape
    sides = [size[0] for _, size, _ in resizer.phases(DATA.shape, 1000)]
    per_step = [step_flops(small, (DATA.shape[0], s, s), TASK.recipe.batch_size) for s in sides]
    assert sides == [height // 2, 3 * height // 4, height]
    mean = sum(
        f * row[0] for f, row in zip(per_step, kernel_rescaling.SETTINGS["smoke"]["schedule"], strict=True)
    )
    assert chapter.epochs_for(TASK, DATA, small, 1.0, resizer) == pytest.approx(6 * per_step[-1] / mean)


def test_every_arm_is_there_and_costs_what_it_may(grown):
    names = [a.name for a in grown.arms]
    assert names[:3] == [chapter.DENSE, RUN, chapter.PRUNED]
    modes = {chapter.mode_name(m, r) for m in MODES for r in (False, True)}
    assert {chapter.GROWN, chapter.RANDOM, chapter.SCRATCH, chapter.ON, *modes} == set(names[3:]) | {RUN}
    whole = chapter.baseline_flops(TASK, DATA)
    for name in [n for n in names if n != chapter.PRUNED]:
        (history,) = grown.histories(name)
        resized = "resizing" in name
        share = chapter.budget(TASK, small=name != chapter.DENSE, resized=resized)
        assert 0.85 * share < history.flops / whole <= 1.03 * share, name
        assert any(kind.startswith("step") and kind != "step" for kind in history.kinds) == resized, name
    (history,) = grown.histories(chapter.PRUNED)
    assert history.flops < 2 * whole  # as long as the baseline by the clock of a pilot


def test_quick_has_three_arms_and_the_others_a_headline_of_their_own():
    quick, study = TASK.but(preset="quick"), TASK.but(preset="study")
    assert [a.name for a in chapter.arms(quick, DATA)] == [chapter.DENSE, RUN, chapter.PRUNED]
    assert chapter.headline(quick) == RUN
    assert {a.name for a in chapter.arms(TASK, DATA)} >= {
        *[chapter.DENSE, RUN, chapter.PRUNED],
        chapter.headline(TASK),
    }
    arms = {a.name: a for a in chapter.arms(study, DATA)}
    assert chapter.headline(study) in arms
    assert {chapter.mode_name(m, r) for m in MODES for r in (False, True)} <= set(arms)
    assert {chapter.DENSE_RESIZED, chapter.SMALL} <= set(arms)
    assert [a.role for a in arms.values()].count("baseline") == 1
    methods = {n for n, a in arms.items() if a.role == "method"}
    windowed = {chapter.mode_name("windowed", True) + suffix for suffix in chapter.SHORT.values()}
    assert methods == {*windowed, *(chapter.mode_name(m, r) for m in MODES for r in (False, True))}
    assert chapter.headline(study) in windowed


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (chapter.mode_name("thesis", True), 1.0),
        (chapter.SMALL, 1.0),
        (chapter.headline(TASK), chapter.FAST),
        (chapter.DENSE_RESIZED + chapter.SHORT[chapter.MODERATE], chapter.MODERATE),
    ],
)
def test_arms_on_resized_images_have_their_share_of_the_flops(name, part):
    arms = [*chapter.modes(TASK, DATA), *chapter.resized(TASK, DATA), *chapter.shorter(TASK, DATA)]
    arm = next(a for a in arms if a.name == name)
    history = arm.run(TASK, DATA, 0)
    share = part * chapter.budget(TASK, small=bool(arm.network), resized=True)
    assert history.flops / chapter.baseline_flops(TASK, DATA) == pytest.approx(share, rel=0.12)


def test_controls_rest_on_the_run_of_the_same_seed(grown):
    (run,), (on,), (scratch,) = (
        grown.histories(n) for n in (chapter.mode_name("windowed", True), chapter.ON, chapter.SCRATCH)
    )
    first = next(e for e, kind, _ in plan(run) if kind in GROWTH)
    assert plan(on) == tuple(s for s in plan(run) if s[1] not in GROWTH)
    same = [
        (a["seen"]["loss"], b["seen"]["loss"])
        for a, b in zip(decisions.seen(run), decisions.seen(on), strict=False)
    ]
    assert all(a == b for a, b in same[: first + 1])
    assert scratch.structure == run.structure


def test_trained_on_leaves_out_growth_and_no_more():
    fit = chapter.on_small_images(TASK, DATA)
    changes = dict(
        prune=replace(GENTLE, ratio=0.0), pressure=False, plan=((1, "deepen", "stage 3"), (3, "stop", ""))
    )
    method = replace(fit.method, **changes)
    run, on, scratch = (
        replace(fit, method=method, what=w)(TASK, 0) for w in ("run", "trained on", "from scratch")
    )
    assert plan(run) == method.plan
    assert plan(on) == method.plan[1:]
    assert [len(h.structure["blocks"][2]) for h in (run, scratch, on)] == [2, 2, 1]


def test_renewed_weights_are_those_of_a_fresh_network():
    model = models.build("resnet", 4, (1, 8, 8), seed=3, blocks=([4, 0], 1, 1))
    again = chapter.renewed(models.build("resnet", 4, (1, 8, 8), seed=0, blocks=([4, 0], 1, 1)), 3)
    assert all(
        (a == b).all() for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
