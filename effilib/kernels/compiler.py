"""Compile a C++ kernel for this processor at first use, once a machine; it needs no headers of PyTorch's."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from effilib import paths
from effilib.clock import cpu_flags

__all__ = ["call", "load", "takes"]

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SMALLEST = 2**16  # elements; for fewer, calling a kernel costs more than it saves
FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-fopenmp", "-w")


@functools.cache
def load(name: str, instead: str, needs: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """Return the kernels of `effilib/kernels/<name>.cpp`, or None without a compiler.

    instead: what is done then, in words; it is said once. needs: instructions of the processor without which
    there are none either. CXX names another compiler than g++.

    >>> load("gradient_pruning", "pruned by PyTorch") is load("gradient_pruning", "pruned by PyTorch")
    True
    """
    missing = [f for f in needs if f not in cpu_flags()]
    try:
        if missing:
            raise OSError(f"this processor has no {missing[0]}")
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        print(f"no C++ kernel, {instead}: {why}", flush=True)
        return None


def takes(x: torch.Tensor) -> bool:
    """Say whether a kernel may read images as (N, H, W, C).

    x: (N, C, H, W). It may not where x is followed, not computed, or too small for that to pay.

    >>> takes(torch.zeros(64, 8, 16, 16).to(memory_format=torch.channels_last)), takes(torch.zeros(64, 8))
    (True, False)
    """
    if type(x) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or not (x.is_cpu and x.dtype in TYPES and x.dim() == 4):
        return False
    return x.numel() >= max(1, SMALLEST) and x.is_contiguous(memory_format=torch.channels_last)


def call(kernels: ctypes.CDLL, name: str, *values: torch.Tensor | float | None) -> None:
    """Call a kernel, `<type of the first tensor>_<name>`.

    Tensors are given by address (None: 0), whole numbers as int64, others as float; last comes the number
    of threads.

    >>> x, y, places = torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.zeros(1), torch.zeros(1, dtype=torch.int8)
    >>> if kernels := load("max_pool", "pooled by PyTorch"):
    ...     call(kernels, "forward", x, y, places, 1, 2, 2, 1)
    ...     print(y.item(), places.item())
    3.0 1
    """
    dtype = next(t.dtype for t in values if isinstance(t, torch.Tensor))
    getattr(kernels, f"{TYPES[dtype]}_{name}")(*map(_as_c, (*values, torch.get_num_threads())))


def _as_c(value):
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def _compiled(source):
    """The shared library of a source, made if it is not there whole.

    Its name ends in the digest of its content: a damaged one would end the process when it is loaded.
    """
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS]
    headers = b"".join(file.read_bytes() for file in sorted(source.parent.glob("*.h")))
    key = source.read_bytes() + headers + " ".join([*command, *sorted(cpu_flags())]).encode()
    folder, name = paths.kernels(), f"{source.stem}-{_digest(key)}"
    for file in folder.glob(f"{name}-*.so"):
        if file.stem == f"{name}-{_digest(file.read_bytes())}":
            return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # whole, or not at all
        new = Path(temporary) / "kernel.so"
        subprocess.run([*command, str(source), "-o", str(new)], check=True, capture_output=True, text=True)
        file = folder / f"{name}-{_digest(new.read_bytes())}.so"
        os.replace(new, file)
    return file


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]
