"""What an exit of the GPU's pass reads and writes, and each of its ops (``gpu_exit``) in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.exits import add_layer_norm_ref
from engine.kernels.gpu_common import ROWS, TOKENS
from engine.kernels.products import Partials, whole_rows

__all__ = [
    "CRITERIA",
    "ExitDestinations",
    "ExitLimits",
    "exit_add_norm_rows__ref",
    "exit_norm_rows__ref",
    "exit_rows__ref",
]

# policy: z > threshold_logit. scripted: script <= layer. confidence: the logit of the classifier's largest softmax
# probability > threshold_logit. last: everybody leaves, nothing is asked.
CRITERIA = ("policy", "scripted", "confidence", "last")


class ExitDestinations(NamedTuple):
    """What an exit writes. B rows of the original batch, cap_rows places for live ones; all contiguous.

    logits       fp32 [B, C], exit_layers  int32 [B], exit_probs  fp32 [B]: of leaving rows, at their original index.
                 exit_probs is sigmoid(z), and 1 where the row had to leave
    keep         int8 [cap_rows]: 1 where the live row stays, 0 where it leaves
    exit_logits  fp32 [cap_rows] or None: z of every live row (the confidence's logit with that criterion; with "last"
                 nothing is written)
    """

    logits: Tensor
    exit_layers: Tensor
    exit_probs: Tensor
    keep: Tensor
    exit_logits: Tensor | None = None


class ExitLimits(NamedTuple):
    """Who the live rows are and when they may leave.

    row_ids                             int32 [cap_rows]: original index of live row i, in [0, B)
    min_depth, max_depth                int32; threshold_logit fp32; script int32, exit layers
    by_row_id                           where the entry of live row i stands in those four: False, at i (they are
                                        compacted with the rows); True, at row_ids[i] (they stay as the batch came)
    The four may be None where the criterion asks for none: no min_depth is 0, no max_depth is never.
    """

    row_ids: Tensor
    min_depth: Tensor | None = None
    max_depth: Tensor | None = None
    threshold_logit: Tensor | None = None
    script: Tensor | None = None
    by_row_id: bool = False


# --- torch twins -----------------------------------------------------------------------------------------------------


def policy_math(state: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """z [n] in fp32 (fp64 for fp64) of states [n, H]."""
    wide = torch.promote_types(state.dtype, torch.float32)
    hidden = F.gelu(F.linear(state.to(wide), w1.to(wide), b1.to(wide)))
    return F.linear(hidden, w2.to(wide), b2.to(wide)).squeeze(1)


def classifier_math(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Class logits [n, C] in fp32 (fp64 for fp64) of states [n, H]."""
    wide = torch.promote_types(state.dtype, torch.float32)
    return F.linear(state.to(wide), weight.to(wide), bias.to(wide))


def confidence_math(logits: Tensor) -> Tensor:
    """Logit of the largest softmax probability p: with s = 1 / p, log(p / (1 - p)) = -log(s - 1)."""
    return -torch.log((logits - logits.amax(1, keepdim=True)).exp().sum(1) - 1)


def exit_rows__ref(
    out: ExitDestinations,
    limits: ExitLimits,
    state: Tensor,
    counts: Tensor,
    layer: int,
    criterion: str,
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    classifier: tuple[Tensor, Tensor],
) -> None:
    n = int(counts[ROWS])
    _decide(out, limits, state[:n], layer, criterion, policy, classifier)


def exit_norm_rows__ref(
    out: ExitDestinations,
    limits: ExitLimits,
    x: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, Tensor, float],
    counts: Tensor,
    layer: int,
    criterion: str,
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    classifier: tuple[Tensor, Tensor],
    index: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    n = int(counts[ROWS])
    source = slice(n) if index is None else index[:n].long()
    rows = whole_rows(x, partials, n if index is None else int(counts[TOKENS]), source)
    state = add_layer_norm_ref(rows, residual[source], *norm).to(x.dtype)
    _decide(out, limits, state, layer, criterion, policy, classifier)


def exit_add_norm_rows__ref(
    out: ExitDestinations,
    limits: ExitLimits,
    normed: Tensor,
    x: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, Tensor, float],
    counts: Tensor,
    layer: int,
    criterion: str,
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    classifier: tuple[Tensor, Tensor],
    index: Tensor | None,
    state: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    rows, tokens = counts.tolist()
    normed[:tokens] = add_layer_norm_ref(whole_rows(x, partials, tokens, slice(tokens)), residual[:tokens], *norm)
    states = normed[index[:rows].long()] if state is None else state[:rows]
    _decide(out, limits, states, layer, criterion, policy, classifier)



def _decide(out, limits, state, layer, criterion, policy, classifier) -> None:
    n = state.shape[0]
    rows = limits.row_ids[:n].long()
    place = rows if limits.by_row_id else slice(n)
    if criterion == "last":
        leave = torch.ones(n, dtype=torch.bool, device=state.device)
        probs = torch.ones(n, dtype=out.exit_probs.dtype, device=state.device)
    else:
        classes = classifier_math(state, *classifier) if criterion == "confidence" else None
        z = policy_math(state, *policy) if classes is None else confidence_math(classes)
        if criterion == "scripted":
            leave = limits.script[place] <= layer
        else:
            leave = z > limits.threshold_logit[place]
        if limits.min_depth is not None:
            leave = leave & (limits.min_depth[place] <= layer)
        probs = z.sigmoid()
        if limits.max_depth is not None:
            forced = limits.max_depth[place] <= layer
            leave = leave | forced
            probs = torch.where(forced, 1.0, probs)
        if out.exit_logits is not None:
            out.exit_logits[:n] = z
        if classes is not None:
            out.logits[rows] = classes.to(out.logits.dtype)
    out.keep[:n] = (~leave).to(torch.int8)
    leaving = rows[leave]
    out.exit_layers[leaving] = layer
    out.exit_probs[leaving] = probs[leave].to(out.exit_probs.dtype)
    if criterion != "confidence":
        out.logits[leaving] = classifier_math(state[leave], *classifier).to(out.logits.dtype)
