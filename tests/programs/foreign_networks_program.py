# SPDX-License-Identifier: Apache-2.0
"""Print what the adapters make of the networks of `ofa` and torchvision: `... ORACLES [small]`.

With `small`: of networks of `ofa` that were built with other lists than those of its paper.

A process of its own, as torchvision is imported with operators that do not exist on a CPU build.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_subnet import activated, extract, recalibrate
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.costs.counts import MACS, PARAMS, SIZE_MB
from lightning_subnet.errors import SearchError, SubnetError
from lightning_subnet.supernets import ElasticMobileNetV3, ElasticResNet, from_ofa, skippable_blocks
from tests.programs.ofa_parity_program import import_originals, shaken

OFA = {
    "OFAMobileNetV3": {
        "ks_list": [3, 5, 7],
        "expand_ratio_list": [3, 4, 6],
        "depth_list": [2, 3, 4],
    },
    "OFAProxylessNASNets": {
        "ks_list": [3, 5, 7],
        "expand_ratio_list": [3, 4, 6],
        "depth_list": [2, 3, 4],
        "width_mult": 1.3,
    },
    "OFAResNets": {
        "depth_list": [0, 1, 2],
        "expand_ratio_list": [0.2, 0.25, 0.35],
        "width_mult_list": [0.65, 0.8, 1.0],
    },
}


def by_hand(net: Any, subnet: Any) -> dict[str, Any]:
    """Return the settings as someone writes them who knows the package and not the adapter."""
    settings = {
        "d": [subnet[f"d.{s}"] for s in range(5)],
        "e": [subnet[name] for name in subnet if name.startswith("e.")],
    }
    if type(net).__name__ == "OFAResNets":
        return settings | {"w": [[0.65, 0.8, 1.0].index(subnet[f"w.{i}"]) for i in range(6)]}
    depth = [*settings["d"], 1] if type(net).__name__ == "OFAProxylessNASNets" else settings["d"]
    return settings | {"d": depth, "ks": [subnet[n] for n in subnet if n.startswith("ks.")]}


def adapted(networks: Any, kind: str) -> dict[str, Any]:
    """Return what `from_ofa` makes of a network, beside what its own methods do."""
    torch.manual_seed(0)
    theirs = shaken(getattr(networks, kind)(n_classes=10, **OFA[kind]))
    keys, untouched = list(theirs.state_dict()), copy.deepcopy(theirs)
    net = from_ofa(theirs)
    space, x = net.search_space(), torch.randn(2, 3, 64, 64)
    told: dict[str, Any] = {
        "same": net is theirs and type(net).__name__ == kind and list(net.state_dict()) == keys,
        "size": space.size,
        "names": len(space.names),
        "rows": [],
    }
    own = {"OFAMobileNetV3": ElasticMobileNetV3, "OFAResNets": ElasticResNet}.get(kind)
    if own is not None:
        with torch.device("meta"):
            told["space of our own"] = own().search_space() == space
    params = sum(p.numel() for p in net.parameters())
    measures = {count.name: count.bind(net, x[:1]) for count in (MACS, PARAMS, SIZE_MB)}
    for subnet in [space.smallest, space.largest, *space.sample(2, 0)]:
        untouched.set_active_subnet(**by_hand(untouched, subnet))
        net.activate(subnet)
        plain = extract(net, subnet)
        with torch.no_grad():
            a, b, c = untouched(x), net(x), plain(x)
        X = space.indices([subnet])
        told["rows"].append(
            {
                "subnet": str(subnet),
                "active": (a - b).abs().max().item(),
                "extracted": (a - c).abs().max().item(),
                "spread": a.std().item(),
                "sliced": plain.sliced,
                "elastic": any("Dynamic" in type(m).__name__ for m in plain.modules()),
                "smaller": sum(p.numel() for p in plain.parameters()) < params,
                "macs": [
                    float(measures["macs"].evaluate(space, X)[0][0]),
                    count_macs(plain, x[:1]),
                ],
                "params": [
                    float(measures["params"].evaluate(space, X)[0][0]),
                    sum(p.numel() for p in plain.parameters()),
                ],
            }
        )
    one, other = space.smallest, space.largest
    net.activate(one)
    twin = copy.deepcopy(net)
    twin.activate(other)
    with torch.no_grad():
        told["a copy activates itself"] = not torch.equal(net(x), twin(x))
    extract(net, other)
    told["extraction leaves what was in force"] = net.active_subnet == one
    recalibrate(net, [x])  # BatchNorm of what runs: as if the subnet had been alone
    with activated(twin, one):
        alone = twin.get_active_subnet(preserve_weight=True).eval()  # its modes are mixed
    recalibrate(alone, [x])
    with torch.no_grad():
        told["recalibrated"] = (net.eval()(x) - alone.eval()(x)).abs().max().item()
    try:
        from_ofa(alone)
    except SearchError as error:
        told["a subnet"] = str(error)
    return told


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one kernel size": ("OFAMobileNetV3", {"ks_list": 3, "expand_ratio_list": [3, 6]}),
    "repeated values": ("OFAProxylessNASNets", {"ks_list": [3, 3, 5], "depth_list": [1, 2]}),
    "depth 0": ("OFAMobileNetV3", {"ks_list": [3, 5], "depth_list": [0, 1]}),
    "one value for all": ("OFAMobileNetV3", {"depth_list": 1}),
    "a negative depth": ("OFAResNets", {"depth_list": [-1, 0]}),
}
STAGES: dict[str, tuple[list[int], list[int]]] = {
    "three stages": ([1, 1, 1], [32, 64, 128]),
    "lists of two lengths": ([1, 1], [32, 64, 128, 256]),
    "five stages, of which four are built": ([1] * 5, [32, 64, 128, 256, 512]),
    "no blocks": ([1, 0], [32, 64]),
}


def small(networks: Any) -> dict[str, Any]:
    """Return what `from_ofa` makes of small networks with other lists, by what they have."""
    from ofa.imagenet_classification.networks import ResNets

    def told(net: Any) -> Any:
        try:
            net = from_ofa(shaken(net))
        except SubnetError as error:
            return f"{type(error).__name__}: {error}"
        space, x = net.search_space(), torch.randn(1, 3, 32, 32)
        gaps = []
        for subnet in (space.smallest, *space.sample(1, 0)):
            net.activate(subnet)
            with torch.no_grad():
                gaps.append((net.eval()(x) - extract(net, subnet)(x)).abs().max().item())
        names = [name for name in space.names if name.startswith("d.")]
        return {"size": space.size, "depths": len(names), "gap": max(gaps)}

    results = {}
    for what, (kind, lists) in VARIANTS.items():
        results[what] = told(getattr(networks, kind)(n_classes=3, **lists))
    before = ResNets.BASE_DEPTH_LIST, ResNets.STAGE_WIDTH_LIST
    elastic = {"depth_list": [0, 1], "expand_ratio_list": [0.25, 0.5]}
    for what, lists in STAGES.items():
        ResNets.BASE_DEPTH_LIST, ResNets.STAGE_WIDTH_LIST = lists
        results[what] = told(networks.OFAResNets(n_classes=3, **elastic))
    ResNets.BASE_DEPTH_LIST, ResNets.STAGE_WIDTH_LIST = [1, 1, 1], [32, 64, 128]
    net = networks.OFAResNets(n_classes=3, **elastic)
    for name, lists in (("widths", ([1, 1, 1], [8, 16, 32])), ("depths", before)):
        net.BASE_DEPTH_LIST, net.STAGE_WIDTH_LIST = lists
        results[f"other {name} than it was built with"] = told(net)
    return results


def skipped() -> dict[str, Any]:
    """Return the blocks of torchvision's networks that may be skipped, and what is left."""
    from torchvision import models

    told = {}
    for name in ("resnet18", "resnet50", "mobilenet_v2", "convnext_tiny", "densenet121"):
        torch.manual_seed(0)
        net, x = getattr(models, name)().eval(), torch.randn(1, 3, 64, 64)
        if name == "densenet121":
            try:
                skippable_blocks(net, x)
            except Exception as error:
                told[name] = f"{type(error).__name__}: {error}"
            continue
        before, keys = net(x), list(net.state_dict())
        skippable_blocks(net, x)
        space = net.search_space()
        net.activate(space.smallest)
        blocks = [name for name, module in net.named_modules() if "forward" in vars(module)]
        small = extract(net, space.smallest)
        with torch.no_grad():
            difference = (net(x) - small(x)).abs().max().item()
            net.activate(space.largest)
            restored = torch.equal(net(x), before)
        told[name] = {
            "blocks": blocks,
            "difference": difference,
            "restored": restored and list(net.state_dict()) == keys,
            "fewer": count_macs(small, x) < count_macs(net, x),
        }
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    networks = import_originals(Path(sys.argv[1]))
    if sys.argv[2:] == ["small"]:
        print(json.dumps(small(networks)))
        sys.exit()
    print(json.dumps({kind: adapted(networks, kind) for kind in OFA} | {"torchvision": skipped()}))
