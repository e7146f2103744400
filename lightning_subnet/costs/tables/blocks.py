# SPDX-License-Identifier: Apache-2.0
"""Blocks of extracted subnets: how they are found, when two are equal, and a bench for them.

A block is a child of the network, or of the containers in it, that one forward pass calls.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_structure, tree_unflatten

from lightning_subnet._json import digest
from lightning_subnet._messages import listed
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.inputs import arguments, batched
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import MeasurementError
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

Choose = Callable[[nn.Module], Iterable[nn.Module]]

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Block:
    """A block with its inputs in one subnet.

    Args:
        module: The block itself.
        inputs: The tensors of its call, for one sample.
        spec: The structure of its arguments, to put them together from their leaves.
        grows: Which of the arguments' leaves are those inputs.
        fixed: The other leaves: plain values, or tensors that do not grow with the batch.
        text: The block and the shapes of its inputs, in words.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    spec: Any
    grows: tuple[bool, ...]
    fixed: tuple[Any, ...]
    text: str


def blocks_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a network by path, from the outside inwards.

    Lists, dictionaries, and sequences of anything but single layers are entered, and so is a
    network whose only child is another one.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
        >>> [path for path, _ in blocks_of(nn.ModuleDict({"body": net}))]
        ['body.0', 'body.1']
    """
    blocks = _inside(net)
    while len(blocks) == 1 and (inner := _inside(blocks[0][1])):
        blocks = [(f"{blocks[0][0]}.{path}", block) for path, block in inner]
    return blocks


def _inside(net: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks: list[tuple[str, nn.Module]] = []
    for name, child in net.named_children():
        many = any(True for part in child.children() for _ in part.children())
        enter = isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (
            isinstance(child, nn.Sequential) and many
        )
        inner = _inside(child) if enter else []
        blocks += [(f"{name}.{path}", block) for path, block in inner] or [(name, child)]
    return blocks


class Tracer:
    """The blocks of subnets, found by forward passes, and one of each kind.

    Args:
        elastic: The super-network, whose subnets `extract` slices.
        sample: One sample, as its forward pass takes it.
        choose: Returns the modules of an extracted network that are its blocks; None: `blocks_of`.

    Attributes:
        kinds: By key of a block, a subnet and the place in it; blocks of one key do the same work.

    Raises:
        MeasurementError: The network cannot be sliced, or calls none of its blocks.
    """

    def __init__(self, elastic: nn.Module, sample: Any, choose: Choose | None = None) -> None:
        self.elastic, self.choose = elastic, choose
        self.samples = [batched(sample, n, who="LatencyTable") for n in (1, 2)]
        self.kinds: dict[str, tuple[Subnet, str]] = {}
        self._keys: dict[bytes, dict[str, str]] = {}
        self.space = elastic_part(elastic).search_space()
        self(self.space.largest)  # a network that cannot be traced shows now

    def __call__(self, subnet: Subnet) -> dict[str, str]:
        """Return the keys of a subnet's blocks by place: path, and count of its calls."""
        code = row_codes(self.space.indices([subnet]))[0]
        if code not in self._keys:
            calls = self._calls(subnet, self.samples[:1])
            self._keys[code] = {place: _key(call) for place, call in calls[0].items()}
            for place, key in self._keys[code].items():
                self.kinds.setdefault(key, (subnet, place))
        return self._keys[code]

    @property
    def n_traced(self) -> int:
        """The number of subnets that were traced."""
        return len(self._keys)

    def blocks(self) -> dict[str, Block]:
        """Return one block of each kind, by key."""
        blocks: dict[str, Block] = {}
        for subnet in dict.fromkeys(subnet for subnet, _ in self.kinds.values()):
            one, two = self._calls(subnet, self.samples)
            at = {key: place for key, (first, place) in self.kinds.items() if first == subnet}
            blocks |= {key: _block(one[place], two[place]) for key, place in at.items()}
        return blocks

    def _calls(self, subnet: Subnet, samples: Sequence[Any]) -> list[dict[str, _BlockCall]]:
        """Return the calls of blocks by place, for each sample."""
        if not callable(getattr(elastic_part(self.elastic), "extract", None)):
            msg = (
                f"{type(self.elastic).__name__} has no extract(subnet), so its blocks do not "
                "show which subnet is in force. Use LatencyPredictor.fit(model, latency)."
            )
            raise MeasurementError(msg)
        with random_state():  # the plain network is initialised first
            net = extract(self.elastic, subnet)
        names = {module: name for name, module in net.named_modules()}
        modules = [m for _, m in blocks_of(net)] if self.choose is None else [*self.choose(net)]
        calls: list[dict[str, _BlockCall]] = []

        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            path, times = names[module], 0
            while (place := f"{path}#{times}" if times else path) in calls[-1]:
                times += 1
            calls[-1][place] = _BlockCall(module, *tree_flatten((args, kwargs)))

        hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
        try:
            with torch.inference_mode(), random_state():
                for sample in samples:
                    calls.append({})
                    inputs, named = arguments(net, sample)
                    net(*inputs, **named)
        except Exception as error:
            msg = f"{class_name(net)} failed while its blocks were traced: {error}."
            raise MeasurementError(f"{msg} Give one sample that forward() takes.") from error
        finally:
            for hook in hooks:
                hook.remove()
        if not calls[0] or any(list(more) != list(calls[0]) for more in calls):
            msg = f"{class_name(net)} calls none of its blocks, or others for a larger batch: "
            raise MeasurementError(msg + f"{listed(names[m] for m in modules)}. Give blocks=.")
        return calls


