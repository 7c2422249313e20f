"""The stages of the tour: what each one does. What a stage leaves on disk is all that the next one needs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from flextron.atomic import write_text
from flextron.choosing.explaining import save_usage, usage_of
from flextron.config import QuickstartConfig, TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.costs.latency import measure_latency
from flextron.costs.saved import find_table, save_table
from flextron.costs.table import CostTable
from flextron.costs.timing import timed_run
from flextron.data.blocks import TokenBlocks, blocks_after, load_blocks
from flextron.demo import report
from flextron.demo.measuring import baselines, measured, routed
from flextron.demo.plan import (
    BUDGETS,
    HELD_OUT,
    NEW_TOKENS,
    PER_TOKEN_BUDGETS,
    QUICK,
    THOROUGH,
    TOKEN_ROUNDS,
    TOKEN_TOKENS,
)
from flextron.demo.stages import Pace, Stage, in_words, run_stages, time_left
from flextron.elastic.smollm2 import named
from flextron.elastic.source import METADATA_FILE
from flextron.environment import default_device, dtype_name, faster_dtype
from flextron.errors import CheckpointError, CostError, RouterError
from flextron.evaluation import evaluate
from flextron.generation import generate
from flextron.model import ElasticModel
from flextron.progress import progress
from flextron.ranking.curvature import estimate_sensitivity
from flextron.ranking.importance import rank
from flextron.ranking.refit import refit
from flextron.ranking.sensitivity import Sensitivity
from flextron.records import checked
from flextron.routers.static.making import make_router
from flextron.routers.static.router import Router, metrics_with_router
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.learning import static_answers
from flextron.routers.token.making import make_token_router
from flextron.subnet import Subnet
from flextron.training.run import train

TEXT = "sample/train"


class Tour:
    """One run through all stages that are not done."""

    def __init__(self, config: QuickstartConfig, started: float) -> None:
        self.config, self.started = config, started
        self.size = THOROUGH if config.thorough else QUICK
        self.out = config.out
        self.elastic, self.trained = config.out / "elastic", config.out / "trained"

    def run(self) -> Path:
        """Run the stages; returns the report's path."""
        pace = self._pace()
        until_picture, rest = self._until_picture(), self._rest()
        if left := time_left([*until_picture, *rest], pace):
            picture = time_left(until_picture, pace)
            first = f", {in_words(picture)} of it until the first picture" if picture else ""
            print(f"At this machine's speed, what is left takes about {in_words(left)}{first}.", flush=True)
        run_stages([*until_picture, *rest], pace)
        results = self._read("results.json")
        results["per_token"] = self._read("per_token.json") if self.size.per_token else []
        with self._readable("results.json"):
            return report.write(self.out, results)

    def _pace(self) -> Pace:
        """How fast the full model reads a prompt here: the least of three times, after a warm-up."""
        tokens = self.size.prompt_tokens
        read = timed_run(self.model, "prefill", batch=1, tokens=tokens)(self.model.search_space.full)
        read()
        return Pace(min(read() for _ in range(3)) / 1000, tokens)

    # ------------------------------------------------------------------ what there is
    # Work is in tokens of the full model's forward pass, by how long stages took on SmolLM2 and two cores.

    def _until_picture(self) -> list[Stage]:
        size, tokens = self.size, self.config.rank_tokens
        return [
            Stage(
                f"Rank the neurons and KV groups of each layer on {tokens:,} tokens, and refit what reads them",
                "Best first: a sub-network is then the first units of each layer, and all share one set of weights.",
                (self.elastic / METADATA_FILE).is_file,
                1.3 * tokens + 2000 + 1.6 * size.refit_tokens,
                self._rank,
            ),
            Stage(
                "Measure what each layer is worth",
                "Layers differ: those that matter little are narrowed first.",
                lambda: Sensitivity.is_in(self.elastic),
                (5 + 0.2 * len(self.model.layers)) * size.sensitivity_tokens,
                self._measure_sensitivity,
            ),
            *self._first_measurements(),
        ]

    def _first_measurements(self) -> list[Stage]:
        """What any model passes: its latency table, and the first picture."""
        size = self.size
        return [
            Stage(
                f"Time {size.designs + HELD_OUT} sub-networks on a prompt of {size.prompt_tokens} tokens",
                "A table fitted to them tells the time of every other sub-network on this machine.",
                self._has_table,
                2 * size.prompt_tokens * (size.designs + HELD_OUT),
                self._measure_table,
            ),
            Stage(
                "Measure loss and time of 7 sub-networks, and draw the first picture",
                "It shows what choosing layer by layer gains over equal widths.",
                (self.out / "before.json").is_file,
                self._measuring_work(7),
                self._measure_before,
            ),
        ]

    def _last_measurement(self) -> Stage:
        return Stage(
            "Measure loss and time of 10 sub-networks, and let some of them write",
            "These are the results.",
            (self.out / "results.json").is_file,
            self._measuring_work(10) + 3000,
            self._measure_after,
        )

    def _rest(self) -> list[Stage]:
        size, tokens = self.size, self.config.train_tokens
        stages = [
            Stage(
                f"Train all sub-networks at once on {tokens:,} tokens",
                "The full model teaches them to do without what they leave out.",
                (self.trained / METADATA_FILE).is_file,
                4.2 * tokens + 2000,
                self._train,
            ),
            Stage(
                f"Train a router on measured losses of {size.evaluations[0]} sub-networks",
                "It learns which layers need each other, and answers every budget at once.",
                lambda: (self.out / "router.json").is_file() and self._has_table(),
                1.0 * size.router_tokens * size.evaluations[0] + 12000,
                self._make_router,
            ),
            self._last_measurement(),
        ]
        if size.per_token:
            what = f"Train a token router on {TOKEN_TOKENS:,} tokens"
            why = "Some tokens need less of the model than others: each gets its own widths."
            is_done = (self.out / "per_token.json").is_file
            stages.append(Stage(what, why, is_done, 8.0 * TOKEN_TOKENS, self._per_token))
        return stages

    def _measuring_work(self, subnets: int) -> float:
        return subnets * (0.95 * self.size.loss_tokens + 4.1 * self.size.prompt_tokens)

    @cached_property
    def model(self) -> ElasticModel:
        """The ranked model; until it is there, the one to rank."""
        if (self.elastic / METADATA_FILE).is_file():
            return ElasticModel.from_pretrained(self.elastic, device=self.config.device)
        source = named(self.config.model)
        dtype = faster_dtype(default_device() if self.config.device == "auto" else self.config.device)
        print(f"Loading {source} in {dtype_name(dtype)}, the faster type here", flush=True)
        return ElasticModel.from_pretrained(source, dtype=dtype, device=self.config.device)

    @cached_property
    def trained_model(self) -> ElasticModel:
        """The model after training."""
        return ElasticModel.from_pretrained(self.trained, device=self.config.device)

    def _table(self) -> CostTable:
        return find_table(self.model, self.elastic, "ttft", tokens=self.size.prompt_tokens)

    def _has_table(self) -> bool:
        """Whether there is a table of this machine."""
        try:
            return bool(self._table())
        except CostError:
            return False

    def _router(self) -> Router | None:
        """The router, if the surrogate could learn."""
        has_one = "ttft" in metrics_with_router(self.trained)
        return Router.load(self.trained, "ttft", self.trained_model) if has_one else None

    def _blocks(self) -> TokenBlocks:
        """Held-out text that losses are measured on."""
        size = self.size
        return load_blocks(
            self.model.tokenizer, "sample/validation", tokens=size.loss_tokens, block_tokens=size.block_tokens
        )

    def _read(self, name: str) -> Any:
        with self._readable(name):
            return checked(json.loads((self.out / name).read_text(encoding="utf8")), Any)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Name the file where a stage's numbers cannot be read back."""
        try:
            yield
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CheckpointError(
                f"cannot read {self.out / name}: {error!r}. Delete it, so that its stage runs again."
            ) from None

    def _write(self, name: str, content: Any) -> None:
        write_text(self.out / name, json.dumps(content, indent=1) + "\n")

    # ------------------------------------------------------------------ what is done

    def _rank(self) -> str:
        tokenizer = self.model.tokenizer
        ranked_on = load_blocks(tokenizer, TEXT, tokens=self.config.rank_tokens)
        rank(self.model, ranked_on, show=True)
        refit(self.model, blocks_after(tokenizer, TEXT, ranked_on.documents, tokens=self.size.refit_tokens), show=True)
        self.model.save_pretrained(self.elastic)
        return f"the ranked model is in {self.elastic}."

    def _measure_sensitivity(self) -> str:
        tokenizer, size = self.model.tokenizer, self.size
        blocks = load_blocks(
            tokenizer,
            TEXT,
            tokens=size.sensitivity_tokens,
            block_tokens=size.sensitivity_block,
            max_characters=4 * size.sensitivity_block,  # about one document for each block
            skip_documents=load_blocks(tokenizer, TEXT, tokens=self.config.rank_tokens).documents,
        )
        sensitivity = estimate_sensitivity(self.model, blocks, show=True)
        sensitivity.save(self.elastic)
        widths = sensitivity.allocate(max(0.6, sensitivity.share(sensitivity.search_space.smallest))).neurons
        return f"with 60% of the weights, layers keep from {min(widths)} to {max(widths)} neurons."

    def _measure_table(self) -> str:
        size = self.size
        table = measure_latency(
            self.model,
            phase="prefill",
            tokens=size.prompt_tokens,
            designs=size.designs,
            held_out=HELD_OUT,
            rounds=1,
            show=True,
        )
        save_table(self.elastic, table)
        return f"the full model takes {table.full:.0f} ms, the smallest {table.smallest:.0f} ms."

    def _measure_before(self) -> str:
        table = self._table()
        candidates = baselines(Sensitivity.load(self.elastic), table)
        results = measured(self.model, candidates, table, self._blocks(), prompt_tokens=self.size.prompt_tokens)
        results["conditions"] |= {"model": self.config.model, **self._conditions(trained=False)}
        report.write(self.out, results)
        self._write("before.json", results)
        after = in_words(time.monotonic() - self.started)
        return f"the first picture, {after} after the start, is {self.out / 'loss.png'}"

    def _train(self) -> str:
        config = self.config
        train(
            TrainConfig(
                str(self.elastic),
                self.trained,
                text=TextOptions(
                    tokens=config.train_tokens, block_tokens=self.size.block_tokens, cache=self.out / "tokens"
                ),
                visit=VisitOptions(visits_per_step=1),  # few tokens: more steps teach more
                watch=WatchOptions(evaluate_tokens=0),
                device=config.device,
            )
        )
        return f"the trained model is in {self.trained}."

    def _make_router(self) -> str:
        """Train a router; where the surrogate cannot learn, the report has the other methods only."""
        save_table(self.trained, self._table())
        error = ""
        for evaluations in self.size.evaluations:
            options: dict[str, Any] = {"evaluations": evaluations, "tokens": self.size.router_tokens}
            try:
                router = make_router(
                    self.trained_model, self.trained, phase="prefill", lowest=min(BUDGETS), show=True, **options
                )
            except RouterError as refused:
                error = str(refused)
            else:
                about = f"{router.about.pairs} sub-networks, measured on {router.about.tokens} tokens each"
                self._write("router.json", about)
                return f"it learnt from {about}."
        self._write("router.json", None)
        return f"no router: {error}"

    def _measure_after(self) -> str:
        table, router, before = self._table(), self._router(), self._read("before.json")
        candidates = baselines(Sensitivity.load(self.elastic), table)
        if router is not None:
            candidates += routed(router, table)
        model, tokens = self.trained_model, self.size.prompt_tokens
        results = measured(model, candidates, table, self._blocks(), prompt_tokens=tokens)
        losses = {Subnet(**row["subnet"]): row["nats_per_token"] for row in before["rows"]}
        if before["conditions"]["training"]:
            losses = {}  # they were of the same weights
        for row, candidate in progress(list(zip(results["rows"], candidates, strict=True)), "write"):
            row["before_training"] = losses.get(candidate.subnet)
            if candidate.method in ("full", "router"):
                row["completion"] = generate(
                    model, self.config.prompt, subnet=candidate.subnet, max_new_tokens=NEW_TOKENS
                )
        results["conditions"] |= {"model": self.config.model, "prompt": self.config.prompt}
        results["conditions"] |= self._conditions(trained=True)
        self._write("results.json", results)
        return f"the numbers are in {self.out / 'results.json'}."

    def _conditions(self, *, trained: bool) -> dict[str, Any]:
        """How the sub-networks came about, for the report."""
        if not trained:
            return {"training": None, "router": None}
        return {
            "training": f"{self.config.train_tokens:,} tokens of {TEXT}",
            "router": self._read("router.json"),
            "left_out": None if self.size.per_token else "flextron quickstart --thorough --out out/thorough",
        }

    def _per_token(self) -> str:
        """Losses where every token has its own widths, beside the router's of that cost; a picture of a text."""
        table, router, blocks = self._table(), self._router(), self._blocks()
        if router is None:
            self._write("per_token.json", [])
            return "without a router there is no token router."
        model = self.trained_model
        options: dict[str, Any] = {"rounds": TOKEN_ROUNDS, "tokens": TOKEN_TOKENS, "show": True}
        token_router, _ = make_token_router(
            model, self.trained, phase="prefill", calibrated=sorted(PER_TOKEN_BUDGETS), any_device=True, **options
        )
        rows = []
        for budget in PER_TOKEN_BUDGETS:
            routing = TokenRouting(model, token_router, [budget], static_answers(router, table, [budget]))
            evaluate(model, [routing], blocks, show=True)
            cost = routing.average_cost
            static, per_token = evaluate(model, [*static_answers(router, table, [cost]), routing], blocks, show=True)
            rows.append({"budget": budget, "cost": cost, "static": asdict(static), "per_token": asdict(per_token)})
        text = model.tokenizer.decode(blocks.tokens[0, :256])  # type: ignore[union-attr]
        usage = usage_of(model, routing, text, f"ttft={PER_TOKEN_BUDGETS[-1]}x")
        for name in ("tokens.png", "tokens.html"):
            save_usage(usage, self.out / name)
        self._write("per_token.json", rows)
        return f"what each token got: {self.out / 'tokens.html'}"
