"""What is ours in step 1: out-of-fold soft labels, exits that learn faster, gradients of early exits scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.train import phases
from engine.train.batching import TokenizedExamples
from engine.train.config import InitOptions, TeacherOptions, TrainConfig
from engine.train.trainer import Trainer
from tests.tiny import tiny_model, write_task


@pytest.fixture(scope="module")
def options(backbone_folder, tmp_path_factory):
    """Options of a small run with a teacher."""
    return dict(
        backbone=str(backbone_folder),
        data=str(write_task(tmp_path_factory.mktemp("task"), {"train": 60, "dev": 20, "test": 20})),
        max_length=32,
        calibration_share=0.2,
        max_rounds=1,
        teacher=dict(folds=2, epochs=1, batch_size=16, learning_rate=3e-3),
        init=dict(epochs=1, batch_size=16, learning_rate=3e-3, exits_rate=3.0, early_gradient=0.5),
        policy=dict(epochs=1),
        task=dict(epochs=1, batch_size=16, learning_rate=1e-3),
        select=dict(alphas=[]),
    )


def make(n: int = 24, seed: int = 0) -> TokenizedExamples:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = torch.randint(5, 50, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    return TokenizedExamples({"input_ids": ids}, offsets, torch.randint(0, 3, (n,), generator=generator), 0)


def soft_labels(data: TokenizedExamples, folds: int = 3) -> torch.Tensor:
    model = tiny_model()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    options = TeacherOptions(epochs=2, batch_size=8, learning_rate=1e-2, folds=folds)
    return phases.out_of_fold(model, data, options, seed=5, restart=lambda: model.load_state_dict(start))


def test_soft_labels_of_a_row_never_saw_its_label():
    """Turning one row's label over changes what is said of other rows, not of the rows of its own fold."""
    data = make()
    before = soft_labels(data)
    assert torch.allclose(before.exp().sum(-1), torch.ones(len(data)))
    row = 7
    labels = data.label_ids.clone()
    labels[row] = (labels[row] + 1) % 3
    after = soft_labels(TokenizedExamples(data.fields, data.offsets, labels, data.pad_token_id))
    part_of = torch.randperm(len(data), generator=torch.Generator().manual_seed(5)) % 3
    own = part_of == part_of[row]
    assert torch.equal(before[own], after[own])
    assert not torch.equal(before[~own], after[~own])


def test_more_folds_than_rows():
    with pytest.raises(ValueError, match="teacher.folds is 5, but there are only 4 training rows"):
        soft_labels(make(4), folds=5)
    assert soft_labels(make(5), folds=5).shape == (5, 3)


def test_soft_labels_stand_at_their_rows():
    """Each fold starts anew and its predictions land where its rows are: checked against a fold trained by hand."""
    data, model = make(), tiny_model()
    got = soft_labels(data)
    part_of = torch.randperm(len(data), generator=torch.Generator().manual_seed(5)) % 3
    alone = InitOptions(2, 8, 1e-2, last_exit_epochs=2)
    phases.train_init(model, data.select((part_of != 1).nonzero()[:, 0]), alone, 5 + 1)
    held_out = (part_of == 1).nonzero()[:, 0]
    with torch.inference_mode():
        batch = data.collate(held_out)
        want = model(**phases.model_inputs(model, batch)).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(got[held_out], want, rtol=1e-5, atol=1e-5)


