"""Who leaves, who goes on, and what the next layer owes those."""

import pytest
import torch

from engine.kernels import step_rows
from engine.kernels.step_rows import DECIDE, LEAVE, STAY, step_rows_, step_rows__ref
from tests.kernels import gpu_cases

LAYERS, BLOCK = 6, 4


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


class Case:
    """A random moment of a step; ``expected`` says in plain Python what has to come of it."""

    def __init__(self, rows, live, splits, seed, device, longest=30):
        g = torch.Generator().manual_seed(seed)

        def draw(low, high, *size):
            return torch.randint(low, high, size, generator=g).to(torch.int32)

        self.live = live
        self.partial = torch.randn(rows, splits, generator=g)
        self.b2 = torch.randn(1, generator=g) * 0.1
        self.order = torch.randperm(rows, generator=g).to(torch.int32)
        self.threshold = torch.randn(rows, generator=g)
        self.script = draw(0, LAYERS + 1, rows) * draw(0, 2, rows)
        self.least, self.most = draw(1, LAYERS, rows), draw(2, LAYERS + 1, rows)
        self.positions = draw(0, longest, rows)
        blocks = longest // BLOCK + 1
        self.table = torch.randperm(rows * blocks, generator=g).view(rows, blocks).to(torch.int32)
        self.marks = (torch.rand(rows, LAYERS, generator=g) * (self.positions[:, None] + 1)).to(torch.int32)
        self.device, self.room = device, rows * longest + 3

    def run(self, way, layer, kind, next_layer):
        def to(x):
            return x.clone().to(self.device)

        rows = len(self.order)
        out = {
            "exit_layers": torch.full((rows,), -1, dtype=torch.int32),
            "exit_probs": torch.full((rows,), -1.0),
            "out_order": torch.full((rows,), -1, dtype=torch.int32),
            "out_counts": torch.full((2,), -1, dtype=torch.int32),
            "watermarks": self.marks,
            "owed_slots": torch.full((self.room,), -1, dtype=torch.int32),
            "owed_positions": torch.full((self.room,), -1, dtype=torch.int32),
        }
        out = {name: to(x) for name, x in out.items()}
        way(step_rows_, step_rows__ref)(
            to(self.partial) if kind == DECIDE else None, to(self.b2) if kind == DECIDE else None, to(self.order),
            ints([self.live, 77], self.device), layer, kind, to(self.threshold), to(self.script), to(self.least),
            to(self.most), out["exit_layers"], out["exit_probs"], out["out_order"], out["out_counts"], next_layer,
            to(self.positions), to(self.table), BLOCK, out["watermarks"], out["owed_slots"], out["owed_positions"],
        )  # fmt: skip
        return {name: x.cpu() for name, x in out.items()}

    def expected(self, layer, kind, next_layer):
        left, stay, owed, marks = {}, [], [], self.marks.clone()
        for r in self.order[: self.live].tolist():
            leave, prob = kind == LEAVE, 1.0
            if kind == DECIDE:
                z = float(self.partial[r].sum() + self.b2)
                script = int(self.script[r])
                leave = script <= layer if script else z > float(self.threshold[r])
                prob = float(torch.tensor(z).sigmoid())
                if self.most[r] <= layer:
                    leave, prob = True, 1.0
                leave = leave and bool(self.least[r] <= layer)
            if leave:
                left[r] = prob
                continue
            stay.append(r)
            if next_layer:
                for p in range(int(marks[r, next_layer - 1]), int(self.positions[r])):
                    owed.append((int(self.table[r, p // BLOCK]) * BLOCK + p % BLOCK, p))
                marks[r, next_layer - 1] = self.positions[r] + 1
        return left, stay, owed, marks


@pytest.mark.parametrize("rows, live, splits", [(1, 1, 16), (1, 0, 1), (5, 3, 1), (33, 33, 4), (64, 50, 16)])
@pytest.mark.parametrize("layer, kind, next_layer", [(0, STAY, 1), (2, STAY, 3), (3, DECIDE, 4), (6, LEAVE, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_against_plain_python(way, rows, live, splits, layer, kind, next_layer, seed):
    case = Case(rows, live, splits, seed, way.device)
    got = case.run(way, layer, kind, next_layer)
    left, stay, owed, marks = case.expected(layer, kind, next_layer)
    n = len(stay)
    assert got["out_counts"].tolist() == [n, len(owed)]
    assert got["out_order"][:n].tolist() == stay
    assert (
        list(zip(got["owed_slots"][: len(owed)].tolist(), got["owed_positions"][: len(owed)].tolist(), strict=True))
        == owed
    )
    assert bool((got["owed_slots"][len(owed) :] == -1).all()), "nobody writes behind what is owed"
    assert torch.equal(got["watermarks"], marks)
    for r in range(rows):
        if r in left:
            assert got["exit_layers"][r] == layer and float(got["exit_probs"][r]) == pytest.approx(left[r], abs=1e-5)
        else:
            assert got["exit_layers"][r] == -1 and got["exit_probs"][r] == -1


def test_a_row_that_owes_hundreds(way):
    case = Case(3, 3, 1, 5, way.device, longest=700)
    case.positions[:] = ints([690, 3, 655], "cpu")
    case.marks[:] = 0
    got = case.run(way, 1, STAY, 2)
    _, _, owed, _ = case.expected(1, STAY, 2)
    assert len(owed) == 690 + 3 + 655 == got["out_counts"][1]
    assert got["owed_slots"][: len(owed)].tolist() == [slot for slot, _ in owed]


def test_nan_does_not_leave(way):
    case = Case(2, 2, 1, 1, way.device)
    case.partial[:], case.script[:], case.least[:], case.most[:] = float("nan"), 0, 1, LAYERS
    assert case.run(way, 3, DECIDE, 4)["out_counts"][0] == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": 3}, "kind must be 0 .stay., 1 .decide. or 2 .leave., got 3"),
        ({"kind": DECIDE}, "partial and b2 are missing"),
        ({"next_layer": 3}, "next_layer must be 0 to 2, got 3"),
        ({"order": torch.zeros(2)}, "order must be int32"),
        ({"threshold_logit": torch.zeros(1)}, r"threshold_logit must have shape \[2 or more\]"),
        ({"watermarks": torch.zeros(1, 2, dtype=torch.int32)}, "watermarks must be int32 of shape"),
        ({"out_counts": None}, "out_order and out_counts must not be order and counts"),
    ],
)
def test_wrong_arguments(change, words):
    def row():
        return torch.zeros(2, dtype=torch.int32)

    good = dict(
        partial=None, b2=None, order=row(), counts=row(), layer=1, kind=STAY, threshold_logit=torch.zeros(2),
        script=row(), min_depth=row(), max_depth=row(), exit_layers=row(), exit_probs=torch.zeros(2), out_order=row(),
        out_counts=row(), next_layer=2, positions=row(), block_table=row()[:, None], block_size=4,
        watermarks=torch.zeros(2, 2, dtype=torch.int32), owed_slots=row(), owed_positions=row(),
    )  # fmt: skip
    given = {**good, **change}
    if given["out_counts"] is None:
        given["out_counts"] = given["counts"]
    with pytest.raises(ValueError, match=words):
        step_rows_(**given)


@gpu_cases.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", [STAY, DECIDE, LEAVE])
@pytest.mark.parametrize("rows", [1, 64])
def test_compiles(monkeypatch, rows, kind, arch):
    monkeypatch.setattr(gpu_cases, "MODULES", (step_rows,))

    def twin_of_call(op, twin):
        return op

    case = Case(rows, rows, 16, 0, "cpu")
    launch = gpu_cases.record(monkeypatch, "step", lambda: case.run(twin_of_call, 3, kind, 0 if kind == LEAVE else 4))
    assert gpu_cases.compile_launch(launch, arch).registers <= 128
