"""The thesis' own procedure: prune while training, and where little was pruned let the network grow.

Four lines of the thesis (2019): train the baseline from the first epoch on; prune it while it trains; train
until one more epoch improves nothing; look at how much was pruned in the last epochs to decide whether the
network should become wider or deeper. What is new in it is the use of the recent pruning rate as a diagnosis:
a penalty that removes all that is not needed tells where no capacity was spare.

Pruning is PruneTrain's (chapter 6.1), growth Net2Net's (6.2), both exact here; the decision is
`effilib.methods.decision.decide`, what is done to the network `effilib.methods.growth`. A run has two phases:
SEARCH, at a constant learning rate and under the penalty, and FINAL, without either, the rate falling to 0.
"""

import copy
import itertools
import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from effilib import seeds, surgery
from effilib.errors import BadInput, choose
from effilib.history import History
from effilib.hooks import Method
from effilib.methods import Info
from effilib.methods.decision import GROWTH, KINDS, Action, Epoch, Policy, Stage, Trace, decide
from effilib.methods.group_lasso import group_norms, group_weight, places, shrink_, shrink_steps, weights
from effilib.methods.growth import going, grow_, price, step_flops, strengths, validate
from effilib.methods.prune_train import PruneTrain, anything_dead, live, prune_
from effilib.methods.widening import BREAKERS
from effilib.run import Run
from effilib.surgery import stages

__all__ = ["GENTLE", "PruneThenGrow", "decisions"]

INFO = Info(
    name="Prune, then grow",
    name_de="Beschneiden, dann wachsen",
    chapter="II.9",
    paper="the thesis, 2019",
    claim="What was pruned lately tells whether a network lacks width or depth, so that it is improved in "
    "less time than by trying (aim here: 0.55 of the time of successive halving on 2 CPU cores).",
    cost_model="Early steps cost what the small network costs; each growth adds its FLOPs to the steps "
    "that are left. Added are a pass over the weights a step, a look at held-out images an epoch, and some "
    "milliseconds of surgery. All is held within a budget of FLOPs.",
    applies="networks whose right shape is not known",
)

# What lives keeps its scale: under BatchNorm that is its learning rate.
GENTLE = PruneTrain(weigh="norm", rule="readers", keep_scale=True)


def decisions(history: History) -> tuple[tuple[int, str, str], ...]:
    """Return what a run decided: (epoch, kind, stage), waiting left out.

    `PruneThenGrow(plan=...)` does the same again.

    >>> action = {"epoch": 3, "kind": "widen", "stage": "stage 1", "reason": "it lost nothing"}
    >>> decisions(History(events=[{"method": "PruneThenGrow", "action": action}]))
    ((3, 'widen', 'stage 1'),)
    """
    events = [e["action"] for e in history.events if e["method"] == PruneThenGrow.__name__ and "action" in e]
    return tuple((a["epoch"], a["kind"], a["stage"]) for a in events if a["kind"] != "wait")


