"""Where the parts of a layer stand in each Hugging Face encoder family, and how its positions are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerParts(NamedTuple):
    """The modules of one post-LayerNorm encoder layer, by role."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.LayerNorm
    intermediate: nn.Module
    output: nn.Module
    output_norm: nn.LayerNorm


@dataclass(frozen=True)
class Family:
    """One encoder architecture.

    model_type       Hugging Face's name in config.json
    first_position   position id of a row's first token; RoBERTa and MPNet start behind their padding id (1)
    token_types      whether token_type_ids mean anything to the model
    position_bias    whether one relative-position bias is added to the scores of all layers (MPNet)
    """

    model_type: str
    first_position: int
    token_types: bool
    position_bias: bool

    def layers(self, backbone: nn.Module) -> nn.ModuleList:
        return backbone.encoder.layer

    def parts(self, layer: nn.Module) -> LayerParts:
        if self.model_type == "mpnet":
            attn, norm = layer.attention.attn, layer.attention.LayerNorm
            qkvo = (attn.q, attn.k, attn.v, attn.o)
        else:
            attn, norm = layer.attention.self, layer.attention.output.LayerNorm
            qkvo = (attn.query, attn.key, attn.value, layer.attention.output.dense)
        return LayerParts(*qkvo, norm, layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)

    def longest(self, backbone_config) -> int:
        """The longest row, in tokens, that the position table can serve."""
        return backbone_config.max_position_embeddings - self.first_position

    def relative_bias(self, backbone: nn.Module, max_length: int) -> Tensor | None:
        """[num_heads, 2 * max_length - 1]: bias for key position minus query position + max_length - 1."""
        if not self.position_bias:
            return None
        encoder = backbone.encoder
        table = encoder.relative_attention_bias
        distance = torch.arange(-(max_length - 1), max_length, device=table.weight.device)
        bucket = encoder.relative_position_bucket(distance, num_buckets=backbone.config.relative_attention_num_buckets)
        return table(bucket).T.contiguous()


FAMILIES = {
    "bert": Family("bert", first_position=0, token_types=True, position_bias=False),
    "roberta": Family("roberta", first_position=2, token_types=True, position_bias=False),
    "mpnet": Family("mpnet", first_position=2, token_types=False, position_bias=True),
}


def family_of(backbone_config) -> Family:
    """The family of a Hugging Face config; ValueError for one that the executors cannot serve."""
    model_type = getattr(backbone_config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: allowed are {', '.join(FAMILIES)}")
    if backbone_config.hidden_act != "gelu":
        raise ValueError(
            f"hidden_act {backbone_config.hidden_act!r} is not supported: the kernels compute the erf form, 'gelu'"
        )
    if getattr(backbone_config, "is_decoder", False) or getattr(backbone_config, "add_cross_attention", False):
        raise ValueError("the backbone is configured as a decoder; an encoder (is_decoder=False) is needed")
    position_type = getattr(backbone_config, "position_embedding_type", "absolute")
    if position_type != "absolute":
        raise ValueError(f"position_embedding_type {position_type!r} is not supported: allowed is 'absolute'")
    return FAMILIES[model_type]
