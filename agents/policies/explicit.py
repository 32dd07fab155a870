"""The explicit policy: it gets its target in words, as similarity maps of CLIP.

After AlignSAM (Huang et al., CVPR 2024): a branch of SAM's features and a branch of CLIP-Surgery
maps, fused by cross-attention. Both models are frozen and outside of the policy. The maps are
computed once per image and word and kept in the embedding store.
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
from sam_gym.backbones import BackboneService
from sam_gym.utils.digest import text_digest
from sam_gym.utils.settings import Count, Fraction, Positive, checked

#: Planes of `TextFeatures.map_planes`, and of `relations` to two of them and to the mask.
_MAP_PLANES, _RELATIONS = 4, 3
#: Inverse temperature of the softmax that weights the peak of a map in standard deviations.
_PEAK = 3.0
#: Rows and columns of the regions that cross-attention attends to; cells would be too many.
_REGIONS = 8


_surgery_of = lru_cache(ClipSurgery)


def shared_surgery(name: str, pretrained: str | None, device: str) -> ClipSurgery:
    """Return the surgery of a CLIP; the same object for the same arguments and weights."""
    return _surgery_of(load_clip(name, pretrained, device))


class WordMaps:
    """Similarity of words with every cell of an image, and with the whole image.

    Args:
        surgery: computes the maps.
        backbone: defines the cells.
        words: the words, in the order of the maps.
        allow_unknown: see `ClipSurgery.embed_texts`.

    Raises:
        ValueError: the CLIP has no word for one of them.
    """

    def __init__(
        self,
        surgery: ClipSurgery,
        backbone: BackboneService,
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
        """Map images uint8 (H, W, 3) to float16 (B, N, 1 + h * w): the whole image, then the cells.

        Maps are unscaled, and the map of a word does not depend on the other words.
        """
        frames = np.stack([self.backbone.framed(image) for image in images])
        pixels = torch.from_numpy(frames).to(self.surgery.clip.device).permute(0, 3, 1, 2)
        maps, whole = self.surgery.similarity(pixels, self.texts, self.redundant)
        maps = F.interpolate(maps, self.cells, mode="bilinear", align_corners=False)
        if not self.backbone.squashes:
            for own, frame in zip(maps, frames, strict=True):
                self._blank_padding(own, frame)
        packed = torch.cat([whole[..., None], maps.flatten(2)], dim=2)
        return packed.to(self.backbone.device, torch.float16)

    def _blank_padding(self, maps: Tensor, frame: np.ndarray) -> None:
        """Set cells (N, h, w) of the padding to the lowest similarity, in place.

        The frame does not mark its padding: black rows and columns up to its edge count as padding.
        """
        content = frame.max(axis=2) > 0
        cell = self.backbone.image_size // self.cells[0]
        rows, columns = (np.flatnonzero(content.max(axis=axis)) for axis in (1, 0))
        height, width = (-(-int(x.max(initial=0) + 1) // cell) for x in (rows, columns))
        lowest = maps.amin(dim=(1, 2), keepdim=True)
        maps[:, height:] = lowest
        maps[:, :, width:] = lowest


class TextFeatures(ClickFeatures):
    """Features of the explicit policy: float32 (B, width, h, w), aligned with SAM's embedding.

    SAM branch: words of the vocabulary modulate the features, as in the implicit policy. For other
    words the branch is zero, since features learned for objects of the training would mislead. In
    training, a fraction of the images is treated as if the word were unknown.

    CLIP branch: four planes from the target's map (scaled to [0, 1]; standardised; its margin over
    the best other word, standardised; the maximum of the other words' maps, weighted down by the
    temperature as in AlignSAM), and relations: cosine similarities of every cell's embedding with
    the embeddings under the peaks of two planes and under the current mask. They mean the same for
    every object.

    Cross-attention lets every cell of the SAM branch attend to all regions of the CLIP branch.

    Args:
        observation_space: of `SamSeg-v0`, with `obs="full"` or `obs="handle"`.
        backbone: arguments of `load_backbone`.
        categories: words of the environment, in the order of `target_category`.
        max_steps: actions per episode, to scale the step.
        clip: arguments of `load_clip`.
        vocabulary: words with a learned modulation in addition to their maps.
        hidden: fraction of the images on which words count as unknown in training.
        allow_unknown: accept words that the CLIP does not know; their maps mean nothing.
        temperature: of the softmax that weights the maps of other words; a low one ignores them.
        width: feature channels.
        num_heads: number of heads of the cross-attention.
    """

    @checked
    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        backbone: dict[str, Any],
        categories: Sequence[str],
        max_steps: Count,
        clip: dict[str, Any],
        vocabulary: Sequence[str] = (),
        hidden: Fraction = 0.15,
        allow_unknown: bool = False,
        temperature: Positive = 0.33,
        width: Count = 48,
        num_heads: Count = 4,
    ) -> None:
        self._clip, self._allow_unknown = clip, allow_unknown
        self._maps: WordMaps | None = None
        self._words: tuple[str, ...] = ()
        super().__init__(observation_space, backbone, vocabulary, categories, max_steps, width)
        self.hidden = hidden
        self.temperature = temperature
        self.around = nn.Sequential(
            nn.Conv2d(_MAP_PLANES + _RELATIONS, width // 2, 3, padding=1), nn.ReLU()
        )
        self.clip_branch = nn.Sequential(nn.Conv2d(width + width // 2, width, 1), nn.ReLU())
        self.regions = min(_REGIONS, self.cells[0]), min(_REGIONS, self.cells[1])
        self.positions = nn.Parameter(torch.randn(1, width, *self.cells) * 0.02)
        self.norm_image, self.norm_clip = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        # Without attention at first: the branches are only added.
        nn.init.zeros_(self.attention.out_proj.weight)

    def frozen_weights(self) -> dict[str, str]:
        """Return digests of weights: "CLIP", in addition to those of the SAM."""
        clip = shared_surgery(**self._clip).clip
        return super().frozen_weights() | {"CLIP": clip.identity}

    def set_categories(self, categories: Sequence[str]) -> None:
        """Set the words that the numbers in `target_category` stand for."""
        super().set_categories(categories)
        words = tuple(categories)
        if self._maps is not None and words == self._words:
            return
        self._words = words
        surgery = shared_surgery(**self._clip)
        self._maps = WordMaps(surgery, self.backbone, words, allow_unknown=self._allow_unknown)
        self.store.register_feature(self._maps.name, self._maps)

    @property
    def identity(self) -> str:
        return f"{super().identity}/{shared_surgery(**self._clip).clip.identity}"

    def forward(self, observations: Any) -> Tensor:
        embedding, mask = self._image(observations)
        word = self._known_words(embedding, observations)
        image = self._modulated(embedding, word) * (word > 0)[:, None, None, None]
        planes = self.map_planes(observations)
        planes = torch.cat([planes, relations(embedding, planes[:, 1:3], mask)], dim=1)
        clip = self.clip_branch(torch.cat([image * planes[:, :1], self.around(planes)], dim=1))
        fused = image + clip + self._attended(image + mask, clip)
        return self.mix(fused, mask, self._planes(mask, observations))

    def _known_words(self, embedding: Tensor, observations: dict[str, Tensor]) -> Tensor:
        """Return vocabulary indices (B,) of the target words; 0 for unknown and hidden ones.

        Hiding depends on the image alone, so that rollouts, their updates and resumed runs agree.
        """
        target = self.words[observations["target_category"].reshape(-1).long()]
        if not self.learning:
            return target
        chance = (1e4 * embedding[:, :8, 0, 0].double().sum(dim=1)).frac().abs()
        return torch.where(chance < self.hidden, 0, target)

    def _attended(self, image: Tensor, clip: Tensor) -> Tensor:
        """Attend from the cells of the SAM branch (B, C, h, w) to regions of the CLIP branch."""
        where = F.adaptive_avg_pool2d(self.positions, self.regions)
        queries = self.norm_image(_tokens(image)) + _tokens(self.positions)
        keys = self.norm_clip(_tokens(F.adaptive_avg_pool2d(clip, self.regions))) + _tokens(where)
        attended, _ = self.attention(queries, keys, keys, need_weights=False)
        return attended.transpose(1, 2).unflatten(2, self.cells)

    def map_planes(self, observations: dict[str, Tensor]) -> Tensor:
        """Return the planes of the target's map: (B, 4, h, w).

        No plane reveals the target word by its level: the policy would memorise the words of its
        training and fail on others.
        """
        maps = self.word_maps(observations).float()[..., 1:].unflatten(-1, self.cells)
        rows = torch.arange(maps.shape[0], device=maps.device)
        target = observations["target_category"].reshape(-1).long()
        scaled, own = min_max(maps), maps[rows, target]
        # The weights softmax((1 for the target, 0 for others) / temperature), divided by their
        # maximum: 1 for the target, and this for the others.
        others = float(np.exp(-1.0 / self.temperature)) * scaled
        rivals = maps.clone()
        others[rows, target], rivals[rows, target] = 0.0, -torch.inf
        ahead = own - rivals.amax(dim=1) if maps.shape[1] > 1 else own
        planes = [scaled[rows, target], _standard(own), _standard(ahead), others.amax(dim=1)]
        return torch.stack(planes, dim=1)

    def word_maps(self, observations: dict[str, Tensor]) -> Tensor:
        """Return the maps of the observed images, (B, N, 1 + h * w), as `WordMaps` does.

        They come from the observations or the store, or are computed from the images.
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
    """Return the similarity of every cell with the areas under peaks of maps, and under a mask.

    Args:
        embedding: (B, C, h, w), of the images.
        maps: (B, M, h, w), in standard deviations.
        mask: (B, 1, h, w), probabilities.

    Returns:
        Cosine similarities (B, M + 1, h, w) of embeddings, centred per image. Those with the mask
        are multiplied by its maximum probability, so that an empty mask gives zeros.
    """
    unit = F.normalize(embedding - embedding.mean(dim=(2, 3), keepdim=True), dim=1)
    peaks = (_PEAK * maps).flatten(2).softmax(dim=2)
    weights = torch.cat([peaks, mask.flatten(2)], dim=1)
    under = F.normalize(torch.einsum("bmn,bcn->bmc", weights, unit.flatten(2)), dim=2)
    cosines = torch.einsum("bmc,bchw->bmhw", under, unit)
    return torch.cat([cosines[:, :-1], cosines[:, -1:] * mask.amax(dim=(2, 3), keepdim=True)], 1)


def _standard(maps: Tensor) -> Tensor:
    """Standardise maps (B, h, w)."""
    centred = maps - maps.mean(dim=(1, 2), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-6)


def _tokens(maps: Tensor) -> Tensor:
    """Flatten maps (B, C, h, w) to tokens (B, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


@POLICIES.register("explicit")
class ExplicitPolicy(ImplicitPolicy):
    """The explicit agent; its arguments are those of `ImplicitPolicy`, with `TextFeatures`."""

    extractor_class = TextFeatures
    needs_image = True
    recalibration_updates = 5
