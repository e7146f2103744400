# SPDX-License-Identifier: Apache-2.0
"""Sliced network: a subnet as the operators that it runs, with weights of its own."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from lightning_subnet._torch.structures import flatten, kind, unflatten

DEVICE = "_device"
"""The attribute of a sliced network by which its operators name its device."""


@dataclass(frozen=True)
class Form:
    """The structure of an argument or an output, as an object that can be pickled.

    Args:
        spec: As torch has it.
    """

    spec: TreeSpec

    def __reduce__(self) -> Any:
        # Its own pickle warns, and changes with the version of torch.
        return _form_of, (self.fill(range(self.spec.num_leaves)),)

    def fill(self, leaves: Iterable[Any]) -> Any:
        """Return an object of this structure."""
        return unflatten(leaves, self.spec)


def _form_of(value: Any) -> Form:
    return Form(flatten(value)[1])


@dataclass(frozen=True)
class Template:
    """The form of one argument of `forward`.

    Args:
        form: Its structure.
        leaves: Its leaves; None in the place of a tensor.
        tensors: Which of them are tensors.
    """

    form: Form
    leaves: tuple[Any, ...]
    tensors: tuple[bool, ...]

    @classmethod
    def of(cls, value: Any) -> Template:
        """Return the template of an argument."""
        leaves, spec = flatten(value)
        tensors = tuple(isinstance(x, torch.Tensor) for x in leaves)
        rest = tuple(None if t else x for x, t in zip(leaves, tensors, strict=True))
        return cls(Form(spec), rest, tensors)

    @cached_property
    def plain(self) -> bool:
        """Whether it is one tensor."""
        return self.tensors == (True,) and self.form.spec.is_leaf()

    def fill(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the argument with these tensors."""
        rest = iter(tensors)
        pairs = zip(self.leaves, self.tensors, strict=True)
        return self.form.fill(next(rest) if t else x for x, t in pairs)

    def take(self, value: Any) -> list[torch.Tensor] | None:
        """Return the tensors of an argument; None if it differs in anything else."""
        if isinstance(value, dict) and self.form.spec.type is dict:
            names = self.form.spec.context
            if set(names) != set(value):
                return None
            value = {name: value[name] for name in names}
        leaves, spec = flatten(value)
        if spec != self.form.spec:
            return None
        result: list[torch.Tensor] = []
        for leaf, expected, tensor in zip(leaves, self.leaves, self.tensors, strict=True):
            if tensor != isinstance(leaf, torch.Tensor):
                return None
            if tensor:
                result.append(leaf)
            elif not _equal(leaf, expected):
                return None
        return result

    def __str__(self) -> str:
        if self.plain:
            return "a tensor"
        if not any(self.tensors):
            return _short(self.fill(()))
        return f"{sum(self.tensors)} tensors in a {kind(self.form.spec)}"


@dataclass(frozen=True)
class Program:
    """The operators of a forward pass, as code.

    Args:
        code: Of a function `forward(self, *tensors)` that returns the leaves of the output.
        names: What the code calls by name: modules by theirs, other objects as they are.
        output: The structure of the output.
    """

    code: str
    names: Mapping[str, Any]
    output: Form

    def function(self) -> Any:
        """Return the function."""
        names = {
            name: importlib.import_module(item.name) if isinstance(item, _Module) else item
            for name, item in self.names.items()
        }
        exec(self.code, names)  # as torch.fx runs its graphs
        return names["forward"]

    @classmethod
    def of(cls, code: str, names: Mapping[str, Any], output: TreeSpec) -> Program:
        """Return a program that can be pickled, with those objects that the code names."""
        portable = {
            name: _Module(item.__name__) if isinstance(item, types.ModuleType) else item
            for name, item in names.items()
            if re.search(rf"\b{re.escape(name)}\b", code)
        }
        return cls(code, portable, Form(output))


@dataclass(frozen=True)
class _Module:
    name: str


