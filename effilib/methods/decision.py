"""When, where and how a network in training should grow: the thesis' rule as a pure function, `decide`.

The thesis trains until one more epoch improves nothing, and then looks at how much was pruned in the last
epochs. Read here as a rule per stage (layers whose maps have the same size): much pruned, keep shrinking;
little pruned although the penalty had the time to, the stage needs its channels, widen it; widening brought
nothing, or its newborns were pruned again, deepen it; else stop.

Nothing here knows a network or a clock: a `Trace` of plain numbers goes in, an `Action` with its reason in
words comes out, the same one every time.
"""

import math
import statistics as stats
from dataclasses import dataclass
from itertools import takewhile

from effilib.errors import BadInput, choose

__all__ = [
    "GROWTH", "KINDS", "MODES", "Action", "Epoch", "Policy", "Stage", "Trace", "cooling", "decide", "due",
    "flat", "gained", "level", "over_fits", "rates", "refuted", "since",
]  # fmt: skip

MODES = ("thesis", "windowed", "periodic")
GROWTH = ("widen", "deepen")
KINDS = ("wait", "shrink", *GROWTH, "stop")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Describe a stage at the end of an epoch.

    >>> Stage(name="stage 1", widths=(16, 32), live=(16, 20), lost=0.1)
    Stage(name='stage 1', depth=1, widths=(16, 32), live=(16, 20), lost=0.1, ..., widen=inf, deepen=inf)
    """

    name: str
    depth: int = 1  # residual paths, or layers
    widths: tuple[int, ...] = (16,)  # channels of its nodes
    live: tuple[int, ...] = (16,)  # how many of these live
    lost: float = 0.0  # share of its grown-up channels, weighted by FLOPs, that died in this epoch
    pending: float = 0.0  # share of them that will be dead within the window if they go on like this
    born: int = 0  # channels of its last widening
    kept: int = 0  # how many of these live
    flops: float = 1.0  # of a training step's image
    widen: float = math.inf  # FLOPs that it would add to the rest of the run; infinite where it cannot be
    deepen: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Describe the end of an epoch.

    >>> stages = (Stage(name="stage 1"),)
    >>> end = Epoch(epoch=3, train_loss=0.9, train_accuracy=70.0, loss=1.0, accuracy=66.0, stages=stages)
    >>> end.train_accuracy - end.accuracy
    4.0
    """

    epoch: int
    train_loss: float  # mean over the epoch, as is the accuracy (%)
    train_accuracy: float
    loss: float  # on the split that decides, as is the accuracy
    accuracy: float
    stages: tuple[Stage, ...]
    size: tuple[int, ...] = ()  # of the images on which both were read


