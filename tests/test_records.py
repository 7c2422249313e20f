"""What is read back from JSON has the types that its reader names; a journal gives its good lines."""

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import pytest

from flextron.errors import LONGEST, FlextronError
from flextron.records import MAY_BE_NAN, Journal, RecordError, checked, parse_record


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    rows: dict[str, tuple[tuple[float, ...], ...]]
    rank: Annotated[float, MAY_BE_NAN]
    about: dict[str, Any]
    name: str | None = None
    kept: bool = False


class Known(TypedDict, total=False):
    batch: int


GOOD = {
    "inner": {"widths": [1, 2]},
    "rows": {"a": [[0.5, 1]]},
    "rank": float("nan"),
    "about": {"state": 2**100, "x": [1]},
}


def test_good_data_become_the_dataclass():
    found = checked(GOOD, Outer)
    assert (found.inner, found.rows) == (Inner((1, 2)), {"a": ((0.5, 1.0),)})
    assert found.about == GOOD["about"]
    assert found.rank != found.rank


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": None}, "inner is None, not an object"),
        ({"inner": {"widths": [1, True]}}, "inner.widths[1] is True, not a whole number"),
        ({"inner": {"widths": [1, "2"]}}, "inner.widths[1] is '2', not a whole number"),
        ({"inner": {"widths": [10**30]}}, "inner.widths[0] is a huge number, not a whole number"),
        ({"inner": {"widths": 3}}, "inner.widths is 3, not a list"),
        ({"inner": {}}, "inner lacks ['widths']"),
        ({"rows": {"a": [[float("inf")]]}}, "rows.a[0][0] is inf, not a finite number"),
        ({"rows": {"a": [[10**400]]}}, "rows.a[0][0] is a huge number, not a finite number"),
        ({"rows": []}, "rows is [], not an object"),
        ({"rank": float("inf")}, "rank is inf, not a finite number"),
        ({"rank": None}, "rank is None, not a number"),
        ({"about": {"x": [1, {"y": float("nan")}]}}, "about.x[1].y is nan, not a finite number"),
        ({"about": {"x": "\ud800"}}, "about.x is '\\ud800', not text"),
        ({"name": 3}, "name is 3, not text"),
        ({"kept": 1}, "kept is 1, not true or false"),
        ({"colour": 1}, "it has the unknown keys ['colour']"),
        ({"name": ["x" * 1000]}, f"name is ['{'x' * 58}…, not text"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(RecordError) as caught:
        checked({**GOOD, **change}, Outer)
    assert str(caught.value) == message


def test_a_typed_dict_checks_the_keys_that_it_knows():
    assert checked({"batch": 1, "more": [1]}, Known) == {"batch": 1, "more": [1]}
    with pytest.raises(RecordError, match=r"conditions\.batch is '1', not a whole number"):
        checked({"batch": "1"}, Known, "conditions")


def test_data_nested_deeply():
    data: Any = []
    for _ in range(100_000):
        data = [data]
    with pytest.raises(RecordError, match="nested too deeply"):
        checked({"about": data}, Known)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, b"\xff{}", "1" * 5000, "null", "{", '{"version": true}', '{"version": 1.0}']
)
def test_no_record(text):
    with pytest.raises(RecordError):
        parse_record(text, version=1)


def test_a_message_is_one_line_with_its_end():
    assert str(FlextronError("cannot read it:\n  line 3\n  ^. Delete it.")) == "cannot read it: line 3 ^. Delete it."
    message = str(FlextronError("cannot read M: " + "x" * 100_000 + ". Delete it."))
    assert len(message) == LONGEST
    assert message.startswith("cannot read M: xx")
    assert message.endswith(". Delete it.")


class TestJournal:
    def test_broken_lines_in_the_middle_are_told_and_kept(self, tmp_path, capsys):
        file = tmp_path / "j.jsonl"
        content = b'{"a": 1}\n{"a": \xff}\n[]\n{"a": 2}\n'
        file.write_bytes(content + b'{"a": 3')
        assert Journal(file).read() == [{"a": 1}, {"a": 2}]
        assert capsys.readouterr().err.startswith(f"note: in {file}, line 2 is left out, because it is not JSON (")
        assert file.read_bytes() == content  # but for the line that a crash cut off

    def test_what_cannot_be_made_is_a_broken_line(self, tmp_path, capsys):
        file = tmp_path / "j.jsonl"
        file.write_text('{"a": 1}\n{"b": 2}\n{"a": NaN}\n{"a": "x"}\n')
        assert Journal(file).read(lambda record: checked(record["a"], float, "a")) == [1.0]
        err = capsys.readouterr().err
        assert "line 2 is left out" in err
        assert err.endswith("; so are 2 more lines.\n")
        assert err.count("\n") == 1