@dataclass(frozen=True)
class Sizes:
    """The sizes of inputs that a program takes.

    Args:
        shapes: Of each tensor; a name, or an expression of names, where a size is open.
        ranges: The least and the largest value of each name.
        conditions: What must hold besides, as expressions of `L["tensors"]`.
    """

    shapes: tuple[tuple[int | str, ...], ...]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    def refusal(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Return why tensors do not fit, or None."""
        reason = self._other_sizes(tensors)
        if reason is None and (violated := self.violated(tensors)):
            reason = f"{violated[0]} does not hold"
        return reason

    def violated(self, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """Return the conditions that do not hold for tensors."""
        names = {"L": {"tensors": tensors}}
        return tuple(c for c in self.conditions if _value(c, names) is False)

    def _other_sizes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        values: dict[str, Any] = {}
        sizes = [
            (i, size, expected)
            for i, (x, shape) in enumerate(zip(tensors, self.shapes, strict=True))
            for size, expected in zip(x.shape, shape, strict=len(x.shape) == len(shape))
        ]
        if any(len(x.shape) != len(s) for x, s in zip(tensors, self.shapes, strict=True)):
            return "another number of dimensions"
        for _, size, expected in sizes:
            if isinstance(expected, str) and expected.isidentifier():
                values.setdefault(expected, size)
        for i, size, expected in sizes:
            value = _value(expected, values) if isinstance(expected, str) else expected
            if value is not None and value != size:
                return f"size {size} of tensor {i} is not {expected}"
        for name, (least, most) in self.ranges.items():
            if name in values and not least <= values[name] <= most:
                return f"size {values[name]} is not from {least:g} to {most:g}"
        return None

    def __str__(self) -> str:
        names: dict[str, str] = {}
        shapes = []
        for shape in self.shapes:
            words = [
                names.setdefault(s, chr(ord("a") + len(names) % 26)) if isinstance(s, str) else s
                for s in shape
            ]
            shapes.append(f"({', '.join(map(str, words))}{',' * (len(words) == 1)})")
        return ", ".join(shapes)


@dataclass(frozen=True, eq=False)
class Recipe:
    """All of a sliced network but its tensors.

    Args:
        name: Of the class of the network that was sliced.
        signature: Of its `forward`, in which defaults are names.
        defaults: The defaults by these names.
        templates: The arguments by name; the others have their defaults.
        sizes: Of the inputs, by whether it is for training.
        programs: The operators, by the same.
        refusal: Why there is no program for training.
    """

    name: str
    signature: str
    defaults: Mapping[str, Any]
    templates: Mapping[str, Template]
    sizes: dict[bool, Sizes]
    programs: Mapping[bool, Program]
    refusal: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self  # nothing in it changes

    def __reduce__(self) -> Any:
        names = self.__dataclass_fields__
        return Recipe, tuple(getattr(self, name) for name in names)

    def build(self) -> SlicedNetwork:
        """Return a network without tensors."""
        cls = vars(self).get("_class")
        if cls is None:
            space = dict(self.defaults)
            exec(f"def bare{self.signature}: ...", space)
            parameters = inspect.signature(space["bare"]).parameters
            arguments = ", ".join(parameters)
            code = f"def forward(self, {self.signature[1:-1]}):\n"
            code += f"    return self._called(({arguments}{',' * bool(arguments)}))\n"
            exec(code, space)
            body = {
                "__module__": __name__,
                "original_name": self.name,
                "_recipe": self,
                "_functions": {mode: p.function() for mode, p in self.programs.items()},
                "_arguments": [
                    (parameter, self.templates.get(name)) for name, parameter in parameters.items()
                ],
                "forward": space["forward"],
            }
            cls = vars(self)["_class"] = type(SlicedNetwork.__name__, (SlicedNetwork,), body)
        network: SlicedNetwork = cls()
        return network


class SlicedNetwork(nn.Module):
    """A subnet of a network that has no `extract` of its own: what it runs, with its own weights.

    It has the signature of the network, its output, and weights of the same names, which are as
    large as the subnet reads them. It trains, moves, is copied and saved as any module.

    Attributes:
        original_name: The class of the network that was sliced, for `class_name`.
        sliced: True.
        untrainable_because: Why it runs in eval mode alone; None: it trains.
        dynamic_batch: Whether it takes batches of any size.
    """

    original_name: str
    _recipe: Recipe
    _functions: Mapping[bool, Any]
    _arguments: Sequence[tuple[inspect.Parameter, Template | None]]
    sliced = True

    def __init__(self) -> None:
        super().__init__()
        setattr(self, DEVICE, torch.device("cpu"))
        self._checked: dict[bool, Any] = {}

    def __reduce__(self) -> Any:
        return Recipe.build, (self._recipe,), dict(vars(self))

    @property
    def untrainable_because(self) -> str | None:
        """Why it runs in eval mode alone; None: it trains."""
        return self._recipe.refusal

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes batches of any size."""
        shapes = self._recipe.sizes[False].shapes
        return any(shape and isinstance(shape[0], str) for shape in shapes)

    def extra_repr(self) -> str:
        """Return the class of the network, and the sizes of its inputs."""
        return f"of {self.original_name}, inputs {self._recipe.sizes[False]}"

    def _called(self, values: tuple[Any, ...]) -> Any:
        recipe = self._recipe
        tensors: list[torch.Tensor] = []
        for (parameter, template), value in zip(self._arguments, values, strict=True):
            if template is not None and template.plain and isinstance(value, torch.Tensor):
                tensors.append(value)
                continue
            got = template.take(value) if template is not None else _nothing(parameter, value)
            if got is None:
                was = "its default" if template is None else template
                msg = (
                    f"The sliced {self.original_name} got {parameter.name}={_short(value)}, and "
                    f"was sliced with {was}. Pass that, or extract with an example input of this "
                    "form."
                )
                raise ValueError(msg)
            tensors += got
        function = self._functions.get(self.training)
        if function is None:
            msg = (
                f"The sliced {self.original_name} cannot be trained: {recipe.refusal}. Call eval()."
            )
            raise RuntimeError(msg)
        self._check(tensors)
        program = recipe.programs[self.training]
        return program.output.fill(function(self, *tensors))

    def _check(self, tensors: list[torch.Tensor]) -> None:
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            return  # which would take sizes for constants
        shapes = [x.shape for x in tensors]
        if shapes == self._checked.get(self.training):
            return
        sizes = self._recipe.sizes[self.training]
        reason = sizes.refusal(tensors)
        if reason is not None:
            msg = (
                f"The sliced {self.original_name} takes inputs of {sizes}, and got "
                f"{', '.join(str(tuple(s)) for s in shapes)}: {reason}. Extract with an example "
                "input of these sizes."
            )
            raise ValueError(msg)
        self._checked[self.training] = shapes

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's
        tensor = next((x for x in (*self.parameters(), *self.buffers())), None)
        if tensor is not None:
            setattr(self, DEVICE, tensor.device)
        return result


def put(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
    """Register a tensor under a dotted name; a parameter as such, any other one as a buffer."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part] or root
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent)


class _Name:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def signature_of(function: Any) -> tuple[str, dict[str, Any]]:
    """Return a signature as text in which defaults are names, and the defaults by name."""
    defaults: dict[str, Any] = {}
    parameters = []
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty:
            name = f"_default_{len(defaults)}"
            defaults[name] = default
            default = _Name(name)
        empty = inspect.Parameter.empty
        parameters.append(parameter.replace(default=default, annotation=empty))
    plain = inspect.Signature(parameters)
    return str(plain), defaults


def _value(expression: str, names: Mapping[str, Any]) -> Any:
    """Return the value of an expression of sizes; None if it has none here."""
    functions = {
        "Max": max, "Min": min, "Mod": lambda a, b: a % b, "FloorDiv": lambda a, b: a // b,
        "PythonMod": lambda a, b: a % b, "CleanDiv": lambda a, b: a // b, "math": math,
        "Eq": lambda a, b: a == b, "Ne": lambda a, b: a != b,
    }  # fmt: skip
    try:
        return eval(expression, {**functions, **names})  # of torch.export
    except Exception:  # of a function that torch has besides
        return None


def _nothing(parameter: inspect.Parameter, value: Any) -> list[torch.Tensor] | None:
    """Return no tensors if an argument is its default, else None."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return None if value else []
    return [] if _equal(value, parameter.default) else None


def _equal(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    try:
        return type(value) is type(expected) and bool(value == expected)
    except Exception:  # of arrays
        return False


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"{value!r:.60}"
