# SPDX-License-Identifier: Apache-2.0
"""What every super-network of attention layers is held to; each test file inherits it."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subnet import Subnet, check_elastic, extract
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.elasticity.attention import MultiheadAttention
from lightning_subnet.errors import InvalidSubnetError
from lightning_subnet.testing import SupernetContract

N_SUBNETS = [5, pytest.param(50, marks=pytest.mark.slow)]


def shaken(net: nn.Module) -> nn.Module:
    """The network with no weight at its initial value, so that no zero or one hides anything."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def of_torch(layer: MultiheadAttention, query: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What `torch.nn.MultiheadAttention` makes of the projections of a layer.

    It has no channels other than those of the embedding and no groups, so it gets queries, keys and
    values that are projected already, those of a group once for each of its heads.
    """
    *memory, options = rest
    source = memory[0] if memory and memory[0] is not None else query
    q, k, v = layer.q(query), layer.k(source), layer.v(source)
    width = q.shape[-1]
    theirs = nn.MultiheadAttention(width, layer.n_heads, bias=False, batch_first=True).eval()
    theirs.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
    theirs.out_proj.weight.copy_(torch.eye(width))
    heads = (layer.n_kv_heads, width // layer.n_heads)
    k, v = (
        x.unflatten(-1, heads).repeat_interleave(layer.n_heads // heads[0], -2).flatten(-2)
        for x in (k, v)
    )
    t = query.shape[1]
    future = torch.ones(t, t, dtype=torch.bool).triu(1) if options.get("causal") else None
    mask = options.get("key_padding_mask")
    y, _ = theirs(q, k, v, key_padding_mask=mask, attn_mask=future, need_weights=False)
    return layer.out(y)


class AttentionContract(SupernetContract):
    """The tests of super-networks of attention layers, beside those that ship."""

    SIZES: ClassVar[dict[str, Any]]  # by name, a function that builds the network
    PLAIN: type[nn.Module]
    OTHER: ClassVar[
        dict[Any, str]
    ]  # changes of a size that give choices which the network does not have

    def inputs_of(self, net: Any, n: int) -> tuple[torch.Tensor, ...]:
        """Inputs of `forward`, of the lengths that `macs` is for."""
        raise NotImplementedError

    def build(self) -> Any:
        return next(iter(self.SIZES.values()))()

    def inputs(self, n: int) -> tuple[torch.Tensor, ...]:
        return self.inputs_of(self.build(), n)

    def loss(self, net: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Something to learn."""
        raise NotImplementedError

    @pytest.fixture
    def nets(self) -> dict[str, Any]:
        torch.manual_seed(0)
        return {name: shaken(build()) for name, build in self.SIZES.items()}

    @pytest.mark.parametrize("n_subnets", N_SUBNETS)
    def test_random_subnets_extracted_are_the_same_and_cost_what_the_tables_say(
        self, nets: dict[str, Any], n_subnets: int
    ) -> None:
        for net in nets.values():
            space, inputs = net.search_space(), self.inputs_of(net, 3)
            single = tuple(x[:1] for x in inputs)
            subnets = [space.smallest, space.largest, *space.sample(n_subnets, 1)]
            X = space.indices(subnets)
            table = {m.name: m.evaluate(space, X)[0] for m in net.exact_measures()}
            outputs = []
            for i, subnet in enumerate(subnets):
                plain = extract(net, subnet)
                net.activate(subnet)
                with torch.no_grad():
                    active, extracted = net(*inputs), plain(*inputs)
                torch.testing.assert_close(extracted, active, atol=1e-5, rtol=1e-5)
                if i < 12:  # tracing takes its time
                    assert table["macs"][i] == count_macs(plain, single), subnet
                params = sum(p.numel() for p in plain.parameters())
                assert table["params"][i] == params, subnet
                size = sum(t.numel() * t.element_size() for t in plain.state_dict().values()) / 1e6
                shared = {id(t) for t in plain.parameters()}
                assert len(shared) == len(list(plain.state_dict())), "nothing counts twice"
                assert math.isclose(table["size_mb"][i], size, rel_tol=1e-12), subnet
                outputs.append(active.flatten())
            assert len(torch.stack(outputs).unique(dim=0)) == len(subnets)  # it says something

    def test_attention_at_full_size_is_that_of_torch(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            net.activate(net.search_space().largest)
            calls: list[tuple[Any, Any, Any]] = []
            layers = [m for m in net.modules() if isinstance(m, MultiheadAttention)]
            for layer in layers:
                layer.register_forward_hook(
                    lambda m, x, named, y, calls=calls: calls.append((m, (*x, named), y)),
                    with_kwargs=True,
                )
            with torch.no_grad():
                net(*self.inputs_of(net, 3))
                assert {id(layer) for layer, _, _ in calls} == set(map(id, layers))
                for layer, given, got in calls:
                    expected = of_torch(layer, *given)
                    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def test_an_extraction_has_no_trace_of_elasticity(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            state = copy.deepcopy(net.state_dict())
            for subnet in net.search_space().sample(4, 2):
                plain = extract(net, subnet)
                assert type(plain) is self.PLAIN
                assert plain.sliced
                assert not plain.training
                assert not any("Elastic" in type(m).__name__ for m in plain.modules())
                assert not hasattr(plain, "activate")
                fresh = self.PLAIN(net.config, plain.shape).eval()
                fresh.load_state_dict(plain.state_dict())  # strict: names and shapes
                inputs = self.inputs_of(net, 2)
                with torch.no_grad():
                    assert torch.equal(fresh(*inputs), plain(*inputs))
                tensors = [*net.state_dict().values(), *net.buffers()]
                own = {t.data_ptr() for t in [*plain.state_dict().values(), *plain.buffers()]}
                assert not own & {t.data_ptr() for t in tensors}
                with torch.no_grad():
                    for parameter in plain.parameters():
                        parameter.zero_()
            assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
            net.activate(net.search_space().smallest)
            before = torch.get_rng_state()
            extract(net, net.search_space().largest)
            assert torch.equal(torch.get_rng_state(), before)
            assert net.active_subnet == net.search_space().smallest

    def test_gradients_of_inactive_weights_are_exactly_zero(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            space = net.search_space()
            for subnet in [space.smallest, *space.sample(6, 4)]:
                shapes = {k: v.shape for k, v in extract(net, subnet).named_parameters()}
                net.activate(subnet)
                net.zero_grad(set_to_none=True)
                net(*self.inputs_of(net, 4)).square().sum().backward()
                for name, parameter in net.named_parameters():
                    if name not in shapes:
                        assert parameter.grad is None or not parameter.grad.any(), name
                        continue
                    inside = tuple(map(slice, shapes[name]))
                    # A bias of keys moves all scores of a query alike, which softmax ignores.
                    assert parameter.grad[inside].any() or name.endswith("k.bias"), name
                    rest = torch.ones_like(parameter, dtype=torch.bool)
                    rest[inside] = False
                    assert not parameter.grad[rest].any(), name

    def test_what_activate_gives_is_views_of_the_weights(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            before = {k: (p.data_ptr(), p.shape) for k, p in net.named_parameters()}
            for subnet in net.search_space().sample(10, 0):
                net.activate(subnet)
            assert before == {k: (p.data_ptr(), p.shape) for k, p in net.named_parameters()}

    def test_before_anything_is_put_in_force_it_is_the_largest(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            inputs = self.inputs_of(net, 2)
            with torch.no_grad():
                before = net(*inputs)
                net.activate(net.search_space().largest)
                assert torch.equal(net(*inputs), before)

    @pytest.mark.parametrize("which", ["smallest", "largest", "random"])
    def test_subnets_learn(self, which: str) -> None:
        for build in self.SIZES.values():
            torch.manual_seed(0)
            net = build().train()
            space = net.search_space()
            net.activate(space.sample(1, 9)[0] if which == "random" else getattr(space, which))
            inputs = self.inputs_of(net, 8)
            optimizer = torch.optim.Adam(net.parameters(), 1e-2)
            losses = []
            for _ in range(20):
                loss = self.loss(net, inputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < 0.8 * losses[0]

    def test_a_seed_fixes_weights_and_training(self) -> None:
        for build in self.SIZES.values():
            states = []
            for _ in range(2):
                torch.manual_seed(3)
                net = build().train()
                optimizer = torch.optim.SGD(net.parameters(), 0.05)
                rng = np.random.default_rng(0)
                inputs = self.inputs_of(net, 4)
                for _ in range(3):
                    net.activate(net.search_space().sample(1, rng)[0])
                    loss = self.loss(net, inputs)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                states.append(copy.deepcopy(net.state_dict()))
            assert all(torch.equal(states[1][k], v) for k, v in states[0].items())

    def test_every_value_of_every_choice_is_another_network(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            check_elastic(net, self.inputs_of(net, 2))

    def test_a_network_of_another_type_extracts_in_that_type(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            single = net.exact_measures()[2]
            net.double()
            space = net.search_space()
            X = space.indices([space.largest])
            assert net.exact_measures()[2].evaluate(space, X)[0] == 2 * single.evaluate(space, X)[0]
            subnet = space.sample(1, 0)[0]
            plain = extract(net, subnet)
            net.activate(subnet)
            assert {p.dtype for p in plain.parameters()} == {torch.float64}
            inputs = tuple(
                x.double() if x.is_floating_point() else x for x in self.inputs_of(net, 2)
            )
            with torch.no_grad():
                torch.testing.assert_close(plain(*inputs), net(*inputs), atol=1e-12, rtol=1e-12)

    def test_frozen_weights_stay_frozen(self, nets: dict[str, Any]) -> None:
        net = next(iter(nets.values()))
        frozen, _ = next(iter(net.named_parameters()))
        net.get_parameter(frozen).requires_grad_(False)
        plain = extract(net, net.search_space().smallest)
        assert [k for k, p in plain.named_parameters() if not p.requires_grad] == [frozen]

    def test_measures_of_thousands_agree_with_those_of_one(self, nets: dict[str, Any]) -> None:
        for net in nets.values():
            space, measures = net.search_space(), net.exact_measures()
            assert [(m.name, m.unit, m.exact, m.vectorised) for m in measures] == [
                ("macs", "MAC", True, True),
                ("params", "", True, True),
                ("size_mb", "MB", True, True),
            ]
            X = space.sample_indices(min(5000, space.size), np.random.default_rng(0))
            for m in measures:
                values = m.evaluate(space, X)[0]
                assert values.shape == (len(X),)
                rows = [m.evaluate(space, X[i : i + 1])[0][0] for i in range(20)]
                assert rows == values[:20].tolist()

    def test_a_subnet_of_another_space_is_refused_and_changes_nothing(self) -> None:
        build = next(iter(self.SIZES.values()))
        net = build()
        subnet = net.search_space().smallest
        net.activate(subnet)
        shape = net.shape
        for changes, message in self.OTHER.items():
            name, values = changes
            other: Subnet = build(**{name: values}).search_space().largest
            with pytest.raises(InvalidSubnetError, match=message):
                net.activate(other)
            with pytest.raises(InvalidSubnetError, match=message):
                net.extract(other)
            assert net.active_subnet == subnet
            assert net.shape == shape
