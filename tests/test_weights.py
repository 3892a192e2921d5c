"""Weights belong to the module: whatever changes them is seen by the next run, or refused. Never a stale answer."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

import engine
from engine.executors.weights import WatchedWeights, _contents
from engine.loading import save_checkpoint
from tests.tiny import assert_same, padded, random_rows, tiny_backbone, tiny_model

ROWS = padded(random_rows(24, seed=1))
FP32 = dict(rtol=1e-5, atol=3e-5)


def fresh(model, **options):
    """The oracle, made now."""
    return engine.from_module(model, executor="reference").run(ROWS, **options)


def assert_seen(runner, model, before=None, **tolerance) -> None:
    """The engine made long ago says what a fresh reference says; and that is something new."""
    for options in ({}, dict(min_depth=4)):
        assert_same(runner.run(ROWS, **options), fresh(model, **options), **(tolerance or FP32))
    if before is not None:
        assert float((fresh(model, min_depth=4).logits - before).abs().max()) > 1e-3, "the change changed nothing"


def full_depth(runner):
    return runner.run(ROWS, min_depth=4).logits


def add_lora(model, target_modules=("query", "value", "dense"), **options):
    """Adapters with random matrices: peft's own start, B = 0, would change nothing."""
    settings = dict(r=3, lora_alpha=6, target_modules=list(target_modules), init_lora_weights=False, lora_dropout=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.backbone = get_peft_model(model.backbone, LoraConfig(**(settings | options)))
    return model


# -- places: every tensor of the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_write_to_any_tensor_is_seen(family):
    model = tiny_model(family, "per_layer")
    runner = engine.from_module(model)
    before = fresh(model)
    for name, parameter in model.named_parameters():
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        want = fresh(model)
        assert_same(runner.run(ROWS), want, **FP32)
        if not name.endswith(("key.bias", ".k.bias")):  # adds one number to all scores of a query: softmax drops it
            unchanged = torch.equal(want.logits, before.logits)
            assert not unchanged or not torch.equal(want.exit_probabilities, before.exit_probabilities), name
        with torch.no_grad():
            parameter.copy_(old)
    assert_same(runner.run(ROWS), before, **FP32)


def test_optimiser_steps_are_seen(model, packed):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05)
    packed.run(ROWS)
    model.train()
    for _ in range(3):
        before = full_depth(packed)
        out = model(**ROWS)
        (out.logits.square().mean() + out.policy_logits.square().mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
        assert_seen(packed, model, before)


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("optimiser_class", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_of_fused_optimisers_are_seen(model, packed, optimiser_class, how):
    """Fused kernels write in place without telling a tensor's version (torch 2.13)."""
    optimiser = optimiser_class(model.parameters(), lr=0.1, **{how: True})
    before = full_depth(packed)
    model(**ROWS).logits.square().mean().backward()
    optimiser.step()
    assert_seen(packed, model, before)


# -- ways of changing weights ------------------------------------------------------------------------------------


def test_load_state_dict_is_seen(model, packed):
    for assign in (False, True):
        before = full_depth(packed)
        other = tiny_model(seed=50 + assign).state_dict()
        model.load_state_dict(other, assign=assign)
        assert_seen(packed, model, before)


def test_assigned_storage_is_the_models(model, packed):
    """After assign=True the tensors handed in *are* the weights: writing to them later is seen too."""
    packed.run(ROWS)
    other = tiny_model(seed=51).state_dict()
    model.load_state_dict(other, assign=True)
    packed.run(ROWS)
    before = full_depth(packed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "intermediate.dense.weight" in name:
                parameter.mul_(1.5)
    assert_seen(packed, model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_seen_and_back_again(model, packed, dtype):
    packed.run(ROWS)
    model.to(dtype)
    assert_seen(packed, model, rtol=0.2, atol=0.2) if dtype != torch.float64 else assert_seen(packed, model)
    model.to(torch.float32)
    assert_seen(packed, model)


def test_to_and_back_between_two_runs_is_seen(model, packed):
    """bfloat16 and back rounds every weight, and may well land at the old addresses."""
    before = full_depth(packed)
    model.to(torch.bfloat16).to(torch.float32)
    assert_seen(packed, model, before)


def test_new_parameters_at_an_old_address_are_seen():
    """The allocator likes to hand out what was just freed: identity by id and address alone is not identity."""
    model = tiny_model(layers=2)
    wide = nn.Linear(32, 32)
    runner = engine.from_module(model)
    self_attention = model.backbone.encoder.layer[0].attention.self
    self_attention.query = wide
    for attempt in range(20):
        runner.run(ROWS)
        del wide.weight
        wide.weight = nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(attempt)))
        assert_same(runner.run(ROWS, min_depth=2), fresh(model, min_depth=2), **FP32)


@pytest.mark.parametrize("size", [64, 128, 384])
def test_one_linear_rounded_in_between_is_seen(size):
    """As above with the storage alone: .to() keeps the Parameter object and swaps what it holds, twice."""
    config = engine.EarlyExitConfig(1, (1,), ("a", "b"), max_length=16)
    from transformers import BertConfig, BertModel

    backbone = BertModel(
        BertConfig(
            vocab_size=120, hidden_size=size, num_hidden_layers=1, num_attention_heads=4, intermediate_size=size,
            max_position_embeddings=16, initializer_range=0.3,
        )
    )  # fmt: skip
    model = engine.MultiExitEncoder(backbone, config).eval()
    batch = padded(random_rows(8, seed=2, shortest=4, longest=16))
    runner, oracle = engine.from_module(model), engine.from_module(model, executor="reference")
    query = model.backbone.encoder.layer[0].attention.self.query
    for _ in range(10):
        runner.run(batch)
        with torch.no_grad():
            query.weight.copy_(torch.randn(size, size) * 0.3)
        runner.run(batch)
        stale = oracle.run(batch).logits
        query.to(torch.bfloat16).to(torch.float32)  # the old storage is free during the first, and taken in the second
        want = oracle.run(batch).logits
        assert float((want - stale).abs().max()) > 1e-4
        torch.testing.assert_close(runner.run(batch).logits, want, rtol=0, atol=2e-5)


def test_new_data_is_seen(model, packed):
    before = full_depth(packed)
    for layer in model.backbone.encoder.layer:
        layer.output.dense.weight.data = torch.randn_like(layer.output.dense.weight) * 0.3
        layer.attention.self.query.bias.data = torch.randn_like(layer.attention.self.query.bias)
    assert_seen(packed, model, before)


def test_refresh_packs_again(model, packed):
    before = full_depth(packed)
    model.backbone.encoder.layer[1].intermediate.dense.weight.data.mul_(2)
    packed.refresh()
    assert_seen(packed, model, before)


def _swap_rows(weight):
    weight[[0, 1]] = weight[[1, 0]]


# What a checksum of bits may miss: signs flipped in pairs, elements that change places, an even number of equal values.
STRUCTURED = {
    "negated": lambda w: w.neg_(),
    "reversed": lambda w: w.copy_(w.flip(0)),
    "two rows swapped": _swap_rows,
    "doubled": lambda w: w.mul_(2),
    "one element changed": lambda w: w[0, 0].add_(0.5),
    "another constant": lambda w: w[:8].fill_(-0.125),
}


@pytest.mark.parametrize("through_data", [False, True], ids=["plain", "through .data"])
@pytest.mark.parametrize("change", STRUCTURED)
def test_writes_with_a_pattern_are_seen(model, packed, change, through_data):
    layers = model.backbone.encoder.layer
    for module in (layers[1].output.dense, layers[2].attention.self.value):
        if change == "another constant":
            with torch.no_grad():
                module.weight[:8].fill_(0.5)
        before = full_depth(packed)
        with torch.no_grad():
            STRUCTURED[change](module.weight.data if through_data else module.weight)
        assert_seen(packed, model, before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_two_elements_that_change_places_are_seen(dtype):
    generator = torch.Generator().manual_seed(3)
    weight = (0.02 * torch.randn(768, 3072, generator=generator)).to(dtype)
    before = _contents([weight])
    for first, second in torch.randint(weight.numel(), (20, 2), generator=generator).tolist():
        flat = weight.clone().flatten()
        flat[[first, second]] = flat[[second, first]]
        assert torch.equal(flat, weight.flatten()) or _contents([flat]) != before


@pytest.mark.parametrize("executor", ["packed", "graph"])
def test_what_cannot_be_packed_is_refused_at_every_run(model, executor):
    runner, rows = engine.from_module(model, executor=executor), padded(random_rows(3))
    before = runner.run(rows)
    hook = model.backbone.encoder.layer[1].output.dense.register_forward_hook(lambda module, given, out: out * 3)
    for _ in range(3):
        with pytest.raises(TypeError, match="with hooks"):
            runner.run(rows)
    hook.remove()
    assert_same(runner.run(rows), before)


def test_zero_matrices_that_become_constant_are_seen(model, packed):
    """Fresh biases and LoRA's B are all zero."""
    bias = model.backbone.encoder.layer[1].attention.self.value.bias
    with torch.no_grad():
        bias.zero_()
    before = full_depth(packed)
    with torch.no_grad():
        bias.fill_(1.0)
    assert_seen(packed, model, before)
    add_lora(model, init_lora_weights=True)
    before = full_depth(packed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    assert_seen(packed, model, before, rtol=1e-4, atol=2e-4)


def test_a_loaded_engine_sees_what_is_done_to_its_model(tmp_path):
    """Nobody else holds it until somebody asks for it."""
    runner = engine.load(save_checkpoint(tiny_model(), tmp_path / "ck"))
    before = full_depth(runner)
    model = runner.model
    for _ in range(2):
        with torch.no_grad():
            model.backbone.encoder.layer[0].output.dense.weight.mul_(1.5)
        assert_seen(runner, model, before)
        before = full_depth(runner)


def test_a_thread_that_looks_while_another_repacks(model, packed):
    """It holds the old weights, and must not take the state that belongs to the new ones for theirs."""
    weights = packed.executor.weights
    before = full_depth(packed)
    with torch.no_grad():
        model.backbone.encoder.layer[0].output.dense.weight.mul_(1.5)
    want = fresh(model, min_depth=4)
    looking, repacked, results = threading.Event(), threading.Event(), []
    original = weights._read_state

    def slow():
        if threading.current_thread().name == "late" and not repacked.is_set():
            looking.set()
            repacked.wait(10)
        return original()

    weights._read_state = slow
    late = threading.Thread(target=lambda: results.append(packed.run(ROWS, min_depth=4)), name="late")
    late.start()
    assert looking.wait(10)
    assert_same(packed.run(ROWS, min_depth=4), want, **FP32)
    repacked.set()
    late.join(20)
    assert float((want.logits - before).abs().max()) > 1e-3
    assert_same(results[0], want, **FP32)


def test_writes_in_inference_mode_are_seen(model, packed):
    before = full_depth(packed)
    with torch.inference_mode():
        model.backbone.encoder.layer[1].intermediate.dense.weight.mul_(2)
    assert_seen(packed, model, before)


def test_a_model_made_in_inference_mode():
    """Inference tensors carry no version: their changes have to be seen otherwise, or the model refused."""
    with torch.inference_mode():
        model = tiny_model()
        try:
            runner = engine.from_module(model)
            before = full_depth(runner)
        except (TypeError, ValueError):
            return
        model.backbone.encoder.layer[1].intermediate.dense.weight.mul_(2)
        assert_seen(runner, model, before)


def test_one_module_made_in_inference_mode(model, packed):
    """It must not blind the watch for all the others."""
    with torch.inference_mode():
        model.exits.classifiers[3] = nn.Linear(32, 3)
    before = full_depth(packed)
    with torch.no_grad():
        model.backbone.encoder.layer[1].intermediate.dense.weight.mul_(2)
    assert_seen(packed, model, before)


def test_replaced_modules_are_seen(model, packed):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        for replace in (
            lambda: setattr(model.backbone.encoder.layer[2].output, "dense", nn.Linear(56, 32)),
            lambda: setattr(model.backbone.encoder.layer[0].attention.output, "LayerNorm", nn.LayerNorm(32)),
            lambda: model.backbone.encoder.layer.__setitem__(1, tiny_model(seed=77).backbone.encoder.layer[3]),
            lambda: model.exits.classifiers.__setitem__(3, nn.Linear(32, 3)),
            lambda: setattr(model.backbone, "embeddings", tiny_model(seed=78).backbone.embeddings),
            lambda: setattr(model, "backbone", tiny_model(seed=79).backbone),
            lambda: setattr(model, "exits", tiny_model(seed=80).exits),
        ):
            before = full_depth(packed)
            replace()
            assert_seen(packed, model, before)


def test_another_width_is_seen(device):
    """Buffers of the graph executor were made for the old one."""
    model = tiny_model().to(device)
    runner = engine.from_module(model, executor="graph")
    full_depth(runner)
    narrow = engine.MultiExitEncoder(tiny_backbone(hidden_size=16), model.config).eval().to(device)
    model.backbone, model.exits = narrow.backbone, narrow.exits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # packed serves instead
        assert_seen(runner, model)


def test_replaced_policies_are_seen(model, packed):
    before = packed.run(ROWS).exit_layers
    model.exits.policies[0] = copy.deepcopy(model.exits.policies[0])
    with torch.no_grad():
        model.exits.policies[0].out.bias.add_(100)
    got = packed.run(ROWS)
    assert got.exit_layers.tolist() == [1] * 24 != before.tolist()
    assert_seen(packed, model)


def test_parametrised_weights_are_seen(model, packed):
    dense = model.backbone.encoder.layer[1].output.dense
    before = full_depth(packed)
    torch.nn.utils.parametrizations.weight_norm(dense)
    with torch.no_grad():
        dense.parametrizations.weight.original0.mul_(2)
    assert_seen(packed, model, before)


def test_a_missing_bias_is_seen_or_refused(model, packed):
    """Hugging Face runs such a layer; so must the engine, or it says which layer it cannot take."""
    for place in ("output.dense", "attention.self.key"):
        packed.run(ROWS)
        model.backbone.encoder.layer[1].get_submodule(place).bias = None
        try:
            got = packed.run(ROWS, min_depth=4)
        except (TypeError, ValueError) as error:
            assert "bias" in str(error)
        else:
            assert_same(got, fresh(model, min_depth=4), **FP32)


class _Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


@pytest.mark.parametrize("place", ["output.dense", "attention.self.value", "attention.output.dense"])
def test_a_linear_with_a_forward_of_its_own_is_honoured_or_refused(model, packed, place):
    """Its weight alone does not say what it computes."""
    packed.run(ROWS)
    layer = model.backbone.encoder.layer[1]
    parent, _, name = place.rpartition(".")
    old = layer.get_submodule(place)
    new = _Scaled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    setattr(layer.get_submodule(parent), name, new)
    try:
        got = packed.run(ROWS, min_depth=4)
    except (TypeError, ValueError) as error:
        assert "_Scaled" in str(error)
    else:
        assert_same(got, fresh(model, min_depth=4), **FP32)


def test_two_engines_on_one_model(model):
    first, second = engine.from_module(model), engine.from_module(model)
    before = full_depth(first)
    assert torch.equal(before, full_depth(second))
    with torch.no_grad():
        model.backbone.encoder.layer[0].output.dense.weight.mul_(1.3)
    assert_seen(first, model, before)
    assert_seen(second, model, before)


@pytest.mark.parametrize("another_thread", [False, True])
def test_who_derives_may_move_parameters_and_nothing_else(model, another_thread):
    """What was read meanwhile may be old and new at once."""
    dense, policy = model.backbone.encoder.layer[0].output.dense, model.exits.policies[0]

    def derive(model):
        dense.weight.data = dense.weight.detach().clone()
        if another_thread and not derived:
            next(policy.parameters()).data.mul_(1.5)
        derived.append(len(derived))
        return derived[-1]

    derived = []
    watched = WatchedWeights(model, True, derive)
    assert watched.current() == 0
    assert [watched.current() for _ in range(3)] == [int(another_thread)] * 3


def test_two_threads_that_both_need_weights_derive_them_once(model):
    derived, began, go_on = [], threading.Event(), threading.Event()

    def derive(model):
        derived.append(object())
        began.set()
        go_on.wait(10)
        return derived[-1]

    watched, found = WatchedWeights(model, False, derive), []
    threads = [threading.Thread(target=lambda: found.append(watched.held())) for _ in range(2)]
    threads[0].start()
    assert began.wait(10)
    threads[1].start()
    time.sleep(0.2)  # it comes to where the first one is
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(derived) == 1 and found == derived * 2


@pytest.mark.gpu
def test_every_stream_may_read_what_was_derived(gpu):
    """torch's streams do not wait for each other: a copy that is still being made would be read."""
    ones = torch.ones(1 << 20, device="cuda")

    def derive(model):
        torch.cuda._sleep(200_000_000)
        return ones * 2

    watched = WatchedWeights(tiny_model().to("cuda"), False, derive)
    with torch.cuda.stream(torch.cuda.Stream()):
        weights = watched.held()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert bool((weights == 2).all())


def test_no_two_layers_share_storage(model):
    """Nothing is tied on purpose here."""
    places = [p.data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


def test_a_run_changes_no_weight(model, packed):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: p._version for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    packed.run(ROWS)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert versions == {name: p._version for name, p in model.named_parameters()}
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}


# -- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_lora_active_merged_disabled_switched(family):
    names = ("q", "v", "o", "dense") if family == "mpnet" else ("query", "value", "dense")
    close = dict(rtol=1e-4, atol=2e-4)  # adding and taking away an adapter leaves its rounding in the weights
    model = tiny_model(family)
    runner = engine.from_module(model)
    bare = full_depth(runner)

    add_lora(model, names)
    assert_seen(runner, model, bare, **close)
    active = full_depth(runner)

    with model.backbone.disable_adapter():
        assert_seen(runner, model, active, **close)
        torch.testing.assert_close(full_depth(runner), bare, **close)
    assert_seen(runner, model, **close)
    torch.testing.assert_close(full_depth(runner), active, **close)

    model.backbone.merge_adapter()
    assert_seen(runner, model, bare, **close)
    torch.testing.assert_close(full_depth(runner), active, **close)
    model.backbone.unmerge_adapter()
    assert_seen(runner, model, **close)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(-1.5)
    assert_seen(runner, model, active, **close)
    active = full_depth(runner)

    model.backbone.add_adapter("other", LoraConfig(r=2, target_modules=list(names[:2]), init_lora_weights=False))
    assert_seen(runner, model, **close)
    model.backbone.set_adapter("other")
    assert_seen(runner, model, active, **close)
    model.backbone.base_model.set_adapter(["default", "other"])
    assert_seen(runner, model, active, **close)
    model.backbone.base_model.set_adapter("default")
    model.backbone.delete_adapter("other")
    assert_seen(runner, model, **close)

    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    assert_seen(runner, model, active, **close)

    last = full_depth(runner)
    model.backbone = model.backbone.merge_and_unload()
    assert_seen(runner, model, bare, **close)
    torch.testing.assert_close(full_depth(runner), last, **close)


def test_lora_training_steps_are_seen(model, packed):
    add_lora(model)
    packed.run(ROWS)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(2):
        before = full_depth(packed)
        model(**ROWS).logits.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        assert_seen(packed, model, before)  # and no adapter dropout: the reference has none
        assert model.training


@pytest.mark.parametrize(
    "options",
    [
        dict(use_dora=True),
        dict(lora_bias=True),
        dict(use_rslora=True),
        dict(bias="lora_only"),
        dict(layers_to_transform=[1]),
        dict(rank_pattern={"query": 5}, alpha_pattern={"value": 11}),
        dict(target_modules=["query", "word_embeddings"]),
        dict(target_modules=["position_embeddings"]),
        dict(modules_to_save=["LayerNorm"]),
        dict(trainable_token_indices={"word_embeddings": list(range(5, 60))}),
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items())[:50],
)
def test_every_kind_of_lora_is_applied_or_refused(model, packed, options):
    packed.run(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_lora(model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(key in name for key in ("modules_to_save", "trainable_tokens_delta", "lora_magnitude")):
                parameter.add_(0.5 * torch.randn_like(parameter))
    try:
        got = packed.run(ROWS, min_depth=4)
    except (TypeError, ValueError) as error:
        assert "merge" in str(error)
    else:
        assert_same(got, fresh(model, min_depth=4), **FP32)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False),
        LNTuningConfig(target_modules=["LayerNorm"]),
    ],
    ids=["IA3", "LayerNorm tuning"],
)
def test_other_adapters_are_applied_or_refused(model, packed, config):
    packed.run(ROWS)
    model.backbone = get_peft_model(model.backbone, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("ia3" in name or "ln_tuning" in name):
                parameter.add_(0.5 * torch.randn_like(parameter))
    try:
        got = packed.run(ROWS, min_depth=4)
    except (TypeError, ValueError) as error:
        assert "merge" in str(error)
    else:
        assert_same(got, fresh(model, min_depth=4), **FP32)


@pytest.mark.parametrize("place", [r".*poolers\.0", r".*classifiers\.\d", r".*policies\.\d\.(dense|out)"])
def test_adapters_on_the_exits_are_applied_or_refused(model, packed, place):
    """peft changes the modules it is given in place, so this engine's model has the adapters."""
    before = packed.run(ROWS)
    get_peft_model(model, LoraConfig(r=3, target_modules=place, init_lora_weights=False))
    try:
        got = packed.run(ROWS)
    except (TypeError, ValueError) as error:
        assert "merge" in str(error)
    else:
        want = fresh(model)
        assert not torch.equal(want.logits, before.logits) or not torch.equal(want.exit_layers, before.exit_layers)
        assert_same(got, want, **FP32)


def test_a_hook_set_after_a_run_is_seen_or_refused(model, packed):
    full_depth(packed)
    dense = model.backbone.encoder.layer[1].output.dense
    handle = dense.register_forward_hook(lambda module, inputs, output: output * 1.2)
    with pytest.raises(TypeError, match="hooks"):
        full_depth(packed)
    handle.remove()
    assert_same(packed.run(ROWS, min_depth=4), fresh(model, min_depth=4), **FP32)


def test_a_changed_eps_is_seen(model, packed):
    before = full_depth(packed)
    for layer in model.backbone.encoder.layer:
        layer.output.LayerNorm.eps = 0.5
    assert_seen(packed, model, before)
