"""HQ-SAM against its authors' package, and its embeddings through service and store."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, PromptEncoder, TwoWayTransformer

from sam_gym.backbones import BACKBONES, Backbone, Prompts, load_backbone
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.backbones.encoders import assemble
from sam_gym.backbones.hq import HqMaskDecoder

with warnings.catch_warnings():
    # The package enters models into timm's registry under names that are taken.
    warnings.simplefilter("ignore")
    authors_package = pytest.importorskip("segment_anything_hq", reason="no segment-anything-hq")
    from segment_anything_hq import SamPredictor
    from segment_anything_hq.modeling.image_encoder import ImageEncoderViT as AuthorsEncoder
    from segment_anything_hq.modeling.mask_decoder_hq import MaskDecoderHQ
    from segment_anything_hq.modeling.sam import Sam as AuthorsSam

SIZE, WIDTH, DIM = 64, 32, 32
ENCODER: dict[str, Any] = {
    "img_size": SIZE,
    "embed_dim": DIM,
    "depth": 3,
    "num_heads": 2,
    "out_chans": WIDTH,
    "use_rel_pos": True,
    "window_size": 3,
    "global_attn_indexes": (1, 2),
}


def build_ours() -> Any:
    def decoder(**kwargs: Any) -> HqMaskDecoder:
        return HqMaskDecoder(vit_dim=DIM, **kwargs)

    return assemble(ImageEncoderViT(**ENCODER), WIDTH, 64, 4, decoder)


@pytest.fixture(scope="module")
def authors() -> Any:
    """The authors' HQ-SAM, small, with random weights that all matter."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=64, num_heads=4)
    sam = AuthorsSam(
        image_encoder=AuthorsEncoder(**ENCODER),
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(4, 4),
            input_image_size=(SIZE, SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoderHQ(
            num_multimask_outputs=3,
            transformer=transformer,
            transformer_dim=WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=WIDTH,
            vit_dim=DIM,
        ),
    )
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sam.state_dict().values():
            spread = 0.3 if value.ndim < 2 else 1.0 / value.flatten(1).shape[1] ** 0.5
            value.normal_(0.0, spread, generator=noise)
    return sam.eval()


@pytest.fixture
def backbone(authors: Any, tmp_path: Path, add_backbone: Callable[..., None]) -> Backbone:
    add_backbone("hq_vit_b", build=build_ours)
    torch.save(authors.state_dict(), tmp_path / "sam_hq.pth")
    return load_backbone("hq_vit_b", str(tmp_path / "sam_hq.pth"), "cpu")


def image_of(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (40, 90), (100, 30)])
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("with_box", [True, False])
def test_the_authors_masks(
    backbone: Backbone, authors: Any, shape: tuple[int, int], multimask: bool, with_box: bool
) -> None:
    image = image_of(shape)
    predictor = SamPredictor(authors)
    predictor.set_image(image)
    points, labels = np.array([[9.0, 20.0], [25.0, 11.0]]), np.array([1, 0])
    box = np.array([3.0, 5.0, 22.0, 30.0]) if with_box else None
    expected, expected_iou, low = predictor.predict(
        points, labels, box, multimask_output=multimask, return_logits=True
    )

    def frame(xy: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(backbone.to_input_frame(xy.reshape(-1, 2), shape))

    prompts: dict[str, Any] = {
        "points": frame(points)[None],
        "labels": torch.from_numpy(labels)[None],
        "boxes": frame(box).reshape(1, 4) if box is not None else None,
    }
    embedding = backbone.encode([image])
    # The authors give one mask even for an ambiguous prompt: the best by predicted IoU.
    logits, iou = backbone.decode_best(embedding, Prompts(**prompts), torch.tensor([multimask]))
    ours = backbone.masks_at(logits, shape).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.std())
    np.testing.assert_allclose(iou.numpy(), expected_iou, atol=1e-4)

    again, *_ = predictor.predict(
        points, labels, mask_input=low, multimask_output=False, return_logits=True
    )
    prompts |= {"boxes": None, "masks": torch.from_numpy(low)}
    logits, _ = backbone.decode(embedding, Prompts(**prompts))
    np.testing.assert_allclose(
        backbone.masks_at(logits[:, 0], shape).numpy(), again, atol=1e-4 * again.std()
    )


def test_rows_of_a_batch_are_what_they_are_alone(backbone: Backbone) -> None:
    embeddings = backbone.encode([image_of((64, 64)), image_of((40, 90))])
    prompts = Prompts(torch.tensor([[[9.0, 20.0]], [[30.0, 8.0]]]), torch.ones(2, 1).long())
    together, _ = backbone.decode(embeddings, prompts, multimask=True)
    for row in range(2):
        alone = Prompts(prompts.points[row : row + 1], prompts.labels[row : row + 1])
        expected, _ = backbone.decode(embeddings[row : row + 1], alone, multimask=True)
        assert (together[row] - expected[0]).abs().max() <= 1e-4 * expected.std()


def test_early_features_travel_through_the_store(backbone: Backbone) -> None:
    images = [image_of((64, 64)), image_of((40, 90))]
    assert backbone.embedding_shape == (WIDTH, 4, 4)
    assert backbone.feature_spec.tensors["hq"].shape == (WIDTH // 8, 16, 16)
    store = EmbeddingStore(backbone)
    gathered = store.gather(torch.tensor(store.acquire(images)))
    assert gathered.names == ("embedding", "hq") and gathered.spec == backbone.feature_spec
    expected = backbone.encode(images)
    torch.testing.assert_close(gathered.tensors, expected.tensors, rtol=0, atol=0)


def test_the_refinement_matters(backbone: Backbone) -> None:
    """Otherwise the comparison above would not see the early features."""
    features = backbone.encode([image_of((64, 64))])
    prompts = Prompts(torch.tensor([[[9.0, 20.0]]]), torch.ones(1, 1).long())
    without = features.merge(hq=torch.zeros_like(features["hq"]))
    one, _ = backbone.decode(features, prompts)
    other, _ = backbone.decode(without, prompts)
    assert (one - other).abs().mean() > 0.1 * one.std()


@pytest.mark.parametrize(
    ("name", "dim"), [("hq_vit_b", 768), ("hq_vit_l", 1024), ("hq_vit_h", 1280)]
)
def test_sizes_and_names_of_the_published_models(name: str, dim: int) -> None:
    with torch.device("meta"):
        ours = BACKBONES.get(name).build().state_dict()
        authors = authors_package.sam_model_registry[name.removeprefix("hq_")]().state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in authors.items()
    }
    assert ours["mask_decoder.compress_vit_feat.0.weight"].shape == (dim, 256, 2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_masks(backbone: Backbone, dtype: torch.dtype) -> None:
    lower = Backbone("hq", backbone.private_copy(), backbone.device, dtype)
    images = [np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)]
    prompts = Prompts(torch.full((1, 1, 2), 20.0), torch.ones(1, 1).long())
    expected, _ = backbone.decode(backbone.encode(images), prompts, multimask=True)
    logits, iou = lower.decode(lower.encode(images), prompts, multimask=True)
    assert logits.dtype == iou.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() <= 0.1 * expected.std()
