"""Train `micro_video`, a memory on the frozen `micro`.

    python -m sam_gym.backbones.video.train --help

The recipe is SAM 2's (Ravi et al. 2024, appendix D) at a small scale: clips of a few frames,
unrolled with gradients; objects are prompted by mask, box or click in the first frame, and at times
corrected by a click in a later one. First come clips of three frames, which teach the matching of
frames at half the cost. The frames of a clip are encoded once; the clip then stays in a pool,
from which steps draw other windows, directions and objects of it. With `--photos`, half of the
clips are made of annotated photographs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.loading import load_backbone, read_base, resolve_device
from sam_gym.backbones.micro.muon import is_hidden_matrix, muon_and_adamw
from sam_gym.backbones.micro.photos import PhotoMixer, PhotoOptions
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.spec import BACKBONES, BASE_DIGEST
from sam_gym.backbones.video.evaluation import (
    Method,
    copy_masks,
    follow_masks,
    score_videos,
    track,
)
from sam_gym.backbones.video.micro_video import (
    build_micro_memory,
    build_micro_video,
)
from sam_gym.backbones.video.photo_clips import photo_clip
from sam_gym.backbones.video.prompting import ErrorClicks, first_prompts
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.video.unroll import ClipTargets, tracking_loss, unroll
from sam_gym.data.synthetic.clips import Clips
from sam_gym.metrics.video import summarize
from sam_gym.utils.digest import digest_of
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_json
from sam_gym.utils.lowres import low_res
from sam_gym.utils.settings import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    check_settings,
    whole,
)
from sam_gym.utils.training import (
    SmallTrainer,
    SmallTrainerConfig,
    save_half,
    single_thread,
    warm_up_and_decay,
)

#: Sides of clips, and the number of frames that one is generated with.
SIZES, GENERATED = (256, 320), 24
#: Kinds of prompts, and how often each is drawn.
KINDS: dict[Any, float] = {"mask": 0.5, "box": 0.25, "point": 0.25}
#: Frames of the short clips at the beginning.
SHORT = 3
#: Smallest area of an object that is prompted, as a fraction of the frame.
SMALLEST = 0.002


@documented
@dataclass(frozen=True, kw_only=True)
class TrainVideoConfig(SmallTrainerConfig, PhotoOptions):
    """Train micro_video, a memory on the frozen micro.

    Run the same command again to resume from `--out`. `--steps` may change in between, which moves
    the final decay of the learning rate.
    """

    out: str = "runs/micro_video"
    steps: Count = 500
    images: Count = 8
    """Clips per step."""
    objects: Count = 2
    """Maximum number of objects per clip and step."""
    frames: Annotated[int, whole(3)] = 6
    """Frames of a clip in a step."""
    window: Annotated[int, whole(3, GENERATED)] = 12
    """Frames of a clip that are encoded, of which each step takes some."""
    short: Fraction = 0.25
    """Initial fraction of the steps with clips of three frames."""
    reuse: Positive = 8.0
    """How often a clip is drawn, on average."""
    pool: Count = 128
    """Number of encoded clips to draw from."""
    correct: Fraction = 0.2
    """Fraction of the steps with long clips in which a frame is corrected by clicks."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, faster where the hardware multiplies bfloat16 matrices."""
    learning_rate: Positive = 2e-3
    decoder_scale: NotNegative = 0.3
    """Learning rates of the mask decoder, as a fraction of those of the memory."""
    weight_decay: NotNegative = 0.03
    """Weight decay of the parameters that Muon optimizes; the others have none."""
    warmup: Natural = 50
    """Steps of linear warm-up."""
    decay: Fraction = 0.4
    """Final fraction of the steps over which the learning rate falls to zero."""
    ema: Fraction = 0.995
    """Decay of the moving average of the weights. The average is saved."""
    evaluate: Natural = 24
    """Held-out clips to track at the end."""


