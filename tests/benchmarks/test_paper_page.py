"""The results page (benchmarks/paper_page.py): differences at equal cost, and the text about them."""

import json
from dataclasses import asdict, replace

import pytest

from flextron.costs.table import CostTable
from flextron.subnet import SearchSpace, Subnet
from paper_page import SHAPE, Loss, write_page

CURVE = [Loss((5.0, 7.0), 0.5), Loss((4.0, 6.0), 0.6), Loss((3.0, 4.0), 1.0)]


@pytest.mark.parametrize(
    ("cost", "blocks"),
    [
        (0.5, (5.0, 7.0)),
        (0.6, (4.0, 6.0)),
        (1.0, (3.0, 4.0)),
        (0.55, (4.5, 6.5)),
        (0.8, (3.5, 5.0)),
        (0.4, (6.0, 8.0)),  # below the lowest point, the last line is extended
    ],
)
def test_losses_between_answers_lie_on_the_line_between_them(cost, blocks):
    assert Loss(blocks, cost).above(CURVE) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_answers_that_took_the_same_time_are_no_division_by_zero():
    curve = [Loss((5.0, 5.0), 0.5), Loss((4.0, 4.0), 0.5), Loss((3.0, 3.0), 1.0)]
    assert Loss((5.0, 5.0), 0.5, cost_error=0.1).above(curve)[0] in (0.0, 1.0)


def test_differences_are_paired_block_by_block():
    assert Loss((4.6, 6.6), 0.55).above(CURVE) == pytest.approx((0.1, 0.0), abs=1e-9)
    assert Loss((4.6, 6.8), 0.55).above(CURVE) == pytest.approx((0.2, 0.1))


def test_what_timing_may_be_off_by_counts_times_the_slope():
    """Between 0.5 and 0.6 of the time, the curve falls by 10 nats per full time, so 0.01 of it gives 0.1 nats."""
    assert Loss((4.6, 6.6), 0.55, cost_error=0.01).above(CURVE) == pytest.approx((0.1, 0.1))
    timed = [replace(CURVE[0], cost_error=0.02), CURVE[1], CURVE[2]]
    assert Loss((4.6, 6.6), 0.55, cost_error=0.01).above(timed) == pytest.approx((0.1, 0.1 * 2**0.5))
    assert Loss((4.6, 6.6), 0.55).above(timed) == pytest.approx((0.1, 0.0), abs=1e-9)  # the router's own widths


SPACE = SearchSpace(layers=2, neurons=(0, 4, 8), kv_groups=(0, 1))
TABLE = CostTable(SPACE, "ttft", "ms", 2.0, ((0, 1, 2),) * 2, ((0, 2),) * 2)  # 10 ms in full
HALF, MOST = Subnet((4, 4), (1, 0)), Subnet((8, 4), (1, 1))
"""The router's answers to 0.6x and 0.9x, which take exactly that time."""
OTHERS = {"greedy": Subnet((8, 0), (1, 0)), "equal widths": Subnet((4, 4), (0, 1))}
PRUNED = Subnet((8, 0), (1, 1))


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def row(name, *blocks, cost=1.0):
    return {"name": name, "blocks": blocks, "cost": cost}


@pytest.fixture
def folder(tmp_path):
    """Results of all stages: losses of 2, 3 and 5 nats at 1.0x, 0.9x and 0.6x, in blocks that differ by 0.2."""
    settings = {"size": "small", "model": "some/model", "train": ["sample/train"], "texts": ["sample/validation"]}
    size = {"prompt_tokens": 256, "batch": 1, "rank_tokens": 1, "train_tokens": 2, "loss_tokens": 3, "seeds": 1}
    size |= {"budgets": [0.9, 0.6], "tasks_at": [0.6], "costly_at": [0.6], "limit": 20}
    about = {"settings": {**settings, "seed": 0}, "size": size, "dtype": "float32", "environment": ["here"]}
    write(tmp_path / "stages.json", {**about, "seconds": {"rank": 3.0}, "minutes": 5})
    (tmp_path / "ranked" / "latency").mkdir(parents=True)
    TABLE.save(tmp_path / "ranked" / "latency" / "ttft-here.json")
    write(tmp_path / "answers" / "0.9x.json", MOST.to_json())
    write(tmp_path / "answers" / "0.6x.json", HALF.to_json())
    ours = [row("full", 1.9, 2.1), row("ttft=0.9x", 2.9, 3.1), row("ttft=0.6x", 4.9, 5.1)]
    per_token = [row("ttft=0.9x per token", 2.7, 2.9, cost=0.9), row("ttft=0.6x per token", 4.7, 4.9, cost=0.6)]
    write(tmp_path / "losses" / "elastic-0.json", [*ours, *per_token])
    write(tmp_path / "losses" / "ranked only-0.json", [row("full", 2.0, 2.2), row("0.6x.json", 5.9, 6.1)])
    choices = {f"choice, router, {budget}": asdict(answer) for budget, answer in ((0.9, MOST), (0.6, HALF))}
    choices |= {f"choice, {method}, 0.6": asdict(subnet) for method, subnet in OTHERS.items()}
    choices = {name: {"subnet": subnet} for name, subnet in choices.items()}
    found = [{"subnet": asdict(subnet), "blocks": [5.4, 5.6]} for subnet in OTHERS.values()]
    ratios = {MOST: [0.9, 0.9], HALF: [0.6, 0.6], OTHERS["greedy"]: [0.6, 0.6], OTHERS["equal widths"]: [0.5, 0.7]}
    times = {"noise": 0.05, "rounds": 2, "ratios": {subnet.to_json(): each for subnet, each in ratios.items()}}
    write(
        tmp_path / "choices.json",
        {**choices, "loss, sample/validation, 0.9": [], "loss, sample/validation, 0.6": found, "times": times},
    )
    return tmp_path


