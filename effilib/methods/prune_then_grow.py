"""The thesis' own procedure: prune while training, and where little was pruned let the network grow.

Four lines of the thesis (2019): train the baseline from the first epoch on; prune it while it trains; train
until one more epoch improves nothing; look at how much was pruned in the last epochs to decide whether the
network should become wider or deeper. What is new in it is the use of the recent pruning rate as a diagnosis:
a penalty that removes all that is not needed tells where nothing was to spare.

Pruning is PruneTrain's (chapter 6.1), growth Net2Net's (6.2), both exact here; the decision is
`effilib.methods.decision.decide`. A run has two phases: SEARCH, at a constant learning rate and under the
penalty, and FINAL, without either, the learning rate falling to 0."""

import copy
import itertools
import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from effilib import cost, models, surgery
from effilib.errors import BadInput, choose
from effilib.methods import Info, net2net
from effilib.methods.decision import GROWTH, KINDS, Action, Epoch, Policy, Stage, Trace, decide
from effilib.methods.prune_train import (
    PruneTrain,
    anything_dead,
    group_norms,
    group_weight,
    live,
    places,
    prune_,
    shrink_,
    shrink_steps,
    weights,
)
from effilib.surgery import stages
from effilib.training import Method, autocast, at_least_fp32

INFO = Info(
    name="Prune, then grow",
    name_de="Beschneiden, dann wachsen",
    chapter="II.9",
    paper="the thesis, 2019",
    claim="A network that is pruned while it trains, and grows where little was pruned once training improves nothing, reaches the "
    "baseline's accuracy in less time (aim here: 0.55 of it on 2 CPU cores).",
    cost_model="Early steps cost what the small network costs; each growth adds its FLOPs to the steps that are left. Added are a pass "
    "over the weights a step, a look at held-out images an epoch, and some milliseconds of surgery. All is held within a budget of FLOPs.",
)

GENTLE = PruneTrain(
    weigh="norm", rule="readers", keep_scale=True
)  # what lives keeps its scale: under BatchNorm that is its learning rate


def price(steps, norm, lr, momentum=0.9, weight_decay=0.0):
    """The penalty's coefficient under which an idle group of this norm is gone after so many steps:
    `shrink_steps` solved for lambda.

    >>> round(shrink_steps(norm=1.0, lam=price(steps=100, norm=1.0, lr=0.1), lr=0.1), 3)
    100.0
    """
    decay = steps * lr * weight_decay / (1 - momentum)
    return norm * (1 - momentum) / (steps * lr) * (decay / math.expm1(decay) if decay else 1.0)


@torch.no_grad()
def strengths(node, rule="union", weigh="equal"):
    """(width,): the norm of each channel's strongest group, in the units that the penalty counts in.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(2, 4))
    >>> with torch.no_grad():
    ...     net.features[0].weight[1] = net.features[4].weight[:, 1] = 0
    >>> (strengths(surgery.trace(net)["features.0"]) > 0).tolist()
    [True, False]
    """
    groups = weights(node.model, places([node], rule))
    return torch.stack([(group_norms(*g) / group_weight(*g, weigh)).cpu() for g in groups]).amax(0)


def going(now, before, epochs):
    """(width,) bool: channels that will have shrunk to nothing within so many epochs if they go on as from
    `before` to `now`.

    >>> going(now=torch.tensor([0.1, 0.9]), before=torch.tensor([0.5, 1.0]), epochs=1).tolist()
    [True, False]
    """
    return now < epochs * (before - now)


