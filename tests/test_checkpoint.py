"""Checkpoints: real processes are killed in mid-training, or run out of memory, and what goes on ends
bit-equal.
"""

import collections
import contextlib
import enum
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from effilib import checkpoint, models, paths, seeds, surgery
from effilib.data import synthetic
from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.methods.net2net import Net2Net
from effilib.methods.prune_train import PruneTrain
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import users

RECIPE = Recipe(epochs=4, batch_size=32, precision="fp32")
DATA = synthetic(images=200)  # 4 batches an epoch
STEPS = 16


def network(seed=0, **settings):
    return models.build("resnet", 4, (1, 8, 8), seed=seed, **{"widths": (8, 8), "blocks": (1, 1), **settings})


def with_dropout():
    with seeds.seeded(5):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4)
        )


def swap(model, optimizer, name, new):
    """Put the module `new` in the place of `name`; the optimizer follows, the momentum starts anew, the order
    is another.
    """
    old, params = model.get_submodule(name), optimizer.param_groups[0]["params"]
    gone = {id(p) for p in old.parameters()}
    params[:] = [p for p in params if id(p) not in gone] + list(new.parameters())
    for p in old.parameters():
        optimizer.state.pop(p, None)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


@dataclass(frozen=True)
class Noise(Method):
    """Has all that a method can have: settings, state of tensors and plain values, draws of its own, and a
    log.
    """

    head: str = "head"
    size: float = 0.05

    def on_fit_start(self, run):
        run.state[self] = {"mean": torch.zeros(4), "steps": 0, "seen": [("begin", 0)]}

    def on_after_backward(self, run):
        state, head = run.state[self], run.model.get_submodule(self.head)
        noise = torch.randn(head.weight.shape, generator=run.generator(self))
        head.weight.grad += self.size * noise + state["mean"][:, None]
        state["mean"] = 0.9 * state["mean"] + 0.1 * head.bias.grad
        state["steps"] += 1

    def on_epoch_end(self, run):
        state = run.state[self]
        state["seen"].append(("epoch", run.epoch))
        run.log(self, "an epoch", steps=state["steps"], norm=float(state["mean"].norm()))


@dataclass(frozen=True)
class Widen(Method):
    """Widens the first block by 4 after the second epoch, with new weights of its own draws."""

    def on_epoch_end(self, run):
        if run.epoch == 1:

            def change(model, optimizer):
                with seeds.seeded(int(torch.randint(1000, (), generator=run.generator(self)))):
                    block = model.stages[0][0]
                    inner = block.conv1.out_channels + 4
                    swap(model, optimizer, "stages.0.0.conv1", nn.Conv2d(8, inner, 3, padding=1, bias=False))
                    swap(model, optimizer, "stages.0.0.bn1", nn.BatchNorm2d(inner))
                    swap(model, optimizer, "stages.0.0.conv2", nn.Conv2d(inner, 8, 3, padding=1, bias=False))

            run.restructure(change)


@dataclass(frozen=True)
class Stop(Method):
    """Ends the training before a step, for once: by an exception, by a signal, for want of memory, or in
    mid-writing.
    """

    step: int
    how: str = "interrupt"
    done: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_batch(self, run, x, y):
        if run.step == self.step and not self.done:
            self.done.append(1)
            if self.how == "memory":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
                torch.ones(2**28)
            elif self.how == "writing":
                os.replace = lambda *files: os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "interrupt":
                raise KeyboardInterrupt
            else:
                os.kill(os.getpid(), getattr(signal, self.how))
        return x, y


@dataclass(frozen=True)
class Operate(Method):
    """All that surgery can do to a user's network, but for inserting layers."""

    def on_epoch_end(self, run):
        if run.epoch == 1:
            run.restructure(lambda model, optimizer: self.change(model, optimizer, run.generator(self)))

    def change(self, model, optimizer, generator):
        surgery.append_block_(model, "layer1.1", optimizer, x=None, generator=generator)
        surgery.remove_path_(surgery.trace(model).path("layer2.0"), optimizer)
        found = surgery.trace(model)
        surgery.select_(found["layer1.2.conv1"], [0, 2, 5], optimizer)
        surgery.select_(found["conv"], [*range(8), 1, 1], optimizer)


