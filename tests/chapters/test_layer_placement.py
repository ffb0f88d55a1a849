"""What chapter 6.4 shows of layer placement: the published ratios, the simulator, and the run over
processes.
"""

import torch

from effilib.chapters import layer_placement as chapter
from effilib.methods.layer_placement import Chain, profile
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


def test_the_published_networks_give_the_published_ratios():
    lines = chapter.published().splitlines()
    assert [line.split()[0] for line in lines] == ["VGG-16", "AlexNet", "ResNet-50"]
    assert [line.split()[-2] for line in lines] == ["8.92x", "16.74x", "1.08x"]
    assert [line.split(":")[1].split(" parameters")[0].strip() for line in lines] == [
        "138.4 M",
        "61.1 M",
        "25.6 M",
    ]


def test_the_toy_case_is_the_formula_by_hand():
    table = chapter.toy()
    assert table["bytes"].tolist() == [
        4 * (2 * 2 * 2 + 2 * 2 * 8),
        4 * (2 * 2 * 12 + 2 * 2 * 4),
        4 * (2 * 2 * 112),
    ]


def test_nothing_beats_the_cut_and_the_pipeline():
    assert chapter.check(60)["not the best"].tolist() == [0, 0]


def test_the_simulator_gains_where_the_head_is_heavy_and_the_link_slow():
    frame = chapter.simulate((1, 4, 8))
    assert len(frame) == 3 * 3 * 3
    assert (frame["speed-up"] >= 1).all()  # no cut is a choice too
    at = frame[frame["workers"] == 8].set_index(["network", "bandwidth"])["speed-up"]
    assert at["VGG-16", "1 Gbit/s"] > at["VGG-16", "100 Gbit/s"]
    assert at["VGG-16", "1 Gbit/s"] > at["ResNet-50", "1 Gbit/s"]
    assert len(chapter.simulation_table(frame, 8)) == 9
    figure, caption = chapter.simulation_figure(frame)
    assert [a.get_title(loc="left") for a in figure.axes] == list(chapter.PUBLISHED)
    assert "ring" in caption


def test_the_tasks_own_network_is_cut_or_the_reason_named():
    assert "stem" in chapter.own_cut(TASK, DATA).loc["layers"].item()


def test_the_real_run_is_equal_in_everything():
    layers = chapter.own_layers(TASK, DATA)
    assert chapter.layer_table(layers, TASK)["parameters"].sum() == sum(
        p.numel() for p in chapter.maker(TASK, DATA)().parameters()
    )
    found = chapter.real(TASK, DATA, layers)
    table = chapter.checks(found)
    assert [v for v in table.iloc[:, 1] if v] == ["equal"] * 6
    assert "6 of 6 checks equal" in chapter.say(found)
    figure, _ = chapter.times_figure(found)
    assert figure.axes[0].get_ylabel() == "ms a step"
    assert len(found["times"]) == 6


def test_the_real_networks_are_the_same_wherever_they_are_made():
    make = chapter.maker(TASK, DATA)
    a, b = make(), make()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert Chain(a).doubts(3) == []
    layers = profile(Chain(a), DATA.shape)
    head = sum(x.parameters for x in layers[6:])
    assert head > 0.8 * sum(x.parameters for x in layers)
    assert len(chapter.batches(TASK, DATA)) == 20
    assert "wait" in chapter.say_bubble()
