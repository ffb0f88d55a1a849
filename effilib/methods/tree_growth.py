"""Where new classes go in a tree: the rules of Tree-CNN (Roy, Panda, Roy 2020, arXiv:1802.05800).

The root is shown images of new classes, and what it takes them for decides. The rules are those of the second
generation of the authors' code, with its alpha = beta = 0.1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from effilib.errors import BadInput

__all__ = ["Growth", "grow", "likelihood"]

EPS = 1e-9  # 0.4 - 0.3 is not above 0.1


def likelihood(
    logits: torch.Tensor, labels: torch.Tensor, full: Iterable[int] = ()
) -> tuple[torch.Tensor, list[int]]:
    """Return (L, classes): how much the root takes each new class for each child.

    L: (K, M) of K children and M new classes; each column sums to 1. logits: (N, K), the root's in eval mode
    for images of the new classes; labels: (N,) their classes. full: children that hold as many classes as
    they may; they are left out of the sum and get 0. The mean is that of the logits, before the softmax.

    >>> L, classes = likelihood(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([5, 5]))
    >>> classes, L[:, 0].argmax().item()  # class 5 is taken for child 1
    ([5], 1)
    """
    classes, full = labels.unique(), set(full)  # sorted
    O = torch.stack([logits[labels == c].double().mean(0) for c in classes], dim=1)  # noqa: E741  (K, M)
    O[torch.tensor(sorted(full), dtype=torch.int64, device=O.device)] = -torch.inf
    L = torch.softmax(O, dim=0) if len(full) < len(O) else torch.zeros_like(O)
    return L, classes.tolist()


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Where new classes went.

    T: class -> child, a partition onto 0 ... K - 1. origin: of each child, which one it was, None if it is
    new. log: for each new class what was done and why, as plain values: class, rule ("add", "merge", "merge
    refused", "new leaf"), child (as in T), values (the likelihoods compared), why.

    >>> Growth(T={0: 0, 1: 1, 2: 2}, origin=[0, 1, None], log=[]).origin[2] is None  # child 2 is new
    True
    """

    T: dict
    origin: list
    log: list


def grow(
    L: torch.Tensor | list[list[float]],
    T: dict[int, int],
    classes: list[int] | None = None,
    *,
    cap: int = 5,
    alpha: float = 0.1,
    beta: float = 0.1,
) -> Growth:
    """Place new classes among the children by their likelihoods.

    L: (K, M). T: class -> child 0 ... K - 1. classes: of L's columns (default: the numbers after T's). cap:
    classes that a child may hold. One class after the other, the surest first; a, b: its two likeliest
    children from the first with room on, with values v1, v2 and v3 that of the next:

    - add to a, if v1 - v2 > alpha;
    - else, if v2 - v3 > beta, two rivals that the root confuses: *merge* b into a and add to a. Not if b was
      a branch before, or a would be over the cap: then the class goes to the one of a, b with fewer classes;
    - else the class is like none of them: a *new leaf* of the root. So it is where no child has room.

    Raises `BadInput` for likelihoods that do not fit T, classes that T has, or a child that is over the cap.

    >>> growth = grow([[0.9, 0.4], [0.1, 0.3], [0.0, 0.3]], {0: 0, 1: 1, 2: 2}, classes=[3, 4])
    >>> growth.T, [entry["rule"] for entry in growth.log]  # class 3 looks like child 0, class 4 like none
    ({0: 0, 1: 1, 2: 2, 3: 0, 4: 3}, ['add', 'new leaf'])
    """
    v = torch.as_tensor(L).double()
    K, M = _check(v, T, cap, alpha, beta)
    classes = [max(T) + 1 + m for m in range(M)] if classes is None else list(classes)
    if len(classes) != M or len(set(classes)) != M or set(classes) & set(T):
        raise BadInput(f"tree: {M} columns of L need {M} new classes, got {classes} beside {sorted(T)}")
    old, T, log, left = dict(T), dict(T), [], list(range(M))
    v, n = v.sort(dim=0, descending=True, stable=True)  # (K, M): values, and the children's names
    v = F.pad(v, (0, 0, 0, 2))  # fewer than three children: the missing ones have likelihood 0

    def held(child, table):
        return sum(k == child for k in table.values())

    while left:
        m = max(left, key=lambda m: v[0, m])
        left.remove(m)
        s = next((r for r in range(K) if held(int(n[r, m]), T) < cap), None)
        if s is None:
            v1 = v2 = v3 = 0.0
        else:
            v1, v2, v3 = v[s : s + 3, m].tolist()
            a = int(n[s, m])
            b = int(n[s + 1, m]) if s + 1 < K else None
        entry = {"class": classes[m], "values": [v1, v2, v3]}
        if s is None:
            child, rule, why = max(K - 1, *T.values()) + 1, "new leaf", f"every child holds {cap} classes"
        elif v1 - v2 > alpha + EPS:
            child, rule, why = a, "add", f"{v1:.2f} - {v2:.2f} > {alpha:g}"
        elif a == b:
            child, rule, why = a, "add", "both rivals were merged before"
        elif v2 - v3 > beta + EPS:
            rivals, after = (
                f"{v1:.2f} and {v2:.2f} are close, the next is {v3:.2f}",
                held(a, T) + held(b, T) + 1,
            )
            if held(b, old) > 1 or after > cap:
                child, rule = min(a, b, key=lambda k: held(k, T)), "merge refused"
                why = rivals + (
                    "; the rival was a branch before"
                    if held(b, old) > 1
                    else f"; together {after} classes, over {cap}"
                )
            else:
                child, rule, why = a, "merge", rivals
                entry["merged"] = [c for c, k in T.items() if k == b]
                T = {c: a if k == b else k for c, k in T.items()}
                n[n == b] = a  # later columns mean the merged child
        else:
            child, rule, why = (
                max(K - 1, *T.values()) + 1,
                "new leaf",
                f"{v1:.2f}, {v2:.2f}, {v3:.2f}: like none",
            )
        T[classes[m]] = child
        log.append(entry | {"rule": rule, "why": why})
    kept = sorted(set(T.values()))  # a merged child leaves a gap
    T = {c: kept.index(k) for c, k in T.items()}
    return Growth(
        T=T, origin=[k if k < K else None for k in kept], log=[e | {"child": T[e["class"]]} for e in log]
    )


def _check(L, T, cap, alpha, beta):
    children = sorted(set(T.values()))
    if L.dim() != 2 or children != list(range(len(L))) or not torch.isfinite(L).all():
        raise BadInput(
            f"tree: L has the shape {tuple(L.shape)}, but T's children are {children}: "
            "one row per child 0, 1, ..., finite"
        )
    largest = max(sum(k == child for k in T.values()) for child in children)
    if largest > cap:
        raise BadInput(f"tree: a child holds {largest} classes, but the cap is {cap}")
    if min(alpha, beta) < 0:
        raise BadInput(f"tree: alpha is {alpha} and beta {beta}, they must be 0 or more")
    return L.shape
