"""The engine of a decoder: runs what is asked of it, alone or as a stream, and puts texts together."""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from engine.config import DecoderExitConfig
from engine.decoding.cache import PagedCache, Pages
from engine.decoding.generate import Counts, Steps, begin, generate_packed, generate_reference, take_tokens
from engine.decoding.packed import STATE_COPIES, PackedDecoder, cache_shape
from engine.decoding.reference import ReferenceDecoder
from engine.decoding.requests import Generating, Sampling
from engine.executors import EXECUTORS
from engine.models.decoder import MultiExitDecoder
from engine.prompts import RequestReader

_PROGRESS_AFTER_S = 1.0
_DEFAULT_CACHE_BYTES = 1 << 30
_MAX_ROWS = 64


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one run.

    prompt_tokens, new_tokens   in all rows
    prefill_s, decode_s         seconds of the calls that ran prompts (and replays), and of the steps
    mean_depth                  mean exit layer of the tokens that a step decoded: all but each row's first, which its
                                prompt yields at full depth; nan where there is none
    saved_layers                1 - mean_depth / num_layers: a depth figure, not a speed-up
    cache_bytes                 of keys, values and exit states, reserved for all rows together
    peak_cache_bytes            how much of them was in use at a time, at most: whole blocks, open streams' too
    owed_settled                keys and values of one position in one layer that a later visit worked out
    preemptions                 rows that gave their cache back and were replayed
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    num_layers: int
    mean_depth: float
    saved_layers: float
    prefill_s: float
    decode_s: float
    wall_time_s: float
    cache_bytes: int
    peak_cache_bytes: int
    owed_settled: int
    preemptions: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens that steps decoded, a second of steps."""
        return (self.new_tokens - self.rows) / self.decode_s if self.decode_s else float("nan")

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else float("nan")


@dataclass(frozen=True, repr=False, eq=False)
class Generation:
    """One entry a row, in the caller's order.

    texts               the continuations, up to a stop string; None for each row where the model has no tokenizer
    token_ids           of the continuations, what ended them included
    exit_layers         layers that ran for each new token; the first one comes from the prompt, at full depth
    exit_probabilities  sigmoid of the policy logit at the exit; 1 where a token had to leave
    finish_reasons      "stop" (an EOS id or a stop string) or "length"
    """

    texts: list[str | None]
    token_ids: list[list[int]]
    exit_layers: list[list[int]]
    exit_probabilities: list[list[float]]
    finish_reasons: list[str]
    stats: GenerationStats

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        s = self.stats
        return f"Generation({s.rows} rows, {s.new_tokens} new tokens, mean depth {s.mean_depth:.2f} of {s.num_layers})"


class StreamedToken(NamedTuple):
    """One new token. text: what it adds to the text so far, empty while a character is incomplete."""

    text: str
    token_id: int
    exit_layer: int
    exit_probability: float


class TokenStream(Iterator[StreamedToken]):
    """Tokens as they come. ``close`` (or the end, an error, leaving ``with``) gives the sequence's cache back."""

    def __init__(self, tokens: Iterator[StreamedToken], release: Callable[[], None]):
        self._tokens = tokens
        self._release = weakref.finalize(self, release)

    def __next__(self) -> StreamedToken:
        try:
            return next(self._tokens)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._tokens = iter(())
        self._release()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_decoder_options(executor: str, state_copy: str, cache_bytes: int | None) -> None:
    """ValueError for options of a DecoderEngine that are wrong for any model, or do not go together."""
    if executor != "auto" and executor not in EXECUTORS:
        raise ValueError(f"a decoder's executor must be one of auto, {', '.join(EXECUTORS)}, got {executor!r}")
    if state_copy not in STATE_COPIES:
        raise ValueError(f"state_copy must be one of {', '.join(STATE_COPIES)}, got {state_copy!r}")
    if executor == "graph" and state_copy != "lazy":
        raise ValueError(f"the graph executor copies states lazily, got {state_copy!r}: packed knows both")
    whole = isinstance(cache_bytes, int) and not isinstance(cache_bytes, bool)
    if cache_bytes is not None and (not whole or cache_bytes < 1):
        raise ValueError(f"cache_bytes must be a positive integer, or None for the default, got {cache_bytes!r}")


