"""A fuzz of the command line: whatever is typed ends in exit code 0, or in 2 with one line; never in a traceback."""

import io
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from flextron import cli
from flextron.config import COMMANDS
from flextron.config.refusals import _field_names

SIZES = ["--text", "text.txt", "--tokens", "64"]
GOOD = {
    "rank": ["m", "out", *SIZES, "--sensitivity-tokens", "64"],
    "route": ["m", "--budget", "weights=0.6x"],
    "evaluate": ["m", *SIZES, "--block-tokens", "32"],
    "generate": ["m", "The quick", "--max-new-tokens", "2"],
    "export": ["m", "out"],
    "env": [],
}
"""What takes milliseconds; the other verbs meet only models that are not there."""
ABSENT = {
    "train": ["./none", "out", "--data", "text.txt"],
    "measure-latency": ["./none"],
    "train-router": ["./none"],
    "quickstart": ["--model", "./none", "--out", "out"],
}
WORDS = """
nan inf -inf -1 0 1 2 1.5 1e30 60% 1e9% nan% 0.5x nanx 12ms -1x neurons=8 neurons=-1 kv_groups=1,neurons=1e9 % é
cpu cpu:7 meta cuda:99 tpu float16 gguf decode piqa@x nosuch [] null @ @@1 text.txt m m/config.json ./none none/x
/dev/null . out.json -- - --help -h --no-json --tokns
"""
ODD = [*WORDS.split(), "", "9" * 30, "1" * 5000, "x" * 300, "a\0b", "\ud800"]
VALUES = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_characters="/\\"), max_size=12))


@st.composite
def command_lines(draw) -> list[str]:
    """A verb with arguments that work, among options with odd values; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.lists(VALUES, max_size=4))
    base = {**GOOD, **ABSENT}
    verb = draw(st.sampled_from(sorted(base)))
    # what makes a valid run long or write elsewhere is left out: more tokens than the text has are as many as it has
    names = sorted({*_field_names(COMMANDS[verb])} - {"model", "out", "prompt", "task_data", "tasks"})
    line = [verb, *base[verb]]
    for name in draw(st.lists(st.sampled_from(names), max_size=3)) if names else ():
        line += [f"--{name.replace('_', '-')}", *draw(st.lists(VALUES, min_size=0, max_size=2))]
    return line


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(checkpoint, folder / "m")
    (folder / "text.txt").write_text(tiny.TEXT * 20)
    return folder


def run(line: list[str]) -> tuple[int, list[str]]:
    """The exit code, and the lines of standard error."""
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            code = cli.main(line)
        except SystemExit as stop:
            code = stop.code
    return code, errors.getvalue().splitlines()


def check(line: list[str]) -> None:
    start = time.monotonic()
    code, said = run(line)
    shutil.rmtree("out", ignore_errors=True)
    errors = [text for text in said if text.startswith("error: ")]
    assert code in (0, 2), said
    assert len(errors) == bool(code), said
    assert not errors or (said[-1] == errors[0] and len(errors[0]) < 2000), said
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("examples", [80, pytest.param(1500, marks=pytest.mark.slow)])
def test_what_is_typed_ends_in_a_line(folder, monkeypatch, examples):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(line=command_lines())
    def each(line):
        check(line)

    each()
