"""Options of `python -m adaptation.train_video`, and its configs. Imports no torch, so that wrong
data is refused at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
import yaml

from sam_gym.data import VIDEO_DATASETS, VideoDataset, video_dataset_help
from sam_gym.data.options import ReadingOptions
from sam_gym.utils import cli
from sam_gym.utils.configs import read_yaml, take_configs, updated
from sam_gym.utils.fields import documented, text_of
from sam_gym.utils.files import write_atomic
from sam_gym.utils.settings import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Seed,
    real,
    whole,
)

#: Configs in the package, by name, as `--config` takes them.
CONFIGS = {
    path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
}
#: What can be trained.
Part = Literal[
    "memory", "memory_attention", "memory_encoder", "decoder", "prompt_encoder", "image_encoder"
]


@documented
@dataclass(frozen=True, kw_only=True)
class VideoOptions(ReadingOptions):
    """The videos, and what is taken of them."""

    registry: ClassVar[Any] = VIDEO_DATASETS

    dataset: Annotated[str, tyro.conf.arg(help=video_dataset_help())] = "clips"
    data: str | None = None
    """Root folder of a dataset that reads files."""
    held_out: Literal["val", "test", "none"] = "val"
    """Split of the videos that are tracked during training and at its end."""
    videos: Count | None = None
    """Maximum number of training videos (None: all; of `clips`: 256)."""
    frames: Annotated[int, whole(2)] = 8
    """Frames of a clip."""
    stride: Count = 1
    """Distance of its frames in the video."""
    objects: Count = 3
    """Maximum number of objects of a clip."""
    reverse: Fraction = 0.5
    """Fraction of clips that are played backwards."""
    flip: Fraction = 0.5
    """Fraction of clips that are mirrored."""

    def open(self, split: str) -> VideoDataset:
        """Open a split; see `sam_gym.data.make_video_dataset` for errors."""
        options = self.options_of(self.dataset)
        if self.data is not None:
            options["root"] = self.data
        if self.dataset == "clips":
            options.setdefault("length", self.videos or 256)
        return VIDEO_DATASETS.get(self.dataset).make(split, **options)


@documented
@dataclass(frozen=True, kw_only=True)
class VideoPromptOptions:
    """How objects are prompted and corrected."""

    kind: Literal["mask", "point", "box", "mixed"] = "mixed"
    """Prompt in the first frame of a clip; mixed: half of them masks, a quarter points and boxes
    each."""
    corrected: Natural = 2
    """Maximum number of frames of a clip that are corrected, drawn from 1 on (0: none). Unless the
    prompt is a mask, the first frame is one of them."""
    clicks: Count = 7
    """Clicks in a corrected frame."""
    from_truth: Fraction = 0.1
    """Fraction of clicks that lie anywhere in the object instead of in an error region."""


@documented
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Weights of the loss."""

    focal: NotNegative = 20.0
    """Focal loss of the masks."""
    dice: NotNegative = 1.0
    """Dice loss of the masks."""
    iou: NotNegative = 1.0
    """L1 loss of the predicted IoU."""
    score: NotNegative = 1.0
    """Cross-entropy of the object score."""
    temperature: Positive = 1.0
    """Divides the mask logits in the loss."""
    gt_stride: Count = 1
    """Compare every so many frames of a clip with their truth, from the first on."""


@documented
@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What is trained, and how."""

    parts: tuple[Part, ...] = ("memory", "decoder")
    """What is trained: memory (all of its modules), or memory_attention and memory_encoder alone;
    decoder, prompt_encoder, image_encoder."""
    steps: Count = 500
    """Optimizer steps."""
    batch_size: Count = 4
    """Clips per step, over all processes."""
    learning_rate: Positive = 5e-6
    """Initial learning rate of AdamW, which falls to a tenth along a cosine."""
    encoder_scale: Positive = 1.0
    """Learning rate of the image encoder, as a fraction of the others'."""
    betas: tuple[Annotated[float, real(0, below=1)], Annotated[float, real(0, below=1)]] = (
        0.9,
        0.999,
    )
    """Decay of the averages of AdamW."""
    weight_decay: NotNegative = 0.1
    """Weight decay, of weights with two dimensions or more."""
    clip: NotNegative = 0.1
    """Maximum norm of the gradients (0: any)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of training."""


