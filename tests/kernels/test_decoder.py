"""``decode_step``: what it refuses, and that nothing has happened then. Its results are compared in tests/decoding."""

from __future__ import annotations

import gc

import pytest
import torch

from engine.kernels.decoder import DecoderPlan, DecoderTensors, decode_step
from engine.kernels.linear import pack_panels
from tests.kernels.cases import needs_extension

pytestmark = needs_extension
H, D, HEADS, KV, INNER, LAYERS, VOCAB, SLOTS = 12, 8, 4, 2, 10, 3, 20, 16


def tensors_of(seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g) * 0.3

    layers = []
    for _ in range(LAYERS):
        layers += [randn(H) + 1, pack_panels(randn((HEADS + 2 * KV) * D, H)), pack_panels(randn(H, HEADS * D))]
        layers += [randn(H) + 1, pack_panels(randn(2 * INNER, H)), pack_panels(randn(H, INNER))]
    policies = [randn(4, H), randn(4), randn(1, 4), randn(1)] * 2
    return DecoderTensors(
        randn(VOCAB, H), randn(30, D), randn(30, D), randn(H) + 1, 1e-5, HEADS, KV, D**-0.5, layers,
        [1e-5] * (2 * LAYERS), [1, 2, 3], policies,
    )  # fmt: skip


def arguments_of(rows=2, script=2):
    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    return dict(
        token_ids=torch.tensor([3, 4][:rows]),
        positions=torch.tensor([5, 2][:rows]),
        block_table=torch.tensor([[1, 2], [0, 0]][:rows], dtype=torch.int32),
        watermarks=torch.tensor([[5, 3, 0], [2, 2, 2]][:rows], dtype=torch.int32),
        keys=torch.randn(LAYERS, SLOTS, KV, D),
        values=torch.randn(LAYERS, SLOTS, KV, D),
        states=torch.randn(SLOTS, H),
        block_size=4,
        threshold_logit=torch.zeros(rows),
        script=ints(*[script] * rows),
        min_depth=ints(*[1] * rows),
        max_depth=ints(*[3] * rows),
    )


def test_what_is_written():
    """Keys and values of the visited layers up to the position, the exit state, the watermarks, and nothing else."""
    plan, a = DecoderPlan(tensors_of()), arguments_of()
    before = {name: a[name].clone() for name in ("keys", "values", "states")}
    normed, exit_layers, probs, settled = decode_step(plan, **a)
    assert exit_layers.tolist() == [2, 2] and normed.shape == (2, H) and ((probs > 0) & (probs < 1)).all()
    assert a["watermarks"].tolist() == [[6, 6, 0], [3, 3, 2]] and settled == 2
    places = {0: [5, 6, 7, 8, 9][-1:], 1: [7, 8, 9]}  # row 0: positions 5, and 3 ... 5, in blocks 1 and 2
    for layer in range(LAYERS):
        written = sorted(places.get(layer, []) + ([2] if layer < 2 else []))
        for name in ("keys", "values"):
            changed = (a[name][layer] != before[name][layer]).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert changed == written, (name, layer)
    assert (a["states"] != before["states"]).any(1).nonzero()[:, 0].tolist() == [2, 9]


def test_nothing_but_the_last_layer_leaves_no_state():
    plan, a = DecoderPlan(tensors_of()), arguments_of(script=3)
    before = a["states"].clone()
    _, exit_layers, probs, settled = decode_step(plan, **a)
    assert exit_layers.tolist() == [3, 3] and probs.tolist() == [1.0, 1.0] and settled == 2 + 5
    assert torch.equal(a["states"], before)


def test_a_row_does_not_depend_on_its_neighbours(instruction_set):
    plan = DecoderPlan(tensors_of())
    torch.manual_seed(1)
    both, alone = arguments_of(), arguments_of(1)
    for name in ("keys", "values", "states"):
        alone[name] = both[name].clone()
    want, got = decode_step(plan, **both), decode_step(plan, **alone)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a[0], b[0])


