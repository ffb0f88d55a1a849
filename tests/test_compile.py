"""Compiled runs are compiled, however many there were before in the process, and say so where they are not.

Dynamo is the real one; what it captures is run as it is (backend "eager"), which saves minutes of a compiler.
"""

import functools
import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.utils import counters

from effilib import models, surgery
from effilib.data import synthetic
from effilib.errors import NoEffect
from effilib.hooks import Method
from effilib.recipe import Recipe
from effilib.training import train

pytestmark = pytest.mark.slow

DATA = synthetic(images=64)
RECIPE = Recipe(epochs=1, batch_size=16, compile=True, precision="fp32")


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    """The graphs that Dynamo captured and handed on, one after the other."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def network(width=4):
    return models.build("convnet", 4, (1, 8, 8), widths=(width, 4))


def test_ten_structures_in_a_process_are_all_compiled(captured):
    made = []
    for i in range(10):  # Dynamo's own limit is eight of a function
        assert train(network(4 + i), DATA, RECIPE).steps == 2
        made.append(len(captured))
    assert all(later > earlier for earlier, later in itertools.pairwise([0, *made]))


def test_ten_structures_in_a_run_are_all_compiled(captured):
    @dataclass(frozen=True)
    class Narrow(Method):
        def on_step_end(self, run):
            run.state.setdefault(self, []).append(len(captured))
            run.restructure(self.change)

        def change(self, model, optimizer):
            node = surgery.trace(model)["features.0"]
            surgery.select_(node, range(node.width - 1), optimizer)

        def on_fit_end(self, run):
            run.log(self, "captured", graphs=run.state[self])

    recipe = Recipe(epochs=6, batch_size=16, compile=True, precision="fp32")
    history = train(network(16), DATA, recipe, [Narrow()])
    graphs = history.events[-1]["graphs"]
    assert len(graphs) == history.steps == 12
    # every step's structure is captured, but for the few whose FLOPs are counted instead
    assert sum(b > a for a, b in itertools.pairwise(graphs)) >= 8


def test_a_run_that_dynamo_gave_up_on_is_said_not_to_be_compiled(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)  # as it was in version 1
    ended = []
    for i in range(11):
        try:
            train(network(4 + i), DATA, RECIPE)
            ended.append("compiled")
        except NoEffect as error:
            ended.append(str(error))
    said = "torch.compile made 0 graphs of 1: this run is not a compiled one"
    assert ended == ["compiled"] * 8 + [said] * 3


def test_a_plain_run_compiles_nothing(captured):
    before = Counter(counters["frames"])
    train(network(), DATA, Recipe(epochs=1, batch_size=16))
    assert not captured
    assert Counter(counters["frames"]) == before
