"""Encoder on a CUDA device: full depth against other engines, what exits cost and save, waits, time to be ready.

    python -m engine.bench.encoder_h100 --output full.json --only full --batches 1 8
    python -m engine.bench.encoder_h100 --merge full.json exits.json ... --output bench/results/encoder_h100.json \
        --kernels bench/results/kernels_h100.json

Parts: full (sequence 128, no padding), mixes (real lengths), exits (removed, nobody leaves, half of the depth), minilm
and mpnet (the same as full and exits, real weights), capture (load + capture), sync (what waits inside a pass), profile
(where a pass's time goes: ``encoder_profile``). fp16, in inference mode, BERT-base with random weights unless the part
says otherwise.

Two clocks. ``device``: CUDA events around several calls whose inputs are on the device. ``host``: wall clock from
padded ids on the host to logits on the host; ours reads, checks and packs the rows, and returns exit layers too. Of
real lengths, batches of other lengths and numbers of tokens take turns there, too many to be remembered.
All competitors of a shape are interleaved in rounds; ``over_ours`` is the median over the rounds of their time over
ours.

"Exits removed" (min_depth = number of layers) is our fastest full-depth path: the last layer computes first tokens only
behind keys and values. A competitor that raises, or whose logits differ from Hugging Face eager by more than 2 % of the
largest, is recorded with its reason and no times. Compiling takes most of the time: choose parts, batches and
competitors to split a run; rows are written after every shape, and --merge computes the figures from several files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backbones import BackboneReference
from engine.bench import encoder_competitors as peers
from engine.bench.encoder_competitors import Batch, Competitor, random_batch, varied_batch
from engine.bench.encoder_figures import MIXES, OURS, figures, merged, plot_times, show_rows
from engine.bench.encoder_profile import profile_rows, table
from engine.bench.encoder_session import (
    HUB_IDS,
    Clocks,
    Session,
    Subject,
    check_served,
    decide_half_depth,
    half_depth,
    make_engine,
    make_module,
    measure,
    ours,
    prepared,
    run_ours,
    spread_exits,
    subject,
    work_of,
)
from engine.bench.plots import check_path
from engine.bench.record import RESULTS, write_result
from engine.bench.report import calls_inside, may_wait
from engine.criteria import make_criterion
from engine.executors.graph import capacity_for

PARTS = ("full", "mixes", "exits", "minilm", "mpnet", "capture", "sync", "profile")
LENGTHS = Path(__file__).resolve().parent / "lengths.json"
OTHERS = 65  # batches that take turns in a mix: more sizes than our engine remembers the way of
TOLERANCE = 2e-2  # of the largest logit, in fp16, from Hugging Face eager


# -- parts ---------------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; infinite where something is not a number."""
    value = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return value if value == value else float("inf")


def _checked(competitor: Competitor, batch: Batch, expected: Tensor) -> float:
    found = difference(competitor.from_host(batch).cpu(), expected)
    if not found <= TOLERANCE:
        raise RuntimeError(f"logits differ from Hugging Face eager by {found:.3g} of the largest, allowed {TOLERANCE}")
    return found


def full_depth_rows(session: Session, subject: Subject, batch: Batch, where: Mapping[str, Any]) -> Rows:
    """Ours with exits removed, and every full-depth competitor that was asked for."""
    module, rows, ready, differences = subject.module, [], {}, {}
    expected = peers.padded(module, batch, None).from_host(batch)

    def attempt(name: str, make: Callable[[], Competitor]) -> None:
        try:
            made = make()
            differences[name] = _checked(made, batch, expected)
            made.on_device()
            session.synchronise()
            ready[name] = made
        except peers.LeftOutError as reason:
            rows.append({**where, "competitor": name, "setting": "full depth", "left_out": str(reason)})
        except Exception as error:  # who fails is a finding, not the end of the run
            rows.append({**where, "competitor": name, "setting": "full depth", "error": peers.one_line(error)})
            print(f"{where['part']} {name}: {peers.one_line(error)}", flush=True)

    attempt(OURS, lambda: ours(subject.engine, batch, [{"min_depth": subject.layers}]))
    for name in (name for name in peers.FULL_DEPTH if name in session.competitors):
        if session.too_late_for(name):
            print(f"{where['part']}, {where['batch']} rows: no time left to compile {name}", flush=True)
            continue
        attempt(name, lambda name=name: peers.build(name, module, batch))
        if name in ready and name in session.ready_s:
            session.ready_s[name] = ready[name].ready_s
    found = measure(session, ready, batch) if ready else {}
    for name, clocks in found.items():
        row = {**where, "competitor": name, "setting": "full depth", **clocks.to_dict()}
        row |= {"difference": differences[name], "ready_s": ready[name].ready_s}
        if name == OURS:
            row |= work_of(subject, batch.lengths, clocks.device.median)
        else:
            row |= {"note": ready[name].note} | ({"over_ours": clocks.over(found[OURS])} if OURS in found else {})
        rows.append(row)
    ready.clear()
    session.clean()
    return rows


