# SPDX-License-Identifier: Apache-2.0
"""Print how far our logits are from those of HAT's own code: `hat_parity_program.py FOLDER N`.

FOLDER is a checkout of mit-han-lab/hardware-aware-transformers. A process of its own, as that code
is of another time: what it imports for reading data and options has stand-ins, none of which the
model needs.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_subnet import Subnet, extract
from lightning_subnet.supernets import ElasticTransformer

UNUSED = ("configargparse", "pyximport", "tensorboardX", "ujson")
COMPILED = ("fairseq.data.data_utils_fast", "fairseq.data.token_block_utils_fast")
ATTEND = {1: -1, 2: 1, 3: 2}
SIZES = {"positions": "fairseq", "pad": 1, "bos": 2, "eos": 2, "enc_depths": (3,), "qkv": 16}
SIZES |= {"heads": (2, 4), "ffn": (16, 32, 48), "attend": (1, 2, 3), "norm_first": False}
THEIRS = {"encoder_layers": 3, "decoder_layers": 3, "qkv_dim": 16}
THEIRS |= {"encoder_ffn_embed_dim": 48, "decoder_ffn_embed_dim": 48}
THEIRS |= {"encoder_embed_dim": 24, "decoder_embed_dim": 24}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shared": ({}, {"share_all_embeddings": True}),
    "separate": ({"source_vocab": 13, "tied": False}, {}),
    "tied": ({"source_vocab": 13}, {"share_decoder_input_output_embed": True}),
    "widths": (
        {"source_vocab": 13, "tied": False, "dec_embed": (16, 32)},
        {"decoder_embed_dim": 32},
    ),
    "norm_first": (
        {"source_vocab": 13, "tied": False, "norm_first": True, "attend": (1,)},
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
    ),
}


class _Nothing(types.ModuleType):
    """A module of which each name is a function that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def import_original(folder: Path) -> Any:
    """Return the module of their network."""
    sys.path.insert(0, str(folder))
    setattr(np, "float", float)  # noqa: B010 - a name of older numpy
    for name in (*UNUSED, *COMPILED):
        sys.modules[name] = _Nothing(name)
    from fairseq.models import transformer_super

    return transformer_super


def build(module: Any, source_vocab: int, vocab: int, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """Return their network and its arguments."""
    from fairseq.data import Dictionary

    dictionaries = {}
    for n in {source_vocab, vocab}:
        dictionaries[n] = Dictionary()
        for i in range(n - len(dictionaries[n])):
            dictionaries[n].add_symbol(f"word{i}")
    parser = argparse.ArgumentParser()
    module.TransformerSuperModel.add_args(parser)
    given = {k: v for k, v in vars(parser.parse_args([])).items() if v is not None}
    args = argparse.Namespace(**{**given, **sizes})
    module.base_architecture(args)
    task = types.SimpleNamespace(
        source_dictionary=dictionaries[source_vocab], target_dictionary=dictionaries[vocab]
    )
    return module.TransformerSuperModel.build_model(args, task), args


def setting_of(subnet: Subnet) -> dict[str, Any]:
    """Return a subnet in their words."""
    v = subnet.grouped()
    encoder = {
        "encoder_embed_dim": v["enc_embed"],
        "encoder_layer_num": v["enc_depth"],
        "encoder_ffn_embed_dim": v["enc_ffn"],
        "encoder_self_attention_heads": v["enc_heads"],
    }
    decoder = {
        "decoder_embed_dim": v["dec_embed"],
        "decoder_layer_num": v["dec_depth"],
        "decoder_ffn_embed_dim": v["dec_ffn"],
        "decoder_self_attention_heads": v["dec_heads"],
        "decoder_ende_attention_heads": v["cross_heads"],
        "decoder_arbitrary_ende_attn": [ATTEND.get(n) for n in v["attend"]],
    }
    return {"encoder": encoder, "decoder": decoder}


def decoded(theirs: Any, source: torch.Tensor, n_steps: int) -> torch.Tensor:
    """Return tokens that their incremental decoding takes greedily."""
    memory, state = theirs.encoder(source, None), {}
    tokens = torch.full((len(source), 1), 2)
    for _ in range(n_steps):
        logits = theirs.decoder(tokens, memory, state)[0][:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[:, 1:]


@torch.no_grad()
def compare(module: Any, variant: str, n: int) -> list[dict[str, Any]]:
    """Return the largest difference and the largest logit of n subnets."""
    ours, sizes = VARIANTS[variant]
    net = ElasticTransformer.tiny(**{**SIZES, **ours}).eval()
    vocab, source_vocab = net.config.vocab, net.config.source_vocab or net.config.vocab
    theirs, args = build(module, source_vocab, vocab, {**THEIRS, **sizes})
    theirs.eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    net.load_hat({"args": args, "model": theirs.state_dict()})
    source, target = torch.randint(3, source_vocab, (4, 7)), torch.randint(3, vocab, (4, 5))
    target[:, 0] = 2
    source[1, -3:] = source[2, :4] = target[3, -2:] = 1
    space, rows = net.search_space(), []
    for subnet in [space.smallest, space.largest, *space.sample(n - 2, 0)]:
        theirs.set_sample_config(setting_of(subnet))
        net.activate(subnet)
        expected = theirs(source, None, target)[0]
        outputs = net(source, target), extract(net, subnet)(source, target)
        rows.append(
            {
                "subnet": str(subnet),
                "difference": max((y - expected).abs().max().item() for y in outputs),
                "scale": expected.abs().max().item(),
                "spread": expected.std().item(),
                "decoding": torch.equal(
                    net.generate(source, 6, stop=False), decoded(theirs, source, 6)
                ),
            }
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    original = import_original(Path(sys.argv[1]))
    torch.manual_seed(0)
    print(json.dumps({v: compare(original, v, int(sys.argv[2])) for v in VARIANTS}))
