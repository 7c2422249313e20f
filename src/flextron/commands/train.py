"""`flextron train`."""

from __future__ import annotations

import os

from flextron.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Train elastically, or print what it would take."""
    from flextron.elastic.checkpoint import quiet_transformers

    quiet_transformers()
    if config.dry_run:
        from flextron.training.estimate import estimate_training

        estimate = estimate_training(config, processes=int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            print(estimate)
        return
    from flextron.training.run import train

    train(config)
