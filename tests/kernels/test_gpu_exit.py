import math

import pytest
import torch
from torch.nn import functional as F

from engine.kernels import gpu_exit
from engine.kernels.exit_rows import (
    ExitDestinations,
    ExitLimits,
    exit_add_norm_rows__ref,
    exit_norm_rows__ref,
    exit_rows__ref,
)
from engine.kernels.gpu_exit import exit_add_norm_rows_, exit_norm_rows_, exit_rows_
from tests.kernels.cases import assert_no_worse, doubled, partials_of

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
EPS, POISON, LAYER = 1e-5, 7.0, 3
FOREVER = 1 << 20


class Case:
    """One exit with ``live`` of ``rows`` rows of a batch of ``batch``, and its plain computation.

    norm: False, the state is given; True, the exit takes the norm; "stored", of all tokens, and writes it; "beside",
    the state is given, and the norm of all tokens is written
    """

    def __init__(self, way, dtype, *, norm, hidden=40, neurons=20, classes=5, rows=9, live=6, batch=12, weights=None):
        self.way, self.dtype, self.norm, self.live, self.batch, self.classes = way, dtype, norm, live, batch, classes

        def randn(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(shape) * scale).to(dtype).to(way.device)

        weights = weights or dtype
        scale = hidden**-0.5
        self.tokens = 3 * rows - 2 if live else 0
        self.index = torch.randperm(3 * rows - 2)[: rows + 1].to(torch.int32).to(way.device)
        self.x, self.residual = (randn(3 * rows, hidden) for _ in range(2))
        self.given = randn(rows, hidden) if norm == "beside" else self.x
        self.normed = torch.full_like(self.x, POISON)
        self.partials = None
        self.weight, self.bias = randn(hidden, dtype=weights), randn(hidden, dtype=weights)
        self.policy = (
            randn(neurons, hidden, scale=2 * scale, dtype=weights),
            randn(neurons, dtype=weights),
            randn(1, neurons, scale=3 * neurons**-0.5, dtype=weights),
            randn(1, dtype=weights),
        )
        self.classifier = (
            randn(classes, hidden, scale=3 * scale, dtype=weights), randn(classes, dtype=weights)
        )  # fmt: skip
        self.row_ids = torch.randperm(batch)[:rows].to(torch.int32).to(way.device)
        device = way.device
        self.out = ExitDestinations(
            torch.full((batch, classes), POISON, device=device),
            torch.full((batch,), 7, dtype=torch.int32, device=device),
            torch.full((batch,), POISON, device=device),
            torch.full((rows,), 7, dtype=torch.int8, device=device),
            torch.full((rows,), POISON, device=device),
        )

    @property
    def stores(self):
        return self.norm in ("stored", "beside")

    def states(self, wide=False):
        """Of the live rows: what an exit reads."""
        if self.norm in (True, "stored"):
            return self.norms(self.index[: self.live].long(), wide)
        return self.given[: self.live].double() if wide else self.given[: self.live]

    def norms(self, rows, wide=False):
        x, residual, weight, bias = self.x[rows], self.residual[rows], self.weight, self.bias
        if wide:
            x, residual, weight, bias = doubled(x, residual, weight, bias)
        return F.layer_norm(x + residual, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)

    def read(self, criterion, wide=False):
        """z and class logits of the live rows, by torch: in fp64, or from a state of the case's dtype in fp32."""
        float_type = torch.float64 if wide else SINGLE
        state = self.states(wide).to(float_type)
        w1, b1, w2, b2, weight, bias = (p.to(float_type) for p in (*self.policy, *self.classifier))
        classes = state @ weight.t() + bias
        if criterion == "confidence":
            best = classes.softmax(1).amax(1)
            return torch.log(best / (1 - best)), classes
        return (F.gelu(state @ w1.t() + b1) @ w2.t() + b2)[:, 0], classes

    def run(self, criterion, limits, layer=LAYER, policy=True):
        way, rest = self.way, (layer, criterion, self.policy if policy else None, self.classifier)
        tokens = self.tokens if self.stores or self.partials is not None else FOREVER
        counts = torch.tensor([self.live, tokens], dtype=torch.int32, device=way.device)
        norm = (self.weight, self.bias, EPS)
        if self.stores:
            places = (self.index, None) if self.norm == "stored" else (None, self.given)
            way(exit_add_norm_rows_, exit_add_norm_rows__ref)(
                self.out, limits, self.normed, self.x, self.residual, norm, counts, *rest, *places, self.partials
            )
        elif self.norm:
            way(exit_norm_rows_, exit_norm_rows__ref)(
                self.out, limits, self.x, self.residual, norm, counts, *rest, self.index, self.partials
            )
        else:
            way(exit_rows_, exit_rows__ref)(self.out, limits, self.x, counts, *rest)

    def limits(self, **per_row):
        """Per-row values given for the live rows, at their place or at their original index; poison elsewhere."""
        by_row_id = per_row.pop("by_row_id", False)
        tensors = {}
        for name, values in per_row.items():
            floating = name == "threshold_logit"
            size = self.batch if by_row_id else self.row_ids.shape[0]
            filler = float("-inf") if floating else 0
            tensor = torch.full((size,), filler, dtype=SINGLE if floating else torch.int32)
            place = self.row_ids[: self.live].long().cpu() if by_row_id else slice(self.live)
            tensor[place] = torch.as_tensor(values, dtype=tensor.dtype).cpu()
            tensors[name] = tensor.to(self.way.device)
        return ExitLimits(self.row_ids, by_row_id=by_row_id, **tensors)

    def check(self, criterion, leave, forced=None, floor=2e-6):
        """All destinations against the expected decisions (bool lists of the live rows)."""
        out, live = self.out, self.live
        forced = [False] * live if forced is None else forced
        # A handful of numbers behind a rounded state: the largest error is mostly luck.
        factor = 3.0 if self.norm else 2.0
        z, classes = self.read(criterion)
        exact_z, exact_classes = self.read(criterion, wide=True)
        assert out.keep.tolist() == [0 if gone else 1 for gone in leave] + [7] * (len(out.keep) - live)
        if criterion != "last":
            assert_no_worse(out.exit_logits[:live], z, exact_z, factor, floor)
            assert out.exit_logits[live:].eq(POISON).all()
        gone = [i for i in range(live) if leave[i]]
        rows = self.row_ids[gone].long()
        written = rows if criterion != "confidence" else self.row_ids[:live].long()
        chosen = gone if criterion != "confidence" else list(range(live))
        assert_no_worse(out.logits[written], classes[chosen], exact_classes[chosen], factor, floor)
        assert out.exit_layers[rows].eq(LAYER).all()
        for row, i in zip(rows.tolist(), gone, strict=True):
            expected = 1.0 if criterion == "last" or forced[i] else float(out.exit_logits[i].double().sigmoid())
            assert float(out.exit_probs[row]) == pytest.approx(expected, abs=3e-7)
        stays = torch.ones(self.batch, dtype=torch.bool)
        stays[rows.cpu()] = False
        assert out.exit_layers[stays].eq(7).all() and out.exit_probs[stays].eq(POISON).all()
        stays[written.cpu()] = False
        assert out.logits[stays].eq(POISON).all()
        tokens = slice(self.tokens if self.stores else 0)
        assert_no_worse(self.normed[tokens], self.norms(tokens), self.norms(tokens, wide=True), floor=2e-6)
        assert self.normed[tokens.stop :].eq(POISON).all()