@dataclass(frozen=True, kw_only=True)
class Action:
    """Say what to do, and why.

    >>> print(Action(kind="widen", stage="stage 1", reason="it lost nothing"))
    widen stage 1: it lost nothing
    """

    kind: str  # one of KINDS
    stage: str = ""
    reason: str = ""
    freeze: tuple[tuple[str, str], ...] = ()  # (stage, growth) that are never to be tried again

    def __post_init__(self):
        choose("kind of action", self.kind, KINDS)

    def __str__(self):
        return f"{self.kind}{' ' * bool(self.stage)}{self.stage}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Hold all that a decision may rest on.

    >>> end = Epoch(epoch=0, train_loss=0.9, train_accuracy=70.0, loss=1.0, accuracy=66.0, stages=())
    >>> trace = Trace(epochs=(end,), actions=((0, Action(kind="deepen", stage="stage 1")),))
    >>> trace.last, len(trace.growths)
    (0, 1)
    """

    epochs: tuple[Epoch, ...]
    actions: tuple[tuple[int, Action], ...] = ()  # (epoch, action) so far, waiting left out
    frozen: frozenset[tuple[str, str]] = frozenset()  # (stage, growth) given up
    spent: float = 0.0  # FLOPs so far
    projected: float = 0.0  # of the rest of the run if nothing changes
    budget: float = math.inf  # in all
    lam: float = 0.0  # the penalty's coefficient
    idle: float = math.inf  # epochs after which it has removed a channel that no gradient holds
    pressed: float = 0.0  # epochs for which it has acted
    images: int = 1000  # behind an accuracy
    over: bool = False  # the search's share of the run has passed

    @property
    def now(self) -> Epoch:
        """The last `Epoch`."""
        return self.epochs[-1]

    @property
    def last(self) -> int:
        """Epoch of the last action, -1 if there was none."""
        return self.actions[-1][0] if self.actions else -1

    @property
    def growths(self) -> list[tuple[int, Action]]:
        """(epoch, `Action`) of every growth."""
        return [(e, a) for e, a in self.actions if a.kind in GROWTH]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Set when and how to decide.

    `mode` says when a decision is due, the rest is the same for all. "thesis": as soon as an epoch's
    validation loss is no new best. "windowed": if the mean validation loss of `patience` epochs is not by
    `tau` below that of as many before, and the training loss falls by less than `progress` an epoch.
    "periodic": every `period` epochs. A stage that lost at most `low` of its channels needs them, from `high`
    on it still shrinks, between them it is left alone.

    >>> Policy(mode="thesis").patience
    2
    >>> Policy(low=0.1, high=0.05)
    Traceback (most recent call last):
    effilib.errors.BadInput: pruning rates low = 0.1, high = 0.05: expected 0 <= low <= high
    """

    mode: str = "windowed"
    patience: int = 2
    tau: float = 0.02
    progress: float = 0.05
    period: int = 3
    cooldown: int = 2  # epochs without a decision after an action
    window: int = 2  # epochs over which pruning is looked at, longer if the penalty needs longer
    low: float = 0.01
    high: float = 0.05
    full: float = 99.5  # training accuracy (%) from which on capacity is not what lacks
    gap: float = 10.0  # points of training over validation accuracy from which on the network over-fits
    gain: float = 0.2  # points that a growth must bring, or it is given up there
    sigmas: float = 1.0  # standard errors of the accuracy that it must bring at least
    growths: int = 4  # at most so many
    order: tuple[str, ...] = GROWTH  # which comes first
    # Whether "nothing was pruned" counts only under a penalty that had the time to; False for growth without
    # one.
    pressure: bool = True

    def __post_init__(self):
        choose("mode", self.mode, MODES)
        object.__setattr__(self, "order", tuple(self.order))
        if sorted(self.order) != sorted(GROWTH):
            raise BadInput(f"the order of growths is {self.order}, expected 'widen' and 'deepen', one first")
        if not 0 <= self.low <= self.high:
            raise BadInput(f"pruning rates low = {self.low}, high = {self.high}: expected 0 <= low <= high")
        if min(self.patience, self.period, self.cooldown, self.window) < 1 or self.growths < 0:
            raise BadInput("patience, period, cooldown and window are at least 1 epoch, growths at least 0")


def flat(losses: list[float], patience: int, tau: float) -> bool:
    """Return whether no recent loss is clearly below the best before.

    patience: losses that are recent. tau: the share of the best that is clear. False if nothing is before.

    >>> flat([1.0, 0.9, 0.91, 0.92], patience=2, tau=0.0), flat([1.0, 0.9, 0.8], patience=2, tau=0.0)
    (True, False)
    """
    return len(losses) > patience and min(losses[-patience:]) >= (1 - tau) * min(losses[:-patience])


def level(losses: list[float], patience: int, tau: float) -> bool:
    """Return whether the mean of recent losses has stopped falling.

    It is not by a share below the mean of as many before. patience: losses that are recent; noise averages
    out. tau: the share.

    >>> level([1.0, 0.8, 0.8, 1.0], patience=2, tau=0.0), level([1.0, 0.9, 0.8, 0.7], patience=2, tau=0.0)
    (True, False)
    """
    if len(losses) < 2 * patience:
        return False
    before, after = losses[-2 * patience : -patience], losses[-patience:]
    return stats.mean(after) >= (1 - tau) * stats.mean(before)


def since(trace: Trace) -> list[Epoch]:
    """Return the epochs that can be compared.

    Those since the last action, on images of one size.

    >>> how = dict(train_loss=1, train_accuracy=70, loss=1, stages=())
    >>> ends = tuple(Epoch(epoch=i, accuracy=66, **how) for i in range(4))
    >>> trace = Trace(epochs=ends, actions=((1, Action(kind="shrink")),))
    >>> [end.epoch for end in since(trace)]
    [2, 3]
    """
    now = trace.now
    return list(takewhile(lambda e: e.epoch > trace.last and e.size == now.size, reversed(trace.epochs)))[
        ::-1
    ]


def cooling(trace: Trace, policy: Policy) -> bool:
    """Return whether the last action is too recent for another.

    >>> end = Epoch(epoch=4, train_loss=1, train_accuracy=70, loss=1, accuracy=66, stages=())
    >>> trace = Trace(epochs=(end,), actions=((3, Action(kind="widen", stage="stage 1")),))
    >>> cooling(trace, Policy(cooldown=2)), cooling(trace, Policy(cooldown=1))
    (True, False)
    """
    return bool(trace.actions) and trace.now.epoch - trace.last < policy.cooldown