CASES = {
    "plain": (network, ()),
    "dropout": (with_dropout, ()),
    "state": (network, (Noise(),)),
    "surgery": (network, (Noise(), Widen())),
    "order": (network, (Widen(),)),
    "grown": (
        network,
        (
            PruneTrain(scale=100.0, weigh="size", multiple=2),
            Net2Net(at=0.5, wider=1.5, deeper=("stages.0.0",)),
        ),
    ),
    "from the start": (network, (Net2Net(wider=1.5, noise=0.1),)),
    "a user's": (users, (Noise("fc"), Operate(), PruneTrain(scale=30.0, weigh="size", multiple=1))),
}


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def run(case, step=10**9, path=None, *, how="interrupt", seed=3, recipe=RECIPE, data=DATA):
    """(model, history) of a case; it stops before `step` and goes on when it is called again."""
    make, methods = CASES[case]
    model, stop = make(), Stop(step, how)
    try:
        return model, train(model, data, recipe, [*methods, stop], seed, checkpoint=path)
    except KeyboardInterrupt:
        model = make()
        return model, train(model, data, recipe, [*methods, stop], seed, checkpoint=path)


def same_run(a, b):
    (model, history), (other, reference) = a, b
    assert equal(model, other)
    assert history.steps == reference.steps == STEPS
    assert history.events == reference.events
    assert history.flops == reference.flops
    assert history.memory == reference.memory
    assert history.structure == reference.structure
    assert history.test_accuracy == reference.test_accuracy
    assert history.kinds["step"]["count"] == reference.kinds["step"]["count"]

    def rows(h):
        return [
            (r["step"], r["epoch"], r["lr"], r["loss"], r["accuracy"], str(r["train_loss"])) for r in h.rows
        ]

    assert rows(history) == rows(reference)
    assert [r["seconds"] for r in history.rows] == sorted(r["seconds"] for r in history.rows)
    assert history.seconds == pytest.approx(sum(k["seconds"] for k in history.kinds.values()))
    assert history.seconds <= history.raw_seconds


# Killed and resumed


ENDS = {
    "dropout": "SIGTERM",
    "surgery": "SIGKILL",
    "grown": "memory",
    "a user's": "SIGKILL",
    "state": "writing",
}


