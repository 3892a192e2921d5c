"""What is asked of one generation, and what has come of it so far. No tensor is touched here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

SEEDS = 1 << 64  # what torch's generators take


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits of the exit that a token leaves through.

    temperature         0: greedy, the first of the greatest logits. Else logits are divided by it
    top_k               only the k most probable tokens; 0: all
    top_p               only the most probable tokens whose probabilities first reach p in sum, at least one
    repetition_penalty  logits of tokens that the prompt or the continuation holds: divided by it where positive, else
                        multiplied (Keskar et al. 2019, CTRL, 4.1; as Hugging Face does it). 1e-6 to 1e6: fp32 logits
                        stay finite
    seed                of this row's own random numbers: the other rows of a batch do not change what it draws. Below
                        2**64, of which torch's generator on the host uses the lower 32 bits
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        read = {
            "temperature": number("temperature", self.temperature, lambda x: x >= 0, "0 (greedy) or more"),
            "top_k": integer("top_k", self.top_k, 0, "0 (all tokens)"),
            "top_p": number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "repetition_penalty": number(
                "repetition_penalty", self.repetition_penalty, lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6"
            ),
            "seed": integer("seed", self.seed, 0, "0 and below 2**64", SEEDS),
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is the first of the greatest logits, as they are."""
        return self.temperature == 0 and self.repetition_penalty == 1.0


def number(name: str, value: Any, good: Callable[[float], bool], allowed: str) -> float:
    """``value`` as a float, NumPy's kinds too; ValueError where it is none, not finite or not good."""
    try:
        read = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        read = math.inf
    if not (math.isfinite(read) and good(read)):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return read


def integer(name: str, value: Any, least: int, what: str, end: float = math.inf) -> int:
    """``value`` as an int, NumPy's kinds too; ValueError where it is none, below ``least``, or not below ``end``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < end:
        raise ValueError(f"{name} must be an integer of at least {what}, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """``value``; ValueError where it is not a bool: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, True or False, got {value!r}")
    return value


@dataclass(frozen=True)
class Request:
    """One prompt, and how its tokens may leave.

    prompt          token ids, one or more
    max_new_tokens  1 or more
    stop_ids        token ids that end it; the one that does is its last token
    criterion       see ``criteria``; what it measures of a token is its exit probability
    threshold       a token leaves when its exit probability is above this
    decay           the threshold falls to nine tenths on the way (CALM)
    min_depth       no token leaves before this layer
    max_depth       every token of a decode step has left by this layer, where an exit stands. The prompt, and with it
                    the first new token, always runs at full depth (the authors' code)
    script          exit layers of new tokens 2, 3, ...: they decide, the policies are computed all the same. None: the
                    policies decide
    forced          the continuation itself, for measuring and testing: what is drawn is replaced by these ids
    keep_logits     whether the fp32 logits that each token was drawn from are kept
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    criterion: str = "policy"
    threshold: float = 0.5
    decay: bool = False
    min_depth: int = 1
    max_depth: int | None = None
    script: tuple[int, ...] | None = None
    forced: tuple[int, ...] | None = None
    keep_logits: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty: generation needs at least one token to start from")
        integer("max_new_tokens", self.max_new_tokens, 1, "1")
        for name, needed in (("script", self.max_new_tokens - 1), ("forced", self.max_new_tokens)):
            given = getattr(self, name)
            if given is not None and len(given) < needed:
                raise ValueError(f"{name} must have an entry for each of {needed} tokens, got {len(given)}")


class NewToken(NamedTuple):
    """exit_layer: layers that ran for it; exit_prob: sigmoid of the policy logit there, 1 where it had to leave."""

    token_id: int
    exit_layer: int
    exit_prob: float


@dataclass(eq=False)
class Generating:
    """A request on its way. Position i of the sequence holds prompt token i, or new token i - len(prompt).

    What new token k + 1 left at is where position len(prompt) + k has its state copied from (``frozen``).
    """

    request: Request
    number: int
    new: list[NewToken] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    draws: Any = None  # the row's random numbers
    stops_at: Callable[[list[int]], bool] | None = None  # whether a continuation holds a stop string

    def __len__(self) -> int:
        return len(self.request.prompt) + len(self.new)

    @property
    def ids(self) -> list[int]:
        return [*self.request.prompt, *self.new_ids]

    @property
    def new_ids(self) -> list[int]:
        return [token.token_id for token in self.new]

    @property
    def frozen(self) -> list[int]:
        """Exit layers of the positions that have run, from the first position behind the prompt on."""
        return [token.exit_layer for token in self.new[1:]]

    def add(self, token: NewToken) -> None:
        """One more token; finish_reason is set where it is the last."""
        self.new.append(token)
        if token.token_id in self.request.stop_ids or (self.stops_at is not None and self.stops_at(self.new_ids)):
            self.finish_reason = "stop"
        elif len(self.new) == self.request.max_new_tokens:
            self.finish_reason = "length"


def decayed(threshold: float, step: int, new: int) -> float:
    """CALM's decaying threshold (Schuster et al. 2022, eq. 5, its temperature 4): lambda (0.9 + 0.1 exp(-4 t / N)) at
    new token t of N."""
    return threshold * (0.9 + 0.1 * math.exp(-4 * step / new))


def threshold_of(request: Request, step: int) -> float:
    """What new token ``step`` (1 is the second) is compared with."""
    return decayed(request.threshold, step, request.max_new_tokens) if request.decay else request.threshold


def scripted_layer(request: Request, step: int) -> int | None:
    """The layer at which new token ``step`` (1 is the second) leaves by script, or None."""
    return None if request.script is None else request.script[step - 1]
