"""Features of several strides, tiles, heads on them, and the files and label maps of heads."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn
from torch.nn import functional as F

from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model, raw_spec
from sam_gym.backbones.adapters.semantic_head import SEMANTIC_HEADS
from sam_gym.backbones.encoders import RepVitEncoder, TinyVitEncoder, assemble
from sam_gym.backbones.micro.model import build_micro
from sam_gym.backbones.micro.v0 import build_micro_v0
from sam_gym.predictor import Predictor

SIZES = [(48, 64), (64, 40), (64, 64)]
CLASSES = ["sky", "road", "car"]


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def served(sam: Sam) -> Backbone:
    return Backbone("test", sam, torch.device("cpu"), torch.float32)


def trained(head: str, kind: str, backbone: Backbone) -> Any:
    """A head whose normalisations have seen something, and which sees every class."""
    torch.manual_seed(0)
    made = SEMANTIC_HEADS.get(head)(kind, raw_spec(backbone.sam, kind), CLASSES)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    made.eval()
    last = made.net[-1] if head == "seed" else made.classify
    with torch.no_grad():
        last.bias -= made(backbone.raw_source(kind).encode(images())).mean(dim=(0, 2, 3))
    return made


def adapter_of(head: str, kind: str, backbone: Backbone, name: str = "tiny") -> Adapter:
    return Adapter(
        *(name, backbone.weights_digest, "semantic", "head", ["street"]),
        semantic_type=head,
        semantic_features=kind,
        semantic_classes=CLASSES,
        semantic=trained(head, kind, backbone).state_dict(),
    )


@pytest.mark.parametrize(
    ("build", "strides"),
    [
        (build_micro, {"embedding": 24, "stage0": 4, "stage1": 8, "stage2": 16, "stage3": 32}),
        (build_micro_v0, {"embedding": 16, "stage0": 4, "stage1": 8, "stage2": 16}),
        (
            lambda: assemble(
                TinyVitEncoder(64, (8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 1, 1), out_chans=32), 32, 64
            ),
            {"embedding": 16, "stage0": 4, "stage1": 8, "stage2": 16, "stage3": 16},
        ),
        (
            lambda: assemble(RepVitEncoder(64, (8, 8, 16, 16), (1, 1, 1, 1), out_chans=32), 32, 64),
            {"embedding": 16, "stage0": 4, "stage1": 8, "stage2": 16, "stage3": 16},
        ),
    ],
    ids=["micro", "micro-v0", "mobile_sam", "repvit_sam"],
)
def test_stages_are_those_of_the_encoder(build: Callable[[], Sam], strides: dict[str, int]) -> None:
    torch.manual_seed(0)
    backbone = served(build())
    source = backbone.raw_source("stages")
    size, few = backbone.image_size, images()[:1]
    raw = source.encode(few)
    assert raw.spec == source.feature_spec
    assert {name: size // x.shape[-1] for name, x in raw.tensors.items()} == strides
    torch.testing.assert_close(raw.embedding, backbone.encode(few).embedding, rtol=0, atol=1e-5)
    assert all(float(x.float().std()) > 0 for x in raw.tensors.values())


def test_other_encoders_give_what_they_have(tiny: Backbone, build_sam2: Any) -> None:
    second = served(build_sam2())
    expected = {"embedding", "high_res_s1", "high_res_s0"}
    for backbone, names in ((tiny, {"embedding", "early"}), (second, expected)):
        for kind in ("stages", "tiles"):
            raw = backbone.raw_source(kind).encode(images())
            assert raw.spec == raw_spec(backbone.sam, kind)
            assert {name.removeprefix("tiled_") for name in raw.names} == names
            assert len(raw.names) == len(names) * (1 + (kind == "tiles"))


@pytest.mark.parametrize("height", [64, 32, 24])
def test_tiles_are_quarters_of_the_image_at_twice_the_size(tiny: Backbone, height: int) -> None:
    """Each by itself, with cv2's crops of an image of exactly that size."""
    size = tiny.image_size
    large = np.random.default_rng(1).integers(0, 256, (2 * height, 2 * size, 3), dtype=np.uint8)
    source = tiny.raw_source("tiles")
    raw = source.encode([large])
    assert raw.spec == source.feature_spec
    half = size // 16
    for row in range(2):
        for column in range(2):
            quarter = large[row * size : (row + 1) * size, column * size : (column + 1) * size]
            own = raw["tiled_embedding"][0, :, row * half :][:, :half, column * half :][..., :half]
            if not quarter.size:
                assert not own.any()
                continue
            padded = np.zeros((size, size, 3), np.uint8)
            padded[: len(quarter)] = quarter
            pixels = (torch.from_numpy(padded).permute(2, 0, 1) - tiny.sam.pixel_mean) / (
                tiny.sam.pixel_std
            )
            pixels[:, len(quarter) :] = 0
            with torch.no_grad():
                expected = tiny.sam.image_encoder(pixels[None])[0]
            torch.testing.assert_close(own.float(), expected, rtol=0, atol=4e-3)
    whole = tiny.encode([large]).embedding
    torch.testing.assert_close(raw.embedding, whole, rtol=0, atol=1e-5)


