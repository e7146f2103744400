# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of one forward pass."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from functools import cache, partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet._messages import warn
from lightning_subnet._torch.contexts import (
    default_type,
    default_types,
    evaluating,
    plain_attention,
    shadowed,
)
from lightning_subnet._torch.formulas import formulas
from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.stored import attributes
from lightning_subnet.errors import CostWarning, MeasurementError

_SHOWN = 3  # modules of an operator in a message
_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def count_macs(module: nn.Module, example_input: Any, *, weights: Iterable[nn.Module] = ()) -> int:
    """Return the multiply-accumulates of one forward pass.

    Matrix products, convolutions and attention count, recurrent and quantised layers among them
    (FLOPs = 2 MACs; a complex one is four); biases, normalisation, activations, lookups and
    elementwise products do not. They are those of the operators that PyTorch runs: what a function
    computes outside of it, in NumPy say, cannot be seen.

    Args:
        module: The network, with the subnet to be counted in force; run in eval mode.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.
        weights: Networks that `module` runs and that are not among its children.

    Raises:
        MeasurementError: The network does not take the input, nothing was counted, or data passed
            through weights in an operator whose products are not known.

    Warns:
        CostWarning: An operator such as a Fourier transform, which has no weights, is left out;
            once for each network.

    Example:
        >>> count_macs(nn.Linear(10, 5), torch.zeros(1, 10))
        50
    """
    counter = _counted(module, example_input, [module, *weights])
    counter.report(module)
    macs = int(counter.get_total_flops()) // 2
    if macs == 0:
        msg = (
            f"No multiplication was counted in {class_name(module)}: it has no matrix product, "
            "convolution or attention, or computes them outside of PyTorch's operators. "
            "Leave 'macs' out, or give a network_measure of your own."
        )
        raise MeasurementError(msg)
    return macs


def _counted(module: nn.Module, example_input: Any, networks: list[nn.Module]) -> _Counter:
    """Return the counter of a forward pass that has run.

    A Trainer with `precision="bf16-true"` makes all tensors in the type of the weights, so that is
    tried too.
    """
    inputs, named = arguments(module, example_input)
    first: Exception | None = None
    for dtype in default_types(module):
        counter = _Counter(networks)
        try:
            # The counter sees nothing inside fused attention on a CPU; its plain form is counted.
            with (
                plain_attention(),
                evaluating(module),
                torch.no_grad(),
                default_type(dtype),
                sdpa_kernel(SDPBackend.MATH),
                # One row has no variance, which a normalisation without statistics refuses; its
                # products are the same.
                shadowed(nn.functional, "_verify_batch_size", lambda _size: None),
                counter,
            ):
                module(*inputs, **named)
        except MeasurementError:
            raise
        except Exception as error:
            first = first or error
        else:
            return counter
    raise _failure(module, (*inputs, *named.values()), first) from first


def _failure(module: nn.Module, inputs: Iterable[Any], error: Exception | None) -> Exception:
    if name := re.search(r"higher_order\.(\w+)", str(error)):
        return MeasurementError(
            f"The MACs of {class_name(module)} cannot be counted: nothing is seen inside "
            f"{name[1]}. Give the measure as a network_measure of your own."
        )
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in inputs]
    return MeasurementError(
        f"{class_name(module)} failed on an input of {shapes} while its MACs were "
        f"counted: {error}. Set example_input_array to an input that forward() takes."
    )


Kind = Literal["plain", "product", "foreign"]

_PRODUCT = re.compile(
    r"(\w*mm|mv|dot|matmul|linear|conv(olution)?(\dd)?|attention|attn|encoder|rnn|lstm|gru|trilinear"
    r"|fft|linalg|solve|lstsq|cholesky|ormqr|householder|cdist|spsolve)"
)
"""A word in the names of operators that consist of products."""
_NO_PRODUCT = re.compile(r"_?linalg_(vector_norm|cross|check_errors)|_thnn_fused_\w+")
_NO_WEIGHTS = {"prims", "prim", "profiler", "c10d", "_c10d_functional", "_dtensor", "symm_mem"}
"""Namespaces whose operators move tensors between processes, or are parts of others."""


class _Nature(NamedTuple):
    """What is known of an operator by its name and its schema."""

    kind: Kind
    mutates: bool = False
    random: bool = False


