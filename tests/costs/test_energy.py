# SPDX-License-Identifier: Apache-2.0
"""Energy: counters in a tree of files as the Linux kernel shows it, and what is said without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin
from lightning_subnet.costs import Energy
from lightning_subnet.costs.energy import RaplCounter
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.study.measures import NetworkMeasure
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.problems import assert_clear

RANGE = 262143328850  # of a real Xeon
IMAGE = torch.zeros(1, 1, 8, 8)


def zone(folder: Path, label: str, energy: int, most: int = RANGE) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Path]:
    """Two packages with cores and memory, as on a server; the flat links are there too."""
    zones = {}
    for k in (0, 1):
        package = tmp_path / "devices" / f"intel-rapl:{k}"
        zones[f"package-{k}"] = zone(package, f"package-{k}", 1_000_000 * (k + 1))
        zones[f"core-{k}"] = zone(package / f"intel-rapl:{k}:0", "core", 500)
        zones[f"dram-{k}"] = zone(package / f"intel-rapl:{k}:1", "dram", 7_000)
    zones["psys"] = zone(tmp_path / "devices" / "intel-rapl:2", "psys", 123)
    zones["mmio"] = zone(tmp_path / "devices" / "intel-rapl-mmio:0", "package-0", 5)
    root = tmp_path / "powercap"
    root.mkdir()
    for path in sorted((tmp_path / "devices").rglob("intel-rapl*")):
        (root / path.name).symlink_to(path)
    zones["root"] = root
    return zones


def add(path: Path, energy: int) -> None:
    path.write_text(f"{int(path.read_text()) + energy}\n")


def test_packages_and_memory_add_up_and_their_parts_do_not(tree: dict[str, Path]) -> None:
    counter = RaplCounter(tree["root"])
    assert counter() == 0
    for name, energy in (("package-0", 3000), ("package-1", 500), ("dram-1", 40)):
        add(tree[name], energy)
    for ignored in ("core-0", "psys", "mmio"):
        add(tree[ignored], 10**6)
    assert counter() == pytest.approx(3.54)  # mJ
    add(tree["dram-0"], 1000)
    assert counter() == pytest.approx(4.54)


def test_a_counter_that_starts_again(tree: dict[str, Path]) -> None:
    tree["package-0"].write_text(f"{RANGE - 1000}\n")
    counter = RaplCounter(tree["root"])
    tree["package-0"].write_text("500\n")
    assert counter() == pytest.approx(1.5)
    tree["package-0"].write_text("2500\n")
    assert counter() == pytest.approx(3.5)


class Burner(SubnetMixin, nn.Module):
    """Each pass adds as many microjoules to a counter as the subnet says.

    It decides by values, so it cannot be sliced, which would leave out that it adds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layer, self.path, self.uj = nn.Linear(4, 4), path, 0

    def search_space(self) -> SearchSpace:
        return SearchSpace(uj=[1000, 2500])

    def activate(self, subnet: Subnet) -> None:
        self.uj = subnet["uj"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        add(self.path, self.uj * len(x))
        return self.layer(x)


def test_millijoules_of_a_pass(tree: dict[str, Path]) -> None:
    net = Burner(tree["dram-1"])
    energy = Energy(rapl=str(tree["root"]), window=0.01, windows=5, threads=1)
    bound = energy.bind(net, torch.zeros(1, 4))
    assert isinstance(energy, NetworkMeasure)
    assert (bound.name, bound.unit, bound.exact) == ("energy_mj", "mJ", False)
    assert bound(list(net.search_space())) == [(1.0, 0.0), (2.5, 0.0)]
    batch = Energy(rapl=str(tree["root"]), window=0.01, windows=5, batch_size=4)
    ((value, error),) = batch.bind(net, torch.zeros(1, 4))([net.search_space().largest])
    assert (value, error) == (10.0, 0.0)


def test_a_counter_that_stands_still_fails(tree: dict[str, Path]) -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)
    bound = Energy(rapl=str(tree["root"]), window=0.01, windows=5).bind(net, IMAGE)
    threads = torch.get_num_threads()
    with pytest.raises(MeasurementError, match=r"did not move in 0\.01 s"):
        bound([net.search_space().largest])
    with pytest.raises(RuntimeError, match="did not move"):
        bound([net.search_space().smallest])
    assert torch.get_num_threads() == threads


def test_the_fingerprint_tells_conditions_apart(tree: dict[str, Path]) -> None:
    net = ElasticMobileNetV3.tiny(n_classes=10)

    def fingerprint(**settings: Any) -> str | None:
        return Energy(rapl=str(tree["root"]), **settings).bind(net, IMAGE).fingerprint

    assert fingerprint() == fingerprint()
    others = [
        fingerprint(batch_size=2),
        fingerprint(threads=2),
        fingerprint(window=1.0),
        fingerprint(windows=9),
    ]
    assert len({fingerprint(), *others}) == 5


def test_no_counter_is_told_at_once_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError) as caught:
        Energy(rapl=str(tmp_path))
    assert_clear(caught.value, "device='cpu'", str(tmp_path), "intel-rapl", "latency_ms")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_counter_that_only_root_may_read(tree: dict[str, Path]) -> None:
    tree["package-0"].chmod(0)
    with pytest.raises(ObjectiveError, match=r"cannot be read\. Run as root"):
        Energy(rapl=str(tree["root"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")
def test_no_gpu() -> None:
    with pytest.raises(ObjectiveError, match="device='cuda' cannot be used here"):
        Energy(device="cuda")


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"threads": 0}, {"windows": 4}, {"window": 0}, {"window": "1"},
     {"windows": True}, {"input": [1]}],
)  # fmt: skip
def test_wrong_arguments(settings: dict[str, Any], tree: dict[str, Path]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        Energy(rapl=str(tree["root"]), **settings)
    assert_clear(caught.value, "Energy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu() -> None:
    pytest.importorskip("pynvml")
    net = ElasticMobileNetV3.tiny(n_classes=10)
    bound = Energy(device="cuda", window=0.5, windows=5).bind(net, IMAGE)
    ((value, error),) = bound([net.search_space().largest])
    assert 0 < error < value
