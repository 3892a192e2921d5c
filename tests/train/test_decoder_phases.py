"""Training steps for decoders on a small random LLaMA: each changes what it should, by the formula it should."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from engine.train import decoder_phases as phases
from engine.train import objectives, policy_gradient
from engine.train.decoder_config import TokenTaskOptions
from engine.train.hardness import memorized_layer
from engine.train.instructions import Instruction, TokenizedInstructions
from tests.decoding.tiny import LAYERS, byte_tokenizer, tiny_decoder


@pytest.fixture(scope="module")
def data():
    rows = [Instruction(f"q{k % 3}", "", "ab" * (1 + k % 4)) for k in range(12)]
    found = TokenizedInstructions.from_instructions(rows, byte_tokenizer(), 512)
    # The template alone is longer than the tiny model's positions: the end of each row will do.
    ids, ends = found.rows.fields["input_ids"], found.rows.offsets.tolist()
    kept = [ids[a:b][-30:] for a, b in zip(ends, ends[1:], strict=False)]
    offsets = torch.tensor([0] + [len(k) for k in kept]).cumsum(0)
    rows = copy.copy(found.rows)
    object.__setattr__(rows, "fields", {"input_ids": torch.cat(kept)})
    object.__setattr__(rows, "offsets", offsets)
    object.__setattr__(rows, "label_ids", torch.full((12,), 15))
    return TokenizedInstructions(rows)


@pytest.fixture
def model():
    return tiny_decoder(vocab=258, seed=1)


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def one_batch(data, size=12):
    return next(data.batches(size, shuffle=False))


@pytest.mark.parametrize("head", ["shared", "lora", "own"])
def test_losses_of_all_exits_are_those_of_hugging_faces_states(data, head, monkeypatch):
    model, batch = tiny_decoder(vocab=258, head=head, seed=2), one_batch(data)
    with torch.no_grad():
        states, targets = phases.exit_states(model, batch)
        ce, hits = phases.all_losses(model, states, targets)
        hidden = model.causal_lm(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
        asked = batch["targets"] >= 0
        for k in range(LAYERS):
            # Hugging Face's last entry is normed already.
            n = hidden[k + 1] if k == LAYERS - 1 else model.final_norm(hidden[k + 1])
            logits = model.exit_logits(k, n[asked])
            want = torch.nn.functional.cross_entropy(logits, batch["targets"][asked], reduction="none")
            torch.testing.assert_close(ce[:, k], want, rtol=1e-4, atol=1e-4)
            assert torch.equal(hits[:, k], logits.argmax(-1) == batch["targets"][asked])
        monkeypatch.setattr(phases, "_CHUNK", 7)
        torch.testing.assert_close(phases.all_losses(model, states, targets)[0], ce, rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_the_chunks(model, data, monkeypatch):
    with torch.no_grad():
        states, targets = phases.exit_states(model, one_batch(data))
    found = []
    for chunk in (1000, 5):
        monkeypatch.setattr(phases, "_CHUNK", chunk)
        model.zero_grad()
        ce, _ = phases.all_losses(model, states, targets)
        objectives.weighted_exit_loss(ce, model.config.exit_layers).backward()
        found.append([p.grad.clone() for p in model.head_parameters()])
    assert all(float(g.abs().max()) > 0 for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_heads(model, data):
    before, figures = snapshot(model), phases.measure(model, data)
    losses = phases.train_heads(model, data, phases.HeadOptions(15, 6, 2e-2), seed=0)
    assert changed(model, before) == {n for n in before if n.startswith("exits.deltas")}
    assert losses[-1] < 0.8 * losses[0]
    after = phases.measure(model, data)
    assert all(a < b for a, b in zip(after.exit_ce, figures.exit_ce, strict=True))
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    with pytest.raises(ValueError, match="heads: there is nothing to train"):
        phases.train_heads(tiny_decoder(vocab=258, head="shared"), data, phases.HeadOptions(), 0)


def test_the_same_seed_gives_the_same(data):
    options = phases.HeadOptions(3, 5, 1e-2)
    first, second = (phases.train_heads(tiny_decoder(vocab=258, seed=1), data, options, 7) for _ in range(2))
    assert first == second


def test_last_exit_with_an_adapter(model, data):
    from peft import LoraConfig, get_peft_model

    model.causal_lm = get_peft_model(model.causal_lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = snapshot(model)
    losses = phases.train_last_exit(model, data, phases.StepOptions(15, 6, 3e-2), seed=0)
    assert losses[-1] < losses[0]
    assert changed(model, before) == {n for n in before if "lora_" in n}


def test_fitted_heads_are_the_nearest_maps_of_their_rank(data):
    """At full rank ordinary least squares; below, the best of its rank: no random one of that rank is nearer."""
    for rank in (32, 3):
        fitted = tiny_decoder(vocab=258, seed=1, head_rank=rank).double()
        before = snapshot(fitted)
        phases.fit_heads(fitted, data, 5)
        assert changed(fitted, before) == {n for n in before if n.startswith("exits.deltas") and ".4." not in n}
        with torch.no_grad():
            states = phases.exit_states(fitted, one_batch(data))[0]

        def error(n, delta, wanted=states[-1]):
            return float((n + delta(n) - wanted).square().sum())

        for n, delta in zip(states[:-1], list(fitted.exits.deltas)[:-1], strict=True):
            least = torch.linalg.lstsq(n, states[-1]).solution
            at_full_rank = float((n @ least - states[-1]).square().sum())
            if rank == n.shape[-1]:
                assert error(n, delta) == pytest.approx(at_full_rank, rel=1e-2)
            else:
                best = error(n, delta)
                assert at_full_rank < best < error(n, lambda n: 0 * n)
                for _ in range(20):
                    a, b = delta.a.weight.clone(), delta.b.weight.clone()
                    a, b = (w + 0.01 * torch.randn_like(w) for w in (a, b))
                    assert error(n, lambda n, a=a, b=b: n @ a.T @ b.T) > best * (1 - 1e-6)
    with pytest.raises(ValueError, match="'own'"):
        phases.fit_heads(tiny_decoder(vocab=258, head="own"), data)


def test_heads_with_the_adapter(model, data):
    from peft import LoraConfig, get_peft_model

    model.causal_lm = get_peft_model(model.causal_lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = snapshot(model)
    losses = phases.train_heads(model, data, phases.HeadOptions(8, 6, 1e-2, adapter=True), seed=0)
    assert losses[-1] < losses[0]
    assert changed(model, before) == {n for n in before if "lora_" in n or n.startswith("exits.deltas")}
    before = snapshot(model)
    phases.train_heads(model, data, phases.HeadOptions(1, 6, 1e-2), seed=0)
    assert changed(model, before) == {n for n in before if n.startswith("exits.deltas")}


def test_policies_of_several_prices_side_by_side(model, data):
    before, options = snapshot(model), phases.TokenPolicyOptions(20, 12, 2e-2)
    cheap, dear = phases.train_policies(model, data, options, (0.0, 10.0), seed=0)
    (alone,) = phases.train_policies(model, data, options, (10.0,), seed=0)
    assert not changed(model, before)
    depths = []
    for policies in (cheap, dear):
        model.exits.policies = policies
        depths.append(phases.measure(model, data).mean_depth)
    assert depths[1] < depths[0] and depths[1] < 1.3
    other = tiny_decoder(vocab=258, seed=1)
    phases.train_policy(other, data, options, 10.0, seed=0)
    for a, b in zip(alone.parameters(), other.policy_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reward", ["vanilla", "hardness"])
def test_policies_in_full_context(model, data, reward):
    """Without a price the best exit is where the loss is least; at a high one the first is."""
    phases.train_heads(model, data, phases.HeadOptions(10, 6, 2e-2), seed=0)
    depths = []
    for alpha in (0.0, 10.0):
        some = copy.deepcopy(model)
        before = snapshot(some)
        options = phases.TokenPolicyOptions(60, 12, 2e-2, reward=reward)
        losses = phases.train_policy(some, data, options, alpha, seed=0)
        assert changed(some, before) <= {n for n in before if n.startswith("exits.policies")} and losses[-1] < losses[0]
        figures = phases.measure(some, data)
        depths.append(figures.mean_depth)
    assert depths[1] < depths[0]
    if reward == "vanilla":
        assert depths[1] < 1.1


def test_the_early_exit_classifier_learns_whose_token_is_the_last_ones(data):
    model = tiny_decoder(vocab=258, seed=1, early_exit_classifier=True)
    phases.train_heads(model, data, phases.HeadOptions(10, 6, 2e-2), seed=0)
    batch = one_batch(data)
    with torch.no_grad():
        states, _ = phases.exit_states(model, batch)
        tokens = torch.stack([model.exit_logits(k, n).argmax(-1) for k, n in enumerate(states)])
        same = (tokens[:-1] == tokens[-1]).float()

        def loss():
            z = torch.stack([model.classifier_logits(n) for n in states[:-1]])
            each = torch.nn.functional.binary_cross_entropy_with_logits(z, same, reduction="none")
            both = [(each[k][same[k] == label]).mean() for k in range(len(same)) for label in (0, 1)]
            return float(torch.stack(both).mean())

        assert all(0 < float(s.mean()) < 1 for s in same), "an exit with one answer: choose another seed"
        fresh = loss()
    before = snapshot(model)
    first = phases.train_early_exit_classifier(model, data, phases.StepOptions(1, 12, 1e-9), seed=0)
    assert first[0] == pytest.approx(fresh, rel=1e-3)
    losses = phases.train_early_exit_classifier(model, data, phases.StepOptions(40, 12, 2e-2), seed=0)
    assert changed(model, before) == {n for n in before if "early_exit_classifier" in n}
    with torch.no_grad():
        assert losses[-1] < first[0] and loss() < fresh


def test_the_closed_form_is_that_of_the_objectives(model, data):
    """One step's loss, reckoned by hand."""
    batch = one_batch(data)
    with torch.no_grad():
        states, targets = phases.exit_states(model, batch)
        ce, hits = phases.all_losses(model, states, targets)
        z = torch.stack([model.policy_logits(k, n) for k, n in enumerate(states[:-1])], 1)
        ml = memorized_layer(hits, model.config.exit_layers)
        rewards = objectives.rewards(ce, model.config.exit_layers, 0.1, LAYERS, ml, "hardness")
        want = policy_gradient.closed_form_loss(z, rewards)
    losses = phases.train_policy(model, data, phases.TokenPolicyOptions(1, 12, 1e-9, reward="hardness"), 0.1, seed=0)
    assert losses[0] == pytest.approx(float(want), rel=1e-5)


