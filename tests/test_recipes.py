"""Recipe files: what is written is read, errors name key and choices, `effilib train --recipe` runs them."""

import json
import tomllib
from dataclasses import replace

import pytest

from effilib import __main__ as command
from effilib import tasks
from effilib.errors import BadInput
from effilib.methods.prune_then_grow import PruneThenGrow
from effilib.workbook import recipes, train_command
from tests.common import equal
from tests.test_train_command import model

ALL = sorted(train_command.methods())


@pytest.mark.parametrize("name", ALL)
def test_every_method_survives_the_file(name, tmp_path):
    method = train_command.method(name)
    task = tasks.task(
        "smoke", "synthetic", device="cpu", lr=0.123, widths={"widths": (4, 8), "blocks": (1, 1)}
    )
    file = recipes.write(tmp_path / "a.toml", task, [method], "two\nlines")
    again, methods = recipes.read(file, "cpu")
    assert methods == (method,)
    assert replace(again, given=()) == replace(task, given=())
    assert recipes.text(again, methods, "two\nlines") == file.read_text()


def test_nested_settings_lists_and_odd_words_survive(tmp_path):
    method = train_command.method("prune_then_grow", "prune.ratio=0.25", "plan=((3, 'wait', 0),)", "idle=0.0")
    odd = tmp_path / 'an "odd" näme\\'
    odd.mkdir()
    task = tasks.task("quick", str(odd), "torchvision.models:resnet18", device="cpu", epochs=1e-5, size=64)
    again, (found,) = recipes.read(recipes.write(tmp_path / "a.toml", task, [method]), "cpu")
    assert found == method
    assert isinstance(found, PruneThenGrow)
    assert (again.dataset, again.network, again.size) == (str(odd), "torchvision.models:resnet18", 64)
    assert again.recipe == task.recipe


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[recipe\n", "is no TOML file"),
        ("[recpie]\n", "unknown part of a recipe 'recpie': choose one of task, recipe, method .*'recipe'"),
        ("recipe = 3\n", "recipe is no table"),
        ("[method]\nname = 'x'\n", "method is no list of tables"),
        ("[[method]]\nratio = 0.3\n", "needs its name: choose one of"),
        ("[[method]]\nname = 'prune_trian'\n", "unknown method 'prune_trian'.*did you mean 'prune_train'"),
        (
            "[[method]]\nname = 'prune_train'\nrate = 1\n",
            "unknown setting of prune_train 'rate': choose one of",
        ),
        ("[[method]]\nname = 'prune_train'\nratio = 'much'\n", "'ratio' of prune_train takes .*float"),
        ("[recipe]\nlr = 0\n", "lr is 0, it must be above 0"),
        ("[recipe]\nlearning = 0.1\n", "unknown setting of \\[recipe\\] 'learning': choose one of epochs"),
        (
            "[recipe]\nschedule = 'steps'\n",
            "unknown schedule 'steps': choose one of linear, cosine, constant",
        ),
        ("[task]\npreset = 'large'\n", "unknown preset 'large': choose one of smoke"),
        ("[task]\npreset = 3\n", "preset of \\[task\\] is 3"),
        ("[task]\nepochs = 3\n", "unknown setting of \\[task\\] 'epochs': choose one of preset"),
        ("[task]\nwidths = [3]\n", "widths of \\[task\\] is \\[3\\]"),
        ("[task]\nimages = -3\n", "images is -3"),
    ],
)
def test_an_error_names_the_key_and_the_choices_in_one_sentence(toml, said, tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    file.write_text(toml)
    with pytest.raises(BadInput, match=said):
        recipes.read(file)
    assert command.main(["train", "--recipe", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error
    assert not (tmp_path / "out").exists()


def test_train_runs_a_recipe_as_it_runs_the_words(tmp_path, capsys):
    words = ["--preset", "smoke", "--dataset", "synthetic", "--device", "cpu", "--set", "epochs=3", "lr=0.05"]
    prune = ["--method", "prune_train", "scale=100.0", "weigh=size", "multiple=2"]
    assert command.main(["train", *words, *prune, "--out", str(tmp_path / "words")]) == 0
    task = train_command.make_task("smoke", "synthetic", "", "base", "cpu", ["epochs=3", "lr=0.05"])
    method = train_command.method("prune_train", "scale=100.0", "weigh=size", "multiple=2")
    file = recipes.write(tmp_path / "a.toml", task, [method])
    run = ["train", "--recipe", str(file), "--device", "cpu"]
    assert command.main([*run, "--out", str(tmp_path / "file")]) == 0
    assert equal(model(tmp_path / "words"), model(tmp_path / "file"))
    records = [json.loads((tmp_path / d / "record.json").read_text())["run"] for d in ("words", "file")]
    assert records[0]["methods"] == records[1]["methods"]
    assert command.main([*run, "--out", str(tmp_path / "file"), "--set", "epochs=1"]) == 2  # another run's
    assert command.main([*run, "--out", str(tmp_path / "short"), "--set", "epochs=1"]) == 0
    capsys.readouterr()
    for more, name in ((prune, "--method"), (["--network", "vgg"], "--network"), (words[:2], "--preset")):
        assert command.main([*run, *more]) == 2
        assert name in capsys.readouterr().err
    assert command.main(["train", "--recipe", str(tmp_path / "nowhere.toml")]) == 2
    assert "nowhere.toml: No such file" in capsys.readouterr().err


def test_a_users_own_method_is_named_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom effilib import Method\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    rate: float = 0.5\n"
    )
    method = train_command.method(f"{file}:Mine", "rate=0.25")
    toml = recipes.text(tasks.task("smoke", "synthetic"), [method])
    assert tomllib.loads(toml)["method"] == [{"name": f"{file}:Mine", "rate": 0.25}]
    assert recipes.read(recipes.write(tmp_path / "a.toml", tasks.task(), [method]))[1] == (method,)
