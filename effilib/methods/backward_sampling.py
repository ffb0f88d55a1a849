"""Backward passes on a part of the batch: samples kept by the norm of their gradient (arXiv:2402.17227).

Pruning elements of a gradient leaves dense kernels as much to do as before. Dropping *samples* makes every
product below smaller: at a border between two blocks sample i stays with probability p_i, which grows with
|g_i| up to 1, and then has the weight 1 / p_i. All that lies below, dX, dW, BatchNorm, ReLU and sums, is
computed for the samples that stayed. The forward pass is exact, and the loss sees every sample. The backward
pass for some of the samples is `effilib.backward`'s.

Wang, Chen & Zhu (ICLR 2024) measure the variance of sampling, and that of SGD, by six extra passes every 100
steps, and steer by their ratio. Here the ratio is predicted from the norms of each batch (`added_variance`),
which costs nothing and needs no time to settle. With it either a variance is allowed at every border
(`fewest`, in their spirit), or the number of samples is found with which training gets furthest in its time
(`most_efficient`): at the uppermost border only, since below it what stayed has norms that are alike. They
drop samples independently, with p_i in proportion to |g_i| itself; here as many as planned stay
(`systematic`), in multiples of a few, since kernels are chosen anew for each size, and no weight is above a
bound (`probabilities`). Their sampling of tokens for dW is left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from effilib.backward import partial_backward_, whole_backward_
from effilib.errors import BadInput, within
from effilib.hooks import Method
from effilib.methods import Info
from effilib.run import Run

__all__ = [
    "INFO", "BackwardSampling", "added_variance", "fewest", "most_efficient", "probabilities", "systematic",
]  # fmt: skip

INFO = Info(
    name="Sampled backward passes",
    name_de="Stichproben im Rückwärtsdurchlauf",
    chapter="4.1",
    paper="Wang, Chen & Zhu 2024, arXiv:2402.17227 (ICLR 2024)",
    claim="Keeping few samples of a batch in the backward pass, by the norm of their gradients and without "
    "bias, saves up to 73.87 % of its FLOPs and 49.58 % of the training's, at the same accuracy.",
    cost_model="Below a border dX, dW and all passes over gradients shrink to the share of samples kept. "
    "Added: their activations are copied once, and a norm of the gradient a sample.",
    applies="long trainings, where most images are learnt",
)

PHASES = 16  # of a run, in each of which the FLOPs of a step are counted: fewer and fewer samples stay
DEFENSIVE = 0.1  # of the mean norm is added to each: no weight grows without bound

# The equations


def probabilities(norms: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """Return the probabilities with which samples stay, k on average.

    p = min(1, c (|g_i| + 0.1 mean |g|)), with sum k. Of the norms alone the variance would be least, but one
    that is near 0 would have a weight 1 / p without bound; so none is above 11 N / k. norms: (N,), not all 0.
    k: from 1 to N; or (K, 1) of them, for p (K, N).

    >>> probabilities(torch.tensor([0.0, 0.0, 3.0]), 2).tolist()
    [0.5, 0.5, 1.0]
    """
    u, rank = norms.double(), torch.arange(len(norms), device=norms.device)
    u = u + DEFENSIVE * u.mean()
    falling = u.sort(descending=True).values
    rest = falling.flip(0).cumsum(0).flip(0)  # of all that are not larger
    certain = ((k - rank) * falling > rest).sum(-1, keepdim=True)  # the largest have p = 1
    return (u * ((k - certain) / rest[certain])).clamp(max=1).to(norms.dtype)


def systematic(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the index of sum(p) samples, each drawn with its probability.

    Those in whose stretch of the line from 0 to sum(p) one of the points u, u + 1, ... lies.

    >>> systematic(torch.tensor([0.25, 0.25, 0.5, 1.0]), torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    ends = F.pad(p.double().cumsum(0), (1, 0))
    ends[-1] = ends[-1].round()  # a whole number, but for rounding
    return (ends - u).ceil().diff().nonzero().squeeze(1)


def added_variance(norms: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the variance that sampling adds, as a share of SGD's own.

    sum (1 / p_i - 1) |g_i|^2 / sum |g_i|^2, over the last dimension: for samples drawn independently, and
    whose gradients of the weights are as long as those of the activations, at right angles.

    >>> added_variance(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5])).item()
    1.0
    """
    return ((1 / p - 1) * norms**2).sum(-1) / (norms**2).sum()


def fewest(norms: torch.Tensor, tau: float, multiple: int = 8) -> int:
    """Return how many samples must stay to add at most variance tau.

    A multiple of `multiple`, or all.

    >>> fewest(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0]), tau=0.1, multiple=1)
    5
    """
    ks = torch.tensor([*range(multiple, len(norms), multiple), len(norms)], device=norms.device)
    enough = added_variance(norms, probabilities(norms, ks[:, None])) <= tau
    enough[-1] = True  # of all, but for rounding
    return int(ks[enough.nonzero()[0, 0]])


