"""The controller on a simulated clock: it narrows in time, widens slowly, starves nobody, and obeys fixed levels."""

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from flextron.serving.embedded.controller import LEAST_PROMPT_TOKENS, PATIENCE, RISE_SECONDS, Controller, Text
from flextron.serving.embedded.prices import LevelCosts, RowWork, StepPrices

TOP = 5
COSTS = [LevelCosts(share, share, share) for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
READ_MS, COMPUTE_MS, IDLE_MS = 20.0, 2.0, 2.0


def true_ms(rows) -> float:
    """A machine: 20 ms to read all weights, 2 ms a token."""
    read = max(COSTS[row.level].read for row in rows)
    return IDLE_MS + READ_MS * read + COMPUTE_MS * sum(COSTS[row.level].compute * row.tokens for row in rows)


def fitted() -> StepPrices:
    prices = StepPrices(COSTS)
    steps = [[RowWork(level, tokens, 0)] * rows for level in (0, 3, 5) for rows in (1, 4, 8) for tokens in (1, 32)]
    prices.fit(steps, [true_ms(rows) for rows in steps])
    return prices


def controller(max_rows: int = 8, max_tokens: int = 128) -> Controller:
    return Controller(fitted(), TOP + 1, max_rows=max_rows, max_tokens=max_tokens)


def writing(level=TOP, floor=0, due_ms=None, now=0.0, **more) -> Text:
    return Text(level, floor, 10, 1, None if due_ms is None else now + due_ms / 1000, **more)


def reading(left, level=TOP, floor=0, due_ms=None, now=0.0, **more) -> Text:
    deadline = None if due_ms is None else now + due_ms / 1000
    return Text(level, floor, 0, left, deadline, writing=False, **more)


class TestPrices:
    def test_the_fit_finds_the_machine(self):
        prices = fitted()
        for rows in ([RowWork(2, 1, 0)], [RowWork(5, 1, 0), RowWork(0, 60, 0)], [RowWork(1, 1, 0)] * 7):
            assert prices.predict(rows) == pytest.approx(true_ms(rows), rel=0.02)

    def test_steps_of_few_tokens_have_prices_of_their_own(self):
        """Kernels compute 9 tokens as 12, all at the widest level; torch computes each at its own, slower."""

        def ms(rows) -> float:
            tokens = sum(row.tokens for row in rows)
            if tokens > 16:
                return 3 * true_ms(rows)
            padded = tokens if tokens <= 2 else -(-tokens // 4) * 4
            return READ_MS * max(COSTS[row.level].read for row in rows) + padded * max(
                COSTS[row.level].compute for row in rows
            )

        prices = StepPrices(COSTS)
        steps = [
            [RowWork(level, tokens, 0)] * rows for level in (0, 3, 5) for rows in (1, 3, 8) for tokens in (1, 2, 20, 32)
        ]
        prices.fit(steps, [ms(rows) for rows in steps], few_tokens=16)
        for rows in ([RowWork(0, 1, 0)] * 8 + [RowWork(5, 1, 0)], [RowWork(2, 17, 0)], [RowWork(4, 1, 0)]):
            assert prices.predict(rows) == pytest.approx(ms(rows), rel=0.05)

    def test_a_slower_machine_is_learnt_while_it_runs(self):
        prices = fitted()
        rows = [RowWork(5, 1, 0)] * 3
        for _ in range(30):
            prices.observe(rows, 1.5 * true_ms(rows))
        assert prices.predict(rows) == pytest.approx(1.5 * true_ms(rows), rel=0.02)
        assert prices.error < 0.05
        assert prices.predicted_over_measured == pytest.approx(1, abs=0.05)

    def test_reading_prompts_and_writing_are_corrected_apart(self):
        prices = fitted()
        prompt, text = [RowWork(5, 64, 0)], [RowWork(5, 1, 0)]
        for _ in range(30):
            prices.observe(prompt, 2 * true_ms(prompt))
        assert prices.predict(text) == pytest.approx(true_ms(text), rel=0.02)


class TestPlan:
    def test_without_objectives_all_get_what_they_ask(self):
        runs = controller().plan(0.0, [writing(3), writing(5), reading(40, 2)])
        assert [(run.index, run.level, run.tokens) for run in runs] == [(0, 3, 1), (1, 5, 1), (2, 2, 40)]

    def test_the_widest_level_that_is_in_time(self):
        """8 rows at level L take 2 + 36 c(L) ms: 0.9 of 31 ms allows 0.7."""
        control = controller()
        runs = control.plan(0.0, [writing(due_ms=31, pace_ms=31) for _ in range(8)])
        assert {run.level for run in runs} == {2}
        assert control.cap == 2

    def test_floors_and_fixed_levels_hold(self):
        texts = [writing(due_ms=1, pace_ms=60), writing(floor=3, due_ms=1, pace_ms=60), writing(4, 4, due_ms=900)]
        levels = {run.index: run.level for run in controller().plan(0.0, texts)}
        assert levels == {0: 0, 1: 3}  # the fixed one is wide, and its own deadline is far: it waits
        late = [*texts[:2], writing(4, 4, due_ms=40, pace_ms=40)]
        assert {run.index: run.level for run in controller().plan(0.0, late)} == {0: 0, 1: 3, 2: 4}

    def test_a_wide_text_without_a_deadline_waits_a_few_steps_at_most(self):
        for passed, runs in ((0, 1), (PATIENCE - 1, 1), (PATIENCE, 2)):
            texts = [writing(due_ms=22, pace_ms=22), writing(TOP, TOP, passed=passed)]
            assert len(controller().plan(0.0, texts)) == runs

    def test_prompts_fill_what_is_left_of_the_step(self):
        """0.9 * 100 ms less 22 + 2 ms: 33 tokens of 2 ms at the full level, less a rest of the fit."""
        runs = controller().plan(0.0, [writing(due_ms=100, pace_ms=100), reading(500)])
        assert runs[1].tokens in (32, 33)
        assert controller().plan(0.0, [reading(500)])[0].tokens == 128
        late = controller().plan(0.0, [writing(due_ms=-5, pace_ms=25), reading(500)])
        assert late[1].tokens == LEAST_PROMPT_TOKENS

    def test_prompts_may_delay_what_can_be_made_up_for(self):
        """Steps of 24 ms against a pace of 44 gain 20 ms in each of the 10 that follow: 0.9 * (44 + 200) ms in all."""
        runs = controller().plan(0.0, [writing(due_ms=44, pace_ms=44, remaining=11), reading(500)])
        assert runs[1].tokens == pytest.approx((0.9 * (44 + 200) - 24) / 2, abs=4)

    def test_a_queue_of_prompts_lowers_the_cap(self):
        """1,000 tokens of 2 ms must be read in 1.6 s."""
        control = controller()
        queue = [reading(250, due_ms=1600, objective_ms=1600) for _ in range(4)]
        control.plan(0.0, queue)
        assert control.cap == 1
        assert {run.level for run in control.plan(0.0, queue)} == {1}

    def test_what_nobody_could_meet_narrows_nobody_else(self):
        control = controller()
        runs = control.plan(0.0, [writing(due_ms=1, pace_ms=1), writing(due_ms=500, pace_ms=500)])
        assert {run.level for run in runs} == {TOP}
        control.plan(0.0, [reading(100, due_ms=5, objective_ms=5), writing(due_ms=500, pace_ms=500)])
        assert control.cap == TOP

    def test_the_cap_falls_at_once_and_rises_slowly(self):
        control = controller()
        control.plan(0.0, [writing(due_ms=15, pace_ms=15)])
        assert control.cap == 0
        caps, now = [], 0.0
        while control.cap < TOP:
            now += 0.1
            control.plan(now, [writing(due_ms=500, pace_ms=500, now=now)])
            caps.append(control.cap)
        assert caps == sorted(caps)
        assert now == pytest.approx(RISE_SECONDS * TOP, abs=0.7)

    def test_after_an_idle_while_nobody_is_narrowed_for_what_was(self):
        control = controller()
        control.plan(10.0, [writing(due_ms=15, pace_ms=15, now=10.0)])
        assert control.cap == 0
        later = 10.0 + RISE_SECONDS * TOP
        assert [run.level for run in control.plan(later, [writing(due_ms=500, pace_ms=500, now=later)])] == [TOP]

    def test_a_limit_from_outside_holds_beside_the_cap(self):
        control = controller()
        control.limit = 1
        assert [run.level for run in control.plan(0.0, [writing(), writing(3, 3)])] == [1, 3]

    def test_admission_counts_what_is_ahead(self):
        control = controller()
        texts = [reading(200), writing()]
        assert control.first_token_ms(texts, 0, 56) > control.first_token_ms([], 0, 56) + 150
        assert control.step_ms([writing()] * 7, 0, 0) > control.step_ms([], 0, 0)


@dataclass
class Simulated:
    """One request on the simulated machine."""

    arrives: float
    prompt: int
    answer: int
    ttft_ms: float
    pace_ms: float
    level: int = TOP
    floor: int = 0
    read: int = 0
    times: list[float] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    passed: int = 0
    longest_pass: int = 0

    def text(self) -> Text:
        if not self.times:
            due = self.arrives + self.ttft_ms / 1000
            return Text(
                self.level, self.floor, self.read, self.prompt - self.read, due, self.ttft_ms, self.pace_ms, False
            )
        due = self.times[0] + len(self.times) * self.pace_ms / 1000
        past = self.prompt + len(self.times)
        rest = self.answer - len(self.times)
        return Text(
            self.level,
            self.floor,
            past,
            1,
            due,
            self.ttft_ms,
            self.pace_ms,
            remaining=rest,
            passed=self.passed,
        )

    @property
    def met(self) -> bool:
        pace = 1000 * (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)
        return 1000 * (self.times[0] - self.arrives) <= self.ttft_ms and pace <= self.pace_ms


def simulate(requests: list[Simulated], control: Controller, noise: float = 0.05, seed: int = 0) -> list[int]:
    """Run all requests; returns the caps, step by step."""
    draw, now, caps = random.Random(seed), 0.0, []  # noqa: S311
    waiting, active = sorted(requests, key=lambda r: r.arrives), []
    while waiting or active:
        if not active:
            now = max(now, waiting[0].arrives)
        while waiting and waiting[0].arrives <= now:
            active.append(waiting.pop(0))
        runs = control.plan(now, [request.text() for request in active])
        assert runs, "a step must do something"
        assert len({run.index for run in runs}) == len(runs) <= 8
        works = [RowWork(run.level, run.tokens, active[run.index].text().past) for run in runs]
        took = true_ms(works) * draw.uniform(1 - noise, 1 + noise)
        control._prices.observe(works, took)
        now += took / 1000
        caps.append(control.cap)
        ran = {run.index for run in runs}
        for index, request in enumerate(active):
            request.passed = 0 if index in ran else request.passed + 1
            if request.times:
                request.longest_pass = max(request.longest_pass, request.passed)
        for run in runs:
            advance(active[run.index], run, now)
        active = [request for request in active if len(request.times) < request.answer]
        assert now < 600, "it never ends"
    return caps


def advance(request: Simulated, run, now: float) -> None:
    assert request.floor <= run.level <= request.level
    if request.read < request.prompt:
        request.read += run.tokens
        if request.read < request.prompt:
            return
    request.times.append(now)
    request.levels.append(run.level)


def burst(seed: int = 0, floor: int = 0) -> list[Simulated]:
    """A calm, a burst that the full model cannot bear, a calm."""
    draw, requests, now = random.Random(seed), [], 0.0  # noqa: S311
    for rate, until in ((0.8, 10), (5.5, 20), (0.8, 35)):
        while now < until:
            requests.append(Simulated(now, draw.randint(20, 60), draw.randint(20, 40), 900.0, 45.0, floor=floor))
            now += draw.expovariate(rate)
    return requests


class TestSimulatedLoad:
    def test_width_is_given_up_before_time(self):
        fixed, adaptive = burst(floor=TOP), burst()
        simulate(fixed, controller())
        simulate(adaptive, controller())
        met = [sum(request.met for request in requests) / len(requests) for requests in (fixed, adaptive)]
        assert met[0] < 0.6
        assert met[1] > 0.95
        calm, busy = (
            [level for request in adaptive if low <= request.arrives < high for level in request.levels]
            for low, high in ((0, 10), (12, 20))
        )
        assert sum(calm) / len(calm) > 0.6 * TOP > 0.3 * TOP > sum(busy) / len(busy)

    def test_nobody_starves_and_the_cap_does_not_swing(self):
        requests = burst(seed=1)
        for request in requests[::7]:  # fixed ones in the crowd
            request.floor = request.level
        caps = simulate(requests, controller())
        assert max(request.longest_pass for request in requests) <= 40
        rises = sum(after > before for before, after in pairwise(caps))
        assert rises <= 35 / RISE_SECONDS + 1
