# SPDX-License-Identifier: Apache-2.0
"""Print how far our logits are from the `ofa` package's: `ofa_parity_program.py ORACLES N NETWORK`.

A process of its own, as torchvision is imported with operators that do not exist on a CPU build.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_subnet.supernets import (
    ElasticMobileNetV3,
    ElasticResNet,
    MobileNetV3Config,
    ResNetConfig,
)

PIXELS, WIDTHS = 64, (1.0, 1.2)


def import_originals(folder: Path) -> Any:
    """Return the module of their networks.

    torchvision's meta registrations need their operators' names.
    """
    sys.path.append(str(folder))
    text = (folder / "torchvision" / "_meta_registrations.py").read_text()
    patterns = (
        r'register_meta\("(\w+)"',
        r"torch\.ops\.torchvision\.(\w+)",
        r"torchvision::(\w+)",
    )
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted({name for pattern in patterns for name in re.findall(pattern, text)}):
        library.define(f"{name}(Tensor x) -> Tensor")
    from ofa.imagenet_classification.elastic_nn import networks

    return networks


def shaken(net: Any) -> Any:
    """Return the network with no tensor at its initial value, so that no zero or one hides."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in net.named_buffers():
            if "running_mean" in name:
                buffer.normal_(0, 0.1)
            elif "running_var" in name:
                buffer.uniform_(0.5, 1.5)
    return net.eval()


def mobilenet(networks: Any, width: float) -> tuple[Any, Any, dict[str, Any]]:
    """Return their network, ours, and the state by layout."""
    theirs = networks.OFAMobileNetV3(
        n_classes=1000,
        width_mult=width,
        ks_list=[3, 5, 7],
        expand_ratio_list=[3, 4, 6],
        depth_list=[2, 3, 4],
    )
    current = shaken(theirs).state_dict()
    released = {
        key.replace(".conv.", ".mobile_inverted_conv.", 1) if key.startswith("blocks") else key: t
        for key, t in current.items()
    }
    ours = ElasticMobileNetV3(MobileNetV3Config(width_mult=width, image_size=PIXELS))
    return theirs, ours, {"current": current, "released": released}


def resnet(networks: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return their network, ours, and the state by layout."""
    theirs = networks.OFAResNets(
        depth_list=[0, 1, 2],
        expand_ratio_list=[0.2, 0.25, 0.35],
        width_mult_list=[0.65, 0.8, 1.0],
    )
    current = shaken(theirs).state_dict()
    released = {  # what their load_state_dict doubles is single
        re.sub(
            r"\b(bn\.bn|linear\.linear|conv\.conv)\.(?=\w+$)", lambda m: f"{m[1].split('.')[0]}.", k
        ): t
        for k, t in current.items()
    }
    theirs.load_state_dict(released)  # they read this layout too, or raise
    ours = ElasticResNet(ResNetConfig(image_size=PIXELS))
    return theirs, ours, {"current": current, "released": released}


def compare(
    theirs: Any, ours: Any, states: dict[str, Any], counts: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the largest difference and the largest logit, for each layout and subnet."""
    assert states["released"].keys() != states["current"].keys()
    x = torch.randn(2, 3, PIXELS, PIXELS)
    ours.eval()
    space, rows = ours.search_space(), []
    for layout, state in states.items():
        with torch.no_grad():
            for tensor in ours.state_dict().values():
                tensor.zero_()  # what the other layout loaded is gone
        ours.load_ofa(state)
        for subnet in [space.smallest, space.largest, *space.sample(counts[layout] - 2, 0)]:
            values = subnet.grouped()
            if "w" in values:  # theirs are numbers of multipliers
                values["w"] = [theirs.width_mult_list.index(w) for w in values["w"]]
            theirs.set_active_subnet(**values)
            ours.activate(subnet)
            with torch.no_grad():
                a, b, c = theirs(x), ours(x), ours.extract(subnet).eval()(x)
                d = theirs.get_active_subnet(preserve_weight=True).eval()(x)
            rows.append(
                {
                    "layout": layout,
                    "subnet": str(subnet),
                    "active": (a - b).abs().max().item(),
                    "extracted": max((a - c).abs().max().item(), (d - c).abs().max().item()),
                    "scale": a.abs().max().item(),
                    "spread": a.std().item(),
                }
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    networks, n = import_originals(Path(sys.argv[1])), int(sys.argv[2])
    torch.manual_seed(0)
    if sys.argv[3] == "mobilenet_v3":
        counts = {"current": n, "released": n}
        print(json.dumps({w: compare(*mobilenet(networks, w), counts) for w in WIDTHS}))
    else:
        counts = {"current": n, "released": 3}  # ten times the work of a MobileNetV3
        print(json.dumps({"resnet": compare(*resnet(networks), counts)}))
