"""GradMax (Evci et al. 2022, arXiv:2201.05125): new channels where the gradient is largest.

They read with zero weights, and write into the direction in which the gradient of those weights is largest.
"""

import torch
import torch.nn.functional as F
from torch import nn

from effilib import seeds, surgery
from effilib.convolution import evaluating
from effilib.errors import BadInput
from effilib.methods.widening import append_

__all__ = ["gradmax_", "gradmax_directions"]

SHARE_OF_NORM = 0.5  # norm of a new channel's outgoing weights over the mean of the old ones (authors' code)
LARGE = 1024  # rows and columns beyond which singular vectors are approximated
SPARK = 1e-2  # shift of new channels, because the derivative of ReLU at 0 is 0


def gradmax_directions(M: torch.Tensor, k: int, k1: int, k2: int, stride: int = 1) -> torch.Tensor:
    """Return GradMax's outgoing weights for k new channels.

    They make the gradient of zero incoming weights largest. M: (c_out, c_in, K, K), the gradient of the loss
    with respect to the kernel of one convolution that would go from the new channels' input straight to their
    readers' output; K = k1 + stride (k2 - 1). As dL/dV = A Omega with A[(i, a), (o, b)] = M[o, i, a + stride
    b], they are the right singular vectors of A with the largest singular values. Returns (k, c_out, k2, k2),
    of norm 1, orthogonal.

    >>> directions = gradmax_directions(torch.rand(4, 2, 5, 5), k=3, k1=3, k2=3)
    >>> directions.shape, directions.flatten(1).norm(dim=1).round().tolist()
    (torch.Size([3, 4, 3, 3]), [1.0, 1.0, 1.0])
    """
    windows = M.unfold(2, k1, stride).unfold(3, k1, stride)  # (o, i, b, b, a, a)
    o, i = M.shape[:2]
    A = windows.permute(1, 4, 5, 0, 2, 3).reshape(i * k1 * k1, o * k2 * k2)
    V = _leading(A, min(k, *A.shape))
    if k > len(V):  # more channels than directions: these are used again
        V = V.repeat(-(-k // len(V)), 1)
    return V[:k].view(k, o, k2, k2).to(M.dtype)


def _leading(A, k):
    """The k right singular vectors of A with the largest singular values, (k, columns)."""
    if min(A.shape) > LARGE:
        with seeds.seeded(0, A.device):  # a randomised start (Halko et al. 2011, arXiv:0909.4061)
            return torch.svd_lowrank(A, q=min(k + 16, *A.shape), niter=4)[2][:, :k].T
    A = A.double()
    if A.shape[1] <= A.shape[0]:
        return torch.linalg.eigh(A.T @ A).eigenvectors[:, -k:].flip(1).T
    U = torch.linalg.eigh(A @ A.T).eigenvectors[:, -k:].flip(1)
    return torch.linalg.qr(A.T @ U).Q.T  # orthogonal even where singular values are 0


def gradmax_(
    node: surgery.Node,
    q: int,
    x: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    spark: float = SPARK,
) -> torch.Tensor:
    """Give a node q channels in GradMax's way, in place.

    x: (N, C, H, W), y: (N,): the batch whose gradient counts. New channels read with zero weights and write
    in the directions of `gradmax_directions`, scaled to half of the old ones' mean norm. PyTorch's ReLU has
    derivative 0 at 0, so that such a channel would be dead: it gets a shift `spark`. To keep the function all
    the same, channels come in pairs that write with opposite signs; an odd one out writes nothing. A
    BatchNorm on an all-zero channel multiplies gradients by scale / sqrt(eps), so its scale is sqrt(eps).
    Returns the singular directions used, (pairs, c_out, k2, k2). Raises `BadInput` unless the node has one
    producer and one consumer, both convolutions, with nothing between that changes the size, and a bias or
    BatchNorm for the shift.

    >>> net = build("vgg", 4, (1, 8, 8), widths=((4,), (8, 8)))
    >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    >>> directions = gradmax_(surgery.trace(net)["features.4"], 12, x, y)
    >>> directions.shape, net.settings()["widths"]  # two pairs
    (torch.Size([2, 8, 3, 3]), [[4], [12, 8]])
    """
    model, n = node.model, node.width
    names = [*node.producers, *node.consumers]
    layers = [node.layer(name) for name in names]
    if len(layers) != 2 or not all(isinstance(m, nn.Conv2d) for m in layers):
        raise BadInput(
            f"GradMax: {node.name} is no node between two convolutions, one that writes it and one that "
            "reads it"
        )
    first, second = layers
    if not all(_plain(m) for m in layers):
        raise BadInput(
            f"GradMax: {names[0]} and {names[1]} must be square, padded by zeros, without dilation"
        )
    if first.bias is None and not node.bns:
        raise BadInput(
            f"GradMax: {node.name} has neither bias nor BatchNorm, so that new channels would stay dead "
            "behind ReLU"
        )
    if q < n:
        raise BadInput(f"{node.name} has {n} channels, it cannot be widened to {q}")
    inside, outside = _around(model, first, second, x, y)
    if outside["x"].shape[-2:] != inside["out"].shape[-2:]:
        raise BadInput(f"GradMax: between {names[0]} and {names[1]} the size changes")
    k1, k2, s = first.kernel_size[0], second.kernel_size[0], first.stride[0]
    size = k1 + s * (k2 - 1)
    pad = [
        m.padding[0] if isinstance(m.padding, tuple) else m.kernel_size[0] // 2 * (m.padding == "same")
        for m in layers
    ]
    M = nn.grad.conv2d_weight(
        inside["x"],
        (second.out_channels, first.in_channels, size, size),
        outside["dy"],
        s * second.stride[0],
        pad[0] + s * pad[1],
    )
    pairs = (q - n) // 2
    directions = gradmax_directions(M, pairs, k1, k2, s)
    with torch.no_grad():
        norm = SHARE_OF_NORM * second.weight.movedim(1, 0).flatten(1).norm(dim=1).mean()
        append_(node, q - n, optimizer)
        new = second.weight[:, n:]
        new[:, :pairs] = norm * directions.movedim(0, 1)
        new[:, pairs : 2 * pairs] = -new[:, :pairs]
        for m in [node.layer(b) for b in node.bns] or [first]:
            m.bias[n:] = spark
            if m is not first:
                m.weight[n:] = m.eps**0.5
    return directions


def _plain(conv):
    """Whether GradMax's one convolution through both is as it takes it to be."""
    pairs = [conv.kernel_size, conv.stride, conv.dilation]
    pairs += [] if isinstance(conv.padding, str) else [conv.padding]
    uneven = conv.padding == "same" and conv.kernel_size[0] % 2 == 0
    square = all(a == b for a, b in pairs) and not uneven
    return square and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def _around(model, first, second, x, y):
    """Input and output of `first`, input of `second` and the gradient of its output, on a batch; nothing else
    is left behind.
    """
    seen = {first: {}, second: {}}

    def keep(m, inputs, output):
        seen[m] |= {"x": inputs[0].detach().float(), "out": output.detach()}
        output.register_hook(lambda dy: seen[m].__setitem__("dy", dy.detach().float()))

    hooks = [m.register_forward_hook(keep) for m in seen]
    try:
        with evaluating(model), torch.enable_grad():  # no statistic moves
            loss = F.cross_entropy(model(x).float(), y)
            torch.autograd.grad(loss, list(second.parameters()))
    finally:
        for h in hooks:
            h.remove()
    return seen[first], seen[second]
