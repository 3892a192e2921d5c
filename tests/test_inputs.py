"""What a caller may pass, and what a wrong batch gets: an error that names the place, before any work is done."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from tokenizers import normalizers, processors

import engine
from engine.executors import PackedBatch
from engine.executors.base import TokenRows, capacity
from engine.inputs import InputReader
from tests.tiny import (
    MAX_LENGTH,
    VOCAB_SIZE,
    assert_same,
    padded,
    random_rows,
    random_texts,
    tiny_model,
    tiny_tokenizer,
)

FP32 = dict(rtol=1e-5, atol=3e-5)
IDS = padded(random_rows(4, seed=1, lengths=[3, 7, 5, 7]))


def changed(key: str, value, base=IDS) -> dict:
    return {**base, key: value}


def mask_with(*values_at: tuple[int, int, int]) -> dict:
    mask = IDS["attention_mask"].clone()
    for row, column, value in values_at:
        mask[row, column] = value
    return changed("attention_mask", mask)


def ids_with(row: int, column: int, value: int) -> dict:
    ids = IDS["input_ids"].clone()
    ids[row, column] = value
    return changed("input_ids", ids)


LONG = "table " * (MAX_LENGTH + 1)

# batch, keyword arguments, error, what its message must hold
BAD_BATCHES = {
    "no list": ("one text", {}, TypeError, ["list", "str"]),
    "bytes": (b"one text", {}, TypeError, ["list", "bytes"]),
    "nothing": (None, {}, TypeError, ["list", "NoneType"]),
    "a number": (3, {}, TypeError, ["list", "int"]),
    "a generator": ((t for t in ["how"]), {}, TypeError, ["list", "generator"]),
    "a set": ({"how"}, {}, TypeError, ["list", "set"]),
    "empty string": (["how", "", "what"], {}, ValueError, ["row 1", "empty"]),
    "white space": (["how", "what", " \n\t "], {}, ValueError, ["row 2", "empty"]),
    "both texts of a pair empty": ([("how", "a"), ("", " ")], {}, ValueError, ["row 1", "empty"]),
    "non-string row": (["how", "what", 3], {}, TypeError, ["row 2", "string", "int"]),
    "None as a row": (["how", None], {}, TypeError, ["row 1", "string", "NoneType"]),
    "bytes as a row": (["how", b"what"], {}, TypeError, ["row 1", "string", "bytes"]),
    "a pair among texts": (["how", ("a", "b")], {}, TypeError, ["row 1", "string", "tuple"]),
    "a text among pairs": ([("a", "b"), "how"], {}, TypeError, ["row 1", "pair", "str"]),
    "three in a pair": ([("a", "b"), ("a", "b", "c")], {}, TypeError, ["row 1", "pair", "3"]),
    "a number in a pair": ([("a", "b"), ("a", 5)], {}, TypeError, ["row 1", "pair", "int"]),
    "half a surrogate pair": (["how", "a \ud800 b"], {}, (TypeError, ValueError), ["row 1"]),
    "text too long": (
        ["how", LONG], {}, ValueError, ["row 1", str(MAX_LENGTH + 3), str(MAX_LENGTH), "truncation"],
    ),
    "pair too long": ([("how", LONG)], {}, ValueError, ["row 0", str(MAX_LENGTH + 5), str(MAX_LENGTH)]),
    "ids too long": (
        padded(random_rows(3, lengths=[5, MAX_LENGTH + 4, 9])), {}, ValueError,
        ["row 1", str(MAX_LENGTH + 4), str(MAX_LENGTH)],
    ),
    "ids too long, truncation asked": (
        padded(random_rows(2, lengths=[5, MAX_LENGTH + 4])), dict(truncation=True), ValueError,
        ["row 1", str(MAX_LENGTH + 4), str(MAX_LENGTH), "truncation"],
    ),
    "unknown key": (changed("labels", torch.zeros(4)), {}, ValueError, ["labels", "input_ids"]),
    "no input_ids": ({"attention_mask": IDS["attention_mask"]}, {}, ValueError, ["input_ids", "attention_mask"]),
    "input_ids None": ({"input_ids": None}, {}, (TypeError, ValueError), ["input_ids"]),
    "input_ids a number": ({"input_ids": 5}, {}, (TypeError, ValueError), ["input_ids"]),
    "input_ids text": ({"input_ids": "how"}, {}, (TypeError, ValueError), ["input_ids"]),
    "input_ids lists of text": ({"input_ids": [["a", "b"]]}, {}, (TypeError, ValueError), ["input_ids"]),
    "input_ids with None": ({"input_ids": [[5, None]]}, {}, (TypeError, ValueError), ["input_ids"]),
    "ids of one row": (changed("input_ids", torch.tensor([5, 6, 7])), {}, ValueError, ["input_ids", "[3]", "two"]),
    "ids of three dimensions": (
        {"input_ids": torch.full((2, 2, 2), 5)}, {}, ValueError, ["input_ids", "[2, 2, 2]", "two"],
    ),
    "float ids": ({"input_ids": torch.ones(2, 3)}, {}, TypeError, ["input_ids", "integers", "float32"]),
    "ragged lists": ({"input_ids": [[5, 6], [7]]}, {}, ValueError, ["input_ids", "padded"]),
    "rows without columns": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, {}, ValueError, ["row 0", "no token"]),
    "empty rows as lists": ({"input_ids": [[], []]}, {}, ValueError, ["row 0", "no token"]),
    "id above the vocabulary": (
        ids_with(1, 2, VOCAB_SIZE), {}, ValueError, ["input_ids[1, 2]", str(VOCAB_SIZE), str(VOCAB_SIZE - 1)],
    ),
    "negative id": (ids_with(0, 1, -1), {}, ValueError, ["input_ids[0, 1]", "-1", str(VOCAB_SIZE - 1)]),
    "huge id": (ids_with(3, 0, 2**40), {}, ValueError, ["input_ids[3, 0]", str(2**40)]),
    "segment id above the table": (
        changed("token_type_ids", torch.full((4, 7), 2)), {}, ValueError, ["token_type_ids[0, 0]", "2", "0 to 1"],
    ),
    "segment ids of another shape": (
        changed("token_type_ids", torch.zeros(4, 6, dtype=torch.long)), {}, ValueError,
        ["token_type_ids", "[4, 6]", "[4, 7]"],
    ),
    "mask of another shape": (
        changed("attention_mask", torch.ones(4, 6, dtype=torch.long)), {}, ValueError,
        ["attention_mask", "[4, 6]", "[4, 7]"],
    ),
    "mask of other rows": (
        changed("attention_mask", torch.ones(3, 7, dtype=torch.long)), {}, ValueError,
        ["attention_mask", "[3, 7]", "[4, 7]"],
    ),
    "mask of one dimension": (changed("attention_mask", [1, 1, 1, 1]), {}, ValueError, ["attention_mask", "[4]"]),
    "float mask": (changed("attention_mask", torch.ones(4, 7)), {}, TypeError, ["attention_mask", "float32"]),
    "mask with a 2": (mask_with((1, 2, 2)), {}, ValueError, ["attention_mask", "0 and 1"]),
    "mask with a -1": (mask_with((1, 2, -1)), {}, ValueError, ["attention_mask", "0 and 1"]),
    "mask with a hole": (mask_with((1, 2, 0)), {}, ValueError, ["row 1", "between"]),
    "holes, the first row named": (mask_with((1, 2, 0), (3, 1, 0)), {}, ValueError, ["row 1", "between"]),
    "bool mask with a hole": (
        changed("attention_mask", mask_with((3, 4, 0))["attention_mask"].bool()), {}, ValueError, ["row 3", "between"],
    ),
    "a full mask but for a 2": (
        changed("attention_mask", torch.ones(4, 7, dtype=torch.long).index_fill(1, torch.tensor([3]), 2)), {},
        ValueError, ["attention_mask", "0 and 1", "row 0", "[2]"],
    ),
    "no mask, id above the vocabulary": (
        {"input_ids": torch.full((5, 6), 7).index_fill(0, torch.tensor([4]), VOCAB_SIZE)}, {}, ValueError,
        ["input_ids[4, 0]", str(VOCAB_SIZE)],
    ),
    "int32 id below zero": (changed("input_ids", ids_with(1, 2, -7)["input_ids"].int()), {}, ValueError,
        ["input_ids[1, 2]", "-7"],
    ),
    "left padding, id above the vocabulary": (
        {k: v.flip(1) for k, v in ids_with(0, 1, VOCAB_SIZE).items()}, {}, ValueError, ["input_ids[0, 5]"],
    ),
    "negative segment id": (
        changed("token_type_ids", torch.zeros(4, 7, dtype=torch.long).index_fill(1, torch.tensor([2]), -1)), {},
        ValueError, ["token_type_ids[0, 2]", "-1", "0 to 1"],
    ),
    "the first row at fault is named, whatever its fault": (
        {**ids_with(1, 0, VOCAB_SIZE), "attention_mask": mask_with((2, 1, 0))["attention_mask"]}, {}, ValueError,
        ["input_ids[1, 0]"],
    ),
    "row without tokens": (
        mask_with(*((2, column, 0) for column in range(7))), {}, ValueError, ["row 2", "no token", "attention_mask"],
    ),
}  # fmt: skip


@pytest.fixture
def runner(model, tokenizer):
    return engine.from_module(model, tokenizer)


def assert_refused(runner, batch, options, error, fragments, monkeypatch) -> None:
    """The error, before any row is computed, leaving no trace: the next good call says what the last one said."""
    good = ["how to join a table", "what is an index"]
    before = runner.run(good)
    random_state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(runner.executor, "run", lambda *args: pytest.fail("work was done before the check"))
        with pytest.raises(error) as caught:
            runner.run(batch, **options)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in: {message}"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(runner.run(good), before, atol=0)


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(runner, case, monkeypatch):
    assert_refused(runner, *BAD_BATCHES[case], monkeypatch)


def test_text_without_a_tokenizer(model, monkeypatch):
    runner = engine.from_module(model)
    with pytest.raises(ValueError, match="no tokenizer.*input_ids"):
        runner.run(["how"])
    assert runner.run([]).labels == []


def test_a_tokenizer_that_is_not_the_models(monkeypatch):
    """Its ids lie outside the vocabulary: found before any work, whether at construction or by the row."""
    model = tiny_model(max_length=20)
    small = engine.MultiExitEncoder(_smaller_vocabulary(), model.config).eval()
    with pytest.raises(ValueError, match="vocabulary|allowed are 0 to 39|input_ids"):
        runner = engine.from_module(small, tiny_tokenizer())
        monkeypatch.setattr(runner.executor, "run", lambda *args: pytest.fail("work was done before the check"))
        runner.run(["how why red green blue zz zz"])


def _smaller_vocabulary():
    from tests.tiny import tiny_backbone

    return tiny_backbone(vocab_size=40)


def test_padding_may_hold_anything(runner):
    """What the mask hides is never read: neither its ids nor its segments."""
    want = runner.run(IDS)
    hidden = IDS["attention_mask"] == 0
    got = runner.run(
        {
            "input_ids": IDS["input_ids"].masked_fill(hidden, -100),
            "attention_mask": IDS["attention_mask"],
            "token_type_ids": torch.zeros(4, 7, dtype=torch.long).masked_fill(hidden, 9),
        }
    )
    assert_same(got, want, atol=0)


# -- what is allowed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["packed", "reference"])
@pytest.mark.parametrize("empty", [[], (), {"input_ids": []}, {"input_ids": torch.zeros(0, 5, dtype=torch.long)}])
def test_an_empty_batch_is_an_empty_result(model, tokenizer, executor, empty):
    runner = engine.from_module(model, tokenizer, executor=executor)
    for options in ({}, dict(threshold=[], min_depth=[], max_depth=[]), dict(threshold=0.3, min_depth=2, max_depth=3)):
        got = runner.run(empty, **options)
        assert got.labels == [] and len(got) == 0
        assert got.label_ids.shape == got.exit_layers.shape == got.exit_probabilities.shape == (0,)
        assert got.logits.shape == got.probabilities.shape == (0, 3)
        assert (got.label_ids.dtype, got.exit_layers.dtype) == (torch.int64, torch.int32)
        assert got.stats.rows == got.stats.tokens == 0 and got.stats.exit_histogram == {1: 0, 2: 0, 3: 0, 4: 0}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_padding_on_either_side_is_stripped(family, side):
    """Positions start where the family's start, wherever the row stands in its tensor."""
    model = tiny_model(family)
    runner = engine.from_module(model)
    rows = random_rows(9, seed=5, shortest=1, longest=20)
    alone = [runner.run({"input_ids": [row]}) for row in rows]
    got = runner.run(padded(rows, side))
    wide = padded([*rows, [5] * 40], side)  # far more padding than needed
    if family == "bert":
        types = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in rows]
        segments = runner.run(padded(rows, side, types=types)).logits
        torch.testing.assert_close(segments, runner.run(padded(rows, "right", types=types)).logits, **FP32)
    for batch in (got, runner.run({name: value[:9] for name, value in wide.items()})):
        assert batch.exit_layers.tolist() == [int(x.exit_layers) for x in alone]
        torch.testing.assert_close(batch.logits, torch.cat([x.logits for x in alone]), **FP32)
        assert batch.stats.tokens == sum(map(len, rows))


