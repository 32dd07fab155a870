"""Masks from points, boxes and masks in image pixels, for many images and prompts at once.

The conventions and numbers are those of `segment_anything.SamPredictor`, and of SAM 2's
`SAM2ImagePredictor` on its models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from sam_gym.backbones import NO_POINT, BackboneService, Prompts, load_backbone
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import unknown_label
from sam_gym.backbones.zoom import Window, low_res_logits
from sam_gym.utils.text import counted
from sam_gym.utils.transfer import to_device, to_host

#: Images per encoder call and prompts per decoder call; they bound the memory of a call.
IMAGES_PER_CALL = 8
PROMPTS_PER_CALL = 64
#: Pixels of the masks that are upsampled together.
PIXELS_PER_CALL = 2**26
#: Bound on the values of prompts: in pixels of the input frame, float32 has to hold them.
_LARGEST = 1e30
_LABELS = (1, 0, -1, NO_POINT)

#: One array per image, or None for an image without prompts of that kind.
PerImage = Sequence[ArrayLike | None] | None


class Predictions(NamedTuple):
    """Masks of each image. P is the number of its prompts, M is 3 or 1 masks per prompt.

    The axis P is left out for an image with a single prompt that was passed without it.

    Attributes:
        masks: bool (P, M, H, W) at the size of the image; float32 logits with `return_logits`.
        scores: float32 (P, M), predicted IoU.
        low_res_logits: float32 (P, M, hm, wm). `Predictor.predict` takes one of the M masks of
            each prompt as `masks`.
    """

    masks: list[np.ndarray]
    scores: list[np.ndarray]
    low_res_logits: list[np.ndarray]


@dataclass
class _ImagePrompts:
    """The P prompts of one image, checked; None where not given.

    Attributes:
        count: P.
        single: whether the prompt was passed without the axis P.
        points: float64 (P, N, 2), in pixels of the image.
        labels: int64 (P, N).
        boxes: float64 (P, 4), in pixels of the image.
        masks: float32 (P, hm, wm).
    """

    count: int = 0
    single: bool = False
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None

    def places(self, number: int) -> np.ndarray:
        """Return the positions that a window of a prompt must show: (N, 2)."""
        found = [np.zeros((0, 2))]
        if self.points is not None and self.labels is not None:
            found.append(self.points[number][np.isin(self.labels[number], (0, 1))])
        if self.boxes is not None:
            found.append(self.boxes[number].reshape(2, 2))
        return np.concatenate(found)


class Predictor:
    """Segment images with points, boxes and masks, all in pixels of the original images.

    Examples:
        >>> predictor = Predictor("micro")
        >>> predictor.set_images([image])
        >>> masks, scores, logits = predictor.predict(points=[[[80, 60]]], labels=[[1]])
        >>> masks[0].shape  # three masks of the size of the image
        (3, 480, 640)

    Args:
        backbone: a registered name (see `load_backbone`) or a backbone.
        checkpoint: path of the weights; None: bundled or downloaded.
        device: "auto", "cpu", "cuda", "mps" or another torch device.
        dtype: "auto", "float32", "bfloat16" or "float16".
        adapter: path of an adapter file.

    Attributes:
        backbone: the shared `BackboneService`.
        images: the images, as they were passed.
        image_sizes: (height, width) of each image.

    Raises:
        ValueError: the backbone is an object and another argument says how to load one, or
            whatever `load_backbone` raises.
    """

    def __init__(
        self,
        backbone: str | BackboneService = "micro",
        checkpoint: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        adapter: str | None = None,
    ) -> None:
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, checkpoint, device, dtype, adapter=adapter)
        elif (checkpoint, device, dtype, adapter) != (None, "auto", "auto", None):
            raise ValueError(
                "checkpoint, device, dtype and adapter say how to load a backbone: pass its name "
                f"instead of {backbone!r}, or leave them out."
            )
        self.backbone = backbone
        self.images: list[np.ndarray] = []
        self.image_sizes: list[tuple[int, int]] = []

    def set_images(self, images: Sequence[np.ndarray]) -> None:
        """Encode images, once for all prompts that follow.

        Args:
            images: uint8 (H, W, 3), RGB; sizes may differ.

        Raises:
            ValueError: there is no image, or one has another dtype or shape.
        """
        self.image_sizes = []
        if isinstance(images, np.ndarray) and images.ndim == 3:
            raise ValueError(
                f"set_images takes a list of images, got one array {images.shape}: "
                "set_images([image])."
            )
        if isinstance(images, (str, os.PathLike)) or not hasattr(images, "__len__"):
            raise ValueError(
                f"set_images takes a list of uint8 arrays (H, W, 3), got {type(images).__name__}."
            )
        if not len(images):
            raise ValueError("set_images needs at least one image, got an empty list.")
        batches = [
            images[start : start + IMAGES_PER_CALL]
            for start in range(0, len(images), IMAGES_PER_CALL)
        ]
        self.features = ImageFeatures.cat([self.backbone.encode(batch) for batch in batches])
        self.images = list(images)
        self.image_sizes = [(image.shape[0], image.shape[1]) for image in images]

    def predict(
        self,
        points: PerImage = None,
        labels: PerImage = None,
        boxes: PerImage = None,
        masks: PerImage = None,
        multimask: bool = True,
        return_logits: bool = False,
        zoom: bool = False,
    ) -> Predictions:
        """Predict the masks of any number of prompts on each image.

        Every argument has one entry per image. Entries of one image describe the same P prompts: a
        prompt may have points, a box and a mask. Images may differ in P and in the number of
        points. Batching does not change a prompt's result.

        Args:
            points: float (P, N, 2), (x, y) in pixels of the image; (N, 2) for one prompt.
            labels: int (P, N) or (N,): 1 foreground, 0 background, -1 SAM's padding token,
                `NO_POINT` no point at all, where prompts of an image differ in their number.
            boxes: float (P, 4), (x0, y0, x1, y1) in pixels of the image; (4,) for one prompt.
            masks: float (P, hm, wm), low-res mask logits; (hm, wm) for one prompt.
            multimask: three masks per prompt, best for ambiguous prompts such as a single click;
                otherwise one.
            return_logits: return mask logits at the size of the image instead of binary masks.
            zoom: look again at the best mask of each prompt, in a window around it that is encoded
                by itself: sharper masks of small objects, for an encoder call per prompt. The
                result has one mask per prompt.

        Returns:
            The masks of each image; P is 0 for an image without prompts.

        Raises:
            RuntimeError: no images are set.
            ValueError: there are no prompts, or an array has a wrong shape or value.
        """
        if not self.image_sizes:
            raise RuntimeError("No images are set: call set_images(images) before predict.")
        prompts = self._checked(points, labels, boxes, masks)
        tokens = 3 if multimask and not zoom else 1
        hm, wm = self.backbone.mask_shape
        dtype = np.float32 if return_logits else bool
        result = Predictions(
            [
                np.empty((own.count, tokens, *size), dtype)
                for own, size in zip(prompts, self.image_sizes, strict=True)
            ],
            [np.empty((own.count, tokens), np.float32) for own in prompts],
            [np.empty((own.count, tokens, hm, wm), np.float32) for own in prompts],
        )
        images = np.repeat(np.arange(len(prompts)), [own.count for own in prompts])
        numbers = np.concatenate([np.arange(own.count) for own in prompts])
        # A zoomed prompt has an image of its own.
        step, predict = PROMPTS_PER_CALL, self._predict_chunk
        if zoom:
            step, predict = IMAGES_PER_CALL, self._predict_zoomed
        for start in range(0, len(images), step):
            chunk = slice(start, start + step)
            predict(prompts, images[chunk], numbers[chunk], multimask, result)
        for image, own in enumerate(prompts):
            if own.single:
                for arrays in result:
                    arrays[image] = arrays[image][0]
        return result

    def segment(self) -> list[np.ndarray]:
        """Classify the pixels of the images that are set, with the adapter's semantic head.

        Returns:
            Label maps of the size of each image, uint8 (H, W): indices of
            `backbone.semantic_classes`.

        Raises:
            RuntimeError: no images are set.
            ValueError: there is no semantic head.
        """
        if not self.image_sizes:
            raise RuntimeError("No images are set: call set_images(images) before segment.")
        return self.backbone.segment(self.images)

    def _predict_chunk(
        self,
        prompts: Sequence[_ImagePrompts],
        images: np.ndarray,
        numbers: np.ndarray,
        multimask: bool,
        result: Predictions,
    ) -> None:
        """Decode some prompts in one call and write their masks to `result`.

        Args:
            prompts: those of each image.
            images: int64 (K,), ascending, the image of each prompt to decode.
            numbers: int64 (K,), which prompt of its image it is.
            multimask: as in `predict`.
            result: arrays with the axis P, filled in place.
        """
        backbone, first = self.backbone, images[0]
        threshold = backbone.mask_threshold
        batch = self._batched(prompts, images, numbers)
        logits, iou = backbone.decode(
            self.features[first : images[-1] + 1], batch, multimask=multimask
        )
        low_res, scores = to_host(logits, iou)
        for image in np.unique(images):
            rows = np.flatnonzero(images == image)
            size = self.image_sizes[image]
            pixels = logits.shape[1] * max(size[0] * size[1], backbone.image_size**2)
            step = max(1, PIXELS_PER_CALL // pixels)
            for start in range(0, len(rows), step):
                few = rows[start : start + step]
                full = backbone.masks_at(logits[few[0] : few[-1] + 1], size)
                out = result.masks[image]
                (out[numbers[few]],) = to_host(full > threshold if out.dtype == bool else full)
            result.scores[image][numbers[rows]] = scores[rows]
            result.low_res_logits[image][numbers[rows]] = low_res[rows]

    def _predict_zoomed(
        self,
        prompts: Sequence[_ImagePrompts],
        images: np.ndarray,
        numbers: np.ndarray,
        multimask: bool,
        result: Predictions,
    ) -> None:
        """Decode some prompts, and again in a window around the best mask of each.

        Arguments as for `_predict_chunk`; the result has one mask per prompt.
        """
        backbone, first = self.backbone, images[0]
        batch = self._batched(prompts, images, numbers)
        features = self.features[first : images[-1] + 1]
        logits, iou = backbone.decode(features, batch, multimask=multimask)
        best = iou.argmax(dim=1)
        scores = iou.gather(1, best[:, None])[:, 0]
        full, windows, low_res = [], [], []
        for row, (image, number) in enumerate(zip(images, numbers, strict=True)):
            size = self.image_sizes[image]
            full.append(backbone.masks_at(logits[row, best[row]], size))
            (found,) = to_host(full[row] > backbone.mask_threshold)
            windows.append(Window.around(found, prompts[image].places(number)))
            low_res.append(low_res_logits(backbone, full[row], windows[row]))
        shown = [Window.whole(self.image_sizes[image]) for image in images]
        rows = [row for row, window in enumerate(windows) if window != shown[row]]
        if rows:
            views = [self.images[images[row]][windows[row].slices] for row in rows]
            own = [windows[row] for row in rows]
            masks = torch.stack([low_res[row] for row in rows])
            batch = self._batched(prompts, images[rows], numbers[rows], own)
            batch = replace(batch, masks=masks, has_mask=None, rows=None)
            closer, own_scores = backbone.decode(backbone.encode(views), batch)
            scores[torch.tensor(rows, device=backbone.device)] = own_scores[:, 0]
            for row, own_logits in zip(rows, closer[:, 0], strict=True):
                window = windows[row]
                full[row][window.slices] = backbone.masks_at(own_logits, window.size)
        for row, (image, number) in enumerate(zip(images, numbers, strict=True)):
            out = result.masks[image]
            mask = full[row] > backbone.mask_threshold if out.dtype == bool else full[row]
            low = low_res_logits(backbone, full[row], shown[row])
            out[number, 0], result.low_res_logits[image][number, 0] = to_host(mask, low)
            result.scores[image][number, 0] = float(scores[row])

    def _batched(
        self,
        prompts: Sequence[_ImagePrompts],
        images: np.ndarray,
        numbers: np.ndarray,
        windows: Sequence[Window] | None = None,
    ) -> Prompts:
        """Batch the ragged prompts of some images, in the model's input frame.

        Args:
            prompts: those of each image.
            images: int64 (K,), the image of each prompt.
            numbers: int64 (K,), which prompt of its image it is.
            windows: what the frame of each prompt shows; None: the whole image.
        """
        backbone, count = self.backbone, len(images)
        if windows is None:
            windows = [Window.whole(self.image_sizes[image]) for image in images]
        owners = [prompts[image] for image in images]
        most = max((0 if own.points is None else own.points.shape[1]) for own in owners)
        points = np.zeros((count, most, 2), np.float32)
        labels = np.full((count, most), NO_POINT, np.int64)
        boxes, has_box = np.zeros((count, 4), np.float32), np.zeros(count, bool)
        has_mask = np.array([own.masks is not None for own in owners])
        masks = np.zeros((count if has_mask.any() else 0, *backbone.mask_shape), np.float32)
        for row, (own, window, number) in enumerate(zip(owners, windows, numbers, strict=True)):
            if own.points is not None and own.labels is not None:
                used = own.points.shape[1]
                places = own.points[number] - window.start
                points[row, :used] = backbone.to_input_frame(places, window.size)
                labels[row, :used] = own.labels[number]
            if own.boxes is not None:
                corners = own.boxes[number].reshape(2, 2) - window.start
                boxes[row] = backbone.to_input_frame(corners, window.size).ravel()
                has_box[row] = True
            if own.masks is not None:
                masks[row] = own.masks[number]
        device = backbone.device
        return Prompts(
            points=to_device(points, device) if most else None,
            labels=to_device(labels, device) if most else None,
            boxes=to_device(boxes, device) if has_box.any() else None,
            has_box=to_device(has_box, device) if has_box.any() else None,
            masks=to_device(masks, device) if has_mask.any() else None,
            has_mask=to_device(has_mask, device) if has_mask.any() else None,
            rows=to_device(images - images[0], device),
        )

    def _checked(
        self, points: PerImage, labels: PerImage, boxes: PerImage, masks: PerImage
    ) -> list[_ImagePrompts]:
        """Check the arguments of `predict` and add missing axes."""
        given = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
        if points is None and boxes is None and masks is None:
            raise ValueError("predict needs points=, boxes= or masks=; all of them are None.")
        count = len(self.image_sizes)
        for name, arrays in given.items():
            if arrays is not None and (not hasattr(arrays, "__len__") or len(arrays) != count):
                got = f"length {len(arrays)}" if hasattr(arrays, "__len__") else f"{arrays!r}"
                raise ValueError(
                    f"{name} has {got} for {counted(count, 'image')}: pass a list with one array "
                    "(or None) per image."
                )
        hm, wm = self.backbone.mask_shape
        shapes = {"points": (None, 2), "labels": (None,), "boxes": (4,), "masks": (hm, wm)}
        checked = []
        for image in range(count):
            own, counts = _ImagePrompts(), {}
            for name, arrays in given.items():
                given_array = None if arrays is None else arrays[image]
                if given_array is None:
                    continue
                value = _finite(f"{name}[{image}]", given_array)
                single = value.ndim == len(shapes[name])
                value = value[None] if single else value
                expected = zip(value.shape[1:], shapes[name], strict=False)
                if value.ndim != 1 + len(shapes[name]) or any(
                    size is not None and got != size for got, size in expected
                ):
                    axes = ", ".join("N" if size is None else str(size) for size in shapes[name])
                    comma = "," if len(shapes[name]) == 1 else ""
                    raise ValueError(
                        f"{name}[{image}] must be (P, {axes}), or ({axes}{comma}) for one prompt, "
                        f"got {np.shape(given_array)}."
                    )
                setattr(own, name, value)
                own.single |= single
                counts[name] = len(value)
            if len(set(counts.values())) > 1:
                hint = " Choose one mask per prompt." if "masks" in counts else ""
                raise ValueError(
                    f"The prompts of image {image} differ in number: "
                    f"{', '.join(f'{number} {name}' for name, number in counts.items())}."
                    f"{hint}"
                )
            own.count = next(iter(counts.values()), 0)
            _check_labels(own, image)
            if own.boxes is not None and (own.boxes[:, 2:] < own.boxes[:, :2]).any():
                raise ValueError(
                    f"boxes[{image}] has a box that ends before it begins: pass (x0, y0, x1, y1), "
                    "not (x, y, width, height) as in COCO."
                )
            checked.append(own)
        return checked


def _finite(name: str, value: ArrayLike) -> np.ndarray:
    """Convert an argument to float64; raise `ValueError` unless it is numeric and finite."""
    try:
        given = np.asarray(value)
        if given.size and given.dtype.kind not in "biuf":
            raise TypeError(f"got {given.dtype}")
        array = given.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be an array of numbers ({error}). Prompts of one image with fewer points "
            f"than others are padded, with the label {NO_POINT}."
        ) from error
    if not (np.abs(array) < _LARGEST).all():
        raise ValueError(f"{name} has values that are NaN, infinite or above {_LARGEST:g}.")
    return array


def _check_labels(own: _ImagePrompts, image: int) -> None:
    """Raise `ValueError` unless points and labels correspond and no prompt is empty."""
    if (own.points is None) != (own.labels is None):
        there, missing = ("labels", "points") if own.points is None else ("points", "labels")
        raise ValueError(f"Image {image} has {there} but no {missing}: pass both.")
    if own.points is None or own.labels is None:
        return
    if own.points.shape[:2] != own.labels.shape:
        raise ValueError(
            f"Image {image} has points {own.points.shape} but labels {own.labels.shape}: "
            "one label per point."
        )
    unknown = ~np.isin(own.labels, _LABELS)
    if unknown.any():
        raise ValueError(unknown_label(f"labels[{image}]", own.labels[unknown][0]))
    own.labels = own.labels.astype(np.int64)
    if own.boxes is None and own.masks is None and (own.labels == NO_POINT).all(axis=1).any():
        raise ValueError(f"A prompt of image {image} has no point, no box and no mask.")