def middle(z):
    """A threshold between the rows, far from each of them."""
    ordered = z.sort().values
    k = int(ordered.diff()[1:-1].argmax()) + 1
    assert ordered[k + 1] - ordered[k] > 0.02
    return float((ordered[k] + ordered[k + 1]) / 2)


norms = pytest.mark.parametrize(
    "norm", [False, True, "stored", "beside"], ids=["state", "norm", "add norm", "state and add norm"]
)


@norms
@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("weights", [None, SINGLE], ids=["own weights", "fp32 weights"])
@pytest.mark.parametrize("criterion", ["policy", "confidence"])
def test_rows_above_their_threshold_leave(way, norm, dtype, weights, criterion):
    way.skip_wrong(dtype)
    case = Case(way, dtype, norm=norm, weights=weights)
    z, _ = case.read(criterion, wide=True)
    threshold = middle(z)
    case.run(criterion, case.limits(threshold_logit=[threshold] * case.live), policy=criterion == "policy")
    leave = (z > threshold).tolist()
    assert 0 < sum(leave) < case.live
    case.check(criterion, leave)


@norms
@pytest.mark.parametrize("by_row_id", [False, True])
@pytest.mark.parametrize("criterion", ["policy", "scripted", "confidence"])
def test_depth_limits(way, norm, by_row_id, criterion):
    """Per row: not before min_depth, not past max_depth whatever the criterion says, else as it says."""
    case = Case(way, SINGLE, norm=norm)
    wish = [True, True, False, False, True, False]
    min_depth, max_depth = [1, 4, 1, 1, 3, 4], [9, 9, 3, 9, 3, 2]
    leave, forced = [True, False, True, False, True, True], [False, False, True, False, True, True]
    per_row = dict(min_depth=min_depth, max_depth=max_depth)
    if criterion == "scripted":
        per_row["script"] = [3 if wished else 4 for wished in wish]
    else:
        per_row["threshold_logit"] = [-math.inf if wished else math.inf for wished in wish]
    case.run(criterion, case.limits(by_row_id=by_row_id, **per_row))
    case.check(criterion, leave, forced)