def test_padding_sides_may_differ_from_row_to_row(runner):
    rows = random_rows(2, seed=6, lengths=[3, 4])
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    ids[0, :3], mask[0, :3] = torch.tensor(rows[0]), 1
    ids[1, 2:6], mask[1, 2:6] = torch.tensor(rows[1]), 1  # on both sides at once
    assert_same(runner.run({"input_ids": ids, "attention_mask": mask}), runner.run(padded(rows)), atol=0)


def test_kinds_of_mapping(runner, tokenizer):
    """Tensors, arrays, nested lists, a tokenizer's own output; the mask may be bool, int32 or absent."""
    texts = ["how to join a table", "what is an index", "select"]
    want = runner.run(texts)
    output = tokenizer(texts, padding=True, return_tensors="pt")
    lists = {name: value.tolist() for name, value in output.items()}
    for batch in (
        output,
        dict(output),
        UserDict(output),
        lists,
        tokenizer(texts, padding=True),
        tokenizer(texts, padding=True, return_tensors="np"),
        {name: np.asarray(value) for name, value in lists.items()},
        {name: value.int() for name, value in output.items()},
        {**output, "attention_mask": output["attention_mask"].bool()},
        {**lists, "attention_mask": [[bool(x) for x in row] for row in lists["attention_mask"]]},
        {name: value for name, value in output.items() if name != "token_type_ids"},
        {**output, "token_type_ids": None},
    ):
        assert_same(runner.run(batch), want, atol=0)
    alone = tokenizer(texts[:1], return_tensors="pt")
    assert_same(runner.run({"input_ids": alone["input_ids"]}), runner.run(texts[:1]), atol=0)


