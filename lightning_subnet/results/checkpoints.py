# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of subnets: they hold which subnet they are of, and any project can rebuild it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_subnet._messages import listed
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import ElasticityError, InvalidSubnetError, SearchError
from lightning_subnet.results.standalone import standalone
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets._elastic.network import put_back
from lightning_subnet.supernets.configs import put_config_in_step
from lightning_subnet.supernets.recipes import rebuild, recipes_of

KEY = "lightning_subnet"
"""Where a checkpoint holds the record of its subnet."""

_RECORD = "_subnet_record"
_FILE, _WEIGHTS = "subnet.json", "weights.pt"
_SAFE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def remember_subnet(
    module: nn.Module,
    subnet: Subnet,
    space: Any,
    *,
    part: str = "",
    values: Mapping[str, float] | None = None,
) -> None:
    """Let a module know which subnet it is, so that its checkpoints hold it.

    Args:
        module: The module; if it is a LightningModule, its `on_save_checkpoint` writes the record.
        subnet: The subnet.
        space: The space.
        part: The name of the network in the module that is the subnet.
        values: What was measured of it.
    """
    network = module.get_submodule(part)
    _attach(
        module,
        {
            "format": 1,
            "module": part,
            "network": class_name(network),
            "subnet": subnet.to_json(),
            "space": space.to_json(),
            "values": {name: float(value) for name, value in (values or {}).items()},
            "recipes": recipes_of(network),
            "versions": _versions(),
        },
    )


def _attach(module: nn.Module, record: dict[str, Any]) -> None:
    vars(module)[_RECORD] = record
    if callable(getattr(module, "on_save_checkpoint", None)):
        vars(module)["on_save_checkpoint"] = _Saves(module).on_save_checkpoint


class _Saves:
    """An `on_save_checkpoint` that adds the record of a subnet; lives on the instance."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record, after what the class of the module does."""
        type(self._module).on_save_checkpoint(self._module, checkpoint)
        checkpoint[KEY] = vars(self._module)[_RECORD]