@norms
@pytest.mark.parametrize("live", [0, 1, 9])
def test_the_last_layer_lets_everybody_go(way, norm, live):
    case = Case(way, HALF, norm=norm, live=live)
    case.run("last", ExitLimits(case.row_ids), policy=False)
    case.check("last", [True] * live)


@norms
@pytest.mark.parametrize("live", [0, 1, 9])
@pytest.mark.parametrize("leave", [False, True])
def test_all_or_none(way, norm, live, leave):
    case = Case(way, SINGLE, norm=norm, live=live)
    case.run("policy", case.limits(threshold_logit=[-math.inf if leave else math.inf] * live))
    case.check("policy", [leave] * live)


@norms
@pytest.mark.parametrize("hidden, neurons, classes", [(16, 1, 1), (300, 33, 150), (128, 32, 2), (257, 70, 33)])
@pytest.mark.parametrize("criterion", ["policy", "confidence"])
def test_sizes(way, norm, hidden, neurons, classes, criterion):
    """Tiles of neurons, of classes and of the hidden state, full and not; one class is always sure."""
    case = Case(way, SINGLE, norm=norm, hidden=hidden, neurons=neurons, classes=classes)
    if criterion == "confidence" and classes == 1:
        case.run(criterion, case.limits(threshold_logit=[1e30] * case.live))
        assert case.out.exit_logits[: case.live].eq(math.inf).all() and case.out.keep[: case.live].eq(0).all()
        assert case.out.exit_probs[case.row_ids[: case.live].long()].eq(1).all()
        return
    case.run(criterion, case.limits(threshold_logit=[-math.inf] * case.live))
    case.check(criterion, [True] * case.live, floor=5e-6)


@norms
@pytest.mark.parametrize("criterion", ["policy", "last"])
@pytest.mark.parametrize("programs", [1, 30, 264])
def test_programs_that_share_the_classes_of_a_row(way, monkeypatch, programs, criterion, norm):
    """One, three and five programs a row decide the same and write every class once."""
    monkeypatch.setattr(gpu_exit, "_PROGRAMS", programs)
    monkeypatch.setattr(gpu_exit, "_PROGRAMS_BESIDE", programs)
    case = Case(way, SINGLE, norm=norm, classes=150)
    z, _ = case.read("policy", wide=True)
    threshold = middle(z)
    case.run(criterion, case.limits(threshold_logit=[threshold] * case.live))
    case.check(criterion, (z > threshold).tolist() if criterion == "policy" else [True] * case.live)


