"""Compile a C++ kernel for this processor at first use, once a machine; it needs no headers of PyTorch's."""

import ctypes
import functools
import hashlib
import os
import shlex
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
        why = next((line for line in lines if "error" in line), lines[0])
        print(f"no C++ kernel, {instead}: {why}", flush=True)
        return None


def _compiled(source):
    """The shared library of a source, made if it is not there whole.

    Its name ends in the digest of its content: a damaged one would end the process when it is loaded.
    """
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS]
    key = source.read_bytes() + " ".join([*command, *sorted(cpu_flags())]).encode()
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
