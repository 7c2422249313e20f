"""Elastic continued training: one run that makes all nested sub-networks good at once.

Flextron (Cai et al., ICML 2024), section 3.3. Ours: several narrowed sub-networks in every step, the full model and the
smallest among them, and distillation from the model as it was (docs/decisions/0006-elastic-training.md).
Shapes: B blocks, T tokens of a block.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from flextron.config import TrainConfig
from flextron.costs.saved import find_table
from flextron.data.corpus import Corpus
from flextron.elastic.adapters import merge_adapters
from flextron.elastic.model import ElasticModel
from flextron.environment import arithmetic_dtype, describe_device, dtype_name
from flextron.errors import FlextronError, TrainingError
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static.making import keep_router, remake_router
from flextron.routers.static.router import Router, metrics_with_router
from flextron.routers.token.learning import TokenRouterAbout
from flextron.routers.token.making import has_token_router, load_token_router, remake_token_router
from flextron.training.distillation import make_distiller
from flextron.training.estimate import check_processes
from flextron.training.folder import RunFolder
from flextron.training.held_out import HeldOut, summary
from flextron.training.optimizer import adamw, schedule
from flextron.training.sampling import TokenRouterInUse, Visit, make_sampler
from flextron.training.sharding import device_of, is_sharded, make_accelerator, on_first, shard, total, whole_weights
from flextron.training.snapshot import latest_snapshot, load_snapshot, save_snapshot
from flextron.training.watching import Bar, numbers, stop_signals

LOSSES = ("loss", "divergence", "cross_entropy")
JUMP = 10
"""Times the usual norm of the gradient that is worth a warning."""


def train(config: TrainConfig) -> Path:
    """Train a checkpoint elastically, or go on with an interrupted run; returns the folder of the trained checkpoint.

        train(TrainConfig("out/elastic", Path("out/trained"), text=TextOptions(data=("corpus.jsonl.xz",))))

    Raises:
        FlextronError: a model, text, or folder that does not fit; a loss that is no longer a number (TrainingError).
        KeyboardInterrupt: after Ctrl-C, once a checkpoint of the last whole step is written.
    """
    accelerator = make_accelerator(config)
    run = TrainingRun(config, accelerator)
    if run.is_finished:
        run.say(f"{config.out} is trained already; name another folder, or pass --resume never to train it again.")
    else:
        run.train()
    router, device, is_first = run.router, str(run.device), run.is_first
    tokens = None if run.tokens is None else run.tokens.about
    del run  # its weights, gradients and moments
    if router is not None and is_first:
        _save_routers(config, router, tokens, device)
    return config.out


def _save_routers(config: TrainConfig, router: Router, tokens: TokenRouterAbout | None, device: str) -> None:
    """Give the new weights their routers, kept or trained on, where an earlier run has not."""
    metric = router.about.metric
    if metric not in metrics_with_router(config.out):
        what = "training the router on, for" if config.visit.retrain_router else "keeping the router: its losses with"
        print(f"{what} the new weights; interrupted, the same command goes on", file=sys.stderr)
        make = remake_router if config.visit.retrain_router else keep_router
        make(config.out, router, config.model, device=device, show=True)
    if tokens is not None and not has_token_router(config.out, metric):
        print("training the token router anew; interrupted, the same command goes on", file=sys.stderr)
        remake_token_router(config.out, tokens, device=device, show=True)


class TrainingRun:
    """One training run: all that a step needs, made once."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        check_processes(config.visit.blocks_per_visit, accelerator.num_processes)
        if config.optimizer.lora_rank and accelerator.num_processes > 1:
            raise ValueError("adapters (lora_rank) train in one process. Run without torchrun, or with --lora-rank 0.")
        self.config = config
        self.accelerator = accelerator
        self.folder = RunFolder(config.out)
        self.model = ElasticModel.from_pretrained(config.model, device=device_of(config, accelerator))
        self.device = self.model.device
        self.saved_dtype = self.model.dtype
        model = self.model.fingerprint()
        metric = config.visit.router
        self.router = None if metric is None else Router.load(config.model, metric, self.model)
        self.tokens = self._token_router(metric) if metric is not None and config.visit.per_token else None
        found = on_first(lambda: self.folder.check(config, model))
        self.is_finished = bool(found) and on_first(lambda: self.folder.is_finished)
        if self.is_finished:
            on_first(lambda: self.folder.open(config, model))  # clears what a killed run has left
            return
        precision = found.get("arithmetic", config.optimizer.precision)  # a resumed run keeps what it began with
        self.dtype = on_first(lambda: arithmetic_dtype(precision, self.device))
        self._sensitivity = Sensitivity.load(config.model) if Sensitivity.is_in(config.model) else None
        self.sampler = make_sampler(
            self.model, config.visit, self._sensitivity, router=self.router, tokens=self.tokens, seed=config.seed
        )
        self.corpus: Corpus | None = None  # in the first process only; it hands the others their blocks
        on_first(self._open_corpus)
        self.held_out = HeldOut(self.model, config, self._sensitivity)
        self.distiller = make_distiller(self.model, config.optimizer, self.dtype, seed=config.seed)
        if accelerator.num_processes > 1:
            shard(self.distiller, self.dtype)
        self.parameters = [p for p in self.distiller.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters, config.optimizer)
        self.tokens_per_step, self.steps = config.tokens_per_step, config.steps
        self.step = 0
        self._norms: deque[float] = deque(maxlen=20)
        on_first(lambda: self.folder.open(config, model, arithmetic="fp32" if self.dtype == torch.float32 else "bf16"))

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return bool(self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        """Print a line on standard error, once."""
        if self.is_first:
            tqdm.write(text, file=sys.stderr)

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run to the end from wherever the folder stands."""
        self._resume()
        self._introduce()
        if not self.step:
            self._evaluate()
        saved = time.monotonic()
        bar = Bar(steps=self.steps, done=self.step, show=self.is_first)
        with bar, stop_signals() as stop:
            while self.step < self.steps:
                bar.show(self.train_step())
                if self.held_out.is_due(self.step, self.steps):
                    self._evaluate()
                stopped = self._agree(stop.asked)
                due = self._agree(self.is_first and time.monotonic() - saved > 60 * self.config.watch.save_minutes)
                if stopped or due or self.step == self.steps:
                    self._save()
                    saved = time.monotonic()
                if stopped and self.step < self.steps:
                    again = "" if self.config.resume == "auto" else " without --resume never"
                    self.say(
                        f"stopped after step {self.step} of {self.steps}; the same command{again} goes on from there."
                    )
                    raise KeyboardInterrupt
        self._finish()

    def train_step(self) -> dict[str, Any]:
        """One update of the weights; returns, and logs, what it did."""
        start = time.monotonic()
        options = self.config.optimizer
        rate = options.learning_rate * schedule(self.step, self.steps, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        visits = self._visit_all()
        norm = self._clip()
        self._stop_unless_finite(visits, norm)
        self._warn_of_a_jump(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        seconds = time.monotonic() - start
        record = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
            "visits": visits,
        }
        self._log(record)
        return record

    def _next_visits(self) -> Iterator[tuple[Visit, torch.Tensor]]:
        """Sub-networks of a step, each with this process's part of its blocks [B, T]."""
        visits, blocks = self.config.visit.visits_per_step, self.config.visit.blocks_per_visit
        tokens = on_first(lambda: self._next_blocks(visits * blocks))
        for tokens_BT in torch.split(tokens.to(self.device), blocks):
            yield self.sampler.next(), tokens_BT[self.accelerator.process_index :: self.accelerator.num_processes]

    def _next_blocks(self, count: int) -> torch.Tensor:
        """Blocks of text [count, T]; says so where a source begins again."""
        corpus = cast(Corpus, self.corpus)
        before = corpus.epochs
        tokens_BT = corpus.next_blocks(count)
        for source, epochs in corpus.epochs.items():
            if epochs > before[source]:
                self.say(f"{source} has been read {epochs} times; it is read again in another order")
        return tokens_BT

    def _visit_all(self) -> list[dict[str, Any]]:
        """Add the gradients of a step's sub-networks; returns their losses in nats per token, over all processes."""
        visits = [(visit, *self._visit(visit, tokens_BT)) for visit, tokens_BT in self._next_visits()]
        sums = total(torch.stack([sums for _, sums, _ in visits])) / self.accelerator.num_processes
        return [
            {
                "kind": visit.kind,
                "share": round(self.model.share(visit.subnet), 4),
                **{name: value / predicted for name, value in zip(LOSSES, values, strict=True)},
                **asdict(visit.subnet),
            }
            for (visit, _, predicted), values in zip(visits, sums.tolist(), strict=True)
        ]

    def _visit(self, visit: Visit, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Add one sub-network's gradients; returns its losses summed, [3], and how many tokens it predicted."""
        predicted = tokens_BT[:, 1:].numel()
        with visit.use(self.model):
            with self.autocast():
                losses = self.distiller(tokens_BT)
            (losses.total / predicted / self.config.visit.visits_per_step).backward()
        return torch.stack([losses.total.detach(), losses.divergence, losses.cross_entropy]), predicted

    def _clip(self) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        return float(norm.full_tensor() if is_sharded(self.distiller) else norm)

    def _stop_unless_finite(self, visits: list[dict[str, Any]], norm: float) -> None:
        """Raise before the weights change."""
        if math.isfinite(norm) and all(math.isfinite(visit["loss"]) for visit in visits):
            return
        losses = ", ".join(f"{visit['loss']:.3g} at {visit['share']:.0%}" for visit in visits)
        raise TrainingError(
            f"the loss or its gradient is not a number in step {self.step + 1} of {self.steps} "
            f"(losses {losses}; gradient norm {norm:.3g}). Nothing was changed by this step. "
            f"Start again with a learning rate below {self.config.optimizer.learning_rate:g} and --resume never."
        )

    def _warn_of_a_jump(self, norm: float) -> None:
        """Say so where the gradient is many times what it was: often the first sign of a run that will fail."""
        if len(self._norms) == self._norms.maxlen and norm > JUMP * median(self._norms):
            self.say(
                f"warning: in step {self.step + 1} the norm of the gradient is {norm:.3g}, "
                f"usually {median(self._norms):.3g}. It is clipped; if this goes on, lower --learning-rate."
            )
        self._norms.append(norm)

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(total(torch.tensor(float(flag), device=self.device)))

    def autocast(self) -> Any:
        """A context in which matrix products are in the type of the arithmetic."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _evaluate(self) -> None:
        """Measure, log and tell the held-out losses of the watched sub-networks."""
        losses = self.held_out.measure(self.distiller, self.autocast)
        if not losses:
            return
        self._log({"step": self.step, "held_out": losses})
        if not self.step:
            self.held_out.before = losses
            return
        for line in self.held_out.compare(losses, step=self.step, steps=self.steps):
            self.say(line)

    def _log(self, record: dict[str, Any]) -> None:
        on_first(lambda: self.folder.log(record))
        if self.config.watch.log_with:
            self.accelerator.log(numbers(record), step=record["step"])

    # ------------------------------------------------------------------ before, between and after

    def _resume(self) -> None:
        """Put weights, optimizer, sampler and corpus where the newest checkpoint says."""
        snapshot = on_first(lambda: latest_snapshot(self.folder.snapshots))
        if snapshot is None:
            on_first(lambda: self.folder.forget_after(-1))
            return
        state = load_snapshot(snapshot, model=self.distiller, optimizers=[self.optimizer])
        self.step = state["step"]
        self.held_out.load_state_dict(state)
        self.sampler.load_state_dict(state["sampler"])
        on_first(lambda: self._set_corpus(state["corpus"]))
        on_first(lambda: self.folder.forget_after(self.step))
        self.say(f"going on from step {self.step} of {self.steps}")

    def _save(self) -> None:
        state = {
            **self.held_out.state_dict(),
            "sampler": self.sampler.state_dict(),
            "corpus": self.corpus.state_dict() if self.corpus else None,
            "step": self.step,
        }
        save_snapshot(
            self.folder.snapshots,
            step=self.step,
            model=self.distiller,
            optimizers=[self.optimizer],
            state=state,
            keep_last=self.config.watch.keep_last,
        )

    def _finish(self) -> None:
        if self.config.optimizer.lora_rank:
            merge_adapters(self.model)
        weights = None
        if is_sharded(self.distiller):
            weights = {name: weight.to(self.saved_dtype) for name, weight in whole_weights(self.model.lm).items()}
        else:
            self.model.lm.to(self.saved_dtype)
        on_first(lambda: self.folder.finish(self.model, weights, self._sensitivity))
        if self.is_first:
            tokens = self.steps * self.tokens_per_step
            print(summary(self.folder.metrics(), tokens, self.held_out.before))
            print(f"wrote {self.config.out}")
        if self.config.watch.log_with:
            self.accelerator.end_training()

    def _introduce(self) -> None:
        text, visit = self.config.text, self.config.visit
        processes = f", {self.accelerator.num_processes} processes" if self.accelerator.num_processes > 1 else ""
        trained = sum(p.numel() for p in self.parameters) / 1e6
        self.say(
            f"training {trained:.1f} M weights for {self.steps} steps of {visit.visits_per_step} x "
            f"{visit.blocks_per_visit} blocks of {text.block_tokens} tokens on "
            f"{describe_device(self.device)}{processes}, {dtype_name(self.dtype)}"
        )
        if self.config.watch.log_with:
            self.accelerator.init_trackers(self.config.out.name, config=numbers(asdict(self.config)))

    def _token_router(self, metric: str) -> TokenRouterInUse:
        if self.accelerator.num_processes > 1:
            raise ValueError("tokens are routed in one process. Run without torchrun, or without --per-token.")
        router, about = load_token_router(self.config.model, metric, self.model)
        return TokenRouterInUse(router, find_table(self.model, self.config.model, metric, foreign=True), about)

    def _open_corpus(self) -> None:
        """Open the text, and see that it holds at least a block."""
        text = self.config.text
        _check_vocabulary(self.model)
        self.corpus = Corpus(
            self.model.tokenizer, text.data, block_tokens=text.block_tokens, seed=self.config.seed, cache=text.cache
        )
        start = self.corpus.state_dict()
        self.corpus.next_blocks(1)
        self.corpus.load_state_dict(start)

    def _set_corpus(self, state: dict[str, Any]) -> None:
        cast(Corpus, self.corpus).load_state_dict(state)


def _check_vocabulary(model: ElasticModel) -> None:
    if model.tokenizer is not None and len(model.tokenizer) > model.config.vocab_size:
        raise FlextronError(
            f"the tokenizer has {len(model.tokenizer)} tokens, the model's vocabulary {model.config.vocab_size}: "
            "it belongs to another model. Put the model's own tokenizer files into its folder."
        )
