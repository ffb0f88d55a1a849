"""`effilib train`: methods and settings from words, files, going on after every kind of end, several
processes; errors in one line.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from effilib import __main__ as command
from effilib import checkpoint, paths, tasks
from effilib.data import ARRAYS, synthetic
from effilib.hooks import Method
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.net2net import Net2Net
from effilib.methods.prune_then_grow import PruneThenGrow
from effilib.methods.prune_train import PruneTrain
from effilib.workbook import train_command
from tests.common import equal
from tests.test_distributed import torchrun

SMALL = ["--preset", "smoke", "--dataset", "synthetic", "--device", "cpu"]
NO_BN = ["--network", "vgg", "--set", "widths={'widths': ((8,), (8,)), 'bn': False}", "precision=fp64"]
PRUNE = ["--method", "prune_train", "scale=100.0", "weigh=size", "multiple=2"]

MINE = """
import enum, os, signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
import torch
from effilib import Method

@dataclass(frozen=True)
class Die(Method):
    how: str = "SIGTERM"
    step: int = 6
    once: str = ""

    def on_batch(self, run, x, y):
        if run.step == self.step and not Path(self.once).exists():
            Path(self.once).touch()
            if self.how == "memory":
                torch.empty(2**60, dtype=torch.uint8)
            os.kill(os.getpid(), getattr(signal, self.how))
        return x, y

class Plain(Method):
    pass

class Kind(enum.Enum):
    MEAN = 1
    MAX = 2

@dataclass(frozen=True)
class Choosy(Method):
    kind: Kind = Kind.MEAN
    norm: Literal["l1", "l2", 3] = "l1"
    limit: Literal["none"] | float = "none"
