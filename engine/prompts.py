"""From what a caller asks of a decoder to checked requests: prompts, stop strings, limits and scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch

from engine.backbones import eos_ids
from engine.criteria.base import first_outside
from engine.decoding.criteria import check_criterion
from engine.decoding.requests import SEEDS, Request, flag, integer
from engine.inputs import check_surrogates
from engine.models.decoder import MultiExitDecoder
from engine.options import depth_limits, per_row

_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")  # those that templates of decoders know


class RequestReader:
    """Reads the calls of one decoder. ValueError or TypeError names what is wrong, before anything is run.

    tokenizer  None where only token ids can be read
    """

    def __init__(self, model: MultiExitDecoder, tokenizer: Any):
        self._model, self.tokenizer = model, tokenizer

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        return eos_ids(self._model.language_model)

    def read(self, prompts: Sequence[Any], o: Mapping[str, Any]) -> tuple[list[Request], tuple[str, ...]]:
        """Requests, and the stop strings. o: the options of ``DecoderEngine.run``, those of ``Sampling`` as one."""
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a list, got {type(prompts).__name__}: for one prompt, put it in a list")
        new, sampling = integer("max_new_tokens", o["max_new_tokens"], 1, "1"), o["sampling"]
        decay, ignore_eos = (flag(name, o[name]) for name in ("decay", "ignore_eos"))
        ids = [self._prompt(index, prompt) for index, prompt in enumerate(prompts)]
        stops, stop_ids = self._stops(o["stop"])
        limits = self._limits(len(ids), o["threshold"], o["min_depth"], o["max_depth"])
        scripts = self._scripts(len(ids), new, o["criterion"], o["exit_layers"])
        requests = []
        for k, prompt in enumerate(ids):
            if len(prompt) + new > self._model.config.max_length:
                raise ValueError(
                    f"prompt {k} has {len(prompt)} tokens and may become {len(prompt) + new} with {new} new ones, the "
                    f"model takes at most {self._model.config.max_length}"
                )
            requests.append(
                Request(
                    prompt=tuple(prompt),
                    max_new_tokens=new,
                    sampling=replace(sampling, seed=(sampling.seed + k) % SEEDS),
                    stop_ids=stop_ids if ignore_eos else stop_ids | self.eos_ids,
                    criterion=self._model.config.criterion if o["criterion"] is None else o["criterion"],
                    threshold=limits[0][k],
                    decay=decay,
                    min_depth=limits[1][k],
                    max_depth=limits[2][k],
                    script=scripts[k],
                )
            )
        return requests, stops

    def _prompt(self, index: int, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"prompt {index} is an empty string: generation needs something to start from")
            check_surrogates(f"prompt {index}", prompt)
            return self._tokenizer(index).encode(prompt)
        if isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
            tokenizer = self._tokenizer(index)
            if getattr(tokenizer, "chat_template", None) is None:
                raise ValueError(f"prompt {index} is a chat, but the tokenizer has no chat template: pass a string")
            for place, message in enumerate(prompt):
                if set(message) != {"role", "content"} or not all(isinstance(v, str) for v in message.values()):
                    raise ValueError(f"prompt {index}, message {place}, must have role and content, got {message!r}")
                if message["role"] not in _ROLES:
                    raise ValueError(
                        f"prompt {index}, message {place}, must have one of the roles {', '.join(_ROLES)}, got "
                        f"{message['role']!r}"
                    )
                check_surrogates(f"prompt {index}, message {place},", message["content"])
            from jinja2 import TemplateError

            try:
                return list(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False))
            except TemplateError as error:
                raise ValueError(f"prompt {index}: the tokenizer's chat template refuses it: {error}") from error
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise TypeError(
                f"prompt {index} must be a string, a list of messages or a list of token ids, got "
                f"{type(prompt).__name__}"
            )
        if not prompt:
            raise ValueError(f"prompt {index} is empty: generation needs at least one token to start from")
        vocab = self._model.language_model.config.vocab_size
        for place, token in enumerate(prompt):
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise TypeError(f"prompt {index} must hold token ids, got {token!r} at {place}")
            if not 0 <= token < vocab:
                raise ValueError(f"prompt {index} has token id {token} at {place}, allowed are 0 to {vocab - 1}")
        return list(map(int, prompt))

    def _tokenizer(self, index: int):
        if self.tokenizer is None:
            raise ValueError(f"prompt {index} is text and this model has no tokenizer: pass token ids")
        return self.tokenizer

    def _stops(self, stop: str | Sequence[str] | None) -> tuple[tuple[str, ...], frozenset[int]]:
        """Stop strings, and the ids of those that are special tokens: no text shows these."""
        given = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if not isinstance(given, Iterable):
            raise TypeError(f"stop must be a string, or a list of strings, got {stop!r}")
        stops = tuple(given)
        if not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop must hold strings of one character or more, got {list(stops)!r}")
        if stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        added = self.tokenizer.added_tokens_decoder.items() if stops else ()
        special = {token.content: number for number, token in added if token.special}
        for s in stops:
            inside = [token for token in special if token in s]
            if inside and s not in special:
                raise ValueError(
                    f"stop string {s!r} holds the special token {inside[0]!r}, which texts leave out: give the token "
                    "alone, or the text without it"
                )
        return stops, frozenset(special[s] for s in stops if s in special)

    def _limits(self, n: int, threshold, min_depth, max_depth) -> tuple[list, list, list]:
        config = self._model.config
        threshold = config.threshold if threshold is None else threshold
        thresholds = per_row("threshold", threshold, n, torch.float32)
        row = first_outside(thresholds, 0, 1)
        if row is not None:
            raise ValueError(f"threshold must lie in [0, 1], got {float(thresholds[row]):g} (row {row})")
        least, most = depth_limits(config.num_layers, config.exit_layers, n, min_depth, max_depth)
        return thresholds.tolist(), least.tolist(), most.tolist()

    def _scripts(self, n: int, new: int, criterion, exit_layers) -> list[tuple[int, ...] | None]:
        chosen = self._model.config.criterion if criterion is None else criterion
        check_criterion(self._model, chosen)
        if chosen != "scripted":
            if exit_layers is not None:
                raise ValueError(f"exit_layers is for the scripted criterion, got criterion {chosen!r}")
            return [None] * n
        if exit_layers is None:
            raise ValueError("the scripted criterion needs exit_layers: one layer, or a list for each prompt")
        known, layers = set(self._model.config.exit_layers), self._model.config.num_layers
        if isinstance(exit_layers, Integral) and not isinstance(exit_layers, bool):
            exit_layers = [[layers] + [exit_layers] * (new - 1)] * n
        if not isinstance(exit_layers, Sequence) or len(exit_layers) != n:
            raise ValueError(f"exit_layers must be one layer, or a list for each of {n} prompts")
        scripts = []
        for row, script in enumerate(exit_layers):
            if not isinstance(script, Iterable):
                raise TypeError(
                    f"exit_layers[{row}] must be a list with a layer for each of {new} tokens, got {script!r}: for one "
                    "layer for all, give it without a list"
                )
            script = tuple(script)
            if len(script) < new:
                raise ValueError(f"exit_layers[{row}] must have a layer for each of {new} tokens, got {len(script)}")
            for step, layer in enumerate(script):
                if layer not in known:
                    raise ValueError(f"exit_layers[{row}][{step}] is {layer}, exits stand at {sorted(known)}")
            if script[0] != layers:
                raise ValueError(
                    f"exit_layers[{row}][0] is {script[0]}: the first new token comes from the prompt, at {layers}"
                )
            scripts.append(script[1:])
        return scripts