def due(trace: Trace, policy: Policy) -> str:
    """Return why a decision is due, "" if it is not.

    >>> how = dict(train_loss=1, train_accuracy=70, loss=1, stages=())
    >>> ends = tuple(Epoch(epoch=i, accuracy=66, **how) for i in range(3))
    >>> due(Trace(epochs=ends), Policy(mode="thesis"))
    'one more epoch improved nothing'
    >>> due(Trace(epochs=ends), Policy(mode="windowed", patience=2))  # too early to tell
    ''
    """
    if any(a.kind == "stop" for _, a in trace.actions) or cooling(trace, policy):
        return ""
    if policy.mode == "periodic":
        return f"{policy.period} epochs have passed" if trace.now.epoch - trace.last >= policy.period else ""
    epochs = since(trace)
    losses = [e.loss for e in epochs]
    if policy.mode == "thesis":
        return "one more epoch improved nothing" if flat(losses, 1, 0.0) else ""
    if not level(losses, policy.patience, policy.tau):
        return ""
    before, after = epochs[-1 - policy.patience].train_loss, epochs[-1].train_loss
    if over_fits(trace, policy) or after > before * (1 - policy.progress) ** policy.patience:
        return f"{policy.patience} epochs improved the validation loss by less than {policy.tau:.1%}"
    return ""  # still learning: the validation loss was only noisy


def rates(trace: Trace, epochs: int) -> dict[str, float]:
    """Return the share of channels that each stage lost lately.

    In the last epochs, by the stage's name.

    >>> how = dict(train_loss=1, train_accuracy=70, loss=1, stages=(Stage(name="stage 1", lost=0.5),))
    >>> halved = Epoch(epoch=0, accuracy=66, **how)
    >>> rates(Trace(epochs=(halved, halved)), epochs=2)
    {'stage 1': 0.75}
    """
    found = {s.name: 1.0 for s in trace.now.stages}
    for e in trace.epochs[-epochs:]:
        for s in e.stages:
            if s.name in found:
                found[s.name] *= 1 - max(0.0, s.lost)
    return {name: 1 - left for name, left in found.items()}


def over_fits(trace: Trace, policy: Policy) -> str:
    """Return why capacity is not what lacks, in words.

    "" if it may be.

    >>> end = Epoch(epoch=0, train_loss=0.1, train_accuracy=98, loss=1, accuracy=80, stages=())
    >>> over_fits(Trace(epochs=(end,)), Policy(gap=10))
    '98.0 % on training images, 80.0 % on others'
    """
    recent = since(trace)[-policy.patience :] or [trace.now]
    train, held = (stats.mean(getattr(e, k) for e in recent) for k in ("train_accuracy", "accuracy"))
    if train >= policy.full:
        return f"{train:.1f} % of the training images are right"
    return f"{train:.1f} % on training images, {held:.1f} % on others" if train - held >= policy.gap else ""


def gained(trace: Trace, policy: Policy) -> float | None:
    """Return the points of accuracy that the last growth brought.

    None if there was none or the images have another size since.

    >>> how = dict(train_loss=1, train_accuracy=70, loss=1, stages=())
    >>> ends = tuple(Epoch(epoch=i, accuracy=60 + i, **how) for i in range(4))
    >>> actions = ((1, Action(kind="widen", stage="stage 1")),)
    >>> gained(Trace(epochs=ends, actions=actions), Policy(patience=2))
    2.0
    """
    if not trace.growths:
        return None
    at = trace.growths[-1][0]
    before = [e for e in trace.epochs if e.epoch <= at][-policy.patience :]
    after = [e for e in trace.epochs if e.epoch > at][-policy.patience :]
    if not before or not after or len({e.size for e in [*before, *after]}) > 1:
        return None
    return stats.mean(e.accuracy for e in after) - stats.mean(e.accuracy for e in before)


def refuted(trace: Trace, policy: Policy) -> list[tuple[tuple[str, str], str]]:
    """Return the last growth, and why, if it was in vain.

    As [((stage, growth), why)], else []. In vain: it brought nothing, or its newborns were pruned again.

    >>> how = dict(train_loss=1, train_accuracy=70, loss=1, stages=())
    >>> ends = tuple(Epoch(epoch=i, accuracy=60, **how) for i in range(4))
    >>> actions = ((1, Action(kind="deepen", stage="stage 1")),)
    >>> refuted(Trace(epochs=ends, actions=actions), Policy(sigmas=0))
    [(('stage 1', 'deepen'), 'deepening it brought +0.0 points, less than 0.2')]
    """
    if not trace.growths:
        return []
    _, last = trace.growths[-1]
    stage = next((s for s in trace.now.stages if s.name == last.stage), None)
    gain, p = gained(trace, policy), trace.now.accuracy / 100
    needed = max(policy.gain, policy.sigmas * 100 * math.sqrt(max(0.0, p * (1 - p)) / trace.images))
    done = {"widen": "widening", "deepen": "deepening"}[last.kind]
    if last.kind == "widen" and stage and stage.born and stage.kept <= stage.born / 2:
        return [
            (
                (last.stage, "widen"),
                f"of its {stage.born} new channels {stage.born - stage.kept} were pruned again",
            )
        ]
    if gain is not None and gain < needed:
        return [((last.stage, last.kind), f"{done} it brought {gain:+.1f} points, less than {needed:.1f}")]
    return []


