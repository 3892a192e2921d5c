"""The console script, command by command, on tiny checkpoints: what is printed where, and how it fails."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import engine
from engine.backbones import GGUF_PACKAGES
from engine.cli import app
from engine.loading import save_checkpoint
from engine.train import decoder_trainer, trainer
from engine.train.card import train_command
from engine.train.config import RECIPES, TrainConfig, load_recipe
from engine.train.decoder_config import DecoderTrainConfig
from tests import tiny

TEXTS = ["how to join two tables", "index a column", "query by key or by value?"]
ROW_KEYS = ["label", "label_id", "probability", "exit_layer", "exit_probability"]


def call(*arguments, stdin=None, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments, stdin=None):
    """The one line on stderr of a call that must fail with exit code 2, and print nothing else."""
    result = call(*arguments, stdin=stdin, code=2)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def json_rows(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected(checkpoint):
    return engine.load(checkpoint).run(TEXTS)


# -- run ---------------------------------------------------------------------------------------------------------


def test_run_prints_a_line_a_row(checkpoint, expected):
    header, *lines = call("run", checkpoint, *TEXTS).stdout.splitlines()
    assert header.split() == ["label", "probability", "exit", "layer", "text"]
    assert len(lines) == len(TEXTS)
    for line, text, label, layer in zip(lines, TEXTS, expected.labels, expected.exit_layers.tolist(), strict=True):
        assert line.startswith(label) and line.endswith(f"{layer}  {text}")


def test_run_json_is_pure(checkpoint, expected):
    result = call("run", checkpoint, *TEXTS, "--json")
    rows = json_rows(result)
    assert [list(row) for row in rows] == [ROW_KEYS] * 3
    assert [row["label"] for row in rows] == expected.labels
    assert [row["label_id"] for row in rows] == expected.label_ids.tolist()
    assert [row["exit_layer"] for row in rows] == expected.exit_layers.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(expected.probabilities.amax(-1).tolist(), abs=1e-5)
    assert [row["exit_probability"] for row in rows] == pytest.approx(expected.exit_probabilities.tolist(), abs=1e-5)


def test_run_reads_lines_from_stdin(checkpoint, expected):
    result = call("run", checkpoint, "--json", stdin="\r\n".join(TEXTS) + "\n\n")
    assert [row["label"] for row in json_rows(result)] == expected.labels
    assert result.stderr == "skipped 1 empty line of stdin, the first is line 4\n"


def test_run_reads_json_lines_from_stdin(checkpoint, expected):
    lines = "".join(json.dumps({"text": text, "label": 0}) + "\n" for text in TEXTS)
    assert [row["label"] for row in json_rows(call("run", checkpoint, "--json", stdin=lines))] == expected.labels


def test_run_reads_pairs_in_three_ways(checkpoint):
    pairs = [("how to join", "left or right?"), ("index a column", "delete it")]
    want = engine.load(checkpoint).run(pairs).labels
    texts = [text for pair in pairs for text in pair]
    tabs = "".join("\t".join(pair) + "\n" for pair in pairs)
    objects = "".join(json.dumps({"text_a": a, "text_b": b}) + "\n" for a, b in pairs)
    for result in (
        call("run", checkpoint, "--pair", "--json", *texts),
        call("run", checkpoint, "--pair", "--json", stdin=tabs),
        call("run", checkpoint, "--json", stdin=objects),
    ):
        assert [row["label"] for row in json_rows(result)] == want


def test_run_without_rows_prints_nothing(checkpoint):
    assert call("run", checkpoint, stdin="").stdout == ""
    assert call("run", checkpoint, "--json", stdin="").stdout == ""


def test_run_options_reach_the_engine(checkpoint):
    def layers(*options):
        return [row["exit_layer"] for row in json_rows(call("run", checkpoint, *TEXTS, "--json", *options))]

    assert layers("--threshold", "0") == [1, 1, 1]
    assert layers("--min-depth", tiny.NUM_LAYERS) == [tiny.NUM_LAYERS] * 3
    assert layers("--max-depth", "2", "--threshold", "1") == [2, 2, 2]
    assert layers("--executor", "reference", "--batch-tokens", "8") == layers()
    assert layers("--device", "cpu", "--dtype", "float64") == layers("--device", "cpu", "--executor", "graph")
    long = "query " * 200
    assert "truncation" in refused("run", checkpoint, long)
    assert len(json_rows(call("run", checkpoint, long, "--json", "--truncation"))) == 1


def test_text_is_never_markup_nor_control(checkpoint):
    line = call("run", checkpoint, "[bold]how[/bold] \x1b[31mto\nindex").stdout.splitlines()[1]
    assert line.endswith("[bold]how[/bold] [31mto index")


@pytest.mark.parametrize(
    "arguments, stdin, says",
    [
        (["--pair", "one"], None, "two by two, got 1"),
        (["--threshold", "1.5", "text"], None, r"threshold must lie in [0, 1]"),
        (["--min-depth", "9", "text"], None, "between 1 and 4, got 9"),
        (["--executor", "fast", "text"], None, "auto, packed, reference, graph, got 'fast'"),
        (["--batch-tokens", "0", "text"], None, "positive integer, got 0"),
        (["--device", "moon", "text"], None, "device 'moon' cannot be used"),
        (["--dtype", "int8", "text"], None, "dtype must be auto, float32"),
        ([" "], None, "row 0 is an empty string"),
        ([], b"fine\n\xff\xfe\n", "stdin, line 2: not UTF-8"),
        ([], '{"title": "x"}\n', """line 1: a JSON object must have "text", or"""),
        ([], '{"text": "x"}\n{"text": \n', "line 2: starts like the JSON objects before it"),
        ([], '{"text": "x"}\n{"text_a": "x", "text_b": "y"}\n', "line 2: rows must all be single texts, or all pairs"),
        (["--pair"], "no tab\n", "line 1: --pair needs two texts"),
    ],
)
def test_run_refuses(checkpoint, arguments, stdin, says):
    assert says in refused("run", checkpoint, *arguments, stdin=stdin)


def test_a_missing_checkpoint_is_one_line_and_debug_shows_more(tmp_path):
    assert "does not exist" in refused("run", tmp_path / "nowhere", "text")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "nowhere"), "text", "--debug"])
    assert isinstance(result.exception, FileNotFoundError)
    # Behind "--" it is a text.
    assert "does not exist" in refused("run", tmp_path / "nowhere", "--", "--debug")


def test_unknown_options_and_commands_exit_with_2():
    call("run", "--nonsense", code=2)
    call("nonsense", code=2)
    call("run", code=2)


def test_help_names_every_command():
    text = call("--help").stdout
    for command in ("run", "eval", "explain", "train", "demo", "info"):
        assert f" {command} " in text
        assert "Usage" in call(command, "--help").stdout


def test_help_imports_no_training_and_no_transformers():
    code = (
        "import sys; from engine.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'peft', 'matplotlib', 'datasets')"
        " or m.startswith(('engine.train', 'engine.bench'))], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


# -- eval --------------------------------------------------------------------------------------------------------


def test_eval_prints_and_writes_the_same_figures(checkpoint, task_folder, tmp_path):
    out = tmp_path / "figures.json"
    text = call("eval", checkpoint, "--data", task_folder, "--json", out).stdout
    record = json.loads(out.read_text())
    full, exits = record["points"]
    assert record["rows"] == full["rows"] == 40
    assert full["mean_depth"] == tiny.NUM_LAYERS and full["threshold"] is None and full["saved_layers"] == 0
    assert exits["threshold"] == 0.5 and exits["mean_depth"] < tiny.NUM_LAYERS
    assert len(exits["wall_time"]["all_s"]) == 3
    assert sum(exits["exit_histogram"].values()) == 40
    assert f"{full['accuracy']:.4f}" in text and f"{exits['accuracy']:.4f}" in text
    assert "tokenisation" in text and "t_full / t" in text
    assert record["environment"]["consistentee"] == engine.__version__

    examples = [json.loads(line) for line in (task_folder / "test.jsonl").read_text().splitlines()]
    labels = engine.load(checkpoint).run([row["text"] for row in examples]).labels
    hits = sum(label == row["label"] for label, row in zip(labels, examples, strict=True))
    assert exits["accuracy"] == pytest.approx(hits / 40)


def test_eval_sweeps_thresholds(checkpoint, task_folder, tmp_path):
    out = tmp_path / "figures.json"
    options = ("--thresholds", "0,0.5,1", "--repeats", 1, "--split", "dev", "--json", out)
    text = call("eval", checkpoint, "--data", task_folder, *options).stdout
    points = json.loads(out.read_text())["points"]
    assert [p["threshold"] for p in points] == [None, 0, 0.5, 1]
    depths = [p["mean_depth"] for p in points[1:]]
    assert depths[0] == 1 and depths == sorted(depths) and depths[2] == tiny.NUM_LAYERS
    assert "threshold 0.5" in text
    assert points[0]["f1"] is None


def test_eval_shows_f1_for_two_classes(tmp_path):
    folder = save_checkpoint(tiny.tiny_model(labels=("no", "yes")), tmp_path / "two", tiny.tiny_tokenizer())
    data = tmp_path / "rows.csv"
    data.write_text("text,label\nhow to join,yes\nindex a column,no\nwhat is it,yes\n")
    text = call("eval", folder, "--data", data, "--repeats", 1).stdout
    assert "F1" in text.splitlines()[1]


def test_eval_refuses(checkpoint, task_folder, tmp_path):
    assert "is no file" in refused("eval", checkpoint, "--data", tmp_path / "nowhere.jsonl")
    assert "it holds none" in refused("eval", checkpoint, "--data", tmp_path)
    assert "split must be one of" in refused("eval", checkpoint, "--data", task_folder, "--split", "gold")
    both = ("--threshold", "0.5", "--thresholds", "0.1")
    assert "either" in refused("eval", checkpoint, "--data", task_folder, *both)
    assert "numbers" in refused("eval", checkpoint, "--data", task_folder, "--thresholds", "a,b")
    other = tmp_path / "rows.jsonl"
    other.write_text('{"text": "a", "label": "spam"}\n')
    assert "'spam'" in refused("eval", checkpoint, "--data", other)


# -- explain -----------------------------------------------------------------------------------------------------


def test_explain_marks_the_layer_where_the_row_leaves(checkpoint):
    for text in TEXTS:
        result = engine.load(checkpoint).run([text])
        lines = call("explain", checkpoint, text).stdout.splitlines()
        layers, marked = lines[1:-1], [line for line in lines if line.startswith("->")]
        assert len(layers) == tiny.NUM_LAYERS and len(marked) == 1
        left = int(result.exit_layers[0])
        assert layers[left - 1] is marked[0]
        assert result.labels[0] in marked[0]
        assert f"{float(result.probabilities.max()):.4f}" in marked[0]
        assert all(" no " in line for line in layers[: left - 1])
        assert "always" in layers[-1]
        assert lines[-1].startswith(f"{result.labels[0]}, after {left} of {tiny.NUM_LAYERS} layers")


def test_explain_takes_pairs_and_thresholds(checkpoint):
    last = call("explain", checkpoint, "how to join", "left or right?", "--threshold", "1").stdout.splitlines()[-2]
    assert last.startswith("->") and "always" in last
    assert "truncation" in refused("explain", checkpoint, "query " * 200)
    call("explain", checkpoint, "query " * 200, "--truncation")


# -- train -------------------------------------------------------------------------------------------------------

QUICK = (
    "max_rounds=1",
    "max_length=32",
    "calibration_share=0.2",
    "init.epochs=1",
    "policy.epochs=2",
    "select.alphas=[1.0]",
    "device=cpu",
)


def assignments(*options):
    return [part for option in options for part in ("--set", option)]


def test_train_then_run_eval_and_info(backbone_folder, task_folder, tmp_path):
    out = tmp_path / "trained"
    where = ("--backbone", backbone_folder, "--output", f"{out}/")
    result = call("train", task_folder, *where, *assignments(*QUICK))
    title, header, *lines, remark = result.stdout.splitlines()
    assert "exit threshold" in title and "mean depth" in header
    assert [line.split()[0] for line in lines] == ["calibration", "dev", "test"]
    assert "phase init" in result.stderr and "phase init" not in result.stdout
    assert not (out / ".run").exists()  # the state of the run stands beside the checkpoint

    assert len(json_rows(call("run", out, "--json", *TEXTS))) == 3
    assert "full depth" in call("eval", out, "--data", task_folder, "--repeats", 1).stdout
    facts = json.loads(call("info", out, "--json").stdout)
    assert list(facts["figures"]) == ["calibration", "dev", "test"]
    assert facts["figures"]["test"]["rows"] == 40
    assert call("info", out).stdout.splitlines()[-4:] == [header, *lines]

    again = call("train", task_folder, *where, *assignments(*QUICK))
    assert "resuming" in again.stderr and again.stdout == result.stdout
    assert "other options (seed)" in refused("train", task_folder, *where, *assignments(*QUICK, "seed=1"))


@pytest.fixture
def trained_configs(monkeypatch):
    """Configurations that reach the trainer, which does not run."""
    configs = []
    figures = {"rows": 1, "accuracy_full_depth": 1.0, "accuracy": 1.0, "mean_depth": 1.0, "saved_layers": 0.5}

    class Recorder:
        def __init__(self, config):
            configs.append(config)

        def run(self):
            return {"result": {"best_phase": "init", "threshold": 0.5, "dev": figures}}

    monkeypatch.setattr(trainer, "Trainer", Recorder)
    return configs


def test_train_accepts_what_a_model_card_prints(trained_configs):
    config = TrainConfig.from_dict(
        {
            "backbone": "user/model",
            "data": "hub:user/data",
            "output": "out",
            "pooler": "per_layer",
            "exit_layers": [2, 4],
            "drop_leaked": False,
            "tolerance": 1e-5,
            "lora": {"rank": 16, "dropout": 0.0},
            "init": {"epochs": 3, "weighting": "equal"},
            "policy": {"alpha": 0.25, "ratio_clip": None, "method": "reinforce"},
            "select": {"alphas": [0.5, 2.0], "reference": 0.9, "max_relative_loss": 0.01},
        }
    )
    line = train_command(config.to_dict(), TrainConfig).replace("\\\n", " ")
    program, *arguments = shlex.split(line)
    assert program == "consistentee"
    call(*arguments)
    assert trained_configs == [config]


def test_train_takes_a_recipe_and_the_command_line_wins(trained_configs, tmp_path):
    recipe = tmp_path / "recipe.json"
    options = {"backbone": "user/a", "output": "a", "seed": 1, "init": {"epochs": 2, "batch_size": 8}}
    recipe.write_text(json.dumps(options))
    call("train", "data", "--recipe", recipe)
    call("train", "data", "--recipe", recipe, "--backbone", "user/b", "--set", "init.epochs=7")
    first, second = trained_configs
    assert (first.backbone, first.data, first.output, first.seed) == ("user/a", "data", "a", 1)
    assert (second.backbone, second.output) == ("user/b", "a")
    assert (second.init.epochs, second.init.batch_size) == (7, 8)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_train_reads_every_recipe(trained_configs, recipe, monkeypatch):
    found = {"calibration": {"rows": 1, "points": {}}}
    kind = type("Recorder", (trainer.Trainer,), {"run": lambda self: {"result": found | {"threshold": 0.5}}})
    monkeypatch.setattr(decoder_trainer, "DecoderTrainer", kind)
    decodes = load_recipe(recipe)["backbone"] in GGUF_PACKAGES
    monkeypatch.setattr("engine.cli._generates", lambda backbone: decodes)
    call("train", "data", "--recipe", recipe, "--output", "out")
    assert [type(config) for config in trained_configs] == [DecoderTrainConfig if decodes else TrainConfig]


def test_train_restart_drops_the_state_of_an_earlier_run(trained_configs, tmp_path):
    state = tmp_path / "out.run"
    state.mkdir()
    where = ("--backbone", "user/a", "--output", tmp_path / "out")
    call("train", "data", *where)
    assert state.exists()
    call("train", "data", *where, "--restart")
    assert not state.exists() and len(trained_configs) == 2


def test_train_refuses(tmp_path, backbone_folder):
    where = ("--backbone", backbone_folder, "--output", tmp_path / "out")
    assert "--backbone is missing" in refused("train", "data", "--output", "out")
    assert "--output is missing" in refused("train", "data", "--backbone", "user/a")
    assert "expected key=value" in refused("train", "data", *where, "--set", "seed")
    assert "unknown options ['sede']" in refused("train", "data", *where, "--set", "sede=1")
    assert "neither a file nor" in refused("train", "data", *where, "--recipe", "nonsense")
    assert "is not a folder" in refused("train", tmp_path / "nowhere", *where)


# -- info --------------------------------------------------------------------------------------------------------


def test_info(checkpoint):
    facts = json.loads(call("info", checkpoint, "--json").stdout)
    assert facts["early_exit"]["labels"] == list(tiny.LABELS)
    assert facts["bytes"]["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert facts["total_bytes"] == sum(path.stat().st_size for path in checkpoint.iterdir())
    exits = engine.load(checkpoint).model.exits
    assert facts["parameters"]["exits.safetensors"] == sum(p.numel() for p in exits.parameters())
    text = call("info", checkpoint).stdout
    assert f"{facts['total_bytes']:,}" in text and "layers 1, 2, 3, 4" in text


def test_info_of_something_else(tmp_path, checkpoint):
    assert "holds no config.json" in refused("info", tmp_path)
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "exits.safetensors").write_bytes(b"not safetensors")
    assert "not a readable safetensors file" in refused("info", broken)
    foreign = shutil.copytree(checkpoint, tmp_path / "foreign")
    (foreign / "training.json").write_text('{"result": {"dev": {"accuracy": 0.5}}}')
    assert "training.json: result is not what training writes" in refused("info", foreign)


# -- demo --------------------------------------------------------------------------------------------------------


def test_demo_refuses(checkpoint, tmp_path):
    assert "must end in .png" in refused("demo", "--checkpoint", checkpoint, "--output", tmp_path / "demo.txt")
    assert "the checkpoint's classes are" in refused("demo", "--checkpoint", checkpoint, "--output", tmp_path / "d.png")
    assert "does not exist" in refused("demo", "--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "d.png")
