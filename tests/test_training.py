"""The training loop, against a loop written by hand, and by methods that use and abuse its hooks."""

import copy
import math
import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models, seeds
from effilib.data import synthetic
from effilib.dataset import Batches
from effilib.errors import BadInput
from effilib.evaluation import evaluate
from effilib.experiment import Arm
from effilib.history import History
from effilib.hooks import HOOKS, Method
from effilib.recipe import Recipe, Schedule, can_compile, native_bf16, resolve_layout, resolve_precision
from effilib.seeds import stream
from effilib.training import train
from tests.common import work

FP32 = Recipe(epochs=2, batch_size=32, precision="fp32")
DATA = synthetic(images=550)  # 12 batches of 32


def network(seed=0, **settings):
    return models.build("resnet", 4, (1, 8, 8), seed=seed, **{"widths": (8, 8), "blocks": (1, 1), **settings})


def trained(recipe=FP32, methods=(), seed=0, model=None, data=DATA, **options):
    """(the trained model, its history)."""
    model = model or network()
    return model, train(model, data, recipe, methods, seed, **options)


def same(a, b):
    """Whether two models hold bit-equal parameters and buffers."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def plain(history):
    """What of a history does not depend on the clock."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "train_loss")} for row in history.rows]
    return rows, history.steps, history.flops, history.memory, history.test_accuracy, history.events


@dataclass(frozen=True)
class Diary(Method):
    """Writes down every call of a hook."""

    name: str = "diary"
    calls: list = field(default_factory=list, hash=False, compare=False)


for _hook in HOOKS:

    def _noted(self, run, *batch, _hook=_hook):
        self.calls.append((self.name, _hook, run.epoch, run.step))
        return batch or None

    setattr(Diary, _hook, _noted)


# The loop itself


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_training_is_bit_equal_to_a_loop_written_by_hand(schedule, layout):
    recipe = replace(
        FP32,
        schedule=schedule,
        memory_format=layout,
        lr=0.15,
        weight_decay=1e-3,
        label_smoothing=0.1,
        momentum=0.8,
    )
    model, history = trained(recipe, seed=3)

    by_hand = network().train()
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    by_hand.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(
        by_hand.parameters(), lr=1.0, momentum=0.8, nesterov=True, weight_decay=1e-3, fused=True
    )
    batches = Batches(DATA, 32, stream(3, "data"))
    step, steps = 0, 2 * len(batches)
    warm = 0.2 * steps
    for _ in range(2):
        for x, y in batches:
            left = (steps - step) / (steps - warm)
            lr = {"linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "constant": 1}[
                schedule
            ]
            optimizer.param_groups[0]["lr"] = 0.15 * (
                (step + 1) / (math.floor(warm) + 1) if step < warm else lr
            )
            loss = F.cross_entropy(by_hand(x.contiguous(memory_format=memory_format)), y, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    close = [
        torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(model.parameters(), by_hand.parameters(), strict=True)
    ]
    assert all(close)
    assert (
        same(model, by_hand) or schedule == "cosine"
    )  # the cosine written the other way differs in its last bit
    assert history.steps == step == steps


def test_learning_rate_rises_to_its_highest_and_falls_to_zero():
    linear = [Recipe(lr=1.0, warmup=0.2).lr_at(i, 10) for i in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [Recipe(lr=1.0, warmup=0, schedule="cosine").lr_at(i, 4) for i in range(4)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert {Recipe(lr=0.3, warmup=0, schedule="constant").lr_at(i, 7) for i in range(7)} == {0.3}
    for steps in range(1, 200):
        rates = [Recipe(lr=1.0).lr_at(i, steps) for i in range(steps)]
        assert all(0 < r <= 1 + 1e-12 for r in rates)
        assert max(rates) == pytest.approx(1, abs=1 / steps)


def test_the_same_seed_is_bit_equal_and_another_seed_is_not():
    (a, ha), (b, hb), (c, _) = trained(seed=1), trained(seed=1), trained(seed=2)
    assert same(a, b)
    assert plain(ha) == plain(hb)
    assert not same(a, c)


def test_the_network_learns():
    untrained = evaluate(network(), DATA, "validation")[1]
    _, history = trained(replace(FP32, epochs=6))
    assert untrained < 60
    assert history.accuracy > 90
    assert history.test_accuracy > 90
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]


def test_what_is_judged_are_all_held_out_images_each_class_counted():
    model, history = trained(replace(FP32, epochs=0.5))
    x = torch.cat([DATA.normalize(s.x) for s in (DATA.validation, DATA.test)])
    y = torch.cat([DATA.validation.y, DATA.test.y])
    right = model.eval()(x).argmax(1) == y
    assert history.held_out == len(y)
    assert history.accuracy == history.final == pytest.approx(100 * right.double().mean().item())
    classes = [100 * right[y == c].double().mean().item() for c in range(4)]
    assert history.balanced_accuracy == pytest.approx(sum(classes) / 4)
    assert history.majority == pytest.approx(100 * max((y == c).double().mean().item() for c in range(4)))
    assert history.accuracy != history.rows[-1]["accuracy"]


def test_dropout_is_deterministic_and_the_global_generators_stay_as_they_were():
    def net():
        with seeds.seeded(5):
            return nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4)
            )

    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    a, _ = trained(model=net(), seed=1)
    torch.rand(3)  # somebody else draws in between
    b, _ = trained(model=net(), seed=1)
    c, _ = trained(model=net(), seed=2)
    torch.manual_seed(7)
    assert same(a, b)
    assert not same(a, c)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    trained(model=net())
    assert torch.equal(torch.get_rng_state(), before[0])


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 6), (1, 12), (1.25, 15), (2.1, 25), (0.001, 1)])
def test_a_fraction_of_an_epoch_ends_in_mid_epoch(epochs, steps):
    diary = Diary()
    _, history = trained(replace(FP32, epochs=epochs), [diary])
    assert history.steps == history.rows[-1]["step"] == steps
    assert history.rows[-1]["epoch"] == pytest.approx(steps / 12)
    called = [hook for _, hook, _, _ in diary.calls]
    assert called.count("on_epoch_start") == called.count("on_epoch_end") == math.ceil(steps / 12)
    assert called.count("on_fit_end") == 1
    assert called[-2:] == ["on_fit_end", "on_evaluation"]
    assert called.count("on_evaluation") == len(history.rows)