@norms
@pytest.mark.parametrize("criterion", ["policy", "confidence"])
def test_nan_never_leaves_of_its_own_accord(way, norm, criterion):
    case = Case(way, SINGLE, norm=norm, live=3)
    where = int(case.index[1]) if norm in (True, "stored") else 1
    case.given[where, 0] = float("nan")
    case.run(criterion, case.limits(threshold_logit=[-math.inf] * 3, max_depth=[9, 9, 9]))
    assert case.out.keep.tolist()[:3] == [0, 1, 0] and bool(case.out.exit_logits[1].isnan())
    case.run(criterion, case.limits(threshold_logit=[-math.inf] * 3, max_depth=[9, 3, 9]))
    assert case.out.keep.tolist()[:3] == [0, 0, 0] and float(case.out.exit_probs[case.row_ids[1]]) == 1


@pytest.mark.parametrize("norm", [True, "stored", "beside"], ids=["norm", "add norm", "state and add norm"])
@pytest.mark.parametrize("shares", [0, 2, 4])
@pytest.mark.parametrize("hidden", [40, 300])
def test_partial_sums_are_added_up(way, norm, shares, hidden):
    """As a product may leave them, in place of rows that nobody may look at then."""
    case = Case(way, HALF, norm=norm, hidden=hidden)
    z, _ = case.read("policy", wide=True)
    threshold = middle(z)
    case.partials, x = partials_of(case.x, shares), case.x
    if shares:
        case.x = torch.full_like(x, float("nan"))
    case.run("policy", case.limits(threshold_logit=[threshold] * case.live))
    case.x = x
    case.check("policy", (z > threshold).tolist())


def test_compact_rows_need_no_index(way):
    """x and residual one row a sequence, as first tokens first leaves them; z is wanted by nobody."""
    case = Case(way, HALF, norm=True)
    case.index = torch.arange(10, dtype=torch.int32, device=way.device)
    z, _ = case.read("policy", wide=True)
    threshold = middle(z)
    limits = case.limits(threshold_logit=[threshold] * case.live)
    case.run("policy", limits)
    expected = case.out
    other = Case(way, HALF, norm=True)
    counts = torch.tensor([case.live, 0], dtype=torch.int32, device=way.device)
    way(exit_norm_rows_, exit_norm_rows__ref)(
        other.out._replace(exit_logits=None), limits, case.x, case.residual, (case.weight, case.bias, EPS), counts,
        LAYER, "policy", case.policy, case.classifier,
    )  # fmt: skip
    for got, want in zip(other.out[:4], expected[:4], strict=True):
        assert torch.equal(got, want)
    assert other.out.exit_logits.eq(POISON).all()


def test_both_forms_decide_on_the_same_numbers(way):
    """A norm inside the kernel is rounded as a stored one would be: bit for bit the same z."""
    if way.name == "twin":
        pytest.skip("the twin is one function behind the norm")
    from engine.kernels.gpu_norms import add_layer_norm_rows_

    case = Case(way, HALF, norm=True, hidden=96)
    limits = case.limits(threshold_logit=[0.0] * case.live)
    case.run("policy", limits)
    stored = torch.zeros(9, 96, dtype=HALF, device=way.device)
    counts = torch.tensor([case.live, 0], dtype=torch.int32, device=way.device)
    add_layer_norm_rows_(
        stored, case.x, case.residual, case.weight, case.bias, EPS, counts, 0, case.index, case.index
    )
    again = Case(way, HALF, norm=False, hidden=96)
    exit_rows_(again.out, limits, stored, counts, LAYER, "policy", case.policy, case.classifier)
    torch.testing.assert_close(again.out.exit_logits, case.out.exit_logits, rtol=1e-5, atol=1e-5)
    beside = Case(way, HALF, norm="stored", hidden=96)
    counts[1] = case.tokens
    exit_add_norm_rows_(
        beside.out, limits, beside.normed, case.x, case.residual, (case.weight, case.bias, EPS), counts, LAYER,
        "policy", case.policy, case.classifier, case.index,
    )  # fmt: skip
    torch.testing.assert_close(beside.out.exit_logits, case.out.exit_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside.normed[case.index[: case.live].long()], stored[: case.live])