def page(folder):
    return write_page(folder).read_text()


def test_the_page_compares_at_equal_cost_with_the_errors_of_timing(folder):
    """A method's time has an error of 0.1 of the full model's, which the router's slope turns into 0.67 nats."""
    cells = [[cell.strip() for cell in line.split("|")] for line in page(folder).splitlines()]
    rows = {of_line[1]: of_line[3] for of_line in cells if len(of_line) == 5}
    assert rows["**elastic, static router**"] == "0.60x: 5.000"
    assert rows["(c) same weights, greedy"] == "0.60x: 5.500 (+0.500 ± 0.000)"
    assert rows["(a) same weights, equal widths (Mix'n'Match)"] == "0.60x: 5.500 (+0.500 ± 0.667)"
    assert rows["(h) no elastic training"] == "0.60x: 6.000 (+1.000 ± 0.000)"


def test_the_page_names_what_was_not_sure_and_not_compared(folder):
    lines = page(folder).splitlines()
    unsure = "(a) same weights, equal widths (Mix'n'Match) at 0.6x on sample/validation (+0.500 ± 0.667)"
    assert f"- within: {unsure}" in lines
    assert "- not compared: (c) same weights, greedy at 0.9x" in lines
    assert "- not compared: (f) mergekit, trained alone, same tokens in total at 0.9x, 0.6x" in lines
    assert not [line for line in lines if line.startswith("- behind")]
    assert [line for line in lines if line.startswith("- `--size full`")]


def test_where_the_router_is_behind_the_page_says_so(folder):
    write(folder / "losses" / "alone-share-0.6x-0.json", [row("0.6x.json", 4.8, 5.0)])
    alone = "(e) each size trained alone, same tokens in total at 0.6x on sample/validation (-0.100 ± 0.000)"
    assert f"- behind: {alone}" in page(folder).splitlines()


def test_a_page_about_a_pack_says_how_it_was_trained_and_asks_for_no_rival_that_would_have_to_be(folder):
    about = json.loads((folder / "stages.json").read_text())
    write(folder / "stages.json", {**about, "settings": {**about["settings"], "size": "pack"}})
    write(folder / "ranked" / "pack.json", {"base": "smollm2", "about": {"tokens": 1_501_184, "data": ["corpus/a.xz"]}})
    (folder / "losses" / "ranked only-0.json").unlink()
    found = page(folder)
    assert (
        "The pack of smollm2 was trained before, on 1,501,184 tokens of a.xz; everything here runs in float32." in found
    )
    assert "Full model, nats per token: after elastic training 2.000." in found
    assert "The router must beat (a), (b) and (c)." in found
    assert "- not compared: (b) same weights, layer dropping at 0.9x, 0.6x" in found
    assert "mergekit" not in found
    assert "- (e), (f) and (h): each would have to be trained on as many tokens." in found


@pytest.mark.parametrize("timed", [True, False])
def test_what_other_tools_pruned_costs_what_its_shape_does(folder, timed):
    """It costs 8 ms of 10 by the table, and 0.65 if it was timed."""
    write(folder / "losses" / "mergekit-0.6x-0.json", [row("full", 6.9, 7.1)])
    write(folder / "mergekit-0.6x-pruned" / SHAPE, PRUNED.to_json())
    if timed:
        choices = json.loads((folder / "choices.json").read_text())
        choices["times"]["ratios"][PRUNED.to_json()] = [0.65, 0.65]
        write(folder / "choices.json", choices)
    found = page(folder)
    assert ("0.65x: 7.000 (+2.333" if timed else "0.80x: 7.000 (+3.333") in found
    by_table = next(line for line in found.splitlines() if "The latency table gives" in line)
    assert ("mergekit" in by_table) != timed
