"""Train the bundled CLIP, `clip_micro`: `python -m agents.clip.train --help`.

A small CLIP of open_clip's own modules learns from captions of `scenes`, which name objects but
not their places. With only ten categories, most captions of a batch are true of many images; hence
three differences from CLIP's recipe:

- Each caption is compared with every image of the batch under its true label, by SigLIP's sigmoid
  loss (Zhai et al. 2023), instead of contrasting one image with all others.
- The patches of the surgical path learn from the same captions by multiple-instance learning: the
  patches most similar to a caption are positive if the caption is true of the image, else negative.
- The empty caption is true of every image and becomes the redundant feature of CLIP Surgery.

Because training is short, the patches also learn to predict the embedding of `micro` at the same
place (feature distillation), through a linear layer that is dropped afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from agents.clip.micro_data import TrainingSet, make_captions, make_training_set, vocabulary
from agents.clip.models import WordTokenizer, read_clip_micro
from agents.clip.pointing import Redundant, pointing_game
from agents.clip.surgery import ClipSurgery, surgical_tokens
from sam_gym.backbones import load_backbone
from sam_gym.backbones.loading import resolve_device
from sam_gym.backbones.micro.muon import muon_and_adamw
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_json
from sam_gym.utils.settings import Count, Fraction, Natural, NotNegative, check_settings
from sam_gym.utils.training import SmallTrainer, SmallTrainerConfig, save_half

MEAN, STD = 0.45, 0.25


@documented
@dataclass(frozen=True, kw_only=True)
class TrainClipConfig(SmallTrainerConfig):
    """Train the bundled CLIP, clip_micro, on captioned scenes.

    Run the same command again to resume an interrupted run.
    """

    out: str = "runs/clip_micro"
    workers: Natural = 2
    scenes: Count = 12000
    """Number of training scenes."""
    steps: Count = 2400
    images: Count = 32
    captions: Count = 40
    """Captions per step, each compared with every image."""
    image_size: Count = 128
    """Height and width of the input, in pixels."""
    patch_size: Count = 8
    """Height and width of a patch."""
    width: Count = 128
    """Channels of the image tower."""
    layers: Count = 4
    """Blocks of the image tower."""
    teacher_weight: NotNegative = 1.0
    """Weight of the distillation loss."""
    patch_weight: NotNegative = 1.0
    """Weight of the patch loss."""
    patch_fraction: Annotated[Fraction, tyro.conf.arg(aliases=("--patch-share",))] = 0.04
    """Fraction of the patches that are trained on a caption: those most similar to it."""
    evaluate: Count = 256
    """Held-out scenes of the pointing game that selects the settings of CLIP Surgery."""


def model_config(config: TrainClipConfig, tokenizer: WordTokenizer) -> dict[str, Any]:
    """Return open_clip's configuration of the model."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.width,
            "layers": config.layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": tokenizer.vocab_size,
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    }


