import pytest
import torch

from engine.kernels.gpu_attention import (
    AttentionConfig,
    attention_configs_for,
    position_matrix,
    varlen_attention_,
    varlen_attention__ref,
)
from engine.kernels.survivors import Removal
from tests.kernels.cases import assert_no_worse, cu_seqlens_of, doubled

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON = 7.0


def plain(qkv, lengths, num_heads, scale, bias, first_only):
    """softmax(scale Q K^T + bias) V, sequence by sequence and head by head, all in the dtype of qkv."""
    hidden, outs, start = qkv.shape[1] // 3, [], 0
    d = hidden // num_heads
    for length in lengths:
        rows, heads = qkv[start : start + length], []
        for h in range(num_heads):
            query, key, value = (rows[:, part * hidden + h * d :][:, :d] for part in range(3))
            scores = query @ key.t() * scale
            if bias is not None:
                middle = bias.shape[1] // 2
                scores = scores + torch.stack([bias[h, middle - i : middle - i + length] for i in range(length)]).to(
                    scores.dtype
                )
            heads.append(scores.softmax(-1) @ value)
        attended = torch.cat(heads, 1)
        outs.append(attended[:1] if first_only else attended)
        start += length
    return torch.cat(outs)


def run(way, qkv, lengths, num_heads, scale, max_seqlen, bias=None, first_only=False, live=None, config=None):
    """The op on the first ``live`` sequences; everything behind them must stay untouched, and unread."""
    live = len(lengths) if live is None else live
    tokens = sum(lengths[:live])
    qkv = qkv.clone()
    qkv[tokens:] = float("nan")
    matrix = None if bias is None else position_matrix(bias)
    cu_seqlens = cu_seqlens_of(lengths, way.device)
    counts = torch.tensor([live, tokens], dtype=torch.int32, device=way.device)
    rows = len(lengths) if first_only else qkv.shape[0]
    out = torch.full((rows, qkv.shape[1] // 3), POISON, dtype=qkv.dtype, device=way.device)
    way(varlen_attention_, varlen_attention__ref)(
        out, qkv, cu_seqlens, counts, num_heads, scale, max_seqlen, matrix, first_only, config
    )
    n = live if first_only else tokens
    assert bool((out[n:] == POISON).all())
    if n:
        args = (lengths[:live], num_heads, scale)
        exact = plain(qkv[:tokens].double(), *args, *doubled(bias), first_only)
        assert_no_worse(out[:n], plain(qkv[:tokens], *args, bias, first_only), exact, floor=2e-6)
    return out[:n]


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("num_heads, d", [(2, 32), (1, 64), (2, 20)])
def test_sequences_of_all_lengths(way, dtype, first_only, num_heads, d):
    way.skip_wrong(dtype)
    # Around the tiles of 16, 32 and 64, one of several tiles, one of a single token.
    lengths = [3, 1, 16, 33, 70, 17]
    qkv = torch.randn(sum(lengths) + 5, 3 * num_heads * d).to(dtype).to(way.device)
    run(way, qkv, lengths, num_heads, d**-0.5, 70, first_only=first_only)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("live", [0, 1, 3])
def test_fewer_live_rows_than_capacity(way, dtype, first_only, live):
    lengths = [5, 18, 1, 20]
    qkv = torch.randn(44, 3 * 32).to(dtype).to(way.device)
    run(way, qkv, lengths, 1, 0.2, 24, first_only=first_only, live=live)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("bias_dtype", [SINGLE, None], ids=["fp32 table", "own dtype"])
def test_position_bias(way, dtype, first_only, bias_dtype):
    lengths = [4, 1, 40]
    qkv = torch.randn(45, 3 * 64).to(dtype).to(way.device)
    bias = torch.randn(2, 2 * 44 - 1).to(bias_dtype or dtype).to(way.device)
    run(way, qkv, lengths, 2, 0.17, 41, bias, first_only)


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
def test_all_tiles_compute_the_same(way, first_only):
    lengths = [130, 2]
    for dtype in (HALF, SINGLE):
        qkv = torch.randn(132, 3 * 32).to(dtype).to(way.device)
        for config in attention_configs_for(130, 32, dtype, first_only):
            run(way, qkv, lengths, 1, 0.17, 130, first_only=first_only, config=config)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_the_last_step_may_be_a_short_one(way, biased):
    """No keys, as many as it holds, and one more, behind none, one and two whole steps."""
    lengths = [1, 31, 32, 33, 64, 65, 96, 97, 128, 129]
    qkv = torch.randn(sum(lengths), 3 * 32).to(HALF).to(way.device)
    bias = torch.randn(1, 2 * 130 - 1).to(way.device) if biased else None
    config = AttentionConfig(64, 64, 4, 2, tail=32)
    assert config == attention_configs_for(65, 32, HALF, sequences=512)[0]
    assert config not in (attention_configs_for(64, 32, HALF)[0], attention_configs_for(65, 32, HALF, sequences=513)[0])
    run(way, qkv, lengths, 1, 0.17, 129, bias, config=config)


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
def test_a_sequence_alone_and_in_a_batch(way, first_only):
    lengths = [3, 20, 37]
    qkv = torch.randn(60, 3 * 32, device=way.device)
    batch = run(way, qkv, lengths, 1, 0.2, 40, first_only=first_only)
    own = batch[2:] if first_only else batch[23:]
    assert torch.equal(run(way, qkv[23:], [37], 1, 0.2, 40, first_only=first_only), own)


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
def test_large_scores_and_nan(way, first_only):
    """exp would overflow without the running maximum; a NaN stays in its sequence and shows."""
    lengths = [40, 2]
    qkv = torch.randn(42, 3 * 16, device=way.device)
    qkv[:, :16] *= 100
    run(way, qkv, lengths, 1, 1.0, 40, first_only=first_only)
    qkv[41, 16:32] = float("nan")
    counts = torch.tensor([2, 42], dtype=torch.int32, device=way.device)
    out = torch.zeros(2 if first_only else 42, 16, device=way.device)
    way(varlen_attention_, varlen_attention__ref)(
        out, qkv, cu_seqlens_of(lengths, way.device), counts, 1, 1.0, 40, None, first_only
    )
    first_of_last = 1 if first_only else 40
    assert bool(out[first_of_last:].isnan().all()) and not bool(out[:first_of_last].isnan().any())


@pytest.mark.parametrize("lengths, capacity", [([5], 1), ([3, 1, 16, 33, 70], 9), ([2] * 40, 40), ([1, 40, 7], 256)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_survivors_are_found_beside_it(way, lengths, capacity, share):
    """As ``survivors_`` finds them, for all the rows that are live; the attention is what it is without."""
    live, tokens = len(lengths), sum(lengths)
    device = way.device
    cu_seqlens = torch.full((capacity + 1,), 99_999, dtype=torch.int32)
    cu_seqlens[: live + 1] = cu_seqlens_of(lengths)
    cu_seqlens, counts = cu_seqlens.to(device), torch.tensor([live, tokens], dtype=torch.int32, device=device)
    qkv = torch.randn(tokens, 3 * 32, device=device)
    keep = (torch.rand(capacity) < share).to(torch.int8).to(device)

    def removal():
        poison = [torch.full((n,), -7, dtype=torch.int32, device=device) for n in (capacity + 1, tokens, 2, capacity)]
        row_ids = torch.randperm(capacity, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(device)
        return Removal(keep, row_ids, *poison)

    for now in (counts, torch.zeros_like(counts)):
        found, expected = removal(), removal()
        outs = [torch.full((tokens, 32), POISON, device=device) for _ in range(2)]
        attend = way(varlen_attention_, varlen_attention__ref)
        attend(outs[0], qkv, cu_seqlens, now, 2, 0.2, max(lengths), removal=found)
        attend(outs[1], qkv, cu_seqlens, now, 2, 0.2, max(lengths))
        expected.run(cu_seqlens.where(cu_seqlens != 99_999, tokens), now)
        assert torch.equal(*outs)
        n, stay = int(now[1]), int(expected.out_counts[0])
        assert found.out_counts.tolist() == expected.out_counts.tolist()
        assert found.token_dest[:n].tolist() == expected.token_dest[:n].tolist()
        assert found.out_cu_seqlens[: stay + 1].tolist() == expected.out_cu_seqlens[: stay + 1].tolist()
        assert found.out_row_ids[:stay].tolist() == expected.out_row_ids[:stay].tolist()


def test_twin_refuses_longer_rows():
    with pytest.raises(ValueError, match="max_seqlen must be at least the longest length, got 4 for 5 tokens"):
        varlen_attention__ref(OUT, QKV, CU, torch.tensor([2, 7], dtype=torch.int32), 2, 1.0, 4)


OUT, QKV, CU = torch.zeros(7, 8), torch.zeros(7, 24), cu_seqlens_of([5, 2])
N = torch.tensor([2, 7], dtype=torch.int32)
MESSAGES = [
    ((OUT.double(), QKV, CU, N, 2, 1.0, 5), "out must be float16, bfloat16 or float32, got float64"),
    ((OUT, QKV, CU, N, 3, 1.0, 5), "num_heads must divide the width of out, got 3 for a width of 8"),
    ((OUT, QKV, CU, N, 2, 1.0, 0), "max_seqlen must be at least 1, got 0"),
    ((OUT, QKV[:, :23], CU, N, 2, 1.0, 5), r"qkv must have shape \[0 or more, 24\], got \[7, 23\]"),
    ((OUT[:6], QKV, CU, N, 2, 1.0, 5), r"out must have shape \[7 or more, 8\], got \[6, 8\]"),
    ((OUT[:1], QKV, CU, N, 2, 1.0, 5, None, True), r"out must have shape \[2 or more, 8\], got \[1, 8\]"),
    ((OUT, QKV, CU.long(), N, 2, 1.0, 5), "cu_seqlens must be int32, got int64"),
    ((OUT, QKV, CU, N[:1], 2, 1.0, 5), r"counts must be int32 of shape \[2\]"),
    ((OUT, QKV, CU, N, 2, 1.0, 5, torch.zeros(2, 9)), r"be \[2, P, P\], P a multiple of 128 .* \(5\), got \[2, 9\]"),
    ((OUT, QKV, CU, N, 2, 1.0, 130, torch.zeros(2, 128, 128)), r"at least max_seqlen \(130\), got \[2, 128, 128\]"),
    ((OUT, QKV, CU, N, 2, 1.0, 5, torch.zeros(1, 128, 128)), r"must have shape \[2, 128, 128\], got \[1, 128, 128\]"),
    ((QKV[:, :8], QKV, CU, N, 2, 1.0, 5), "out must not overlap qkv in memory"),
]


@pytest.mark.parametrize("arguments, message", MESSAGES)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention_(*arguments)


def test_messages_of_a_removal():
    def ints(n):
        return torch.zeros(n, dtype=torch.int32)

    good = Removal(torch.zeros(2, dtype=torch.int8), ints(2), ints(3), ints(7), ints(2), ints(2))
    varlen_attention_(OUT, QKV, CU, N, 2, 1.0, 5, removal=good)
    for wrong, message in (
        (dict(keep=ints(2)), "keep of a removal must be bool or int8 or uint8, got int32"),
        (dict(out_cu_seqlens=ints(2)), r"out_cu_seqlens of a removal must have shape \[3 or more\], got \[2\]"),
        (dict(out_cu_seqlens=ints(4)), r"out_cu_seqlens of a removal must have shape \[3\], got \[4\]"),
        (dict(out_counts=ints(4)[::2]), "out_counts of a removal must be contiguous, got stride 2"),
        (dict(token_dest=torch.zeros(7)), "token_dest of a removal must be int32, got float32"),
        (dict(token_dest=ints(6)), r"token_dest of a removal must have shape \[7 or more\], got \[6\]"),
        (dict(out_row_ids=good.row_ids), "outputs must not share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            varlen_attention_(OUT, QKV, CU, N, 2, 1.0, 5, removal=good._replace(**wrong))
    with pytest.raises(ValueError, match="at most 256 rows, got first_only=True and 2 rows"):
        varlen_attention_(OUT, QKV, CU, N, 2, 1.0, 5, first_only=True, removal=good)
