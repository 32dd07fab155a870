"""Hugging Face's SAM, SAM-HQ and SAM 2, saved by transformers and loaded by us."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam_gym.backbones import Backbone, Prompts, load_backbone
from sam_gym.backbones.hq import encode_with_early

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZE, WIDTH = 64, 32
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "output_channels": WIDTH,
    "window_size": 3,
    "global_attn_indexes": [1, 2],
    "mlp_dim": 48,
    "num_pos_feats": WIDTH // 2,
}
PROMPT = {"hidden_size": WIDTH, "image_size": SIZE, "patch_size": 16}
DECODER = {
    "hidden_size": WIDTH,
    "mlp_dim": 64,
    "num_attention_heads": 4,
    "iou_head_hidden_dim": WIDTH,
}


#: Of SAM 2, whose stages halve the grid three times.
SIDE = 128
VISION2: dict[str, Any] = {
    "backbone_config": {
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 2, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 6, 3],
        "global_attention_blocks": [4],
        "model_type": "sam2_hiera_det_model",
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[SIDE // stride] * 2 for stride in (4, 8, 16)],
    "fpn_hidden_size": WIDTH,
}


def randomised(model: Any) -> Any:
    """The model with random weights that all matter."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name != "prompt_encoder.shared_embedding.positional_embedding":
                spread = 0.3 if value.ndim < 2 else 1.0 / value.flatten(1).shape[1] ** 0.5
                value.normal_(0.0, spread, generator=noise)
        shared = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    return model.eval()


@pytest.fixture(params=["sam", "sam_hq"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """A small model with random weights, and the folder where transformers saved it."""
    parts = {"vision_config": VISION, "prompt_encoder_config": PROMPT}
    if request.param == "sam":
        config = transformers.SamConfig(**parts, mask_decoder_config=DECODER)
        model = transformers.SamModel(config)
    else:
        decoder = {**DECODER, "vit_dim": VISION["hidden_size"]}
        config = transformers.SamHQConfig(**parts, mask_decoder_config=decoder)
        model = transformers.SamHQModel(config)
    randomised(model).save_pretrained(tmp_path / "model")
    return model, str(tmp_path / "model")


@pytest.mark.parametrize("saved", ["sam"], indirect=True)
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", ["points", "box", "mask"])
def test_same_masks_as_transformers(saved: tuple[Any, str], multimask: bool, prompt: str) -> None:
    model, folder = saved
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    points = torch.tensor([[[9.0, 20.0], [40.0, 11.0]]])
    labels = torch.tensor([[1, 0]])
    box = torch.tensor([[3.0, 5.0, 22.0, 30.0]])
    mask = torch.randn(1, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(1))
    theirs: dict[str, Any] = {"input_points": points[None], "input_labels": labels[None]}
    ours: dict[str, Any] = {"points": points, "labels": labels}
    if prompt == "box":
        theirs, ours = theirs | {"input_boxes": box[None]}, ours | {"boxes": box}
    if prompt == "mask":
        theirs, ours = theirs | {"input_masks": mask[None]}, ours | {"masks": mask}
    with torch.no_grad():
        pixels = backbone.prepare([image])
        expected = model(pixel_values=pixels, multimask_output=multimask, **theirs)
    logits, iou = backbone.decode(backbone.encode([image]), Prompts(**ours), multimask=multimask)
    masks, scores = expected.pred_masks[0, 0], expected.iou_scores[0, 0]
    assert (logits[0] - masks).abs().max() <= 1e-4 * masks.std()
    torch.testing.assert_close(iou[0], scores, atol=1e-4, rtol=0)


@pytest.fixture(params=[True, False])
def saved2(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """A small SAM 2, and the folder where transformers saved it, with and without its memory."""
    parts = {
        "vision_config": VISION2,
        "prompt_encoder_config": PROMPT | {"image_size": SIDE},
        "mask_decoder_config": DECODER,
    }
    model = randomised(transformers.Sam2Model(transformers.Sam2Config(**parts)))
    if not request.param:
        model.save_pretrained(tmp_path)
        return model, str(tmp_path)
    memory = {
        "image_size": SIDE,
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 1,
        "memory_encoder_hidden_size": WIDTH,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": WIDTH,
    }
    video = transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**parts, **memory))
    missing, unexpected = video.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and not any("vision_encoder" in name for name in missing)
    video.save_pretrained(tmp_path)
    return model, str(tmp_path)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", ["points", "box", "box and points", "mask and points"])
def test_same_masks_as_transformers_sam2(
    saved2: tuple[Any, str],
    multimask: bool,
    prompt: str,
    assert_masks_of: Callable[[Any, Backbone, str, bool], None],
) -> None:
    model, folder = saved2
    assert_masks_of(model, load_backbone(f"hf:{folder}", device="cpu"), prompt, multimask)


@pytest.mark.parametrize("saved", ["sam_hq"], indirect=True)
def test_hq_part_by_part(saved: tuple[Any, str]) -> None:
    """transformers' parts give what ours give.

    Its whole forward does not: it upscales the image embedding from before the two-way transformer
    (transformers 5.23), where the authors take the one from behind it, as we do.
    """
    model, folder = saved
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    ours, theirs = backbone.sam.mask_decoder, model.mask_decoder
    noise = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=noise)
    features = torch.randn(1, WIDTH // 8, 16, 16, generator=noise)
    token = torch.randn(1, WIDTH, generator=noise)
    with torch.no_grad():
        embedding, early = encode_with_early(backbone.sam.image_encoder, pixels)
        expected, expected_early = model.get_image_embeddings(pixels)
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(early, expected_early[0].permute(0, 3, 1, 2))

        x = theirs.activation(theirs.encoder_norm(theirs.encoder_conv1(embedding)))
        y = theirs.activation(theirs.compress_vit_norm(theirs.compress_vit_conv1(early)))
        z = theirs.activation(theirs.mask_norm(theirs.mask_conv1(features)))
        expected = theirs.encoder_conv2(x) + theirs.compress_vit_conv2(y)
        torch.testing.assert_close(ours.image_features(embedding, early), expected)
        torch.testing.assert_close(
            ours.embedding_maskfeature(features),
            theirs.mask_conv2(z),
        )
        torch.testing.assert_close(ours.hf_mlp(token), theirs.hq_mask_mlp(token))
        torch.testing.assert_close(ours.hf_token.weight, theirs.hq_token.weight)


def test_shared_and_named(saved: tuple[Any, str]) -> None:
    one = load_backbone(f"hf:{saved[1]}", device="cpu")
    assert load_backbone(f"hf:{saved[1]}", device="cpu") is one
    with pytest.raises(ValueError, match="brings its own weights"):
        load_backbone(f"hf:{saved[1]}", checkpoint="sam.pth", device="cpu")


def test_what_is_no_sam_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="type 'vit'; expected 'sam', 'sam_hq', 'sam2', 'sam2_video'"
    ):
        load_backbone(f"hf:{tmp_path}", device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_backbone(f"hf:{tmp_path / 'nowhere'}", device="cpu")


def test_without_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"sam-gym\[hf\]"):
        load_backbone("hf:facebook/sam-vit-base", device="cpu")
