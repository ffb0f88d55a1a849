"""Resource-aware layer placement: put each layer where it costs least.

Park et al. 2019, arXiv:1901.05803. A parameter server sends all weights to every worker, and receives all
gradients from every worker, in every synchronous step: its network link is the bottleneck. Convolutions
compute much and weigh little, fully connected layers the other way round. So the layers up to a *cut* stay
with the workers, and those behind it run on the server itself: their weights never travel; what travels
instead are the activations at the cut and their gradients. It is still the same synchronous SGD.

Only the paper's abstract was at hand. The traffic and time model below is our own reading of it: it follows
from what has to be sent. The cut is chosen from a profile of the layers; for a pipeline of several machines,
dynamic programming chooses the cuts."""

import copy
import itertools
import math
import statistics as stats
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from effilib import cost, models
from effilib.clock import elapsed, interleaved, pause
from effilib.convolution import evaluating
from effilib.errors import BadInput
from effilib.methods import Info
from effilib.surgery.channels import Tracer

__all__ = [
    "Chain", "Cluster", "Job", "Layer", "Wire", "alone", "best_cut", "bubble", "estimate", "measure",
    "pipeline", "profile", "ring_seconds", "server_bytes", "several", "step_seconds", "take_part", "traffic",
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
)

BYTES = 4  # of a number on the wire, fp32


# The model: what a cut costs


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
    """Return the bytes through the server's link in a step, 4 [2 W P(1..k) + 2 W b A_k].

    The first k of N layers are on the workers. Weights down and gradients up, activations up and their
    gradients down; k = N is the plain parameter server, where nothing is cut.

    >>> conv, fc = (Layer(name="", parameters=p, outputs=a) for p, a in ((10, 100), (1000, 10)))
    >>> layers = [conv, fc]
    >>> traffic(layers, 1, workers=2, batch=1), traffic(layers, 2, workers=2, batch=1)
    (1760, 16160)
    """
    P = sum(layer.parameters for layer in layers[:k])
    A = layers[k - 1].outputs if k < len(layers) else 0
    return BYTES * (2 * workers * P + 2 * workers * batch * A)


def step_seconds(layers: Sequence[Layer], k: int, cluster: Cluster) -> float:
    """Return T(k), the seconds of a step that is cut behind layer k.

    The workers' part, the link and the server's part, one after the other; with overlap the longest of them.

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
    """Return (k, seconds) of the cut with the shortest step that fits the server's memory.

    Of equals the one with the least on the server. The first layer always stays with the workers, for the
    images are there.

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
    """Return the seconds of a step without a server: gradients are summed in a ring of the workers.

    Each worker's own link carries 2 (W - 1) / W P numbers.

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
    """Cut the chain in `stages` pieces so that the slowest piece or link takes the least time.

    Returns (seconds, cuts); one machine a piece.

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
    """Return the share of the time that a pipeline's machine waits: (S - 1) / (M + S - 1).

    The pipeline is filled and drained at every step.

    >>> bubble(stages=4, microbatches=12)
    0.2
    """
    return (stages - 1) / (microbatches + stages - 1)


# The network as a chain


