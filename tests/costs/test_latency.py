"""Latency tables: fits of known tables, timing by synthetic clocks, tiny models for real; files and messages."""

from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
import torch

import tiny
from flextron.costs.busy import ProcessorTime
from flextron.costs.fitting import designed, fit, random_subnets
from flextron.costs.latency import measure_latency
from flextron.costs.saved import describe, find_table, save_table, table_file, table_from_csv
from flextron.costs.table import CostTable, linear_table
from flextron.costs.timing import RETRIES, TOKENS, present_conditions, time_interleaved, timed_run
from flextron.errors import CostError
from flextron.inference.decoder import Decoder
from flextron.model import ElasticModel
from flextron.subnet import SearchSpace, Subnet

SMALL = SearchSpace(tiny.LAYERS, (0, 8, 20, tiny.NEURONS), (0, 1, tiny.KV_GROUPS))
LARGE = SearchSpace(12, tuple(range(0, 1537, 64)), (0, 1, 2, 3))
NONE_SKIPPED = SearchSpace(12, (512, 1024, 1536), (1, 2, 3))
ONE_NEURON_WIDTH = SearchSpace(6, (1536,), (0, 1, 2, 3))
ONE_GROUP_WIDTH = SearchSpace(6, (0, 512, 1536), (3,))
SPACES = [SMALL, LARGE, NONE_SKIPPED, ONE_NEURON_WIDTH, ONE_GROUP_WIDTH]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def known(space: SearchSpace, fixed: float = 2.0, power: float = 1.0) -> CostTable:
    """A fifth of a sub-layer's cost comes with its first unit, the rest by the power of its width."""

    def row(choices, cost):
        return tuple(cost * (0.2 + 0.8 * (width / choices[-1]) ** power) if width else 0 for width in choices)

    rows = ((row(choices, cost),) * space.layers for choices, cost in ((space.neurons, 1.0), (space.kv_groups, 0.6)))
    return CostTable(space, "tpot", "ms", fixed, *rows)


def fitted(space: SearchSpace, truth: CostTable, noise: float = 0.0, seed: int = 0) -> CostTable:
    draw = rng(seed)
    subnets = designed(space, 28, draw)
    times = [truth.price(subnet) * (1 + noise * draw.normal()) for subnet in subnets]
    return fit(space, subnets, times, metric="tpot")


def largest_error(found: CostTable, truth: CostTable) -> float:
    space = truth.search_space
    subnets = [space.full, space.smallest, *random_subnets(space, 30, rng(99))]
    return max(abs(found.price(subnet) / truth.price(subnet) - 1) for subnet in subnets)


# ------------------------------------------------------------------ which sub-networks


@pytest.mark.parametrize("space", SPACES)
def test_designs_go_from_the_smallest_to_the_full_model(space):
    subnets = designed(space, 20, rng())
    assert (subnets[0], subnets[-1], len(subnets)) == (space.smallest, space.full, 20)
    for subnet in [*subnets, *random_subnets(space, 20, rng())]:
        space.check(subnet)
    sizes = [
        sum(subnet.neurons) / space.neurons[-1] + sum(subnet.kv_groups) / space.kv_groups[-1] for subnet in subnets
    ]
    assert np.corrcoef(sizes, range(20))[0, 1] > 0.8


def test_designs_visit_every_width_and_differ_between_layers():
    subnets = designed(LARGE, 28, rng())
    assert {width for subnet in subnets for width in subnet.neurons} == set(LARGE.neurons)
    assert sum(subnet.is_uniform for subnet in subnets) == 2


@pytest.mark.parametrize("draw_subnets", [designed, random_subnets])
def test_the_seed_decides(draw_subnets):
    assert draw_subnets(LARGE, 12, rng(3)) == draw_subnets(LARGE, 12, rng(3))
    assert draw_subnets(LARGE, 12, rng(3)) != draw_subnets(LARGE, 12, rng(4))


# ------------------------------------------------------------------ the fit


@pytest.mark.parametrize("space", [SMALL, LARGE])
def test_a_known_table_is_found_again(space):
    truth = known(space)
    found = fitted(space, truth)
    assert found.fixed == pytest.approx(truth.fixed, rel=0.01)
    for axis in ("neurons", "kv_groups"):
        for row, true_row in zip(getattr(found, axis), getattr(truth, axis), strict=True):
            assert row == pytest.approx(true_row, rel=0.01, abs=1e-9)
    assert (found.metric, found.unit) == ("tpot", "ms")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("space", SPACES)
