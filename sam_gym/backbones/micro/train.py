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
from typing import Any

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sam_gym.backbones.decode import best_token, decode_tokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.hq import encode_pixels
from sam_gym.backbones.loading import load_backbone, load_weights, resolve_device
from sam_gym.backbones.micro.data import LABEL_STRIDE, NO_LABEL, MicroStream, TrainItem
from sam_gym.backbones.micro.imagenet import load_imagenet, weights_file
from sam_gym.backbones.micro.model import STRIDE, build_micro
from sam_gym.backbones.micro.muon import is_hidden_matrix, muon_and_adamw
from sam_gym.backbones.micro.photos import PhotoMixer, PhotoOptions
from sam_gym.backbones.micro.prompts import PromptBatch
from sam_gym.backbones.service import Backbone
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.metrics.masks import batch_iou
from sam_gym.simulation.interactive import Target, click_out
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_json
from sam_gym.utils.settings import Count, Fraction, Natural, NotNegative, Positive, check_settings
from sam_gym.utils.training import (
    SmallTrainer,
    SmallTrainerConfig,
    save_half,
    single_thread,
    warm_up_and_decay,
)

#: Cells of the semantic head per cell of the embedding and axis.
SEMANTIC = STRIDE // LABEL_STRIDE


@documented
@dataclass(frozen=True, kw_only=True)
class TrainMicroConfig(SmallTrainerConfig, PhotoOptions):
    """Train micro, the bundled SAM.

    Run the same command again to resume from `--out`. `--steps` may change in between, which moves
    the final decay of the learning rate.
    """

    out: str = "runs/micro"
    photo_fraction: Fraction = 0.65
    init: str = "imagenet"
    """Initial weights: random, a file of micro, or imagenet (of the image encoder; the prompt
    encoder and the mask decoder start from micro-v0)."""
    steps: Count = 5000
    images: Count = 12
    targets: Count = 4
    """Prompted targets per image."""
    max_rounds: Natural = 7
    """Maximum number of corrections without gradients before the last one."""
    vector_learning_rate: Positive = 8e-4
    trunk_scale: NotNegative = 0.3
    """Learning rate of the pretrained layers, as a fraction of that of AdamW."""
    weight_decay: NotNegative = 0.03
    """Weight decay of the parameters that Muon optimizes; the others have none."""
    warmup: Natural = 200
    """Steps of linear warm-up."""
    decay: Fraction = 0.3
    """Final fraction of the steps over which the learning rate falls to zero."""
    ema: Fraction = 0.998
    """Decay of the moving average of the weights. The average is saved."""
    semantic_weight: NotNegative = 1.0
    """Weight of the semantic head's cross-entropy."""
    evaluate: Natural = 200
    """Objects of held-out scenes to segment with simulated clicks at the end."""


def mask_losses(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Focal x 8 + Dice per mask: logits (P, M, h, w), target, weight (P, h, w) -> (P, M)."""
    target, weight = target[:, None].expand_as(logits), weight[:, None]
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = ((probability - target).square() * entropy * weight).mean(dim=(2, 3))
    overlap = (probability * target).sum(dim=(2, 3))
    total = (probability * weight).sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    return 8.0 * focal + 1.0 - (2.0 * overlap + 1.0) / (total + 1.0)


def true_iou(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """IoU of thresholded masks: logits (P, M, h, w), target, weight (P, h, w) -> (P, M)."""
    return batch_iou((logits > 0) & (weight[:, None] > 0), (target > 0.5)[:, None])


def round_loss(
    sam: Sam, features: ImageFeatures, batch: PromptBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the current prompts, the best logits (P, h, w) and their IoU (P,)."""
    device = features.device
    tokens = decode_tokens(sam, features, batch.prompts(device))
    logits = tokens.decode_masks()
    target, weight = batch.target.to(device), batch.weight.to(device)
    ambiguous = batch.ambiguous.to(device)
    learn = (~torch.from_numpy(batch.partial).to(device)).float()

    losses = mask_losses(logits, target, weight)
    three = losses[:, 1:]
    # The best mask learns the target. A small weight keeps the other two from dying.
    multimask = 0.93 * three.min(dim=1).values + 0.07 * three.mean(dim=1)
    shared = torch.where(ambiguous, multimask + 0.4 * losses[:, 0], losses[:, 0] + 0.2 * multimask)
    quality = true_iou(logits.detach(), target, weight)
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


def load_first_decoder(sam: Sam) -> None:
    """Start the prompt encoder and the mask decoder from `micro-v0`, except where a shape differs:
    in the layers that know the stride of the embedding."""
    own = sam.state_dict()
    state = {
        name: value
        for name, value in load_backbone("micro-v0", device="cpu").sam.state_dict().items()
        if not name.startswith("image_encoder.") and value.shape == own[name].shape
    }
    sam.load_state_dict(state, strict=False)


def _load_initial(sam: Sam, init: str) -> None:
    """Load the file that `--init` names."""
    path = Path(init).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"init must be random, imagenet or a file of micro, got {init!r}: no such file."
        )
    load_weights(sam, "micro", path)


