"""What chapter 6.4 trains over processes, and the published networks."""

import torch

from effilib.chapters import layer_placement as chapter
from effilib.methods.layer_chain import Chain
from effilib.methods.layer_placement import traffic
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


def test_the_published_networks_give_the_published_ratios():
    found = {}
    for name, (_, batch) in chapter.PUBLISHED.items():
        layers, k = chapter.published(name)
        less = traffic(layers, len(layers), 1, batch) / traffic(layers, k, 1, batch)
        found[name] = round(sum(layer.parameters for layer in layers) / 1e6, 1), round(less, 2)
    assert found == {"VGG-16": (138.4, 8.92), "AlexNet": (61.1, 16.74), "ResNet-50": (25.6, 1.08)}


def test_the_real_network_is_the_same_wherever_it_is_made_and_has_a_heavy_head():
    make = chapter.maker(TASK, DATA)
    a, b = make(), make()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert Chain(a).doubts(3) == []
    layers = chapter.own_layers(TASK, DATA)
    assert sum(x.parameters for x in layers[6:]) > 0.8 * sum(x.parameters for x in layers)
    assert all(x.seconds > 0 for x in layers)


def test_the_batches_are_shared_out_evenly():
    found = chapter.batches(TASK, DATA)
    assert len(found) == chapter.STEPS
    assert {len(y) % chapter.WORKERS for _, y in found} == {0}
