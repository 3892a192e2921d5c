"""Decode steps over packed rows, eagerly: rows that leave go, visited layers settle what their sequences owe."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from engine.criteria import log_odds
from engine.decoding.cache import CacheShape, PagedCache, Pages
from engine.decoding.criteria import decide
from engine.decoding.requests import Generating, scripted_layer, threshold_of
from engine.decoding.weights import decoder_plan
from engine.executors.weights import WatchedWeights
from engine.kernels.decoder import DecoderPlan, decode_step
from engine.kernels.linear import own_kernel
from engine.models.decoder import MultiExitDecoder

STATE_COPIES = ("lazy", "eager")
_ONE_OP = ("policy", "scripted")  # criteria that ``decode_step`` knows
# Longest prompt that goes through ``decode_step``, which reads keys anew for every query. SmolLM2-135M on two cores: 32
# for 67 ms of the modules at 20 tokens, 111 for 150 at 128, as long at 512, longer behind.
_ONE_OP_PROMPT = 384


class StepOutputs(NamedTuple):
    """One entry a row: next-token logits [n, V] of the exit it left through, or None where the greedy token is all that
    anybody wants; exit layers; exit probabilities; the first of the greatest logits, where that is known already."""

    logits: Tensor | None
    exit_layers: list[int]
    exit_probs: list[float]
    greedy: list[int] | None = None


def cache_shape(model: MultiExitDecoder, block_size: int = 16) -> CacheShape:
    """What a cache of this model holds."""
    hf = model.language_model.config
    return CacheShape(
        hf.num_hidden_layers,
        hf.num_key_value_heads,
        getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        hf.hidden_size,
        block_size,
    )


def logits_by_exit(model: MultiExitDecoder, n: Tensor, exit_layers: list[int]) -> Tensor:
    """[rows, V] in fp32 (fp64 for fp64): each row of n [rows, H] through the head of the exit it left through."""
    out = None
    for index, layer in enumerate(model.config.exit_layers):
        rows = [i for i, left in enumerate(exit_layers) if left == layer]
        if rows:
            part = model.exit_logits(index, n[rows])
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            out = part.new_empty(len(exit_layers), part.shape[1]) if out is None else out
            out[rows] = part
    return out


class StepLimits(NamedTuple):
    """How the newest token of each row may leave: see ``decode_step``. script: 0 where the policy decides."""

    thresholds: list[float]
    script: list[int]
    min_depth: list[int]
    max_depth: list[int]


def step_limits(sequences: list[Generating], layers: int, ahead: int = 0) -> StepLimits:
    """What the sequences' requests say for the step that comes, or for the one ``ahead`` steps behind it."""
    steps = [(sequence.request, len(sequence.new) + ahead) for sequence in sequences]
    return StepLimits(
        [threshold_of(request, step) for request, step in steps],
        [scripted_layer(request, step) or 0 for request, step in steps],
        [request.min_depth for request, _ in steps],
        [layers if request.max_depth is None else request.max_depth for request, _ in steps],
    )


class LaunchedStep(Protocol):
    """A step that has begun."""

    def outputs(self) -> StepOutputs:
        """Waits for the step. To be called once, in the order of the launches."""
        ...


class Done(NamedTuple):
    """A step that had ended when it was launched."""

    found: StepOutputs

    def outputs(self) -> StepOutputs:
        return self.found


class _Row(NamedTuple):
    """One sequence in a step: its cache, and the position that is computed."""

    sequence: Generating
    pages: Pages
    position: int