def kill_all(folder, threads):
    """Run every case of `ENDS` in a process of its own, to its bitter end; print how each ended. Forks, as
    imports take seconds.
    """
    ends = {}
    for case, how in ENDS.items():
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(threads)
                run(case, 10 if how == "writing" else 14, Path(folder) / case / "run.pt", how=how)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        ends[case] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ends))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the checkpoints of processes that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    code = f"""
import sys, torch
torch.set_num_threads(1)  # a process that has threads must not fork
sys.path[:0] = [{str(paths.root())!r}, {str(Path(__file__).parent)!r}]
import {__name__} as t  # under the name that it has here: a method is known by it
t.kill_all({str(folder)!r}, {torch.get_num_threads()})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.root(), capture_output=True, text=True, timeout=120
    )
    ends = json.loads(done.stdout or "{}")
    codes = {"SIGTERM": -signal.SIGTERM, "SIGKILL": -signal.SIGKILL, "memory": 1, "writing": -signal.SIGKILL}
    assert ends == {case: codes[how] for case, how in ENDS.items()}, done.stderr
    assert "can't allocate memory" in done.stderr
    return folder


@pytest.mark.parametrize("case", ENDS)
def test_a_process_killed_in_mid_training_goes_on_and_ends_bit_equal(case, killed):
    path, how = killed / case / "run.pt", ENDS[case]
    if how != "writing":
        assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == (8 if how == "writing" else 12)  # its last whole epoch
    make, methods = CASES[case]
    model = make()
    history = train(
        model,
        DATA,
        RECIPE,
        [*methods, Stop(10 if how == "writing" else 14, how, done=[1])],
        3,
        checkpoint=path,
    )
    same_run((model, history), run(case))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert (shapes != {name: p.shape for name, p in make().named_parameters()}) == (
        case in ("surgery", "grown", "a user's")
    )
    if case == "surgery":
        assert models.describe(model)["blocks"] == [[12], [8]]
        assert [e["epoch"] for e in history.events] == [0, 1, 2, 3]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("step", [2, 8, 14])
def test_an_interrupted_run_goes_on_and_ends_bit_equal(case, step, tmp_path):
    same_run(run(case, step, tmp_path / "run.pt"), run(case))


def test_a_checkpoint_changes_nothing_and_a_finished_run_can_be_asked_for_again(tmp_path):
    path = tmp_path / "run.pt"
    reference = run("surgery")
    same_run(run("surgery", path=path), reference)
    same_run(run("surgery", path=path), reference)


def test_a_fraction_of_an_epoch_is_resumed_too(tmp_path):
    recipe = replace(RECIPE, epochs=2.5)
    (a, ha), (b, hb) = run("plain", 9, tmp_path / "run.pt", recipe=recipe), run("plain", recipe=recipe)
    assert equal(a, b)
    assert ha.steps == hb.steps == 10


def test_a_grown_batch_is_resumed_too(tmp_path):
    @dataclass(frozen=True)
    class Doubles(Method):
        def on_epoch_end(self, run):
            if run.epoch == 0:
                run.grow_batch(2, 1.5)

    def go(stop, path=None):
        model = network()
        try:
            return model, train(model, DATA, RECIPE, [Doubles(), stop], 3, checkpoint=path)
        except KeyboardInterrupt:
            model = network()
            return model, train(model, DATA, RECIPE, [Doubles(), stop], 3, checkpoint=path)

    (a, ha), (b, hb) = go(Stop(7), tmp_path / "run.pt"), go(Stop(10**9))
    assert equal(a, b)
    assert ha.steps == hb.steps < STEPS
    assert [r["lr"] for r in ha.rows] == [r["lr"] for r in hb.rows]


def test_parameter_groups_and_their_learning_rate_factors_are_resumed(tmp_path):
    @dataclass(frozen=True)
    class Split(Method):
        def on_epoch_end(self, run):
            if run.epoch == 0:
                (group,) = run.optimizer.param_groups
                head = list(run.model.head.parameters())
                group["params"] = [p for p in group["params"] if not any(p is h for h in head)]
                state = {p: run.optimizer.state[p] for p in head}
                run.optimizer.add_param_group({"params": head, "lr_factor": 0.1})
                run.optimizer.state.update(state)

    def finished(stop, path=None):
        for _ in range(2):
            model = network()
            try:
                train(model, DATA, RECIPE, [Split(), stop], checkpoint=path)
                return model
            except KeyboardInterrupt:
                pass

    assert equal(finished(Stop(9), tmp_path / "run.pt"), finished(Stop(10**9)))


# Another run's, or damaged


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "run.pt"
    train(network(), DATA, replace(RECIPE, epochs=2), [Noise()], 3, checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("recipe", {"recipe": replace(RECIPE, epochs=2, lr=0.05)}),
        ("seed", {"seed": 4}),
        ("data", {"dataset": synthetic(images=200, seed=1)}),
        ("methods", {"methods": [Noise(size=0.06)]}),
        ("methods", {"methods": []}),
        ("network", {"model": network(widths=(8, 12))}),
        ("network", {"model": models.build("convnet", 4, (1, 8, 8), widths=(8, 8))}),
        ("network", {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))}),
    ],
)
def test_a_checkpoint_of_another_run_is_bad_input_and_changes_nothing(what, changes, written):
    before = written.read_bytes()
    own = dict(model=network(), dataset=DATA, recipe=replace(RECIPE, epochs=2), methods=[Noise()], seed=3)
    own |= changes
    start = {k: v.clone() for k, v in own["model"].state_dict().items()}
    with pytest.raises(
        BadInput, match=rf"run\.pt belongs to another run: other {what}; delete it or name another file"
    ):
        train(**own, checkpoint=written)
    assert written.read_bytes() == before
    assert all(torch.equal(start[k], v) for k, v in own["model"].state_dict().items())


def test_all_that_differs_is_named(written):
    with pytest.raises(BadInput, match="other recipe and methods and seed"):
        train(network(), DATA, RECIPE, [], 5, checkpoint=written)


# What edited code, or a network of other strides, makes of a run.
OWN = """
from dataclasses import dataclass
import own_helper
from effilib.hooks import Method

@dataclass(frozen=True)
class Own(Method):
    def on_epoch_end(self, run):
        run.log(self, own_helper.word())