class ClipTrainer(SmallTrainer):
    """The model, and the scales of its losses."""

    def __init__(self, config: TrainClipConfig, device: torch.device) -> None:
        import open_clip

        self.config, self.device = config, device
        self.tokenizer = WordTokenizer(vocabulary(), context_length=16)
        self.model_config = model_config(config, self.tokenizer)
        # Before seeding: building a model draws random numbers, but only on the first load.
        channels = load_backbone("micro", device=str(device)).embedding_shape[0]
        torch.manual_seed(config.seed)
        self.model: Any = open_clip.CLIP(**self.model_config).to(device)
        nn.init.normal_(self.model.visual.positional_embedding, std=0.02)
        # Log scale and bias of the image loss (row 0) and of the patch loss (row 1).
        self.scales = nn.Parameter(torch.tensor([[2.3, -3.0], [2.3, -3.0]], device=device))
        self.student = nn.Linear(self.model_config["embed_dim"], channels).to(device)
        named = [item for item in self.model.named_parameters() if item[0] != "logit_scale"]
        matrices = [p for name, p in named if p.ndim >= 2 and "embedding" not in name]
        taken = {id(parameter) for parameter in matrices}
        rest = [p for _, p in named if id(p) not in taken]
        rest += [self.scales, *self.student.parameters()]
        self.parameters = [*matrices, *rest]
        self.optimizers = muon_and_adamw(matrices, rest, config, 0.03)
        self.parts = {"model": self.model, "scales": self.scales, "student": self.student}

    def train_step(self, data: TrainingSet) -> dict[str, float]:
        """Take one optimizer step on a random batch; returns numbers for the log."""
        config = self.config
        rng = np.random.default_rng([config.seed, 7, self.step])
        chosen = rng.integers(len(data.images), size=config.images)
        batch = torch.from_numpy(data.images[chosen]).to(self.device).permute(0, 3, 1, 2).float()
        flipped = torch.from_numpy(rng.random(config.images) < 0.5).to(self.device)
        flipped = flipped[:, None, None, None]
        batch = torch.where(flipped, batch.flip(-1), batch)
        teacher = data.teacher[torch.from_numpy(chosen)].to(self.device).float()
        teacher = torch.where(flipped, teacher.flip(-1), teacher).flatten(2).transpose(1, 2)
        light = torch.from_numpy(rng.uniform(0.85, 1.15, (config.images, 3, 1, 1))).to(batch)
        texts, names_in = make_captions(rng, Scenes.categories, config.captions)
        # A caption is true of an image that holds every category it names.
        true = ~(names_in[None] & ~data.present[chosen][:, None]).any(axis=2)
        labels = torch.from_numpy(true).to(self.device).float()

        cls, patches = surgical_tokens(
            self.model.visual, (batch * light / 255.0 - MEAN) / STD, blocks=1
        )
        features = self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
        whole = F.normalize(cls, dim=-1) @ features.T
        places = F.normalize(patches, dim=-1) @ features.T
        best = places.topk(max(1, round(config.patch_fraction * places.shape[1])), dim=1).values
        single = torch.from_numpy(names_in.sum(axis=1) <= 1).to(self.device)
        image_loss = self._loss(0, whole, labels)
        patch_loss = self._loss(1, best.mean(dim=1)[:, single], labels[:, single])
        teacher_loss = 1.0 - F.cosine_similarity(self.student(patches), teacher, dim=2).mean()
        loss = image_loss + config.patch_weight * patch_loss + config.teacher_weight * teacher_loss
        norm = self.descend(loss)
        with torch.no_grad():
            self.scales[:, 0].clamp_(0.0, math.log(50.0))
        numbers = {"loss": loss, "image": image_loss, "patch": patch_loss}
        numbers |= {"teacher": teacher_loss, "grad_norm": norm}
        return {key: float(value.detach()) for key, value in numbers.items()}

    def _loss(self, kind: int, similarity: Tensor, labels: Tensor) -> Tensor:
        """Return the sigmoid loss, with equal total weight for true and false pairs."""
        logits = similarity * self.scales[kind, 0].exp() + self.scales[kind, 1]
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        true, false = (
            (each * side).sum() / side.sum().clamp(min=1) for side in (labels, 1 - labels)
        )
        return 0.5 * (true + false)

    def schedule(self) -> float:
        """Return the fraction of the peak: linear warm-up, cosine decay."""
        warm = min(1.0, (self.step + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps)))

    def export(
        self,
        folder: Path,
        surgical_blocks: int,
        surgical_size: int | None = None,
        redundant_weight: float = 1.0,
    ) -> None:
        """Write the model in float16, as open_clip reads it, with its vocabulary."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "open_clip_model.safetensors"
        save_half(self.model.state_dict(), weights, {"steps": str(self.step)})
        size = self.config.image_size
        preprocess = {"size": size, "mean": [MEAN] * 3, "std": [STD] * 3, "resize_mode": "squash"}
        write_json(
            folder / "open_clip_config.json",
            {"model_cfg": self.model_config, "preprocess_cfg": preprocess},
        )
        words = {
            "words": list(self.tokenizer.words),
            "context_length": self.tokenizer.context_length,
            "surgical_blocks": surgical_blocks,
            "surgical_size": surgical_size or size,
            "redundant_weight": redundant_weight,
        }
        write_json(folder / "tokenizer.json", words)


@dataclass(frozen=True)
class SurgeryChoice:
    """Settings of CLIP Surgery, and their accuracy in the pointing game on held-out scenes."""

    blocks: int
    size: int
    weight: float
    redundant: Redundant
    accuracy: float


def evaluate(folder: Path, scenes: int, device: torch.device) -> list[SurgeryChoice]:
    """Play the pointing game on held-out scenes under different settings of CLIP Surgery.

    Searches the number of surgical blocks at the model's own input size, then larger inputs, then
    smaller weights of the redundant feature, each with the best setting so far.
    """
    clip = read_clip_micro(folder, device)
    held_out = Scenes("val")
    samples = [held_out[index] for index in range(scenes)]
    visual: Any = clip.model.visual
    patch = visual.patch_size[0]

    def play(blocks: int, size: int, weight: float, redundant: Redundant) -> SurgeryChoice:
        surgery = ClipSurgery(replace(clip, surgical_size=size, redundant_weight=weight), blocks)
        played = pointing_game(surgery, samples, Scenes.categories, redundant)
        return SurgeryChoice(blocks, size, weight, redundant, round(played.accuracy, 4))

    own = clip.image_size
    choices = [
        play(blocks, own, 1.0, redundant)
        for blocks in range(len(visual.transformer.resblocks) + 1)
        for redundant in get_args(Redundant)
    ]
    blocks = best_choice(choices).blocks
    larger = [own + k * patch for k in (2, 4, 6, 8)]
    choices += [play(blocks, size, 1.0, "empty") for size in larger]
    size = best_choice(choices).size
    return choices + [play(blocks, size, weight, "empty") for weight in (0.25, 0.5, 0.75)]


def best_choice(choices: Sequence[SurgeryChoice]) -> SurgeryChoice:
    """Return the best choice whose maps do not depend on other words: "empty", with surgery."""
    usable = [choice for choice in choices if choice.blocks and choice.redundant == "empty"]
    return max(usable, key=lambda choice: choice.accuracy)


def train(config: TrainClipConfig) -> dict[str, Any]:
    """Train or resume, and write the model and `evaluation.json`; returns the evaluation."""
    check_settings(config)
    device = resolve_device(config.device)
    out = make_folder(config.out)
    trainer = ClipTrainer(config, device)
    trainer.resume(out)
    data = make_training_set(
        config.scenes, config.image_size, config.patch_size, config.workers, device
    )
    trainer.run(repeat(data), out, "loss {loss:.3f}".format_map)
    trainer.export(out / "clip_micro", surgical_blocks=1)
    choices = evaluate(out / "clip_micro", config.evaluate, device)
    best = best_choice(choices)
    trainer.export(out / "clip_micro", best.blocks, best.size, best.weight)
    result = {"best": asdict(best), "all": [asdict(choice) for choice in choices]}
    write_json(out / "evaluation.json", result)
    print("Pointing game on held-out scenes:")
    for choice in choices:
        kind = f"{choice.redundant} x {choice.weight}"
        print(f"  {choice.blocks} blocks, {choice.size} px, {kind}: {choice.accuracy}")
    return result


if __name__ == "__main__":
    from sam_gym.utils import cli

    cli.run(
        lambda: train(cli.parse(TrainClipConfig, "python -m agents.clip.train")),
        "Run the same command again to resume.",
    )