"""


def train(out, *words):
    """The exit code of `effilib train`."""
    return command.main(["train", *SMALL, *map(str, words), *(["--out", str(out)] if out else [])])


def model(folder):
    return checkpoint.load_model(folder / "model.pt")


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


# What is written and said


def test_a_training_writes_its_files_and_is_not_run_twice(tmp_path, capsys):
    assert train(tmp_path / "a", *PRUNE, "--epochs", "3", "--seed", "4") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("synthetic, 128 images of 8 x 8, resnet; PruneTrain(ratio=0.2, ")
    assert said[0].endswith(f"3 epochs, batches of 32; into {tmp_path / 'a'}")
    assert [line.split(":")[0] for line in said[1:4]] == [f"epoch {e} of 3" for e in (1, 2, 3)]
    assert re.search(
        r": training loss [\d.]+, validation loss [\d.]+, [\d.]+ %; about [\d.]+ s left$", said[2]
    )
    assert said[3].endswith(" %")
    ending = r"127 held-out images \([\d.]+ % of those for testing\), 12 steps in [\d.]+ s, [\d,]+ parameters"
    assert re.fullmatch(rf"[\d.]+ ± [\d.]+ % of {ending}", said[4])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["history.csv", "model.pt", "record.json"]
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["status"] == "complete"
    assert record["run"]["methods"][0]["scale"] == 100
    assert record["run"]["seed"] == 4
    assert record["run"]["task"]["recipe"]["epochs"] == 3
    rows = pd.read_csv(tmp_path / "a" / "history.csv")
    assert list(rows["epoch"]) == [1, 2, 3]
    held, of_test = record["held_out"], 76  # validation and test images together
    validation = (record["accuracy"] * held - record["test_accuracy"] * of_test) / (held - of_test)
    assert rows["accuracy"].iloc[-1] == pytest.approx(validation, rel=1e-4)
    assert record["structure"]["blocks"] == model(tmp_path / "a").settings()["blocks"] != [[8], [8], [8]]
    before = (tmp_path / "a" / "model.pt").stat().st_mtime_ns
    assert train(tmp_path / "a", *PRUNE, "--epochs", "3", "--seed", "4") == 0
    assert "it was complete" in capsys.readouterr().out
    assert (tmp_path / "a" / "model.pt").stat().st_mtime_ns == before
    assert train(tmp_path / "a", *PRUNE, "--epochs", "3", "--seed", "5") == 2
    assert (
        capsys.readouterr().err
        == f"effilib: {tmp_path / 'a'} holds another run: name another folder with --out, or delete it\n"
    )


@pytest.mark.parametrize("name", ["model.pt", "history.csv"])
def test_a_run_whose_files_are_gone_is_not_complete(name, tmp_path, capsys):
    assert train(tmp_path, "--epochs", "1") == 0
    (tmp_path / name).unlink()
    assert train(tmp_path, "--epochs", "1") == 0
    assert "it was complete" not in capsys.readouterr().out
    assert (tmp_path / name).exists()


def test_a_run_is_known_by_its_images_wherever_they_lie(tmp_path, monkeypatch, capsys):
    split = synthetic().train
    arrays = (split.x.numpy(), split.y.numpy()) * 2
    np.savez(tmp_path / "data.npz", **dict(zip(ARRAYS, arrays, strict=True)))
    (tmp_path / "below").mkdir()
    words = ["train", "--preset", "smoke", "--epochs", "1", "--out", str(tmp_path / "out"), "--dataset"]
    for place, name in ((".", "data.npz"), ("below", "../data.npz"), (".", str(tmp_path / "data.npz"))):
        monkeypatch.chdir(tmp_path / place)
        assert command.main([*words, name]) == 0
    assert capsys.readouterr().out.count("it was complete") == 2


def test_without_out_the_folder_is_named_after_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    assert train(None, "--method", "other_norm", "kind=group", "--epochs", "0.5") == 0
    (folder,) = (tmp_path / "play").iterdir()
    assert folder.name == "train-smoke-synthetic-resnet-other_norm-kind=group-epochs=0.5-seed=0"
    assert (folder / "record.json").exists()
    assert "model.pt holds weights that no network by name takes" in capsys.readouterr().err
    assert len(train_command.file_name(*["long"] * 100)) < 150


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "memory"])
def test_an_interrupted_training_goes_on_by_itself(how, mine, tmp_path, capsys):
    words = [*PRUNE, "--epochs", "3", "--method", f"{mine}:Die", f"how={how}", f"once={tmp_path / 'once'}"]
    ended = train(tmp_path / "a", *words)
    said = capsys.readouterr()
    if how == "memory":
        assert ended == 2
        assert re.fullmatch(
            r"effilib: out of memory \(.*\); a smaller batch needs less: --set batch_size=...\n", said.err
        )
    else:
        assert ended == 130
        file = tmp_path / "a" / "checkpoint.pt"
        assert f"interrupted; the same command goes on from the last whole epoch ({file})" in said.out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["checkpoint.pt", "record.json"]
    assert json.loads((tmp_path / "a" / "record.json").read_text())["status"] == "running"
    assert train(tmp_path / "a", *words) == 0
    said = capsys.readouterr().out
    assert f"goes on from {tmp_path / 'a' / 'checkpoint.pt'}" in said
    assert "epoch 2 of 3" in said
    assert "epoch 0 of 3" not in said
    assert train(tmp_path / "b", *words, "--checkpoint", tmp_path / "c.pt") == 0  # it has died once
    assert equal(model(tmp_path / "a"), model(tmp_path / "b"))
    assert (tmp_path / "c.pt").exists()
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def test_rare_classes_and_few_images_are_said(tmp_path, capsys):
    rng, y = np.random.default_rng(0), np.arange(80) % 20 == 0  # 19 of 20 are of one class
    x = rng.integers(0, 256, (80, 8, 8), dtype=np.uint8)
    arrays = (x[:60], y[:60].astype(int), x[60:], y[60:].astype(int))
    np.savez(tmp_path / "rare.npz", **dict(zip(ARRAYS, arrays, strict=True)))
    words = ["--preset", "smoke", "--dataset", str(tmp_path / "rare.npz"), "--device", "cpu"]
    words += [
        "--epochs",
        "0.5",
        "--set",
        "batch_size=8",
        "lr=1e-6",
        "--size",
        "10",
        "--out",
        str(tmp_path / "out"),
    ]
    assert command.main(["train", *words]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["held_out"] == 26
    assert record["classes"] == ["0", "1"]
    assert record["shape"] == [1, 10, 10]
    assert record["run"]["task"]["size"] == 10
    said = capsys.readouterr().out
    assert "rare, 51 images of 10 x 10, resnet" in said
    assert f"The largest class has {record['majority']:.0f} % of the images" in said
    assert "Accuracy by class is" in said
    assert "One of 26 held-out images is 3.8 points" in said
    assert ("no better than always naming the largest class" in said) == (
        record["accuracy"] <= record["majority"]
    )
    assert record["notes"][0] == "images of 8 x 8 pixels resized to 10 x 10"
    assert all(sentence in said for sentence in record["notes"][1:])
    assert len(record["notes"]) > 2
    assert command.main(["train", *words[:-1], str(tmp_path / "b"), "--size", "0"]) == 2
    assert "size is 0, it must be" in capsys.readouterr().err
    balanced = train_command.History(steps=100, final=90.0, held_out=500, majority=25.0, classes=4)
    assert not train_command.cautions(balanced)


# What a run is recognised by

OWN = {
    "mine.py": """
        import os, signal
        from dataclasses import dataclass
        from torch import nn
        from effilib import Method
        from neighbour import amount

        class Mine(Method):
            def on_epoch_end(self, run):
                run.log(self, amount())
                if "DIE" in os.environ and run.epoch == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        def net(classes, channels=1):
            return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(144, classes))
    """,
    "neighbour.py": """
        def amount():
            return "a"
    """,
}


@pytest.fixture
def own(tmp_path):
    """A user's files, and `go(**environment)`: the command in a fresh process, from another folder."""
    for name, text in OWN.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    content = dict(zip(ARRAYS, (images[:50], np.arange(50) % 2, images[50:], np.arange(10) % 2), strict=True))
    np.savez(tmp_path / "data.npz", **content)

    def go(**environment):
        words = ["--method", f"{tmp_path}/mine.py:Mine", "--network", f"{tmp_path}/mine.py:net"]
        words += ["--dataset", f"{tmp_path}/data.npz", "--preset", "smoke", "--epochs", "3"]
        words += ["--set", "batch_size=10", "--out", str(tmp_path / "out")]
        modules = os.pathsep.join([str(paths.root()), str(tmp_path)])
        done = subprocess.run(
            [sys.executable, "-m", "effilib", "train", *words],
            env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", **environment},
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def replace(name, old, new):
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))

    go.content, go.replace = content, replace
    return go


