"""Small random LLaMAs whose policies are spread out, and random requests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import DecoderExitConfig
from engine.decoding.requests import Request, Sampling
from engine.loading import save_checkpoint
from engine.models.decoder import MultiExitDecoder

VOCAB, LAYERS = 61, 5


def tiny_decoder(
    exit_layers=(1, 2, 3, 4, 5),
    head="lora",
    kv_heads=2,
    rope=None,
    tied=True,
    seed=0,
    vocab=VOCAB,
    positions=128,
    hidden=32,
    **options,
):
    """Weights large enough for exits to disagree about the next token; policies above and below zero."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=56,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    sizes = dict(head_rank=3, policy_hidden_size=6, max_length=positions)
    exits = DecoderExitConfig(LAYERS, exit_layers, head=head, **(sizes | options))
    model = MultiExitDecoder(LlamaForCausalLM(config), exits)
    with torch.no_grad():
        for norm in (m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
            norm.weight.add_(torch.randn_like(norm.weight) * 0.2)
        for policy in model.exits.policies:
            policy.dense.weight.normal_(std=0.8)
            policy.out.weight.normal_(std=2.0)
            policy.out.bias.fill_(-3.0)
        for parameter in model.head_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def byte_tokenizer():
    """Every byte is a token: half a character comes often."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: 2 + k for k, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    return tokenizer


def random_requests(count, seed=0, longest=20, new=12, exits=None, forced=False, **fields):
    """Ragged prompts and lengths. exits: script every token's exit among these layers."""
    g = torch.Generator().manual_seed(seed)

    def draw(high, size):
        return tuple(torch.randint(high, (size,), generator=g).tolist())

    requests = []
    for k in range(count):
        steps = 1 + draw(new, 1)[0]
        script = None if exits is None else tuple(exits[i] for i in draw(len(exits), steps))
        given = draw(VOCAB, steps) if forced else None
        prompt = draw(VOCAB, 1 + draw(longest, 1)[0])
        sampling = fields.pop("sampling", None) or Sampling(seed=k)
        requests.append(Request(prompt, steps, sampling, script=script, forced=given, keep_logits=True, **fields))
    return requests


def save_talker(folder: Path) -> str:
    """A checkpoint that reads and writes text, and ends no answer by itself."""
    model = tiny_decoder(vocab=258, seed=2)
    model.language_model.generation_config.eos_token_id = None
    return str(save_checkpoint(model, folder, byte_tokenizer()))
