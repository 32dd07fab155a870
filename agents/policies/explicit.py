"""The explicit agent: told in words what to segment, it sees where CLIP finds them.

After AlignSAM (Huang et al., CVPR 2024): a branch of SAM's features and a branch of CLIP-Surgery
maps, fused by cross-attention. Both models are frozen and outside of the policy; the maps are
computed once per image and word, and kept in the embedding store.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.clip.models import load_clip
from agents.clip.surgery import ClipSurgery, min_max
from agents.policies.base import POLICIES
from agents.policies.implicit import ClickFeatures, ImplicitPolicy
from sam_gym.backbones import Backbone
from sam_gym.utils.digest import text_digest

#: Planes of `TextFeatures.map_planes`, and of `relations` to two of them and to the mask.
_MAP_PLANES, _RELATIONS = 4, 3
#: How much more the peak of a map counts than what is a standard deviation below it: its log.
_PEAK = 3.0
#: Rows and columns of regions that cross-attention looks at: cells would cost it too much.
_REGIONS = 8


@lru_cache
def shared_surgery(name: str, pretrained: str | None, device: str) -> ClipSurgery:
    """The surgery of a CLIP; the same arguments give the same object in a process."""
    return ClipSurgery(load_clip(name, pretrained, device))


class WordMaps:
    """How like some words every cell of an image is, and the image as a whole.

    Args:
        surgery: makes the maps.
        backbone: whose cells.
        words: the words, in the order of the maps.
        allow_unknown: see `ClipSurgery.embed_texts`.

    Raises:
        ValueError: the CLIP has no word for one of them.
    """

    def __init__(
        self,
        surgery: ClipSurgery,
        backbone: Backbone,
        words: Sequence[str],
        *,
        allow_unknown: bool = False,
    ) -> None:
        self.surgery, self.backbone = surgery, backbone
        self.texts = surgery.embed_texts(words, allow_unknown=allow_unknown)
        self.redundant = surgery.redundant()
        self.cells = backbone.embedding_shape[1:]
        clip = surgery.clip
        how = (surgery.blocks, clip.surgical_size, clip.redundant_weight, *words)
        digest = text_digest(*how)
        #: Name of the maps in an `EmbeddingStore`.
        self.name = f"words/{clip.identity}/{digest}"

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images uint8 (H, W, 3) -> float16 (B, N, 1 + h * w): the whole, then every cell.

        Maps are not scaled, and those of a word do not depend on the other words.
        """
        frames = np.stack([self.backbone.framed(image) for image in images])
        pixels = torch.from_numpy(frames).to(self.surgery.clip.device).permute(0, 3, 1, 2)
        maps, whole = self.surgery.similarity(pixels, self.texts, self.redundant)
        maps = F.interpolate(maps, self.cells, mode="bilinear", align_corners=False)
        for own, frame in zip(maps, frames, strict=True):
            self._blank_padding(own, frame)
        packed = torch.cat([whole[..., None], maps.flatten(2)], dim=2)
        return packed.to(self.backbone.device, torch.float16)

    def _blank_padding(self, maps: Tensor, frame: np.ndarray) -> None:
        """Give cells (N, h, w) below and right of the image the lowest similarity there is.

        Observations show the frame only, so padding is what is black to its edge.
        """
        content = frame.max(axis=2) > 0
        cell = self.backbone.image_size // self.cells[0]
        rows, columns = (np.flatnonzero(content.max(axis=axis)) for axis in (1, 0))
        height, width = (-(-int(x.max(initial=0) + 1) // cell) for x in (rows, columns))
        lowest = maps.amin(dim=(1, 2), keepdim=True)
        maps[:, height:] = lowest
        maps[:, :, width:] = lowest


class TextFeatures(ClickFeatures):
    """What the explicit agent sees: float32 (B, width, h, w), aligned with SAM's embedding.

    In the SAM branch, words of the vocabulary modulate the features, as in the implicit agent. Of
    other words the policy has no experience, and what things of its training look like would
    mislead it: there the SAM branch is empty, and maps and relations must do. While the policy
    learns, it sees a share of the images as if the word were such another one.
    The CLIP branch has the target's map among those of all words: scaled to [0, 1]; in standard
    deviations; how far it is ahead of the best of the others, in standard deviations; and, scaled,
    the strongest of the others, weighted down by the temperature as in AlignSAM. Beside them stand
    relations: how like every cell is, to SAM, to what lies under the peak of two of the maps, and
    under the mask so far; they mean the same whatever the thing is.
    Cross-attention lets every place of the SAM branch look at all regions of the CLIP branch.

    Args:
        observation_space: of `SamSeg-v0`, with `obs="full"` or `obs="handle"`.
        backbone: name, checkpoint, device and dtype of the SAM, as `load_backbone` takes them.
        categories: words of the environment, in the order of `target_category`.
        max_steps: actions per episode, to scale the step.
        clip: name, pretrained and device of the CLIP, as `load_clip` takes them.
        vocabulary: words that the policy learns to know by themselves, beside their maps.
        hidden: share of the images on which a policy that learns takes words for unknown ones.
        allow_unknown: let words be unknown to the CLIP; their maps mean nothing.
        temperature: the lower, the less the maps of words count that are not asked for.
        width: feature channels.
        num_heads: of the cross-attention.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        backbone: dict[str, Any],
        categories: Sequence[str],
        max_steps: int,
        clip: dict[str, Any],
        vocabulary: Sequence[str] = (),
        hidden: float = 0.15,
        allow_unknown: bool = False,
        temperature: float = 0.33,
        width: int = 48,
        num_heads: int = 4,
    ) -> None:
        self._clip, self._allow_unknown = clip, allow_unknown
        self._maps: WordMaps | None = None
        self._words: tuple[str, ...] = ()
        super().__init__(observation_space, backbone, vocabulary, categories, max_steps, width)
        self.hidden = hidden
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.around = nn.Sequential(
            nn.Conv2d(_MAP_PLANES + _RELATIONS, width // 2, 3, padding=1), nn.ReLU()
        )
        self.clip_branch = nn.Sequential(nn.Conv2d(width + width // 2, width, 1), nn.ReLU())
        self.regions = min(_REGIONS, self.cells[0]), min(_REGIONS, self.cells[1])
        self.positions = nn.Parameter(torch.randn(1, width, *self.cells) * 0.02)
        self.norm_image, self.norm_clip = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        # At first the branches are only added.
        nn.init.zeros_(self.attention.out_proj.weight)

    def set_categories(self, categories: Sequence[str]) -> None:
        """Say which words the numbers in `target_category` stand for from now on."""
        super().set_categories(categories)
        words = tuple(categories)
        if self._maps is not None and words == self._words:
            return
        self._words = words
        surgery = shared_surgery(**self._clip)
        self._maps = WordMaps(surgery, self.backbone, words, allow_unknown=self._allow_unknown)
        self.store.register_feature(self._maps.name, self._maps)

    def forward(self, observations: Any) -> Tensor:
        embedding, mask = self._image(observations)
        word = self._known_words(embedding, observations)
        image = self._modulated(embedding, word) * (word > 0)[:, None, None, None]
        planes = self.map_planes(observations)
        planes = torch.cat([planes, relations(embedding, planes[:, 1:3], mask)], dim=1)
        clip = self.clip_branch(torch.cat([image * planes[:, :1], self.around(planes)], dim=1))
        fused = image + clip + self._attended(image + mask, clip)
        return self.mix(torch.cat(self._planes(fused, mask, observations), dim=1))

    def _known_words(self, embedding: Tensor, observations: dict[str, Tensor]) -> Tensor:
        """Numbers (B,) of the words in the vocabulary, 0 for those that are not, or are hidden.

        What is hidden depends on the image alone: it must be the same in a rollout, in the updates
        after it and in a run that is resumed.
        """
        target = self.words[observations["target_category"].reshape(-1).long()]
        if not self.learning:
            return target
        chance = (1e4 * embedding[:, :8, 0, 0].double().sum(dim=1)).frac().abs()
        return torch.where(chance < self.hidden, 0, target)

    def _attended(self, image: Tensor, clip: Tensor) -> Tensor:
        """What every place of the SAM branch (B, C, h, w) takes from regions of the CLIP branch."""
        where = F.adaptive_avg_pool2d(self.positions, self.regions)
        queries = self.norm_image(_tokens(image)) + _tokens(self.positions)
        keys = self.norm_clip(_tokens(F.adaptive_avg_pool2d(clip, self.regions))) + _tokens(where)
        attended, _ = self.attention(queries, keys, keys, need_weights=False)
        return attended.transpose(1, 2).unflatten(2, self.cells)

    def map_planes(self, observations: dict[str, Tensor]) -> Tensor:
        """The target's map among those of all words: (B, 4, h, w).

        No plane tells by its level which word is asked for: a policy would learn the words of its
        training by heart, and do nothing with others.
        """
        maps = self.word_maps(observations).float()[..., 1:].unflatten(-1, self.cells)
        rows = torch.arange(maps.shape[0], device=maps.device)
        target = observations["target_category"].reshape(-1).long()
        scaled, own = min_max(maps), maps[rows, target]
        # A softmax over the words of (1 for the target, 0 for the others) / temperature, over its
        # maximum: 1 for the target, and this for the others.
        others = float(np.exp(-1.0 / self.temperature)) * scaled
        rivals = maps.clone()
        others[rows, target], rivals[rows, target] = 0.0, -torch.inf
        ahead = own - rivals.amax(dim=1) if maps.shape[1] > 1 else own
        planes = [scaled[rows, target], _standard(own), _standard(ahead), others.amax(dim=1)]
        return torch.stack(planes, dim=1)

    def word_maps(self, observations: dict[str, Tensor]) -> Tensor:
        """Maps of the observed images, (B, N, 1 + h * w), as `WordMaps` has them.

        They stand in the observations, or in the store, or are computed from whole images.
        """
        assert self._maps is not None
        if "word_maps" in observations:
            return observations["word_maps"]
        if "handle" in observations:
            return self.store.gather(observations["handle"][:, 0], self._maps.name)
        image = observations["image"]
        if image.shape[-1] != 3:  # SB3 puts channels first
            image = image.permute(0, 2, 3, 1)
        return self._maps(list(image.to(torch.uint8).cpu().numpy()))


def relations(embedding: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
    """How like every cell is to what lies under peaks of maps, and under a mask.

    Args:
        embedding: (B, C, h, w), of the images.
        maps: (B, M, h, w), in standard deviations.
        mask: (B, 1, h, w), probabilities.

    Returns:
        Cosines (B, M + 1, h, w), of embeddings less the mean of their image; those with what is
        under the mask times its highest probability, so that an empty mask is like nothing.
    """
    unit = F.normalize(embedding - embedding.mean(dim=(2, 3), keepdim=True), dim=1)
    peaks = (_PEAK * maps).flatten(2).softmax(dim=2)
    weights = torch.cat([peaks, mask.flatten(2)], dim=1)
    under = F.normalize(torch.einsum("bmn,bcn->bmc", weights, unit.flatten(2)), dim=2)
    cosines = torch.einsum("bmc,bchw->bmhw", under, unit)
    return torch.cat([cosines[:, :-1], cosines[:, -1:] * mask.amax(dim=(2, 3), keepdim=True)], 1)


def _standard(maps: Tensor) -> Tensor:
    """Maps (B, h, w) less their mean, over their standard deviation."""
    centred = maps - maps.mean(dim=(1, 2), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-6)


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


@POLICIES.register("explicit")
class ExplicitPolicy(ImplicitPolicy):
    """The explicit agent; its arguments are those of `ImplicitPolicy`, with `TextFeatures`."""

    extractor_class = TextFeatures
    needs_image = True
    recalibration_updates = 5
