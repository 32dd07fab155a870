"""The batched decoder against segment_anything's own predictor, prompt set by prompt set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from sam_gym.backbones import NO_POINT, Backbone, Prompts, decode, load_backbone
from sam_gym.backbones.decode import decode_tokens
from sam_gym.backbones.hq import encode_pixels
from sam_gym.backbones.prompts import PADDING_POINT

#: How far logits may be from the predictor's, in units of the standard deviation of its logits.
TOLERANCE = 1e-4
#: One of each architecture.
SAMS = pytest.mark.parametrize("backbone", ["tiny", "shipped"], indirect=True)
GARBAGE = 7.7e3


@dataclass
class Row:
    """A prompt set in pixels of its image, as `SamPredictor.predict` takes it."""

    image: int
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    box: np.ndarray | None = None
    mask: np.ndarray | None = None

    def alone(
        self, predictors: Sequence[SamPredictor], multimask: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits at the size of the image (M, H, W), IoU (M,) and low-res logits (M, h, w)."""
        return predictors[self.image].predict(
            self.points,
            self.labels,
            self.box,
            None if self.mask is None else self.mask[None],
            multimask_output=multimask,
            return_logits=True,
        )


def make_images(backbone: Backbone) -> list[np.ndarray]:
    """A square image of the model's own size, a wide one and a large tall one."""
    rng = np.random.default_rng(1)
    size = backbone.image_size
    shapes = [(size, size), (size * 5 // 8, size), (size * 5 // 4, size * 3 // 4)]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def make_predictors(backbone: Backbone, images: Sequence[np.ndarray]) -> list[SamPredictor]:
    predictors = [SamPredictor(backbone.sam) for _ in images]
    for predictor, image in zip(predictors, images, strict=True):
        predictor.set_image(image)
    return predictors


def make_row(
    rng: np.random.Generator,
    backbone: Backbone,
    images: Sequence[np.ndarray],
    image: int,
    num_points: int,
    box: bool,
    mask: bool,
) -> Row:
    height, width = images[image].shape[:2]
    row = Row(image)
    if num_points:
        row.points = rng.uniform(0, [width - 1, height - 1], (num_points, 2))
        row.labels = rng.integers(0, 2, num_points)
    if box:
        corners = rng.uniform(0, [width - 1, height - 1], (2, 2))
        row.box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
    if mask:
        row.mask = rng.normal(0, 8, backbone.mask_shape).astype(np.float32)
    return row


def every_kind(backbone: Backbone, images: Sequence[np.ndarray]) -> list[Row]:
    """No or one to ten points, with and without box, with and without mask, over all images."""
    rng = np.random.default_rng(2)
    kinds = [(n, box, mask) for n in range(11) for box in (False, True) for mask in (False, True)]
    rows = [
        make_row(rng, backbone, images, number % len(images), *kind)
        for number, kind in enumerate(kinds)
        if any(kind)
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


def together(backbone: Backbone, images: Sequence[np.ndarray], rows: Sequence[Row]) -> Prompts:
    """All rows in one batch; what a row does not have is filled with garbage."""
    count, most = len(rows), max(len(row.points) for row in rows if row.points is not None)
    points = np.full((count, most, 2), GARBAGE, np.float32)
    labels = np.full((count, most), NO_POINT, np.int64)
    boxes = np.full((count, 4), GARBAGE, np.float32)
    masks = np.full((count, *backbone.mask_shape), GARBAGE, np.float32)
    for i, row in enumerate(rows):
        shape = images[row.image].shape[:2]
        if row.points is not None:
            points[i, : len(row.points)] = backbone.to_input_frame(row.points, shape)
            labels[i, : len(row.points)] = row.labels
        if row.box is not None:
            boxes[i] = backbone.to_input_frame(row.box.reshape(2, 2), shape).ravel()
        if row.mask is not None:
            masks[i] = row.mask
    return Prompts(
        points=torch.from_numpy(points),
        labels=torch.from_numpy(labels),
        boxes=torch.from_numpy(boxes),
        has_box=torch.tensor([row.box is not None for row in rows]),
        masks=torch.from_numpy(masks),
        has_mask=torch.tensor([row.mask is not None for row in rows]),
        rows=torch.tensor([row.image for row in rows]),
    )


def assert_same(
    backbone: Backbone,
    logits: torch.Tensor,
    iou: torch.Tensor,
    alone: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    at_image, expected_iou, expected = alone
    limit = TOLERANCE * expected.std(axis=(1, 2), keepdims=True)
    assert (np.abs(logits.numpy() - expected) <= limit).all()
    clear = np.abs(at_image) > limit
    assert clear.mean() > 0.99
    mask = backbone.masks_at(logits, at_image.shape[1:]).numpy() > 0
    np.testing.assert_array_equal(mask[clear], (at_image > 0)[clear])
    np.testing.assert_allclose(iou.numpy(), expected_iou, atol=1e-4)


@SAMS
@pytest.mark.parametrize("multimask", [False, True])
def test_ragged_rows_equal_the_predictor(backbone: Backbone, multimask: bool) -> None:
    images = make_images(backbone)
    predictors = make_predictors(backbone, images)
    rows = every_kind(backbone, images)
    embeddings = backbone.encode(images)
    prompts = together(backbone, images, rows)
    logits, iou = backbone.decode(embeddings, prompts, multimask=multimask)
    count = 3 if multimask else 1
    assert (
        logits.shape == (len(rows), count, *backbone.mask_shape) and iou.shape == logits.shape[:2]
    )
    assert logits.dtype == iou.dtype == torch.float32

    expected = [row.alone(predictors, multimask) for row in rows]
    for i, reference in enumerate(expected):
        assert_same(backbone, logits[i], iou[i], reference)
    # The comparison means something only if the prompts make a difference.
    for (_, _, one), (_, _, other) in pairwise(expected):
        assert np.abs(one - other).max() > 100 * TOLERANCE * one.std()


@SAMS
@pytest.mark.parametrize(
    "kind",
    [(3, False, False), (0, True, False), (0, False, True), (1, True, False), (2, True, True)],
    ids=["points", "boxes", "masks", "points+boxes", "all"],
)
def test_uniform_rows_equal_the_predictor(backbone: Backbone, kind: tuple[int, bool, bool]) -> None:
    """Without `rows`, `has_box` and `has_mask`: one prompt set of the same kind per image."""
    images = make_images(backbone)
    rng = np.random.default_rng(3)
    rows = [make_row(rng, backbone, images, i, *kind) for i in range(len(images))]
    filled = together(
        backbone, images, [*rows, make_row(rng, backbone, images, 0, 1, False, False)]
    )
    num_points, box, mask = kind
    prompts = Prompts(
        points=filled.points[: len(rows), :num_points] if num_points else None,
        labels=filled.labels[: len(rows), :num_points] if num_points else None,
        boxes=filled.boxes[: len(rows)] if box else None,
        masks=filled.masks[: len(rows)] if mask else None,
    )
    logits, iou = backbone.decode(backbone.encode(images), prompts, multimask=True)
    predictors = make_predictors(backbone, images)
    for i, row in enumerate(rows):
        assert_same(backbone, logits[i], iou[i], row.alone(predictors, True))


@SAMS
def test_best_mask_is_the_predictors_choice(backbone: Backbone) -> None:
    images = make_images(backbone)
    predictors = make_predictors(backbone, images)
    rows = every_kind(backbone, images)
    multimask = np.random.default_rng(4).random(len(rows)) < 0.5
    embeddings, prompts = backbone.encode(images), together(backbone, images, rows)
    logits, iou = backbone.decode_best(embeddings, prompts, torch.from_numpy(multimask))
    assert logits.shape == (len(rows), *backbone.mask_shape) and iou.shape == (len(rows),)
    picked = set()
    for i, row in enumerate(rows):
        at_image, quality, low = row.alone(predictors, bool(multimask[i]))
        best = int(quality.argmax())
        picked.add((bool(multimask[i]), best))
        chosen = at_image[best][None], quality[best][None], low[best][None]
        assert_same(backbone, logits[i][None], iou[i][None], chosen)
    assert {(False, 0)} < picked


def test_best_of_three_is_never_the_single_mask(tiny: Backbone) -> None:
    images = make_images(tiny)
    rows = every_kind(tiny, images)
    embeddings, prompts = tiny.encode(images), together(tiny, images, rows)
    _, single = tiny.decode(embeddings, prompts)
    _, three = tiny.decode(embeddings, prompts, multimask=True)
    assert (single[:, 0] > three.amax(dim=1)).any() and len(three.argmax(dim=1).unique()) > 1
    _, best = tiny.decode_best(embeddings, prompts, torch.ones(len(rows), dtype=torch.bool))
    torch.testing.assert_close(best, three.amax(dim=1))


def test_order_and_company_do_not_matter(tiny: Backbone) -> None:
    images = make_images(tiny)
    rows = every_kind(tiny, images)
    embeddings = tiny.encode(images)
    logits, _ = tiny.decode(embeddings, together(tiny, images, rows))
    backwards, _ = tiny.decode(embeddings, together(tiny, images, rows[::-1]))
    torch.testing.assert_close(logits, backwards.flip(0), rtol=0, atol=1e-4 * float(logits.std()))


def test_gradients_are_those_of_the_original_modules(tiny: Backbone) -> None:
    sam = tiny.private_copy()
    points, labels = torch.tensor([[[9.0, 20.0], [40.0, 33.0]]]), torch.tensor([[1, 0]])
    weight = torch.randn(tiny.mask_shape, generator=torch.Generator().manual_seed(5))
    image = make_images(tiny)[0]

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        sam.zero_grad(set_to_none=True)
        (logits * weight).sum().backward()
        return {k: p.grad for k, p in sam.named_parameters() if p.grad is not None}

    features = encode_pixels(sam, tiny.prepare([image]))
    tokens = decode_tokens(sam, features, Prompts(points, labels))
    ours = gradients(tokens.decode_masks(tokens.mask_embeddings[:, :1]))
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    low, _ = sam.mask_decoder(
        image_embeddings=sam.image_encoder(tiny.prepare([image])),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    expected = gradients(low)
    assert "image_encoder.patch_embed.proj.weight" in expected
    # The gradient of a key's bias is zero but for rounding, hence the second term.
    noise = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        atol = 2e-4 * float(gradient.abs().max()) + noise
        if name in ours:
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol, msg=name)
        else:
            assert not gradient.any(), name


def test_low_precision_is_close_and_returns_float32(tiny: Backbone) -> None:
    images = make_images(tiny)
    rows = every_kind(tiny, images)
    low = Backbone("tiny", tiny.private_copy(), torch.device("cpu"), torch.bfloat16)
    prompts = together(tiny, images, rows)
    exact, _ = tiny.decode(tiny.encode(images), prompts)
    rough, iou = low.decode(low.encode(images), prompts)
    assert rough.dtype == iou.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.ravel(), rough.ravel()]))[0, 1] > 0.98
    assert not torch.equal(exact, rough)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_are_computed_in_the_precision_of_their_prompts(
    tiny: Backbone, dtype: torch.dtype
) -> None:
    """Whether the autocast is still on or not."""
    images = make_images(tiny)
    low = Backbone("tiny", tiny.private_copy(), torch.device("cpu"), dtype)
    tokens = low.decode_tokens(low.encode(images), together(tiny, images, every_kind(tiny, images)))
    with low.autocast():
        expected = tokens.decode_masks()
    pairs = torch.tensor([1, 0]), torch.tensor([2, 3])
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(tokens.decode_masks(), expected)
            assert torch.equal(tokens.upscaled().decode_masks(), expected)
            torch.testing.assert_close(tokens.decode_mask_pairs(*pairs), expected[pairs])


def test_prompts_that_do_not_fit_are_refused(tiny: Backbone) -> None:
    embeddings = tiny.encode(make_images(tiny)[:2])
    points, labels = torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"3 prompt sets for 2 images: pass rows="):
        tiny.decode(embeddings, Prompts(points, labels))
    with pytest.raises(ValueError, match="points were given without labels"):
        tiny.decode(embeddings, Prompts(points[:2]))
    with pytest.raises(ValueError, match="at least points, boxes or masks"):
        tiny.decode(embeddings, Prompts())


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [[1]]}, "labels must be a tensor, got list"),
        ({"points": np.zeros((1, 1, 2))}, "points must be a tensor, got ndarray"),
        ({"labels": torch.tensor([[2]])}, r"labels must be 1 \(foreground\), 0 .*got 2"),
        ({"labels": torch.tensor([[-3]])}, "no point.*got -3"),
        ({"labels": torch.tensor([[1.0]])}, "labels must be integers, got torch.float32"),
        ({"labels": torch.tensor([[True]])}, "labels must be integers, got torch.bool"),
        ({"labels": torch.tensor([[1, 0]])}, r"labels must have shape \(1, 1\), got \(1, 2\)"),
        ({"labels": None}, "points were given without labels"),
        ({"points": None}, "labels were given without points"),
        ({"points": torch.tensor([[[NAN, 1.0]]])}, "points has values that are NaN"),
        (
            {"points": torch.tensor([[[float("inf"), 1.0]]])},
            "points has values that are NaN or inf",
        ),
        ({"points": torch.zeros(1, 1, 3)}, r"points must have shape \(1, 1, 2\), got \(1, 1, 3\)"),
        ({"points": torch.zeros(1, 2)}, r"points must have shape"),
        ({"boxes": torch.tensor([[0.0, 0.0, NAN, 9.0]])}, "boxes has values that are NaN"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes must have shape \(1, 4\), got \(2, 4\)"),
        ({"masks": torch.full((1, 16, 16), NAN)}, "masks has values that are NaN"),
        ({"masks": torch.zeros(1, 64, 64)}, r"masks must have shape \(1, 16, 16\)"),
        ({"has_mask": torch.tensor([1])}, "has_mask must be bool, got torch.int64"),
        ({"rows": torch.tensor([1])}, "rows must be from 0 to 0"),
        ({"rows": torch.tensor([-1])}, "rows must be from 0 to 0"),
    ],
)
def test_prompts_with_impossible_values_are_refused(
    tiny: Backbone, changes: dict[str, torch.Tensor], message: str
) -> None:
    features = tiny.encode([np.zeros((64, 64, 3), np.uint8)])
    valid = Prompts(
        points=torch.tensor([[[5.0, 9.0]]]),
        labels=torch.tensor([[1]]),
        boxes=torch.tensor([[1.0, 2.0, 30.0, 40.0]]),
        masks=torch.zeros(1, 16, 16),
        has_mask=torch.tensor([True]),
        rows=torch.tensor([0]),
    )
    for label in (1, 0, PADDING_POINT, NO_POINT):
        tiny.decode(features, replace(valid, labels=torch.tensor([[label]])))
    with pytest.raises(ValueError, match=message):
        tiny.decode(features, replace(valid, **changes))
    with pytest.raises(ValueError, match=message):
        tiny.decode_tokens(features, replace(valid, **changes))