def test_there_are_as_many_evaluations_as_asked_for_and_time_never_goes_back():
    _, history = trained(replace(FP32, epochs=3), evaluations=9)
    assert [r["step"] for r in history.rows] == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    seconds = [r["seconds"] for r in history.rows]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 9
    assert history.seconds >= seconds[-1] > 0
    assert history.kinds["step"]["count"] == history.steps == 36
    assert history.rows[-1]["lr"] == 0
    assert history.rows[0]["lr"] == pytest.approx(FP32.lr_at(4, 36))
    assert len(trained()[1].rows) == 3  # two for progress and pictures, and the end


def test_progress_is_told_after_each_evaluation():
    told = []
    trained(evaluations=4, progress=told.append)
    assert [t["step"] for t in told] == [6, 12, 18, 24]
    assert {t["steps"] for t in told} == {24}
    assert {"accuracy", "loss", "lr", "seconds", "epoch"} <= set(told[0])


def test_evaluation_does_not_touch_the_weights():
    often, rarely = trained(evaluations=24)[0], trained(evaluations=1)[0]
    assert same(often, rarely)


@pytest.mark.parametrize("batch_size", [8, 40])
def test_no_more_images_are_evaluated_at_once_than_trained(batch_size):
    model, seen = network(), {True: set(), False: set()}
    model.register_forward_pre_hook(lambda module, x: seen[module.training].add(len(x[0])))
    train(model, DATA, replace(FP32, batch_size=batch_size))
    assert max(seen[False]) == max(seen[True]) == batch_size
    assert next(iter(DATA.batches(DATA.train)))[0].shape[0] == min(500, len(DATA.train))  # by itself


def test_evaluate_is_the_mean_over_the_split_in_eval_mode():
    model = network().train()
    loss, accuracy = evaluate(model, DATA, "decide")
    assert model.training
    with torch.no_grad():
        logits = model.eval()(DATA.normalize(DATA.decide.x))
    assert loss == pytest.approx(F.cross_entropy(logits, DATA.decide.y).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == DATA.decide.y).float().mean().item())


@dataclass(frozen=True)
class Watched:
    """A split that writes down when its images are read."""

    split: object
    log: list

    @property
    def x(self):
        self.log.append("test read")
        return self.split.x

    @property
    def y(self):
        return self.split.y

    def __len__(self):
        return len(self.split)


def test_the_test_split_is_read_once_after_everything_else():
    log = []

    @dataclass(frozen=True)
    class Last(Method):
        def on_fit_end(self, run):
            log.append("fit end")

    data = replace(DATA, test=Watched(DATA.test, log))
    trained(methods=[Last()], data=data, progress=lambda row: log.append("evaluation"))
    assert log[-3:] == ["fit end", "evaluation", "test read"]
    assert log.count("test read") == 1


def test_a_diverging_run_is_reported_and_not_a_crash():
    plain_net = models.build("convnet", 4, (1, 8, 8), bn=False, widths=(8, 8))
    diary = Diary()
    _, history = trained(replace(FP32, lr=1e6, epochs=10), [diary], model=plain_net)
    assert history.diverged
    assert history.steps < 120  # it stopped instead of burning the rest
    assert math.isfinite(history.accuracy)
    assert history.test_accuracy is not None
    assert diary.calls[-1][1] == "on_fit_end"  # a plain model is left behind all the same
    assert not trained()[1].diverged


def test_a_run_that_diverges_in_its_last_step_is_reported_too():
    @dataclass(frozen=True)
    class Blow(Method):
        def on_step_end(self, run):
            if run.step == run.steps - 1:
                with torch.no_grad():
                    run.model.head.weight.fill_(math.nan)

    assert trained(methods=[Blow()])[1].diverged


def test_a_batch_larger_than_the_split_is_bad_input():
    with pytest.raises(BadInput, match=r"batch size 4096 does not fit synthetic: it has \d+ training images"):
        trained(replace(FP32, batch_size=4096))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "fp8"}, "choose one of auto, fp32, tf32, bf16, fp16"),
        ({"memory_format": "nhwc"}, "choose one of auto, channels_last, contiguous"),
        ({"epochs": 0}, "epochs is 0, it must be above 0"),
        ({"epochs": math.nan}, "epochs is nan"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
    ],
)
def test_a_recipe_that_cannot_be_is_bad_input(settings, words):
    with pytest.raises(BadInput, match=words):
        Recipe(**settings)


def test_an_unknown_augmentation_is_bad_input():
    with pytest.raises(BadInput, match="augmentation 'crpo'"):
        trained(replace(FP32, augmentation="crpo"))


# Precision and compilation


def test_precision_is_resolved_and_said():
    assert resolve_precision("auto") == ("bf16" if native_bf16() else "fp32")
    assert trained(replace(FP32, epochs=0.1, precision="auto"))[1].precision == resolve_precision("auto")
    for precision in ("fp16", "tf32"):
        with pytest.raises(
            BadInput, match=f"precision '{precision}' needs CUDA; on this CPU choose auto, fp32 or bf16"
        ):
            trained(replace(FP32, precision=precision))


def test_fp64_computes_in_64_bits_from_the_images_to_the_loss():
    seen = {}

    @dataclass(frozen=True)
    class Look(Method):
        def on_batch(self, run, x, y):
            seen["images"] = x.dtype
            return x, y

        def on_step_end(self, run):
            seen["loss"] = run.loss.dtype
            seen["momentum"] = {
                run.optimizer.state[p]["momentum_buffer"].dtype for p in run.model.parameters()
            }

    model, history = trained(replace(FP32, precision="fp64"), [Look()], evaluations=24)
    assert seen == {"images": torch.float64, "loss": torch.float64, "momentum": {torch.float64}}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert history.precision == "fp64"
    single = trained(evaluations=24)[1]
    assert history.rows[1]["loss"] == pytest.approx(single.rows[1]["loss"], rel=1e-4)
    assert history.flops == single.flops
    assert history.memory["parameters"] == 2 * single.memory["parameters"]