@dataclass(frozen=True, kw_only=True)
class PruneThenGrow(Policy, Method):
    """Prune while training, then grow.

    Raises `BadInput` for a network that cannot be pruned or cannot grow. When and where it grows: see
    `Policy`, whose settings are this method's. A method that resizes images comes before this one, says so by
    `phases(shape, steps)` as `KernelRescaling` does, and leaves kernels.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=3), [PruneThenGrow()])
    >>> history.events[-1]["text"]
    '... growths; ... of the budget spent, ...% of it to look at held-out images'
    """

    # PruneTrain without `until`, `at`, `grow_batch` and the published mode; with a ratio of 0 there is no
    # penalty.
    prune: PruneTrain = GENTLE
    # Share of the steps after which the penalty has removed a channel that no gradient holds, at the full
    # learning rate; 0: lambda comes from PruneTrain's ratio.
    idle: float = 0.15
    factor: float = 1.5  # of the channels, by widening
    breaker: str = "pair"  # of symmetry, see `widening.widen_`
    grace: int = 1  # epochs in which newborn channels are neither penalised nor cut
    search: float = 0.6  # share of the schedule that SEARCH takes at most
    # FLOPs that the run may cost, looking at images included, relative to the network as given, trained for
    # the recipe's steps on full-size images. With 1 growth may use what pruning and small images save.
    budget: float = 1.0
    images: int = 1000  # looked at after an epoch of SEARCH
    plan: tuple | None = None  # do not decide, do what another run did: `decisions(history)`

    def __post_init__(self):
        super().__post_init__()
        choose("symmetry breaker", self.breaker, (*BREAKERS, "gradmax"))
        p = self.prune
        if p.mode != "proximal" or p.until != 1 or p.at or p.grow_batch:
            raise BadInput(
                "PruneThenGrow: prune is PruneTrain in its proximal mode, without until, at and grow_batch"
            )
        if (
            not 0 < self.search < 1
            or not 0 <= self.idle < 1
            or self.factor <= 1
            or self.budget <= 0
            or self.images < 1
        ):
            raise BadInput(
                "PruneThenGrow: search lies in (0, 1), idle in [0, 1), factor is above 1, budget above 0, "
                "at least 1 image is looked at"
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

    def on_fit_start(self, run: Run) -> None:
        model, shape = run.model, run.dataset.shape
        surgery.nodes(model)  # refuses what has none
        layout = stages.find(model, shape)
        if self.growths and all(
            self._added(model, layout, self._images(run), i, g) is None
            for i in range(len(layout["pixels"]))
            for g in GROWTH
        ):
            raise BadInput(f"PruneThenGrow: no stage of {type(model).__name__} can become wider or deeper")
        run.schedule.lr_at = partial(self._lr_at, run)
        run.state[self] = {
            "lambda": None, "idle": math.inf, "pressed": 0.0, "final": None,  # penalty and schedule
            "budget": 0.0, "spent": 0.0, "looked": 0.0, "flops": {"structure": -1},
            "layout": layout, "channels": stages.table(surgery.trace(model)), "newborn": {},
            "groups": {"epoch": None},
            "epochs": [], "actions": [], "frozen": [],  # what the decision sees
            "sums": [0.0, 0.0, 0], "steps": {}, "batch": None, "size": shape[1:],  # of this epoch
        }  # fmt: skip
        run.state[self]["budget"] = self.budget * run.schedule.planned * self._step_cost(run, shape[1:])
        self._fit_budget(run)

    def on_epoch_start(self, run: Run) -> None:
        self._groups(run)

    def on_batch(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = run.state[self]
        state["batch"], state["size"] = (x, y), tuple(x.shape[2:])
        return x, y

    def loss_terms(self, run: Run) -> None:
        state = run.state[self]
        if state["lambda"] is None:
            lam, steps = self._coefficient(run)
            state["lambda"], state["idle"] = lam, steps / len(run.batches)
            run.log(
                self,
                f"lambda = {lam:.3g}: a channel that no gradient holds is gone after {state['idle']:.1f} "
                "epochs",
                lam=lam,
            )

    def on_step_end(self, run: Run) -> None:
        state, (_, y) = run.state[self], run.state[self]["batch"]
        key = _key(state["size"])
        state["steps"][key] = state["steps"].get(key, 0) + 1
        loss, correct, n = state["sums"]
        state["sums"] = [loss + run.loss, correct + (run.logits.argmax(1) == y).sum(), n + len(y)]
        if state["lambda"] and state["final"] is None:
            state["pressed"] += run.lr / run.recipe.lr
            kappa = run.lr * state["lambda"] / (1 - run.recipe.momentum)
            for group, grown in self._groups(run):
                mine = kappa if grown is None else kappa * grown
                shrink_([group], mine, self.prune.weigh, self.prune.keep_scale)

    def on_epoch_end(self, run: Run) -> None:
        state = run.state[self]
        state["spent"] += sum(
            n * self._step_cost(run, map(int, key.split(" x "))) for key, n in state["steps"].items()
        )
        if run.step < run.steps:
            if state["final"] is None:
                self._observe(run)
                self._act(run, run.ranks.agree(self._decided(run)))
            self._fit_budget(run)
        state["batch"], state["sums"], state["steps"] = None, [0.0, 0.0, 0], {}

    def on_fit_end(self, run: Run) -> None:
        state = run.state[self]
        done = [a for a in state["actions"] if a[1] in GROWTH]
        if self.plan is not None and len(state["actions"]) < len([s for s in self.plan if s[1] != "wait"]):
            raise BadInput(
                f"PruneThenGrow: the plan goes on after epoch {run.epoch}, where this run ends or its search "
                "was over"
            )
        total = state["spent"] + state["looked"]
        looking = f"{state['looked'] / max(total, 1):.1%} of it to look at held-out images"
        text = f"{len(done)} growths; {total / state['budget']:.3f} of the budget spent, {looking}"
        with run.clock.paused():  # for the record
            found, layout = surgery.trace(run.model), state["layout"]
            nodes = {name: stages.members(found, layout, i) for i, name in enumerate(stages.names(layout))}
            ends = [{"name": name, "widths": [n.width for n in own]} for name, own in nodes.items()]
        spent = dict(spent=state["spent"], looked=state["looked"], budget=state["budget"])
        run.log(self, text, **spent, stages=ends)

    # Schedule and budget

    def _lr_at(self, run, position, planned):
        """Warmed up as the recipe says, constant in SEARCH, linearly to 0 in FINAL."""
        rise, state = run.recipe.warmup * planned, run.state[self]
        final = min(self.search * planned, math.inf if state["final"] is None else state["final"])
        if position < rise:
            return run.recipe.lr * (position + 1) / (math.floor(rise) + 1)
        return run.recipe.lr * min(1.0, max(0.0, (planned - position) / (planned - max(final, rise))))

    @torch.no_grad()
    def _coefficient(self, run):
        """(lambda, steps after which it has removed a mean group that no gradient holds), from a batch."""
        groups = [g for g, _ in self._groups(run)]
        norms = [(group_norms(*g) / group_weight(*g, self.prune.weigh)).cpu() for g in groups]
        norm = torch.cat(norms).mean().item()
        how = run.recipe.lr, run.recipe.momentum, run.recipe.weight_decay
        if not self.idle or not self.prune.ratio:
            lam = self.prune.price(run, groups)[0]
            return lam, shrink_steps(norm, lam, *how) if lam else math.inf
        steps = self.idle * run.schedule.planned
        return run.ranks.agree(price(steps, norm, *how)), steps

    def _step_cost(self, run, size):
        """FLOPs of a step of the network as it is now, on images of a size. Never called within a step, where
        the run itself may count.
        """
        size, kept = tuple(size), run.state[self]["flops"]
        if kept["structure"] != run.structures:
            kept = run.state[self]["flops"] = {"structure": run.structures}
        if _key(size) not in kept:
            kept[_key(size)] = step_flops(run.model, (run.dataset.shape[0], *size), run.batches.batch_size)
        return kept[_key(size)]

    def _scaled_cost(self, run, size):
        """FLOPs of a step on images of a size, scaled from the current one by pixels: counting takes time."""
        now = run.state[self]["size"]
        return self._step_cost(run, now) * math.prod(size) / math.prod(now)

    def _rest(self, run, step_cost):
        """FLOPs of the remaining steps, looking at images included. step_cost: size -> FLOPs of a step."""
        begin, end, shape = run.schedule.position, run.schedule.planned, run.dataset.shape
        resizer = next((m for m in run.methods if hasattr(m, "phases")), None)
        phases = [(0, shape[1:])]
        if resizer:
            phases = [(start, size) for start, size, *_ in resizer.phases(shape, end)]
        search = end * self.search if run.state[self]["final"] is None else begin
        total = 0.0
        for (first, size), (last, _) in itertools.pairwise([*phases, (end, None)]):
            steps, looking = (
                max(0.0, min(last, stop) - max(first, begin)) / (end - begin) * (run.steps - run.step)
                for stop in (end, search)
            )
            total += step_cost(tuple(size)) * (steps + looking * self._look_share(run))
        return total

    def _look_share(self, run):
        """What looking at held-out images adds to a step, relative to it: their forward pass, a third of a
        step, once an epoch.
        """
        return min(self.images, len(run.decide)) / (3 * run.batches.batch_size * len(run.batches))

    def _fit_budget(self, run):
        """Shorten the run where the remaining steps would exceed the budget."""
        state, left = run.state[self], run.steps - run.step
        step = self._rest(run, partial(self._scaled_cost, run)) / left
        affordable = max(1, int((state["budget"] - state["spent"] - state["looked"]) / step))
        if affordable < left:
            run.replan(affordable)

    # What is seen, decided and done at an epoch's end

    def _observe(self, run):
        """Note the epoch: losses, and of every stage its widths, and what died of it."""
        state, before = run.state[self], run.kind
        run.kind = "validate"
        loss, accuracy = run.ranks.agree(validate(run, self.images, state["size"]))
        run.kind = before
        state["looked"] += self._look_share(run) * len(run.batches) * self._step_cost(run, state["size"])
        structure = surgery.trace(run.model)
        per_layer = stages.flops(run.model, run.dataset.shape)
        seen = tuple(
            self._stage(run, structure, per_layer, i, name)
            for i, name in enumerate(stages.names(state["layout"]))
        )
        total, correct, n = (float(v) for v in state["sums"])
        correct, n = (sum(counts) for counts in zip(*run.ranks.gather((correct, n)), strict=True))
        batches = n / run.batches.batch_size
        how = dict(train_loss=total / batches, train_accuracy=100 * correct / n, loss=loss, accuracy=accuracy)
        state["epochs"].append(asdict(Epoch(epoch=run.epoch, **how, stages=seen, size=state["size"])))

    def _stage(self, run, structure, flops, number, name):
        """A stage as the decision sees it; the channels' table is brought up to date. flops: by layer."""
        state = run.state[self]
        window = max(self.window, math.ceil(min(state["idle"], run.schedule.planned)))
        nodes = stages.members(structure, state["layout"], number)
        total = lost = leaving = 0.0
        (birth, born), kept = state["newborn"].get(name, (None, 0)), 0
        for node in nodes:
            table = state["channels"][node.name]
            alive = live(node, rule=self.prune.rule)
            strength = strengths(node, self.prune.rule, self.prune.weigh)
            grown = self._grown(table, run.epoch)
            was, now = grown & torch.tensor(table["alive"]), grown & alive
            each = sum(flops.get(p, 0) for p in {*node.producers, *node.consumers}) / node.width
            total += each * int(was.sum())
            lost += each * (int(was.sum()) - int(now.sum()))
            leaving += each * int((now & going(strength, torch.tensor(table["strength"]), window)).sum())
            kept += sum(a and b == birth for a, b in zip(alive.tolist(), table["born"], strict=True))
            table["alive"], table["strength"] = alive.tolist(), strength.tolist()
        own = {p for n in nodes for p in n.producers}
        penalised = total and state["lambda"]  # weight decay alone shrinks all channels and removes none
        return Stage(
            name=name,
            depth=stages.depth(structure, state["layout"], number),
            widths=tuple(n.width for n in nodes),
            live=tuple(sum(state["channels"][n.name]["alive"]) for n in nodes),
            lost=max(0.0, lost / total) if total else 0.0,
            pending=leaving / total if penalised else 0.0,
            born=born,
            kept=kept,
            flops=sum(flops.get(p, 0) for p in own),
        )

    def _grown(self, table, epoch):
        """(width,) bool: the channels that are not newborn in an epoch."""
        return epoch - torch.tensor(table["born"]) > self.grace

    def _groups(self, run):
        """[(group, None or (width,) 1 where a channel is penalised)], producers' rows first; found anew in
        every epoch.
        """
        state = run.state[self]
        if state["groups"]["epoch"] != run.epoch:
            found = []
            for node in surgery.trace(run.model).nodes:
                grown = self._grown(state["channels"][node.name], run.epoch)
                mask = None if grown.all() else grown.to(run.device, torch.float32)
                found += [(place, mask) for place in places([node], self.prune.rule)]
            state["groups"] = {"epoch": run.epoch, "places": sorted(found, key=lambda f: f[0][1])}
        found, masks = zip(*state["groups"]["places"], strict=True)
        return list(zip(weights(run.model, found), masks, strict=True))

    def _trace(self, run):
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
            epochs=epochs,
            actions=actions,
            frozen=frozenset(tuple(f) for f in state["frozen"]),
            spent=state["spent"] + state["looked"],
            projected=self._rest(run, partial(self._scaled_cost, run)),
            budget=state["budget"],
            lam=state["lambda"],
            idle=state["idle"],
            pressed=state["pressed"] / len(run.batches),
            images=min(self.images, len(run.decide)),
            over=run.schedule.position >= self.search * run.schedule.planned,
        )

    def _prices(self, run, stage, growths):
        """What some growths of a stage (its number) would add to the FLOPs of the remaining steps, by growth.

        Infinite where it cannot be, and behind the first that can be.
        """
        found, full = dict.fromkeys(GROWTH, math.inf), math.prod(run.dataset.shape[1:])
        for growth in (g for g in self.order if g in growths):
            how = run.state[self]["layout"], self._images(run), stage, growth, self.prune.blocks(run)
            more = self._added(run.model, *how)
            if more is not None:
                pixel = more * run.batches.batch_size / full
                found[growth] = self._rest(run, lambda size, pixel=pixel: pixel * math.prod(size))
                break
        return found

    @staticmethod
    def _images(run):
        """Images on which growth is tried."""
        return run.dataset.normalize(run.dataset.train.x[:16])

    def _added(self, model, layout, x, stage, growth, multiple=16):
        """FLOPs that a growth would add to an image's training step; None where it cannot be: tried on a
        twin.
        """
        twin, shape = copy.deepcopy(model), x.shape[1:]
        try:
            with seeds.seeded(0):  # draws of constructors must not shift those of the run
                how = dict(multiple=multiple, breaker="none", generator=torch.Generator(), x=x)
                self._enlarge(twin, layout, stage, growth, **how)
        except BadInput:
            return None
        return sum(stages.flops(twin, shape).values()) - sum(stages.flops(model, shape).values())

    def _enlarge(self, model, layout, stage, growth, **kwargs):
        """`grow_` with this method's settings."""
        return grow_(model, layout, stage, growth, factor=self.factor, **kwargs)

    def _decided(self, run):
        """The decision, or what the plan says."""
        if self.plan is None:
            trace = self._trace(run)
            action = decide(trace, self)
            # What growth costs takes time to find out, and tells nothing where there is none.
            if action.kind in GROWTH:
                gone, now = trace.frozen | set(action.freeze), trace.now
                left = [[g for g in GROWTH if (s.name, g) not in gone] for s in now.stages]
                priced = tuple(replace(s, **self._prices(run, i, left[i])) for i, s in enumerate(now.stages))
                action = decide(
                    replace(trace, epochs=(*trace.epochs[:-1], replace(now, stages=priced))), self
                )
            return action
        step = next((s for s in self.plan if s[0] == run.epoch and s[1] != "wait"), (run.epoch, "wait", ""))
        return Action(kind=step[1], stage=step[2], reason="as planned")

    def _act(self, run, action):
        """Carry an action out, with the cuts that are due, and note both."""
        state, names = run.state[self], stages.names(run.state[self]["layout"])
        growth = action.kind in GROWTH
        stage = names.index(choose("stage", action.stage, names)) if growth else None
        how = dict(multiple=self.prune.blocks(run), rule=self.prune.rule)
        how["spare"] = {n: ~self._grown(t, run.epoch + 1) for n, t in state["channels"].items()}
        cut = state["lambda"] and ((run.epoch + 1) % self.prune.every == 0 or growth or action.kind == "stop")
        done = []
        if growth or (cut and anything_dead(run.model, **how)):
            run.restructure(partial(self._restructure, run, action, stage, how, done))
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

    def _restructure(self, run, action, stage, how, done, model, optimizer):
        """Cut, then grow; and keep the tables of layers and channels."""
        state, cuts = run.state[self], {}
        x, y = (run.ranks.whole(t) for t in state["batch"])
        before = {m: name for name, m in model.named_modules()}
        owners = stages.owners(surgery.trace(model))
        done += prune_(model, optimizer, cuts=cuts, x=x[:16], **how)
        if stage is not None:
            how = dict(multiple=how["multiple"], breaker=self.breaker, generator=run.generator(self))
            done += self._enlarge(
                model, state["layout"], stage, action.kind, optimizer=optimizer, x=x, y=y, **how
            )
        state["layout"] = stages.follow(state["layout"], before, model, stage)
        state["channels"], new = stages.carry(
            state["channels"], owners, before, surgery.trace(model), cuts, run.epoch
        )
        if action.kind == "widen":
            state["newborn"][action.stage] = [run.epoch, new]


def _key(size):
    return f"{size[0]} x {size[1]}"