"""


def test_an_interrupted_run_does_not_go_on_with_edited_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def load(word="a", comment=""):
        (tmp_path / "own_method.py").write_text(OWN + comment)
        (tmp_path / "own_helper.py").write_text(f"def word():\n    return {word!r}\n")
        for name in ("own_method", "own_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("own_method").Own()

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), DATA, RECIPE, [load(), Stop(9)], checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(
        BadInput, match=r"run\.pt was written by other code: .* was edited since; undo that, "
    ):
        train(network(), DATA, RECIPE, [load("other"), Stop(9, done=[1])], checkpoint=path)
    assert path.read_bytes() == before
    again = [load(comment="# a comment\n"), Stop(9, done=[1])]
    assert train(network(), DATA, RECIPE, again, checkpoint=path).steps == STEPS
    for name in ("own_method", "own_helper"):
        sys.modules.pop(name)


def test_a_network_of_other_strides_is_another_one(tmp_path):
    def net(stride):
        with seeds.seeded(0):
            return nn.Sequential(
                nn.Conv2d(1, 4, 3, stride), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
            )

    with pytest.raises(KeyboardInterrupt):
        train(net(1), DATA, RECIPE, [Stop(9)], checkpoint=tmp_path / "run.pt")
    with pytest.raises(BadInput, match="belongs to another run: other network; delete it"):
        train(net(2), DATA, RECIPE, [Stop(9, done=[1])], checkpoint=tmp_path / "run.pt")


class Classic(Method):
    """A method that is no dataclass, with a function and an own object as settings."""

    def __init__(self, rate, act=torch.tanh, size=2):
        self.rate, self.act, self.own = rate, act, Amount(size)

    def on_after_backward(self, run):
        run.model.head.bias.grad += self.rate * self.act(run.model.head.bias.grad) * self.own.size


class Amount:
    def __init__(self, size):
        self.size = size


def test_a_plain_class_with_functions_as_settings_is_known_again(tmp_path):
    def start(done, path=tmp_path / "run.pt", **settings):
        model = network()
        method = Classic(**{"rate": 0.1, **settings})
        return model, train(model, DATA, RECIPE, [method, Stop(9, done=done)], checkpoint=path)

    with pytest.raises(KeyboardInterrupt):
        start([])
    for settings in ({"rate": 0.2}, {"act": torch.sigmoid}, {"act": lambda x: x}, {"size": 3}):
        with pytest.raises(BadInput, match="belongs to another run: other methods;"):
            start([1], **settings)
    with pytest.raises(
        BadInput, match=r"\[0\]\.act is <object object>, which has no name that stays the same"
    ):
        start([1], act=object())
    same_run(start([1]), start([1], None))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_losses_since_the_last_evaluation_are_resumed(precision, tmp_path):
    @dataclass(frozen=True)
    class Losses(Method):
        seen: list = field(default_factory=list, compare=False, hash=False)

        def on_step_end(self, run):
            self.seen.append(run.loss.item())

    def start(stop, path=None):
        look = Losses()
        recipe = replace(RECIPE, precision=precision)
        return look.seen, train(network(), DATA, recipe, [look, stop], checkpoint=path)

    losses, whole = start(Stop(10**9))
    assert [r["step"] for r in whole.rows] == [5, 11, 16]  # epochs end after 4, 8 and 12
    for row, (begin, end) in zip(whole.rows, [(0, 5), (5, 11), (11, 16)], strict=True):
        assert row["train_loss"] == pytest.approx(sum(losses[begin:end]) / (end - begin), rel=1e-6)
    with pytest.raises(KeyboardInterrupt):
        start(Stop(9), tmp_path / "run.pt")
    _, resumed = start(Stop(9, done=[1]), tmp_path / "run.pt")
    assert [r["train_loss"] for r in resumed.rows] == [r["train_loss"] for r in whole.rows]


class Held:
    pass


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": 1, "seen": np.zeros(3)}, "ndarray in run.state[self]['seen']"),
        ({"seen": collections.deque([1])}, "deque in run.state[self]['seen']"),
        ({"act": lambda x: x}, "function in run.state[self]['act']"),
        ({"own": Held()}, "Held in run.state[self]['own']"),
        ({"deep": [1, {"x": (torch.ones(1), Held())}]}, "Held in run.state[self]['deep'][1]['x'][1]"),
        ({"generator": torch.Generator()}, "Generator in run.state[self]['generator']"),
        (collections.deque(), "deque in run.state[self]"),
    ],
)
def test_a_state_that_no_checkpoint_can_hold_is_named_at_the_first_save(state, words, tmp_path):
    @dataclass(frozen=True)
    class Keeps(Method):
        def on_fit_start(self, run):
            run.state[self] = state

    methods = [Noise(), Keeps()]
    with pytest.raises(BadInput) as error:
        train(network(), DATA, RECIPE, methods, checkpoint=tmp_path / "run.pt")
    said = f"Keeps keeps an object of type {words}, which a checkpoint cannot hold: use tensors, numbers, "
    assert str(error.value).startswith(said)
    assert not list(tmp_path.iterdir())  # nothing half-written
    assert train(network(), DATA, RECIPE, methods).steps == STEPS  # without a checkpoint it may


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor(2.5, requires_grad=True), 2.5),
        (torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        ({"a": (torch.tensor(1), [np.float64(2)]), np.int32(4): None}, {"a": (1, [2.0]), 4: None}),
        (Level.HIGH, 3),
        ("word", "word"),
        (collections.OrderedDict(a=np.str_("b")), {"a": "b"}),
    ],
)
def test_what_a_method_logs_is_plain_from_then_on_and_survives_files(value, plain, tmp_path):
    @dataclass(frozen=True)
    class Logs(Method):
        def on_epoch_end(self, run):
            run.log(self, "an epoch", value=value)
            event = run.events[-1]
            assert event["value"] == plain
            assert type(event["value"]) is type(plain)

    with pytest.raises(KeyboardInterrupt):
        train(network(), DATA, RECIPE, [Logs(), Stop(9)], checkpoint=tmp_path / "run.pt")
    history = train(network(), DATA, RECIPE, [Logs(), Stop(9, done=[1])], checkpoint=tmp_path / "run.pt")
    assert [e["value"] for e in history.events] == [plain] * 4
    json.dumps(history.events)


def test_what_is_logged_is_what_it_was_then():
    @dataclass(frozen=True)
    class Logs(Method):
        def on_fit_start(self, run):
            run.state[self] = []

        def on_epoch_end(self, run):
            run.state[self].append(run.epoch)
            run.log(self, "epochs", epochs=run.state[self])

    events = train(network(), DATA, RECIPE, [Logs()]).events
    assert [e["epochs"] for e in events] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(Held(), "Held"), ({"a": [Held()]}, "Held"), ({1, 2}, "set"), (b"x", "bytes"), (1j, "complex"),
     (torch.float16, "dtype"), (lambda: 1, "function"), (collections.deque(), "deque")],
)  # fmt: skip
def test_what_no_history_can_hold_is_refused_where_it_is_logged(value, kind):
    done = []

    @dataclass(frozen=True)
    class Logs(Method):
        def on_step_end(self, run):
            done.append(run.step)
            run.log(self, "x", other=1, value=value)

    words = (
        rf"Logs: run\.log\(\.\.\., value=\.\.\.\) is or holds an object of type {kind}, which no history can"
    )
    with pytest.raises(BadInput, match=words):
        train(network(), DATA, RECIPE, [Logs()])
    assert done == [0]


def test_a_state_of_all_plain_kinds_is_resumed_as_it_was(tmp_path):
    plain = {
        "tensors": [torch.arange(3), torch.ones(2, dtype=torch.float64)], "words": ("a", b"b", None, True),
        "numbers": {1: 2.5, "nan": float("inf")}, "sets": {1, 2}, "ordered": collections.OrderedDict(a=1),
    }  # fmt: skip

    @dataclass(frozen=True)
    class Keeps(Method):
        def on_fit_start(self, run):
            run.state[self] = plain

        def on_fit_end(self, run):
            assert str(run.state[self]) == str(plain)
            assert (run.state[self] is not plain) == run.resumed

    with pytest.raises(KeyboardInterrupt):
        train(network(), DATA, RECIPE, [Keeps(), Stop(9)], checkpoint=tmp_path / "run.pt")
    history = train(network(), DATA, RECIPE, [Keeps(), Stop(9, done=[1])], checkpoint=tmp_path / "run.pt")
    assert history.steps == STEPS


def test_a_users_network_is_built_anew_whoever_changed_its_widths_but_not_with_layers_that_were_inserted(
    tmp_path,
):
    @dataclass(frozen=True)
    class Wider(Method):
        def on_epoch_end(self, run):
            if run.epoch == 0:

                def change(model, optimizer):
                    with seeds.seeded(1):
                        swap(model, optimizer, "0", nn.Conv2d(1, 12, 3))
                        swap(model, optimizer, "3", nn.Linear(12 * 36, 4))

                run.restructure(change)

    @dataclass(frozen=True)
    class Deeper(Method):
        def on_epoch_end(self, run):
            x = torch.rand(4, 1, 8, 8)
            if run.epoch == 0:
                run.restructure(
                    lambda model, optimizer: surgery.insert_layer_(model, "1", optimizer, x=x) and None
                )

    def net():
        with seeds.seeded(0):
            return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

    def start(method, stop, path=None):
        model = net()
        train(model, DATA, RECIPE, [method, stop], checkpoint=path)
        return model

    for method in (Wider(), Deeper()):
        with pytest.raises(KeyboardInterrupt):
            start(method, Stop(6), tmp_path / f"{type(method).__name__}.pt")
    resumed, whole = (start(Wider(), Stop(6, done=[1]), path) for path in (tmp_path / "Wider.pt", None))
    assert equal(resumed, whole)
    assert resumed[0].weight.shape == (12, 1, 3, 3)
    with pytest.raises(BadInput, match="was restructured and cannot be built anew"):
        start(Deeper(), Stop(6), tmp_path / "Deeper.pt")


def flipped(raw, path):
    """The file's bytes with one bit of a weight flipped: torch.load alone reads it without a word."""
    path.write_bytes(raw)
    weight = torch.load(path, weights_only=True)["model"]["head.weight"].numpy().tobytes()
    at = raw.index(weight) + 5
    return raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage", ["empty", "text", "cut", "pickle", "bits", "other content", "a network", "a folder"]
)
def test_a_damaged_checkpoint_is_bad_input_that_names_the_file(damage, written, tmp_path):
    path, raw = tmp_path / "damaged.pt", written.read_bytes()
    if damage == "other content":
        torch.save([1, 2], path)
    elif damage == "a network":
        checkpoint.save_model(path, network(), "resnet", DATA)
    elif damage == "a folder":
        path.mkdir()
    else:
        bits = flipped(raw, path)
        path.write_bytes(
            {"empty": b"", "text": b"hello\n", "cut": raw[:-100], "pickle": b"\x80\x02]\x94.", "bits": bits}[
                damage
            ]
        )
    with pytest.raises(BadInput, match=r"damaged\.pt is not a (readable )?checkpoint"):
        train(network(), DATA, replace(RECIPE, epochs=2), [Noise()], 3, checkpoint=path)


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        train(network(), DATA, RECIPE, checkpoint=tmp_path / "file" / "run.pt")


