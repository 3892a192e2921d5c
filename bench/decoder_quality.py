"""What exits of a decoder cost in quality: ConsistentEE's policies against CALM's measures on the same weights.

    python -m engine.bench.decoder_quality checkpoints/dolly-smollm2 --data DIR [--prompts 200] [--sampled]
    python -m engine.bench.decoder_quality checkpoints/dolly-smollm2 --data DIR --only texts --device cuda --output FILE
    python -m engine.bench.decoder_quality checkpoints/dolly-smollm2 --data DIR --only times scores --input FILE
    python -m engine.bench.decoder_quality checkpoints/dolly-smollm2 --merge FILE ...

writes ``bench/results/decoder_quality.json`` and a curve. DIR holds train and test files of instructions; policies, one
set for each price of a layer, are trained on train rows alone (kept beside the output, ``--policies``), CALM has one
point for each threshold. Between two prices ``--thresholds`` leads: below 0.5 the same policies leave sooner. Needs the
extra: pip install "consistentee[quality]".

Scores are F1 of ROUGE-L (stemmed) and BERTScore (``--scorer``), against the reference answer and against what the same
model writes at full depth, in the mean over prompts; intervals are bootstrapped over prompts (95 %).

Time is that of decoding one prompt alone, over its time at full depth: the exits that a run took are replayed as a
script in our fastest path, and a measure of CALM pays its own checks on top, timed alone. Not its own run: that would
compare the paths that serve them, not the methods. So texts may come from one machine, times from another and scores
from a third (``--only``, ``--input``); the file says of each step where it ran (``steps``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from engine.backbones import BackboneReference
from engine.bench.plots import check_path, save_figure
from engine.bench.record import RESULTS, figure, merged, same_in_all, write_result
from engine.bench.report import environment
from engine.bench.timer import interleave
from engine.decoding.criteria import measure
from engine.facts import TRAINING
from engine.generation import DecoderEngine
from engine.loading import load_model
from engine.reading import fill_module, read_tensors
from engine.train import decoder_phases
from engine.train.data import split_file
from engine.train.decoder_config import TokenPolicyOptions
from engine.train.instructions import Instruction, TokenizedInstructions, load_instructions, without

OURS, FULL = "ConsistentEE", "full depth"
SPEED_UPS = (1.5, 2.0, 3.0, 5.0)
ALPHAS = (
    0.02, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.17, 0.2, 0.24, 0.3, 0.4,
)  # fmt: skip
THRESHOLDS = {
    "softmax": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    "saturation": (0.3, 0.9, 0.95, 0.96, 0.97, 0.975, 0.98, 0.983, 0.986, 0.99),
    "classifier": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
SCORES = ("rouge_reference", "bert_reference", "rouge_full", "bert_full")
GREEDY = {"repetition_penalty": 1.2}  # the paper's code
SAMPLED = {"temperature": 1.0, "top_p": 0.75, "top_k": 40}  # the paper's text
_RESAMPLES = 2000
_SHOWN = 3  # prompts whose texts are kept
_THRESHOLD = 0.5  # of the policies, where a row says no other
STEPS = {"texts": "", "times": "exit_layers", "scores": "texts"}  # and what each finds in rows, and takes away
# Of a result file, beside its rows; each step knows some.
_ABOUT = ("decoding", "prompts", "new_tokens", "check_us", "scorer", "examples_at_2x", "steps")
# Points further apart than this factor say nothing about what lies between them.
_GAP = 1.6

Scorer = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # F1 of each pair


# -- scores --------------------------------------------------------------------------------------------------------


def rouge_l(found: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(found, wanted, strict=True)])


def bert_score(model: str, layer: int, device: str) -> Scorer:
    """model: hub id or folder; layer: whose states are compared."""
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=model, num_layers=layer, device=device)

    def score(found: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
        scores = np.zeros(len(found))  # of who says nothing
        said = [k for k, pair in enumerate(zip(found, wanted, strict=True)) if all(text.strip() for text in pair)]
        if said:
            scores[said] = scorer.score([found[k] for k in said], [wanted[k] for k in said])[2].numpy()
        return scores

    return score


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % of the means of bootstrapped prompts."""
    draws = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    return float(low), float(high)


