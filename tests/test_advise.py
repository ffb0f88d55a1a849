"""`effilib advise`: real processes, killed and resumed, on a folder of pictures with a user's network."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image

from effilib import __main__ as command
from effilib import data, figures, models, paths, search, tasks, tuning
from effilib.experiment import Arm
from effilib.methods.data_pruning import DataPruning
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.prune_then_grow import PruneThenGrow
from effilib.results import compare
from effilib.workbook import advise, recipes
from effilib.workbook.advise import make_plan

pytestmark = pytest.mark.slow

LENET = """
from torch import nn

def lenet(classes, channels=3):
    features = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, classes))
"""
METHODS = ["--methods", "resizing", "data pruning", "stochastic pooling", "Net2Net"]


def pictures(folder, train=110, test=40, classes=3):
    g = np.random.default_rng(0)
    patterns = g.integers(0, 200, (classes, 12, 12))
    for split, n in (("train", train), ("test", test)):
        for c in range(classes):
            (folder / split / f"class {c}").mkdir(parents=True)
            for i in range(n):
                x = 0.25 * patterns[c] + g.integers(0, 180, (12, 12))
                Image.fromarray(x.clip(0, 255).astype("uint8")).save(
                    folder / split / f"class {c}" / f"{i}.png"
                )
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, a network and a recipe of a user's."""
    folder = tmp_path_factory.mktemp("users")
    pictures(folder / "photos")
    (folder / "mine.py").write_text(LENET)
    task = tasks.task("quick", str(folder / "photos"), f"{folder / 'mine.py'}:lenet", device="cpu", size=12)
    recipes.write(folder / "mine.toml", task.but(epochs=4, batch_size=8, lr=0.05), [])
    return folder


def start(place, out, *words):
    own = {"EFFILIB_RESULTS": str(place / "results"), "PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "effilib", "advise", "photos", "--size", "12", "--device", "cpu"]
    call += ["--out", str(out), *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(call, cwd=place, env={**os.environ, **own}, **pipes)


def until(process, found, seconds=120):
    """Read what a process says until a line has `found`."""
    begun, said = time.monotonic(), []
    for line in process.stdout:
        said.append(line)
        if found in line:
            return "".join(said)
        assert time.monotonic() - begun < seconds
    raise AssertionError("".join(said))


def settings(file):
    with file.open(newline="") as f:
        return [(r["epochs"], r["setting"], r["seed"]) for r in csv.DictReader(f)]


def test_killed_in_its_tuning_it_goes_on_where_it_was(place, tmp_path):
    words = ["--network", "mine.py:lenet", "--minutes", "9", *METHODS]
    process = start(place, tmp_path / "a", *words)
    said = until(process, " 3/12  baseline")
    process.kill()
    process.wait()
    assert "plan: tuning" in said
    assert "left] " in said  # an estimate
    before = settings(tmp_path / "a" / "tuning.csv")
    plan = json.loads((tmp_path / "a" / "state.json").read_text())["plan"]
    process = start(place, tmp_path / "a", *words)
    said = until(process, f"{5 - len(before) + 1}/{12 - len(before)}  baseline")
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "goes on from here" in said
    assert "asking" not in said  # who can take part was asked before
    after = settings(tmp_path / "a" / "tuning.csv")
    assert len(set(after)) == len(after) > len(before)
    assert set(before) <= set(after)
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    assert state["plan"] == plan
    assert state["spent"] > state["asked"]
    other = start(place, tmp_path / "a", *words[:2], "--minutes", "8")
    assert "holds other advice" in other.communicate(timeout=60)[0]
    assert other.returncode == 2


def test_with_a_recipe_of_ones_own_it_ends_in_a_page_a_recipe_and_a_snippet(
    place, tmp_path, capsys, monkeypatch
):
    words = ["--recipe", "mine.toml", "--minutes", "9", "--methods", "resizing", "data pruning", "Net2Net"]
    process = start(place, tmp_path / "a", *words)
    until(process, "advice: 3 of")
    process.kill()
    process.communicate()
    assert not (tmp_path / "a" / "advice.json").exists()
    process = start(place, tmp_path / "a", *words)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "tuning" not in said
    assert "left out: resizing (kernel rescaling: network" in said
    assert "left out: Net2Net (it is more than one training" in said
    advice = json.loads((tmp_path / "a" / "advice.json").read_text())
    assert advice["answer"] in said
    assert {v["arm"] for v in advice["verdicts"]} == {"data pruning"}
    page = (tmp_path / "a" / "advice.html").read_text()
    for part in ("<img", "recipe.toml", "snippet.py", "What was left out, and why", "speed-up", "Net2Net"):
        assert part in page
    recipe = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    assert recipe["recipe"]["lr"] == 0.05
    assert recipe["task"]["dataset"] == str(place / "photos")
    capsys.readouterr()
    monkeypatch.chdir(place)
    call = ["advise", "photos", "--size", "12", "--device", "cpu", "--out", str(tmp_path / "a"), *words]
    assert command.main(call) == 0
    assert "it was complete" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "trained"), "--device", "cpu", "--epochs", "1"]
    assert command.main(["train", "--recipe", str(tmp_path / "a" / "recipe.toml"), *out]) == 0