# Networks


def outputs(model):
    with torch.no_grad():
        return model.eval()(DATA.normalize(DATA.decide.x))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet", {"widths": (8, 16), "blocks": (2, 1)}),
        ("resnet", {"widths": (8, 12), "blocks": [[5, 7], [9]], "stem": 6}),
        ("vgg", {"widths": ((4,), (6, 8))}),
        ("convnet", {"widths": (4, 6), "bn": False}),
        ("torchvision.models:resnet18", {}),
        ("tests.common:Users", {}),
    ],
)
def test_a_saved_network_is_built_anew_with_its_widths(name, settings, tmp_path):
    shape = (3, 8, 8) if ":" in name else (1, 8, 8)
    model = models.build(name, 4, shape, seed=1, **settings)
    with torch.no_grad():
        model(
            torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
        )  # moves the BatchNorms' statistics
    checkpoint.save_model(tmp_path / "net.pt", model, name, synthetic(channels=shape[0]))
    loaded = checkpoint.load_model(tmp_path / "net.pt", name)
    assert loaded is not model
    assert equal(loaded, model)
    assert torch.load(tmp_path / "net.pt", weights_only=True)["architecture"]["network"] == name
    assert models.describe(loaded) == models.describe(model)


def test_a_restructured_network_is_saved_and_built_anew(tmp_path):
    for case, name in (("surgery", "resnet"), ("a user's", "tests.common:Users")):
        model, _ = run(case)
        checkpoint.save_model(tmp_path / "net.pt", model, name, DATA)
        loaded = checkpoint.load_model(tmp_path / "net.pt", name)
        assert equal(loaded, model)
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-6)


