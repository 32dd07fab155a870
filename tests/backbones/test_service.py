"""Frames, encoding and ownership of a backbone, against segment_anything's predictor."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from sam_gym.backbones import Backbone, ImageFeatures, Prompts, service
from sam_gym.backbones.decode import MaskTokens

SHAPES = [(64, 64), (40, 64), (64, 33), (130, 90), (20, 31)]


def some_images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


@pytest.mark.parametrize("backbone", ["tiny", "shipped"], indirect=True)
def test_encoding_a_batch_equals_the_predictors_features(backbone: Backbone) -> None:
    images = some_images()
    embeddings = backbone.encode(images).embedding
    assert embeddings.shape == (len(images), *backbone.embedding_shape)
    assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
    predictor = SamPredictor(backbone.sam)
    for embedding, image in zip(embeddings, images, strict=True):
        predictor.set_image(image)
        expected = predictor.features[0]
        torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("shape", SHAPES)
def test_points_are_scaled_as_by_the_predictor(tiny: Backbone, shape: tuple[int, int]) -> None:
    points = np.random.default_rng(1).uniform(0, 30, (4, 2, 2))
    scaled = tiny.to_input_frame(points, shape)
    assert scaled.dtype == np.float32
    expected = ResizeLongestSide(tiny.image_size).apply_coords(points, shape)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_reach_the_image_as_by_the_predictor(tiny: Backbone, shape: tuple[int, int]) -> None:
    logits = torch.randn(2, 3, *tiny.mask_shape, generator=torch.Generator().manual_seed(0))
    full = tiny.masks_at(logits, shape)
    expected = tiny.sam.postprocess_masks(logits, tiny.input_size(shape), shape)
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiny.masks_at(logits[0, 0], shape), full[0, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 64), np.uint8),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
    ],
    ids=["float", "grey", "channels first", "alpha"],
)
def test_what_is_no_rgb_image_is_refused(tiny: Backbone, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(H, W, 3\), got"):
        tiny.encode([image])


def test_images_are_not_changed(tiny: Backbone) -> None:
    images = some_images()
    tiny.encode(images)
    for image, original in zip(images, some_images(), strict=True):
        np.testing.assert_array_equal(image, original)


def test_model_is_frozen_and_in_evaluation_mode(backbone: Backbone) -> None:
    assert not any(module.training for module in backbone.sam.modules())
    assert not any(parameter.requires_grad for parameter in backbone.sam.parameters())


def test_private_copy_leaves_the_backbone_alone(micro: Backbone) -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    prompts = Prompts(torch.tensor([[[80.0, 99.0]]]), torch.tensor([[1]]))
    before = {key: value.clone() for key, value in micro.sam.state_dict().items()}
    logits, _ = micro.decode(micro.encode([image]), prompts)

    copy = micro.private_copy().train()
    assert all(parameter.requires_grad for parameter in copy.parameters())
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    copy.image_encoder(micro.prepare([image, image[::-1]])).square().sum().backward()
    optimizer.step()
    name = "image_encoder.pyramid.mix_eighth.1.running_mean"
    assert not torch.equal(copy.state_dict()[name], before[name])

    assert not any(module.training for module in micro.sam.modules())
    for key, value in micro.sam.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(micro.decode(micro.encode([image]), prompts)[0], logits)


def test_identity_tells_weights_and_precision_apart(tiny: Backbone) -> None:
    def identity(change: float = 0.0, name: str = "tiny", dtype=torch.float32) -> str:
        sam = tiny.private_copy().requires_grad_(False)
        sam.mask_decoder.iou_token.weight[0, 0] += change
        return Backbone(name, sam, torch.device("cpu"), dtype).identity

    assert identity() == tiny.identity and len(tiny.identity) == 32
    others = {identity(1e-3), identity(name="other"), identity(dtype=torch.bfloat16)}
    assert len(others | {tiny.identity}) == 4


@pytest.mark.parametrize("shared", [False, True])
def test_a_cpu_decodes_many_prompts_in_pieces(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    count, asked = 2 * service._DECODED + 5, []
    features = tiny.encode(some_images())
    rows = torch.arange(count) % len(features)
    prompts = Prompts(
        torch.rand((count, 2, 2), generator=torch.manual_seed(0)) * tiny.image_size,
        torch.ones((count, 2), dtype=torch.int64),
        rows=rows if shared else None,
    )
    features = features if shared else features[rows]
    first = torch.arange(count) % 3 == 0
    whole = tiny.model.decode(features, prompts).decode_best_masks(first)
    decode = tiny.model.decode

    def counted(features: ImageFeatures, prompts: Prompts) -> MaskTokens:
        asked.append((len(prompts), len(features)))
        return decode(features, prompts)

    monkeypatch.setattr(tiny.model, "decode", counted)
    own = tiny.decode_best(features, prompts, first)
    for found, expected in zip(own, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(tiny.predict_iou(features, prompts, first), own[1])
    assert [prompts for prompts, _ in asked] == 2 * [*2 * [service._DECODED], 5]
    assert all(images <= (len(features) if shared else prompts) for prompts, images in asked)
