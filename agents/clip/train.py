"""Train `clip_micro`, the CLIP in the box: `python -m agents.clip.train --help`.

A CLIP of open_clip's own modules, small enough for the package, learns from captioned `scenes`:
what is in an image, never where. Three things differ from CLIP's recipe, since with ten categories
most captions of a batch are true of many of its images:

- A caption is compared with every image of the batch under its true label, by SigLIP's sigmoid loss
  (Zhai et al. 2023), instead of the caption of one image against all others.
- The patches of the surgical path learn from the same captions by multiple-instance learning: the
  patches that are most like a caption must be like it if, and only if, it is true of the image.
- The empty caption is true of every image: it becomes the redundant feature of CLIP Surgery.

So few images and so few steps do not teach a transformer to see: its patches also learn to say what
`micro` says of the same place (feature distillation), through a linear layer that is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.clip.models import MICRO_TEMPLATES, WordTokenizer, read_clip_micro, words_of
from agents.clip.pointing import Redundant, pointing_game
from agents.clip.surgery import ClipSurgery, surgical_tokens
from sam_gym.backbones import load_backbone
from sam_gym.backbones.loading import resolve_device
from sam_gym.backbones.micro.muon import Muon
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.utils.files import write_json
from sam_gym.utils.progress import track
from sam_gym.utils.training import run_steps, save_half, save_state

MEAN, STD = 0.45, 0.25
#: Sentences that are true of every image.
_GENERIC = ("", "a photo.", "a picture of a scene.", "there are things in the scene.")


@dataclass
class Config:
    """Train clip_micro, the CLIP in the box, on captioned scenes.

    The run resumes from `out` when it is started again with the same settings.
    """

    out: str = "runs/clip_micro"
    """Folder for the checkpoint, the model and its evaluation."""
    scenes: int = 12000
    """Different training scenes."""
    steps: int = 2400
    """Optimizer steps."""
    images: int = 32
    """Images per step."""
    captions: int = 40
    """Captions per step; each is compared with every image."""
    image_size: int = 128
    """Height and width of the input, in pixels."""
    patch_size: int = 8
    """Height and width of a patch."""
    width: int = 128
    """Channels of the image tower."""
    layers: int = 4
    """Blocks of the image tower."""
    learning_rate: float = 2e-3
    """Peak learning rate of Muon, after a linear warm-up, before a cosine decay."""
    vector_learning_rate: float = 1e-3
    """Peak learning rate of AdamW, for vectors and embeddings."""
    teacher_weight: float = 1.0
    """Weight of agreeing with micro."""
    patch_weight: float = 1.0
    """Weight of the patches' loss."""
    patch_share: float = 0.04
    """Share of the patches that have to be like a caption that is true."""
    evaluate: int = 256
    """Held-out scenes of the pointing game that chooses how maps are made."""
    save_every: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of captions, flips and initial weights."""
    workers: int = 2
    """Processes that draw the scenes at the beginning."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, mps."""


# Data ------------------------------------------------------------------------------------------


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A training scene, shrunk: uint8 (S, S, 3), and which categories are in it: bool (N,)."""
    index, size = job
    sample = Scenes("train")[index]
    present = np.zeros(len(Scenes.categories), bool)
    present[sample.categories] = True
    return cv2.resize(sample.image, (size, size), interpolation=cv2.INTER_AREA), present


@dataclass(frozen=True)
class TrainingSet:
    """What there is to learn from.

    Attributes:
        images: uint8 (K, S, S, 3).
        present: bool (K, categories), what is in them.
        teacher: float16 (K, C, h, w), what `micro` says of them, on the grid of the patches.
    """

    images: np.ndarray
    present: np.ndarray
    teacher: Tensor


def make_training_set(config: Config, device: torch.device) -> TrainingSet:
    """Draw the scenes, and let `micro` look at them."""
    images, present = draw_scenes(config)
    micro, side = load_backbone("micro", device=str(device)), config.image_size // config.patch_size
    teacher = []
    for first in track(range(0, len(images), 32), "asking micro"):
        big = [
            cv2.resize(image, (micro.image_size,) * 2, interpolation=cv2.INTER_CUBIC)
            for image in images[first : first + 32]
        ]
        teacher.append(F.adaptive_avg_pool2d(micro.encode(big), side).half().cpu())
    return TrainingSet(images, present, torch.cat(teacher))


def draw_scenes(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Training images uint8 (K, S, S, 3) and what is in them, bool (K, categories)."""
    jobs = [(index, config.image_size) for index in range(config.scenes)]
    if config.workers < 2:
        pairs = [_draw(job) for job in track(jobs, "drawing scenes")]
    else:
        with get_context("fork").Pool(config.workers, cv2.setNumThreads, (0,)) as pool:
            done = pool.imap(_draw, jobs, chunksize=64)
            pairs = list(track(done, "drawing scenes", total=len(jobs)))
    return np.stack([image for image, _ in pairs]), np.stack([present for _, present in pairs])


