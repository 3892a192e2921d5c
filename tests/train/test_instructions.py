"""Instructions: files, the template, tokens and targets."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from engine.train.instructions import Instruction, TokenizedInstructions, chat_template, load_instructions
from tests.decoding.tiny import byte_tokenizer

ROWS = [
    {"instruction": "Name a fruit.", "input": "", "output": "Apple."},
    {"instruction": "Translate.", "context": "Guten Tag", "output": " Good day ", "category": "x"},
]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.name.endswith(".gz") else open(path, "w") as file:
        file.write(text)
    return path


def test_an_answer_that_quotes_a_heading_changes_no_question():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template(tokenizer)
    quoted = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "a\n\n### Input:\nb"}]
    plain = [quoted[0], {"role": "assistant", "content": "a"}]
    found, want = (
        tokenizer.apply_chat_template([*turns, quoted[0]], tokenize=False, add_generation_prompt=True)
        for turns in (quoted, plain)
    )
    assert found.replace("\n\n### Input:\nb", "") == want


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_reading(tmp_path, name):
    rows = load_instructions(write(tmp_path / name, ROWS))
    assert rows == [Instruction("Name a fruit.", "", "Apple."), Instruction("Translate.", "Guten Tag", "Good day")]
    assert rows[0].prompt.endswith("### Instruction:\nName a fruit.\n\n### Response:\n")
    assert "Input" not in rows[0].prompt
    assert rows[1].prompt.endswith("### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"output": "x"}, r"a.jsonl:2: instruction must be text, it is missing"),
        ({"instruction": "x"}, "a.jsonl:2: output must be text, it is missing"),
        ({"instruction": 3, "output": "x"}, "a.jsonl:2: instruction must be text, it is int: 3"),
        ({"instruction": " ", "output": "x"}, "a.jsonl:2: instruction is empty"),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, "input and context are two names"),
        ([1], "a.jsonl:2: a row must be a JSON object"),
    ],
)
def test_rows_that_are_wrong(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_instructions(write(tmp_path / "a.jsonl", [ROWS[0], row]))


def test_files_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_instructions(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="expected a file ending in"):
        load_instructions(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="there are no rows"):
        load_instructions(write(tmp_path / "a.jsonl", []))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "row", [Instruction("Name a fruit.", "", ""), Instruction("Translate.", 'He "said"\n{{ x }}', "")]
)
def test_a_chat_of_one_message_is_the_prompt(row, bos):
    tokenizer = byte_tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.chat_template = chat_template(tokenizer)
    chat = [{"role": "user", "content": f" {row.message}\n"}]
    found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert found == tokenizer.encode(row.prompt) and found.count(0) == bos


def test_a_chat_of_several_turns():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template(tokenizer)
    said = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"))
    chat = [{"role": role, "content": content} for role, content in said]
    found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    first = Instruction("Be brief.\n\nHello", "", "").prompt
    assert found == f"{first}Hi</s>\n\n### Instruction:\nBye\n\n### Response:\n"
    assert tokenizer.apply_chat_template(chat[:3], tokenize=False) == f"{first}Hi</s>"


def test_tokens_and_targets():
    tokenizer = byte_tokenizer()
    rows = [Instruction("a", "", "xyz"), Instruction("b" * 40, "", "w"), Instruction("c", "", "v" * 500)]
    eos = tokenizer.eos_token_id
    for answers_only in (False, True):
        data = TokenizedInstructions.from_instructions(rows, tokenizer, 190, answers_only)
        assert len(data) == 3
        seen = 0
        for batch in data.batches(2, shuffle=False):
            assert set(batch) == {"input_ids", "attention_mask", "targets"}
            for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True):
                n = int(mask.sum())
                prompts = [(r, tokenizer.encode(r.prompt)) for r in rows]
                row, prompt = next((r, p) for r, p in prompts if ids[: len(p)].tolist() == p)
                whole = [*prompt, *tokenizer.encode(row.output), eos][:190]
                assert ids[:n].tolist() == whole
                start = len(prompt) - 1 if answers_only else 0
                assert targets[start : n - 1].tolist() == whole[start + 1 :]
                assert targets[:start].eq(-1).all() and targets[n - 1 :].eq(-1).all()
                seen += 1
        assert seen == 3
    # What is cut has no end of answer; a prompt that fills the row leaves nothing to learn.
    assert len(TokenizedInstructions.from_instructions(rows, tokenizer, len(tokenizer.encode(rows[0].prompt)) + 1)) == 2
    with pytest.raises(ValueError, match="no row is left: every prompt has 20 tokens or more"):
        TokenizedInstructions.from_instructions(rows, tokenizer, 20)


def test_every_row_once():
    tokenizer = byte_tokenizer()
    rows = [Instruction(f"{k:02d}", "", "x" * k) for k in range(1, 20)]
    data = TokenizedInstructions.from_instructions(rows, tokenizer)
    order = torch.Generator().manual_seed(0)
    lengths = [int(n) for batch in data.batches(4, True, order) for n in batch["attention_mask"].sum(1)]
    assert sorted(lengths) == sorted(int(n) for n in data.rows.lengths)
