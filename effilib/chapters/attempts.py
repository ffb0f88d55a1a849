"""Arms of chapter 10 that other chapters have not: one that may fail, and Tree-CNN as a way to all classes.

They stand apart from the chapter's tables and pictures, because what was measured with them is kept under
their source."""

from dataclasses import dataclass, field, replace

import torch

from effilib import models
from effilib.chapters import plain_network as plain
from effilib.chapters.tree_cnn import makers, stages
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm
from effilib.methods.tree_cnn import TreeCNN, accuracy
from effilib.training import History, resolve_precision


def tried(function, network):
    """(what `function()` returns, "") or (None, why not): a method that does not apply says so by `BadInput`
    or `NoEffect`.

    Any other error is a fault of ours and is raised, unless the network is a user's, whose code may raise
    anything."""
    try:
        return function(), ""
    except (BadInput, NoEffect) as error:
        return None, str(error)
    except Exception as error:
        if network in models.NETWORKS:
            raise
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Runs an arm; where it does not apply, its history holds the reason and nothing else: (task, seed) ->
    `History`.
    """

    arm: Arm

    def __call__(self, task, seed):
        history, why = tried(lambda: self.arm.run(task, plain.load(task), seed), task.network)
        return history or nothing(why)


def nothing(why):
    """The history of an arm that does not apply."""
    row = dict.fromkeys(("step", "epoch", "seconds", "lr", "train_loss", "loss", "accuracy"), 0.0)
    return History(
        rows=[row],
        test_accuracy=0.0,
        events=[{"step": 0, "epoch": 0, "method": "Attempt", "text": why, "refused": why}],
    )


def refused(history):
    """Why this arm does not apply, "" where it does."""
    return next((e["refused"] for e in history.events if "refused" in e), "")


def attempted(arm):
    """The same arm, but it may fail."""
    return Arm(name=arm.name, role=arm.role, fit=Attempt(arm=arm))


@dataclass(frozen=True, kw_only=True)
class WholeTree:
    """Tree-CNN from no class to all of them, every stage on the clock: (task, seed) -> `History`.

    In chapter 7.1 the first stage is given, as in the paper. Here it counts, and so does every image of a
    class that has not come yet: it is told wrong. So accuracies are those of the whole task, as the other
    arms have them."""

    tree: TreeCNN = field(default_factory=TreeCNN)

    def __call__(self, task, seed):
        dataset = plain.load(task)
        first, *later = stages(dataset)
        _, *two = makers(task, dataset, seed)
        tree, begun = self.tree.start(dataset, tuple((c,) for c in first), *two, task.recipe, seed)
        history = of_all(begun, dataset, first)
        for new in later:
            history += of_all(self.tree.learn_(tree, dataset, new, *two, task.recipe, seed), dataset, tree.T)
        precision = resolve_precision(task.recipe.precision, dataset.device)
        return replace(history, test_accuracy=accuracy(tree, dataset, "test", precision))


def of_all(history, dataset, seen):
    """The history with accuracies of the whole validation split; those it has are of the classes `seen`."""
    y = dataset.validation.y
    share = float(torch.isin(y, torch.tensor(list(seen), device=y.device)).float().mean())
    return replace(history, rows=[{**row, "accuracy": share * row["accuracy"]} for row in history.rows])
