"""Instructions and answers for training decoders: reading, the paper's template, tokens cut into batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.train.batching import TokenizedExamples
from engine.train.data import SUFFIXES, read_rows

# Alpaca (Taori et al. 2023), which the paper trains and tests with.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_INSTRUCTION, _INPUT, _RESPONSE = (f"\n\n### {name}:\n" for name in ("Instruction", "Input", "Response"))
# Texts are trimmed, as rows are when they are read.
_TURNS = r"""{%- set asked = messages | rejectattr("role", "equalto", "assistant") | map(attribute="content") %}
{{- with_input if input in asked | join("\n") else without_input }}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- response + message.content | trim + eos_token }}
    {%- else %}
        {{- instruction if loop.first or loop.previtem.role == "assistant" else "\n\n" }}
        {{- message.content | trim }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- response }}
{%- endif %}"""


@dataclass(frozen=True)
class Instruction:
    """input: further context, may be empty. output: the answer."""

    instruction: str
    input: str
    output: str

    @property
    def message(self) -> str:
        """What a user says in a chat to ask for the same: an input stands behind its heading."""
        return self.instruction + (_INPUT + self.input if self.input else "")

    @property
    def prompt(self) -> str:
        """What the model is given, up to where the answer begins."""
        return (_WITH_INPUT if self.input else _WITHOUT_INPUT) + _INSTRUCTION + self.message + _RESPONSE


def chat_template(tokenizer: Any) -> str:
    """The template in Jinja: of a user's ``Instruction.message`` it makes the ``prompt``, with the BOS token where the
    tokenizer puts one in front of texts.

    Turns go on below each other, the EOS token behind each answer; a system message opens the instruction behind it.
    """
    texts = dict(
        with_input=_WITH_INPUT, without_input=_WITHOUT_INPUT, instruction=_INSTRUCTION, input=_INPUT, response=_RESPONSE
    )
    bos = "{{- bos_token }}\n" if tokenizer.encode("") == [tokenizer.bos_token_id] else ""
    return bos + "".join(f"{{%- set {name} = {json.dumps(text)} %}}\n" for name, text in texts.items()) + _TURNS


def load_instructions(path: str | Path) -> list[Instruction]:
    """Rows of one file with "instruction", "output" and maybe "input" (or "context"), as text.

    Formats as in ``engine.train.data``. ValueError names file and line; FileNotFoundError for no file.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a file ending in one of {SUFFIXES}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    found = []
    for place, row in read_rows(path):
        values = {}
        for name, required in (("instruction", True), ("output", True), ("input", False), ("context", False)):
            value = row.get(name)
            if value is None and not required:
                value = ""
            if not isinstance(value, str):
                given = "is missing" if value is None else f"is {type(value).__name__}: {value!r}"
                raise ValueError(f"{place}: {name} must be text, it {given}")
            values[name] = value.strip()
        for name in ("instruction", "output"):
            if not values[name]:
                raise ValueError(f"{place}: {name} is empty: leave the row out")
        if values["input"] and values["context"]:
            raise ValueError(f"{place}: input and context are two names of one thing, give one of them")
        found.append(Instruction(values["instruction"], values["input"] or values["context"], values["output"]))
    if not found:
        raise ValueError(f"{path}: there are no rows")
    return found


def without(rows: list[Instruction], *others: list[Instruction]) -> list[Instruction]:
    """The rows whose instruction stands in none of ``others``."""
    seen = {row.instruction for other in others for row in other}
    return [row for row in rows if row.instruction not in seen]


@dataclass(frozen=True, eq=False)
class TokenizedInstructions:
    """Prompts and answers end to end, each answer closed by the EOS token where it was not cut.

    rows           their label_ids (N,) are the prompts' lengths, in tokens
    answers_only   the prompt's tokens are no targets
    """

    rows: TokenizedExamples
    answers_only: bool = False

    @classmethod
    def from_instructions(
        cls, instructions: list[Instruction], tokenizer: Any, max_length: int = 256, answers_only: bool = False
    ) -> TokenizedInstructions:
        """Rows are cut to ``max_length`` tokens (paper's code: 256); those whose prompt fills it are left out.
        ValueError where none remains, or the tokenizer has no EOS token."""
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: answers could not be ended")
        ids: list[list[int]] = []
        prompts: list[int] = []
        for row in instructions:
            prompt = tokenizer.encode(row.prompt)
            if len(prompt) >= max_length:
                continue
            answer = tokenizer.encode(row.output, add_special_tokens=False)
            ids.append([*prompt, *answer, tokenizer.eos_token_id][:max_length])
            prompts.append(len(prompt))
        if not ids:
            raise ValueError(f"no row is left: every prompt has {max_length} tokens or more, raise max_length")
        lengths = torch.tensor([len(row) for row in ids])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        fields = {"input_ids": torch.tensor([token for row in ids for token in row], dtype=torch.int32)}
        return cls(TokenizedExamples(fields, offsets, torch.tensor(prompts), tokenizer.eos_token_id), answers_only)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self, batch_size: int, shuffle: bool = True, generator: torch.Generator | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Every row once: input_ids, attention_mask, and targets (B, S) int64, the next token of every position; -1
        where there is none, or it is no target. Padded on the right."""
        for batch in self.rows.batches(batch_size, shuffle, generator):
            ids, mask = batch["input_ids"], batch["attention_mask"].bool()
            targets = torch.full_like(ids, -1)
            targets[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], -1)
            if self.answers_only:
                position = torch.arange(ids.shape[1])
                targets[position[None] < batch["labels"][:, None] - 1] = -1
            yield {"input_ids": ids, "attention_mask": batch["attention_mask"], "targets": targets}