def test_sampled_exits_are_a_pass_with_state_copying(model, data):
    batch = one_batch(data)
    asked = batch["targets"] >= 0
    generator = torch.Generator().manual_seed(0)
    log_prob, depth, ce = phases.sampled_exits(model, batch, generator)
    assert set(depth.tolist()) == set(range(1, LAYERS + 1))
    left = torch.full(asked.shape, LAYERS)
    left[asked] = depth
    # Positions without a target draw, too; they come last in their rows, so nobody else sees them.
    with torch.no_grad():
        outputs = model.layer_outputs(batch["input_ids"], batch["attention_mask"], left)
    z = torch.stack([model.policy_logits(k, model.final_norm(outputs[k][asked])) for k in range(LAYERS - 1)], 1)
    want = policy_gradient.exit_log_probs(z).gather(1, depth[:, None] - 1)[:, 0]
    torch.testing.assert_close(log_prob, want, rtol=1e-4, atol=1e-4)
    for k in range(LAYERS):
        rows = depth == k + 1
        logits = model.exit_logits(k, model.final_norm(outputs[k][asked][rows]))
        exact = torch.nn.functional.cross_entropy(logits, batch["targets"][asked][rows], reduction="none")
        torch.testing.assert_close(ce[rows], exact, rtol=1e-4, atol=1e-4)
    assert log_prob.requires_grad and not ce.requires_grad
    log_prob.sum().backward()
    assert all(p.grad is not None for p in model.policy_parameters())


