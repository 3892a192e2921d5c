"""How hard an instance is: memorized layer (ConsistentEE, Eq. 7) and forgetting events (Toneva et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.train.objectives import check_exit_layers


def memorized_layer(correct: Tensor, exit_layers: Sequence[int]) -> Tensor:
    """First exit layer from which on every exit is correct, (N,) int64 layer numbers (Eq. 7).

    correct  (N, E) bool, whether exit k predicts the gold label; training set, eval mode (no dropout)
    A row that is wrong at the last exit gets the last layer, whatever it was before: never correct, or correct
    and lost again. Hardness is the result divided by the number of layers.
    """
    if correct.ndim != 2 or correct.dtype != torch.bool:
        raise TypeError(f"correct must be a bool tensor (N, E), got {correct.dtype} {tuple(correct.shape)}")
    layers = torch.tensor(check_exit_layers(exit_layers, correct.shape[1]), device=correct.device)
    correct_run = correct.flip(1).long().cumprod(1).sum(1)
    return layers[(len(layers) - correct_run).clamp(max=len(layers) - 1)]


class ForgettingEvents:
    """Counts, per training instance, how often it went from correct to incorrect between two looks at it.

    A look is one ``update`` containing the instance, e.g. its minibatch of each epoch (at the last exit). As in
    Toneva et al. (2019) an instance counts as incorrect before its first look, so an instance that is never
    correct has 0 events: it is *never learned*, not unforgettable. The paper sorts those as forgotten infinitely
    often; here ``counts`` stays the plain count and ``never_learned`` is reported beside it.
    """

    def __init__(self, num_instances: int):
        if num_instances < 1:
            raise ValueError(f"num_instances must be at least 1, got {num_instances}")
        self._counts = torch.zeros(num_instances, dtype=torch.int64)
        self._looks = torch.zeros(num_instances, dtype=torch.int64)
        self._last_correct = torch.zeros(num_instances, dtype=torch.bool)
        self._ever_correct = torch.zeros(num_instances, dtype=torch.bool)

    def update(self, indices: Tensor, correct: Tensor) -> None:
        """Record one look: ``indices`` (B,) int64, distinct, and ``correct`` (B,) bool of the same instances."""
        indices, correct = indices.cpu(), correct.cpu()
        if indices.ndim != 1 or indices.shape != correct.shape or correct.dtype != torch.bool:
            raise ValueError(
                f"indices and correct must be (B,) int64 and (B,) bool, got {indices.dtype} "
                f"{tuple(indices.shape)} and {correct.dtype} {tuple(correct.shape)}"
            )
        size = len(self._counts)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(f"indices must lie in 0..{size - 1}, got {int(indices.min())}..{int(indices.max())}")
        if len(indices.unique()) != len(indices):
            raise ValueError("indices repeat within one update: the order of the two looks would be unknown")
        self._counts[indices] += self._last_correct[indices] & ~correct
        self._looks[indices] += 1
        self._last_correct[indices] = correct
        self._ever_correct[indices] |= correct

    @property
    def counts(self) -> Tensor:
        """Forgetting events per instance, (num_instances,) int64."""
        return self._counts.clone()

    @property
    def looks(self) -> Tensor:
        """How often each instance was looked at, (num_instances,) int64."""
        return self._looks.clone()

    @property
    def never_learned(self) -> Tensor:
        """Looked at, and incorrect every time; (num_instances,) bool."""
        return ~self._ever_correct & (self._looks > 0)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"_{name}").clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(_STATE):
            raise ValueError(f"state must have the keys {_STATE}, got {tuple(sorted(state))}")
        for name in _STATE:
            mine, given = getattr(self, f"_{name}"), state[name]
            if given.shape != mine.shape or given.dtype != mine.dtype:
                raise ValueError(
                    f"state[{name!r}] must be {mine.dtype} {tuple(mine.shape)}, got {given.dtype} "
                    f"{tuple(given.shape)}: it was saved for another training set"
                )
        for name in _STATE:
            setattr(self, f"_{name}", state[name].detach().cpu().clone())


_STATE = ("counts", "looks", "last_correct", "ever_correct")