def make_captions(
    rng: np.random.Generator, names: Sequence[str], count: int
) -> tuple[list[str], np.ndarray]:
    """Captions, and which categories each names: bool (count, categories).

    Half of them name one category, in turn so that all occur; then pairs; a few say nothing.
    """
    names_in = np.zeros((count, len(names)), bool)
    texts = []
    for number in range(count):
        kind = number / count
        if kind >= 0.9:
            texts.append(_GENERIC[0] if rng.random() < 0.5 else str(rng.choice(_GENERIC)))
            continue
        first = number % len(names)
        chosen = [first]
        if kind >= 0.6:
            chosen += [int(k) for k in rng.permutation(len(names))[:1] if k != first]
        names_in[number, chosen] = True
        words = " and a ".join(names[k] for k in chosen)
        template = "{}" if rng.random() < 0.2 else str(rng.choice(MICRO_TEMPLATES))
        texts.append(template.format(words))
    return texts, names_in


def vocabulary() -> list[str]:
    """Every word that a caption or a template may hold."""
    sentences = [*MICRO_TEMPLATES, *_GENERIC, *Scenes.categories, "and"]
    return sorted({word for sentence in sentences for word in words_of(sentence)})


# Model -----------------------------------------------------------------------------------------


def model_config(config: Config, tokenizer: WordTokenizer) -> dict[str, Any]:
    """open_clip's configuration of the model."""
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


