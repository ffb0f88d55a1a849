"""Several processes, started by a real torchrun (gloo): equal to one process, also through surgery; killed,
restarted, refused.

`torchrun -m tests.test_distributed FOLDER` runs what is below `main`; pytest does the same with one process
and compares. With BatchNorm the one process normalises each share apart."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import distributed, models, paths
from effilib.data import synthetic
from effilib.dataset import Batches
from effilib.distributed import ALONE, Ranks
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm
from effilib.hooks import Method
from effilib.methods.column_row_sampling import ChannelSampling
from effilib.methods.gradient_approximation import GradientApproximation
from effilib.methods.improvement import Treatment
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.net2net import Net2Net
from effilib.methods.prune_then_grow import PruneThenGrow
from effilib.methods.prune_train import PruneTrain
from effilib.methods.ranked_cut import RankedCut
from effilib.methods.stochastic_pooling import StochasticPooling
from effilib.methods.structure_and_strength import StructureAndStrength
from effilib.methods.wavelet_auto_encoder import WAE, WaveletAutoEncoder
from effilib.recipe import Recipe
from effilib.results import compare
from effilib.tasks import task
from effilib.training import train
from effilib.workbook.train_command import methods as all_methods
from tests.common import users

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=5, batch_size=33, lr=0.1, precision="fp64")  # 33 images: shares of 17 and 16
DATA = synthetic(images=200)  # 4 batches an epoch, 20 steps


def with_bn(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 1), **settings})


def without_bn():
    return models.build("vgg", 4, (1, 8, 8), widths=((8,), (8,)), bn=False)


@dataclass(frozen=True)
class Look(Method):
    """Writes down what must be the same in all processes, and what must not."""

    def on_fit_start(self, run):
        run.state[self] = {"losses": [], "batches": [], "equal": True, "images": 0}
        common, own = (
            run.ranks.gather(torch.rand(3, generator=run.generator(self, share)).tolist())
            for share in (False, True)
        )
        run.log(
            self,
            "draws",
            common=common[0],
            alike=common == common[:1] * len(common),
            own=len({str(o) for o in own}) == len(own),
        )

    def on_batch(self, run, x, y):
        whole = run.ranks.whole(x).flatten()  # in its order
        run.state[self]["batches"].append(
            round((whole * torch.linspace(0, 1, len(whole), dtype=x.dtype)).sum().item(), 6)
        )
        return x, y

    def on_after_backward(self, run):
        state, gradients = run.state[self], [p.grad for p in run.model.parameters()]
        state["equal"] &= all(
            torch.equal(a, b)
            for other in run.ranks.gather(gradients)
            for a, b in zip(gradients, other, strict=True)
        )

    def on_step_end(self, run):
        state = run.state[self]
        state["losses"].append(round(run.loss.item(), 9))
        state["images"] += int(run.ranks.total(torch.tensor(len(run.logits))))

    def on_fit_end(self, run):
        run.log(self, "seen", **run.state[self])


PRUNE = PruneTrain(scale=100.0, weigh="size", multiple=2)
GENTLE = PruneTrain(weigh="norm", rule="readers", keep_scale=True, multiple=2)
GROW = PruneThenGrow(
    mode="periodic",
    period=1,
    cooldown=1,
    prune=GENTLE,
    idle=0.1,
    budget=3.0,
    full=101.0,
    gap=100.0,
    search=0.9,
)
PLAN = replace(GROW, plan=((0, "widen", "stage 2"), (2, "deepen", "stage 2")))
CASES = {
    "plain": (without_bn, (Look(),)),
    "plain, BatchNorm": (with_bn, (Look(),)),
    "pruned": (without_bn, (PRUNE,)),
    "pruned, BatchNorm": (with_bn, (PRUNE,)),
    "grown": (without_bn, (GROW,)),
    "grown, BatchNorm": (with_bn, (GROW,)),
    "grown by plan": (without_bn, (PLAN,)),
    "grown by plan, BatchNorm": (with_bn, (PLAN,)),
}


def outcome(make, methods, **options):
    """What a training came to, as plain values and tensors."""
    model = make()
    history = train(model, DATA, RECIPE, methods, seed=1, **options)
    assert alike(model)
    events = [{k: v for k, v in e.items() if k != "seconds"} for e in history.events]
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in history.rows]
    return {
        "model": model.state_dict(), "structure": history.structure, "events": events, "rows": rows,
        "flops": history.flops, "steps": history.steps, "test": history.test_accuracy,
    }  # fmt: skip


# What the processes do


@dataclass(frozen=True)
class Die(Method):
    """Kills one of the processes, once."""

    folder: str
    step: int = 14

    def on_batch(self, run, x, y):
        once = Path(self.folder) / "died"
        if run.step == self.step and run.ranks.rank == 1 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x, y


@dataclass(frozen=True)
class Jitter(Method):
    """Draws for its own images, and has a state of its own in each process."""

    def on_fit_start(self, run):
        run.state[self] = {"drawn": 0.0, "rank": run.ranks.rank}

    def on_batch(self, run, x, y):
        noise = torch.randn(x.shape, generator=run.generator(self, share=True), dtype=x.dtype)
        run.state[self]["drawn"] += noise.sum().item()
        assert run.state[self]["rank"] == run.ranks.rank
        return x + 0.1 * noise, y

    def on_fit_end(self, run):
        run.log(self, "drawn", drawn=run.ranks.gather(run.state[self]["drawn"]))


class Classic(Method):
    """A method that is no dataclass, with a function as a setting: it has the same name in all processes."""

    def __init__(self, act):
        self.act = act

    def on_after_backward(self, run):
        run.model.head.bias.grad += self.act(run.model.head.bias.grad)


# A user's network with dropout, pruned and grown in width and depth, and draws for single images: all that a
# checkpoint has to hold.
KILLED = (users, (Jitter(), PRUNE, Net2Net(at=0.4, wider=1.5, deeper=("layer1.1",))))


def unused():
    model = with_bn()
    model.spare = nn.Linear(2, 2)
    return model


def refusals(rank, folder):
    """What each call is refused with."""
    found = {}
    calls = {
        "skip": lambda: train(with_bn(), DATA, RECIPE, [GradientApproximation(how="skip")]),
        "other seeds": lambda: train(with_bn(), DATA, RECIPE, seed=rank),
        "one image": lambda: train(with_bn(), DATA, Recipe(epochs=1, batch_size=1, precision="fp32")),
        "sync_bn": lambda: train(with_bn(), DATA, Recipe(sync_bn=True)),
        "unused": lambda: train(unused(), DATA, RECIPE),
        "no name": lambda: train(with_bn(), DATA, RECIPE, [Classic(object())]),
        "another run's": lambda: train(with_bn(), DATA, RECIPE, checkpoint=folder / "alone.pt"),
        "compare": lambda: compare(task("smoke", "mnist5k"), [Arm(name="plain", role="baseline")]),
    }
    for name, call in calls.items():
        try:
            call()
        except BadInput as error:
            found[name] = str(error)
    return found


def every_method():
    """A short training with every method: whether all processes end with the same weights; or why not."""

    def trunk(width):
        return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    special = {
        "kernel_rescaling": (with_bn, KernelRescaling(kernels=False, recalibrate=1)),
        "net2net": (with_bn, Net2Net(wider=1.5)),
        "ranked_cut": (lambda: with_bn(widths=(16, 16)), RankedCut(multiple=4, price="FLOPs")),
        "stochastic_pooling": (
            lambda: models.build("vgg", 4, (1, 8, 8), widths=((8,), (8,))),
            StochasticPooling(),
        ),
        "structure_and_strength": (with_bn, StructureAndStrength(structure="random", scope="auto")),
        "channel_sampling": (lambda: with_bn(widths=(16, 16)), ChannelSampling(minimal=4, block=4)),
        "treatment": (lambda: with_bn(widths=(16, 16)), Treatment(plan=("widen stage 1",))),
        "wavelet_auto_encoder": (lambda: WAE(1, 4, trunk(8), trunk(4), (8, 4)), WaveletAutoEncoder()),
    }
    found = {}
    for name, cls in all_methods().items():
        make, method = special.get(name) or (lambda: with_bn(widths=(16, 16)), cls())
        model = make()
        try:
            precision = "bf16" if name == "eight_bits" else "fp32"
            train(model, DATA, replace(RECIPE, epochs=2, precision=precision), [method])
            found[name] = alike(model)
        except (BadInput, NoEffect) as error:
            found[name] = str(error)
    return found


def alike(model):
    """Whether a model is the same in all processes, to the last bit."""
    everyone = distributed.ranks().gather(list(model.state_dict().values()))
    return all(torch.equal(a, b) for other in everyone for a, b in zip(everyone[0], other, strict=True))


def main(folder):
    """What `torchrun` calls. Twice, for at the end of the first time a process is killed."""
    folder, ranks, found = Path(folder), distributed.ranks(), {}
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    make, methods = KILLED
    if not again:
        for name, case in CASES.items():
            found[name] = outcome(*case)
        found["methods"] = every_method()
        found["classic"] = outcome(without_bn, (Classic(torch.tanh), Classic(lambda x: x / 2)))
        if ranks.rank == 0:
            torch.save(found, folder / "first.pt")
    found["resumed"] = outcome(make, (*methods, Die(str(folder))), checkpoint=folder / "run.pt")
    found["whole"] = outcome(make, (*methods, Die(str(folder))))
    found["refused"] = ranks.gather(refusals(ranks.rank, folder))
    if ranks.rank == 0:
        torch.save(found, folder / "second.pt")


# Against one process


def apart(m, x):
    """BatchNorm that normalises each of two shares of the batch by itself; running statistics are the mean of
    theirs.
    """
    if not m.training:
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)
    outs, moments = [], []
    for part in x.tensor_split(2):
        moments.append([m.running_mean.clone(), m.running_var.clone()])
        outs.append(F.batch_norm(part, *moments[-1], m.weight, m.bias, True, m.momentum, m.eps))
    for mine, theirs in zip((m.running_mean, m.running_var), zip(*moments, strict=True), strict=True):
        mine.copy_(torch.stack(theirs).mean(0))
    m.num_batches_tracked += 1
    return torch.cat(outs)


def torchrun(folder, *words, restarts=0):
    """Run `python *words` in two processes; one thread each."""
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes came to."""
    folder = tmp_path_factory.mktemp("torchrun")
    train(with_bn(), DATA, RECIPE, checkpoint=folder / "alone.pt")
    torchrun(folder, "-m", "tests.test_distributed", str(folder), restarts=1)
    assert (folder / "died").exists()
    return {
        **torch.load(folder / "first.pt", weights_only=False),
        **torch.load(folder / "second.pt", weights_only=False),
    }


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_equal_to_one(name, found, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", apart)
    one, two = outcome(*CASES[name]), found[name]
    assert one["steps"] == two["steps"] >= 20
    assert one["structure"] == two["structure"]
    assert list(one["model"]) == list(two["model"])
    for key, tensor in one["model"].items():
        assert (tensor - two["model"][key]).abs().max() < 1e-8, key
    assert one["flops"] == two["flops"]
    assert one["test"] == pytest.approx(two["test"])
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-7, nan_ok=True)
    start = CASES[name][0]()
    if name.startswith("plain"):
        assert (
            one["events"][-1] == two["events"][-1]
        )  # images and losses of every step; gradients were equal in all processes
        assert two["events"][-1]["images"] == 20 * 33
        assert two["events"][-1]["equal"]
        assert two["events"][0]["common"] == one["events"][0]["common"]
        assert two["events"][0]["alike"]
        assert two["events"][0]["own"]
    else:
        said = " ".join(e["text"] for e in two["events"])
        assert [e["text"] for e in one["events"]] == [e["text"] for e in two["events"]]
        assert models.describe(start) != two["structure"]
        grown = ("widen" in said) + ("deepen" in said)
        assert grown == 2 if "plan" in name else grown if name.startswith("grown") else "->" in said


