# SPDX-License-Identifier: Apache-2.0
"""Graph: the operators of an exported network, and which parts of weights they read."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate
from torch.utils._pytree import TreeSpec

from lightning_subnet.elasticity.slicing.network import (
    DEVICE,
    Program,
    Sizes,
)
from lightning_subnet.elasticity.slicing.regions import Memory, Part, Region, changes, is_random
from lightning_subnet.elasticity.slicing.weights import Use, Weights

_NORMALISATIONS: Mapping[Any, Any] = {
    torch.ops.aten.batch_norm.default: torch.batch_norm,
    torch.ops.aten.instance_norm.default: torch.instance_norm,
}
_VIEWS = {
    getattr(torch.ops.aten, name).default
    for name in ("alias", "detach", "view", "squeeze", "unsqueeze", "t", "permute")
} | {torch.ops.aten.slice.Tensor, torch.ops.aten.select.int}
_MEAN, _FLAG = 3, 5  # among their arguments
_ASSUMED = 2  # the least size that torch.export gives an open one


class Graph:
    """The operators of a forward pass, with the parts of weights that they read."""

    def __init__(
        self, program: Any, tensors: Sequence[torch.Tensor], memory: Memory, spec: TreeSpec
    ) -> None:
        self.spec = spec
        self.sizes = _sizes_of(program)
        self.device = tensors[0].device
        self.module = _unlifted(program)
        self._tidy()
        locator = _Locator(self.module, memory)
        locator.run(*tensors, enable_io_processing=False)
        self.constants = locator.constants
        self.moved = set(locator.regions) | locator.groups
        self.whole = {
            node: region.source.name
            for node, region in locator.regions.items()
            if node.op == "get_attr" and _is(locator.values[node], region.source.tensor)
        }
        self.uses = [
            Use(node, region, locator.values[node])
            for node, region in locator.regions.items()
            if any(user not in self.moved for user in node.users)
        ]
        if weight := next(iter(self.uses), None):
            self.device = weight.value.device

    def parts(self) -> dict[str, Part]:
        """Return what is read, by the name of the source."""
        uses: dict[str, list[Region]] = {}
        for use in self.uses:
            uses.setdefault(use.region.source.name, []).append(use.region)
        return {name: Part(regions[0].source, regions) for name, regions in uses.items()}

    def statistics(self) -> dict[str, bool]:
        """Return whether a batch moves running means, by their names."""
        regions = {use.node: use.region for use in self.uses}
        return {
            regions[mean].source.name: bool(node.args[_FLAG])
            for node in self.module.graph.nodes
            if node.target in _NORMALISATIONS and (mean := node.args[_MEAN]) in regions
        }

    def program(self, weights: Weights, moving: Set[str]) -> Program:
        """Return the operators as code that names weights of their own.

        Args:
            weights: These; which are used is noted there.
            moving: Running means of layers that are frozen, or renewed, by their own flag.
        """
        graph = self.module.graph
        for use in self.uses:
            with graph.inserting_before(use.node):
                node = weights.node_of(graph, use, self._is_of_whole(use.node))
            if node is not use.node:
                use.node.replace_all_uses_with(
                    node, delete_user_cb=lambda user: user not in self.moved
                )
        self._sweep()
        for node in list(graph.nodes):
            if node in self.whole:
                node.target = self.whole[node]
            elif node.op == "get_attr" and node.target in self.constants:
                with graph.inserting_before(node):
                    name = weights.constant(self.constants[node.target])
                    node.replace_all_uses_with(graph.create_node("get_attr", name))
        self._sweep()
        self._name_flags(moving)
        self._name_device()
        _traceable(graph)
        graph.set_codegen(CodeGen())
        code = graph.python_code("self")
        return Program.of(_with_autocast(code.src), code.globals, self.spec)

    def _is_of_whole(self, node: fx.Node) -> bool:
        """Return whether a node is made of weights as they are, not of what is kept of them."""
        inputs = [n for n in node.all_input_nodes if n in self.moved]
        return node in self.whole if not inputs else all(map(self._is_of_whole, inputs))

    def _tidy(self) -> None:
        """Remove checks of types and devices, and regions of code that are no operators."""
        _inlined(self.module)
        graph = self.module.graph
        for node in list(graph.nodes):
            name = str(node.target)
            if node.op == "call_module" or "_assert_tensor_metadata" in name:
                graph.erase_node(node)
            elif node.target is torch.ops.aten.sym_size.int:  # which a trace would freeze
                with graph.inserting_before(node):
                    size = graph.call_method("size", node.args)
                size.meta = node.meta
                node.replace_all_uses_with(size)
                graph.erase_node(node)
        self._sweep()
        _slices_first(graph)

    def _sweep(self) -> None:
        """Remove what nobody reads."""
        graph = self.module.graph
        for node in reversed(list(graph.nodes)):
            unused = not node.users and node.op not in ("placeholder", "output")
            acts = changes(node.target) or node.target in (enter_autocast, exit_autocast)
            if unused and not acts and "assert" not in str(node.target):
                graph.erase_node(node)

    def _name_flags(self, moving: Set[str]) -> None:
        """Let normalisations that move statistics follow the flag of the module that has these."""
        for node in list(self.module.graph.nodes):
            if node.target not in _NORMALISATIONS:
                continue
            mean = str(getattr(_viewed(node.args[_MEAN]), "target", ""))
            holder, _, _ = mean.rpartition(".")
            if holder and mean in moving:
                with self.module.graph.inserting_before(node):
                    flag = self.module.graph.create_node("get_attr", f"{holder}.training")
                node.update_arg(_FLAG, flag)
            node.target = _NORMALISATIONS[node.target]  # which can be watched

    def _name_device(self) -> None:
        """Let operators that are given the device of the weights take the network's own."""
        graph = self.module.graph
        named: list[fx.Node] = []

        def replaced(item: Any) -> Any:
            if item != self.device or not isinstance(item, torch.device):
                return item
            if not named:
                first = next(iter(graph.nodes))
                with graph.inserting_before(first):
                    named.append(graph.create_node("get_attr", DEVICE))
            return named[0]

        for node in list(graph.nodes):
            if node.op == "call_function":
                node.args = map_aggregate(node.args, replaced)
                node.kwargs = map_aggregate(node.kwargs, replaced)