class Chain:
    """Follow a network as a chain of layers.

    It can be cut wherever a single tensor flows on, so a residual block is one link. A link begins at a layer
    with weights and takes along what follows without (BatchNorm, ReLU, pooling). `part(i, j)` is the network
    of links i..j-1 with the same parameters under the same names. Raises `BadInput` if the forward pass
    cannot be followed.

    >>> chain = Chain(build("resnet", 4, (1, 8, 8), widths=(4, 8), blocks=(1, 1)))
    >>> chain.names, chain.part(0, 2)(torch.rand(2, 1, 8, 8)).shape
    (['stem', 'stages.0.0', 'stages.1.0', 'head'], torch.Size([2, 4, 8, 8]))
    """

    def __init__(self, model: nn.Module):
        try:
            self.traced = fx.GraphModule(model, Tracer().trace(model))
        except Exception as error:  # a user's forward may raise anything when it meets a symbol
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(
                f"the forward pass of {type(model).__name__} cannot be followed, so it cannot be cut: "
                f"{reason}"
            ) from error
        self.nodes = [n for n in self.traced.graph.nodes if n.op != "output"]
        if [n.op for n in self.nodes].count("placeholder") != 1:
            raise BadInput(f"{type(model).__name__} does not take one tensor of images, so it is no chain")
        place = {n: i for i, n in enumerate(self.traced.graph.nodes)}
        # (how many nodes lie before it, the one tensor that flows over it)
        cuts, alive = [(1, self.nodes[0])], set()
        for i, n in enumerate(self.nodes):
            alive = {v for v in (*alive, n) if any(place[u] > i for u in v.users)}
            if i and len(alive) == 1:
                cuts.append((i + 1, *alive))
        if cuts[-1][0] != len(self.nodes):
            raise BadInput(f"{type(model).__name__} does not return one tensor of logits, so it is no chain")
        self.borders, links = [cuts[0], cuts[0]], [[]]
        for (begin, _), end in itertools.pairwise(cuts):
            weights = self._weights(begin, end[0])
            if weights and links[-1]:
                links.append([])
                self.borders.append(end)
            self.borders[-1] = end
            links[-1] += weights
        self.names = [self._say(names) for names in links]

    def __len__(self):
        return len(self.names)

    def _weights(self, begin, end):
        """Names of the layers with weights, and of such parameters, among some nodes."""
        heavy = [n for n, p in self.traced.named_parameters(remove_duplicate=False) if p.dim() > 1]
        called = [n.target for n in self.nodes[begin:end] if n.op in ("call_module", "get_attr")]
        return [t for t in called if any(h == t or h.startswith(f"{t}.") for h in heavy)]

    @staticmethod
    def _say(names):
        """What a link is called: its layer, or what holds all of its layers."""
        common = [
            parts[0]
            for parts in itertools.takewhile(
                lambda p: len(set(p)) == 1, zip(*(n.split(".") for n in names), strict=False)
            )
        ]
        return ".".join(common) or f"{names[0]} ... {names[-1]}" if names else "no weights"

    def part(self, first: int, last: int) -> nn.Module:
        """Return the network of links first..last-1; it shares its layers with the whole."""
        if not 0 <= first < last <= len(self):
            raise BadInput(f"no part {first}..{last} in a chain of {len(self)} layers")
        (begin, entrance), (end, exit_) = self.borders[first], self.borders[last]
        graph = fx.Graph()
        copied = {entrance: graph.placeholder("x")}
        for n in self.nodes[begin:end]:
            copied[n] = graph.node_copy(n, copied.__getitem__)
        graph.output(copied[exit_])
        return fx.GraphModule(self.traced, graph)

    def stages(self, cuts: Sequence[int]) -> list[nn.Module]:
        """Return the parts between the cuts: a pipeline's stages."""
        return [self.part(i, j) for i, j in itertools.pairwise((0, *cuts, len(self)))]

    def doubts(self, k: int) -> list[str]:
        """Return why training that is cut behind k would not give the same weights.

        In sentences; none if it does.
        """
        found = []
        if k < len(self):
            near, far = self.part(0, k), self.part(k, len(self))
            shared = {id(p) for p in near.parameters()}
            found = [
                f"the parameter {n} is used on both sides of the cut"
                for n, p in far.named_parameters()
                if id(p) in shared
            ]
            for name, m in far.named_modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    found.append(
                        f"BatchNorm {name} behind the cut takes its statistics over the images of all workers"
                    )
        drawn = [
            n
            for n, m in self.traced.named_modules()
            if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
        ]
        return found + [f"dropout {n} draws other numbers in every process" for n in drawn]


def trainable(module):
    """Return the parameters that travel and are trained.

    >>> frozen = nn.Linear(2, 2).requires_grad_(False)
    >>> len(trainable(nn.Sequential(frozen, nn.Linear(2, 2))))
    2
    """
    return [p for p in module.parameters() if p.requires_grad]


