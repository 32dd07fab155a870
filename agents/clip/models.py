"""Load CLIP models: any of open_clip's, and the bundled `clip_micro`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_gym.backbones.loading import resolve_device
from sam_gym.utils.digest import digest_of
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.shared import SharedObjects
from sam_gym.utils.weights import check_finite

CLIP_MICRO = Path(__file__).parents[1] / "weights" / "clip_micro"
#: Prompt templates of `clip_micro`, which knows few words.
MICRO_TEMPLATES = (
    "a {}.",
    "the {}.",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
)
#: Prompt templates that CLIP Surgery adds to open_clip's templates for ImageNet.
_SCENE_TEMPLATES = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

Tokenizer = Callable[[Sequence[str]], Tensor]


class WordTokenizer:
    """One token per word, for a text tower with a small vocabulary.

    Args:
        words: the vocabulary, lower case.
        context_length: tokens per text, including start, end and padding.
    """

    PAD, UNKNOWN = 0, 1

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words, self.context_length = tuple(words), context_length
        self._index = {word: 2 + k for k, word in enumerate(words)}
        # open_clip pools the token of the largest id, which must be the end of the text.
        self.start, self.end = 2 + len(words), 3 + len(words)

    @property
    def vocab_size(self) -> int:
        return self.end + 1

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that are not in the vocabulary."""
        return [word for word in words_of(text) if word not in self._index]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 (N, context_length); longer texts are truncated."""
        ids = torch.full((len(texts), self.context_length), self.PAD)
        for row, text in zip(ids, texts, strict=True):
            found = [self._index.get(word, self.UNKNOWN) for word in words_of(text)]
            found = [self.start, *found[: self.context_length - 2], self.end]
            row[: len(found)] = torch.tensor(found)
        return ids


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen CLIP model with its tokenizer and preprocessing.

    Attributes:
        name: the name that it was loaded by.
        model: open_clip's model, in evaluation mode, without gradients.
        tokenizer: texts -> token ids, int64 (N, context length).
        templates: prompt templates that a name is embedded with.
        image_size: height and width of the input, in pixels.
        mean, std: normalisation of the input, float32 (3, 1, 1).
        surgical_blocks: default number of last blocks that CLIP Surgery works on.
        surgical_size: height and width of the input of CLIP Surgery, in pixels; a finer grid of
            patches than that of the training can localise better.
        device: device of the model.
        redundant_weight: factor of the redundant feature that CLIP Surgery subtracts from texts.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    templates: tuple[str, ...]
    image_size: int
    mean: Tensor
    std: Tensor
    surgical_blocks: int
    surgical_size: int
    device: torch.device
    redundant_weight: float = 1.0

    @cached_property
    def identity(self) -> str:
        """Hex digest of all weights."""
        return digest_of(self.model.state_dict(), self.name)

    @property
    def is_open(self) -> bool:
        """Whether the vocabulary is open: `clip_micro` knows few words."""
        return not isinstance(self.tokenizer, WordTokenizer)

    def check_known(self, names: Sequence[str]) -> None:
        """Raise `ValueError` for a name with words outside the model's vocabulary."""
        if isinstance(self.tokenizer, WordTokenizer):
            for name in names:
                if self.tokenizer.unknown(name) or (name and not words_of(name)):
                    raise ValueError(
                        f"{self.name} has no word for {name!r}. It knows: "
                        f"{', '.join(self.tokenizer.words)}. Use a CLIP with a full vocabulary, "
                        "for example clip='ViT-B-16' with clip_pretrained='openai'; or, to test a "
                        "training with meaningless maps, pass --allow-unknown-words."
                    )

    def to_input(self, images: Tensor, side: int | None = None) -> Tensor:
        """Resize images to a square, ignoring the aspect ratio, and normalise them.

        Args:
            images: float32 (B, 3, H, W), in 0..255.
            side: height and width S of the result (default: `image_size`).

        Returns:
            float32 (B, 3, S, S).
        """
        side = side or self.image_size
        size = (side, side)
        if images.shape[-2:] != size:
            shrink = max(images.shape[-2:]) > side
            images = nn.functional.interpolate(
                images, size, mode="bicubic", align_corners=False, antialias=shrink
            ).clamp(0, 255)
        return (images / 255.0 - self.mean) / self.std


_loaded: SharedObjects[Clip] = SharedObjects()


def load_clip(
    name: str = "clip_micro", pretrained: str | None = None, device: str = "auto"
) -> Clip:
    """Load a CLIP model; the same arguments return the same object in a process.

    Files that were written since are loaded again; objects that exist keep their weights.

    Args:
        name: "clip_micro", or a model of open_clip, for example "ViT-B-16".
        pretrained: a tag of open_clip, for example "openai" (downloaded on first use), or a local
            file. Optional for `clip_micro`, whose weights are bundled.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.

    Raises:
        ValueError: the name is unknown, or needs `pretrained`; or weights are not finite.
        FileNotFoundError: the package was installed without the weights of `clip_micro`.
        OSError: the weights could not be downloaded, or do not fit the model.
    """
    target = resolve_device(device)
    file = Path(pretrained or CLIP_MICRO)

    def load() -> Clip:
        if name == "clip_micro":
            return read_clip_micro(file, target)
        return _load_open_clip(name, pretrained, target)

    return _loaded.get((name, pretrained, target), [file], load)


def read_clip_micro(folder: Path, device: torch.device) -> Clip:
    """Load a folder that `agents.clip.train` wrote: configuration, weights and vocabulary."""
    import open_clip

    if not (folder / "open_clip_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no open_clip_model.safetensors in this folder.")
    details = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = WordTokenizer(details["words"], details["context_length"])
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, device=device)
    clip = _clip(
        "clip_micro", model, tokenizer, MICRO_TEMPLATES, details["surgical_blocks"], device
    )
    weight = details.get("redundant_weight", 1.0)
    return replace(clip, surgical_size=details["surgical_size"], redundant_weight=weight)


def _load_open_clip(name: str, pretrained: str | None, device: torch.device) -> Clip:
    import open_clip

    if name not in open_clip.list_models():
        raise unknown_name("CLIP", name, ["clip_micro", *open_clip.list_models()])
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"{name} needs clip_pretrained: a file, or one of {', '.join(tags)}.")
    try:
        model = open_clip.create_model(name, pretrained, device=device, require_pretrained=True)
    except RuntimeError as error:
        raise OSError(f"{name}: the weights {pretrained!r} could not be loaded. {error}") from error
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    tokenizer = open_clip.get_tokenizer(name)
    return _clip(name, model, tokenizer, (*templates, *_SCENE_TEMPLATES), 6, device)


def _clip(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    templates: tuple[str, ...],
    surgical_blocks: int,
    device: torch.device,
) -> Clip:
    model.eval().requires_grad_(False)
    check_finite(model.state_dict(), name)
    visual = model.visual
    size = visual.image_size
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).reshape(3, 1, 1)
        for values in (visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
    )
    side = size if isinstance(size, int) else size[0]
    return Clip(name, model, tokenizer, templates, side, mean, std, surgical_blocks, side, device)
