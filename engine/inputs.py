"""From what a caller passes to tokenised rows; of much text part by part, mistakes being looked for before any of it
is computed (``Texts``)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from engine.executors.base import TokenRows
from engine.kernels.token_rows import all_below, read_tokens

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAPPING_KEYS = ("input_ids", "attention_mask", "token_type_ids")
_NO_ROWS = TokenRows(np.empty(0, np.int64), None, ())
# Characters of text. Up to _AT_ONCE are tokenised together, more of them in parts of _PART: some 8,000 tokens of
# English, so that a micro-batch of 16,384 is ready soon, and several texts for every core at any length. 10,000 titles
# on 16 cores beside an H100, in parts of 2^14 / 2^15 / 2^16 / 2^17 / at once: 135 / 97 / 112 / 100 / 141 ms with
# BERT-base at full depth, 104 / 91 / 90 / 95 / 100 with MiniLM's sizes.
_AT_ONCE = 1 << 16
_PART = 1 << 15
_SPECIAL = 8  # what a row's special tokens count as: without them, a part of single words would be far too many rows


class InputReader:
    """Reads batches for one model: text through its tokenizer, or ids as they are.

    tokenizer   a fast Hugging Face tokenizer, None where only ids can be read
    max_length  longest row in tokens, special tokens included
    """

    def __init__(self, tokenizer, vocab_size: int, type_vocab_size: int, max_length: int):
        self.vocab_size, self.type_vocab_size, self.max_length = vocab_size, type_vocab_size, max_length
        self.tokenizer = tokenizer
        self._backend = self._truncating = None
        self._knows_all: bool | None = None  # whether every text has tokens, all of them the model's
        if tokenizer is not None:
            # The tokenizers library itself: 5 times less overhead for one short text than the transformers call. A
            # copy, because padding and truncation are state of the object that its owner may set.
            self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
            self._backend.no_padding()
            self._backend.no_truncation()
            self._truncating = copy.deepcopy(self._backend)
            self._truncating.enable_truncation(max_length)

    def read(self, batch: Any, truncation: bool) -> TokenRows:
        """batch: list of texts, list of text pairs, or a mapping of id tensors.

        Whole arrays are checked first. Only where something is wrong are rows looked at one by one, to name the first.
        """
        found = self.open(batch, truncation)
        return found if isinstance(found, TokenRows) else self._tokens(found.rows, truncation)

    def open(self, batch: Any, truncation: bool) -> TokenRows | Texts:
        """What ``read`` returns; but where there is much text, all that can be checked without tokenising it has been
        checked, and its tokens are to be had part by part."""
        if isinstance(batch, (dict, Mapping)):  # of an abstract class alone it would take longer to know
            return self._read_mapping(batch, truncation)
        if isinstance(batch, (str, bytes)) or not isinstance(batch, Sequence):
            hint = ": put it in a list" if isinstance(batch, str) else ""
            raise TypeError(
                "batch must be a list of strings, a list of (string, string) pairs, or a mapping with input_ids and "
                f"attention_mask, got {type(batch).__name__}{hint}"
            )
        if len(batch) == 0:
            return _NO_ROWS
        if self._backend is None:
            raise ValueError("this model has no tokenizer: pass a mapping with input_ids and attention_mask")
        pairs = isinstance(batch[0], (tuple, list))
        for index, row in enumerate(batch):
            _check_text(index, row, pairs)
        if pairs:
            batch = [tuple(row) for row in batch]
        if len(batch) > 1:
            sizes = _characters(batch, pairs)
            if sum(sizes) > _AT_ONCE:
                return Texts(self, list(batch), sizes, truncation)
        return self._tokens(batch, truncation)

    def _tokens(self, batch: Sequence, truncation: bool) -> TokenRows:
        """Of texts that have been checked."""
        encode = self._truncating if truncation else self._backend
        encodings = encode.encode_batch_fast(batch)
        rows = [encoding.ids for encoding in encodings]
        lengths = tuple(map(len, rows))
        ids = _flat(rows)
        if min(lengths) == 0 or not all_below(ids, self.vocab_size) or max(lengths) > self.max_length:
            self._refuse_text(rows)
        types = None
        if self.type_vocab_size > 1 and isinstance(batch[0], tuple):  # all 0 for a single text, whatever the family
            types = _flat([encoding.type_ids for encoding in encodings])
        return TokenRows(ids, types, lengths)

    def _doubtful(self, rows: list, sizes: np.ndarray, truncation: bool) -> np.ndarray:
        """Which rows might have too many tokens, none, or ids that the model has not. sizes: characters and special
        tokens; a token is a byte of the text at least, unless a tokenizer's normaliser makes text longer."""
        if self._knows_all is None:
            largest = max(self._backend.get_vocab(with_added_tokens=True).values())
            self._knows_all = largest < self.vocab_size and self._backend.num_special_tokens_to_add(False) > 0
        if not self._knows_all:
            return np.ones(len(rows), bool)
        if truncation:
            return np.zeros(len(rows), bool)
        wide = [not (row.isascii() if isinstance(row, str) else all(map(str.isascii, row))) for row in rows]
        return sizes * np.where(wide, 4, 1) > self.max_length

    def _refuse_text(self, rows: list[list[int]]) -> NoReturn:
        for index, ids in enumerate(rows):
            if not ids:
                raise ValueError(f"row {index} holds no token: the tokenizer finds nothing in it; leave the row out")
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
        raise AssertionError("no row is at fault")

    def _read_mapping(self, batch: Mapping, truncation: bool) -> TokenRows:
        for key in batch:
            if key not in _MAPPING_KEYS:
                unknown = sorted(set(batch) - set(_MAPPING_KEYS))
                raise ValueError(f"the batch has unknown keys {unknown}; allowed are {list(_MAPPING_KEYS)}")
        if "input_ids" not in batch:
            raise ValueError(f"the batch lacks input_ids; it has {list(batch)}")
        ids = _integers("input_ids", batch["input_ids"], None)
        mask = _integers("attention_mask", batch.get("attention_mask"), ids)
        types = _integers("token_type_ids", batch.get("token_type_ids"), ids)
        if self.type_vocab_size == 1:
            types = None
        if len(ids) == 0:
            return _NO_ROWS
        found = read_tokens(ids, mask, types, self.vocab_size, self.type_vocab_size)
        if found is None or (ids.shape[1] > self.max_length and max(found[2]) > self.max_length):
            self._refuse_mapping(ids, mask, types, truncation)
        return TokenRows(*found)

    def _refuse_mapping(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, truncation: bool) -> NoReturn:
        for index, row in enumerate(ids.tolist()):
            start, end = (0, len(row)) if mask is None else _block(index, mask[index].tolist())
            if start == end:
                raise ValueError(f"row {index} holds no token: input_ids has no columns")
            _check_ids("input_ids", index, start, row[start:end], self.vocab_size)
            if end - start > self.max_length:
                # Cutting ids would drop the final special token: only the tokenizer knows how to shorten a row.
                raise ValueError(
                    f"row {index} has {end - start} tokens, the model takes at most {self.max_length}: shorten it"
                    + (" (truncation=True shortens text only, not ids)" if truncation else "")
                )
            if types is not None:
                _check_ids("token_type_ids", index, start, types[index, start:end].tolist(), self.type_vocab_size)
        raise AssertionError("no row is at fault")


