"""Eager execution over packed rows: layer, exit check, compact. Every later layer really is smaller."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.criteria import ExitReading
from engine.executors.base import AtOnce, ExitOptions, PackedBatch, RowOutputs, TokenRows, capacity, ladder
from engine.executors.weights import EncoderWeights, ExitWeights, LayerWeights, WatchedWeights, derive
from engine.kernels.attention import ALL_TOKENS, FIRST_TOKENS, OTHER_TOKENS
from engine.kernels.encoder import EncoderPlan, run_encoder
from engine.kernels.exits import embed_layer_norm, exit_policy
from engine.kernels.packing import compact_lead
from engine.models.encoder import MultiExitEncoder

# First tokens first reads three of a layer's four weights twice. That costs as much as the products of about this many
# more tokens, and saves three quarters of the work of every leaving row's other tokens. MiniLM on two cores, AVX2 and
# AVX-512: 3 to 7 are the best from 1 to 8 rows and 6 to 14 at 16 and 32; 10 costs 4 % at one row, 40 costs 4 to 28 %.
_SECOND_PASS_TOKENS = 6


def first_tokens_first(rows: int, tokens: int, leave_rate: float) -> bool:
    """Whether serving first tokens, and then the survivors' others, is expected to beat the whole layer."""
    return 0.75 * leave_rate * (tokens - rows) > _SECOND_PASS_TOKENS


class PackedExecutor(AtOnce):
    """Runs a MultiExitEncoder on packed rows, on the device and in the dtype of its weights.

    Where our own kernel serves every product and the criterion is one comparison or a script, the whole pass is one op;
    else it goes op by op.
    """

    name = "packed"

    def __init__(self, model: MultiExitEncoder, watching: bool = True):
        self.weights = WatchedWeights(model, watching, derive)

    def watch(self) -> None:
        """From now on somebody else may change the module: ``look`` reads all weights."""
        self.weights.watching = True

    def look(self) -> None:
        """See what somebody else has done to the module."""
        self.weights.current()

    def refresh(self) -> None:
        """Read the module's weights again now."""
        self.weights.refresh()

    def run(self, rows: TokenRows, options: ExitOptions) -> RowOutputs:
        """Exit layer, exit probability and class logits of every row. rows and options stand on the host."""
        weights = self.weights.held()
        if weights.plan is not None and options.no_comparison is None:
            return _run_at_once(weights.plan, rows, options)
        with torch.inference_mode():
            device = weights.word.device
            batch = PackedBatch.from_rows(rows, weights.first_position, device, weights.own_kernel)
            outputs = _Pass(weights, batch, options.to(device)).run()
            if device.type == "cuda":
                # Where another thread has derived new weights meanwhile, these go now, to others on its stream.
                torch.cuda.current_stream(device).synchronize()
            return outputs


def _run_at_once(plan: EncoderPlan, rows: TokenRows, options: ExitOptions) -> RowOutputs:
    name, types = options.criterion.policy_threshold, rows.segments
    outputs = run_encoder(
        plan,
        torch.from_numpy(rows.ids),
        None if types is None else torch.from_numpy(types),
        rows.lengths,
        None if name is None else options.begin()[name],
        options.exit_layers if name is None else None,
        *options.depth_limits,
        options.leave_rates_read,
        options.deepest,
        _SECOND_PASS_TOKENS,
    )
    return RowOutputs(*outputs)


class _Kept(NamedTuple):
    """Survivors of an exit among the rows before it: bool mask, and int64 places."""

    mask: Tensor
    index: Tensor


class _Left(NamedTuple):
    """Rows that left together. logits: of the policy; inf where the row had to leave, nan where none was computed."""

    layer: int
    rows: list[int]
    classes: Tensor
    logits: Tensor | None


def _exit_probs(part: _Left, device: torch.device) -> Tensor:
    return torch.ones(len(part.rows), device=device) if part.logits is None else torch.sigmoid(part.logits.float())


