# SPDX-License-Identifier: Apache-2.0
"""Networks of timm and transformers, of tiny configurations, with the groups that each must have.

The numbers of groups are those of the architecture: each comment says where they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.zoo.torchvision_operators import define

try:
    import torchvision  # noqa: F401 - with its compiled operators, or it fails
except (ImportError, RuntimeError):
    OPERATORS = define()

import timm
import transformers as hf


@dataclass(frozen=True)
class Case:
    """A network of the zoo.

    Args:
        build: Makes it.
        inputs: Makes an example of so many rows.
        width: Number of groups of inner channels.
        heads: Number of groups of attention heads.
        stream: Number of groups of channels that blocks add to.
        refused: The layers whose channels do not vary.
        depth: Whether it has blocks that may be left out.
        not_onnx: Why it is not converted to ONNX.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    width: int
    heads: int = 0
    stream: int = 0
    refused: tuple[str, ...] = ()
    depth: bool = True
    not_onnx: str = ""


def image(size: int = 32) -> Callable[[int], torch.Tensor]:
    return lambda n: torch.randn(n, 3, size, size)


def pixels(size: int = 32) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda n: {"pixel_values": torch.randn(n, 3, size, size)}


def tokens(n: int, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randint(3, 100, (n, 8)) for name in names or ("input_ids",)}


def vision(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **config)


def efficientnet() -> nn.Module:
    """Return an EfficientNet-B0 of half as many blocks."""
    make = timm.models.efficientnet._gen_efficientnet
    return make("efficientnet_b0", depth_multiplier=0.5, num_classes=10)


def language(network: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: network(config())


LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip
BERT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 100,
}  # fmt: skip
VIT = {**BERT, "image_size": 32, "patch_size": 8}
del VIT["vocab_size"]


CASES: dict[str, Case] = {
    "resnet18": Case(vision("resnet18"), image(), 8, stream=4),
    # 10 expansions, 9 gates, the stem and the outputs of four stages of one block
    "mobilenetv3": Case(vision("mobilenetv3_small_100"), image(), 23, stream=4),
    # 9 expansions, 10 gates, the stem, the head and the outputs of four stages of one block
    "efficientnet": Case(efficientnet, image(), 25, stream=3),
    "vit": Case(vision("vit_tiny_patch16_224", img_size=32, depth=2), image(), 2, 2, 1),
    "convnext": Case(vision("convnext_atto", depths=(1, 1, 2, 1)), image(), 5, stream=4),
    "swin": Case(
        vision(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1, 1, 1),
            embed_dim=48, num_heads=(2, 2, 4, 4),
        ),
        image(), 4, 4, 4,
    ),
    # the stem, two convolutions of each of four layers, and the one between the blocks
    "densenet": Case(
        vision("densenet121", growth_rate=16, block_config=(2, 2)), image(), 10,
        depth=False,
    ),
    # the groups of 13 grouped convolutions, the stem and the outputs of two stages of one block
    "regnet": Case(vision("regnetx_002"), image(), 16, stream=2),
    "bert": Case(
        language(hf.BertForSequenceClassification, lambda: hf.BertConfig(**BERT)), tokens, 3, 2, 1
    ),
    "distilbert": Case(
        language(
            hf.DistilBertForMaskedLM,
            lambda: hf.DistilBertConfig(
                dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=100
            ),
        ),
        tokens, 2, 2, 1,
    ),
    "gpt2": Case(
        language(
            hf.GPT2LMHeadModel,
            lambda: hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100),
        ),
        tokens, 2, 2, 1,
    ),
    "llama": Case(language(hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**LLAMA)), tokens, 2, 2, 1),
    "qwen3": Case(
        language(hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**LLAMA, head_dim=16)), tokens, 2, 2, 1
    ),
    "gemma2": Case(
        language(hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**LLAMA, head_dim=16)),
        tokens, 2, 2, 1,
        depth=False,  # each layer is the first of its kind, by which a cache tells its length
    ),
    "t5": Case(
        language(
            hf.T5ForConditionalGeneration,
            lambda: hf.T5Config(
                d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=128, vocab_size=100
            ),
        ),
        lambda n: tokens(n, "input_ids", "decoder_input_ids"), 4, 3, 1,
        not_onnx="whole T5 does not convert either, with its cache of its own class",
    ),
    "whisper": Case(
        language(
            hf.WhisperForConditionalGeneration,
            lambda: hf.WhisperConfig(
                d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
                vocab_size=100, num_mel_bins=16, max_source_positions=16, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            ),
        ),
        lambda n: {
            "input_features": torch.randn(n, 16, 32), **tokens(n, "decoder_input_ids")
        },
        3, 3, 2,  # one of the convolutions before the encoder is an inner one
    ),
    "clip": Case(
        language(
            hf.CLIPModel,
            lambda: hf.CLIPConfig(
                text_config={**BERT, "eos_token_id": 99}, vision_config=VIT, projection_dim=32
            ),
        ),
        lambda n: {**tokens(n), **pixels()(n)}, 4, 4, 2,
    ),
    "hf-vit": Case(
        language(hf.ViTForImageClassification, lambda: hf.ViTConfig(**VIT)), pixels(), 2, 2, 1
    ),
    "mixtral": Case(
        language(
            hf.MixtralForCausalLM,
            lambda: hf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
        ),
        tokens, 0, 2,  # which expert a token gets depends on the whole stream
    ),
    "bloom": Case(
        language(
            hf.BloomForCausalLM,
            lambda: hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=100),
        ),
        tokens, 2, 0, 1,
        # The slopes of its biases are those of another number of heads.
        refused=tuple(f"heads.transformer.h.{i}.self_attention" for i in range(2)),
        depth=False,
    ),
    "phi": Case(
        language(
            hf.PhiForCausalLM,
            lambda: hf.PhiConfig(**{**LLAMA, "num_key_value_heads": 4}),
        ),
        tokens, 2, 2, 1,
    ),
    "opt": Case(
        language(
            hf.OPTForCausalLM,
            lambda: hf.OPTConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
                vocab_size=100, word_embed_proj_dim=64, max_position_embeddings=32
            ),
        ),
        tokens, 2, 2, 1,
    ),
}  # fmt: skip