def test_a_plain_class_with_functions_as_settings_trains_in_several_processes(found):
    one, two = outcome(without_bn, (Classic(torch.tanh), Classic(lambda x: x / 2))), found["classic"]
    for key, tensor in one["model"].items():
        assert (tensor - two["model"][key]).abs().max() < 1e-8, key


def test_a_killed_process_is_restarted_and_the_run_ends_as_if_nothing_had_been(found):
    resumed, whole = found["resumed"], found["whole"]
    assert list(resumed["model"]) == list(whole["model"]) != list(users().state_dict())
    assert all(torch.equal(t, whole["model"][k]) for k, t in resumed["model"].items())
    assert resumed["events"] == whole["events"]
    assert str(resumed["rows"]) == str(whole["rows"])
    drawn = next(e["drawn"] for e in whole["events"] if "drawn" in e)
    assert drawn[0] != drawn[1]


def test_every_method_trains_alike_in_all_processes(found):
    assert set(found["methods"]) == set(all_methods())
    assert {name: said for name, said in found["methods"].items() if said is not True} == {}


def test_what_cannot_work_is_refused_by_all_processes(found):
    words = {
        "skip": "gradient approximation: 'skip' needs one process",
        "other seeds": "process 1 does not train what process 0 does: other seed",
        "one image": "a batch of 1 cannot be shared among 2 processes",
        "sync_bn": "sync_bn needs CUDA",
        "unused": "every parameter must take part in every step: spare.weight does not",
        "no name": "[0].act is <object object>, which has no name that stays the same",
        "another run's": "alone.pt belongs to another run: other number of processes",
        "compare": "arms are measured in one process; over several only train() works",
    }
    first, second = found["refused"]
    assert first == second
    assert {k: words[k] in said for k, said in first.items()} == dict.fromkeys(words, True)


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [8, 33])
def test_shares_are_a_partition_and_weighed_means_are_the_mean(n, size):
    everyone, x = [Ranks(rank, size) for rank in range(size)], torch.rand(n, dtype=torch.float64)
    shares = [x[r.share(n)] for r in everyone]
    assert torch.equal(torch.cat(shares), x)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    batches = Batches(DATA, n, torch.Generator())
    means = [r.weigh(part.mean(), batches) for r, part in zip(everyone, shares, strict=True)]
    assert torch.stack(means).mean() == pytest.approx(x.mean().item(), rel=1e-12)


