"""`flextron serve` as a process: what it prints, how it starts, drains and ends."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from served import GREEDY_BODY, make_model

import tiny
from flextron import cli
from flextron.commands.serve import TRAINED, hardly_trained, shares_from
from flextron.config import ServeConfig
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.serving.api.address import bind
from flextron.serving.levels import make_levels
from flextron.training.sampling import even_sensitivity

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint whose sensitivities make levels."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model = make_model()
    model.save_pretrained(folder)
    tiny.in_nats(even_sensitivity(model)).save(folder)
    assert Sensitivity.is_in(folder)
    return folder


@contextmanager
def process(folder, *options):
    """`flextron serve` at a free port; yields the process, its URL, and what it printed until it was ready."""
    command = [sys.executable, "-m", "flextron.cli", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as started:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in started.stdout], daemon=True).start()
        try:
            printed = []
            while not printed or not printed[-1].startswith("curl"):
                printed.append(lines.get(timeout=300))
            yield started, printed[-1].split()[1].split("/v1")[0], printed
        finally:
            started.kill()


def post(url, **changes):
    """An answer whose body is still to be read."""
    body = json.dumps({**GREEDY_BODY, **changes}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})  # noqa: S310
    return urllib.request.urlopen(request, timeout=60)  # noqa: S310


def test_it_serves_drains_and_ends(folder):
    with process(folder, "--drain-seconds", "60", "--served-name", "small") as (started, url, printed):
        text = "".join(printed)
        assert "full  1.000x" in text
        assert "0.5x" in text
        assert "timing a few batches" in text
        with post(url, model="small", budget="0.7x") as answer:
            assert json.load(answer)["usage"]["flextron"]["asked"] == "0.7x"
        with post(url, max_tokens=600, stream=True, ignore_eos=True) as answer:
            begun = answer.read(200)
            started.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            with pytest.raises(OSError, match=r"503|refused"):  # HTTPError is one
                post(url)
            whole = begun + answer.read()
        assert started.wait(30) == 0
        assert whole.endswith(b"data: [DONE]\n\n")
        assert b'"completion_tokens":600' in whole


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(folder):
    with (
        process(folder, "--drain-seconds", "60") as (started, url, _),
        post(url, max_tokens=1900, stream=True, ignore_eos=True) as answer,
    ):
        assert answer.read(200)
        started.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 128 + signal.SIGTERM


def test_a_port_in_use_is_one_line_before_anything_is_loaded(folder, capsys):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: port {port} of 127.0.0.1 is in use; choose another with --port.\n"


def test_an_address_of_another_machine(folder, capsys):
    assert cli.main(["serve", str(folder), "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "cannot serve at 192.0.2.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--default-budget", "fast"], "cannot read the budget 'fast'"),
        (["--floor", "tpot=9ms"], '--floor is tpot=9ms; it must be a share of the full model, such as "0.5x".'),
        (["--port", "70000"], "--port is 70000; it must lie between 0 and 65535."),
        (["--max-batch", "0"], "--max-batch is 0; it must be at least 1."),
        (["--slo-tpot-ms", "-1"], "--slo-tpot-ms is -1.0; it must be milliseconds above 0."),
        (["--slo-tpot-ms", "9", "--default-budget", "tpot=9ms"], "Keep one."),
        (["--cors", "chat.example"], "write an origin such as https://chat.example.com"),
        (["--served-name", "a\nb"], "use printable ASCII characters"),
        (["--api-key", " "], "--api-key is empty"),
    ],
)
def test_options_that_do_not_fit(folder, arguments, message, capsys):
    try:
        code = cli.main(["serve", str(folder), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("arguments", [["--slo-tpot-ms", "0.001"], ["--default-budget", "0.1x"]])
def test_defaults_that_cannot_be_kept_end_it(folder, arguments, capsys):
    assert cli.main(["serve", str(folder), "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: budget ")


def test_a_server_that_all_reach_warns_without_a_key(folder, capsys, monkeypatch):
    monkeypatch.setattr("flextron.serving.api.server.serve", lambda _load, listening, _access, **_: listening.close())
    assert cli.main(["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 0  # noqa: S104
    assert "no --api-key is set" in capsys.readouterr().err
    monkeypatch.setenv("FLEXTRON_API_KEY", "secret")
    assert cli.main(["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 0  # noqa: S104
    assert "no --api-key" not in capsys.readouterr().err


def test_levels_smaller_than_what_is_trained_are_told(folder):
    model = ElasticModel.from_pretrained(folder)
    levels = make_levels(model, shares=[0.2, 0.4, 0.6, 0.9, 1.0]).levels
    shares = [f"{model.share(level.subnet):.0%}" for level in levels]
    small = [level for level in levels if model.share(level.subnet) < TRAINED]
    assert 1 < len(small) < len(levels)
    said = hardly_trained(model, levels)
    assert said.startswith(f"{small[0].name} to {small[-1].name} keep {shares[0]} to {shares[len(small) - 1]} of the")
    assert said.endswith(f"--floor {levels[len(small)].name} leaves them out.")
    assert hardly_trained(model, levels[:1]).startswith(f"{levels[0].name} keeps {shares[0]} of the")
    assert hardly_trained(model, levels[len(small) :]) is None


def test_levels_from_the_floor_up():
    assert shares_from("0.85x") == [0.85, 0.9, 0.95, 1.0]
    assert shares_from("0.82x")[:2] == [0.82, 0.85]
    assert shares_from("full") == [1.0]
    assert ServeConfig("m").adaptive


def test_ipv6():
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        with bind("::1", 0) as listening:
            assert listening.getsockname()[1]
    except Exception as error:
        pytest.skip(f"no IPv6 here: {error}")
