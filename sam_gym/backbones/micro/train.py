"""Train `micro`, the bundled SAM: `python -m sam_gym.backbones.micro.train --help`.

The recipe follows SAM (Kirillov et al. 2023, appendix A) at a small scale: simulated clicks, boxes
and noisy masks, corrections from the error region, focal + Dice loss, the best of three masks for
an ambiguous prompt, a predicted-IoU head. Two additions: a semantic head on the embedding, used in
training only, teaches the encoder categories; and all corrections but the last are simulated
without gradients, so that long click sequences are cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sam_gym.backbones.decode import NO_POINT, Prompts, best_token, decode_tokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.hq import encode_pixels
from sam_gym.backbones.loading import load_weights, resolve_device
from sam_gym.backbones.micro.data import LABEL_STRIDE, NO_LABEL, SIZE, MicroStream, TrainItem
from sam_gym.backbones.micro.model import build_micro
from sam_gym.backbones.micro.muon import muon_and_adamw
from sam_gym.backbones.service import Backbone
from sam_gym.data.base import Sample
from sam_gym.data.options import ReadingOptions
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.metrics.masks import batch_iou
from sam_gym.simulation.clicks import interior_distance
from sam_gym.simulation.interactive import Target, click_out
from sam_gym.utils.files import make_folder, write_json
from sam_gym.utils.lowres import low_res
from sam_gym.utils.settings import Count, Fraction, Natural, NotNegative, Positive, check_settings
from sam_gym.utils.training import SmallTrainer, SmallTrainerConfig, save_half

MASK = SIZE // 4
CELL = SIZE // MASK


@dataclass(frozen=True, kw_only=True)
class TrainMicroConfig(SmallTrainerConfig, ReadingOptions):
    """Train micro, the bundled SAM.

    Run the same command again to resume from `--out`. `--steps` may change in between, which moves
    the final decay of the learning rate.
    """

    out: str = "runs/micro"
    photos: str | None = None
    """Root of a COCO-style dataset to mix in, train split (None: scenes only)."""
    init: str | None = None
    """Weights of micro to start from (None: random weights)."""
    steps: Count = 2700
    images: Count = 12
    targets: Count = 4
    """Prompted targets per image."""
    max_rounds: Natural = 6
    """Maximum number of corrections without gradients before the last one."""
    vector_learning_rate: Positive = 8e-4
    weight_decay: NotNegative = 0.03
    """Weight decay of the parameters that Muon optimizes; the others have none."""
    warmup: Natural = 150
    """Steps of linear warm-up."""
    decay: Fraction = 0.3
    """Final fraction of the steps over which the learning rate falls to zero."""
    ema: Fraction = 0.998
    """Decay of the moving average of the weights. The average is saved."""
    semantic_weight: NotNegative = 1.0
    """Weight of the semantic head's cross-entropy."""
    evaluate: Natural = 200
    """Objects of held-out scenes to segment with simulated clicks at the end."""


