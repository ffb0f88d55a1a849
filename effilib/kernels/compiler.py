"""Compile a C++ kernel for this processor at first use, once a machine; it needs no headers of PyTorch's."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from effilib import paths
from effilib.clock import cpu_flags

__all__ = ["load"]

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
        print(f"no C++ kernel, {instead}: {lines[0]}", flush=True)
        return None


def _compiled(source):
    """The shared library of a source, made if it is not there."""
    command = [os.environ.get("CXX", "g++"), *FLAGS]
    key = source.read_bytes() + " ".join([*command, *sorted(cpu_flags())]).encode()
    file = paths.kernels() / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # whole, or not at all
            new = Path(folder) / file.name
            command += [str(source), "-o", str(new)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(new, file)
    return file
