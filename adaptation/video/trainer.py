"""Train a tracker on clips: its memory, its decoder, its encoders."""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptation.trainer import falling, import_fabric
from adaptation.video.clips import Clip, describe, draw_clip
from adaptation.video.options import OptimizerOptions, TrainTrackerConfig, save_config
from sam_gym.backbones import load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.tuning import VIDEO
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.spec import check_tracks
from sam_gym.backbones.video.evaluation import score_videos, track
from sam_gym.backbones.video.prompting import ErrorClicks, PromptKind, first_prompts
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.video.unroll import (
    ClipTargets,
    LossWeights,
    tracking_loss,
    unroll,
)
from sam_gym.data.base import VideoDataset
from sam_gym.metrics.video import summarize
from sam_gym.utils.files import make_folder, wait_for_a_later_name, write_json
from sam_gym.utils.lowres import frame_mask, low_res
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.render import draw_overlays, save_image, tile
from sam_gym.utils.runs import refuse_finished, remove_files
from sam_gym.utils.text import reason_of
from sam_gym.utils.training import read_state, save_state

#: Part -> beginnings of the names of its weights; those of the memory begin with "memory.".
PARTS: Mapping[str, tuple[str, ...]] = {
    "memory": ("memory.",),
    "memory_attention": ("memory.memory_attention.",),
    "memory_encoder": ("memory.memory_encoder.", "memory.spatial_perceiver."),
    "decoder": ("mask_decoder.", "no_mem_embed"),
    "prompt_encoder": ("prompt_encoder.",),
    "image_encoder": ("image_encoder.",),
}
#: Kinds of prompts of "mixed", and how often each is drawn.
_MIXED: Mapping[PromptKind, float] = {"mask": 0.5, "point": 0.25, "box": 0.25}
#: Weights that belong to the decoder by name, and are computed with the frame.
_OF_FRAMES = ("mask_decoder.conv_s",)
#: GiB of features that are kept.
_CACHE = 2.0
#: Settings that change no result, so a run may be resumed with other ones.
_FREE = ("out", "resume", "overwrite", "checkpoint_every", "evaluate_every", "evaluate", "pictures")
#: Files that a run writes.
_WRITTEN = (
    *("run.json", "config.yaml", "adapter.safetensors", "checkpoint.pt", "pictures/*.png"),
    "tensorboard/events.out.tfevents.*",
)


@dataclass(frozen=True)
class VideoBatch:
    """The clips of a step that one process works on.

    Attributes:
        frames: of each time, the features or the pixels (B, 3, S, S) of B frames.
        rows: int64 (P,), the clip of each object.
        masks: bool (P, S, S), of the first frame, in the input frame.
        targets: of all frames.
        rngs: the source of randomness of each object.
    """

    frames: list[ImageFeatures]
    rows: Tensor
    masks: np.ndarray
    targets: ClipTargets
    rngs: list[np.random.Generator]


