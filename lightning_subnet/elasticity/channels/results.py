# SPDX-License-Identifier: Apache-2.0
"""Those outputs of a network that say what it computes: no caches, and no states beside logits."""

from __future__ import annotations

from typing import Any

import torch

from lightning_subnet._torch.outputs import named_outputs


def results(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors in the output of a network that a subnet must have, too, by name.

    Caches are none of them: their size is that of the heads. Networks of transformers with a task
    also hand out inner states (`encoder_last_hidden_state`) beside their loss and logits; as these
    are as wide as the layers that made them, they are none either.

    Args:
        output: What `forward` returned.

    Example:
        >>> list(results({"logits": torch.zeros(2), "past_key_values": torch.zeros(2)}))
        ['logits']
    """
    named = {n: x for n, x in named_outputs(output).items() if "past_key_values" not in n}
    if any(cls.__name__ == "ModelOutput" for cls in type(output).__mro__):
        of_task = {n: x for n, x in named.items() if "logits" in n or "loss" in n}
        return of_task or named
    return named