def decide(trace: Trace, policy: Policy | None = None) -> Action:
    """Return what to do after the last epoch of the trace.

    >>> stage = Stage(name="stage 1", widen=1.0)  # it lost nothing, and can become wider
    >>> how = dict(train_loss=1, train_accuracy=70, loss=1, stages=(stage,))
    >>> ends = tuple(Epoch(epoch=i, accuracy=66, **how) for i in range(4))
    >>> action = decide(Trace(epochs=ends, lam=0.1, idle=2, pressed=4))  # the penalty had its time
    >>> action.kind, action.stage
    ('widen', 'stage 1')
    """
    policy = policy or Policy()
    if any(a.kind == "stop" for _, a in trace.actions):
        return Action(kind="wait", reason="the search is over")
    if trace.over:
        return Action(kind="stop", reason="the search's share of the run has passed")
    if trace.spent >= trace.budget:
        return Action(kind="stop", reason="the budget is spent")
    why = due(trace, policy)
    if not why:
        return Action(
            kind="wait",
            reason="the last action is too recent" if cooling(trace, policy) else "still improving",
        )
    if policy.pressure and (trace.lam <= 0 or trace.pressed < trace.idle):
        much = f"for {trace.pressed:.1f} of {trace.idle:.1f} epochs" if trace.lam > 0 else "with no penalty"
        return Action(
            kind="wait", reason=f"{why}, but without pressure ({much}) it says nothing that little was pruned"
        )
    over = over_fits(trace, policy)
    if over:
        return Action(kind="stop", reason=f"{why}, and capacity is not what lacks: {over}")
    if len(trace.growths) >= policy.growths:
        return Action(
            kind="stop", reason=f"{why}, and there were {len(trace.growths)} growths, as many as are allowed"
        )
    return _grow(trace, policy, why)


def _grow(trace, policy, why):
    window = max(policy.window, math.ceil(trace.idle) if policy.pressure else 0)
    lost, stages = rates(trace, window), trace.now.stages
    pruned = {
        s.name: f"{s.name} lost {lost[s.name]:.1%} of its channels in {window} epochs, {s.pending:.1%} are "
        "going"
        for s in stages
    }
    judged = refuted(trace, policy)
    freeze = tuple(f for f, _ in judged)
    frozen = trace.frozen | set(freeze)
    needy = [s for s in stages if max(lost[s.name], s.pending) <= policy.low]
    if not needy:
        busy = max(stages, key=lambda s: max(lost[s.name], s.pending))
        shrinks = max(lost[busy.name], busy.pending) >= policy.high
        return Action(
            kind="shrink" if shrinks else "wait", reason=f"{why}, but {pruned[busy.name]}", freeze=freeze
        )
    options = []  # of each stage the first growth that it can still have
    for s in needy:
        left = [g for g in policy.order if (s.name, g) not in frozen and math.isfinite(getattr(s, g))]
        options += [(s, g) for g in left[:1]]
    if not options:
        return Action(
            kind="stop",
            reason=f"{why}, and no stage that needs its channels can grow any further",
            freeze=freeze,
        )
    options = [(s, g) for s, g in options if trace.spent + trace.projected + getattr(s, g) <= trace.budget]
    if not options:
        return Action(kind="stop", reason=f"{why}, and no growth fits the budget", freeze=freeze)
    stage, growth = max(options, key=lambda option: _worth(trace, *option, {f[0] for f in freeze}))
    first, reason = policy.order[0], f"{why}; {pruned[stage.name]}"
    if growth != first:
        reason += "; " + dict(judged).get((stage.name, first), f"it cannot {first} any further")
    return Action(kind=growth, stage=stage.name, reason=reason, freeze=freeze)


def _worth(trace, stage, growth, just_refuted):
    """What is compared: the stage whose last growth has just been refuted first, then living channels per
    FLOP, then the fewest growths so far (round robin), then the later stage, whose pixels are few."""
    alive = sum(stage.live) / max(1, sum(stage.widths))
    so_far = sum(a.stage == stage.name for _, a in trace.growths)
    return (
        stage.name in just_refuted,
        alive / max(getattr(stage, growth), 1e-12),
        -so_far,
        trace.now.stages.index(stage),
    )
