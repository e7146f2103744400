# SPDX-License-Identifier: Apache-2.0
"""The contract of super-networks of convolutions: name the classes, and what is not active."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet import Subnet, check_elastic
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import Elastic
from lightning_subnet.testing import SupernetContract

PIXELS = 64  # of the full size


def shaken(net: Any) -> Any:
    """Return a network with no weight at its initial value, so that no zero or one hides."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                tensor.normal_(0, 0.1)
            elif "num_batches" not in name:
                tensor.add_(0.02 * torch.randn_like(tensor))
    return net.eval()


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Check that no test writes to a shared network."""
    state = copy.deepcopy(net.state_dict())
    yield
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def megabytes(net: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values()) / 1e6


def images(net: Any, n: int) -> torch.Tensor:
    return torch.randn(n, net.config.in_channels, net.config.image_size, net.config.image_size)


@functools.lru_cache(maxsize=4)
def _shared(contract: type[ConvolutionalContract], size: str) -> Any:
    return shaken(contract().build(size))


class ConvolutionalContract(SupernetContract):
    """The tests that every super-network of convolutions inherits, beside those that ship.

    Attributes:
        cls: Its class, with the constructors `tiny` and `small`.
        plain: The class of its extractions.
        config: The class of its sizes.
        inactive: Returns, of each parameter by name, where it is not in force in a subnet.
        parts: Ends of names of parameters whose gradients must have been seen.
        draws: Random subnets of each size, in the slow tests; otherwise a tenth.
    """

    cls: ClassVar[type]
    plain: ClassVar[type]
    config: ClassVar[Callable[..., Any]]
    inactive: ClassVar[Callable[[Any, Subnet], Mapping[str, torch.Tensor]]]
    parts: ClassVar[frozenset[str]]
    draws: ClassVar[dict[str, int]] = {"tiny": 50, "small": 50, "full": 50}

    def inputs(self, n: int) -> tuple[Any, ...]:
        return (images(self.build(), n),)

    def build(self, size: str = "tiny", **changes: Any) -> Any:
        torch.manual_seed(0)
        if size == "full":
            return self.cls(self.config(image_size=PIXELS, **changes))
        return getattr(self.cls, size)(**changes)

    @pytest.fixture(params=["tiny", "small", "full"])
    def size(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture
    def net(self, size: str) -> Iterator[Any]:
        net = _shared(type(self), size)
        tensors = net.state_dict(keep_vars=True)
        versions = {name: tensor._version for name, tensor in tensors.items()}
        yield net
        for name, tensor in net.state_dict(keep_vars=True).items():  # no test writes to it
            assert tensor is tensors[name], name
            assert tensor._version == versions[name], name

    def test_it_follows_the_protocol(self, net: Any) -> None:
        assert isinstance(net, Elastic)
        assert net.search_space() == net.search_space()
        assert copy.deepcopy(net).search_space() == net.search_space()

    @pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
    def test_random_subnets_extracted_give_the_same_outputs_and_cost_what_the_tables_say(
        self, net: Any, size: str, share: float
    ) -> None:
        torch.manual_seed(1)
        x, space = images(net, 1), net.search_space()
        subnets = [
            space.smallest,
            space.largest,
            *space.sample(math.ceil(share * self.draws[size]), 1),
        ]
        X = space.indices(subnets)
        table = {m.name: m.evaluate(space, X)[0] for m in net.exact_measures()}
        outputs = []
        for i, subnet in enumerate(subnets):
            plain = extract(net, subnet)
            net.activate(subnet)
            with torch.no_grad():
                active = net(x)
                with FlopCounterMode(display=False) as counter:
                    extracted = plain(x)
            assert active.shape == (1, net.config.n_classes)
            torch.testing.assert_close(extracted, active, atol=1e-6, rtol=1e-6)
            assert table["macs"][i] * 2 == counter.get_total_flops(), subnet
            assert table["params"][i] == sum(p.numel() for p in plain.parameters()), subnet
            assert math.isclose(table["size_mb"][i], megabytes(plain), rel_tol=1e-12), subnet
            assert type(plain) is self.plain
            assert plain.sliced
            assert not plain.training
            assert not any("Elastic" in type(module).__name__ for module in plain.modules())
            assert not hasattr(plain, "activate")
            outputs.append(active)
        assert len(torch.cat(outputs).unique(dim=0)) == len(subnets)  # it says something

    def test_an_extraction_shares_no_memory(self, net: Any) -> None:
        shared = {t.data_ptr() for t in net.state_dict().values()}
        plain = extract(net, net.search_space().largest)
        assert not shared & {t.data_ptr() for t in plain.state_dict().values()}

    def test_extraction_leaves_what_was_in_force(self, net: Any) -> None:
        x = images(net, 1)
        one, other = net.search_space().sample(2, 3)
        net.activate(one)
        with torch.no_grad():
            before = net(x)
            extract(net, other)
            assert net.active_subnet == one
            assert torch.equal(net(x), before)

    def test_gradients_of_inactive_weights_are_exactly_zero(self, net: Any, size: str) -> None:
        net = copy.deepcopy(net).train()
        x, space = images(net, 3), net.search_space()
        kinds: set[str] = set()
        for subnet in [space.smallest, *space.sample(2 if size == "full" else 8, 4)]:
            net.activate(subnet)
            net.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
            gradients = {name: p.grad for name, p in net.named_parameters()}
            masks = type(self).inactive(net, subnet)
            for name, inactive in masks.items():
                gradient = gradients[name]
                if gradient is None:
                    assert inactive.all(), name
                    continue
                kinds.add(name)
                assert gradient[inactive].abs().sum() == 0, name
                assert inactive.all() or gradient[~inactive].abs().sum() > 0, name
        assert [p for p in self.parts if not any(kind.endswith(p) for kind in kinds)] == []

    def test_what_activate_gives_is_views_of_the_weights(self) -> None:
        net = self.build("tiny")
        net.activate(net.search_space().smallest)
        state = net.state_dict(keep_vars=True)
        before = {name: (p.data_ptr(), p.shape) for name, p in state.items()}
        for subnet in net.search_space().sample(20, 0):
            net.activate(subnet)
        state = net.state_dict(keep_vars=True)
        assert before == {name: (p.data_ptr(), p.shape) for name, p in state.items()}

    def test_every_choice_is_wired(self) -> None:
        net = shaken(self.build("tiny"))
        check_elastic(net, images(net, 2))

    def test_exact_measures_know_what_they_are_and_agree_in_bulk_and_one_by_one(self) -> None:
        with torch.device("meta"):
            net = self.cls()
        space, measures = net.search_space(), net.exact_measures()
        assert [(m.name, m.unit, m.exact, m.vectorised) for m in measures] == [
            ("macs", "MAC", True, True),
            ("params", "", True, True),
            ("size_mb", "MB", True, True),
        ]
        X = space.sample_indices(20_000, np.random.default_rng(0))
        began = time.perf_counter()
        values = [m.evaluate(space, X)[0] for m in measures]
        assert time.perf_counter() - began < 20  # 20,000 extractions would take half an hour
        assert all(v.shape == (20_000,) and np.isfinite(v).all() for v in values)
        for m, v in zip(measures, values, strict=True):
            rows = [m.evaluate(space, X[i : i + 1])[0][0] for i in range(50)]
            assert rows == v[:50].tolist()

    @pytest.mark.parametrize("kind", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("which", ["smallest", "largest", "random"])
    def test_subnets_learn(self, kind: str, which: str) -> None:
        net = self.build(kind, n_classes=4, dropout=0.0)
        space = net.search_space()
        net.activate(space.sample(1, 9)[0] if which == "random" else getattr(space, which))
        x, y = images(net, 8), torch.arange(8) % 4
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        losses = []
        for _ in range(6):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_training_repeats_under_a_seed(self) -> None:
        def trained() -> dict[str, torch.Tensor]:
            net = self.build("tiny", n_classes=4)
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            for subnet in net.search_space().sample(5, 0):
                net.activate(subnet)
                optimizer.zero_grad()
                F.cross_entropy(net(images(net, 8)), torch.arange(8) % 4).backward()
                optimizer.step()
            return net.state_dict()

        one, other = trained(), trained()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
        fresh = self.build("tiny", n_classes=4).state_dict()
        assert not all(torch.equal(tensor, fresh[name]) for name, tensor in one.items())

    def test_a_network_on_another_type_extracts_in_that_type(self) -> None:
        net = shaken(self.build("tiny")).double()
        subnet = net.search_space().sample(1, 0)[0]
        net.activate(subnet)
        x = images(net, 2).double()
        plain = extract(net, subnet)
        assert {p.dtype for p in plain.parameters()} == {torch.float64}
        torch.testing.assert_close(plain(x), net(x), atol=1e-12, rtol=1e-12)
        assert isinstance(plain.stages[0], nn.Sequential)