def at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Linear interpolation of (x, y) points; None outside of them, and between two that are far from each other."""
    below, above = [p for p in points if p[0] <= x], [p for p in points if p[0] >= x]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    if high[0] > _GAP * low[0]:
        return None
    return low[1] if high[0] == low[0] else low[1] + (high[1] - low[1]) * (x - low[0]) / (high[0] - low[0])


def best_within(points: Sequence[tuple[float, float]], seconds: float) -> float | None:
    """The best score that (time, score) points can have in that time: of one that takes no longer, or interpolated to
    the next one; where that is far, its score whole, so rather too much. None where all take longer."""
    there = [score for time_, score in points if time_ <= seconds]
    if not there:
        return None
    later = [p for p in points if p[0] >= seconds]
    if later:
        between = at(points, seconds)
        there.append(min(later)[1] if between is None else between)
    return max(there)


# -- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A method at one price or threshold. policies: what the model's are replaced by."""

    method: str
    value: float
    options: Mapping[str, Any]
    policies: Mapping[str, torch.Tensor] | None = None


def settings(
    sets: Mapping[float, Mapping[str, torch.Tensor]],
    criteria: Sequence[str],
    step: int = 1,
    thresholds: Sequence[float] = (_THRESHOLD,),
) -> list[Setting]:
    """All of ours at each of ``thresholds``, and every ``step``-th threshold of each criterion."""
    ours = [
        Setting(OURS, alpha, {"criterion": "policy", "threshold": threshold}, found)
        for alpha, found in sets.items()
        for threshold in thresholds
    ]
    theirs = [
        Setting(f"CALM {name}", value, {"criterion": name, "threshold": value})
        for name in criteria
        for value in THRESHOLDS[name][::step]
    ]
    return ours + theirs


def train_policies(
    model: Any, data: TokenizedInstructions, alphas: Sequence[float], epochs: int
) -> dict[float, dict[str, torch.Tensor]]:
    """State of the policies for each price, trained side by side."""
    options = TokenPolicyOptions(epochs=epochs, learning_rate=1e-3)
    sets = decoder_phases.train_policies(model, data, options, alphas, seed=0)
    return {a: {k: v.cpu() for k, v in s.state_dict().items()} for a, s in zip(alphas, sets, strict=True)}


def store_policies(path: Path, sets: Mapping[float, Mapping[str, torch.Tensor]]) -> None:
    flat = {f"{alpha:g}/{name}": value.contiguous() for alpha, s in sets.items() for name, value in s.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, path)


def read_policies(path: Path, alphas: Sequence[float] | None = None) -> dict[float, dict]:
    """What ``store_policies`` wrote. alphas: those alone; ValueError where the file lacks one or holds other things."""
    sets: dict[float, dict] = {}
    for key, value in read_tensors(path).items():
        alpha, _, name = key.partition("/")
        try:
            sets.setdefault(float(alpha), {})[name] = value
        except ValueError:
            raise ValueError(f"{path} must hold policies, ALPHA/NAME each, got {key}: name another file") from None
    names = {f"{alpha:g}": alpha for alpha in sorted(sets)}
    asked = list(names) if alphas is None else [f"{alpha:g}" for alpha in sorted(alphas)]
    missing = [name for name in asked if name not in names]
    if missing:
        raise ValueError(
            f"{path} has policies for the alphas {', '.join(names)}, not for {', '.join(missing)}: ask for some of "
            "these, or name another file"
        )
    return {names[name]: sets[names[name]] for name in asked}


def check_seconds(lm: DecoderEngine, criteria: Sequence[str]) -> dict[str, float]:
    """Of one check of one row by itself, all parts that a measure needs."""
    model = lm.model
    size = model.language_model.config.hidden_size
    hidden, before = (torch.randn(1, size, device=model.device, dtype=model.dtype) for _ in range(2))

    def one(name: str) -> Callable[[], Any]:
        def call() -> None:
            for _ in range(10):
                measure(model, name, 0, model.final_norm(hidden), hidden, before)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        return call

    with torch.inference_mode():
        measured = interleave({name: one(name) for name in ("policy", *criteria)}, repeats=15, warmup=2)
    return {name: found.timing.median / 10 for name, found in measured.items()}