def test_a_complete_run_of_edited_code_or_other_data_is_not_said_to_be_complete(own, tmp_path):
    assert own()[0] == 0
    record = tmp_path / "out" / "record.json"
    first = record.read_bytes()
    sentence = "effilib: {} holds a run from before {} was changed: undo that, name another folder with --out"
    code = sentence.format(tmp_path / "out", "the code of a method, the network or effilib")
    for file, old, new in (
        ("neighbour.py", '"a"', '"b"'),  # what the method imports
        ("mine.py", "amount())", "amount() * 2)"),  # the method
        ("mine.py", "channels, 4, 3)", "channels, 4, 3, bias=False)"),  # the network
    ):
        own.replace(file, old, new)
        ended, out, err = own()
        assert (ended, out) == (2, "")
        assert err.startswith(code)
        own.replace(file, new, old)
    own.replace("mine.py", "import os", "# a comment\nimport os")
    np.savez(tmp_path / "data.npz", **own.content)  # written anew, as it was
    ended, out, _ = own()
    assert ended == 0
    assert "it was complete" in out
    own.content["train_images"][0] += 1
    np.savez(tmp_path / "data.npz", **own.content)
    assert own()[2].startswith(sentence.format(tmp_path / "out", "the data set"))
    assert record.read_bytes() == first


def test_an_interrupted_run_does_not_go_on_with_edited_code(own, tmp_path):
    assert own(DIE="")[0] == 130
    own.replace("neighbour.py", '"a"', '"b"')
    ended, out, err = own()
    assert (ended, out) == (2, "")
    assert err.startswith(f"effilib: {tmp_path / 'out'} holds an interrupted run from before the code of ")
    own.replace("neighbour.py", '"b"', '"a"')
    ended, out, _ = own()
    assert ended == 0
    assert "goes on from" in out
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [e["text"] for e in record["events"]] == ["a"] * 3


def test_files_that_are_called_alike_have_folders_of_their_own(tmp_path):
    t = tasks.task("smoke", "synthetic")
    names = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        own = replace(t, dataset=str(tmp_path / place))
        words = [f"{tmp_path / place / 'mine.py'}:Mine"]
        names |= {
            train_command.default_folder(own, [], [], 0, 1).name,
            train_command.default_folder(t, words, [], 0, 1).name,
            train_command.default_folder(replace(t, network=words[0]), [], [], 0, 1).name,
        }
    assert len(names) == 6


