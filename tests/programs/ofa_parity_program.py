# SPDX-License-Identifier: Apache-2.0
"""Print how far our logits are from those of the `ofa` package: `ofa_parity_program.py ORACLES N`.

A process of its own, as torchvision is imported with operators that do not exist on a CPU build.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3, MobileNetV3Config

PIXELS, WIDTHS = 64, (1.0, 1.2)


def import_original(folder: Path) -> type:
    """Return OFAMobileNetV3; torchvision's meta registrations need their operators' names."""
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
    from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

    return OFAMobileNetV3


def compare(original: type, width: float, n: int) -> list[dict[str, float]]:
    """Return the largest difference and the largest logit, for each layout and subnet."""
    torch.manual_seed(0)
    theirs = original(
        n_classes=1000,
        width_mult=width,
        ks_list=[3, 5, 7],
        expand_ratio_list=[3, 4, 6],
        depth_list=[2, 3, 4],
    ).eval()
    with torch.no_grad():  # no tensor at its initial value: the transformations start as identities
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in theirs.named_buffers():
            if "running_mean" in name:
                buffer.normal_(0, 0.1)
            elif "running_var" in name:
                buffer.uniform_(0.5, 1.5)
    current = theirs.state_dict()
    released = {
        key.replace(".conv.", ".mobile_inverted_conv.", 1) if key.startswith("blocks") else key: t
        for key, t in current.items()
    }
    assert released.keys() != current.keys()
    x = torch.randn(2, 3, PIXELS, PIXELS)
    ours = ElasticMobileNetV3(MobileNetV3Config(width_mult=width, image_size=PIXELS)).eval()
    space, rows = ours.search_space(), []
    for layout, state in (("current", current), ("released", released)):
        with torch.no_grad():
            for tensor in ours.state_dict().values():
                tensor.zero_()  # what the other layout loaded is gone
        ours.load_ofa(state)
        for subnet in [space.smallest, space.largest, *space.sample(n - 2, 0)]:
            values = subnet.grouped()
            theirs.set_active_subnet(ks=values["ks"], e=values["e"], d=values["d"])
            ours.activate(subnet)
            with torch.no_grad():
                a, b, c = theirs(x), ours(x), ours.extract(subnet).eval()(x)
            rows.append(
                {
                    "layout": layout,
                    "subnet": str(subnet),
                    "active": (a - b).abs().max().item(),
                    "extracted": (a - c).abs().max().item(),
                    "scale": a.abs().max().item(),
                    "spread": a.std().item(),
                }
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    original = import_original(Path(sys.argv[1]))
    print(json.dumps({w: compare(original, w, int(sys.argv[2])) for w in WIDTHS}))