@dataclass(frozen=True, eq=False)
class Texts:
    """Many texts (or pairs), checked but for what only their tokens show.

    rows   the caller's, in a list of our own: what is tokenised later is what was checked
    sizes  characters of each row
    """

    reader: InputReader
    rows: list
    sizes: list[int]
    truncation: bool

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self) -> Iterator[tuple[np.ndarray, TokenRows]]:
        """(places in the batch, tokens) of all rows. ValueError names the first row at fault, as ``read`` does.

        A part is tokenised while the caller works on the one before it; those with rows that their tokens might show to
        be wrong, before the first part is given. They stand in front, then the longest, so that neighbours are alike in
        length.
        """
        sizes = np.array(self.sizes) + _SPECIAL
        doubtful = self.reader._doubtful(self.rows, sizes, self.truncation)
        order = np.lexsort((-sizes, ~doubtful))
        numbers = np.cumsum(sizes[order]) // _PART
        cuts = np.split(order, np.flatnonzero(np.diff(numbers)) + 1)
        ahead = sum(bool(doubtful[places].any()) for places in cuts)
        with closing(self._one_ahead(cuts)) as parts:
            yield from [next(parts) for _ in range(ahead)]
            yield from parts

    def _one_ahead(self, cuts: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, TokenRows]]:
        """The parts, the next one tokenised by a thread while the caller works on this one. Nothing is under way any
        more where it ends, or is closed."""
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
            waiting: Future | None = None
            for places in cuts:
                following = thread.submit(self._part, places)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            yield waiting.result()

    def _part(self, places: np.ndarray) -> tuple[np.ndarray, TokenRows]:
        try:
            return places, self.reader._tokens([self.rows[place] for place in places.tolist()], self.truncation)
        except ValueError as error:
            wrong = error  # numbered within the part
        self.reader._tokens(self.rows, self.truncation)  # names the first of all rows at fault
        raise wrong


