"""Save and resume a training run, architecture included, as plain tensors and values (`weights_only`).

Written at the end of an epoch, atomically: a run that is killed goes on from its last whole epoch, bit for
bit. A network whose shape had changed is built anew: ours by its widths and depths, a user's by doing the
same surgery again.
"""

import contextlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from effilib import convolution, models, networks, paths, provenance, seeds, surgery
from effilib.data import LARGEST
from effilib.dataset import Batches, Dataset
from effilib.distributed import Ranks
from effilib.errors import BadInput

if TYPE_CHECKING:
    from effilib.history import History
    from effilib.hooks import Method
    from effilib.recipe import Recipe
    from effilib.run import Run

__all__ = [
    "identity", "load_images", "load_model", "operate_again_", "read", "restore", "save", "save_model",
    "shape_",
]  # fmt: skip

ALIKE = 1e-2  # of the largest logit: other processors and TF32 round otherwise


def save_model(
    path: Path | str, model: nn.Module, network: str, dataset: Dataset, *, layout: str = "contiguous"
) -> None:
    """Save a network with all that building and using it needs.

    Also with its answer to two fixed pictures, by which `load_model` knows it again. network: its name, or
    the import path of a user's own. dataset: on what it was trained, whose classes and images it knows from
    now on. layout: the memory format of its training.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> save_model("net.pt", net, "convnet", data)
    >>> torch.equal(load_model("net.pt").head.weight, net.head.weight)
    True
    """
    architecture = {
        "network": network,
        "classes": dataset.classes,
        "shape": list(dataset.shape),
        "settings": models.describe(model),
    }
    images = {
        "names": [str(name) for name in dataset.names],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "layout": layout,
    }
    saved = {"architecture": architecture, "images": images, "model": model.state_dict()}
    _write(path, saved | {"answer": _answer(model, dataset.shape)})


@torch.no_grad()
def _answer(model, shape):
    """Logits (2, classes) of two pictures of waves, in eval mode: layers without weights show only here."""
    like = next(model.parameters())
    waves = torch.arange(2 * torch.Size(shape).numel(), dtype=torch.float64).pow(1.5).sin()
    with convolution.evaluating(model), seeds.seeded(0, like.device):
        return model(waves.view(2, *shape).to(like)).double().cpu()


def load_images(path: Path | str) -> dict:
    """Return what a saved network knows of its images.

    A dict: names, mean, std, layout and shape. names: of the classes. shape: (C, H, W). Raises `BadInput` for
    a file that does not say it.

    >>> data = load("synthetic")
    >>> save_model("net.pt", build("convnet", data.classes, data.shape), "convnet", data)
    >>> known = load_images("net.pt")
    >>> known["names"], known["shape"], known["layout"]
    (('0', '1', '2', '3'), (1, 8, 8), 'contiguous')
    """
    saved = _read(path, "architecture", map_location="cpu")
    if "images" not in saved:
        raise BadInput(
            f"{path} is of an older effilib and knows neither its classes nor how its images were normalised:"
            " train it again"
        )
    try:
        known = {k: saved["images"][k] for k in ("names", "mean", "std", "layout")}
        known |= {k: tuple(known[k]) for k in ("names", "mean", "std")}
        channels, height, width = known["shape"] = tuple(saved["architecture"]["shape"])
        sides = all(type(n) is int and 0 < n <= LARGEST for n in (height, width))
        values = [v for k in ("mean", "std") for v in known[k]]
        fits = len(known["names"]) == saved["architecture"]["classes"] and len(values) == 2 * channels
        if not (sides and fits and all(isinstance(v, float) for v in values) and min(known["std"]) > 0):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a checkpoint of a network") from error
    return known


