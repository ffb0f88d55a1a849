"""`effilib predict`: from a folder of a user's pictures through training to the classes of new ones."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effilib import __main__ as command
from effilib import checkpoint, data, models
from effilib.data import synthetic
from effilib.errors import BadInput
from effilib.workbook import predict

CLASSES = ("$dark$", "bright ü")


def draw(path, name, seed, size=(40, 30)):
    """A dark or a bright noisy picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    low = 0 if name == CLASSES[0] else 180
    Image.fromarray(rng.integers(low, low + 75, (*size[::-1], 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was trained on a folder of a user's pictures, by the command line."""
    root, monkeypatch = tmp_path_factory.mktemp("predict"), pytest.MonkeyPatch()
    for part, n in (("train", 30), ("test", 10)):
        for name in CLASSES:
            for i in range(n):
                draw(root / "photos" / part / name / f"{i}.png", name, 100 * n + i)
    words = ["--dataset", "photos", "--size", "12", "--preset", "smoke", "--device", "cpu", "--out", "out"]
    with monkeypatch.context() as m:
        m.chdir(root)
        m.setenv("EFFILIB_DATA", str(root / "data"))
        assert command.main(["train", *words, "--epochs", "6", "--set", "batch_size=16"]) == 0
    return root / "out" / "model.pt"


def rows(folder):
    return list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))


def test_a_trained_network_tells_the_classes_of_new_pictures(trained, tmp_path, capsys):
    new = tmp_path / "new"
    for i in range(70):  # more than are looked at together
        draw(new / ("deep" if i % 3 else ".") / f"{i}.jpg", CLASSES[i % 2], i, size=(30 + i, 100))
    (new / "notes.txt").write_text("hello")
    (new / "._0.jpg").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command.main(["predict", str(trained), str(new), "--out", str(tmp_path / "told")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2] in ("70 pictures: 35 $dark$, 35 bright ü", "70 pictures: 35 bright ü, 35 $dark$")
    assert said[-1] == f"{tmp_path / 'told'}: predictions.csv, predictions.png"
    found = rows(tmp_path / "told")
    assert len(found) == 70
    for row in found:
        assert row["class"] == CLASSES[int(Path(row["file"]).stem) % 2]
        assert row["second class"] == CLASSES[1 - CLASSES.index(row["class"])]
        p, q = float(row["probability"]), float(row["second probability"])
        assert p >= q
        assert p + q == pytest.approx(1, abs=1e-3)
    assert Image.open(tmp_path / "told" / "predictions.png").size[0] > 500
    assert sorted(p.name for p in (tmp_path / "told").iterdir()) == ["predictions.csv", "predictions.png"]


def test_what_is_told_is_what_evaluation_tells(trained, tmp_path, monkeypatch):
    photos = trained.parents[1] / "photos"
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path / "data"))
    d = data.load(str(photos), size=12)
    net, known = checkpoint.load_model(trained), checkpoint.load_images(trained)
    assert (known["names"], known["mean"], known["std"], known["shape"]) == (d.names, d.mean, d.std, d.shape)
    files = predict.find([str(photos / "test")])
    told = [row[2] for row in predict.predict(net, known, files, [])]
    with torch.no_grad():
        expected = net.eval()(d.normalize(d.test.x)).softmax(1)
    got = torch.tensor([[dict(classes)[name] for name in d.names] for classes in told])
    assert torch.allclose(got, expected, atol=1e-4)