def test_noise_of_one_percent_costs_little(space, seed):
    """Whether or not 0 is a width, and with one width only on an axis."""
    truth = known(space)
    assert largest_error(fitted(space, truth), truth) < 0.01
    assert largest_error(fitted(space, truth, noise=0.01, seed=seed), truth) < 0.05


@pytest.mark.parametrize("power", [0.5, 2])
def test_curved_costs_are_followed(power):
    truth = known(LARGE, power=power)
    assert largest_error(fitted(LARGE, truth), truth) < 0.03


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_noise_costs_rise_with_the_width(seed):
    found = fitted(LARGE, known(LARGE), noise=0.5, seed=seed)
    for row in (*found.neurons, *found.kv_groups):
        assert row[0] == 0
        assert all(low <= high for low, high in pairwise(row))


def test_costs_that_do_not_depend_on_the_width():
    found = fit(SMALL, designed(SMALL, 12, rng()), [5.0] * 12, metric="ttft")
    assert found.smallest == pytest.approx(found.full) == pytest.approx(5)


def test_sizes_of_the_numbers_do_not_matter():
    in_s = fitted(SMALL, known(SMALL).scaled(1e-6))
    assert in_s.full == pytest.approx(1e-6 * known(SMALL).full, rel=0.01)


def test_too_few_sub_networks():
    with pytest.raises(CostError, match="at least 4 measured sub-networks, of different widths; got 3"):
        fit(SMALL, designed(SMALL, 3, rng()), [1, 2, 3], metric="tpot")


@pytest.mark.parametrize(
    "subnets",
    [
        [SMALL.full] * 9,
        [SMALL.uniform(width) for width in (*SMALL.neurons, 8)],
        [SMALL.uniform(0, 0), SMALL.uniform(0, 0), SMALL.full, SMALL.full],
    ],
)
def test_sub_networks_that_do_not_tell_the_axes_apart(subnets):
    with pytest.raises(CostError, match=r"do not tell what neurons and kv_groups cost.* wide on one axis and narrow"):
        fit(SMALL, subnets, range(1, len(subnets) + 1), metric="tpot")


def test_with_one_choice_nothing_has_to_be_told_apart():
    space = SearchSpace(2, (0, 8), (3,))
    found = fit(space, [space.full, space.smallest] * 2, [4, 2, 4, 2], metric="tpot")
    assert (found.full, found.smallest) == pytest.approx((4, 2))


# ------------------------------------------------------------------ timing, by a synthetic clock

SUBNETS = designed(SMALL, 10, rng())
TRUTH = known(SMALL)
RATIOS = [TRUTH.price(subnet) / TRUTH.full for subnet in SUBNETS]


UNTOLD = ProcessorTime(wall=0.0, own=0.0, others=None)  # the real processor's load has no part in made-up times


def timed(prepare, rounds=2, repeats=3, seed=0):
    how = {"rounds": rounds, "repeats": repeats, "draw": rng(seed)}
    return time_interleaved(prepare, SMALL.full, SUBNETS, read=lambda: UNTOLD, **how)


def medians(timing) -> list[float]:
    return [float(np.median(ratios)) for ratios in timing.ratios]


@pytest.mark.parametrize("repeats", [1, 12])
def test_a_machine_that_slows_down_cancels(repeats):
    clock = count()
    runs = 4 * len(SUBNETS) * (repeats + 1)

    def prepare(subnet):
        return lambda: TRUTH.price(subnet) * (1 + next(clock) / runs)

    timing = timed(prepare, rounds=2, repeats=repeats)
    assert next(clock) / runs > 0.5
    assert medians(timing) == pytest.approx(RATIOS, rel=0.02)
    assert timing.milliseconds == pytest.approx([timing.full_ms * ratio for ratio in RATIOS], rel=0.02)
    assert 0.05 < timing.noise < 0.3


def test_on_a_steady_machine_times_are_what_they_are():
    timing = timed(lambda subnet: lambda: TRUTH.price(subnet))
    assert (timing.full_ms, timing.noise) == (TRUTH.full, 0)
    assert timing.milliseconds == pytest.approx([TRUTH.price(subnet) for subnet in SUBNETS])
    assert {len(ratios) for ratios in timing.ratios} == {2}


