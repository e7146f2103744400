# SPDX-License-Identifier: Apache-2.0
"""Adapters for super-networks of other packages: `ofa`, `whittle` and HAT.

None of those packages is imported; a network is known by its methods. Each adapter attaches the
protocol (`elastic`) and returns the same object.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.protocol import activated, elastic
from lightning_subnet.errors import SearchError, SpaceError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets._blocks.resnet_space import ResNetConfig, resnet_choices

_Net = TypeVar("_Net", bound=nn.Module)
Config = Callable[[Subnet], Mapping[str, Any]]

_MOBILE = ("OFAMobileNetV3", "OFAProxylessNASNets")
_RESNET = "OFAResNets"
_STAGES = ("STAGE_WIDTH_LIST", "BASE_DEPTH_LIST")  # of a ResNet


# The once-for-all package


def from_ofa(net: _Net) -> _Net:
    """Make a super-network of the `ofa` package searchable: its space is that of its own lists.

    Choices are named as the package names its settings, numbered: `d.<stage>`, `ks.<block>`,
    `e.<block>`; of a ResNet `d.0` is the stem's and `w.<place>` are width multipliers themselves,
    not their numbers. Extraction is the network's own `get_active_subnet(preserve_weight=True)`.

    Args:
        net: An `OFAMobileNetV3`, `OFAProxylessNASNets` or `OFAResNets`.

    Returns:
        The same object, with `search_space()`, `activate(subnet)`, `extract(subnet)` and
        `active_subnet`.

    Raises:
        SearchError: The network is another one, or lacks what networks of the package have.
        SpaceError: The network was built with one value for everything, with values that cannot
            be built, or its blocks are other ones than its lists say.

    References:
        Cai et al., Once-for-All: Train One Network and Specialize it for Efficient Deployment, ICLR
        2020, and its package `ofa`.

    Example:
        >>> from_ofa(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.SearchError: from_ofa() got a Linear, which is none of ...
    """
    names = {cls.__name__ for cls in type(net).__mro__}
    if not isinstance(net, nn.Module) or not names & {*_MOBILE, _RESNET}:
        msg = (
            f"from_ofa() got a {class_name(net)}, which is none of {listed((*_MOBILE, _RESNET))}"
            ". Pass the super-network itself, or use elastic(net, space=, activate=)."
        )
        raise SearchError(msg)
    choices = _ofa_resnet_choices(net) if _RESNET in names else _ofa_mobile_choices(net)
    activate = _activate_ofa_resnet if _RESNET in names else _activate_ofa_mobile
    return elastic(net, space=SearchSpace(choices), activate=activate, extract=_extract_ofa)


def _ofa_mobile_choices(net: Any) -> dict[str, Choice]:
    """Return the choices of a MobileNetV3 or a ProxylessNAS network, depths first."""
    groups, choices, when = _own(net, "block_group_info"), {}, {}
    depth_list = _listed_values(net, "depth_list", least=1)
    for s, group in enumerate(groups):
        depths = sorted({min(d, len(group)) for d in depth_list})
        if len(depths) > 1 or len(group) == max(depth_list):
            choices[f"d.{s}"] = Choice(depths)
        for b, i in enumerate(group):
            deep = [d for d in depths if d > b]
            when[i - 1] = {f"d.{s}": deep} if len(deep) < len(depths) else {}
    for name, attribute in (("ks", "ks_list"), ("e", "expand_ratio_list")):
        values = _listed_values(net, attribute)
        for number, condition in when.items():
            choices[f"{name}.{number}"] = Choice(values, when=condition)
    return choices


def _activate_ofa_mobile(net: Any, subnet: Subnet) -> None:
    values = subnet.grouped()
    net.set_active_subnet(ks=values["ks"], e=values["e"], d=values["d"])


def _ofa_resnet_choices(net: Any) -> dict[str, Choice]:
    """Return the choices of a ResNet of any number of stages."""
    depths = _listed_values(net, "depth_list", least=0)
    groups = _own(net, "grouped_block_index")
    # The package pairs them so, and builds four stages at most.
    stages = list(zip(*(_own(net, name) for name in _STAGES), strict=False))[: len(groups)]
    try:
        config = ResNetConfig(
            widths=tuple(width for width, _ in stages),
            base_depths=tuple(base for _, base in stages),
            strides=(2,) * (len(stages) + 2),  # on which no choice depends
            depths=tuple(depths),
            expansions=tuple(_listed_values(net, "expand_ratio_list")),
            width_mults=tuple(_listed_values(net, "width_mult_list")),
            divisor=_own(net, "CHANNEL_DIVISIBLE"),
        )
    except SpaceError as error:
        msg = f"from_ofa() got a {class_name(net)} with {_lists(net)}: {error}"
        raise SpaceError(msg) from error
    _check_stages(net, groups, config)
    return resnet_choices(config)


def _check_stages(net: Any, groups: Sequence[Sequence[int]], config: ResNetConfig) -> None:
    """Raise if a ResNet has other stages than its lists say, as those of its base count."""
    blocks, expected = [len(group) for group in groups], [len(n) for n in config.numbers]
    firsts = (_own(net, "blocks")[group[0]] for group in groups)
    widths = [getattr(block, "out_channel_list", None) for block in firsts]
    what = f"{len(blocks)} stages of {blocks} blocks", f"{len(expected)} of {expected}"
    if blocks == expected:
        pairs = zip(widths, config.channels[2:], strict=True)
        if all(width is None or sorted(set(width)) == sorted(set(c)) for width, c in pairs):
            return
        what = f"stages of {widths} channels", f"{config.channels[2:]}"
    msg = (
        f"from_ofa() got a {class_name(net)} with {what[0]:.150}, and expected {what[1]:.150} by "
        f"its lists: {_lists(net)}. Give it the lists that it was built with, or use elastic(net, "
        "space=, activate=)."
    )
    raise SpaceError(msg)


def _lists(net: Any) -> str:
    return ", ".join(f"{name}={_own(net, name)!r:.60}" for name in (*_STAGES, "depth_list"))


def _activate_ofa_resnet(net: Any, subnet: Subnet) -> None:
    values = subnet.grouped()
    multipliers = list(net.width_mult_list)
    net.set_active_subnet(
        d=values["d"], e=values["e"], w=[multipliers.index(w) for w in values["w"]]
    )


def _own(net: Any, name: str) -> Any:
    """Return an attribute that networks of the package have.

    Raises:
        SearchError: This one does not.
    """
    try:
        return getattr(net, name)
    except AttributeError as error:
        msg = (
            f"from_ofa() got a {class_name(net)} without {name}, which networks of the ofa package "
            "have. Pass one of those, or use elastic(net, space=, activate=)."
        )
        raise SearchError(msg) from error


def _listed_values(net: Any, name: str, least: int | None = None) -> list[Any]:
    """Return the values of one of a network's lists, each once, in ascending order.

    Args:
        net: The network.
        name: Of the list.
        least: The least value of whole numbers; None: positive numbers of any kind.

    Raises:
        SpaceError: The list is empty, or holds something else.
    """
    held = _own(net, name)
    values = list(held) if hasattr(held, "__iter__") else [held]
    values = [v.item() if hasattr(v, "item") else v for v in values]  # of NumPy
    if least is None:
        expected = "positive numbers"
        good = [isinstance(v, int | float) and v > 0 for v in values]
    else:
        expected = f"whole numbers from {least}"
        good = [isinstance(v, int) and v >= least for v in values]
    if not values or not all(good):
        msg = (
            f"from_ofa() got a {class_name(net)} with {name}={held!r:.80}, which must be one or "
            f"more {expected}. Build the network with such a list."
        )
        raise SpaceError(msg)
    return sorted(set(values))


def _extract_ofa(net: Any, subnet: Subnet) -> nn.Module:
    with activated(net, subnet):
        plain: nn.Module = net.get_active_subnet(preserve_weight=True)
    return plain


# Whittle


def from_whittle(net: _Net, space: SearchSpace, *, config: Config | None = None) -> _Net:
    """Make a network in the style of `whittle` searchable.

    If all choices are arguments of its `set_sub_network`, they are passed to that by name; else
    they go to its `select_sub_network(config)` as one dictionary. Numbered choices (`num_heads.0`,
    `num_heads.1`) arrive as lists. `reset_super_network()` is called before, so that nothing of the
    last subnet stays.

    Args:
        net: A network with `reset_super_network()` and at least one of the two.
        space: A space with the names that the network uses.
        config: Returns what the network gets for a subnet; by default `subnet.grouped()`.

    Returns:
        The same object, with `search_space()`, `activate(subnet)` and `active_subnet`.

    Raises:
        SearchError: The network does not have these methods.
        SpaceError: The network does not take the smallest or the largest subnet of the space.

    References:
        The package `whittle`, whose `GPT` has these methods.
    """
    _check_network(net, "from_whittle", ("reset_super_network",))
    _check_space(space, "from_whittle")
    by_name = getattr(net, "set_sub_network", None)
    selects = callable(getattr(net, "select_sub_network", None))
    try:
        arguments = dict((config or _grouped)(space.largest))
    except Exception as error:
        msg = (
            f"config= of from_whittle() fails for {space.largest!r:.200}: {type(error).__name__}: "
            f"{error!s:.100}. Let it return a dictionary of what the network takes."
        )
        raise SpaceError(msg) from error
    if not selects and not callable(by_name):
        msg = (
            f"from_whittle() got a {class_name(net)}, which has neither select_sub_network() "
            "nor set_sub_network(). Pass the super-network itself."
        )
        raise SearchError(msg)
    misfit = _misfit(by_name, arguments) if callable(by_name) else "there is no such method"
    if misfit and not selects:
        msg = f"The space does not fit {class_name(net)}: {misfit}."
        raise SpaceError(msg)

    def activate(net: Any, subnet: Subnet) -> None:
        values = dict((config or _grouped)(subnet))
        net.reset_super_network()
        if misfit:
            net.select_sub_network(values)
        else:
            net.set_sub_network(**values)

    _attach(net, space, activate).reset_super_network()  # type: ignore[operator] # checked above
    return net


def _grouped(subnet: Subnet) -> dict[str, Any]:
    return subnet.grouped()


def _misfit(function: Any, arguments: Mapping[str, Any]) -> str:
    """Return why a function does not take arguments of these names, or an empty string."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return ""
    for name in arguments:
        if name not in parameters:
            hint = did_you_mean(name, parameters)
            return f"{name!r} is not an argument of set_sub_network(){hint.rstrip('?')}"
    for name, p in parameters.items():
        if p.default is p.empty and name not in arguments and p.kind is not p.VAR_POSITIONAL:
            return f"set_sub_network() needs {name!r}, which is not a choice"
    return ""


# Hardware-aware transformers


def from_hat(
    net: _Net, space: SearchSpace | Mapping[str, Any], *, config: Config | None = None
) -> _Net:
    """Make a network in the style of HAT searchable: one with `set_sample_config(config)`.

    Args:
        net: The network.
        space: A space with the names of HAT's configurations, or what HAT's
            `get_all_choices(args)` returns: `{"encoder": {"encoder_embed_dim": [640, 512], ...},
            "decoder": {...}}`. Of that, `<part>_embed_dim` and `<part>_layer_num` hold for the
            whole part, and each other name is a choice of every layer, which exists only while the
            part is deep enough.
        config: Returns what the network gets for a subnet. By default names that begin with
            `encoder_` or `decoder_` (or another part in the mapping) go into a dictionary of that
            part, others beside them; numbered choices are lists.

    Returns:
        The same object, with `search_space()`, `activate(subnet)` and `active_subnet`.

    Raises:
        SearchError: The network has no `set_sample_config`.
        SpaceError: The network does not take the smallest or the largest subnet of the space.

    References:
        Wang et al., HAT: Hardware-Aware Transformers, ACL 2020, and its implementation
        (mit-han-lab/hardware-aware-transformers, `utils.get_all_choices`).
    """
    _check_network(net, "from_hat", ("set_sample_config",))
    parts: tuple[str, ...] = ("encoder", "decoder")
    if isinstance(space, Mapping):
        parts, space = tuple(space), SearchSpace(_hat_choices(space))
    _check_space(space, "from_hat")

    def nested(subnet: Subnet) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in subnet.grouped().items():
            part = next((part for part in parts if name.startswith(f"{part}_")), None)
            (values if part is None else values.setdefault(part, {}))[name] = value
        return values

    def activate(net: Any, subnet: Subnet) -> None:
        net.set_sample_config((config or nested)(subnet))

    return _attach(net, space, activate)


def _hat_choices(parts: Mapping[str, Any]) -> dict[str, Choice]:
    """Return the choices of HAT's lists: of each part, then of each of its layers."""
    choices: dict[str, Choice] = {}
    for part, lists in parts.items():
        if not isinstance(lists, Mapping) or f"{part}_layer_num" not in lists:
            msg = (
                f"{part!r} holds {lists!r:.60}, not the choices of a part by name with "
                f"'{part}_layer_num'. Pass get_all_choices(args), or a SearchSpace."
            )
            raise SpaceError(msg)
        depth, whole = f"{part}_layer_num", (f"{part}_layer_num", f"{part}_embed_dim")
        _check_lists(lists)
        depths = sorted(set(lists[depth]))
        choices |= {name: Choice(sorted(set(lists[name]))) for name in whole if name in lists}
        for name in (name for name in lists if name not in whole):
            for layer in range(max(depths)):
                deep = [d for d in depths if d > layer]
                when = {depth: deep} if len(deep) < len(depths) else {}
                choices[f"{name}.{layer}"] = Choice(sorted(set(lists[name])), when=when)
    return choices


def _check_lists(lists: Mapping[str, Any]) -> None:
    """Raise if the choices of a part are not lists of numbers, and depths whole ones."""
    for name, values in lists.items():
        whole = name.endswith("_layer_num")
        kind: Any = int if whole else int | float
        of_numbers = isinstance(values, Sequence) and all(isinstance(v, kind) for v in values)
        if not of_numbers or not values or (whole and min(values) < 0):
            expected = "whole numbers from 0" if whole else "numbers"
            msg = (
                f"from_hat() got {name!r}: {values!r:.80}, which is not a list of one or more "
                f"{expected}. Write {{{name!r}: [2, 4]}}, or pass a SearchSpace."
            )
            raise SpaceError(msg)


# What they share


def _check_network(net: object, adapter: str, methods: Sequence[str]) -> None:
    if not isinstance(net, nn.Module):
        msg = f"{adapter}() got a {class_name(net)}, which is not an nn.Module. Pass the network."
        raise SearchError(msg)
    missing = [name for name in methods if not callable(getattr(net, name, None))]
    if missing:
        msg = (
            f"{adapter}() got a {class_name(net)}, which has no {missing[0]}(). "
            "Pass the super-network itself, or use elastic(net, space=, activate=)."
        )
        raise SearchError(msg)


def _check_space(space: object, adapter: str) -> None:
    if not isinstance(space, SearchSpace):
        msg = f"{adapter}(space={space!r:.60}) is not a SearchSpace. Write SearchSpace({{...}})."
        raise SearchError(msg)


def _attach(net: _Net, space: SearchSpace, activate: Callable[[Any, Subnet], object]) -> _Net:
    """Attach the protocol once the network has taken the extremes of the space."""
    for subnet in (space.smallest, space.largest):
        try:
            activate(net, subnet)
        except Exception as error:
            msg = (
                f"The space does not fit {class_name(net)}: {subnet!r:.200} raises "
                f"{type(error).__name__}: {error!s:.100}. Name choices and values as it does."
            )
            raise SpaceError(msg) from error
    return elastic(net, space=space, activate=activate)
