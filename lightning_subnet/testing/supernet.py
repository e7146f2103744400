# SPDX-License-Identifier: Apache-2.0
"""The contract of a super-network: every choice is wired, and a subnet is what is extracted."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.macs import count_macs
from lightning_subnet._torch.outputs import named_outputs
from lightning_subnet.elasticity.checking import check_elastic
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.elasticity.protocol import Elastic, activated
from lightning_subnet.testing.problems import ends_and_more


def outputs_of(net: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return the tensors that a network in evaluation mode gives."""
    with torch.no_grad(), evaluating(net):
        return list(named_outputs(net(*inputs)).values())


class SupernetContract:
    """The tests that every super-network inherits.

    Attributes:
        n_subnets: How many random subnets are tried, beside both ends of the space.
        sliced: Whether an extracted subnet holds its own weights only.
        tolerance: The largest difference of outputs, absolute and relative.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> class TestMine(SupernetContract):
        ...     def build(self):
        ...         return ElasticMobileNetV3.tiny()
        ...     def inputs(self, n):
        ...         return (torch.randn(n, 1, 8, 8),)
    """

    n_subnets: ClassVar[int] = 5
    sliced: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def build(self) -> Any:
        """Return the network; its weights need not be trained, nor equal at every call."""
        raise NotImplementedError

    def inputs(self, n: int) -> tuple[Any, ...]:
        """Return n samples of noise, as positional arguments of `forward`."""
        raise NotImplementedError

    @pytest.fixture
    def supernet(self) -> Any:
        """The network, with no weight at its initial value, so that no zero or one hides."""
        torch.manual_seed(0)
        net = self.build()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return net.eval()

    def test_it_follows_the_protocol(self, supernet: Any) -> None:
        assert isinstance(supernet, Elastic)
        space = supernet.search_space()
        assert space == supernet.search_space()
        assert space == copy.deepcopy(supernet).search_space()
        for subnet in (space.smallest, space.largest):
            supernet.activate(subnet)
            assert getattr(supernet, "active_subnet", subnet) == subnet

    def test_every_value_of_every_choice_is_another_network(self, supernet: Any) -> None:
        check_elastic(supernet, self.inputs(2))

    def test_what_is_active_is_what_is_extracted(self, supernet: Any) -> None:
        space, inputs = supernet.search_space(), self.inputs(2)
        for subnet in ends_and_more(space, self.n_subnets, seed=1):
            plain = extract(supernet, subnet)
            with activated(supernet, subnet):
                active = outputs_of(supernet, inputs)
                macs = count_macs(supernet, inputs)
            extracted = outputs_of(plain, inputs)
            torch.testing.assert_close(
                extracted, active, atol=self.tolerance, rtol=self.tolerance, msg=str(subnet)
            )
            assert plain.sliced == self.sliced
            assert not plain.training
            assert count_macs(plain, inputs) <= macs

    def test_outputs_do_not_depend_on_what_was_active_before(self, supernet: Any) -> None:
        space, inputs = supernet.search_space(), self.inputs(2)
        subnets = ends_and_more(space, self.n_subnets, seed=2)

        def outputs(order: list[int]) -> dict[int, list[torch.Tensor]]:
            results = {}
            for i in order:
                supernet.activate(subnets[i])
                results[i] = outputs_of(supernet, inputs)
            return results

        order = list(range(len(subnets)))
        there, back = outputs(order), outputs(order[::-1])
        for i in order:
            assert all(map(torch.equal, there[i], back[i])), subnets[i]

    def test_activating_moves_no_weights(self, supernet: Any) -> None:
        before = copy.deepcopy(supernet.state_dict())
        for subnet in ends_and_more(supernet.search_space(), self.n_subnets):
            supernet.activate(subnet)
        after = supernet.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_an_extraction_shares_no_memory_and_leaves_what_is_active(self, supernet: Any) -> None:
        space, inputs = supernet.search_space(), self.inputs(2)
        active, other = space.smallest, space.largest
        supernet.activate(active)
        before = outputs_of(supernet, inputs)
        plain = extract(supernet, other)
        assert all(map(torch.equal, outputs_of(supernet, inputs), before))
        own = {t.data_ptr() for t in supernet.state_dict().values() if t.numel()}
        assert not own & {t.data_ptr() for t in plain.state_dict().values() if t.numel()}

    def test_gradients_reach_what_is_active(self, supernet: Any) -> None:
        space, inputs = supernet.search_space(), self.inputs(2)
        supernet.train()
        counts = []
        for subnet in (space.smallest, space.largest):
            supernet.activate(subnet)
            supernet.zero_grad(set_to_none=True)
            outputs = named_outputs(supernet(*inputs)).values()
            floating = [x for x in outputs if x.is_floating_point()]
            torch.stack([x.square().sum() for x in floating]).sum().backward()  # type: ignore[no-untyped-call]
            counts.append(
                sum(int((p.grad != 0).sum()) for p in supernet.parameters() if p.grad is not None)
            )
        assert 0 < counts[0] <= counts[1]