def test_memory_format_auto_is_channels_last_where_the_kernels_read_it():
    assert resolve_layout(FP32) == "channels_last"
    assert resolve_layout(replace(FP32, memory_format="contiguous")) == "contiguous"
    assert [resolve_layout(replace(FP32, precision=p), "cuda") for p in ("fp32", "tf32", "bf16", "fp16")] == [
        "contiguous"
    ] + 3 * ["channels_last"]
    assert same(trained(FP32)[0], trained(replace(FP32, memory_format="channels_last"))[0])
    weight = trained(FP32)[0].stages[1][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_bf16_computes_in_16_bits_on_fp32_weights():
    seen = {}

    @dataclass(frozen=True)
    class Look(Method):
        def on_after_backward(self, run):
            seen["logits"] = run.logits.dtype
            seen["gradients"] = {p.grad.dtype for p in run.model.parameters()}

    model, history = trained(replace(FP32, precision="bf16"), [Look()])
    assert seen == {"logits": torch.bfloat16, "gradients": {torch.float32}}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not same(model, trained()[0])  # bit-equal to fp32 would mean that nothing was rounded
    assert history.precision == "bf16"


@pytest.mark.skipif(bool(can_compile()), reason=can_compile())
def test_a_compiled_network_trains_as_the_plain_one_does():
    recipe = replace(FP32, epochs=1)
    data = synthetic(images=128)  # one structure, few steps: nearly all of this test is the compiler
    plain_model, plain_history = trained(recipe, data=data, evaluations=1)
    model, history = trained(replace(recipe, compile=True), data=data, evaluations=1)
    assert history.warm_up > plain_history.warm_up  # compiling is told apart from training
    assert history.flops == plain_history.flops
    assert history.rows[-1]["train_loss"] == pytest.approx(plain_history.rows[-1]["train_loss"], rel=1e-3)
    for a, b in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)


# Methods


def test_hooks_are_called_in_their_order_and_methods_in_theirs():
    a, b = Diary("a"), Diary("b")
    object.__setattr__(b, "calls", a.calls)
    trained(replace(FP32, epochs=13 / 12), [a, b], evaluations=1)
    step = [(n, h) for h in ("on_batch", "loss_terms", "on_after_backward", "on_step_end") for n in "ab"]

    def both(hook):
        return [("a", hook), ("b", hook)]

    epoch = [both("on_epoch_start"), both("on_epoch_end")]
    look = both("on_evaluation")
    expected = [
        *both("on_fit_start"),
        *epoch[0],
        *12 * step,
        *epoch[1],
        *epoch[0],
        *step,
        *epoch[1],
        *both("on_fit_end"),
        *look,
    ]
    assert [(name, hook) for name, hook, _, _ in a.calls] == expected
    assert [step for name, hook, _, step in a.calls if (name, hook) == ("a", "on_batch")] == list(range(13))
    assert [epoch for name, hook, epoch, _ in a.calls if (name, hook) == ("a", "on_epoch_start")] == [0, 1]


def test_what_a_method_does_for_an_evaluation_is_seen_by_it_and_is_off_the_clock():
    @dataclass(frozen=True)
    class Break(Method):
        """Makes every evaluation see a network whose last bias points at class 0."""

        def on_evaluation(self, run):
            work(0.3)
            with torch.no_grad():
                run.model.head.bias.copy_(torch.tensor([1e6, 0, 0, 0]))

    _, history = trained(methods=[Break()], evaluations=4)
    share = 100 * (DATA.validation.y == 0).double().mean().item()
    assert [r["accuracy"] for r in history.rows] == pytest.approx([share] * 4)
    assert history.raw_seconds < 4 * 0.3
    assert "on_evaluation" not in history.kinds


def test_a_method_that_only_watches_changes_nothing():
    assert same(trained(methods=[Diary()])[0], trained()[0])


@dataclass(frozen=True, kw_only=True)
class Draws(Method):
    """Draws from its own generator, and from the global one."""

    seen: list = field(default_factory=list, hash=False, compare=False)
    draws: bool = True

    def on_batch(self, run, x, y):
        if self.draws:
            torch.rand(17, generator=run.generator(self))
            torch.rand(5)
        self.seen.append((x.clone(), y.clone()))
        return x, y


def test_a_methods_draws_do_not_shift_the_order_of_the_data():
    quiet, noisy = Draws(draws=False), Draws()
    a, b = trained(methods=[quiet])[0], trained(methods=[noisy])[0]
    assert all(
        torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(quiet.seen, noisy.seen, strict=True)
    )
    assert same(a, b)


def test_every_method_has_a_generator_of_its_own_that_follows_the_seed():
    @dataclass(frozen=True)
    class Note(Method):
        name: str
        drawn: list = field(default_factory=list, hash=False, compare=False)

        def on_fit_start(self, run):
            self.drawn.append(torch.rand(4, generator=run.generator(self)).tolist())

    a, b = Note("a"), Note("b")
    for seed in (0, 0, 1):
        trained(replace(FP32, epochs=0.1), [a, b], seed=seed)
    assert a.drawn[0] == a.drawn[1] != a.drawn[2]
    assert a.drawn[0] != b.drawn[0]


