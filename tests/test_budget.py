"""`Budget`: every form reads back from its own text, and what cannot be read says what to write instead."""

import subprocess
import sys
from itertools import product

import pytest

from flextron.budget import Budget, Limit
from flextron.errors import BudgetError


def limits(text: str) -> tuple[Limit, ...]:
    return Budget.parse(text).limits


def refused(text: str) -> str:
    """The message, less its opening, which names the text."""
    with pytest.raises(BudgetError) as error:
        Budget.parse(text)
    opening = f"cannot read the budget {text!r}: "
    if len(text) > 300:  # the middle of a long message is left out
        return str(error.value).rpartition(": ")[2]
    assert str(error.value).startswith(opening)
    return str(error.value).removeprefix(opening)


FORMS = {
    "12ms": Limit("tpot", 12),
    "1.5s": Limit("tpot", 1500),
    "0.6x": Limit("tpot", 0.6, relative=True),
    "tpot=0.6x": Limit("tpot", 0.6, relative=True),
    "1.2x": Limit("tpot", 1.2, relative=True),
    ".5x": Limit("tpot", 0.5, relative=True),
    "ttft=200ms": Limit("ttft", 200),
    "ttft=0.7x": Limit("ttft", 0.7, relative=True),
    "ttft=200ms@512": Limit("ttft", 200, prompt_tokens=512),
    "ttft=0.7x@512": Limit("ttft", 0.7, relative=True, prompt_tokens=512),
    "e2e=3s@512+128": Limit("e2e", 3000, prompt_tokens=512, new_tokens=128),
    "e2e=0.5x@512+128": Limit("e2e", 0.5, relative=True, prompt_tokens=512, new_tokens=128),
    "40k": Limit("parameters", 40_000),
    "80M": Limit("parameters", 80e6),
    "1.2B": Limit("parameters", 1.2e9),
    "2T": Limit("parameters", 2e12),
    "parameters=0.5x": Limit("parameters", 0.5, relative=True),
    "parameters=80M": Limit("parameters", 80e6),
    "600kB": Limit("weights", 600e3),
    "150MB": Limit("weights", 150e6),
    "1.5GB": Limit("weights", 1.5e9),
    "2TB": Limit("weights", 2e12),
    "3KiB": Limit("weights", 3 * 2**10),
    "200MiB": Limit("weights", 200 * 2**20),
    "1.5GiB": Limit("weights", 1.5 * 2**30),
    "2TiB": Limit("weights", 2 * 2**40),
    "weights=0.5x": Limit("weights", 0.5, relative=True),
    "kv=20MB@4096": Limit("kv", 20e6, prompt_tokens=4096),
    "kv=0.5x": Limit("kv", 0.5, relative=True),
    "kv=0.5x@4096": Limit("kv", 0.5, relative=True, prompt_tokens=4096),
    "flops=0.5x": Limit("flops", 0.5, relative=True),
    "flops=200M": Limit("flops", 200e6),
    "flops=2G": Limit("flops", 2e9),
    "flops=2B": Limit("flops", 2e9),
    "flops=30k": Limit("flops", 30e3),
    "flops=4T": Limit("flops", 4e12),
}


@pytest.mark.parametrize(("text", "limit"), FORMS.items())
def test_every_form(text, limit):
    assert limits(text) == (limit,)
    assert Budget.parse(str(limit)) == Budget((limit,))


def test_several_hold_together_in_their_order():
    text = "tpot=12ms,weights=150MB,e2e=3s@512+128"
    assert limits(text) == (*limits("12ms"), *limits("150MB"), *limits("e2e=3s@512+128"))
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    ("loose", "strict"),
    [
        ("  12 ms , 80 M ", "tpot=12ms,parameters=80M"),
        ("e2e = 3 s @ 512 + 128", "e2e=3s@512+128"),
        ("kv\t=20 MB@4096", "kv=20MB@4096"),
        ("0.6X", "tpot=0.6x"),
        ("40K", "parameters=40k"),
        ("150mb", "weights=150MB"),
        ("150KB", "weights=150kB"),
        ("2GIB", "weights=2GiB"),
        ("5.x", "tpot=5x"),
    ],
)
def test_spaces_and_letters_that_can_mean_nothing_else(loose, strict):
    assert str(Budget.parse(loose)) == strict


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Limit("tpot", 1500), "tpot=1.5s"),
        (Limit("tpot", 0.25), "tpot=0.25ms"),
        (Limit("weights", 200 * 2**20), "weights=200MiB"),
        (Limit("weights", 150_000_000), "weights=150MB"),
        (Limit("parameters", 134_515_008), "parameters=134.515008M"),
        (Limit("parameters", 7), "parameters=0.007k"),
        (Limit("flops", 1.2e9), "flops=1.2G"),
        (Limit("kv", 0.5, relative=True), "kv=0.5x"),
    ],
)
def test_the_text_is_short_and_exact(limit, text):
    assert str(limit) == text
    assert limits(text) == (limit,)


