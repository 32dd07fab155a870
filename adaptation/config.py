"""Settings of a training, the same for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from adaptation.evaluation import check_prompt
from sam_gym.utils.registry import unknown_name

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training, the same for every method."""

    steps: int = 60
    """Optimizer steps per domain."""
    batch_size: int = 16
    """Objects per step, over all processes."""
    objects_per_augmentation: Annotated[int, arg(aliases=("--objects-per-view",))] = 1
    """Objects that a step draws from each augmented image. Where the encoder is tuned (sam_adapter,
    lora), 8 means an eighth of the images to encode in a step of the same size."""
    learning_rate: float | None = None
    """Initial learning rate, which falls to a tenth over a domain along a cosine (default: by tune
    target: decoder and sam_adapter 3e-4, hq and prompts 1e-3, hq_small 2e-3, LoRA 3e-3)."""
    augmentations: Annotated[int, arg(aliases=("--views",))] = 4
    """Augmentations per training image: the image itself, then flipped and scaled copies."""
    objects_per_image: int = 8
    """Maximum number of objects of an augmented or held-out image."""
    max_images: int | None = None
    """Maximum number of images per split (default: all)."""
    prompts: tuple[str, ...] = ("box",)
    """Prompts that held-out objects are evaluated with: box, click, clicks5."""
    split: Literal["val", "test"] = "test"
    """Split to evaluate on. Tune on val."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of training; --dtype is that of the frozen encoder."""
    checkpoint_every: int = 200
    """Steps between checkpoints. A checkpoint is also written after each domain."""
    memory_gib: float = 8.0
    """Memory for samples and features, in GiB. Features that do not fit are kept in files."""
    disk: str | None = None
    """Folder that keeps features between runs (default: SAM_GYM_HOME/embeddings, used only for
    features that exceed --memory-gib)."""
    seed: int = 0
    """Seed of weights, batches, prompts, augmentations and buffers."""

    def validate(self) -> None:
        """Raise `ValueError` for an impossible value."""
        counts = ("steps", "batch_size", "objects_per_augmentation", "augmentations")
        for name in (*counts, "objects_per_image", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {self.max_images}.")
        if not self.memory_gib > 0:
            raise ValueError(f"memory_gib must be positive, got {self.memory_gib}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.split not in ("val", "test"):
            raise unknown_name("split to evaluate on", self.split, ("val", "test"))
        if not self.prompts:
            raise ValueError("prompts is empty: name at least one of box, click, clicks5.")
        for name in self.prompts:
            check_prompt(name)
