"""Layer placement: the model against hand and brute force, chains that compute what the network does, and
training over processes.
"""

import functools
import itertools
import math
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effilib import cost, models
from effilib.distributed import processes
from effilib.errors import BadInput
from effilib.methods.layer_chain import Chain, measure, profile
from effilib.methods.layer_placement import (
    Cluster,
    Layer,
    best_cut,
    bubble,
    estimate,
    pipeline,
    server_bytes,
    step_seconds,
    traffic,
)
from effilib.methods.placed_training import Job, alone, pipelined, several, take_part

SHAPE = (1, 12, 12)
make = functools.partial(models.build, "convnet", 4, SHAPE, seed=1, widths=(4, 6, (6, 8)), bn=False)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def some_batches(n, size=8):
    source = g(3)
    # laid out as data sets are, channels last: what is sent has to be made contiguous
    return tuple(
        (
            torch.randn(size, *SHAPE, generator=source).to(memory_format=torch.channels_last),
            torch.randint(4, (size,), generator=source),
        )
        for _ in range(n)
    )


def chain_of(*layers):
    return [Layer(name=str(i), parameters=p, outputs=a, seconds=t) for i, (p, a, t) in enumerate(layers)]


# The model


def test_the_traffic_of_each_cut_by_hand():
    layers = chain_of((2, 8, 0), (10, 4, 0), (100, 3, 0))
    assert traffic(layers, 1, 3, 5) == 4 * (2 * 3 * 2 + 2 * 3 * 5 * 8)
    assert traffic(layers, 2, 3, 5) == 4 * (2 * 3 * 12 + 2 * 3 * 5 * 4)
    assert traffic(layers, 3, 3, 5) == 4 * 2 * 3 * 112


def test_the_time_of_a_step_by_hand():
    layers = chain_of((2, 8, 1.0), (10, 4, 2.0), (100, 3, 4.0))
    cluster = Cluster(workers=3, batch=5, bandwidth=100.0, server_speed=2.0)
    parts = 5 * 3.0, traffic(layers, 2, 3, 5) / 100, 15 * 4.0 / 2
    assert step_seconds(layers, 2, cluster) == sum(parts)
    overlapping = Cluster(workers=3, batch=5, bandwidth=100.0, server_speed=2.0, overlap=True)
    assert step_seconds(layers, 2, overlapping) == max(parts)
    assert step_seconds(layers, 3, Cluster(workers=3, batch=5)) == 5 * 7.0


def test_an_infinitely_fast_link_leaves_all_with_the_workers_and_a_slow_one_moves_the_heavy_head():
    layers = chain_of((10, 100, 1.0), (10, 5, 1.0), (1000, 3, 0.1))
    assert best_cut(layers, Cluster(workers=4, batch=2))[0] == 3
    assert best_cut(layers, Cluster(workers=4, batch=2, bandwidth=100.0))[0] == 2


def test_memory_limits_what_the_server_can_take():
    layers = chain_of((10, 100, 1.0), (10, 5, 1.0), (1000, 3, 0.1))
    need = server_bytes(layers, 2, Cluster(workers=4, batch=2))
    assert need == 4 * (3 * 1000 + 2 * 8 * (5 + 3))
    for memory, k in ((need, 2), (need - 1, 3)):
        assert best_cut(layers, Cluster(workers=4, batch=2, bandwidth=100.0, memory=memory))[0] == k


layer_lists = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=7
)


@settings(max_examples=150, deadline=None)
@given(layer_lists, st.integers(1, 5), st.integers(1, 4), st.integers(1, 500), st.booleans())
def test_the_cut_is_the_best_of_all(rows, workers, batch, bandwidth, overlap):
    layers = chain_of(*rows)
    cluster = Cluster(workers=workers, batch=batch, bandwidth=bandwidth, overlap=overlap)
    k, seconds = best_cut(layers, cluster)
    assert (
        seconds
        == step_seconds(layers, k, cluster)
        == min(step_seconds(layers, c, cluster) for c in range(1, len(layers) + 1))
    )


