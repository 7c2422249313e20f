"""A tiny training run, and `main`, what each of two processes does with it."""

import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flextron.errors import CheckpointError
from flextron.training.snapshot import load_snapshot, save_snapshot
from folders import files_of_at_most


def net() -> nn.Sequential:
    """A model with two tied weights, one frozen, one never used, and one of a single row (so rank 1 of 2 has none)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 1)
    )
    model[3].weight = model[1].weight
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(4))
    return model


class Run:
    """A model and its two optimizers; the data depend only on the step."""

    def __init__(self, *, muon: bool = False, sharded: bool = False):
        self.model = net()
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in (self.model[0], self.model[4], self.model):
                fully_shard(layer, mesh=mesh)
        square, others = [self.model[1].weight], []
        for weight in self.model.parameters():
            if weight is not square[0] and weight.requires_grad:
                others.append(weight)
        matrices = torch.optim.Muon(square, lr=0.05) if muon else torch.optim.AdamW(square, lr=0.05)
        self.optimizers = [matrices, torch.optim.AdamW(others, lr=0.05, fused=True)]
        self.step = 0

    def train(self, steps: int, *, rank: int = 0, ranks: int = 1) -> "Run":
        for _ in range(steps):
            rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(self.step))[rank::ranks]
            self.model(rows).square().mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
        return self

    def save(self, runs: Path, keep_last: int = 2) -> Path:
        state = {"step": self.step, "losses": [0.1, self.step / 3], "draw": 2**70 + 1}
        return save_snapshot(
            runs, step=self.step, model=self.model, optimizers=self.optimizers, state=state, keep_last=keep_last
        )

    def load(self, snapshot: Path) -> "Run":
        state = load_snapshot(snapshot, model=self.model, optimizers=self.optimizers)
        assert state == {"step": state["step"], "losses": [0.1, state["step"] / 3], "draw": 2**70 + 1}
        self.step = state["step"]
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all weights and optimizer tensors, gathered and copied."""
        found = {name: weight.detach() for name, weight in self.model.named_parameters()}
        names = {weight: name for name, weight in self.model.named_parameters()}
        for index, optimizer in enumerate(self.optimizers):
            for weight, kept in optimizer.state.items():
                found.update({f"{index} {names[weight]} {key}": value for key, value in kept.items()})
        return {name: getattr(value, "full_tensor", value.clone)() for name, value in found.items()}


def failure(work) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "none"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    results = {}

    def keep(name: str, run: Run) -> None:
        results.update({f"{name}: {key}": value for key, value in run.tensors().items()})

    here = {"rank": rank, "ranks": 2}
    for name, muon in (("adamw", False), ("muon", True)):
        run = Run(muon=muon, sharded=True).train(2, **here)
        keep(name, run)
        with torch.no_grad():
            run.model(torch.ones(2, 6))  # after this, FSDP leaves the root's weights gathered
        run.save(folder / name)
        keep(f"{name} saved", run)
        other = Run(muon=muon, sharded=True).train(1, **here).load(folder / name / "step-00000002")
        keep(f"{name} loaded", other)
        keep(f"{name} continued", other.train(2, **here))
    keep("from one", Run(sharded=True).load(folder / "one" / "step-00000002").train(2, **here))

    run.step = 3
    with files_of_at_most(1_000 if rank == 1 else 10**9):
        problems = [failure(lambda: run.save(folder / "muon"))]
    run.step = 2
    problems.append(failure(lambda: run.save(folder / "one")))
    problems.append(failure(lambda: run.load(folder / "garbled" / "step-00000002")))
    (folder / f"problems-{rank}").write_text("\n".join(problems))
    if rank == 0:
        save_file(results, folder / "results.safetensors")
    dist.destroy_process_group()