class PromptBatch:
    """The prompts of one step. Each round adds a click.

    Args:
        items: the images and targets of the step.
        capacity: maximum number of clicks per target.
        rng: draws prompt kinds and click places.
    """

    def __init__(self, items: Sequence[TrainItem], capacity: int, rng: np.random.Generator) -> None:
        targets = [target for item in items for target in item.targets]
        self.rng = rng
        self.rows = np.repeat(np.arange(len(items)), [len(item.targets) for item in items])
        self.full = np.stack([target.mask for target in targets])
        area = np.stack([low_res(mask, (MASK, MASK)) for mask in self.full])
        self.target = torch.from_numpy(area)
        self.hard = area > 0.5
        count = len(targets)
        self.points = np.zeros((count, capacity, 2), np.float32)
        self.labels = np.full((count, capacity), NO_POINT, np.int64)
        self.boxes = np.zeros((count, 4), np.float32)
        self.has_box = np.zeros(count, bool)
        self.masks = torch.zeros(count, MASK, MASK)
        self.has_mask = np.zeros(count, bool)
        self.used = np.zeros(count, np.int64)
        self.partial = np.zeros(count, bool)
        for i, target in enumerate(targets):
            self._first_prompt(i, target.clicks)

    def _first_prompt(self, i: int, clicks: np.ndarray) -> None:
        kind = self.rng.random()
        if kind < 0.18:
            self._add_box(i)
            return
        count = len(clicks) if len(clicks) > 1 and self.rng.random() < 0.5 else 1
        # The first click on a union selects a single object: this round has no training signal.
        self.partial[i] = count < len(clicks)
        for click in clicks[:count]:
            self._add_click(i, click[0], click[1], True)
        if kind > 0.9:
            self._add_noisy_mask(i)

    def _add_click(self, i: int, x: float, y: float, positive: bool) -> None:
        if self.used[i] < self.points.shape[1]:
            self.points[i, self.used[i]] = x, y
            self.labels[i, self.used[i]] = int(positive)
            self.used[i] += 1

    def _add_box(self, i: int) -> None:
        x, y, w, h = cv2.boundingRect(self.full[i].astype(np.uint8))
        corners = np.array([x, y, x + w - 1, y + h - 1], np.float32)
        noise = self.rng.normal(0, 0.06, 4) * [w, h, w, h]
        self.boxes[i] = np.clip(corners + np.clip(noise, -15, 15), 0, SIZE - 1)
        self.has_box[i] = True

    def _add_noisy_mask(self, i: int) -> None:
        mask = self.hard[i].astype(np.float32)
        dx, dy = self.rng.normal(0, 2, 2)
        move = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        mask = cv2.GaussianBlur(cv2.warpAffine(mask, move, (MASK, MASK)), (0, 0), 1.5)
        bumps = cv2.resize(self.rng.normal(0, 0.25, (8, 8)).astype(np.float32), (MASK, MASK))
        self.masks[i] = torch.from_numpy((mask + bumps - 0.5) * self.rng.uniform(6, 20))
        self.has_mask[i] = True

    @property
    def ambiguous(self) -> Tensor:
        """bool (P,): rows whose only prompt is one click."""
        return torch.from_numpy((self.used == 1) & ~self.has_box & ~self.has_mask)

    def prompts(self, device: torch.device) -> Prompts:
        used = max(1, int(self.used.max()))

        def to(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).to(device)

        return Prompts(
            points=to(self.points[:, :used]),
            labels=to(self.labels[:, :used]),
            boxes=to(self.boxes),
            has_box=to(self.has_box),
            masks=self.masks.to(device),
            has_mask=to(self.has_mask),
            rows=to(self.rows),
        )

    def correct(self, logits: Tensor) -> None:
        """Give each target a click in its error region, and the logits as its mask prompt."""
        self.masks = logits.detach().float().cpu().clamp(-32, 32)
        self.has_mask[:] = True
        predicted = self.masks.numpy() > 0
        for i, (mask, truth) in enumerate(zip(predicted, self.hard, strict=True)):
            missed, extra = truth & ~mask, mask & ~truth
            if not (missed.any() or extra.any()):
                continue
            if self.rng.random() < 0.65:
                inner_missed, inner_extra = interior_distance(missed), interior_distance(extra)
                positive = bool(inner_missed.max() > inner_extra.max())
                index = int((inner_missed if positive else inner_extra).argmax())
            else:
                wrong = np.flatnonzero(missed | extra)
                index = int(wrong[self.rng.integers(len(wrong))])
                positive = bool(truth.flat[index])
            y, x = divmod(index, MASK)
            dx, dy = self.rng.integers(0, CELL, 2)
            self._add_click(i, CELL * x + dx, CELL * y + dy, positive)


def mask_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Focal x 8 + Dice per mask: logits (P, M, h, w), target (P, h, w) in [0, 1] -> (P, M)."""
    target = target[:, None].expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = ((probability - target).square() * entropy).mean(dim=(2, 3))
    overlap = (probability * target).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    return 8.0 * focal + 1.0 - (2.0 * overlap + 1.0) / (total + 1.0)


def true_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of thresholded masks: logits (P, M, h, w), target (P, h, w) -> (P, M)."""
    return batch_iou(logits > 0, (target > 0.5)[:, None])


