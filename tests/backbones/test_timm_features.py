"""Features of timm's models: against timm on the same pixels, in heads and files, and errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch.nn import functional as F

from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import raw_spec
from sam_gym.backbones.adapters.semantic_head import SEMANTIC_HEADS
from sam_gym.backbones.timm_features import TimmEncoder, check_features

MEAN, STD = (0.2, 0.5, 0.6), (0.3, 0.2, 0.1)
SaveModel = Callable[..., str]


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Saves a model with random weights in a folder, and returns its name for timm."""

    def save(name: str, folder: str = "model", seed: int = 0, **options: Any) -> str:
        torch.manual_seed(seed)
        model = timm.create_model(name, **options)
        save_for_hf(
            model,
            str(tmp_path / folder),
            model_args=options or None,
            safe_serialization=True,
            data_config={"mean": MEAN, "std": STD},
        )
        return f"local-dir:{tmp_path / folder}"

    return save


def image(side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """As timm's transform does it."""
    values = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(values).float().permute(2, 0, 1)[None]


SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}


@pytest.mark.parametrize(
    ("name", "options", "strides"),
    [
        ("test_efficientnet", {}, [4, 8, 16, 32]),
        ("test_vit", {}, [16, 16, 16]),
        ("swin_tiny_patch4_window7_224", SWIN, [4, 8, 16, 32]),
    ],
    ids=["convolutions", "transformer", "channels last"],
)
def test_features_are_those_of_timm(
    name: str, options: dict[str, Any], strides: list[int], tiny: Backbone, save_model: SaveModel
) -> None:
    """Of a frame that the image fills, normalised as timm says."""
    saved = save_model(name, **options)
    source = tiny.raw_source(f"stages@timm:{saved}")
    raw = source.encode([image()])
    assert raw.spec == source.feature_spec
    names = [*(f"stage{k}" for k in range(len(strides) - 1)), "embedding"]
    assert {*names} == {*raw.names}
    sized = {} if name == "test_efficientnet" else {"img_size": 64}
    reference = timm.create_model(saved, pretrained=True, **sized).eval()
    kept = [-3, -2, -1] if name == "test_vit" else [-4, -3, -2, -1]
    with torch.no_grad():
        maps = reference.forward_intermediates(  # type: ignore[operator]
            normalised(image()),
            indices=len(kept),
            norm=name == "test_vit",
            intermediates_only=True,
        )[-len(kept) :]
        if name == "test_vit":
            last = reference.forward_features(normalised(image()))[:, 1:]  # type: ignore[operator]
            torch.testing.assert_close(raw.embedding.flatten(2).transpose(1, 2), last)
    for own, stride, expected in zip(names, strides, maps, strict=True):
        assert raw[own].shape[-1] == 64 // stride
        torch.testing.assert_close(raw[own].float(), expected, rtol=2e-3, atol=2e-3)
    only = tiny.raw_source(f"embedding@timm:{saved}").encode([image()])
    assert only.names == ("embedding",) and torch.equal(only.embedding, raw.embedding)


def test_frames_are_enlarged_to_a_multiple_of_the_stride(save_model: SaveModel) -> None:
    zeros, ones = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    encoder = TimmEncoder(save_model("test_efficientnet"), 80, zeros, ones)
    pixels = torch.from_numpy(image(80)).permute(2, 0, 1)[None].float()
    found = encoder(pixels)
    assert found.embedding.shape[-2:] == (3, 3)  # of 96 pixels
    large = F.interpolate(pixels, (96, 96), mode="bilinear", align_corners=False)
    maps = encoder.trunk(normalised(large[0].permute(1, 2, 0).numpy()))
    torch.testing.assert_close(found.embedding, maps[-1], rtol=1e-3, atol=1e-3)


def test_tiles_are_encoded_by_themselves(tiny: Backbone, save_model: SaveModel) -> None:
    kind = f"@timm:{save_model('test_efficientnet')}"
    large = image(128)
    raw = tiny.raw_source(f"tiles{kind}").encode([large])
    assert raw.spec == raw_spec(tiny.sam, f"tiles{kind}")
    quarter = tiny.raw_source(f"stages{kind}").encode([np.ascontiguousarray(large[64:, :64])])
    own = raw["tiled_embedding"][..., 2:, :2].float()
    torch.testing.assert_close(own, quarter.embedding, rtol=2e-3, atol=2e-3)


def adapter_of(head: str, kind: str, backbone: Backbone) -> Adapter:
    torch.manual_seed(0)
    source = backbone.raw_source(kind)
    made: Any = SEMANTIC_HEADS.get(head)(kind, source.feature_spec, ["sky", "road"])
    made.eval()
    last = made.net[-1] if head == "seed" else made.classify
    with torch.no_grad():  # both classes occur
        last.bias -= made(source.encode([image(96)])).mean(dim=(0, 2, 3))
    return Adapter(
        *("tiny", backbone.weights_digest, "semantic", "head", ["street"]),
        semantic_type=head,
        semantic_features=kind,
        semantic_classes=["sky", "road"],
        semantic_encoder=source.encoder_digest,
        semantic=made.state_dict(),
    )


@pytest.mark.parametrize(("head", "kind"), [("seed", "embedding"), ("pyramid", "tiles")])
def test_a_head_on_them_is_an_adapter(
    head: str,
    kind: str,
    tiny: Backbone,
    tiny_env: dict[str, Any],
    save_model: SaveModel,
    tmp_path: Path,
) -> None:
    name = save_model("test_efficientnet")
    path = adapter_of(head, f"{kind}@timm:{name}", tiny).save(tmp_path / "a.safetensors")
    sam = {"checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    backbone = load_backbone("tiny", adapter=str(path), **sam)
    (labels,) = backbone.segment([image(96)])
    assert labels.shape == (96, 96) and len(np.unique(labels)) > 1
    # The adapter names the weights, not only the model.
    own = Adapter.load(path)
    own.semantic_encoder = "0" * 32
    with pytest.raises(ValueError, match=r"trained on other weights of timm's 'local-dir:"):
        own.model(backbone.sam)


def test_other_weights_have_other_features_on_disk(tiny: Backbone, save_model: SaveModel) -> None:
    kinds = [
        f"embedding@timm:{save_model('test_efficientnet', f'model{seed}', seed)}"
        for seed in range(2)
    ]
    identities = {tiny.raw_source(kind).identity for kind in ["embedding", *kinds]}
    assert len(identities) == 3


def test_wrong_names_are_errors(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    for features in ("dino", "timm:", "vit_small"):
        with pytest.raises(ValueError, match="sam or timm:NAME"):
            check_features(features)
    with pytest.raises(ValueError, match=r"no model 'nothing_like_it' .*list_models"):
        tiny.raw_source("stages@timm:nothing_like_it")
    with pytest.raises(ValueError, match="Unknown kind of raw features 'early'"):
        tiny.raw_source("early@timm:test_vit")

    def offline(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="local-dir:PATH"):
        tiny.raw_source("stages@timm:test_vit")
