"""The README says what is true: its table and picture, commands and code, a sentence for each dependency."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import effilib
from effilib import hooks, paths, provenance, statistics
from effilib.workbook import recipes, series

CONTRIBUTING = (paths.root() / "CONTRIBUTING.md").read_text()
README = (paths.root() / "README.md").read_text()
TOML = tomllib.loads((paths.root() / "pyproject.toml").read_text())
PROJECT, GROUPS = TOML["project"], TOML["dependency-groups"]
TESTED = (paths.root() / "constraints.txt").read_text().splitlines()


def test_the_table_of_chapters_is_up_to_date():
    assert series.with_table(README) == README, "bring it up to date: python -m effilib.workbook.series"


def test_the_picture_shows_what_is_recorded():
    assert "](results/recorded/scoreboard.png)" in README
    assert series.drawn(series.picture()) == provenance.digest(series.headlines()), (
        "bring it up to date: python -m effilib.workbook.series"
    )


def test_it_is_read_in_five_minutes():
    prose = re.sub(r"(?s)```.*?```|<!--.*?-->|^\|.*?$", "", README, flags=re.M)
    assert len(prose.split()) < 5 * 240


def test_it_explains_every_verdict():
    section = README.split("## How to read a verdict")[1].split("\n## ")[0]
    words = (
        "FASTER",
        "SLOWER",
        "NO_DIFFERENCE",
        "UNDECIDED",
        "DEPENDS",
        "OUT_OF_REACH",
        "SATURATED",
        "DIVERGED",
    )
    words += ("MET", "MISSED", "NOT_DECIDED")
    assert not [word for word in words if getattr(statistics, word) not in section]


BLOCKS = re.findall(r"(?s)```python\n(.*?)```", README)


@pytest.mark.parametrize("code", BLOCKS, ids=["a loop", "a method", "the library"])
def test_its_code_runs_as_it_stands(code, tmp_path):
    file = paths.write(tmp_path / "mine.py", code)
    own = {
        "EFFILIB_PRESET": "smoke",
        "EFFILIB_RESULTS": str(tmp_path / "results"),
        "PYTHONPATH": str(paths.root()),
    }
    done = subprocess.run(
        [sys.executable, file.name], cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"fewer images|^[\d.]+ [\d.]+$|layers are frozen", done.stdout, re.M), done.stdout


def test_it_names_every_hook():
    named = README.split("with hooks: `")[1].split("`")[0].replace("\n", " ").split(", ")
    assert named == hooks.HOOKS


def test_its_table_of_modules_is_the_tree():
    rows = re.findall(
        r"^\| ((?:`[\w/]+`(?:, )?)+) \|", README.split("## The library")[1].split("\n## ")[0], re.M
    )
    named = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    package = paths.root() / "effilib"
    there = {f.stem for f in package.glob("*.py")} | {
        f"{f.parent.name}/" for f in package.glob("*/__init__.py")
    }
    small = {"__init__", "__main__", "errors", "paths", "progress", "provenance"}
    assert named == there - small


def test_its_method_is_thirty_lines():
    assert len(BLOCKS[1].splitlines()) <= 30


def test_it_is_cited_with_its_version():
    citation = yaml.safe_load((paths.root() / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "license"} <= set(citation)
    assert citation["version"] == effilib.__version__ == PROJECT["version"]
    assert f"version = {{{effilib.__version__}}}" in README


def test_every_dependency_has_its_sentence():
    wanted = [
        *PROJECT["dependencies"],
        *(d for extra in PROJECT["optional-dependencies"].values() for d in extra),
        *(d for group in GROUPS.values() for d in group if isinstance(d, str)),
    ]
    names = {re.split(r"[<>=\[]", d)[0] for d in wanted}
    section = README.split("## Dependencies")[1]
    assert not [n for n in names if f"`{n}`" not in section]


def test_make_has_the_targets_that_it_names():
    makefile = (paths.root() / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README + CONTRIBUTING):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_make_test_leaves_out_what_is_slow_and_ci_runs_everything():
    def commands(target):
        return subprocess.run(["make", "-n", target], cwd=paths.root(), capture_output=True, text=True).stdout

    assert '-m "not slow"' in commands("test")
    assert "nbval" in commands("test")
    assert "not slow" not in commands("test-all")
    assert len(re.findall("-m pytest", commands("test-all"))) == 2
    workflow = (paths.root() / ".github" / "workflows" / "tests.yml").read_text()
    assert "make test-all" in workflow


def test_its_recipe_is_one(tmp_path):
    (toml,) = re.findall(r"(?s)```toml\n(.*?)```", README)
    task, _ = recipes.read(paths.write(tmp_path / "mine.toml", toml))
    assert (task.recipe.batch_size, task.recipe.lr) == (128, 0.2)


def test_pictures_and_notebooks_that_it_links_to_are_there():
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (paths.root() / link).exists(), link


def test_it_names_the_exact_pair_of_versions():
    for pair in ("torch==2.14.1", "torchvision==0.29.1"):
        assert pair in TESTED
        assert f"`{pair}`" in README


def test_every_dependency_was_tested_in_an_exact_version_that_is_allowed():
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in TESTED)  # names and versions only
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in TESTED)}
    everything = [*PROJECT["dependencies"], *(d for g in GROUPS.values() for d in g if isinstance(d, str))]
    for wanted in map(Requirement, everything):
        assert tested[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_every_tested_version_runs_on_the_oldest_python():
    tested = dict(line.split("==") for line in TESTED)
    here = [d for d in metadata.distributions() if tested.get(d.name) == d.version]
    assert here
    wanted = {f"{d.name}=={d.version}": d.metadata.get("Requires-Python") or "" for d in here}
    assert not {name: needs for name, needs in wanted.items() if "3.11.0" not in SpecifierSet(needs)}


def test_the_changelog_begins_with_this_version():
    changes = (paths.root() / "CHANGELOG.md").read_text()
    assert re.findall(r"(?m)^## (\S+)", changes)[0] == effilib.__version__


def test_the_wheel_has_every_package():
    listed = TOML["tool"]["setuptools"]["packages"]
    files = (paths.root() / "effilib").rglob("__init__.py")
    there = {".".join(file.parent.relative_to(paths.root()).parts) for file in files}
    assert set(listed) == there | set(TOML["tool"]["setuptools"]["package-dir"])