def test_a_method_can_change_the_batch_the_loss_and_the_gradients():
    @dataclass(frozen=True)
    class Halve(Method):
        def on_batch(self, run, x, y):
            return x[:16], y[:16]

    @dataclass(frozen=True)
    class Shrink(Method):
        seen: list = field(default_factory=list, hash=False, compare=False)

        def loss_terms(self, run):
            self.seen.append((run.logits.shape, run.loss.item()))
            return 0.1 * sum(p.square().sum() for p in run.model.parameters())

    @dataclass(frozen=True)
    class Zero(Method):
        def on_after_backward(self, run):
            for p in run.model.parameters():
                p.grad.zero_()

    recipe = replace(FP32, weight_decay=0.0)
    reference, history = trained(recipe)
    half, half_history = trained(recipe, [Halve()])
    assert not same(half, reference)
    assert half_history.flops == history.flops / 2
    shrink = Shrink()
    shrunk, _ = trained(recipe, [Halve(), shrink])
    assert {shape for shape, _ in shrink.seen} == {(16, 4)}
    assert all(math.isfinite(loss) for _, loss in shrink.seen)

    def norm(model):
        return sum(p.square().sum() for p in model.parameters())

    assert norm(shrunk) < 0.8 * norm(half)
    zeroed, _ = trained(recipe, [Zero()])
    start = network()
    assert all(torch.equal(p, q) for p, q in zip(zeroed.parameters(), start.parameters(), strict=True))


def test_a_second_run_of_the_same_method_starts_afresh():
    @dataclass(frozen=True)
    class Count(Method):
        ends: list = field(default_factory=list, hash=False, compare=False)

        def on_fit_start(self, run):
            run.state[self] = {"steps": 0}

        def on_step_end(self, run):
            run.state[self]["steps"] += 1

        def on_fit_end(self, run):
            self.ends.append(run.state[self]["steps"])
            run.log(self, "counted", steps=run.state[self]["steps"])

    count = Count()
    histories = [trained(methods=[count], seed=s)[1] for s in (0, 1)]
    assert count.ends == [24, 24]
    assert histories[1].events == [
        {"step": 24, "epoch": 1, "method": "Count", "text": "counted", "steps": 24}
    ]


def test_a_group_of_parameters_can_have_a_learning_rate_factor():
    @dataclass(frozen=True)
    class Freeze(Method):
        def on_fit_start(self, run):
            (group,) = run.optimizer.param_groups
            head = list(run.model.head.parameters())
            group["params"] = [p for p in group["params"] if not any(p is h for h in head)]
            run.optimizer.add_param_group({"params": head, "lr_factor": 0.0})

    model, _ = trained(methods=[Freeze()])
    assert torch.equal(model.head.weight, network().head.weight)
    assert not torch.equal(model.stem.weight, network().stem.weight)


# A larger batch in mid-training


@dataclass(frozen=True)
class Doubles(Method):
    """Doubles the batch at the end of an epoch."""

    epoch: int = 0
    lr_factor: float = 2.0

    def on_epoch_end(self, run):
        if run.epoch == self.epoch:
            run.grow_batch(2, self.lr_factor)


@dataclass(frozen=True)
class Notes(Method):
    def on_fit_start(self, run):
        run.state[self] = []

    def on_step_end(self, run):
        run.state[self].append((len(run.logits), run.lr))

    def on_fit_end(self, run):
        run.log(self, "steps", steps=run.state[self])


def test_the_batch_can_grow_in_mid_training_and_the_schedule_goes_on():
    _, plain = trained(methods=[Notes()])
    _, grown = trained(methods=[Doubles(), Notes()])
    before, after = plain.events[-1]["steps"], grown.events[-1]["steps"]
    assert [n for n, _ in after] == [32] * 12 + [64] * 6
    assert after[:12] == before[:12]
    assert [lr for _, lr in after[12:]] == pytest.approx([2 * lr for _, lr in before[12::2]])
    assert grown.steps == 18
    assert grown.rows[-1]["epoch"] == plain.rows[-1]["epoch"] == 2
    assert grown.flops == pytest.approx(plain.flops)
    evaluated = [r["step"] for r in grown.rows]
    assert evaluated == sorted(set(evaluated))  # at most once a step
    assert evaluated[-1] == 18


def test_a_batch_that_the_data_do_not_fill_is_bad_input():
    @dataclass(frozen=True)
    class Grows(Method):
        def on_epoch_start(self, run):
            run.grow_batch(1000)

    with pytest.raises(BadInput, match="a batch of 32000 does not fit"):
        trained(methods=[Grows()])


@dataclass(frozen=True)
class Replans(Method):
    """Goes through what is left after the first epoch in another number of steps."""

    left: int

    def on_epoch_end(self, run):
        if run.epoch == 0:
            run.replan(self.left)


@pytest.mark.parametrize("left", [7, 40])
def test_what_is_left_of_the_schedule_can_take_another_number_of_steps(left):
    _, plain = trained(methods=[Notes()])
    _, replanned = trained(methods=[Replans(left), Notes()])
    before, after = ([lr for _, lr in h.events[-1]["steps"]] for h in (plain, replanned))
    first = plain.steps // 2
    assert replanned.steps == first + left == len(after)
    assert after[:first] == before[:first]
    assert max(after[first:]) <= max(before)
    assert after[first] == pytest.approx(before[first])
    assert after[-1] <= max(before[-1], before[-1] * (plain.steps - first) / left) + 1e-9
    assert len(replanned.rows) <= len(plain.rows)  # a mark that no step comes near is passed over
    assert replanned.rows[-1]["epoch"] == pytest.approx(plain.rows[-1]["epoch"])
    assert replanned.rows[-1]["step"] == replanned.steps


def test_a_run_of_no_more_steps_is_bad_input():
    with pytest.raises(BadInput, match="at least one more step, got 0"):
        trained(methods=[Replans(0)])


def test_a_method_can_bring_a_schedule_of_its_own():
    @dataclass(frozen=True)
    class Staircase(Method):
        def on_fit_start(self, run):
            run.schedule.lr_at = lambda position, planned: 0.1 if position < planned / 2 else 0.01

    _, history = trained(methods=[Staircase(), Notes()])
    half = history.steps // 2
    assert [lr for _, lr in history.events[-1]["steps"]] == [0.1] * half + [0.01] * half


