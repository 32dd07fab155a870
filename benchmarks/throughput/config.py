"""Options of `throughput`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.options import BackboneOptions, require_at_least
from benchmarks.throughput.reference import check_comparable

#: Maximum number of environments when growth over images is measured.
_GROWTH_NUM_ENVS = 64


@dataclass
class ThroughputBenchmarkConfig(BackboneOptions):
    """Compare the vector environment with the way it is done today, for several numbers of envs.

    Three sides play the same actions on the same images with the same weights, and their masks are
    compared: `vector` is ours; `scalar` is a Python loop over our scalar environments; `reference`
    is what research code does, a `SamPredictor` per environment under SyncVectorEnv, which encodes
    at every reset. Cached images were seen before (only `reference` encodes them again); fresh
    images never. A step that ends episodes includes their reset.
    """

    out: str = "runs/throughput"
    """Folder for results.json, repeats.csv, plots and report.html."""
    num_envs: tuple[int, ...] = (1, 8, 64, 256)
    """Environments on each side, one or several numbers."""
    max_steps: int = 5
    """Steps per episode."""
    steps: int = 5
    """Steps per repeat, a multiple of max_steps: then every repeat holds equally many resets."""
    repeats: int = 5
    """Timed repeats, of which the median counts; one more to warm up comes first."""
    images: int = 64
    """Different images among the cached ones."""
    growth_images: int = 1024
    """Fresh images over which the cost of a step is followed; 0 leaves that out."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        if not self.num_envs:
            raise ValueError("--num-envs needs at least one number.")
        check_comparable(self.backbone)
        require_at_least(
            1,
            num_envs=min(self.num_envs),
            max_steps=self.max_steps,
            steps=self.steps,
            repeats=self.repeats,
            images=self.images,
        )
        require_at_least(0, seed=self.seed, growth_images=self.growth_images)
        if self.steps % self.max_steps:
            raise ValueError(
                f"--steps must be a multiple of --max-steps ({self.max_steps}), got {self.steps}: "
                "else some repeats would hold more resets than others."
            )

    @property
    def growth_num_envs(self) -> int:
        """Environments that play while the cost is followed over images."""
        fitting = [n for n in self.num_envs if n <= _GROWTH_NUM_ENVS]
        return max(fitting) if fitting else min(self.num_envs)

    def env_settings(self, fresh: bool, obs: str = "handle") -> dict[str, Any]:
        """Arguments of `SamSeg-v0`; the scenes are endless if they have to be fresh."""
        return {
            "dataset": "scenes",
            "split": "test",
            "dataset_kwargs": {"length": None if fresh else self.images},
            "backbone": self.backbone,
            "checkpoint": self.checkpoint,
            "device": self.device,
            "dtype": self.dtype,
            "compile": self.compile,
            "obs": obs,
            "max_steps": self.max_steps,
        }