class _Locator(fx.Interpreter):
    """Runs a graph, and notes which nodes hold a part of a weight whatever the inputs are."""

    def __init__(self, module: fx.GraphModule, memory: Memory) -> None:
        super().__init__(module)
        self._memory = memory
        self._dependent: set[fx.Node] = set()
        self.regions: dict[fx.Node, Region] = {}
        self.groups: set[fx.Node] = set()  # of several tensors
        self.values: dict[fx.Node, torch.Tensor] = {}
        self.constants: dict[Any, torch.Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Run a node and note its place."""
        value = super().run_node(node)
        tensor = isinstance(value, torch.Tensor)
        if node.op == "get_attr":
            region = self._memory.region(value) if tensor else None
            if region is not None:
                self._note(node, region, value)
            elif tensor:
                self.constants[node.target] = value
            return value
        dependent = node.op == "placeholder" or is_random(node.target)
        dependent = dependent or any(n in self._dependent for n in node.all_input_nodes)
        if dependent or not isinstance(value, (torch.Tensor, tuple, list)):
            self._dependent.add(node)
        elif node.target is operator.getitem or self._moves(node, value):
            if not isinstance(value, torch.Tensor):
                self.groups.add(node)
            elif (region := self._memory.region(value)) is not None:
                self._note(node, region, value)
        return value

    def _moves(self, node: fx.Node, value: Any) -> bool:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        held = [n for n in node.all_input_nodes if n in self.regions]
        return bool(held) and self._memory.moved(node.target, args, kwargs, value)

    def _note(self, node: fx.Node, region: Region, value: torch.Tensor) -> None:
        self.regions[node], self.values[node] = region, value


def _viewed(node: Any) -> Any:
    """Return the node of the tensor that a node is a view of, as `[:n]` is where n takes all."""
    while getattr(node, "target", None) in _VIEWS:
        node = node.args[0]
    return node


def _is(one: torch.Tensor, other: torch.Tensor) -> bool:
    places = [(x.data_ptr(), x.shape, x.stride()) for x in (one, other)]
    return places[0] == places[1]


def _unlifted(program: Any) -> fx.GraphModule:
    takes = inspect.signature(program.module).parameters
    module: fx.GraphModule = program.module(**({"check_guards": False} if takes else {}))
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target)
    return module


def _sizes_of(program: Any) -> Sizes:
    """Return the sizes that an exported program takes."""
    names = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    shapes = tuple(tuple(_size(n) for n in node.meta["val"].shape) for node in nodes)
    ranges = {
        str(name): (_least(float(bounds.lower)), float(bounds.upper))
        for name, bounds in program.range_constraints.items()
    }
    return Sizes(shapes, ranges, tuple(getattr(program, "_guards_code", ()) or ()))


def _slices_first(graph: fx.Graph) -> None:
    """Take slices of fixed sizes before those that depend on an input, as of `w[:length, :n]`."""
    op, end = torch.ops.aten.slice.Tensor, 2**63 - 1
    for node in list(graph.nodes):
        if node.target is op and tuple(node.args[2:]) in ((), (0,), (0, end), (None, None)):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))  # it takes all
            graph.erase_node(node)
    for node in list(graph.nodes):
        later = node
        while later.target is op:
            inner = cast(fx.Node, later.args[0])
            fixed = not any(isinstance(bound, fx.Node) for bound in later.args[1:])
            depends = inner.target is op and any(isinstance(x, fx.Node) for x in inner.args[1:])
            if not (fixed and depends and len(inner.users) == 1):
                break
            if later.args[1] == inner.args[1]:
                break
            with graph.inserting_before(inner):
                first = graph.call_function(op, (inner.args[0], *later.args[1:]))
            inner.args = (first, *inner.args[1:])
            later.replace_all_uses_with(inner)
            graph.erase_node(later)
            later = first


def enter_autocast(device_type: str, dtype: torch.dtype | None, enabled: bool, cache: bool) -> Any:
    """Enter autocast while a graph is looked at; return what leaves it."""
    context = torch.autocast(device_type, dtype, enabled, cache)
    context.__enter__()  # type: ignore[no-untyped-call] # torch's
    return context


def exit_autocast(context: Any) -> None:
    """Leave autocast."""
    context.__exit__(None, None, None)


def _with_autocast(code: str) -> str:
    """Return code in which autocast is a `with` block, which tracers and compilers follow."""
    lines, depth = [], 0
    for line in code.splitlines():
        entered, left = _ENTER.search(line), _EXIT.search(line)
        if left is not None:
            depth -= 1
            continue
        text = f"    with torch.autocast({entered.group(1)}):" if entered is not None else line
        lines.append("    " * depth + text)
        depth += entered is not None
    return "\n".join(lines) + "\n"


_ENTER = re.compile(rf"\w*{enter_autocast.__name__}\((.*?)\)(;|$)")
_EXIT = re.compile(rf"\w*{exit_autocast.__name__}\(")


def _traceable(graph: fx.Graph) -> None:
    """Let operators be called that way with open sizes in which a trace follows these."""
    for node in list(graph.nodes):
        op = node.target
        sizes = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
        if not sizes or not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
            continue
        name = op._schema.name.removeprefix("aten::")
        of_tensor = op._schema.arguments[0].name == "self"
        with graph.inserting_before(node):
            if op is torch.ops.aten.slice.Tensor:
                x, d, *bounds = cast(Any, (*node.args, *(0, None, None, 1)[len(node.args) - 1 :]))
                item = (*[slice(None)] * d, slice(*bounds))
                new = graph.call_function(operator.getitem, (x, item))
            elif of_tensor and hasattr(torch.Tensor, name):
                new = graph.call_method(name, node.args, node.kwargs)
            elif hasattr(torch, name):
                new = graph.call_function(getattr(torch, name), node.args, node.kwargs)
            else:
                continue
        new.meta = node.meta
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _size(size: Any) -> int | str:
    """Return a size, or the name of an open one; of some torch found out that they are fixed."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else str(size.node.expr)


def _least(size: float) -> float:
    """Return the least size that is taken; 0 and 1, which torch.export does not assume, are."""
    return 0 if size <= _ASSUMED else size


def _inlined(module: fx.GraphModule) -> None:
    """Put the operators of `no_grad` and `autocast` regions into the graph around them."""
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "") or str(node.target)
        if node.op != "call_function" or name not in _REGIONS:
            continue
        n = _REGIONS[name]
        settings, inner, args = node.args[:n], node.args[n], node.args[n + 1 :]
        assert isinstance(inner, fx.Node)
        region = getattr(module, str(inner.target))
        _inlined(region)
        with graph.inserting_before(node):
            entered = graph.call_function(enter_autocast, tuple(settings)) if n > 1 else None
            places = [x for x in region.graph.nodes if x.op == "placeholder"]
            copies: dict[fx.Node, Any] = dict(zip(places, args, strict=True))
            output = graph.graph_copy(region.graph, copies)
            if entered is not None:
                graph.call_function(exit_autocast, (entered,))
            elif not settings[0]:
                output = map_aggregate(
                    output,
                    lambda x: graph.call_method("detach", (x,)) if isinstance(x, fx.Node) else x,
                )
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(output[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)


_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
