# SPDX-License-Identifier: Apache-2.0
"""Proof that choices are wired: changing one of them changes the network's outputs or its cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from lightning_subnet._checks import checked_int
from lightning_subnet._messages import listed
from lightning_subnet._torch.contexts import evaluating, random_state
from lightning_subnet._torch.fingerprints import hashed
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet._torch.names import class_name
from lightning_subnet._torch.outputs import Difference, difference, named_outputs
from lightning_subnet.elasticity.ends import Costs, Excess, ends_message, ends_of, groups_of
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.parity import Call, check_parity
from lightning_subnet.elasticity.protocol import activated, elastic_part
from lightning_subnet.errors import ElasticityError, ParityError
from lightning_subnet.space.choices import Value
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

_DRAWS = 200  # random subnets among which a choice that the largest lacks is looked for
_COVER = 8  # subnets that between them have every value of choices with so few
_PASSES = 150  # of families around other subnets than the largest
_COUNTING = 5  # plain passes that take as long as one that is counted
_VALUES = 4  # of each such family, beside that of the subnet in its middle
_ALONE = 24  # choices of a list whose costs are compared one by one
_CLEARLY = 1.5  # how many times the first of ascending numbers costs the last if it is a mistake
_ALL_PAIRS = 6  # of so few subnets each follows each other one
_GLANCE = 480  # characters of a message
_REPEATED = 1e-6  # what kernels may differ by from one run to the next, as a share


def check_elastic(module: nn.Module, example_input: Any, *, seed: int = 0) -> None:
    """Prove that every value of every choice is another network, the one that is extracted.

    Around the largest subnet every choice takes all its values, while all else stays: any two of
    these networks must give other outputs on the same input, or cost other MACs. Around the
    smallest subnet and random ones the same is tried with up to five values of a choice, within the
    time of 150 forward passes.

    The largest subnet must not cost less than the smallest, nor the last value of an ordered choice
    less than the first; of ascending numbers (those of a list, `ks.0`, `ks.1` ..., together) not
    by a third, as with more heads a network may be a little cheaper.

    About ten subnets, which have each value of a choice between them if it has at most eight, run
    again in opposite orders and must give the same outputs. Those of a network with an `extract`
    method must give the outputs of their extractions; of another network two are compared with a
    frozen copy. Weights and buffers must stay as they are.

    The subnet in force, weights, buffers and random states come back. A network of 50 layers takes
    the time of some 400 forward passes.

    Args:
        module: A super-network, or a module with one elastic descendant.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of `forward`,
            whose outputs may have any structure. Take real data or noise: zeros hide weights that
            they are multiplied with.
        seed: The seed of the subnets that are compared.

    Raises:
        ElasticityError: A choice or a value changes nothing; the values of a choice are upside
            down; a subnet cannot be put in force or run; its outputs are random, or depend on the
            subnet that was in force before; it is not what is extracted; or weights change.

    Example:
        >>> from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
        >>> check_elastic(ElasticMobileNetV3.tiny(), torch.randn(2, 1, 8, 8))
    """
    seed = checked_int(seed, "seed", error=ElasticityError, least=0)
    part = elastic_part(module)
    space = part.search_space()
    runner = _Runner(module, part, example_input)
    with random_state(seed), activated(module, space.largest), evaluating(module):
        if any(is_lazy(tensor) for tensor in module.parameters()):
            runner.run(space.largest)  # its first pass makes them
        state = _State(module)
        with state.kept():
            subnets = _cover(space, seed)
            references = _check_runs(runner, state, subnets)
            if problems := _Families(runner, space, subnets[2:], seed).problems():
                raise ElasticityError(_joined(problems))
            _check_orders(runner, references, seed)
            _check_extraction(runner, subnets)
            runner.run(subnets[0])
            state.check(subnets[0])
            state.check_noted(subnets[0])


def _joined(problems: list[str]) -> str:
    """Return the first problems, one a line, as many as are read at a glance."""
    lines = problems[:1]
    for problem in problems[1:3]:
        if sum(map(len, lines)) + len(problem) < _GLANCE:
            lines.append(problem)
    return "\n".join(lines)


class _Runner:
    """Runs subnets of a network on one input.

    Args:
        module: The module that is run.
        part: The super-network in it.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.
    """

    def __init__(self, module: nn.Module, part: Any, example_input: Any) -> None:
        self.module, self.part = module, part
        is_named = isinstance(example_input, Mapping)
        self._inputs = arguments(module, dict(example_input) if is_named else example_input)
        self.costs = Costs(module, part, *self._inputs)
        self._works = False  # no subnet has run yet

    def run(self, subnet: Subnet, after: Subnet | None = None) -> Any:
        """Return the outputs of a subnet, numbers as tensors.

        Args:
            subnet: The subnet.
            after: Another one that is put in force before.
        """
        try:
            if after is not None:
                self.part.activate(after)
            self.part.activate(subnet)
            outputs = self.again()
            self._works = True
            return outputs
        except Exception as error:
            msg = (
                f"{subnet!r:.200} cannot be put in force or run: {type(error).__name__}: "
                f"{error!s:.150}. Every subnet of the space must run{self._hint()}"
            )
            raise ElasticityError(msg) from error

    def _hint(self) -> str:
        """Return what to do where a subnet does not run."""
        if self._works:
            return ": mend activate(), or exclude it by when=."
        first = ", and this is the first: pass an example_input that forward() takes"
        return f"{first}, or mend activate()."

    def again(self) -> Any:
        """Return the outputs of the subnet in force."""
        args, kwargs = cloned(self._inputs)  # a first layer may work in place
        with torch.no_grad():
            return tree_map(_tensor, self.module(*args, **kwargs))

    def call_of_part(self) -> Call | None:
        """Return the arguments of the super-network in a pass; None if it is not called itself."""
        calls: list[Call] = []

        def remember(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(cloned((args, kwargs)))

        with self.part.register_forward_pre_hook(remember, with_kwargs=True):
            self.again()
        return calls[0] if calls else None


def _tensor(leaf: Any) -> Any:
    """Return numbers and arrays in outputs as tensors, which are compared; else the leaf."""
    is_number = isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray)
    return torch.as_tensor(leaf) if is_number else leaf


def _gap(expected: Any, output: Any) -> Difference | None:
    """Return the difference of two outputs that should be equal, None if rounding explains it."""
    gap = difference(expected, output)
    types = {x.dtype for x in named_outputs(expected).values() if x.is_floating_point()}
    steps = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
    return gap if gap.relative > max(_REPEATED, steps) else None


def _named(space: SearchSpace, subnet: Subnet) -> str:
    if subnet in (space.largest, space.smallest):
        return f"the {'largest' if subnet == space.largest else 'smallest'} subnet"
    return f"{subnet!r:.100}"


def _cover(space: SearchSpace, seed: int) -> list[Subnet]:
    """Return the ends of a space and random subnets that have every value between them."""
    rng = np.random.default_rng(seed)
    ends = [space.largest, space.smallest]
    if space.is_pool:
        return list(dict.fromkeys([*ends, *space.sample(min(_COVER, space.size), rng)]))
    values = [
        [space.choices[name].values.index(value) for value in some]
        for name, some in space.values.items()
    ]
    n = min(_COVER, max(map(len, values)) + 2)
    columns = [np.resize(rng.permutation(some), n) for some in values]
    rows = np.stack([rng.permutation(column) for column in columns], axis=1)
    return list(dict.fromkeys([*ends, *space.from_indices(rows)]))


# Runs of the same subnet


def _check_runs(runner: _Runner, state: _State, subnets: list[Subnet]) -> dict[Subnet, Any]:
    """Return the outputs of subnets, which must be the same twice in a row and change no weight."""
    references: dict[Subnet, Any] = {}
    for subnet in subnets:
        references[subnet] = runner.run(subnet)
        tensors = named_outputs(references[subnet]).values()
        if tensors and not any(x.numel() for x in tensors):
            msg = "The outputs are empty, so that all subnets look alike. Pass an example_input "
            raise ElasticityError(f"{msg}with one sample or more.")
        state.check(subnet)
        if len(references) == 1:
            state.note()
        _check_random(runner, subnet, references[subnet])
    return references


def _check_random(runner: _Runner, subnet: Subnet, output: Any) -> None:
    if gap := _gap(output, runner.again()):
        msg = (
            f"{subnet!r:.200} gives other outputs when it is run twice in a row, in eval mode: "
            f"{gap}. Turn off what draws random numbers there (dropout, sampling), or what "
            "forward() changes."
        )
        raise ElasticityError(msg)


def _check_orders(runner: _Runner, references: Mapping[Subnet, Any], seed: int) -> None:
    """Refuse subnets whose outputs depend on those that were in force before."""
    space: SearchSpace = runner.part.search_space()
    order = list(references)
    rng = np.random.default_rng([seed, 1])
    if len(order) <= _ALL_PAIRS:
        walk = _each_after_each(order)
    else:
        walk = [*order, *order[::-1], *(order[i] for i in rng.permutation(len(order)))]
    for subnet in walk:
        output = runner.run(subnet)
        if gap := _gap(references[subnet], output):
            _check_random(runner, subnet, output)
            name = _named(space, subnet)
            msg = (
                f"{name[0].upper()}{name[1:]} gives other outputs after others were in force: "
                f"{gap}. activate() must set everything that a subnet depends on, each time."
            )
            raise ElasticityError(msg)


def _each_after_each(order: list[Subnet]) -> list[Subnet]:
    """Return a walk in which each subnet comes directly after each other one."""
    walk: list[Subnet] = []
    for i, one in enumerate(order):
        for other in order[i + 1 :]:
            walk += [one, other]
        walk.append(one)
    return [*walk, *walk[::-1]]


# One choice at a time


class _Families:
    """Subnets that differ in one choice alone, and what is wrong with their outputs and costs.

    Args:
        runner: Runs them.
        space: The space.
        others: Random subnets.
        seed: The seed of the choices and values that are tried around others than the largest.
    """

    def __init__(
        self, runner: _Runner, space: SearchSpace, others: list[Subnet], seed: int
    ) -> None:
        self._runner, self._space, self._seed = runner, space, seed
        self._others = others
        self._digests: dict[Subnet, str] = {}

    def problems(self) -> list[str]:
        """Return messages about choices, none if all are wired."""
        space = self._space
        problems = []
        for name in space.names:
            base = self._base(name)
            problems += [] if base is None else self._check(name, base, "")
        if problems:
            return problems
        message = self._upside_down() or ends_message(space, self._runner.costs)
        return [message] if message else self._elsewhere()

    def _elsewhere(self) -> list[str]:
        """Return messages about choices around the smallest subnet and around random ones."""
        space, left = self._space, _PASSES
        rng = np.random.default_rng([self._seed, 2])
        names = [str(name) for name in rng.permutation(list(space.names))]
        smallest = [(name, space.smallest) for name in names]
        turns = enumerate(names if self._others else [])
        randoms = [(name, self._others[i % len(self._others)]) for i, name in turns]
        problems: list[str] = []
        for around in (smallest, randoms):
            for name, subnet in around:
                if left <= 0 or len(problems) > 1:
                    break
                before = self._spent
                problems += self._check(name, subnet, f" around {_named(space, subnet)}", rng)
                left -= self._spent - before
        return problems

    @property
    def _spent(self) -> int:
        """The time that was spent, in forward passes."""
        return len(self._digests) + _COUNTING * len(self._runner.costs)

    def _base(self, name: str) -> Subnet | None:
        """Return a subnet whose choice can be changed, the largest if possible."""
        space = self._space
        if len(self._family(name, space.largest)) > 1:
            return space.largest
        draws = space.sample(min(_DRAWS, space.size), np.random.default_rng(self._seed))
        return next((subnet for subnet in draws if len(self._family(name, subnet)) > 1), None)

    def _family(
        self, name: str, base: Subnet, rng: np.random.Generator | None = None
    ) -> dict[Subnet, Value]:
        """Return the subnets around one by the distinct values of a choice; of a few if drawn."""
        space, j = self._space, self._space.names.index(name)
        choice = space.choices[name]
        if name not in base.active:
            return {}
        at = [choice.values.index(value) for value in space.values[name]]
        if rng is not None and len(at) > _VALUES:
            some = [at[0], at[-1], *rng.choice(at[1:-1], _VALUES - 2, replace=False).tolist()]
            at = sorted({*some, int(base.indices[j])})
        rows = np.repeat(base.indices[None], len(at), axis=0)
        rows[:, j] = at
        family: dict[Subnet, Value] = {}
        for i, subnet in zip(at, space.from_indices(rows), strict=True):
            if subnet in space:
                family.setdefault(subnet, choice.values[i])
        return family

    def _check(
        self, name: str, base: Subnet, where: str, rng: np.random.Generator | None = None
    ) -> list[str]:
        """Return messages about the values of one choice around one subnet."""
        family = self._family(name, base, rng)
        if len(family) < 2:  # noqa: PLR2004 - a fixed choice, or one that does not exist there
            return []
        groups: dict[tuple[str, int | None], list[Value]] = {}
        digests = [self._digest(subnet, base) for subnet in family]
        for digest, (subnet, value) in zip(digests, family.items(), strict=True):
            self._runner.part.activate(base)  # as for the outputs
            macs = self._runner.costs.macs(subnet) if digests.count(digest) > 1 else None
            groups.setdefault((digest, macs), []).append(value)
        ties = [values for values in groups.values() if len(values) > 1]
        if ties and len(groups) == 1:
            there = " there" if where else ""
            end = ", or say when it exists: Choice(..., when=...)." if where else "."
            return [
                f"Choice {name!r} is dead{where}: all its values give the same outputs and MACs"
                f"{there}. Use it in activate() and forward(){end}"
            ]
        return [
            f"Values {_listed(values)} of {name!r} are the same network{where}. "
            + (
                "Wire them there, or say when they exist: Choice(..., when=...)."
                if where
                else f"Say so, Choice(..., same=[({', '.join(map(repr, values))})]), or wire them."
            )
            for values in ties
        ]

    def _digest(self, subnet: Subnet, base: Subnet) -> str:
        """Return a hash of the outputs: those of hundreds of subnets may not fit into memory."""
        if subnet not in self._digests:
            # What activate() leaves out is then that of the base, and shows as equal to it.
            self._digests[subnet] = hashed(tree_map(_plain_zeros, self._runner.run(subnet, base)))
        return self._digests[subnet]

    def _units(self) -> list[tuple[int, ...]]:
        """Return the positions of choices whose costs are compared together: counting takes time.

        The numbers of a list (`ks.0`, `ks.1` ...) go together where they ascend in all of them.
        """
        units: list[tuple[int, ...]] = []
        for places in groups_of(self._space):
            together = all(self._is_plain(j) for j in places) or len(places) > _ALONE
            units += [places] if together else [(j,) for j in places]
        return units

    def _is_plain(self, place: int) -> bool:
        """Return whether the values of a choice are ascending numbers."""
        choice = self._space.choices[self._space.names[place]]
        types = {type(value) for value in choice.values}
        return types <= {int, float} and choice.ascends

    def _upside_down(self) -> str | None:
        """Return a message about choices whose last value costs less than their first."""
        wrong: list[str] = []
        costs: list[Excess] = []
        for places in self._units():
            if excess := self._excess(places):
                wrong += [self._space.names[j] for j in places]
                costs.append(excess)
        if not wrong:
            return None
        values, excess = self._space.values[wrong[0]], costs[0]
        return (
            f"The order of {listed(wrong, 3)} is upside down: with the last value, {values[-1]!r}, "
            f"the network costs {excess.last:,} {excess.unit}, and with the first, {values[0]!r}, "
            f"{excess.first:,}; the largest subnet takes the last. Go from the smallest network to "
            f"the largest: Choice({list(reversed(values))!r:.60}, ordered=True); or ordered=False."
        )

    def _excess(self, places: tuple[int, ...]) -> Excess | None:
        """Return the costs if choices cost less at their last values than at their first."""
        space = self._space
        bases = [space.largest]
        if len(places) == 1 and (base := self._base(space.names[places[0]])):
            bases.append(base)  # the largest may lack the choice
        pairs = (ends_of(space, places, space.indices([base])) for base in bases)
        ends = next((pair for pair in pairs if pair), None)
        excess = None if ends is None else self._runner.costs.excess(*ends)
        if excess and all(map(self._is_plain, places)) and excess.first < _CLEARLY * excess.last:
            return None
        return excess


def _listed(values: list[Value]) -> str:
    return f"{', '.join(map(repr, values[:-1]))} and {values[-1]!r}"


def _plain_zeros(leaf: Any) -> Any:
    """Return a tensor in which -0.0, which equals 0.0, is that."""
    is_floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf + 0.0 if is_floating else leaf


# Extraction


def _check_extraction(runner: _Runner, subnets: list[Subnet]) -> None:
    """Refuse extractions that give other outputs than the subnet in force."""
    runner.part.activate(subnets[0])
    call, part = runner.call_of_part(), runner.part
    if call is None:
        return  # the module calls methods of it, not forward()
    has_own = callable(getattr(part, "extract", None))
    for subnet in subnets if has_own else subnets[1:3]:
        active = runner.run(subnets[0])
        try:
            plain = extract(part, subnet)
        except ElasticityError:
            raise
        except Exception as error:
            msg = (
                f"{class_name(part)} cannot extract {subnet!r:.200}: {type(error).__name__}: "
                f"{error!s:.150}. Every subnet of the space must be extracted."
            )
            raise ElasticityError(msg) from error
        if name := _shared(runner.module, plain):
            msg = (
                f"The extraction of {subnet!r:.200} shares {name!r} with the super-network, so "
                "training one would change the other. Return a network with copies of weights."
            )
            raise ElasticityError(msg)
        if gap := _gap(active, runner.again()):
            msg = (
                f"Extracting {subnet!r:.200} changes the subnet in force: {gap}. extract() must "
                "leave it as it was: with activated(net, subnet): ..."
            )
            raise ElasticityError(msg)
        try:
            check_parity(part, subnet, plain, [call])
        except ParityError as error:
            raise ElasticityError(str(error)) from error


def _shared(module: nn.Module, plain: nn.Module) -> str | None:
    """Return the name of a tensor of an extraction that lies in the memory of the super-network."""
    own = {
        t.untyped_storage().data_ptr()
        for t in module.state_dict().values()
        if torch.is_tensor(t) and t.numel()
    }
    state = plain.state_dict().items()
    return next((k for k, t in state if t.numel() and t.untyped_storage().data_ptr() in own), None)


# Weights and buffers


class _State:
    """The parameters and buffers of a module as they are now.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tensors = self._now()
        self._values = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._persistent = self._values.keys() & module.state_dict().keys()
        self._scratch: dict[str, torch.Tensor] = {}

    def _now(self) -> dict[str, torch.Tensor]:
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        return {name: tensor.detach() for name, tensor in named if not is_lazy(tensor)}

    def note(self) -> None:
        """Remember the buffers that no checkpoint holds: they may depend on the subnet in force."""
        self._scratch = {
            name: tensor.clone()
            for name, tensor in self._now().items()
            if name not in self._persistent
        }

    def check(self, subnet: Subnet) -> None:
        """Raise if a tensor of the state dict is another one since."""
        now = self._now()
        for name in self._persistent:
            if name not in now or not _equal(now[name], self._values[name]):
                self._refuse(subnet, name)

    def check_noted(self, subnet: Subnet) -> None:
        """Raise if a buffer is another one than it was with the same subnet in force."""
        now = self._now()
        for name, value in self._scratch.items():
            # A cache may have grown since.
            if name in now and now[name].shape == value.shape and not _equal(now[name], value):
                self._refuse(subnet, name)

    def _refuse(self, subnet: Subnet, name: str) -> None:
        msg = (
            f"Putting {subnet!r:.200} in force, or running it in eval mode, changes the tensor "
            f"{name!r}. activate() and forward() must leave weights and buffers as they are; keep "
            "what depends on the subnet in attributes."
        )
        raise ElasticityError(msg)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put values back on leaving."""
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._tensors.items():
                    if not _equal(tensor, self._values[name]):
                        tensor.copy_(self._values[name])


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