# The clock


def test_the_first_step_after_surgery_is_on_the_clock():
    """It chooses kernels, and compiles; version 1 put a median in its place, so that it was free."""

    @dataclass(frozen=True)
    class Restructures(Method):
        def on_after_backward(self, run):
            if run.step == 5 and run.structures == 1:
                work(0.3)

        def on_step_end(self, run):
            if run.step == 4:
                run.restructure(lambda model, optimizer: None)

    _, history = trained(methods=[Restructures()])
    assert history.seconds >= 0.3


@dataclass(frozen=True)
class Reconfigures(Method):
    """Does one-off work in some steps."""

    steps: tuple = (3,)
    hook: str = "on_step_end"

    def work(self, run):
        if run.step in self.steps:
            run.kind = "reconfigure"
            torch.randn(300, 300) @ torch.randn(300, 300)
            run.kind = "step"

    def on_step_end(self, run):
        if self.hook == "on_step_end":
            self.work(run)

    def on_after_backward(self, run):
        if self.hook == "on_after_backward":
            self.work(run)


def test_one_off_work_is_timed_under_its_own_kind():
    _, history = trained(methods=[Reconfigures(steps=(3, 15))])
    assert history.kinds["reconfigure"]["count"] == 2
    assert history.kinds["reconfigure"]["seconds"] > 0
    assert sum(k["seconds"] for k in history.kinds.values()) == pytest.approx(history.seconds)
    assert history.seconds <= history.raw_seconds


def test_the_kind_is_reset_at_the_end_of_a_step():
    @dataclass(frozen=True)
    class Forgets(Method):
        def on_step_end(self, run):
            if run.step == 4:
                run.kind = "reconfigure"

    _, history = trained(methods=[Forgets()])
    assert history.kinds["reconfigure"]["count"] == 1
    assert history.kinds["step"]["count"] == 24


def test_steps_of_another_size_are_a_kind_of_their_own():
    @dataclass(frozen=True)
    class Small(Method):
        def on_epoch_start(self, run):
            run.step_kind = "step" if run.epoch else "step, small"

        def on_after_backward(self, run):
            work(0.03 if run.step_kind == "step" else 0)

        def on_step_end(self, run):
            if run.step == 6:
                run.step_kind = "step"

    _, history = trained(methods=[Small()])
    assert history.kinds["step, small"]["count"] == 7
    assert history.kinds["step"]["count"] >= 17  # and what is left over between epochs
    assert history.kinds["step"]["seconds"] > 16 * 0.03
    assert history.step_seconds == history.seconds / 24


def test_a_methods_work_is_inside_the_clock_and_the_record_is_not():
    @dataclass(frozen=True)
    class Waits(Method):
        def on_epoch_end(self, run):
            work(0.3)

    def slow(row):
        work(0.3)

    _, history = trained(methods=[Waits()], progress=slow, evaluations=2)
    assert history.kinds["on_epoch_end"]["count"] == 2
    assert history.kinds["on_epoch_end"]["seconds"] >= 0.59
    assert history.kinds["step"]["seconds"] < 0.6  # 2 x 0.3 s of what is shown to a person are not in it


def test_heavy_work_in_every_third_step_counts_whole_whatever_it_is_called():
    @dataclass(frozen=True)
    class Heavy(Method):
        label: bool

        def on_step_end(self, run):
            if run.step % 3 == 2:
                if self.label:
                    run.kind = "heavy"
                work(0.03)

    for label in (False, True):
        _, history = trained(methods=[Heavy(label)])
        assert history.seconds >= 8 * 0.03
        assert history.step_seconds >= 0.01


# FLOPs and memory


def test_flops_of_a_run_are_those_of_its_steps():
    model, history = trained()
    assert history.flops == 24 * cost.step_flops(network().to("meta"), (1, 8, 8), 32)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert history.memory["parameters"] == size
    assert history.memory["optimizer"] == size  # one momentum each
    assert history.memory["saved"] > 0


def test_a_method_that_adds_products_pays_for_them():
    @dataclass(frozen=True)
    class Extra(Method):
        def on_step_end(self, run):
            torch.ones(10, 20) @ torch.ones(20, 30)

    assert trained(methods=[Extra()])[1].flops - trained()[1].flops == 24 * 2 * 10 * 20 * 30


# A change of structure in mid-training


