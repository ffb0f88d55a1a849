"""Surgery is never silently wrong: what would change the function is undone and refused in words."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, seeds, surgery
from effilib.errors import BadInput
from effilib.methods.net2net import deepen_, grow_
from effilib.methods.prune_train import dead_paths
from tests.common import exactly, images, make, shake, step

X = images(8, torch.float32)
Y = torch.arange(8) % 5


class Residual(nn.Module):
    """Blocks whose sum goes through `after`; `scale` of the path, `shared`: one norm in both places."""

    def __init__(self, after=F.relu, scale=1.0, twice=False, shared=False):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.after, self.scale, self.twice, self.shared = after, scale, twice, shared
        if isinstance(after, nn.Module):
            self.behind = after

    def path(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        if self.shared:
            x = self.bn1(x)
        path = self.path(x) if self.scale == 1 else self.path(x) * self.scale
        y = self.after(path + x)
        return y + F.relu(self.conv1(y)) if self.twice else y


def net(make_block):
    with seeds.seeded(0):
        blocks = nn.Sequential(make_block(), make_block())
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)]
        return shake(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), blocks, *head))


def both(model, x=X):
    """Outputs in eval and in training mode, statistics left as they were."""
    model = copy.deepcopy(model)
    return torch.stack([model.eval()(x), model.train()(x)]).detach()


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step(model.train(), optimizer, X, Y)
    return optimizer


def untouched(model, optimizer, before, every=True):
    """Whether names, weights, the optimizer's places and its state are what they were."""
    state, momenta, modules, places = before
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == places
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(state) == len(model.state_dict())
    for p, was in momenta.items():
        for k, v in was.items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][k]), torch.as_tensor(v))
    assert len(momenta) == len(optimizer.state)
    if every:  # state is as large as the weights
        exactly(optimizer, model)


def snapshot(model, optimizer):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {p: copy.deepcopy(s) for p, s in optimizer.state.items()},
        {n: id(m) for n, m in model.named_modules()},
        [id(p) for g in optimizer.param_groups for p in g["params"]],
    )


# 7.1 Blocks


def norm():
    return nn.BatchNorm2d(4)


def pointwise():
    return nn.Conv2d(4, 4, 1)