def profile(chain: Chain, shape: tuple[int, int, int], *, images: int = 2) -> list[Layer]:
    """Count the chain's layers: parameters, numbers at each cut, FLOPs per image.

    FLOPs of forward and backward. Works on the meta device. shape: (C, H, W) of the images.

    >>> chain = Chain(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    >>> [(layer.name, layer.parameters, layer.outputs) for layer in profile(chain, (1, 8, 8))]
    [('features.0', 44, 64), ('features.4', 304, 8), ('head', 36, 4)]
    """
    model, found = chain.traced, []
    p = next(model.parameters())
    x, was = torch.zeros(images, *shape, device=p.device), model.training
    model.eval()  # BatchNorm's statistics stay as they are
    try:
        for i, name in enumerate(chain.names):
            part = copy.deepcopy(chain.part(i, i + 1))  # backward writes gradients

            def step(part=part, x=x, first=i == 0):
                part(x.detach().requires_grad_(not first)).sum().backward()

            parameters = sum(p.numel() for p in trainable(part))
            flops = cost.count_flops(step) / images
            with torch.no_grad():
                x = part(x)
            found.append(Layer(name=name, parameters=parameters, outputs=x.numel() // images, flops=flops))
    finally:
        model.train(was)
    return found


def estimate(layers: Sequence[Layer], rate: float) -> list[Layer]:
    """Return the layers with seconds from FLOPs, for a device that does `rate` FLOP/s.

    >>> estimate([Layer(name="conv", parameters=10, outputs=5, flops=2e9)], rate=1e9)[0].seconds
    2.0
    """
    return [replace(layer, seconds=layer.flops / rate) for layer in layers]


def measure(
    chain: Chain,
    layers: Sequence[Layer],
    x: torch.Tensor,
    *,
    repeats: int = 9,
    seconds: float | None = None,
) -> list[Layer]:
    """Return the layers with measured seconds per image, interleaved medians.

    Forward and backward of each on a batch like x (N, C, H, W).

    >>> chain = Chain(build("convnet", 4, (1, 8, 8), widths=(4, 8)))
    >>> layers = measure(chain, profile(chain, (1, 8, 8)), torch.rand(4, 1, 8, 8), repeats=3)
    >>> all(layer.seconds > 0 for layer in layers)
    True
    """
    functions = {}
    with models.seeded(0, x.device):  # dropout draws from the global generator
        for i in range(len(chain)):
            part = copy.deepcopy(chain.part(i, i + 1)).train()  # BatchNorm's statistics stay as they are

            def step(part=part, x=x, first=i == 0):
                x = x.detach().requires_grad_(not first)
                y = part(x)
                torch.autograd.grad(
                    y, [*trainable(part), *([] if first else [x])], torch.ones_like(y), allow_unused=True
                )

            functions[i] = step
            with torch.no_grad():
                x = part(x)
        times = interleaved(functions, repeats=repeats, warm_up=2, device=x.device, seconds=seconds)
    return [replace(layer, seconds=stats.median(times[i]) / len(x)) for i, layer in enumerate(layers)]


# The real thing: rank 0 is the server, the others are workers


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe a training over several processes.

    make: () -> the network, with the same initial weights wherever it is called. cut: links of the chain on
    the workers (None: all, the plain parameter server). batches: (x, y) of each step, the images of all
    workers, each of which takes its share in order; the server knows the labels from there. bandwidth:
    bytes/s that the server's link is slowed down to, by waiting (None: as fast as it is).

    >>> batches = ((torch.rand(4, 1, 8, 8), torch.arange(4)),)
    >>> job = Job(make=lambda: build("convnet", 4, (1, 8, 8), widths=(4, 8)), batches=batches)
    >>> job.cut is None  # the plain parameter server
    True
    """

    make: Callable
    batches: tuple
    cut: int | None = None
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bandwidth: float | None = None

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return SGD over the given parameters."""
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


class Wire:
    """Send and receive tensors, and count their bytes.

    >>> wire = Wire()
    >>> wire.sent, wire.received
    (0, 0)
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype, self.sent, self.received = dtype, 0, 0

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """Send a tensor to a rank, which has to know its shape."""
        tensor = tensor.detach().contiguous()
        dist.send(tensor, rank)
        self.sent += cost.size_bytes([tensor])

    def receive(self, shape: Sequence[int], rank: int) -> torch.Tensor:
        """Return a tensor of that shape from a rank."""
        tensor = torch.empty(shape, dtype=self.dtype)
        dist.recv(tensor, rank)
        self.received += cost.size_bytes([tensor])
        return tensor


def take_part(rank: int, job: Job) -> dict:
    """Be one rank of synchronous training: the server (rank 0) or a worker.

    Returns {"parameters" (server), "sent", "received", "seconds"}. Buffers, such as BatchNorm's running
    statistics, stay with their worker.

    >>> from functools import partial
    >>> from effilib.distributed import processes
    >>> make = partial(build, "convnet", 4, (1, 8, 8), widths=(4, 8), bn=False)
    >>> job = Job(make=make, batches=((torch.rand(4, 1, 8, 8), torch.arange(4)),), cut=1)
    >>> server, worker = processes.run(take_part, 2, job)
    >>> server["sent"] == worker["received"], sorted(server["parameters"]) == sorted(alone(job))
    (True, True)
    """
    chain = Chain(job.make().train())
    k = len(chain) if job.cut is None else job.cut
    near, far = chain.part(0, k), chain.part(k, len(chain)) if k < len(chain) else None
    wire, workers = Wire(next((p.dtype for p in near.parameters()), torch.float32)), dist.get_world_size() - 1
    if len(job.batches[0][1]) % workers:
        raise BadInput(
            f"a batch of {len(job.batches[0][1])} images cannot be shared out among {workers} workers"
        )
    seconds, shape = [], near_shape(near, job.batches[0][0][:1]) if far else None
    optimizer = job.optimizer([*trainable(near), *(trainable(far) if far else [])]) if rank == 0 else None
    for x, y in job.batches:
        with elapsed() as t:
            if rank == 0:
                before = wire.sent + wire.received
                serve(wire, near, far, optimizer, y, workers, shape)
                if job.bandwidth:
                    pause((wire.sent + wire.received - before) / job.bandwidth)
            else:
                work(wire, near, far is None, x.chunk(workers)[rank - 1], y.chunk(workers)[rank - 1])
            seconds.append(t())
    parameters = {
        n: p.detach() for part in (near, far) if part and rank == 0 for n, p in part.named_parameters()
    }
    return {
        "parameters": parameters,
        "sent": wire.sent,
        "received": wire.received,
        "seconds": stats.median(seconds),
    }


def serve(wire, near, far, optimizer, y, workers, shape):
    """Take the server's step.

    far: the layers behind the cut; they see the activations of all workers at once, the loss is their mean.
    """
    ranks = range(1, workers + 1)
    weights = parameters_to_vector(trainable(near))
    for r in ranks:
        wire.send(weights, r)
    if far:
        received = [wire.receive((len(y) // workers, *shape), r) for r in ranks]
        A = torch.cat(received).requires_grad_()  # (W b, ...)
        F.cross_entropy(far(A), y).backward()
        for r, dA in zip(ranks, A.grad.chunk(workers), strict=True):
            wire.send(dA, r)
    gradient = sum(wire.receive(weights.shape, r) for r in ranks)
    if not far:
        gradient /= workers  # each was that of the mean over a worker's own images
    for p, g in zip(trainable(near), gradient.split([p.numel() for p in trainable(near)]), strict=True):
        p.grad = g.view_as(p)
    optimizer.step()
    optimizer.zero_grad()


def work(wire, near, whole, x, y):
    """Take a worker's step.

    Pull the weights, forward, get the gradient at the cut (or from the loss), backward, push the gradients.
    """
    parameters = trainable(near)
    with torch.no_grad():
        vector_to_parameters(wire.receive((sum(p.numel() for p in parameters),), 0), parameters)
    out = near(x)
    if whole:
        loss = F.cross_entropy(out, y)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    else:
        wire.send(out, 0)
        gradients = torch.autograd.grad(out, parameters, wire.receive(out.shape, 0), allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    wire.send(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]), 0)


@torch.no_grad()
def near_shape(near, x):
    """Return the shape of what one image sends over the cut.

    >>> near_shape(nn.Conv2d(1, 4, 3), torch.zeros(1, 1, 8, 8))
    torch.Size([4, 6, 6])
    """
    with evaluating(near):
        return near(x).shape[1:]


def alone(job: Job) -> dict[str, torch.Tensor]:
    """Train the same in this one process, on whole batches: the slow oracle.

    Returns dict name -> parameter.

    >>> batches = ((torch.rand(4, 1, 8, 8), torch.arange(4)),)
    >>> job = Job(make=lambda: build("convnet", 4, (1, 8, 8), widths=(4, 8)), batches=batches)
    >>> list(alone(job))[:2]
    ['features.0.weight', 'features.1.weight']
    """
    model = job.make().train()
    optimizer = job.optimizer(trainable(model))
    for x, y in job.batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


class Pack(torch.autograd.Function):
    """Lay out a tensor for sending: contiguous forward, and its gradient contiguous too.

    >>> Pack.apply(torch.ones(2, 3).T).is_contiguous()
    True
    """

    @staticmethod
    def forward(ctx, x):
        return x.contiguous()

    @staticmethod
    def backward(ctx, dy):
        return dy.contiguous()


class Stage(nn.Module):
    """Run a part of the chain between two links.

    >>> Stage(nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Pack.apply(self.part(Pack.apply(x)))


def pipelined(rank, make, cuts, x, y, microbatches):
    """Return the gradients of this rank's stage of a pipeline, by name.

    A step of GPipe over the parts between the cuts, by `torch.distributed.pipelining`. x is cut into
    `microbatches` equal pieces, and the loss is their mean; so a BatchNorm sees other statistics than in one
    process. Ranks without a stage return {}."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stages = Chain(make().train()).stages(cuts)
    group = dist.new_group(range(len(stages)))
    if rank >= len(stages):
        return {}
    part = stages[rank]
    stage = PipelineStage(Stage(part), rank, len(stages), torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=F.cross_entropy)
    images, labels = [x] if rank == 0 else [], {"target": y, "losses": []} if rank == len(stages) - 1 else {}
    schedule.step(*images, **labels)
    return {n: p.grad for n, p in part.named_parameters()}


def several(rank: int, calls: Sequence[tuple]) -> list:
    """Call several (function, arguments) one after the other in the same processes.

    Starting them takes longer than what they do.

    >>> several(2, [(pow, (3,)), (max, (5, 1))])  # pow(2, 3), max(2, 5, 1)
    [8, 5]
    """
    return [function(rank, *args) for function, args in calls]