def test_without_rows_or_tokens(way):
    """Empty buffers of either kind; of the other everything is done."""
    case = Case(way, SINGLE, norm="stored", rows=1, live=1)
    case.index.zero_()
    limits = case.limits(threshold_logit=[-math.inf])
    counts = torch.tensor([1, 0], dtype=torch.int32, device=way.device)
    norm, rest = (case.weight, case.bias, EPS), (LAYER, "policy", case.policy, case.classifier, case.index)
    run = way(exit_add_norm_rows_, exit_add_norm_rows__ref)
    if way.name != "twin":  # which takes the states from what it has stored
        run(case.out, limits, case.normed[:0], case.x, case.residual, norm, counts, *rest)
        assert case.out.keep.tolist() == [0]
    counts = torch.tensor([0, 1], dtype=torch.int32, device=way.device)
    nobody = ExitLimits(case.row_ids[:0], threshold_logit=limits.threshold_logit[:0])
    run(case.out, nobody, case.normed, case.x, case.residual, norm, counts, *rest)
    one = slice(1)
    assert_no_worse(case.normed[one], case.norms(one), case.norms(one, wide=True), floor=2e-6)


def test_every_layer_number(way):
    for layer in (1, 16):
        case = Case(way, SINGLE, norm=False)
        case.run("scripted", case.limits(script=[1, 2, 16, 17, 15, 30]), layer=layer)
        leave = [place <= layer for place in (1, 2, 16, 17, 15, 30)]
        assert case.out.keep.tolist()[:6] == [0 if gone else 1 for gone in leave]
        rows = case.row_ids[:6][torch.tensor(leave, device=way.device)].long()
        assert case.out.exit_layers[rows].eq(layer).all()


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [False, True], ids=["norm", "add norm"])
def test_a_graph_reads_the_count_at_every_replay(gpu, stored):
    from tests.kernels.conftest import Way

    case = Case(Way("cuda", "cuda"), HALF, norm=True)
    counts = torch.tensor([case.live, 0], dtype=torch.int32, device="cuda")
    limits = case.limits(threshold_logit=[0.0] * case.live)
    rest = (case.x, case.residual, (case.weight, case.bias, EPS), counts, LAYER, "policy", case.policy,
            case.classifier, case.index)  # fmt: skip
    op = exit_add_norm_rows_ if stored else exit_norm_rows_
    arguments = (case.out, limits, *([case.normed] if stored else []), *rest)
    op(*arguments)
    expected = case.out.exit_logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*arguments)
    for live in (6, 2, 0):
        case.out.exit_logits.fill_(POISON)
        counts[0] = live
        graph.replay()
        assert torch.equal(case.out.exit_logits[:live], expected[:live])
        assert case.out.exit_logits[live:].eq(POISON).all()


# --- messages --------------------------------------------------------------------------------------------------------