MADE = (norm, pointwise)
CHANGE = {
    "gelu": dict(after=F.gelu),
    "silu": dict(after=F.silu),
    "tanh": dict(after=torch.tanh),
    "sigmoid": dict(after=torch.sigmoid),
    "leaky relu": dict(after=lambda x: F.leaky_relu(x, 0.2)),
    "batch norm": dict(after=norm),
    "pooling": dict(after=lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "convolution": dict(after=pointwise),
    "over root 2": dict(after=lambda x: x / 2**0.5),
    "two residuals": dict(twice=True),
    "a scaled path": dict(scale=0.3),
    "a shared norm": dict(shared=True),
}
KEEP = {
    "relu": dict(after=F.relu),
    "nothing": dict(after=nn.Identity()),
    "dropout": dict(after=nn.Dropout(0.3)),
}


def block(after=F.relu, **kwargs):
    return Residual(after=after() if after in MADE else after, **kwargs)


@pytest.mark.parametrize("what", CHANGE)
def test_a_block_is_not_appended_where_what_follows_its_sum_would_change(what):
    model = net(lambda: block(**CHANGE[what]))
    optimizer = trained(model)
    before = snapshot(model, optimizer)
    with pytest.raises(BadInput, match=r"would change what Sequential computes|unknown residual path"):
        surgery.append_block_(model, "2.1", optimizer, x=X)
    untouched(model, optimizer, before)
    with pytest.raises(BadInput):
        grow_(model, optimizer, X, Y, deeper=("2.1",))
    untouched(model, optimizer, before)


@pytest.mark.parametrize("what", KEEP)
def test_a_block_is_appended_where_nothing_changes(what):
    model = net(lambda: block(**KEEP[what]))
    optimizer = trained(model)
    outputs = both(model)[0]
    new = surgery.append_block_(model, "2.1", optimizer, x=X)
    assert new == "2.2"
    torch.testing.assert_close(both(model)[0], outputs)
    exactly(optimizer, model)
    surgery.remove_block_(model, new, optimizer, x=X)
    torch.testing.assert_close(both(model)[0], outputs)
    before = snapshot(model, optimizer)
    with pytest.raises(BadInput, match=r"taking out 2\.1 would change what Sequential computes"):
        surgery.remove_block_(model, "2.1", optimizer, x=X)  # its path adds something
    untouched(model, optimizer, before)


def test_drawn_outputs_are_compared_in_eval_mode_only():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    model = net(block).insert(0, Noisy())
    assert surgery.append_block_(model, "3.1", x=X) == "3.2"


def test_training_mode_counts_too():
    """Statistics of the batch see a shift that those at rest do not."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.on = False

        def forward(self, x):
            return x + 1 if self.on and self.training else x

    model = nn.Sequential(Odd(), nn.Conv2d(3, 5, 8), nn.Flatten())
    with (
        pytest.raises(BadInput, match="turning it on would change what Sequential computes in training mode"),
        surgery.keeping("turning it on", model, X),
    ):
        model[0].on = True
    assert not model[0].on


# 7.3, 7.5 Layers


def behind(*layers):
    with seeds.seeded(0):
        return shake(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers))


CASES = {
    "transposed": lambda: behind(
        nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    ),
    "shuffled": lambda: behind(
        nn.PixelShuffle(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_inserted_layer_has_the_width_of_what_flows_there(name):
    model = CASES[name]()
    relu = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU))
    before = both(model)
    new = deepen_(model, relu, x=X)
    assert model.get_submodule(new).in_channels == {"transposed": 6, "shuffled": 2}[name]
    torch.testing.assert_close(both(model), before, atol=1e-5, rtol=1e-4)


def test_no_layer_is_inserted_behind_a_flatten():
    model = behind(nn.Flatten(), nn.Linear(512, 6), nn.ReLU(), nn.Linear(6, 5))
    optimizer = trained(model)
    before = snapshot(model, optimizer)
    with pytest.raises(BadInput, match=r"3: what comes out of it is no map \(N, C, H, W\), but \(8, 6\)"):
        surgery.insert_layer_(model, "3", optimizer, x=X)
    untouched(model, optimizer, before)


def test_names_of_ones_own_stay():
    def named():
        with seeds.seeded(0):
            layers = OrderedDict(conv=nn.Conv2d(3, 4, 3, padding=1), bn=nn.BatchNorm2d(4), relu=nn.ReLU())
            blocks = OrderedDict(block0=block(), block1=block())
            parts = OrderedDict(stem=nn.Sequential(layers), trunk=nn.Sequential(blocks))
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
            return shake(nn.Sequential(OrderedDict(**parts, head=nn.Sequential(*head))))

    model = named()
    optimizer, before, names = trained(model), both(model := model), list(model.state_dict())
    assert deepen_(model, "stem.relu", optimizer, x=X) == "stem.relu_1"
    assert deepen_(model, "trunk.block1", optimizer, x=X) == "trunk.block1_1"
    assert list(model.stem._modules) == ["conv", "bn", "relu", "relu_1", "relu_2", "relu_3"]
    torch.testing.assert_close(both(model), before, atol=1e-5, rtol=1e-4)
    step(model, optimizer, X, Y)
    surgery.remove_block_(model, "trunk.block1_1", optimizer, x=None)
    surgery.remove_layer_(model, "stem.relu_1", optimizer, x=None)
    assert list(model.state_dict()) == names
    exactly(optimizer, model)


def test_torchvisions_regnet_becomes_deeper():
    model = models.build("torchvision.models:regnet_y_400mf", 5, (3, 32, 32))
    x = images(4, torch.float32, (3, 32, 32))
    before = model.eval()(x)
    assert deepen_(model, "stem.2", x=x) == "stem.3"
    torch.testing.assert_close(model.eval()(x), before, atol=1e-4, rtol=1e-3)


# 7.4 Optimizers

KINDS = (torch.optim.Adadelta, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_cannot_follow_is_refused_before_anything_changes(kind):
    model = make("resnet", dtype=torch.float32)
    optimizer = kind(model.parameters())
    step(model, optimizer, X, Y)
    before = snapshot(model, optimizer)
    with pytest.raises(BadInput, match=f"{kind.__name__} keeps"):
        surgery.select_(surgery.nodes(model)[0], [0, 1], optimizer)
    untouched(model, optimizer, before, every=False)
    step(model, optimizer, X, Y)


def undone(model, optimizer, change):
    """A change that ends in an error, and is undone."""
    with surgery.undoing(model, optimizer):
        change()
        raise KeyError


def test_undoing_brings_back_what_was_changed_in_place():
    model = make("resnet", dtype=torch.float32)
    optimizer = trained(model)
    before = snapshot(model, optimizer)

    def change():
        with torch.no_grad():
            model.stem.weight.mul_(2)
            model.bn.running_mean.add_(1)
        for node in surgery.nodes(model):
            surgery.select_(node, [*range(node.width), 0], optimizer)
        surgery.append_block_(model, "stages.0.0", optimizer, x=None)

    with pytest.raises(KeyError):
        undone(model, optimizer, change)
    untouched(model, optimizer, before)
    step(model, optimizer, X, Y)


def test_undoing_brings_back_the_optimizers_groups():
    model = make("resnet", dtype=torch.float32)
    optimizer = trained(model)
    before = snapshot(model, optimizer)

    def change():
        optimizer.param_groups[0]["lr"] = 9.0
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})

    with pytest.raises(KeyError):
        undone(model, optimizer, change)
    untouched(model, optimizer, before)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01]


# Groups of the optimizer


def by_kind(model, left_out=()):
    """With weight decay on matrices and kernels, none on the rest."""
    held = [p for p in model.parameters() if all(p is not q for q in left_out)]
    groups = [{"params": [p for p in held if p.dim() > 1]}, {"params": [p for p in held if p.dim() == 1]}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize(("name", "where"), [("resnet", "stages.2.0"), ("vgg", "features.2")])
def test_what_is_new_joins_the_groups_of_its_kind_in_the_networks_order(name, where):
    model = make(name, dtype=torch.float32)
    optimizer = by_kind(model)
    step(model, optimizer, X, Y)
    old = set(model.parameters())
    deepen_(model, where, optimizer, x=X)
    matrices, rest = (g["params"] for g in optimizer.param_groups)
    assert all(p.dim() > 1 for p in matrices)
    assert all(p.dim() == 1 for p in rest)
    exactly(optimizer, model)
    order = {p: i for i, p in enumerate(model.parameters())}
    new = [[order[p] for p in g if p not in old] for g in (matrices, rest)]
    assert all(n == sorted(n) for n in new)
    step(model, optimizer, X, Y)


def test_what_is_new_is_trained_where_the_last_old_parameter_is_not():
    model = net(block)
    last = model[2][1].bn2
    for p in (*last.parameters(), model[2][1].bn1.weight):
        p.requires_grad_(False)
    optimizer = by_kind(model, left_out=[last.bias])
    name = surgery.append_block_(model, "2.1", optimizer, x=X)
    new = list(model.get_submodule(name).parameters())
    assert {p for g in optimizer.param_groups for p in g["params"]} >= set(new)
    for _ in range(2):  # its convolutions once its last scale is not 0
        step(model.train(), optimizer, X, Y)
    assert all(p.grad.any() for p in new)


def test_an_optimizer_of_other_weights_is_refused():
    model = make("resnet", dtype=torch.float32)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(BadInput, match="new would not be trained: the optimizer holds nothing"):
        surgery.append_block_(model, "stages.0.0", optimizer, x=X)
    assert len(model.stages[0]) == 1
    with pytest.raises(BadInput, match="new would not be trained: no group"):
        surgery.adopt_(optimizer, [model.stem.weight], like=model.head.weight)


@pytest.mark.parametrize(("name", "where"), [("resnet", "stages.0.0"), ("vgg", "features.2")])
def test_insertion_draws_nothing_from_the_global_generator(name, where):
    model, before = make(name, dtype=torch.float32), torch.get_rng_state()
    deepen_(model, where, x=X, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_block_has_the_kernels_of_the_one_before_it():
    model = models.build("resnet", 5, (3, 8, 8), widths=(4,), blocks=(1,), kernels=(3, 5))
    surgery.append_block_(model, "stages.0.0", x=X)
    assert model.stages[0][1].kernels == model.stages[0][0].kernels == [5, 5]


@pytest.mark.parametrize("breaker", ["noise", "uneven"])
def test_rounding_of_short_numbers_is_no_change(breaker):
    model = make("resnet", dtype=torch.bfloat16)
    how = dict(wider=1.5, deeper=("stages.0.0",), breaker=breaker, generator=torch.Generator().manual_seed(0))
    grow_(model, None, X.bfloat16(), None, **how)
    with pytest.raises(BadInput, match="would change"), surgery.keeping("half", model, X.bfloat16()):
        nn.init.constant_(model.head.weight, 0.5)


# Sums that a removed path cannot take part in


SUMS = {
    "out.add(x)": lambda out, x: out.add(x),
    "out.add_(x)": lambda out, x: out.add_(x),
    "alpha": lambda out, x: torch.add(out, x, alpha=0.1),
}


class Summed(Residual):
    def __init__(self, add):
        super().__init__()
        self.add = add

    def forward(self, x):
        return F.relu(self.add(self.path(x), x))


@pytest.mark.parametrize("how", [*SUMS, "torch.add"])
def test_a_path_is_removed_only_from_a_plain_sum(how):
    model = net(lambda: Summed(SUMS.get(how, torch.add)))
    for m in model[2]:
        for p in (m.conv1.weight, m.conv2.weight, m.bn2.bias):
            nn.init.zeros_(p)
        m.bn2.running_mean.zero_()
    before = both(model)
    assert bool(dead_paths(surgery.trace(model))) == (how == "torch.add")
    if how == "torch.add":
        surgery.remove_path_(surgery.trace(model).path("2.0"))
    else:
        with pytest.raises(BadInput, match=r"residual path 2\.0 has a sum that is no plain \+"):
            surgery.remove_path_(surgery.trace(model).path("2.0"))
    assert torch.equal(both(model), before)


# 7.6, 7.7 What is traced


class Heads(nn.Module):
    """A head that runs in training only reads the trunk, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.head, self.helper = nn.Linear(8, 5), nn.Linear(6, 5)

    def forward(self, x):
        h = F.relu(self.first(x))
        y = self.head(F.relu(self.second(h)).mean((2, 3)))
        return y + self.helper(h.mean((2, 3))) if self.training else y


@pytest.mark.parametrize("mode", [True, False])
def test_channels_that_a_head_reads_in_training_only_are_no_node(mode):
    model = Heads().train(mode)
    found = surgery.trace(model)
    assert model.training == mode
    assert [n.name for n in found.nodes] == ["second"]
    assert {n.name: n.why for n in found.refused} == {
        "first": "other layers take part in training than in evaluation"
    }
    surgery.select_(found["second"], [0, 2])
    model.train()(X).sum().backward()


def test_flatten_by_keywords_is_seen():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x):
            return self.head(torch.flatten(input=F.relu(input=self.conv(x)), start_dim=1))

    (node,) = surgery.trace(Keywords()).nodes
    assert node.consumers == {"head": 36}


