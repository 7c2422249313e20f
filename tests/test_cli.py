"""The command line as a user meets it: help, recipes, errors and exit codes; and the commands on a tiny checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import tiny
from flextron import cli
from flextron.config import COMMANDS, EvaluateConfig
from flextron.elastic import ElasticModel

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
    sizes = ["--tokens", "1024", "--sensitivity-tokens", "256"]
    assert cli.main(["rank", str(checkpoint), str(folder), "--text", str(text), *sizes]) == 0
    return folder


def test_help_is_instant_and_imports_no_torch():
    imports = (
        "import sys; sys.argv = ['flextron']; from flextron import cli\n"
        "try: cli.main(['rank', '--help'])\nexcept SystemExit: pass\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", imports + "print('torch' in sys.modules, 'numpy' in sys.modules)"],
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert found.stdout.splitlines()[-1] == "False False"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert run("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


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


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("tokns: 5", "--tokens"), ("- a\n- b", "must list options"), ("a: [", "cannot read the recipe")],
)
def test_bad_recipes_exit_2(recipe, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    try:
        code = cli.main(["evaluate", "m", "--recipe", str(path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_users_errors_are_one_line_without_a_traceback(tmp_path):
    found = run("evaluate", tmp_path / "nothing")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: no such checkpoint")


@pytest.mark.parametrize("arguments", [["--tokens", "1"], ["--subnet"], ["--subnet", "tiny"]])
def test_bad_values_exit_2(checkpoint, arguments):
    assert run("evaluate", checkpoint, *arguments).returncode == 2


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
    arguments = ["rank", checkpoint, out, "--text", text, "--tokens", "1024", "--sensitivity-tokens", "2048"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "flextron.cli", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    seen = ""
    while stage not in seen and (character := process.stderr.read(1)):
        seen += character
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ([] if stage == "loading" else ["out"])
    assert run(*arguments).returncode == 0
    assert "sensitivity.json" in {path.name for path in out.iterdir()}
