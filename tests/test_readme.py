"""The README says what is true: its table of chapters, its commands, a sentence for each dependency."""

import re
import tomllib

from effilib import paths, series

README = (paths.root() / "README.md").read_text()
PROJECT = tomllib.loads((paths.root() / "pyproject.toml").read_text())["project"]


def test_the_table_of_chapters_is_up_to_date():
    assert series.with_table(README) == README, "bring it up to date: python -m effilib.series"


def test_every_dependency_has_its_sentence():
    wanted = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[<>=\[]", d)[0] for d in wanted}
    section = README.split("## Dependencies")[1]
    assert not [n for n in names if f"`{n}`" not in section]


def test_make_has_the_targets_that_it_names():
    makefile = (paths.root() / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_pictures_and_notebooks_that_it_links_to_are_there():
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (paths.root() / link).exists(), link


def test_it_names_the_exact_pair_of_versions():
    dev = PROJECT["optional-dependencies"]["dev"]
    for pair in ("torch==2.14.1", "torchvision==0.29.1"):
        assert pair in dev
        assert pair in README