@pytest.mark.parametrize("pre", [True, False])
def test_a_layer_whose_hook_may_change_its_output_is_refused(pre):
    model = make("vgg")
    layer = model.features[4]
    if pre:
        layer.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))
    else:
        layer.register_forward_hook(lambda m, inputs, y: y.roll(1, 1))
    refused = {n.name: n.why for n in surgery.trace(model).refused}
    assert refused["features.0"] == "features.4 has a hook, which may change what it computes"
    assert [n.name for n in surgery.trace(model).nodes] == ["features.7"]


# 7.8 GradMax


@pytest.mark.parametrize(
    "kwargs",
    [dict(dilation=2, padding=2), dict(padding=(0, 1)), dict(kernel_size=(3, 1)), dict(stride=(1, 2)),
     dict(padding="same", kernel_size=2), dict(padding=1, padding_mode="circular")],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 2])
def test_gradmax_falls_back_on_pairs_where_convolutions_are_odd(kwargs, place):
    plain = dict(kernel_size=3, padding=1)
    convs = [nn.Conv2d(3, 4, **(plain | (kwargs if place == 0 else {}))), nn.ReLU()]
    convs += [nn.Conv2d(4, 6, **(plain | (kwargs if place == 2 else {}))), nn.ReLU()]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    optimizer = trained(model)
    before = both(model)
    done = grow_(model, optimizer, X, Y, wider=(("0", 8),), breaker="gradmax")
    assert done == ["0 4 -> 8 (pair)"]
    torch.testing.assert_close(both(model), before, atol=1e-5, rtol=1e-4)
    step(model, optimizer, X, Y)
