"""Methods in a plain PyTorch loop: the same weights as in `train`, other optimizers, loaders, trainers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from effilib import data, models
from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.methods.column_row_sampling import ColumnRowSampling
from effilib.methods.data_pruning import DataPruning
from effilib.methods.freezing import FrozenPrefix
from effilib.methods.gradient_pruning import GradientPruning
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.mixed_precision import MixedPrecision
from effilib.methods.muon import Muon
from effilib.methods.net2net import Net2Net
from effilib.methods.prune_then_grow import PruneThenGrow
from effilib.methods.prune_train import PruneTrain
from effilib.methods.ranked_cut import RankedCut
from effilib.methods.speed_run import FastBiases, Lookahead, PartialIdentity
from effilib.methods.whitening import Whitening
from effilib.own_loop import attach
from effilib.recipe import Recipe
from effilib.seeds import stream
from effilib.training import train

RECIPE = Recipe(epochs=4, batch_size=32, lr=0.1, precision="fp64")
RESIZED = KernelRescaling(schedule=((0.5, 0.5), (0.5, 1.0)), kernels=False)
DECIDE = (torch.randn(16, 1, 8, 8), torch.arange(16) % 4)
CUT = PruneTrain(ratio=0.9, scale=40.0, multiple=1)


def net(seed=1):
    return models.build("resnet", 4, (1, 8, 8), seed=seed, widths=(8, 16), blocks=(1, 1))


def sgd(model, **how):
    settings = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4) | how
    return torch.optim.SGD(model.parameters(), **settings)


def loop(run, epochs, scaler=None, accumulate=1, scheduler=None):
    """What anybody writes by hand."""
    for _ in range(epochs):
        for i, (x, y) in enumerate(run.read(), 1):
            logits = run.model(x)
            loss = run.add_terms(F.cross_entropy(logits, y), logits) / accumulate
            (scaler.scale(loss) if scaler else loss).backward()
            if i % accumulate == 0:
                run.update(scaler)
                if scheduler:
                    scheduler.step()
    return run


METHODS = {
    "nothing": (),
    "column sampling": (ColumnRowSampling(ratio=0.5, minimal=4, block=4, until=0.7),),
    "gradient pruning": (GradientPruning(p=0.9),),
    "PruneTrain": (CUT,),
    "resizing": (RESIZED,),
    "freezing": (FrozenPrefix(at=(0.5,)),),
    "freezing, annealed": (FrozenPrefix(at=(0.5,), anneal=True),),
    "data pruning": (DataPruning(),),
    "growth": (Net2Net(at=0.5, wider=1.5),),
    "prune, then grow": (PruneThenGrow(),),
    "several": (RESIZED, CUT),
    "Muon": (Muon(),),
    "lookahead": (Lookahead(),),
    "fast biases": (FastBiases(),),
    "partial identity": (PartialIdentity(),),
    "whitening": (Whitening(patches=500, learns=0.5),),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_hand_written_loop_gives_the_weights_that_train_gives(name):
    dataset = data.load("synthetic")
    theirs, methods = net(), METHODS[name]
    history = train(theirs, dataset, RECIPE, methods, evaluations=1)

    double = replace(dataset, dtype=torch.float64)
    mine = net().double().to(memory_format=torch.channels_last)
    loader = double.shuffled(32, stream(0, "data"))
    optimizer = sgd(mine, fused=True)
    run = attach(mine, optimizer, methods, steps=4 * len(loader), loader=loader, recipe=RECIPE)
    loop(run, 4)

    assert run.step == history.steps
    assert [e["text"] for e in run.events] == [e["text"] for e in history.events]
    assert name != "PruneTrain" or any("pruned" in e for e in run.events)
    expected = theirs.state_dict()
    assert expected.keys() == run.model.state_dict().keys()
    for key, value in run.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
    plain = net()
    train(plain, dataset, RECIPE)
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), theirs.parameters(), strict=False))
    assert same == (name == "nothing")  # the method has an effect


class Plain(torch.utils.data.Dataset):
    """Pictures as floats with their numbers, as a user's own data set has them."""

    def __init__(self, n=96):
        g = torch.Generator().manual_seed(0)
        self.y = torch.arange(n) % 4
        self.x = torch.randn(n, 1, 8, 8, generator=g) + self.y.view(-1, 1, 1, 1)
        self.asked = []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.x[i], self.y[i]