def _characters(batch: Sequence, pairs: bool) -> list[int]:
    return [len(first) + len(second) for first, second in batch] if pairs else list(map(len, batch))


def join(parts: Sequence[TokenRows]) -> TokenRows:
    """The rows of one or more parts, of which all have types or none has."""
    if len(parts) == 1:
        return parts[0]
    types = None if parts[0].types is None else np.concatenate([part.types for part in parts])
    lengths = tuple(chain.from_iterable(part.lengths for part in parts))
    return TokenRows(np.concatenate([part.ids for part in parts]), types, lengths)


def _flat(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows[0], np.int64) if len(rows) == 1 else np.fromiter(chain.from_iterable(rows), np.int64)


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


def check_surrogates(where: str, text: str) -> None:
    """ValueError that begins with ``where``: of text that cannot be encoded."""
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError(f"{where} has half a surrogate pair, which no tokenizer takes: decode the text properly")


def _check_text(index: int, row: Any, pairs: bool) -> None:
    if pairs:
        if not isinstance(row, (tuple, list)) or len(row) != 2 or not all(isinstance(part, str) for part in row):
            raise TypeError(f"row {index} must be a pair of strings like row 0, got {_describe(row)}")
        empty = not row[0].strip() and not row[1].strip()
    else:
        if not isinstance(row, str):
            raise TypeError(f"row {index} must be a string, got {_describe(row)}")
        empty = not row.strip()
    check_surrogates(f"row {index}", "".join(row) if pairs else row)
    if empty:
        raise ValueError(f"row {index} is an empty string: there is nothing to classify; leave the row out")


def _describe(row: Any) -> str:
    if isinstance(row, (tuple, list)):
        return f"a {type(row).__name__} of {len(row)}: ({', '.join(type(part).__name__ for part in row)})"
    return f"{type(row).__name__}: {str(row)[:40]!r}"


def _integers(name: str, value: Any, like: Tensor | None) -> Tensor | None:
    """Rows of integers, int64 [N, S] on the host, contiguous. ``like``: a tensor that it must equal in shape; then None
    stays None."""
    if value is None and like is not None:
        return None
    if isinstance(value, Tensor):
        if (  # what tokenizers return
            value.dtype == torch.int64
            and value.is_cpu
            and value.is_contiguous()
            and len(value.shape) == 2
            and (like is None or value.shape == like.shape)
        ):
            return value
    else:
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
    if value.is_floating_point() or value.is_complex():
        if value.numel():
            raise TypeError(f"{name} must hold integers, got {value.dtype}")
        value = torch.empty(value.shape, dtype=torch.int64)  # what an empty list becomes is no number at all
    if like is not None and value.shape != like.shape and (len(value) or len(like)):
        raise ValueError(f"{name} has shape {list(value.shape)}, input_ids has {list(like.shape)}: they must be equal")
    return value.cpu().long().contiguous()
