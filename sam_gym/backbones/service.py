"""A SAM as a batched, read-only service that a whole process shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model, raw_features, raw_spec
from sam_gym.backbones.adapters.semantic_head import SemanticHead
from sam_gym.backbones.adapters.tuning import TUNINGS, apply_tuned
from sam_gym.backbones.attention import fuse_attention
from sam_gym.backbones.compiled import FixedShapes, padded_size
from sam_gym.backbones.decode import MaskTokens
from sam_gym.backbones.encoders import upscaling_of
from sam_gym.backbones.features import FeatureSpec, ImageFeatures
from sam_gym.backbones.frames import Frame, PaddedFrame, SquashedFrame, Window
from sam_gym.backbones.prompts import NO_POINT, Prompts
from sam_gym.backbones.sam2 import VideoSam
from sam_gym.backbones.timm_features import split_kind, timm_encoder
from sam_gym.utils.digest import digest_of

#: Precisions by name, of models and of features on disk.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Images of which `segment` holds the features at once.
_SEGMENTED = 4
#: Prompts that a CPU decodes at once: more are not faster, and take more memory.
_DECODED = 64
#: Smallest number of points of a compiled call; larger numbers are powers of two.
_POINTS = 8


def check_rgb(image: object) -> None:
    """Raise `ValueError` unless an image is a uint8 array (H, W, 3)."""
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"An image must be a uint8 array (H, W, 3), got {type(image).__name__}. "
            "Of a file: np.array(PIL.Image.open(path).convert('RGB'))."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"An image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")


class Backbone:
    """A frozen SAM on one device; implements `BackboneService`.

    Args:
        name: the registered name.
        sam: the model; this object owns it from now on.
        device: where it runs.
        dtype: float32, or a lower precision for autocast.
        compile: run `encode` and `decode_best` compiled, with CUDA graphs on CUDA; batches are
            padded to a few fixed shapes, each of which compiles at its first call.
        adapter: learned weights on top of the model, or None.

    Raises:
        ValueError: the adapter was made for another model, or cannot be compiled.
    """

    def __init__(
        self,
        name: str,
        sam: Sam,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.sam = sam.to(device).eval().requires_grad_(False)
        fuse_attention(self.sam.image_encoder)
        #: The SAM without the adapter. Its `raw_features` are the features.
        self.pretrained = Model(self.sam, "embedding")
        self.model, self.adapter, self._replaced = self.pretrained, adapter, False
        #: The video memory (`sam_gym.backbones.video`), or None.
        self.memory: Any = None
        if adapter is not None:
            adapter.check_fits(name, self.weights_digest)
            self.model = adapter.model(self.sam)
        self.image_size: int = sam.image_encoder.img_size
        size = self.image_size
        squashes = isinstance(sam, VideoSam) and sam.squashes
        self._frame_class = SquashedFrame if squashes else PaddedFrame
        self._frame: Frame = self._frame_class(size)
        #: Whether images are stretched to the whole frame; otherwise they are padded.
        self.squashes: bool = self._frame.squashes
        #: Logit above which a pixel belongs to a mask.
        self.mask_threshold: float = sam.mask_threshold
        #: (C, h, w) of the feature `embedding`.
        self.embedding_shape = (
            sam.prompt_encoder.embed_dim,
            *sam.prompt_encoder.image_embedding_size,
        )
        #: (hm, wm) of a low-res mask.
        scale = math.prod(upscaling_of(sam.mask_decoder))
        self.mask_shape = (scale * self.embedding_shape[1], scale * self.embedding_shape[2])
        self._encode: Callable[..., Sequence[Tensor]] = partial(_encode, self.model)
        self._decode_best: Callable[..., Sequence[Tensor]] = partial(_decode_best, self.model)
        self.compiled = compile
        if compile and not self.model.fixed_shapes:
            raise ValueError(
                "An adapter that routes among experts does not compile: compile=False."
            )
        if compile:
            self._encode = FixedShapes(self._encode)
            self._decode_best = FixedShapes(self._decode_best)

    def __repr__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        adapted = f", adapted by {self.adapter.method}" if self.adapter is not None else ""
        device = str(self.device)
        return f"Backbone({self.name!r}, device={device!r}, dtype={self.dtype}{compiled}{adapted})"

    @property
    def feature_spec(self) -> FeatureSpec:
        """Shapes and dtypes of `encode`."""
        return self.model.feature_spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of `class_logits`; empty without a class head."""
        return self.model.classes

    @property
    def semantic_classes(self) -> tuple[str, ...]:
        """Names of the classes of `segment`; empty without a semantic head."""
        return () if self.model.segmenter is None else self.model.segmenter.classes

    @cached_property
    def weights_digest(self) -> str:
        """Hex digest of the weights of the SAM in any precision, without the adapter."""
        return digest_of(self.sam.state_dict())

    @cached_property
    def identity(self) -> str:
        """Hex digest of the name, the precision and all weights."""
        label = f"{self.name}/{self.dtype}"
        if self._replaced:
            return digest_of(self.model.state_dict(), f"{label}/model")
        state = self.sam.state_dict()
        if self.adapter is not None:
            state |= self.adapter.state
        if self.memory is not None:
            state |= self.memory.state_dict(prefix="memory.")
        return digest_of(state, label)

    def with_model(self, model: Model) -> Backbone:
        """The same service with another model of this SAM, as a trainer has it; not compiled.

        Its identity is that of the model when it is first asked for.
        """
        own = copy.copy(self)
        own.__dict__.pop("identity", None)
        own._replaced = True
        own.model, own.compiled = model, False
        own._encode, own._decode_best = partial(_encode, model), partial(_decode_best, model)
        return own

    def private_copy(self) -> Sam:
        """A copy of the model that a trainer may change; all its parameters require gradients."""
        return copy.deepcopy(self.sam).requires_grad_(True)

    def tuned_copy(self, tune: str) -> Sam:
        """A SAM to be trained that shares the frozen weights; `tune` is a key of `TUNINGS`."""
        return TUNINGS.get(tune).prepare(self.sam)

    def apply_tuned(self, tune: str, weights: Mapping[str, Tensor]) -> Sam:
        """A frozen SAM with tuned weights that shares all others; see `apply_tuned`."""
        return apply_tuned(self.sam, tune, weights)

    def adapted_model(self, adapter: Adapter, source: str = "adapter") -> Model:
        """The model of an adapter on this SAM; `source` names its file in messages.

        Raises:
            ValueError: the adapter was made for another SAM.
        """
        adapter.check_fits(self.name, self.weights_digest)
        return adapter.model(self.sam, source)

    def raw_source(self, kind: str) -> RawFeatureSource:
        """The pretrained SAM's `raw_features` of a kind, for stores and trainers."""
        return RawFeatureSource(self, kind)

    # Frames ------------------------------------------------------------------------------------

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in the input frame of an image of (height, width)."""
        return self._frame.input_size(image_size)

    def to_input_frame(self, points: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Scale (x, y) pixels of an image of (height, width) to the model's input frame.

        Args:
            points: (..., 2), (x, y). A box is two points.
            image_size: (height, width) of the image.

        Returns:
            float32, same shape.
        """
        height, width = self.input_size(image_size)
        scale = np.array([width / image_size[1], height / image_size[0]])
        return (np.asarray(points, np.float64) * scale).astype(np.float32)

    def masks_at(
        self, logits: Tensor, image_size: tuple[int, int], window: Window | None = None
    ) -> Tensor:
        """Resize low-res logits (..., hm, wm) to an image's size, (..., height, width).

        Args:
            logits: of masks.
            image_size: (height, width).
            window: (x0, y0, x1, y1) in pixels, without x1 and y1: only this part of it.
        """
        return self._frame.masks_at(logits, image_size, window)

    def framed(self, image: np.ndarray) -> np.ndarray:
        """Bring an image into the input frame, uint8 (S, S, 3); padding is black."""
        return self._frame.framed(image)

    # Inference -----------------------------------------------------------------------------------

    def check_image(self, image: np.ndarray) -> None:
        """Raise `ValueError` unless an image is uint8 (H, W, 3) and keeps pixels when resized."""
        check_rgb(image)
        if 0 in image.shape or 0 in self.input_size(image.shape[:2]):
            raise ValueError(
                f"An image of {image.shape[0]} x {image.shape[1]} pixels has no pixels left "
                f"once its longest side is {self.image_size}. Crop it."
            )

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """Bring images into the frame and normalise: float32 (B, 3, S, S) on the device."""
        for image in images:
            self.check_image(image)
        return self._frame.pixels(images, self.sam.pixel_mean, self.sam.pixel_std, self.device)

    def prepare_tiles(self, images: Sequence[np.ndarray]) -> Tensor:
        """Bring images and their quadrants into frames: float32 (B, 5, 3, S, S) on the device.

        The first of the five is the whole image, as of `prepare`; the others are the quadrants of
        its frame at twice the size, row by row.
        """
        whole, size = self.prepare(images), self.image_size
        twice = self._frame_class(2 * size)
        large = twice.pixels(images, self.sam.pixel_mean, self.sam.pixel_std, self.device)
        grid = large.reshape(-1, 3, 2, size, 2, size).permute(0, 2, 4, 1, 3, 5)
        return torch.cat([whole[:, None], grid.flatten(1, 2)], dim=1)

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> ImageFeatures:
        """Encode images of any size.

        Args:
            images: B arrays uint8 (H, W, 3), RGB; sizes may differ.

        Returns:
            Features of B images as `feature_spec` describes them, on the device.

        Raises:
            ValueError: an image has another dtype or shape.
        """
        with self.autocast():
            tensors = self._encode(self.prepare(images))
        return _float32(ImageFeatures(dict(zip(self.feature_spec.tensors, tensors, strict=True))))

    @torch.no_grad()
    def decode(
        self, features: ImageFeatures, prompts: Prompts, *, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompt sets in one call; batching does not change a row's result.

        Args:
            features: of B images, from `encode`.
            prompts: P prompt sets (see `Prompts`).
            multimask: return the three masks for ambiguous prompts instead of the single one. For
                an unstable single mask, SAM 2 returns the best of the three.

        Returns:
            Mask logits float32 (P, M, hm, wm) and predicted IoU float32 (P, M); M is 3 or 1.

        Raises:
            ValueError: prompts have a wrong shape, dtype or value (see `Prompts.check`).
        """
        prompts.check(len(features), self.mask_shape)
        with self.autocast():
            tokens = self.model.decode(features, prompts)
            if multimask:
                logits, iou = tokens.decode_masks(tokens.mask_embeddings[:, 1:]), tokens.iou[:, 1:]
            else:
                single = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
                logits, iou = (x[:, None] for x in tokens.decode_best_masks(single))
        return logits.float(), iou.float()

    @torch.no_grad()
    def decode_best(
        self, features: ImageFeatures, prompts: Prompts, multimask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask per prompt set: the best of three by predicted IoU, or the single one.

        Environments call it in every step: the values of prompts are not checked.

        Args:
            features: of B images, from `encode`.
            prompts: P prompt sets.
            multimask: bool (P,), which rows are ambiguous (a first click).

        Returns:
            Mask logits float32 (P, hm, wm) and predicted IoU float32 (P,).
        """
        if self._takes_pieces(prompts):
            parts = [self.decode_best(*own) for own in _pieces(features, prompts, multimask)]
            masks, ious = zip(*parts, strict=True)
            return torch.cat(masks), torch.cat(ious)
        if self.compiled and len(prompts):
            features, prompts = _with_fixed_shapes(features, prompts)
        work = self._decode_best if len(prompts) else partial(_decode_best, self.model)
        with self.autocast():
            logits, iou = work(
                features.names,
                *features.tensors.values(),
                prompts.points,
                prompts.labels,
                prompts.boxes,
                prompts.has_box,
                prompts.masks,
                prompts.has_mask,
                prompts.rows,
                multimask,
            )
        return logits.float(), iou.float()

    @torch.no_grad()
    def predict_iou(self, features: ImageFeatures, prompts: Prompts, multimask: Tensor) -> Tensor:
        """Predict the IoU of the masks of `decode_best`, without computing masks.

        Arguments as for `decode_best`; values of prompts are not checked.

        Returns:
            float32 (P,).
        """
        if self._takes_pieces(prompts):
            pieces = _pieces(features, prompts, multimask)
            return torch.cat([self.predict_iou(*own) for own in pieces])
        with self.autocast():
            return self.model.decode(features, prompts).best_iou(multimask).float()

    def _takes_pieces(self, prompts: Prompts) -> bool:
        """Whether prompts are decoded in pieces, which bounds the memory."""
        return self.device.type == "cpu" and not self.compiled and len(prompts) > _DECODED

    @torch.no_grad()
    def decode_tokens(self, features: ImageFeatures, prompts: Prompts) -> MaskTokens:
        """Decode P prompt sets up to their mask tokens, to choose before masks are computed.

        Raises:
            ValueError: prompts have a wrong shape, dtype or value (see `Prompts.check`).
        """
        prompts.check(len(features), self.mask_shape)
        with self.autocast():
            return self.model.decode(features, prompts)

    @torch.no_grad()
    def class_logits(self, tokens: MaskTokens) -> Tensor:
        """Classify the masks of decoded prompts: logits (P, K, number of classes).

        Raises:
            ValueError: the model has no class head.
        """
        with self.autocast():
            return self.model.class_logits(tokens)

    def segment(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Classify the pixels of images with the semantic head of the adapter.

        Args:
            images: B arrays uint8 (H, W, 3), RGB; sizes may differ.

        Returns:
            Label maps of the size of each image, uint8 (H, W): indices of `semantic_classes`.

        Raises:
            ValueError: the model has no semantic head, or an image has another dtype or shape.
        """
        return [_labels(logits) for logits in self.pixel_logits(images)]

    def pixel_logits(self, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield the class logits of images at their size; arguments and errors of `segment`.

        Yields:
            float32 (number of classes, H, W), on the device.
        """
        for first in range(0, len(images), _SEGMENTED):
            batch = images[first : first + _SEGMENTED]
            for logits, image in zip(self.frame_logits(batch), batch, strict=True):
                yield self.masks_at(logits, (image.shape[0], image.shape[1]))

    def frame_logits(self, images: Sequence[np.ndarray]) -> Tensor:
        """Classify cells of the frame with the semantic head; arguments and errors of `segment`.

        Returns:
            Class logits (B, number of classes, h, w) of the frame, float32.
        """
        return self.segment_logits(self.raw_source(self._segmenter.kind).encode(images))

    @torch.no_grad()
    def segment_logits(self, raw: ImageFeatures) -> Tensor:
        """Compute class logits (B, number of classes, h, w) of the frame, float32.

        Args:
            raw: of `raw_source(kind)`, where the kind is that of the semantic head.

        Raises:
            ValueError: the model has no semantic head.
        """
        with self.autocast():
            return self._segmenter(raw).float()

    def labels_at(self, logits: Tensor, image_size: tuple[int, int]) -> np.ndarray:
        """Resize class logits (number of classes, h, w) to a label map uint8 (height, width)."""
        return _labels(self.masks_at(logits, image_size))

    @property
    def _segmenter(self) -> SemanticHead:
        if self.model.segmenter is None:
            raise ValueError(
                "This model has no semantic head: pass the adapter of one (python -m "
                "adaptation.train --method semantic)."
            )
        return self.model.segmenter

    def autocast(self) -> torch.autocast:
        """The context in which the model runs in the precision of the backbone."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


class RawFeatureSource:
    """`raw_features` of a backbone's pretrained SAM; implements `FeatureSource`.

    Args:
        backbone: the backbone; its adapter plays no part.
        kind: of `raw_features`.

    Raises:
        ValueError: unknown kind, or unknown model of timm.
        ConnectionError: the weights of that model cannot be downloaded.
    """

    def __init__(self, backbone: Backbone, kind: str) -> None:
        self._backbone, self.kind = backbone, kind
        self._own, self._timm = split_kind(kind)
        self.device, self.feature_spec = backbone.device, raw_spec(backbone.sam, kind)

    @cached_property
    def identity(self) -> str:
        """Hex digest; for the kind "embedding", that of the backbone without its adapter."""
        own = self._backbone
        suffix = "" if self.kind == "embedding" else f"/{self.kind}"
        if self.encoder_digest:
            suffix += f"/{self.encoder_digest}"
        return digest_of(own.sam.state_dict(), f"{own.name}/{own.dtype}{suffix}")

    @property
    def encoder_digest(self) -> str:
        """Hex digest of the weights of the model of timm; "" for features of the SAM."""
        return timm_encoder(self._backbone.sam, self._timm).identity if self._timm else ""

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> ImageFeatures:
        """Compute the raw features of B images uint8 (H, W, 3), RGB; sizes may differ."""
        own = self._backbone
        prepare = own.prepare_tiles if self._own == "tiles" else own.prepare
        return self.encode_pixels(prepare(images))

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> ImageFeatures:
        """Compute the raw features of prepared pixels: (B, 3, S, S), tiles (B, 5, 3, S, S)."""
        with self._backbone.autocast():
            features = raw_features(self._backbone.sam, pixels, self.kind)
        return features.as_in(self.feature_spec).map(Tensor.contiguous)


def _labels(logits: Tensor) -> np.ndarray:
    """Class logits (number of classes, H, W) -> label map uint8 (H, W)."""
    return logits.argmax(dim=0).to(torch.uint8).cpu().numpy()


def _float32(features: ImageFeatures) -> ImageFeatures:
    return features.floating_to(torch.float32).map(Tensor.contiguous)


def _encode(model: Model, pixels: Tensor) -> tuple[Tensor, ...]:
    return tuple(model.encode(pixels).tensors.values())


def _decode_best(model: Model, names: tuple[str, ...], *inputs: Any) -> tuple[Tensor, Tensor]:
    """Decode from a flat list: features of these names, fields of `Prompts`, multimask."""
    features = ImageFeatures(dict(zip(names, inputs, strict=False)))
    *prompts, multimask = inputs[len(names) :]
    return model.decode(features, Prompts(*prompts)).decode_best_masks(multimask)


def _pieces(
    features: ImageFeatures, prompts: Prompts, multimask: Tensor
) -> Iterator[tuple[ImageFeatures, Prompts, Tensor]]:
    """Yield `_DECODED` prompts at a time with the features of their images."""
    for index in torch.arange(len(prompts)).split(_DECODED):
        own, images = prompts.take(index), index
        if own.rows is not None:
            images, rows = own.rows.unique(return_inverse=True)
            own = replace(own, rows=rows)
        yield features[images], own, multimask[index]


def _with_fixed_shapes(features: ImageFeatures, prompts: Prompts) -> tuple[ImageFeatures, Prompts]:
    """Bring prompts into a form with few distinct shapes.

    Every prompt set has its own image, `_POINTS` points or a larger power of two, a box and, if any
    of them has one, a mask; missing parts are marked as absent.
    """
    count, device = len(prompts), features.device
    points, labels = prompts.points, prompts.labels
    if points is None or labels is None:
        points = torch.zeros((count, 0, 2), device=device)
        labels = torch.zeros((count, 0), dtype=torch.int64, device=device)
    missing = max(_POINTS, padded_size(points.shape[1])) - points.shape[1]
    boxes, masks = prompts.boxes, prompts.masks
    has_box, has_mask = prompts.has_box, prompts.has_mask
    if has_box is None:
        has_box = torch.full((count,), boxes is not None, device=device)
    if has_mask is None and masks is not None:
        has_mask = torch.ones(count, dtype=torch.bool, device=device)
    return features if prompts.rows is None else features[prompts.rows], Prompts(
        points=F.pad(points, (0, 0, 0, missing)),
        labels=F.pad(labels, (0, missing), value=NO_POINT),
        boxes=torch.zeros((count, 4), device=device) if boxes is None else boxes,
        has_box=has_box,
        masks=masks,
        has_mask=has_mask,
    )
