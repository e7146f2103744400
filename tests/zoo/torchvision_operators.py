# SPDX-License-Identifier: Apache-2.0
"""The names of torchvision's compiled operators, which a CPU build of torch does not load.

timm and transformers import torchvision, whose modules look these names up when they are imported.
None of the networks here calls one.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    "qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    "roi_align(Tensor input, Tensor boxes, float scale, int height, int width, int ratio,"
    " bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor boxes, float scale, int height, int width) -> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor boxes, float scale, int height, int width, int ratio)"
    " -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor boxes, float scale, int height, int width)"
    " -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias,"
    " SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h,"
    " SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
)


def define() -> torch.library.Library:
    """Return a library with these names, which lives as long as the object."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library
