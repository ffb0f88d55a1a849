"""Chapter 6.4, the paper itself: the published networks, and what is trained over three processes."""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from effilib import models, networks
from effilib.dataset import Batches, Dataset
from effilib.methods.layer_chain import Chain, measure, profile
from effilib.methods.layer_placement import Layer
from effilib.seeds import stream
from effilib.tasks import Task

# images a worker
PUBLISHED = {"VGG-16": ("vgg16", 32), "AlexNet": ("alexnet", 128), "ResNet-50": ("resnet50", 32)}
# FLOP/s of every machine in the simulator: an assumption, of the order of what a GPU of 2019 kept up in fp32
RATE = 5e12
GBIT = 1e9 / 8  # bytes/s
LINKS = {"1 Gbit/s": GBIT, "10 Gbit/s": 10 * GBIT, "100 Gbit/s": 100 * GBIT}
WORKERS, STEPS, SLOW_STEPS = 2, 20, 4  # of the real run; and steps over a link that is slowed down
LR = 0.002
SIZES = {  # of the real run
    "smoke": dict(batch=4, width=4),
    "quick": dict(batch=8, width=16),
    "study": dict(batch=32, width=32),
    "full": dict(batch=32, width=32),
}


@functools.cache
def published(name: str) -> tuple[list[Layer], int]:
    """Return (layers, how many lie before the first fully connected one) of a published network.

    At 224 x 224 pixels, on the meta device.
    """
    import torchvision

    with torch.device("meta"):
        chain = Chain(getattr(torchvision.models, PUBLISHED[name][0])())
    first = next(i for i, n in enumerate(chain.names) if isinstance(chain.traced.get_submodule(n), nn.Linear))
    return profile(chain, (3, 224, 224)), first


def fat_head(classes: int, channels: int = 3, width: int = 32) -> nn.Sequential:
    """Return six convolutions and three fully connected layers, like VGG's, without BatchNorm.

    Few weights compute much, many compute little.
    """
    layers, c, hidden = [], channels, 32 * width
    for w in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(c, w, 3, padding=1), nn.ReLU()]
            c = w
        layers.append(nn.MaxPool2d(2))
    head = [
        nn.Linear(16 * c, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    ]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = nn.Sequential(OrderedDict(features=features, head=nn.Sequential(*head)))
    networks.initialize_(model)
    return model


def maker(task: Task, dataset: Dataset) -> Callable[[], nn.Module]:
    """Return () -> the network of the real run, the same in every process."""
    settings = dict(seed=stream(0, "placement").initial_seed(), width=SIZES[task.preset]["width"])
    return functools.partial(models.build, f"{__name__}:fat_head", dataset.classes, dataset.shape, **settings)


def double(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the network in float64, in which the rounding of 20 steps does not grow beyond notice."""
    return make().double()


def batches(task: Task, dataset: Dataset, steps: int = STEPS) -> tuple:
    """Return the batches of the real run, for all workers together."""
    source = Batches(dataset, WORKERS * SIZES[task.preset]["batch"], stream(0, "placement"))
    endless = itertools.chain.from_iterable(itertools.repeat(source))
    return tuple((x.cpu().contiguous(), y.cpu()) for x, y in itertools.islice(endless, steps))


def own_layers(task: Task, dataset: Dataset) -> list[Layer]:
    """Return the real network's layers with measured seconds, on one thread as in the processes."""
    chain, (x, _) = Chain(maker(task, dataset)()), batches(task, dataset, 1)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(chain, profile(chain, dataset.shape), x.chunk(WORKERS)[0], repeats=5, seconds=3)
    finally:
        torch.set_num_threads(threads)
