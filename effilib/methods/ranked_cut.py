"""One cut by ranking: the channels that the loss needs least per millisecond go, once, early in training.

What a channel is worth is the change of the loss if its BatchNorm's scale were 0, to first order:
|gamma dL/dgamma| (Molchanov et al. 2019, arXiv:1906.10771), summed over steps. What it costs is measured: a
CPU's convolutions work in blocks of 16 channels, so blocks are ranked, by their worth per millisecond. The
ranking is looked at again and again, each time by the steps since the last look, and the cut comes once two
looks agree (Early-Bird tickets, You et al. 2020, arXiv:1909.11957: the distance of their masks is below 0.1),
or at the latest after 30 % of the run, while the learning rate is high; it goes by all steps. There is no
penalty, and nothing is trained that is not needed.
"""

from dataclasses import dataclass, replace

import torch

from effilib import cost, surgery
from effilib.errors import BadInput, NoEffect, choose, within
from effilib.hooks import Method
from effilib.methods import Info
from effilib.run import Run

__all__ = ["RankedCut", "block_prices", "distance", "masks"]

INFO = Info(
    name="One cut by ranking",
    name_de="Ein Schnitt nach Rang",
    chapter="6.1",
    paper="You et al. 2020, arXiv:1909.11957 (Early-Bird tickets)",
    claim="Which channels can go is seen early in training, while the learning rate is high; a network that "
    "is cut there trains in less time, to a comparable accuracy.",
    cost_model="Full price until the cut, at 10 to 30 % of the run; then the share of the convolutions' time "
    "that was asked for is gone. The ranking costs a product per BatchNorm's channel and step.",
    applies="networks wider than they need to be",
)

PRICES = ("milliseconds", "FLOPs")
Scores = dict[str, torch.Tensor]  # a node's name -> (width,)