# Clips -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawClip:
    """Frames of a video, and where its objects are.

    Attributes:
        images: T arrays uint8 (H, W, 3).
        masks: uint8 (T, N, S * S / 8), packed bits of masks in the input frame.
        areas: float64 (T, N), fractions of the frame.
    """

    images: list[np.ndarray]
    masks: np.ndarray
    areas: np.ndarray


class ClipStream(TorchDataset[RawClip]):
    """The training clips, whose first frames show an object; item `i` is always the same.

    Args:
        seed: of the whole stream.
        frames: number of frames of a clip, of every frame of a video or every second one.
        side: of the input frame, in pixels.
        photos: annotated photographs to make clips of, or None.
        photo_fraction: fraction of these clips.
    """

    def __init__(
        self,
        seed: int,
        frames: int,
        side: int,
        photos: PhotoMixer | None = None,
        photo_fraction: float = 0.5,
    ) -> None:
        self._seed, self._frames, self._side = seed, frames, side
        self._sets = [Clips("train", frames=GENERATED, size=size, seed=seed) for size in SIZES]
        self._photos, self._photo_fraction = photos, photo_fraction if photos else 0.0

    def __getitem__(self, index: int) -> RawClip:
        rng = np.random.default_rng([self._seed, 19, index])
        while True:
            raw = self._draw(rng, index)
            if raw.areas[0].max() >= SMALLEST:
                return raw

    def _draw(self, rng: np.random.Generator, index: int) -> RawClip:
        if self._photos is not None and rng.random() < self._photo_fraction:
            images, masks = photo_clip(rng, self._photos, self._frames)
            return self._raw(images, np.stack([self._framed(own) for own in masks]))
        clip = self._sets[int(rng.integers(len(SIZES)))][index]
        stride = int(rng.integers(1, max(1, (GENERATED - 1) // (self._frames - 1)) + 1))
        first = int(rng.integers(GENERATED - (self._frames - 1) * stride))
        frames = range(first, first + self._frames * stride, stride)
        images = [clip.image(frame) for frame in frames]
        masks = np.stack([self._framed(clip.annotation(frame).masks) for frame in frames])
        return self._raw(images, masks)

    def _raw(self, images: list[np.ndarray], masks: np.ndarray) -> RawClip:
        flat = masks.reshape(*masks.shape[:2], -1)
        return RawClip(images, np.packbits(flat, axis=2), flat.mean(axis=2))

    def _framed(self, masks: np.ndarray) -> np.ndarray:
        size = (self._side, self._side)
        return np.stack([cv2.resize(mask.astype(np.uint8) * 255, size) > 127 for mask in masks])


@dataclass(frozen=True)
class EncodedClip:
    """A clip whose frames were encoded.

    Attributes:
        features: float16, of its T frames, without `no_mem_embed`.
        masks: see `RawClip`.
        areas: see `RawClip`.
    """

    features: ImageFeatures
    masks: np.ndarray
    areas: np.ndarray


class ClipPool:
    """The pool of encoded clips. What a step draws depends on seed and step only.

    Args:
        config: of the training.
        backbone: the frozen `micro`.
        photos: annotated photographs to make clips of, or None.
    """

    def __init__(
        self, config: TrainVideoConfig, backbone: Backbone, photos: PhotoMixer | None = None
    ) -> None:
        self.config, self._backbone = config, backbone
        self._stream = ClipStream(
            config.seed, config.window, backbone.image_size, photos, config.photo_fraction
        )
        self._clips: OrderedDict[int, EncodedClip] = OrderedDict()

    def batches(self, start: int) -> Iterator[list[EncodedClip]]:
        """Iterate over the clips of each step from `start` on."""
        config = self.config
        first, last = self._numbers(start).start, self._numbers(config.steps - 1).stop
        loader = DataLoader(
            self._stream,
            batch_size=None,
            sampler=range(first, last),  # type: ignore[arg-type]
            num_workers=config.workers,
            worker_init_fn=single_thread,
            prefetch_factor=4 if config.workers else None,
        )
        drawn = enumerate(loader, start=first)
        for step in range(start, config.steps):
            numbers = self._numbers(step)
            while next(reversed(self._clips), -1) < numbers.stop - 1:
                number, raw = next(drawn)
                self._clips[number] = self._encoded(raw)
            while next(iter(self._clips)) < numbers.start:
                self._clips.popitem(last=False)
            rng = np.random.default_rng([config.seed, 13, step])
            chosen = rng.choice(numbers, config.images, replace=False)
            yield [self._clips[number] for number in chosen.tolist()]

    def _numbers(self, step: int) -> range:
        """Return the clips that are in the pool at a step."""
        config = self.config
        stop = 2 * config.images + int(step * config.images / config.reuse)
        return range(max(0, stop - max(config.pool, config.images)), stop)

    def _encoded(self, raw: RawClip) -> EncodedClip:
        features = self._backbone.encode(raw.images).floating_to(torch.float16)
        return EncodedClip(features, raw.masks, raw.areas)


@dataclass(frozen=True)
class StepClips:
    """What a step sees of its clips.

    Attributes:
        frames: of each time, the features of B frames.
        rows: int64 (P,), the clip of each object.
        masks: bool (P, T, S, S), in the input frame.
    """

    frames: list[ImageFeatures]
    rows: Tensor
    masks: np.ndarray


def draw_windows(
    rng: np.random.Generator,
    clips: Sequence[EncodedClip],
    length: int,
    objects: int,
    side: int,
) -> StepClips:
    """Draw frames and objects of clips: windows forwards or backwards, of neighbouring frames or,
    if they are short, with gaps. Objects that vanish for a while are drawn more often.

    Args:
        rng: the source of randomness.
        clips: B clips, whose first frames show an object.
        length: T, number of frames.
        objects: maximum number per clip.
        side: S, of the input frame.
    """
    picked, rows, masks = [], [], []
    for number, clip in enumerate(clips):
        shown = np.asarray((clip.areas >= SMALLEST).any(axis=1))
        span = len(shown) - length + 1
        # Where a window may begin, forwards and backwards.
        begins = [*np.flatnonzero(shown[:span]), *(~np.flatnonzero(shown[::-1][:span]))]
        first = int(begins[rng.integers(len(begins))])
        rest = np.arange(length - 1)
        if length <= SHORT:
            rest = np.sort(rng.choice(len(shown) - 1 - max(first, ~first), length - 1, False))
        frames = np.array([0, *(1 + rest)])
        frames = first + frames if first >= 0 else len(shown) + first - frames
        seen = np.flatnonzero(clip.areas[frames[0]] >= SMALLEST)
        gone = np.asarray((clip.areas[frames][:, seen] < 0.1 * SMALLEST).any(axis=0))
        weights = 1.0 + 2.0 * gone
        count = min(objects, len(seen))
        chosen = rng.choice(seen, count, replace=False, p=weights / weights.sum())
        rows += [number] * count
        picked.append(clip.features[torch.from_numpy(frames.copy())])
        bits = np.unpackbits(clip.masks[frames][:, chosen], axis=2)
        masks.append(bits.reshape(length, count, side, side).swapaxes(0, 1).astype(bool))
    frames_of = [
        ImageFeatures.cat([own[time : time + 1] for own in picked]).floating_to(torch.float32)
        for time in range(length)
    ]
    where = torch.tensor(rows, device=frames_of[0].device)
    return StepClips(frames_of, where, np.concatenate(masks))


def clip_targets(masks: np.ndarray, shape: tuple[int, int], device: torch.device) -> ClipTargets:
    """Return the targets of masks bool (P, T, S, S) at the size (hm, wm) of low-res masks."""
    small = np.stack([[low_res(mask, shape) for mask in own] for own in masks])
    known = torch.ones(masks.shape[:2], dtype=torch.bool, device=device)
    return ClipTargets(torch.from_numpy(small).to(device), None, known)


# Training ----------------------------------------------------------------------------------------


class TrainedParts(nn.Module):
    """What is trained of `micro_video`; the rest is `micro`."""

    def __init__(self, sam: Any, memory: Any) -> None:
        super().__init__()
        self.mask_decoder, self.no_mem_embed = sam.mask_decoder, sam.no_mem_embed
        self.memory = memory

    def exported(self) -> dict[str, Tensor]:
        """The weights under the names of a checkpoint."""
        return {name.removeprefix("memory."): own for name, own in self.state_dict().items()}


class MicroVideoTrainer(SmallTrainer):
    """The memory, the mask decoder, and their moving average."""

    def __init__(self, config: TrainVideoConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        spec = BACKBONES.get("micro_video")
        base = read_base(spec)
        self.base_digest = digest_of(base)
        self.sam, self.memory = build_micro_video(), build_micro_memory()
        _initialize(self.sam, self.memory, base)
        self.sam.to(device).eval().requires_grad_(False)
        self.memory.to(device).eval()
        self.trained = TrainedParts(self.sam, self.memory).requires_grad_(True)
        self.memory.no_mem_pos_enc.requires_grad_(False)
        self.average = AveragedModel(
            self.trained, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
        )
        named = {n: p for n, p in self.trained.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in named.items():
            key = is_hidden_matrix(name, parameter), name.startswith("mask_decoder.")
            groups.setdefault(key, []).append(parameter)
        self.optimizers = muon_and_adamw(
            groups[True, False], groups[False, False], config, config.weight_decay
        )
        for optimizer, is_matrix in zip(self.optimizers, (True, False), strict=True):
            own = {"params": groups[is_matrix, True], "scale": config.decoder_scale}
            optimizer.add_param_group(own)
        self.parts = {"trained": self.trained, "average": self.average}

    def schedule(self) -> float:
        config = self.config
        return warm_up_and_decay(self.step, config.steps, config.warmup, config.decay)

    def train_step(self, clips: Sequence[EncodedClip]) -> dict[str, float]:
        """One optimizer step; returns numbers for the log."""
        config, side = self.config, self.sam.image_encoder.img_size
        rng = np.random.default_rng([config.seed, 17, self.step])
        is_short = self.step < config.short * config.steps
        length = SHORT if is_short else config.frames
        drawn = draw_windows(rng, clips, length, config.objects, side)
        kinds = rng.choice(list(KINDS), len(drawn.masks), p=list(KINDS.values())).tolist()
        rngs = rng.spawn(len(drawn.masks))
        prompts = first_prompts(rngs, drawn.masks[:, 0], kinds, self.device)
        targets = clip_targets(drawn.masks, self.sam.prompt_encoder.mask_input_size, self.device)
        clicks: dict[int, int] = {}
        if not is_short and rng.random() < config.correct:
            clicks = {int(rng.integers(1, length - 1)): int(rng.integers(1, 3))}
        corrector = ErrorClicks(rngs, targets.masks.cpu(), side)
        with torch.autocast(self.device.type, torch.bfloat16, config.precision == "bfloat16"):
            predictions = unroll(
                self.sam, self.memory, drawn.frames, drawn.rows, prompts, clicks, corrector
            )
        loss, numbers = tracking_loss(predictions, targets)
        loss = loss / len(predictions)
        norm = self.descend(loss)
        self.average.update_parameters(self.trained)
        numbers = {name: own / len(predictions) for name, own in numbers.items() if name != "j"} | {
            "j": numbers["j"],
            "loss": loss.detach(),
            "grad_norm": norm,
        }
        return {name: float(value) for name, value in numbers.items()} | {
            "objects": len(drawn.masks)
        }

    def export(self, path: Path) -> None:
        """Write the averaged weights as float16 safetensors."""
        averaged: TrainedParts = self.average.module  # type: ignore[assignment]
        state = averaged.exported()
        digest = torch.tensor(list(bytes.fromhex(self.base_digest)), dtype=torch.uint8)
        metadata = {"model": "sam-gym micro_video", "steps": str(self.step)}
        save_half(state | {BASE_DIGEST: digest}, path, metadata)


def _initialize(sam: Any, memory: Any, base: dict[str, Tensor]) -> None:
    """Start from `micro`, and from memories that change nothing but attend to what looks alike.

    Queries are embeddings, memories are embeddings in fewer channels, and keys are these in their
    former channels, so that their products are those of embeddings.
    """
    missing, unexpected = sam.load_state_dict(base, strict=False)
    assert not unexpected and all("score" in name or "no_mem" in name for name in missing)
    nn.init.zeros_(sam.no_mem_embed)
    # Most objects are there.
    nn.init.constant_(sam.mask_decoder.pred_obj_score_head.layers[-1].bias, 2.0)
    attention, norm = memory.memory_attention, sam.image_encoder.norm
    for layer in attention.layers:
        for last in (layer.self_attn.out_proj, layer.cross_attn_image.out_proj, layer.linear2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    with torch.no_grad():
        attention.norm.weight.copy_(norm.weight)
        attention.norm.bias.copy_(norm.bias)
    encoder = memory.memory_encoder
    for block in encoder.fuser.layers:
        nn.init.constant_(block.gamma, 0.1)
    fewer = nn.init.orthogonal_(torch.empty(encoder.out_proj.weight.shape[:2])) * 2**0.5
    same = torch.eye(fewer.shape[1])
    for projection, weight in (
        (encoder.pix_feat_proj, same),
        (encoder.out_proj, fewer),
        *((layer.cross_attn_image.q_proj, same) for layer in attention.layers),
        *((layer.cross_attn_image.k_proj, fewer.T) for layer in attention.layers),
    ):
        projection.weight.data.copy_(weight.view_as(projection.weight))
        nn.init.zeros_(projection.bias)


def evaluate(backbone: Backbone, clips: int, split: str = "val") -> dict[str, float]:
    """Measure J&F on clips, from a mask, a box and a click, beside two methods without memory."""
    videos = Clips(split, frames=GENERATED, length=clips)
    tracker, image = VideoTracker(backbone), load_backbone("micro", device=str(backbone.device))
    methods: dict[str, Method] = {
        "mask copied": copy_masks,
        "previous mask and box": partial(follow_masks, image),
    }
    for kind in KINDS:
        methods[f"memory, {kind}"] = partial(track, tracker, kind=kind)
    results = {}
    for name, method in methods.items():
        scores = score_videos((videos[k] for k in range(clips)), videos.categories, method)
        results[name] = round(summarize(scores)["J&F"], 4)
    return results


def train(config: TrainVideoConfig) -> dict[str, float]:
    """Train or resume training, and write the weights and `evaluation.json`."""
    # OpenCV's threads do not survive a fork: a data worker would wait for them forever.
    cv2.setNumThreads(0)
    check_settings(config)
    if config.frames > config.window:
        raise ValueError(
            f"--frames is {config.frames}, but only {config.window} frames of a clip are encoded: "
            "raise --window."
        )
    device = resolve_device(config.device)
    out = make_folder(config.out)
    photos = config.photo_mixer()
    trainer = MicroVideoTrainer(config, device)
    trainer.resume(out)
    micro = load_backbone("micro", device=str(device), dtype="float32")
    pool = ClipPool(config, micro, photos)
    headline = "loss {loss:.3f}  J {j:.3f}".format_map
    trainer.run(pool.batches(trainer.step), out, headline)
    path = out / "micro_video.safetensors"
    trainer.export(path)
    result: dict[str, float] = {}
    if config.evaluate:
        trained = load_backbone(
            "micro_video", checkpoint=str(path), device=str(device), dtype="float32"
        )
        result = evaluate(trained, config.evaluate)
    write_json(out / "evaluation.json", result)
    print("J&F on held-out clips:", result)
    return result


if __name__ == "__main__":
    from sam_gym.utils import cli

    cli.run(
        lambda: train(cli.parse(TrainVideoConfig, "python -m sam_gym.backbones.video.train")),
        "Run the same command again to resume.",
    )
