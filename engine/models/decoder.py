"""A Hugging Face LLaMA with exits: the module that training optimises and every executor runs.

method: ConsistentEE (AAAI 2024), its generation part. An exit reads n = Norm(h) with the model's *final* norm, shared
by all layers; the policy is the two-layer MLP of the paper on n, the head the model's own with a change of low rank, or
one of the exit's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.config import DecoderExitConfig
from engine.models.exits import INIT_STD, ExitPolicy

# RoPE whose frequencies depend on the position alone: cached keys stay right as a sequence grows.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class HeadDelta(nn.Module):
    """What one exit adds to the shared head, rank R: "hidden": logits = W (n + B A n), A [R, H], B [H, R];
    "logits": logits = W n + B A n, A [R, H], B [V, R]. B starts at zero: a fresh exit has the shared head."""

    def __init__(self, hidden_size: int, outputs: int, rank: int):
        super().__init__()
        self.a = nn.Linear(hidden_size, rank, bias=False)
        self.b = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.a.weight, std=INIT_STD)
        nn.init.zeros_(self.b.weight)

    def forward(self, n: Tensor) -> Tensor:
        return self.b(self.a(n))


class DecoderExits(nn.Module):
    """Policies (E - 1: none at the last layer), what the E exits' heads have of their own, and CALM's early-exit
    classifier where it is asked for: one linear layer that all exits but the last share."""

    def __init__(self, config: DecoderExitConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config = config
        self.policies = nn.ModuleList(
            ExitPolicy(hidden_size, config.policy_hidden_size) for _ in config.exit_layers[:-1]
        )
        self.early_exit_classifier = nn.Linear(hidden_size, 1) if config.early_exit_classifier else None
        self.deltas, self.heads = nn.ModuleList(), nn.ModuleList()
        if config.head == "lora":
            outputs = hidden_size if config.head_side == "hidden" else vocab_size
            self.deltas.extend(HeadDelta(hidden_size, outputs, config.head_rank) for _ in config.exit_layers)
        elif config.head == "own":
            self.heads.extend(nn.Linear(hidden_size, vocab_size, bias=False) for _ in config.exit_layers)
        for policy in self.policies:
            for linear in (policy.dense, policy.out):
                nn.init.normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)

    def logits(self, exit_index: int, n: Tensor, shared: nn.Module) -> Tensor:
        """n [..., H], final-normed states that leave through exit ``exit_index`` -> next-token logits [..., V]."""
        if self.config.head == "own":
            return self.heads[exit_index](n)
        if self.config.head == "shared":
            return shared(n)
        delta = self.deltas[exit_index](n)
        return shared(n + delta) if self.config.head_side == "hidden" else shared(n) + delta


class MultiExitDecoder(nn.Module):
    """causal_lm (LlamaForCausalLM, possibly wrapped by peft) + exits."""

    def __init__(self, causal_lm: nn.Module, config: DecoderExitConfig):
        super().__init__()
        hf = causal_lm.config
        if hf.model_type != "llama":
            raise ValueError(f"the decoder's architecture must be llama, got {hf.model_type!r}")
        if hf.num_hidden_layers != config.num_layers:
            raise ValueError(f"early_exit.num_layers is {config.num_layers}, the backbone has {hf.num_hidden_layers}")
        if config.max_length > hf.max_position_embeddings:
            raise ValueError(
                f"max_length is {config.max_length}, the backbone's positions end at {hf.max_position_embeddings}"
            )
        rope = hf.rope_parameters["rope_type"]
        if rope not in _FIXED_ROPE:
            raise ValueError(
                f"RoPE scaling {rope!r} changes with the length of the sequence, so cached keys would be wrong; "
                f"allowed are {', '.join(_FIXED_ROPE)}"
            )
        self.config = config
        self.causal_lm = causal_lm
        self.exits = DecoderExits(config, hf.hidden_size, hf.vocab_size)
        if config.head == "own":  # every exit starts as the pretrained head
            with torch.no_grad():
                for head in self.exits.heads:
                    head.weight.copy_(self.language_model.lm_head.weight)

    @property
    def language_model(self) -> nn.Module:
        """The Hugging Face model itself, also when peft has wrapped it."""
        return self.causal_lm.get_base_model() if hasattr(self.causal_lm, "get_base_model") else self.causal_lm

    @property
    def backbone(self) -> nn.Module:
        return self.language_model.model

    @property
    def device(self) -> torch.device:
        return self.backbone.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.norm.weight.dtype

    def final_norm(self, hidden: Tensor) -> Tensor:
        """h [..., H] -> n, what policies and heads of every exit read."""
        return self.backbone.norm(hidden)

    def exit_logits(self, exit_index: int, n: Tensor) -> Tensor:
        """Next-token logits [..., V] of exit ``exit_index`` (0 ... E-1) for n [..., H]."""
        return self.exits.logits(exit_index, n, self.language_model.lm_head)

    def policy_logits(self, exit_index: int, n: Tensor) -> Tensor:
        """z [...] in fp32 (fp64 for fp64); sigmoid(z) is the exit probability. The last exit has none: it exits."""
        z = self.exits.policies[exit_index](n)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def classifier_logits(self, n: Tensor) -> Tensor:
        """CALM's early-exit classifier (Schuster et al. 2022, 3.5) in fp32 (fp64 for fp64): sigmoid of it is how likely
        the exit's next token is that of the last exit. n [..., H] -> [...]. Only where the config has one."""
        z = self.exits.early_exit_classifier(n).squeeze(-1)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, head_dim] of positions [T], in the model's dtype."""
        like = self.backbone.norm.weight
        cos, sin = self.backbone.rotary_emb(like, positions[None])
        return cos[0], sin[0]

    def layer_outputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        exit_layers: Tensor | Callable[[int, Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Teacher-forced pass with state copying. input_ids [B, S] -> outputs of layers 1 ... L, each [B, S, H].

        attention_mask [B, S] of 0 and 1 (None: all 1); padding may stand on either side.
        exit_layers    int [B, S]: from this layer on a position keeps its hidden state, and later layers take its keys
                       and values from there (state copying: Elbayad et al. 2020; CALM). None: all at full depth. A
                       function is asked behind every layer, with its number and output, for what holds from there on
        """
        backbone = self.backbone
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        hidden = backbone.embed_tokens(input_ids)
        size = input_ids.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool, device=hidden.device).tril()
        # A padded position sees itself alone: it is never read, and a row of nothing would be NaN.
        allowed = (seen & mask[:, None, :].bool()) | torch.eye(size, dtype=torch.bool, device=hidden.device)
        bias = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        bias = bias.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[:, None]
        rope = backbone.rotary_emb(hidden, positions)
        outputs = []
        left = None if callable(exit_layers) else exit_layers
        for number, layer in enumerate(backbone.layers, start=1):
            out = layer(hidden, attention_mask=bias, position_ids=positions, position_embeddings=rope)
            out = out[0] if isinstance(out, tuple) else out
            hidden = out if left is None else torch.where((left < number)[..., None], hidden, out)
            outputs.append(hidden)
            if callable(exit_layers):
                left = exit_layers(number, hidden)
        return outputs

    def policy_parameters(self) -> list[nn.Parameter]:
        """phi: the policies."""
        return list(self.exits.policies.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """What the exits' heads have of their own."""
        return [*self.exits.deltas.parameters(), *self.exits.heads.parameters()]