def round_loss(
    sam: Sam, features: ImageFeatures, batch: PromptBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the current prompts, the best logits (P, h, w) and their IoU (P,)."""
    device = features.device
    tokens = decode_tokens(sam, features, batch.prompts(device))
    logits = tokens.decode_masks()
    target = batch.target.to(device)
    ambiguous = batch.ambiguous.to(device)
    learn = (~torch.from_numpy(batch.partial).to(device)).float()

    losses = mask_losses(logits, target)
    three = losses[:, 1:]
    # The best mask learns the target. A small weight keeps the other two from dying.
    multimask = 0.93 * three.min(dim=1).values + 0.07 * three.mean(dim=1)
    shared = torch.where(ambiguous, multimask + 0.4 * losses[:, 0], losses[:, 0] + 0.2 * multimask)
    quality = true_iou(logits.detach(), target)
    quality_loss = (tokens.iou - quality).square().mean(dim=1)
    loss = ((shared + quality_loss) * learn).sum() / learn.sum().clamp(min=1)

    chosen = best_token(tokens.iou, ambiguous)[:, None]
    kept = logits.detach().take_along_dim(chosen[:, :, None, None], dim=1)[:, 0]
    return loss, kept, quality.gather(1, chosen)[:, 0]


@torch.no_grad()
def play_round(sam: Sam, features: ImageFeatures, batch: PromptBatch) -> Tensor:
    """Decode the current prompts without gradients: logits (P, h, w)."""
    tokens = decode_tokens(sam, features, batch.prompts(features.device))
    return tokens.decode_best_masks(batch.ambiguous.to(features.device))[0]


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon optimizes a parameter: it maps features to features."""
    if parameter.ndim < 2 or "embed" in name:
        return False
    return min(parameter.flatten(1).shape) >= 8


class MicroTrainer(SmallTrainer):
    """The model and its moving average."""

    def __init__(self, config: TrainMicroConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.sam = build_micro()
        if config.init:
            load_weights(self.sam, "micro", Path(config.init))
        self.sam.to(device)
        width = self.sam.prompt_encoder.embed_dim
        per_cell = (16 // LABEL_STRIDE) ** 2
        self.semantic = nn.Conv2d(width, (1 + len(Scenes.categories)) * per_cell, 1).to(device)
        self.average = AveragedModel(
            self.sam, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
        )
        self.parameters = [*self.sam.parameters(), *self.semantic.parameters()]
        matrices = [p for name, p in self.sam.named_parameters() if _is_hidden_matrix(name, p)]
        taken = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.parameters if id(parameter) not in taken]
        self.optimizers = muon_and_adamw(matrices, rest, config, config.weight_decay)
        self.parts = {"sam": self.sam, "semantic": self.semantic, "average": self.average}

    def schedule(self) -> float:
        """Fraction of the peak learning rate at this step: warm-up, constant, linear decay."""
        config = self.config
        warm = min(1.0, (self.step + 1) / config.warmup)
        cool = min(1.0, (config.steps - self.step) / max(1.0, config.decay * config.steps))
        return warm * cool

    def train_step(self, items: Sequence[TrainItem]) -> dict[str, float]:
        """One optimizer step; returns numbers for the log."""
        config = self.config
        rng = np.random.default_rng([config.seed, 11, self.step])
        self.sam.train()
        pixels = torch.from_numpy(np.stack([item.image for item in items])).to(self.device)
        pixels = (pixels.permute(0, 3, 1, 2) - self.sam.pixel_mean) / self.sam.pixel_std
        features = encode_pixels(self.sam, pixels)
        semantic = self._semantic_loss(features.embedding, items)

        rounds = int(rng.integers(0, config.max_rounds))
        batch = PromptBatch(items, rounds + 6, rng)
        first, logits, first_iou = round_loss(self.sam, features, batch)
        batch.correct(logits)
        batch.partial[:] = False
        for _ in range(rounds):
            batch.correct(play_round(self.sam, features, batch))
        last, _, last_iou = round_loss(self.sam, features, batch)

        loss = first + last + config.semantic_weight * semantic
        norm = self.descend(loss)
        self.average.update_parameters(self.sam)
        numbers = {
            "loss": loss,
            "first": first,
            "last": last,
            "semantic": semantic,
            "grad_norm": norm,
            "iou_first": first_iou.mean(),
            "iou_last": last_iou.mean(),
        }
        return {key: float(value.detach()) for key, value in numbers.items()}

    def _semantic_loss(self, embeddings: Tensor, items: Sequence[TrainItem]) -> Tensor:
        labels = torch.from_numpy(np.stack([item.labels for item in items])).long()
        if (labels == NO_LABEL).all():
            return embeddings.new_zeros(())
        scores = F.pixel_shuffle(self.semantic(embeddings), 16 // LABEL_STRIDE)
        # Most cells are background and would dominate the loss at full weight.
        weight = scores.new_ones(scores.shape[1])
        weight[0] = 0.25
        return F.cross_entropy(scores, labels.to(self.device), weight, ignore_index=NO_LABEL)

    def export(self, path: Path) -> None:
        """Write the averaged weights as float16 safetensors."""
        metadata = {"model": "sam-gym micro", "steps": str(self.step)}
        save_half(self.average.module.state_dict(), path, metadata)


def item_batches(
    config: TrainMicroConfig, photos: Sequence[Sample], start: int
) -> Iterator[list[TrainItem]]:
    """Iterate over the training stream from step `start`, in batches of `config.images`."""
    total = config.steps * config.images
    stream = MicroStream(config.seed, total, photos, config.targets)
    loader = DataLoader(
        stream,
        batch_size=config.images,
        sampler=range(start * config.images, total),  # type: ignore[arg-type]
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=_single_thread,
        prefetch_factor=4 if config.workers else None,
    )
    return iter(loader)


def _single_thread(_: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def evaluate(backbone: Backbone, objects: int, num_clicks: int = 5) -> dict[str, float]:
    """Measure mIoU after 1 to `num_clicks` simulated clicks on objects of held-out scenes."""
    scenes = Scenes("val")
    targets: list[Target] = []
    index = 0
    while len(targets) < objects:
        sample = scenes[index]
        targets += [Target(sample.image, mask) for mask in sample.masks]
        index += 1
    ious = [
        session.ious
        for first in range(0, objects, 32)
        for session in click_out(backbone, targets[first : min(first + 32, objects)], num_clicks)
    ]
    means = np.mean(ious, axis=0)
    return {f"miou@{k + 1}": round(float(value), 4) for k, value in enumerate(means)}


def train(config: TrainMicroConfig) -> dict[str, float]:
    """Train or resume training, and write the weights and `evaluation.json`."""
    # OpenCV's threads do not survive a fork: a data worker would wait for them forever.
    cv2.setNumThreads(0)
    check_settings(config)
    device = resolve_device(config.device)
    out = make_folder(config.out)
    photos: list[Sample] = []
    if config.photos:
        from sam_gym.data import make_dataset

        options = config.options_of("coco")
        dataset = make_dataset("coco", "train", root=config.photos, **options)
        photos = [dataset[i] for i in range(len(dataset))]
    trainer = MicroTrainer(config, device)
    trainer.resume(out)
    headline = "loss {loss:.3f}  IoU {iou_first:.3f} -> {iou_last:.3f}".format_map
    trainer.run(item_batches(config, photos, trainer.step), out, headline)
    trainer.export(out / "micro.safetensors")

    backbone = Backbone("micro", trainer.average.module, device, torch.float32)
    result = evaluate(backbone, config.evaluate)
    write_json(out / "evaluation.json", result)
    print("held-out scenes:", result)
    return result


if __name__ == "__main__":
    from sam_gym.utils import cli

    cli.run(
        lambda: train(cli.parse(TrainMicroConfig, "python -m sam_gym.backbones.micro.train")),
        "Run the same command again to resume.",
    )