@dataclass(frozen=True)
class _BlockCall:
    """A call of a module: the leaves of its arguments, and their structure."""

    module: nn.Module
    leaves: list[Any]
    spec: Any

    @property
    def text(self) -> str:
        """The module and its inputs, in words."""
        shapes = ", ".join(f"{tuple(x.shape)}" for x in self.leaves if torch.is_tensor(x))
        name = " ".join(re.sub(r"0x[0-9a-f]+", "", repr(self.module)).split())
        return f"{name} on {shapes}"


def _block(one: _BlockCall, two: _BlockCall) -> Block:
    """Return a block whose inputs are the tensors that grow with the batch.

    Args:
        one: Its call with a batch of one sample.
        two: That with two.
    """
    grows = tuple(
        torch.is_tensor(x) and torch.is_tensor(y) and x.ndim > 0 and len(y) == 2 * len(x)
        for x, y in zip(one.leaves, two.leaves, strict=True)
    )
    inputs = tuple(x.clone() for x, on in zip(one.leaves, grows, strict=True) if on)
    fixed = tuple(None if on else x for x, on in zip(one.leaves, grows, strict=True))
    return Block(one.module, inputs, one.spec, grows, fixed, one.text)


def _key(call: _BlockCall) -> str:
    """Return a hash of all that the time of a block depends on, not of weights and places."""
    tensors = [*call.module.named_parameters(), *call.module.named_buffers()]
    settings = [
        [path, type(module).__qualname__, name, repr(value)]
        for path, module in call.module.named_modules()
        for name, value in sorted(vars(module).items())
        if name != "training" and _is_plain(value)
    ]
    shapes = [[n, [*t.shape], str(t.dtype)] for n, t in tensors]
    inputs = [f"{[*x.shape]} {x.dtype}" if torch.is_tensor(x) else repr(x) for x in call.leaves]
    return digest([call.text, settings, shapes, inputs])


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


class Alone(nn.Module):
    """A block that picks its inputs from those of all blocks.

    Args:
        block: The block.
        first: The place of its first input among those of all.
    """

    def __init__(self, block: Block, first: int) -> None:
        super().__init__()
        self.module, self._block = block.module, block
        self._at = range(first, first + len(block.inputs))
        # Most blocks take one tensor, and unpacking costs as much as a small layer.
        self._single = block.grows == (True,) and block.spec == tree_structure(((0,), {}))
        for i, x in enumerate(block.fixed):
            if torch.is_tensor(x):  # goes where the weights go
                self.register_buffer(f"fixed_{i}", x, persistent=False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Apply the block to its part of the inputs."""
        if self._single:
            return self.module(inputs[self._at[0]])
        tensors, block = iter([inputs[i] for i in self._at]), self._block
        leaves = [
            next(tensors) if on else getattr(self, f"fixed_{i}", x)
            for i, (on, x) in enumerate(zip(block.grows, block.fixed, strict=True))
        ]
        args, kwargs = tree_unflatten(leaves, block.spec)
        return self.module(*args, **kwargs)


class BlockBench(nn.Module):
    """All blocks as one super-network whose subnets they are, so that `Latency` can time them.

    They take turns with the slowest, which is the largest subnet: a reference that takes about as
    long as they do is disturbed about as often.

    Args:
        blocks: The blocks.

    Attributes:
        inputs: The inputs of all.
        order: For each subnet the position of its block in `blocks`.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        inputs: list[torch.Tensor] = []
        parts = []
        for block in blocks:
            parts.append(Alone(block, len(inputs)))
            inputs += block.inputs
        self.inputs = tuple(inputs)
        self.parts = nn.ModuleList(parts)
        self.order = sorted(range(len(parts)), key=lambda i: _roughly(parts[i], self.inputs))
        self._space = SearchSpace(block=range(max(len(parts), 2)))

    def search_space(self) -> SearchSpace:
        """Return one subnet per block, the slowest last."""
        return self._space

    def activate(self, subnet: Subnet) -> None:
        """Do nothing: blocks are extracted."""

    def extract(self, subnet: Subnet) -> nn.Module:
        """Return a block."""
        index = min(int(str(subnet["block"])), len(self.order) - 1)
        return self.parts[self.order[index]]


@torch.inference_mode()
def _roughly(block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Return the seconds of the fastest of some calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        block(*inputs)
        times.append(time.perf_counter() - start)
    return min(times)
