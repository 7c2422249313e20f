"""The command line as a user meets it: help, recipes, errors and exit codes; and the commands on a tiny checkpoint."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiny
from flextron import cli
from flextron.choosing import explaining
from flextron.choosing.routing import route
from flextron.commands import shared
from flextron.config import COMMANDS, LEAST_EVALUATIONS, EvaluateConfig
from flextron.costs.pricing import Ceiling
from flextron.costs.saved import find_table, save_table
from flextron.costs.table import CostTable, linear_table
from flextron.costs.timing import TOKENS, Timing, present_conditions
from flextron.data.blocks import load_blocks
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static import learning as training
from flextron.routers.static import making, surrogate
from flextron.routers.static.pairs import LossMeter
from flextron.routers.static.router import Router
from flextron.subnet import Subnet

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*arguments, **options):
    command = [sys.executable, "-m", "flextron.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 60)
    return path


@pytest.fixture(scope="module")
def ranked(checkpoint, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked") / "elastic"
    sizes = ["--tokens", "1024", "--refit-tokens", "1024", "--sensitivity-tokens", "256"]
    assert cli.main(["rank", str(checkpoint), str(folder), "--text", str(text), *sizes]) == 0
    return folder


@pytest.fixture(scope="module")
def deep(text, tmp_path_factory):
    """Folder of a ranked checkpoint of 12 layers: with 3 there are too few sub-networks to train a router on."""
    folder = tmp_path_factory.mktemp("deep")
    lm = tiny.plain_model("llama", vocab_size=300, num_hidden_layers=12, max_position_embeddings=1024)
    ElasticModel(lm, tiny.tokenizer()).save_pretrained(folder / "plain")
    sizes = ["--tokens", "1024", "--refit-tokens", "1024", "--sensitivity-tokens", "256"]
    arguments = ["rank", str(folder / "plain"), str(folder / "elastic"), "--text", str(text), *sizes]
    assert cli.main(arguments) == 0
    return folder / "elastic"


@pytest.fixture
def folder(deep, tmp_path):
    """A copy of `deep` with latency tables that say they were measured here, and cost in proportion to widths."""
    shutil.copytree(deep, tmp_path / "elastic")
    add_tables(tmp_path / "elastic")
    return tmp_path / "elastic"


def add_tables(folder, **conditions):
    model = ElasticModel.from_pretrained(folder)
    for phase, metric, scale in (("prefill", "ttft", 10.0), ("decode", "tpot", 1.0)):
        about = {**present_conditions(model), "phase": phase, "batch": 1, TOKENS[metric]: 16, **conditions}
        costs = {"per_neuron": [0.01 * scale] * 12, "per_kv_group": [0.1 * scale] * 12}
        save_table(
            folder,
            linear_table(model.search_space, metric=metric, unit="ms", fixed=scale, conditions=about, **costs),
        )


def rename_device(folder):
    for file in (folder / "latency").glob("*.json"):
        table = CostTable.load(file)
        file.unlink()
        replace(table, conditions={**table.conditions, "device": "another machine"}).save(file)


def printed(capsys):
    """What was printed on standard error, without the box and the line breaks of the option parser."""
    return " ".join(re.sub("[─-╿]", " ", capsys.readouterr().err).split())


def test_help_imports_no_torch():
    imports = (
        "import sys; sys.argv = ['flextron']; from flextron import cli\n"
        "for command in cli.COMMANDS:\n"
        "    try: cli.main([command, '--help'])\n    except SystemExit: pass\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", imports + "print('torch' in sys.modules, 'numpy' in sys.modules)"],
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert found.stdout.splitlines()[-1] == "False False"


@pytest.mark.timing
def test_help_is_instant():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert run("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_commands_stand_in_the_order_of_the_data():
    expected = "quickstart inspect rank train measure-latency train-router route evaluate generate serve bench-serve"
    assert list(COMMANDS) == [*expected.split(), "export", "pack", "quantize", "env"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"flextron {command}" in shown
    assert command == "env" or "Example" in shown


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("flextron 0.")


def test_recipe_stands_for_options_and_options_given_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tokens: 4096\nsubnet: [full, 60%]\njson: true\nblock_tokens: 128\n")
    expected = EvaluateConfig("model", subnet=("full", "60%"), tokens=512, block_tokens=128)
    options, from_recipe = ["--tokens", "512", "--no-json"], ["--recipe", str(recipe)]
    assert cli.parse(["evaluate", "model", *from_recipe, *options]) == expected
    assert cli.parse(["evaluate", "model", *options, *from_recipe]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], "evaluate"),
        (["evaluate", "m", "--tokns", "5"], "--tokens"),
        (["evaluate", "m", "--tokens", "five"], "five"),
        (["rank", "m"], "OUT"),
    ],
)
def test_wrong_arguments_exit_2_and_name_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_general_help_lists_every_verb_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z-]+)  +([A-Z])", shown, re.MULTILINE)
    assert [verb for verb, _ in listed] == list(COMMANDS)
    for kind in COMMANDS.values():
        assert kind.__doc__.split("\n\n")[0].strip() in " ".join(shown.split())
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().out == shown


def test_lines_of_help_fit_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], *([command] for command in COMMANDS)):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if not line.startswith("Example")) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute", "--help"], "flextron has no verb evalute; did you mean evaluate?"),
        (["nosuch"], f"flextron has no verb nosuch; choose one of {', '.join(COMMANDS)}."),
        (["evaluate", "m", "--tokns", "5"], "unknown option --tokns for flextron evaluate; did you mean --tokens?"),
        (
            ["train", "m", "o", "--keep_lst=1"],
            "unknown option --keep-lst for flextron train; did you mean --keep",
        ),
        (["a\nb"], "flextron has no verb a b; choose one of"),
        (["a\x1bb"], "flextron has no verb a\\x1bb; choose one of"),
        (["rank", "m", "--xyz"], "unknown option --xyz for flextron rank; `flextron rank --help` lists its options."),
        (["evaluate", "m", "extra"], "flextron evaluate takes no such argument: extra."),
        (["evaluate", "m", "--tokens", "five"], "--tokens is 'five'; it must be a whole number."),
        (["evaluate", "m", "--limit", "5.5"], "--limit is '5.5'; it must be a whole number."),
        (["train", "m", "o", "--warmup", "x"], "--warmup is 'x'; it must be a number."),
        (["train", "m", "o", "--visits", "1", "2"], "--visits needs 4 values."),
        (["route", "m", "--out"], "--out needs a value."),
        (["route", "m", "--budget", "1x", "--dtype", "int3"], "--dtype is 'int3'; it must be one of 'auto', "),
        (["train"], "flextron train needs MODEL and OUT."),
        (["rank", "--out", "o", "--text", "t"], "flextron rank needs MODEL."),
        (["train", "m", "o", "--tokens", "5"], "--tokens is 5; it must be at least 512."),
        (["generate", "m", "p", "--temperature", "nan"], "--temperature is nan; it must be"),
        (["generate", "m", "p", "--temperature", "inf"], "--temperature is inf; it must be a number of at most 1e+15."),
        (["rank", "m", "o", "--tokens", "9" * 30], f"--tokens is {'9' * 30}; it must be a number of at most 1e+15."),
        (["evaluate", "m", "--text", "a\0b"], "'a\\x00b' has a NUL character, which no option takes."),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro frames its messages differently
def test_errors_about_arguments_are_one_plain_line(arguments, message, encoding, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["x" * 100_000],
        ["evaluate", "m", "x" * 100_000],
        ["evaluate", "m", "--" + "x" * 100_000],
        ["evaluate", "m", "--dtype", "x" * 100_000],
        ["evaluate", "m", "--dtype", "x " * 50_000],
        ["evaluate", "m", "--budget", "x " * 50_000],
        ["evaluate", "m", "--recipe", "x" * 100_000],
    ],
)
def test_long_values_are_shortened_in_messages(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert "…" in error
    assert len(error) < 1000


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("tokns: 5", "--tokens"),
        ("- a\n- b", "must list options"),
        ("a: [", "cannot read the recipe"),
        ("a: &a [x]\nb: [*a, *a]", "aliases (*name) are not for recipes"),
        ("text: " + "x" * 100_000, "it is longer than 100000 characters"),
        ("a: " + "[" * 5000, "cannot read the recipe"),
        ("tokens: !!int x", "cannot read the recipe"),
        ("tokens: !!timestamp x", "cannot read the recipe"),
        ('text: "a\\0b"', "'a\\x00b' has a NUL character"),
        ("tokens: 1000000000000000000000000000000", "it must be a number of at most 1e+15"),
    ],
)
def test_bad_recipes_exit_2(recipe, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    try:
        code = cli.main(["evaluate", "m", "--recipe", str(path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_users_errors_are_one_line_without_a_traceback(tmp_path):
    """And the exit code is that of the process."""
    found = run("evaluate", tmp_path / "nothing")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: no such checkpoint")


@pytest.mark.parametrize("arguments", [["--tokens", "1"], ["--subnet"], ["--subnet", "tiny"]])
def test_bad_values_exit_2(checkpoint, arguments):
    try:
        code = cli.main(["evaluate", str(checkpoint), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2


def test_rank_writes_an_elastic_checkpoint(ranked, checkpoint):
    assert {"flextron.json", "ranking.safetensors", "sensitivity.json"} <= {path.name for path in ranked.iterdir()}
    assert ElasticModel.from_pretrained(ranked).ranking.score == "reconstruction"
    assert ElasticModel.from_pretrained(checkpoint).ranking is None


def test_rank_refuses_an_existing_folder_before_it_loads_anything(ranked, capsys):
    assert cli.main(["rank", "nowhere", str(ranked)]) == 2
    assert "exists" in capsys.readouterr().err


def test_rank_goes_on_where_it_was_interrupted(checkpoint, text, tmp_path, capsys):
    arguments = ["rank", str(checkpoint), str(tmp_path / "out"), "--text", str(text), "--tokens", "1024"]
    assert cli.main([*arguments, "--sensitivity-tokens", "0"]) == 0  # what an interrupted run has saved
    assert cli.main([*arguments, "--score", "rms"]) == 2  # something else was asked for
    ranked = (tmp_path / "out" / "ranking.safetensors").stat().st_mtime_ns
    assert cli.main([*arguments, "--sensitivity-tokens", "256"]) == 0
    assert "only its sensitivities" in capsys.readouterr().err
    assert (tmp_path / "out" / "ranking.safetensors").stat().st_mtime_ns == ranked
    assert (tmp_path / "out" / "sensitivity.json").exists()
    assert cli.main([*arguments, "--sensitivity-tokens", "256"]) == 2


def test_rank_from_the_disk_writes_the_same_checkpoint(ranked, checkpoint, text, tmp_path):
    sizes = ["--tokens", "1024", "--refit-tokens", "1024", "--sensitivity-tokens", "256"]
    source = (checkpoint / "model.safetensors").read_bytes()
    assert cli.main(["rank", str(checkpoint), str(tmp_path / "out"), "--text", str(text), *sizes, "--stream"]) == 0
    for name in ("model.safetensors", "ranking.safetensors"):
        found, expected = load_file(tmp_path / "out" / name), load_file(ranked / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert (tmp_path / "out" / "sensitivity.json").read_bytes() == (ranked / "sensitivity.json").read_bytes()
    assert (checkpoint / "model.safetensors").read_bytes() == source
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == ["out"]


def test_evaluate_prints_json_and_a_table(ranked, text, capsys):
    wishes = ["full", "60%", "neurons=20"]
    arguments = ["evaluate", str(ranked), "--text", str(text), "--tokens", "512", "--block-tokens", "64", "--subnet"]
    assert cli.main([*arguments, *wishes]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:]] == wishes
    assert cli.main([*arguments, *wishes, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == wishes
    assert rows[1]["share"] <= 0.6
    assert f"{rows[1]['nats_per_token']:.4f}" in table[3]


def test_generate_prints_the_text(ranked, capsys):
    assert cli.main(["generate", str(ranked), "The quick", "--subnet", "80%", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


def test_export_reports_asked_and_got(ranked, tmp_path, capsys):
    assert cli.main(["export", str(ranked), str(tmp_path / "small"), "--subnet", "neurons=20,kv_groups=2"]) == 0
    assert "asked" in capsys.readouterr().out
    assert cli.main(["export", str(ranked), str(tmp_path / "small"), "--subnet", "60%"]) == 2


def test_env(capsys):
    assert cli.main(["env"]) == 0
    assert "transformers 5." in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["loading", "sensitivity:"])
def test_ctrl_c_keeps_what_was_finished_and_nothing_else(checkpoint, text, tmp_path, stage):
    out = tmp_path / "out"
    arguments = [
        "rank",
        checkpoint,
        out,
        "--text",
        text,
        "--tokens",
        "1024",
        "--refit-tokens",
        "1024",
        "--sensitivity-tokens",
        "2048",
    ]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "flextron.cli", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    seen = ""
    while stage not in seen and (character := process.stderr.read(1)):
        seen += character
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ([] if stage == "loading" else ["out"])
    assert cli.main([*map(str, arguments)]) == 0
    assert "sensitivity.json" in {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "m", "p", "--budget", "0.6x", "--subnet", "60%"], "--subnet 60% and --budget 0.6x exclude"),
        (["export", "m", "o", "--budget", "0.6x", "--subnet", "60%"], "--subnet 60% and --budget 0.6x exclude"),
        (["generate", "m", "p", "--budget", "12"], "cannot read the budget '12': '12' has no unit"),
        (["export", "m", "o", "--budget", "60%"], "weights: use --subnet 60%."),
        (["evaluate", "m", "--budget", "0.9x", "12 parsecs"], "'parsecs' in '12 parsecs' is no unit"),
        (["route", "m", "--budget", "0.6x,"], "has no number where one belongs"),
        (["route", "m"], "--budget"),
        (["route", "m", "--budget", "1x", "--out", "a.txt"], "out is a.txt; its name must end in .json"),
        (["route", "m", "--budget", "1x", "--picture", "a.json"], "must end in .png or .svg or .pdf"),
        (["measure-latency", "m", "--phase"], "phase"),
        (["measure-latency", "m", "--phase", "decode", "decode"], "both once"),
        (["measure-latency", "m", "--tokens", "0"], "tokens is 0; it must be at least 1"),
        (["measure-latency", "m", "--batch", "0"], "batch is 0; it must be at least 1"),
        (["measure-latency", "m", "--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["measure-latency", "m", "--from-csv", "t.csv"], "say which: --phase prefill or --phase decode"),
        (["measure-latency", "m", "--engine", "vllm"], "name it with --from-csv"),
        (["measure-latency", "m", "--device-name", "H100"], "name it with --from-csv"),
        (["train-router", "m", "--evaluations", "159"], "evaluations is 159; it must be at least 160"),
        (["train-router", "m", "--tokens", "255"], "tokens is 255; it must be at least 256"),
        (["train-router", "m", "--lowest", "1"], "lowest is 1.0; it must lie between 0 and 1"),
        (["train-router", "m", "--seed", "-1"], "seed is -1; it must be at least 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(shared, "load", lambda config: pytest.fail("loads"))
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in printed(capsys)


@pytest.mark.parametrize("arguments", [["measure-latency"], ["train-router"], ["route", "--budget", "1x"]])
def test_what_is_kept_beside_a_checkpoint_needs_its_folder(arguments, capsys, monkeypatch):
    monkeypatch.setattr(shared, "load", lambda config: pytest.fail("loads"))
    command, *options = arguments
    assert cli.main([command, "some/model", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no such folder: some/model.")
    assert "flextron rank MODEL OUT" in error


def test_measure_latency_keeps_and_describes_a_table_of_each_phase(ranked, tmp_path, capsys):
    folder = shutil.copytree(ranked, tmp_path / "elastic")
    assert cli.main(["measure-latency", str(folder), "--tokens", "16", "--rounds", "1", "--batch", "2"]) == 0
    shown = capsys.readouterr().out
    model = ElasticModel.from_pretrained(folder)
    for metric, phase in (("ttft", "prefill"), ("tpot", "decode")):
        table = find_table(model, folder, metric)
        asked = {"phase": phase, "batch": 2, TOKENS[metric]: 16, "rounds": 1}
        assert asked.items() <= dict(table.conditions).items()
        assert f"{metric}: full model {table.full:.2f} ms" in shown
    assert [line.split()[0] for line in shown.splitlines() if str(folder / "latency") in line] == ["wrote", "wrote"]
    (folder / "latency").rename(tmp_path / "both")
    assert cli.main(["measure-latency", str(folder), "--phase", "decode", "--tokens", "16", "--rounds", "1"]) == 0
    assert [file.name[:4] for file in (folder / "latency").iterdir()] == ["tpot"]


def test_times_of_another_engine_are_read_from_a_file(deep, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(deep, tmp_path / "elastic")
    file = tmp_path / "engine.csv"
    widths = [(neurons, groups) for neurons in (0, 20, 40) for groups in (0, 1, 3)]
    rows = [f"{neurons},{groups},{1 + 12 * (0.01 * neurons + 0.1 * groups)}" for neurons, groups in widths]
    file.write_text("\n".join(["neurons,kv_groups,ms", *rows]))
    arguments = ["measure-latency", str(folder), "--from-csv", str(file), "--phase", "decode", "--batch", "4"]
    model = ElasticModel.from_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shared, "load", lambda config: pytest.fail("loads"))
        assert cli.main([*arguments, "--tokens", "99"]) == 0
    table = find_table(model, folder, "tpot")
    about = {"phase": "decode", "engine": "as in engine.csv", "batch": 4, "context_tokens": 99}
    assert {**about, "error_median": table.conditions["error_median"]} == table.conditions
    assert table.full == pytest.approx(9.4, rel=0.01)
    assert "tpot: full model" in capsys.readouterr().out
    assert cli.main(["route", str(folder), "--budget", "0.6x", "--json"]) == 0  # not measured here: prediction only
    (limit,) = json.loads(capsys.readouterr().out)["limits"]
    assert "measured" not in limit
    shutil.rmtree(folder / "latency")
    named = ["--engine", "vllm", "--device-name", "H100", "--dtype", "bfloat16"]
    assert cli.main([*arguments, *named]) == 0
    conditions = find_table(model, folder, "tpot", foreign=True).conditions
    assert {"engine": "vllm", "device": "H100", "dtype": "bfloat16"}.items() <= dict(conditions).items()
    file.write_text("neurons,ms\n1,1\n")
    assert cli.main(arguments) == 2
    assert "lacks the columns ['kv_groups']" in capsys.readouterr().err


def test_csv_widths_of_a_checkpoint_that_is_not_ranked_are_those_of_the_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "plain")
    (folder / "flextron.json").unlink()
    file = tmp_path / "engine.csv"
    file.write_text("neurons,kv_groups,ms\n0,0,1\n20,1,2\n20,3,3\n40,3,4\n")
    assert cli.main(["measure-latency", str(folder), "--from-csv", str(file), "--phase", "prefill"]) == 0
    assert find_table(ElasticModel.from_pretrained(folder), folder, "ttft").full == pytest.approx(4, rel=0.1)


@pytest.fixture
def quick_router(monkeypatch):
    """Few steps of training. A random model's losses hardly follow from widths, so any surrogate will do here."""
    monkeypatch.setattr(surrogate, "STEPS", 20)
    monkeypatch.setattr(training, "STEPS", 5)
    monkeypatch.setattr(training, "LARGEST_ERROR", 10.0)
    monkeypatch.setattr(training, "_orders", lambda _: True)
    monkeypatch.setattr(training, "SPREADS", (1.0,))  # so small a model has few sub-networks near the greedy ones


