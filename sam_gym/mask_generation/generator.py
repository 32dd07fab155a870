"""Everything mode: the masks of all that is in an image, from a grid of clicks.

What segment_anything's `SamAutomaticMaskGenerator` does, and of equal settings the same results,
for many images at once: the clicks of all images share decoder calls, masks are drawn only
of what is trusted, and what leaves a call is run lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from segment_anything.utils.amg import (
    generate_crop_boxes,
    is_box_near_crop_edge,
    remove_small_regions,
)
from torch import Tensor
from torchvision.ops import nms

from sam_gym.backbones.decode import MaskTokens, Prompts
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.spec import BackboneSpec, find_spec
from sam_gym.mask_generation.masks import OUTPUTS, Collected, Masks, run_lengths, to_counts
from sam_gym.simulation.clicks import relative_grid
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.transfer import to_device, to_host

#: Embedding cells of a decoder call, and pixels that masks are brought to at once, by device: as
#: many as are quick, on a CPU so few that they stay in its caches.
_CELLS = {"cpu": 2**14}
_MANY_CELLS = 2**20
_PIXELS = {"cpu": 2**20}
_MANY_PIXELS = 2**26

#: Images, or crops of images, whose embeddings are held at once.
_VIEWS = 8


@dataclass(frozen=True)
class GeneratorOptions:
    """Where everything mode clicks and which masks it keeps, as segment_anything names it."""

    grid: tuple[int, int] = (32, 32)
    """Clicks on an image: columns and rows of the point grid."""
    pred_iou_thresh: float | None = None
    """Keep masks whose IoU SAM predicts to be above this; 0 keeps all (default: the
    backbone's; 0.88 for SAM)."""
    stability_score_thresh: float | None = None
    """Keep masks of at least this stability; 0 keeps all (default: the backbone's; 0.95 for
    SAM)."""
    stability_score_offset: float = 1.0
    """Stability is the IoU of the masks at thresholds so far above and below SAM's own."""
    box_nms_thresh: float = 0.7
    """Of masks whose boxes have a greater IoU than this, keep the one with the best predicted
    IoU."""
    crop_n_layers: int = 0
    """Look at crops of the image too: layer i has 4**i of them."""
    crop_nms_thresh: float = 0.7
    """The same as box_nms_thresh, between crops: the mask of the smaller crop is kept."""
    crop_overlap_ratio: float = 512 / 1500
    """Overlap of the crops of the first layer, as a share of the image's shorter side."""
    crop_n_points_downscale_factor: int = 1
    """In crops of layer i, the grid is this to the power of i times as coarse."""
    min_mask_region_area: int = 0
    """Remove islands and fill holes of fewer pixels than this."""
    output: str = "binary_mask"
    """How a record holds its mask: binary_mask, uncompressed_rle, coco_rle."""
    points_per_batch: int | None = None
    """Clicks in a decoder call (left out: as many as are quickest on the device)."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        if self.output not in OUTPUTS:
            raise unknown_name("output", self.output, OUTPUTS)
        shares = "pred_iou_thresh stability_score_thresh box_nms_thresh crop_nms_thresh"
        for name in (*shares.split(), "crop_overlap_ratio"):
            if getattr(self, name) is not None:
                _require(self, name, 0.0, 1.0)
        _require(self, "stability_score_offset", 0.0)
        for name in ("crop_n_layers", "min_mask_region_area"):
            _require(self, name, 0)
        _require(self, "crop_n_points_downscale_factor", 1)
        if self.points_per_batch is not None:
            _require(self, "points_per_batch", 1)
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(
                f"grid must be two numbers of at least 1, columns and rows, got {self.grid}."
            )
        if min(self.layer_grid(self.crop_n_layers)) < 1:
            raise ValueError(
                f"A grid of {self.grid[0]} x {self.grid[1]} has no point left in crops of layer "
                f"{self.crop_n_layers}: take a finer grid, fewer crop_n_layers, or a smaller "
                f"crop_n_points_downscale_factor than {self.crop_n_points_downscale_factor}."
            )

    def thresholds(self, backbone: str) -> tuple[float, float]:
        """Return the predicted IoU and stability from which masks are kept.

        Thresholds that are None default to those of the backbone's specification.
        """
        suited = (find_spec(backbone) or BackboneSpec).thresholds
        own = (self.pred_iou_thresh, self.stability_score_thresh)
        least, stable = (usual if v is None else v for v, usual in zip(own, suited, strict=True))
        return least, stable

    def layer_grid(self, layer: int) -> tuple[int, int]:
        """Columns and rows of the grid in crops of a layer; layer 0 is the image."""
        columns, rows = self.grid
        coarser = self.crop_n_points_downscale_factor**layer
        return int(columns / coarser), int(rows / coarser)


def _require(options: GeneratorOptions, name: str, least: float, most: float | None = None) -> None:
    value = getattr(options, name)
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}.")


class _View(NamedTuple):
    """What SAM sees at once: an image or a crop of it.

    Attributes:
        pixels: uint8 (h, w, 3).
        box: (x0, y0, x1, y1) in the image.
        image_size: (H, W) of the image.
        points: float64 (P, 2), (x, y) in pixels of the view, where to click.
        last: whether it is the last one of its image.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    image_size: tuple[int, int]
    points: np.ndarray
    last: bool


class MaskGenerator:
    """Finds the masks of all that is in images.

    Args:
        backbone: the SAM.
        options: where to click and what to keep.

    Raises:
        ValueError: an option is wrong.
    """

    def __init__(self, backbone: Backbone, options: GeneratorOptions | None = None) -> None:
        self.backbone, self.options = backbone, options or GeneratorOptions()
        self.options.validate()
        #: Above which predicted IoU, and from which stability on, masks are kept.
        self.thresholds = self.options.thresholds(backbone.name)
        self.names: tuple[str, ...] = backbone.classes
        kind = backbone.device.type
        cells = backbone.embedding_shape[1] * backbone.embedding_shape[2]
        usual = max(1, _CELLS.get(kind, _MANY_CELLS) // cells)
        self._points_per_batch = self.options.points_per_batch or usual
        self._pixels = _PIXELS.get(kind, _MANY_PIXELS)

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """The masks of an image uint8 (H, W, 3), as records; see `Masks.records`."""
        return self.generate_all([image])[0]

    def generate_all(
        self, images: Sequence[np.ndarray], progress: bool = False
    ) -> list[list[dict[str, Any]]]:
        """The masks of each image, as records; see `generate_masks` and `Masks.records`."""
        every = self.generate_masks(images, progress)
        return [masks.records(self.options.output) for masks in every]

    def generate_masks(self, images: Sequence[np.ndarray], progress: bool = False) -> list[Masks]:
        """The masks of each image, as arrays.

        Args:
            images: uint8 (H, W, 3), RGB; sizes may differ.
            progress: show a bar.
        """
        if not progress:
            return list(self.stream(images))
        with ProgressBar() as bar:
            total = sum(len(view.points) for view in self._views(images))
            task = bar.add_task("clicking", total=total)
            return list(self.stream(images, lambda count: bar.advance(task, count)))

    def stream(
        self, images: Iterable[np.ndarray], clicked: Callable[[int], None] | None = None
    ) -> Iterator[Masks]:
        """The masks of one image after the other; few images are read ahead.

        Args:
            images: uint8 (H, W, 3), RGB; sizes may differ.
            clicked: told how many clicks were done, after each decoder call.
        """
        views, found = self._views(images), []
        while batch := list(islice(views, _VIEWS)):
            for view, masks in zip(batch, self._of_views(batch, clicked), strict=True):
                found.append(masks)
                if view.last:
                    yield self._of_image(found)
                    found = []

    def _views(self, images: Iterable[np.ndarray]) -> Iterator[_View]:
        options = self.options
        for image in images:
            size = image.shape[:2]
            boxes, layers = generate_crop_boxes(
                size, options.crop_n_layers, options.crop_overlap_ratio
            )
            for number, (box, layer) in enumerate(zip(boxes, layers, strict=True), start=1):
                x0, y0, x1, y1 = box
                points = relative_grid(*options.layer_grid(layer)) * (x1 - x0, y1 - y0)
                pixels = image[y0:y1, x0:x1]
                yield _View(pixels, (x0, y0, x1, y1), size, points, number == len(boxes))

    @torch.no_grad()
    def _of_views(
        self, views: Sequence[_View], clicked: Callable[[int], None] | None
    ) -> list[Masks]:
        """The masks of each view, in pixels of its image, without duplicates."""
        backbone = self.backbone
        features = self._encode(views)
        rows = np.repeat(np.arange(len(views)), [len(view.points) for view in views])
        frame = np.concatenate(
            [backbone.to_input_frame(view.points, view.pixels.shape[:2]) for view in views]
        )
        points = np.concatenate([view.points for view in views]).astype(np.float32)
        found = [Collected(view.pixels.shape[:2], self.names) for view in views]
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
                for masks in self._drawn(tokens, part, views[number], points[chunk]):
                    found[number].add(masks)
            if clicked is not None:
                clicked(len(own))
        return [
            self._of_view(view, collected.masks())
            for view, collected in zip(views, found, strict=True)
        ]

    def _encode(self, views: Sequence[_View]) -> ImageFeatures:
        pixels = [view.pixels for view in views]
        if self.backbone.device.type == "cpu":
            # A batch gains nothing there, and takes more memory.
            return ImageFeatures.cat([self.backbone.encode([one]) for one in pixels])
        return self.backbone.encode(pixels)

    def _drawn(
        self, tokens: MaskTokens, part: slice, view: _View, points: np.ndarray
    ) -> Iterator[Masks]:
        """What is kept of the decoded clicks on one view, in its own pixels.

        Args:
            tokens: all decoded clicks of a call.
            part: which of them are on the view.
            view: the view.
            points: float32 (P, 2), all clicks of the call.
        """
        backbone, least = self.backbone, self.thresholds[0]
        # The first token is the single mask, which is not for ambiguous prompts.
        iou = tokens.iou[part, 1:].float()
        prompts, which = (iou > (least if least > 0 else -torch.inf)).nonzero(as_tuple=True)
        quality = iou[prompts, which]
        prompts, which = prompts + part.start, which + 1
        probabilities = iou.new_zeros((len(prompts), 0))
        if self.names:
            logits = backbone.class_logits(tokens)
            probabilities = logits[prompts, which].float().softmax(dim=-1)
        height, width = view.pixels.shape[:2]
        at_once = max(1, self._pixels // max(height * width, backbone.image_size**2))
        for start in range(0, len(prompts), at_once):
            few = slice(start, start + at_once)
            with backbone.autocast():
                low = tokens.decode_mask_pairs(prompts[few], which[few]).float()
            keep, stability, boxes, counts = self._measured(low, view)
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
                crop_boxes=np.tile(np.array(view.box, np.float32), (len(box), 1)),
                probabilities=probability,
                names=self.names,
            )

    def _measured(
        self, low: Tensor, view: _View
    ) -> tuple[Tensor, Tensor, Tensor, list[np.ndarray]]:
        """Which masks to keep, int64 (K,), their stability, boxes int64 (K, 4) and run lengths.

        Args:
            low: mask logits (N, hm, wm).
            view: what the masks are of.
        """
        level, offset = self.backbone.mask_threshold, self.options.stability_score_offset
        height, width = view.pixels.shape[:2]
        # Columns are laid out one after the other, as run lengths go.
        logits = self.backbone.masks_at(low.transpose(1, 2), (width, height))
        # Comparisons that give floats are several times as quick on a CPU as those that give bools.
        above = torch.empty_like(logits)
        inner = torch.gt(logits, level + offset, out=above).sum(dim=(1, 2))
        outer = torch.gt(logits, level - offset, out=above).sum(dim=(1, 2))
        stability = inner / outer.clamp(min=1)
        # Where all are kept (at 0), so are those without a pixel.
        stable = (stability >= self.thresholds[1]).nonzero()[:, 0]
        logits = logits[stable]
        boxes = _boxes(logits.amax(dim=2) > level, logits.amax(dim=1) > level)
        whole = [0, 0, view.image_size[1], view.image_size[0]]
        kept = (~is_box_near_crop_edge(boxes, list(view.box), whole)).nonzero()[:, 0]
        counts = run_lengths(torch.gt(logits, level, out=torch.empty_like(logits))[kept].bool())
        keep = stable[kept]
        return keep, stability[keep], boxes[kept], counts

    def _of_view(self, view: _View, masks: Masks) -> Masks:
        """Without duplicates, best predicted IoU first, in pixels of the image."""
        keep = without_duplicates(masks.boxes, masks.predicted_iou, self.options.box_nms_thresh)
        return masks.take(keep).placed(view.box[:2], view.image_size)

    def _of_image(self, of_views: Sequence[Masks]) -> Masks:
        """The masks of all views of an image, without duplicates and small regions."""
        options, masks = self.options, Masks.joined(of_views)
        if len(of_views) > 1:
            x0, y0, x1, y1 = masks.crop_boxes.T
            scores = 1 / ((x1 - x0) * (y1 - y0))
            masks = masks.take(without_duplicates(masks.boxes, scores, options.crop_nms_thresh))
        if options.min_mask_region_area > 0:
            threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
            masks = without_small_regions(masks, options.min_mask_region_area, threshold)
        return masks


def without_small_regions(masks: Masks, least_area: int, nms_thresh: float) -> Masks:
    """Masks without small islands and holes; of duplicates that appear, what was whole stays.

    Args:
        masks: of one image.
        least_area: in pixels; smaller regions go.
        nms_thresh: IoU of two boxes from which on they are duplicates.
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
    """Non-maximum suppression: index int64 (K,) of the boxes to keep, best score first.

    Args:
        boxes: float32 (N, 4), (x0, y0, x1, y1).
        scores: float32 (N,).
        threshold: of two boxes with a greater IoU than this, the one of the better score is kept.
    """
    if threshold >= 1:  # no IoU is greater, and 60,000 boxes have 2 billion pairs
        return np.argsort(-scores, kind="stable")
    return nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).numpy()


def _boxes(columns: Tensor, rows: Tensor) -> Tensor:
    """Boxes int64 (N, 4) of masks: their first and last pixel, zeros where there is none.

    Args:
        columns: bool (N, W), which columns have a pixel of the mask.
        rows: bool (N, H), which rows have.
    """

    def ends(present: Tensor) -> tuple[Tensor, Tensor]:
        present = present.to(torch.uint8)
        last = present.shape[1] - 1 - present.flip(1).argmax(dim=1)
        return present.argmax(dim=1), last

    (x0, x1), (y0, y1) = ends(columns), ends(rows)
    return torch.stack([x0, y0, x1, y1], dim=1) * columns.any(dim=1, keepdim=True)