def test_pictures_that_cannot_be_read_are_named_and_the_others_go_on(trained, tmp_path, capsys):
    draw(tmp_path / "a.png", CLASSES[0], 0)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "c.txt").write_text("hello")  # it was named, so that it is meant
    words = [str(tmp_path / n) for n in ("b.png", "a.png", "c.txt", "a.png")]
    assert command.main(["predict", str(trained), *words, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    bad = f"effilib: 2 of 3 cannot be read: {words[0]} (cannot be decoded: image file is truncated"
    assert said.err.startswith(bad)
    assert said.err.endswith(f"), {tmp_path / 'c.txt'} (no picture that Pillow reads)\n")
    assert "1 picture: 1 $dark$" in said.out
    assert [row["file"] for row in rows(tmp_path)] == [words[1]]


@pytest.mark.parametrize(
    ("model", "pictures", "sentence"),
    [
        ("MODEL", ["nowhere.png"], "nowhere.png: there is no such picture or folder"),
        ("MODEL", ["empty"], "empty: there are no pictures in this folder"),
        ("MODEL", ["bad.png"], "there is no picture that could be read"),
        ("bad.png", ["empty"], "bad.png is not a readable checkpoint"),
        ("old.pt", ["empty"], "old.pt is of an older effilib and knows neither its classes nor how"),
        ("users.pt", ["empty"], "users.pt holds a network that tests.common:Users makes, which would be"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    model, pictures, sentence, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad.png").write_bytes(b"x")
    old = torch.load(trained, weights_only=True)
    del old["images"]
    torch.save(old, "old.pt")
    checkpoint.load_model("old.pt")  # which is still loaded
    small = synthetic(channels=3)
    users = models.build("tests.common:Users", 4, small.shape)
    checkpoint.save_model("users.pt", users, "tests.common:Users", small)
    before = sorted(tmp_path.rglob("*"))
    model = str(trained) if model == "MODEL" else model
    assert command.main(["predict", model, *pictures, "--out", "told"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"effilib: {sentence}")
    assert [p for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [p for p in before if p.is_file()]


@pytest.mark.filterwarnings("ignore:the network calls view")
def test_a_users_own_network_is_named_and_needs_no_layout(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, classes)\n"
        "    def forward(self, x):\n"
        "        x = self.conv(x)\n"
        "        return self.fc(x.view(x.size(0), -1))\n"
    )
    name, d = f"{tmp_path / 'mine.py'}:Net", synthetic(channels=3)
    checkpoint.save_model(
        tmp_path / "net.pt", models.build(name, 4, d.shape), name, d, layout="channels_last"
    )
    draw(tmp_path / "a.png", CLASSES[0], 0)
    words = ["predict", str(tmp_path / "net.pt"), str(tmp_path / "a.png")]
    assert command.main([*words, "--network", name]) == 0
    assert rows(tmp_path)[0]["class"] in "0123"  # beside the model, where nothing else is said
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.main(["predict", "~/net.pt", *words[2:], "--network", name, "--out=~/told"]) == 0
    assert len(rows(tmp_path / "told")) == 1


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("names", ["a"]), ("names", 3), ("mean", [0.5, 0.5]), ("mean", ["a"]), ("std", [0.0]), ("std", None),
        ("shape", [1, 8]), ("shape", [1, 8, 10**9]), ("shape", ["a", 8, 8]),
    ],
)  # fmt: skip
def test_a_file_that_says_something_impossible_of_its_images_is_bad_input(part, content, tmp_path):
    d = synthetic()
    checkpoint.save_model(tmp_path / "net.pt", models.build("convnet", 4, d.shape), "convnet", d)
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    saved["architecture" if part == "shape" else "images"][part] = content
    torch.save(saved, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"net\.pt is not a checkpoint of a network"):
        checkpoint.load_images(tmp_path / "net.pt")


def test_a_disk_that_is_full_is_one_sentence_and_leaves_no_half_file(trained, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    draw(tmp_path / "a.png", CLASSES[0], 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # enough for the table
    try:
        ended = command.main(
            ["predict", str(trained), str(tmp_path / "a.png"), "--out", str(tmp_path / "told")]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended == 2
    assert (
        capsys.readouterr().err
        == f"effilib: cannot write {tmp_path / 'told/predictions.png'}: File too large\n"
    )
    assert [p.name for p in (tmp_path / "told").iterdir()] == ["predictions.csv"]
    assert len(rows(tmp_path / "told")) == 1


def test_names_that_are_no_text_come_through(trained, tmp_path):
    draw(tmp_path / "a.png", CLASSES[1], 0)
    (tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    assert command.main(["predict", str(trained), str(tmp_path), "--out", str(tmp_path / "told")]) == 0
    assert b"\xff.png," in (tmp_path / "told" / "predictions.csv").read_bytes()