def router_arguments(folder, text):
    sizes = ["--evaluations", str(LEAST_EVALUATIONS), "--tokens", "256"]
    return ["train-router", str(folder), "--text", str(text), *sizes]


def test_train_router_goes_on_after_ctrl_c_and_serves_budgets(folder, text, quick_router, monkeypatch, capsys):
    def interrupted(meter, subnet):
        if meter.measured == 60:
            raise KeyboardInterrupt
        return measure(meter, subnet)

    measure = LossMeter.__call__
    with monkeypatch.context() as patch:
        patch.setattr(LossMeter, "__call__", interrupted)
        assert cli.main(router_arguments(folder, text)) == 130
    (measured,) = (folder / "routers").glob("pairs-*.jsonl")
    assert len(measured.read_text().splitlines()) == 61
    assert not (folder / "routers/tpot").exists()
    capsys.readouterr()
    assert cli.main(router_arguments(folder, text)) == 0
    out, err = capsys.readouterr()
    assert f"resuming with 60 measured sub-networks from {measured}" in err
    assert "no latency table" not in err
    about = Router.load(folder, "tpot", ElasticModel.from_pretrained(folder)).about
    assert (about.metric, about.text, about.tokens) == ("tpot", str(text), 255)
    lines = out.splitlines()
    assert f"surrogate, on the last sub-networks measured: {about.error}" in lines
    assert f"surrogate, cross-validated: {about.cross_validated}" in lines
    table = lines[lines.index(f"{'budget':<8}{'router':>12}{'greedy':>12}") + 1 :][: len(about.checks)]
    assert [line.split() for line in table] == [
        [f"{check.budget:.2f}x", f"{check.loss:.4f}", f"{check.greedy_loss:.4f}"] for check in about.checks
    ]
    assert any(line.startswith(f"wrote {folder}/routers/tpot in ") for line in lines)
    assert f"try: flextron route {folder} --budget tpot=0.6x" in lines
    assert cli.main(["route", str(folder), "--budget", "0.6x", "--no-measure"]) == 0
    assert "chosen by the router for tpot; it expects " in capsys.readouterr().out
    assert cli.main(["route", str(folder), "--budget", "0.6x", "--no-measure", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["chosen_by"], answer["router_metric"]) == ("router", "tpot")
    assert 0 < answer["predicted_nats_per_token"] < 10


def test_train_router_measures_a_latency_table_if_there_is_none(folder, monkeypatch, text, capsys):
    def measured(model, *, phase, tokens, show):
        asked.append((phase, tokens, show))
        return table

    def stop(*arguments, **options):
        raise ValueError("as far as this test goes")

    asked, table = [], find_table(ElasticModel.from_pretrained(folder), folder, "ttft")
    (there,) = (folder / "latency").glob("ttft*.json")
    there.unlink()
    monkeypatch.setattr(making, "measure_latency", measured)
    monkeypatch.setattr(making, "train_router", stop)
    assert cli.main([*router_arguments(folder, text), "--phase", "prefill"]) == 2
    err = capsys.readouterr().err
    assert f"{folder} has no latency table for prefill; measuring one first" in err
    assert f"wrote {there}" in err
    assert asked == [("prefill", 512, True)]
    assert CostTable.load(there) == table
    assert cli.main([*router_arguments(folder, text), "--phase", "prefill"]) == 2
    assert len(asked) == 1


def test_train_router_reads_documents_that_ranking_has_not_seen(deep, tmp_path, monkeypatch):
    def stop(sensitivity, table, meter, pairs, **options):
        found.append(meter.blocks)
        raise ValueError("as far as this test goes")

    found = []
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} {tiny.TEXT * 2}"}) + "\n" for number in range(400)))
    sizes = ["--tokens", "1024", "--refit-tokens", "1024", "--sensitivity-tokens", "512"]
    folder = tmp_path / "elastic"
    assert cli.main(["rank", str(deep.parent / "plain"), str(folder), "--text", str(text), *sizes]) == 0
    add_tables(folder)
    model = ElasticModel.from_pretrained(folder)
    ranked = load_blocks(model.tokenizer, text, tokens=1024).documents
    monkeypatch.setattr(making, "train_router", stop)
    for rest in ({}, {"text": str(tmp_path / "other.jsonl")}):
        shutil.copy(text, tmp_path / "other.jsonl")
        with pytest.raises(ValueError, match="as far as"):
            making.make_router(model, folder, **{"text": str(text), "tokens": 256, **rest})
        shutil.rmtree(folder / "routers")
    first = [int(model.tokenizer.decode(blocks.tokens[0]).split()[0]) for blocks in found]
    sensitivity = making.sensitivity_blocks(model.tokenizer, text, tokens=512, after=ranked)
    assert sensitivity.documents > ranked > 0
    assert first == [sensitivity.documents, 0]  # counted from 0: the one after those
    assert (found[0].text, found[0].predicted_tokens) == (str(text), 255)


