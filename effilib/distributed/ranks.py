"""One training over several processes, started by `torchrun`: one a GPU, or a few that share a CPU.

Every process (a *rank*) holds the whole network and the whole data set, and draws for the whole batch: order,
crops and flips are those of one process. It trains on its share of each batch; DistributedDataParallel
averages the gradients, and all take the same step. BatchNorm normalises each share by itself. What is decided
is decided by rank 0 (`agree`, `first`), and only rank 0 writes.

`ranks()` says who takes part. For one process alone everything here gives back what it was given.
"""

import atexit
import os
import pickle
import platform
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from effilib.distributed.processes import loopback
from effilib.errors import BadInput, NoEffect, NotApplicable

if TYPE_CHECKING:
    from effilib.dataset import Batches

__all__ = ["ALONE", "Ranks", "gpu", "ranks", "several", "sync_"]

T = TypeVar("T")


def several() -> bool:
    """Return whether this process was started as one of several.

    By `torchrun`, or by anything that sets the same variables.

    >>> several()
    False
    """
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def gpu() -> str:
    """Return the GPU of this process: "cuda", or one for each of several processes on a machine.

    Raises `BadInput` if there are too few.

    >>> gpu()
    'cuda'
    """
    if not several():
        return "cuda"
    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if mine >= there:
        raise BadInput(
            f"process {mine} of this machine has no GPU of its own, there are {there}: start as many"
            " processes as GPUs"
        )
    return f"cuda:{mine}"


def ranks(device: torch.device | str = "cpu") -> "Ranks":
    """Return the `Ranks` that train together on data on `device`.

    At its first call with several processes they meet: NCCL on GPUs, else gloo. Raises `BadInput` if two
    processes would use the same GPU.

    >>> ranks() == ALONE
    True
    """
    if not dist.is_available() or not (dist.is_initialized() or several()):
        return ALONE
    if not dist.is_initialized():
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # needs no network
            for name, value in loopback().items():
                os.environ.setdefault(name, value)
        store, rank, size = next(rendezvous("env://"))
        if (
            os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        ):  # the store outlives a restart, with the addresses of those who are gone
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size
        )
        atexit.register(_leave)
        warnings.filterwarnings(
            "ignore", message="Grad strides do not match bucket view strides"
        )  # 1x1 filters: no matter
        places = _ranks().gather((platform.node(), str(torch.device(device))))
        if cuda and len(set(places)) < len(places):
            raise BadInput(
                f"several processes on {device}: each needs a GPU of its own, e.g."
                " dataset.to(effilib.distributed.gpu())"
            )
    return _ranks()


def _pack(value):
    """A value as bytes: what it cannot be sent for is noticed before anybody waits."""
    try:
        return None, pickle.dumps(value)
    except Exception as error:  # of many kinds
        raise TypeError(f"a {type(value).__name__} cannot be sent to other processes: {error}") from error


def _failure(error):
    """What another process needs to raise `error` too: an exception itself may be one that cannot be sent."""
    return type(error).__name__, str(error)


def _unpack(packed):
    kind, content = packed
    if kind is None:
        return pickle.loads(content)
    known = {error.__name__: error for error in (BadInput, NoEffect, NotApplicable)}
    raise known.get(kind, RuntimeError)(content or kind)


def _ranks():
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size())


