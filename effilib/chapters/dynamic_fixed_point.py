"""Chapter 3.3: what is trained, and the integer route checked and timed at GEMM and layer level."""

import statistics as stats

import pandas as pd
import torch

from effilib import figures
from effilib.clock import interleaved, steady_memory
from effilib.convolution import Convolution
from effilib.cost import Conv
from effilib.experiment import Arm
from effilib.methods.dynamic_fixed_point import (
    DynamicFixedPoint,
    chained_mm,
    columns,
    dequantise,
    fixed_point,
    halves,
    integer_mm,
    quantise,
)
from effilib.models import stream
from effilib.tasks import Task
from effilib.timing import formats, layer_times, say_conv

BITS = (16, 14, 10, 8, 6)
SECONDS = {"smoke": 0.5, "quick": 0.7}  # for a table's rounds
LONG = 2**17  # int8 sums of that many products still fit into int32
GEMMS = {
    "smoke": ((64, 64, 64),),
    "quick": ((512, 512, 512), (4096, 1152, 128)),
    "study": ((512, 512, 512), (4096, 1152, 128), (2048, 2048, 2048)),
}
LAYERS = {
    "smoke": (Conv(N=4, C=8, O=8, H=8, W=8),),
    "quick": (Conv(N=64, C=32, O=32, H=14, W=14), Conv(N=64, C=128, O=128, H=14, W=14)),
    "study": (
        Conv(N=64, C=16, O=16, H=32, W=32),
        Conv(N=64, C=64, O=64, H=8, W=8),
        Conv(N=64, C=128, O=128, H=16, W=16),
    ),
}

NARROW = {"widths": (8, 16, 32), "blocks": (1, 1, 1)}
# An integer step takes several times as long as fp32's: runs are short, and the quick preset trains a
# narrower network on smaller batches.
SIZES = {
    "quick": dict(epochs=0.5, widths=NARROW, batch_size=32, lr=0.1),
    "study": dict(epochs=1.2),
}
GRID = {
    "quick": SIZES["quick"] | dict(epochs=0.25),
    "study": dict(epochs=0.5),
    "full": dict(epochs=2),
}


def by_hand():
    """Four numbers in 4 bits: the exponent, the integers, and what they stand for."""
    x = torch.tensor([0.9, -2.6, 0.1, 1.4])
    q = quantise(x, 4)
    rows = {
        f"{v:g}": {"x 2^scf": f"{v * 2 ** q.scf.item():g}", "I": str(i), "I 2^-scf": f"{d:g}"}
        for v, i, d in zip(x.tolist(), q.I.tolist(), dequantise(q).tolist(), strict=True)
    }
    return pd.DataFrame(rows).T.rename_axis(
        f"x: max 2.6 = 0.65 x 2^2, so E = 2 and scf = 4 - 1 - 2 = {q.scf.item():g}"
    )


def error_table(K=512):
    """Relative error of a product of N(0, 1) matrices with an inner dimension of K, by number format."""
    g = stream(0, "errors")
    a, b = torch.randn(128, K, generator=g), torch.randn(K, 128, generator=g)
    exact, rows = a.double() @ b.double(), {}

    def note(name, product, bits):
        rows[name] = {
            "bits": bits,
            "relative error": f"{(product.double() - exact).norm() / exact.norm():.1e}",
        }

    for bits in BITS:
        qa, qb = quantise(a, bits), quantise(b, bits)
        note(f"DFP-{bits}", integer_mm(halves(qa.I), halves(qb.I)) * 2.0 ** -(qa.scf + qb.scf).double(), bits)
    for name, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ):  # operands rounded, sums exact: the format alone
        note(f"{name}, operands rounded", a.to(dtype).double() @ b.to(dtype).double(), 16)
    note("fp32", a @ b, 32)
    return pd.DataFrame(rows).T


def check_exact(size=256):
    """Products of 16-bit integers by several routes against int64: how many of the results differ."""
    g = stream(0, "exact")
    a, b = (torch.randint(-8191, 8192, s, generator=g).to(torch.int16) for s in ((size, 512), (512, size)))
    truth = a.long() @ b.long()
    routes = {
        "four int8 products into int32 (used here)": integer_mm(halves(a), halves(b)),
        "float64": a.double() @ b.double(),
        "fp32 (an emulation)": a.float() @ b.float(),
        "torch's own int16 @ int16": a @ b,
    }
    rows = {
        n: {
            "wrong results": f"{(r.long() != truth).double().mean():.1%}",
            "largest error": f"{(r.long() - truth).abs().max():,}",
        }
        for n, r in routes.items()
    }
    return pd.DataFrame(rows).T.rename_axis("16-bit integers, 512 products a sum")


