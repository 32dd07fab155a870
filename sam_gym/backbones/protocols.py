"""What a model has to offer to environments, agents, generators and stores of features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.decode import MaskTokens
from sam_gym.backbones.features import FeatureSpec, ImageFeatures
from sam_gym.backbones.frames import Window
from sam_gym.backbones.prompts import Prompts


class FeatureSource(Protocol):
    """Computes image features; all that an `EmbeddingStore` or `DiskStore` needs."""

    #: Where the features are.
    device: torch.device

    @property
    def feature_spec(self) -> FeatureSpec:
        """Shapes and dtypes of the features."""

    @property
    def identity(self) -> str:
        """Hex digest of everything that the features depend on, except the image."""

    def encode(self, images: Sequence[np.ndarray]) -> ImageFeatures:
        """Encode B images uint8 (H, W, 3), RGB; sizes may differ."""


class BackboneService(FeatureSource, Protocol):
    """The interface of a promptable segmentation model for environments, agents and generators.

    `Backbone` implements it for the SAM family. A model with another encoder or decoder implements
    it too; nothing outside `sam_gym.backbones` may depend on more.
    """

    #: The registered name.
    name: str
    #: Precision of the model.
    dtype: torch.dtype
    #: Side of the square input frame, in pixels.
    image_size: int
    #: Whether images are stretched to the whole frame; otherwise they are padded.
    squashes: bool
    #: (C, h, w) of the feature `embedding`.
    embedding_shape: tuple[int, int, int]
    #: (hm, wm) of a low-res mask.
    mask_shape: tuple[int, int]
    #: Logit above which a pixel belongs to a mask.
    mask_threshold: float

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of `class_logits`; empty if the model does not classify masks."""

    def decode(
        self, features: ImageFeatures, prompts: Prompts, *, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompt sets: mask logits (P, M, hm, wm), predicted IoU (P, M)."""

    def decode_best(
        self, features: ImageFeatures, prompts: Prompts, multimask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask per prompt set: logits (P, hm, wm), predicted IoU (P,)."""

    def predict_iou(self, features: ImageFeatures, prompts: Prompts, multimask: Tensor) -> Tensor:
        """Predict the IoU (P,) of the masks of `decode_best`."""

    def decode_tokens(self, features: ImageFeatures, prompts: Prompts) -> MaskTokens:
        """Decode P prompt sets up to their mask tokens, from which masks can be chosen."""

    def class_logits(self, tokens: MaskTokens) -> Tensor:
        """Classify the masks of decoded prompts: logits (P, K, number of classes)."""

    @property
    def semantic_classes(self) -> tuple[str, ...]:
        """Names of the classes of `segment`; empty if the model does not classify pixels."""

    def segment(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Classify the pixels of images: label maps uint8 (H, W), indices of the classes."""

    def frame_logits(self, images: Sequence[np.ndarray]) -> Tensor:
        """Classify cells of the frame: class logits (B, number of classes, h, w)."""

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in the input frame of an image of (height, width)."""

    def to_input_frame(self, points: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Scale (x, y) pixels of an image of (height, width) to the input frame."""

    def masks_at(
        self, logits: Tensor, image_size: tuple[int, int], window: Window | None = None
    ) -> Tensor:
        """Resize low-res logits (..., hm, wm) to an image's size, (..., height, width).

        With a window (x0, y0, x1, y1) in pixels, only this part of it.
        """

    def framed(self, image: np.ndarray) -> np.ndarray:
        """Bring an image into the input frame, uint8 (S, S, 3)."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs in the precision of the backbone."""