def grow_(
    model,
    layout,
    stage,
    growth,
    optimizer=None,
    *,
    factor=1.5,
    multiple=16,
    trunk=False,
    breaker="pair",
    x=None,
    y=None,
    generator=None,
):
    """Widen or deepen a stage (its number in the layout of `effilib.surgery.stages`), in place. Returns what
    was done, in words.

    "widen": every node inside of its residual paths (of a plain stage every node, with `trunk` the trunk too)
    gets `factor` times its channels, rounded up to a multiple. "deepen": one more block at its end, or layer.
    breaker: see `net2net.widen_`; "pair" is exact. x, y: a batch at the size that the network trains on, see
    `net2net.deepen_` and `gradmax_`. Raises `BadInput` where it cannot be.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(16, 16), blocks=(1, 1))
    >>> layout = stages.find(net, (1, 8, 8))
    >>> grow_(net, layout, 1, "widen"), grow_(net, layout, 1, "deepen")
    (['stages.1.0.conv1 16 -> 32'], ['stages.1.1 added'])
    """
    choose("growth", growth, GROWTH)
    if growth == "deepen":
        return net2net.grow_(
            model, optimizer, x, y, deeper=(stages.deepenable(model, layout, stage),), generator=generator
        )
    nodes = stages.widenable(surgery.trace(model), layout, stage, trunk)
    if not nodes:
        raise BadInput(f"{stages.names(layout)[stage]} has nothing that could become wider")
    wider = tuple((n.name, math.ceil(factor * n.width / multiple) * multiple) for n in nodes)
    return net2net.grow_(model, optimizer, x, y, wider=wider, breaker=breaker, generator=generator)


def step_flops(model, size, batch_size):
    """FLOPs of a training step on images (C, H, W) = `size`, counted without computing them.

    >>> step_flops(nn.Conv2d(1, 2, 3), (1, 5, 5), batch_size=2)
    1296
    """
    return cost.step_flops(copy.deepcopy(model).to("meta"), size, batch_size)


@torch.no_grad()
def validate(run, images, size):
    """(mean cross entropy, accuracy in %) on the first images of the split that decides, resized as those of
    the training are.

    >>> from effilib.training import Run
    >>> data = load("synthetic")
    >>> run = Run(build("convnet", data.classes, data.shape, widths=(4, 8)), data, Recipe(), (), seed=0)
    >>> loss, accuracy = validate(run, 20, (6, 6))
    >>> 0 <= accuracy <= 100
    True
    """
    model, part, loss, correct = run.model, run.decide[:images], 0.0, 0
    model.eval()
    with autocast(run.precision, run.device):
        for x, y in run.dataset.batches(part):
            if x.shape[2:] != size:
                x = F.interpolate(x, size, mode="bilinear", antialias=True)
            logits = at_least_fp32(model(x.contiguous(memory_format=run.layout)))
            loss += F.cross_entropy(logits, y, reduction="sum").double()
            correct += (logits.argmax(1) == y).sum()
    model.train()
    return float(loss) / len(part), 100 * float(correct) / len(part)


def plan(history):
    """What a run decided, ((epoch, kind, stage), ...): `PruneThenGrow(plan=...)` does the same again.

    >>> action = {"epoch": 3, "kind": "widen", "stage": "stage 1", "reason": "it lost nothing"}
    >>> plan(History(events=[{"method": "PruneThenGrow", "action": action}]))
    ((3, 'widen', 'stage 1'),)
    """
    events = [e["action"] for e in history.events if e["method"] == PruneThenGrow.__name__ and "action" in e]
    return tuple((a["epoch"], a["kind"], a["stage"]) for a in events if a["kind"] != "wait")