def loader(dataset=None, batch_size=16, **how):
    settings = dict(shuffle=True, generator=torch.Generator().manual_seed(3)) | how
    return DataLoader(dataset or Plain(), batch_size=batch_size, **settings)


def test_without_a_method_it_is_the_plain_loop_also_with_a_scheduler():
    def make():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12), loader()

    mine, optimizer, scheduler, batches = make()
    for _ in range(2):
        for x, y in batches:
            F.cross_entropy(mine(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    theirs, optimizer, scheduler, batches = make()
    loop(attach(theirs, optimizer, [], steps=12, loader=batches), 2, scheduler=scheduler)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # attach has looked at the data, and left the loader's random state alone


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_adamw_follows_a_cut_in_mid_training(how):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **how)
    before = sum(p.numel() for p in model.parameters())
    run = attach(model, optimizer, [PruneTrain(ratio=0.9, scale=60.0, multiple=1)], steps=24, loader=loader())
    loop(run, 4)
    assert sum(p.numel() for p in run.model.parameters()) < before
    assert set(optimizer.param_groups[0]["params"]) == set(run.model.parameters())
    for p in run.model.parameters():
        moments = [t for name, t in optimizer.state[p].items() if name.startswith("exp_avg")]
        assert moments
        assert all(t.shape == p.shape and t.stride() == p.stride() for t in moments)
        assert any(t.any() for t in moments)
        assert all(t.isfinite().all() for t in moments)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def trained(batch_size, accumulate):
        model = models.build("convnet", 4, (1, 8, 8), seed=1, widths=(8, 8), bn=False).double()
        dataset = Plain()
        dataset.x = dataset.x.double()
        batches = loader(dataset, batch_size)
        methods = [FrozenPrefix(at=(0.5,)), RESIZED]
        how = dict(steps=12, loader=batches, accumulate=accumulate)
        return loop(attach(model, sgd(model, lr=0.02), methods, **how), 4, accumulate=accumulate)

    whole, parts = trained(32, 1), trained(8, 4)
    assert whole.step == parts.step == 12
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any("frozen" in e["text"] for e in parts.events)


def test_a_gradient_scaler_changes_nothing_but_overflow():
    def trained(scaler):
        model = net()
        methods = [GradientPruning(p=0.5), FrozenPrefix(at=(0.5,)), RESIZED]
        run = attach(model, sgd(model), methods, steps=12, loader=loader())
        return loop(run, 2, scaler).model

    plain, scaled = trained(None), trained(torch.amp.GradScaler("cpu", init_scale=1024.0))
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # pruned gradients are drawn alike


@pytest.mark.parametrize("method", [GradientPruning(), Muon(), RankedCut(multiple=1, price="FLOPs")])
def test_a_step_that_overflows_is_skipped_and_counted(method):
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run = attach(model, sgd(model), [method], steps=9, loader=loader(batch_size=96))
    before = [p.clone() for p in model.parameters()]
    for x, y in run.read():
        logits = run.model(x)
        scaler.scale(run.add_terms(1e4 * F.cross_entropy(logits, y), logits)).backward()
        run.update(scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(score.isfinite().all() for score in run.state[method].get("scores", {}).values())
    assert run.step == 1
    assert scaler.get_scale() < 2.0**127


def test_data_pruning_chooses_what_a_loader_yields_and_knows_which_images_these_are():
    dataset, model = Plain(), net()
    method = DataPruning(ratio=0.9, full=0.25)
    run = attach(model, sgd(model), [method], steps=24, loader=loader(dataset, drop_last=True))
    for epoch in range(4):
        dataset.asked, seen = [], []
        for x, y in run.read():
            assert torch.equal(dataset.y[run.batches.index], y)
            assert torch.equal(dataset.x[run.batches.index], x)
            seen += run.batches.index.tolist()
            logits = run.model(x)
            run.add_terms(F.cross_entropy(logits, y), logits).backward()
            run.update()
        chosen = range(96) if run.batches.chosen is None else run.batches.chosen.tolist()
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(chosen)
        assert (len(seen) < 96) == (epoch in (1, 2))  # losses are known after the first; the last takes all
    assert run.finished
    assert run.step == run.steps < 24


def test_what_a_method_needs_is_asked_for_in_words_and_nothing_has_changed():
    few = torch.utils.data.SubsetRandomSampler(range(48))
    cases = [
        (dict(methods=[PruneThenGrow()], decide=DECIDE), "PruneThenGrow.* attach\\(recipe="),
        (dict(methods=[FrozenPrefix(anneal=True)]), "FrozenPrefix.* attach\\(recipe="),
        (dict(methods=[PruneTrain(scale="schedule")]), "PruneTrain.* attach\\(recipe="),
        (dict(methods=[PruneThenGrow()], recipe=Recipe()), "PruneThenGrow.* attach\\(decide="),
        (dict(methods=[DataPruning()], loader=[next(iter(loader()))] * 4), "DataPruning.* DataLoader"),
        (dict(methods=[DataPruning()], loader=loader(shuffle=False, sampler=few)), "DataPruning.* sampler"),
        (dict(methods=[GradientPruning(), MixedPrecision()]), "MixedPrecision.* effilib.train"),
        (dict(methods=[]), "steps is 0"),
        (dict(methods=[], loader=iter(loader())), "anew each time"),
        (dict(methods=[], loader=[]), "no batch"),
        (dict(methods=[Method]), "an instance of effilib.Method"),
    ]
    for how, said in cases:
        model = net()
        optimizer, before = sgd(model), str(model)
        weights = [p.clone() for p in model.parameters()]
        settings = dict(steps=0 if "steps" in said else 24, loader=loader()) | how
        with pytest.raises(BadInput, match=f"(?s){said}"):
            attach(model, optimizer, **settings)
        assert str(model) == before
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert not optimizer.state
        assert len(optimizer.param_groups) == 1


def test_a_loop_may_leave_its_epochs_by_break():
    model = net()
    before = str(model)
    run = attach(model, sgd(model), [FrozenPrefix()], steps=8, loader=loader())
    for epoch in range(4):
        assert run.epoch == max(0, epoch - 1)  # the next `read` ends it
        for i, (x, y) in enumerate(run.read(), 1):
            logits = run.model(x)
            run.add_terms(F.cross_entropy(logits, y), logits).backward()
            run.update()
            if i == 2:
                break
        assert (str(model) != before) == (epoch in (1, 2))
    assert run.finished
    assert run.epoch == 4
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [FrozenPrefix(), CUT], ids=["freezing", "PruneTrain"])
def test_an_optimizer_may_leave_out_what_is_not_fine_tuned(method):
    model = net()
    for p in (own := model.get_submodule("stages.0")).parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = loop(attach(model, optimizer, [method], steps=24, loader=loader()), 4)
    assert any("frozen" in e["text"] or "pruned" in e for e in run.events)
    held = set(optimizer.param_groups[0]["params"])
    assert held == {p for p in run.model.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in own.parameters())


def test_methods_learn_by_a_scheduler_that_warms_up_and_refuse_one_that_was_made_before_their_groups():
    model, shares = net(), []
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=12)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(BadInput, match=r"FastBiases.* make the scheduler after attach"):
        attach(model, optimizer, [PartialIdentity(), FastBiases()], steps=12, loader=loader())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    class Look(Method):
        def on_step_end(self, run):
            shares.append(run.lr / run.recipe.lr)  # by which Muon multiplies its own

    loop(attach(model, optimizer, [Muon(), Look()], steps=12, loader=loader()), 2, scheduler=scheduler)
    assert max(shares) == pytest.approx(1, abs=0.05)