def test_an_absent_mask_may_be_none(runner):
    """token_type_ids=None is allowed; so is attention_mask=None, or it is an error that names it."""
    batch = {"input_ids": IDS["input_ids"].clamp(min=5)}
    try:
        got = runner.run({**batch, "attention_mask": None})
    except (TypeError, ValueError) as error:
        assert "attention_mask" in str(error)
    else:
        assert_same(got, runner.run(batch), atol=0)


def test_the_callers_tensors_are_not_changed(runner):
    batch = {name: value.clone() for name, value in IDS.items()}
    runner.run(batch)
    assert all(torch.equal(batch[name], IDS[name]) for name in IDS)
    texts = ["how", "what"]
    runner.run(texts)
    assert texts == ["how", "what"]


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_text_is_tokenised_as_hugging_face_does(family):
    tokenizer = tiny_tokenizer(family)
    runner = engine.from_module(tiny_model(family), tokenizer)
    texts = random_texts(30, seed=2)
    assert_same(runner.run(texts), runner.run(tokenizer(texts, padding=True)), atol=0)
    pairs = list(zip(random_texts(30, seed=3, longest=20), random_texts(30, seed=4, longest=20), strict=True))
    got = runner.run(pairs)
    assert_same(got, runner.run(tokenizer(*map(list, zip(*pairs, strict=True)), padding=True)), atol=0)
    assert_same(got, runner.run([list(pair) for pair in pairs]), atol=0)