class MicroTrainer(SmallTrainer):
    """The model and its moving average."""

    def __init__(self, config: TrainMicroConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.sam = build_micro()
        encoder: Any = self.sam.image_encoder
        self.trunk = encoder.trunk
        if config.init == "imagenet":
            load_imagenet(self.trunk, self.sam.pixel_mean, self.sam.pixel_std, weights_file())
            load_first_decoder(self.sam)
        elif config.init != "random":
            _load_initial(self.sam, config.init)
        self.sam.to(device)
        width = self.sam.prompt_encoder.embed_dim
        labels = (1 + len(Scenes.categories)) * SEMANTIC**2
        self.semantic = nn.Conv2d(width, labels, 1).to(device)
        self.average = AveragedModel(
            self.sam, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
        )
        # The first stages know edges and textures already, and cost the most to train.
        for part in (self.trunk.conv_stem, *self.trunk.blocks[:2]):
            part.requires_grad_(False)
        everything = [*self.sam.parameters(), *self.semantic.parameters()]
        self.parameters = [parameter for parameter in everything if parameter.requires_grad]
        pretrained = [p for p in self.trunk.parameters() if p.requires_grad]
        taken = {id(parameter) for parameter in pretrained}
        matrices = [
            parameter
            for name, parameter in self.sam.named_parameters()
            if is_hidden_matrix(name, parameter) and id(parameter) not in taken
        ]
        taken |= {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.parameters if id(parameter) not in taken]
        self.optimizers = muon_and_adamw(matrices, rest, config, config.weight_decay)
        self.optimizers[1].add_param_group({"params": pretrained, "scale": config.trunk_scale})
        self.parts = {"sam": self.sam, "semantic": self.semantic, "average": self.average}

    def schedule(self) -> float:
        config = self.config
        return warm_up_and_decay(self.step, config.steps, config.warmup, config.decay)

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
        scores = F.pixel_shuffle(self.semantic(embeddings), SEMANTIC)
        # Most cells are background and would dominate the loss at full weight.
        weight = scores.new_ones(scores.shape[1])
        weight[0] = 0.25
        return F.cross_entropy(scores, labels.to(self.device), weight, ignore_index=NO_LABEL)

    def export(self, path: Path) -> None:
        """Write the averaged weights as float16 safetensors."""
        metadata = {"model": "sam-gym micro", "steps": str(self.step)}
        save_half(self.average.module.state_dict(), path, metadata)


def item_batches(
    config: TrainMicroConfig, photos: PhotoMixer | None, start: int
) -> Iterator[list[TrainItem]]:
    """Iterate over the training stream from step `start`, in batches of `config.images`."""
    total = config.steps * config.images
    stream = MicroStream(
        config.seed,
        total,
        photos,
        targets_per_image=config.targets,
        photo_fraction=config.photo_fraction,
    )
    loader = DataLoader(
        stream,
        batch_size=config.images,
        sampler=range(start * config.images, total),  # type: ignore[arg-type]
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=single_thread,
        prefetch_factor=4 if config.workers else None,
    )
    return iter(loader)


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
    photos = config.photo_mixer()
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
