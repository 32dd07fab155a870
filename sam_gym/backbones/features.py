"""Image features: named tensors that a backbone computes once per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from sam_gym.utils.registry import unknown_name


class TensorSpec(NamedTuple):
    """Shape of one image's tensor, without the batch axis, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes per image."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FeatureSpec:
    """The features that a backbone computes of an image.

    Attributes:
        tensors: feature name -> shape and dtype per image.
    """

    tensors: Mapping[str, TensorSpec]

    def __str__(self) -> str:
        return ", ".join(f"{name} {own.shape}" for name, own in self.tensors.items())

    @property
    def nbytes(self) -> int:
        """Bytes per image."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def empty(self, count: int, device: torch.device) -> ImageFeatures:
        """Uninitialised features of `count` images; maps are channels-last in memory.

        Decoders and policies read all channels of a cell together.
        """

        def empty(spec: TensorSpec) -> Tensor:
            layout = torch.channels_last if len(spec.shape) == 3 else torch.contiguous_format
            size = (count, *spec.shape)
            return torch.empty(size, dtype=spec.dtype, device=device, memory_format=layout)

        return ImageFeatures({name: empty(spec) for name, spec in self.tensors.items()})


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of B images. The first axis of every tensor is the image.

    `features["hq"]` is one tensor; `features[rows]` holds all features of some images, where rows
    are a slice, an integer tensor or list, or a boolean mask. Names in use:

    | name | tensor |
    |---|---|
    | `embedding` | float (B, C, h, w), the image embedding |
    | `hq` | float (B, C / 8, kh, kw), the prompt-independent part of an HQ decoder |
    | `high_res_s1` | float (B, C / 4, 2h, 2w), finer features that SAM 2's decoder adds |
    | `high_res_s0` | float (B, C / 8, 4h, 4w), the finest of them |
    | `early` | float (B, D, h, w), early encoder features, from which an HQ head is trained |
    | `route` | int64 (B,), the expert of each image |
    | `pixels` | float32 (B, 3, S, S), where the encoder itself is trained |

    Attributes:
        tensors: feature name -> (B, ...), in a fixed order.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: slice | Tensor | Sequence[int]) -> ImageFeatures: ...

    def __getitem__(self, key: str | slice | Tensor | Sequence[int]) -> Tensor | ImageFeatures:
        if isinstance(key, str):
            if key not in self.tensors:
                raise unknown_name("image feature", key, self.tensors)
            return self.tensors[key]
        if isinstance(key, (int, np.integer)):
            # Also keeps Python from iterating: a row without its batch axis is no `ImageFeatures`.
            raise TypeError(f"Features are indexed by name or rows: use [{key}:{key + 1}].")
        return self.map(lambda tensor: tensor[key])

    def __setitem__(self, rows: Tensor | slice, values: ImageFeatures) -> None:
        """Overwrite all features of some images, in place; raises as `cat` does."""
        self._check_names(values)
        for name, tensor in self.tensors.items():
            tensor[rows] = values[name]

    def _check_names(self, other: ImageFeatures) -> None:
        if set(other.names) != set(self.names):
            raise ValueError(f"Features differ: {', '.join(self.names)}; {', '.join(other.names)}.")

    @property
    def embedding(self) -> Tensor:
        """The image embedding, float (B, C, h, w)."""
        return self["embedding"]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, in order."""
        return tuple(self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return next(iter(self.tensors.values())).device

    @property
    def spec(self) -> FeatureSpec:
        """Shapes and dtypes per image."""
        return FeatureSpec(
            {name: TensorSpec(tuple(x.shape[1:]), x.dtype) for name, x in self.tensors.items()}
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> ImageFeatures:
        """Apply a function to every tensor."""
        return ImageFeatures({name: function(tensor) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> ImageFeatures:
        """The same features on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def floating_to(self, dtype: torch.dtype) -> ImageFeatures:
        """The same features with floating-point tensors in another precision."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def as_in(self, spec: FeatureSpec) -> ImageFeatures:
        """The same features in the dtypes of a specification that has their names."""
        dtypes = {name: own.dtype for name, own in spec.tensors.items()}
        return ImageFeatures({name: x.to(dtypes[name]) for name, x in self.tensors.items()})

    def merge(self, **tensors: Tensor) -> ImageFeatures:
        """These features and further ones; a name that exists is replaced."""
        return ImageFeatures({**self.tensors, **tensors})

    def split(self, size: int) -> list[ImageFeatures]:
        """Consecutive chunks of at most `size` images."""
        return [self[first : first + size] for first in range(0, len(self), size)]

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The images of all parts, one after the other.

        Raises:
            ValueError: the parts have different features.
        """
        for part in parts[1:]:
            parts[0]._check_names(part)
        return ImageFeatures(
            {name: torch.cat([part[name] for part in parts]) for name in parts[0].names}
        )
