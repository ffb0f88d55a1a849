"""Give every purpose a random stream of its own, and set PyTorch's global ones for a while."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch

__all__ = ["seeded", "stream"]


def stream(seed: int, name: str) -> torch.Generator:
    """Return the random stream of a purpose.

    Initial weights, data order and a method's draws never shift each other.

    >>> [torch.rand(1, generator=stream(0, name)).item() < 1 for name in ("weights", "data")]
    [True, True]
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


@contextlib.contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, PyTorch's global generator starts from `seed`; outside, it is as if nothing had been drawn.

    Layers' constructors and dropout know no generator of their own: this is the one place that touches the
    global one.

    >>> with seeded(0):
    ...     first = nn.Linear(2, 2)
    >>> with seeded(0):
    ...     second = nn.Linear(2, 2)
    >>> torch.equal(first.weight, second.weight)
    True
    """
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if cuda else []):
        torch.random.default_generator.manual_seed(seed)
        if cuda:  # the generator of this very GPU, which need not be the current one
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
