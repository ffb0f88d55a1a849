"""What tests share: small networks and what they compute, runs that are interrupted."""

import copy
import time
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, networks, seeds
from effilib.hooks import Method
from effilib.training import train

OURS = {
    "resnet": ("resnet", {"widths": (4, 6, 8), "blocks": (1, 2, [3, 5])}),
    "resnet, a path gone": ("resnet", {"widths": (4, 6), "blocks": ([4, 0], [0, 3])}),
    "vgg": ("vgg", {"widths": ((4,), (6, 5))}),
    "convnet": ("convnet", {"widths": (4, 6), "bn": False}),
}
SHAPE = (3, 8, 8)


def work(seconds):
    """Keep the processor busy for so long: sleeping is a stall, which is taken off the clock."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class UsersBlock(nn.Module):
    """A residual block as torchvision writes them: the sum is in place."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Users(nn.Module):
    """A small network that is none of ours: residual blocks, dropout."""

    def __init__(self, classes=4, channels=1):
        super().__init__()
        self.conv, self.bn, self.relu = (
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.layer1 = nn.Sequential(UsersBlock(8, 8), UsersBlock(8, 8))
        self.layer2 = nn.Sequential(UsersBlock(8, 8, stride=2))
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2), nn.Linear(8, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn(self.conv(x)))))
        return self.fc(self.drop(torch.flatten(self.pool(x), 1)))


def users(seed=5):
    with seeds.seeded(seed):
        return Users()


class Flat(nn.Module):
    """Convolution -> pooling -> flatten -> two linear layers, as in VGG."""

    def __init__(self, way="flatten"):
        super().__init__()
        self.conv, self.bn, self.pool = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d((2, 3)),
        )
        self.norm, self.fc1, self.fc2, self.way = nn.BatchNorm1d(24), nn.Linear(24, 7), nn.Linear(7, 5), way

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.conv(x))))
        if self.way == "view":
            x = x.view(x.size(0), -1)
        elif self.way == "shape":
            x = x.reshape((x.shape[0], -1))
        else:
            x = torch.flatten(x, 1)
        return self.fc2(F.dropout(F.relu(self.fc1(self.norm(x))), 0.5, self.training))


def make(name, seed=0, dtype=torch.float64):
    if name == "flat":
        with seeds.seeded(seed):
            model = Flat()
    else:
        network, kwargs = OURS[name]
        model = models.build(network, 5, SHAPE, seed=seed, **kwargs)
    return shake(model, seed).to(dtype)


def shake(model, seed=0):
    """BatchNorms that do something: scales, shifts and running statistics away from their first values."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | networks.Constant):
            with torch.no_grad():
                m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                if not isinstance(m, networks.Constant):
                    m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
                    m.running_mean.copy_(0.3 * torch.randn(m.weight.shape, generator=g))
                    m.running_var.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
    return model


def images(n=6, dtype=torch.float64, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(model, x):
    """Outputs in eval and in training mode, statistics left as they were; no dropout in either."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.momentum = 0.0
    outputs = [model.eval()(x)]
    if not isinstance(model, Flat):
        outputs.append(model.train()(x))
    return torch.stack(outputs).detach()


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def exactly(optimizer, model):
    assert len(held(optimizer)) == len(set(held(optimizer)))
    assert set(held(optimizer)) == set(model.parameters())
    assert set(optimizer.state) <= set(held(optimizer))
    for p, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == p.shape


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


ALL = [*OURS, "flat"]
every = pytest.mark.parametrize("name", ALL)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(a, b):
    """Whether two models are bit-equal, buffers included."""
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@dataclass(frozen=True)
class Stop(Method):
    """Ends the first run that it takes part in, as Ctrl-C would, at the beginning of the second epoch."""

    done: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_epoch_start(self, run):
        if run.epoch == 1 and not self.done:
            self.done.append(1)
            raise KeyboardInterrupt


def resumed_and_whole(make, data, recipe, methods, file):
    """((model, history) of a run that is interrupted and goes on from its checkpoint `file`, the same of one
    that is not).
    """
    methods = [*methods, Stop()]
    with pytest.raises(KeyboardInterrupt):
        train(make(), data, recipe, methods, checkpoint=file)
    found = []
    for checkpoint in (file, None):
        model = make()
        found.append((model, train(model, data, recipe, methods, checkpoint=checkpoint)))
    return found
