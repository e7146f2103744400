# SPDX-License-Identifier: Apache-2.0
"""Tables of a network's own say what is counted for the input that is given, or are not taken."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_subnet import Measure, SearchSpace, Subnet
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.costs import closest_subnet
from lightning_subnet.costs.resolve import resolve, with_sample
from lightning_subnet.elasticity.extraction import extract
from lightning_subnet.errors import CostWarning, MeasurementError, StudyMismatchError
from lightning_subnet.study.additive import Term, additive_measure
from lightning_subnet.supernets import (
    ElasticGPT,
    ElasticMobileNetV3,
    ElasticResNet,
    ElasticTransformer,
    ElasticViT,
)
from tests.networks import WIDTHS, ElasticMlp, search


def pixels(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(3, 20, shape, generator=torch.Generator().manual_seed(0))


def subnets(space: SearchSpace) -> list[Subnet]:
    return [space.smallest, space.largest, *space.sample(2, 5)]


def values(measure: Measure, space: SearchSpace) -> list[float]:
    return measure.evaluate(space, space.indices(subnets(space)))[0].tolist()


def bound(model: nn.Module, name: str, example_input: Any = None) -> Measure:
    host, sample = with_sample(model, example_input)
    return resolve(host, [name], sample=lambda: sample)[name]


OWN: list[tuple[Any, Any, bool]] = [  # a network, an input, and whether its sizes name this input
    (ElasticMobileNetV3.tiny, pixels(1, 1, 8, 8), True),
    (ElasticMobileNetV3.tiny, pixels(1, 1, 16, 16), False),
    (ElasticMobileNetV3.tiny, {"x": pixels(3, 1, 9, 14)}, False),
    (ElasticResNet.tiny, (pixels(1, 1, 8, 8),), True),
    (ElasticResNet.tiny, pixels(2, 1, 15, 10), False),
    (lambda: ElasticResNet.tiny(resolutions=(8, 12)), pixels(1, 1, 16, 10), True),
    (lambda: ElasticResNet.tiny(resolutions=(8, 12)), pixels(4, 1, 8, 8), False),
    (ElasticViT.tiny, pixels(1, 1, 8, 8), True),
    (ElasticViT.tiny, pixels(5, 1, 8, 8), False),
    (lambda: ElasticViT.tiny(image_size=(8, 4)), (pixels(2, 1, 8, 4),), False),
    (ElasticGPT.tiny, words(1, 64), True),
    (ElasticGPT.tiny, words(3, 11), False),
    (lambda: ElasticGPT.tiny(head_dim=8, kv_heads=()), {"tokens": words(1, 20)}, False),
    (ElasticTransformer.tiny, (words(1, 7), words(1, 9)), True),
    (ElasticTransformer.tiny, (words(2, 12), words(2, 4)), False),
    (lambda: ElasticTransformer.tiny(tied=False, source_vocab=20),
     {"target": words(1, 5), "source": words(1, 10)}, False),
]  # fmt: skip


@pytest.mark.parametrize(("make", "example", "named"), OWN)
def test_macs_of_own_networks_are_those_of_the_input(make: Any, example: Any, named: bool) -> None:
    net = make()
    space = net.search_space()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CostWarning)
        macs = bound(net, "macs", example)
    traced = [count_macs(extract(net, subnet), example) for subnet in subnets(space)]
    assert values(macs, space) == traced
    assert macs.vectorised
    # What was stored under the table alone was of the input that the sizes name.
    assert (macs.fingerprint is None) == named


def test_the_numbers_of_two_sizes_of_image() -> None:
    net = ElasticMobileNetV3.tiny()
    space = net.search_space()
    for side, macs in ((8, 1_263_616), (16, 4_599_808)):
        assert values(bound(net, "macs", pixels(1, 1, side, side)), space)[1] == macs
    assert values(bound(net, "macs"), space)[1] == 1_263_616  # of its sizes, without an input
    near = closest_subnet(net, pixels(1, 1, 16, 16), macs=2_000_000)
    assert near.values["macs"] == count_macs(extract(net, near.subnet), pixels(1, 1, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 4, 8, 11, 14])
def test_weights_of_own_networks_are_those_of_the_extracted_subnet(
    at: int, dtype: torch.dtype
) -> None:
    net = OWN[at][0]().to(dtype)
    space = net.search_space()
    plain = [extract(net, subnet) for subnet in subnets(space)]
    params, size = bound(net, "params"), bound(net, "size_mb")
    assert values(params, space) == [sum(p.numel() for p in x.parameters()) for x in plain]
    sizes = [sum(t.numel() * t.element_size() for t in x.state_dict().values()) for x in plain]
    np.testing.assert_allclose(values(size, space), np.array(sizes) / 1e6, rtol=1e-12)
    assert params.fingerprint is size.fingerprint is None


def test_weights_of_several_types_are_counted_where_the_table_has_one() -> None:
    net = ElasticGPT.tiny().bfloat16()
    for layer in net.layers:  # normalisation in single precision, as it is often kept
        layer.attention_norm.float()
    space = net.search_space()
    with pytest.warns(CostWarning, match=r"ElasticGPT says 0\.8\d+ size_mb .* each subnet is"):
        size = bound(net, "size_mb")
    plain = [extract(net, subnet) for subnet in subnets(space)]
    sizes = [sum(t.numel() * t.element_size() for t in x.state_dict().values()) for x in plain]
    np.testing.assert_allclose(values(size, space), np.array(sizes) / 1e6, rtol=1e-12)
    assert size.fingerprint is not None


class Around(nn.Module):
    """A module that enlarges images and has a layer of its own; `often` runs of the network."""

    def __init__(self, often: int) -> None:
        super().__init__()
        self.net, self.often = ElasticMobileNetV3.tiny(), often
        self.last = nn.Linear(1000, 7)
        self.example_input_array = pixels(1, 1, 5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2)
        return self.last(sum(self.net(x) for _ in range(self.often)))


def test_what_a_module_around_the_network_adds_counts() -> None:
    model = Around(1)
    space = model.net.search_space()
    macs = bound(model, "macs")
    inside = bound(model.net, "macs", pixels(1, 1, 10, 10))
    assert values(macs, space) == [x + 7000 for x in values(inside, space)]
    assert macs.vectorised


def test_a_module_that_runs_the_network_twice_is_counted_itself() -> None:
    model = Around(2)
    space = model.net.search_space()
    with pytest.warns(CostWarning, match="are counted for the input, so each subnet is") as caught:
        macs, _ = (bound(model, "macs") for _ in range(2))
    assert len(caught) == 1
    inside = bound(model.net, "macs", pixels(1, 1, 10, 10))
    assert values(macs, space) == [2 * x + 7000 for x in values(inside, space)]


class Stated(ElasticMlp):
    """A network with tables of its own: so many MACs and weights for each unit of its width."""

    def __init__(self, **each: float) -> None:
        super().__init__()
        self.each = each

    def exact_measures(self) -> list[Measure]:
        space, widths = self.search_space(), np.array(WIDTHS, dtype=float)
        return [
            additive_measure(name, space, [Term(("width",), each * widths)])
            for name, each in self.each.items()
        ]


ROWS = torch.zeros(1, 64)


def test_a_users_table_is_taken_if_it_says_what_is_counted() -> None:
    net = Stated(macs=74)
    macs = bound(net, "macs", ROWS)
    assert macs.vectorised
    assert macs.fingerprint is None
    with pytest.warns(CostWarning, match="Let exact_measures") as caught:
        traced = bound(net, "macs", ROWS.repeat(3, 1))
    assert "says 2368 macs for the largest subnet, and 7104 are counted" in str(caught[0].message)
    space = net.search_space()
    assert values(traced, space) == [3 * x for x in values(macs, space)]


def test_a_table_of_half_the_macs_is_not_taken_and_one_of_the_list_is() -> None:
    net = Stated(macs=37)
    space = net.search_space()
    with pytest.warns(CostWarning, match="says 1184 macs"):
        assert values(bound(net, "macs", ROWS), space)[1] == 74 * 32
    (own,) = net.exact_measures()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CostWarning)
        assert resolve(net, [own], ["macs"], lambda: ROWS)["macs"] is own
        assert values(bound(net, "macs"), space)[1] == 37 * 32  # without an input it cannot be seen


def test_a_table_of_weights_is_held_against_the_slices_and_not_against_a_copy_of_all() -> None:
    class Unsliced(Stated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if bool(x.sum() > 1e6) else x * 1.0)  # no graph of one way

    net = Unsliced(params=75)
    assert values(bound(net, "params", ROWS), net.search_space())[1] == 75 * 32
    with pytest.warns(CostWarning, match="params"):
        # 64 * 32 + 32 + 32 * 10 + 10, and two of 64 of the normalisation
        assert values(bound(Stated(params=75), "params", ROWS), net.search_space())[1] == 2538


def test_an_input_that_the_network_does_not_take_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="this network is made for"):
        bound(ElasticViT.tiny(), "macs", pixels(1, 1, 16, 16))
    with pytest.raises(MeasurementError, match="failed on an input of"):
        bound(ElasticMobileNetV3.tiny(), "macs", pixels(1, 3, 8, 8))


class LitGPT(L.LightningModule):
    """A language model whose batches have one token more than the network gets."""

    def __init__(self, context: int = 12) -> None:
        super().__init__()
        self.net = ElasticGPT.tiny(vocab=20, context=context)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net(tokens)

    def inputs(self, batch: Any) -> torch.Tensor:
        return batch["tokens"] if isinstance(batch, dict) else batch

    def validation_step(self, batch: Any, _: int) -> None:
        tokens = self.inputs(batch)
        logits = self(tokens[:, :-1])
        self.log("loss", F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


class LitGPTInDicts(LitGPT):
    forward = L.LightningModule.forward

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net(tokens)


def largest_macs(model: LitGPT, data: list[Any], **settings: Any) -> float:
    loader = DataLoader(data, batch_size=4)
    objectives = {"loss": "min", "macs": "min"}
    result = search(objectives=objectives, budget=2, **settings).fit(model, dataloaders=loader)
    return float(
        next(e for e in result.history if e.subnet == result.history.space.largest).values["macs"]
    )


@pytest.mark.parametrize("kind", [LitGPT, LitGPTInDicts])
@pytest.mark.parametrize("context", [12, 30])
@pytest.mark.parametrize("named", [False, True])
def test_without_an_example_macs_are_those_of_what_a_validation_gives_the_network(
    kind: Any, context: int, named: bool
) -> None:
    tokens = [*words(8, 13)]
    data: list[Any] = [{"tokens": x} for x in tokens] if named else tokens
    model = kind(context)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CostWarning)
        macs = largest_macs(model, data)
    largest = model.net.search_space().largest
    assert macs == count_macs(extract(model.net, largest), words(1, 12))


def test_it_is_a_warning_where_no_input_of_the_network_is_seen() -> None:
    class Unseen(LitGPT):
        def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.net(tokens["tokens"])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("loss", float(self.net.generate(self.inputs(batch)[:, :3], 2).sum()))

    data = [{"tokens": x} for x in words(8, 13)]
    with pytest.warns(CostWarning, match="configuration names.*Set example_input_array of Unseen"):
        macs = largest_macs(Unseen(30), data, checks=False)
    net = ElasticGPT.tiny(vocab=20, context=30)
    assert macs == count_macs(extract(net, net.search_space().largest), words(1, 30))


def test_a_study_goes_on_with_the_same_input_alone(tmp_path: Path) -> None:
    def run(length: int, budget: int) -> Any:
        data = [*words(8, length + 1)]
        torch.manual_seed(0)
        model = LitGPT(30)
        settings = {"storage": f"sqlite:///{tmp_path}/s.db", "name": "one", "budget": budget}
        objectives = {"loss": "min", "macs": "min"}
        engine = search(objectives=objectives, **settings)
        return engine.fit(model, dataloaders=DataLoader(data, batch_size=4))

    run(12, 2)
    assert len(run(12, 3).history) == 3
    with pytest.raises(StudyMismatchError, match="macs"):
        run(9, 4)