def test_two_processes_write_what_one_does(tmp_path, capsys):
    words = [*NO_BN, *PRUNE, "--epochs", "5"]
    assert train(tmp_path / "one", *words) == 0
    said = torchrun(tmp_path, "-m", "effilib", "train", *SMALL, *words, "--out", str(tmp_path / "two")).stdout
    assert said.count("epoch 5 of 5") == 1  # one speaks
    assert "batches of 32, shared by 2 processes" in said
    one, two = (model(tmp_path / name) for name in ("one", "two"))
    assert one.settings() == two.settings() != {"widths": [[8], [8]], "bn": False}
    assert all(
        (a - b).abs().max() < 1e-8
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    assert json.loads((tmp_path / "two" / "record.json").read_text())["run"]["processes"] == 2
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["history.csv", "model.pt", "record.json"]


# Words


def test_methods_are_found_by_name_and_settings_are_literals(mine):
    assert train_command.method("prune_train") == PruneTrain()
    assert train_command.method(
        "prune_train", "ratio=0.3", "every=2", "multiple=auto", "grow_batch=True"
    ) == PruneTrain(ratio=0.3, every=2, grow_batch=True)
    assert train_command.method("net2net", "wider=[['stem', 8]]", "at=0") == Net2Net(
        wider=(("stem", 8),), at=0
    )
    assert train_command.method("kernel_rescaling", "schedule=((0.5, 0.5), (0.5, 1.0))") == KernelRescaling(
        schedule=((0.5, 0.5), (0.5, 1.0))
    )
    assert train_command.method("prune_then_grow", "prune.every=3", "plan=None").prune.every == 3
    assert (
        train_command.method("prune_then_grow", "prune.every=3").prune.weigh
        == PruneThenGrow().prune.weigh
        == "norm"
    )
    own = train_command.method(f"{mine}:Die", "step=3", "once=3")  # a word, not a number
    assert (own.step, own.once) == (3, "3")
    choosy = train_command.method(f"{mine}:Choosy", "kind=MAX", "norm=3", "limit=0.5")
    assert (choosy.kind.value, choosy.norm, choosy.limit) == (2, 3, 0.5)
    assert isinstance(train_command.method(f"{mine}:Plain"), Method)
    assert set(train_command.methods()) >= {
        "prune_train",
        "net2net",
        "gradient_subsets",
        "wavelet_stem",
        "other_norm",
    }
    assert "policy" not in train_command.methods()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "prune_trian"],
            "unknown method 'prune_trian': choose one of .* (did you mean 'prune_train'?)",
        ),
        (["--method", "wavelet"], "wavelet is no method: choose wavelet_auto_encoder or wavelet_stem"),
        (
            ["--method", "layer_replacement"],
            "layer_replacement is no method: it is more than one training, see its notebook",
        ),
        (
            ["--method", "prune_train", "ratoi=1"],
            "unknown setting of prune_train 'ratoi': choose one of .* (did you mean 'ratio'?)",
        ),
        (["--method", "prune_train", "ratio"], "prune_train: 'ratio' is no setting, expected name=value"),
        (
            ["--method", "prune_train", "ratio=much"],
            "setting 'ratio' of prune_train takes values of type float, not 'much'",
        ),
        (
            ["--method", "prune_train", "grow_batch=1"],
            "setting 'grow_batch' of prune_train takes values of type bool, not '1'",
        ),
        (["--method", "prune_train", "mode=x"], "unknown mode 'x': choose one of proximal, published"),
        (
            ["--method", "prune_train", "ratio.x=1"],
            "setting 'ratio' of prune_train has no settings of its own",
        ),
        (["--method", "prune_then_grow", "prune.x=1"], "unknown setting of prune_then_grow's prune 'x'"),
        (["--method", "MINE:Nothing"], "unknown method in"),
        (["--method", "MINE:Path"], "MINE:Path is no effilib.Method"),
        (
            ["--method", "MINE:Plain", "x=1"],
            "unknown setting of MINE:Plain 'x': choose one of none, it has no settings",
        ),
        (["--method", "gradient_pruning", "p=0.0"], "gradient pruning: p = 0 prunes nothing"),
        (
            ["--method", "MINE:Choosy", "kind=MIN"],
            "unknown kind of MINE:Choosy 'MIN': choose one of MEAN,",
        ),
        (["--method", "MINE:Choosy", "norm=l3"], "unknown norm of MINE:Choosy 'l3': choose one of l1, l2, 3"),
        (
            ["--method", "MINE:Choosy", "limit=all"],
            "setting 'limit' of MINE:Choosy takes values of type 'none' or",
        ),
        (["--set", "learning=1"], "unknown setting 'learning': choose one of"),
        (["--set", "lr=fast"], "setting 'lr' of the recipe takes values of type float, not 'fast'"),
        (["--set", "batch_size=10000"], "batch size 10000 does not fit synthetic"),
        (["--set", "sync_bn=True"], "sync_bn needs CUDA"),
        (["--epochs", "0"], "recipe: epochs is 0.0, it must be above 0"),
        (["--dataset", "mnist6k"], "unknown data set 'mnist6k'"),
        (["--network", "resent"], "unknown network 'resent'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_bad_input_is_one_line(words, message, mine, tmp_path, capsys):
    assert train(tmp_path / "out", *[w.replace("MINE", str(mine)) for w in words]) == 2
    said = capsys.readouterr().err
    assert re.match("effilib: " + re.escape(message.replace("MINE", str(mine))).replace(r"\.\*", ".*"), said)
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "record.json").exists()


def test_a_checkpoint_that_is_none_and_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("hello")
    assert train(tmp_path / "a", "--checkpoint", tmp_path / "file") == 2
    assert re.match(r"effilib: .*file is not a readable checkpoint \(.*\)\n$", capsys.readouterr().err)
    assert train(tmp_path / "file" / "b") == 2
    assert capsys.readouterr().err.startswith(f"effilib: cannot write results into {tmp_path / 'file' / 'b'}")


def test_the_other_commands_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(["list"]) == 2
    assert (
        capsys.readouterr().err
        == "effilib: process 1: list is one process: of the commands torchrun starts train alone\n"
    )