def test_fast_biases_keep_what_decays_and_what_does_not():
    model = net()
    norms = [p for n, p in model.named_parameters() if "bn" in n and "stages" in n]
    rest = [p for p in model.parameters() if p not in set(norms)]
    groups = [{"params": rest, "weight_decay": 0.64}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attach(model, optimizer, [FastBiases()], steps=6, loader=loader())
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[model.bn.bias] == pytest.approx(0.01)
    assert {decays[p] for p in norms} == {0.0}
    assert decays[model.stem.weight] == 0.64


def test_before_an_evaluation_methods_make_the_model_what_it_expects():
    model = net()
    run = attach(model, sgd(model), [*METHODS["column sampling"]], steps=12, loader=loader())
    loop(run, 1)
    before, step = model.bn.running_mean.clone(), run.step
    weights = [p.clone() for p in model.parameters()]
    run.prepare_evaluation()
    assert not torch.equal(model.bn.running_mean, before)  # re-estimated, by exact products
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert run.step == step


def test_a_loop_that_forgets_a_step_or_goes_on_for_too_long_is_told():
    model = net()
    run = attach(model, sgd(model), [], steps=6, loader=loader())
    with pytest.raises(BadInput, match="update"):
        list(run.read())
    loop(run, 1)
    with pytest.raises(BadInput, match="all 6 steps are done"):
        loop(run, 1)


def test_a_run_that_is_stopped_early_leaves_a_plain_model():
    model = net()
    before = str(model)
    run = attach(model, sgd(model), [FrozenPrefix(at=(0.1,)), GradientPruning()], steps=60, loader=loader())
    loop(run, 2)
    assert str(model) != before
    run.finish()
    run.finish()
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


class Trainer:
    """The loop of a trainer class as there are many, with the usual places for callbacks."""

    def __init__(self, callbacks):
        self.callbacks = callbacks

    def tell(self, hook, *what):
        for callback in self.callbacks:
            what = getattr(callback, hook)(self, *what) or what
        return what

    def fit(self, model, optimizer, loader, epochs):
        self.model, self.optimizer, self.loader, self.epochs = model, optimizer, loader, epochs
        self.tell("on_fit_start")
        for _ in range(epochs):
            for x, y in self.tell("on_epoch_start", loader)[0]:
                logits = self.model(x)
                (loss,) = self.tell("on_loss", F.cross_entropy(logits, y), logits)[:1]
                loss.backward()
                self.tell("on_before_optimizer_step")
                optimizer.step()
                optimizer.zero_grad()
                self.tell("on_step_end")
        return self


class Callback:  # what a trainer needs to know of effilib
    def __init__(self, methods):
        self.methods = methods

    def on_fit_start(self, trainer):
        steps = trainer.epochs * len(trainer.loader)
        self.run = attach(trainer.model, trainer.optimizer, self.methods, steps=steps, loader=trainer.loader)

    def on_epoch_start(self, trainer, loader):
        return (self.run.read(),)

    def on_loss(self, trainer, loss, logits):
        return (self.run.add_terms(loss, logits),)

    def on_before_optimizer_step(self, trainer):
        self.run.before_step()

    def on_step_end(self, trainer):
        self.run.after_step()


@pytest.mark.parametrize("methods", [[RESIZED, CUT], [DataPruning(), FrozenPrefix()]], ids=["a cut", "data"])
def test_a_trainer_takes_part_by_a_callback(methods):
    mine, theirs = net(), net()
    loop(attach(mine, sgd(mine), methods, steps=24, loader=loader()), 4)
    callback = Callback(methods)
    Trainer([callback]).fit(theirs, sgd(theirs), loader(), epochs=4)
    assert callback.run.finished
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