class TrackerModule(nn.Module):
    """The trained SAM and memory, and one forward pass, as data-parallel training wraps it."""

    def __init__(self, tracker: VideoTracker, config: TrainTrackerConfig) -> None:
        super().__init__()
        self.sam, self.memory = tracker.sam, tracker.memory
        self._config, self._side = config, tracker.backbone.image_size

    def forward(self, made: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and numbers; `made` returns a `VideoBatch`, see `adaptation.steps`."""
        batch: VideoBatch = made()
        config, frames = self._config, batch.frames
        if "pixels" in frames[0]:
            together = self.sam.encode_frames(torch.cat([own["pixels"] for own in frames]))
            frames = together.split(len(frames[0]))
        given = config.prompt
        rng = np.random.default_rng([config.run.seed, 31, step])
        kinds = [
            rng_.choice(list(_MIXED), p=list(_MIXED.values())) if given.kind == "mixed" else None
            for rng_ in batch.rngs
        ]
        named: list[Any] = [given.kind if kind is None else str(kind) for kind in kinds]
        device = batch.rows.device
        prompts = first_prompts(batch.rngs, batch.masks, named, device)
        corrector = ErrorClicks(batch.rngs, batch.targets.masks.cpu(), self._side, given.from_truth)
        clicks = dict.fromkeys(_corrected(rng, config), given.clicks)
        predictions = unroll(self.sam, self.memory, frames, batch.rows, prompts, clicks, corrector)
        compared = [own for own in predictions if own.frame % config.loss.gt_stride == 0]
        weights = {name: getattr(config.loss, name) for name in ("focal", "dice", "iou", "score")}
        return tracking_loss(
            compared, batch.targets, LossWeights(**weights), config.loss.temperature
        )


def _corrected(rng: np.random.Generator, config: TrainTrackerConfig) -> list[int]:
    """Draw the frames of a clip that are corrected, the same for all clips of a step."""
    first = [] if config.prompt.kind == "mask" else [0]
    most = min(config.prompt.corrected, config.video.frames - 1 + len(first))
    if not most:
        return []
    count = int(rng.integers(1, most + 1))
    later = rng.choice(np.arange(1, config.video.frames), count - len(first), replace=False)
    return sorted([*first, *later.tolist()])


class TrackerTrainer:
    """Trains a tracker on clips of videos, on private copies of its weights.

    Under `torchrun`, each process takes its share of the clips of every step, and gradients are
    averaged.

    Args:
        config: of the run.
        train: the training videos.
        held_out: the videos that are tracked to report results, or None.

    Raises:
        ValueError: a setting is impossible, or the backbone has no memory.
    """

    def __init__(
        self, config: TrainTrackerConfig, train: VideoDataset, held_out: VideoDataset | None
    ) -> None:
        self.config, self.train, self.held_out = config, train, held_out
        world = int(os.environ.get("WORLD_SIZE", "1"))
        batch = config.optimizer.batch_size
        if batch % world:
            raise ValueError(f"--batch-size {batch} does not divide among {world} processes.")
        model = asdict(config.model)
        check_tracks(model["backbone"])
        self.backbone = load_backbone(
            model["backbone"],
            model["checkpoint"],
            model["device"],
            "float32",
            False,
            model["adapter"],
        )
        own = self.backbone.with_model(Model(copy.deepcopy(self.backbone.model.sam)))
        self.tracker = VideoTracker(own, copy.deepcopy(self.backbone.memory))
        if own.model.sam.state_dict().keys() != self.backbone.sam.state_dict().keys():
            raise ValueError(
                f"--adapter {config.model.adapter}: it adds layers to the SAM. Start from one that "
                "changes weights only."
            )
        device = self.backbone.device
        self.fabric = import_fabric()(
            accelerator=device.type,
            devices=1 if world == 1 else "auto" if device.type == "cuda" else world,
            strategy="auto" if world == 1 else "ddp_find_unused_parameters_true",
            precision=config.optimizer.precision,
        )
        self.fabric.launch()
        self.module = TrackerModule(self.tracker, config)
        self.trained = select_parts(self.module, config.optimizer)
        self.trains_encoder = "image_encoder" in config.optimizer.parts
        self.step = 0
        self.results: dict[str, Any] = {"scores": {}}
        self._features: OrderedDict[tuple[int, int, bool], ImageFeatures] = OrderedDict()
        self._log: Any = None

    # The run -------------------------------------------------------------------------------------

    def fit(self, out: Path) -> dict[str, Any]:
        """Train, evaluate and write everything into a folder; returns the content of run.json."""
        config = self.config
        checkpoint = out / "checkpoint.pt"
        # Before anything is written: it may be of another run.
        state = self._read(checkpoint) if config.run.resume and checkpoint.is_file() else None
        self._prepare(out)
        groups = self._groups()
        optimizer: Any = torch.optim.AdamW(groups, betas=config.optimizer.betas)
        peaks = [group["lr"] for group in groups]
        if state is not None:
            for name, value in state["weights"].items():
                self.trained[name].data.copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.results = state["step"], state["results"]
        self._open_log(out)
        wrapped, optimizer = self.fabric.setup(self.module, optimizer)
        if not self.step and not self.results["scores"]:
            self._evaluate(out)
        steps = config.optimizer.steps
        with ProgressBar(disable=not self.fabric.is_global_zero) as progress:
            task = progress.add_task("training", total=steps, completed=self.step)
            while self.step < steps:
                numbers = self._descend(wrapped, optimizer, peaks)
                self.step += 1
                for name, number in numbers.items():
                    self._record(f"train/{name}", number)
                text = f"loss {numbers['loss']:.3f}  J {numbers['j']:.3f}"
                progress.update(task, completed=self.step, numbers=text)
                every = config.run.evaluate_every
                if self.step == steps or (every and self.step % every == 0):
                    self._evaluate(out)
                if self.step % config.run.checkpoint_every == 0 or self.step == steps:
                    self._save(checkpoint, optimizer)
        self._finish(out)
        return self.results

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate and weight decay."""
        own = self.config.optimizer
        groups = []
        for is_encoder in (False, True):
            for decays in (True, False):
                weights = [
                    weight
                    for name, weight in self.trained.items()
                    if name.startswith("image_encoder.") == is_encoder
                    and (weight.ndim > 1) == decays
                ]
                rate = own.learning_rate * (own.encoder_scale if is_encoder else 1.0)
                decay = own.weight_decay if decays else 0.0
                if weights:
                    groups.append({"params": weights, "lr": rate, "weight_decay": decay})
        return groups

    def _descend(self, module: Any, optimizer: Any, peaks: Sequence[float]) -> dict[str, float]:
        """Take an optimizer step; the clips depend on seed and step only."""
        config, fabric = self.config, self.fabric
        batch = self._batch()
        factor = falling(self.step / config.optimizer.steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss, numbers = module(lambda: batch, self.step)
        # The mean over the objects of all processes, some of which have more of them.
        count = torch.tensor(float(len(batch.rows)), device=fabric.device)
        mean: Any = fabric.all_reduce(count.clone(), reduce_op="mean")
        share = count / mean
        optimizer.zero_grad()
        fabric.backward(loss * share)
        norm = self._clip(module, optimizer)
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The loss is {value} in step {self.step}. Lower --learning-rate."
            )
        shown = {"loss": value, "grad_norm": norm, "learning_rate": factor}
        shown |= {name: float(own) for name, own in numbers.items()}
        return shown

    def _clip(self, module: Any, optimizer: Any) -> float:
        bound = self.config.optimizer.clip or math.inf
        norm = self.fabric.clip_gradients(
            module, optimizer, max_norm=bound, error_if_nonfinite=False
        )
        return 0.0 if norm is None else float(norm)

    # Clips ---------------------------------------------------------------------------------------

    def _batch(self) -> VideoBatch:
        """Draw and read the clips of this process."""
        config, fabric = self.config, self.fabric
        size = config.optimizer.batch_size // fabric.world_size
        rows = range(fabric.global_rank * size, (fabric.global_rank + 1) * size)
        rngs = [np.random.default_rng([config.run.seed, 23, self.step, row]) for row in rows]
        clips = [draw_clip(rng, self.train, config.video) for rng in rngs]
        device = self.backbone.device
        parts = [self._truth(clip) for clip in clips]
        owners = np.repeat(np.arange(len(clips)), [len(clip.objects) for clip in clips])
        targets = ClipTargets(
            torch.from_numpy(np.concatenate([own[1] for own in parts])).to(device),
            torch.from_numpy(np.concatenate([own[2] for own in parts])).to(device),
            torch.from_numpy(np.concatenate([own[3] for own in parts])).to(device),
        )
        each = [rng.spawn(len(clip.objects)) for rng, clip in zip(rngs, clips, strict=True)]
        return VideoBatch(
            [
                ImageFeatures.cat([self._frame(clip, time) for clip in clips])
                for time in range(config.video.frames)
            ],
            torch.from_numpy(owners).to(device),
            np.concatenate([own[0] for own in parts]),
            targets,
            [rng for own in each for rng in own],
        )

    def _frame(self, clip: Clip, time: int) -> ImageFeatures:
        """Features of a frame, which are kept if the image encoder is frozen; else its pixels."""
        if self.trains_encoder:
            return ImageFeatures({"pixels": self.tracker.pixels([clip.image(time)])})
        key = clip.number, clip.frames[time], clip.is_flipped
        if key not in self._features:
            # Alone, so that the numbers do not depend on what was kept.
            with torch.no_grad(), self.fabric.autocast():
                features = self.tracker.sam.encode_frames(self.tracker.pixels([clip.image(time)]))
            self._features[key] = features.floating_to(torch.float32)
            if len(self._features) * features.spec.nbytes > _CACHE * 2**30:
                self._features.popitem(last=False)
        return self._features[key]

    def _truth(self, clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Masks bool (N, S, S) of the first frame, targets and valid pixels float32
        (N, T, hm, wm), and which are known, bool (N, T)."""
        backbone, shape = self.backbone, self.backbone.mask_shape
        content = backbone.input_size(clip.video.size)
        side, count = backbone.image_size, len(clip.objects)
        first = np.zeros((count, side, side), bool)
        targets = np.zeros((count, len(clip.frames), *shape), np.float32)
        valid = np.ones_like(targets)
        known = np.zeros(targets.shape[:2], bool)

        for time in range(len(clip.frames)):
            masks, known[:, time], ignore = clip.masks(time)
            for number, mask in enumerate(masks):
                full = frame_mask(mask, content, side)
                targets[number, time] = low_res(full, shape)
                if time == 0:
                    # Even the smallest object keeps a pixel.
                    first[number] = full >= min(0.5, float(full.max()))
            if ignore is not None:
                valid[:, time] = low_res(frame_mask(ignore, content, side), shape) < 0.5
        return first, targets, valid, known

    # Evaluation ----------------------------------------------------------------------------------

    def _evaluate(self, out: Path) -> None:
        """Track held-out videos; only the first process does."""
        own = self.config.run
        if self.held_out is None or not own.evaluate or not self.fabric.is_global_zero:
            self.fabric.barrier()
            return
        kind: PromptKind = "mask" if self.config.prompt.kind == "mixed" else self.config.prompt.kind
        videos = [self.held_out[k] for k in range(min(own.evaluate, len(self.held_out)))]
        kept: list[tuple[Any, list[np.ndarray]]] = []

        def method(video: Any) -> Iterator[tuple[int, np.ndarray]]:
            masks = []
            for frame, found in track(self.tracker, video, kind):
                masks.append(found)
                yield frame, found
            if len(kept) < own.pictures:
                kept.append((video, masks))

        scores = score_videos(videos, self.held_out.categories, method)
        means = {name: round(summarize(scores)[name], 4) for name in ("J&F", "J", "F")}
        self.results["scores"][str(self.step)] = means
        for name, value in means.items():
            self._record(f"held_out/{name}", value)
        print(f"step {self.step}: held-out J&F {means['J&F']:.3f} ({kind} in the first frame)")
        for number, (video, masks) in enumerate(kept):
            drawn = list(draw_overlays(video, masks, height=192))
            picture = tile(drawn[:: max(1, -(-len(drawn) // 8))], 4)
            save_image(make_folder(out / "pictures") / f"{self.step:06d}-{number}.png", picture)
            if self._log is not None:
                name = f"held_out/{number}"
                self._log.add_image(name, picture, self.step, dataformats="HWC")
        self.fabric.barrier()

    # Files ---------------------------------------------------------------------------------------

    def _key(self) -> dict[str, Any]:
        """Everything that decides the weights, in plain values."""
        settings: dict[str, Any] = asdict(self.config)
        for name in _FREE:
            del settings["run"][name]
        del settings["video"]["held_out"], settings["model"]["device"]
        own: dict[str, Any] = {"settings": settings, "backbone": self.backbone.identity}
        own["data"] = describe(self.train, self.config.video)
        listed: dict[str, Any] = _lists(own)
        return listed

    def _prepare(self, out: Path) -> None:
        """Make the folder, or refuse one that holds a run."""
        own = self.config.run
        if not own.resume and not own.overwrite:
            refuse_finished(out, "run.json")
            if (out / "checkpoint.pt").is_file():
                raise FileExistsError(
                    f"{out} holds an unfinished run. Pass --resume to continue it, --overwrite to "
                    "start over, or another --out."
                )
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            make_folder(out)
            if not own.resume:
                remove_files(out, _WRITTEN)
            save_config(self.config, out / "config.yaml")
        self.fabric.barrier()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = read_state(path, self.backbone.device)
        except Exception as error:  # a damaged file raises errors of every kind
            raise ValueError(
                f"{path}: not a readable checkpoint ({reason_of(error)}). Remove the file to start "
                "the run again."
            ) from error
        key = self._key()
        differs = [name for name, value in key.items() if state["key"].get(name) != value]
        if differs:
            raise ValueError(
                f"{path}: a checkpoint of a run with another {', '.join(differs)}. Resume with the "
                "same settings, or choose another --out."
            )
        return state

    def _save(self, path: Path, optimizer: Any) -> None:
        if self.fabric.is_global_zero:
            state = {
                "key": self._key(),
                "step": self.step,
                "weights": {name: own.detach() for name, own in self.trained.items()},
                "optimizer": optimizer.state_dict(),
                "results": self.results,
            }
            save_state(state, path)

    def _finish(self, out: Path) -> None:
        if self._log is not None:
            self._log.close()
        if self.fabric.is_global_zero:
            self.adapter().save(out / "adapter.safetensors")
            write_json(out / "run.json", self.results)

    def adapter(self) -> Adapter:
        """The trained weights, together with those of the adapter that training started from."""
        plain, before = self.backbone, self.backbone.adapter
        published, names = plain.sam.state_dict(), {*self.trained}
        if before is not None:
            names |= {f"memory.{name}" for name in before.memory}
        own = self.module.sam.state_dict()
        image = {
            name: value
            for name, value in own.items()
            if name in names or not torch.equal(value, published[name])
        }
        memory = {
            name: value
            for name, value in self.module.memory.state_dict().items()
            if f"memory.{name}" in names
        }
        learned = [self.train.name]
        return Adapter(
            plain.name, plain.weights_digest, "video", VIDEO, learned, [image], memory=memory
        )

    def _open_log(self, out: Path) -> None:
        if self.fabric.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            folder = out / "tensorboard"
            wait_for_a_later_name(folder)
            self._log = SummaryWriter(str(folder), purge_step=self.step + 1)

    def _record(self, name: str, value: float) -> None:
        if self._log is not None:
            self._log.add_scalar(name, value, self.step)


def select_parts(module: TrackerModule, options: OptimizerOptions) -> dict[str, nn.Parameter]:
    """Freeze all of a module but the parts to train; returns their weights, by name."""
    prefixes = tuple(prefix for part in options.parts for prefix in PARTS[part])
    named = {f"memory.{name}": weight for name, weight in module.memory.named_parameters()}
    named |= dict(module.sam.named_parameters())
    # Finer features are computed with the frame, without gradients if the encoder is frozen.
    frozen = () if "image_encoder" in options.parts else _OF_FRAMES
    never = ("memory.no_mem_pos_enc",)
    trained = {}
    for name, weight in named.items():
        is_trained = name.startswith(prefixes) and not name.startswith((*frozen, *never))
        weight.requires_grad_(is_trained)
        if is_trained:
            trained[name] = weight
    return trained


def _lists(value: Any) -> Any:
    """Plain values with lists instead of tuples, as files hold them."""
    if isinstance(value, Mapping):
        return {name: _lists(own) for name, own in value.items()}
    return [_lists(own) for own in value] if isinstance(value, (list, tuple)) else value
