import pytest
import torch

from engine.train.batching import TokenizedExamples, shuffled_batches
from engine.train.data import Examples
from tests.train.test_data import examples


def test_shuffled_batches():
    draw = [[b.tolist() for b in shuffled_batches(10, 4, torch.Generator().manual_seed(s))] for s in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert [len(batch) for batch in draw[0]] == [4, 4, 2] and sorted(sum(draw[0], [])) == list(range(10))
    with pytest.raises(ValueError, match="batch_size"):
        list(shuffled_batches(10, 0))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def many(count=37):
    texts = [" ".join("abcdefgh"[(i + j) % 8] for j in range(i * 7 % 11 + 1)) for i in range(count)]
    return examples(*texts, labels=[i % 3 for i in range(count)])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("bucketing", [True, False])
def test_batches_equal_the_tokenizers_own_padding(tokenizer, shuffle, bucketing):
    data = many()
    tokenized = TokenizedExamples.from_examples(data, tokenizer, max_length=8)
    seen = []
    for batch in tokenized.batches(5, shuffle, torch.Generator().manual_seed(0), bucketing):
        rows = batch["indices"].tolist()
        seen += rows
        wanted = tokenizer([data.texts[i] for i in rows], padding=True, truncation=True, max_length=8,
                           return_tensors="pt")
        assert set(batch) == {*wanted, "labels", "indices"}
        for name in wanted:
            assert torch.equal(batch[name], wanted[name]) and batch[name].dtype == torch.int64
        assert batch["labels"].tolist() == [i % 3 for i in rows]
    assert sorted(seen) == list(range(37))
    if not shuffle and not bucketing:
        assert seen == list(range(37))


def test_batches_of_pairs(tokenizer):
    tokenized = TokenizedExamples.from_examples(examples(("a b", "c"), ("d", "e f g")), tokenizer)
    batch = tokenized.collate(torch.tensor([1, 0]))
    assert batch["input_ids"].tolist() == [[2, 7, 3, 8, 9, 10, 3], [2, 4, 5, 3, 6, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]


def test_batches_are_deterministic_and_bucketing_saves_padding(tokenizer):
    tokenized = TokenizedExamples.from_examples(many(200), tokenizer)

    def run(seed, bucketing=True):
        batches = list(tokenized.batches(8, generator=torch.Generator().manual_seed(seed), length_bucketing=bucketing))
        return [b["indices"].tolist() for b in batches], sum(b["input_ids"].numel() for b in batches)

    assert run(0) == run(0) and run(0)[0] != run(1)[0]
    assert run(0)[1] < 0.8 * run(0, bucketing=False)[1]


def test_tokenized_refuses(tokenizer):
    with pytest.raises(ValueError, match="no examples"):
        TokenizedExamples.from_examples(Examples([], torch.zeros(0, dtype=torch.int64), ("0",)), tokenizer)

    class WithoutPadding:
        pad_token_id = None

    with pytest.raises(ValueError, match="no padding token"):
        TokenizedExamples.from_examples(many(), WithoutPadding())


def test_selected_rows_are_those_rows(tokenizer):
    whole = TokenizedExamples.from_examples(many(), tokenizer)
    indices = torch.tensor([5, 0, 36, 5])
    got, want = whole.select(indices).collate(torch.arange(4)), whole.collate(indices)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert torch.equal(got[name], want[name]), name
    assert len(whole.select(torch.tensor([], dtype=torch.int64))) == 0
