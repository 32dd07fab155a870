"""Everything mode against segment_anything's own mask generator, record by record."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid, mask_to_rle_pytorch, rle_to_mask
from torchvision.ops import nms

from sam_gym.backbones import Backbone, Prompts, load_backbone
from sam_gym.backbones.adapters.class_head import ClassHead
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.routers import EmbeddingRouter, RoutedModel
from sam_gym.data import make_dataset
from sam_gym.mask_generation import generator
from sam_gym.mask_generation.generator import (
    GeneratorOptions,
    MaskGenerator,
    without_duplicates,
)
from sam_gym.mask_generation.masks import Masks, from_counts, run_lengths, to_counts
from sam_gym.simulation.clicks import relative_grid

#: Thresholds that let enough masks through.
LOOSE = {"pred_iou_thresh": 0.45, "stability_score_thresh": 0.4}
#: The same for the tiny SAM, whose weights are random: its masks are noise all over the image.
NOISE = {"pred_iou_thresh": 0.1, "stability_score_thresh": 0.5, "stability_score_offset": 0.3}
NOISE |= {"box_nms_thresh": 1.0}
GRID = 5


def make_images() -> list[np.ndarray]:
    """Scenes: wide, tall, and as large as the input of the tiny SAM."""
    scenes = make_dataset("scenes", "test", length=3, size=200)
    return [scenes[0].image[:150], scenes[1].image[:, :170], scenes[2].image[:64, :64]]


def options(**settings: Any) -> GeneratorOptions:
    return GeneratorOptions(**({"grid": (GRID, GRID)} | LOOSE | settings))


def reference(backbone: Backbone, image: np.ndarray, **settings: Any) -> list[dict[str, Any]]:
    """What segment_anything finds."""
    if "point_grids" not in settings:
        settings = {"points_per_side": GRID} | settings
    else:
        settings = {"points_per_side": None} | settings
    return SamAutomaticMaskGenerator(backbone.sam, **(LOOSE | settings)).generate(image)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0


def assert_same(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], stability: float = 0.01
) -> None:
    """The same records in the same order, but for rounding."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        np.testing.assert_allclose(own["bbox"], other["bbox"], atol=1)
        np.testing.assert_allclose(own["point_coords"], other["point_coords"], atol=1e-3)
        assert own["crop_box"] == other["crop_box"]
        assert own["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
        assert own["stability_score"] == pytest.approx(other["stability_score"], abs=stability)
        assert iou(own["segmentation"], other["segmentation"]) > 0.99
        assert abs(own["area"] - other["area"]) <= max(1, 0.01 * other["area"])
        assert type(own["area"]) is int and type(own["predicted_iou"]) is float


def test_a_name_is_loaded() -> None:
    assert MaskGenerator("micro-v0").backbone is load_backbone("micro-v0")


def test_thresholds_suit_the_backbone_unless_set() -> None:
    assert MaskGenerator("micro-v0").thresholds == (0.6, 0.8)
    suited = (0.5, 0.7)
    assert GeneratorOptions().thresholds(suited) == suited
    assert GeneratorOptions(pred_iou_thresh=0.0).thresholds(suited) == (0.0, 0.7)
    assert GeneratorOptions(stability_score_thresh=0.3).thresholds(suited) == (0.5, 0.3)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (1, 900)])