def _leave():
    """Part. Gloo's threads may still hold a tensor of the last exchange, and dropping it needs Python's lock:
    later, in an interpreter that is being torn down, that aborts a process whose work is done. DDP keeps the
    group, so that its threads cannot be joined."""
    if dist.is_initialized():
        threading.Event().wait(
            0.1
        )  # gives the lock away; nothing is exchanged, so it cannot hang where another process has died
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, seen from one of them. What exchanges something must be called by all, in
    the same order.

    >>> [Ranks(rank=rank, size=2).share(5) for rank in (0, 1)]
    [slice(0, 3, None), slice(3, 5, None)]
    """

    rank: int = 0
    size: int = 1

    # Shares of a batch

    def share(self, n: int) -> slice:
        """Return this rank's slice of a batch; sizes differ by one at most."""
        if n < self.size:
            raise BadInput(
                f"a batch of {n} cannot be shared among {self.size} processes: it needs at least one image"
                " for each"
            )
        each, more = divmod(n, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def weigh(self, mean: torch.Tensor, batches: "Batches") -> torch.Tensor:
        """Weigh a mean over this rank's share of a batch.

        The mean of the weighed ones over all ranks is that over the batch.
        """
        if self.size == 1:
            return mean
        mine = self.share(batches.batch_size)
        return mean * ((mine.stop - mine.start) * self.size / batches.batch_size)

    def mean(self, mean: torch.Tensor, batches: "Batches") -> torch.Tensor:
        """Return a whole batch's mean from the means over the shares."""
        return mean if self.size == 1 else self.total(self.weigh(mean, batches)) / self.size

    # Words: anything that can be pickled; what cannot is an error in all processes, as they would wait for it

    def agree(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        return self.first(lambda: value)

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on all ranks.

        What it raises there is raised by all, in the same words.
        """
        if self.size == 1:
            return function()
        packed = failed = None
        if self.rank == 0:
            try:
                packed = _pack(function())
            except Exception as error:  # the others wait for an answer
                failed, packed = error, _failure(error)
        box = [packed]
        dist.broadcast_object_list(box)
        if failed is not None:
            raise failed
        return _unpack(box[0])

    def gather(self, value: T) -> list[T]:
        """Return the list of all ranks' values, on all ranks."""
        if self.size == 1:
            return [value]
        try:
            packed = _pack(value)
        except Exception as error:
            packed = _failure(error)
        values = [None] * self.size
        dist.all_gather_object(values, packed)
        return [_unpack(v) for v in values]

    def check(self, mine: dict) -> None:
        """Raise `BadInput`, on all ranks, unless all train the same. mine: a dict that says what."""
        everyone = self.gather(mine)
        for rank, theirs in enumerate(everyone[1:], 1):
            other = [k for k, v in everyone[0].items() if theirs[k] != v]
            if other:
                raise BadInput(
                    f"process {rank} does not train what process 0 does: other {' and '.join(other)}"
                )

    # Numbers

    def total(self, t: torch.Tensor) -> torch.Tensor:
        """Return a tensor's sum over all ranks."""
        if self.size > 1:
            t = t.detach().clone()
            dist.all_reduce(t)
        return t

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Return the whole batch (N, ...) from all ranks' shares, slowly."""
        return x if self.size == 1 else torch.cat([part.to(x.device) for part in self.gather(x.cpu())])

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make tensors the mean over all ranks, in place."""

        def mean(flat):
            dist.all_reduce(flat)
            flat /= self.size

        self._exchange(tensors, mean)

    def copy_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make tensors those of rank 0, in place."""
        self._exchange(tensors, lambda flat: dist.broadcast(flat, 0))

    @torch.no_grad()
    def _exchange(self, tensors, exchange):
        """Exchange tensors in place: all of a format as one long vector."""
        for dtype in dict.fromkeys(t.dtype for t in tensors) if self.size > 1 else ():
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in some])
            exchange(flat)
            for t, new in zip(some, flat.split([t.numel() for t in some]), strict=True):
                t.copy_(new.view(t.shape))

    # The network

    def wrap(self, model: nn.Module, sync_bn: bool = False) -> nn.Module:
        """Return the model with gradients averaged over the ranks.

        All get rank 0's parameters and buffers. sync_bn: let BatchNorm take its moments over the whole batch.
        To be called anew when parameters came or went.
        """
        if self.size == 1:
            return model
        if sync_bn:
            sync_(model)
        wrapped = DistributedDataParallel(model)
        # after this once: rank 0's statistics at every step would be those of its share alone
        wrapped.broadcast_buffers = False
        return wrapped

    def complete(self, model: nn.Module) -> None:
        """After a backward pass: raise `BadInput` if a parameter took no part in it.

        The other ranks' gradients for it would be waited for in vain.
        """
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if unused and self.size > 1:
            raise BadInput(
                f"over several processes every parameter must take part in every step: {unused[0]} does not"
            )

    def statistics_(self, model: nn.Module) -> None:
        """Make BatchNorm's running statistics the mean over all ranks, in place.

        As they are linear, this is as if it were done at every step.
        """
        norms = [
            m
            for m in model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        self.mean_([t for m in norms for t in (m.running_mean, m.running_var)])


ALONE = Ranks()


def sync_(model: nn.Module, on: bool = True) -> None:
    """Let BatchNorms span the whole batch, or make them plain again.

    In place; `nn.SyncBatchNorm` works on CUDA only.

    >>> net = nn.Sequential(nn.BatchNorm2d(4))
    >>> for on in (True, False):
    ...     sync_(net, on)
    ...     type(net[0]).__name__
    'SyncBatchNorm'
    'BatchNorm2d'
    """
    for m in model.modules():
        if on and type(m) in (nn.BatchNorm1d, nn.BatchNorm2d):
            m.plain, m.process_group = type(m), None  # None: all ranks
            m.__class__ = nn.SyncBatchNorm
        elif not on and hasattr(m, "plain"):
            m.__class__ = m.plain
            del m.plain, m.process_group
