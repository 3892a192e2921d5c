"""The ``consistentee`` command: one subcommand a job. What only some commands need is imported by them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from engine.lines import Row, read_rows

if TYPE_CHECKING:
    from engine.api import Engine
    from engine.generation import DecoderEngine
    from engine.results import Classification

# The caller's mistakes and missing files or packages: one line. Anything else is a defect and keeps its traceback.
_EXPECTED = (ValueError, TypeError, OSError, ImportError)
_BAD_INPUT = 2


class _Commands(TyperGroup):
    """Turns expected errors of every command into one line on stderr; ``--debug`` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        if "--debug" in options:
            args = ["--debug", *(a for a in options if a != "--debug"), *args[len(options) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has gone, which is no mistake
            raise
        except _EXPECTED as error:
            if ctx.params.get("debug"):
                raise
            from rich.text import Text

            message = " ".join(str(error).split()) or type(error).__name__
            Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
            raise typer.Exit(_BAD_INPUT) from None


app = typer.Typer(
    cls=_Commands,
    help="Early-exit transformers: classify, generate, evaluate, explain and train (ConsistentEE, AAAI 2024).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint folder or hub id.", show_default=False)]
Threshold = Annotated[
    float | None,
    typer.Option(help="A row leaves when its exit probability is above this, 0 to 1 (default: the checkpoint's)."),
]
MinDepth = Annotated[
    int | None, typer.Option(help="No row leaves before this layer; the number of layers removes all exits.")
]
MaxDepth = Annotated[int | None, typer.Option(help="Every row has left by this layer.")]
Executor = Annotated[str, typer.Option(help="auto (graph on CUDA, else packed), packed, reference or graph.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one, else the CPU) or any torch device.")]
Dtype = Annotated[str, typer.Option(help="auto (float16 on CUDA, else float32), or its name.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens computed together (default: 2048, on CUDA 16384).")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs of every setting; medians are shown.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Read by ``_Commands.invoke``."""


@app.command()
def run(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; without any, stdin is read.")
    ] = None,
    pair: Annotated[
        bool, typer.Option("--pair", help="Rows are pairs: two arguments each, or lines with a tab between them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row, nothing else on stdout.")] = False,
    threshold: Threshold = None,
    min_depth: MinDepth = None,
    max_depth: MaxDepth = None,
    truncation: Annotated[bool, typer.Option("--truncation", help="Shorten texts beyond the model's limit.")] = False,
    executor: Executor = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Decoders: longest continuation (default: 128).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Decoders: 0 is greedy (default).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Decoders: draw from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Decoders: draw from tokens that come to this share.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Decoders: above 1, tokens repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decoders: of the draws (default: 0).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Decoders: a string that ends it; repeat at will.")] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(help="Decoders: memory for keys, values and exit states (default: at most 1 GiB).")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Decoders: continue the text itself, no chat template.")] = False,
    show_exits: Annotated[bool, typer.Option("--show-exits", help="Decoders: colour tokens by their depth.")] = False,
) -> None:
    """Classify texts, or continue prompts with a decoder: arguments, or lines on stdin.

    Classifiers: a line is one text, or a JSON object with "text" (or "text_a" and "text_b"). Decoders: a line is a
    prompt; on a terminal, without any, a chat begins.
    """
    generation = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or None,
    }
    generation = {name: value for name, value in generation.items() if value is not None}
    limits = {"threshold": threshold, "min_depth": min_depth, "max_depth": max_depth}
    if _is_decoder(checkpoint):
        classifier = {"--pair": pair, "--truncation": truncation, "--batch-tokens": batch_tokens}
        _refuse(classifier, "classifiers, and this checkpoint is a decoder")
        lm = _load(checkpoint, executor, device, dtype, cache_bytes)
        _generate(lm, texts, {"seed": 0, **generation, **limits}, raw, as_json, show_exits)
        return
    named = {f"--{name.replace('_', '-')}": True for name in generation}
    others = {"--cache-bytes": cache_bytes is not None, "--raw": raw, "--show-exits": show_exits}
    _refuse({**named, **others}, "decoders, and this checkpoint is a classifier")
    rows = _argument_rows(texts, pair) if texts else _stdin_rows(pair)
    result = _load(checkpoint, executor, device, dtype).run(
        rows,
        threshold=threshold,
        min_depth=min_depth,
        max_depth=max_depth,
        truncation=truncation,
        batch_tokens=batch_tokens,
    )
    if as_json:
        for record in _records(result):
            print(json.dumps(record))
    elif rows:
        _show_rows(result, rows)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Labelled rows: .jsonl, .csv or .tsv (also .gz), a folder of splits, or hub:owner/name.")
    ],
    split: Annotated[str, typer.Option(help="Which file of a folder: train, dev or test.")] = "test",
    threshold: Threshold = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Sweep: one line a threshold.", show_default=False)
    ] = None,
    min_depth: MinDepth = None,
    max_depth: MaxDepth = None,
    truncation: Annotated[bool, typer.Option(help="Shorten texts beyond the model's limit, as training did.")] = True,
    executor: Executor = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    repeats: Repeats = 3,
    output: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write all figures to this JSON file.")
    ] = None,
) -> None:
    """Accuracy, depth and time on labelled rows, at full depth and with exits, from the same interleaved runs."""
    from engine.bench import report

    _check_classifier(checkpoint, "eval")
    if output is not None and output.is_dir():
        raise ValueError(f"--json must name a file to write, {output} is a folder")
    chosen = _thresholds(threshold, thresholds)
    model = _load(checkpoint, executor, device, dtype)
    examples = report.labelled_examples(data, model.config.labels, split)
    limits = {"min_depth": min_depth, "max_depth": max_depth}
    settings: dict[str, dict[str, Any]] = {report.FULL_DEPTH: report.full_depth(model)}
    for value in chosen or [model.config.threshold]:
        settings[report.threshold_name(value)] = {"threshold": value, **limits}
    points = report.measure_points(
        model,
        examples,
        settings,
        repeats=repeats,
        progress=Console(stderr=True),
        truncation=truncation,
        batch_tokens=batch_tokens,
    )
    figures = [point for point, _ in points.values()]
    _show_evaluation(figures, repeats)
    if output is not None:
        from engine.loading import write_file

        what = {"checkpoint": checkpoint, "data": data, "split": split, "rows": len(examples), **limits}
        how = {"executor": model.executor.name, "batch_tokens": batch_tokens, "timed": report.WHAT_IS_TIMED}
        record = {**what, **how, "environment": report.environment(), "points": [p.to_dict() for p in figures]}
        write_file(output, json.dumps(record, indent=1) + "\n")


@app.command()
def explain(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Argument(metavar="TEXT", show_default=False)],
    text_b: Annotated[str | None, typer.Argument(metavar="TEXT_B", help="Second text, for pairs.")] = None,
    threshold: Threshold = None,
    truncation: Annotated[bool, typer.Option("--truncation", help="Shorten a text beyond the model's limit.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """One text, layer by layer: what every exit decides and answers, and where the row leaves."""
    from engine.console import say, show_table

    _check_classifier(checkpoint, "explain")
    row: Row = text if text_b is None else (text, text_b)
    model = _load(checkpoint, "reference", device, dtype)
    result = model.run([row], threshold=threshold, truncation=truncation)
    left = int(result.exit_layers[0])
    limit = model.config.threshold if threshold is None else threshold
    lines = []
    for layer, exit_probability, label, probability in _exit_answers(model, row):
        if exit_probability is None:
            decision = ["-", "always"]
        else:
            decision = [f"{exit_probability:.4f}", "yes" if exit_probability > limit else "no"]
        lines.append(["->" if layer == left else "", str(layer), *decision, label, f"{probability:.4f}"])
    console = Console()
    header = ["", "layer", "exit probability", f"above {limit:g}", "label", "label's probability"]
    show_table(console, header, lines, left=("label", ""))
    layers = f"{left} of {model.config.num_layers} layers"
    say(console, f"{result.labels[0]}, after {layers}. Below the arrow: what deeper exits would have said.")


@app.command()
def train(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder with train, dev and maybe test, or hub:owner/name.")
    ],
    backbone: Annotated[
        str | None, typer.Option(metavar="ID", help="Encoder to train exits on: hub id or folder.")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Checkpoint folder to write.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Options to start from: a recipe's name, or a JSON file.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One option, e.g. init.epochs=3; repeat at will."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop the state of an earlier run instead of resuming it.")
    ] = False,
) -> None:
    """Train exits on a backbone, a classifier's on labelled texts or a decoder's on instructions; a run that was
    stopped goes on where it was.
    """
    from engine.train.config import TrainConfig, load_recipe, override

    options = override(load_recipe(recipe) if recipe else {}, assignments or [])
    given = {"data": data, "backbone": backbone, "output": output}
    options.update({name: value for name, value in given.items() if value is not None})
    for name in ("backbone", "output"):
        if not isinstance(options.get(name), str):
            raise ValueError(f"--{name} is missing: give it, or a recipe that names one")
    options["output"] = str(Path(options["output"]))  # "out/" would put the run's state into the checkpoint
    with _progress_log():
        from engine.train.run import discard

        if _generates(options["backbone"]):
            from engine.train.decoder_config import DecoderTrainConfig
            from engine.train.decoder_trainer import DecoderTrainer

            config, trainer, show = DecoderTrainConfig.from_dict(options), DecoderTrainer, _show_decoder_training
        else:
            from engine.train.trainer import Trainer

            config, trainer, show = TrainConfig.from_dict(options), Trainer, _show_training
        if restart:
            discard(config.output)
        record = trainer(config).run()
    show(record["result"], config.output)


@app.command()
def demo(
    checkpoint: Annotated[
        str, typer.Option(help="A checkpoint trained on the StackOverflow questions.")
    ] = "checkpoints/stackoverflow-minilm",
    output: Annotated[
        str, typer.Option(help="Where the accuracy-against-time curve goes (.png, .pdf or .svg).")
    ] = "demo.png",
    rows: Annotated[int | None, typer.Option(help="Only the first rows of the test split (default: all 1000).")] = None,
) -> None:
    """What the exits save on this machine: accuracy, depth and time on StackOverflow questions; about a minute."""
    from engine.bench.demo import run_demo

    run_demo(checkpoint, output, rows, Console(), Console(stderr=True))


@app.command()
def info(
    checkpoint: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """A checkpoint without its weights read: exits, classes, sizes, backbone, the figures of its training."""
    from engine.facts import checkpoint_facts

    facts = checkpoint_facts(checkpoint)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _show_facts(facts)


def main() -> None:
    """Entry point of the console script."""
    app()


# -- rows --------------------------------------------------------------------------------------------------------


def _is_decoder(checkpoint: str) -> bool:
    """Whether a checkpoint generates; errors as ``engine.load``."""
    from engine.config import DecoderExitConfig
    from engine.loading import read_config, resolve_checkpoint

    return isinstance(read_config(resolve_checkpoint(checkpoint))[1], DecoderExitConfig)


def _check_classifier(checkpoint: str, command: str) -> None:
    if _is_decoder(checkpoint):
        raise ValueError(f"{command} is for classifiers, and {checkpoint} is a decoder: try consistentee run")


def _refuse(options: dict[str, Any], what: str) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)}: for {what}")


def _generate(
    lm: DecoderEngine, texts: list[str] | None, options: dict[str, Any], raw: bool, as_json: bool, show_exits: bool
) -> None:
    from engine.chat import answer_prompts, chat, read_prompts

    prompts = list(texts) if texts else read_prompts()
    if prompts is not None:
        answer_prompts(lm, prompts, options, raw, as_json, show_exits)
    elif as_json:
        raise ValueError("no prompts: give them as arguments, or pipe them in, one a line")
    else:
        chat(lm, options, raw, show_exits)


def _load(checkpoint: str, executor: str, device: str, dtype: str, cache_bytes: int | None = None) -> Engine:
    import engine

    return engine.load(checkpoint, executor=executor, device=device, dtype=dtype, cache_bytes=cache_bytes)


def _argument_rows(texts: list[str], pair: bool) -> list[Row]:
    if not pair:
        return list(texts)
    if len(texts) % 2:
        raise ValueError(f"--pair takes texts two by two, got {len(texts)}")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _stdin_rows(pair: bool) -> list[Row]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("no texts: give them as arguments, or pipe them in, one a line")
    return read_rows(sys.stdin.buffer, pair)


# -- results -----------------------------------------------------------------------------------------------------


def _records(result: Classification) -> Iterator[dict[str, Any]]:
    columns = zip(
        result.labels,
        result.label_ids.tolist(),
        result.probabilities.amax(-1).tolist(),
        result.exit_layers.tolist(),
        result.exit_probabilities.tolist(),
        strict=True,
    )
    for label, label_id, probability, exit_layer, exit_probability in columns:
        yield {
            "label": label,
            "label_id": label_id,
            "probability": probability,
            "exit_layer": exit_layer,
            "exit_probability": exit_probability,
        }


def _show_rows(result: Classification, rows: list[Row]) -> None:
    from engine.console import show_table

    lines = [
        [r["label"], f"{r['probability']:.4f}", str(r["exit_layer"]), row if isinstance(row, str) else " | ".join(row)]
        for r, row in zip(_records(result), rows, strict=True)
    ]
    show_table(Console(), ["label", "probability", "exit layer", "text"], lines, left=("label", "text"))


def _thresholds(threshold: float | None, thresholds: str | None) -> list[float]:
    """The thresholds asked for, without repeats; none: the checkpoint's."""
    if thresholds is None:
        return [] if threshold is None else [threshold]
    if threshold is not None:
        raise ValueError("give either --threshold or --thresholds")
    try:
        return list(dict.fromkeys(float(part) for part in thresholds.split(",")))
    except ValueError:
        raise ValueError(f"--thresholds must be numbers with commas between them, got {thresholds!r}") from None


def _show_evaluation(points: list[Any], repeats: int) -> None:
    from engine.bench.report import WHAT_IS_TIMED, show_histogram, show_points
    from engine.console import say, show_table

    console, full = Console(), points[0]
    show_points(console, points, f"{full.rows} rows, {full.num_layers} layers")
    say(console, f"Times are for all {full.rows} rows, {WHAT_IS_TIMED}.")
    say(console, f"Every setting ran {repeats} times in turns, after a warm-up; time is the median.")
    say(console, "t_full / t: the time at full depth divided by the line's.\n")
    if len(points) == 2:
        show_histogram(console, points[1].exit_histogram, f"Where rows leave ({points[1].name})")
        return
    layers = [str(layer) for layer in full.exit_histogram]
    counts = [[p.name, *map(str, p.exit_histogram.values())] for p in points[1:]]
    show_table(console, ["layer", *layers], counts, title="Rows that leave at each layer", left=("layer",))


def _exit_answers(model: Engine, row: Row) -> Iterator[tuple[int, float | None, str, float]]:
    """(layer, exit probability or None at the last layer, label, its probability) of every exit."""
    import torch

    config = model.config
    texts = (row,) if isinstance(row, str) else row
    encoding = model.tokenizer(*texts, truncation=True, max_length=config.max_length, return_tensors="pt")
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        exits = model.model(**{name: encoding[name] for name in names if name in encoding})
    exit_probabilities = [*torch.sigmoid(exits.policy_logits[0].float()).tolist(), None]
    best = torch.softmax(exits.logits[0].float(), -1).max(-1)
    for k, layer in enumerate(config.exit_layers):
        yield layer, exit_probabilities[k], config.labels[int(best.indices[k])], float(best.values[k])


# -- training ----------------------------------------------------------------------------------------------------


@contextmanager
def _progress_log() -> Iterator[None]:
    """Training's log on stderr, above its progress bars."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    log = logging.getLogger("engine.train")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with logging_redirect_tqdm([log]):
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def _show_training(result: dict[str, Any], output: str) -> None:
    from engine.console import say

    console, splits = Console(), {name: figures for name, figures in result.items() if isinstance(figures, dict)}
    _show_figures(console, splits, f"{output}, exit threshold {result['threshold']:g}")
    say(console, f"Layers are counted here, not timed: consistentee eval {output} --data ... measures times.")


def _generates(backbone: str) -> bool:
    """Whether a backbone is a decoder's. What cannot be had is left to the trainer, who says so."""
    from engine.backbones import DECODER, BackboneReference

    try:
        return BackboneReference(backbone).model_type() == DECODER
    except (OSError, ValueError):
        return False


def _show_decoder_training(result: dict[str, Any], output: str) -> None:
    from engine.console import say, show_table

    header = ["split", "rows", "threshold", "CE, full depth", "CE, with exits", "mean depth"]
    lines = [
        [split, str(part["rows"]), at, f"{p['ce_full']:.4f}", f"{p['ce']:.4f}", f"{p['mean_depth']:.2f}"]
        for split, part in result.items()
        if isinstance(part, dict)
        for at, p in part["points"].items()
    ]
    console = Console()
    show_table(console, header, lines, title=f"{output}, nats a token", left=("split",))
    say(console, "Teacher-forced, contexts at full depth. Layers are counted here, not timed.")


def _show_token_figures(console: Console, splits: dict[str, dict[str, Any]], title: str) -> None:
    from engine.console import show_table

    header = ["split", "tokens", "CE, full depth", "CE, with exits", "mean depth"]
    lines = [
        [name, str(f["tokens"]), f"{f['ce_full']:.4f}", f"{f['ce']:.4f}", f"{f['mean_depth']:.2f}"]
        for name, f in splits.items()
    ]
    show_table(console, header, lines, title=title + ", nats a token", left=("split",))


def _show_figures(console: Console, splits: dict[str, dict[str, Any]], title: str) -> None:
    from engine.console import show_table

    header = ["split", "rows", "accuracy, full depth", "accuracy, with exits", "mean depth", "saved layers"]
    lines = [
        [
            name,
            str(figures["rows"]),
            f"{figures['accuracy_full_depth']:.4f}",
            f"{figures['accuracy']:.4f}",
            f"{figures['mean_depth']:.2f}",
            f"{100 * figures['saved_layers']:.1f} %",
        ]
        for name, figures in splits.items()
    ]
    show_table(console, header, lines, title=title, left=("split",))


# -- checkpoints -------------------------------------------------------------------------------------------------


def _show_facts(facts: dict[str, Any]) -> None:
    from engine.console import say, show_table

    console, exits, backbone = Console(), facts["early_exit"], facts["backbone"]
    source = "its own weights (safetensors)"
    if backbone is not None:
        source = f"{backbone['source']}, sha256 {backbone['sha256']}"
        source += f", revision {backbone['revision']}" if backbone["revision"] else ""
    lines = [
        ["model", f"{facts['model_type']}, {exits['num_layers']} layers, hidden size {facts['hidden_size']}"],
        ["backbone", source],
        ["exits", f"layers {', '.join(map(str, exits['exit_layers']))}"],
        ["leaves by", f"{exits['criterion']}, threshold {exits['threshold']:g}"],
        ["policy hidden size", str(exits["policy_hidden_size"])],
        ["longest row", f"{exits['max_length']} tokens"],
    ]
    if "labels" in exits:
        lines.append(["pooler", exits["pooler"]])
        lines.append([f"{len(exits['labels'])} classes", ", ".join(exits["labels"])])
    else:
        rank = f", rank {exits['head_rank']} on the {exits['head_side']}" if exits["head"] == "lora" else ""
        lines.append(["head", exits["head"] + rank])
    show_table(console, [facts["checkpoint"], ""], lines, left=(facts["checkpoint"], ""))
    say(console)
    files = [
        [name, f"{size:,}", f"{facts['parameters'][name]:,}" if name in facts["parameters"] else ""]
        for name, size in facts["bytes"].items()
    ]
    files.append(["all", f"{facts['total_bytes']:,}", ""])
    show_table(console, ["file", "bytes", "parameters"], files, left=("file",))
    if facts["figures"]:
        say(console)
        title = f"Found when it was trained, at threshold {exits['threshold']:g}"
        (_show_figures if "labels" in exits else _show_token_figures)(console, facts["figures"], title)


if __name__ == "__main__":
    main()
