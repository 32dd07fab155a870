"""Features of an image encoder at several strides, from which semantic heads are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor

from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec
from sam_gym.backbones.hq import early_channels, early_features, encode_pixels
from sam_gym.backbones.sam2 import Sam2

#: Names of tiled features begin with it.
TILED = "tiled_"


def encode_stages(sam: Sam, pixels: Tensor) -> ImageFeatures:
    """Encode prepared pixels to the embedding and what the encoder has of other strides.

    SAM 2 has its finer features, a ViT the early features of its only stride. An encoder with
    stages defines `forward_with_stages` and `stage_shapes`; another one has the embedding only.

    Args:
        sam: the pretrained SAM.
        pixels: (B, 3, S, S).
    """
    encoder: Any = sam.image_encoder
    if isinstance(sam, Sam2):
        return encode_pixels(sam, pixels)
    if isinstance(encoder, ImageEncoderViT):
        return early_features(encoder, pixels)
    if not hasattr(encoder, "forward_with_stages"):
        return ImageFeatures({"embedding": encoder(pixels)})
    embedding, stages = encoder.forward_with_stages(pixels)
    return ImageFeatures(
        {"embedding": embedding} | {f"stage{number}": own for number, own in enumerate(stages)}
    )


def stage_spec(sam: Sam) -> FeatureSpec:
    """Shapes and dtypes of `encode_stages`; all but the embedding are kept in half precision."""
    encoder: Any = sam.image_encoder
    shape = (sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
    tensors = {"embedding": TensorSpec(shape)}
    others: dict[str, tuple[int, ...]]
    if isinstance(sam, Sam2):
        others = {name: own.shape for name, own in sam.feature_spec.tensors.items()}
        del others["embedding"]
    elif isinstance(encoder, ImageEncoderViT):
        others = {"early": (early_channels(encoder), *shape[1:])}
    else:
        stages = getattr(encoder, "stage_shapes", ())
        others = {f"stage{k}": (width, side, side) for k, (width, side) in enumerate(stages)}
    tensors |= {name: TensorSpec(own, torch.float16) for name, own in others.items()}
    return FeatureSpec(tensors)


def tiled_spec(spec: FeatureSpec) -> FeatureSpec:
    """Shapes and dtypes of `encode_tiles`, from those of the whole images."""
    tensors = dict(spec.tensors)
    for name, (own, _) in spec.tensors.items():
        tensors[TILED + name] = TensorSpec((own[0], 2 * own[1], 2 * own[2]), torch.float16)
    return FeatureSpec(tensors)


def encode_tiles(encode: Callable[[Tensor], ImageFeatures], pixels: Tensor) -> ImageFeatures:
    """Encode whole images and their quadrants; the features of quadrants are put together.

    Quadrants without image have features of zero, at no cost.

    Args:
        encode: prepared pixels (N, 3, S, S) -> features (N, C, h, w), such as `encode_stages`.
        pixels: (B, 5, 3, S, S), see `Backbone.prepare_tiles`.

    Returns:
        Features (B, C, h, w) of `encode`, and the same of twice the size, (B, C, 2h, 2w), under
        names that begin with `TILED`.
    """
    whole = encode(pixels[:, 0])
    quadrants = pixels[:, 1:].flatten(0, 1)
    shown = quadrants.flatten(1).any(dim=1).nonzero()[:, 0]
    found = encode(quadrants[shown]) if len(shown) else whole[:0]

    def together(x: Tensor) -> Tensor:
        all_four = x.new_zeros((len(quadrants), *x.shape[1:]))
        all_four[shown] = x
        count, channels, height, width = all_four.shape
        grid = all_four.reshape(count // 4, 2, 2, channels, height, width)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, 2 * height, 2 * width)

    return whole.merge(**{TILED + name: together(x) for name, x in found.tensors.items()})
