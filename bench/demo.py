"""What exits do for a trained checkpoint: StackOverflow questions, with and without them, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import engine
from engine.api import Engine
from engine.bench import plots
from engine.bench.report import (
    FULL_DEPTH,
    WHAT_IS_TIMED,
    Point,
    environment,
    full_depth,
    labelled_examples,
    measure_points,
    show_histogram,
    show_points,
    threshold_name,
)
from engine.bench.timer import format_seconds
from engine.console import printable, say
from engine.results import Classification
from engine.train.data import Examples

DATA = Path(__file__).parent / "data" / "stackoverflow"
CHECKPOINT = "checkpoints/stackoverflow-minilm"
THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
REPEATS = 3
EXAMPLES = 5


@dataclass(frozen=True)
class Demo:
    """full: exits removed; chosen: the checkpoint's threshold; curve: every threshold, ascending."""

    full: Point
    chosen: Point
    curve: tuple[Point, ...]
    result: Classification


def run_demo(checkpoint: str, output: str, rows: int | None, console: Console, progress: Console) -> Demo:
    """Measure, print to ``console``, write the curve to ``output``; a progress bar goes to ``progress``."""
    plots.check_path(output)
    model = engine.load(find_checkpoint(checkpoint))
    examples = demo_rows(model, rows)
    demo = measure(model, examples, progress)
    show(demo, examples, checkpoint, console)
    curves = {FULL_DEPTH: [demo.full], "exits, by threshold": demo.curve}
    title = f"StackOverflow questions, {Path(checkpoint).name}"
    subtitle = f"{model.config.num_layers} layers, tokenisation included, {torch.get_num_threads()} threads"
    plots.plot_accuracy_time(curves, output, title=title, subtitle=subtitle)
    say(console, f"\nAccuracy against time over {len(demo.curve)} thresholds: {output}")
    return demo


def find_checkpoint(checkpoint: str) -> str:
    """The folder named, also where it stands beside the package and the command was started elsewhere."""
    beside = Path(engine.__file__).resolve().parent.parent / checkpoint
    if not Path(checkpoint).exists() and beside.is_dir():
        return str(beside)
    if checkpoint == CHECKPOINT and not Path(checkpoint).exists():
        # Not left to the loader, which would take this for a hub id.
        raise FileNotFoundError(
            f"{CHECKPOINT} is not here: run the demo in a checkout of the repository, or give --checkpoint"
        )
    return checkpoint


def demo_rows(model: Engine, rows: int | None) -> Examples:
    """The first ``rows`` of the StackOverflow test split (default: all)."""
    examples = labelled_examples(DATA, model.config.labels, "test")
    if rows is None:
        return examples
    if not 1 <= rows <= len(examples):
        raise ValueError(f"rows must lie between 1 and {len(examples)}, the size of the test split, got {rows}")
    return examples.select(torch.arange(rows))


def measure(model: Engine, examples: Examples, progress: Console) -> Demo:
    """Full depth and every threshold, all in one interleaved measurement."""
    thresholds = sorted({*THRESHOLDS, model.config.threshold})
    settings = {FULL_DEPTH: full_depth(model), **{threshold_name(t): {"threshold": t} for t in thresholds}}
    points = measure_points(model, examples, settings, repeats=REPEATS, progress=progress, truncation=True)
    chosen, result = points[threshold_name(model.config.threshold)]
    curve = tuple(points[threshold_name(t)][0] for t in thresholds)
    return Demo(points[FULL_DEPTH][0], chosen, curve, result)


# -- showing -----------------------------------------------------------------------------------------------------


def show(demo: Demo, examples: Examples, checkpoint: str, console: Console) -> None:
    full, chosen, machine = demo.full, demo.chosen, environment()
    t_full, t_exit = full.timing.median, chosen.timing.median
    say(console, f"{checkpoint}: {full.num_layers} layers, {len(examples.labels)} classes")
    say(console, f"{full.rows} questions of the StackOverflow test split")
    say(console, f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']}")
    say(console, f"Times are for all {full.rows} rows, {WHAT_IS_TIMED}.")
    say(console, f"Every setting ran {REPEATS} times in turns, after a warm-up; medians.\n")
    say(console, f"accuracy         {full.accuracy:.4f} at full depth, {chosen.accuracy:.4f} with exits")
    say(console, f"mean depth       {full.mean_depth:.2f} at full depth, {chosen.mean_depth:.2f} with exits")
    say(console, f"saved layers     {100 * chosen.saved_layers:.1f} %")
    say(console, f"wall time        t_full {format_seconds(t_full)}, t_exit {format_seconds(t_exit)}")
    say(console, f"t_full / t_exit  {t_full / t_exit:.2f}\n")
    show_histogram(console, chosen.exit_histogram, f"Where rows leave ({chosen.name})")
    say(console, "\nThe first rows of the split that left at these layers:")
    for row in example_rows(demo.result.exit_layers.tolist()):
        _show_example(console, demo.result, examples, row)
    say(console)
    show_points(console, [full, *demo.curve], f"Accuracy against time ({full.rows} rows, {full.num_layers} layers)")


def example_rows(exit_layers: list[int], count: int = EXAMPLES) -> list[int]:
    """Rows to show, early, middle and late: layers spread evenly over those where rows left, the first row of each.

    Nothing is picked by outcome, so wrong answers show up as they come. Where fewer layers than ``count`` were used,
    the second rows of layers follow.
    """
    by_layer: dict[int, list[int]] = {}
    for row, layer in enumerate(exit_layers):
        by_layer.setdefault(layer, []).append(row)
    layers = sorted(by_layer)
    last = len(layers) - 1
    wanted = [layers[round(k * last / max(count - 1, 1))] for k in range(min(count, len(exit_layers)))]
    taken: list[int] = []
    for layer in wanted:
        left = [row for row in by_layer[layer] if row not in taken]
        taken.append(left[0] if left else next(row for row in range(len(exit_layers)) if row not in taken))
    return sorted(taken, key=lambda row: (exit_layers[row], row))


def _show_example(console: Console, result: Classification, examples: Examples, row: int) -> None:
    gold, predicted = examples.labels[examples.label_ids[row]], result.labels[row]
    text = examples.texts[row]
    probability = float(result.exit_probabilities[row])
    verdict = "right" if gold == predicted else "wrong"
    say(console, f"  layer {int(result.exit_layers[row])}, exit probability {probability:.2f}: {printable(str(text))}")
    say(console, f"      gold {gold}, predicted {predicted} ({verdict})")
