# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of HAT's own code: its sizes, names and layout, and what it computes otherwise.

That code is a fork of fairseq 0.8: `fairseq/models/transformer_super.py` and `fairseq/modules/` of
mit-han-lab/hardware-aware-transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_subnet.errors import SpaceError
from lightning_subnet.supernets._blocks.checkpoints import check_weights
from lightning_subnet.supernets._blocks.transformer_config import TransformerConfig

# A dictionary of fairseq begins with <s>, <pad>, </s>; its generator begins a target with </s>.
FAIRSEQ: dict[str, Any] = {"positions": "fairseq", "pad": 1, "bos": 2, "eos": 2}

# What differs from the defaults of TransformerConfig, by task; None has to be given.
HAT_TASKS: dict[str, dict[str, Any]] = {
    "wmt14.en-de": {"vocab": 32_768},
    "wmt14.en-fr": {"vocab": None},
    "wmt19.en-de": {"vocab": None},
    "iwslt14.de-en": {
        "vocab": None,
        "source_vocab": None,
        "ffn": (512, 1024, 2048),
        "heads": (2, 4),
        "tied": False,
    },
}

_PARTS = {
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "attention_norm",
    "encoder_attn.out_proj": "cross.out",
    "encoder_attn_layer_norm": "cross_norm",
    "fc1": "inner",
    "fc2": "outer",
    "final_layer_norm": "feed_norm",
}
_ATTENTIONS = {"self_attn": "attention", "encoder_attn": "cross"}
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_NAME = re.compile(r"(en|de)coder\.(embed_|layers\.|layer_norm\.|version$)")
# Of no influence: a number of the format, and sinusoids, which older checkpoints hold themselves.
_IGNORED = (".version", ".embed_positions._float_tensor", ".embed_positions.weights")
_FIXED = {  # arguments of HAT's code that are nowhere among the weights, and their usual values
    "activation_fn": "relu",
    "vocab_original_scaling": False,
    "no_token_positional_embeddings": False,
}


def load_hat(net: nn.Module, config: TransformerConfig, checkpoint: object) -> None:
    """Load a checkpoint of HAT into an elastic Transformer, if all of it fits.

    Args:
        net: The super-network.
        config: Its sizes.
        checkpoint: HAT's state dict, or a dictionary with that under `"model"` and, if it is there,
            HAT's arguments under `"args"`.

    Raises:
        SpaceError: It does not fit; nothing is loaded then.
    """
    state, arguments = _state(checkpoint)
    _check_tokens(config)
    own = net.state_dict()
    layout = dict(_layout(config, own, state))
    shapes = {
        name: (sum(len(own[part]) for part in parts), *own[parts[0]].shape[1:])
        for name, parts in layout.items()
    }
    _check_output(config, state)
    check_weights(type(net).__name__, shapes, state)
    _check_attention(config)
    _check_arguments(config, arguments)
    source, target = (state[name] for name in _TABLES)
    if config.source_vocab is None and not torch.equal(source, target):
        msg = (
            "The checkpoint has tables of its own for source and target, and this network one for "
            "both. Build the network with source_vocab=."
        )
        raise SpaceError(msg)
    weights: dict[str, torch.Tensor] = {}
    for name, parts in layout.items():
        slices = torch.split(state[name], [len(own[part]) for part in parts])
        weights.update(zip(parts, slices, strict=True))
    net.load_state_dict(weights)


def _state(checkpoint: object) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors of a checkpoint that count, and HAT's arguments or None."""
    hint = "Pass the state dict of a TransformerSuperModel, or the checkpoint with that as 'model'."
    if not isinstance(checkpoint, Mapping):
        msg = (
            f"load_hat() got a {type(checkpoint).__name__}, which is not a dictionary. {hint} "
            "torch.load(path, map_location='cpu', weights_only=False) reads one from a file."
        )
        raise SpaceError(msg)
    inner = checkpoint.get("model")
    state, arguments = (
        (inner, checkpoint.get("args")) if isinstance(inner, Mapping) else (checkpoint, None)
    )
    for name, tensor in state.items():
        if not _NAME.match(str(name)):
            msg = f"{name!r} is not a name of HAT's network. {hint}"
            raise SpaceError(msg)
        if not isinstance(tensor, torch.Tensor):
            msg = f"{name!r} is a {type(tensor).__name__}, not a tensor. {hint}"
            raise SpaceError(msg)
    if not state:
        msg = f"The state dict is empty. {hint}"
        raise SpaceError(msg)
    return {k: v for k, v in state.items() if not k.endswith(_IGNORED)}, arguments


