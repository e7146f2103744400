# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from lightning_subnet import Choice, SearchSpace, Subnet, elastic
from lightning_subnet.elasticity.checking import check_elastic
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3, MobileNetV3Config
from tests.networks import ElasticMlp, LitMlp
from tests.problems import assert_clear, numpy_state

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def message(net: nn.Module, example: Any = X) -> str:
    with pytest.raises(ElasticityError) as caught:
        check_elastic(net, example)
    return str(caught.value)


class Mlp(ElasticMlp):
    """ElasticMlp with an activate and a space that a test gives."""

    def __init__(self, space: SearchSpace, act: Callable[[Any, Subnet], object]) -> None:
        super().__init__()
        self.space, self.act = space, act

    def search_space(self) -> SearchSpace:
        return self.space

    def activate(self, subnet: Subnet) -> None:
        self.act(self, subnet)


def both(net: Any, subnet: Subnet) -> None:
    net.width, net.sharpen = subnet["width"], subnet["sharpen"]


SPACE = SearchSpace(width=[4, 8, 16], sharpen=[1, 2, 3])


@pytest.mark.parametrize(
    ("net", "image"),
    [
        (ElasticMobileNetV3.tiny, (2, 1, 8, 8)),
        (ElasticMobileNetV3.small, (1, 3, 32, 32)),
    ],
)
def test_mobilenets_are_wired(net: Any, image: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check_elastic(net(), torch.randn(image))


@pytest.mark.slow
def test_the_full_mobilenet_is_wired() -> None:
    torch.manual_seed(0)
    check_elastic(ElasticMobileNetV3(MobileNetV3Config(image_size=64)), torch.randn(1, 3, 64, 64))


def test_it_passes_for_a_network_of_ones_own_alone_or_in_a_module() -> None:
    check_elastic(ElasticMlp(), X)
    check_elastic(LitMlp(), (X,))
    check_elastic(Mlp(SearchSpace(width=[4, 8], sharpen=[2]), both), X)  # one value: no choice


def test_the_dead_choice_is_named() -> None:
    def forgot(net: Any, subnet: Subnet) -> None:
        net.width = subnet["width"]

    text = message(Mlp(SPACE, forgot))
    assert_clear(text, "Choice 'sharpen' is dead", "Use it in activate() and forward()")
    assert "width" not in text
    text = message(Mlp(SPACE, lambda net, subnet: None))
    assert_clear(text, "'width' is dead", "'sharpen' is dead")
    many = SearchSpace({f"c.{i}": [1, 2] for i in range(9)})
    assert_clear(message(Mlp(many, lambda net, subnet: None)), "'c.0'", "'c.2'")


def test_a_dead_choice_under_a_condition_is_found() -> None:
    space = SearchSpace(
        {
            "width": [4, 8],
            "sharpen": Choice([1, 2], when={"width": [4]}),
            "dead": Choice([1, 2], when={"width": [4]}),
        }
    )
    text = message(Mlp(space, both))
    assert_clear(text, "'dead' is dead")
    assert "'sharpen'" not in text


def test_two_equal_values_are_named_unless_the_space_says_so() -> None:
    def clipped(net: Any, subnet: Subnet) -> None:
        net.width, net.sharpen = subnet["width"], max(2, subnet["sharpen"])

    text = message(Mlp(SPACE, clipped))
    assert_clear(text, "Values 1 and 2 of 'sharpen' are the same network", "same=[(1, 2)]")
    said = SearchSpace(width=[4, 8], sharpen=Choice([1, 2, 3], same=[(1, 2)]))
    check_elastic(Mlp(said, clipped), X)


def test_choices_that_only_change_the_cost_are_alive() -> None:
    class Wasteful(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.sharpen):
                self.first(x)
            return self.last.weight.sum() + x.sum() + self.width

    check_elastic(Wasteful(SPACE, both), X)


def test_a_subnet_that_cannot_be_put_in_force_or_run_is_named() -> None:
    def raising(net: Any, subnet: Subnet) -> None:
        if subnet["sharpen"] == 2:
            raise RuntimeError("no kernel for that")
        both(net, subnet)

    text = message(Mlp(SPACE, raising))
    assert_clear(text, "sharpen=2", "cannot be put in force", "RuntimeError: no kernel for that")
    text = message(Mlp(SearchSpace(width=[4, 64], sharpen=[1]), both), torch.zeros(4, 63))
    assert_clear(text, "width=64", "cannot be put in force or run")


def test_state_that_leaks_between_subnets_is_found() -> None:
    def leaking(net: Any, subnet: Subnet) -> None:
        net.width, net.sharpen = subnet["width"], subnet["sharpen"]
        if subnet["sharpen"] == 3 and subnet["width"] == 4:
            net.offset = 1.0

    class Leaking(Mlp):
        offset = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.offset

    assert_clear(
        message(Leaking(SPACE, leaking)),
        "gives other outputs after others were in force",
        "activate() must set everything",
    )


@pytest.mark.parametrize("outcome", ["passes", "fails"])
def test_what_was_in_force_flags_and_random_states_come_back(outcome: str) -> None:
    class Drawing(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            random.random()
            np.random.rand()  # noqa: NPY002 - as users' code may
            torch.rand(1)
            return super().forward(x)

    def act(net: Any, subnet: Subnet) -> None:
        net.width, net.sharpen = subnet["width"], subnet["sharpen"] if outcome == "passes" else 1

    net = Drawing(SPACE, act).train()
    net.drop.eval()
    subnet = SPACE.subnet(width=8, sharpen=2)
    net.activate(subnet)
    flags = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    if outcome == "passes":
        check_elastic(net, X)
    else:
        assert "'sharpen' is dead" in message(net)
    assert net.active_subnet == subnet
    assert net.width == 8
    assert [module.training for module in net.modules()] == flags
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_attached_networks_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(64, 2), 1

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            return {"first": self.layer(x), "second": (y * self.scale, 3)}

    space = SearchSpace(scale=[1, 2])
    net = elastic(Two(), space=space, activate=lambda n, s: setattr(n, "scale", s["scale"]))
    check_elastic(net, (X, X))
    assert_clear(message(net, (X, torch.zeros(1))), "Choice 'scale' is dead")


def test_something_without_an_elastic_part_is_refused() -> None:
    with pytest.raises(SearchError, match="no elastic part"):
        check_elastic(nn.Linear(2, 2), torch.zeros(1, 2))


# Faults, one at a time, in random super-networks that are right without them

FAULTS = {
    "dead": "Choice 'k' is dead",
    "dead when narrow": "Choice 'k' is dead around",
    "first and last the same": "of 'k' are the same network",
    "falsy": "of 'k' are the same network",
    "upside down": "The order of 'width' is upside down: with the last value, ",
    "raises in the middle": "cannot be put in force or run: RuntimeError: no such k",
    "leaks between small ones": "gives other outputs after others were in force",
    "random": "gives other outputs when it is run twice in a row",
    "writes to weights": "changes the tensor 'first.weight'",
    "counts its passes": "changes the tensor 'passes'",
    "extracts the largest": "is another network than the super-network",
    "extracts nothing": "extract() returned None",
    "extracts a number": "extract() returned 3",
    "extracts an identity": "is another network than the super-network",
    "extracts itself": "returned the super-network itself",
    "extraction raises": "cannot extract",
    "extraction leaves another in force": "changes the subnet in force",
}


class Toy(nn.Module):
    """6 -> width, with k more features and a depth of 1 to 3 -> 3, with a fault or none."""

    def __init__(self, space: SearchSpace, fault: str = "", *, extracts: bool = True) -> None:
        super().__init__()
        self.space, self.fault = space, fault
        self.most = max(space.choices["width"].values)
        self.first = nn.Linear(6, self.most)
        self.inner = nn.ModuleList(nn.Linear(self.most, self.most) for _ in range(3))
        self.extra = nn.Linear(6, 8)
        self.last = nn.Linear(self.most + 8, 3)
        self.register_buffer("passes", torch.zeros(()))
        self.k = self.depth = self.width = 1
        self.offset = 0.0
        if not extracts:
            self.extract = None

    def search_space(self) -> SearchSpace:
        return self.space

    def activate(self, subnet: Subnet) -> None:
        ks = self.space.choices["k"].values
        self.width, self.depth, k = subnet["width"], subnet.get("depth", 1), subnet["k"]
        narrow = self.width < self.most
        if self.fault == "dead" or (self.fault == "dead when narrow" and narrow):
            k = ks[-1]
        if self.fault == "first and last the same" and k == ks[0]:
            k = ks[-1]
        if self.fault == "raises in the middle" and k == ks[1]:
            raise RuntimeError("no such k")
        if self.fault == "leaks between small ones":
            if not narrow:
                self.offset = 0.0
            elif k == ks[0]:
                self.offset = 1.0
        if self.fault == "writes to weights" and narrow:
            self.first.weight.data[self.width :] = 0
        self.k = (k or self.k) if self.fault == "falsy" else k

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        w, k = self.width, self.k
        h = F.linear(x, self.first.weight[:w], self.first.bias[:w]).tanh()
        for layer in self.inner[: self.depth]:
            h = F.linear(h, layer.weight[:w, :w], layer.bias[:w]).tanh()
        y = F.linear(h, self.last.weight[:, :w], self.last.bias) + self.offset
        if k:
            extra = F.linear(x, self.extra.weight[:k], self.extra.bias[:k]).tanh()
            y = y + F.linear(extra, self.last.weight[:, self.most : self.most + k])
        if self.fault == "random":
            y = F.dropout(y, 0.5, training=True)
        if self.fault == "counts its passes":
            self.passes += 1
        return {"logits": y, "hidden": [h], "k": k}

    def extract(self, subnet: Subnet) -> Any:
        if self.fault == "extraction raises":
            raise KeyError("d")
        if self.fault == "extraction leaves another in force":
            self.activate(subnet)
        if self.fault == "extracts itself":
            return self
        bad = {"nothing": None, "a number": 3, "an identity": nn.Identity()}
        if (what := self.fault.removeprefix("extracts ")) in bad:
            return bad[what]
        plain = copy.deepcopy(self)
        plain.activate(self.space.largest if what == "the largest" else subnet)
        return plain


@st.composite
def toy_spaces(draw: st.DrawFn, fault: str = "") -> SearchSpace:
    """Draw a space that the fault can show in."""
    widths = sorted(draw(st.lists(st.integers(2, 9), min_size=2, max_size=4, unique=True)))
    least = 3 if fault in ("raises in the middle", "falsy") else 2
    ks = sorted(draw(st.lists(st.integers(1, 8), min_size=least, max_size=5, unique=True)))
    if fault == "falsy" or draw(st.booleans()):
        ks[0] = 0
    if fault == "first and last the same":
        ks = sorted({*ks, 0, 4, 8})
    if fault == "upside down":
        widths.reverse()
    choices: dict[str, Any] = {"width": Choice(widths, ordered=True), "k": ks}
    if draw(st.booleans()):
        narrow = Choice([1, 2, 3], when={"width": widths[:-1]})
        choices["depth"] = narrow if draw(st.booleans()) else [1, 2, 3]
    return SearchSpace(choices)


def toy_input() -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(space=toy_spaces(), extracts=st.booleans(), seed=st.integers(0, 99))
def test_random_networks_that_are_wired_pass(space: Any, extracts: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = Toy(space, extracts=extracts)
    state = copy.deepcopy(net.state_dict())
    check_elastic(net, toy_input(), seed=seed)
    check_elastic(net, (toy_input(),))
    check_elastic(net, {"x": toy_input()})
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


@few
@pytest.mark.parametrize("fault", FAULTS)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_one_fault_fails(fault: str, data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = Toy(data.draw(toy_spaces(fault)), fault)
    state = copy.deepcopy(net.state_dict())
    assert FAULTS[fault] in message(net, toy_input())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


# Inputs, outputs and spaces of other kinds


class Fields(NamedTuple):
    logits: torch.Tensor
    more: dict[str, Any]


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda y: Fields(y.sum(), {"y": y}),
        lambda y: Output(y, (y,)),
        lambda y: [None, "text", (y.argmax(), y.tolist())],
        lambda y: y.detach().numpy(),
        lambda y: float(y.sum()),
    ],
)
def test_outputs_of_any_structure(wrapped: Callable[[Any], Any]) -> None:
    class Structured(Mlp):
        offset = 0.0

        def forward(self, x: torch.Tensor) -> Any:
            return wrapped(super().forward(x) + self.offset)

    def leaking(net: Any, subnet: Subnet) -> None:
        both(net, subnet)
        net.offset += 1.0

    check_elastic(Structured(SPACE, both), X)
    assert "gives other outputs after others" in message(Structured(SPACE, leaking))
    assert "'width' is dead" in message(Structured(SPACE, lambda net, subnet: None))


def test_inputs_that_forward_works_on_in_place_or_by_name() -> None:
    class Inplace(Mlp):
        def forward(self, x: torch.Tensor, *, bias: torch.Tensor | None = None) -> torch.Tensor:
            x.add_(1.0)
            return super().forward(x if bias is None else x.add_(bias))

    before = X.clone()
    check_elastic(Inplace(SPACE, both), X)
    check_elastic(Inplace(SPACE, both), {"x": X, "bias": X})
    check_elastic(Inplace(SPACE, both).double(), MappingProxyType({"x": X}))
    assert torch.equal(X, before)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"kind": ["large", "small"]}, "with the last value, 'small', the network costs"),
        ({"kind": [True, False]}, "Choice([False, True], ordered=True)"),
        ({"kind": [1, 2]}, "The order of 'kind' is upside down"),  # as a stride does
        ({"kind": Choice([3, 2, 1], ordered=True)}, ""),
        ({"kind": Choice(["large", "small"], ordered=False)}, ""),
        ({"kind": [-1, 2]}, "'kind'"),
        ({"kind": [1.0, 1.1]}, ""),  # ascending, and a little cheaper
        ({"kind": Choice([1.1, 1.2, 1.0], ordered=True)}, ""),
        ({"kind": Choice([1.0, 1.2, 1.1], ordered=True)}, "The order of 'kind' is upside down"),
    ],
    ids=str,
)
def test_the_order_of_values_against_cost(choices: Any, text: str) -> None:
    costly = ["'large'", "True", "1", "-1", "1.0"]
    work = {"'small'": 8, "False": 8, "2": 8, "3": 4, "1.1": 23, "1.2": 22} | dict.fromkeys(
        costly, 24
    )

    class Working(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = work[repr(self.kind)]
            return super().forward(x) + (x[:, :n] @ torch.ones(n, 400)).mean(1, keepdim=True) / n

    def act(net: Any, subnet: Subnet) -> None:
        net.width, net.kind = subnet["width"], subnet["kind"]

    net = Working(SearchSpace(width=[4, 32], **choices), act)
    if not text:
        check_elastic(net, X)
    else:
        assert_clear(message(net), text, "upside down", "or ordered=False")
        assert "'width'" not in message(net)


def test_a_list_that_is_upside_down_is_named_together_and_one_that_does_not_ascend_alone() -> None:
    class Layers(nn.Module):
        def __init__(self, space: SearchSpace, *, widths: bool = False) -> None:
            super().__init__()
            self.space, self.layers = space, nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.widths = widths

        def search_space(self) -> SearchSpace:
            return self.space

        def activate(self, subnet: Subnet) -> None:
            self.steps = subnet.grouped()["s"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for step, layer in zip(self.steps, self.layers, strict=True):
                n = 2 * step if self.widths else 8 // step
                y = F.linear(x[:, :n], layer.weight[:n, :n])
                x = torch.cat([x[:, n:], y], 1).tanh()
            return x

    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    names = [f"s.{i}" for i in range(4)]
    strides = SearchSpace({name: [1, 2, 4] for name in names})
    assert_clear(message(Layers(strides), x), "The order of 's.0', 's.1', 's.2', ... (4 in all)")
    meant = SearchSpace({name: Choice([4, 2, 1], ordered=True) for name in names})
    check_elastic(Layers(meant), x)
    text = message(Layers(meant, widths=True), x)
    assert_clear(text, "The order of 's.0', 's.1', 's.2', ... (4 in all) is upside down: with the")
    one = SearchSpace({**strides.choices, "s.2": Choice([4, 2, 1], ordered=True)})
    text = message(Layers(one, widths=True), x)
    assert_clear(text, "The order of 's.2' is upside down: with the last value, 1,")
    assert "'s.1'" not in text


def test_pools_and_parts_put_only_their_own_subnets_in_force() -> None:
    seen: set[Subnet] = set()

    def watching(net: Any, subnet: Subnet) -> None:
        seen.add(subnet)
        both(net, subnet)

    whole = SearchSpace(width=[4, 8, 16, 32], sharpen=[1, 2, 3])
    pool = whole.restricted_to([s for s in whole if s["width"] != 8 and s["sharpen"] != 2])
    part = whole.narrowed_to({"width": [8, 16], "sharpen": [1, 3]})
    for space in (pool, part):
        check_elastic(Mlp(space, watching), X)
        assert seen <= set(space)
        seen.clear()

        def deaf(net: Any, subnet: Subnet) -> None:
            net.width = subnet["width"]

        assert "Choice 'sharpen' is dead" in message(Mlp(space, deaf))
    lonely = whole.restricted_to(
        [whole.subnet(width=4, sharpen=1), whole.subnet(width=8, sharpen=2)]
    )
    check_elastic(Mlp(lonely, both), X)  # nothing differs in one choice alone


def test_buffers_of_the_subnet_may_change_where_no_checkpoint_holds_them() -> None:
    class Masked(Mlp):
        def __init__(self, *args: Any, persistent: bool, counts: bool = False) -> None:
            super().__init__(*args)
            self.counts = counts
            self.register_buffer("mask", torch.ones(32), persistent=persistent)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def activate(self, subnet: Subnet) -> None:
            both(self, subnet)
            self.mask.copy_(torch.arange(32) < self.width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += self.counts
            return self.last(self.first(x) * self.mask) * self.sharpen

    check_elastic(Masked(SPACE, both, persistent=False), X)
    text = message(Masked(SPACE, both, persistent=True))
    assert_clear(text, "changes the tensor 'mask'", "keep what depends on the subnet in attributes")
    assert "'seen'" in message(Masked(SPACE, both, persistent=False, counts=True))


def test_what_is_random_in_some_subnets_only_is_not_taken_for_a_leak() -> None:
    class Sometimes(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5, training=self.sharpen == 2)

    assert_clear(message(Sometimes(SPACE, both)), "sharpen=2", "run twice in a row, in eval mode")


def test_a_module_that_calls_methods_of_its_part_is_checked_but_for_extraction() -> None:
    class Calling(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.net = Mlp(SPACE, act)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net.forward(x)

    check_elastic(Calling(both), X)
    assert "'width' is dead" in message(Calling(lambda net, subnet: None))


@pytest.mark.parametrize(
    ("example", "options", "text"),
    [
        (torch.zeros(2, 3, 5), {}, "this is the first: pass an example_input that forward() takes"),
        (torch.zeros(0, 1, 8, 8), {}, "The outputs are empty"),
        (torch.zeros(2, 1, 8, 8), {"seed": "a"}, "seed='a' must be a whole number from 0"),
    ],
)
def test_bad_input(example: Any, options: Any, text: str) -> None:
    with pytest.raises(ElasticityError) as caught:
        check_elastic(ElasticMobileNetV3.tiny(), example, **options)
    assert text in str(caught.value)
