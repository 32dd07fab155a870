"""Options of `throughput`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from benchmarks.options import TimedOptions
from benchmarks.throughput.reference import check_comparable
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, Natural, check_settings, whole

#: Whether images were encoded before, or are new in every episode.
KINDS = ("cached", "fresh")
#: Maximum number of environments when growth over images is measured.
_GROWTH_NUM_ENVS = 64


@documented
@dataclass(frozen=True, kw_only=True)
class ThroughputBenchmarkConfig(TimedOptions):
    """Measure environment steps per second against one SamPredictor per environment.

    Compares three sides: `vector`, the vector environment; `scalar`, a Python loop over scalar
    environments; and `reference`, one `SamPredictor` per environment under SyncVectorEnv, as in
    research code, which encodes at every reset. All play the same actions on the same images with
    the same weights, and their masks are compared. Cached images are in the store before timing
    starts, though `reference` encodes them again; fresh images are not. The time of the step that
    ends an episode includes the reset. Given another checkout, the vector environments of both also
    play in turn, each in a process of its own.
    """

    out: str = "runs/throughput"
    """Folder for results.json, repeats.csv, plots and report.html."""
    num_envs: tuple[Count, ...] = (1, 8, 64, 256)
    """Environments per side, one or several numbers."""
    max_steps: Annotated[int, whole(1, 100)] = 5
    """Steps per episode."""
    steps: Count = 5
    """Steps per repeat, a multiple of max_steps, so that all repeats have equally many resets."""
    repeats: Count = 5
    """Timed repeats after one warm-up; results are medians."""
    images: Count = 64
    """Number of images in the cached setting."""
    growth_images: Natural = 1024
    """Fresh images over which the growth of the step time is measured; 0: skip."""
    encoder_batch: Count = 16
    """Number of images per call when the encoder is timed."""
    precision_images: Count = 32
    """Number of images on which masks in low precision are compared with those in float32."""
    against: str | None = None
    """Folder of another checkout of this project, for example of an older commit (git worktree add
    PATH COMMIT), whose vector environment plays the same actions in turn with this one."""
    against_backbone: str | None = None
    """Name of the same SAM in that checkout, if it has another one there."""

    def validate(self) -> None:
        """Raise `ValueError` if an option is out of range."""
        check_settings(self)
        if not self.num_envs:
            raise ValueError("--num-envs needs at least one number.")
        check_comparable(self.backbone)
        if self.against_backbone is not None and self.against is None:
            raise ValueError("--against-backbone takes effect with --against PATH only.")
        if self.steps % self.max_steps:
            raise ValueError(
                f"--steps must be a multiple of --max-steps ({self.max_steps}), got {self.steps}: "
                "otherwise some repeats would have more resets than others."
            )

    @property
    def growth_num_envs(self) -> int:
        """Number of environments when growth over images is measured."""
        fitting = [n for n in self.num_envs if n <= _GROWTH_NUM_ENVS]
        return max(fitting) if fitting else min(self.num_envs)

    def env_settings(self, fresh: bool, obs: str = "handle") -> dict[str, Any]:
        """Return arguments of `SamSeg-v0`; fresh scenes come from an endless dataset."""
        names = ("backbone", "checkpoint", "device", "dtype", "compile", "max_steps")
        own = {name: getattr(self, name) for name in names}
        images = {"length": None if fresh else self.images}
        return own | {"dataset": "scenes", "split": "test", "dataset_kwargs": images, "obs": obs}
