"""From what a caller passes to tokenised rows, with every mistake found before any work is done."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.executors.base import TokenRow

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAPPING_KEYS = ("input_ids", "attention_mask", "token_type_ids")


class InputReader:
    """Reads batches for one model: text through its tokenizer, or ids as they are.

    tokenizer   a fast Hugging Face tokenizer, None where only ids can be read
    max_length  longest row in tokens, special tokens included
    """

    def __init__(self, tokenizer, vocab_size: int, type_vocab_size: int, max_length: int):
        self.vocab_size, self.type_vocab_size, self.max_length = vocab_size, type_vocab_size, max_length
        self.tokenizer = tokenizer
        self._backend = self._truncating = None
        if tokenizer is not None:
            # The tokenizers library itself: 5 times less overhead for one short text than the transformers call. A
            # copy, because padding and truncation are state of the object that its owner may set.
            self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
            self._backend.no_padding()
            self._backend.no_truncation()
            self._truncating = copy.deepcopy(self._backend)
            self._truncating.enable_truncation(max_length)

    def read(self, batch: Any, truncation: bool) -> list[TokenRow]:
        """batch: list of texts, list of text pairs, or a mapping of id tensors -> one TokenRow a row."""
        if isinstance(batch, Mapping):
            return self._read_mapping(batch, truncation)
        if isinstance(batch, (str, bytes)) or not isinstance(batch, Sequence):
            hint = ": put it in a list" if isinstance(batch, str) else ""
            raise TypeError(
                "batch must be a list of strings, a list of (string, string) pairs, or a mapping with input_ids and "
                f"attention_mask, got {type(batch).__name__}{hint}"
            )
        return self._read_text(batch, truncation) if len(batch) else []

    def _read_text(self, batch: Sequence, truncation: bool) -> list[TokenRow]:
        if self._backend is None:
            raise ValueError("this model has no tokenizer: pass a mapping with input_ids and attention_mask")
        pairs = isinstance(batch[0], (tuple, list))
        for index, row in enumerate(batch):
            _check_text(index, row, pairs)
        if pairs:
            batch = [tuple(row) for row in batch]
        encode = self._truncating if truncation else self._backend
        rows = []
        for index, encoding in enumerate(encode.encode_batch_fast(batch)):
            ids = encoding.ids
            if max(ids) >= self.vocab_size:
                raise ValueError(
                    f"row {index} has token id {max(ids)}, the model's vocabulary ends at {self.vocab_size - 1}: the "
                    "tokenizer is not the model's"
                )
            if len(ids) > self.max_length:
                raise ValueError(
                    f"row {index} has {len(ids)} tokens, the model takes at most {self.max_length}: shorten it, or "
                    "pass truncation=True"
                )
            # Segment ids are all 0 for a single text, whatever the family.
            rows.append(TokenRow(ids, _types(encoding.type_ids) if pairs and self.type_vocab_size > 1 else None))
        return rows

    def _read_mapping(self, batch: Mapping, truncation: bool) -> list[TokenRow]:
        keys = list(batch.keys())
        unknown = sorted(set(keys) - set(_MAPPING_KEYS))
        if unknown:
            raise ValueError(f"the batch has unknown keys {unknown}; allowed are {list(_MAPPING_KEYS)}")
        if "input_ids" not in keys:
            raise ValueError(f"the batch lacks input_ids; it has {keys}")
        # Lists: for the short rows of a small batch they are several times cheaper than tensor operations.
        ids = _integer_rows("input_ids", batch["input_ids"], None)
        mask = _integer_rows("attention_mask", batch.get("attention_mask"), ids)
        types = _integer_rows("token_type_ids", batch.get("token_type_ids"), ids)
        rows = []
        for index, row in enumerate(ids):
            start, end = (0, len(row)) if mask is None else _block(index, mask[index])
            if start == end:
                raise ValueError(f"row {index} holds no token: input_ids has no columns")
            tokens = row[start:end] if end - start < len(row) else row
            _check_ids("input_ids", index, start, tokens, self.vocab_size)
            if len(tokens) > self.max_length:
                # Cutting ids would drop the final special token: only the tokenizer knows how to shorten a row.
                raise ValueError(
                    f"row {index} has {len(tokens)} tokens, the model takes at most {self.max_length}: shorten it"
                    + (" (truncation=True shortens text only, not ids)" if truncation else "")
                )
            segment = None
            if types is not None and self.type_vocab_size > 1:
                segment = _types(types[index][start:end])
                if segment is not None:
                    _check_ids("token_type_ids", index, start, segment, self.type_vocab_size)
            rows.append(TokenRow(tokens, segment))
        return rows


def _block(index: int, mask: list[int]) -> tuple[int, int]:
    """Where the tokens of a row stand between its padding: [start, end)."""
    length = sum(mask)
    if length == len(mask) and min(mask, default=1) == 1:
        return 0, length
    if not set(mask) <= {0, 1}:
        raise ValueError(f"attention_mask must hold 0 and 1 only, row {index} has {sorted(set(mask) - {0, 1})}")
    if length == 0:
        raise ValueError(f"row {index} holds no token: attention_mask is 0 throughout")
    start = mask.index(1)
    if 0 in mask[start : start + length]:
        raise ValueError(f"row {index} has padding between its tokens: only padding at an end can be stripped")
    return start, start + length


def _check_ids(name: str, index: int, start: int, ids: list[int], size: int) -> None:
    if min(ids) < 0 or max(ids) >= size:
        column = next(i for i, token in enumerate(ids) if not 0 <= token < size)
        raise ValueError(f"{name}[{index}, {start + column}] is {ids[column]}, allowed are 0 to {size - 1}")


def _types(types: list[int]) -> list[int] | None:
    return types if any(types) else None


def _check_text(index: int, row: Any, pairs: bool) -> None:
    if pairs:
        if not isinstance(row, (tuple, list)) or len(row) != 2 or not all(isinstance(part, str) for part in row):
            raise TypeError(f"row {index} must be a pair of strings like row 0, got {_describe(row)}")
        empty = not row[0].strip() and not row[1].strip()
    else:
        if not isinstance(row, str):
            raise TypeError(f"row {index} must be a string, got {_describe(row)}")
        empty = not row.strip()
    if _SURROGATE.search("".join(row)):
        raise ValueError(f"row {index} has half a surrogate pair, which no tokenizer takes: decode the text properly")
    if empty:
        raise ValueError(f"row {index} is an empty string: there is nothing to classify; leave the row out")


def _describe(row: Any) -> str:
    if isinstance(row, (tuple, list)):
        return f"a {type(row).__name__} of {len(row)}: ({', '.join(type(part).__name__ for part in row)})"
    return f"{type(row).__name__}: {str(row)[:40]!r}"


def _integer_rows(name: str, value: Any, like: list[list[int]] | None) -> list[list[int]] | None:
    """Rows of integers as lists. ``like``: rows that it must equal in shape; then None stays None."""
    if value is None and like is not None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, (list, tuple)) and len(value) == 0:
            value = torch.empty(0, 0, dtype=torch.int64)
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name} cannot be read as a tensor ({error}): rows of different length must be padded"
            ) from error
    if value.dim() != 2:
        raise ValueError(f"{name} must have two dimensions [rows, tokens], got shape {list(value.shape)}")
    if (value.is_floating_point() or value.is_complex()) and value.numel():
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    if like is not None:
        shape = [len(like), len(like[0]) if like else 0]
        if list(value.shape) != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, input_ids has {shape}: they must be equal")
    return (value.long() if value.dtype == torch.bool else value).tolist()
