"""One decode step as a fixed sequence of kernels: what a program of ``graph`` captures, or runs one by one.

Rows of the step stand in buffers by their place in the batch and never move; which of them are still on their way, and
in what order, is a list on the device (``order``, ``counts``). Behind every layer ``step_rows_`` writes that list anew
without those that have left, and lists what the next layer owes to those that go on: positions whose keys and values it
lacks (state copying). They ride along in that layer's product of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.decoding.cache import PagedCache
from engine.executors.weights import effective_linear
from engine.kernels.gpu_decode_attention import decode_attention_, decode_attention_workspace
from engine.kernels.gpu_greedy import TOLD, greedy_rows_
from engine.kernels.gpu_measures import classifier_rows_, response_rows_, saturation_rows_
from engine.kernels.gpu_policy import delta_rows_, policy_rows_, policy_splits
from engine.kernels.gpu_qkv import qkv_rows_
from engine.kernels.gpu_qkv_entries import qkv_entries
from engine.kernels.gpu_stream import stream_rows_, stream_workspace
from engine.kernels.step_rows import DECIDE, LEAVE, STAY, step_rows_
from engine.models.decoder import MultiExitDecoder

# --- weights ---------------------------------------------------------------------------------------------------------


class StepLayer(NamedTuple):
    """One layer: products as nn.Linear holds them, norms as (weight, eps)."""

    input_norm: tuple[Tensor, float]
    qkv: Tensor
    attention_output: Tensor
    mlp_norm: tuple[Tensor, float]
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class StepWeights:
    """A LLaMA decoder with exits. E exits, K the rank of what they add to the head.

    cos, sin   [positions, head_dim]
    policies   of every exit but the last: w1, b1, w2, b2
    deltas     a [E, K, H] and b [E, H, K] of heads on the hidden side, or None
    head       [V, H], or None where an exit's head is more than that: the modules then serve
    classifier CALM's early-exit classifier: weight [1, H] and bias [1], or None
    """

    embedding: Tensor
    cos: Tensor
    sin: Tensor
    final_norm: tuple[Tensor, float]
    scale: float
    layers: tuple[StepLayer, ...]
    exit_layers: tuple[int, ...]
    policies: tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]
    deltas: tuple[Tensor, Tensor] | None
    head: Tensor | None
    classifier: tuple[Tensor, Tensor] | None


def step_problem(model: MultiExitDecoder) -> str | None:
    """Why the kernels of a step do not serve this model, or None."""
    hf = model.language_model.config
    if hf.hidden_act != "silu":
        return f"its activation is {hf.hidden_act}, the kernels know silu"
    if model.dtype == torch.float64:
        return "it is in float64, the kernels know float16, bfloat16 and float32"
    try:
        for layer in model.backbone.layers:
            attention, mlp = layer.self_attn, layer.mlp
            products = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj,
                        mlp.up_proj, mlp.down_proj)  # fmt: skip
            if any(bool(effective_linear(product)[1].any()) for product in products):
                return "its products have biases"
    except TypeError as error:
        return str(error)
    return None


def _side_by_side(*modules: nn.Module) -> Tensor:
    """The weights of products of the same rows as one tensor [sum of N, K], which the modules share from then on.

    A plain module's own parameter becomes a view of it; what an active adapter adds is a copy.
    """
    weights = [effective_linear(module)[0].detach() for module in modules]
    first, size = weights[0], sum(w.shape[0] for w in weights)
    place = first.data_ptr()
    for w in weights:  # already views of one tensor, from an earlier time
        if (
            not w.is_contiguous()
            or w.data_ptr() != place
            or w.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            break
        place += w.nbytes
    else:
        return first.as_strided((size, first.shape[1]), (first.shape[1], 1))
    whole = torch.cat(weights)
    start = 0
    for module, w in zip(modules, weights, strict=True):
        if getattr(module, "weight", None) is not None and module.weight.data_ptr() == w.data_ptr():
            module.weight.data = whole[start : start + w.shape[0]]
        start += w.shape[0]
    return whole


@torch.no_grad()
def step_weights(model: MultiExitDecoder) -> StepWeights:
    """Everything that a step reads, in the module's own storage but for what active adapters change."""
    backbone, config, exits = model.backbone, model.config, model.exits
    layers = []
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        before, behind = layer.input_layernorm, layer.post_attention_layernorm
        layers.append(
            StepLayer(
                (before.weight.detach(), before.variance_epsilon),
                _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
                effective_linear(attention.o_proj)[0].detach(),
                (behind.weight.detach(), behind.variance_epsilon),
                _side_by_side(mlp.gate_proj, mlp.up_proj),
                effective_linear(mlp.down_proj)[0].detach(),
            )
        )
    cos, sin = model.rope(torch.arange(config.max_length, device=model.device))
    shared, deltas, classifier = config.head == "shared", None, exits.early_exit_classifier
    if config.head == "lora" and config.head_side == "hidden":
        shared = True
        deltas = torch.stack([d.a.weight for d in exits.deltas]), torch.stack([d.b.weight for d in exits.deltas])
    return StepWeights(
        embedding=backbone.embed_tokens.weight.detach(),
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        final_norm=(backbone.norm.weight.detach(), backbone.norm.variance_epsilon),
        scale=backbone.layers[0].self_attn.scaling,
        layers=tuple(layers),
        exit_layers=tuple(config.exit_layers),
        policies=tuple(
            (p.dense.weight.detach(), p.dense.bias.detach(), p.out.weight.detach(), p.out.bias.detach())
            for p in exits.policies
        ),
        deltas=deltas,
        head=effective_linear(model.language_model.lm_head)[0].detach() if shared else None,
        classifier=None if classifier is None else (classifier.weight.detach(), classifier.bias.detach()),
    )