def half_depth_cases(scripts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    return [{"criterion": "scripted", "exit_layers": list(script)} for script in scripts]


def exit_rows(session: Session, subject: Subject, batch: Batch, where: Mapping[str, Any]) -> Rows:
    """Exits removed, exits that never fire, and half of the depth: by a script, ours and the naive early exit's, and as
    policies decide."""
    layers, scripts = subject.layers, half_depth(len(batch.lengths), subject.layers)
    where = {**where, "setting": "exits"}
    try:
        entries = {
            "removed": ours(subject.engine, batch, [{"min_depth": layers}]),
            "nobody": ours(subject.engine, batch, [{"threshold": 1.0}]),
            "half": ours(subject.engine, batch, half_depth_cases(scripts)),
        }
    except Exception as error:
        print(f"{where['part']} {OURS}: {peers.one_line(error)}", flush=True)
        return [{**where, "competitor": OURS, "error": peers.one_line(error)}]
    depths: list[float] = []
    try:
        decided = decide_half_depth(subject, batch)
        entries["decided"] = ours(subject.engine, batch, decided, checked=False)
        depths = [run_ours(subject.engine, batch, case).exit_layers.float().mean().item() for case in decided]
    except Exception as error:  # the others have their times all the same
        print(f"{where['part']} {OURS}, policies: {peers.one_line(error)}", flush=True)
    if peers.NAIVE in session.competitors:
        entries[peers.NAIVE] = peers.naive(subject.module, batch, scripts)
    found = measure(session, entries, batch)
    mean_depth = sum(map(sum, scripts)) / sum(map(len, scripts))
    speedup = found["removed"].over(found["half"])
    row = {**where, "competitor": OURS, "mean_depth": mean_depth, "layers": layers}
    row |= {name: found[name].to_dict() for name in ("removed", "nobody", "half", "decided") if name in found}
    if depths:
        depth = sum(depths) / len(depths)
        ratios = found["removed"].over(found["decided"])
        row["decided_depth"] = depth
        row["decided_realised"] = {clock: ratio / (layers / depth) for clock, ratio in ratios.items()}
    row |= {"nobody_over_removed": found["nobody"].over(found["removed"])}
    row |= {"realised": {clock: value / (layers / mean_depth) for clock, value in speedup.items()}}
    return [row, *_naive_row(where, found, entries, mean_depth)]


def _naive_row(
    where: Mapping[str, Any], found: Mapping[str, Clocks], entries: Mapping[str, Competitor], mean_depth: float
) -> Rows:
    """over_ours: over our half-depth time."""
    if peers.NAIVE not in found:
        return []
    row = {**where, "competitor": peers.NAIVE, "setting": "half depth", **found[peers.NAIVE].to_dict()}
    over = found[peers.NAIVE].over(found["half"])
    return [row | {"over_ours": over, "mean_depth": mean_depth, "note": entries[peers.NAIVE].note}]


def mix_rows(session: Session, subject: Subject, batch: Batch, where: Mapping[str, Any]) -> Rows:
    """Full depth as ever; then half of the depth, ours against the naive early exit."""
    rows = full_depth_rows(session, subject, batch, where)
    script = spread_exits(len(batch.lengths), subject.layers)
    try:
        entries = {"half": ours(subject.engine, batch, half_depth_cases([script]))}
    except Exception as error:
        return [*rows, {**where, "competitor": OURS, "setting": "half depth", "error": peers.one_line(error)}]
    if peers.NAIVE in session.competitors:
        entries[peers.NAIVE] = peers.naive(subject.module, batch, [script])
    found, mean_depth = measure(session, entries, batch), sum(script) / len(script)
    half = {**where, "competitor": OURS, "setting": "half depth", **found["half"].to_dict(), "mean_depth": mean_depth}
    return [*rows, half, *_naive_row(where, found, entries, mean_depth)]


def _where(session: Session, part: str, subject: Subject, batch: Batch, mix: str | None = None) -> dict[str, Any]:
    return {
        "part": part,
        "model": subject.name,
        "mix": mix,
        "batch": len(batch.lengths),
        "longest": max(batch.lengths),
        "tokens": sum(batch.lengths),
        "padded_tokens": batch.input_ids.numel(),
        "gpu": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else None,
    }


def uniform_part(session: Session, parts: Sequence[str], model: str, batches: Sequence[int]) -> Iterator[Rows]:
    """Some of full, exits and profile, on rows of one length."""
    measured = {"full": full_depth_rows, "exits": exit_rows, "profile": profile_rows}
    one = subject(session, model)
    for rows in batches:
        batch = random_batch(one.module, [session.sequence] * rows)
        for part in parts:
            yield measured[part](session, one, batch, _where(session, part, one, batch))


def mix_lengths(lengths: Sequence[int], padded_tokens: int) -> list[int]:
    """The first rows, as many as make a batch of that many tokens when padded to their longest."""
    longest = 0
    for rows, length in enumerate(lengths, 1):
        longest = max(longest, length)
        if rows * longest >= padded_tokens:
            return list(lengths[:rows])
    raise ValueError(f"{len(lengths)} rows of at most {longest} tokens make no batch of {padded_tokens} padded tokens")


def mixes_part(session: Session) -> Iterator[Rows]:
    one = subject(session, "bert-base")
    found = json.loads(LENGTHS.read_text())
    for mix in session.mixes:
        lengths = mix_lengths(found[mix], 200 if session.tiny else 4000)
        batch = varied_batch(one.module, lengths, 8, 8 if session.tiny else OTHERS)
        yield mix_rows(session, one, batch, _where(session, "mixes", one, batch, mix))


def sync_part(session: Session) -> Iterator[Rows]:
    """One pass under a profiler: graph launches, and calls that wait, up to the wait for its results."""
    one = subject(session, "bert-base")
    batch = random_batch(one.module, [session.sequence] * 8)
    row = {**_where(session, "sync", one, batch), "competitor": OURS, "setting": "policy"}
    if session.device.type != "cuda":
        yield [row | {"left_out": f"needs a CUDA device, the model is on {session.device}"}]
        return
    case = {"threshold": 0.5}
    run_ours(one.engine, batch, case)
    check_served(one.engine)
    call = prepared(one.engine, batch, case)
    one.engine.executor.submit(*call)()
    session.synchronise()
    torch.cuda.set_sync_debug_mode("error")
    try:
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
            with torch.profiler.record_function("start a pass"):
                wait = one.engine.executor.submit(*call)
            with torch.profiler.record_function("wait for results"):
                wait()
        run_ours(one.engine, batch, case)
    except RuntimeError as error:
        yield [row | {"error": peers.one_line(error)}]
        return
    finally:
        torch.cuda.set_sync_debug_mode("default")
    events = list(profile.events())
    started, waited = calls_inside(events, "start a pass"), calls_inside(events, "wait for results")
    yield [
        row
        | {
            "graph_launches": started.count("cudaGraphLaunch"),
            "synchronisations": sum(map(may_wait, started)),
            "waits_for_results": sum(map(may_wait, waited)),
            "sync_debug_mode": "passed",
        }
    ]


def capture_part(session: Session) -> Iterator[Rows]:
    """Load + capture in a fresh process, twice: with an empty Triton cache, and with the one that left."""
    arguments = [sys.executable, "-m", "engine.bench.encoder_h100", "--capture-child", "--device", session.device.type]
    where = {"part": "capture", "model": ("tiny-" if session.tiny else "") + "bert-base", "competitor": OURS}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            environment = {**os.environ, "TRITON_CACHE_DIR": folder}
            call = [*arguments, *(["--tiny"] if session.tiny else [])]
            done = subprocess.run(call, env=environment, capture_output=True, text=True)
            row = {**where, "setting": f"{cache} cache"}
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                yield [row | {"error": reason[:300]}]
                return
            yield [row | json.loads(done.stdout.strip().splitlines()[-1])]


def load_and_capture(session: Session) -> dict[str, Any]:
    """Seconds from a module on the device to an engine with the programs of 1 to 128 rows at the sequence length."""
    module = make_module(session, "bert-base")
    session.synchronise()
    started = time.perf_counter()
    made = make_engine(module)
    n, most = session.sequence, 8 if session.tiny else 128
    ladder = sorted({capacity_for(rows, rows * n, n, module.config.max_length).rows for rows in range(1, most + 1)})
    criterion = make_criterion(module.config.criterion)
    for rows in ladder:
        options = made._options_reader.options(module.config, rows, criterion, None, None, None, None)
        made.executor.warmup(rows, rows * n, n, options)
    session.synchronise()
    seconds = time.perf_counter() - started
    check_served(made)
    return {"seconds": seconds, "rows_served": ladder, "longest": n}


def run_part(session: Session, part: str) -> Iterator[Rows]:
    """Rows of one part, after every shape."""
    if part in ("full", "exits", "profile"):
        return uniform_part(session, [part], "bert-base", session.batches)
    if part in ("minilm", "mpnet"):
        return uniform_part(session, ["full", "exits"], part, [b for b in session.batches if b <= 128])
    return {"mixes": mixes_part, "sync": sync_part, "capture": capture_part}[part](session)


# -- lengths -------------------------------------------------------------------------------------------------------


def write_lengths(data: Path, path: Path = LENGTHS, rows: int = 512) -> None:
    """Token counts, special tokens included, of the first rows of every mix's dev split (BERT's uncased WordPiece).

    data  a folder with one folder a data set
    """
    from transformers import AutoTokenizer

    from engine.train.data import load_examples, split_file

    tokenizer = AutoTokenizer.from_pretrained(BackboneReference(HUB_IDS["minilm"]).resolve())
    lines = []
    for mix in MIXES:
        file = split_file(data / mix, "dev") or split_file(data / mix, "test")
        if file is None:
            raise ValueError(f"{data / mix} must hold a dev or test file, it holds neither")
        texts = load_examples(file).texts[:rows]
        encoded = tokenizer([list(t) if isinstance(t, tuple) else t for t in texts], truncation=True, max_length=512)
        lines.append(f" {json.dumps(mix)}: {json.dumps([len(ids) for ids in encoded['input_ids']])}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# -- the command ---------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoder_h100.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--batches", nargs="+", type=int, help="rows a batch, where a part has them; 1 8 32 128 512")
    parser.add_argument("--competitors", nargs="+", choices=peers.TITLES, default=list(peers.TITLES))
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES), help="data sets of that part")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each competitor, by each clock")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing more is compiled")
    parser.add_argument("--minilm-folder", type=Path, help=f"Hugging Face folder; default: {HUB_IDS['minilm']}")
    parser.add_argument("--mpnet-folder", type=Path, help=f"Hugging Face folder; default: {HUB_IDS['mpnet']}")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="combine results; nothing is measured")
    parser.add_argument("--kernels", type=Path, help="result file of kernels_h100 whose figures to add")
    parser.add_argument("--plot", type=Path, help="also draw time against batch, e.g. as a PNG")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and shapes, to try the script")
    parser.add_argument("--write-lengths", type=Path, metavar="DATA", help=f"write {LENGTHS.name} from these data sets")
    parser.add_argument("--capture-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.batches = options.batches or ([1, 8] if options.tiny else [1, 8, 32, 128, 512])
    if min(options.batches) < 1 or options.rounds < 1 or options.budget <= 0:
        parser.error(
            f"batches and rounds must be at least 1 and budget above 0, got {options.batches}, {options.rounds} and "
            f"{options.budget:g}"
        )
    if options.kernels is not None and options.merge is None:
        parser.error("--kernels adds figures to merged results: give --merge, too")
    measures = options.merge is None and options.write_lengths is None
    if measures and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu --tiny tries the script")
    if options.plot is not None:
        try:
            check_path(options.plot)
        except (ValueError, ImportError) as error:
            parser.error(str(error))
    return options


def run(options: argparse.Namespace) -> Rows:
    """Measure the parts that were asked for, writing the result file after every shape."""
    session = make_session(options)
    rows: Rows = []
    with torch.inference_mode():
        for part in options.only:
            try:
                for found in run_part(session, part):
                    rows += found
                    seconds = time.perf_counter() - session.started
                    with contextlib.redirect_stdout(io.StringIO()):  # the table of figures is for the end
                        write_result(options.output, figures(rows), rows, rounds=options.rounds, seconds=seconds)
                    print(f"{part}: {len(found)} rows, {seconds:.0f} s so far", flush=True)
            except OSError as error:  # weights that are not here
                print(f"{part} is left out: {error}", flush=True)
            except Exception:  # what this part had measured is written, the others may still work
                print(f"{part} failed:\n{traceback.format_exc()}", flush=True)
            session.clean()
    seconds = time.perf_counter() - session.started
    write_result(options.output, figures(rows), rows, rounds=options.rounds, seconds=seconds)
    return rows


def make_session(options: argparse.Namespace) -> Session:
    return Session(
        device=torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"),
        tiny=options.tiny,
        rounds=options.rounds,
        batches=tuple(options.batches),
        competitors=tuple(options.competitors),
        mixes=tuple(options.mixes),
        budget_s=options.budget,
        folders={"minilm": options.minilm_folder, "mpnet": options.mpnet_folder},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.tiny and options.device == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other cost more than tiny products
    if options.write_lengths is not None:
        write_lengths(options.write_lengths)
        return
    if options.capture_child:
        with torch.inference_mode():
            print(json.dumps(load_and_capture(make_session(options))))
        return
    if options.merge is not None:
        rows, about = merged(options.merge)
        kernels = json.loads(options.kernels.read_text())["figures"] if options.kernels else []
        write_result(options.output, [*figures(rows), *kernels], rows, **about)
    else:
        rows = run(options)
    if options.plot is not None:
        plot_times(rows, options.plot)
    show_rows(rows)
    if any("kernels" in row for row in rows):
        print(table(rows))


if __name__ == "__main__":
    main()
