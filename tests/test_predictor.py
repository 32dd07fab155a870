"""`Predictor` against segment_anything's own, on images of four shapes."""

from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from sam_gym import Predictor
from sam_gym.backbones import NO_POINT, Backbone
from sam_gym.predictor import Predictions

SHAPES = [(64, 64), (40, 72), (130, 90), (31, 20)]
#: One of each architecture.
SAMS = pytest.mark.parametrize("backbone", ["tiny", "shipped"], indirect=True)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def make_prompts(backbone: Backbone, images: list[np.ndarray]) -> dict[str, list[Any]]:
    """Points, points and boxes, boxes, and masks with points; another number for each image."""
    rng = np.random.default_rng(1)

    def points(image: int, *shape: int) -> np.ndarray:
        height, width = images[image].shape[:2]
        return rng.uniform(0, [width - 1, height - 1], (*shape, 2))

    def boxes(image: int, count: int) -> np.ndarray:
        corners = points(image, count, 2)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def labels(*shape: int) -> np.ndarray:
        return rng.integers(0, 2, shape)

    return {
        "points": [points(0, 3, 1), points(1, 2, 4), None, points(3, 1, 2)],
        "labels": [labels(3, 1), labels(2, 4), None, labels(1, 2)],
        "boxes": [None, boxes(1, 2), boxes(2, 5), None],
        "masks": [None, None, None, rng.normal(0, 8, (1, *backbone.mask_shape))],
    }