def say(capsys, *words):
    code = command.main(["advise", *map(str, words), "--device", "cpu"])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_what_cannot_be_advised_on_is_said_in_a_sentence_with_what_there_is(tmp_path, capsys):
    few = pictures(tmp_path / "few", train=30, test=10)
    code, said, _ = say(capsys, few, "--out", tmp_path / "a")
    assert code == 0
    assert "training images are too few to compare methods, 200 or more are needed" in said
    assert recipes.read(tmp_path / "a" / "recipe.toml")[0].dataset == str(few)
    one = pictures(tmp_path / "one", train=30, test=10, classes=1)
    code, _, error = say(capsys, one, "--out", tmp_path / "b")
    assert code == 2
    assert error.count("\n") == 1
    code, said, _ = say(
        capsys, "mnist5k", "--minutes", "0.05", "--out", tmp_path / "c", "--methods", "resizing"
    )
    assert code == 0
    assert "0.05 minutes are too few" in said
    assert "would do" in said
    assert recipes.read(tmp_path / "c" / "recipe.toml")[0].dataset == "mnist5k"
    task, _ = recipes.read(tmp_path / "c" / "recipe.toml")
    mine = recipes.write(tmp_path / "mine.toml", task.but(epochs=0.1), [])
    words = ["mnist5k", "--recipe", mine, "--out", tmp_path / "d", "--methods", "resizing"]
    assert "a quarter of the 0.1 epochs of your recipe is too short" in say(capsys, *words)[1]
    words = ["mnist5k", "--minutes", "3", "--out", tmp_path / "f", "--methods", "Tree-CNN"]
    code, said, _ = say(capsys, *words)
    assert code == 0
    assert "no method applies here" in said
    assert "left out: Tree-CNN (it is more than one training" in said
    for words, wrong in (
        (["mnist5k", "--minutes", "0"], "minutes is 0"),
        (["mnist5k", "--methods", "resize"], "did you mean 'resizing'"),
        (["mnist5k", "--recipe", tmp_path / "c" / "recipe.toml", "--network", "vgg"], "--network"),
        (["nowhere"], "nowhere"),
    ):
        code, _, error = say(capsys, *words, "--out", tmp_path / "e")
        assert (code, wrong in error, error.count("\n")) == (2, True, 1), error


def test_a_network_that_surgery_cannot_follow_leaves_out_what_needs_it(tmp_path):
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, classes)\n"
        "    def forward(self, x):\n"
        "        x = self.conv(x)\n"
        "        if x.sum() > 1e9:\n"
        "            x = -x\n"
        "        return self.fc(x.sort(1).values.mean((2, 3)))\n"
    )
    task = tasks.task("quick", "synthetic", f"{tmp_path / 'odd.py'}:Odd", device="cpu")
    state, said = {"spent": 0.0}, []
    say = advise._Say(0.0)
    own = advise._Advice(task, False, task.load(), 6000, ("PruneTrain", "data pruning"), tmp_path, state, say)
    assert [c.name for c in own.who()] == ["data pruning"]
    assert state["left_out"]["PruneTrain"]
    assert not said