def test_single_runs_that_are_slow_do_not_count():
    prepared = count()

    def prepare(subnet):
        runs, slow = count(), next(prepared) > 0  # the full model's own runs stay steady
        return lambda: TRUTH.price(subnet) * (10 if next(runs) == 2 and slow else 1)

    assert medians(timed(prepare, repeats=5)) == pytest.approx(RATIOS)


def test_what_differs_between_rounds_is_timed_again():
    odd, times = SUBNETS[4], count()

    def prepare(subnet):
        factor = 1.5 if subnet == odd and next(times) == 0 else 1
        return lambda: TRUTH.price(subnet) * factor

    timing = timed(prepare)
    again = 2 + RETRIES
    assert [len(ratios) for ratios in timing.ratios] == [again if subnet == odd else 2 for subnet in SUBNETS]
    assert medians(timing) == pytest.approx(RATIOS)


def test_sub_networks_are_timed_in_another_order_each_round_by_the_seed():
    def order(seed):
        prepared = []

        def prepare(subnet):
            prepared.append(subnet)
            return lambda: 1.0

        timed(prepare, seed=seed)
        return prepared

    assert order(1) == order(1) != order(2)
    first, *both = order(1)
    rounds = both[: len(SUBNETS)], both[len(SUBNETS) :]
    assert first == SMALL.full
    assert rounds[0] != rounds[1]
    assert [sorted(map(str, part)) for part in rounds] == [sorted(map(str, SUBNETS))] * 2


# ------------------------------------------------------------------ tiny models, for real


def measure(model, **changes) -> CostTable:
    return measure_latency(model, **{"tokens": 16, "designs": 8, "held_out": 2, "rounds": 1, **changes})


@pytest.fixture(scope="module")
def gpt2() -> ElasticModel:
    return ElasticModel(tiny.plain_model("gpt2"), search_space=SearchSpace(tiny.LAYERS, (0, 20, 40), (0, 2, 6)))


@pytest.mark.timing
@pytest.mark.parametrize(
    ("kind", "phase", "batch", "engine"),
    [
        ("llama", "decode", 1, "flextron decoder"),
        ("llama", "decode", 2, "transformers"),
        ("llama", "prefill", 2, "transformers"),
        ("gpt2", "decode", 1, "transformers"),
        ("gpt2", "prefill", 1, "transformers"),
    ],
)
def test_measured_tables(kind, phase, batch, engine, request):
    model = request.getfixturevalue(kind)
    before = model.subnet
    table = measure(model, phase=phase, batch=batch, rounds=3, seed=3)
    assert model.subnet == before
    assert 0 < table.smallest < table.full
    assert (table.search_space, table.unit) == (model.search_space, "ms")
    metric, tokens = {"decode": ("tpot", "context_tokens"), "prefill": ("ttft", "prompt_tokens")}[phase]
    assert table.metric == metric
    conditions = dict(table.conditions)
    assert conditions.pop("full_ms") > 0
    assert conditions.pop("machine_noise") >= 0
    assert conditions.pop("rounds_differ") >= 0
    others = conditions.pop("other_programs")
    assert others is None or 0 <= others <= 1
    conditions.pop("warning", None)  # if this machine is busy now
    assert 0 <= conditions.pop("error_median") <= conditions.pop("error_worst")
    assert conditions.pop("device").endswith(" cores")
    assert conditions == {
        "dtype": "float32",
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "transformers": present_conditions(model)["transformers"],
        "phase": phase,
        "batch": batch,
        tokens: 16,
        "engine": engine,
        "rounds": 3,
        "seed": 3,
        "sub_networks": 8,
        "held_out": 2,
    }


def test_the_error_needs_held_out_sub_networks(llama):
    conditions = measure(llama, phase="prefill", held_out=0).conditions
    assert (conditions["error_median"], conditions["error_worst"]) == (None, None)