def most_efficient(norms: torch.Tensor, fixed: float, multiple: int = 8) -> int:
    """Return with how many samples training gets furthest in its time.

    While noise is most of a gradient, a step with an added variance v is worth 1 / (1 + v) steps. fixed: the
    share of a step's time that does not depend on how many stay. A multiple of `multiple`, or all.

    >>> alike, unlike = torch.ones(32), torch.tensor([0.01] * 24 + [1.0] * 8)
    >>> most_efficient(alike, fixed=0.4), most_efficient(unlike, fixed=0.4)
    (32, 8)
    """
    n = len(norms)
    ks = torch.tensor([*range(multiple, n, multiple), n], device=norms.device)
    v = added_variance(norms, probabilities(norms, ks[:, None]))
    return int(ks[((1 + v) * (fixed + (1 - fixed) * ks / n)).argmin()])


# In training


@dataclass(frozen=True, kw_only=True)
class BackwardSampling(Method):
    """Train with backward passes on the samples whose gradients are large.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [BackwardSampling(keep=0.5)])
    >>> history.events[-1]["text"]
    'samples kept: features.6 50%'
    """

    fixed: float = 0.4  # share of a step that samples don't shorten; the most efficient number of them stays
    keep: float | None = None  # or a fixed share of the batch
    tau: float | None = None  # or as many as add this variance, of SGD's own, at every border, as VCAS does
    begin: float = 0.0  # share of the run after which it begins; until then gradients are exact
    multiple: int = 8  # as many samples, or a multiple, stay: kernels are chosen anew for each size

    def __post_init__(self):
        if self.keep is not None and self.tau is not None:
            raise BadInput("backward sampling: keep and tau both say how many samples stay; give one of them")
        ranges = {
            "fixed": "from 0 to below 1", "keep": "above 0, to 1", "tau": "above 0",
            "begin": "from 0 to below 1", "multiple": "a whole number above 0",
        }  # fmt: skip
        for name, words in ranges.items():
            if (value := getattr(self, name)) is not None:
                within(f"backward sampling: {name}", value, words)

    def on_fit_start(self, run: Run) -> None:
        if run.recipe.compile:
            raise BadInput("backward sampling: its backward pass can't be compiled; train without `compile`")
        run.state[self] = {"structures": run.structures, "phase": (0, False), "borders": {}}
        part = self._install(run)
        text = f"{len(part.convs)} convolutions below {part.above}, borders: {', '.join(part.borders)}"
        run.log(self, text, borders=part.borders, above=part.above)
        whole_backward_(run.model)  # until it begins

    def on_batch(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = run.state[self]
        if self._on(run) and (not hasattr(run.model, "part") or state["structures"] != run.structures):
            state["structures"] = run.structures  # surgery may have made another network of it
            self._install(run)
        return x, y

    def on_step_end(self, run: Run) -> None:
        state = run.state[self]
        phase = PHASES * (run.step + 1) // run.steps, self._on(run, run.step + 1)
        if phase != state["phase"]:  # as after surgery, the FLOPs of a step are counted anew
            state["phase"], state["structures"] = phase, state["structures"] + 1
            run.structures += 1

    def on_fit_end(self, run: Run) -> None:
        whole_backward_(run.model)
        found = run.state[self]["borders"]
        means = {k: {n: s[k] / s["calls"] for n, s in found.items()} for k in ("share", "variance")}
        text = ", ".join(f"{n} {share:.0%}" for n, share in means["share"].items()) or "all"
        run.log(self, f"samples kept: {text}", **means)

    def _on(self, run, step=None):
        return (run.step if step is None else step) >= self.begin * run.steps

    def _install(self, run):
        generator, device = run.generator(self, share=True), run.device

        def sampler(border, norms):
            if not norms.isfinite().all() or not norms.any():
                return None  # what overflowed stays, to be seen
            norms = norms.cpu()
            p = probabilities(norms, self._size(norms))
            index = systematic(p, generator)
            s = run.state[self]["borders"].setdefault(border, {"calls": 0, "share": 0.0, "variance": 0.0})
            s["calls"] += 1
            s["share"] += len(index) / len(run.logits)
            s["variance"] += added_variance(norms, p).item()
            return None if len(index) == len(norms) else (index.to(device), (1 / p[index]).to(device))

        return partial_backward_(run.model, sampler, top_only=self.tau is None)

    def _size(self, norms):
        """How many samples stay."""
        if self.keep is not None:
            k = round(self.keep * len(norms) / self.multiple) * self.multiple
            return min(max(k, self.multiple), len(norms))
        if self.tau is not None:
            return fewest(norms, self.tau, self.multiple)
        return most_efficient(norms, self.fixed, self.multiple)
