"""The kernels of one pass, in order: what a program of ``graph`` captures, or runs step by step.

Everything has room for the capacity; which rows are live stands on the device (``Live``), and an exit writes it anew
into a record of its own. ``survivors_`` says where each token goes; who moves it is the next Add & Norm:

* at once: the one behind the exit, for which the exit has taken the norm of the first tokens alone;
* delayed: the first one of the next layer, whose attention still sees all rows, those that leave, too. The exit then
  runs beside the norm in front of it and ``survivors_`` beside that attention (``Removal``), so it costs no launch more
  than no exit, but where a conditional node asks who is left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from engine.executors.weights import EncoderWeights, ExitWeights, LayerWeights, PlainLinear
from engine.kernels.exit_rows import ExitDestinations, ExitLimits
from engine.kernels.gpu_attention import REMOVAL_ROWS, varlen_attention_
from engine.kernels.gpu_common import ROWS, TOKENS
from engine.kernels.gpu_exit import exit_add_norm_rows_, exit_norm_rows_, exit_rows_
from engine.kernels.gpu_linear import linear_rows_
from engine.kernels.gpu_norms import add_layer_norm_compact_, add_layer_norm_rows_, embed_layer_norm_rows_
from engine.kernels.products import (
    Partials,
    partials_memory,
    product_partials,
    product_problem,
    product_workspace,
)
from engine.kernels.survivors import Removal, survivors_

# Largest capacity at which tokens move with a delay. At every exit that saves the exit's own launch, 5 us of an H100. A
# row pays once, where it leaves: QKV, attention and output projection for nobody, some 9 ns a token of BERT-base.
# Measured on an H200, whose exits are found beside the next attention then: 3 to 4 % faster at 32 x 128 tokens where
# nobody leaves and 1 % with exits spread over all layers; at 40 x 128 half a percent faster and 1 % slower.
_DELAY_TOKENS = 4096

# Largest capacity at which a conditional node pays: nobody is left in the middle of a pass of few rows alone.
_STAGE_ROWS = 16


def stage_layers(deepest: int, rows: int) -> int:
    """Layers between two conditional nodes: with few rows one node, in the middle of the pass, and never fewer than
    three layers; with many none.

    A node costs 15 to 40 us where it is taken (with half of BERT-base behind it), a layer of kernels that find no rows
    about 8. With a node every three layers, a pass that nobody leaves took 3 to 5 % longer on an H100; with none at 32
    rows it takes 2 % less than with one. An H200 takes 3 to 5 % less without it at 1 to 8 rows where some row stays to
    the end, and 25 to 45 % more where all leave in the first half: it pays from one pass in ten on that ends there.
    """
    return max(3, -(-deepest // 2)) if rows <= _STAGE_ROWS else deepest + 1


class Capacity(NamedTuple):
    """What a program has room for."""

    rows: int
    tokens: int
    longest: int


class Steps(NamedTuple):
    """What a program does, beside its capacity. reads: layers whose exit is read; criterion: of ``exit_rows_``."""

    criterion: str
    reads: tuple[int, ...]
    deepest: int


class Live(NamedTuple):
    """The live rows: how many rows and tokens, where their tokens stand, which rows of the batch they are."""

    counts: Tensor
    cu_seqlens: Tensor
    row_ids: Tensor


class Arena:
    """Activations of up to ``tokens`` tokens. One pass at a time uses them, so all programs share the largest made."""

    def __init__(self, tokens: int, hidden: int, wide: int, like: Tensor):
        def rows(width: int) -> Tensor:
            return torch.zeros(tokens, width, dtype=like.dtype, device=like.device)

        self.tokens = tokens
        self.hidden, self.attended, self.x, self.projected = (rows(hidden) for _ in range(4))
        self.qkv, self.inner = rows(3 * hidden), rows(wide)
        self.workspace, self.sums = product_workspace(like.device), partials_memory(like)
        self.bytes = sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))


class Pass:
    """Everything between a batch's ids and its results, for one capacity, in buffers that never move.

    given  what the host has written: counts, cu_seqlens, row_ids; min_depth, max_depth, threshold_logit (the bits of
           fp32) and script by original row; input_ids, positions, token_type_ids. All int32
    out    where results go
    """

    def __init__(
        self,
        weights: EncoderWeights,
        arena: Arena,
        capacity: Capacity,
        steps: Steps,
        given: dict[str, Tensor],
        out: ExitDestinations,
    ):
        self.weights, self.arena, self.capacity, self.steps = weights, arena, capacity, steps
        self._given, self._out = given, out
        self._delays = capacity.tokens <= _DELAY_TOKENS
        first = Live(given["counts"], given["cu_seqlens"], given["row_ids"])
        # What an exit writes goes into one of two records by turns; what was given stays for the next launch.
        self._lives = first, *(Live(*map(torch.zeros_like, first)) for _ in range(2))
        self._token_dest = torch.zeros_like(given["input_ids"])
        self._first, self._state = (torch.zeros_like(arena.hidden[:1]).repeat(capacity.rows, 1) for _ in range(2))

    @property
    def bytes(self) -> int:
        """Of its own on the device."""
        own = (*self._lives[1], *self._lives[2], self._token_dest, self._first, self._state)
        return sum(t.nbytes for t in own)

    def record(self, when: Callable[[Tensor], AbstractContextManager[None]]) -> None:
        """Launch it on the current stream. ``with when(flag)``: what is launched inside runs if the flag is not 0."""
        w, steps, given = self.weights, self.steps, self._given
        hidden, now = self.arena.hidden[: self.capacity.tokens], self._lives[0]
        embed_layer_norm_rows_(
            hidden,
            given["input_ids"],
            None if w.token_type is None else given["token_type_ids"],
            given["positions"],
            w.word,
            w.token_type,
            w.position,
            *w.embedding_norm,
            now.counts,
        )
        with ExitStack() as stages:
            stage = stage_layers(steps.deepest, self.capacity.rows)
            since, left_behind = 0, False  # layers since the last stage; whether rows can have left since
            before: Live | None = None  # the rows as hidden still has them, where their move is delayed
            removal: Removal | None = None  # where ``now`` is still to be found, beside the attention of ``before``
            for layer in range(1, steps.deepest + 1):
                if left_behind and since >= stage:
                    stages.enter_context(when(now.counts[:1]))
                    since, left_behind = 0, False
                since += 1
                if layer == steps.deepest:
                    self._last_layer(layer, now)
                    break
                x, projected, partials = self._layer(w.layers[layer - 1], now, before, removal)
                norm, before, removal = w.layers[layer - 1].output_norm, None, None
                if layer not in steps.reads:
                    add_layer_norm_rows_(hidden, projected, x, *norm, now.counts, TOKENS, partials=partials)
                    continue
                after = self._lives[2] if now is self._lives[1] else self._lives[1]
                # The last layer serves first tokens alone: it has no Add & Norm that could move the others.
                if self._delays and layer + 1 < steps.deepest:
                    self._exit(layer, now, x, projected, partials, norm, normed=hidden)
                    before, removal = now, self._removal(now, after)
                    if since >= stage or self.capacity.rows > REMOVAL_ROWS:  # a node asks whether anybody is left
                        self._find_survivors(now, removal)
                        removal = None
                else:
                    self._exit(layer, now, x, projected, partials, norm)
                    self._find_survivors(now, self._removal(now, after))
                    add_layer_norm_compact_(hidden, projected, x, *norm, now.counts, self._token_dest, partials)
                now, left_behind = after, True

    def _layer(
        self, w: LayerWeights, now: Live, before: Live | None, removal: Removal | None
    ) -> tuple[Tensor, Tensor, Partials | None]:
        """A layer up to its last Add & Norm: (x, projected, partials), the normed sum of x and projected being its
        result. before, removal: see ``record``."""
        a, tokens = self.arena, self.capacity.tokens
        hidden, attended, x, projected, inner = (
            buffer[:tokens] for buffer in (a.hidden, a.attended, a.x, a.projected, a.inner)
        )
        standing = now if before is None else before
        # Of what an exit has found and this attention finds there is always a product between writer and reader, which
        # therefore may load it before its wait.
        self._attend(w.qkv, attended, standing, first_only=False, removal=removal)
        partials = self._project(projected, attended, w.attention_output, standing.counts, TOKENS)
        norm = w.attention_norm
        if before is None:
            add_layer_norm_rows_(x, projected, hidden, *norm, now.counts, TOKENS, partials=partials)
        else:
            add_layer_norm_compact_(
                x, projected, hidden, *norm, before.counts, self._token_dest, partials, settled=True
            )
        inner = inner[:, : w.intermediate.weight.shape[0]]  # layers may differ
        self._multiply(inner, x, w.intermediate, now.counts, TOKENS, "gelu")
        return x, projected, self._project(projected, inner, w.output, now.counts, TOKENS)

    def _last_layer(self, layer: int, now: Live) -> None:
        """Nobody goes on: behind keys and values, first tokens alone, one a row."""
        w, a, rows, counts = self.weights.layers[layer - 1], self.arena, self.capacity.rows, now.counts
        attended, x, projected, inner = (b[:rows] for b in (a.attended, a.x, a.projected, a.inner))
        self._attend(w.qkv, attended, now, first_only=True)
        partials = self._project(projected, attended, w.attention_output, counts, ROWS)
        add_layer_norm_rows_(
            x, projected, a.hidden, *w.attention_norm, counts, ROWS, now.cu_seqlens, partials=partials
        )
        inner = inner[:, : w.intermediate.weight.shape[0]]
        self._multiply(inner, x, w.intermediate, counts, ROWS, "gelu")
        partials = self._project(projected, inner, w.output, counts, ROWS)
        self._exit(layer, now, x, projected, partials, w.output_norm, compact=True)

    def _multiply(
        self,
        out: Tensor,
        x: Tensor,
        linear: PlainLinear,
        counts: Tensor,
        which: int,
        act: str = "none",
    ) -> None:
        linear_rows_(out, x, *linear, counts, which, act, workspace=self.arena.workspace)

    def _project(
        self, out: Tensor, x: Tensor, linear: PlainLinear, counts: Tensor, which: int
    ) -> Partials | None:
        """A product that an Add & Norm reads next: with few rows that one adds up the partial sums returned here."""
        if self.arena.sums is None or product_problem(out, x, *linear, "none") is not None:
            self._multiply(out, x, linear, counts, which)
            return None
        partials = product_partials(self.arena.sums, *linear.weight.shape)
        linear_rows_(out, x, *linear, counts, which, partials=partials)
        return partials

    def _attend(
        self, qkv: PlainLinear, attended: Tensor, now: Live, first_only: bool, removal: Removal | None = None
    ) -> None:
        a, tokens, heads = self.arena, self.capacity.tokens, self.weights.heads
        self._multiply(a.qkv[:tokens], a.hidden[:tokens], qkv, now.counts, TOKENS)
        varlen_attention_(
            attended,
            a.qkv[:tokens],
            now.cu_seqlens,
            now.counts,
            heads.num_heads,
            heads.scale,
            self.capacity.longest,
            heads.position_bias,
            first_only,
            removal=removal,
        )

    def _exit(
        self,
        layer: int,
        now: Live,
        x: Tensor,
        projected: Tensor,
        partials: Partials | None,
        norm: tuple,
        normed: Tensor | None = None,
        compact: bool = False,
    ) -> None:
        """The exit behind ``layer``, on each row's first token. normed: where the norm of all tokens goes, if it is
        wanted; compact: x and projected hold one row a row, and nobody goes on."""
        weights: ExitWeights = self.weights.exits[layer]
        given, out = self._given, self._out
        limits = ExitLimits(
            now.row_ids,
            given["min_depth"],
            given["max_depth"],
            given["threshold_logit"].view(torch.float32),
            given["script"],
            by_row_id=True,
        )
        index = None if compact else now.cu_seqlens
        criterion = "last" if compact else self.steps.criterion
        decision = now.counts, layer, criterion, weights.policy, tuple(weights.classifier)
        if weights.pooler is None:
            if normed is None:
                exit_norm_rows_(out, limits, projected, x, norm, *decision, index, partials)
            else:
                exit_add_norm_rows_(
                    out, limits, normed, projected, x, norm, *decision, index, partials=partials
                )
            return
        add_layer_norm_rows_(self._first, projected, x, *norm, now.counts, ROWS, index, index, partials)
        self._multiply(self._state, self._first, PlainLinear(*weights.pooler), now.counts, ROWS, "tanh")
        if normed is None:
            exit_rows_(out, limits, self._state, *decision)
        else:
            exit_add_norm_rows_(out, limits, normed, projected, x, norm, *decision, None, self._state, partials)

    def _removal(self, now: Live, after: Live) -> Removal:
        return Removal(
            self._out.keep, now.row_ids, after.cu_seqlens, self._token_dest, after.counts, after.row_ids
        )

    def _find_survivors(self, now: Live, removal: Removal) -> None:
        keep, row_ids, *written, out_row_ids = removal
        survivors_(keep, now.cu_seqlens, now.counts, [row_ids], *written, [out_row_ids])