class PackedDecoder:
    """Runs a MultiExitDecoder on any device, in the dtype of its weights.

    On a CPU in fp32, with lazy state copying, a step is one op on packed copies of the layers' weights
    (``decoder_plan``); else it calls the modules, layer by layer.

    state_copy  "lazy": keys and values of skipped layers are worked out when their layer is next visited; "eager": as
                soon as a token has left, as the method is written. Same results
    watching    whether somebody else may change the module: ``look`` then reads all weights
    """

    def __init__(self, model: MultiExitDecoder, cache: PagedCache, state_copy: str = "lazy", watching: bool = True):
        if state_copy not in STATE_COPIES:
            raise ValueError(f"state_copy must be one of {', '.join(STATE_COPIES)}, got {state_copy!r}")
        self.model, self.cache, self.state_copy = model, cache, state_copy
        self.settled = 0  # keys and values of one position in one layer that were owed
        self._weights = WatchedWeights(model, watching, decoder_plan)
        self._plan: DecoderPlan | None = None

    def watch(self) -> None:
        """From now on somebody else may change the module."""
        self._weights.watching = True

    def look(self) -> None:
        """Steps use the weights of this moment from now on: to be called where a run begins."""
        if self.state_copy == "lazy" and own_kernel(self.model.device, self.model.dtype):
            self._plan = self._weights.current()
        else:
            self._plan = None

    # -- prompts -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, rows: list[tuple[Generating, Pages]]) -> StepOutputs:
        """Keys and values of everything that has run of each sequence, in all layers: prompts at full depth, new tokens
        (of a sequence that lost its cache) frozen at the exit layers they had. Returns what follows each prompt at full
        depth; for a sequence with new tokens that is of no use.

        Pages have room for the positions.
        """
        model = self.model
        layers = model.config.num_layers
        fresh = all(not sequence.new and len(sequence) <= _ONE_OP_PROMPT for sequence, _ in rows)
        if self._plan is not None and fresh:
            return self._prefill_at_once(self._plan, rows)
        ids: list[int] = []
        depths: list[int] = []
        ends, slots = [0], []
        for sequence, pages in rows:
            ran = len(sequence) - (1 if sequence.new else 0)
            ids += sequence.ids[:ran]
            depths += [layers] * len(sequence.request.prompt) + sequence.frozen
            ends.append(len(ids))
            slots.append(pages.slots(0, ran))
            pages.watermarks = [ran] * layers
        device = model.device
        starts = torch.tensor([start for start, end in zip(ends, ends[1:], strict=False) for _ in range(end - start)])
        positions = (torch.arange(len(ids)) - starts).to(device)
        depth, places = torch.tensor(depths, device=device), torch.cat(slots)
        hidden = model.backbone.embed_tokens(torch.tensor(ids, device=device))
        rope = model.rope(positions)
        for number, layer in enumerate(model.backbone.layers, start=1):
            n = layer.input_layernorm(hidden)
            keys, values = _keys_values(layer.self_attn, n, rope)
            self.cache.keys[number - 1, places], self.cache.values[number - 1, places] = keys, values
            moving = depth >= number
            attended = []
            for start, end in zip(ends, ends[1:], strict=False):
                asked = moving[start:end].nonzero()[:, 0]
                turned = rope[0][start:end][asked], rope[1][start:end][asked]
                query = _queries(layer.self_attn, n[start:end][asked], turned)
                seen = torch.arange(end - start, device=device) <= asked[:, None]
                attended.append(_attention(layer.self_attn, query, keys[start:end], values[start:end], seen))
            went = hidden[moving] + layer.self_attn.o_proj(torch.cat(attended))
            went = went + layer.mlp(layer.post_attention_layernorm(went))
            if bool(moving.all()):
                hidden = went
            else:
                hidden = hidden.clone()
                hidden[moving] = went
        # The last position of a replayed sequence may be frozen: its logits were drawn from before.
        last = model.final_norm(hidden[[end - 1 for end in ends[1:]]])
        exit_layers = [layers] * len(rows)
        return StepOutputs(logits_by_exit(model, last, exit_layers), exit_layers, [1.0] * len(rows))

    def _prefill_at_once(self, plan: DecoderPlan, rows: list[tuple[Generating, Pages]]) -> StepOutputs:
        """Prompts through ``decode_step``, every token a row of its own: in each layer keys and values of all of them
        are written before anybody looks at those in front of it."""
        layers = self.model.config.num_layers
        lengths = [len(sequence) for sequence, _ in rows]
        positions = [p for n in lengths for p in range(n)]
        tokens = len(positions)
        states = self._run_op(
            plan,
            [token for sequence, _ in rows for token in sequence.ids],
            positions,
            [pages.blocks for (_, pages), n in zip(rows, lengths, strict=True) for _ in range(n)],
            torch.tensor(positions, dtype=torch.int32)[:, None].repeat(1, layers),
            [1.0] * tokens,
            [layers] * tokens,
            [layers] * tokens,
            [layers] * tokens,
        )[0]
        for (_, pages), n in zip(rows, lengths, strict=True):
            pages.watermarks = [n] * layers
        last = torch.tensor(lengths).cumsum(0) - 1
        left = [layers] * len(rows)
        return StepOutputs(logits_by_exit(self.model, states[last], left), left, [1.0] * len(rows))

    # -- steps ---------------------------------------------------------------------------------------------------

    def launch(self, batch: list[tuple[Generating, Pages]]) -> LaunchedStep:
        """Begin a step; ``outputs`` of what this returns ends it. Here that is one, a device may be left to work."""
        return Done(self.step(batch))

    def launch_next(self, launched: LaunchedStep) -> LaunchedStep | None:
        """Begin the step of the same rows behind the one that was launched last, before the host knows what that one
        comes to; pages have room for one more position. None where this cannot be: then nothing has happened."""
        return None

    @torch.inference_mode()
    def step(self, batch: list[tuple[Generating, Pages]]) -> StepOutputs:
        """The newest token of every sequence through its layers. Pages have room for one more position."""
        model, config = self.model, self.model.config
        rows = [_Row(sequence, pages, len(sequence) - 1) for sequence, pages in batch]
        if self._plan is not None and all(row.sequence.request.criterion in _ONE_OP for row in rows):
            return self._step_at_once(self._plan, rows)
        device = model.device
        newest = [row.sequence.new[-1].token_id for row in rows]
        hidden = model.backbone.embed_tokens(torch.tensor(newest, device=device))
        active = list(range(len(rows)))
        states = torch.empty_like(hidden)  # final-normed, as each row left
        exit_layers, exit_probs = [0] * len(rows), [1.0] * len(rows)
        exits = {layer: index for index, layer in enumerate(config.exit_layers)}
        for number, layer in enumerate(model.backbone.layers, start=1):
            before, hidden = hidden, self._layer(number, layer, hidden, [rows[i] for i in active])
            if number not in exits:
                continue
            n = model.final_norm(hidden)
            live = [rows[i].sequence for i in active]
            leaves, probs = self._decide(number, exits[number], n, hidden, before, live)
            gone = [k for k, leave in enumerate(leaves) if leave]
            if not gone:
                continue
            left = [rows[active[k]] for k in gone]
            if number < config.num_layers:
                slots = torch.cat([row.pages.slots(row.position, row.position + 1) for row in left])
                self.cache.states[slots] = hidden[gone]
                if self.state_copy == "eager":
                    self._copy(number, hidden[gone], left)
            states[[active[k] for k in gone]] = n[gone]
            for k in gone:
                exit_layers[active[k]], exit_probs[active[k]] = number, probs[k]
            kept = [k for k, leave in enumerate(leaves) if not leave]
            if not kept:
                break
            hidden, active = hidden[kept], [active[k] for k in kept]
        return StepOutputs(logits_by_exit(model, states, exit_layers), exit_layers, exit_probs)

    def _step_at_once(self, plan: DecoderPlan, rows: list[_Row]) -> StepOutputs:
        watermarks = _ints([row.pages.watermarks for row in rows])
        states, exit_layers, probs, settled = self._run_op(
            plan,
            [row.sequence.new[-1].token_id for row in rows],
            [row.position for row in rows],
            [row.pages.blocks for row in rows],
            watermarks,
            *step_limits([row.sequence for row in rows], self.model.config.num_layers),
        )
        for row, marks in zip(rows, watermarks.tolist(), strict=True):
            row.pages.watermarks = marks
        self.settled += settled
        left = exit_layers.tolist()
        return StepOutputs(logits_by_exit(self.model, states, left), left, probs.tolist())

    def _run_op(
        self,
        plan: DecoderPlan,
        ids: list[int],
        positions: list[int],
        blocks: list[list[int]],
        watermarks: Tensor,
        thresholds: list[float],
        scripts: list[int],
        least: list[int],
        most: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        cache, longest = self.cache, max(map(len, blocks))
        return decode_step(
            plan,
            torch.tensor(ids),
            torch.tensor(positions),
            _ints([row + [0] * (longest - len(row)) for row in blocks]),
            watermarks,
            cache.keys,
            cache.values,
            cache.states,
            cache.shape.block_size,
            log_odds(torch.tensor(thresholds)),
            _ints(scripts),
            _ints(least),
            _ints(most),
        )

    def _layer(self, number: int, layer: nn.Module, hidden: Tensor, rows: list[_Row]) -> Tensor:
        """One layer for the live rows [n, H], and what it owes their sequences."""
        owed = [(row, start) for row in rows if (start := row.pages.watermarks[number - 1]) < row.position]
        positions = [row.position for row in rows] + [p for row, start in owed for p in range(start, row.position)]
        own = torch.cat([row.pages.slots(row.position, row.position + 1) for row in rows])
        x, places = hidden, own
        if owed:
            there = torch.cat([row.pages.slots(start, row.position) for row, start in owed])
            x, places = torch.cat([hidden, self.cache.states[there]]), torch.cat([own, there])
            self.settled += len(there)
        n = layer.input_layernorm(x)
        cos, sin = self.model.rope(torch.tensor(positions, device=hidden.device))
        keys, values = _keys_values(layer.self_attn, n, (cos, sin))
        self.cache.keys[number - 1, places], self.cache.values[number - 1, places] = keys, values
        for row in rows:
            row.pages.watermarks[number - 1] = row.position + 1
        count = len(rows)
        query = _queries(layer.self_attn, n[:count], (cos[:count], sin[:count]))
        attended = []
        for k, row in enumerate(rows):
            context = row.pages.slots(0, row.position + 1)
            keys, values = self.cache.keys[number - 1, context], self.cache.values[number - 1, context]
            attended.append(_attention(layer.self_attn, query[k : k + 1], keys, values, None))
        hidden = hidden + layer.self_attn.o_proj(torch.cat(attended))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _decide(
        self, number: int, exit_index: int, n: Tensor, hidden: Tensor, before: Tensor, sequences: list[Generating]
    ) -> tuple[list[bool], list[float]]:
        """Who leaves behind layer ``number``, and the exit probabilities."""
        config = self.model.config
        if number == config.num_layers:
            return [True] * len(sequences), [1.0] * len(sequences)
        above, probs = [False] * len(sequences), [0.0] * len(sequences)
        for criterion in {s.request.criterion for s in sequences}:
            own = [k for k, s in enumerate(sequences) if s.request.criterion == criterion]
            limits = [threshold_of(sequences[k].request, len(sequences[k].new)) for k in own]
            said = decide(self.model, criterion, exit_index, n[own], hidden[own], before[own], limits)
            for k, leave, prob in zip(own, *said, strict=True):
                above[k], probs[k] = leave, prob
        leaves = []
        for k, sequence in enumerate(sequences):
            request, script = sequence.request, scripted_layer(sequence.request, len(sequence.new))
            leave = above[k] if script is None else script <= number
            if request.max_depth is not None and number >= request.max_depth:
                leave, probs[k] = True, 1.0
            leaves.append(leave and number >= request.min_depth)
        return leaves, probs

    def _copy(self, left: int, states: Tensor, rows: list[_Row]) -> None:
        """Keys and values of the layers behind ``left`` for rows that have just left there (eager state copying)."""
        slots = torch.cat([row.pages.slots(row.position, row.position + 1) for row in rows])
        rope = self.model.rope(torch.tensor([row.position for row in rows], device=states.device))
        for number, layer in enumerate(self.model.backbone.layers, start=1):
            if number <= left:
                continue
            keys, values = _keys_values(layer.self_attn, layer.input_layernorm(states), rope)
            self.cache.keys[number - 1, slots], self.cache.values[number - 1, slots] = keys, values
            for row in rows:
                row.pages.watermarks[number - 1] = row.position + 1
            self.settled += len(rows)


def _ints(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _turned(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE (Su et al. 2021) of x [n, heads, d] in LLaMA's layout: halves, not pairs."""
    cos, sin = (part[:, None] for part in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _queries(attention: nn.Module, n: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return _turned(attention.q_proj(n).unflatten(-1, (-1, attention.head_dim)), rope)


def _keys_values(attention: nn.Module, n: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    keys, values = (p(n).unflatten(-1, (-1, attention.head_dim)) for p in (attention.k_proj, attention.v_proj))
    return _turned(keys, rope), values


def _attention(attention: nn.Module, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """query [q, heads, d] on keys and values [c, kv_heads, d] -> [q, heads * d]. seen [q, c]; None: everything."""
    query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    out = scaled_dot_product_attention(
        query, keys, values, attn_mask=seen, scale=attention.scaling, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return out[0].transpose(0, 1).flatten(1)