class _Fixed(NamedTuple):
    """Memory whose content does not depend on data."""

    owner: weakref.ref[Any]
    is_weight: bool


@cache
def _nature(operator: Any) -> _Nature:
    """Return what an operator may be.

    It consists of products if its name says so. What another one does is known of torch itself,
    and not of other packages.
    """
    if not isinstance(operator, torch._ops.OpOverloadPacket):
        return _Nature("foreign")  # a kernel of triton
    namespace, _, name = operator._qualified_op_name.partition("::")
    names: Any = operator.overloads  # carries no annotation
    overloads = [getattr(operator, overload) for overload in names()]
    words = name.strip("_").split("_")
    kind: Kind = "plain" if namespace == "aten" else "foreign"
    if any(_PRODUCT.fullmatch(word) for word in words) and not _NO_PRODUCT.fullmatch(name):
        kind = "product"
    if namespace in _NO_WEIGHTS or torch.Tag.pointwise in overloads[0].tags:
        kind = "plain"
    return _Nature(
        kind,
        # Operators with an argument out= are overloads of others.
        mutates=any(overload._schema.is_mutable for overload in overloads),
        random=torch.Tag.nondeterministic_seeded in overloads[0].tags,
    )


class _Counter(FlopCounterMode):
    """Counts FLOPs, and notes the operators without a formula that data passes through.

    Weights are the parameters and buffers of some networks, views of them, and what is computed of
    them and of constants. Constants are tensors that modules keep in other ways, and what an
    operator makes of no tensor, and not at random. All else is data.

    Args:
        networks: Those whose weights are meant.

    Attributes:
        with_weights: Operators that multiply data by weights, or may do so, and where they ran.
        without: Operators that multiply data by data, and where they ran.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__(display=False, custom_mapping=formulas())
        self._networks = list(networks)
        self.mod_tracker: Any = _Running()
        self._fixed: dict[int, _Fixed] = {}  # memory of weights and constants
        self.with_weights: dict[str, list[str]] = {}
        self.without: dict[str, list[str]] = {}
        for network in self._networks:
            self._mark([*network.parameters(), *network.buffers()], is_weight=True)
            self._mark(attributes(network), is_weight=False)
            self._look_into_scripts(network)

    def _look_into_scripts(self, network: nn.Module) -> None:
        """Note the operators of optimised TorchScript, which go past every counter."""
        for name, child in network.named_modules():
            if isinstance(child, torch.jit.ScriptModule) and hasattr(child, "inlined_graph"):
                graph = child.inlined_graph
                for node in graph.nodes():
                    if node.kind().startswith(("prim::mkldnn_", "prim::oneDNN")):
                        self.with_weights.setdefault(node.kind(), []).append(name)

    def _mark(self, tensors: Iterable[torch.Tensor], *, is_weight: bool) -> None:
        """Remember the memory of tensors as that of weights or constants, while it lives."""
        for tensor in tensors:
            owner = _memory(tensor)
            key = owner._cdata
            if key not in self._fixed:
                forget = partial(self._forget, key)
                self._fixed[key] = _Fixed(weakref.ref(owner, forget), is_weight)

    def _forget(self, key: int, _: object = None) -> None:
        self._fixed.pop(key, None)

    def _is_fixed(self, operand: Any) -> bool:
        return not isinstance(operand, torch.Tensor) or _memory(operand)._cdata in self._fixed

    def _is_weight(self, operand: Any) -> bool:
        if not isinstance(operand, torch.Tensor):
            return True  # packed
        fixed = self._fixed.get(_memory(operand)._cdata)
        return fixed is not None and fixed.is_weight

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """Count the FLOPs of an operator that has run, and look at its operands."""
        nature = _nature(func_packet)
        unknown = nature.kind != "plain" and func_packet not in self.flop_registry
        first = args[0] if args else None
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        # Most operators have a formula or need none, and their first operand is data.
        if unknown or kwargs or not isinstance(first, torch.Tensor) or self._is_fixed(first):
            self._look(func_packet, nature, unknown, out, tree_leaves((args, kwargs)))
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call] # torch's

    def _look(
        self, operator: Any, nature: _Nature, unknown: bool, out: Any, leaves: list[Any]
    ) -> None:
        """Note an operator that may multiply data, or remember what it returns as fixed."""
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        operands = [x for x in leaves if isinstance(x, _OPERANDS)]
        weights = [x for x in operands if self._is_weight(x)]
        data = [x for x in operands if not self._is_fixed(x)]
        if data or nature.random:
            if nature.mutates:
                for tensor in results:
                    self._forget(_memory(tensor)._cdata)
            if unknown:
                self._note(operator, nature.kind, [x for x in data if _is_number(x)], weights, out)
        else:
            self._mark(results, is_weight=bool(weights))

    def _note(
        self, operator: Any, kind: Kind, data: list[Any], weights: list[Any], out: Any
    ) -> None:
        """Remember an operator that has no formula, if it may multiply."""
        name = getattr(operator, "_qualified_op_name", None) or f"triton::{operator.__name__}"
        if not data or not (kind == "product" or _multiplies(data, weights, out)):
            return
        places = (self.with_weights if weights else self.without).setdefault(name, [])
        if (place := self._place()) not in places:
            places.append(place)

    def _place(self) -> str:
        """Return the path of the innermost module that runs."""
        running = self.mod_tracker.modules
        for network in self._networks:
            for name, child in network.named_modules(prefix=class_name(network)):
                if running and child is running[-1]:
                    return str(name)
        return type(running[-1]).__name__ if running else "the network"

    def report(self, module: nn.Module) -> None:
        """Refuse a count that is short of products with weights, and warn of others, once."""
        name = class_name(module)
        if self.with_weights:
            places = _listed(self.with_weights)
            packet = next(iter(self.with_weights)).replace("::", ".")
            msg = (
                f"The MACs of {name} cannot be counted: no formula is known for {places}, which "
                "takes weights, so the number would be short. Register one, "
                f"@torch.utils.flop_counter.register_flop_formula(torch.ops.{packet}), that "
                "returns FLOPs (2 per MAC; 0 if it has none); or give the measure as a "
                "network_measure of your own."
            )
            raise MeasurementError(msg)
        told = _TOLD.setdefault(module, set())
        if fresh := {op: places for op, places in self.without.items() if op not in told}:
            told.update(fresh)
            warn(
                f"The MACs of {name} leave out {_listed(fresh)}: only matrix products, "
                "convolutions and attention count, where a formula is known. Register one by "
                "torch.utils.flop_counter.register_flop_formula to include it.",
                CostWarning,
            )


def _listed(operators: dict[str, list[str]]) -> str:
    """Return operators and the first modules in which each ran."""
    return "; ".join(
        f"{operator} in {', '.join(places[:_SHOWN])}{', ...' if len(places) > _SHOWN else ''}"
        for operator, places in operators.items()
    )


class _Running:
    """The modules that run, from the outermost to the innermost.

    It stands in for torch's `ModuleTracker`, which sets hooks on gradients too, and so fails on
    views of parameters that are made without gradients.
    """

    def __init__(self) -> None:
        self.parents = {"Global"}  # to which the counter adds its FLOPs
        self.modules: list[nn.Module] = []

    def __enter__(self) -> None:
        self._handles = [
            register_module_forward_pre_hook(lambda module, _: self.modules.append(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        ]

    def _leave(self) -> None:
        self.modules.pop()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


_OPERANDS = (torch.Tensor, torch.ScriptObject)


def _memory(tensor: torch.Tensor) -> Any:
    """Return the storage of a tensor, or the tensor itself where it has none of its own."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:  # sparse, or of another library
        return tensor


def _is_number(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (
        x.is_floating_point() or x.is_complex() or x.is_quantized
    )


def _multiplies(data: list[torch.Tensor], weights: list[Any], out: Any) -> bool:
    """Return whether a foreign operator may multiply data by matrices.

    A vector of weights that leaves the shape of the data alone is taken for a scale, a bias or the
    like; a matrix, or weights that are packed, for more.
    """
    shapes = {tuple(x.shape) for x in data}
    same = any(isinstance(x, torch.Tensor) and tuple(x.shape) in shapes for x in tree_leaves(out))
    for weight in weights:
        if not isinstance(weight, torch.Tensor):
            return True
        long = sum(size > 1 for size in weight.shape)
        if long > 1 or (long == 1 and not same):
            return True
    return False