def masks(scores: Scores, prices: dict[str, float], share: float, multiple: int = 1) -> Scores:
    """Return which channels stay, node -> (width,) bool.

    share: of the price of all, is to go. prices: node -> what a channel costs. Each node's channels, the best
    first, make blocks of `multiple`; blocks go by their score per price, the lowest first, until enough is
    gone; the first block stays.

    >>> scores = {"a": torch.tensor([9.0, 1.0, 8.0, 2.0]), "b": torch.tensor([7.0, 3.0])}
    >>> kept = masks(scores, {"a": 1.0, "b": 1.0}, share=0.4, multiple=2)  # the lowest block: 1 + 2
    >>> kept["a"].tolist(), kept["b"].tolist()
    ([True, False, True, False], [True, True])
    """
    blocks = []
    for name, score in scores.items():
        best = score.argsort(descending=True)
        for block in best.split(multiple)[1:]:
            price = prices[name] * len(block)
            blocks.append((float(score[block].sum()) / max(price, 1e-30), price, name, block))
    left = share * sum(prices[name] * len(score) for name, score in scores.items())
    kept = {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
    for _, price, name, block in sorted(blocks, key=lambda b: b[0]):
        if price <= left * (1 + 1e-9):
            left -= price
            kept[name][block] = False
    return kept


def distance(a: Scores, b: Scores) -> float:
    """Return Early-Bird's distance: the share on which two masks differ.

    >>> distance({"a": torch.tensor([True, False])}, {"a": torch.tensor([True, True])})
    0.5
    """
    return float(torch.cat([a[name] != b[name] for name in a]).double().mean())


def block_prices(
    nodes: list[surgery.Node],
    x: torch.Tensor,
    multiple: int = 16,
    price: str = "milliseconds",
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.0,
) -> dict[str, float]:
    """Return what a channel of each node costs in a training step: a block less, over its channels.

    x: (N, C, H, W), images. price: "milliseconds", measured on this device for at most so many `seconds`, or
    "FLOPs". Convolutions only.

    >>> nodes = surgery.nodes(build("vgg", 4, (1, 8, 8), widths=((4,), (8,))))
    >>> block_prices(nodes, torch.zeros(1, 1, 8, 8), multiple=2, price="FLOPs")  # 6 (9 x 64 + 72 x 16)
    {'features.0': 10368.0, 'features.4': 3456.0}
    """
    choose("price", price, PRICES)
    convs, tried = cost.layers(nodes[0].model, x), {}
    for node in nodes:
        less = min(multiple, node.width - 1)
        for name in {*node.producers, *node.consumers} & set(convs):
            old = convs[name]
            tried[name] = old
            written, read = less * (name in node.producers), less * (name in node.consumers)
            tried[node.name, name] = replace(old, O=old.O - written, C=old.C - read)
    if price == "FLOPs":
        spent = {key: 3.0 * conv.flops for key, conv in tried.items()}
    else:
        last = x.is_contiguous(memory_format=torch.channels_last)
        how = dict(dtype=dtype, channels_last=last, device=x.device, repeats=5, seconds=seconds)
        times, spent = cost.conv_seconds({repr(k): c for k, c in tried.items()}, **how), {}
        for key in tried:
            passes = [t for (k, _), t in times.items() if k == repr(key)]
            spent[key] = 1e3 * sum(min(t) for t in passes)
    found = {}
    for node in nodes:
        less = min(multiple, node.width - 1)
        saved = sum(spent[k[1]] - spent[k] for k in tried if isinstance(k, tuple) and k[0] == node.name)
        found[node.name] = max(0.0, saved) / max(1, less)
    return found


@dataclass(frozen=True, kw_only=True)
class RankedCut(Method):
    """Cut, once, the blocks of channels whose loss per millisecond is least.

    Raises `NoEffect` if no node has a BatchNorm and more than one block of channels. What is cut was alive:
    the function changes, and the rest of the run has to make up for it.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=4), [RankedCut(multiple=2, price="FLOPs")])
    >>> log = history.events[-1]  # at the cut, and at the end
    >>> len(log["epochs"]), log["epochs"][-1], log["widths"][0]["stem"][0] <= 8
    (2, 4.0, True)
    """

    share: float = 0.5  # of what the channels cost that goes
    first: float = 0.1  # share of the run after which the ranking is looked at for the first time
    every: float = 0.05  # share of the run between looks
    latest: float = 0.3  # share of the run at which the cut comes, whether looks agree or not
    agree: float = 0.1  # distance of two looks' masks below which they agree
    multiple: int | str = "auto"  # channels of a block; "auto" is 16 on a CPU, 8 on CUDA
    price: str = "milliseconds"  # or "FLOPs", which are the same on every machine
    each: int = 2  # steps between the gradients that are summed up

    def __post_init__(self):
        choose("price", self.price, PRICES)
        for name in ("share", "first", "every", "latest"):
            within(f"ranked cut: {name}", getattr(self, name), "above 0")
        if not self.first <= self.latest < 1 or self.share >= 1:
            raise BadInput("ranked cut: share lies below 1, and first <= latest < 1")
        if self.multiple != "auto" and not (isinstance(self.multiple, int) and self.multiple > 0):
            raise BadInput("ranked cut: multiple is a whole number above 0, or 'auto'")
        within("ranked cut: each", self.each, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        nodes = self._nodes(run)
        run.state[self] = {
            "scores": {n.name: torch.zeros(n.width, device=run.device) for n in nodes}, "prices": None,
            "seen": None, "mask": None, "looks": 0, "cut": False, "widths": [], "epochs": [],
        }  # fmt: skip

    def _blocks(self, run):
        return cost.channel_block(self.multiple, run.device)

    def _nodes(self, run):
        """The nodes that can lose a block: those with a BatchNorm, whose scale says what a channel does."""
        found = [n for n in surgery.trace(run.model).nodes if n.bns and set(n.bns.values()) == {1}]
        scales = {n: [n.layer(b).weight for b in n.bns] for n in found}
        found = [n for n in found if all(w is not None and w.requires_grad for w in scales[n])]
        if not any(n.width > self._blocks(run) for n in found):
            raise NoEffect(
                "ranked cut: no channels with a BatchNorm, its scale trained, come in more than one block of "
                f"{self._blocks(run)}"
            )
        return found

    @torch.no_grad()
    def on_after_backward(self, run: Run) -> None:
        state = run.state[self]
        if state["cut"] or run.step % self.each:
            return
        if "layers" not in state or state["structure"] != run.structures:
            names = {n.name: list(n.bns) for n in self._nodes(run)}
            state |= {"layers": names, "structure": run.structures}
        for name, bns in state["layers"].items():
            for bn in bns:
                gamma = run.model.get_submodule(bn).weight
                state["scores"][name] += (gamma * gamma.grad).abs().float()

    def on_step_end(self, run: Run) -> None:
        state, planned = run.state[self], run.schedule.planned
        done = run.schedule.after
        due = done >= (self.first + state["looks"] * self.every) * planned
        if state["cut"] or not (due or done >= self.latest * planned) or run.step + 1 >= run.steps:
            return
        if state["prices"] is None:
            state["prices"] = run.ranks.first(lambda: self._prices(run))
        scores = {name: score.to("cpu", copy=True) for name, score in state["scores"].items()}
        recent = {n: s - state["seen"][n] for n, s in scores.items()} if state["seen"] else scores
        mask = self._masks(run, recent)
        apart = 1.0 if state["mask"] is None else distance(mask, state["mask"])
        state |= {"seen": scores, "mask": mask, "looks": state["looks"] + 1}
        if apart < self.agree or done >= self.latest * planned:
            why = f"after {done / planned:.0%} of the run, masks {apart:.2f} apart"
            self._cut(run, self._masks(run, scores), why)
            self._note(run, done)

    def _masks(self, run, scores):
        prices = run.state[self]["prices"]
        return run.ranks.agree(masks(scores, prices, self.share, self._blocks(run)))

    def _prices(self, run):
        x = run.dataset.normalize(run.dataset.train.x[: run.batches.batch_size])
        dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
        x = x.contiguous(memory_format=run.layout)
        return block_prices(self._nodes(run), x, self._blocks(run), self.price, dtype)

    def _cut(self, run, mask, why):
        state, done = run.state[self], []
        run.level()  # in mid-epoch several processes are equal up to rounding only
        if all(m.all() for m in mask.values()):
            raise NoEffect(f"ranked cut: not one block is within {self.share:.0%} of what channels cost")

        def change(model, optimizer):
            for node in surgery.trace(model).nodes:
                if node.name in mask and not mask[node.name].all():
                    before, index = node.width, mask[node.name].nonzero().flatten()
                    surgery.select_(node, index, optimizer)
                    done.append(f"{node.name} {before} -> {len(index)}")

        run.restructure(change)
        state["cut"] = True
        run.log(self, f"{why}: {'; '.join(done)}", pruned=done, prices=state["prices"])

    def _note(self, run, position):
        """Note the widths, off the clock: they are for the record."""
        with run.clock.paused():
            nodes = surgery.trace(run.model).nodes
            run.state[self]["widths"].append({n.name: (n.width, n.width) for n in nodes})
            epochs = run.recipe.epochs * position / max(1, run.schedule.planned)
            run.state[self]["epochs"].append(epochs)

    def on_fit_end(self, run: Run) -> None:
        state = run.state[self]
        if not state["cut"]:
            raise NoEffect("ranked cut: training ended before the cut")
        self._note(run, run.schedule.planned)
        run.log(self, "widths", widths=state["widths"], epochs=state["epochs"])
