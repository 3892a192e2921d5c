"""From what a caller passes to tokenised rows, with every mistake found before any work is done."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.executors.base import TokenRow

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
            if len(ids) > self.max_length:
                raise ValueError(
                    f"row {index} has {len(ids)} tokens, the model takes at most {self.max_length}: shorten it, or pass "
                    "truncation=True"
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
        if not isinstance(batch["input_ids"], Tensor) and len(batch["input_ids"]) == 0:
            return []
        ids = _integer_matrix("input_ids", batch["input_ids"])
        if ids.shape[0] == 0:
            return []
        mask = torch.ones_like(ids)
        if "attention_mask" in keys:
            mask = _integer_matrix("attention_mask", batch["attention_mask"])
            if mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask has shape {list(mask.shape)}, input_ids has {list(ids.shape)}: they must be equal"
                )
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError("attention_mask must hold 0 and 1 only")
        types = None
        if "token_type_ids" in keys and batch["token_type_ids"] is not None:
            types = _integer_matrix("token_type_ids", batch["token_type_ids"])
            if types.shape != ids.shape:
                raise ValueError(
                    f"token_type_ids has shape {list(types.shape)}, input_ids has {list(ids.shape)}: they must be equal"
                )
        lengths = mask.sum(-1)
        first = mask.argmax(-1)
        column = torch.arange(ids.shape[1])
        block = (column >= first[:, None]) & (column < (first + lengths)[:, None])
        for bad, what in (
            (lengths == 0, "holds no token: attention_mask is 0 throughout"),
            ((block != mask.bool()).any(-1), "has padding between its tokens: only padding at an end can be stripped"),
        ):
            if bool(bad.any()):
                raise ValueError(f"row {int(torch.nonzero(bad)[0])} {what}")
        self._check_ids("input_ids", ids, mask, self.vocab_size)
        if types is not None and self.type_vocab_size > 1:
            self._check_ids("token_type_ids", types, mask, self.type_vocab_size)
        if int(lengths.max()) > self.max_length:
            row = int(lengths.argmax())
            # Cutting ids would drop the final special token: only the tokenizer knows how to shorten a row.
            raise ValueError(
                f"row {row} has {int(lengths[row])} tokens, the model takes at most {self.max_length}: shorten it"
                + (" (truncation=True shortens text only, not ids)" if truncation else "")
            )
        rows = []
        ends = (first + lengths).tolist()
        for index, (start, end) in enumerate(zip(first.tolist(), ends)):
            segment = types[index, start:end].tolist() if types is not None and self.type_vocab_size > 1 else None
            rows.append(TokenRow(ids[index, start:end].tolist(), None if segment is None else _types(segment)))
        return rows

    @staticmethod
    def _check_ids(name: str, ids: Tensor, mask: Tensor, size: int) -> None:
        bad = ((ids < 0) | (ids >= size)) & mask.bool()
        if bool(bad.any()):
            row, column = torch.nonzero(bad)[0].tolist()
            raise ValueError(
                f"{name}[{row}, {column}] is {int(ids[row, column])}, allowed are 0 to {size - 1}"
            )


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
    if empty:
        raise ValueError(f"row {index} is an empty string: there is nothing to classify; leave the row out")


def _describe(row: Any) -> str:
    if isinstance(row, (tuple, list)):
        return f"a {type(row).__name__} of {len(row)}: ({', '.join(type(part).__name__ for part in row)})"
    return f"{type(row).__name__}: {str(row)[:40]!r}"


def _integer_matrix(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be read as a tensor ({error}): rows of different length must be padded"
            ) from error
    if value.dim() != 2:
        raise ValueError(f"{name} must have two dimensions [rows, tokens], got shape {list(value.shape)}")
    if value.dtype == torch.bool:
        value = value.long()
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    return value.detach().to("cpu", torch.int64)
