"""Checkpoints: real processes are killed in mid-training, or run out of memory, and what goes on ends
bit-equal.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from effilib import checkpoint, models, paths, surgery
from effilib.data import synthetic
from effilib.errors import BadInput
from effilib.methods.net2net import Net2Net
from effilib.methods.prune_train import PruneTrain
from effilib.training import Method, Recipe, train
from tests.common import users

RECIPE = Recipe(epochs=4, batch_size=32, precision="fp32")
DATA = synthetic(images=200)  # 4 batches an epoch
STEPS = 16


def network(seed=0, **settings):
    return models.build("resnet", 4, (1, 8, 8), seed=seed, **{"widths": (8, 8), "blocks": (1, 1), **settings})


def with_dropout():
    with models.seeded(5):
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
                with models.seeded(int(torch.randint(1000, (), generator=run.generator(self)))):
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
        surgery.append_block_(model, "layer1.1", optimizer, generator=generator)
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
    assert history.raw_seconds == pytest.approx(sum(k["seconds"] for k in history.kinds.values()))


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


def test_a_users_network_is_built_anew_whoever_changed_its_widths_but_not_with_layers_that_were_inserted(
    tmp_path,
):
    @dataclass(frozen=True)
    class Wider(Method):
        def on_epoch_end(self, run):
            if run.epoch == 0:

                def change(model, optimizer):
                    with models.seeded(1):
                        swap(model, optimizer, "0", nn.Conv2d(1, 12, 3))
                        swap(model, optimizer, "3", nn.Linear(12 * 36, 4))

                run.restructure(change)

    @dataclass(frozen=True)
    class Deeper(Method):
        def on_epoch_end(self, run):
            if run.epoch == 0:
                run.restructure(
                    lambda model, optimizer: surgery.insert_layer_(model, "1", optimizer) and None
                )

    def net():
        with models.seeded(0):
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
        checkpoint.save_model(path, network(), "resnet", 4, (1, 8, 8))
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
    checkpoint.save_model(tmp_path / "net.pt", model, name, 4, shape)
    loaded = checkpoint.load_model(tmp_path / "net.pt")
    assert loaded is not model
    assert equal(loaded, model)
    assert torch.load(tmp_path / "net.pt", weights_only=True)["architecture"]["network"] == name
    assert models.describe(loaded) == models.describe(model)


def test_a_restructured_network_is_saved_and_built_anew(tmp_path):
    for case, name in (("surgery", "resnet"), ("a user's", "tests.common:Users")):
        model, _ = run(case)
        checkpoint.save_model(tmp_path / "net.pt", model, name, 4, (1, 8, 8))
        loaded = checkpoint.load_model(tmp_path / "net.pt")
        assert equal(loaded, model)
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-6)


MINE = """
from torch import nn
def net(classes, channels={channels}):
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * channels, classes))
"""


def test_a_users_own_network_is_saved_and_loaded_by_its_path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(channels=3).replace("channels=3", "width=3").replace("channels", "width"))
    name = f"{file}:net"
    model = models.build(name, 4, (1, 8, 8), seed=1)
    checkpoint.save_model(tmp_path / "net.pt", model, name, 4, (1, 8, 8))
    assert torch.equal(outputs(checkpoint.load_model(tmp_path / "net.pt")), outputs(model))
    file.write_text(file.read_text().replace("width=3", "width=11"))
    assert torch.equal(
        outputs(checkpoint.load_model(tmp_path / "net.pt")), outputs(model)
    )  # widths follow the file that was saved
    file.write_text(file.read_text().replace("width, 3)", "width, 5, padding=1)"))
    with pytest.raises(BadInput, match=r"net\.pt: the weights do not fit network .*mine\.py:net"):
        checkpoint.load_model(tmp_path / "net.pt")
    file.unlink()
    with pytest.raises(BadInput, match="cannot import"):
        checkpoint.load_model(tmp_path / "net.pt")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bits", "a run"])
def test_a_damaged_network_is_bad_input(damage, written, tmp_path):
    path = tmp_path / "net.pt"
    if damage == "a run":
        path.write_bytes(written.read_bytes())
    elif damage != "missing":
        checkpoint.save_model(path, network(), "resnet", 4, (1, 8, 8))
        raw = path.read_bytes()
        bits = flipped(raw, path)
        path.write_bytes({"empty": b"", "cut": raw[:1000], "bits": bits}[damage])
    with pytest.raises(BadInput, match=r"net\.pt is not a (readable )?checkpoint"):
        checkpoint.load_model(path)


def test_every_cut_and_many_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "net.pt"
    small = nn.Linear(4, 4)
    checkpoint.save_model(path, small, "resnet", 4, (1, 8, 8))
    raw = path.read_bytes()
    intact = str(torch.load(path, weights_only=True))
    for i in range(0, len(raw), 37):
        path.write_bytes(raw[:i])
        with pytest.raises(BadInput):
            checkpoint._read(path, "architecture")
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1 :])
        with contextlib.suppress(BadInput):  # padding between the parts carries nothing
            assert str(checkpoint._read(path, "architecture")) == intact
