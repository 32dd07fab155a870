"""The models that a backbone runs: images to features, features and prompts to masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

from segment_anything.modeling import Sam
from torch import Tensor, nn

from sam_gym.backbones.adapters.class_head import ClassHead
from sam_gym.backbones.adapters.semantic_head import SemanticHead
from sam_gym.backbones.decode import MaskTokens, decode_tokens
from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec
from sam_gym.backbones.hq import (
    early_channels,
    early_features,
    encode_pixels,
    feature_spec,
    with_hq_features,
)
from sam_gym.backbones.prompts import Prompts
from sam_gym.backbones.stages import encode_stages, encode_tiles, stage_spec, tiled_spec
from sam_gym.backbones.timm_features import split_kind, timm_encoder
from sam_gym.utils.registry import Registry, check_choice

#: Inputs of the tuned part of a SAM; see `raw_features`.
RAW_KINDS = ("pixels", "embedding", "early", "stages", "tiles")
#: Those that models of timm have, too.
_TIMM_KINDS = ("embedding", "stages", "tiles")


class Model(nn.Module):
    """A SAM, pretrained or adapted.

    Args:
        sam: the model. For a model that routes or prompts by image: the pretrained one.
        raw: a kind of `raw_features`, which the pretrained SAM can compute in advance.
        head: classifies masks, or None.
        segmenter: classifies pixels by `raw_features` of the pretrained SAM, or None.
    """

    def __init__(
        self,
        sam: Sam,
        raw: str = "pixels",
        head: ClassHead | None = None,
        segmenter: SemanticHead | None = None,
    ) -> None:
        super().__init__()
        self.sam, self.raw, self.head, self.segmenter = sam, raw, head, segmenter

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of `class_logits`; empty without a head."""
        return () if self.head is None else self.head.classes

    def class_logits(self, tokens: MaskTokens) -> Tensor:
        """Classify the masks of decoded prompts: logits (P, K, number of classes).

        Raises:
            ValueError: the model has no head.
        """
        if self.head is None:
            raise ValueError("This model does not classify masks: its adapter has no class head.")
        return self.head(tokens.tokens)

    @property
    def feature_spec(self) -> FeatureSpec:
        """Shapes and dtypes of `encode`, in float32."""
        return feature_spec(self.sam)

    @property
    def num_experts(self) -> int:
        """Number of experts that a router chooses from."""
        return 1

    @property
    def fixed_shapes(self) -> bool:
        """Whether the model can be compiled: no shape depends on tensor values."""
        return True

    def encode(self, pixels: Tensor) -> ImageFeatures:
        """Encode prepared pixels (B, 3, S, S)."""
        return encode_pixels(self.sam, pixels)

    def embed(
        self, raw: ImageFeatures, pixels: Callable[[], Tensor] | None = None
    ) -> ImageFeatures:
        """Compute features from `raw_features` of the model's kind; differentiable.

        Args:
            raw: of B images.
            pixels: returns the prepared pixels of the images; some routers need them.
        """
        return embed(self.sam, raw)

    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskTokens:
        """Decode prompts; see `decode_tokens`."""
        return decode_tokens(self.sam, features, prompts)


class AdapterModule(nn.Module, ABC):
    """A module that an adapter needs at inference time, in addition to its tuned weights.

    Register a subclass in `ADAPTER_MODULES`. Adapter files name it as their `router` and hold its
    state, so an adaptation method of another package can register its own.
    """

    @classmethod
    @abstractmethod
    def from_weights(cls, sam: Sam, weights: Mapping[str, Tensor], num_experts: int) -> Self:
        """Build a module with the shapes of a saved state, which is loaded afterwards.

        Args:
            sam: the pretrained SAM.
            weights: the saved state.
            num_experts: number of tuned copies in the adapter.
        """

    @abstractmethod
    def wrap(self, sam: Sam, experts: Sequence[Sam], raw: str) -> Model:
        """Build the adapted model.

        Args:
            sam: the pretrained SAM.
            experts: its tuned copies; can be empty.
            raw: the kind of `raw_features` that the experts start from.
        """


#: Name -> class, as adapter files name it.
ADAPTER_MODULES: Registry[type[AdapterModule]] = Registry("adapter module")


def raw_features(sam: Sam, pixels: Tensor, kind: str) -> ImageFeatures:
    """Compute the inputs of the tuned part of a SAM; see `Tuning.raw`.

    Args:
        sam: the pretrained SAM.
        pixels: prepared, (B, 3, S, S).
        kind: "pixels" (feature `pixels`), "embedding" (as `encode_pixels`), "early" (features
            `embedding` and `early`), "stages" (as `encode_stages`) or "tiles" (as `encode_tiles`,
            from pixels (B, 5, 3, S, S)); "KIND@timm:NAME" for an embedding, stages or tiles of a
            model of timm (see `TimmEncoder`).

    Raises:
        ValueError: unknown kind.
    """
    own, name = _checked(kind)
    encode: Callable[[Tensor], ImageFeatures] = (
        timm_encoder(sam, name) if name else partial(encode_stages, sam)
    )
    if own == "tiles":
        return encode_tiles(encode, pixels)
    if own == "stages":
        return encode(pixels)
    if name:
        return ImageFeatures({"embedding": encode(pixels).embedding})
    if own == "pixels":
        return ImageFeatures({"pixels": pixels})
    return (
        early_features(sam.image_encoder, pixels) if own == "early" else encode_pixels(sam, pixels)
    )


def raw_spec(sam: Sam, kind: str) -> FeatureSpec:
    """Shapes and dtypes of `raw_features`; float32, but for those of stages and tiles.

    Raises:
        ValueError: unknown kind.
    """
    own, name = _checked(kind)
    if name or own in ("stages", "tiles"):
        spec = timm_encoder(sam, name).feature_spec if name else stage_spec(sam)
        if own == "embedding":
            return FeatureSpec({"embedding": spec.tensors["embedding"]})
        return tiled_spec(spec) if own == "tiles" else spec
    if own == "pixels":
        side = sam.image_encoder.img_size
        return FeatureSpec({"pixels": TensorSpec((3, side, side))})
    found = feature_spec(sam)
    if own != "early":
        return found
    embedding = found.tensors["embedding"]
    early = TensorSpec((early_channels(sam.image_encoder), *embedding.shape[1:]))
    return FeatureSpec({"embedding": embedding, "early": early})


def _checked(kind: str) -> tuple[str, str]:
    """Split a kind of raw features into the kind and a name of timm, "" for the SAM's own."""
    own, name = split_kind(kind)
    check_choice("kind of raw features", own, _TIMM_KINDS if name else RAW_KINDS)
    return own, name


def embed(sam: Sam, raw: ImageFeatures) -> ImageFeatures:
    """Compute the features for `decode_tokens` from `raw_features`; differentiable."""
    if "pixels" in raw:
        return encode_pixels(sam, raw["pixels"])
    return with_hq_features(sam, raw) if "early" in raw else raw