def overflow_table(K=512):
    """A tensor of largest numbers, built to overflow: what int32 would make of the sum, and the chain that
    cannot overflow.
    """
    rows = {}
    for bits in (16, 15, 14):
        largest = 32639 if bits == 16 else 2 ** (bits - 1) - 1
        a, b = torch.full((1, K), largest, dtype=torch.int16), torch.full((K, 1), largest, dtype=torch.int16)
        exact, safe = K * largest**2, (2**31 - 1) // largest**2
        wrapped = (exact + 2**31) % 2**32 - 2**31
        try:
            chained_mm(halves(a), halves(b), K)
            caught = "NOT CAUGHT"
        except OverflowError:
            caught = "caught"
        summed = chained_mm(halves(a), halves(b), safe).item()
        rows[f"{bits} bits"] = {
            f"true sum of {K}": f"{exact:,}",
            "in int32": f"{wrapped:,}",
            "one chain": caught,
            "longest safe chain": safe,
            "in safe chains, fp32 between": f"{summed:,.0f}",
        }
    return pd.DataFrame(rows).T


def gemm_table(preset, device="cpu"):
    """GEMMs by route, core only and with rounding and splitting the operands: table of ms, and speed-ups over
    fp32.
    """
    steady_memory()
    g, rows = stream(0, "gemm"), {}
    for M, K, N in GEMMS.get(preset, GEMMS["study"]):
        a, b = torch.randn(M, K, generator=g).to(device), torch.randn(K, N, generator=g).to(device)
        functions = {"fp32": lambda a=a, b=b: a @ b}
        if "bf16" in formats(device):
            a16, b16 = a.bfloat16(), b.bfloat16()
            functions["bf16"] = lambda a=a16, b=b16: a @ b
        for bits, name in ((8, "int8, 1 product"), (14, "int16, 4 products")):
            pa, pb = halves(quantise(a, bits).I), halves(quantise(b, bits).I)
            functions[f"{name}, core"] = lambda pa=pa, pb=pb: [
                torch._int_mm(p, q) for p, _ in pa for q, _ in pb
            ]
            functions[f"{name}, whole"] = lambda a=a, b=b, bits=bits: _whole(a, b, bits)
        times = interleaved(
            functions, repeats=3 if preset == "smoke" else 15, device=device, seconds=SECONDS.get(preset, 4)
        )
        ms = {n: 1e3 * stats.median(t) for n, t in times.items()}
        rows[f"{M} x {K} x {N}"] = {n: f"{t:.2f} ms, {ms['fp32'] / t:.2f}x" for n, t in ms.items()}
    return pd.DataFrame(rows).T.rename_axis("M x K x N: time, speed-up over fp32")


def _whole(a, b, bits):
    qa, qb = quantise(a, bits), quantise(b, bits)
    return torch.ldexp(
        chained_mm(halves(qa.I), halves(qb.I), LONG if bits <= 8 else 2304), -(qa.scf + qb.scf)
    )


def layer_table(preset, device="cpu"):
    """Forward and backward pass of single layers in ms: fp32, bf16, the integer route with 8 and 14 bits."""
    convs = {say_conv(c): c for c in LAYERS.get(preset, LAYERS["study"])}
    chains = {"forward": 2304, "dX": 2304, "dW": 2304}
    integer = {f"DFP-{bits}": fixed_point(bits, lambda: chains) for bits in (8, 14)}
    few = dict(repeats=2, seconds=1) if preset == "smoke" else dict(repeats=9, seconds=SECONDS.get(preset, 4))
    found = [
        layer_times(convs, integer if p == "fp32" else {}, precision=p, device=device, **few).rename(
            index={"exact": p}
        )
        for p in reversed(formats(device))
    ]
    table = pd.concat(found).loc[list(convs)].rename_axis(["layer", "arithmetic"])
    whole = table.sum(axis=1)
    table["x over fp32"] = whole.xs("fp32", level=1).reindex(table.index, level=0) / whole
    return table


