"""Resource-aware layer placement: put each layer where it costs least.

Park et al. 2019, arXiv:1901.05803. A parameter server sends all weights to every worker, and receives all
gradients from every worker, in every synchronous step: its network link is the bottleneck. Convolutions
compute much and weigh little, fully connected layers the other way round. So the layers up to a *cut* stay
with the workers, and those behind it run on the server itself: their weights never travel; what travels
instead are the activations at the cut and their gradients. It is still the same synchronous SGD.

Only the paper's abstract was at hand. The traffic and time model below is our own reading of it: it follows
from what has to be sent. The cut is chosen from a profile of the layers; for a pipeline of several machines,
dynamic programming chooses the cuts."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from effilib.errors import BadInput
from effilib.methods import Info

__all__ = [
    "Cluster", "Layer", "best_cut", "bubble", "estimate", "pipeline", "ring_seconds", "server_bytes",
    "step_seconds", "traffic",
]  # fmt: skip

INFO = Info(
    name="Resource-aware layer placement",
    name_de="Ressourcenbewusste Platzierung von Schichten",
    chapter="6.4",
    paper="Park et al. 2019, arXiv:1901.05803",
    claim="Placing layers on workers and parameter server by the resources that they use shortens the "
    "distributed training of many CNNs without loss of accuracy, as the network is the bottleneck of "
    "parameter servers.",
    cost_model="Bytes at the server a step: 4 [2 W P(1..k) + 2 W b A_k] instead of 4 [2 W P]; the server "
    "computes the rest.",
    applies="several machines with a parameter server",
)

BYTES = 4  # of a number on the wire, fp32


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Describe a link of the chain.

    parameters: trainable numbers. outputs: numbers per image that the next one reads (A). flops, seconds: of
    forward and backward, per image, on a worker.

    >>> Layer(name="fc", parameters=1000, outputs=10).seconds  # not measured yet
    0.0
    """

    name: str
    parameters: int
    outputs: int
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Describe the machines: workers, and a parameter server with its link.

    workers: W. batch: b, images on each a step. bandwidth: of the link, bytes/s. server_speed: times a
    worker's. memory: bytes of the server (None: enough). overlap: computing and sending at the same time.

    >>> Cluster(workers=4, batch=32, bandwidth=1e9 / 8).overlap
    False
    """

    workers: int
    batch: int
    bandwidth: float = math.inf
    server_speed: float = 1.0
    memory: float | None = None
    overlap: bool = False


def traffic(layers: Sequence[Layer], k: int, workers: int, batch: int) -> int:
    """Return the bytes through the server's link in a step.

    4 [2 W P(1..k) + 2 W b A_k]. The first k of N layers are on the workers. Weights down and gradients up,
    activations up and their gradients down; k = N is the plain parameter server, where nothing is cut.

    >>> conv, fc = (Layer(name="", parameters=p, outputs=a) for p, a in ((10, 100), (1000, 10)))
    >>> layers = [conv, fc]
    >>> traffic(layers, 1, workers=2, batch=1), traffic(layers, 2, workers=2, batch=1)
    (1760, 16160)
    """
    P = sum(layer.parameters for layer in layers[:k])
    A = layers[k - 1].outputs if k < len(layers) else 0
    return BYTES * (2 * workers * P + 2 * workers * batch * A)


def step_seconds(layers: Sequence[Layer], k: int, cluster: Cluster) -> float:
    """Return the seconds of a step cut behind layer k.

    T(k). The workers' part, the link and the server's part, one after the other; with overlap the longest of
    them.

    >>> conv = Layer(name="conv", parameters=10, outputs=100, seconds=2.0)
    >>> layers = [conv, Layer(name="fc", parameters=1000, outputs=10, seconds=0.5)]
    >>> step_seconds(layers, 1, Cluster(workers=2, batch=1))  # 2 on the workers, 2 x 0.5 on the server
    3.0
    """
    W, b = cluster.workers, cluster.batch
    parts = (
        b * sum(layer.seconds for layer in layers[:k]),
        traffic(layers, k, W, b) / cluster.bandwidth,
        W * b * sum(layer.seconds for layer in layers[k:]) / cluster.server_speed,
    )
    return max(parts) if cluster.overlap else sum(parts)


def server_bytes(layers: Sequence[Layer], k: int, cluster: Cluster) -> int:
    """Return the memory of the layers behind the cut, in bytes.

    Weights, gradients and momentum, and the activations of W b images with their gradients.

    >>> conv, fc = (Layer(name="", parameters=p, outputs=a) for p, a in ((10, 100), (1000, 10)))
    >>> layers = [conv, fc]
    >>> server_bytes(layers, 1, Cluster(workers=2, batch=1))
    13760
    """
    held = 3 * sum(layer.parameters for layer in layers[k:])
    passing = (
        2 * cluster.workers * cluster.batch * sum(layer.outputs for layer in layers[k - 1 :])
        if k < len(layers)
        else 0
    )
    return BYTES * (held + passing)


def best_cut(layers: Sequence[Layer], cluster: Cluster) -> tuple[int, float]:
    """Return (k, seconds) of the cut with the shortest step.

    Of those that fit the server's memory. Of equals the one with the least on the server. The first layer
    always stays with the workers, for the images are there.

    >>> conv = Layer(name="conv", parameters=10, outputs=100, seconds=2.0)
    >>> layers = [conv, Layer(name="fc", parameters=1000, outputs=10, seconds=0.5)]
    >>> best_cut(layers, Cluster(workers=2, batch=1, bandwidth=1000))[0]
    1
    """
    fits = [
        k
        for k in range(len(layers), 0, -1)
        if cluster.memory is None or server_bytes(layers, k, cluster) <= cluster.memory
    ]
    if not fits:
        raise BadInput(f"no cut fits the server's memory of {cluster.memory:g} bytes")
    seconds = {k: step_seconds(layers, k, cluster) for k in fits}
    k = min(fits, key=seconds.get)
    return k, seconds[k]


def ring_seconds(layers: Sequence[Layer], cluster: Cluster) -> float:
    """Return the seconds of a step without a server.

    Gradients are summed in a ring of the workers. Each worker's own link carries 2 (W - 1) / W P numbers.

    >>> layers = [Layer(name="fc", parameters=1000, outputs=10, seconds=0.5)]
    >>> ring_seconds(layers, Cluster(workers=2, batch=1, bandwidth=4000))
    1.5
    """
    W, P = cluster.workers, sum(layer.parameters for layer in layers)
    seconds = cluster.batch * sum(layer.seconds for layer in layers)
    return seconds + BYTES * 2 * (W - 1) / W * P / cluster.bandwidth


def pipeline(
    layers: Sequence[Layer], stages: int, batch: int, bandwidth: float = math.inf
) -> tuple[float, tuple[int, ...]]:
    """Cut the chain so that its slowest piece or link is fastest.

    In `stages` pieces. Returns (seconds, cuts); one machine a piece.

    B[j][m] = min_{i<j} max(B[i][m-1], 2 * 4 b A_i / bandwidth, t_{i+1} + ... + t_j), over j layers and m
    stages (PipeDream's straight pipeline); seconds are those of a batch of `batch` images. cuts: how many
    layers lie before each border. O(N^2 S).

    >>> layers = [Layer(name="conv", parameters=1, outputs=1, seconds=s) for s in (1.0, 1.0, 2.0)]
    >>> pipeline(layers, stages=2, batch=1)
    (2.0, (2,))
    """
    N = len(layers)
    if not 1 <= stages <= N:
        raise BadInput(f"a pipeline of {stages} stages does not fit a network of {N} layers")
    until = [0.0, *itertools.accumulate(batch * layer.seconds for layer in layers)]
    link = [0.0, *(2 * BYTES * batch * layer.outputs / bandwidth for layer in layers)]
    B = [[math.inf] * (stages + 1) for _ in range(N + 1)]
    best = [[0] * (stages + 1) for _ in range(N + 1)]
    for j in range(1, N + 1):
        B[j][1] = until[j]
        for m in range(2, min(j, stages) + 1):
            options = {i: max(B[i][m - 1], link[i], until[j] - until[i]) for i in range(m - 1, j)}
            best[j][m] = min(options, key=options.get)
            B[j][m] = options[best[j][m]]
    cuts, j = [], N
    for m in range(stages, 1, -1):
        j = best[j][m]
        cuts.append(j)
    return B[N][stages], tuple(cuts[::-1])


def bubble(stages: int, microbatches: int) -> float:
    """Return the share of time that a pipeline's machine waits.

    (S - 1) / (M + S - 1). The pipeline is filled and drained at every step.

    >>> bubble(stages=4, microbatches=12)
    0.2
    """
    return (stages - 1) / (microbatches + stages - 1)


def estimate(layers: Sequence[Layer], rate: float) -> list[Layer]:
    """Return the layers with seconds from FLOPs.

    For a device that does `rate` FLOP/s.

    >>> estimate([Layer(name="conv", parameters=10, outputs=5, flops=2e9)], rate=1e9)[0].seconds
    2.0
    """
    return [replace(layer, seconds=layer.flops / rate) for layer in layers]