def test_exits_are_drawn_as_often_as_the_policies_say(model, data):
    """At the first position nothing depends on other draws: the exit distribution is known."""
    batch = {name: value[:1].repeat(400, 1) for name, value in one_batch(data).items()}
    generator = torch.Generator().manual_seed(1)
    asked = batch["targets"] >= 0
    place = torch.zeros_like(asked)
    place[:, 0] = True
    first = torch.cat([phases.sampled_exits(model, batch, generator)[1][place[asked]] for _ in range(5)])
    with torch.no_grad():
        states, _ = phases.exit_states(model, {name: value[:1] for name, value in batch.items()})
        z = torch.stack([model.policy_logits(k, states[k][:1]) for k in range(LAYERS - 1)], 1)
    probs = policy_gradient.exit_log_probs(z).exp()[0]
    share = torch.bincount(first - 1, minlength=LAYERS) / len(first)
    assert float((share - probs).abs().max()) < 4 * 0.5 / len(first) ** 0.5


@pytest.mark.parametrize("reward, per_layer", [("vanilla", False), ("hardness", True)])
def test_policies_in_sampled_context(model, data, reward, per_layer):
    before = snapshot(model)
    options = phases.TokenPolicyOptions(40, 12, 2e-2, context="sampled", reward=reward, per_layer=per_layer)
    depth = phases.measure(model, data).mean_depth
    phases.train_policy(model, data, options, 2.0, seed=0)
    assert changed(model, before) <= {n for n in before if n.startswith("exits.policies")}
    assert phases.measure(model, data).mean_depth < depth


