# SPDX-License-Identifier: Apache-2.0
"""A BERT with the methods of DynaBERT's (huawei-noah/Pretrained-Language-Model).

Layers read `width_mult` and slice their weights in `forward`; the encoder reads `depth_mult` and
leaves layers out evenly. Inputs come by name, with a mask, and outputs are an object.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import register_pytree_node

from lightning_subnet import SearchSpace, Subnet, elastic
from tests.families.family import CLASSES, LENGTH, VOCAB, Family, LitText, labelled_texts, seeded

HIDDEN, HEADS, INNER, LAYERS = 24, 4, 48, 4


@dataclass
class Output(OrderedDict[str, Any]):
    """What the network returns, as transformers has it: fields by name, but those that are None.

    It is known to torch's trees, as `transformers.utils.ModelOutput` makes its subclasses.
    """

    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    loss: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(**dict(zip(names, values, strict=True))),
    serialized_type_name=f"{Output.__module__}.{Output.__name__}",
)


def round_to_nearest(size: int, width_mult: float) -> int:
    return max(1, int(round(HEADS * width_mult) / HEADS * size))


class DynaLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, dyna_dim: tuple[bool, bool]) -> None:
        super().__init__(inputs, outputs)
        self.in_features_max, self.out_features_max = inputs, outputs
        self.width_mult, self.dyna_dim = 1.0, dyna_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dyna_dim[0]:
            self.in_features = round_to_nearest(self.in_features_max, self.width_mult)
        if self.dyna_dim[1]:
            self.out_features = round_to_nearest(self.out_features_max, self.width_mult)
        weight = self.weight[: self.out_features, : self.in_features]
        return F.linear(x, weight, self.bias[: self.out_features])


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value"):
            setattr(self, name, DynaLinear(HIDDEN, HIDDEN, (False, True)))
        self.attention_output = DynaLinear(HIDDEN, HIDDEN, (True, False))
        self.attention_norm, self.output_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.intermediate = DynaLinear(HIDDEN, INNER, (False, True))
        self.output = DynaLinear(INNER, HIDDEN, (True, False))
        self.dropout = nn.Dropout(0.1)
        self.num_attention_heads = HEADS

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, HIDDEN // HEADS).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.num_attention_heads = round(HEADS * self.query.width_mult)
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS) + mask
        y = self.dropout(scores.softmax(-1)) @ v
        y = y.transpose(1, 2).contiguous().flatten(2)
        x = self.attention_norm(x + self.dropout(self.attention_output(y)))
        y = self.output(F.gelu(self.intermediate(x)))
        return self.output_norm(x + self.dropout(y))


class BertEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer() for _ in range(LAYERS))
        self.depth_mult = 1.0

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        states: tuple[torch.Tensor, ...] = ()
        for i in range(round(self.depth_mult * LAYERS)):
            states = (*states, x)
            x = self.layer[math.floor(i / self.depth_mult)](x, mask)
        return x, (*states, x)


class BertForSequenceClassification(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, HIDDEN)
        self.position_embeddings = nn.Embedding(LENGTH, HIDDEN)
        self.token_type_embeddings = nn.Embedding(2, HIDDEN)
        self.norm, self.dropout = nn.LayerNorm(HIDDEN), nn.Dropout(0.1)
        self.encoder, self.pooler = BertEncoder(), nn.Linear(HIDDEN, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> Output:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        mask = attention_mask[:, None, None].to(dtype=next(self.parameters()).dtype)
        places = torch.arange(input_ids.size(1), device=input_ids.device)[None]
        x = self.word_embeddings(input_ids) + self.position_embeddings(places)
        x = self.dropout(self.norm(x + self.token_type_embeddings(token_type_ids)))
        x, states = self.encoder(x, (1.0 - mask) * -10000.0)
        pooled = self.dropout(self.pooler(x[:, 0]).tanh())
        return Output(self.classifier(pooled), states)


def activate(net: nn.Module, subnet: Subnet) -> None:
    net.apply(lambda module: setattr(module, "depth_mult", subnet["depth_mult"]))
    net.apply(lambda module: setattr(module, "width_mult", subnet["width_mult"]))


def bert() -> LitText:
    net = elastic(
        seeded(BertForSequenceClassification),
        space=SearchSpace(depth_mult=[0.5, 0.75, 1.0], width_mult=[0.25, 0.5, 0.75, 1.0]),
        activate=activate,
    )
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    return LitText(net, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


FAMILIES = [
    Family(
        "DynaBERT",
        bert,
        labelled_texts,
        "net = elastic(net, space=SearchSpace(depth_mult=[0.5, 0.75, 1.0], "
        "width_mult=[0.25, 0.5, 0.75, 1.0]), activate=lambda net, s:\n"
        "              [net.apply(lambda module: setattr(module, name, s[name])) for name in s])",
        "Hou et al., DynaBERT, NeurIPS 2020; huawei-noah/Pretrained-Language-Model",
    )
]