def test_shares_of_batches_are_those_of_one_process():
    def batches(ranks):
        found = Batches(DATA, 33, torch.Generator().manual_seed(0))
        found.ranks = ranks
        return list(found)

    whole, shares = batches(ALONE), [batches(Ranks(rank, 3)) for rank in range(3)]
    for i, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([part[i][0] for part in shares]), x)
        assert torch.equal(torch.cat([part[i][1] for part in shares]), y)
        assert [len(part[i][1]) for part in shares] == [11, 11, 11]


def test_one_process_gives_back_what_it_was_given():
    x, model = torch.rand(3), with_bn()
    assert distributed.ranks() is ALONE
    assert ALONE.wrap(model) is model
    assert (
        ALONE.agree(x) is ALONE.total(x) is ALONE.whole(x) is ALONE.mean(x, None) is ALONE.weigh(x, None) is x
    )
    assert ALONE.gather(x) == [x]
    assert ALONE.first(lambda: x) is x


def test_synchronised_norms_are_plain_again_afterwards():
    model = with_bn()
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    state = {k: set(vars(m)) for k, m in enumerate(layers)}
    distributed.sync_(model)
    assert {type(m) for m in layers} == {nn.SyncBatchNorm}
    assert torch.isfinite(model.eval()(torch.rand(2, 1, 8, 8))).all()
    distributed.sync_(model, on=False)
    assert {type(m) for m in layers} == {nn.BatchNorm2d}
    assert state == {k: set(vars(m)) for k, m in enumerate(layers)}


if __name__ == "__main__":
    main(sys.argv[1])