def _versions() -> dict[str, str]:
    names = ("lightning-subnet", "torch", "lightning", "timm", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def subnet_record(source: nn.Module | str | Path) -> dict[str, Any]:
    """Return which subnet a module or a checkpoint is of.

    Args:
        source: What `to_module`, `extract` of a result or `load_subnet` returned; or the path of a
            checkpoint or of a folder that `save_subnet` wrote.

    Returns:
        Its `subnet`, `space`, measured `values` and `versions` of the packages, and what it takes
        to rebuild it.

    Raises:
        SearchError: It has no such record.

    Example:
        >>> subnet_record(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.SearchError: Linear is not a subnet that a search handed out. ...
    """
    if not isinstance(source, nn.Module):
        return _read(Path(source), weights_only=True)[0]
    record = vars(source).get(_RECORD)
    if record is None and recipes_of(source):
        record = {
            "format": 1,
            "module": "",
            "network": class_name(source),
            "recipes": recipes_of(source),
            "values": {},
            "versions": _versions(),
        }
    if record is None:
        msg = (
            f"{class_name(source)} is not a subnet that a search handed out. Take what "
            "result.to_module(model, subnet) or result.extract(subnet) returns."
        )
        raise SearchError(msg)
    return dict(record)


def save_subnet(module: nn.Module, folder: str | Path) -> Path:
    """Write a subnet as a folder, from which `load_subnet` rebuilds it in another project.

    Beside `subnet.json`, with the subnet, its values and its recipe, lie the weights. A model of
    transformers is written by its `save_pretrained`. Where all its layers are of one size, its
    config says it, and `from_pretrained` reads the folder without this package.

    Args:
        module: What `to_module`, `extract` of a result or of an elasticized network, or
            `load_subnet` returned.
        folder: The folder, which is made.

    Returns:
        The folder.

    Raises:
        SearchError: It is not a subnet.

    Example:
        >>> import tempfile
        >>> from lightning_subnet import elasticize
        >>> net = lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> elastic = elasticize(net(), torch.randn(2, 4))
        >>> small = elastic.extract(elastic.search_space().smallest)
        >>> folder = save_subnet(small, tempfile.mkdtemp())
        >>> load_subnet(folder, net)[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    record = subnet_record(module)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = module
    if callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config"):
        record["config"] = put_config_in_step(model)
        model.save_pretrained(folder)
    else:
        torch.save(module.state_dict(), folder / _WEIGHTS)
    (folder / _FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return folder


def load_subnet(
    path: str | Path,
    model: Callable[..., Any],
    *,
    weights_only: bool = True,
    example_input: Any = None,
    **options: Any,
) -> Any:
    """Return a subnet with the weights of its checkpoint, rebuilt from the code of the original.

    A checkpoint that a Trainer writes while it trains what `result.to_module` returned holds the
    subnet, and so does a folder of `save_subnet`. The whole network is made anew, what the subnet
    does not have is cut out of it by the recipe in the checkpoint (nothing is searched or probed),
    and the weights are loaded.

    Args:
        path: The checkpoint, or the folder.
        model: The class, or a function, that makes the original: the LightningModule, or the
            network alone, of which the weights of the checkpoint are then taken. Hyperparameters in
            the checkpoint are passed to a class that takes them.
        weights_only: Whether objects other than tensors and plain data in the checkpoint are
            refused, as `torch.load` has it. Code in a checkpoint runs with False.
        example_input: What a super-network takes that is not sliced by itself; see `extract`.
        **options: Passed to `model`.

    Returns:
        The module, whose checkpoints hold the subnet, too.

    Raises:
        SearchError: The checkpoint holds no subnet, or is of another model: the message names the
            first tensor that differs, and both shapes.

    Example:
        >>> import tempfile
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> small = net.extract(net.search_space().smallest)
        >>> remember_subnet(small, net.search_space().smallest, net.search_space())
        >>> folder = save_subnet(small, tempfile.mkdtemp())
        >>> type(load_subnet(folder, lambda: ElasticMobileNetV3.tiny(n_classes=10))).__name__
        'MobileNetV3'
    """
    record, state, hyperparameters = _read(Path(path), weights_only=weights_only)
    whole = _made(model, {**hyperparameters, **options}, options)
    name = record["module"]
    alone = bool(name) and name not in dict(whole.named_modules())
    if alone:
        prefix = f"{name}."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        record = {**record, "module": ""}
    module = _rebuilt(whole, record, example_input)
    _load(module, state, record["network"])
    _attach(module, record)
    return module


def _read(path: Path, *, weights_only: bool) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the record, the weights and the hyperparameters of a checkpoint or a folder."""
    if path.is_dir():
        if not (path / _FILE).exists():
            msg = f"{path} has no {_FILE}. Give a folder that save_subnet() wrote, or a checkpoint."
            raise SearchError(msg)
        record = json.loads((path / _FILE).read_text(encoding="utf-8"))
        return record, _weights_in(path), {}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # which torch raises for other objects
            raise
        msg = (
            f"{path} holds other objects than tensors and plain data, as hyperparameters may be. "
            "If you trust who wrote it: load_subnet(..., weights_only=False)."
        )
        raise SearchError(msg) from error
    record = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if record is None:
        msg = (
            f"{path} holds no subnet. Checkpoints hold one that are written of what "
            "result.to_module(model, subnet) returned; or write a folder with save_subnet()."
        )
        raise SearchError(msg)
    return dict(record), checkpoint["state_dict"], checkpoint.get("hyper_parameters", {})


def _weights_in(folder: Path) -> dict[str, Any]:
    if (folder / _WEIGHTS).exists():
        weights: dict[str, Any] = torch.load(
            folder / _WEIGHTS, map_location="cpu", weights_only=True
        )
        return weights
    from safetensors.torch import (  # type: ignore[import-not-found,unused-ignore] # of transformers
        load_file,
    )

    names = [_SAFE]
    if (folder / _INDEX).exists():
        names = sorted({*json.loads((folder / _INDEX).read_text())["weight_map"].values()})
    return {k: v for name in names for k, v in load_file(folder / name).items()}


def _made(model: Callable[..., Any], proposed: Mapping[str, Any], options: Any) -> Any:
    """Return the original; a class gets those hyperparameters that it takes."""
    if isinstance(model, nn.Module):
        msg = (
            f"load_subnet() got an object of {class_name(model)}, which it would cut. Pass its "
            f"class or a function that makes one: load_subnet(path, {class_name(model)})."
        )
        raise SearchError(msg)
    if isinstance(model, type):
        parameters = inspect.signature(model).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        options = {
            k: v for k, v in proposed.items() if takes_all or k in parameters or k in options
        }
    whole = model(**options)
    if not isinstance(whole, nn.Module):
        msg = f"model= made a {class_name(whole)}, which is not an nn.Module."
        raise SearchError(msg)
    return whole


def _rebuilt(whole: nn.Module, record: Mapping[str, Any], example_input: Any) -> nn.Module:
    """Return a module with the structure of a subnet."""
    part = whole.get_submodule(record["module"])
    if record["recipes"]:
        put_back(part)  # what made it elastic, if it was
        try:
            for recipe in record["recipes"]:
                rebuild(part, recipe)
        except ElasticityError as error:
            msg = f"The checkpoint is of another model than {class_name(whole)}: {error}"
            raise SearchError(msg) from error
        return whole.train()
    try:
        network: Any = elastic_part(whole)
        subnet = network.search_space().subnet(record["subnet"])
    except (SearchError, InvalidSubnetError) as error:
        msg = (
            f"The checkpoint is of a subnet of a super-network, and {class_name(whole)} does not "
            f"have it: {error} Give what makes the super-network."
        )
        raise SearchError(msg) from error
    if network is whole and not hasattr(whole, "training_step"):
        return extract(whole, subnet, example_input)
    calls = []
    if example_input is not None:
        named = isinstance(example_input, Mapping)
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        calls = [((), dict(example_input)) if named else (inputs, {})]
    return standalone(whole, subnet, calls=calls)


def _load(module: nn.Module, state: Mapping[str, torch.Tensor], network: str) -> None:
    """Load weights into a module, or say which is the first that does not fit."""
    own = module.state_dict()
    places = {k: v.data_ptr() for k, v in own.items() if isinstance(v, torch.Tensor)}
    loaded = {places.get(k) for k in state}
    name = class_name(module)
    for key, value in own.items():
        if key not in state:
            if places.get(key) and places[key] in loaded:  # of tied weights one is written
                continue
            msg = (
                f"The checkpoint is of another model than {name}: it has no {key!r} "
                f"{tuple(getattr(value, 'shape', ()))}. It holds a subnet of {network}, with "
                f"{listed(state, limit=2)}."
            )
            raise SearchError(msg)
        there, here = (tuple(getattr(x, "shape", ())) for x in (state[key], value))
        if there != here:
            msg = (
                f"The checkpoint is of another model than {name}: {key!r} is {there} there and "
                f"{here} here. It holds a subnet of {network}."
            )
            raise SearchError(msg)
    if extra := [key for key in state if key not in own]:
        shape = tuple(getattr(state[extra[0]], "shape", ()))
        msg = (
            f"The checkpoint is of another model than {name}, which has no {extra[0]!r} {shape}"
            f" ({len(extra)} such). It holds a subnet of {network}."
        )
        raise SearchError(msg)
    module.load_state_dict(dict(state), strict=False)