def test_the_teacher_enters_the_loss_of_its_own_rows():
    data, model = make(), tiny_model()
    log_probs = torch.randn(len(data), 3).log_softmax(-1)
    first, _ = phases.train_init(model, data, InitOptions(1, 8, 1e-9), 3, phases.Teacher(log_probs, 1.0, 2.0))
    # At a learning rate of nothing and without dropout the epoch's loss is that of the model as it is.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    again, _ = phases.train_init(model, data, InitOptions(1, 8, 1e-9), 3, phases.Teacher(log_probs, 1.0, 2.0))
    with torch.inference_mode():
        out = model(**phases.model_inputs(model, data.collate(torch.arange(len(data)))))
    soft = (log_probs / 2).log_softmax(-1)[:, None].expand(-1, out.logits.shape[1], -1)
    kl = torch.nn.functional.kl_div((out.logits / 2).log_softmax(-1), soft, reduction="none", log_target=True).sum(-1)
    weights = torch.tensor(model.config.exit_layers).float()
    want = float((4 * kl @ (weights / weights.sum())).mean())
    assert again[0] == pytest.approx(want, rel=1e-4)
    assert first[0] != pytest.approx(want, rel=1e-6), "dropout acts in training"


def gradients(early: float):
    model = tiny_model()
    model.eval()
    data = make()
    out = model(**phases.model_inputs(model, data.collate(torch.arange(8))), early_gradient=early)
    ce = -out.logits.log_softmax(-1)[:, :, 0].sum(0)
    parts = []
    for exits in (ce[:-1].sum(), ce[-1]):
        parameters = [*model.backbone.parameters(), *model.exits.classifiers.parameters()]
        found = torch.autograd.grad(exits, parameters, retain_graph=True, allow_unused=True)
        parts.append([None if g is None else g.clone() for g in found])
    return parts, len(list(model.backbone.parameters()))


@pytest.mark.parametrize("early", [0.0, 0.25])
def test_early_gradient_scales_what_reaches_the_backbone_and_nothing_else(early):
    (early_plain, last_plain), count = gradients(1.0)
    (early_scaled, last_scaled), _ = gradients(early)
    for i, (a, b) in enumerate(zip(early_plain, early_scaled, strict=True)):
        if a is not None:
            torch.testing.assert_close(b, a * early if i < count else a)
    for a, b in zip(last_plain, last_scaled, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_exits_rate_speeds_up_what_exits_read_with():
    """One step of Adam moves every weight by its learning rate, whatever the gradient's size."""
    moved = {}
    for rate in (1.0, 10.0):
        model = tiny_model()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        phases.train_init(model, make(8), InitOptions(1, 8, 1e-4, exits_rate=rate), seed=0)
        moved[rate] = {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}
    for name, distance in moved[1.0].items():
        if name.startswith(("exits.classifiers", "exits.poolers")):
            assert moved[10.0][name] == pytest.approx(10 * distance, rel=0.02)
        elif name.startswith("exits.policies"):
            assert distance == moved[10.0][name] == 0
        elif distance > 5e-5:
            assert moved[10.0][name] == pytest.approx(distance, rel=0.02), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_a_killed_run_goes_on_behind_its_teacher(options, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    Trainer(TrainConfig.from_dict({**options, "output": str(tmp_path / "whole")})).run()

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    config = TrainConfig.from_dict({**options, "output": str(tmp_path / "killed")})
    with monkeypatch.context() as patch:
        original, calls = phases.train_init, []

        def third_call_dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:  # two folds have trained: step 1 itself
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(phases, "train_init", third_call_dies)
        with pytest.raises(Killed):
            Trainer(config).run()
    assert (tmp_path / "killed.run/teacher/weights.safetensors").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(phases, "out_of_fold", die)  # stored: not made again
        Trainer(config).run()
    want, got = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed")
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


def test_the_teacher_changes_the_run(options, tmp_path):
    torch.set_num_threads(1)
    records = []
    for folds in (0, 2):
        changed = {**options, "teacher": {**options["teacher"], "folds": folds}, "output": str(tmp_path / str(folds))}
        records.append(Trainer(TrainConfig.from_dict(changed)).run())
    for phase in ("init", "round1.task"):
        assert records[0]["phases"][phase]["epoch_loss"] != records[1]["phases"][phase]["epoch_loss"]
    assert not (tmp_path / "0.run/teacher").exists()
