# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import itertools
import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.elasticity.batchnorm import recalibrate
from lightning_subnet.errors import ElasticityError, ElasticityWarning, SearchError
from lightning_subnet.supernets.elasticizing import elasticize
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
from tests.elasticity.channels import networks
from tests.elasticity.channels.checks import assert_close, output, shaken

ROW, IMAGE = torch.randn(4, 6), torch.randn(2, 3, 8, 8)


class Own(nn.Module):
    """A network of two inner layers, whose forward is made up of them by each test."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.a(x).relu()).relu())


# Bad input


@pytest.mark.parametrize("model", ["resnet18", None, nn.Linear])
def test_only_modules_are_taken(model: Any) -> None:
    with pytest.raises(SearchError, match=r"not an nn\.Module"):
        elasticize(model, ROW)


def test_an_example_is_needed() -> None:
    with pytest.raises(SearchError, match=r"model\.example_input_array"):
        elasticize(networks.mlp())


def test_the_example_of_the_model_is_taken() -> None:
    net = networks.mlp()
    net.example_input_array = ROW
    assert len(elasticize(net).search_space().names) == 2


@pytest.mark.parametrize("widths", [(), (0, 1), (0.5, 1.5), (-0.5,), "half", 0.5, (None,)])
def test_widths_are_shares(widths: Any) -> None:
    with pytest.raises(SearchError, match="are not shares of the whole"):
        elasticize(networks.mlp(), ROW, widths=widths)


@pytest.mark.parametrize("divisor", [0, -8, 2.5, True, None])
def test_the_divisor_is_a_whole_number(divisor: Any) -> None:
    with pytest.raises(SearchError, match="is not a whole number"):
        elasticize(networks.mlp(), ROW, divisor=divisor)


def test_an_example_that_forward_does_not_take_is_told() -> None:
    with pytest.raises(ElasticityError, match=r"Pass an input that forward\(\) takes"):
        elasticize(networks.mlp(), torch.randn(4, 7))
    with pytest.raises(ElasticityError, match="failed on the example input: TypeError"):
        elasticize(networks.mlp(), (ROW, ROW))


def test_a_pattern_that_matches_nothing_is_told_with_what_was_meant() -> None:
    with pytest.raises(ElasticityError, match="Did you mean 'shared'"):
        elasticize(networks.TwoInputs(), (ROW, torch.randn(4, 4)), groups=["sharde"])


def test_a_network_of_one_layer_has_nothing_that_may_vary() -> None:
    with pytest.raises(ElasticityError, match="reaches the outputs of the network"):
        elasticize(nn.Sequential(nn.Linear(6, 16)), ROW)


def test_widths_that_round_to_the_whole_are_told() -> None:
    with pytest.raises(ElasticityError, match="one value after rounding"):
        elasticize(networks.mlp(), ROW, divisor=64)


class Branches(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.c(self.b(h if h.mean() > 0 else h.relu()))


class Converts(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.c(self.b(h / max(1.0, h.abs().max().item())))


@pytest.mark.parametrize("kind", [Branches, Converts])
def test_networks_that_decide_by_what_layers_give_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ElasticityError, match="decides by values that its layers give"):
        elasticize(kind(), ROW)


def test_networks_may_decide_by_their_inputs() -> None:
    class Checks(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(x).all():
                raise ValueError
            return super().forward(x)

    assert len(elasticize(Checks(), ROW).search_space().names) == 2


class Draws(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(F.dropout(self.a(x).relu(), 0.5)).relu())


def test_channels_that_a_network_draws_for_are_refused() -> None:
    with pytest.raises(ElasticityError, match="draws at random in eval mode"):
        elasticize(Draws(), ROW, groups=["a"])


class Remembers(Own):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.n, self.last = 0, None
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        self.n += 1
        self.last = h
        self.seen.append(h)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.c(self.b(h).relu())


def test_what_a_network_remembers_is_left_as_it_was() -> None:
    net = elasticize(Remembers(), ROW)
    assert (net.n, net.seen, net.last) == (0, [], None)
    assert torch.equal(net._buffers["mean"], torch.zeros(16))
    assert {"width.b"} <= set(net.search_space().names)


def test_a_network_whose_outputs_depend_on_earlier_calls_is_refused() -> None:
    class Moves(Remembers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.mean.sum()

    with pytest.raises(ElasticityError, match="depend on what it saw before"):
        elasticize(Moves(), ROW)


def test_branches_of_training_alone_are_run_too() -> None:
    class Auxiliary(Own):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.a(x).relu()
            y = self.c(self.b(h).relu())
            return (y, self.auxiliary(h)) if self.training else y

    net = elasticize(Auxiliary(), ROW)
    assert set(net.search_space().names) == {"width.b"}
    reasons = {row.name: row.reason for row in net.elastic_report.refused}
    assert "fails" in reasons["width.a"]
    assert reasons["auxiliary"] == "no data of the example reaches it"


def test_numbers_of_classes_are_no_numbers_of_channels() -> None:
    class Counts(Own):
        def __init__(self) -> None:
            super().__init__()
            self.n_classes, self.num_labels, self.hidden_dim = 16, 24, 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / self.hidden_dim**0.5)

    net = elasticize(Counts(), ROW)
    net.activate(net.search_space().smallest)
    assert (net.n_classes, net.num_labels, net.hidden_dim) == (16, 24, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype: torch.dtype) -> None:
    net = elasticize(networks.mlp().to(dtype), ROW)
    net.activate(net.search_space().smallest)
    assert net(ROW.to(dtype)).dtype == dtype
    assert set(net.search_space().names) == {"width.0", "width.2"}


def test_quantised_weights_are_refused() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.randint(-127, 127, (16, 6), dtype=torch.int8))
            self.scale, self.out = nn.Parameter(torch.rand(16, 1)), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(F.linear(x, self.q.to(x.dtype) * self.scale).relu())

    with pytest.raises(ElasticityError, match="nothing that may vary"):
        elasticize(Quantised(), ROW)


def test_own_super_networks_are_refused() -> None:
    with pytest.raises(ElasticityError, match="already"):
        elasticize(ElasticMobileNetV3.tiny(n_classes=10), torch.randn(1, 1, 8, 8))


def test_networks_with_a_super_network_in_them_are_refused() -> None:
    wrapped = nn.Sequential(ElasticMobileNetV3.tiny(n_classes=10))
    with pytest.raises(ElasticityError, match="its part '0' has a search_space"):
        elasticize(wrapped, torch.randn(1, 1, 8, 8))
    with pytest.raises(ElasticityError, match="its part '0' has a search_space"):
        elasticize(nn.Sequential(elasticize(networks.mlp(), ROW)), ROW)


def test_networks_are_elasticized_before_they_are_compiled() -> None:
    for compiled in (
        torch.jit.trace(networks.mlp(), ROW), torch.compile(networks.mlp(), backend="eager")
    ):  # fmt: skip
        with pytest.raises(SearchError, match="is compiled"):
            elasticize(compiled, ROW)


def test_examples_and_weights_that_tell_nothing() -> None:
    with pytest.raises(ElasticityError, match="has no rows"):
        elasticize(networks.mlp(), ROW[:0])
    diverged = networks.mlp()
    diverged[4].bias.data.fill_(torch.nan)
    with pytest.raises(ElasticityError, match="gives NaN or infinity alone"):
        elasticize(diverged, ROW)


def test_dicts_name_the_arguments() -> None:
    net = elasticize(networks.TwoInputs(), {"text": torch.randn(4, 4), "image": ROW})
    assert set(net.search_space().names) == {"width.image", "width.shared"}


def test_a_call_without_gradients_leaves_a_network_that_learns() -> None:
    with torch.no_grad():
        net = elasticize(networks.mlp(), ROW)
    net.activate(net.search_space().smallest)
    net(ROW).sum().backward()
    assert net[0]._parameters["weight"].grad.abs().sum() > 0


def test_elasticizing_again_starts_anew() -> None:
    net = shaken(networks.mlp())
    expected = output(net, ROW)
    net = elasticize(net, ROW)
    net.activate(net.search_space().smallest)
    again = elasticize(net, ROW, widths=(0.5, 1), divisor=4)
    assert again is net
    assert net.search_space().values == {"width.0": (8, 16), "width.2": (12, 24)}
    assert net[0].weight.shape == (16, 6)
    assert_close(expected, output(net, ROW))
    net.activate(net.search_space().smallest)
    assert [tuple(net[i].weight.shape) for i in (0, 2, 4)] == [(8, 6), (12, 8), (3, 12)]


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.example_input_array = networks.mlp(), ROW

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_lightning_module() -> None:
    task = elasticize(Task())
    assert set(task.search_space().names) == {"width.net.0", "width.net.2"}
    part = task.extract(task.search_space().smallest)
    assert type(part) is Task
    assert part.net[0].out_features == 8


# Options


def test_patterns_take_and_leave_out() -> None:
    def names(**options: Any) -> set[str]:
        return set(elasticize(networks.UNet(), IMAGE, divisor=1, **options).search_space().names)

    assert names(groups=["down*"]) == {"width.down1.0", "width.down2.0"}
    assert names(groups="middle") == {"width.middle.0"}
    assert names(groups=["!up*", "!join*", "!down?"]) == {"width.middle.0"}


def test_uniform_ties_all_layers_of_a_kind() -> None:
    net = elasticize(networks.LanguageModel(), torch.randint(0, 20, (2, 5)), uniform=True)
    values = net.search_space().values
    assert values["heads"] == (1, 2, 3, 4)
    assert values["width"] == (16, 32, 48, 64)
    net.activate({**net.search_space().largest, "width": 32, "heads": 2})
    part = net.extract(net.active_subnet)
    for layer in part.layers:
        assert layer[1].inner[1].gate.out_features == 32
        assert layer[0].inner[1].q.out_features == 16
        assert (layer[0].inner[1].n_heads, layer[0].inner[1].n_kv_heads) == (4, 2)
        assert layer[0].inner[1].head_dim == 4
    assert_close(output(net, torch.arange(4)[None]), output(part, torch.arange(4)[None]))


def test_heads_and_depth_may_stay_as_they_are() -> None:
    net = elasticize(
        networks.LanguageModel(), torch.randint(0, 20, (2, 5)), heads=False, depth=False
    )
    assert {name.partition(".")[0] for name in net.search_space().names} == {"width"}
    reasons = [row.reason for row in net.elastic_report.refused]
    assert reasons.count("depth=False") == 4
    assert reasons.count("heads=False") == 2


def test_streams_vary_where_asked_for() -> None:
    net = shaken(networks.inverted_residuals())
    net = elasticize(net, IMAGE, streams=True, depth=False, divisor=1)
    space = net.search_space()
    assert space.values["stream.0.0"] == (2, 4, 6, 8)
    net.activate({**space.largest, "stream.0.0": 4})
    assert net[0][0].weight.shape[0] == 4
    assert_close(output(net, IMAGE), output(net.extract(net.active_subnet), IMAGE))


def test_a_stream_with_layer_norms_gives_what_its_extraction_gives() -> None:
    net = shaken(networks.LanguageModel())
    tokens = torch.randint(0, 20, (2, 5))
    net = elasticize(net, tokens, streams=True)
    name = next(n for n in net.search_space().names if n.startswith("stream"))
    for value in net.search_space().values[name]:
        net.activate({**net.search_space().largest, name: value})
        part = net.extract(net.active_subnet)
        assert part.embedding.embedding_dim == value
        assert part.head.weight is part.embedding.weight
        assert_close(output(net, tokens), output(part, tokens))


def test_the_divisor_rounds_and_merges() -> None:
    net = elasticize(networks.mlp(), ROW, widths=(0.1, 0.2, 0.5, 1), divisor=8)
    assert net.search_space().values == {"width.0": (8, 16), "width.2": (8, 16, 24)}


def test_widths_inside_a_block_exist_where_it_is_kept() -> None:
    space = elasticize(networks.inverted_residuals(), IMAGE).search_space()
    assert space.choices["width.1.inner.0.0"].when == {"keep.0": (1,)}
    assert space.choices["width.2.inner.0.0"].when == {"keep.1": (1,)}
    one = space.subnet({**space.smallest, "keep.0": 0, "width.1.inner.0.0": 8})
    assert one == space.subnet({**space.smallest, "keep.0": 0, "width.1.inner.0.0": 32})


def test_a_space_that_saves_nearly_nothing_is_told() -> None:
    def network() -> nn.Module:
        sizes = (6, 300, 300, 8, 3)
        return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))

    with pytest.warns(ElasticityWarning, match="of its MACs"):
        elasticize(network(), ROW, groups=["2"], widths=(0.5, 1), divisor=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elasticize(network(), ROW)


def test_the_report_is_a_table_and_data() -> None:
    report = elasticize(networks.inverted_residuals(), IMAGE).elastic_report
    assert "proved" in str(report)
    assert "stream.0.0: streams=False" in str(report)
    rows = report.to_dicts()
    assert {row["kind"] for row in rows} == {"width", "depth", "stream"}
    assert re.search(r"The smallest subnet has \d+% of the MACs", str(report))


# Importance


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "activation", None])
def test_every_importance_keeps_the_largest_function(importance: Any) -> None:
    torch.manual_seed(0)
    net = shaken(networks.convolutions())
    expected = output(net, IMAGE)
    net.eval()(IMAGE.double()).square().sum().backward()
    net = elasticize(net, IMAGE, importance=importance, batches=[IMAGE], divisor=1)
    assert_close(expected, output(net, IMAGE))


def test_the_first_units_are_those_that_matter() -> None:
    net = networks.mlp()
    strength = torch.arange(16.0)
    with torch.no_grad():
        net[2].weight.copy_(strength.expand(24, 16))
    net = elasticize(net, ROW, groups=["0"])
    assert torch.equal(net[2].weight[0], strength.flip(0))


def test_importance_may_be_a_function() -> None:
    net = networks.mlp()
    before = net[0].bias.detach().clone()

    def by_bias(group: Any, tensors: Any) -> torch.Tensor:
        return tensors["0.bias"][group.axes["0.bias", 0][:, 0]]

    elasticize(net, ROW, groups=["0"], importance=by_bias)
    assert torch.equal(net[0].bias, before.sort(descending=True).values)
    with pytest.raises(ElasticityError, match="one number per unit"):
        elasticize(networks.mlp(), ROW, importance=lambda *_: torch.zeros(3))


def test_an_unknown_importance_is_told() -> None:
    with pytest.raises(ElasticityError, match="Did you mean 'taylor'"):
        elasticize(networks.mlp(), ROW, importance="tailor")
    with pytest.raises(ElasticityError, match="needs gradients"):
        elasticize(networks.mlp(), ROW, importance="taylor")
    with pytest.raises(ElasticityError, match="needs inputs"):
        elasticize(networks.mlp(), ROW, importance="activation")


def test_momenta_are_sorted_with_their_weights() -> None:
    torch.manual_seed(0)
    one = shaken(networks.mlp())
    other = copy.deepcopy(one)
    optimizers = [torch.optim.Adam(net.parameters(), 0.01) for net in (one, other)]

    def step(net: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        net(ROW.double()).square().sum().backward()
        optimizer.step()

    for net, optimizer in zip((one, other), optimizers, strict=True):
        step(net, optimizer)
    elasticize(one, ROW, optimizers=[optimizers[0]])
    assert not torch.equal(one[0].weight, other[0].weight)
    for _ in range(3):
        for net, optimizer in zip((one, other), optimizers, strict=True):
            step(net, optimizer)
    assert_close(output(other, ROW), output(one, ROW))


# What an elasticized network can do


def test_gradients_reach_the_slices_alone() -> None:
    net = elasticize(networks.mlp(), ROW)
    net.activate({"width.0": 8, "width.2": 16})
    net(ROW).square().sum().backward()
    gradient = net[2]._parameters["weight"].grad
    assert gradient[:16, :8].abs().sum() > 0
    assert gradient[16:].abs().sum() == 0
    assert gradient[:, 8:].abs().sum() == 0


def test_an_optimizer_moves_the_slices() -> None:
    net = elasticize(networks.convolutions(), IMAGE)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = copy.deepcopy(net.state_dict())
    net.activate(net.search_space().smallest)
    net.train()(IMAGE).square().sum().backward()
    optimizer.step()
    after = net.state_dict()
    assert not torch.equal(before["1.0.weight"][:8, :8], after["1.0.weight"][:8, :8])
    assert torch.equal(before["1.0.weight"][8:], after["1.0.weight"][8:])
    assert not torch.equal(before["1.1.running_var"][:8], after["1.1.running_var"][:8])
    assert torch.equal(before["1.1.running_var"][8:], after["1.1.running_var"][8:])


def test_statistics_of_channels_of_several_groups_are_moved_and_renewed() -> None:
    torch.manual_seed(0)
    net = elasticize(networks.DenseNet(), IMAGE, divisor=1)
    net.activate(net.search_space().smallest)
    part = net.extract(net.active_subnet)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    recalibrate(net, batches)
    recalibrate(part, batches)
    kept = torch.tensor([*range(4), 16, 17, 24, 25])
    statistics = net.norms[2]._buffers["running_var"]
    torch.testing.assert_close(statistics[kept], part.norms[2].running_var)
    assert torch.equal(statistics[[4, 20]], torch.ones(2))
    for one in (net, part):
        one.train()(batches[0])
    torch.testing.assert_close(statistics[kept], part.norms[2].running_var)
    torch.testing.assert_close(net.eval()(IMAGE), part.eval()(IMAGE))


def test_weights_are_loaded_and_cast_while_a_subnet_is_in_force() -> None:
    one, other = (elasticize(networks.UNet(), IMAGE, importance=None) for _ in range(2))
    for net in (one, other):
        net.activate(net.search_space().smallest)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(output(one, IMAGE), output(other, IMAGE))
    for net in (one, other):
        net.to(torch.float64)
    assert other.middle[0].weight.dtype == torch.float64
    assert_close(output(one, IMAGE), output(other, IMAGE))


def test_a_recurrent_network_is_cast_copied_and_trained() -> None:
    sequence = torch.randn(2, 5, 6)
    net = elasticize(networks.Recurrent(nn.LSTM, num_layers=2), sequence)
    net.activate(net.search_space().smallest)
    assert (net.rnn.hidden_size, net.rnn.input_size) == (8, 8)
    net = copy.deepcopy(net.double())
    part = net.extract(net.active_subnet)
    assert_close(output(net, sequence), output(part, sequence))
    assert part.rnn._flat_weights[0] is part.rnn.weight_ih_l0
    net.train()(sequence.double()).sum().backward()
    gradient = net.rnn._parameters["weight_hh_l1"].grad
    rows = torch.tensor([g * 24 + u for g in range(4) for u in range(8)])
    assert gradient[rows][:, :8].abs().min() > 0
    gradient[rows[:, None], torch.arange(8)] = 0
    assert gradient.abs().sum() == 0


def test_a_subnet_in_force_is_compiled() -> None:
    net = elasticize(networks.mlp(), ROW)
    net.activate(net.search_space().smallest)
    torch._dynamo.reset()  # of what other tests compiled
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ROW), net(ROW))
    net.activate(net.search_space().largest)
    torch.testing.assert_close(compiled(ROW), net(ROW))


@pytest.mark.parametrize("build", [networks.convolutions, networks.UNet])
def test_an_extracted_network_is_exported(build: Any) -> None:
    net = elasticize(build().eval(), IMAGE)
    part = net.extract(net.search_space().smallest)
    exported = torch.export.export(part, (IMAGE,)).module()
    torch.testing.assert_close(exported(IMAGE), part(IMAGE))