def test_every_instruction_set(instruction_set):
    """Against the modules' arithmetic in plain torch, for one row without anything owed."""
    t = tensors_of(seed=3)
    torch.manual_seed(2)
    a = arguments_of(1, script=3)
    a["watermarks"] = torch.full((1, LAYERS), 5, dtype=torch.int32)
    keys, values = a["keys"].clone(), a["values"].clone()
    normed, *_ = decode_step(DecoderPlan(t), **a)

    def rms(x, weight):
        return x * (x.square().mean() + 1e-5).rsqrt() * weight

    def product(panels, x, outputs):
        return panels.transpose(1, 2).flatten(0, 1)[:outputs] @ x

    def turned(x):
        half = torch.cat((-x[:, D // 2 :], x[:, : D // 2]), 1)
        return x * t.cos[5] + half * t.sin[5]

    x, slots = t.embedding[3], [4, 5, 6, 7, 8, 9]  # positions 0 ... 5, in blocks 1 and 2
    for layer in range(LAYERS):
        before, qkv, out, behind, gate_up, down = t.layers[6 * layer : 6 * layer + 6]
        q, k, v = product(qkv, rms(x, before), (HEADS + 2 * KV) * D).split([HEADS * D, KV * D, KV * D])
        keys[layer, 9], values[layer, 9] = turned(k.view(KV, D)), v.view(KV, D)
        heads = []
        for head, query in enumerate(turned(q.view(HEADS, D))):
            seen = keys[layer, slots, head // 2], values[layer, slots, head // 2]
            heads.append(torch.softmax(seen[0] @ query * D**-0.5, 0) @ seen[1])
        x = x + product(out, torch.cat(heads), H)
        gate, up = product(gate_up, rms(x, behind), 2 * INNER).chunk(2)
        x = x + product(down, torch.nn.functional.silu(gate) * up, H)
    torch.testing.assert_close(normed[0], rms(x, t.final_weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["keys"], keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("token_ids", torch.tensor([3, 20]), r"token_ids must lie in \[0, 20\), got 20 at index 1"),
        ("token_ids", torch.tensor([3, 4], dtype=torch.int32), "token_ids must be int64, got int32"),
        ("positions", torch.tensor([5, 30]), r"positions must lie in \[0, 30\), got 30 at index 1"),
        ("positions", torch.tensor([8, 2]), "block_table must have 3 blocks for position 8 of row 0, got 2"),
        ("block_table", torch.tensor([[1, 4], [0, 0]], dtype=torch.int32), r"of the 16 slots, got 4 at \[0, 1\]"),
        ("block_table", torch.tensor([[1, -1], [0, 0]], dtype=torch.int32), r"got -1 at \[0, 1\]"),
        ("watermarks", torch.tensor([[6, 3, 0], [2, 2, 2]], dtype=torch.int32), r"the position, 5, got 6 at \[0, 0\]"),
        ("keys", torch.zeros(LAYERS, SLOTS, KV, 9), r"keys must have shape \[3, 16, 2, 8\], got \[3, 16, 2, 9\]"),
        ("values", torch.zeros(LAYERS, SLOTS, KV, D).double(), "values must be float32, got float64"),
        ("states", torch.zeros(SLOTS, 11), r"states must have shape \[16, 12\], got \[16, 11\]"),
        ("block_size", 0, "block_size must be positive, got 0"),
        ("threshold_logit", torch.zeros(3), r"threshold_logit must have shape \[2\], got \[3\]"),
        ("script", torch.zeros(2), "script must be int32, got float32"),
    ],
)
def test_messages_of_a_step(name, value, message):
    plan, a = DecoderPlan(tensors_of()), arguments_of()
    a[name] = value
    before = {key: x.clone() for key, x in a.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        decode_step(plan, **a)
    assert all(torch.equal(a[key], x) for key, x in before.items()), "something was written"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(embedding=torch.zeros(VOCAB, H).half()), "embedding must be float32, got float16"),
        (dict(sin=torch.zeros(29, D)), r"sin must have shape \[30, 8\], got \[29, 8\]"),
        (dict(cos=torch.zeros(30, 7)), "cos must have an even width, got 7"),
        (dict(kv_heads=3), "kv_heads must divide num_heads, got 3 and 4"),
        (dict(num_heads=1, kv_heads=1), "num_heads times the width of cos must be a multiple of 16, got 8"),
        (dict(final_weight=torch.zeros(3)), r"final_weight must have shape \[12\], got \[3\]"),
        (dict(layers=[]), "layers must hold 6 tensors and eps 2 numbers for each layer, got 0 and 6"),
        (dict(exit_layers=[1, 3]), "policies must hold 4 tensors for each of exit_layers but the last, got 8 for 2"),
        (dict(exit_layers=[2, 1, 3]), "exit_layers must rise from at least 1 to 3, got 1 behind 2"),
        (dict(exit_layers=[1], policies=[]), "exit_layers must end with the last layer, 3, got 1"),
    ],
)
def test_messages_of_a_plan(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderPlan(tensors_of()._replace(**change))


def test_a_plan_goes_with_its_owner():
    plan = DecoderPlan(tensors_of())
    handle = plan.handle
    del plan
    gc.collect()
    a = arguments_of()
    order = [a[name] for name in ("token_ids", "positions", "block_table", "watermarks", "keys", "values", "states")]
    rest = [a[name] for name in ("threshold_logit", "script", "min_depth", "max_depth")]
    with pytest.raises(ValueError, match=f"plan must be one that decoder_plan made and nobody dropped, got {handle}"):
        torch.ops.consistentee.decode_step(*order, 4, handle, *rest)