def widen(model, optimizer, *, new=4, rebind=True):
    """Give the first block `new` more inner channels; weights and momentum of the old ones stay. In place."""
    block = model.stages[0][0]
    conv1, bn1, conv2 = block.conv1, block.bn1, block.conv2
    inner = conv1.out_channels + new
    block.conv1, block.bn1 = (
        nn.Conv2d(conv1.in_channels, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
    )
    block.conv2 = nn.Conv2d(inner, conv2.out_channels, 3, padding=1, bias=False)
    nn.init.zeros_(block.conv2.weight)
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(block.bn1, name)[:-new] = getattr(bn1, name)
        pairs = [(conv1.weight, block.conv1.weight, 0), (conv2.weight, block.conv2.weight, 1)]
        pairs += [(bn1.weight, block.bn1.weight, 0), (bn1.bias, block.bn1.bias, 0)]
        for old, wide, dim in pairs:
            wide.narrow(dim, 0, old.shape[dim]).copy_(old)
            if rebind:
                params = optimizer.param_groups[0]["params"]
                params[next(i for i, p in enumerate(params) if p is old)] = wide
                momentum = torch.zeros_like(wide)
                state = optimizer.state.pop(old, None)
                if state and state.get("momentum_buffer") is not None:
                    momentum.narrow(dim, 0, old.shape[dim]).copy_(state["momentum_buffer"])
                optimizer.state[wide] = {"momentum_buffer": momentum}


@dataclass(frozen=True)
class Widen(Method):
    """Widens the first block once: in the given hook, at the given step."""

    hook: str = "on_step_end"
    step: int = 5

    def work(self, run, hook):
        if hook == self.hook and run.step == self.step:
            with seeds.seeded(0):
                run.restructure(widen)

    def on_epoch_start(self, run):
        self.work(run, "on_epoch_start")

    def on_batch(self, run, x, y):
        self.work(run, "on_batch")
        return x, y

    def on_step_end(self, run):
        self.work(run, "on_step_end")


@pytest.mark.parametrize(
    ("hook", "step", "narrow"), [("on_step_end", 5, 6), ("on_step_end", 0, 1), ("on_epoch_start", 12, 12)]
)
def test_a_layer_can_be_widened_in_mid_training(hook, step, narrow):
    model, history = trained(methods=[Widen(hook, step)])
    assert history.structure["blocks"] == [[12], [8]]
    assert model.stages[0][0].conv1.weight.shape == (12, 8, 3, 3)
    assert model.stages[0][0].conv2.weight[:, 8:].abs().max() > 0  # the new channels are trained
    assert history.steps == 24
    assert history.kinds["reconfigure"]["count"] == 1
    before, after = (
        cost.step_flops(network(blocks=b).to("meta"), (1, 8, 8), 32) for b in ([[8], [8]], [[12], [8]])
    )
    assert history.flops == narrow * before + (24 - narrow) * after
    assert history.memory["parameters"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("hook", ["on_batch", "on_step_end"])
def test_a_change_of_structure_may_return_a_new_model(hook):
    """The step goes on with the new model, not with a graph or reference of the old one."""
    made = []

    def change(model, optimizer):
        made.append(new := network(seed=9, blocks=[[12], [8]]))
        optimizer.param_groups[0]["params"] = list(new.parameters())
        optimizer.state.clear()
        return new

    @dataclass(frozen=True)
    class Replace(Method):
        def on_batch(self, run, x, y):
            if hook == "on_batch" and run.step == 23:
                run.restructure(change)
            return x, y

        def on_step_end(self, run):
            if hook == "on_step_end" and run.step == 22:
                run.restructure(change)

    _, history = trained(methods=[Replace()])
    start = network(seed=9, blocks=[[12], [8]])
    assert not torch.equal(made[0].stem.weight, start.stem.weight)  # step 23 trained it
    assert history.structure["blocks"] == [[12], [8]]
    assert history.rows[-1]["loss"] == pytest.approx(evaluate(made[0], DATA, "validation")[0])


def test_a_restructured_run_goes_on_with_the_new_network():
    """Against the same by hand: narrow steps, widening, wide steps."""
    method = Widen("on_step_end", 5)
    model, _ = trained(replace(FP32, epochs=1), [method])
    by_hand = network().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        by_hand.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    for step, (x, y) in enumerate(Batches(DATA, 32, stream(0, "data"))):
        optimizer.param_groups[0]["lr"] = FP32.lr_at(step, 12)
        F.cross_entropy(by_hand(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 5:
            with seeds.seeded(0):
                widen(by_hand, optimizer)
    assert same(model, by_hand)


def test_new_parameters_may_come_without_momentum():
    """PyTorch's fused SGD fails on a mixture of parameters with and without one."""

    @dataclass(frozen=True)
    class NewHead(Method):
        momenta: list = field(default_factory=list, hash=False, compare=False)

        def on_step_end(self, run):
            if run.step == 6:
                run.restructure(self.change)
            if run.step == 7:
                self.momenta.extend(
                    run.optimizer.state[p]["momentum_buffer"] for p in run.model.head.parameters()
                )

        def change(self, model, optimizer):
            params = optimizer.param_groups[0]["params"]
            for p in model.head.parameters():
                params[:] = [q for q in params if q is not p]
                del optimizer.state[p]
            with seeds.seeded(0):
                model.head = nn.Linear(8, 4)
            params += list(model.head.parameters())

    method = NewHead()
    _, history = trained(methods=[method])
    assert history.steps == 24
    assert len(method.momenta) == 2
    assert all(m.abs().max() > 0 for m in method.momenta)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_momentum_laid_out_in_another_way_than_its_weights_means_the_same(layout):
    """The fused optimizer would go through both in the order of memory and mix up their elements."""
    other = torch.contiguous_format if layout == "channels_last" else torch.channels_last

    @dataclass(frozen=True)
    class Shuffle(Method):
        def on_step_end(self, run):
            if run.step == 6:
                run.restructure(self.change)

        def change(self, model, optimizer):
            for state in optimizer.state.values():
                if state["momentum_buffer"].dim() == 4:
                    state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=other)

    recipe = replace(FP32, memory_format=layout)
    assert same(trained(recipe, [Shuffle()])[0], trained(recipe)[0])


def test_a_gradient_that_a_method_sets_in_another_layout_means_the_same():
    @dataclass(frozen=True)
    class Own(Method):
        def on_after_backward(self, run):
            for p in run.model.parameters():
                p.grad = p.grad.contiguous().clone(memory_format=torch.contiguous_format)

    assert same(trained(methods=[Own()])[0], trained()[0])


def test_a_layer_may_begin_to_learn_later():
    @dataclass(frozen=True)
    class Later(Method):
        def on_after_backward(self, run):
            if run.step < 5:
                run.model.head.weight.grad = None

    model, _ = trained(methods=[Later()])
    assert not torch.equal(model.head.weight, network().head.weight)


@pytest.mark.parametrize("kind", ["old parameters", "a parameter twice", "state of old parameters"])
def test_an_optimizer_that_does_not_fit_the_new_structure_is_an_error(kind):
    def change(model, optimizer):
        if kind == "old parameters":
            widen(model, optimizer, rebind=False)
        elif kind == "a parameter twice":
            optimizer.param_groups[0]["params"].append(model.head.weight)
        else:
            head = nn.Linear(8, 4)
            params = optimizer.param_groups[0]["params"]
            params[:] = [p for p in params if p is not model.head.weight and p is not model.head.bias] + list(
                head.parameters()
            )
            model.head = head

    @dataclass(frozen=True)
    class Careless(Method):
        def on_step_end(self, run):
            if run.step == 3:
                run.restructure(change)

    with pytest.raises(ValueError, match="optimizer must hold exactly the model's parameters"):
        trained(methods=[Careless()])


@pytest.mark.parametrize("kind", ["refused", "another model"])
def test_a_refused_change_of_structure_leaves_the_run_as_it_was(kind):
    def change(model, optimizer):
        widen(model, optimizer)
        if kind == "another model":
            return network(seed=9)
        raise BadInput("no")

    @dataclass(frozen=True)
    class Try(Method):
        def on_step_end(self, run):
            if run.step == 3:
                before = run.model, run.kind, run.structures
                with pytest.raises((BadInput, ValueError)):
                    run.restructure(change)
                assert (run.model, run.kind, run.structures) == before

    (a, _), (b, _) = trained(methods=[Try()]), trained()
    assert same(a, b)


def test_counting_a_step_changes_no_weights():
    """A change of structure that changes nothing makes the loop count one step more."""

    @dataclass(frozen=True)
    class Again(Method):
        def on_epoch_end(self, run):
            run.restructure(lambda model, optimizer: None)

        def on_step_end(self, run):
            if run.step == 7:
                run.restructure(lambda model, optimizer: None)

    (a, ha), (b, hb) = trained(methods=[Again()]), trained()
    assert same(a, b)
    assert ha.flops == hb.flops


def test_the_time_of_a_counted_step_is_not_on_the_clock():
    """Work labelled inside the first, counted step: its own time counts, the counting does not."""
    for hook in ("on_step_end", "on_after_backward"):
        _, history = trained(methods=[Reconfigures(steps=(0,), hook=hook)])
        assert history.kinds["reconfigure"]["count"] == 1
        assert history.kinds["step"]["count"] in (
            24,
            25,
        )  # what was left open by the hook is a piece of its own
        assert sum(k["seconds"] for k in history.kinds.values()) == pytest.approx(history.seconds)


# Histories


def test_histories_add_up_to_one_clock():
    first = train(model := network(), DATA, replace(FP32, epochs=1), [Widen("on_step_end", 3)], evaluations=3)
    second = train(model, DATA, replace(FP32, epochs=2), [Reconfigures()], evaluations=4)
    unchanged = copy.deepcopy((first, second))
    both = first + second
    assert repr((first, second)) == repr(unchanged)
    assert [r["step"] for r in both.rows] == [4, 8, 12, 18, 24, 30, 36]
    assert [r["epoch"] for r in both.rows] == pytest.approx([1 / 3, 2 / 3, 1, 1.5, 2, 2.5, 3])
    assert both.rows[3]["seconds"] == pytest.approx(first.seconds + second.rows[0]["seconds"])
    assert [r["accuracy"] for r in both.rows] == [r["accuracy"] for r in [*first.rows, *second.rows]]
    for name in ("steps", "seconds", "raw_seconds", "flops", "seen", "warm_up"):
        assert getattr(both, name) == pytest.approx(getattr(first, name) + getattr(second, name))
    assert both.kinds["step"]["count"] == first.kinds["step"]["count"] + 24 + 1
    assert both.kinds["reconfigure"]["seconds"] == pytest.approx(
        first.kinds["reconfigure"]["seconds"] + second.kinds["reconfigure"]["seconds"]
    )
    assert both.test_accuracy == second.test_accuracy
    assert both.memory["saved"] == max(first.memory["saved"], second.memory["saved"])


def test_events_of_a_later_history_move_with_its_clock():
    first = History(
        rows=[{"step": 10, "epoch": 2.0, "seconds": 1.0, "accuracy": 50.0}], steps=10, seconds=1.0
    )
    first.events = [{"step": 3, "text": "x"}]
    second = History(
        rows=[{"step": 4, "epoch": 1.0, "seconds": 2.0, "accuracy": 60.0}],
        steps=4,
        seconds=2.0,
        diverged=True,
    )
    second.events = [{"step": 2, "epoch": 0, "method": "M", "text": "pruned", "channels": 7}]
    both = first + second
    assert both.events == [
        *first.events,
        {"step": 12, "epoch": 2.0, "method": "M", "text": "pruned", "channels": 7},
    ]
    assert both.rows[-1] == {"step": 14, "epoch": 3.0, "seconds": 3.0, "accuracy": 60.0}
    assert both.diverged
    assert (second + first).diverged
    assert (both + first).steps == 24


def test_adding_nothing_changes_nothing():
    _, history = trained(replace(FP32, epochs=0.25))
    assert repr(History() + history) == repr(history)


# What a user's method gets wrong


def method(**hooks):
    """A method of a user's, called Mine, with these hooks."""
    return type("Mine", (Method,), hooks)()


def swap(run, *batch):
    run.model.head = nn.Linear(8, 4)
    return batch or None


def cut(run, *batch):
    run.model.stem.weight.data = run.model.stem.weight.data[:4]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"on_epoch_begin": lambda self, run: None},
            r"nothing calls Mine\.on_epoch_begin: the hooks are .* \(did you mean 'on_epoch_start'\?\)",
        ),
        (
            {"on_train_start": lambda self, run: None},
            r"nothing calls Mine\.on_train_start: .* \(did you mean 'on_fit_start'\?\)",
        ),
        (
            {"loss_term": lambda self, run: None},
            r"nothing calls Mine\.loss_term: .* \(did you mean 'loss_terms'\?\)",
        ),
        (
            {"on_batch": lambda self, run, x, y: None},
            r"Mine\.on_batch has to return the \(x, y\) .* returned None",
        ),
        ({"on_batch": lambda self, run, x, y: x}, r"Mine\.on_batch has to return"),
        (
            {"on_batch": lambda self, run, x, y: (x[:3], y)},
            r"Tensor of shape \(3, 1, 8, 8\), Tensor of shape \(32,\)",
        ),
        ({"on_batch": lambda self, run, x, y: (x[:0], y[:0])}, r"it returned \(Tensor of shape \(0, "),
        (
            {"loss_terms": lambda self, run: run.logits.mean(0)},
            r"Mine\.loss_terms has to return one number, .*\(4,\)",
        ),
        (
            {"loss_terms": lambda self, run: "much"},
            r"Mine\.loss_terms has to return one number, it returned str",
        ),
        (
            {"on_step_end": lambda self, run: setattr(run, "model", network())},
            r"run\.model: return the new one",
        ),
        (
            {"on_fit_start": lambda self, run: swap(run)},
            r"Mine\.on_fit_start changed the network's parameters by",
        ),
        (
            {"on_epoch_start": lambda self, run: cut(run)},
            r"Mine\.on_epoch_start changed the network's parameters",
        ),
        (
            {"on_epoch_end": lambda self, run: swap(run)},
            r"Mine\.on_epoch_end changed the network's parameters",
        ),
        (
            {"on_batch": lambda self, run, *batch: swap(run, *batch)},
            "at every step changed the network's parameters",
        ),
    ],
)
def test_a_method_that_is_wrong_is_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(BadInput, match=sentence) as error:
        trained(replace(FP32, epochs=1), [method(**wrong)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_raises_says_which_it_was(hook):
    def wrong(self, run, *batch):
        return {}["nothing"]

    with pytest.raises(KeyError, match="nothing") as error:
        trained(replace(FP32, epochs=0.1), [method(**{hook: wrong})])
    assert error.value.__notes__ == [
        f"Mine.{hook} raised this, at step {error.value.__notes__[0].split()[-1]}"
    ]


def test_a_hook_that_ends_the_program_is_named():
    with pytest.raises(BadInput, match=r"Mine\.on_epoch_end ends the program at step 12: exit\('enough'\)"):
        trained(replace(FP32, epochs=1), [method(on_epoch_end=lambda self, run: exit("enough"))])


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("set_grad_enabled", False),
        ("set_num_threads", 3),
        ("set_default_dtype", torch.float64),
        ("set_float32_matmul_precision", "medium"),
    ],
)
def test_a_hook_cannot_change_what_other_arms_share(function, value):
    get = getattr(torch, function.replace("set_grad", "is_grad").replace("set_", "get_"))
    before = get()
    with pytest.raises(BadInput, match=rf"Mine\.on_fit_start left torch\.{function}\({before}\) changed"):
        trained(FP32, [method(on_fit_start=lambda self, run: getattr(torch, function)(value) and None)])
    assert get() == before