def test_segments_of_a_pair_are_used(runner, tokenizer):
    pairs = list(zip(random_texts(20, seed=5, longest=9), random_texts(20, seed=6, longest=9), strict=True))
    got = runner.run(pairs, min_depth=4)
    ids = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True)
    assert int(np.max(ids["token_type_ids"])) == 1
    without = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    assert float((runner.run(without, min_depth=4).logits - got.logits).abs().max()) > 1e-2
    # Rows with and without a second text may share a batch of ids.
    both = tokenizer([pairs[0][0], pairs[1][0]], padding=True)
    mixed = tokenizer.pad(
        [{k: v[0] for k, v in both.items()}, tokenizer(*pairs[1])], return_tensors="pt"
    )
    alone = [runner.run([pairs[0][0]]), runner.run([pairs[1]])]
    torch.testing.assert_close(runner.run(mixed).logits, torch.cat([x.logits for x in alone]), **FP32)


def test_one_empty_text_of_a_pair_is_allowed(runner, tokenizer):
    got = runner.run([("how to join", ""), ("", "what")])
    want = runner.run(tokenizer(["how to join", ""], ["", "what"], padding=True))
    assert_same(got, want, atol=0)


def test_truncation_only_when_asked(runner, tokenizer):
    texts = ["how to join", LONG]
    with pytest.raises(ValueError, match="row 1"):
        runner.run(texts)
    got = runner.run(texts, truncation=True)
    want = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True)
    assert_same(got, runner.run(want), atol=0)
    pairs = [("how to join", LONG), (LONG, "what"), (LONG, LONG)]
    want = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=MAX_LENGTH, padding=True)
    assert_same(runner.run(pairs, truncation=True), runner.run(want), atol=0)
    with pytest.raises(ValueError, match="row 1"):
        runner.run(texts)  # truncation was for one call
    assert runner.run(["table " * (MAX_LENGTH - 2)]).stats.tokens == MAX_LENGTH