def test_crops_without_pixels_are_left_out(tiny: Backbone, size: tuple[int, int]) -> None:
    options = GeneratorOptions(
        grid=(4, 4), pred_iou_thresh=0.0, stability_score_thresh=0.0, crop_n_layers=2
    )
    generator = MaskGenerator(tiny, options)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if 0 in tiny.input_size(size):
        with pytest.raises(ValueError, match="no pixels left"):
            generator.generate(image)
        return
    for masks in generator.generate_all([image, image]):
        assert all(own["segmentation"].shape == size for own in masks)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crop_n_layers": 1},
        {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.4},
        {"min_mask_region_area": 60},
        {"crop_n_layers": 1, "min_mask_region_area": 30, "box_nms_thresh": 0.9},
        {"pred_iou_thresh": 0.0, "stability_score_offset": 3.0},
    ],
    ids=["plain", "crops", "coarser crops", "regions", "crops and regions", "all trusted"],
)
def test_records_are_those_of_segment_anything(shipped: Backbone, settings: dict[str, Any]) -> None:
    images = make_images()[: 1 if "crop_n_layers" in settings else 2]
    together = MaskGenerator(shipped, options(**settings)).generate_all(images)
    alone = [reference(shipped, image, **settings) for image in images]
    assert sum(map(len, alone)) > 8
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"crop_n_layers": 1}], ids=["plain", "crops"])
def test_records_of_large_images_are_those_of_segment_anything(
    shipped: Backbone, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stability is measured on smaller masks, and only stable ones are drawn, in windows."""
    (image,) = make_images()[:1]
    monkeypatch.setattr(generator, "_MEASURED", 150 * 100 if settings else 150 * 180)
    ours = MaskGenerator(shipped, options(**settings)).generate(image)
    theirs = reference(shipped, image, **settings)
    assert len(theirs) > 4
    assert_same(ours, theirs, stability=0.05)
    for own, other in zip(ours, theirs, strict=True):
        assert own["bbox"] == other["bbox"] and own["area"] == other["area"]


@pytest.mark.parametrize("size", [(150, 200), (200, 90)])
@pytest.mark.parametrize("name", ["tiny", "tiny_sam2"])
def test_a_mask_is_drawn_in_a_window_as_in_the_image(
    name: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(name)
    backbone = load_backbone(made, device="cpu") if isinstance(made, str) else made
    height, width = backbone.mask_shape
    noise = torch.randn(8, height, width, generator=torch.Generator().manual_seed(0)) - 2.5
    low = torch.stack([own.roll(number, 0) for number, own in enumerate(noise)])
    low[0] = -1.0  # empty
    low[1] = 1.0
    low[2], low[2, 0, 0] = -5.0, 9.0
    low[3], low[3, -1, -1] = -5.0, 9.0  # of a padded frame: where no image is
    full = backbone.masks_at(low, size) > backbone.mask_threshold
    window = (11, 7, 60, 83)
    part = backbone.masks_at(low, size, window)
    torch.testing.assert_close(part, backbone.masks_at(low, size)[..., 7:83, 11:60])
    drawing = MaskGenerator(backbone)
    for own, mask in zip(low, full.numpy(), strict=True):
        box, counts = drawing._enlarged(own, size)
        np.testing.assert_array_equal(from_counts(counts, size), mask)
        places = np.argwhere(mask)
        expected = (
            [*places.min(axis=0)[::-1], *places.max(axis=0)[::-1]] if len(places) else [0] * 4
        )
        assert box.tolist() == expected


def test_so_are_those_of_a_vit(tiny: Backbone) -> None:
    images = make_images()
    together = MaskGenerator(tiny, options(**NOISE)).generate_all(images)
    alone = [reference(tiny, image, **NOISE) for image in images]
    assert min(map(len, alone)) > 10
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs)


def test_small_regions_make_a_difference(shipped: Backbone) -> None:
    image = make_images()[0]
    plain, cleaned = (
        MaskGenerator(shipped, options(min_mask_region_area=area)).generate_masks([image])[0]
        for area in (0, 60)
    )
    assert sorted(plain.areas) != sorted(cleaned.areas)


def test_grids_may_be_rectangular(tiny: Backbone) -> None:
    np.testing.assert_array_equal(relative_grid(9, 9), build_point_grid(9))
    x, y = np.meshgrid([0.1, 0.3, 0.5, 0.7, 0.9], [1 / 6, 3 / 6, 5 / 6])
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    np.testing.assert_allclose(relative_grid(5, 3), points)
    image = make_images()[1]
    theirs = reference(tiny, image, point_grids=[points], **NOISE)
    assert len(theirs) > 3
    assert_same(MaskGenerator(tiny, options(grid=(5, 3), **NOISE)).generate(image), theirs)


def test_neither_company_nor_chunks_change_results(tiny: Backbone) -> None:
    images = make_images() * 4
    settings = NOISE | {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}
    together = MaskGenerator(tiny, options(**settings)).generate_all(images)
    few = MaskGenerator(tiny, options(**settings, points_per_batch=11))
    few._pixels = 1
    for image, expected in zip(images[:3], together[:3], strict=True):
        assert_same(few.generate(image), expected)
    for one, again in zip(together[:3], together[9:], strict=True):
        assert_same(again, one)


def test_clicks_are_counted(tiny: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    images, counted = make_images(), []
    generator = MaskGenerator(tiny, options(points_per_batch=40, **NOISE))
    every = list(generator.stream(iter(images), counted.append))
    assert len(every) == 3 and sum(counted) == 3 * GRID**2 and max(counted) == 40
    shown = generator.generate_masks(images, progress=True)
    assert [len(masks) for masks in shown] == [len(masks) for masks in every]
    assert "clicking" in capsys.readouterr().err


def test_outputs_hold_the_same_masks(tiny: Backbone) -> None:
    image = make_images()[0]
    binary, lengths, coded = (
        MaskGenerator(tiny, options(output=output, **NOISE)).generate(image)
        for output in ("binary_mask", "uncompressed_rle", "coco_rle")
    )
    theirs = reference(tiny, image, output_mode="uncompressed_rle", **NOISE)
    assert len(binary) == len(theirs) > 0
    for one, two, three, other in zip(binary, lengths, coded, theirs, strict=True):
        mask = one["segmentation"]
        assert mask.dtype == bool and mask.shape == image.shape[:2] and mask.sum() == one["area"]
        np.testing.assert_array_equal(rle_to_mask(two["segmentation"]), mask)
        np.testing.assert_array_equal(rle.decode(three["segmentation"]), mask)
        assert two["segmentation"].keys() == other["segmentation"].keys()
        assert type(two["segmentation"]["counts"][0]) is int
        assert isinstance(three["segmentation"]["counts"], str)


def test_arrays_say_what_records_say(tiny: Backbone) -> None:
    image, generator = make_images()[2], MaskGenerator(tiny, options(**NOISE))
    (masks,), records = generator.generate_masks([image]), generator.generate(image)
    assert len(masks) == len(records) > 2 and masks.size == image.shape[:2]
    np.testing.assert_array_equal(masks.binary(), [r["segmentation"] for r in records])
    np.testing.assert_array_equal(masks.areas, [r["area"] for r in records])
    for mask, box in zip(masks.binary(), masks.boxes, strict=True):
        y, x = mask.nonzero()
        np.testing.assert_array_equal(box, [x.min(), y.min(), x.max(), y.max()])
    for name, width in {"boxes": 4, "points": 2, "crop_boxes": 4, "probabilities": 0}.items():
        array = getattr(masks, name)
        assert array.dtype == np.float32 and array.shape == (len(masks), width)
    assert masks.predicted_iou.dtype == masks.stability.dtype == np.float32
    assert (masks.classes == -1).all() and not masks.class_scores.any()
    two = masks.take(np.array([1, 0]))
    np.testing.assert_array_equal(two.binary(), masks.binary()[[1, 0]])
    assert [r["area"] for r in two.records()] == [r["area"] for r in records[1::-1]]


@pytest.mark.parametrize("layers", [0, 1])
def test_no_mask_is_no_error(tiny: Backbone, layers: int) -> None:
    strict = options(pred_iou_thresh=1.0, crop_n_layers=layers, min_mask_region_area=5)
    masks = MaskGenerator(tiny, strict).generate_masks(make_images())
    assert [len(own) for own in masks] == [0, 0, 0]
    assert masks[1].binary().shape == (0, *make_images()[1].shape[:2])
    for output in ("binary_mask", "coco_rle"):
        assert masks[0].records(output) == []
    assert MaskGenerator(tiny, strict).generate_all([]) == []


def test_at_one_no_box_is_a_duplicate_of_another() -> None:
    rng = np.random.default_rng(0)
    boxes = rng.integers(0, 20, (500, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:50] = 0
    scores = (rng.integers(0, 50, 500) / 50).astype(np.float32)
    want = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 1.0).numpy()
    assert len(want) == 500 and np.array_equal(without_duplicates(boxes, scores, 1.0), want)


def test_run_lengths_are_those_of_segment_anything() -> None:
    masks = torch.rand(6, 5, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    masks[0], masks[1], masks[2, 0, 0], masks[3, 0, 0] = False, True, True, False
    expected = [own["counts"] for own in mask_to_rle_pytorch(masks)]
    ours = run_lengths(masks.transpose(1, 2).contiguous())
    assert [own.tolist() for own in ours] == expected
    for mask, counts in zip(masks.numpy(), ours, strict=True):
        np.testing.assert_array_equal(from_counts(counts, (5, 9)), mask)
        assert to_counts(mask).tolist() == counts.tolist()


class Judge(Model):
    """A model that tells by the mask token which class it is, as surely as its number says."""

    @property
    def classes(self) -> tuple[str, ...]:
        return ("single", "whole", "part", "detail")

    def class_logits(self, tokens: Any) -> torch.Tensor:
        return torch.diag(torch.arange(4.0)).expand(len(tokens.iou), 4, 4)


def test_a_model_with_classes_names_them(shipped: Backbone) -> None:
    backbone = shipped.with_model(Judge(shipped.sam))
    masks = MaskGenerator(backbone, options()).generate_masks(make_images()[:1])[0]
    plain = MaskGenerator(shipped, options()).generate(make_images()[0])
    assert masks.names == ("single", "whole", "part", "detail")
    assert set(masks.classes) <= {1, 2, 3} and len(set(masks.classes)) > 1
    expected = torch.diag(torch.arange(4.0)).softmax(dim=1).amax(dim=1)[masks.classes]
    np.testing.assert_allclose(masks.class_scores, expected)
    np.testing.assert_allclose(masks.probabilities.sum(axis=1), 1.0, rtol=1e-6)
    for record, without, kind in zip(masks.records(), plain, masks.classes, strict=True):
        assert record.pop("category") == masks.names[kind]
        assert 0.4 < record.pop("category_score") < 1.0
        np.testing.assert_array_equal(record.pop("segmentation"), without.pop("segmentation"))
        assert record == without


def test_a_class_head_reads_the_token_of_its_mask(tiny: Backbone) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = ClassHead(tiny.embedding_shape[0], ["disc", "square"])
    backbone = tiny.with_model(Model(tiny.sam, head=head))
    records = MaskGenerator(backbone, options(**NOISE)).generate(make_images()[0])
    assert len(records) > 2
    assert all(r["category"] in ("disc", "square") and r["category_score"] >= 0.5 for r in records)


def test_a_model_that_routes_works_alike(tiny: Backbone) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        selector = EmbeddingRouter(tiny.embedding_shape[0], 2)
    routed = tiny.with_model(RoutedModel(tiny.sam, [tiny.sam, tiny.sam], selector, "embedding"))
    ours = MaskGenerator(routed, options(**NOISE)).generate_all(make_images())
    plain = MaskGenerator(tiny, options(**NOISE)).generate_all(make_images())
    for one, other in zip(ours, plain, strict=True):
        assert_same(one, other)


def test_single_masks_are_those_of_a_whole_drawing(hq_micro: str) -> None:
    backbone = load_backbone(hq_micro, device="cpu")
    points, rows = torch.rand(5, 1, 2) * 255, torch.tensor([4, 0, 0, 2])
    prompts = Prompts(points, torch.ones((5, 1), dtype=torch.int64), rows=torch.arange(5) // 3)
    with torch.no_grad():
        tokens = backbone.model.decode(backbone.encode(make_images()[:2]), prompts)
        every = tokens.decode_masks()
        assert tokens.refinement is not None and tokens.refinement.any()
        which = torch.tensor([0, 3, 1, 2])
        torch.testing.assert_close(tokens.decode_mask_pairs(rows, which), every[rows, which])
        none = torch.zeros(0, dtype=torch.int64)
        assert tokens.decode_mask_pairs(none, none).shape == (0, *backbone.mask_shape)
    loose = options(pred_iou_thresh=0.0, stability_score_thresh=0.0)
    assert len(MaskGenerator(backbone, loose).generate(make_images()[0])) > 0


def test_low_precision_finds_much_the_same(build_tiny: Callable[[], Sam], tiny: Backbone) -> None:
    low = Backbone("tiny", build_tiny(), torch.device("cpu"), torch.bfloat16)
    image = make_images()[0]
    rough, exact = (
        MaskGenerator(b, options(**NOISE)).generate_masks([image])[0].binary() for b in (low, tiny)
    )
    best = [max(iou(mask, other) for other in rough) for mask in exact]
    assert np.median(best) > 0.9


def test_nothing_of_the_backbone_changes(tiny: Backbone) -> None:
    before, state = tiny.identity, torch.random.get_rng_state()
    MaskGenerator(tiny, options(**NOISE)).generate(make_images()[0])
    assert Backbone("tiny", tiny.sam, tiny.device, tiny.dtype).identity == before
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output": "coco-rle"}, "Unknown output 'coco-rle'. Did you mean 'coco_rle'"),
        ({"pred_iou_thresh": 1.2}, "pred_iou_thresh must be from 0 to 1, got 1.2"),
        ({"box_nms_thresh": float("nan")}, "box_nms_thresh must be a finite number, got nan"),
        ({"stability_score_offset": -1.0}, "stability_score_offset must be at least 0"),
        ({"crop_n_layers": -1}, "crop_n_layers must be from 0 to 6, got -1"),
        ({"crop_n_layers": 40}, "crop_n_layers must be from 0 to 6, got 40"),
        ({"crop_n_points_downscale_factor": 0}, "downscale_factor must be at least 1, got 0"),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1, got 0"),
        ({"grid": (4, 0)}, "grid must be at least 1, got 0"),
        (
            {"grid": (9, 3), "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
            "A grid of 9 x 3 has no points in crops of layer 2",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(
    tiny: Backbone, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MaskGenerator(tiny, replace(GeneratorOptions(), **settings))
    assert isinstance(Masks.none((2, 3)).coco(), list)
    with pytest.raises(ValueError, match="Did you mean 'binary_mask'"):
        Masks.none((2, 3)).records("binary")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (9, 9)), r"a uint8 array \(H, W, 3\), got Image"),
        ("photo.jpg", "got str"),
        (np.zeros((9, 9), np.uint8), r"got uint8 \(9, 9\)"),
        (np.full((9, 9, 3), np.nan, np.float32), r"got float32 \(9, 9, 3\)"),
    ],
)
def test_what_is_no_rgb_image_is_refused(tiny: Backbone, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskGenerator(tiny).generate(image)
