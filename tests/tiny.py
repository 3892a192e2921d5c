"""Tiny random models, tokenizers, batches and tasks for tests: nothing is downloaded, everything follows from a seed.

Weights are larger than Hugging Face's initialisation and biases are not zero: with std 0.02 at width 32 every row's
first token stays where its embedding put it, and a wrong attention mask would pass any tolerance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

import engine
from engine.criteria import Policy
from engine.kernels import capture
from engine.kernels.graphs import GraphBuilder
from engine.models.families import family_of

FAMILIES = ("bert", "roberta", "mpnet")
POOLERS = ("shared", "per_layer", "none")
VOCAB_SIZE = 120
MAX_LENGTH = 60  # tokens a row; every family's position table serves exactly this
NUM_LAYERS = 4
LABELS = ("query", "join", "index")

_CLASSES = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "mpnet": (MPNetConfig, MPNetModel),
}
# Different widths, so that no shape is right by accident; head sizes 8, 12 and 10.
_WIDTHS = {"bert": (32, 56), "roberta": (48, 40), "mpnet": (40, 72)}
_PAD = {"bert": 0, "roberta": 1, "mpnet": 1}


# -- models ------------------------------------------------------------------------------------------------------


def tiny_backbone(family: str = "bert", layers: int = NUM_LAYERS, seed: int = 0, **overrides: Any) -> nn.Module:
    """A Hugging Face encoder with its own pooler, all weights random, in eval mode."""
    config_class, model_class = _CLASSES[family]
    hidden, intermediate = _WIDTHS[family]
    settings = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_LENGTH + (0 if family == "bert" else 2),
        pad_token_id=_PAD[family],
        initializer_range=0.25,
    )
    if family != "mpnet":
        settings["type_vocab_size"] = 2 if family == "bert" else 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**(settings | overrides)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if "relative_attention_bias" in name:
                    parameter.copy_(torch.randn_like(parameter))
            # Hugging Face zeroes the embedding of the padding id; a trained model's need not be zero.
            model.embeddings.word_embeddings.weight.normal_(std=0.5)
            model.embeddings.position_embeddings.weight.normal_(std=0.3)
    return model.eval()


def tiny_model(
    family: str = "bert",
    pooler: str = "shared",
    exit_layers: Sequence[int] | None = None,
    layers: int = NUM_LAYERS,
    seed: int = 0,
    widen: bool = True,
    **fields: Any,
) -> engine.MultiExitEncoder:
    """A multi-exit model whose rows leave at all exits (``widen_policies``), in eval mode; a new one each time."""
    exits = tuple(range(1, layers + 1)) if exit_layers is None else tuple(exit_layers)
    fields = {"labels": LABELS, "max_length": MAX_LENGTH} | fields
    return copy.deepcopy(_tiny_model(family, pooler, exits, layers, seed, widen, tuple(fields.items())))


@lru_cache
def _tiny_model(family, pooler, exits, layers, seed, widen, fields) -> engine.MultiExitEncoder:
    config = engine.EarlyExitConfig(num_layers=layers, exit_layers=exits, pooler=pooler, **dict(fields))
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = engine.MultiExitEncoder(tiny_backbone(family, layers, seed), config).eval()
        with torch.no_grad():
            for linear in model.exits.poolers:
                linear.weight.normal_(std=0.25)
                linear.bias.normal_(std=0.3)
            for linear in model.exits.classifiers:
                linear.weight.normal_(std=0.5)
                linear.bias.normal_(std=0.3)
    return widen_policies(model, seed) if widen else model


@torch.no_grad()
def widen_policies(model: engine.MultiExitEncoder, seed: int = 0) -> engine.MultiExitEncoder:
    """Spread the policies' logits so that at threshold 0.5 about as many rows leave at every exit.

    Fresh policies sit at exit probability 0.5: every row is a borderline case there, and a test proves nothing.
    Afterwards logits of one exit have standard deviation 3 over random rows of all lengths.
    """
    exits = model.config.num_exits
    with torch.random.fork_rng():
        torch.manual_seed(seed + 2)
        for policy in model.exits.policies:
            policy.dense.weight.normal_(std=0.5)
            policy.dense.bias.normal_(std=0.3)
            policy.out.weight.normal_(std=0.5)
    rows = random_rows(128, seed=seed + 3, longest=model.config.max_length)
    z = every_exit(model, rows).policy_logits.float()
    for k, policy in enumerate(model.exits.policies):
        scale = 3 / z[:, k].std()
        policy.out.weight.mul_(scale)
        policy.out.bias.mul_(scale).sub_(scale * z[:, k].quantile(1 - 1 / (exits - k)))
    return model


class Half(Policy):
    """A threshold that an executor cannot compare for itself."""

    name = "half"
    policy_threshold = None


# -- batches -----------------------------------------------------------------------------------------------------


def random_rows(
    n: int, seed: int = 0, shortest: int = 1, longest: int = MAX_LENGTH, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """n rows of random ids (5 ... VOCAB_SIZE - 1: no special token), of random or given lengths."""
    generator = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def padded(
    rows: Sequence[Sequence[int]], side: str = "right", pad_id: int = 0, types: Sequence[Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """input_ids and attention_mask [N, S] int64 of ``rows``, and token_type_ids where ``types`` are given."""
    width = max(map(len, rows))

    def fill(sequences, value: int) -> Tensor:
        out = torch.full((len(rows), width), value)
        for i, row in enumerate(sequences):
            at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            out[i, at] = torch.as_tensor(row)
        return out

    batch = {"input_ids": fill(rows, pad_id), "attention_mask": fill([[1] * len(row) for row in rows], 0)}
    return batch if types is None else batch | {"token_type_ids": fill(types, 0)}


@torch.no_grad()
def every_exit(model: engine.MultiExitEncoder, rows: Sequence[Sequence[int]]):
    """ExitOutputs of ``rows``, by the module's own padded forward."""
    training = model.training
    out = model.eval()(**{name: ids.to(model.device) for name, ids in padded(rows).items()})
    model.train(training)
    return out