@dataclass(frozen=True, kw_only=True)
class PruneThenGrow(Policy, Method):
    """Prune while training, then grow. Raises `BadInput` for a network that cannot be pruned or cannot grow.

    mode and what else says when and where to grow: see `Policy`, whose settings are this method's. prune:
    PruneTrain's settings (without `until`, `grow_batch` and the published mode). idle: share of the steps
    after which the penalty has removed a channel that no gradient holds, at the full learning rate; 0: lambda
    comes from PruneTrain's ratio. A ratio of 0 is no penalty. factor, trunk, breaker: see `grow_`. grace:
    epochs in which newborn channels are neither penalised nor cut. search: share of the schedule that SEARCH
    takes at most. budget: FLOPs of the whole run, looking at held-out images included, relative to the
    baseline's: `baseline` FLOPs, or (0) those of the network as given, trained for the recipe's steps. The
    run is shortened rather than exceed it. spend: lengthen it too, until the budget is spent. held: images
    looked at after an epoch of SEARCH. plan: do not decide, do what another run did (`plan(history)`).

    A method that resizes images comes before this one, says so by `phases(shape, steps)` as `KernelRescaling`
    does, and leaves kernels.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=3), [PruneThenGrow()])
    >>> history.events[-1]["text"]
    '... growths; ... of the budget spent, ...% of it to look at held-out images'
    """

    prune: PruneTrain = GENTLE
    idle: float = 0.15
    factor: float = 1.5
    trunk: bool = False
    breaker: str = "pair"
    grace: int = 1
    search: float = 0.6
    budget: float = 1.0
    baseline: float = 0.0
    spend: bool = False
    held: int = 1000
    plan: tuple | None = None

    def __post_init__(self):
        super().__post_init__()
        choose("symmetry breaker", self.breaker, (*net2net.BREAKERS, "gradmax"))
        if self.prune.mode != "proximal" or self.prune.grow_batch or self.prune.until != 1:
            raise BadInput(
                "PruneThenGrow: prune is PruneTrain in its proximal mode, without until and grow_batch"
            )
        if (
            not 0 < self.search < 1
            or not 0 <= self.idle < 1
            or self.factor <= 1
            or self.budget <= 0
            or self.baseline < 0
            or self.held < 1
        ):
            raise BadInput(
                "PruneThenGrow: search lies in (0, 1), idle in [0, 1), factor is above 1, budget above 0, held at least 1 image"
            )
        if not 0 <= self.grace <= self.cooldown:
            raise BadInput(
                f"PruneThenGrow: a grace of {self.grace} epochs, it is at most the cool-down, {self.cooldown}"
            )
        if self.plan is not None:
            object.__setattr__(self, "plan", tuple(tuple(step) for step in self.plan))  # lists come from JSON
            for step in self.plan:
                if len(step) != 3 or not isinstance(step[0], int):
                    raise BadInput(f"PruneThenGrow: {step} in the plan, expected (epoch, kind, stage)")
                choose("kind of action", step[1], KINDS)

    # Hooks

    def on_fit_start(self, run):
        model, shape = run.model, run.dataset.shape
        surgery.nodes(model)  # refuses what has none
        layout = stages.find(model, shape)
        if self.growths and all(
            self.added(model, layout, i, g) is None for i in range(len(layout["pixels"])) for g in GROWTH
        ):
            raise BadInput(f"PruneThenGrow: no stage of {type(model).__name__} can become wider or deeper")
        run.schedule.lr_at = partial(self.lr_at, run)
        run.state[self] = {
            "lambda": None, "idle": math.inf, "pressed": 0.0, "final": None,  # penalty and schedule
            "budget": 0.0, "spent": 0.0, "looked": 0.0, "flops": {"structure": -1},
            "layout": layout, "channels": stages.table(surgery.trace(model)), "newborn": {}, "groups": {"epoch": None},
            "epochs": [], "actions": [], "frozen": [],  # what the decision sees
            "sums": [0.0, 0.0, 0], "steps": {}, "batch": None, "size": shape[1:],  # of this epoch
        }  # fmt: skip
        baseline = self.baseline or run.schedule.planned * self.step_cost(run, shape[1:])
        run.state[self]["budget"] = self.budget * baseline
        self.fit_budget(run)

    def on_epoch_start(self, run):
        self.groups(run)

    def on_batch(self, run, x, y):
        state = run.state[self]
        state["batch"], state["size"] = (x, y), tuple(x.shape[2:])
        return x, y

    def loss_terms(self, run):
        state = run.state[self]
        if state["lambda"] is None:
            lam, steps = self.coefficient(run)
            state["lambda"], state["idle"] = lam, steps / len(run.batches)
            run.log(
                self,
                f"lambda = {lam:.3g}: a channel that no gradient holds is gone after {state['idle']:.1f} epochs",
                lam=lam,
            )

    def on_step_end(self, run):
        state, (_, y) = run.state[self], run.state[self]["batch"]
        key = _key(state["size"])
        state["steps"][key] = state["steps"].get(key, 0) + 1
        loss, correct, n = state["sums"]
        state["sums"] = [loss + run.loss, correct + (run.logits.argmax(1) == y).sum(), n + len(y)]
        if state["lambda"] and state["final"] is None:
            state["pressed"] += run.lr / run.recipe.lr
            kappa = run.lr * state["lambda"] / (1 - run.recipe.momentum)
            for group, grown in self.groups(run):
                shrink_(
                    [group],
                    kappa if grown is None else kappa * grown,
                    self.prune.weigh,
                    self.prune.keep_scale,
                )

    def on_epoch_end(self, run):
        state = run.state[self]
        state["spent"] += sum(
            n * self.step_cost(run, map(int, key.split(" x "))) for key, n in state["steps"].items()
        )
        if run.step < run.steps:
            if state["final"] is None:
                self.observe(run)
                self.act(run, run.ranks.agree(self.decided(run)))
            self.fit_budget(run)
        state["batch"], state["sums"], state["steps"] = None, [0.0, 0.0, 0], {}

    def on_fit_end(self, run):
        state = run.state[self]
        done = [a for a in state["actions"] if a[1] in GROWTH]
        if self.plan is not None and len(state["actions"]) < len([s for s in self.plan if s[1] != "wait"]):
            raise BadInput(
                f"PruneThenGrow: the plan goes on after epoch {run.epoch}, where this run ends or its search was over"
            )
        total = state["spent"] + state["looked"]
        text = f"{total / state['budget']:.3f} of the budget spent, {state['looked'] / max(total, 1):.1%} of it to look at held-out images"
        with run.clock.paused():  # for the record
            found, layout = surgery.trace(run.model), state["layout"]
            nodes = {name: stages.members(found, layout, i) for i, name in enumerate(stages.names(layout))}
            ends = [{"name": name, "widths": [n.width for n in own]} for name, own in nodes.items()]
        spent = dict(spent=state["spent"], looked=state["looked"], budget=state["budget"])
        run.log(self, f"{len(done)} growths; {text}", **spent, stages=ends)

    # Schedule and budget

    def lr_at(self, run, position, planned):
        """Warmed up as the recipe says, constant in SEARCH, linearly to 0 in FINAL."""
        rise, state = run.recipe.warmup * planned, run.state[self]
        final = (
            self.search * planned if state["final"] is None else min(state["final"], self.search * planned)
        )
        if position < rise:
            return run.recipe.lr * (position + 1) / (math.floor(rise) + 1)
        return run.recipe.lr * min(1.0, max(0.0, (planned - position) / (planned - max(final, rise))))

    @torch.no_grad()
    def coefficient(self, run):
        """(lambda, steps after which it has removed a mean group that no gradient holds), from the first
        batch.
        """
        groups = [g for g, _ in self.groups(run)]
        norm = (
            torch.cat([(group_norms(*g) / group_weight(*g, self.prune.weigh)).cpu() for g in groups])
            .mean()
            .item()
        )
        how = run.recipe.lr, run.recipe.momentum, run.recipe.weight_decay
        if not self.idle or not self.prune.ratio:
            lam = self.prune.price(run, groups)[0]
            return lam, shrink_steps(norm, lam, *how) if lam else math.inf
        return run.ranks.agree(
            price(self.idle * run.schedule.planned, norm, *how)
        ), self.idle * run.schedule.planned

    def step_cost(self, run, size):
        """FLOPs of a step of the network as it is now, on images of a size. Never called within a step, where
        the run itself may count.
        """
        size, kept = tuple(size), run.state[self]["flops"]
        if kept["structure"] != run.structures:
            kept = run.state[self]["flops"] = {"structure": run.structures}
        if _key(size) not in kept:
            kept[_key(size)] = step_flops(run.model, (run.dataset.shape[0], *size), run.batches.batch_size)
        return kept[_key(size)]

    def about(self, run, size):
        """The same for what is to come: counted at the size of now, elsewhere in proportion to the pixels,
        for counting takes time.
        """
        now = run.state[self]["size"]
        return self.step_cost(run, now) * math.prod(size) / math.prod(now)

    def rest(self, run, step_cost, left):
        """FLOPs of `left` steps over the rest of the schedule, looking at held-out images included.
        step_cost: size -> FLOPs.
        """
        begin, end, shape = run.schedule.position, run.schedule.planned, run.dataset.shape
        resizer = next((m for m in run.methods if hasattr(m, "phases")), None)
        phases = (
            [(start, size) for start, size, *_ in resizer.phases(shape, end)] if resizer else [(0, shape[1:])]
        )
        search = end * self.search if run.state[self]["final"] is None else begin
        total = 0.0
        for (first, size), (last, _) in itertools.pairwise([*phases, (end, None)]):
            steps, looking = (
                max(0.0, min(last, stop) - max(first, begin)) / (end - begin) * left for stop in (end, search)
            )
            total += step_cost(tuple(size)) * (steps + looking * self.look_share(run))
        return total

    def look_share(self, run):
        """What looking at held-out images adds to a step, relative to it: their forward pass, a third of a
        step, once an epoch.
        """
        return min(self.held, len(run.decide)) / (3 * run.batches.batch_size * len(run.batches))

    def fit_budget(self, run):
        """Shorten the run so that it stays within the budget; with `spend` lengthen it."""
        state, left = run.state[self], run.steps - run.step
        unit = self.rest(run, partial(self.about, run), 1.0)
        fits = max(1, int((state["budget"] - state["spent"] - state["looked"]) / unit))
        if fits != left and (self.spend or fits < left):
            run.replan(fits)

    # What is seen, decided and done at an epoch's end

    def observe(self, run):
        """Note the epoch: losses, and of every stage its widths, and what died of it."""
        state, before = run.state[self], run.kind
        run.kind = "validate"
        loss, accuracy = run.ranks.agree(validate(run, self.held, state["size"]))
        run.kind = before
        state["looked"] += self.look_share(run) * len(run.batches) * self.step_cost(run, state["size"])
        structure = surgery.trace(run.model)
        seen = tuple(
            self.stage(run, structure, i, name) for i, name in enumerate(stages.names(state["layout"]))
        )
        total, correct, n = (float(v) for v in state["sums"])
        correct, n = (sum(counts) for counts in zip(*run.ranks.gather((correct, n)), strict=True))
        batches = n / run.batches.batch_size
        epoch = dict(
            epoch=run.epoch,
            train_loss=total / batches,
            train_accuracy=100 * correct / n,
            loss=loss,
            accuracy=accuracy,
        )
        state["epochs"].append(asdict(Epoch(**epoch, stages=seen, size=state["size"])))

    def stage(self, run, structure, number, name):
        """A stage as the decision sees it; the channels' table is brought up to date."""
        state = run.state[self]
        window = max(self.window, math.ceil(min(state["idle"], run.schedule.planned)))
        nodes = stages.members(structure, state["layout"], number)
        total = lost = leaving = 0.0
        (birth, born), kept = state["newborn"].get(name, (None, 0)), 0
        for node in nodes:
            table = state["channels"][node.name]
            alive, strength = (
                live(node, rule=self.prune.rule),
                strengths(node, self.prune.rule, self.prune.weigh),
            )
            grown = self.grown(table, run.epoch)
            was, now = grown & torch.tensor(table["alive"]), grown & alive
            each = stages.flops(run.model, state["layout"], {*node.producers, *node.consumers}) / node.width
            total += each * int(was.sum())
            lost += each * (int(was.sum()) - int(now.sum()))
            leaving += each * int((now & going(strength, torch.tensor(table["strength"]), window)).sum())
            kept += sum(a and b == birth for a, b in zip(alive.tolist(), table["born"], strict=True))
            table["alive"], table["strength"] = alive.tolist(), strength.tolist()
        own = {p for n in nodes for p in n.producers}
        penalised = total and state["lambda"]  # weight decay alone shrinks all channels and removes none
        return Stage(
            name=name, depth=stages.depth(structure, state["layout"], number), widths=tuple(n.width for n in nodes),
            live=tuple(sum(state["channels"][n.name]["alive"]) for n in nodes), lost=max(0.0, lost / total) if total else 0.0,
            pending=leaving / total if penalised else 0.0, born=born, kept=kept, flops=stages.flops(run.model, state["layout"], own),
        )  # fmt: skip

    def grown(self, table, epoch):
        """(width,) bool: the channels that are not newborn in an epoch."""
        return epoch - torch.tensor(table["born"]) > self.grace

    def groups(self, run):
        """[(group, None or (width,) 1 where a channel is penalised)], producers' rows first; found anew in
        every epoch.
        """
        state = run.state[self]
        if state["groups"]["epoch"] != run.epoch:
            found = []
            for node in surgery.trace(run.model).nodes:
                grown = self.grown(state["channels"][node.name], run.epoch)
                mask = None if grown.all() else grown.to(run.device, torch.float32)
                found += [(place, mask) for place in places([node], self.prune.rule)]
            state["groups"] = {"epoch": run.epoch, "places": sorted(found, key=lambda f: f[0][1])}
        kept = state["groups"]["places"]
        return list(
            zip(weights(run.model, [place for place, _ in kept]), [mask for _, mask in kept], strict=True)
        )

    def trace(self, run):
        """The run so far, as the decision sees it; every growth is free as yet."""
        state = run.state[self]
        epochs = tuple(
            Epoch(**{**e, "stages": tuple(replace(Stage(**s), widen=0.0, deepen=0.0) for s in e["stages"])})
            for e in state["epochs"]
        )
        actions = tuple(
            (e, Action(kind=kind, stage=stage, reason=reason)) for e, kind, stage, reason in state["actions"]
        )
        return Trace(
            epochs=epochs, actions=actions, frozen=frozenset(tuple(f) for f in state["frozen"]), spent=state["spent"] + state["looked"],
            projected=self.rest(run, partial(self.about, run), self.least(run)), budget=state["budget"], lam=state["lambda"],
            idle=state["idle"], pressed=state["pressed"] / len(run.batches), images=min(self.held, len(run.decide)),
            over=run.schedule.position >= self.search * run.schedule.planned, seed=run.seed,
        )  # fmt: skip

    def least(self, run):
        """Steps that must still be affordable after a growth: those left of the recipe's, and all of
        FINAL.
        """
        return max(
            min(run.schedule.planned, run.steps) - run.step,
            math.ceil((1 - self.search) * min(run.schedule.planned, run.steps)),
        )

    def prices(self, run, stage, growths):
        """{"widen": FLOPs that it would add to the rest of the run, "deepen": ...} of a stage (its number),
        of some growths.

        Infinite where it cannot be, and behind the first that can be: only a choice at random looks further.
        """
        found, full = dict.fromkeys(GROWTH, math.inf), math.prod(run.dataset.shape[1:])
        for growth in (g for g in self.order if g in growths):
            more = self.added(run.model, run.state[self]["layout"], stage, growth, self.prune.blocks(run))
            if more is not None:
                pixel = more * run.batches.batch_size / full
                found[growth] = self.rest(
                    run, lambda size, pixel=pixel: pixel * math.prod(size), self.least(run)
                )
                if self.where != "random":
                    break
        return found

    def added(self, model, layout, stage, growth, multiple=16):
        """FLOPs that a growth would add to an image's training step; None where it cannot be. Tried on a twin
        without any numbers in it.
        """
        twin = copy.deepcopy(model).to("meta")
        before = {m: name for name, m in twin.named_modules()}
        try:
            with models.seeded(0):  # draws of constructors must not shift those of the run
                self.enlarge(
                    twin, layout, stage, growth, multiple, breaker="none", generator=torch.Generator()
                )
        except BadInput:
            return None
        return stages.flops(twin, stages.follow(layout, before, twin, stage)) - stages.flops(model, layout)

    def enlarge(self, model, layout, stage, growth, multiple, optimizer=None, **kwargs):
        """`grow_` with this method's settings."""
        return grow_(
            model,
            layout,
            stage,
            growth,
            optimizer,
            factor=self.factor,
            multiple=multiple,
            trunk=self.trunk,
            **kwargs,
        )

    def decided(self, run):
        """The decision, or what the plan says."""
        if self.plan is None:
            trace = self.trace(run)
            action = decide(trace, self)
            if (
                action.kind in GROWTH
            ):  # what growth costs takes time to find out, and tells nothing where there is none
                gone, now = trace.frozen | set(action.freeze), trace.now
                left = [[g for g in GROWTH if (s.name, g) not in gone] for s in now.stages]
                priced = tuple(replace(s, **self.prices(run, i, left[i])) for i, s in enumerate(now.stages))
                action = decide(
                    replace(trace, epochs=(*trace.epochs[:-1], replace(now, stages=priced))), self
                )
            return action
        steps = [s for s in self.plan if s[0] == run.epoch and s[1] != "wait"]
        return (
            Action(kind=steps[0][1], stage=steps[0][2], reason="as planned")
            if steps
            else Action(kind="wait", reason="as planned")
        )

    def act(self, run, action):
        """Carry an action out, with the cuts that are due, and note both."""
        state, names = run.state[self], stages.names(run.state[self]["layout"])
        growth = action.kind in GROWTH
        stage = names.index(choose("stage", action.stage, names)) if growth else None
        how = dict(multiple=self.prune.blocks(run), rule=self.prune.rule)
        how["spare"] = {n: ~self.grown(t, run.epoch + 1) for n, t in state["channels"].items()}
        cut = state["lambda"] and ((run.epoch + 1) % self.prune.every == 0 or growth or action.kind == "stop")
        done = []
        if growth or (cut and anything_dead(run.model, **how)):
            run.restructure(partial(self.restructure, run, action, stage, how, done))
        if action.kind != "wait":
            state["actions"].append([run.epoch, action.kind, action.stage, action.reason])
        state["frozen"] += [list(f) for f in action.freeze if list(f) not in state["frozen"]]
        if action.kind == "stop":
            state["final"] = run.schedule.position
        seen = {k: v for k, v in state["epochs"][-1].items() if k not in ("epoch", "stages")}
        seen["stages"] = [
            {k: v for k, v in s.items() if k not in GROWTH} for s in state["epochs"][-1]["stages"]
        ]
        run.log(
            self, f"epoch {run.epoch}: {action}" + "".join(f"; {d}" for d in done), seen=seen, done=done,
            action={"epoch": run.epoch, "kind": action.kind, "stage": action.stage, "reason": action.reason},
            flops=state["spent"] + state["looked"], seconds=run.clock.seconds,
        )  # fmt: skip

    def restructure(self, run, action, stage, how, done, model, optimizer):
        """Cut, then grow; and keep the tables of layers and channels."""
        state, cuts = run.state[self], {}
        x, y = (run.ranks.whole(t) for t in state["batch"])
        before = {m: name for name, m in model.named_modules()}
        owners = stages.owners(surgery.trace(model))
        done += prune_(model, optimizer, cuts=cuts, **how)
        if stage is not None:
            done += self.enlarge(model, state["layout"], stage, action.kind, how["multiple"], optimizer, breaker=self.breaker, x=x, y=y,
                                 generator=run.generator(self))  # fmt: skip
        state["layout"] = stages.follow(state["layout"], before, model, stage)
        state["channels"], new = stages.carry(
            state["channels"], owners, before, surgery.trace(model), cuts, run.epoch
        )
        if action.kind == "widen":
            state["newborn"][action.stage] = [run.epoch, new]


def _key(size):
    return f"{size[0]} x {size[1]}"
