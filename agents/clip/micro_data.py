"""Training data of `clip_micro`: `scenes`, with captions that name their objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agents.clip.models import MICRO_TEMPLATES, words_of
from sam_gym.backbones import load_backbone
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.utils.progress import track

#: Captions that are true of every image.
_GENERIC = ("", "a photo.", "a picture of a scene.", "there are things in the scene.")


@dataclass(frozen=True)
class TrainingSet:
    """Images, their categories and the teacher's features.

    Attributes:
        images: uint8 (K, S, S, 3).
        present: bool (K, categories), categories in each image.
        teacher: float16 (K, C, h, w), embeddings of `micro` on the grid of the patches.
    """

    images: np.ndarray
    present: np.ndarray
    teacher: Tensor


def make_training_set(
    count: int, image_size: int, patch_size: int, workers: int, device: torch.device
) -> TrainingSet:
    """Draw scenes and encode them with `micro`.

    Args:
        count: number of scenes.
        image_size: height and width S of the images, in pixels.
        patch_size: height and width of a patch.
        workers: processes that draw the scenes.
        device: device of `micro`.
    """
    images, present = draw_scenes(count, image_size, workers)
    micro, side = load_backbone("micro", device=str(device)), image_size // patch_size
    teacher = []
    for first in track(range(0, len(images), 32), "encoding with micro"):
        big = [
            cv2.resize(image, (micro.image_size,) * 2, interpolation=cv2.INTER_CUBIC)
            for image in images[first : first + 32]
        ]
        teacher.append(F.adaptive_avg_pool2d(micro.encode(big).embedding, side).half().cpu())
    return TrainingSet(images, present, torch.cat(teacher))


def draw_scenes(count: int, image_size: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training images uint8 (K, S, S, 3) and their categories, bool (K, categories)."""
    jobs = [(index, image_size) for index in range(count)]
    if workers < 2:
        pairs = [_draw(job) for job in track(jobs, "drawing scenes")]
    else:
        with get_context("fork").Pool(workers, cv2.setNumThreads, (0,)) as pool:
            done = pool.imap(_draw, jobs, chunksize=64)
            pairs = list(track(done, "drawing scenes", total=len(jobs)))
    return np.stack([image for image, _ in pairs]), np.stack([present for _, present in pairs])


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a training scene, uint8 (S, S, 3), and its categories, bool (N,)."""
    index, size = job
    sample = Scenes("train")[index]
    present = np.zeros(len(Scenes.categories), bool)
    present[sample.categories] = True
    return cv2.resize(sample.image, (size, size), interpolation=cv2.INTER_AREA), present


def make_captions(
    rng: np.random.Generator, names: Sequence[str], count: int
) -> tuple[list[str], np.ndarray]:
    """Return captions and the categories that each names, bool (count, categories).

    60% name one category, in turn so that all occur; 30% name up to two; 10% name none.
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
    """Return every word of the captions and templates."""
    sentences = [*MICRO_TEMPLATES, *_GENERIC, *Scenes.categories, "and"]
    return sorted({word for sentence in sentences for word in words_of(sentence)})
