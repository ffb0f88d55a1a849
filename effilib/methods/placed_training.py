"""Training over several processes: a parameter server with a cut, and a pipeline of the same parts.

Rank 0 is the server, the others are workers; with a cut the layers behind it run on the server, and what
travels are the activations there and their gradients. It is still the same synchronous SGD.
"""

import statistics as stats
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from effilib import cost
from effilib.clock import elapsed, pause
from effilib.convolution import evaluating
from effilib.errors import BadInput
from effilib.methods.layer_chain import Chain, trainable

__all__ = ["Job", "Wire", "alone", "several", "take_part"]


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