def test_a_router_needs_sensitivities(folder, text, capsys):
    sensitivity = json.loads((folder / "sensitivity.json").read_text())
    sensitivity["search_space"]["neurons"] = [0, 40]
    (folder / "sensitivity.json").write_text(json.dumps(sensitivity))
    assert cli.main(router_arguments(folder, text)) == 2
    assert "with another search space" in capsys.readouterr().err
    (folder / "sensitivity.json").unlink()
    assert cli.main(router_arguments(folder, text)) == 2
    assert f"{folder} has no sensitivities; a router starts from them." in capsys.readouterr().err
    with pytest.raises(ValueError, match="phase is 'both'; it must be one of: prefill, decode"):
        making.make_router(ElasticModel.from_pretrained(folder), folder, phase="both")


def test_least_evaluations_are_those_of_the_training():
    assert training.FIRST_PAIRS + training.ROUND_PAIRS + 2 * training.CHECKED_BUDGETS == LEAST_EVALUATIONS


def test_route_draws_explains_measures_and_writes(folder, tmp_path, capsys):
    out, picture = tmp_path / "new/subnet.json", tmp_path / "new/widths.png"
    files = ["--out", str(out), "--picture", str(picture)]
    assert cli.main(["route", str(folder), "--budget", "0.6x,weights=0.9x,ttft=2x", *files]) == 0
    shown, err = capsys.readouterr()
    lines = shown.splitlines()
    expected = Sensitivity.load(folder)
    subnet = Subnet.load(out)
    assert f"{subnet}; {expected.share(subnet):.1%} of the layers' weights" == lines[0]
    assert [line.split()[0] for line in lines[2:15]] == ["layer", *map(str, range(12))]
    price = find_table(ElasticModel.from_pretrained(folder), folder, "tpot").price(subnet)
    assert price <= 0.6 * 9.4 + 1e-9
    (at,) = (index for index, line in enumerate(lines) if line.startswith("tpot=0.6x: "))
    assert f"{price:.3g} ms predicted" in lines[at]
    assert re.match(r"  measured: \S+ ms, \d\.\d{3}x of \S+ ms; measured is \d+% \w+ predicted", lines[at + 1])
    assert lines[at + 2].startswith("weights=0.9x: ")
    assert lines[at + 3].startswith("ttft=2x: ")
    assert lines[at + 4].startswith("  measured: ")
    assert lines[at + 5] == f"chosen by sensitivities (greedy); a router chooses better: flextron train-router {folder}"
    assert lines[at + 6 :] == ["note: ttft=2x is more than the full model needs (94 ms): the full model meets it."]
    assert f"wrote {out}" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["export", str(folder), str(tmp_path / "small"), "--subnet", str(out)]) == 0


