"""Features of timm's models, with which those of a SAM can be compared.

They are a kind of raw features, `KIND@timm:NAME`: "embedding@timm:resnet50.a1_in1k" is what
"embedding" is of the SAM, of the same frames.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec
from sam_gym.utils.digest import digest_of

PREFIX = "timm:"
#: Stages at smaller strides are as large as the image, and left out.
_SMALLEST_STRIDE = 4


def kind_of(kind: str, features: str) -> str:
    """The kind of raw features of a model: "sam", or "timm:NAME"."""
    return kind if features == "sam" else f"{kind}@{features}"


def split_kind(kind: str) -> tuple[str, str]:
    """Split a kind of raw features into the kind itself and timm's name, "" for the SAM's own."""
    own, _, features = kind.partition(f"@{PREFIX}")
    return own, features


def check_features(features: str) -> None:
    """Raise `ValueError` unless a name is that of a model with features."""
    if features != "sam" and not (features.startswith(PREFIX) and features != PREFIX):
        raise ValueError(
            f"features must be sam or timm:NAME (such as timm:resnet50.a1_in1k), got {features!r}."
        )


class TimmEncoder(nn.Module):
    """A frozen model of timm that encodes the frames of a SAM.

    Frames are enlarged to the next multiple of the model's largest stride.

    Args:
        name: of timm, with its pretrained weights; "hf-hub:OWNER/NAME" and "local-dir:PATH" are
            names, too.
        size: side of a frame, in pixels.
        mean, std: (3, 1, 1), with which frames are normalised.

    Raises:
        ValueError: there is no such model, it has no weights, or it gives no feature maps.
        ConnectionError: its weights cannot be downloaded.
    """

    def __init__(self, name: str, size: int, mean: Tensor, std: Tensor) -> None:
        from timm.models import Eva, VisionTransformer

        super().__init__()
        untrained = _create(name, features_only=True)
        self._strides = untrained.feature_info.reduction()
        self._side = -(-size // max(self._strides)) * max(self._strides)
        about = untrained.pretrained_cfg
        # A model with an embedding of positions is made for its size.
        sized = {"img_size": self._side} if about.get("fixed_input_size") else {}
        self._plain = isinstance(getattr(untrained, "model", None), (VisionTransformer, Eva))
        kept = {"num_classes": 0} if self._plain else {"features_only": True}
        self.trunk = _create(name, pretrained=True, **kept, **sized)
        # (p - mean * 255) / (std * 255) = x * scale + shift for a pixel p, normalised to x.
        own_mean, own_std = (
            255 * torch.tensor(about[key]).reshape(3, 1, 1) for key in ("mean", "std")
        )
        self._scale = nn.Buffer(std.cpu() / own_std)
        self._shift = nn.Buffer((mean.cpu() - own_mean) / own_std)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Encode frames (B, 3, S, S), as `Backbone.prepare` makes them.

        Returns:
            `embedding`, the last feature map, and `stage0`, ... those before it, the finest first;
            of a plain ViT, its last three blocks.
        """
        scaled: Any = pixels * self._scale + self._shift
        if scaled.shape[-1] != self._side:
            size = (self._side, self._side)
            scaled = F.interpolate(scaled, size, mode="bilinear", align_corners=False)
        *stages, embedding = [
            own
            for own, stride in zip(self._maps(scaled), self._strides, strict=True)
            if stride >= _SMALLEST_STRIDE
        ]
        named = {f"stage{number}": own for number, own in enumerate(stages)}
        return ImageFeatures({"embedding": embedding, **named})

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """The feature maps (B, C, h, w), the finest first."""
        if self._plain:
            # Normalised, as features of DINO are used; timm's feature extractor leaves that out.
            return self.trunk.forward_intermediates(
                pixels, indices=len(self._strides), norm=True, intermediates_only=True
            )
        maps = self.trunk(pixels)
        if str(getattr(self.trunk, "output_fmt", "")).endswith("NHWC"):
            return [own.permute(0, 3, 1, 2) for own in maps]
        return maps

    @cached_property
    def feature_spec(self) -> FeatureSpec:
        """Shapes and dtypes of `forward`; stages are kept in half precision."""
        device = self._scale.device
        found = self(torch.zeros(1, 3, self._side, self._side, device=device)).spec
        halves = {
            name: TensorSpec(own.shape, torch.float16)
            for name, own in found.tensors.items()
            if name != "embedding"
        }
        return FeatureSpec({"embedding": found.tensors["embedding"], **halves})

    @cached_property
    def identity(self) -> str:
        """Hex digest of the weights."""
        return digest_of(self.state_dict())


def timm_encoder(sam: Sam, name: str) -> TimmEncoder:
    """A model of timm for the frames of a SAM, on its device; it is loaded once per process.

    Raises:
        ValueError, ConnectionError: see `TimmEncoder`.
    """
    mean, std = (tuple(x.flatten().tolist()) for x in (sam.pixel_mean, sam.pixel_std))
    return _loaded(name, sam.image_encoder.img_size, mean, std, sam.pixel_mean.device)


@lru_cache(maxsize=2)
def _loaded(
    name: str, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> TimmEncoder:
    shaped = (torch.tensor(own).reshape(3, 1, 1) for own in (mean, std))
    return TimmEncoder(name, size, *shaped).to(device)


def _create(name: str, **options: Any) -> Any:
    """Create a model of timm."""
    from timm import create_model

    try:
        return create_model(name, **options)
    except OSError as error:
        raise ConnectionError(
            f"The weights of timm's {name!r} cannot be loaded ({error}). Without network, save the "
            "model with timm.models.save_for_hf and pass timm:local-dir:PATH."
        ) from error
    except (RuntimeError, AttributeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"timm has no model {name!r} with pretrained weights and feature maps ({error}). "
            "timm.list_models(pretrained=True) lists names."
        ) from error
