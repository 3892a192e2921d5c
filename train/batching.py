"""Examples tokenised once, and cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.train.data import Examples


def shuffled_batches(n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """A random order of 0..n-1 cut into int64 index tensors; the last may be shorter."""
    yield from torch.randperm(n, generator=generator).split(_check_batch_size(batch_size))


@dataclass(frozen=True, eq=False)
class TokenizedExamples:
    """Examples tokenised once. ``fields`` maps input_ids (and token_type_ids, where the model reads them) to one
    (total_tokens,) int32 tensor each; row i is the slice offsets[i]:offsets[i+1], offsets (N + 1,) int64."""

    fields: Mapping[str, Tensor]
    offsets: Tensor
    label_ids: Tensor
    pad_token_id: int

    @classmethod
    def from_examples(cls, examples: Examples, tokenizer: Any, max_length: int = 128) -> TokenizedExamples:
        """``tokenizer``: a Hugging Face tokenizer with a padding token. The longer text of a pair is cut first."""
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token, e.g. to its eos_token")
        if not len(examples):
            raise ValueError("there are no examples to tokenise")
        sides = zip(*examples.texts, strict=True) if examples.is_pair else (examples.texts,)
        encoded = tokenizer(
            *map(list, sides), truncation=True, max_length=max_length, padding=False, return_attention_mask=False
        )
        lengths = torch.tensor([len(ids) for ids in encoded["input_ids"]])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        fields = {
            name: torch.tensor([token for row in encoded[name] for token in row], dtype=torch.int32)
            for name in ("input_ids", "token_type_ids")
            if name in encoded
        }
        return cls(fields, offsets, examples.label_ids, tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.label_ids)

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def select(self, indices: Tensor) -> TokenizedExamples:
        """The rows ``indices`` (n,) int64, in that order."""
        lengths = self.lengths[indices]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        row = torch.repeat_interleave(torch.arange(len(indices)), lengths)
        source = self.offsets[indices][row] + torch.arange(int(offsets[-1])) - offsets[row]
        fields = {name: tokens[source] for name, tokens in self.fields.items()}
        return TokenizedExamples(fields, offsets, self.label_ids[indices], self.pad_token_id)

    def collate(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows ``indices`` (B,), padded on the right to the longest: input_ids, attention_mask and maybe
        token_type_ids (B, T), labels and indices (B,), all int64."""
        lengths = self.lengths[indices]
        position = torch.arange(int(lengths.max()))
        mask = position < lengths[:, None]
        source = (self.offsets[indices][:, None] + position)[mask]
        batch = {}
        for name, tokens in self.fields.items():
            batch[name] = torch.full(mask.shape, self.pad_token_id if name == "input_ids" else 0)
            batch[name][mask] = tokens[source].long()
        return batch | {"attention_mask": mask.long(), "labels": self.label_ids[indices], "indices": indices}

    def batches(
        self,
        batch_size: int,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        length_bucketing: bool = True,
    ) -> Iterator[dict[str, Tensor]]:
        """Every row once, in padded batches (see ``collate``); the last one cut may be shorter.

        Bucketing puts rows of like length together: with ``shuffle`` inside random windows of 50 batches, whose
        batches are then mixed; without, over all rows, shortest first. Use ``indices`` to restore row order.
        """
        _check_batch_size(batch_size)
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        if length_bucketing:
            windows = order.split(batch_size * 50) if shuffle else (order,)
            order = torch.cat([w[self.lengths[w].argsort(stable=True)] for w in windows])
        parts = order.split(batch_size)
        mixed = torch.randperm(len(parts), generator=generator) if shuffle else torch.arange(len(parts))
        for part in mixed.tolist():
            yield self.collate(parts[part])


def _check_batch_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return batch_size
