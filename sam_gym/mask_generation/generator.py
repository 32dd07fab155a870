"""Everything mode: all masks of an image from a grid of clicks.

Gives the results of segment_anything's `SamAutomaticMaskGenerator` with the same options, for many
images at once. Clicks of all images share decoder calls, masks are filtered by predicted IoU before
they are upsampled, and leave a call as run lengths.

In images and crops of more than a megapixel, the stability of masks is measured at a megapixel, so
that only stable ones are drawn in full, each in a window around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from segment_anything.utils.amg import (
    generate_crop_boxes,
    is_box_near_crop_edge,
    remove_small_regions,
)
from torch import Tensor
from torchvision.ops import nms

from sam_gym.backbones.decode import MaskTokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.loading import load_backbone
from sam_gym.backbones.prompts import Prompts
from sam_gym.backbones.protocols import BackboneService
from sam_gym.backbones.service import check_rgb
from sam_gym.backbones.spec import suited_thresholds
from sam_gym.mask_generation.masks import Collected, Masks, placed_counts, run_lengths, to_counts
from sam_gym.simulation.clicks import relative_grid
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.settings import Count, Fraction, Natural, NotNegative, check_settings, whole
from sam_gym.utils.transfer import to_device, to_host

#: Embedding cells per decoder call, and pixels of masks upsampled at once, by type of device. On a
#: CPU they stay in its caches.
_CELLS = {"cpu": 2**14}
_MANY_CELLS = 2**20
_PIXELS = {"cpu": 2**20}
_MANY_PIXELS = 2**26
#: Pixels up to which masks are measured at the size of the image; larger ones at this size.
_MEASURED = 2**20
#: Cells around those above a threshold that interpolation may lift above it; one would do but for
#: the two steps from low-res masks to the frame and from there to the image.
_MARGIN = 2

#: Crops (or whole images) whose embeddings are held at once.
CROPS_PER_CALL = 8


@documented
@dataclass(frozen=True)
class GeneratorOptions:
    """Options of everything mode, named as in segment_anything."""

    grid: tuple[Count, Count] = (32, 32)
    """Columns and rows of the point grid."""
    pred_iou_thresh: Fraction | None = None
    """Minimum predicted IoU (exclusive); 0 keeps all (None: the backbone's; SAM: 0.88)."""
    stability_score_thresh: Fraction | None = None
    """Minimum stability score; 0 keeps all (None: the backbone's; SAM: 0.95)."""
    stability_score_offset: NotNegative = 1.0
    """Stability is the IoU of the masks at thresholds this far above and below SAM's."""
    box_nms_thresh: Fraction = 0.7
    """Box IoU above which the mask of the lower predicted IoU is a duplicate."""
    crop_n_layers: Annotated[int, whole(0, 6)] = 0
    """Layers of crops; layer i has 4**i crops."""
    crop_nms_thresh: Fraction = 0.7
    """Box IoU above which masks of two crops are duplicates; that of the smaller crop stays."""
    crop_overlap_ratio: Fraction = 512 / 1500
    """Overlap of the crops of layer 1, as a fraction of the image's shorter side."""
    crop_n_points_downscale_factor: Count = 1
    """The grid in crops of layer i is coarser by this factor to the power of i."""
    min_mask_region_area: Natural = 0
    """Remove islands and fill holes of fewer pixels than this."""
    output: Literal["binary_mask", "uncompressed_rle", "coco_rle"] = "binary_mask"
    """Format of the masks."""
    points_per_batch: Count | None = None
    """Clicks per decoder call (None: chosen by device)."""

    def validate(self) -> None:
        """Raise `ValueError` if an option is out of range."""
        check_settings(self)
        if min(self.layer_grid(self.crop_n_layers)) < 1:
            raise ValueError(
                f"A grid of {self.grid[0]} x {self.grid[1]} has no points in crops of layer "
                f"{self.crop_n_layers}: take a finer grid, fewer crop_n_layers, or a smaller "
                f"crop_n_points_downscale_factor than {self.crop_n_points_downscale_factor}."
            )

    def thresholds(self, suited: tuple[float, float]) -> tuple[float, float]:
        """Return the predicted IoU and stability from which masks are kept.

        Args:
            suited: those of the backbone, for options that are None.
        """
        own = (self.pred_iou_thresh, self.stability_score_thresh)
        least, stable = (usual if v is None else v for v, usual in zip(own, suited, strict=True))
        return least, stable

    def layer_grid(self, layer: int) -> tuple[int, int]:
        """Return columns and rows of the grid in crops of a layer; layer 0 is the image."""
        columns, rows = self.grid
        coarser = self.crop_n_points_downscale_factor**layer
        return int(columns / coarser), int(rows / coarser)


class _Crop(NamedTuple):
    """An image or a crop of it, as the encoder sees it.

    Attributes:
        pixels: uint8 (h, w, 3).
        box: (x0, y0, x1, y1) in the image.
        image_size: (H, W) of the image.
        points: float64 (P, 2), clicks (x, y) in pixels of the crop.
        last: whether it is the last crop of its image.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    image_size: tuple[int, int]
    points: np.ndarray
    last: bool


class MaskGenerator:
    """Generates all masks of images.

    Args:
        backbone: the SAM, a registered name (see `load_backbone`) or a backbone.
        options: the grid, thresholds and crops.

    Raises:
        ValueError: an option is wrong, or whatever `load_backbone` raises.
    """

    def __init__(
        self, backbone: str | BackboneService, options: GeneratorOptions | None = None
    ) -> None:
        self.options = options or GeneratorOptions()
        self.options.validate()
        if isinstance(backbone, str):
            backbone = load_backbone(backbone)
        self.backbone = backbone
        #: Minimum predicted IoU (exclusive) and minimum stability.
        self.thresholds = self.options.thresholds(suited_thresholds(backbone))
        self.names: tuple[str, ...] = backbone.classes
        kind = backbone.device.type
        cells = backbone.embedding_shape[1] * backbone.embedding_shape[2]
        usual = max(1, _CELLS.get(kind, _MANY_CELLS) // cells)
        self._points_per_batch = self.options.points_per_batch or usual
        self._pixels = _PIXELS.get(kind, _MANY_PIXELS)

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Return the masks of an image uint8 (H, W, 3) as records; see `Masks.records`."""
        return self.generate_all([image])[0]

    def generate_all(
        self, images: Sequence[np.ndarray], progress: bool = False
    ) -> list[list[dict[str, Any]]]:
        """Return the masks of each image as records; see `generate_masks` and `Masks.records`."""
        every = self.generate_masks(images, progress)
        return [masks.records(self.options.output) for masks in every]

    def generate_masks(self, images: Sequence[np.ndarray], progress: bool = False) -> list[Masks]:
        """Return the masks of each image as arrays.

        Args:
            images: uint8 (H, W, 3), RGB; sizes may differ.
            progress: show a progress bar.
        """
        if not progress:
            return list(self.stream(images))
        with ProgressBar() as bar:
            total = sum(len(crop.points) for crop in self._crops(images))
            task = bar.add_task("clicking", total=total)
            return list(self.stream(images, lambda count: bar.advance(task, count)))

    def stream(
        self, images: Iterable[np.ndarray], clicked: Callable[[int], None] | None = None
    ) -> Iterator[Masks]:
        """Yield the masks of each image; reads few images ahead.

        Args:
            images: uint8 (H, W, 3), RGB; sizes may differ.
            clicked: called with the number of clicks after each decoder call.
        """
        crops, found = self._crops(images), []
        while batch := list(islice(crops, CROPS_PER_CALL)):
            for crop, masks in zip(batch, self._of_crops(batch, clicked), strict=True):
                found.append(masks)
                if crop.last:
                    yield self._of_image(found)
                    found = []

    def _crops(self, images: Iterable[np.ndarray]) -> Iterator[_Crop]:
        options = self.options
        for image in images:
            check_rgb(image)
            size = image.shape[:2]
            boxes, layers = generate_crop_boxes(
                size, options.crop_n_layers, options.crop_overlap_ratio
            )
            placed = list(zip(boxes, layers, strict=True))
            # Crops of a small or thin image may have no pixels.
            placed = placed[:1] + [own for own in placed[1:] if self._has_pixels(own[0])]
            for number, ((x0, y0, x1, y1), layer) in enumerate(placed, start=1):
                points = relative_grid(*options.layer_grid(layer)) * (x1 - x0, y1 - y0)
                pixels = image[y0:y1, x0:x1]
                yield _Crop(pixels, (x0, y0, x1, y1), size, points, number == len(placed))

    def _has_pixels(self, box: Sequence[int]) -> bool:
        """Whether a crop (x0, y0, x1, y1) keeps pixels in the input frame."""
        size = box[3] - box[1], box[2] - box[0]
        return min(size) > 0 and min(self.backbone.input_size(size)) > 0

    @torch.no_grad()
    def _of_crops(
        self, crops: Sequence[_Crop], clicked: Callable[[int], None] | None
    ) -> list[Masks]:
        """Return the masks of each crop, in pixels of its image, without duplicates."""
        backbone = self.backbone
        features = self._encode(crops)
        rows = np.repeat(np.arange(len(crops)), [len(crop.points) for crop in crops])
        frame = np.concatenate(
            [backbone.to_input_frame(crop.points, crop.pixels.shape[:2]) for crop in crops]
        )
        points = np.concatenate([crop.points for crop in crops]).astype(np.float32)
        found = [Collected(crop.pixels.shape[:2], self.names) for crop in crops]
        for start in range(0, len(rows), self._points_per_batch):
            chunk = slice(start, start + self._points_per_batch)
            own, first = rows[chunk], rows[start]
            prompts = Prompts(
                points=to_device(frame[chunk, None], backbone.device),
                labels=torch.ones((len(own), 1), dtype=torch.int64, device=backbone.device),
                rows=to_device(own - first, backbone.device),
            )
            tokens = backbone.decode_tokens(features[first : own[-1] + 1], prompts)
            for number in range(first, own[-1] + 1):
                part = slice(*np.searchsorted(own, [number, number + 1]).tolist())
                for masks in self._drawn(tokens, part, crops[number], points[chunk]):
                    found[number].add(masks)
            if clicked is not None:
                clicked(len(own))
        return [
            self._of_crop(crop, collected.masks())
            for crop, collected in zip(crops, found, strict=True)
        ]

    def _encode(self, crops: Sequence[_Crop]) -> ImageFeatures:
        pixels = [crop.pixels for crop in crops]
        if self.backbone.device.type == "cpu":
            # Batches are not faster on a CPU and take more memory.
            return ImageFeatures.cat([self.backbone.encode([one]) for one in pixels])
        return self.backbone.encode(pixels)

    def _drawn(
        self, tokens: MaskTokens, part: slice, crop: _Crop, points: np.ndarray
    ) -> Iterator[Masks]:
        """Yield the masks kept for the decoded clicks on one crop, in pixels of the crop.

        Args:
            tokens: all decoded clicks of a call.
            part: those on the crop.
            crop: the crop.
            points: float32 (P, 2), all clicks of the call.
        """
        backbone, least = self.backbone, self.thresholds[0]
        # Token 0 is the single mask, for unambiguous prompts.
        iou = tokens.iou[part, 1:].float()
        prompts, which = (iou > (least if least > 0 else -torch.inf)).nonzero(as_tuple=True)
        quality = iou[prompts, which]
        prompts, which = prompts + part.start, which + 1
        probabilities = iou.new_zeros((len(prompts), 0))
        if self.names:
            logits = backbone.class_logits(tokens)
            probabilities = logits[prompts, which].float().softmax(dim=-1)
        height, width = crop.pixels.shape[:2]
        measured = math.prod(_measured_size((height, width)))
        at_once = max(1, self._pixels // max(measured, backbone.image_size**2))
        for start in range(0, len(prompts), at_once):
            few = slice(start, start + at_once)
            with backbone.autocast():
                low = tokens.decode_mask_pairs(prompts[few], which[few]).float()
            keep, stability, boxes, counts = self._measured(low, crop)
            predicted, prompt, probability, stable, box = to_host(
                quality[few][keep], prompts[few][keep], probabilities[few][keep], stability, boxes
            )
            yield Masks(
                size=(height, width),
                counts=counts,
                boxes=box.astype(np.float32),
                predicted_iou=predicted,
                stability=stable,
                points=points[prompt],
                crop_boxes=np.tile(np.array(crop.box, np.float32), (len(box), 1)),
                probabilities=probability,
                names=self.names,
            )

    def _measured(
        self, low: Tensor, crop: _Crop
    ) -> tuple[Tensor, Tensor, Tensor, list[np.ndarray]]:
        """Return index int64 (K,), stability, boxes int64 (K, 4) and run lengths of masks to keep.

        Args:
            low: mask logits (N, hm, wm).
            crop: the crop of the masks.
        """
        level, offset = self.backbone.mask_threshold, self.options.stability_score_offset
        size = crop.pixels.shape[:2]
        height, width = _measured_size(size)
        # Transposed: run lengths go down the columns.
        logits = self.backbone.masks_at(low.transpose(1, 2), (width, height))
        # Comparisons with float output are several times faster on a CPU than with bool output.
        above = torch.empty_like(logits)
        inner = torch.gt(logits, level + offset, out=above).sum(dim=(1, 2))
        outer = torch.gt(logits, level - offset, out=above).sum(dim=(1, 2))
        stability = inner / outer.clamp(min=1)
        # A threshold of 0 keeps empty masks too.
        stable = (stability >= self.thresholds[1]).nonzero()[:, 0]
        whole = [0, 0, crop.image_size[1], crop.image_size[0]]

        def inside(boxes: Tensor) -> Tensor:
            return (~is_box_near_crop_edge(boxes, list(crop.box), whole)).nonzero()[:, 0]

        if (height, width) == size:
            logits = logits[stable]
            boxes = _boxes(logits.amax(dim=2) > level, logits.amax(dim=1) > level)
            kept = inside(boxes)
            counts = run_lengths(torch.gt(logits, level, out=torch.empty_like(logits))[kept].bool())
        else:
            every = [self._enlarged(own, size) for own in low[stable]]
            boxes = torch.stack([box for box, _ in every]) if every else stable.new_zeros((0, 4))
            kept = inside(boxes)
            counts = [every[number][1] for number in kept.tolist()]
        keep = stable[kept]
        return keep, stability[keep], boxes[kept], counts

    def _enlarged(self, low: Tensor, size: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
        """Return the box int64 (4,) and the run lengths of a mask in an image.

        Args:
            low: its logits (hm, wm).
            size: (H, W) of the image.
        """
        backbone, level = self.backbone, self.backbone.mask_threshold
        (above,) = to_host(low > level)
        places = [np.flatnonzero(above.any(axis=axis)) for axis in (0, 1)]
        ends = []
        # Columns, then rows: pixels of the image per cell, and the window.
        for cells, length, shown, own in zip(
            low.shape[::-1], size[::-1], backbone.input_size(size)[::-1], places, strict=True
        ):
            each = backbone.image_size / cells * length / shown
            first, last = (own[0], own[-1]) if len(own) else (0, -1)
            start = max(0, math.floor((first - _MARGIN) * each))
            ends.append((start, min(length, math.ceil((last + 1 + _MARGIN) * each))))
        (x0, x1), (y0, y1) = ends
        if not len(places[0]) or x0 >= x1 or y0 >= y1:
            return torch.zeros(4, dtype=torch.int64, device=low.device), np.array(
                [math.prod(size)], np.int32
            )
        # Transposed: run lengths go down the columns.
        logits = backbone.masks_at(low.T, size[::-1], (y0, x0, y1, x1))
        columns = torch.gt(logits, level, out=torch.empty_like(logits)).bool()[None]
        box = _boxes(columns.any(dim=2), columns.any(dim=1))[0]
        box += torch.tensor([x0, y0, x0, y0], device=box.device) * columns.any()
        (counts,) = run_lengths(columns)
        return box, placed_counts(counts, (y1 - y0, x1 - x0), (x0, y0), size)

    def _of_crop(self, crop: _Crop, masks: Masks) -> Masks:
        """Remove duplicates, sort by predicted IoU, and convert to pixels of the image."""
        keep = without_duplicates(masks.boxes, masks.predicted_iou, self.options.box_nms_thresh)
        return masks.take(keep).placed(crop.box[:2], crop.image_size)

    def _of_image(self, of_crops: Sequence[Masks]) -> Masks:
        """Join the masks of all crops of an image, without duplicates and small regions."""
        options, masks = self.options, Masks.joined(of_crops)
        if len(of_crops) > 1:
            x0, y0, x1, y1 = masks.crop_boxes.T
            scores = 1 / ((x1 - x0) * (y1 - y0))
            masks = masks.take(without_duplicates(masks.boxes, scores, options.crop_nms_thresh))
        if options.min_mask_region_area > 0:
            threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
            masks = without_small_regions(masks, options.min_mask_region_area, threshold)
        return masks


def _measured_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) at which masks of an image of (height, width) are measured."""
    pixels = math.prod(size)
    if pixels <= _MEASURED:
        return size
    scale = math.sqrt(_MEASURED / pixels)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def without_small_regions(masks: Masks, least_area: int, nms_thresh: float) -> Masks:
    """Remove small islands and holes, then duplicates; unchanged masks take precedence.

    Args:
        masks: of one image.
        least_area: minimum area of a region, in pixels.
        nms_thresh: box IoU above which masks are duplicates.
    """
    counts, boxes, whole = list(masks.counts), masks.boxes.copy(), np.ones(len(masks), np.float32)
    for index in range(len(masks)):
        mask, filled = remove_small_regions(masks.mask(index), least_area, mode="holes")
        mask, cut = remove_small_regions(mask, least_area, mode="islands")
        if filled or cut:
            whole[index] = 0.0
            counts[index] = to_counts(mask)
            columns, rows = (torch.from_numpy(mask.any(axis=axis))[None] for axis in (0, 1))
            boxes[index] = _boxes(columns, rows)[0].numpy()
    keep = without_duplicates(boxes, whole, nms_thresh)
    return replace(masks, counts=counts, boxes=boxes).take(keep)


def without_duplicates(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Return the index int64 (K,) of boxes that survive NMS, best score first.

    Args:
        boxes: float32 (N, 4), (x0, y0, x1, y1).
        scores: float32 (N,).
        threshold: IoU above which the box of the lower score is removed.
    """
    if threshold >= 1:  # nothing to suppress; 60,000 boxes have 2 billion pairs
        return np.argsort(-scores, kind="stable")
    return nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).numpy()


def _boxes(columns: Tensor, rows: Tensor) -> Tensor:
    """Return boxes int64 (N, 4) of masks, first and last pixel; zeros for empty masks.

    Args:
        columns: bool (N, W), columns with a pixel of the mask.
        rows: bool (N, H), rows with a pixel of the mask.
    """

    def ends(present: Tensor) -> tuple[Tensor, Tensor]:
        present = present.to(torch.uint8)
        last = present.shape[1] - 1 - present.flip(1).argmax(dim=1)
        return present.argmax(dim=1), last

    (x0, x1), (y0, y1) = ends(columns), ends(rows)
    return torch.stack([x0, y0, x1, y1], dim=1) * columns.any(dim=1, keepdim=True)