class ClipTrainer:
    """Owns the model, the scales of its losses, the optimizer and the step counter."""

    def __init__(self, config: Config, device: torch.device) -> None:
        import open_clip

        self.config, self.device, self.step = config, device, 0
        self.tokenizer = WordTokenizer(vocabulary(), context_length=16)
        self.model_config = model_config(config, self.tokenizer)
        # Before the seed: loading a model draws random numbers, if it is loaded for the first time.
        channels = load_backbone("micro", device=str(device)).embedding_shape[0]
        torch.manual_seed(config.seed)
        self.model: Any = open_clip.CLIP(**self.model_config).to(device)
        nn.init.normal_(self.model.visual.positional_embedding, std=0.02)
        # Log of the scale, and the bias, of the images' and of the patches' similarities.
        self.scales = nn.Parameter(torch.tensor([[2.3, -3.0], [2.3, -3.0]], device=device))
        self.student = nn.Linear(self.model_config["embed_dim"], channels).to(device)
        named = [item for item in self.model.named_parameters() if item[0] != "logit_scale"]
        matrices = [p for name, p in named if p.ndim >= 2 and "embedding" not in name]
        taken = {id(parameter) for parameter in matrices}
        rest = [p for _, p in named if id(p) not in taken]
        rest += [self.scales, *self.student.parameters()]
        self.parameters = [*matrices, *rest]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, config.learning_rate, weight_decay=0.03),
            torch.optim.AdamW(
                rest, lr=config.vector_learning_rate, betas=(0.9, 0.98), weight_decay=0.0
            ),
        )

    def train_step(self, data: TrainingSet) -> dict[str, float]:
        """One optimizer step on a batch drawn from all images; returns numbers for the log."""
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
        # A caption is true of an image if all that it names is there.
        true = ~(names_in[None] & ~data.present[chosen][:, None]).any(axis=2)
        labels = torch.from_numpy(true).to(self.device).float()

        peaks = (config.learning_rate, config.vector_learning_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self._schedule()
        cls, patches = surgical_tokens(
            self.model.visual, (batch * light / 255.0 - MEAN) / STD, blocks=1
        )
        features = self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
        whole = F.normalize(cls, dim=-1) @ features.T
        places = F.normalize(patches, dim=-1) @ features.T
        best = places.topk(max(1, round(config.patch_share * places.shape[1])), dim=1).values
        single = torch.from_numpy(names_in.sum(axis=1) <= 1).to(self.device)
        image_loss = self._loss(0, whole, labels)
        patch_loss = self._loss(1, best.mean(dim=1)[:, single], labels[:, single])
        teacher_loss = 1.0 - F.cosine_similarity(self.student(patches), teacher, dim=2).mean()
        loss = image_loss + config.patch_weight * patch_loss + config.teacher_weight * teacher_loss
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            self.scales[:, 0].clamp_(0.0, math.log(50.0))
        self.step += 1
        numbers = {
            "loss": loss,
            "image": image_loss,
            "patch": patch_loss,
            "teacher": teacher_loss,
            "grad_norm": norm,
        }
        return {key: float(value.detach()) for key, value in numbers.items()}

    def _loss(self, kind: int, similarity: Tensor, labels: Tensor) -> Tensor:
        """Sigmoid loss in which true and false pairs weigh the same."""
        logits = similarity * self.scales[kind, 0].exp() + self.scales[kind, 1]
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        true, false = (
            (each * side).sum() / side.sum().clamp(min=1) for side in (labels, 1 - labels)
        )
        return 0.5 * (true + false)

    def _schedule(self) -> float:
        """Share of the peak learning rate at this step."""
        warm = min(1.0, (self.step + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps)))

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "scales": self.scales.detach(),
            "student": self.student.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_state(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.scales.copy_(state["scales"])
        self.student.load_state_dict(state["student"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def export(
        self,
        folder: Path,
        surgical_blocks: int,
        surgical_size: int | None = None,
        redundant_weight: float = 1.0,
    ) -> None:
        """Write the model in open_clip's form, in float16, and its words beside it."""
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
class Choice:
    """How maps are made, and how well they point on held-out scenes."""

    blocks: int
    size: int
    weight: float
    redundant: Redundant
    accuracy: float


def evaluate(folder: Path, scenes: int, device: torch.device) -> list[Choice]:
    """Play the pointing game on held-out scenes with maps made in all ways that make sense.

    The number of surgical blocks is tried at the model's own input size, larger inputs with the
    best number, and less of the redundant feature with the best of these.
    """
    clip = read_clip_micro(folder, device)
    held_out = Scenes("val")
    samples = [held_out[index] for index in range(scenes)]
    visual: Any = clip.model.visual
    patch = visual.patch_size[0]

    def play(blocks: int, size: int, weight: float, redundant: Redundant) -> Choice:
        surgery = ClipSurgery(replace(clip, surgical_size=size, redundant_weight=weight), blocks)
        played = pointing_game(surgery, samples, Scenes.categories, redundant)
        return Choice(blocks, size, weight, redundant, round(played.accuracy, 4))

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


def best_choice(choices: Sequence[Choice]) -> Choice:
    """The best way with surgery and the empty prompt: maps of a word that know no other words."""
    usable = [choice for choice in choices if choice.blocks and choice.redundant == "empty"]
    return max(usable, key=lambda choice: choice.accuracy)


def train(config: Config) -> dict[str, Any]:
    """Train, or go on training, and write the model and `evaluation.json`."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    device = resolve_device(config.device)
    trainer = ClipTrainer(config, device)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"Going on from step {trainer.step} of {checkpoint}.")
    write_json(out / "config.json", asdict(config))
    data = make_training_set(config, device)

    def headline(row: dict[str, float]) -> str:
        return f"loss {row['loss']:.3f}"

    run_steps(trainer, repeat(data), config.steps, out, config.save_every, headline)

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
    import tyro

    from sam_gym.utils import cli

    cli.run(lambda: train(tyro.cli(Config)))