def test_route_prints_json_alone(folder, capsys):
    arguments = ["route", str(folder), "--budget", "parameters=0.7x,e2e=0.9x@32+9", "--json"]
    assert cli.main([*arguments, "--no-measure"]) == 0
    answer = json.loads(capsys.readouterr().out)
    subnet = Subnet(**answer["subnet"])
    model = ElasticModel.from_pretrained(folder)
    assert subnet == route(model, "parameters=0.7x,e2e=0.9x@32+9").subnet
    assert answer["budget"] == arguments[3]
    assert answer["share"] == pytest.approx(model.share(subnet))
    parameters, time_to_end = answer["limits"]
    assert (parameters["unit"], time_to_end["unit"]) == ("parameters", "ms")
    assert set(parameters) == {"limit", "unit", "at_most", "predicted", "full_model"}
    assert time_to_end["full_model"] == pytest.approx(2 * 94 + 8 * 9.4)
    assert time_to_end["predicted"] <= time_to_end["at_most"] == pytest.approx(0.9 * time_to_end["full_model"])
    assert (answer["chosen_by"], answer["router_metric"], answer["predicted_nats_per_token"]) == ("greedy", None, None)
    assert cli.main(arguments) == 0
    parameters, time_to_end = json.loads(capsys.readouterr().out)["limits"]
    assert "measured" not in parameters
    assert time_to_end["measured"] > 0
    assert time_to_end["full_model_measured"] > 0