def checks(exit_layers: Sequence[int], exits: Sequence[int]) -> int:
    """How often tokens were looked at: at every exit up to the one they left through, the last one asks nobody."""
    return sum(sum(layer <= depth for layer in exits[:-1]) for depth in exit_layers[1:])


def relative_time(
    lm: DecoderEngine,
    prompts: Sequence[str],
    exit_layers: Sequence[Sequence[int]],
    rounds: int,
    check_s: float,
    sampling: Mapping,
) -> float:
    """Decoding of the prompts one by one with these exits, over that at full depth of as many tokens.

    check_s: what a check costs beyond that of the policy, which the script's path computes all the same."""
    layers, exits = lm.config.num_layers, lm.config.exit_layers
    ratios = []
    for _ in range(rounds):
        exit_s, full_s = 0.0, 0.0
        for prompt, depths in zip(prompts, exit_layers, strict=False):
            if len(depths) < 2:
                continue
            common = dict(max_new_tokens=len(depths), ignore_eos=True, progress=False, **sampling)
            full_s += lm.run([prompt], min_depth=layers, **common).stats.decode_s
            exit_s += lm.run([prompt], criterion="scripted", exit_layers=[depths], **common).stats.decode_s
            exit_s += checks(depths, exits) * check_s
        ratios.append(exit_s / full_s)
    return median(ratios)


def generated(
    lm: DecoderEngine,
    prompts: Sequence[str],
    found_settings: Sequence[Setting],
    new: int,
    sampling: Mapping[str, Any],
    timed: int,
) -> list[dict[str, Any]]:
    """A row for each setting, full depth first: how deep its tokens went, what it wrote, which ``add_scores`` asks for,
    and the exits of the first ``timed`` prompts, which ``add_times`` asks for."""
    common = dict(max_new_tokens=new, progress=False, **sampling)
    layers = lm.config.num_layers
    rows = []
    for setting in (Setting(FULL, layers, {"min_depth": layers}), *found_settings):
        started = time.perf_counter()
        if setting.policies is not None:
            with torch.no_grad():
                fill_module(lm.model.exits.policies, setting.policies, "policies")
        found = lm.run(prompts, **setting.options, **common)
        depth = found.stats.mean_depth
        row = {"method": setting.method, "value": setting.value, "mean_depth": depth, "layer_speed_up": layers / depth}
        if setting.method == OURS and setting.options["threshold"] != _THRESHOLD:
            row["threshold"] = setting.options["threshold"]
        row["exit_layers"] = found.exit_layers[:timed]
        taken = [layer for depths in found.exit_layers for layer in depths[1:]]
        row["exit_share"] = [taken.count(layer) / len(taken) for layer in lm.config.exit_layers]
        row["tokens"] = len(taken) + len(prompts)
        row["texts"] = found.texts
        rows.append(row)
        print(f"{_named(row)}  {row['tokens']} tokens  ({time.perf_counter() - started:.0f} s)", flush=True)
    return rows


def _named(row: Mapping[str, Any]) -> str:
    at_threshold = f"  at {row['threshold']:g}" if "threshold" in row else ""
    return f"{row['method']:16} {row['value']:6g}{at_threshold}  {row['layer_speed_up']:5.2f} x"


def add_scores(rows: Sequence[dict[str, Any]], references: Sequence[str], bert: Scorer) -> dict[str, Any]:
    """Scores of every row, in place of its texts. Returns what each method wrote for the first prompts near 2 x."""
    full = next(row["texts"] for row in rows if row["method"] == FULL)
    examples = []
    for row in rows:
        texts = row.pop("texts")
        values = {
            "rouge_reference": rouge_l(texts, references),
            "bert_reference": bert(texts, references),
            "rouge_full": rouge_l(texts, full),
            "bert_full": bert(texts, full),
        }
        for name in SCORES:
            row[name], row[f"{name}_95"] = float(values[name].mean()), interval(values[name])
        told = {key: row[key] for key in ("method", "value", "threshold", "layer_speed_up") if key in row}
        examples.append(told | {"texts": texts[:_SHOWN]})
        print(f"{_named(row)}  " + "  ".join(f"{name} {row[name]:.4f}" for name in SCORES), flush=True)
    return _nearest(examples)


