"""y = act(x W^T + b) for a weight that is used many times: packed once for the machine's matrix product.

On x86 with AVX2 the extension's own kernel serves fp32 (``packed_linear``): it fetches the next panel of the weight
while it multiplies with this one. Two cores of an AMD EPYC (Zen 3), weights not in any cache, microseconds against
oneDNN on a pre-packed weight (which was 2.2 times as fast as ``F.linear`` there):

    rows            1          14           32          128           450
    384 -> 1152     75 / 105   108 / 186    214 / 301   785 / 865     2769 / 2899
    384 -> 1536    114 / 172   169 / 296    341 / 542   1326 / 1654   4509 / 5647   with GELU
    1536 -> 384    115 / 167   158 / 253    329 / 430   1071 / 1300   4188 / 4218

so it serves every number of rows, and one packed copy of the weight is all that is held. So it is with AVX-512: whole
passes of MiniLM at 110, 450 and 1 800 tokens took 0.74, 0.91 and 0.92 of the time that they took with oneDNN from 65
rows on (two cores of an Intel Xeon with 480 MB of L3). Without the extension, or without AVX2, oneDNN is the
implementation of fp32 on the CPU, and ``F.linear`` of everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import extension
from engine.kernels.extension import bind

__all__ = ["PackedLinear", "linear_ref", "own_kernel", "pack_panels", "packed_linear"]

# Outputs of one panel: kPanel of csrc/include/args.h.
PANEL = 16

# Row-count hint of oneDNN's packing. One hint serves all sizes: packed for 32 rows, 1 to 4 096 rows are within 3 % of
# the best hint, while packing for 1 row costs up to 2.4 times at 12 rows.
_PACK_ROWS = 32


def _onednn_ops():
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight.default, torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


_ONEDNN = _onednn_ops()
# Instruction sets with a kernel of ours: see above.
_OWN_KERNELS = ("avx2", "avx512")


def own_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our own kernel serves; oneDNN's plans anew for every number of rows not met before."""
    return device.type == "cpu" and dtype == torch.float32 and extension.cpu_kernels() in _OWN_KERNELS


# --- torch twins ---------------------------------------------------------------------------------------------------


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x [n, K], weight [N, K], bias [N] -> [n, N]; erf-GELU on top where asked."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def packed_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, gelu: bool) -> Tensor:
    if outputs < 0:
        raise ValueError(f"outputs must not be negative, got {outputs}")
    panels = -(-outputs // PANEL)
    if tuple(weight.shape) != (panels, x.shape[1], PANEL):
        raise ValueError(
            f"weight must have shape {[panels, x.shape[1], PANEL]}, got {list(weight.shape)}: pack it with pack_panels"
        )
    return linear_ref(x, weight.transpose(1, 2).flatten(0, 1)[:outputs], bias, gelu)


_packed_linear = bind("packed_linear", packed_linear_ref)


# --- public functions ----------------------------------------------------------------------------------------------


def pack_panels(weight: Tensor) -> Tensor:
    """weight [N, K] -> [ceil(N / 16), K, 16]: 16 outputs side by side for each k, zeros past the last output."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    return padded.view(-1, PANEL, inputs).transpose(1, 2).contiguous()


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, gelu: bool = False) -> Tensor:
    """``x W^T + bias``, erf-GELU on top where asked: (n, outputs), fp32.

    x       (n, K) fp32, the last dimension contiguous
    weight  what ``pack_panels`` makes of W, fp32
    bias    (outputs,) fp32 or None
    A row's result does not depend on the other rows.
    """
    return _packed_linear(x, weight, bias, outputs, gelu)


class PackedLinear:
    """A linear layer for inference. Holds a packed *copy* of the weight where that is faster.

    weight  [N, K] float, bias [N] or None. The owner watches the source weight and packs again when it changes.
    panels  the weight as ``packed_linear`` takes it; None where our kernel does not serve
    """

    __slots__ = ("bias", "panels", "weight", "_linear", "_outputs")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self._outputs = weight.shape[0]
        self.panels = self.weight = self._linear = None
        if own_kernel(weight.device, weight.dtype):
            self.panels = pack_panels(weight)
            return
        self.weight = weight
        if _ONEDNN is not None and weight.device.type == "cpu" and weight.dtype == torch.float32:
            self.weight, self._linear = _ONEDNN[0](weight.contiguous(), _PACK_ROWS), _ONEDNN[1]

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x [n, K] -> [n, N]."""
        if self.panels is not None:
            return _packed_linear(x, self.panels, self.bias, self._outputs, gelu)
        if self._linear is None:
            return linear_ref(x, self.weight, self.bias, gelu)
        return self._linear(x, self.weight, self.bias, "gelu" if gelu else "none", [], "none" if gelu else "")