X, V, IDS = torch.zeros(4, 8), torch.zeros(8), torch.zeros(4, dtype=torch.int32)
N = torch.tensor([2, 4], dtype=torch.int32)
POLICY = (torch.zeros(3, 8), torch.zeros(3), torch.zeros(1, 3), torch.zeros(1))
HEAD = (torch.zeros(5, 8), torch.zeros(5))
DONE = ExitDestinations(torch.zeros(6, 5), torch.zeros(6, dtype=torch.int32), torch.zeros(6), IDS.to(torch.int8))
FREE = ExitLimits(IDS, threshold_logit=torch.zeros(4))
MESSAGES = [
    ((DONE, FREE, X.double(), N, 1, "policy", POLICY, HEAD), "the state must be float16, bfloat16 or float32"),
    ((DONE, FREE, X, N, 1, "patience", POLICY, HEAD), "criterion must be one of policy, scripted, confidence, last"),
    ((DONE, FREE, X, N, 0, "policy", POLICY, HEAD), "layer must be at least 1, the layers that have run, got 0"),
    ((DONE, FREE, X, N, 1, "policy", None, HEAD), "the policy criterion needs policy, .w1, b1, w2, b2., got None"),
    ((DONE, FREE, X, N, 1, "scripted", POLICY, HEAD), "the scripted criterion needs script for every row, got None"),
    ((DONE, ExitLimits(IDS), X, N, 1, "confidence", None, HEAD), "confidence criterion needs threshold_logit"),
    ((DONE, FREE._replace(by_row_id=True), X, N, 1, "policy", POLICY, HEAD), r"threshold_logit must have shape \[6 or"),
    ((DONE, FREE, X[:3], N, 1, "policy", POLICY, HEAD), r"state must have shape \[4 or more, 8\], got \[3, 8\]"),
    ((DONE, FREE, X, N, 1, "policy", (POLICY[0].t(), *POLICY[1:]), HEAD), r"w1 must have shape \[8, 8\], got \[8, 3\]"),
    ((DONE, FREE, X, N, 1, "policy", POLICY, (HEAD[0][:4], HEAD[1][:4])), "logits must be contiguous float32 of shape"),
    ((DONE._replace(keep=IDS), FREE, X, N, 1, "policy", POLICY, HEAD), "keep must be int8, got int32"),
    ((DONE, FREE, X, N[:1], 1, "policy", POLICY, HEAD), r"counts must be int32 of shape \[2\]"),
]


@pytest.mark.parametrize("arguments, message", MESSAGES)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        exit_rows_(*arguments)


def test_messages_of_the_norm():
    rest = (N, 1, "policy", POLICY, HEAD)
    with pytest.raises(ValueError, match=r"residual must have shape \[4 or more, 8\], got \[3, 8\]"):
        exit_norm_rows_(DONE, FREE, X, X[:3], (V, V, EPS), *rest)
    with pytest.raises(ValueError, match=r"the norm's bias must have shape \[8\], got \[7\]"):
        exit_norm_rows_(DONE, FREE, X, X, (V, V[:7], EPS), *rest)
    with pytest.raises(ValueError, match=r"index must have shape \[4 or more\], got \[3\]"):
        exit_norm_rows_(DONE, FREE, X, X, (V, V, EPS), *rest, IDS[:3])


def test_messages_of_the_stored_norm():
    rest = ((V, V, EPS), N, 1, "policy", POLICY, HEAD, IDS)
    for x, residual, name in ((X, X.clone(), "x"), (X.clone(), X, "residual")):
        with pytest.raises(ValueError, match=f"normed must not overlap {name} in memory"):
            exit_add_norm_rows_(DONE, FREE, X, x, residual, *rest)
    with pytest.raises(ValueError, match=r"normed must have shape \[0 or more, 8\], got \[4, 7\]"):
        exit_add_norm_rows_(DONE, FREE, X[:, :7], X, X, *rest)
    with pytest.raises(ValueError, match=r"x must have shape \[4 or more, 8\], got \[3, 8\]"):
        exit_add_norm_rows_(DONE, FREE, X.clone(), X[:3], X, *rest)
    with pytest.raises(ValueError, match=r"index must have shape \[4 or more\], got \[3\]"):
        exit_add_norm_rows_(DONE, FREE, X.clone(), X, X, *rest[:-1], IDS[:3])
    for places, given in (((IDS, X), "both"), ((None,), "neither")):
        with pytest.raises(ValueError, match=f"either index .* or state must be given, got {given}"):
            exit_add_norm_rows_(DONE, FREE, X.clone(), X, X, *rest[:-1], *places)
    with pytest.raises(ValueError, match=r"state must have shape \[4 or more, 8\], got \[3, 8\]"):
        exit_add_norm_rows_(DONE, FREE, X.clone(), X, X, *rest[:-1], None, X[:3])
    out = X.clone()
    with pytest.raises(ValueError, match="normed must not overlap state in memory"):
        exit_add_norm_rows_(DONE, FREE, out, X, X, *rest[:-1], None, out)