def hugging_face_logits(model: engine.MultiExitEncoder, batch: dict[str, Tensor]) -> Tensor:
    """Full-depth class logits [N, C] from Hugging Face's own forward of the backbone: no code of ours before the exit.

    RoBERTa and MPNet count positions from the padding id by themselves; BERT must be told where left-padded rows start.
    """
    inputs = dict(batch)
    if family_of(model.encoder_backbone.config).model_type == "bert":
        inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = model.encoder_backbone(**inputs).last_hidden_state
        first = hidden[torch.arange(len(hidden)), batch["attention_mask"].argmax(-1)]
        pooler = model.exits.pooler(model.config.num_exits - 1)
        state = first if pooler is None else torch.tanh(pooler(first))
        return model.exits.classifiers[-1](state)


# -- comparisons -------------------------------------------------------------------------------------------------


def borderline_rows(
    got, want, z: Tensor, exit_layers: Sequence[int], threshold: Any = 0.5, margin: float = 1e-4
) -> Tensor:
    """Rows that left elsewhere; each is excused by a policy logit within ``margin`` of the threshold's logit there.

    z  [N, E-1] of the rows. Returns their indices; any other difference fails.
    """
    limit = torch.logit(torch.as_tensor(threshold, dtype=torch.float32)).expand(len(z))
    different = torch.nonzero(got.exit_layers != want.exit_layers).flatten()
    for row in different.tolist():
        layer = min(int(got.exit_layers[row]), int(want.exit_layers[row]))
        distance = float((z[row, list(exit_layers).index(layer)].float() - limit[row]).abs())
        assert distance <= margin, (
            f"row {row} left at {int(got.exit_layers[row])} instead of {int(want.exit_layers[row])}, "
            f"although its logit at layer {layer} is {distance:g} from the threshold"
        )
    return different


def assert_same(got, want, rtol: float = 0.0, atol: float = 5e-6) -> None:
    """Two Classifications agree: exit layers exactly, logits and probabilities to rounding."""
    torch.testing.assert_close(got.exit_layers, want.exit_layers, rtol=0, atol=0)
    torch.testing.assert_close(got.logits, want.logits, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.probabilities, want.probabilities, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.exit_probabilities, want.exit_probabilities, rtol=rtol, atol=atol)


# -- text --------------------------------------------------------------------------------------------------------

_WORDS = (
    "how what why where when which does is are can the a to of in on for with from by my your table row column list "
    "file error value query join index select insert update delete left right inner outer group order count key type "
    "red green blue"
).split()


def tiny_tokenizer(family: str = "bert") -> PreTrainedTokenizerFast:
    """WordPiece with [CLS] A [SEP] B [SEP]; the second text has segment id 1. Its padding id is the family's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if _PAD[family] == 1:
        special[:2] = special[1::-1]
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = special + _WORDS + [x for x in letters if x not in _WORDS] + ["##" + x for x in letters[:10]] + ["?", "!"]
    vocab = {word: i for i, word in enumerate(vocab[:VOCAB_SIZE])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, vocab[t]) for t in ("[CLS]", "[SEP]")],
    )
    names = {f"{t.strip('[]').lower()}_token": t for t in special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def random_texts(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    """n texts of 1 ... ``longest`` known words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [
        " ".join(_WORDS[i] for i in torch.randint(0, len(_WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]


def save_backbone(
    folder: Path, family: str = "bert", layers: int = 3, seed: int = 0, pooler: bool = True, **overrides: Any
) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, tokenizer files."""
    model = tiny_backbone(family, layers, seed, **overrides)
    if not pooler:
        model.pooler = None
    model.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def write_task(folder: Path, rows: dict[str, int] | None = None, seed: int = 0) -> Path:
    """A task that a tiny model learns in seconds: the class is the one keyword in the text, names as in ``LABELS``.

    A tenth of the rows is harder: a second class' keyword stands behind "not".
    """
    generator = torch.Generator().manual_seed(seed)
    filler = [w for w in _WORDS if w not in LABELS and w not in ("red", "green", "blue")]

    def draw(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=generator))

    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (rows or {"train": 160, "dev": 40, "test": 40}).items():
        lines = []
        for i in range(count):
            label = i % len(LABELS)
            words = [filler[draw(len(filler))] for _ in range(3 + draw(6))]
            words.insert(draw(len(words) + 1), LABELS[label])
            if draw(10) == 0:
                words += ["red", LABELS[draw(len(LABELS))]]
            lines.append(json.dumps({"text": " ".join(words), "label": LABELS[label]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "labels.json").write_text(json.dumps(list(LABELS)))
    return folder


def profiler_event(name: str, start: float, end: float, device: str = "CPU") -> SimpleNamespace:
    """What a torch profiler says of a call of the host ("CPU"), or of what ran on the device ("CUDA")."""
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


def disturb_captures(monkeypatch) -> list[int]:
    """Of two programs on CUDA the first is captured at its third attempt, the second never: something is allocated
    meanwhile. Returns a list that grows by one with every attempt."""
    original, tries = GraphBuilder.capture, []

    def disturbed(self, stream):
        tries.append(1)
        if len(tries) in (1, 2, *range(4, 4 + capture.CAPTURES)):
            torch.empty(1 << 20, device="cuda")
        return original(self, stream)

    monkeypatch.setattr(GraphBuilder, "capture", disturbed)
    return tries