@pytest.mark.parametrize("tune", [True, False])
def test_a_plan_fits_into_its_time_and_has_enough_steps(tune):
    found = 0
    for seconds in (30, 120, 480, 3600):
        for step in (0.002, 0.02, 0.2):
            how = dict(step=step, extra=0.3, steps=50, contenders=12, most=30, tune=tune)
            plan = make_plan(seconds, **how)
            if plan is None:
                assert seconds < 60 * 60 * step * 20
                continue
            found += 1
            assert plan.seconds <= seconds
            assert plan.tuning <= seconds / 3
            assert (plan.tuning == 0) == (not tune)
            assert plan.epochs * 50 * 0.25 >= 29
            more = make_plan(2 * seconds, **how)
            assert more.epochs >= plan.epochs or more.contenders > plan.contenders
    assert found > 4


def test_a_recipe_that_trains_on_all_images_is_compared_without(tmp_path):
    file = recipes.write(tmp_path / "whole.toml", tasks.task("quick", "synthetic").but(whole=True), [])
    assert not advise._task("synthetic", "", None, str(file), "cpu")[0].whole


def test_the_page_draws_what_is_advised_or_else_all_arms(tmp_path, monkeypatch):
    task, drawn = tasks.task("smoke", "synthetic", device="cpu", epochs=1), []
    arms = [search.BASELINE, *(Arm(name=n, changes={"lr": 0.1 + i / 10}) for i, n in enumerate("ab"))]
    comparison = compare(task, arms, title="advice")
    own = figures.curves
    monkeypatch.setattr(figures, "curves", lambda c, arm: drawn.append(arm) or own(c, arm))
    for name in ("recipe.toml", "snippet.py"):
        (tmp_path / name).write_text("")
    for use in ("b", "baseline"):
        advise._page(tmp_path, task.load(), task, search.Found(), comparison, use, {}, "")
    assert drawn == ["b", None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_snippet_has_network_precision_and_layout_as_they_were_measured(precision):
    task = tasks.task("quick", "synthetic", device="cpu", precision=precision, epochs=1)
    task = advise._as_task(task, Arm(name="smaller", network={"blocks": (1, 1, 1)}))
    loaded, names = task.load(), {}
    exec(advise.snippet(task, loaded, []), names)
    assert models.describe(names["net"]) == models.describe(task.build(loaded))
    x, y = loaded.normalize(loaded.train.x[:64]).contiguous(), loaded.train.y[:64]
    seen = set()
    names["net"].head.register_forward_hook(lambda m, inputs, output: seen.add(output.dtype))
    trained = names["train"](names["net"], [(x, y)])
    convs = [m.weight for m in trained.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convs)
    assert ({torch.bfloat16} <= seen) == (precision == "bf16")


@pytest.mark.parametrize("method", [DataPruning(), KernelRescaling(kernels=False), PruneThenGrow()])
def test_the_snippet_trains_a_network_of_ones_own(method):
    task = tasks.task("quick", "synthetic", epochs=4, label_smoothing=0.1)
    code = advise.snippet(task, task.load(), [method])
    names = {}
    exec(code, names)
    assert names["methods"] == [method]
    assert names["recipe"].label_smoothing == 0.1
    digits = data.load("synthetic")
    x, y = digits.normalize(digits.train.x), digits.train.y
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 60, shuffle=True)
    net = task.build(digits)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    more = [(x[:20], y[:20])] if isinstance(method, PruneThenGrow) else []
    trained = names["train"](net, loader, *more)
    assert any(not torch.equal(v, before.get(k, v[:0])) for k, v in trained.state_dict().items())


def test_a_sweep_goes_into_a_file_of_its_own_in_this_process(tmp_path):
    short = tasks.task("smoke", "synthetic", device="cpu", epochs=0.5, lengths=(1.0,))
    how = dict(seeds=(1000,), report=lambda line: None)
    rows = tuning.sweep(short, tuning.BASELINE, [{"lr": 0.1}], workers=1, file=tmp_path / "own.csv", **how)
    others = tuning.sweep(short, tuning.BASELINE, [{"lr": 0.1}], workers=2, file=tmp_path / "b.csv", **how)
    assert rows == others  # as in processes of its own
    assert len(settings(tmp_path / "own.csv")) == 1