def check_of(row: Mapping[str, Any]) -> str:
    """What decided in a row of results: the policy, or a criterion's name."""
    return "policy" if row["method"] == OURS else row["method"].removeprefix("CALM ")


def add_times(
    lm: DecoderEngine,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    rounds: int,
    check_s: Mapping[str, float],
    sampling: Mapping,
) -> None:
    """relative_time of every row, in place of its exits."""
    for row in rows:
        taken = row.pop("exit_layers")
        if row["method"] == FULL:
            row["relative_time"] = 1.0
            continue
        beyond = check_s[check_of(row)] - check_s["policy"]
        row["relative_time"] = relative_time(lm, prompts, taken, rounds, beyond, sampling)
        print(f"{_named(row)}  time {row['relative_time']:.3f}", flush=True)


# -- what it comes to ----------------------------------------------------------------------------------------------


def figures(rows: Sequence[Mapping[str, Any]], decoding: str) -> list[dict[str, Any]]:
    """At each layer speed-up of ours, every score less that of the best measure of CALM in the same time.

    Ours lies between its two points that are nearest in speed-up, whatever their thresholds, and is not given the best
    of several as CALM is. Without rows of CALM there is no bar: nothing was compared."""
    ours = [r for r in rows if r["method"] == OURS]
    methods = sorted({r["method"] for r in rows} - {OURS, FULL})
    out = []
    for speed_up in SPEED_UPS:
        seconds = at([(r["layer_speed_up"], r["relative_time"]) for r in ours], speed_up)
        for score in SCORES:
            mine = at([(r["layer_speed_up"], r[score]) for r in ours], speed_up)
            theirs = {
                m: None if seconds is None else best_within(
                    [(r["relative_time"], r[score]) for r in rows if r["method"] == m], seconds
                )
                for m in methods
            }  # fmt: skip
            there = {m: value for m, value in theirs.items() if value is not None}
            best = max(there, key=there.get) if there else None
            value = mine - there[best] if mine is not None and best is not None else None
            bar = ">= 0" if speed_up >= 2 and methods else "-"
            # Who cannot be as fast at any threshold has no point there; ours then stands alone.
            met = bar == "-" or (mine is not None and (best is None or value >= 0))
            name = f"{decoding}: {score} at {speed_up:g} x, ConsistentEE less the best of CALM in the same time"
            out.append(figure(name, value, "F1", bar, met, ours=mine, relative_time=seconds, theirs=theirs, best=best))
    return out


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Scores against relative time, a panel each; a band is the interval over prompts. What takes longer than full
    depth by more than a fifth is left out of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(drawn)
    kinds = {"rouge": "ROUGE-L F1", "bert": "BERTScore F1"}
    against = {"reference": "references", "full": "full depth"}
    titles = {f"{k}_{a}": f"{kind} against {what}" for k, kind in kinds.items() for a, what in against.items()}
    for axes, score in zip(drawn.subplots(2, 2).flat, SCORES, strict=True):
        for method in sorted({r["method"] for r in rows} - {FULL}, key=lambda m: (m != OURS, m)):
            own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["relative_time"])
            times = [r["relative_time"] for r in own]
            (line,) = axes.plot(times, [r[score] for r in own], marker="o", markersize=4, label=method)
            bounds = zip(*(r[f"{score}_95"] for r in own), strict=True)
            axes.fill_between(times, *bounds, alpha=0.12, color=line.get_color(), linewidth=0)
        axes.axhline(next(r[score] for r in rows if r["method"] == FULL), color="0.5", linewidth=0.8, linestyle="--")
        axes.set_title(titles[score], fontsize="medium")
        axes.set_xlim(right=min(axes.get_xlim()[1], 1.2))
        axes.set_xlabel("decoding time of one prompt, full depth = 1")
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    drawn.suptitle(title)
    save_figure(drawn, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="folder with train and test instructions")
    parser.add_argument("--prompts", type=int, default=200, help="the first of the test rows whose prompt fits")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256, help="of training rows, and of test prompts")
    parser.add_argument("--alphas", nargs="+", type=float, help="default: those in the file of policies, or ALPHAS")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[_THRESHOLD], help="of the policies")
    parser.add_argument("--coarse", action="store_true", help="every second threshold of CALM's measures alone")
    parser.add_argument("--criteria", nargs="*", choices=THRESHOLDS, default=list(THRESHOLDS), help="of CALM")
    parser.add_argument("--epochs", type=int, default=2, help="of the policies")
    parser.add_argument("--train-rows", type=int, help="the first train rows alone are the policies'; default: all")
    parser.add_argument("--policies", type=Path, help="file to keep them in; default: beside the output")
    parser.add_argument("--sampled", action="store_true", help="the paper's sampling instead of greedy decoding")
    parser.add_argument("--scorer", default="sentence-transformers/all-MiniLM-L6-v2", help="BERTScore's model")
    parser.add_argument("--scorer-layer", type=int, default=6)
    parser.add_argument("--timed", type=int, default=20, help="prompts whose decoding is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps to run")
    parser.add_argument("--input", type=Path, metavar="FILE", help="what the steps before have written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="combine results; nothing is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_quality.json")
    parser.add_argument("--plot", type=Path, help="default: the output's name as a PNG")
    o = parser.parse_args(arguments)
    drawing = o.output.with_suffix(".png") if o.plot is None else o.plot
    check_path(drawing)
    if o.merge is not None:
        merge(o.merge, o.output, drawing, o.checkpoint.name)
        return
    wrong = [value for value in o.thresholds if not 0 <= value <= 1]
    if wrong:
        parser.error(f"--thresholds must lie between 0 and 1, got {', '.join(f'{value:g}' for value in wrong)}")
    if o.data is None:
        parser.error("--data is missing: a folder with train and test instructions")
    parts = {}
    for split in ("train", "test"):
        file = split_file(o.data, split)
        if file is None:
            parser.error(f"{o.data} has no {split} file")
        parts[split] = load_instructions(file)
    sampling, decoding = (SAMPLED, "sampled") if o.sampled else (GREEDY, "greedy")
    if ("texts" in o.only) == (o.input is not None):
        parser.error("--input belongs to --only times and scores, which go on with what another run wrote")
    model, tokenizer = load_model(o.checkpoint)
    lm = DecoderEngine(model.to(o.device), tokenizer)  # not private: policies are exchanged in place
    # Longer prompts than the model was trained on say nothing of its exits.
    tests = [row for row in parts["test"] if len(tokenizer.encode(row.prompt)) <= o.max_length][: o.prompts]
    prompts = [row.prompt for row in tests]
    if "scores" in o.only:  # a scorer that is not there is found before the work
        folder, scorer = _scorer(o.scorer)
        bert = bert_score(folder, o.scorer_layer, o.device)
    about: dict[str, Any] = {"decoding": {"name": decoding, **sampling}, "prompts": len(tests)}
    steps: dict[str, Any] = {}
    if o.input is None:
        rows = generated(lm, prompts, _settings(parser, o, lm, parts), o.new_tokens, sampling, o.timed)
        about["new_tokens"] = o.new_tokens
        steps["texts"] = environment()
    else:
        rows, known = _continued(parser, o, about)
        about |= known
        steps |= about.pop("steps")
    if "times" in o.only:
        checked = check_seconds(lm, sorted({check_of(row) for row in rows if row["method"] not in (OURS, FULL)}))
        add_times(lm, rows, prompts, o.rounds, checked, sampling)
        about["check_us"] = {name: 1e6 * s for name, s in checked.items()}
        steps["times"] = environment()
    if "scores" in o.only:
        shown = add_scores(rows, [row.output for row in tests], bert)
        about["scorer"] = {"rouge": "rouge-score, ROUGE-L F1, stemmed", "bert": scorer, "layer": o.scorer_layer}
        about["examples_at_2x"] = {"prompts": [row.instruction for row in tests[:_SHOWN]], **shown}
        steps["scores"] = environment()
    done = set(steps) == set(STEPS)
    if done:
        plot(rows, drawing, _title(o.checkpoint.name, len(tests), decoding))
    write_result(o.output, figures(rows, decoding) if done else [], rows, **about, steps=steps)


def _continued(
    parser: argparse.ArgumentParser, o: argparse.Namespace, asked: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ``--input``, and what that file says beside them. An error where it is another run's, or lacks a step."""
    result = json.loads(o.input.read_text())
    for key, value in asked.items():
        if result[key] != value:
            parser.error(f"{o.input} has {key} {result[key]}, asked for are {value}: give the options of its run")
    for needed in (STEPS[step] for step in o.only):
        if any(needed not in row for row in result["rows"]):
            parser.error(f"{o.input} has rows without {needed}, which is used up: name what --only texts has written")
    return result["rows"], {key: result[key] for key in _ABOUT if key in result}


def _settings(
    parser: argparse.ArgumentParser, o: argparse.Namespace, lm: DecoderEngine, parts: Mapping[str, list[Instruction]]
) -> list[Setting]:
    """All that is compared; policies are trained where none are kept, on such tokens as the checkpoint's were."""
    kept = o.policies or o.output.with_suffix(".policies.safetensors")
    sets = None
    if kept.exists():
        try:
            sets = read_policies(kept, o.alphas)
        except ValueError as error:
            parser.error(str(error))
    if "classifier" in o.criteria and not lm.config.early_exit_classifier:
        parser.error("the checkpoint has no early-exit classifier: leave that criterion out")
    if sets is None:
        record = o.checkpoint / TRAINING
        answers_only = json.loads(record.read_text())["config"]["answers_only"] if record.exists() else False
        training = without(parts["train"], parts["test"])[: o.train_rows]
        data = TokenizedInstructions.from_instructions(training, lm.tokenizer, o.max_length, answers_only)
        sets = train_policies(lm.model, data, o.alphas or ALPHAS, o.epochs)
        store_policies(kept, sets)
    return settings(sets, o.criteria, 2 if o.coarse else 1, o.thresholds)


def merge(files: Sequence[Path], output: Path, drawing: Path, name: str) -> None:
    """Rows of all files, and the figures that follow from them. ValueError where they were not asked the same."""
    found = [json.loads(file.read_text()) for file in files]
    for file, one in zip(files, found, strict=True):
        left = [step for step, needed in STEPS.items() if any(needed in row for row in one["rows"])]
        if left:
            raise ValueError(f"{file} is not finished: run --only {' '.join(left)} --input {file} first")
    same = same_in_all(found, ("decoding", "scorer", "prompts", "new_tokens"))
    rows, about = merged(files, ("method", "value", "threshold"))
    decoding = same["decoding"]["name"]
    shown = [one["examples_at_2x"] for one in found]
    examples = [value for one in shown for key, value in one.items() if key != "prompts"]
    plot(rows, drawing, _title(name, same["prompts"], decoding))
    checks = {key: value for one in found for key, value in one["check_us"].items()}
    write_result(output, figures(rows, decoding), rows, **about, **same, check_us=checks,
                 examples_at_2x={"prompts": shown[0]["prompts"], **_nearest(examples)},
                 steps=[one["steps"] for one in found])  # fmt: skip


def _title(name: str, prompts: int, decoding: str) -> str:
    return f"{name}, {prompts} prompts, {decoding}"


def _nearest(examples: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of each method what it wrote nearest to a layer speed-up of 2."""
    nearest: dict[str, Mapping[str, Any]] = {}
    for example in examples:
        best = nearest.get(example["method"])
        if best is None or abs(example["layer_speed_up"] - 2) < abs(best["layer_speed_up"] - 2):
            nearest[example["method"]] = example
    return nearest


def _scorer(model: str) -> tuple[str, str]:
    """Where the scorer's weights are (a package may carry them), and its name in results: a hub id, or the name of a
    folder with the hash of its weights, for where it lies says nothing elsewhere."""
    folder, sha256 = BackboneReference(model).found()
    given = Path(model).expanduser().is_dir()
    return str(folder), f"{folder.resolve().name} (sha256 {sha256})" if given else model


if __name__ == "__main__":
    main()