def test_measured_times_are_scaled_as_the_tables_are(folder, monkeypatch):
    def times(model, subnet, phase, *, batch, tokens):
        assert (batch, tokens) == (1, 16)
        return Timing(((0.5,),), {"prefill": 200.0, "decode": 2.0}[phase], 0.0)

    monkeypatch.setattr(explaining, "_timed", times)
    model = ElasticModel.from_pretrained(folder)
    for text, factor_of_prefill, factor_of_decode in (
        ("tpot=5ms", 0, 1),
        ("ttft=0.5x", 1, 0),
        ("ttft=50ms@24", 1.5, 0),
        ("e2e=0.5x@8+101", 0.5, 100),
        ("e2e=0.5x@16+1", 1, 0),
    ):
        ceiling = Ceiling(find_table(model, folder, "tpot"), 5.0, text)
        measured = explaining.measured_ms(model, ceiling, model.search_space.full, folder)
        ms = factor_of_prefill * 100 + factor_of_decode
        assert measured[:2] == pytest.approx((ms, 2 * ms))


def test_tables_of_another_device_need_to_be_allowed(folder, text, tmp_path, capsys):
    rename_device(folder)
    sizes = ["--text", str(text), "--tokens", "128", "--block-tokens", "64"]
    for command, *options in (
        ["route", str(folder), "--budget", "0.6x"],
        ["evaluate", str(folder), "--budget", "0.6x", *sizes],
        ["generate", str(folder), "The quick", "--budget", "0.6x", "--max-new-tokens", "2"],
        ["export", str(folder), str(tmp_path / "small"), "--budget", "0.6x"],
    ):
        assert cli.main([command, *options]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            f"error: no latency table of decode in {folder} was measured here (its device is another"
        )
        assert error.endswith("or allow it: --any-device")
        assert cli.main([command, *options, "--any-device"]) == 0
        shown = capsys.readouterr()
        note = "note: using a latency table that was measured elsewhere: its device is another machine"
        assert note in (shown.out if command == "route" else shown.err)
        assert "measured: " not in shown.out  # times here say nothing about a table of elsewhere


