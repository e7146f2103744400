# SPDX-License-Identifier: Apache-2.0
"""What holds for every elasticized network, told without the package's own masks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn

from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.outputs import difference
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets.elasticizing import elasticize

CLOSE = 1e-6  # in double precision


def output(net: nn.Module, example: Any, *, training: bool = False) -> Any:
    args, kwargs = arguments(net, example)
    before = net.training
    net.train(training)
    try:
        with torch.no_grad():
            return net(*args, **kwargs)
    finally:
        net.train(before)


def assert_close(expected: Any, value: Any) -> None:
    gap = difference(expected, value)
    assert gap.relative <= CLOSE, str(gap)


def shaken(net: nn.Module) -> nn.Module:
    """Return a network in double precision in which no two numbers of a weight are alike."""
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p) * (1 if p.ndim == 1 else p[0].numel() ** -0.5))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return net


def indices(whole: torch.Tensor, part: torch.Tensor) -> list[torch.Tensor]:
    """Return where a part of a tensor lies in it, by dimension: its numbers are all others."""
    flat, order = whole.detach().flatten().sort()
    assert len(flat.unique()) == len(flat), "two numbers are alike"
    at = torch.searchsorted(flat, part.detach().flatten())
    assert torch.equal(flat[at], part.detach().flatten()), (
        "it has a number that is not of the whole"
    )
    places = torch.unravel_index(order[at], whole.shape)
    found = [place.unique() for place in places]
    expected = whole.detach()
    for dim, index in enumerate(found):
        expected = expected.index_select(dim, index)
    assert torch.equal(expected, part.detach()), "its numbers come in another order"
    return found


READ = {  # the dimensions of weights that are read along
    nn.Linear: {"weight": 1},
    nn.Conv1d: {"weight": 1}, nn.Conv2d: {"weight": 1},
    nn.ConvTranspose1d: {"weight": 0}, nn.ConvTranspose2d: {"weight": 0},
}  # fmt: skip


def read_by(module: nn.Module) -> dict[str, int]:
    """Return the tensors of a layer that read channels, with the dimension of these."""
    own = getattr(type(module), "READS", READ.get(type(module), {}))
    if isinstance(module, nn.RNNBase):
        own = {n: 1 for n, _ in module.named_parameters() if n.startswith("weight")}
    if isinstance(module, nn.RNNCellBase):
        own = {"weight_ih": 1, "weight_hh": 1}
    if getattr(module, "groups", 1) > 1:
        return {}
    return own


def masked(whole: nn.Module, part: nn.Module) -> nn.Module:
    """Return a whole network in which nothing reads what a part of it lacks."""
    result = copy.deepcopy(whole)
    parts = dict(part.named_parameters())
    with torch.no_grad():
        for owner, module in result.named_modules():
            for attribute, dim in read_by(module).items():
                name = f"{owner}.{attribute}" if owner else attribute
                tensor = module.get_parameter(attribute)
                own = parts.get(name)
                if own is None or tensor.shape[dim] == own.shape[dim]:
                    continue
                kept = indices(dict(whole.named_parameters())[name], own)[dim]
                mask = torch.zeros(tensor.shape[dim], dtype=torch.bool)
                mask[kept] = True
                tensor.index_fill_(dim, (~mask).nonzero().flatten(), 0.0)
    return result


def check(net: nn.Module, example: Any, *, n_subnets: int = 3, **options: Any) -> Any:
    """Elasticize a network, check what holds for all of them, and return it."""
    net = shaken(net)
    training = {name: module.training for name, module in net.named_modules()}
    before, names = output(net, example), {n: v.shape for n, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    original = copy.deepcopy(net)

    net = elasticize(net, example, **{"divisor": 1, **options})

    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert training == {name: module.training for name, module in net.named_modules()}
    assert names == {n: v.shape for n, v in net.state_dict().items()}
    assert_close(before, output(net, example))
    for name, tensor in original.state_dict().items():
        assert torch.equal(
            tensor.flatten().sort().values, net.state_dict()[name].flatten().sort().values
        )
    whole = net.extract(net.search_space().largest)
    subnets = [
        net.search_space().smallest,
        *net.search_space().sample(min(n_subnets, net.search_space().size), 0),
    ]
    for subnet in subnets:
        check_subnet(net, whole, subnet, example)
    net.activate(net.search_space().largest)
    assert_close(before, output(net, example))
    return net


def check_subnet(net: Any, whole: nn.Module, subnet: Subnet, example: Any) -> None:
    shapes = {n: v.shape for n, v in net.state_dict().items()}
    net.activate(subnet)
    active = output(net, example)
    assert shapes == {n: v.shape for n, v in net.state_dict().items()}
    assert_close(active, output(copy.deepcopy(net), example))
    assert_close(active, output(pickle.loads(pickle.dumps(net)), example))

    part = net.extract(subnet)
    assert_close(active, output(part, example))
    assert type(part) in type(net).__mro__
    assert not [
        n
        for n, m in part.named_modules()
        if type(m).__name__ != type(m).__qualname__.rpartition(".")[2]
    ]
    for module in part.modules():
        assert not any("slice" in key or "elastic" in key for key in vars(module)), module
    assert_close(active, output(pickle.loads(pickle.dumps(part)), example))
    assert_close(active, output(net, example))  # extraction leaves in force what was

    if all(value for name, value in subnet.items() if name.startswith("keep.")) and not any(
        name.startswith("stream") for name in subnet
    ):
        assert_close(active, output(masked(whole, part), example))
