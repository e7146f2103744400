# SPDX-License-Identifier: Apache-2.0
"""The contract of a measure of networks: a number for each subnet, and nothing else changes."""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet._types import Indices
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.testing.problems import ends_and_more, numpy_state


class MeasureContract:
    """The tests that every measure of networks inherits.

    Attributes:
        n_subnets: How many random subnets are measured, beside both ends of the space.
        grows: Whether the largest subnet has a greater value than the smallest.

    Example:
        >>> from lightning_subnet.costs import PeakMemory
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> class TestPeakMemory(MeasureContract):
        ...     def make(self):
        ...         return PeakMemory()
        ...     def network(self):
        ...         return ElasticMobileNetV3.tiny()
        ...     def example_input(self):
        ...         return torch.randn(1, 1, 8, 8)
    """

    n_subnets: ClassVar[int] = 3
    grows: ClassVar[bool] = True

    def make(self) -> NetworkMeasure:
        """Return the measure, not bound to a network yet."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """Return a super-network, with the same weights at every call."""
        raise NotImplementedError

    def example_input(self) -> Any:
        """Return one sample, as the network takes it."""
        raise NotImplementedError

    @pytest.fixture
    def net(self) -> nn.Module:
        """The super-network of a test."""
        return self.network()

    @pytest.fixture
    def bound(self, net: nn.Module) -> Measure:
        """The measure of that network."""
        return self.make().bind(elastic_part(net), self.example_input())

    def _rows(self, space: SearchSpace) -> Indices:
        return space.indices(ends_and_more(space, self.n_subnets))

    def test_it_has_a_name_and_binds_to_a_measure_of_that_name(self, bound: Measure) -> None:
        measure = self.make()
        assert isinstance(measure, NetworkMeasure)
        assert not isinstance(measure, type)
        assert isinstance(bound, Measure)
        assert bound.name == measure.name

    def test_each_subnet_has_a_finite_number(self, net: nn.Module, bound: Measure) -> None:
        space = elastic_part(net).search_space()
        X = self._rows(space)
        values, errors = bound.evaluate(space, X)
        assert values.shape == errors.shape == (len(X),)
        assert np.isfinite(values).all()
        assert (errors >= 0).all()
        if self.grows:
            assert values[1] > values[0]
        if bound.exact:
            assert (errors == 0).all()
            assert np.array_equal(values, bound.evaluate(space, X)[0])
            alone = [bound.evaluate(space, X[i : i + 1])[0][0] for i in range(len(X))]
            assert values.tolist() == alone

    def test_the_network_and_all_random_states_stay_as_they_are(
        self, net: nn.Module, bound: Measure
    ) -> None:
        part = elastic_part(net)
        space = part.search_space()
        subnet = space.sample(1, 3)[0]
        part.activate(subnet)
        net.train()
        before = copy.deepcopy(net.state_dict())
        modes = [module.training for module in net.modules()]
        frozen = [p.requires_grad for p in net.parameters()]
        states = random.getstate(), torch.get_rng_state(), numpy_state()
        bound.evaluate(space, self._rows(space))
        assert getattr(part, "active_subnet", subnet) == subnet
        assert [module.training for module in net.modules()] == modes
        assert [p.requires_grad for p in net.parameters()] == frozen
        assert all(p.grad is None for p in net.parameters())
        after = net.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert numpy_state() == states[2]

    def test_its_fingerprint_is_that_of_its_settings_and_the_network(self, bound: Measure) -> None:
        again = self.make().bind(elastic_part(self.network()), self.example_input())
        assert again.fingerprint == bound.fingerprint
        assert again.exact == bound.exact
        assert again.unit == bound.unit
