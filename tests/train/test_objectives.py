import math

import pytest
import torch

from engine.train.objectives import (
    alpha_grid,
    check_exit_layers,
    cross_entropy_per_exit,
    distillation_loss,
    greedy_exit_index,
    rewards,
    task_loss,
    weighted_exit_loss,
)

LAYERS = (2, 4, 6)
CE = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])


def test_cross_entropy_matches_torch_per_exit():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 3, 4, generator=generator), torch.tensor([0, 3, 1, 2, 3])
    ce = cross_entropy_per_exit(logits, labels)
    for k in range(3):
        torch.testing.assert_close(ce[:, k], torch.nn.functional.cross_entropy(logits[:, k], labels, reduction="none"))


def test_cross_entropy_is_natural_log_and_fp32_for_half_inputs():
    ce = cross_entropy_per_exit(torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.tensor([3]))
    assert ce.dtype == torch.float32
    torch.testing.assert_close(ce, torch.full((1, 2), math.log(8)))


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_cross_entropy_has_no_ignored_label(label):
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        cross_entropy_per_exit(torch.zeros(1, 2, 4), torch.tensor([label]))


def test_weighted_loss_weights_by_layer_number():
    by_hand = ((2 * 0.9 + 4 * 0.5 + 6 * 0.1) / 12 + (2 * 0.2 + 4 * 0.3 + 6 * 0.4) / 12) / 2
    assert float(weighted_exit_loss(CE, LAYERS)) == pytest.approx(by_hand)
    assert float(weighted_exit_loss(CE, LAYERS, "equal")) == pytest.approx(float(CE.mean()))


def test_weighted_loss_of_twelve_layers_divides_by_78():
    ce = torch.eye(12)[11:]
    assert float(weighted_exit_loss(ce, range(1, 13))) == pytest.approx(12 / 78)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_softened_divergence_of_every_exit(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(5, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    got = distillation_loss(logits, teacher, temperature)
    target = (teacher / temperature).log_softmax(-1)
    for k in range(3):
        student = (logits[:, k] / temperature).log_softmax(-1)
        want = torch.nn.functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(got[:, k], want * temperature**2)
    torch.testing.assert_close(distillation_loss(teacher[:, None], teacher, temperature), torch.zeros(5, 1))


def test_distillation_needs_a_teacher_of_the_same_rows():
    with pytest.raises(ValueError, match=r"teacher \(N, C\), got \(5, 3, 4\), \(4, 4\)"):
        distillation_loss(torch.zeros(5, 3, 4), torch.zeros(4, 4), 2.0)


def test_rewards_by_hand():
    ml = torch.tensor([6, 2])
    vanilla = rewards(CE, LAYERS, alpha=0.1, num_layers=6, kind="vanilla")
    torch.testing.assert_close(vanilla, -CE - 0.1 * torch.tensor([2.0, 4, 6]))
    hardness = rewards(CE, LAYERS, alpha=0.1, num_layers=6, memorized_layer=ml)
    torch.testing.assert_close(hardness[0], -CE[0])  # hardest: no pressure
    torch.testing.assert_close(hardness[1], -CE[1] - 0.1 * (1 - 2 / 6) * torch.tensor([2.0, 4, 6]))
    assert (hardness >= vanilla).all()


def test_rewards_carry_no_gradient():
    assert not rewards(CE.clone().requires_grad_(), LAYERS, 0.1, 6, kind="vanilla").requires_grad


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"kind": "soft"}, "kind must be one of"),
        ({}, "needs memorized_layer"),
        ({"memorized_layer": torch.tensor([1])}, "needs memorized_layer"),
        ({"memorized_layer": torch.tensor([0, 6])}, r"must lie in 1\.\.6, got 0\.\.6"),
        ({"ce": CE / 0}, "diverged"),
        ({"num_layers": 12}, "must be the last layer 12"),
        ({"exit_layers": (4, 2, 6)}, "ascending"),
        ({"exit_layers": (2, 6)}, "names 2 exits"),
    ],
)
def test_rewards_refuses(kwargs, message):
    arguments = {"ce": CE, "exit_layers": LAYERS, "alpha": 0.1, "num_layers": 6} | kwargs
    with pytest.raises(ValueError, match=message):
        rewards(**arguments)


def test_empty_batch_is_an_error_not_nan():
    with pytest.raises(ValueError, match="N >= 1"):
        weighted_exit_loss(torch.zeros(0, 3), LAYERS)
    with pytest.raises(ValueError, match="weighting must be one of"):
        weighted_exit_loss(CE, LAYERS, "depth")


def test_check_exit_layers():
    assert check_exit_layers([1, 3]) == (1, 3)
    for bad in ((), (0, 1), (2, 2)):
        with pytest.raises(ValueError, match="ascending"):
            check_exit_layers(bad)


def test_greedy_exit_index():
    z = torch.tensor([[0.1, 5.0], [-0.1, 0.2], [-1.0, 0.0], [0.0, -2.0]])
    assert greedy_exit_index(z).tolist() == [0, 1, 2, 2]  # 0.5 itself does not leave
    assert greedy_exit_index(z, 0.9).tolist() == [1, 2, 2, 2]
    assert greedy_exit_index(z, 0.0).tolist() == [0] * 4
    assert greedy_exit_index(z + 100, 1.0).tolist() == [2] * 4  # sigmoid would round to 1
    assert greedy_exit_index(torch.zeros(3, 0)).tolist() == [0] * 3
    with pytest.raises(ValueError, match="threshold must lie in"):
        greedy_exit_index(z, 1.5)


def test_task_loss_reads_only_the_exit_taken():
    ce = CE.clone().requires_grad_()
    z = torch.tensor([[-1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    loss = task_loss(ce, LAYERS, z)
    assert loss.item() == pytest.approx((0.5 + 0.2) / 2)
    loss.backward()
    assert ce.grad.tolist() == [[0, 0.5, 0], [0.5, 0, 0]]
    assert z.grad is None


def test_task_loss_expected_is_the_mean_of_sample():
    z = torch.tensor([[-0.5, 0.3], [0.2, -1.0]], requires_grad=True)
    expected = task_loss(CE, LAYERS, z, "expected")
    assert not expected.requires_grad
    repeats = 20_000
    drawn = task_loss(CE.repeat(repeats, 1), LAYERS, z.repeat(repeats, 1), "sample",
                      generator=torch.Generator().manual_seed(1))
    assert float(drawn) == pytest.approx(float(expected), abs=4 * float(CE.std()) / math.sqrt(2 * repeats))


def test_task_loss_refuses():
    with pytest.raises(ValueError, match="none at the last exit"):
        task_loss(CE, LAYERS, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="indicator must be one of"):
        task_loss(CE, LAYERS, torch.zeros(2, 2), "soft")


def test_alpha_grid_scales_with_depth_and_classes():
    assert alpha_grid(12, 2)[0] == pytest.approx(0.002) and len(alpha_grid(12, 2)) == 9
    assert alpha_grid(6, 4) == pytest.approx([4 * alpha for alpha in alpha_grid(12, 2)])
    with pytest.raises(ValueError, match="num_labels >= 2"):
        alpha_grid(12, 1)