def test_a_network_that_is_frozen_in_mid_run_is_said_to_be():
    def freeze(self, run):
        run.model.requires_grad_(False)

    with pytest.raises(BadInput, match="nothing is left to train at step 12: all parameters are frozen"):
        trained(FP32, [method(on_epoch_end=freeze)])


@dataclass
class Changeable(Method):
    rate: float = 0.5


@dataclass(frozen=True)
class Listed(Method):
    sizes: list = field(default_factory=list)
    rate: float = 0.5


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (
            [Changeable()],
            r"the settings of Changeable could change .*; write @dataclass\(frozen=True, kw_only=True\)",
        ),
        ([Listed(sizes=[1, 2])], "the settings of Listed could .*; 'sizes' is a list: make it a tuple"),
        ([Changeable], "expected a method with its settings, an instance of effilib.Method, got <class"),
        ([print], "expected a method with its settings"),
        ([Listed(sizes=()), Listed(sizes=())], "two methods are equal and would share their state"),
    ],
)
def test_methods_whose_state_could_not_be_kept_are_refused_before_anything_runs(methods, sentence):
    for what in (
        lambda: trained(methods=methods),
        lambda: Arm(name="mine", methods=tuple(methods)),
    ):
        with pytest.raises(BadInput, match=sentence):
            what()