def parts_figure(preset, device="cpu"):
    """(figure, caption): where the time of an integer layer's forward pass goes, beside fp32 and bf16."""
    c, g, product = LAYERS.get(preset, LAYERS["study"])[-1], stream(0, "parts"), Convolution(padding=(1, 1))
    shapes = (c.N, c.C, c.H, c.W), (c.O, c.C, c.k, c.k)
    x, w = (torch.randn(s, generator=g).to(device).to(memory_format=torch.channels_last) for s in shapes)
    functions = {("fp32", "product"): lambda: product.forward(x, w)}
    if "bf16" in formats(device):
        x16, w16 = x.bfloat16(), w.bfloat16()
        functions["bf16", "product"] = lambda: product.forward(x16, w16)
    for bits in (8, 14):
        q, qw = quantise(x, bits), quantise(w, bits)
        parts, weights = halves(q.I), [(p.permute(2, 3, 1, 0).reshape(-1, c.O), f) for p, f in halves(qw.I)]
        patches = [(columns(p, product, (3, 3)), f) for p, f in parts]
        name = f"DFP-{bits}"
        functions[name, "rounding"] = lambda bits=bits: (quantise(x, bits), quantise(w, bits))
        if bits > 8:
            functions[name, "splitting"] = lambda q=q: halves(q.I)
        functions[name, "gathering patches"] = lambda parts=parts: [
            columns(p, product, (3, 3)) for p, _ in parts
        ]
        functions[name, "product"] = lambda a=patches, b=weights: [
            torch._int_mm(p, o) for p, _ in a for o, _ in b
        ]
        functions[name, "product and sums"] = lambda a=patches, b=weights: chained_mm(a, b, 2304)
    times = interleaved(
        functions, repeats=3 if preset == "smoke" else 15, device=device, seconds=SECONDS.get(preset, 4)
    )
    ms, parts = {k: 1e3 * stats.median(t) for k, t in times.items()}, {}
    for (name, part), t in ms.items():
        if part == "product and sums":
            parts[name]["adding up, checking, scaling"] = max(0.0, t - ms[name, "product"])
        else:
            parts.setdefault(name, {})[part] = t
    order = ("rounding", "splitting", "gathering patches", "product", "adding up, checking, scaling")
    parts = {n: {p: row[p] for p in order if p in row} for n, row in parts.items()}
    figure = figures.shares(parts, xlabel=f"ms, forward pass, {say_conv(c)}, batch {c.N}")
    return figure, (
        "Where the forward pass of one layer spends its time. What surrounds the integer products, one pass "
        "over the operands after the other, is what a fused kernel would have to hide."
    )


def arms(task: Task) -> list[Arm]:
    """Return fp32, the authors' 14 of 16 bits, and bf16, to which this format lost in the end.

    All take the same steps, so that their curves cover the same accuracies.
    """
    return [
        Arm(name="fp32", role="baseline", changes={"precision": "fp32"}),
        Arm(
            name="DFP-14",
            methods=(DynamicFixedPoint(),),
            changes={"precision": "fp32"},
            lengths=task.lengths,
        ),
        Arm(name="bf16", role="control", changes={"precision": "bf16"}, lengths=task.lengths),
    ]


def grid(task: Task) -> list[Arm]:
    """Return numbers of bits; and rounding, exponents and master weights where bits are few."""
    fp32 = {"precision": "fp32"}
    settings = {f"{b} bits": dict(bits=b) for b in BITS}
    if task.preset in ("smoke", "quick"):
        settings = {n: settings[n] for n in ("14 bits", "6 bits")}
    settings["6 bits, stochastic rounding"] = dict(bits=6, rounding="stochastic")
    if task.preset in ("study", "full"):
        settings["6 bits, an exponent a channel"] = dict(bits=6, exponents="channel")
        settings["6 bits, both"] = dict(bits=6, exponents="channel", rounding="stochastic")
        settings["5 bits"], settings["4 bits"] = dict(bits=5), dict(bits=4)
        settings["10 bits, no master weights"] = dict(bits=10, master=False)
    return [
        Arm(name="fp32", role="baseline", changes=fp32),
        *(
            Arm(name=n, methods=(DynamicFixedPoint(**how),), changes=fp32, lengths=task.lengths)
            for n, how in settings.items()
        ),
    ]