def test_the_tokenizers_own_settings_neither_matter_nor_change(model):
    """A tokenizer with padding and truncation switched on is its owner's business."""
    tokenizer = tiny_tokenizer()
    plain = engine.from_module(model, tokenizer).run(["how to join", "select"])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    runner = engine.from_module(model, tokenizer)
    assert_same(runner.run(["how to join", "select"]), plain, atol=0)
    assert runner.run(["how to join a table"]).stats.tokens == 7
    runner.run([LONG], truncation=True)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert tokenizer.backend_tokenizer.padding["length"] == 30


def test_the_models_limit_is_the_configs(tokenizer):
    """max_length may be less than the position table serves; the shorter one holds."""
    runner = engine.from_module(tiny_model(max_length=10), tokenizer)
    assert runner.run(padded(random_rows(2, lengths=[10, 9]))).stats.tokens == 19
    with pytest.raises(ValueError, match=r"row 1 has 11 tokens.* 10"):
        runner.run(padded(random_rows(2, lengths=[10, 11])))
    assert runner.run([LONG], truncation=True).stats.tokens == 10


# -- what is read ------------------------------------------------------------------------------------------------


def one_by_one(ids, mask, types) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and segments of every row, by the plainest means."""
    pick = [[column for column, bit in enumerate(row) if bit] for row in mask.tolist()]
    return tuple(
        [[int(row[column]) for column in columns] for row, columns in zip(x, pick, strict=True)] for x in (ids, types)
    )


def random_blocks(rows: int, width: int, side: str, seed: int) -> torch.Tensor:
    """A mask with one block of 1s a row: at the left or right end, anywhere, or everywhere."""
    mask = torch.zeros(rows, width, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for row in mask:
        length = width if side == "none" else int(torch.randint(1, width + 1, (), generator=generator))
        room = width - length
        start = {"left": room, "right": 0, "none": 0}.get(side, int(torch.randint(room + 1, (), generator=generator)))
        row[start : start + length] = 1
    return mask


READER = InputReader(None, vocab_size=VOCAB_SIZE, type_vocab_size=2, max_length=MAX_LENGTH)
KINDS = {
    "int64": lambda x: x,
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.to(torch.uint8),
    "array": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "both", "none"])
@pytest.mark.parametrize("rows, width", [(1, 1), (1, 9), (7, 1), (40, 23), (3, MAX_LENGTH)])
def test_tokens_of_a_mapping(rows, width, side, kind):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(VOCAB_SIZE, (rows, width), generator=generator)
    types = torch.randint(2, (rows, width), generator=generator)
    mask = random_blocks(rows, width, side, seed=width)
    want_ids, want_types = one_by_one(ids, mask, types)
    tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    batch = {name: KINDS[kind](value) for name, value in tensors.items()}
    masks = [batch["attention_mask"], mask.bool()] + ([None] if side == "none" else [])
    for given in masks:
        read = READER.read({**batch, "attention_mask": given}, False)
        assert read.lengths == tuple(map(len, want_ids)) and read.num_tokens == sum(read.lengths)
        assert read.ids.tolist() == sum(want_ids, [])
        assert read.ids.dtype == np.int64 and read.ids.flags.c_contiguous
        if any(sum(want_types, [])):
            assert read.types.tolist() == sum(want_types, [])
            assert read.types.dtype == np.int64 and read.types.flags.c_contiguous
        else:
            assert read.types is None
    assert READER.read({k: v for k, v in batch.items() if k != "token_type_ids"}, False).types is None


def test_one_row_for_all(runner):
    """A row without memory of its own, and a column that is not contiguous: kernels get what they expect."""
    row = torch.tensor([[5, 9, 8, 7]])
    want = runner.run({"input_ids": row})
    for ids in (row.expand(3, 4), row.repeat(3, 1), row.repeat_interleave(3, 1)[:, ::3].expand(3, 4)):
        assert_same(runner.run({"input_ids": ids[:1]}), want, atol=0)
        torch.testing.assert_close(runner.run({"input_ids": ids}).logits, want.logits.expand(3, -1), **FP32)


def token_rows(lengths: list[int], types: bool) -> TokenRows:
    ids = np.arange(100, 100 + sum(lengths))
    return TokenRows(ids, ids % 2 if types else None, tuple(lengths))


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize("lengths", [[4], [1], [3, 1, 5], [6, 6, 6], [1, 1]])
def test_rows_move_and_are_cut(lengths, types):
    rows = token_rows(lengths, types)
    lists = np.split(rows.ids, rows.cu_seqlens[1:-1])
    part = rows[1:3]
    assert len(part) == len(part.lengths) == len(lists[1:3])
    assert part.ids.tolist() == [int(x) for row in lists[1:3] for x in row]
    order = np.array([(3 * k + 1) % len(lengths) for k in range(len(lengths))]) if len(lengths) != 3 else [2, 0, 1]
    moved = rows.take(np.array(order))
    assert moved.ids.tolist() == [int(x) for k in order for x in lists[k]]
    assert moved.lengths == tuple(lengths[k] for k in order)
    if types:
        assert (moved.types == moved.ids % 2).all() and (part.types == part.ids % 2).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("lengths", [[1], [12], [9, 1, 17], [6] * 5, [1] * 3])
def test_packed_batches(lengths, exact):
    rows, first, tokens = token_rows(lengths, True), 2, sum(lengths)
    batch = PackedBatch.from_rows(rows, first, torch.device("cpu"), exact)
    spans = [list(range(sum(lengths[:k]), sum(lengths[: k + 1]))) for k in range(len(lengths))]
    order = [s[0] for s in spans] + sum((s[1:] for s in spans), [])
    position = [first + k for n in lengths for k in range(n)]
    assert len(batch.input_ids) == capacity(len(lengths), tokens, exact)
    assert batch.input_ids[:tokens].tolist() == [100 + k for k in order]
    assert batch.positions[:tokens].tolist() == [position[k] for k in order]
    if max(lengths) > 1 or len(lengths) > 1:
        assert batch.token_type_ids[:tokens].tolist() == [k % 2 for k in order]
    spare = slice(tokens, None)
    assert set(batch.positions[spare].tolist()) <= {first} and set(batch.input_ids[spare].tolist()) <= {100}
    assert batch.lengths == tuple(lengths)
    assert batch.cu_seqlens.tolist() == [sum(lengths[:k]) for k in range(len(lengths) + 1)]
    wanted = torch.int64, torch.int64, torch.int32
    assert (batch.input_ids.dtype, batch.positions.dtype, batch.cu_seqlens.dtype) == wanted
    assert batch.input_ids.is_contiguous() and batch.positions.is_contiguous()


def test_segments_that_are_all_0_are_left_out():
    rows = TokenRows(np.arange(9), np.array([0] * 6 + [1] * 3), (4, 2, 3))
    for cut, there in ((slice(0, 2), False), (slice(1, 3), True)):
        batch = PackedBatch.from_rows(rows[cut], 0, torch.device("cpu"))
        assert (batch.token_type_ids is not None) == there


def test_a_text_that_the_tokenizer_finds_nothing_in(model):
    """Without special tokens a text may come to nothing."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    runner = engine.from_module(model, tokenizer)
    with pytest.raises(ValueError, match="row 1 holds no token"):
        runner.run(["how to join", "!!!"])