@pytest.mark.parametrize("metric", ["tpot", "parameters", "weights", "flops"])
def test_every_value_reads_back_exactly(metric):
    values = [digits * 10.0**power for digits, power in product((0.1, 1 / 3, 2**0.5, 1e22 / 7), (-7, 0, 5))]
    for value, relative in product(values, (False, True)):
        budget = Budget((Limit(metric, value, relative),))
        assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.6", "'0.6' has no unit; write 0.6x for a multiple of the full model's, or a unit, such as 12ms or 80M."),
        ("ttft=0.7", "'ttft=0.7' has no unit; write ttft=0.7x for a multiple of the full model's, or ttft=200ms@512."),
        (
            "60%",
            "60% is a share of the layers' weights: use --subnet 60%. For a part of a cost write tpot=0.6x.",
        ),
        (
            "weights=62.5 %",
            "62.5% is a share of the layers' weights: use --subnet 62.5%. For a part of a cost write weights=0.625x.",
        ),
        (
            "12m",
            "'m' in '12m' is no unit (m and M differ). Use x for a multiple of the full model's; tpot: ms, s; "
            "parameters: k, M, B, T; weights: kB, MB, GB, TB, KiB, MiB, GiB, TiB.",
        ),
        ("latency=3ms", "there is no metric 'latency'; choose one of tpot, ttft, e2e, parameters, weights, kv, flops."),
        ("ttft=80M", "ttft cannot be in M; use ms, s or x, such as ttft=200ms@512."),
        ("parameters=80MB", "parameters cannot be in MB; use k, M, B, T or x, such as parameters=80M."),
        ("3G", "'3G' needs a name, such as flops=3G."),
        ("-3ms", "tpot is -3; a limit is a number above 0, such as tpot=12ms."),
        ("0x", "tpot is 0; a limit is a number above 0, such as tpot=12ms."),
        ("nan ms", "tpot is nan; a limit is a number above 0, such as tpot=12ms."),
        ("weights=infMB", "weights is inf; a limit is a number above 0, such as weights=150MB."),
        ("9" * 400 + "s", "tpot is inf; a limit is a number above 0, such as tpot=12ms."),
        ("1.2.3ms", "'1.2.3' in '1.2.3ms' is not a number; write one such as 1.5."),
        ("tpot=ms", "'tpot=ms' has no number where one belongs; write tpot=12ms."),
        ("tpot=", "'tpot=' has no number where one belongs; write tpot=12ms."),
        ("e2e=3s", "e2e needs the lengths of prompt and output, such as e2e=3s@512+128."),
        ("e2e=0.5x@512", "e2e needs the lengths of prompt and output, such as e2e=3s@512+128."),
        ("kv=20MB", "kv needs the number of tokens in the cache, such as kv=20MB@4096."),
        ("kv=20MB@0", "the lengths of kv must be whole numbers from 1 up, such as kv=20MB@4096."),
        ("e2e=3s@512+0", "the lengths of e2e must be whole numbers from 1 up, such as e2e=3s@512+128."),
        ("kv=1MB@8+8", "kv takes no output length; only e2e does, such as e2e=3s@512+128."),
        ("12ms@512", "tpot takes no length; write tpot=12ms. Only ttft, e2e and kv take one."),
        (
            "ttft=9ms@many",
            "cannot read the lengths 'many'; write the tokens of the prompt, and for e2e + the tokens of the output, "
            "such as ttft=200ms@512.",
        ),
        ("12ms,tpot=0.6x", "tpot is limited twice, by tpot=12ms and tpot=0.6x. Keep one."),
    ],
)
def test_what_cannot_be_read_says_what_to_write(text, message):
    assert refused(text) == message


@pytest.mark.parametrize("text", ["12MS", "12Ms", "3Mb", "80M parameters", "1e3ms", "12 12ms", "12ms@5@6"])
def test_no_unit_is_guessed(text):
    assert "is no unit" in refused(text) or "cannot read the lengths" in refused(text)


@pytest.mark.parametrize("text", [",", "12ms,", "ms", "many"])
def test_where_a_number_is_missing_all_forms_are_named(text):
    assert (
        "has no number where one belongs; write 12ms (time per output token), 0.6x (0.6 times the full model's"
        in refused(text)
    )


def test_empty():
    with pytest.raises(
        BudgetError,
        match=r"the budget is empty; write 12ms \(time.*, 0\.6x .*separate several limits by commas",
    ):
        Budget.parse("  ")
    with pytest.raises(BudgetError, match=r"a budget needs at least one limit: 12ms \(time"):
        Budget(())


def test_limits_are_checked_when_made_too():
    with pytest.raises(BudgetError, match="there is no metric 'speed'; choose one of tpot"):
        Limit("speed", 3)
    with pytest.raises(BudgetError, match="tpot is limited twice"):
        Budget([Limit("tpot", 3), Limit("tpot", 4)])
    assert hash(Budget([Limit("tpot", 3)])) == hash(Budget((Limit("tpot", 3),)))


def test_needs_no_torch():
    code = (
        "import sys; sys.argv = ['flextron'];"  # as the command line: a library registers its classes when imported
        "import flextron.budget; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