def test_task_step_trains_the_heads_at_the_exits_taken(model, data):
    before, share = snapshot(model), phases.measure(model, data).exit_share
    phases.train_task(model, data, TokenTaskOptions(1, 12, 1e-3), seed=0)
    taken = {k for k in range(LAYERS) if share[k] > 0}
    touched = {int(name.split(".")[2]) for name in changed(model, before)}
    assert touched == taken and all(n.startswith("exits.deltas") for n in changed(model, before))


def test_task_step_with_the_adapter(model, data):
    """Eq. 6 over heads and backbone: the loss at the exits taken falls, and the policies stay."""
    from peft import LoraConfig, get_peft_model

    model.causal_lm = get_peft_model(model.causal_lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before, ce = snapshot(model), phases.measure(model, data).ce
    losses = phases.train_task(model, data, TokenTaskOptions(8, 6, 1e-2, adapter=True), seed=0)
    assert losses[-1] < losses[0] and phases.measure(model, data).ce < ce
    touched = changed(model, before)
    assert {n for n in before if "lora_" in n} <= touched
    assert all("lora_" in n or n.startswith("exits.deltas") for n in touched)


def test_measure(model, data):
    figures, batch = phases.measure(model, data, threshold=0.3, batch_size=5), one_batch(data)
    with torch.no_grad():
        states, targets = phases.exit_states(model, batch)
        ce, hits = phases.all_losses(model, states, targets)
        z = torch.stack([model.policy_logits(k, n) for k, n in enumerate(states[:-1])], 1)
    index = objectives.greedy_exit_index(z, 0.3)
    assert figures.tokens == len(ce)
    assert figures.ce == pytest.approx(float(ce.gather(1, index[:, None]).mean()), rel=1e-4)
    assert figures.ce_full == pytest.approx(float(ce[:, -1].mean()), rel=1e-4)
    assert figures.accuracy == pytest.approx(float(hits.gather(1, index[:, None]).float().mean()))
    assert figures.mean_depth == pytest.approx(float((index + 1).float().mean()))
    assert sum(figures.exit_share) == pytest.approx(1.0)
    answers = phases.measure(model, replace(data, answers_only=True))
    assert answers.tokens < figures.tokens


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(context="half"), "policy.context must be one of full, sampled, got 'half'"),
        (dict(context="sampled", num_samples=1), "policy.num_samples must be an integer of at least 2"),
        (dict(reward="most"), "policy.reward must be one of"),
        (dict(learning_rate=0), "policy.learning_rate must be a number above 0"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        phases.TokenPolicyOptions(**options)


def test_one_exit_has_no_policy(data):
    model = tiny_decoder((LAYERS,), vocab=258)
    assert phases.train_policy(model, data, phases.TokenPolicyOptions(), 0.1, 0) == []
    assert phases.measure(model, data).mean_depth == LAYERS