class DecoderEngine:
    """Token-level early-exit generation with one model. Made by ``engine.load`` and ``engine.from_module``.

    executor     "graph" (a step is one CUDA graph launch; the default on CUDA, with lazy copying), "packed", or
                 "reference" (no cache, the oracle: very slow)
    state_copy   "lazy" or "eager": see ``PackedDecoder``. Nothing to the reference, which copies no states
    cache_bytes  memory for keys, values and exit states of all rows; default 1 GiB, or less where the model's longest
                 sequences for 64 rows need less. The reference keeps none
    private      nobody else holds ``model``, so its weights need no watching until somebody asks for it
    Raises ValueError as ``check_decoder_options``, and where cache_bytes has no room for one block of positions.
    Calls from several threads are safe: runs go one after the other, streams beside them.
    """

    def __init__(
        self,
        model: MultiExitDecoder,
        tokenizer=None,
        executor: str = "auto",
        *,
        state_copy: str = "lazy",
        cache_bytes: int | None = None,
        private: bool = False,
    ):
        check_decoder_options(executor, state_copy, cache_bytes)
        if executor == "auto":
            executor = "graph" if model.device.type == "cuda" and state_copy == "lazy" else "packed"
        self._model, self.tokenizer, self.executor, self._watching = model, tokenizer, executor, not private
        self._state_copy, self._cache_bytes = state_copy, cache_bytes
        self._reader = RequestReader(model, tokenizer)
        self._decoder: PackedDecoder | None = None
        self._lock = threading.RLock()
        self._abandoned: deque[Pages] = deque()  # of streams that ended while somebody else was running
        if executor != "reference":
            self._packed()  # what is wrong with the arguments is found now

    @property
    def model(self) -> MultiExitDecoder:
        """The module that is run. Asking for it turns on the look at its weights before every run."""
        self._watching = True
        if self._decoder is not None:
            self._decoder.watch()
        return self._model

    @property
    def config(self) -> DecoderExitConfig:
        """The model's DecoderExitConfig."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    def __repr__(self) -> str:
        c = self.config
        return (
            f"DecoderEngine({c.num_layers} layers, exits at {list(c.exit_layers)}, head {c.head}, executor "
            f"{self.executor}, {self.device}, {self._model.dtype})"
        )

    def warm_up(self, rows: int, tokens: int) -> None:
        """Be ready for prompts of ``tokens`` tokens in all, and for steps of half to all of ``rows`` rows, with exits
        and without: the graph executor compiles and captures now. Nothing to do for the others.

        With exits by the model's own criterion: what steps by another one need (a ``criterion`` of ``run``, such as
        CALM's three) is compiled and captured by the first of them.

        ValueError where no batch has that size.
        """
        most = rows * (self.config.max_length - 2)
        if not 1 <= rows <= tokens <= most:
            raise ValueError(
                f"{rows} prompts have {max(rows, 1)} to {max(most, 1)} tokens and there is at least one, got {tokens}"
            )
        if self.executor != "graph":
            return
        prompts = [[0] * (tokens // rows + (row < tokens % rows)) for row in range(rows)]
        for least in (1, self.config.num_layers):
            self.run(prompts, max_new_tokens=2, min_depth=least, ignore_eos=True, progress=False)

    def run(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        threshold: float | Sequence[float] | None = None,
        min_depth: int | Sequence[int] | None = None,
        max_depth: int | Sequence[int] | None = None,
        criterion: str | None = None,
        decay: bool = False,
        exit_layers: int | Sequence[Sequence[int]] | None = None,
        progress: bool | None = None,
    ) -> Generation:
        """Continue every prompt; each new token leaves at the layer its exit decides.

        prompts       strings, chats (lists of {"role", "content"} for the tokenizer's template), or lists of token ids
        temperature, top_k, top_p, repetition_penalty   see ``Sampling``; temperature 0 is greedy
        seed          row i draws from seed + i (modulo 2**64), whatever stands beside it
        stop          strings that end a continuation, and are cut off; a special token's own stops at that token
        ignore_eos    go on behind the checkpoint's EOS ids
        threshold     a token leaves when its exit probability is above this; [0, 1]. Default: the model's
        min_depth     no token leaves before this layer; the number of layers removes all exits. Default 1
        max_depth     every decoded token has left by this layer, at the deepest exit not beyond it. Default: all layers
        criterion     "policy", "scripted", or CALM's "softmax", "saturation" or "classifier" (``engine.decoding.
                      criteria``), whose measures stand for exit probabilities. Default: the model's
        decay         the threshold falls to nine tenths on the way (CALM)
        exit_layers   for "scripted": one layer for all tokens, or for each prompt one layer for each new token (the
                      first comes from the prompt, at full depth: its entry must be the number of layers)
        threshold, min_depth, max_depth: one value, or one per prompt. No prompts: an empty result.
        Raises ValueError or TypeError before any token is computed.
        """
        started = time.perf_counter()
        options = dict(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, repetition_penalty, seed),
            stop=stop,
            ignore_eos=ignore_eos,
            threshold=threshold,
            decay=decay,
            min_depth=min_depth,
            max_depth=max_depth,
            criterion=criterion,
            exit_layers=exit_layers,
        )
        sequences, stops = self._sequences(prompts, options)
        counts, settled = Counts(), 0
        bar = tqdm(
            total=sum(s.request.max_new_tokens for s in sequences),
            unit="token",
            disable=not (sys.stderr.isatty() if progress is None else progress),
            delay=_PROGRESS_AFTER_S if progress is None else 0,
        )
        with self._lock, bar:
            self._release_abandoned()
            decoder = None if self.executor == "reference" else self._packed()
            if decoder is None:
                steps = generate_reference(ReferenceDecoder(self._model), sequences, counts)
            else:
                settled, decoder.cache.peak_blocks = -decoder.settled, 0
                steps = generate_packed(decoder, sequences, _MAX_ROWS, counts)
            for grown in steps:
                bar.update(len(grown))
            settled += 0 if decoder is None else decoder.settled
            seconds = time.perf_counter() - started
            stats = self._stats(sequences, counts, decoder, settled, seconds)
        return Generation(
            texts=[self._text(s, stops) for s in sequences],
            token_ids=[s.new_ids for s in sequences],
            exit_layers=[[t.exit_layer for t in s.new] for s in sequences],
            exit_probabilities=[[t.exit_prob for t in s.new] for s in sequences],
            finish_reasons=[s.finish_reason for s in sequences],
            stats=stats,
        )

    def stream(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        threshold: float | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        criterion: str | None = None,
        decay: bool = False,
        exit_layers: int | Sequence[int] | None = None,
    ) -> TokenStream:
        """The tokens of one prompt's continuation as they come; options as in ``run``, exit_layers without the outer
        list. Their texts together are what ``run`` gives.

        What is wrong is raised by this call, before the first token is asked for. The sequence's room in the cache is
        its own until the iterator ends or is closed.
        """
        options = dict(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, repetition_penalty, seed),
            stop=stop,
            ignore_eos=ignore_eos,
            threshold=threshold,
            decay=decay,
            min_depth=min_depth,
            max_depth=max_depth,
            criterion=criterion,
            exit_layers=exit_layers if exit_layers is None or isinstance(exit_layers, Integral) else [exit_layers],
        )
        (sequence,), stops = self._sequences([prompt], options)
        if self.executor == "reference":
            steps = generate_reference(ReferenceDecoder(self._model), [sequence])
            return TokenStream(self._told(steps, sequence, stops), lambda: None)
        with self._lock:
            self._release_abandoned()
            decoder = self._packed()
            decoder.look()
            pages = Pages(decoder.cache)
            needed = len(sequence.request.prompt) + sequence.request.max_new_tokens - 1
            if decoder.cache.blocks_for(needed) > decoder.cache.free_blocks:
                size = decoder.cache.shape.block_size
                raise ValueError(
                    f"the prompt and its continuation may need {needed} positions, the cache has room for "
                    f"{decoder.cache.free_blocks * size}: close other streams, or give it more memory (cache_bytes)"
                )
            pages.reserve(needed)
        lock, abandoned = self._lock, self._abandoned

        def release() -> None:
            # The collector may call this anywhere, also where another lock is held that a run is waiting for.
            if lock.acquire(blocking=False):
                try:
                    pages.release()
                finally:
                    lock.release()
            else:
                abandoned.append(pages)

        return TokenStream(self._told(_alone(decoder, sequence, pages), sequence, stops), release)

    # -- running -------------------------------------------------------------------------------------------------

    def _sequences(self, prompts: Sequence[Any], options: dict[str, Any]) -> tuple[list[Generating], tuple[str, ...]]:
        """Checked sequences, of which nothing has run, and the stop strings."""
        requests, stops = self._reader.read(prompts, options)
        sequences = begin(requests)
        if stops:
            for sequence in sequences:
                sequence.stops_at = lambda new_ids: _cut(self._decode(new_ids), stops) is not None
        return sequences, stops

    def _release_abandoned(self) -> None:
        while self._abandoned:
            self._abandoned.popleft().release()

    def _packed(self) -> PackedDecoder:
        """The decoder with its cache, made anew where the model has moved."""
        model = self._model
        held = self._decoder
        if held is not None and held.cache.keys.device == model.device and held.cache.keys.dtype == model.dtype:
            return held
        shape = cache_shape(model)
        block = shape.block_bytes(model.dtype)
        if self._cache_bytes is None:
            most = _MAX_ROWS * -(-self.config.max_length // shape.block_size)
            blocks = min(max(_DEFAULT_CACHE_BYTES // block, 1), most)
        else:
            blocks = self._cache_bytes // block
            if blocks < 1:
                raise ValueError(f"cache_bytes must be at least {block}, one block, got {self._cache_bytes}")
        cache = PagedCache(shape, blocks, model.device, model.dtype)
        if self.executor == "graph":
            # Brings triton along: not for those who do not ask.
            from engine.decoding.graph import GraphDecoder, graph_problem

            problem = graph_problem(model)
            if problem is None:
                self._decoder = GraphDecoder(model, cache, self._watching)
                return self._decoder
            self.executor = "packed"
            warnings.warn(f"the graph executor cannot serve ({problem}): packed serves instead", stacklevel=3)
        self._decoder = PackedDecoder(model, cache, self._state_copy, self._watching)
        return self._decoder

    def _told(
        self, steps: Iterator[list[Generating]], sequence: Generating, stops: tuple[str, ...]
    ) -> Iterator[StreamedToken]:
        told = ""
        for _ in steps:
            token = sequence.new[-1]
            text = ""
            if self.tokenizer is not None:
                text = self._text(sequence, stops)
                if sequence.finish_reason is None:
                    text = _sure(text, stops)
                text, told = text[len(told) :], max(told, text, key=len)
            yield StreamedToken(text, *token)

    # -- results -------------------------------------------------------------------------------------------------

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _text(self, sequence: Generating, stops: tuple[str, ...]) -> str | None:
        if self.tokenizer is None:
            return None
        ids = sequence.new_ids
        text = self._decode(ids[:-1] if ids[-1] in sequence.request.stop_ids else ids)
        place = _cut(text, stops)
        return text if place is None else text[:place]

    def _stats(
        self, sequences: list[Generating], counts: Counts, decoder: PackedDecoder | None, settled: int, seconds: float
    ) -> GenerationStats:
        layers = self.config.num_layers
        depths = [token.exit_layer for sequence in sequences for token in sequence.new[1:]]
        mean_depth = sum(depths) / len(depths) if depths else math.nan
        return GenerationStats(
            rows=len(sequences),
            prompt_tokens=sum(len(s.request.prompt) for s in sequences),
            new_tokens=sum(len(s.new) for s in sequences),
            num_layers=layers,
            mean_depth=mean_depth,
            saved_layers=1 - mean_depth / layers,
            prefill_s=counts.prefill_s,
            decode_s=counts.decode_s,
            wall_time_s=seconds,
            cache_bytes=0 if decoder is None else decoder.cache.bytes,
            peak_cache_bytes=0 if decoder is None else decoder.cache.peak_bytes,
            owed_settled=settled,
            preemptions=counts.preemptions,
        )


def _alone(decoder: PackedDecoder, sequence: Generating, pages: Pages) -> Iterator[list[Generating]]:
    rows = [(sequence, pages)]
    take_tokens([sequence], decoder.prefill(rows))
    yield [sequence]
    steps = Steps(decoder)
    try:
        while sequence.finish_reason is None:
            yield steps.take(lambda: rows, lambda: True)  # room for all of them is there
    finally:
        steps.close()


def _cut(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first stop string begins in ``text``."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def _sure(text: str, stops: tuple[str, ...]) -> str:
    """``text`` without an end that the next token may change: half a character, or what may become a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
