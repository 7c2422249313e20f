"""The tour with a trained pack: nothing is trained here, only timed, fitted and shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flextron.atomic import new_folder
from flextron.config import QuickstartConfig
from flextron.demo.stages import Stage
from flextron.demo.tour import Tour
from flextron.elastic.pack import FILE, Pack, find_pack, shipped_packs
from flextron.errors import RouterError
from flextron.exporting.card import text_names
from flextron.model import ElasticModel
from flextron.routers.static.making import router_from_pairs


def pack_of(config: QuickstartConfig) -> Path | None:
    """The trained pack that the tour starts from: MODEL itself, or the one that comes for it; None to start anew."""
    if config.from_scratch or config.thorough:
        return None
    if (Path(config.model) / FILE).is_file():
        return find_pack(config.model)
    return shipped_packs().get(config.model)


class PackTour(Tour):
    """The stages that are left with a trained pack: it brings ranking, training, sensitivities and measured losses."""

    def __init__(self, config: QuickstartConfig, started: float, pack: Path) -> None:
        super().__init__(config, started)
        self.pack = pack
        self.elastic = self.trained  # one model, which is trained from the start
        if not (self.trained / FILE).is_file():
            with new_folder(self.trained) as partial:
                shutil.copytree(pack, partial, dirs_exist_ok=True)
        self.about = Pack.load(self.trained).about

    @property
    def model(self) -> ElasticModel:
        """The trained model."""
        return self.trained_model

    def _until_picture(self) -> list[Stage]:
        return self._first_measurements()

    def _rest(self) -> list[Stage]:
        return [
            Stage(
                "Fit a router for this machine to losses that the pack brings",
                "It learns which layers need each other, and answers every budget at once.",
                (self.out / "router.json").is_file,
                2000,
                self._make_router,
            ),
            self._last_measurement(),
        ]

    def _make_router(self) -> str:
        try:
            router = router_from_pairs(self.model, self.trained, phase="prefill", lowest=0.45)
        except (RouterError, ValueError) as refused:
            self._write("router.json", None)
            return f"no router: {refused}"
        about = f"{router.about.pairs} sub-networks, measured on {router.about.tokens} tokens each before packing"
        self._write("router.json", about)
        return f"it learnt from {about}."

    def _conditions(self, *, trained: bool) -> dict[str, Any]:
        tokens, data = self.about.get("tokens"), self.about.get("data", [])
        training = f"{tokens:,} tokens of {text_names(data)}" if tokens else "nothing: they are ranked only"
        command = "flextron quickstart --from-scratch --out out/scratch"
        router = json.loads((self.out / "router.json").read_text(encoding="utf8")) if trained else None
        return {"training": training, "router": router, "left_out": command, "accuracy": self.about.get("accuracy")}
