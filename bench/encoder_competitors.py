"""Who the encoder is compared with on a GPU: the same weights through Hugging Face, torch.compile and plain torch.

Every builder takes a model and a batch, compiles and warms up what it needs, and returns two calls: one with the inputs
on the device already, and one from padded ids on the host to logits on the host. Shapes are static, as a server would
have them in buckets. All but the naive early exit run every layer and classify the first token with the last exit's
classifier; packed, as ours, computes nothing but first tokens behind the last layer's keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.encoder import MultiExitEncoder

EAGER, REDUCE_OVERHEAD, MAX_AUTOTUNE, PACKED, NAIVE = "eager", "reduce-overhead", "max-autotune", "packed", "naive"
PADDED = (EAGER, REDUCE_OVERHEAD, MAX_AUTOTUNE)
FULL_DEPTH = (*PADDED, PACKED)
TITLES = {
    EAGER: "Hugging Face eager, SDPA",
    REDUCE_OVERHEAD: "torch.compile reduce-overhead",
    MAX_AUTOTUNE: "torch.compile max-autotune",
    PACKED: "compiled packed, varlen_attn, CUDA graph",
    NAIVE: "naive early exit",
}
# A compiled function runs plain, is recorded, and replays from its third call on.
_WARM_CALLS = 4
_TOKEN_STEP, _LONGEST_STEP = 128, 32

# q, k, v [T, heads, size], cu_seqlens of queries and keys, longest query and key -> [T, heads, size]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


class LeftOutError(RuntimeError):
    """This competitor cannot take part here, for the reason given."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of ids padded at the right, on the host. input_ids, attention_mask int64 [B, S]; lengths: of the rows.

    others  batches that take turns with this one where time is taken from the host: as many rows, as wide
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: tuple[int, ...]
    others: tuple[Batch, ...] = ()

    @property
    def turns(self) -> tuple[Batch, ...]:
        return self, *self.others

    @property
    def is_full(self) -> bool:
        return min(self.lengths) == self.input_ids.shape[1]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def random_batch(module: MultiExitEncoder, lengths: Sequence[int], multiple: int = 1, seed: int = 0) -> Batch:
    """Random ids in rows of these lengths, padded to the longest rounded up to ``multiple``."""
    config = module.encoder_backbone.config
    width = _up(max(lengths), multiple)
    generator = torch.Generator().manual_seed(seed)
    # From 1000 on are BERT's words: no special token in a row by chance.
    first = min(1000, config.vocab_size // 2)
    ids = torch.randint(first, config.vocab_size, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return Batch(ids.where(mask.bool(), torch.tensor(config.pad_token_id)), mask, tuple(lengths))


def varied_batch(module: MultiExitEncoder, lengths: Sequence[int], multiple: int, others: int) -> Batch:
    """``random_batch`` with others: what a server sees, no two batches of the same lengths, nor of as many tokens.

    Up to half of them have more tokens than the first, by one in each of some rows, half of them less.
    """
    longest, found = max(lengths), []
    for k in range(1, others + 1):
        own, step = list(lengths), 1 if k % 2 else -1
        changed = [i for i, n in enumerate(own) if n < longest and n + step > 0]
        for turn in range((k + 1) // 2 if changed else 0):
            place = changed[turn % len(changed)]
            own[place] = min(longest, max(1, own[place] + step))
        found.append(random_batch(module, own[k % len(own) :] + own[: k % len(own)], multiple, seed=k))
    return replace(random_batch(module, lengths, multiple), others=tuple(found))


@dataclass(frozen=True, eq=False)
class Competitor:
    """Two calls that do the same work.

    on_device  inputs are on the device; returns when the work is queued
    from_host  padded ids on the host -> logits [B, C] on the host: of the batch given, the one it was made for or one
               of its others
    period     calls after which all of its cases have had their turn
    stream     the stream on_device works on, None for the current one
    note       what a reader of its times should know
    ready_s    seconds that compiling and warming up took
    waits      on_device waits for the device inside
    many_launches  on_device queues hundreds of kernels: few calls fit the device's queue
    """

    on_device: Callable[[], Any]
    from_host: Callable[[Batch], Tensor]
    period: int = 1
    stream: torch.cuda.Stream | None = None
    note: str = ""
    ready_s: float = 0.0
    waits: bool = False
    many_launches: bool = False


def build(name: str, module: MultiExitEncoder, batch: Batch) -> Competitor:
    """A full-depth competitor by its name, warmed up. LeftOutError where it cannot serve this model or device."""
    builders = {
        EAGER: lambda: padded(module, batch, None),
        REDUCE_OVERHEAD: lambda: padded(module, batch, REDUCE_OVERHEAD),
        MAX_AUTOTUNE: lambda: padded(module, batch, MAX_AUTOTUNE),
        PACKED: lambda: packed(module, batch),
    }
    if name not in builders:
        raise ValueError(f"a full-depth competitor must be one of {', '.join(builders)}, got {name!r}")
    if name != EAGER and module.device.type != "cuda":
        raise LeftOutError(f"needs a CUDA device, the model is on {module.device}")
    return builders[name]()


# -- padded: Hugging Face, plain and compiled --------------------------------------------------------------------------


class FullDepth(nn.Module):
    """Hugging Face's own layers and the last exit's classifier: ids, mask [B, S] -> logits [B, C]. mask None: full.

    Embeddings and encoder are called one by one. Hugging Face's whole forward cannot know, while it is compiled, that
    there is nothing to mask: it builds a mask of ones, which keeps SDPA from its flash kernel (3.1 ms instead of 2.3
    for 32 rows of 128 tokens, 12.0 instead of 8.1 for 128, on an H100). Where there is padding, one additive mask
    [B, 1, 1, S] serves all layers, rather than a boolean one of [B, 1, S, S].
    """

    def __init__(self, module: MultiExitEncoder):
        super().__init__()
        self.whole = module.backbone
        self.parts = None if module.family.position_bias else module.encoder_backbone
        self.exits, self.last = module.exits, module.config.num_exits - 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.parts is not None:
            embedded = self.parts.embeddings(input_ids=input_ids)
            if attention_mask is not None:
                hidden_away = (attention_mask == 0)[:, None, None, :]
                attention_mask = torch.zeros_like(hidden_away, dtype=embedded.dtype)
                attention_mask = attention_mask.masked_fill(hidden_away, torch.finfo(embedded.dtype).min)
            hidden = self.parts.encoder(embedded, attention_mask=attention_mask)
        else:
            hidden = self.whole(input_ids=input_ids, attention_mask=attention_mask)
        return self.exits.classify(self.last, self.exits.state(self.last, hidden.last_hidden_state[:, 0]))


def keep_bias_on_device(module: MultiExitEncoder) -> None:
    """MPNet's position bias computed where the model is, one for all rows.

    Hugging Face computes its buckets on the host and writes the bias once a row: a copy and a wait in every forward,
    and no CUDA graph under torch.compile.
    """
    if not module.family.position_bias:
        return
    encoder = module.encoder_backbone.encoder

    def compute_position_bias(x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        bucket = encoder.relative_position_bucket(place[None, :] - place[:, None], num_buckets=num_buckets)
        return encoder.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    encoder.compute_position_bias = compute_position_bias


def padded(module: MultiExitEncoder, batch: Batch, mode: str | None) -> Competitor:
    """Hugging Face eager, or compiled for this one shape. No mask where all rows are full."""
    started = time.perf_counter()
    device = module.device
    plain = FullDepth(module).eval()
    forward = plain if mode is None else torch.compile(plain, mode=mode, dynamic=False)
    ids = batch.input_ids.to(device)
    mask = None if batch.is_full else batch.attention_mask.to(device)

    def on_device() -> Tensor:
        if mode is None:
            return forward(ids, mask)
        torch.compiler.cudagraph_mark_step_begin()
        return forward(ids, mask)  # which the next call overwrites

    staged = _staged(batch, device)

    def from_host(batch: Batch) -> Tensor:
        _send((ids, mask), staged, batch)
        return on_device().cpu()

    for _ in range(_WARM_CALLS):
        from_host(batch)
    note = "" if batch.is_full else f"padded to {batch.input_ids.shape[1]}, with a mask"
    if module.family.position_bias:
        note = "; ".join(filter(None, [note, "eager attention (the model has no SDPA), position bias on the device"]))
    ready_s = time.perf_counter() - started
    return Competitor(on_device, from_host, note=note, ready_s=ready_s, many_launches=mode is None)


def _staged(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory that the device copies from at its full speed, for ids and mask."""
    pin = device.type == "cuda"
    ids, mask = (torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in (batch.input_ids, batch.attention_mask))
    return ids, mask


def _send(to: tuple[Tensor, Tensor | None], staged: tuple[Tensor, Tensor], batch: Batch) -> None:
    """The ids on their way to the device, and the mask where there is one."""
    for target, pinned, given in zip(to, staged, (batch.input_ids, batch.attention_mask), strict=True):
        if target is not None:
            pinned.copy_(given)
            target.copy_(pinned, non_blocking=True)


# -- packed: no padding, plain torch -----------------------------------------------------------------------------------


class _PackedLayer(nn.Module):
    """A post-LayerNorm layer on packed tokens; one product for queries, keys and values, the rest Hugging Face's."""

    def __init__(self, parts: Any, num_heads: int):
        super().__init__()
        three = (parts.query, parts.key, parts.value)
        self.qkv_weight = nn.Parameter(torch.cat([p.weight for p in three]).detach(), requires_grad=False)
        self.qkv_bias = nn.Parameter(torch.cat([p.bias for p in three]).detach(), requires_grad=False)
        self.attention_output, self.attention_norm = parts.attention_output, parts.attention_norm
        self.intermediate, self.output, self.output_norm = parts.intermediate, parts.output, parts.output_norm
        self.num_heads = num_heads

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor, longest: int, attend: Attend, first: Tensor | None = None
    ) -> Tensor:
        """first: places of the rows' first tokens, where they alone are wanted (the last layer)."""
        tokens, width = hidden.shape
        qkv = F.linear(hidden, self.qkv_weight, self.qkv_bias)
        q, k, v = qkv.view(tokens, 3, self.num_heads, width // self.num_heads).unbind(1)
        if first is None:
            attended = attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest).reshape(tokens, width)
        else:
            one_each = torch.arange(len(first) + 1, dtype=torch.int32, device=hidden.device)
            q, hidden = q.index_select(0, first), hidden.index_select(0, first)
            attended = attend(q, k, v, one_each, cu_seqlens, 1, longest).reshape(len(first), width)
        x = self.attention_norm(self.attention_output(attended) + hidden)
        return self.output_norm(self.output(F.gelu(self.intermediate(x))) + x)


class PackedBert(nn.Module):
    """BERT on the tokens of all rows end to end: what a careful user of plain torch writes to compute no padding.

    input_ids, positions  int32 [T]; cu_seqlens int32 [B + 1]. Tokens from cu_seqlens[-1] on belong to no row: they pad
    the buffer to its bucket, and what becomes of them is never read. Returns logits [B, C].
    """

    def __init__(self, module: MultiExitEncoder, attend: Attend):
        super().__init__()
        if module.family.model_type != "bert":
            raise LeftOutError(
                f"packed plain torch serves BERT only, got {module.family.model_type!r}: varlen_attn takes no bias"
            )
        backbone = module.encoder_backbone
        layers = (module.family.parts(layer) for layer in module.family.layers(backbone))
        self.embeddings = backbone.embeddings
        self.layers = nn.ModuleList(_PackedLayer(parts, backbone.config.num_attention_heads) for parts in layers)
        self.exits, self.last = module.exits, module.config.num_exits - 1
        self.attend = attend

    def forward(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        e = self.embeddings
        hidden = e.word_embeddings(input_ids) + e.token_type_embeddings.weight[0] + e.position_embeddings(positions)
        hidden = e.LayerNorm(hidden)
        # As ours: nobody reads more of the last layer than its first tokens.
        for layer in self.layers[:-1]:
            hidden = layer(hidden, cu_seqlens, longest, self.attend)
        first = self.layers[-1](hidden, cu_seqlens, longest, self.attend, first=cu_seqlens[:-1])
        return self.exits.classify(self.last, self.exits.state(self.last, first))


class PackedBuffers:
    """The host's and the device's copy of one packed batch, in one piece: one transfer a call."""

    def __init__(self, batch: Batch, device: torch.device):
        rows, self.tokens = len(batch.lengths), sum(batch.lengths)
        self.bucket = _up(max(sum(one.lengths) for one in batch.turns), _TOKEN_STEP)
        self.longest = _up(max(batch.lengths), _LONGEST_STEP)
        size = 2 * self.bucket + rows + 1
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        parts = [self.bucket, self.bucket, rows + 1]
        self._fields = [part.numpy() for part in self._host.split(parts)]
        self.input_ids, self.positions, self.cu_seqlens = self._device.split(parts)

    def fill(self, batch: Batch) -> None:
        """Strip the padding and send the batch on its way. By numpy: torch's threads take longer to wake than this."""
        ids, positions, cu_seqlens = self._fields
        given, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
        tokens, place = int(mask.sum()), np.broadcast_to(np.arange(given.shape[1]), given.shape)
        if tokens == given.size:
            ids[:tokens].reshape(given.shape)[:] = given
            positions[:tokens].reshape(given.shape)[:] = place
        else:
            there = mask.astype(bool)
            ids[:tokens], positions[:tokens] = given[there], place[there]
        np.cumsum(mask.sum(1), out=cu_seqlens[1:])
        self._device.copy_(self._host, non_blocking=True)


def packed(module: MultiExitEncoder, batch: Batch) -> Competitor:
    """PackedBert on varlen_attn, compiled, in one CUDA graph for the bucket: launches leave no gaps."""
    from torch.nn.attention.varlen import varlen_attn

    started = time.perf_counter()
    buffers = PackedBuffers(batch, module.device)
    buffers.fill(batch)
    with torch.inference_mode(False):  # ordinary parameters, as everybody else's
        network = PackedBert(module, varlen_attn).eval()
    notes = [
        f"{buffers.tokens} tokens in a bucket of {buffers.bucket}; the longest row is a host integer: the bucket's, "
        f"{buffers.longest}; flash attention as torch ships it"
    ]

    def warm(forward: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            return forward(buffers.input_ids, buffers.positions, buffers.cu_seqlens, buffers.longest)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        return call

    mode = "max-autotune-no-cudagraphs"
    try:
        call = warm(torch.compile(network, mode=mode, dynamic=False))
    except Exception as error:
        notes.append(f"compiled with the default mode: {mode} failed ({one_line(error)})")
        torch.compiler.reset()
        call = warm(torch.compile(network, dynamic=False))
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    except Exception as error:
        notes.append(f"launched kernel by kernel: it could not be captured ({one_line(error)})")
        torch.cuda.synchronize()
        on_device = call
    else:

        def on_device() -> Tensor:
            graph.replay()
            return result

    def from_host(batch: Batch) -> Tensor:
        buffers.fill(batch)
        return on_device().cpu()

    from_host(batch)
    return Competitor(on_device, from_host, note="; ".join(notes), ready_s=time.perf_counter() - started)


# -- early exit as it is written first ---------------------------------------------------------------------------------


def naive_early_exit(
    module: MultiExitEncoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    threshold: float | None = None,
    script: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A Python loop over Hugging Face's layers; rows that leave are taken out of the padded tensors.

    input_ids, attention_mask  [B, S] on the model's device, padded at the right; mask None where all rows are full
    threshold  a row leaves when its exit probability is above this; script: int64 [B], layers to leave at instead
    Give one of the two. The decision is read on the host behind every exit, and the policy is computed either way.
    Returns logits [B, C] and exit layers int64 [B], both on the device.
    """
    if (threshold is None) == (script is None):
        raise ValueError(f"give either threshold or script, got threshold={threshold!r} and script={script!r}")
    backbone, exits, config = module.encoder_backbone, module.exits, module.config
    rows = torch.arange(len(input_ids), device=input_ids.device)
    logits = torch.zeros(len(rows), config.num_labels, dtype=module.dtype, device=rows.device)
    exit_layers = torch.zeros_like(rows)
    hidden = backbone.embeddings(input_ids=input_ids)
    biased = module.family.position_bias
    mask = None
    if attention_mask is not None:
        mask = attention_mask.bool()[:, None, None, :]
        if biased:  # eager attention adds its mask
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, torch.finfo(hidden.dtype).min)
    more = {"position_bias": backbone.encoder.compute_position_bias(hidden)[:1]} if biased else {}
    exit_index = {layer: k for k, layer in enumerate(config.exit_layers)}
    for layer, part in enumerate(module.family.layers(backbone), 1):
        hidden = part(hidden, mask, **more)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        if layer not in exit_index:
            continue
        k = exit_index[layer]
        state = exits.state(k, hidden[:, 0])
        if layer == config.num_layers:
            logits[rows], exit_layers[rows] = exits.classify(k, state), layer
            break
        probability = torch.sigmoid(exits.policies[k](state).float())
        leave = probability > threshold if script is None else script <= layer
        # One read on the host an exit; what it tells then serves all that is left.
        decided = leave.tolist()
        if not any(decided):
            continue
        places = ([i for i, d in enumerate(decided) if d is wanted] for wanted in (True, False))
        on_cuda = rows.is_cuda
        gone, stay = (torch.tensor(p, pin_memory=on_cuda).to(rows.device, non_blocking=True) for p in places)
        left = rows.index_select(0, gone)
        logits[left], exit_layers[left] = exits.classify(k, state.index_select(0, gone)), layer
        if all(decided):
            break
        rows, hidden = rows.index_select(0, stay), hidden.index_select(0, stay)
        mask = None if mask is None else mask.index_select(0, stay)
        script = None if script is None else script.index_select(0, stay)
    return logits, exit_layers


def naive(module: MultiExitEncoder, batch: Batch, scripts: Sequence[Sequence[int]]) -> Competitor:
    """The naive early exit with rows leaving where a script says; one script after the other."""
    started = time.perf_counter()
    device = module.device
    ids = batch.input_ids.to(device)
    mask = None if batch.is_full else batch.attention_mask.to(device)
    layers = [torch.tensor(script, device=device) for script in scripts]
    staged = _staged(batch, device)
    turn = 0

    def on_device() -> Tensor:
        nonlocal turn
        turn += 1
        return naive_early_exit(module, ids, mask, script=layers[turn % len(layers)])[0]

    def from_host(batch: Batch) -> Tensor:
        _send((ids, mask), staged, batch)
        return on_device().cpu()

    for _ in range(2):
        from_host(batch)
    note = "reads the decision on the host at every exit"
    ready_s = time.perf_counter() - started
    return Competitor(on_device, from_host, len(layers), note=note, ready_s=ready_s, waits=True)


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for a row of results."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