def test_the_seed_head_is_that_of_the_published_code(tiny: Backbone) -> None:
    """Written down here from its description: a file of it loads, and gives the same logits."""
    layers = [nn.Conv2d(32, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU()]
    layers += [nn.Conv2d(256, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU()]
    torch.manual_seed(1)
    published = nn.Sequential(OrderedDict(net=nn.Sequential(*layers, nn.Conv2d(256, 3, 1)))).eval()
    head = trained("seed", "embedding", tiny)
    head.load_state_dict(published.state_dict())
    raw = tiny.raw_source("embedding").encode(images())
    torch.testing.assert_close(head(raw), published(raw.embedding))
    with pytest.raises(ValueError, match="Unknown kind of features of the head 'seed'"):
        SEMANTIC_HEADS.get("seed")("tiles", raw_spec(tiny.sam, "tiles"), CLASSES)


@pytest.mark.parametrize(
    ("head", "kind"), [("seed", "embedding"), ("pyramid", "stages"), ("pyramid", "tiles")]
)
def test_a_file_gives_label_maps_of_the_size_of_images(
    head: str, kind: str, tiny: Backbone, tiny_env: dict[str, Any], tmp_path: Path
) -> None:
    path = adapter_of(head, kind, tiny).save(tmp_path / "a.safetensors")
    sam = {"checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    backbone = load_backbone("tiny", adapter=str(path), **sam)
    assert backbone.semantic_classes == tuple(CLASSES) and backbone.classes == ()
    found = backbone.segment(images())
    assert [own.shape for own in found] == SIZES
    logits = trained(head, kind, tiny)(tiny.raw_source(kind).encode(images()))
    for number, (labels, (height, width)) in enumerate(zip(found, SIZES, strict=True)):
        frame = F.interpolate(logits[number][None], (64, 64), mode="bilinear")[0].detach()
        expected = frame[:, :height, :width].argmax(dim=0).numpy()
        assert labels.dtype == np.uint8 and (labels == expected).mean() > 0.999
        np.testing.assert_array_equal(backbone.segment(images()[number : number + 1])[0], labels)
    assert len({*np.unique(np.concatenate([own.ravel() for own in found]))}) > 1
    predictor = Predictor(backbone)
    with pytest.raises(RuntimeError, match="before segment"):
        predictor.segment()
    predictor.set_images(images())
    for own, other in zip(predictor.segment(), found, strict=True):
        np.testing.assert_array_equal(own, other)
    # Masks are those of the SAM.
    features = tiny.encode(images()).embedding
    torch.testing.assert_close(backbone.encode(images()).embedding, features)


def test_large_images_are_enlarged_as_masks_are(tiny: Backbone) -> None:
    head = trained("seed", "embedding", tiny)
    backbone = tiny.with_model(Model(tiny.sam, "embedding", segmenter=head))
    image = cv2.resize(images()[0], (200, 150))
    logits = backbone.segment_logits(tiny.raw_source("embedding").encode([image]))
    expected = tiny.masks_at(logits[0], (150, 200)).argmax(dim=0)
    np.testing.assert_array_equal(backbone.segment([image])[0], expected.numpy())


def test_a_checkpoint_of_the_published_code_is_an_adapter(
    tiny: Backbone, tiny_env: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make = SEMANTIC_HEADS.get("seed")
    head = make("embedding", raw_spec(tiny.sam, "embedding"), [f"class{k}" for k in range(5)])
    path = tmp_path / "seg_head_epoch_5.pth"
    torch.save(head.state_dict(), path)
    sam = {"checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    backbone = load_backbone("tiny", adapter=str(path), **sam)
    assert backbone.semantic_classes == ("road", "sidewalk", "building", "person", "car")
    logits = head.eval()(tiny.raw_source("embedding").encode(images()))
    for own, size, labels in zip(logits, SIZES, backbone.segment(images()), strict=True):
        expected = tiny.masks_at(own.detach(), size).argmax(dim=0).numpy()
        np.testing.assert_array_equal(labels, expected)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"epoch_5.pth: not a head of the SAM-Cityscapes code"):
        load_backbone("tiny", adapter=str(path), **sam)
    wide = make("embedding", raw_spec(served(build_micro()).sam, "embedding"), CLASSES)
    torch.save(wide.state_dict(), path)
    with pytest.raises(ValueError, match="does not fit this backbone"):
        load_backbone("tiny", adapter=str(path), **sam)


def test_what_is_wrong_is_said(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no semantic head: pass the adapter of one"):
        tiny.segment(images())
    assert tiny.semantic_classes == ()
    path = adapter_of("seed", "embedding", tiny).save(tmp_path / "a.safetensors")
    kept = Adapter.load(path)
    assert kept.experts == [] and kept.tune == "head" and kept.semantic_classes == CLASSES
    kept.semantic.pop("net.0.weight")
    with pytest.raises(ValueError, match="1 weights differ in name or shape, first: net.0.weight"):
        tiny.adapted_model(kept)
