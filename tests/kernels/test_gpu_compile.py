"""Every Triton kernel compiles for sm_80 and sm_90, fits their shared memory and spills no register: no device needed.

Here every form, those that take most in all dtypes; ``python -m tests.kernels.gpu_cases`` compiles all of them in all
dtypes and prints what each one takes.
"""

import functools

import pytest
import torch

from engine.kernels.gpu_linear import configs_for
from tests.kernels import gpu_cases

pytestmark = gpu_cases.needs_compiler

BERT, MINILM = 768, 384
# Of every kernel the forms that take most.
CORE = ("linear qkv", "attention 128 bias", "first tokens bias", "embed", "norm compact", "exit norm policy",
        "exit add norm policy", "exit add norm, state, policy")  # fmt: skip
ALL = (*CORE, "linear gelu", "linear pooler", "linear small", "linear down", "attention 128", "attention 128 few",
       "attention 128 removal", "attention 32", "attention 32 bias", "first tokens 128", "first tokens 32", "norm",
       "norm first", "exit norm confidence", "exit norm last", "exit state policy", "exit state scripted",
       "exit add norm confidence", "exit add norm last", "exit add norm, state, confidence",
       "exit add norm, state, last")  # fmt: skip
# Only products of 16 bit on Hopper leave partial sums.
PARTIALS = ("norm compact partials", "norm few partials",
            *(f"{form} partials {criterion}" for form in ("exit norm", "exit add norm", "exit add norm few")
              for criterion in ("policy", "confidence", "last")))  # fmt: skip


@functools.cache
def launches(hidden, dtype):
    return {launch.name: launch for launch in gpu_cases.launches(pytest.MonkeyPatch(), hidden, dtype)}


def check(hidden, dtype, name, arch):
    usage = gpu_cases.compile_launch(launches(hidden, dtype)[name], arch)
    assert usage.stack_bytes == 0, "registers are spilled"
    assert usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
    return usage


def test_every_form_is_compiled():
    assert sorted(ALL + PARTIALS) == sorted(name for name, _ in gpu_cases.calls(BERT, torch.float16))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ALL)
def test_half_precision(name, arch):
    usage = check(BERT, torch.float16, name, arch)
    if arch == 90 and name.startswith(("linear qkv", "linear gelu", "attention 128")) and "bias" not in name:
        # Tensor cores fed by asynchronous copies: the early return has not stopped the pipeline.
        assert "wgmma.mma_async" in usage.ptx and "cp.async" in usage.ptx


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize(
    "dtype, arch",
    [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float32, 80), (torch.float32, 90)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_dtypes_and_devices(name, dtype, arch):
    check(BERT, dtype, name, arch)


@pytest.mark.parametrize("name", CORE[:3] + CORE[4:])
def test_minilm(name):
    check(MINILM, torch.float16, name, 90)


@pytest.mark.parametrize("name", PARTIALS)
@pytest.mark.parametrize("hidden, dtype", [(BERT, torch.float16), (BERT, torch.bfloat16), (MINILM, torch.float16)])
def test_partial_sums(hidden, dtype, name):
    check(hidden, dtype, name, 90)


def test_tiles_fit():
    """Shared memory of every tile that is offered: num_stages tiles of x and of W."""
    for dtype in (torch.float16, torch.float32):
        for rows in (16, 128, 4096):
            for config in configs_for(rows, BERT, BERT, dtype):
                stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
                assert stage * config.num_stages <= gpu_cases.SHARED_BYTES[80]