@pytest.mark.parametrize(("kind", "batch"), [("llama", 2), ("gpt2", 1), ("gemma3_text", 2)])
def test_every_decoding_run_sees_the_same_text(kind, batch):
    """Past a sliding window, too, and where the first layer's attention is skipped."""
    model = ElasticModel(tiny.plain_model(kind))
    groups = model.search_space.kv_groups[-1]
    run = timed_run(model, "decode", batch=batch, tokens=tiny.TIME)(Subnet((40, 0, 8), (0, groups, 1)))
    seen = []

    def note(module, args, kwargs):
        seen.append((kwargs["past_key_values"].get_seq_length(), tuple(args[0].shape)))

    model.lm.register_forward_pre_hook(note, with_kwargs=True)
    assert min(run(), run(), run()) > 0
    assert seen == [(tiny.TIME, (batch, 1))] * 3


def test_the_own_decoder_reads_a_cache_that_was_written(llama, monkeypatch):
    made = []

    class Noted(Decoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for cache in self._caches:
                cache.fill_(torch.nan)
            made.append(self)

    monkeypatch.setattr("flextron.costs.timing.Decoder", Noted)
    run = timed_run(llama, "decode", batch=1, tokens=10)(Subnet((40, 0, 8), (0, 3, 1)))
    assert min(run(), run()) > 0
    assert (made[0].position, made[0].max_tokens) == (11, 11)
    made[0].rewind(10)
    assert made[0].step(0).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "both"}, "phase is 'both'; it must be one of: prefill, decode"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"designs": 7}, "designs is 7; it must be at least 8"),
        ({"held_out": -1}, "held_out is -1; it must be at least 0"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"tokens": 64}, "a text of 65 tokens is too long for this model, which has 64 positions"),
        ({"tokens": 65, "phase": "prefill"}, "a text of 65 tokens is too long"),
    ],
)
def test_bad_arguments(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(llama, **changes)


def test_the_longest_text_fits(gpt2):
    assert timed_run(gpt2, "decode", batch=1, tokens=63)(gpt2.search_space.full)() > 0
    assert timed_run(gpt2, "prefill", batch=1, tokens=64)(gpt2.search_space.full)() > 0


# ------------------------------------------------------------------ beside a checkpoint


def made_up(model, metric="tpot", fixed=1.0, tokens=512, space=None, **changes) -> CostTable:
    space = space or model.search_space
    conditions = {**present_conditions(model), "batch": 1, TOKENS[metric]: tokens, **changes}
    per_unit = {"per_neuron": [0.1] * space.layers, "per_kv_group": [0.2] * space.layers}
    return linear_table(space, metric=metric, unit="ms", fixed=fixed, conditions=conditions, **per_unit)


def test_what_is_saved_is_found(llama, tmp_path):
    table = measure(llama, phase="prefill")
    file = save_table(tmp_path, table)
    assert file == table_file(tmp_path, table)
    assert file.parent == tmp_path / "latency"
    assert file.name.startswith("ttft-")
    assert file.name.endswith("float32-b1-t16.json")
    assert find_table(llama, tmp_path, "ttft") == table


def test_the_nearest_length_is_taken(llama, tmp_path):
    for tokens in (128, 1024, 4096):
        for metric in ("tpot", "ttft"):
            save_table(tmp_path, made_up(llama, metric, tokens=tokens))
    assert len(list((tmp_path / "latency").iterdir())) == 6
    for asked, taken in ((1, 128), (128, 128), (600, 1024), (2559, 1024), (2561, 4096), (10**6, 4096), (None, 128)):
        for metric in ("tpot", "ttft"):
            assert find_table(llama, tmp_path, metric, tokens=asked) == made_up(llama, metric, tokens=taken)


def test_the_same_conditions_again_replace_the_file(llama, tmp_path):
    old, new = made_up(llama, fixed=1), made_up(llama, fixed=2)
    assert save_table(tmp_path, old) == save_table(tmp_path, new)
    assert find_table(llama, tmp_path, "tpot") == new


def test_the_smallest_batch_is_taken(llama, tmp_path):
    for batch in (8, 2):
        save_table(tmp_path, made_up(llama, batch=batch))
    assert find_table(llama, tmp_path, "tpot").conditions["batch"] == 2
    save_table(tmp_path, made_up(llama, tokens=9999))
    assert find_table(llama, tmp_path, "tpot", tokens=512).conditions["batch"] == 1


def test_nothing_measured_yet(llama, tmp_path):
    save_table(tmp_path, made_up(llama, "ttft"))
    way_out = rf"Measure one: flextron measure-latency {tmp_path} --phase decode"
    with pytest.raises(CostError, match=rf"{tmp_path} has no latency table of decode \(tpot\)\. {way_out}"):
        find_table(llama, tmp_path, "tpot")
    with pytest.raises(CostError, match=r"no latency table of prefill \(ttft\)\. .* --phase prefill"):
        find_table(llama, tmp_path / "nowhere", "ttft")


def test_tables_of_another_search_space_are_left_out(llama, tmp_path):
    save_table(tmp_path, made_up(llama, space=SMALL, tokens=64))
    with pytest.raises(CostError, match=r"latency tables of decode in .* are of another search space\. Measure one: "):
        find_table(llama, tmp_path, "tpot", foreign=True)
    ours = made_up(llama, tokens=512)
    save_table(tmp_path, ours)
    assert find_table(llama, tmp_path, "tpot", tokens=64) == ours


@pytest.mark.parametrize(
    ("key", "value"), [("device", "NVIDIA H100"), ("dtype", "bfloat16"), ("torch", "1.0"), ("transformers", "1.0")]
)
def test_measured_elsewhere(llama, tmp_path, key, value):
    elsewhere = made_up(llama, **{key: value})
    save_table(tmp_path, elsewhere)
    differs = f"its {key} is {value}, here it is {present_conditions(llama)[key]}"
    with pytest.raises(CostError) as error:
        find_table(llama, tmp_path, "tpot")
    assert f"was measured here ({differs}). Measure one: flextron measure-latency {tmp_path}" in str(error.value)
    assert str(error.value).endswith("or allow it: --any-device")
    warnings = []
    assert find_table(llama, tmp_path, "tpot", foreign=True, warn=warnings.append) == elsewhere
    assert warnings == [f"using a latency table that was measured elsewhere: {differs}."]


def test_ours_comes_before_others_and_the_same_device_before_other_versions(llama, tmp_path):
    device, versions, ours = (
        made_up(llama, tokens=100, device="NVIDIA H100"),
        made_up(llama, tokens=200, torch="1.0", transformers="1.0"),
        made_up(llama, tokens=9999),
    )
    warnings = []
    for table, said in ((device, 1), (versions, 2), (ours, 2)):
        save_table(tmp_path, table)
        assert find_table(llama, tmp_path, "tpot", tokens=100, foreign=True, warn=warnings.append) == table
        assert len(warnings) == said
    assert "its torch is 1.0" in warnings[1]
    assert "H100" not in warnings[1]


def test_what_a_table_does_not_say_is_not_compared(llama, tmp_path):
    table = replace(made_up(llama), conditions={"device": present_conditions(llama)["device"]})
    assert save_table(tmp_path, table).name.startswith("tpot-")
    assert find_table(llama, tmp_path, "tpot") == table
    assert table_file(tmp_path, replace(table, conditions={})).name == "tpot.json"


def test_a_damaged_table_is_named(llama, tmp_path):
    file = save_table(tmp_path, made_up(llama))
    file.write_text(file.read_text()[:100])
    with pytest.raises(CostError, match=f"cannot read the cost table {file}"):
        find_table(llama, tmp_path, "tpot")


# ------------------------------------------------------------------ times from elsewhere


def write_csv(folder, subnets, times, header="neurons,kv_groups,ms", encoding="utf8"):
    def text(widths):
        return str(widths[0]) if len(set(widths)) == 1 else " ".join(map(str, widths))

    file = folder / "times.csv"
    rows = (f"{text(s.neurons)},{text(s.kv_groups)},{ms}" for s, ms in zip(subnets, times, strict=True))
    file.write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return file


@pytest.mark.parametrize("encoding", ["utf8", "utf-8-sig"])
def test_csv(tmp_path, encoding):
    """Uniform and per-layer widths; with the byte order mark of spreadsheets, too."""
    file = write_csv(tmp_path, SUBNETS, map(TRUTH.price, SUBNETS), encoding=encoding)
    table = table_from_csv(file, SMALL, phase="decode", conditions={"device": "NVIDIA H100", "context_tokens": 64})
    assert largest_error(table, TRUTH) < 0.01
    assert (table.metric, table.unit) == ("tpot", "ms")
    conditions = dict(table.conditions)
    assert conditions.pop("error_median") < 0.01
    assert conditions == {
        "phase": "decode",
        "engine": "as in times.csv",
        "device": "NVIDIA H100",
        "context_tokens": 64,
    }
    named = table_from_csv(file, SMALL, phase="prefill", conditions={"engine": "vLLM 0.9"})
    assert (named.metric, named.conditions["engine"]) == ("ttft", "vLLM 0.9")


def test_csv_with_blanks_and_further_columns(tmp_path):
    file = write_csv(tmp_path, SUBNETS, map(TRUTH.price, SUBNETS))
    plain = table_from_csv(file, SMALL, phase="decode", conditions={})
    lines = file.read_text().splitlines()
    file.write_text("\n".join(f"a note, {line.replace(',', ', ')}" for line in lines))
    assert table_from_csv(file, SMALL, phase="decode", conditions={}) == plain


GOOD = "neurons,kv_groups,ms\n40,3,9\n0 8 20,3,4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"times\.csv lacks the columns \['neurons', 'kv_groups', 'ms'\]; it has \[\]"),
        ("neurons,ms\n1,2\n", r"times\.csv lacks the columns \['kv_groups'\]; it has \['neurons', 'ms'\]"),
        (GOOD + "9,3,5\n", r"times\.csv, line 4: neurons\[0\] is 9, not a choice"),
        (GOOD + "8,4,5\n", r"times\.csv, line 4: kv_groups\[0\] is 4; a layer of this model has 3"),
        (GOOD + "8 8,3,5\n", r"times\.csv, line 4: .* got 2 widths of neurons and 3 of kv_groups"),
        (GOOD + "wide,3,5\n", r"times\.csv, line 4: .*'wide'"),
        (GOOD + "8,3,fast\n", r"times\.csv, line 4: .*'fast'"),
        (GOOD + "8,3,nan\n", r"times\.csv, line 4: ms is nan; it must be a number above 0"),
        (GOOD + "8,3,0\n", r"times\.csv, line 4: ms is 0; it must be a number above 0"),
        (GOOD + "8,3\n", r"times\.csv, line 4: could not convert string to float"),
        (GOOD + "8\n", r"times\.csv, line 4: .* got 3 widths of neurons and 0 of kv_groups"),
        (GOOD, r"times\.csv: a table needs at least 4 measured sub-networks, of different widths; got 2"),
        (GOOD + "40,3,9\n" * 3, r"times\.csv: .* do not tell what neurons and kv_groups cost"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    file = tmp_path / "times.csv"
    file.write_text(text)
    with pytest.raises(CostError, match=message):
        table_from_csv(file, SMALL, phase="decode", conditions={})


def test_csv_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "times.csv").write_bytes(b"neurons,kv_groups,ms\n\xff\xfe")
    for name in ("times.csv", "none.csv"):
        with pytest.raises(CostError, match=f"cannot read {tmp_path / name}: "):
            table_from_csv(tmp_path / name, SMALL, phase="decode", conditions={})


def test_csv_of_no_phase(tmp_path):
    with pytest.raises(ValueError, match="phase is 'training'; it must be one of: prefill, decode"):
        table_from_csv(tmp_path / "times.csv", SMALL, phase="training", conditions={})


# ------------------------------------------------------------------ for people


def test_description(llama, tmp_path):
    measured = {"held_out": 8, "error_median": 0.0071, "error_worst": 0.034, "machine_noise": 0.051, "engine": "own"}
    lines = describe(made_up(llama, **measured)).splitlines()
    assert lines[0] == f"tpot: full model {1 + 3 * 40 * 0.1 + 3 * 3 * 0.2:.2f} ms, smallest 1.00 ms"
    assert lines[1] == "on 8 sub-networks that the fit has not seen: median error 0.7%, worst 3.4%"
    assert lines[2] == "the full model's own time varied by 5.1% meanwhile"
    assert '"dtype": "float32", "engine": "own", "batch": 1' in lines[3]


def test_description_of_a_table_without_held_out_sub_networks(tmp_path):
    file = write_csv(tmp_path, SUBNETS, map(TRUTH.price, SUBNETS))
    lines = describe(table_from_csv(file, SMALL, phase="decode", conditions={})).splitlines()
    assert lines[1] == "median error on the sub-networks that it was fitted to: 0.0%"
    assert len(describe(known(SMALL)).splitlines()) == 2