def load_model(path: Path | str, network: str | None = None) -> nn.Module:
    """Build a saved network anew, also after surgery, and load its weights.

    network: the import path of a user's own, which must be the one in the file. A file from elsewhere may
    name any function, so that only names of effilib's own networks are taken from it. Raises `BadInput` if
    the file cannot be read, names another network, or does not fit what is built: also where weights fit, but
    a method had put other layers in, such as a pooling, and the answers differ.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> save_model("net.pt", net, "convnet", data)
    >>> load_model("net.pt").settings()
    {'widths': [[4], [8]], 'bn': True}
    """
    saved = _read(path, "architecture", map_location="cpu")
    try:
        name, classes, shape, settings = (
            saved["architecture"][k] for k in ("network", "classes", "shape", "settings")
        )
        tensors = dict(saved["model"])
        networks.NETWORKS.get(name)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a checkpoint of a network") from error
    if name not in networks.NETWORKS and network is None:
        raise BadInput(
            f"{path} holds a network that {name} makes, which would be imported and called: if you trust"
            f" it, name it: load_model(..., network={name!r}), or --network {name}"
        )
    if network not in (None, name):
        raise BadInput(f"{path} holds a network that {name} makes, not {network}")
    model = models.build(name, classes, tuple(shape), **settings)
    if not settings:
        operate_again_(model, tensors)
    model.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadInput(
            f"{path}: the weights do not fit network {name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    if isinstance(saved.get("answer"), torch.Tensor):  # older files have none
        was, now = (t.nan_to_num() for t in (saved["answer"], _answer(model, tuple(shape))))
        if was.shape != now.shape or (was - now).abs().max() > ALIKE * was.abs().max():
            raise BadInput(
                f"{path}: network {name} with these weights answers otherwise than the one that was saved: a"
                " method had put layers without weights into it, such as another pooling; build it in Python,"
                ' put them in again, and load the file\'s "model"'
            )
    return model


def identity(
    model: nn.Module,
    dataset: Dataset,
    recipe: "Recipe",
    methods: "Sequence[Method]",
    seed: int,
    ranks: Ranks,
) -> dict:
    """Return what makes a run this one, as plain data.

    model: as before the first step.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> from effilib.distributed import ALONE
    >>> identity(net, data, Recipe(), (), seed=0, ranks=ALONE)["network"]["shapes"]["head.weight"]
    [4, 8]
    """
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    layers = provenance.ADDRESS.sub("", repr(model))  # with strides and the like, which no shape shows
    kinds = sorted({type(m) for m in model.modules()} | {type(dataset)}, key=str)
    return {
        "network": {"shapes": shapes, "layers": provenance.digest(layers)},
        "data": dataset.digest,
        "recipe": asdict(recipe),
        "methods": provenance.settings(list(methods)),
        "seed": seed,
        "number of processes": ranks.size,  # shares are normalised apart, and draw apart
        "code": provenance.source(list(methods), kinds, always=("effilib.training",)),
    }


def save(
    path: Path | str | None,
    mine: dict,
    run: "Run",
    history: "History",
    batches: Batches,
    flops: object,
    losses: list[torch.Tensor],
) -> None:
    """Write a run's state at an epoch's end.

    mine: its identity. path: None: nowhere. Raises `BadInput`, and writes nothing, if a method keeps in
    `run.state` what could not be read again.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=2), checkpoint="first.pt")  # after every epoch but the last
    >>> from effilib.distributed import ALONE
    >>> read("first.pt", {}, ALONE, "cpu")["epoch"]
    1
    """
    if path is None:
        return
    names = {p: name for name, p in run.model.named_parameters()}
    with run.clock.paused():
        refused = next(filter(None, run.ranks.gather(_refused(run))), "")
        if refused:
            raise BadInput(refused)
        of_ranks = run.ranks.gather(_bytes(_own(run)))
        run.ranks.first(lambda: _write(path, {
            "run": mine,
            "settings": models.describe(run.model),
            "kernels": models.kernels(run.model),
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            # surgery may change it
            "order": [[names[p] for p in group["params"]] for group in run.optimizer.param_groups],
            "scaler": run.scaler.state_dict(),
            **_own(run),
            "other ranks": of_ranks[1:],
            "data": batches.generator.get_state(),
            "step": run.step, "epoch": run.epoch + 1, "structures": run.structures, "events": run.events,
            "schedule": {k: getattr(run.schedule, k) for k in ("position", "pace", "scale")},
            "steps": run.steps, "batch_size": batches.batch_size, "flops": vars(flops),
            "losses": torch.stack(losses) if losses else torch.empty(0),
            "clock": run.clock.totals(),
            "history": {k: getattr(history, k) for k in ("rows", "memory", "warm_up")},
        }))  # fmt: skip


def _refused(run):
    """Which state of a method could not be read again, in a sentence; "" if all can."""
    for method in run.methods:
        state = run.state.get(method)
        if not _readable(state):
            return (
                f"{type(method).__name__} keeps {_culprit(state, 'run.state[self]')}, which a checkpoint"
                " cannot hold: use tensors, numbers, words, None, and lists, tuples and dicts of these"
            )
    return ""


def _readable(value):
    try:
        torch.load(io.BytesIO(_bytes(value)), weights_only=True)
    except Exception:  # of many kinds, from the writer or the reader
        return False
    return True


def _culprit(value, where):
    """The innermost part of a value that cannot be read again, in words: its type and place."""
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, part in parts:
        if not _readable(part):
            return _culprit(part, f"{where}[{key!r}]")
    return f"an object of type {type(value).__name__} in {where}"


def _own(run):
    """What each of several processes has of its own: the states of methods and of what draws."""
    return {
        "state": [run.state.get(m) for m in run.methods],
        "generators": [[g[m].get_state() for m in run.methods] for g in (run.generators, run.own)],
        "dropout": [
            torch.get_rng_state(),
            torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
        ],
    }


def read(path: Path | str | None, mine: dict, ranks: Ranks, device: torch.device | str) -> dict | None:
    """Return the content of a checkpoint; None where there is none.

    Rank 0 reads it for all. Its tensors are on `device`. Raises `BadInput` if it cannot be read, or is
    another run's: another network, data set, recipe, methods, seed or code.

    >>> from effilib.distributed import ALONE
    >>> print(read("nowhere.pt", {}, ALONE, "cpu"))
    None
    """
    content = ranks.first(lambda: _content(path) if path is not None and Path(path).exists() else None)
    if content is None:
        return None
    saved = _read(
        path,
        "run",
        content,
        map_location={f"cuda:{i}": str(device) for i in range(torch.cuda.device_count())},
    )
    other = [k for k, v in mine.items() if saved["run"].get(k) != v]
    if other == ["code"]:
        raise BadInput(
            f"checkpoint {path} was written by other code: the network's, a method's or effilib's was edited"
            " since; undo that, delete the file to start again, or name another file"
        )
    if other:
        said = " and ".join(k for k in other if k != "code")
        raise BadInput(
            f"checkpoint {path} belongs to another run: other {said}; delete it or name another file"
        )
    return saved


def shape_(model: nn.Module, saved: dict | None) -> nn.Module:
    """Give a network its saved widths, depths and kernel sizes, in place.

    >>> saved = {"settings": {"widths": [[2], [8]], "bn": True}}
    >>> shape_(build("convnet", 4, (1, 8, 8), widths=(4, 8)), saved).settings()["widths"]
    [[2], [8]]
    """
    if saved and saved["settings"] != models.describe(model):
        rebuilt = type(model)(model.head.out_features, next(model.parameters()).shape[1], **saved["settings"])
        _hold_alike_(rebuilt, model)
        model.__dict__ = rebuilt.__dict__  # the caller's model it stays
    elif saved and not saved["settings"]:
        operate_again_(model, saved["model"])
    now = models.kernels(model)
    for name, kernel in saved.get("kernels", {}).items() if saved else ():
        if name in now and kernel != now[name]:
            conv, (size, *_) = model.get_submodule(name), kernel
            models.set_kernel_(conv, *kernel)
            new = conv.weight.new_empty(*conv.weight.shape[:2], *size)
            conv.weight = torch.nn.Parameter(new, requires_grad=conv.weight.requires_grad)
    return model


def _hold_alike_(new, old):
    """Freeze, and leave in eval mode, the layers of `new` whose namesakes in `old` are so."""
    parameters, modules = dict(old.named_parameters()), dict(old.named_modules())
    for name, p in new.named_parameters():
        p.requires_grad_(name not in parameters or parameters[name].requires_grad)
    for name, m in new.named_modules():
        m.training = name not in modules or modules[name].training


def operate_again_(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Bring a user's fresh network to the shape of `tensors`.

    These are its state after surgery. In place; what else differs stays. Blocks that were put behind a
    Sequential's last one come back, residual paths that were removed go, and channel nodes get their widths.
    Values mean nothing: the state is loaded next. Layers that were inserted are beyond it.

    >>> narrow, net = (build("vgg", 10, (3, 8, 8), widths=((w,), (8,))) for w in (4, 6))
    >>> operate_again_(net, narrow.state_dict())
    >>> net.load_state_dict(narrow.state_dict())
    <All keys matched successfully>
    """
    if {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in tensors.items()
    }:
        return
    with contextlib.suppress(BadInput), seeds.seeded(0):  # what cannot be followed stays, and does not fit
        for name, blocks in list(model.named_modules()):
            inside = f"{name}." if name else ""
            places = {key.removeprefix(inside).partition(".")[0] for key in tensors if key.startswith(inside)}
            while isinstance(blocks, nn.Sequential) and len(blocks):
                if surgery.follower(blocks, len(blocks) - 1) not in places:
                    break
                surgery.append_block_(model, f"{inside}{list(blocks._modules)[-1]}", x=None)
        for path in surgery.trace(model).paths:
            if not any(f"{layer}.weight" in tensors for layer in path.convs):
                surgery.remove_path_(path)
        for node in surgery.trace(model).nodes:
            keys = [f"{layer}.{p}" for layer in [*node.producers, *node.bns] for p in ("weight", "bias")]
            width = next((len(tensors[key]) for key in keys if key in tensors), node.width)
            if width != node.width:
                surgery.select_(node, [i % node.width for i in range(width)])


def restore(
    saved: dict, path: Path | str, run: "Run", history: "History", batches: Batches, flops: object
) -> list[torch.Tensor]:
    """Bring `run`, whose methods have been set up, to the saved state.

    Returns the losses since the last evaluation. Raises `BadInput` if a user's network was changed in a way
    that `operate_again_` does not know.

    >>> data = load("synthetic")
    >>> nets = [build("convnet", data.classes, data.shape, widths=(4, 8)) for _ in range(2)]
    >>> for net in nets:  # the second run goes on from the first one's checkpoint
    ...     history = train(net, data, Recipe(epochs=2), checkpoint="second.pt")
    >>> torch.equal(nets[0].head.weight, nets[1].head.weight)
    True
    """
    try:
        run.model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise BadInput(
            f"checkpoint {path}: the network was restructured and cannot be built anew; delete it to start"
            " again"
        ) from error
    named = dict(run.model.named_parameters())
    run.optimizer.param_groups[:] = [
        {**run.optimizer.defaults, "params": [named[n] for n in names]} for names in saved["order"]
    ]
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    mine = (
        saved
        if not run.ranks.rank
        else torch.load(io.BytesIO(saved["other ranks"][run.ranks.rank - 1]), weights_only=True)
    )
    for generators, states in zip((run.generators, run.own), mine["generators"], strict=True):
        for method, state in zip(run.methods, states, strict=True):
            generators[method].set_state(state)
    run.state.update(
        (m, state) for m, state in zip(run.methods, mine["state"], strict=True) if state is not None
    )
    batches.generator.set_state(saved["data"])
    cpu, cuda = mine["dropout"]
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, run.device)
    run.step, run.epoch, run.structures, run.events = (
        saved["step"],
        saved["epoch"],
        saved["structures"],
        saved["events"],
    )
    run.steps, batches.batch_size = saved["steps"], saved["batch_size"]
    for k, v in saved["schedule"].items():
        setattr(run.schedule, k, v)
    vars(flops).update(saved["flops"])
    run.clock.forget(**saved["clock"])
    for k, v in saved["history"].items():
        setattr(history, k, v)
    return list(saved["losses"].to(run.device).unbind())


def _bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _write(path, content):
    paths.write(paths.make(Path(path).absolute().parent) / Path(path).name, _bytes(content))


def _content(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path} is not a readable checkpoint ({error.strerror})") from error


def _read(path, part, content=None, **options):
    """What is in a file that must hold `part`. What a damaged file makes the readers raise is endless: it is
    one error here.
    """
    content = _content(path) if content is None else content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        content = None if damaged else torch.load(io.BytesIO(content), weights_only=True, **options)
    except Exception as error:
        raise BadInput(
            f"{path} is not a readable checkpoint ({str(error).split(chr(10))[0] or type(error).__name__})"
        ) from error
    if damaged:
        raise BadInput(f"{path} is not a readable checkpoint ({damaged} in it is damaged)")
    if not isinstance(content, dict) or part not in content:
        raise BadInput(f"{path} is not a checkpoint of {'a run' if part == 'run' else 'a network'}")
    return content