class _Pass:
    """One batch on its way down. ``hidden`` [R, H] in lead layout, over the rows that are still active; rows behind
    their ``num_tokens`` are spare, and so are those behind the first ``num_rows`` of what serves first tokens."""

    def __init__(self, weights: EncoderWeights, batch: PackedBatch, options: ExitOptions):
        self.weights, self.options = weights, options
        self.cu_seqlens = batch.cu_seqlens
        self.num_rows = len(batch.lengths)
        self.batch_rows = self.num_rows
        self.num_tokens = sum(batch.lengths)
        self.hidden = embed_layer_norm(
            batch.input_ids,
            batch.token_type_ids,
            batch.positions,
            weights.word,
            weights.token_type,
            weights.position,
            *weights.embedding_norm,
        )
        self.active = list(range(self.num_rows))  # original row of each active row
        self.state = options.begin()
        if not options.uniform:
            self.state = {**self.state, "_min_depth": options.min_depth, "_max_depth": options.max_depth}
        self.left: list[_Left] = []

    def run(self) -> RowOutputs:
        layer, deepest = 0, self.options.deepest
        while self.num_rows and layer < deepest:
            layer += 1
            weights, exit_weights = self.weights.layers[layer - 1], self.weights.exits.get(layer)
            if layer == deepest:
                # Nobody goes on: the other tokens end here.
                qkv = weights.qkv(self.hidden)
                first = self._first_tokens(weights, qkv)[: self.num_rows]
                self._leave(layer, exit_weights, self.active, exit_weights.state(first), None)
                break
            if exit_weights is None or not self.options.reads_exit(layer):
                self.hidden = self._whole_layer(weights)
            elif self._first_tokens_first(layer):
                self._layer_first_tokens_first(layer, weights, exit_weights)
            else:
                self._layer_then_exit(layer, weights, exit_weights)
        return self._results()

    # -- layers --------------------------------------------------------------------------------------------------

    def _first_tokens_first(self, layer: int) -> bool:
        return first_tokens_first(self.num_rows, self.num_tokens, self.options.leave_rates[layer])

    def _finish(
        self, weights: LayerWeights, qkv: Tensor, rows: Tensor | None, residual: Tensor, part: int
    ) -> Tensor:
        return weights.finish(qkv, self.cu_seqlens, rows, residual, self.weights.heads, part)

    def _first_tokens(self, weights: LayerWeights, qkv: Tensor) -> Tensor:
        size = ladder(self.num_rows, self.weights.own_kernel)
        return self._finish(weights, qkv, None, self.hidden[:size], FIRST_TOKENS)

    def _whole_layer(self, weights: LayerWeights) -> Tensor:
        return self._finish(weights, weights.qkv(self.hidden), None, self.hidden, ALL_TOKENS)

    def _layer_then_exit(self, layer: int, weights: LayerWeights, exit_weights: ExitWeights) -> None:
        self.hidden = self._whole_layer(weights)
        first = self.hidden[: self.num_rows]
        kept = self._exit(layer, exit_weights, first, *self._read(exit_weights, first))
        if kept is not None and self.num_rows:
            self.hidden, self.cu_seqlens, _ = self._compact(kept.mask)

    def _layer_first_tokens_first(self, layer: int, weights: LayerWeights, exit_weights: ExitWeights) -> None:
        qkv = weights.qkv(self.hidden)
        first = self._first_tokens(weights, qkv)[: self.num_rows]
        kept = self._exit(layer, exit_weights, first, *self._read(exit_weights, first))
        if self.num_rows == 0:
            return
        rows, residual, cu_seqlens = None, self.hidden, self.cu_seqlens
        if kept is not None:
            residual, cu_seqlens, rows = self._compact(kept.mask)
            first = first[kept.index]
        size = ladder(self.num_tokens - self.num_rows, self.weights.own_kernel)
        if size:
            others = self._finish(weights, qkv, rows, residual[self.num_rows : self.num_rows + size], OTHER_TOKENS)
            self.hidden = torch.cat([first, others, residual[self.num_rows + size :]])
        else:
            self.hidden = torch.cat([first, residual[self.num_rows :]])
        self.cu_seqlens = cu_seqlens

    # -- exits ---------------------------------------------------------------------------------------------------

    def _read(self, weights: ExitWeights, first: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the exit reads of the active rows' first tokens, and the policy's logits where the criterion asks."""
        if self.options.criterion.needs_policy:
            return exit_policy(first, *(weights.pooler or (None, None)), *weights.policy)
        return weights.state(first), None

    def _exit(
        self, layer: int, weights: ExitWeights, first: Tensor, state: Tensor, logits: Tensor | None
    ) -> _Kept | None:
        """Decide about the active rows and let the leaving ones go.

        Returns None where nobody leaves; else num_rows, active and the per-row state are those of the survivors.
        """
        options = self.options
        criterion = options.criterion
        classes = weights.classifier(state).float() if criterion.needs_classifier else None
        if criterion.may_decide(layer):
            leave = criterion.decide(ExitReading(layer, first, logits, classes), self.state)
        else:
            leave = torch.zeros(self.num_rows, dtype=torch.bool, device=first.device)
        if layer < options.shallowest:  # read for the criterion's state alone
            return None
        if not options.uniform:
            forced = self.state["_max_depth"] <= layer
            leave = (leave & (self.state["_min_depth"] <= layer)) | forced
            if logits is not None:
                logits = logits.masked_fill(forced, torch.inf)
            else:
                logits = torch.where(forced, torch.inf, torch.nan)
        elif logits is None:
            logits = torch.full((self.num_rows,), torch.nan, device=first.device)
        flags = leave.tolist()  # the read-back: on a CPU it costs nothing
        if True not in flags:
            return None
        leaving = [i for i, flag in enumerate(flags) if flag]
        if len(leaving) == len(flags):
            self._leave(layer, weights, self.active, state, logits)
            self.num_rows = 0
            return _Kept(~leave, leave)
        index = torch.tensor(leaving, device=first.device)
        self._leave(layer, weights, [self.active[i] for i in leaving], state[index], logits[index])
        kept = [i for i, flag in enumerate(flags) if not flag]
        index = torch.tensor(kept, device=first.device)
        self.num_rows = len(kept)
        self.active = [self.active[i] for i in kept]
        self.state = {name: value[index] for name, value in self.state.items()}
        return _Kept(~leave, index)

    def _leave(
        self, layer: int, weights: ExitWeights, rows: list[int], state: Tensor, logits: Tensor | None
    ) -> None:
        """Classify rows that leave at ``layer``. state: what the exit's classifier reads, one entry a row."""
        self.left.append(_Left(layer, rows, weights.classifier(state), logits))

    def _results(self) -> RowOutputs:
        """What every row left with, in the batch's order."""
        if len(self.left) == 1:  # everybody together, in order: no tensor is joined or moved
            part = self.left[0]
            classes, n = part.classes.float(), len(part.rows)
            layers = torch.full((n,), part.layer, dtype=torch.int32, device=classes.device)
            return RowOutputs(classes, layers, _exit_probs(part, classes.device))
        classes = torch.cat([part.classes for part in self.left]).float()
        device = classes.device
        layers = [part.layer for part in self.left for _ in part.rows]
        outputs = RowOutputs(
            classes,
            torch.tensor(layers, dtype=torch.int32, device=device),
            torch.cat([_exit_probs(part, device) for part in self.left]),
        )
        place = [0] * self.batch_rows
        for position, row in enumerate(row for part in self.left for row in part.rows):
            place[row] = position
        index = torch.tensor(place, device=device)
        return RowOutputs(*(value[index] for value in outputs))

    # -- compaction ----------------------------------------------------------------------------------------------

    def _compact(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Survivors' tokens in lead layout, their cu_seqlens, and their rows among those before."""
        compact, cu_seqlens, rows, _ = compact_lead(self.hidden, self.cu_seqlens, keep)
        cu_seqlens = cu_seqlens[: self.num_rows + 1]
        self.num_tokens = int(cu_seqlens[-1])
        size = capacity(self.num_rows, self.num_tokens, self.weights.own_kernel)
        return compact[:size], cu_seqlens, rows[: self.num_rows]