MINE = """
from torch import nn
def net(classes, channels={channels}):
    maps = nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU())
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(36 * channels, classes))
"""


def test_a_users_own_network_is_saved_and_loaded_by_its_path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(channels=3).replace("channels=3", "width=3").replace("channels", "width"))
    name = f"{file}:net"
    model = models.build(name, 4, (1, 8, 8), seed=1)
    checkpoint.save_model(tmp_path / "net.pt", model, name, DATA)
    assert torch.equal(outputs(checkpoint.load_model(tmp_path / "net.pt", name)), outputs(model))
    for new, words in (("width, 5, padding=1)", "the weights do not fit network"), (None, "cannot import")):
        other = tmp_path / f"{len(words)}.py"  # a file is loaded once
        if new:
            other.write_text(file.read_text().replace("width, 3)", new))
        checkpoint.save_model(tmp_path / "net.pt", model, f"{other}:net", DATA)
        with pytest.raises(BadInput, match=words):
            checkpoint.load_model(tmp_path / "net.pt", f"{other}:net")


def test_widths_follow_the_file_that_was_saved(tmp_path):
    narrow, wide = (tmp_path / f"{name}.py" for name in ("narrow", "wide"))
    for file, width in ((narrow, 3), (wide, 11)):
        file.write_text(MINE.format(channels=width).replace(f"channels={width}", f"width={width}"))
        file.write_text(file.read_text().replace("channels", "width"))
    model = models.build(f"{narrow}:net", 4, (1, 8, 8), seed=1)
    checkpoint.save_model(tmp_path / "net.pt", model, f"{wide}:net", DATA)
    assert torch.equal(outputs(checkpoint.load_model(tmp_path / "net.pt", f"{wide}:net")), outputs(model))