# --- buffers ---------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What the host writes for a step, all int32 on the device, by place in the batch. R rows, L layers.

    counts [2]: rows, 0; positions, slots [R]; threshold_logit [R], the bits of fp32; script, min_depth, max_depth [R];
    block_table [R, blocks]; and what a step leaves behind as the next one of the same rows needs it, so that the host
    need not: ids [R], and watermarks [R, L] but for the first layer's, which no step reads or moves: nothing is owed it
    """

    counts: Tensor
    positions: Tensor
    slots: Tensor
    threshold_logit: Tensor
    script: Tensor
    min_depth: Tensor
    max_depth: Tensor
    block_table: Tensor
    watermarks: Tensor
    ids: Tensor


def given_sizes(rows: int, layers: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Shapes of ``Given``'s fields, in their order."""
    per_row = ("positions", "slots", "threshold_logit", "script", "min_depth", "max_depth")
    shapes = {"counts": (2,), **dict.fromkeys(per_row, (rows,))}
    return {**shapes, "block_table": (rows, blocks), "watermarks": (rows, layers), "ids": (rows,)}


class StepArena:
    """Activations of up to ``rows`` rows. One step at a time uses them, so all programs share them."""

    def __init__(self, weights: StepWeights, cache: PagedCache, rows: int, positions: int):
        like, hidden = weights.embedding, weights.embedding.shape[1]
        device, shape = like.device, cache.shape
        heads = weights.layers[0].attention_output.shape[1] // shape.head_dim

        def new(*size: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        def ints(*size: int) -> Tensor:
            return new(*size, dtype=torch.int32)

        self.rows, self.heads = rows, heads
        self.hidden, self.normed, self.read = (new(rows, hidden) for _ in range(3))
        self.query, self.attended = (new(rows, heads, shape.head_dim) for _ in range(2))
        self.entries = new(qkv_entries(rows, heads, shape.kv_heads, shape.head_dim), hidden)
        self.inner = new(rows, weights.layers[0].down.shape[1])
        self.logits = None if weights.head is None else new(rows, weights.head.shape[0], dtype=torch.float32)
        self.everybody = torch.arange(rows, dtype=torch.int32, device=device)
        self.orders, self.counts = [ints(rows) for _ in range(2)], [ints(2) for _ in range(2)]
        self.owed_slots, self.owed_positions = (ints(rows * positions) for _ in range(2))
        self.exit_layers, self.exit_index = ints(rows), ints(rows)
        self.exit_probs = new(rows, dtype=torch.float32)
        self.before = new(rows, hidden)  # hidden behind the layer in front, for saturation
        self.no_bias = new(1, dtype=torch.float32)
        exits = torch.arange(len(weights.exit_layers), dtype=torch.int32, device=device)
        self.all_through = exits[:, None].repeat(1, rows)  # exit index of every row where all are asked at one exit
        # exit index of a layer, for heads that differ
        index = torch.zeros(len(weights.layers) + 1, dtype=torch.int32)
        index[list(weights.exit_layers)] = torch.arange(len(weights.exit_layers), dtype=torch.int32)
        self.index_of_layer = index.to(device)


# --- the step --------------------------------------------------------------------------------------------------------

# What an exit goes by, so named as the criteria: the policy's z, also where a script says who leaves; or CALM's.
MEASURES = ("policy", "softmax", "saturation", "classifier")
When = Callable[[Tensor], AbstractContextManager[None]]


class Step:
    """The kernels of a step for up to ``rows`` rows, in buffers that never move.

    measure  what an exit compares with the threshold, one of ``MEASURES``. None: nobody may leave, and nothing is owed;
             nothing is measured, no list is kept
    told     int32 [rows, 3] of ``greedy_rows_``: what the host wants to know, where the step has a head
    """

    def __init__(
        self,
        weights: StepWeights,
        arena: StepArena,
        cache: PagedCache,
        given: Given,
        measure: str | None,
        stage: int,
    ):
        self.weights, self.arena, self.cache, self.given = weights, arena, cache, given
        self.measure, self._stage = measure, stage
        rows = self._rows = given.ids.shape[0]
        a, shape = arena, cache.shape
        self._attention = decode_attention_workspace(
            rows, a.heads, shape.kv_heads, shape.head_dim, weights.embedding.device
        )
        self._shared = stream_workspace(rows, weights.embedding.shape[1], weights.embedding.device)
        room = qkv_entries(rows, a.heads, shape.kv_heads, shape.head_dim)
        self._entries = a.entries[:room] if room else None
        policy = weights.policies[0][0] if weights.policies and measure == "policy" else None
        splits = 1 if policy is None else policy_splits(rows, policy.shape[1], policy.shape[0])
        self._partial = torch.zeros(rows, splits, device=weights.embedding.device)
        self.told = torch.zeros(rows, len(TOLD), dtype=torch.int32, device=weights.embedding.device)

    def record(self, when: When) -> None:
        """Launch the kernels. when(flag): a context whose kernels are needed only where flag, one int32, is not 0."""
        w, a, g, rows = self.weights, self.arena, self.given, self._rows
        order, counts = a.everybody[:rows], g.counts  # nothing is owed to the first layer: every token has been there
        torch.index_select(w.embedding, 0, g.ids, out=a.hidden[:rows])
        if self.measure == "saturation":
            a.before[:rows].copy_(a.hidden[:rows])
        exits = {layer: index for index, layer in enumerate(w.exit_layers[:-1])}  # at the last everybody leaves
        with ExitStack() as skipped:
            for number, layer in enumerate(w.layers, start=1):
                self._layer(number, layer, order, counts)
                last = number == len(w.layers)
                if self.measure is None and not last:
                    continue
                kind = LEAVE if last else DECIDE if number in exits else STAY
                policy, bias = None, None
                if kind == DECIDE and self.measure == "policy":
                    *policy, bias = w.policies[exits[number]]
                if kind != STAY:
                    policy_rows_(
                        self._partial, a.normed[:rows], None if last else self.cache.states, a.hidden[:rows],
                        w.final_norm, policy, order, g.slots, counts,
                    )  # fmt: skip
                if self.measure == "saturation" and not last:  # behind every layer: the next one compares with it
                    saturation_rows_(self._partial, a.before[:rows], a.hidden[:rows], order, counts)
                if kind == DECIDE and self.measure != "policy":
                    bias = self._measured(exits[number], order, counts)
                order, counts = self._next(order, counts, number, kind, 0 if last else number + 1, bias)
                if kind == DECIDE and number % self._stage == 0:
                    skipped.enter_context(when(counts[:1]))
        self._head()

    def _measured(self, exit_index: int, order: Tensor, counts: Tensor) -> Tensor:
        """CALM's measure of the live rows at one exit, but for the bias that this returns."""
        w, a, rows = self.weights, self.arena, self._rows
        if self.measure == "classifier":
            weight, bias = w.classifier
            classifier_rows_(self._partial, a.normed[:rows], weight, order, counts)
            return bias
        if self.measure == "softmax":
            read = a.normed[:rows]
            if w.deltas is not None:
                read = a.read[:rows]
                delta_rows_(read, a.normed[:rows], *w.deltas, a.all_through[exit_index, :rows], order, counts)
            stream_rows_(a.logits[:rows], read, w.head, order, counts)
            response_rows_(self._partial, a.logits[:rows], order, counts)
        return a.no_bias

    def _next(
        self, order: Tensor, counts: Tensor, layer: int, kind: int, next_layer: int, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Who goes on behind ``layer``, and what the next one owes them. bias: the policy's last, where it decides."""
        a, g, rows = self.arena, self.given, self._rows
        turn = 0 if counts is not a.counts[0] else 1
        out = a.orders[turn][:rows], a.counts[turn]
        step_rows_(
            self._partial if kind == DECIDE else None,
            bias,
            order,
            counts,
            layer,
            kind,
            g.threshold_logit.view(torch.float32),
            g.script,
            g.min_depth,
            g.max_depth,
            a.exit_layers[:rows],
            a.exit_probs[:rows],
            *out,
            next_layer,
            g.positions,
            g.block_table,
            self.cache.shape.block_size,
            g.watermarks,
            a.owed_slots,
            a.owed_positions,
        )
        return out

    def _layer(self, number: int, w: StepLayer, order: Tensor, counts: Tensor) -> None:
        a, g, rows, cache = self.arena, self.given, self._rows, self.cache
        hidden, query, attended, inner = (x[:rows] for x in (a.hidden, a.query, a.attended, a.inner))
        keys, values = cache.keys[number - 1], cache.values[number - 1]
        cos, sin = self.weights.cos, self.weights.sin
        qkv_rows_(query, keys, values, hidden, cache.states, w.qkv, w.input_norm, cos, sin, order, g.slots,
                  g.positions, a.owed_slots, a.owed_positions, counts, entries=self._entries)  # fmt: skip
        decode_attention_(attended, query, keys, values, order, g.block_table, g.positions, counts,
                          self.weights.scale, cache.shape.block_size, self._attention)  # fmt: skip
        stream_rows_(hidden, attended.flatten(1), w.attention_output, order, counts, residual=hidden,
                     workspace=self._shared)  # fmt: skip
        if rows == 1:
            stream_rows_(inner, hidden, w.gate_up, order, counts, norm=w.mlp_norm, act="swiglu")
        else:  # a norm of its own costs less than the gain that tiles of weights are multiplied with
            read = a.read[:rows]
            policy_rows_(self._partial, read, None, hidden, w.mlp_norm, None, order, g.slots, counts)
            stream_rows_(inner, read, w.gate_up, order, counts, act="swiglu")
        stream_rows_(hidden, inner, w.down, order, counts, residual=hidden, workspace=self._shared)

    def _head(self) -> None:
        """All rows of the step, each through the head of the exit it left through."""
        w, a, g, rows = self.weights, self.arena, self.given, self._rows
        if w.head is None:
            return
        read, everybody = a.normed[:rows], a.everybody[:rows]
        if w.deltas is not None:
            torch.index_select(a.index_of_layer, 0, a.exit_layers[:rows], out=a.exit_index[:rows])
            delta_rows_(a.read[:rows], read, *w.deltas, a.exit_index[:rows], everybody, g.counts)
            read = a.read[:rows]
        stream_rows_(a.logits[:rows], read, w.head, everybody, g.counts)
        greedy_rows_(self.told, g.ids, a.logits[:rows], a.exit_layers[:rows], a.exit_probs[:rows], g.counts)
