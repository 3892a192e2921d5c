"""A Hugging Face encoder with exits: the module that training optimises and every executor runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import EarlyExitConfig
from engine.models.exits import ExitHeads, ExitOutputs
from engine.models.families import family_of


class MultiExitEncoder(nn.Module):
    """backbone (BertModel, RobertaModel or MPNetModel, possibly wrapped by peft) + exits.

    The backbone is used without its own pooler: exits read the first token through theirs.
    """

    def __init__(self, backbone: nn.Module, config: EarlyExitConfig):
        super().__init__()
        self.family = family_of(backbone.config)
        if backbone.config.num_hidden_layers != config.num_layers:
            raise ValueError(
                f"early_exit.num_layers is {config.num_layers}, the backbone has {backbone.config.num_hidden_layers}"
            )
        longest = self.family.longest(backbone.config)
        if config.max_length > longest:
            raise ValueError(f"max_length is {config.max_length}, the backbone's position table serves {longest}")
        self.config = config
        self.backbone = backbone
        self.exits = ExitHeads(config, backbone.config.hidden_size)
        # The backbone's own pooler is kept out of the module: it would be dead weight and an unused parameter.
        if getattr(backbone, "pooler", None) is not None:
            self._initialise_poolers(backbone.pooler.dense)
            backbone.pooler = None

    @torch.no_grad()
    def _initialise_poolers(self, pretrained: nn.Linear) -> None:
        for pooler in self.exits.poolers:
            pooler.weight.copy_(pretrained.weight)
            pooler.bias.copy_(pretrained.bias)

    @property
    def encoder_backbone(self) -> nn.Module:
        """The Hugging Face model itself, also when peft has wrapped it."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone

    @property
    def device(self) -> torch.device:
        return self.exits.classifiers[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.exits.classifiers[0].weight.dtype

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Padded forward at full depth. input_ids, attention_mask [B, S] -> outputs of layers 1 ... L, each [B, S, H].

        Padding may stand on either side: position ids count each row's own tokens, from where the family starts.
        """
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0) + self.family.first_position
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
        if self.family.token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        return list(self.backbone(**inputs, output_hidden_states=True, return_dict=True).hidden_states[1:])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        early_gradient: float = 1.0,
    ) -> ExitOutputs:
        """What every exit says of every row: all layers run, all exits are read (training and the reference).

        early_gradient scales what all exits but the last send back into the backbone.
        """
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids)
        first = attention_mask.long().argmax(-1)  # a left-padded row's first token is not in column 0
        rows = torch.arange(len(first), device=first.device)
        first_tokens = [hidden[layer - 1][rows, first] for layer in self.config.exit_layers]
        if early_gradient != 1 and torch.is_grad_enabled():
            for read in first_tokens[:-1]:
                if read.requires_grad:
                    read.register_hook(lambda gradient: gradient * early_gradient)
        return self.exits(first_tokens)

    def policy_parameters(self) -> list[nn.Parameter]:
        """phi: the policies."""
        return list(self.exits.policies.parameters())

    def reading_parameters(self) -> list[nn.Parameter]:
        """What an exit reads and classifies with: poolers and classifiers."""
        return [*self.exits.poolers.parameters(), *self.exits.classifiers.parameters()]

    def task_parameters(self) -> list[nn.Parameter]:
        """theta: what training may change outside the policies (backbone or its adapters, poolers, classifiers)."""
        policy = {id(p) for p in self.policy_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in policy]