@settings(max_examples=150, deadline=None)
@given(layer_lists, st.data())
def test_the_pipeline_is_the_best_of_all_partitions(rows, data):
    layers, batch, bandwidth = chain_of(*rows), 3, 16.0
    stages = data.draw(st.integers(1, len(layers)))

    def slowest(cuts):
        pieces = [
            sum(batch * x.seconds for x in layers[i:j])
            for i, j in itertools.pairwise((0, *cuts, len(layers)))
        ]
        return max(pieces + [2 * 4 * batch * layers[i - 1].outputs / bandwidth for i in cuts])

    seconds, cuts = pipeline(layers, stages, batch, bandwidth)
    assert len(cuts) == stages - 1
    assert (
        seconds
        == slowest(cuts)
        == min(map(slowest, itertools.combinations(range(1, len(layers)), stages - 1)))
    )


def test_a_pipeline_needs_a_layer_for_each_stage():
    with pytest.raises(BadInput, match="3 stages does not fit a network of 2 layers"):
        pipeline(chain_of((1, 1, 1), (1, 1, 1)), 3, 1)
    assert bubble(1, 4) == 0
    assert bubble(4, 1) == 0.75


# The chain

NETWORKS = {
    "plain": lambda: make(),
    "residual": lambda: models.build("resnet", 4, SHAPE, widths=(8, 8), blocks=(1, 2)),
    "torchvision": lambda: models.build("torchvision.models:resnet18", 4, (3, 32, 32)),
    "alexnet": lambda: models.build("torchvision.models:alexnet", 4, (3, 64, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_of_a_chain_compute_what_the_network_does(name):
    model = NETWORKS[name]().eval()
    chain = Chain(model)
    x = torch.randn(2, *{"torchvision": (3, 32, 32), "alexnet": (3, 64, 64)}.get(name, SHAPE), generator=g())
    whole, by_parts = model(x), x
    for i in range(len(chain)):
        by_parts = chain.part(i, i + 1)(by_parts)
    assert torch.equal(by_parts, whole)
    k = len(chain) // 2
    near, far = chain.part(0, k), chain.part(k, len(chain))
    assert torch.equal(far(near(x)), whole)
    names = [n for part in (near, far) for n, _ in part.named_parameters()]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert all(p is dict(model.named_parameters())[n] for n, p in near.named_parameters())


def test_a_residual_block_is_one_link_and_layers_without_weights_go_with_the_one_before():
    assert Chain(NETWORKS["residual"]()).names == ["stem", "stages.0.0", "stages.1.0", "stages.1.1", "head"]
    assert Chain(make()).names == ["features.0", "features.3", "features.6", "features.8", "head"]


class Forked(nn.Module):
    """Nowhere a single tensor but at its end."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.a(x).mean((2, 3)) + self.b(x).mean((2, 3))


class Choosy(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    def forward(self, x):
        return x, x + 1


def test_what_is_no_chain_is_named():
    assert len(Chain(Forked())) == 1
    with pytest.raises(BadInput, match="Choosy cannot be followed, so it cannot be cut"):
        Chain(Choosy())
    with pytest.raises(BadInput, match="Two does not return one tensor"):
        Chain(Two())
    with pytest.raises(BadInput, match=r"no part 3\.\.9 in a chain of 5"):
        Chain(make()).part(3, 9)


def test_doubts_name_what_would_not_stay_equal():
    assert Chain(make()).doubts(3) == []
    chain = Chain(NETWORKS["residual"]())
    assert chain.doubts(len(chain) - 1) == chain.doubts(len(chain)) == []
    assert any("BatchNorm stages.1.1.bn2 behind the cut" in d for d in chain.doubts(2))
    assert any("dropout classifier.0 draws" in d for d in Chain(NETWORKS["alexnet"]()).doubts(2))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert Chain(tied).doubts(1) == ["the parameter 2.weight is used on both sides of the cut"]


def test_the_profile_adds_up_to_the_network():
    model = NETWORKS["residual"]()
    before = {n: b.clone() for n, b in model.named_buffers()}
    layers = profile(Chain(model), SHAPE)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    assert sum(x.parameters for x in layers) == cost.parameters(model)
    assert sum(x.flops for x in layers) == pytest.approx(cost.step_flops(model, SHAPE, 2) / 2)
    assert [x.outputs for x in layers] == [8 * 144, 8 * 144, 8 * 36, 8, 4]  # what flows on after the pooling
    assert [x.seconds for x in estimate(layers, 10.0)] == [x.flops / 10 for x in layers]


def test_measured_seconds_are_those_of_an_image():
    chain = Chain(make())
    found = measure(chain, profile(chain, SHAPE), torch.randn(4, *SHAPE, generator=g()), repeats=3)
    assert all(0 < x.seconds < 1 for x in found)
    assert all(p.grad is None for p in chain.traced.parameters())


# Over processes


def dying():
    """A network for all but the last rank, which is killed while the others wait for it."""
    if dist.is_initialized() and dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return make()


@pytest.fixture(scope="module")
def trained():
    """Plain, placed and throttled training of 20 steps, and two pipelines, in three processes that start
    once.
    """
    everything = some_batches(20)
    x, y = everything[0]
    calls = [(take_part, (Job(make=make, batches=everything, cut=k),)) for k in (None, 3, 1)]
    calls.append((take_part, (Job(make=make, batches=everything[:3], cut=3, bandwidth=2e4),)))
    calls += [(pipelined, (make, cuts, x, y, m)) for cuts, m in (((3,), 2), ((1, 3), 4))]
    by_rank = processes.run(several, 3, calls)
    return everything, [[r[i] for r in by_rank] for i in range(len(calls))]


@pytest.mark.parametrize(("run", "k"), [(0, 5), (1, 3), (2, 1)])
def test_the_bytes_on_the_wire_are_those_of_the_formula(trained, run, k):
    _, found = trained
    layers = profile(Chain(make()), SHAPE)
    server, *workers = found[run]
    assert server["sent"] + server["received"] == 20 * traffic(layers, k, 2, 4)
    assert server["sent"] == server["received"]
    assert sum(w["sent"] for w in workers) == server["received"]


@pytest.mark.parametrize("run", [0, 1, 2])
def test_the_weights_after_20_steps_are_those_of_one_process(trained, run):
    everything, found = trained
    exact = alone(Job(make=make, batches=everything))
    mine = found[run][0]["parameters"]
    assert mine.keys() == exact.keys()
    for name, p in exact.items():
        torch.testing.assert_close(mine[name], p, rtol=0, atol=1e-5)
        assert float((p - dict(make().named_parameters())[name]).detach().abs().max()) > 1e-3  # they did move


def test_a_slower_link_takes_the_time_of_its_bytes(trained):
    _, found = trained
    seconds = traffic(profile(Chain(make()), SHAPE), 3, 2, 4) / 2e4
    assert seconds < found[3][0]["seconds"] < seconds + 1


@pytest.mark.parametrize("run", [4, 5])
def test_the_pipelines_gradients_are_those_of_one_process(trained, run):
    everything, found = trained
    model, (x, y) = make().train(), everything[0]
    F.cross_entropy(model(x), y).backward()
    gradients = {n: p for rank in found[run] for n, p in rank.items()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert sum(bool(rank) for rank in found[run]) == run - 2  # stages
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_worker_that_dies_ends_the_run_with_one_sentence_soon():
    begin = time.monotonic()
    with pytest.raises(
        processes.WorkerFailed, match=r"^rank 2 of 3 was killed by SIGKILL; the others were ended$"
    ):
        processes.run(take_part, 3, Job(make=dying, batches=some_batches(4)))
    assert time.monotonic() - begin < 30


def test_batches_must_be_shareable():
    assert math.isinf(Cluster(workers=1, batch=1).bandwidth)
    with pytest.raises(
        processes.WorkerFailed, match="BadInput: a batch of 7 images cannot be shared out among 2 workers"
    ):
        processes.run(take_part, 3, Job(make=make, batches=some_batches(1, 7)))
