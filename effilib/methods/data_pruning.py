"""Prune training images whose loss is small, without bias (InfoBatch, Qin et al. 2024, arXiv:2303.04947).

Before an epoch each image i whose loss was below the mean, L_i < mean(L), is left out with probability r. The
loss of those that stay is divided by 1 - r, so that the expected gradient is that of all images:

    E[sum over kept of w_i dL_i] = sum_i dL_i,    w_i = 1 / (1 - r) where L_i < mean(L), else 1

Losses are those of the last step that saw the image; in the first epoch all are trained. A variance remains,
so the last epochs take all images again. An epoch has fewer steps, and the learning rate follows the epochs:
time is saved in proportion, about r times the share of images below the mean.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.recipe import at_least_fp32
from effilib.run import Run

__all__ = ["DataPruning", "keep_images"]


def keep_images(
    losses: torch.Tensor, ratio: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (index of the images kept, weight of every image's loss).

    losses: (N,). Those below the mean are left out with probability `ratio`, and weigh 1 / (1 - ratio).

    >>> losses = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0])
    >>> kept, weights = keep_images(losses, 0.5, torch.Generator().manual_seed(0))
    >>> 4 in kept, weights.tolist()
    (True, [2.0, 2.0, 2.0, 2.0, 1.0])
    """
    below = losses < losses.mean()
    dropped = below & (torch.rand(len(losses), generator=generator).to(losses.device) < ratio)
    return (~dropped).nonzero().flatten(), torch.where(below, 1 / (1 - ratio), 1.0)


@dataclass(frozen=True, kw_only=True)
class DataPruning(Method):
    """Leave out images whose loss was small; weigh up the others like them.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=4, batch_size=32), [DataPruning(full=0.25)])
    >>> history.events[-1]["text"]
    'trained on ... % of the images of 4 epochs'
    """

    ratio: float = 0.5  # r: of the images below the mean, the share that is left out; the paper's
    full: float = 0.125  # last share of the run that takes all images; the paper's

    def __post_init__(self):
        if not 0 < self.ratio < 1 or not 0 <= self.full < 1:
            raise BadInput(
                f"data pruning: ratio is {self.ratio}, it must be between 0 and 1; full is {self.full}, it "
                "must be from 0 to below 1"
            )

    def on_fit_start(self, run: Run) -> None:
        if run.schedule.planned <= len(run.batches):
            raise NoEffect("data pruning: nothing is pruned in a run of one epoch, whose losses it needs")
        ones = torch.ones(len(run.dataset.train), device=run.device)
        # equal losses: none is below the mean. new: whether an image was seen since, and its loss
        run.state[self] = {"losses": ones, "weights": ones.clone(), "new": torch.stack([ones, ones]) * 0}

    def on_epoch_start(self, run: Run) -> None:
        state, batches = run.state[self], run.batches
        seen, losses = run.ranks.total(state["new"])  # every process saw others
        state["losses"] = torch.where(seen > 0, losses, state["losses"])
        state["new"].zero_()
        batches.chosen = None
        per_epoch = len(batches)
        if run.schedule.position + 0.5 < (1 - self.full) * run.schedule.planned:
            chosen, state["weights"] = keep_images(state["losses"], self.ratio, run.generator(self))
            if batches.batch_size <= len(chosen) < len(state["losses"]):
                batches.chosen = chosen
        else:
            state["weights"] = torch.ones_like(state["losses"])
        run.schedule.pace = per_epoch / len(batches)
        run.steps = run.step + run.schedule.left

    def loss_terms(self, run: Run) -> torch.Tensor:
        state, index, y = run.state[self], run.batches.index, run.targets
        if len(run.logits) != len(index):
            raise BadInput("data pruning: another method changes which images a batch holds")
        logits = at_least_fp32(run.logits)
        smoothing = run.recipe.label_smoothing
        losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
        state["new"][0, index] = 1
        state["new"][1, index] = losses.detach().to(state["new"].dtype)
        return ((state["weights"][index] - 1) * losses).mean()  # on top of the loop's mean

    def on_fit_end(self, run: Run) -> None:
        whole, seen = run.schedule.planned, run.step
        run.batches.chosen = None
        epochs = whole / len(run.batches)
        run.log(self, f"trained on {100 * seen / whole:.0f} % of the images of {epochs:g} epochs")
