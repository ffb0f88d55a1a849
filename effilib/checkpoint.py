"""Save and resume a training run, architecture included. Plain tensors and values only: loads with `weights_only=True`.

Written at the end of an epoch, atomically: a run that is killed goes on from its last whole epoch, bit for bit.
"""

import io
import pickle
from dataclasses import asdict
from pathlib import Path

import torch

from effilib import models, paths
from effilib.errors import BadInput


def save_model(path, model, network, classes, shape):
    """Save a network with all that is needed to build it anew: its import path or name, classes, (C, H, W) and widths."""
    architecture = {"network": network, "classes": classes, "shape": list(shape), "settings": models.describe(model)}
    _write(path, {"architecture": architecture, "model": model.state_dict()})


def load_model(path):
    """Build the saved network anew, also one whose widths and depths were changed by surgery, and load its weights.

    Raises `BadInput` if the file cannot be read, or a user's network no longer has the shapes that were saved.
    """
    saved = _read(path)
    a = saved["architecture"]
    model = models.build(a["network"], a["classes"], tuple(a["shape"]), **a["settings"])
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise BadInput(f"{path}: the weights do not fit network {a['network']}: {str(error).splitlines()[-1].strip()}") from error
    return model


def save(path, run, history, batches):
    """Write the state of `run` at the end of an epoch to `path` (None: nowhere)."""
    if path is None:
        return
    with run.clock.paused():
        _write(path, {
            "recipe": asdict(run.recipe), "seed": run.seed, "digest": run.dataset.digest,
            "methods": [repr(m) for m in run.methods],
            "settings": models.describe(run.model),
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "state": [run.state.get(m) for m in run.methods],
            "generators": [run.generators[m].get_state() for m in run.methods],
            "data": batches.generator.get_state(), "dropout": torch.get_rng_state(),
            "step": run.step, "epoch": run.epoch + 1, "structures": run.structures, "events": run.events,
            "clock": run.clock.totals(),
            "history": {k: getattr(history, k) for k in ("rows", "flops", "memory", "warm_up")},
        })  # fmt: skip


def read(path):
    """The content of a checkpoint, or None where there is none."""
    return _read(path) if path is not None and Path(path).exists() else None


def shape_(model, saved):
    """Give one of our networks the widths and depths that surgery had given it when it was saved, in place."""
    if saved and saved["settings"] != models.describe(model):
        rebuilt = type(model)(model.head.out_features, next(model.parameters()).shape[1], **saved["settings"])
        model.__dict__ = rebuilt.__dict__  # the caller's model it stays
    return model


def restore(saved, path, run, history, batches):
    """Bring `run`, whose methods have been set up, to the saved state.

    Raises `BadInput` if it is another run's: another recipe, seed, data set or list of methods.
    """
    mine = {"recipe": asdict(run.recipe), "seed": run.seed, "digest": run.dataset.digest, "methods": [repr(m) for m in run.methods]}
    other = [k for k, v in mine.items() if saved[k] != v]
    if other:
        raise BadInput(f"checkpoint {path} belongs to another run: its {' and '.join(other)} differ; delete it or name another file")
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    for method, state, generator in zip(run.methods, saved["state"], saved["generators"], strict=True):
        run.generators[method].set_state(generator)
        if state is not None:
            run.state[method] = state
    batches.generator.set_state(saved["data"])
    torch.set_rng_state(saved["dropout"])
    run.step, run.epoch, run.structures, run.events = saved["step"], saved["epoch"], saved["structures"], saved["events"]
    run.clock.forget(**saved["clock"])
    for k, v in saved["history"].items():
        setattr(history, k, v)


def _write(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    paths.write(paths.make(Path(path).absolute().parent) / Path(path).name, buffer.getvalue())


def _read(path):
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path} is not a readable checkpoint ({str(error).splitlines()[0]})") from error