def expected(
    backbone: Backbone, image: np.ndarray, prompt: dict[str, Any], **kwargs: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `SamPredictor` gives for a single prompt."""
    predictor = SamPredictor(backbone.sam)
    predictor.set_image(image)
    mask = prompt.get("masks")
    return predictor.predict(
        prompt.get("points"),
        prompt.get("labels"),
        prompt.get("boxes"),
        None if mask is None else mask[None],
        **kwargs,
    )


def prompts_of(prompts: dict[str, list[Any]], image: int) -> list[dict[str, Any]]:
    own = {name: arrays[image] for name, arrays in prompts.items() if arrays[image] is not None}
    count = len(next(iter(own.values())))
    return [{name: array[number] for name, array in own.items()} for number in range(count)]


def assert_same(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-4 * theirs[2].std())


@SAMS
@pytest.mark.parametrize("multimask", [True, False], ids=["three masks", "one mask"])
def test_ragged_batch_equals_the_original_one_by_one(
    backbone: Backbone, images: list[np.ndarray], multimask: bool
) -> None:
    predictor = Predictor(backbone)
    predictor.set_images(images)
    prompts = make_prompts(backbone, images)
    result = predictor.predict(**prompts, multimask=multimask)
    assert isinstance(result, Predictions)
    assert [masks.shape[0] for masks in result.masks] == [3, 2, 5, 1]
    for i, image in enumerate(images):
        for number, prompt in enumerate(prompts_of(prompts, i)):
            ours = tuple(arrays[i][number] for arrays in result)
            theirs = expected(backbone, image, prompt, multimask_output=multimask)
            assert_same(ours, theirs)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_single_prompt_has_the_axes_and_defaults_of_the_original(
    tiny: Backbone, images: list[np.ndarray], number: int
) -> None:
    image = images[number]
    predictor = Predictor(tiny)
    predictor.set_images([image])
    mask = np.random.default_rng(2).normal(0, 8, tiny.mask_shape)
    for prompt in (
        {"points": np.array([[5, 9], [12, 20]]), "labels": np.array([1, 0])},
        {"boxes": np.array([3.0, 4.0, 15.0, 22.0])},
        {"points": np.array([[5, 9]]), "labels": np.array([1]), "masks": mask},
    ):
        result = predictor.predict(**{name: [value] for name, value in prompt.items()})
        theirs = expected(tiny, image, prompt)
        assert_same(tuple(arrays[0] for arrays in result), theirs)
        assert result.masks[0].shape == (3, *image.shape[:2])
        # `SamPredictor` takes a mask as (1, hm, wm).
        if "masks" in prompt:
            again = predictor.predict(points=[prompt["points"]], labels=[[1]], masks=[mask[None]])
            assert_same(tuple(arrays[0] for arrays in again), theirs)


def test_padding_label_is_the_token_of_the_original(
    tiny: Backbone, images: list[np.ndarray]
) -> None:
    predictor = Predictor(tiny)
    predictor.set_images(images[1:2])
    points = np.array([[5.0, 9.0], [30.0, 20.0], [0.0, 0.0]])
    padded = predictor.predict(points=[points], labels=[[1, 0, -1]])
    prompt = {"points": points, "labels": np.array([1, 0, -1])}
    assert_same(tuple(arrays[0] for arrays in padded), expected(tiny, images[1], prompt))
    # Without a point, a label leaves nothing behind.
    absent = predictor.predict(points=[points], labels=[[1, 0, NO_POINT]])
    prompt = {"points": points[:2], "labels": np.array([1, 0])}
    assert_same(tuple(arrays[0] for arrays in absent), expected(tiny, images[1], prompt))
    assert np.abs(padded.low_res_logits[0] - absent.low_res_logits[0]).max() > 1e-3


def test_logits_and_low_res_logits_feed_the_next_prediction(
    tiny: Backbone, images: list[np.ndarray]
) -> None:
    predictor = Predictor(tiny)
    predictor.set_images(images)
    prompts = make_prompts(tiny, images)
    first = predictor.predict(**prompts, return_logits=True)
    binary = predictor.predict(**prompts)
    for logits, masks in zip(first.masks, binary.masks, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits > 0, masks)
    again = predictor.predict(masks=[low[:, 0] for low in first.low_res_logits])
    for i, low in enumerate(first.low_res_logits):
        theirs = expected(tiny, images[i], {"masks": low[0, 0]})
        assert_same(tuple(arrays[i][0] for arrays in again), theirs)


def test_images_without_prompts_get_none(tiny: Backbone, images: list[np.ndarray]) -> None:
    predictor = Predictor(tiny)
    predictor.set_images(images[:2])
    result = predictor.predict(boxes=[np.zeros((0, 4)), np.array([[2, 3, 30, 31]])])
    assert result.masks[0].shape == (0, 3, 64, 64) and result.scores[1].shape == (1, 3)
    result = predictor.predict(boxes=[None, None])
    assert [len(masks) for masks in result.masks] == [0, 0]


def test_many_prompts_take_several_calls(
    tiny: Backbone, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(tiny, images)
    predictor = Predictor(tiny)
    predictor.set_images(images)
    whole = predictor.predict(**prompts)
    for name, limit in {"IMAGES_PER_CALL": 3, "PROMPTS_PER_CALL": 2, "PIXELS_PER_CALL": 1}.items():
        monkeypatch.setattr(f"sam_gym.predictor.{name}", limit)
    predictor.set_images(images)
    parts = predictor.predict(**prompts)
    for i in range(len(images)):
        assert_same(tuple(a[i] for a in parts), tuple(a[i] for a in whole))


def test_backbone_by_name_or_object(micro_checkpoint: str, micro: Backbone) -> None:
    assert Predictor("micro", checkpoint=micro_checkpoint, device="cpu").backbone is micro
    assert Predictor(micro).backbone is micro
    with pytest.raises(ValueError, match="say how to load a backbone: pass its name"):
        Predictor(micro, device="cpu")
    with pytest.raises(ValueError, match="Unknown backbone 'vit_x'"):
        Predictor("vit_x")


def test_images_come_first(tiny: Backbone, images: list[np.ndarray]) -> None:
    predictor = Predictor(tiny)
    with pytest.raises(RuntimeError, match=r"call set_images\(images\) before predict"):
        predictor.predict(points=[[[1, 2]]], labels=[[1]])
    with pytest.raises(ValueError, match=r"got one array \(64, 64, 3\): set_images\(\[image\]\)"):
        predictor.set_images(images[0])
    with pytest.raises(ValueError, match="at least one image"):
        predictor.set_images([])
    with pytest.raises(ValueError, match=r"must be uint8 \(H, W, 3\), got float64"):
        predictor.set_images([images[0] / 255])
    with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), got str.*PIL.Image.open"):
        predictor.set_images(["photo.jpg"])  # type: ignore[list-item]
    for wrong in (None, "photo.jpg"):
        with pytest.raises(ValueError, match="takes a list of uint8 arrays"):
            predictor.set_images(wrong)  # type: ignore[arg-type]
    for shape in ((3, 5000, 3), (0, 5, 3)):
        with pytest.raises(ValueError, match=f"image of {shape[0]} x {shape[1]} pixels .*Crop it"):
            predictor.set_images([np.zeros(shape, np.uint8)])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "needs points=, boxes= or masks="),
        ({"labels": [[1], [1]]}, "needs points=, boxes= or masks="),
        ({"points": [[[1, 2]]], "labels": [[1]]}, "points has length 1 for 2 images"),
        ({"points": [[[1, 2]], None]}, "Image 0 has points but no labels"),
        ({"boxes": [None, [0, 0, 9, 9]], "labels": [None, [1]]}, "has labels but no points"),
        ({"points": [None, [[1, 2]]], "labels": [None, [1, 0]]}, "one label per point"),
        ({"points": [[1, 2], None], "labels": [[1], None]}, r"points\[0\] must be \(P, N, 2\)"),
        ({"points": [[[1, 2, 3]], None]}, r"or \(N, 2\) for one prompt, got \(1, 3\)"),
        ({"boxes": [None, [[0, 0, 9]]]}, r"boxes\[1\] must be \(P, 4\), or \(4,\).*\(1, 3\)"),
        ({"masks": [np.zeros((2, 8, 8)), None]}, r"masks\[0\] must be \(P, 16, 16\).*\(2, 8, 8\)"),
        ({"boxes": [None, [0, 0, np.nan, 9]]}, r"boxes\[1\] has values that are NaN"),
        ({"boxes": [None, [30, 40, 20, 50]]}, r"boxes\[1\].*not \(x, y, width, height\)"),
        ({"boxes": 5}, r"boxes has 5 for 2 images: pass a list"),
        ({"boxes": iter([[0, 0, 9, 9]])}, "boxes has <list_iterator.*: pass a list"),
        (
            {"boxes": [torch.ones(1, 4, requires_grad=True), None]},
            r"boxes\[0\] must be an array of numbers \(.*detach",
        ),
        ({"masks": [np.full((16, 16), np.inf), None]}, r"masks\[0\] has values that are NaN"),
        ({"points": [[[1, 2]], None], "labels": [[2], None]}, r"labels\[0\] must be 1.*got 2"),
        ({"points": [[[1, 2]], None], "labels": [[0.5], None]}, "got 0.5"),
        ({"points": [[[1, 2]], None], "labels": [[-3], None]}, "got -3"),
        ({"points": [[[1, 2]], None], "labels": [[np.nan], None]}, r"labels\[0\] has values.*NaN"),
        ({"points": [[[1, 1e38]], None], "labels": [[1], None]}, r"points\[0\].*above 1e\+30"),
        ({"points": [[["1", "2"]], None], "labels": [[1], None]}, r"must be an array of numbers"),
        ({"points": [[["a", 2]], None]}, r"points\[0\] must be an array of numbers"),
        (
            {"points": [np.zeros((1, 0, 2)), None], "labels": [np.zeros((1, 0)), None]},
            "image 0 has no point, no box and no mask",
        ),
        (
            {"points": [[[[1, 2]], [[1, 2], [3, 4]]], None], "labels": [[[1], [1, 1]], None]},
            "fewer points than others are padded, with the label -2",
        ),
        (
            {
                "points": [np.zeros((1, 1, 2)), None],
                "labels": [np.ones((1, 1)), None],
                "masks": [np.zeros((3, 16, 16)), None],
            },
            "1 points, 1 labels, 3 masks. Choose one mask per prompt",
        ),
        (
            {
                "points": [np.zeros((2, 1, 2)), None],
                "labels": [np.ones((2, 1)), None],
                "boxes": [np.zeros((3, 4)), None],
            },
            "image 0 differ in number: 2 points, 2 labels, 3 boxes",
        ),
    ],
)
def test_wrong_prompts_are_errors(
    tiny: Backbone, images: list[np.ndarray], prompts: dict[str, Any], message: str
) -> None:
    predictor = Predictor(tiny)
    predictor.set_images(images[:2])
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompts)
