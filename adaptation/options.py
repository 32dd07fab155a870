"""Settings of a training, and options that command lines share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from sam_gym.backbones.spec import backbone_help
from sam_gym.data import DATASETS
from sam_gym.data.coco import Coco
from sam_gym.data.options import ReadingOptions
from sam_gym.data.streams import STREAMS, Domain, Stream, dataset_stream, make_stream
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, Positive, Seed, check_settings

#: Prompt of an evaluation; see `adaptation.evaluation.PROMPTS`.
PromptName = Literal["box", "click", "clicks5"]


#: Optimizer steps per domain of a method that does not count epochs.
DEFAULT_STEPS = 60


@documented
@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training, the same for every method."""

    steps: Count | None = None
    """Optimizer steps per domain (None: 60; semantic: of its epochs)."""
    batch_size: Count | None = None
    """Objects per step, over all processes (None: 16; semantic: 2 images)."""
    objects_per_augmentation: Annotated[Count, tyro.conf.arg(aliases=("--objects-per-view",))] = 1
    """Objects drawn from each augmented image of a step. If the encoder is tuned (sam_adapter,
    lora), more objects per image mean fewer images to encode."""
    learning_rate: Positive | None = None
    """Initial learning rate, which falls to a tenth over a domain along a cosine (None: by tune
    target: decoder and sam_adapter 3e-4, hq, prompts and head 1e-3, hq_small 2e-3, LoRA 3e-3)."""
    augmentations: Annotated[Count, tyro.conf.arg(aliases=("--views",))] = 4
    """Augmentations per training image: the image itself, then flipped and scaled copies."""
    objects_per_image: Count = 8
    """Maximum number of objects of an augmented or held-out image."""
    max_images: Count | None = None
    """Maximum number of images per split (None: all)."""
    prompts: tuple[PromptName, ...] = ("box",)
    """Prompts that held-out objects are evaluated with (semantic takes none)."""
    split: Literal["val", "test"] | None = None
    """Split to evaluate on (None: test, or val if there is none, as in coco). Tune on val."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of training; --dtype is that of the frozen encoder."""
    checkpoint_every: Count = 200
    """Steps between checkpoints. A checkpoint is also written after each domain and epoch."""
    memory_gib: Positive = 8.0
    """Memory for samples and features, in GiB. Features that do not fit are kept in files."""
    disk: str | None = None
    """Folder that keeps features between runs (None: SAM_GYM_HOME/embeddings, used only for
    features that exceed --memory-gib)."""
    seed: Seed = 0
    """Seed of weights, batches, prompts, augmentations and buffers."""

    def validate(self) -> None:
        """Raise `ValueError` for an impossible value."""
        check_settings(self)
        if self.disk == "":
            raise ValueError("disk is empty: name a folder, or leave it out.")
        if not self.prompts:
            raise ValueError("prompts is empty: name at least one of box, click, clicks5.")


def stream_help() -> str:
    """Return the help text of `--stream`: streams, and datasets as streams of one domain."""
    # A dataset "domain" needs its kind: --stream scenes-domains --domains KIND.
    datasets = [name for name in DATASETS if name != "domain"]
    return (
        f"Stream of domains: {', '.join(STREAMS.names())}, or a dataset as one domain: "
        f"{', '.join(datasets)} or module:Class (None: folders if --data is given, else "
        "scenes-domains)."
    )


@documented
@dataclass(frozen=True, kw_only=True)
class StreamOptions(ReadingOptions):
    """The domains and their order."""

    stream: Annotated[str | None, tyro.conf.arg(help=stream_help())] = None
    data: tuple[str, ...] = ()
    """Folders of domains, each with images/, masks/ (or instances/) and splits.json; or the folder
    of a dataset that reads files."""
    dataset_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further options of a dataset, as pairs of names and values: --dataset-kwargs annotations
    FILE split_seed 0."""
    domains: str | None = None
    """Comma-separated names of procedural domains (None: all)."""
    stream_seed: Seed = 0
    """Seed of the procedural images, or of the choice of images."""
    retention: str | None = None
    """Folder of a COCO dataset whose val split is evaluated at the end and never trained on."""

    def open(self, order: str | None = None) -> Stream:
        """Open the stream, in an order (see `Stream.ordered`)."""
        name = self.stream or ("folders" if self.data else "scenes-domains")
        if name in DATASETS and name not in STREAMS:
            if len(self.data) > 1:
                raise ValueError(f"--stream {name} is one dataset: give one folder as --data.")
            return dataset_stream(name, *self.data, **self.options_of(name))
        options: dict[str, Any] = {"seed": self.stream_seed, "on_error": self.on_error}
        options |= self.dataset_kwargs
        if self.domains is not None:
            if name != "scenes-domains":
                raise ValueError("--domains chooses procedural domains: drop it, or drop --data.")
            options["domains"] = self.domains
        return make_stream(name, list(self.data) or None, order, **options)

    def open_retention(self) -> Domain | None:
        """Open the retention set as a domain without training images."""
        if self.retention is None:
            return None
        coco = Coco("val", root=self.retention, on_error=self.on_error)
        return Domain("retention", False, {"val": coco, "test": coco})


@documented
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The SAM and its device."""

    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("SAM"))] = "micro"
    checkpoint: str | None = None
    """Its weights (.safetensors or .pth); those of micro are bundled."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""
    dtype: str = "auto"
    """Precision of the frozen SAM: auto (bfloat16 on CUDA, else float32), float32, bfloat16,
    float16."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `load_backbone`."""
        names = ("checkpoint", "device", "dtype")
        return {"name": self.backbone} | {name: getattr(self, name) for name in names}