@pytest.mark.parametrize("name", ["tiny", "micro", "tiny_sam2"])
def test_masks_are_computed_in_pieces(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = request.getfixturevalue(name)
    backbone = load_backbone(own, device="cpu") if isinstance(own, str) else own
    features = backbone.encode(make_images(backbone)[:2])
    count = 7
    points = torch.rand((count, 1, 2), generator=torch.manual_seed(0)) * backbone.image_size
    rows = torch.arange(count) % 2
    prompts = Prompts(points, torch.ones((count, 1), dtype=torch.int64), rows=rows)
    monkeypatch.setattr(decode, "PIECE", 3)
    # With gradients, all masks are computed together.
    whole = decode_tokens(backbone.sam, features, prompts)
    every = whole.decode_masks().detach()
    pairs, which = torch.tensor([6, 0, 3, 3, 1, 6]), torch.tensor([1, 0, 2, 3, 1, 0])
    first = torch.arange(count) % 3 == 0
    with torch.no_grad():
        for tokens in (decode_tokens(backbone.sam, features, prompts), whole.upscaled()):
            torch.testing.assert_close(tokens.decode_masks(), every)
            torch.testing.assert_close(tokens.decode_mask_pairs(pairs, which), every[pairs, which])
            torch.testing.assert_close(tokens.decode_mask_pairs(pairs[:0], which[:0]), every[:0, 0])
            one = tokens.decode_masks(tokens.mask_embeddings[:, 2:3])
            torch.testing.assert_close(one[:, 0], every[:, 2])
            assert torch.equal(tokens.best_iou(first), tokens.decode_best_masks(first)[1])
    best = backbone.decode_best(features, prompts, first)[1]
    torch.testing.assert_close(backbone.predict_iou(features, prompts, first), best)
    assert best.unique().numel() > 1