def test_a_router_for_another_device_needs_to_be_allowed(folder, text, monkeypatch, capsys):
    def stop(sensitivity, table, *arguments, **options):
        raise ValueError(f"for {table.conditions['device']}")

    monkeypatch.setattr(making, "train_router", stop)
    rename_device(folder)
    assert cli.main(router_arguments(folder, text)) == 2
    assert "or allow it: --any-device" in capsys.readouterr().err
    assert cli.main([*router_arguments(folder, text), "--any-device"]) == 2
    err = capsys.readouterr().err
    assert "measured elsewhere: its device is another machine" in err
    assert err.endswith("error: for another machine\n")


def test_a_budget_of_time_needs_a_table(ranked, capsys):
    assert cli.main(["route", str(ranked), "--budget", "12ms"]) == 2
    assert f"Measure one: flextron measure-latency {ranked} --phase decode" in capsys.readouterr().err
    assert cli.main(["generate", str(ranked), "fox", "--budget", "parameters=1k"]) == 2
    assert "is below the smallest sub-network" in capsys.readouterr().err


def test_evaluate_takes_budgets_beside_sub_networks(folder, text, capsys):
    arguments = ["evaluate", str(folder), "--text", str(text), "--tokens", "128", "--block-tokens", "64"]
    assert cli.main([*arguments, "--subnet", "full", "60%", "--budget", "0.9x", "0.6x,weights=1x", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["full", "60%", "0.9x", "0.6x,weights=1x"]
    model = ElasticModel.from_pretrained(folder)
    for row in rows[2:]:
        assert Subnet(**row["subnet"]) == route(model, row["name"]).subnet
    assert "note: weights=1x is all the full model needs" in err
    assert cli.main([*arguments, "--budget", "0.6x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("above full")
    assert [line.split()[0] for line in lines[2:]] == ["full", "0.6x"]


def test_generate_and_export_take_a_budget(folder, tmp_path, capsys):
    assert cli.main(["generate", str(folder), "The quick", "--budget", "2x", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert "note: tpot=2x is more than the full model needs" in err
    assert "note" not in out
    assert cli.main(["generate", str(folder), "The quick", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == out
    assert cli.main(["export", str(folder), str(tmp_path / "small"), "--budget", "0.6x"]) == 0
    (tmp_path / "chosen.json").write_text(route(ElasticModel.from_pretrained(folder), "0.6x").subnet.to_json())
    wish = ["--subnet", str(tmp_path / "chosen.json")]
    assert cli.main(["export", str(folder), str(tmp_path / "same"), *wish]) == 0
    config = (tmp_path / "small/config.json").read_text()
    assert config == (tmp_path / "same/config.json").read_text()
    assert "per_layer_config" in config


@pytest.mark.parametrize("command", [["rank", "--overwrite"], ["export", "--overwrite"]])
def test_a_model_is_never_replaced_by_what_is_made_of_it(command, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    before = sorted(path.name for path in folder.iterdir())
    verb, *options = command
    assert cli.main([verb, str(folder), str(tmp_path / "x" / ".." / "model"), *options]) == 2
    assert "itself, which this run reads" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_the_system_refuses_is_one_line_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def refuse(_):
        raise PermissionError(13, "Permission denied", "/some/file")

    def bug(_):
        raise KeyError("width")

    monkeypatch.setitem(cli._RUN, cli.EnvConfig, refuse)
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "error: /some/file: Permission denied.\n"
    monkeypatch.setitem(cli._RUN, cli.EnvConfig, bug)
    with pytest.raises(KeyError, match="width"):
        cli.main(["env"])
    assert "this is a bug in flextron" in capsys.readouterr().err


OUTPUTS = f"""
. "$0"; cd "$1"
{sys.executable} -m flextron.cli env >&-; echo "closed output: $?"
{sys.executable} -m flextron.cli nosuch 2>&-; echo "closed errors: $?"
{sys.executable} -m flextron.cli --help >&- 2>&-; echo "both closed: $?"
{sys.executable} -m flextron.cli --help >/dev/full; echo "full disk: $?"
{sys.executable} -m flextron.cli nosuch 2>/dev/full; echo "full disk of errors: $?"
({sys.executable} -m flextron.cli --help; echo "reader gone: $?" >&2) | true
"""


def test_outputs_that_cannot_be_written_end_in_no_traceback(tmp_path):
    found = subprocess.run(
        ["bash", "-c", OUTPUTS, "/dev/null", tmp_path], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    codes = dict(line.split(": ") for line in found.stdout.splitlines())
    assert codes == {
        "closed output": "0", "closed errors": "2", "both closed": "0", "full disk": "2", "full disk of errors": "2",
    }  # fmt: skip
    full, gone = found.stderr.splitlines()
    assert full.startswith("error: ")
    assert full.endswith("No space left on device.")
    assert gone == "reader gone: 1"


def test_a_terminal_of_ascii_shows_all_it_can(ranked, text, monkeypatch, capsysbinary):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(["evaluate", str(ranked), "--text", str(text), "--tokens", "128", "--block-tokens", "64"]) == 0
    assert b"\\xb1" in stdout.buffer.getvalue()


WRONG_PLACES = [
    (["route", "{}/nowhere", "--budget", "0.6x"], "no such checkpoint: {}/nowhere"),
    (["route", "nowhere", "--budget", "0.6x"], "no such folder: nowhere"),
    (["rank", "{}/nowhere", "{}/out"], "no such checkpoint: {}/nowhere"),
    (["train-router", "nowhere"], "no such folder: nowhere"),
    (["evaluate", "{}", "--tasks", "arc_easy"], "{} is not a checkpoint: it has no config.json."),
    (["evaluate", "{}/m", "--tasks", "nosuch"], "there is no task 'nosuch' among those of lm-eval"),
    (["evaluate", "{}/m", "--tasks", "piqa@x"], "cannot read the task 'piqa@x'; write NAME or NAME@SHOTS"),
    (["evaluate", "{}/m", "--tasks", ""], "cannot read the task ''"),
    (["generate", "x" * 300, "a"], "xxx"),
]


def test_wrong_places_and_tasks_are_told_before_torch_is_imported(checkpoint, tmp_path):
    (tmp_path / "m").symlink_to(checkpoint)
    cases = [[[part.format(tmp_path) for part in arguments], said.format(tmp_path)] for arguments, said in WRONG_PLACES]
    code = (
        "import io, json, sys; from contextlib import redirect_stderr; sys.argv = ['flextron']\n"
        "from flextron import cli\n"
        "for arguments, said in json.loads(sys.stdin.read()):\n"
        "    with redirect_stderr(io.StringIO()) as errors: code = cli.main(arguments)\n"
        "    lines = errors.getvalue().splitlines()\n"
        "    assert (code, len(lines)) == (2, 1) and lines[0].startswith('error: ' + said), (arguments, code, lines)\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(cases), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert found.stderr == ""


@pytest.mark.parametrize(
    "options", [["--device", device] for device in ("meta", "tpu", "cuda:99", "")] + [["--dtype", "int3"]], ids=str
)
def test_devices_that_are_not_there_are_one_line(checkpoint, options, capsys):
    try:
        code = cli.main(["generate", str(checkpoint), "The quick", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_too_little_memory_is_one_line(checkpoint, text, tmp_path, capsys):
    sizes = ["--tokens", "256", "--block-tokens", "64", "--lora-rank", str(10**14)]
    assert cli.main(["train", str(checkpoint), str(tmp_path / "out"), "--data", str(text), *sizes]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: not enough memory: ")