@documented
@dataclass(frozen=True, kw_only=True)
class VideoRunOptions:
    """The run."""

    out: str | None = None
    """Folder of the run (None: outputs/DATE/TIME)."""
    resume: bool = False
    """Resume the interrupted run in --out. Bit-exact on a CPU."""
    overwrite: bool = False
    """Replace the run in --out. Without --overwrite, a run in it is an error."""
    seed: Seed = 0
    """Seed of clips, prompts and clicks."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    evaluate_every: Natural = 0
    """Steps between evaluations on held-out videos (0: before training and at the end only)."""
    evaluate: Natural = 8
    """Maximum number of held-out videos to track."""
    pictures: Natural = 2
    """Number of held-out videos to draw at each evaluation."""


@documented
@dataclass(frozen=True, kw_only=True)
class TrackerOptions:
    """The tracker that is trained."""

    backbone: str = "micro_video"
    """A SAM with a video memory: micro_video, sam2.1_hiera_tiny, ..."""
    checkpoint: str | None = None
    """Its weights."""
    adapter: str | None = None
    """Adapter to start from, as this command writes it."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""


@dataclass(frozen=True, kw_only=True)
class TrainTrackerConfig:
    """Train a tracker on videos.

    --config NAME or --config FILE.yaml sets defaults, which the other options override; it may be
    repeated.
    """

    run: tyro.conf.OmitArgPrefixes[VideoRunOptions] = field(default_factory=VideoRunOptions)
    model: tyro.conf.OmitArgPrefixes[TrackerOptions] = field(default_factory=TrackerOptions)
    video: tyro.conf.OmitArgPrefixes[VideoOptions] = field(default_factory=VideoOptions)
    prompt: VideoPromptOptions = field(default_factory=VideoPromptOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)

    def check(self) -> None:
        """Raise `ValueError` for settings that do not go together."""
        if not self.optimizer.parts:
            raise ValueError("--parts is empty: name at least one part to train.")
        if self.run.resume and self.run.overwrite:
            raise ValueError("--resume continues a run, --overwrite replaces it: pass one of them.")
        if self.run.resume and self.run.out is None:
            raise ValueError("--resume needs --out, the folder of the run.")
        if not any((self.loss.focal, self.loss.dice, self.loss.iou, self.loss.score)):
            raise ValueError("All weights of the loss are 0: raise one of them.")


def parse_config(args: Sequence[str] | None = None) -> TrainTrackerConfig:
    """Return the config of a command line.

    Raises:
        ValueError, FileNotFoundError: a config does not exist, or a value is impossible.
    """
    rest, paths = take_configs(sys.argv[1:] if args is None else args, CONFIGS)
    default = TrainTrackerConfig()
    for path in paths:
        default = updated(default, read_yaml(path), str(path))
    # tyro would make an option of every key of a dict that is not empty.
    given = default.video.dataset_kwargs
    default = replace(default, video=replace(default.video, dataset_kwargs={}))
    config = cli.parse(
        TrainTrackerConfig,
        "python -m adaptation.train_video",
        rest,
        default=default,
        description=f"{text_of(TrainTrackerConfig)} Names: {', '.join(CONFIGS)}.",
    )
    options = given | config.video.dataset_kwargs
    config = replace(config, video=replace(config.video, dataset_kwargs=options))
    config.check()
    return config


def save_config(config: TrainTrackerConfig, path: Path) -> None:
    """Write a config that repeats the run as `--config PATH`, in another folder."""
    content = asdict(config)
    for name in ("out", "resume", "overwrite"):
        del content["run"][name]
    write_atomic(path, yaml.safe_dump(_plain(content), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value