def _check_tokens(config: TransformerConfig) -> None:
    """Refuse a network with other positions or special tokens than HAT's."""
    for name, value in FAIRSEQ.items():
        if getattr(config, name) != value:
            msg = (
                f"{name}={getattr(config, name)!r} of this network is {value!r} in HAT. Build it "
                "with ElasticTransformer.hat(task, vocab=...), or with "
                f"{', '.join(f'{n}={v!r}' for n, v in FAIRSEQ.items())}."
            )
            raise SpaceError(msg)


def _check_attention(config: TransformerConfig) -> None:
    """Refuse a network that attends to other layers than HAT, whatever the weights are."""
    several = max(config.attend) > 1
    if several and len(config.enc_depths) > 1:
        msg = (
            f"With enc_depths={config.enc_depths!r} and attend={config.attend!r} HAT attends to "
            "the last layer again in place of those that a shallower encoder skips, which this "
            "network does not. Build it with one depth of the encoder, or with attend=(1,)."
        )
        raise SpaceError(msg)
    if several and config.norm_first:
        msg = (
            f"With norm_first=True and attend={config.attend!r} HAT normalises the last encoder "
            "layer's output and none of the others, and this network all of them. Build it with "
            "attend=(1,)."
        )
        raise SpaceError(msg)


def _check_arguments(config: TransformerConfig, arguments: Any) -> None:
    """Refuse what HAT's arguments say and its weights do not, where it is another network."""
    for name, value in _FIXED.items():
        if getattr(arguments, name, value) != value:
            msg = (
                f"The checkpoint was trained with {name}={getattr(arguments, name)!r}, which is "
                f"not supported: ElasticTransformer computes what HAT does with {value!r}."
            )
            raise SpaceError(msg)
    for side in ("encoder", "decoder"):
        name = f"{side}_normalize_before"
        if getattr(arguments, name, config.norm_first) != config.norm_first:
            msg = (
                f"The checkpoint was trained with {name}={getattr(arguments, name)!r}, and this "
                f"network has norm_first={config.norm_first!r} on both sides."
            )
            raise SpaceError(msg)


def _check_output(config: TransformerConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse an output layer of its own where there is none here, and the reverse."""
    own = "decoder.embed_out" in state
    if own is config.tied:
        msg = (
            f"The checkpoint has {'an' if own else 'no'} output layer of its own "
            f"('decoder.embed_out'). Build the network with tied={not own}."
        )
        raise SpaceError(msg)


def _layout(
    config: TransformerConfig, own: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name of HAT, and our names of what it holds one above the other."""
    source = "target.weight" if config.source_vocab is None else "source.weight"
    yield from zip(_TABLES, ((source,), ("target.weight",)), strict=True)
    if not config.tied:
        yield "decoder.embed_out", ("output.weight",)
    for side in ("encoder", "decoder"):
        if config.norm_first:
            for kind in ("weight", "bias"):
                yield f"{side}.layer_norm.{kind}", (f"{side}_norm.{kind}",)
        depth = max(config.enc_depths if side == "encoder" else config.dec_depths)
        for i in range(depth):
            pairs = _layer_layout(f"{side}.layers.{i}", f"{side}.{i}", state)
            yield from (pair for pair in pairs if pair[1][0] in own)


def _layer_layout(
    theirs: str, ours: str, state: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name of a layer that attends to a memory, and our names of what it holds."""
    for name, part in _ATTENTIONS.items():
        rows = [f"{ours}.{part}.{x}" for x in "qkv"]
        if f"{theirs}.{name}.q_proj_weight" in state:  # where the sides' widths differ
            for row in rows:
                yield f"{theirs}.{name}.{row[-1]}_proj_weight", (f"{row}.weight",)
        else:
            yield f"{theirs}.{name}.in_proj_weight", tuple(f"{row}.weight" for row in rows)
        yield f"{theirs}.{name}.in_proj_bias", tuple(f"{row}.bias" for row in rows)
    for name, part in _PARTS.items():
        for kind in ("weight", "bias"):
            yield f"{theirs}.{name}.{kind}", (f"{ours}.{part}.{kind}",)
