"""SAM 2.1 as an image model, alone and against its authors' package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adaptation.frame_transform import FrameTransform
from benchmarks.video_speed.peer import Shape, build_peer
from sam_gym import MaskGenerator, Predictor
from sam_gym.backbones import BACKBONES, Backbone, Prompts, load_backbone, service
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.tuning import (
    TUNINGS,
    apply_tuned,
    plain_blocks,
    trainable,
    tuned_weights,
)
from sam_gym.backbones.compiled import FixedShapes
from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.backbones.sam2 import MEMORY_PREFIXES, Sam2, split_state
from sam_gym.data import Sample
from sam_gym.data.streams import low_res_ceiling
from sam_gym.metrics.masks import iou
from sam_gym.utils.lowres import frame_mask, low_res

SIZE, WIDTH = 128, 256
SHAPES = [(SIZE, SIZE), (50, 90), (200, 70)]
CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
#: How far logits may be from the authors', in units of the standard deviation of theirs.
TOLERANCE = 1e-4


def images_of(shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


# Against the authors ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors(build_sam2: Callable[..., Sam2]) -> Any:
    """The authors' SAM 2.1, small, with random weights that all matter."""
    pytest.importorskip("sam2", reason="the package sam2 is not installed")
    from sam2.modeling.sam2_base import SAM2Base

    trunk = {"stages": (1, 2, 2, 1), "window_spec": (8, 4, 6, 3), "global_att_blocks": (4,)}
    model = build_peer(
        SAM2Base,
        Shape(SIZE, WIDTH, 1, 32, {"embed_dim": 8} | trunk),
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    ours = build_sam2(SIZE, WIDTH, 2048, 8).state_dict()
    # The image part shares its memory with the model.
    image, _ = split_state(model.state_dict())
    assert image.keys() == ours.keys()
    for name, value in image.items():
        value.copy_(ours[name])
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(authors: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "sam2.pt"
    torch.save({"model": authors.state_dict()}, path)
    return str(path)


@pytest.fixture
def backbone(
    checkpoint: str, add_backbone: Callable[..., None], build_sam2: Callable[..., Sam2]
) -> Backbone:
    add_backbone("sam2.1_hiera_tiny", build=lambda: build_sam2(SIZE, WIDTH, 2048, 8), memory=None)
    return load_backbone("sam2.1_hiera_tiny", checkpoint, "cpu")


def predictor_of(authors: Any, image: np.ndarray) -> Any:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(authors)
    # It is written for frames of 1024 pixels.
    predictor._bb_feat_sizes = [(SIZE // stride,) * 2 for stride in (4, 8, 16)]
    predictor.set_image(image)
    return predictor


@dataclass
class Row:
    """A prompt in pixels of its image, as both predictors take it."""

    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    box: np.ndarray | None = None
    mask: np.ndarray | None = None


def rows_of(rng: np.random.Generator, shape: tuple[int, int]) -> list[Row]:
    """Prompts of each kind: one to four points, a box, a mask, and their combinations."""
    rows = []
    for count in range(5):
        for box in (False, True):
            for mask in (False, True):
                row, corner = Row(), [shape[1] - 1, shape[0] - 1]
                if count:
                    row.points = rng.uniform(0, corner, (count, 2))
                    row.labels = rng.integers(0, 2, count)
                if box:
                    row.box = np.sort(rng.uniform(0, corner, (2, 2)), axis=0).ravel()
                if mask:
                    coarse = torch.from_numpy(rng.normal(0, 12, (1, 1, 4, 4)))
                    smooth = F.interpolate(coarse, (SIZE // 4,) * 2, mode="bilinear")
                    row.mask = smooth[0, 0].clamp(-32, 32).float().numpy()
                rows.append(row)
    return rows[1:]


def predicted(predictor: Any, row: Row, multimask: bool) -> tuple[np.ndarray, ...]:
    """The authors' logits at the size of the image, predicted IoU and low-res logits."""
    mask = None if row.mask is None else row.mask[None]
    return predictor.predict(
        row.points, row.labels, row.box, mask, multimask_output=multimask, return_logits=True
    )


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_authors_masks(
    backbone: Backbone, authors: Any, shape: tuple[int, int], multimask: bool
) -> None:
    (image,) = images_of([shape])
    predictor, ours = predictor_of(authors, image), Predictor(backbone)
    ours.set_images([image])
    features = predictor._features
    high_res = zip(("high_res_s0", "high_res_s1"), features["high_res_feats"], strict=True)
    for name, expected in [("embedding", features["image_embed"]), *high_res]:
        assert_close(ours.features[name].numpy(), expected.numpy())
    replaced, drawn = [], []
    for row in rows_of(np.random.default_rng(1), shape):
        masks, scores, low = predicted(predictor, row, multimask)
        given = [None if x is None else [x] for x in (row.points, row.labels, row.box, row.mask)]
        got = ours.predict(*given, multimask=multimask, return_logits=True)
        assert_close(got.masks[0], masks)
        assert_close(got.low_res_logits[0].clip(-32, 32), low)
        np.testing.assert_allclose(got.scores[0], scores, atol=1e-4)
        drawn.append(low)
        if not multimask:
            best = predicted(predictor, row, True)
            replaced.append(bool((best[2][best[1].argmax()] == low[0]).all()))
    # Otherwise the comparison would not see the prompts, or the choice by stability.
    assert np.stack(drawn).std(axis=0).mean() > 0.05 * np.stack(drawn).std()
    assert multimask or set(replaced) == {True, False}


def test_logits_that_are_returned_prompt_the_next_call(
    backbone: Backbone, authors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors bound what they return; we bound what we are given."""
    (image,) = images_of([(90, 50)])
    predictor, ours = predictor_of(authors, image), Predictor(backbone)
    ours.set_images([image])
    for part in (authors.sam_mask_decoder, backbone.sam.mask_decoder):  # larger logits
        for mlp in part.output_hypernetworks_mlps:
            for name in ("weight", "bias"):
                own = getattr(mlp.layers[-1], name)
                monkeypatch.setattr(own, "data", 10 * own.data)
    row = Row(np.array([[20.0, 30.0]]), np.array([1]))
    points, labels = [row.points], [row.labels]
    got = ours.predict(points, labels, return_logits=True)
    assert np.abs(got.low_res_logits[0]).max() > 64
    row.mask = predicted(predictor, row, True)[2][0]
    again = ours.predict(points, labels, masks=[got.low_res_logits[0][0]], return_logits=True)
    assert_close(again.masks[0], predicted(predictor, row, True)[0])


def test_rows_of_a_batch_are_what_the_authors_give_for_each(
    backbone: Backbone, authors: Any
) -> None:
    images = images_of(SHAPES)
    rows = [
        (number, row)
        for number, image in enumerate(images)
        for row in rows_of(np.random.default_rng(number), image.shape[:2])
    ]
    rows = [rows[k] for k in np.random.default_rng(3).permutation(len(rows))]
    count, most = len(rows), 4
    points, boxes = torch.full((count, most, 2), 7e3), torch.full((count, 4), 7e3)
    labels, masks = torch.full((count, most), -2), torch.full((count, *backbone.mask_shape), 7e3)
    for i, (number, row) in enumerate(rows):
        shape = images[number].shape[:2]
        if row.points is not None:
            points[i, : len(row.points)] = torch.from_numpy(
                backbone.to_input_frame(row.points, shape)
            )
            labels[i, : len(row.points)] = torch.from_numpy(row.labels)
        if row.box is not None:
            corners = backbone.to_input_frame(row.box.reshape(2, 2), shape)
            boxes[i] = torch.from_numpy(corners).ravel()
        if row.mask is not None:
            masks[i] = torch.from_numpy(row.mask)
    prompts = Prompts(
        points=points,
        labels=labels,
        boxes=boxes,
        has_box=torch.tensor([row.box is not None for _, row in rows]),
        masks=masks,
        has_mask=torch.tensor([row.mask is not None for _, row in rows]),
        rows=torch.tensor([number for number, _ in rows]),
    )
    features, predictors = backbone.encode(images), [predictor_of(authors, x) for x in images]
    unmasked = Prompts(**{**vars(prompts), "masks": None, "has_mask": None})
    for given, kept in (
        (prompts, range(count)),
        (unmasked, [i for i, (_, row) in enumerate(rows) if row.mask is None]),
    ):
        for multimask in (True, False):
            logits, iou = backbone.decode(features, given, multimask=multimask)
            for i in kept:
                number, row = rows[i]
                _, scores, low = predicted(predictors[number], row, multimask)
                assert_close(logits[i].clamp(-32, 32).numpy(), low)
                np.testing.assert_allclose(iou[i].numpy(), scores, atol=1e-4)
    single = torch.tensor([False]).expand(count)
    best, _ = backbone.decode_best(features, prompts, single)
    torch.testing.assert_close(best, backbone.decode(features, prompts)[0][:, 0])


@pytest.mark.parametrize("size", CONFIGS)
def test_sizes_and_names_of_the_published_models(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pytest.importorskip("sam2.build_sam", reason="the package sam2 is not installed")
    # The authors' trunk reads values of it.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        config = f"configs/sam2.1/sam2.1_hiera_{CONFIGS[size]}.yaml"
        theirs = build.build_sam2(config, None, device="meta").state_dict()
        ours = BACKBONES.get(f"sam2.1_hiera_{size}").build().state_dict()
    image, memory = split_state(theirs)
    assert {k: v.shape for k, v in image.items()} == {k: v.shape for k, v in ours.items()}
    assert len(image) + len(memory) == len(theirs)
    for prefix in MEMORY_PREFIXES:
        assert any(name.startswith(prefix) for name in memory), prefix


def test_what_a_checkpoint_may_hold(
    authors: Any, backbone: Backbone, checkpoint: str, tmp_path: Path
) -> None:
    whole = torch.load(checkpoint)["model"]

    def load(state: dict[str, torch.Tensor]) -> Backbone:
        torch.save(state, tmp_path / "other.pt")
        return load_backbone("sam2.1_hiera_tiny", str(tmp_path / "other.pt"), "cpu")

    image, memory = split_state(whole)
    for state in (
        image,
        {name: value for name, value in whole.items() if name not in memory},
        {f"module.{name}": value for name, value in whole.items()},
    ):
        assert load(state).weights_digest == backbone.weights_digest
    with pytest.raises(ValueError, match=r"1 unexpected \(first: memory_banks.weight\)"):
        load(whole | {"memory_banks.weight": torch.zeros(1)})
    whole.pop("no_mem_embed")
    with pytest.raises(ValueError, match=r"1 missing \(first: no_mem_embed\)"):
        load(whole)


# Alone ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_sam2: str) -> Backbone:
    return load_backbone(tiny_sam2, device="cpu")


def prompts_of(backbone: Backbone) -> Prompts:
    size = backbone.image_size
    return Prompts(
        points=torch.tensor([[[0.2, 0.3], [0.8, 0.5]], [[0.6, 0.6], [0, 0]]]) * size,
        labels=torch.tensor([[1, 0], [1, -2]]),
        boxes=torch.tensor([[0.1, 0.1, 0.5, 0.7], [0, 0, 0, 0]]) * size,
        has_box=torch.tensor([True, False]),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_squashed(tiny: Backbone, shape: tuple[int, int]) -> None:
    (image,), size = images_of([shape]), tiny.image_size
    assert tiny.squashes and tiny.input_size(shape) == (size, size)
    corners = np.array([[0, 0], [shape[1], shape[0]]])
    np.testing.assert_allclose(tiny.to_input_frame(corners, shape), [[0, 0], [size, size]])
    frame = tiny.framed(image)
    assert frame.shape == (size, size, 3) and frame.dtype == np.uint8
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (frame / 255 - mean) / deviation
    pixels = tiny.prepare([image])[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels - expected).max() <= 0.51 / 255 / deviation.min()
    # A linear ramp keeps its values at the centres of pixels, away from the border.
    ramp = torch.arange(16.0).expand(16, 16)
    full = tiny.masks_at(ramp, shape)
    assert full.shape == shape
    x = (np.arange(shape[1]) + 0.5) * 16 / shape[1] - 0.5
    np.testing.assert_allclose(full[shape[0] // 2], x.clip(0, 15), atol=1e-4)


def test_features_travel_through_the_stores(tiny: Backbone, tmp_path: Path) -> None:
    images = images_of(SHAPES)
    expected = tiny.encode(images)
    assert expected.spec == tiny.feature_spec
    assert expected.names == BACKBONES.get("tiny_sam2").features
    half = DiskStore(tiny, tmp_path, "float16")
    for disk, tolerance in ((None, 0.0), (half, 2e-3)):
        store = EmbeddingStore(tiny, disk=disk)
        gathered = store.gather(torch.tensor(store.acquire(images)))
        for name, value in expected.tensors.items():
            atol = tolerance * float(value.abs().max())
            torch.testing.assert_close(gathered[name], value, rtol=0, atol=atol)
    again = EmbeddingStore(tiny, disk=DiskStore(tiny, tmp_path, "float16"))
    again.acquire(images)
    assert again.encoded == 0
    assert half.spec.nbytes * 2 == tiny.feature_spec.nbytes


def test_the_published_features_take_four_times_those_of_sam() -> None:
    with torch.device("meta"):
        sam2, sam = (BACKBONES.get(name).build() for name in ("sam2.1_hiera_tiny", "vit_b"))
    assert Model(sam2).feature_spec.nbytes == 4 * Model(sam).feature_spec.nbytes == 2**24


@pytest.mark.parametrize("name", ["high_res_s0", "high_res_s1", "embedding"])
def test_every_feature_matters(tiny: Backbone, name: str) -> None:
    features = tiny.encode(images_of(SHAPES[:2]))
    without = features.merge(**{name: torch.zeros_like(features[name])})
    one, _ = tiny.decode(features, prompts_of(tiny), multimask=True)
    other, _ = tiny.decode(without, prompts_of(tiny), multimask=True)
    assert (one - other).abs().mean() > 0.05 * one.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_masks(tiny: Backbone, dtype: str) -> None:
    lower, images = load_backbone("tiny_sam2", device="cpu", dtype=dtype), images_of(SHAPES[:2])
    expected, _ = tiny.decode(tiny.encode(images), prompts_of(tiny), multimask=True)
    logits, iou = lower.decode(lower.encode(images), prompts_of(tiny), multimask=True)
    assert logits.dtype == iou.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() <= 0.1 * expected.std()


@pytest.mark.parametrize("tune", TUNINGS.names())
def test_tune_targets(tiny: Backbone, tune: str) -> None:
    if tune.startswith("hq"):
        with pytest.raises(
            ValueError, match="do not go with a SAM for videos: take another tune target"
        ):
            TUNINGS.get(tune).prepare(tiny.sam)
        return
    if tune.startswith("lora"):
        pytest.importorskip("peft")
    pixels, prompts = tiny.prepare(images_of(SHAPES[:2])), prompts_of(tiny)

    def masks_of(sam: Sam2) -> torch.Tensor:
        with torch.no_grad():
            return Model(sam).decode(Model(sam).encode(pixels), prompts).decode_masks()

    own = TUNINGS.get(tune).prepare(tiny.sam)
    expected = masks_of(tiny.sam)
    torch.testing.assert_close(masks_of(own), expected, rtol=0, atol=1e-4 * float(expected.std()))
    features = Model(own).embed(Model(tiny.sam).encode(pixels))
    if TUNINGS.get(tune).raw == "pixels":
        features = Model(own).encode(pixels)
    tokens = Model(own).decode(features, prompts)
    assert tokens.object_score is not None
    (
        tokens.decode_masks().square().mean() + tokens.iou.sum() + tokens.object_score.sum()
    ).backward()
    trained = trainable(own)
    # A LoRA's first factor has no gradient while the second is zero.
    idle = [name for name, weight in trained.items() if weight.grad is None]
    assert not idle
    if tune in ("lora", "sam_adapter"):
        assert any(name.startswith("image_encoder.trunk.blocks.5.") for name in trained)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trained.values():
            weight += 0.1 * torch.randn(weight.shape, generator=noise)
    moved = masks_of(own)
    assert (moved - expected).abs().mean() > 0.01 * expected.std()
    again = apply_tuned(tiny.sam, tune, tuned_weights(own))
    torch.testing.assert_close(masks_of(again), moved, rtol=0, atol=1e-4 * float(moved.std()))
    assert torch.equal(masks_of(tiny.sam), expected)


def test_routers_of_tokens_are_refused(tiny: Backbone) -> None:
    with pytest.raises(ValueError, match="Sam2Encoder differ in width.*take micro or a ViT SAM"):
        plain_blocks(tiny.sam.image_encoder)


@pytest.mark.parametrize("kind", ["SamSeg-v0", "SamEverything-v0"])
def test_environments_play(tiny_sam2: str, kind: str) -> None:
    envs = gym.make_vec(
        kind,
        num_envs=2,
        vectorization_mode="vector_entry_point",
        backbone=tiny_sam2,
        device="cpu",
        dataset_kwargs={"length": 4, "size": 96},
    )
    envs.reset(seed=0)
    envs.action_space.seed(0)
    for _ in range(12):
        _, rewards, *_ = envs.step(envs.action_space.sample())
        assert np.isfinite(rewards).all()
    envs.close()


def test_targets_lie_where_images_do(tiny: Backbone, two_photos: Path) -> None:
    """Targets and clicks of images of any shape cover the squashed frame."""
    env: Any = gym.make(
        "SamSeg-v0",
        backbone="tiny_sam2",
        device="cpu",
        dataset="folder",
        data=str(two_photos),
        split="all",
    ).unwrapped
    core = env.core
    for seed in range(4):
        env.reset(seed=seed)
        mask = core.targets[0].mask
        low = torch.from_numpy(core._low_res(mask)).float()
        assert iou(tiny.masks_at(low, mask.shape).numpy() > 0.5, mask) > 0.8
        assert core._low_res_valid(mask.shape, None).all()
        x, y = core.centre_of(core.config.grid**2 - 1)
        assert core._clip_to_image(0, x, y) == (x, y)
        column, row = core.to_image(0, x, y)
        half = tiny.image_size / core.config.grid / 2
        assert column / mask.shape[1] > 1 - 2 * half / tiny.image_size
        assert row / mask.shape[0] > 1 - 2 * half / tiny.image_size


def test_augmentations_fill_the_squashed_frame(tiny: Backbone) -> None:
    rng, (image,) = np.random.default_rng(0), images_of([(50, 90)])
    mask = np.zeros((50, 90), bool)
    mask[10:40, 30:60] = True
    plain = FrameTransform.draw(rng, (50, 90), tiny.image_size, plain=True, squash=True)
    smooth = cv2.GaussianBlur(image, (0, 0), 3)
    difference = plain.frame(smooth).astype(float) - tiny.framed(smooth)
    assert np.abs(difference).mean() < 2
    low = np.round(tiny.framed(mask[..., None].repeat(3, 2) * np.uint8(255))[..., 0] / 255.0) > 0
    assert iou(plain.mask(mask), low) > 0.9
    free = FrameTransform.draw(rng, (50, 90), tiny.image_size, plain=False, squash=True)
    assert free.scale[1] / free.scale[0] == pytest.approx(90 / 50)
    dataset: Any = [Sample(image, mask[None], np.zeros(1, int), "image")]
    small = torch.from_numpy(low_res(frame_mask(mask, (64, 64), 64), tiny.mask_shape))
    cover = tiny.masks_at(small, mask.shape).numpy()
    best = max(iou(cover > threshold, mask) for threshold in np.linspace(0.02, 0.98, 97))
    ceiling = low_res_ceiling(dataset, tiny.image_size, tiny.mask_shape[0], squash=True)
    assert ceiling == pytest.approx(best, abs=0.02)


def test_masks_of_everything(tiny: Backbone) -> None:
    image = images_of([(48, 80)])[0]
    generator = MaskGenerator(tiny)
    assert generator.thresholds == (0.1, 0.1)
    for record in generator.generate(image):
        assert record["segmentation"].shape == (48, 80)


@pytest.mark.slow
def test_same_masks_compiled(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model is one graph; which backend compiles it does not matter here."""
    monkeypatch.setattr(service, "FixedShapes", partial(FixedShapes, backend="eager"))
    compiled = Backbone("own", tiny.private_copy(), tiny.device, tiny.dtype, compile=True)
    images, prompts = images_of(SHAPES[:2]), prompts_of(tiny)
    features = compiled.encode(images)
    torch.testing.assert_close(features.tensors, tiny.encode(images).tensors, rtol=1e-5, atol=1e-5)
    first = torch.tensor([True, False])
    expected, quality = tiny.decode_best(features, prompts, first)
    logits, iou = compiled.decode_best(features, prompts, first)
    assert (logits - expected).abs().max() <= 1e-4 * expected.std()
    torch.testing.assert_close(iou, quality, rtol=1e-4, atol=1e-5)