def test_a_generator_of_methods_is_read_once():
    assert trained(replace(FP32, epochs=0.1), (m for m in [Diary()]))[1].steps == 1


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("epochs", (0, -1, math.inf, math.nan, "3", None, True), (0.01, 3)),
        ("batch_size", (0, -1, 10.5, 10.0, "10"), (1, np.int64(8))),
        ("lr", (0, -0.1, math.nan), (np.float32(0.1),)),
        ("warmup", (-1, 2, math.nan), (0, 1)),
        ("momentum", (-1, 1, 2), (0, 0.99)),
        ("weight_decay", (-1, math.inf), (0,)),
        ("label_smoothing", (-1, 1, 5), (0, 0.1)),
        ("augmentation", ("crops", 1), ("none",)),
    ],
)
def test_every_setting_of_a_recipe_has_a_range_and_says_it(name, bad, good):
    for value in bad:
        with pytest.raises(BadInput, match=rf"{name} is .*, it must be |unknown {name} .*: choose one of"):
            Recipe(**{name: value})
    for value in good:
        Recipe(**{name: value})


def test_a_warm_up_may_take_the_whole_run():
    assert trained(replace(FP32, epochs=0.5, warmup=1))[1].steps == 6


def test_batchnorms_in_eval_mode_stay_so_in_training_and_evaluation():
    model = network()
    held = model.stages[0][0].bn1.eval()
    held.running_var.fill_(4.0)
    _, history = trained(replace(FP32, epochs=1), model=model)
    assert len(history.rows) == 3
    assert [m.training for m in model.modules()] == [m is not held for m in model.modules()]
    assert torch.equal(held.running_var, torch.full((8,), 4.0))
    assert not torch.equal(model.bn.running_var, torch.ones(8))
    asleep = network().eval()
    trained(replace(FP32, epochs=0.1), model=asleep)
    assert all(m.training for m in asleep.modules())  # as a whole it was only looked at before


def test_rounding_adds_no_step_to_what_is_left():
    for steps in range(1, 40):
        schedule = Schedule(
            lr_at=Recipe().lr_at, planned=24, position=sum([6 / steps] * steps), pace=6 / steps
        )
        assert schedule.left == 3 * steps
