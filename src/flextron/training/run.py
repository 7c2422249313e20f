"""Elastic continued training: one run improves all nested sub-networks together.

Follows Flextron (Cai et al., ICML 2024), section 3.3. Two things differ from the paper: each step trains several
sub-networks, the full model and the smallest among them, and the model distills from its own state before training
(docs/decisions/0006-elastic-training.md).
Shapes: B blocks, T tokens per block.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, TypedDict, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from flextron.atomic import check_space
from flextron.config import TrainConfig
from flextron.costs.saved import find_table
from flextron.data.corpus import Corpus
from flextron.elastic import model as elastic
from flextron.elastic.adapters import draw_adapters, merge_adapters
from flextron.elastic.pack import changes_of
from flextron.environment import arithmetic_dtype, describe_device, dtype_name
from flextron.errors import CheckpointError, FlextronError, TrainingError
from flextron.ranking.sensitivity import Sensitivity
from flextron.records import checked
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
from flextron.training.sharding import (
    average_gradients,
    device_of,
    fill,
    is_sharded,
    make_accelerator,
    on_first,
    open_model,
    shard,
    total,
    whole_weights,
)
from flextron.training.snapshot import latest_snapshot, load_snapshot, save_snapshot
from flextron.training.watching import Bar, numbers, stop_signals

LOSSES = ("loss", "divergence", "cross_entropy")
JUMP = 10
"""A warning is printed when the gradient norm exceeds this many times its median."""


def train(config: TrainConfig) -> Path:
    """Train a checkpoint elastically, or resume an interrupted run; return the folder of the trained checkpoint.

        train(TrainConfig("out/elastic", Path("out/trained"), text=TextOptions(data=("corpus.jsonl.xz",))))

    Raises:
        FlextronError: the model, the text or the folder cannot be used; or the loss is no longer a number
            (TrainingError).
        KeyboardInterrupt: after Ctrl-C, once the last complete step is saved.
    """
    accelerator = make_accelerator(config)
    run = TrainingRun(config, accelerator)
    with closing(run.folder):
        if run.is_finished:
            run.say(f"{config.out} is already trained. Name another folder, or pass --resume never to train it again.")
        else:
            run.train()
        router, device, is_first = run.router, str(run.device), run.is_first
        tokens = None if run.tokens is None else run.tokens.about
        del run  # frees weights, gradients and moments
        if router is not None and is_first:
            _save_routers(config, router, tokens, device)
    return config.out


def _save_routers(config: TrainConfig, router: Router, tokens: TokenRouterAbout | None, device: str) -> None:
    """Save routers for the new weights, kept or trained further, unless an earlier run has saved them."""
    metric = router.about.metric
    if metric not in metrics_with_router(config.out):
        what = (
            "training the router further for" if config.visit.retrain_router else "measuring the router's losses with"
        )
        print(f"{what} the new weights; if interrupted, run the same command to continue", file=sys.stderr)
        make = remake_router if config.visit.retrain_router else keep_router
        make(config.out, router, config.model, device=device, show=True)
    if tokens is not None and not has_token_router(config.out, metric):
        print("training a new token router; if interrupted, run the same command to continue", file=sys.stderr)
        remake_token_router(config.out, tokens, device=device, show=True)


class TrainingRun:
    """One training run: everything that a step needs, created once."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        check_processes(config.visit.blocks_per_visit, accelerator.num_processes)
        self.config = config
        self.accelerator = accelerator
        self.folder = RunFolder(config.out)
        processes = accelerator.num_processes
        device = device_of(config, accelerator)
        self.shards = 1 if config.replicate else processes
        self.model = open_model(config.model, device, shards=self.shards)
        self.model.check_float("train")
        self.device = torch.device(device) if self.model.is_empty else self.model.device
        self.saved_dtype = self.model.dtype
        model = self.model.fingerprint()
        metric = config.visit.router
        self.router = None if metric is None else Router.load(config.model, metric, self.model)
        self.tokens = self._token_router(metric) if metric is not None and config.visit.per_token else None
        found = on_first(lambda: self.folder.check(config, model))
        self.is_finished = bool(found) and on_first(lambda: self.folder.is_finished)
        if self.is_finished:
            on_first(lambda: self.folder.open(config, model))  # deletes what a killed run left behind
            return
        precision = found.get("arithmetic", config.optimizer.precision)  # a resumed run keeps its first dtype
        self.dtype = on_first(lambda: arithmetic_dtype(precision, self.device))
        self._sensitivity = Sensitivity.load(config.model) if Sensitivity.is_in(config.model) else None
        self.sampler = make_sampler(
            self.model, config.visit, self._sensitivity, router=self.router, tokens=self.tokens, seed=config.seed
        )
        self.corpus: Corpus | None = None  # only in the first process, which sends blocks to the others
        on_first(self._open_corpus)
        self.held_out = HeldOut(self.model, config, self._sensitivity)
        self.distiller = make_distiller(
            self.model,
            config.optimizer,
            self.dtype,
            seed=config.seed,
            open_teacher=self._open_teacher,
            changes=changes_of(config.model) if config.optimizer.train_pack else None,
        )
        if self.shards > 1:
            self._shard()
        self.parameters = [p for p in self.distiller.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters, config.optimizer)
        self.tokens_per_step, self.steps = config.tokens_per_step, config.steps
        self.step = 0
        self._norms: deque[float] = deque(maxlen=20)
        on_first(lambda: check_space(config.out, self._disk_bytes()))
        on_first(lambda: self.folder.open(config, model, arithmetic="fp32" if self.dtype == torch.float32 else "bf16"))

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, the only one that writes and prints."""
        return bool(self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        """Print a line on standard error, from the first process only."""
        if self.is_first:
            tqdm.write(text, file=sys.stderr)

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Train to the end, from the newest snapshot if the folder has one."""
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
                        f"stopped after step {self.step} of {self.steps}. To continue, run the same command{again}."
                    )
                    raise KeyboardInterrupt
        self._finish()

    def train_step(self) -> dict[str, Any]:
        """Update the weights once; log and return the record of the step."""
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

    def _open_teacher(self, path: str) -> elastic.ElasticModel:
        """Return the teacher without weights if the student has none."""
        return open_model(path, self.device, shards=self.shards if self.model.is_empty else 1)

    def _shard(self) -> None:
        """Shard student and teacher over all processes, and fill them if they have no weights yet."""
        was_empty = self.model.is_empty
        shard(self.distiller, self.dtype, self.device)
        sources = {"student": self.config.model, "teacher": self.config.optimizer.teacher or self.config.model}
        fill(self.distiller, sources, self.device)
        if was_empty and self.config.optimizer.lora_rank:
            draw_adapters(self.model, self.config.seed)

    def _next_visits(self) -> Iterator[tuple[Visit, torch.Tensor]]:
        """Yield the visits of a step, each with this process's share of its blocks, [B, T]."""
        visits, blocks = self.config.visit.visits_per_step, self.config.visit.blocks_per_visit
        tokens = on_first(lambda: self._next_blocks(visits * blocks))
        for tokens_BT in torch.split(tokens.to(self.device), blocks):
            yield self.sampler.next(), tokens_BT[self.accelerator.process_index :: self.accelerator.num_processes]

    def _next_blocks(self, count: int) -> torch.Tensor:
        """Return blocks of text, [count, T]; print a line when a source starts again."""
        corpus = cast(Corpus, self.corpus)
        before = corpus.epochs
        tokens_BT = corpus.next_blocks(count)
        for source, epochs in corpus.epochs.items():
            if epochs > before[source]:
                self.say(f"{source} has been read {epochs} times; reading it again in another order")
        return tokens_BT

    def _visit_all(self) -> list[dict[str, Any]]:
        """Add the gradients of a step's visits; return their losses in nats per token, averaged over all processes."""
        visits = [(visit, *self._visit(visit, tokens_BT)) for visit, tokens_BT in self._next_visits()]
        if self.shards == 1:
            average_gradients(self.parameters)
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
        """Add the gradients of one visit; return its summed losses, [3], and the number of predicted tokens."""
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
        """Raise TrainingError if a loss or the gradient is not finite, before the weights change."""
        if math.isfinite(norm) and all(math.isfinite(visit["loss"]) for visit in visits):
            return
        losses = ", ".join(f"{visit['loss']:.3g} at {visit['share']:.0%}" for visit in visits)
        raise TrainingError(
            f"the loss or its gradient is not a number in step {self.step + 1} of {self.steps} "
            f"(losses {losses}; gradient norm {norm:.3g}). This step changed no weights. "
            f"Start again with a learning rate below {self.config.optimizer.learning_rate:g} and --resume never."
        )

    def _warn_of_a_jump(self, norm: float) -> None:
        """Warn when the gradient norm jumps, which is often the first sign of a failing run."""
        if len(self._norms) == self._norms.maxlen and norm > JUMP * median(self._norms):
            self.say(
                f"warning: in step {self.step + 1} the gradient norm is {norm:.3g}; the usual norm is "
                f"{median(self._norms):.3g}. The gradient is clipped. If this continues, lower --learning-rate."
            )
        self._norms.append(norm)

    def _disk_bytes(self) -> int:
        """Bytes that the run writes at least: one snapshot, of the weights and two moments, and the trained model."""
        stored = self.saved_dtype.itemsize * sum(weight.numel() for weight in self.model.lm.parameters())
        stored *= 1 if self.shards == 1 else 2  # as gathered, and as the checkpoint
        return int(stored + 3 * sum(weight.nbytes for weight in self.parameters))

    def _agree(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(total(torch.tensor(float(flag), device=self.device)))

    def autocast(self) -> Any:
        """Return a context that runs matrix products in the dtype of this run."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _evaluate(self) -> None:
        """Measure, log and print the held-out losses of the watched sub-networks."""
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
        """Load weights, optimizer, sampler and corpus from the newest snapshot, if there is one."""
        snapshot = on_first(lambda: latest_snapshot(self.folder.snapshots, warn=self.say))
        if snapshot is None:
            if logged := on_first(lambda: len(self.folder.metrics())):
                where = self.folder.snapshots
                self.say(f"no snapshot in {where}: beginning again; {logged} logged records are dropped")
            on_first(lambda: self.folder.forget_after(-1))
            return
        state = load_snapshot(snapshot, model=self.distiller, optimizers=[self.optimizer])
        try:
            self.step = checked(state, _State, "state")["step"]
            self.held_out.load_state_dict(state)
            self.sampler.load_state_dict(state["sampler"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"cannot use {snapshot}: {error}. Delete it to resume from an earlier one.") from None
        on_first(lambda: self._set_corpus(state["corpus"]))
        on_first(lambda: self.folder.forget_after(self.step))
        self.say(f"resuming from step {self.step} of {self.steps}")

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
        if self.config.optimizer.adapters:
            merge_adapters(self.model)
        weights = None
        try:
            if is_sharded(self.distiller):
                weights = whole_weights(self.distiller, self.saved_dtype, self.folder.gathered)
            else:
                elastic.cast(self.model.lm, self.saved_dtype)
            on_first(lambda: self.folder.finish(self.model, weights, self._sensitivity))
        finally:
            on_first(self.folder.drop_gathered)
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
            raise ValueError("--per-token needs a single process. Run without torchrun, or without --per-token.")
        router, about = load_token_router(self.config.model, metric, self.model)
        return TokenRouterInUse(router, find_table(self.model, self.config.model, metric, foreign=True), about)

    def _open_corpus(self) -> None:
        """Open the text and check that it holds at least one block."""
        text = self.config.text
        _check_vocabulary(self.model)
        self.model.check_length(text.block_tokens, f"Pass --block-tokens {self.model.positions}.")
        self.corpus = Corpus(
            self.model.tokenizer, text.data, block_tokens=text.block_tokens, seed=self.config.seed, cache=text.cache
        )
        start = self.corpus.state_dict()
        self.corpus.next_blocks(1)
        self.corpus.load_state_dict(start)

    def _set_corpus(self, state: dict[str, Any]) -> None:
        cast(Corpus, self.corpus).load_state_dict(state)


class _State(TypedDict):
    """What a snapshot says about the run."""

    step: int
    before: dict[str, float]
    held_out: Any
    sampler: dict[str, Any]
    corpus: dict[str, Any]


def _check_vocabulary(model: elastic.ElasticModel) -> None:
    if model.tokenizer is not None and len(model.tokenizer) > model.config.vocab_size:
        raise FlextronError(
            f"the tokenizer has {len(model.tokenizer)} tokens, the model's vocabulary {model.config.vocab_size}: "
            "the tokenizer belongs to another model. Put the model's own tokenizer files into its folder."
        )