@pytest.mark.parametrize("name", ["os:system", "subprocess:call", "EVIL:net"])
def test_a_file_cannot_name_what_is_called(name, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'called')!r}, 'w')\ndef net(classes): pass\n")
    name = name.replace("EVIL", str(tmp_path / "evil.py"))
    content = {
        "architecture": {
            "network": name,
            "classes": f"touch {tmp_path / 'called'}",
            "shape": [1, 8, 8],
            "settings": {},
        },
        "model": {},
    }
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(
        BadInput, match=f"holds a network that {name} makes, which would be imported and called"
    ):
        checkpoint.load_model(tmp_path / "net.pt")
    with pytest.raises(BadInput, match=f"holds a network that {name} makes, not resnet"):
        checkpoint.load_model(tmp_path / "net.pt", "resnet")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "architecture",
    [{}, [], None, {"network": ["resnet"], "classes": 4, "shape": [1, 8, 8], "settings": {}}],
)
def test_a_file_that_describes_no_network_is_bad_input(architecture, tmp_path):
    torch.save({"architecture": architecture, "model": {}}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"net\.pt is not a checkpoint of a network"):
        checkpoint.load_model(tmp_path / "net.pt")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bits", "a run"])
def test_a_damaged_network_is_bad_input(damage, written, tmp_path):
    path = tmp_path / "net.pt"
    if damage == "a run":
        path.write_bytes(written.read_bytes())
    elif damage != "missing":
        checkpoint.save_model(path, network(), "resnet", DATA)
        raw = path.read_bytes()
        bits = flipped(raw, path)
        path.write_bytes({"empty": b"", "cut": raw[:1000], "bits": bits}[damage])
    with pytest.raises(BadInput, match=r"net\.pt is not a (readable )?checkpoint"):
        checkpoint.load_model(path)


def test_every_cut_and_many_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "net.pt"
    checkpoint.save_model(path, nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "resnet", DATA)
    raw = path.read_bytes()
    intact = str(torch.load(path, weights_only=True))
    for i in range(0, len(raw), 37):
        path.write_bytes(raw[:i])
        with pytest.raises(BadInput):
            checkpoint._read(path, "architecture")
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1 :])
        with contextlib.suppress(BadInput):  # padding between the parts carries nothing
            assert str(checkpoint._read(path, "architecture")) == intact


def test_what_its_user_froze_stays_so_in_a_network_that_is_built_anew():
    model = models.build("convnet", 4, (1, 8, 8), widths=(4, 8))
    model.features[4].requires_grad_(False)
    model.features[5].eval()
    checkpoint.shape_(model, {"settings": {"widths": [[2], [8]], "bn": True}})
    assert model.settings()["widths"] == [[2], [8]]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["features.4.weight"]
    assert [n for n, m in model.named_modules() if not m.training] == ["features.5"]
