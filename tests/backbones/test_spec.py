"""The table of backbones: what is derived from it, and a backbone that is added from outside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from adaptation.options import ModelOptions
from agents.annotation.everything import AnnotateEverythingConfig
from benchmarks.options import BackboneOptions
from benchmarks.throughput.reference import check_comparable
from sam_gym.backbones import BACKBONES, Backbone, download, load_backbone, register_backbone
from sam_gym.backbones.embeddings import precompute
from sam_gym.backbones.hq import feature_spec
from sam_gym.backbones.spec import (
    PublishedWeights,
    backbone_table,
    backbones_by_size,
    suited_thresholds,
)
from sam_gym.envs.click import SamSegConfig

#: A user's script: a SAM of their own, under a name, in every place that takes one.
OUTSIDE = """
import gymnasium as gym
import numpy as np
import torch
import sam_gym
from sam_gym import Backbone, BackboneSpec, MaskGenerator, load_backbone, register_backbone
from sam_gym.backbones import PublishedWeights, download
from sam_gym.backbones.encoders import assemble
from sam_gym.backbones.micro.model import STRIDE, UPSCALING, MicroEncoder


def build():
    torch.manual_seed(0)
    encoder = MicroEncoder(img_size=192, out_chans=64, depth=1)
    return assemble(encoder, width=64, mlp_dim=128, stride=STRIDE, upscaling=UPSCALING)


torch.save({"model": {f"own.{k}": v for k, v in build().state_dict().items()}}, "own.pth")
class OwnService(Backbone):
    def __repr__(self):
        return f"OwnService({self.name!r})"


register_backbone(
    BackboneSpec(
        name="own_sam",
        service=OwnService,
        build=build,
        description="A SAM of my own",
        weights=PublishedWeights("https://example.org/own.pth", "0" * 64, 12),
        convert=lambda state: {k.removeprefix("own."): v for k, v in state.items()},
        thresholds=(0.3, 0.4),
        input_size=192,
    )
)
given = {"checkpoint": "own.pth", "device": "cpu"}
backbone = load_backbone("own_sam", **given)
assert backbone.image_size == 192 and load_backbone("own_sam", **given) is backbone
assert repr(backbone) == "OwnService('own_sam')"
assert MaskGenerator(backbone).thresholds == (0.3, 0.4)
env = gym.make("SamSeg-v0", backbone="own_sam", dataset_kwargs={"length": 2}, **given)
env.reset(seed=0)
assert np.isfinite(env.step(env.action_space.sample())[1])
env.close()
download.main(download.DownloadConfig())
"""


def test_a_backbone_is_added_from_outside(
    start_script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    done = start_script("script.py").finish()
    assert done.returncode == 0, done.stderr
    assert "own_sam: not here; https://example.org/own.pth (12 MB)" in done.stdout


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="backbone 'micro' is registered already"):
        register_backbone(BACKBONES.get("micro"))


def test_without_weights_a_checkpoint_is_needed(
    add_backbone: Callable[..., None], tiny_checkpoint: str
) -> None:
    add_backbone("bare", build=BACKBONES.get("micro").build)
    with pytest.raises(ValueError, match="'bare' has no weights of its own: pass checkpoint="):
        load_backbone("bare", device="cpu")


@pytest.mark.parametrize("name", BACKBONES.names())
def test_specifications_describe_their_models(name: str) -> None:
    spec = BACKBONES.get(name)
    with torch.device("meta"):
        sam = spec.build()
    assert spec.input_size == sam.image_encoder.img_size
    assert spec.features == tuple(feature_spec(sam).tensors)
    if isinstance(spec.weights, PublishedWeights):
        with torch.device("meta"):
            parts = [sam] if spec.memory is None else [sam, spec.memory[0]()]
        weights = [own for part in parts for own in part.state_dict().values()]
        size = sum(own.numel() * own.element_size() for own in weights) / 1e6
        assert spec.megabytes == pytest.approx(size, rel=0.05)
    else:
        assert isinstance(spec.weights, Path) and spec.weights.is_file()
    assert spec.description and spec.source and 0 < min(spec.thresholds) < 1


@pytest.mark.parametrize(
    "config",
    [
        ModelOptions,
        AnnotateEverythingConfig,
        BackboneOptions,
        precompute.PrecomputeConfig,
        SamSegConfig,
        download.DownloadConfig,
    ],
)
def test_help_lists_the_table(
    config: type, add_backbone: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = PublishedWeights("https://example.org/own.pth", "0" * 64, 12)
    add_backbone("own_sam", build=BACKBONES.get("micro").build, weights=weights)
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    listed = backbones_by_size()
    if config is download.DownloadConfig:
        listed = [BACKBONES.get(name) for name in download.published_weights()]
    names = [spec.name for spec in listed]
    assert ", ".join(names) in text and "own_sam" in names


def test_errors_list_the_table() -> None:
    with pytest.raises(ValueError, match="hq_vit_b: segment_anything's SamPredictor") as caught:
        check_comparable("hq_vit_b")
    assert "micro, mobile_sam, repvit_sam, vit_b, vit_l, vit_h" in str(caught.value)
    for spec in backbones_by_size():
        if spec.features == ("embedding",) and spec.memory is None:
            check_comparable(spec.name)
    with pytest.raises(ValueError, match="micro_video: segment_anything's SamPredictor"):
        check_comparable("micro_video")


def test_thresholds_are_those_of_the_backbone(
    tiny: Backbone, build_sam2: Callable[..., Any]
) -> None:
    """Of a model of the hub, those of its kind."""

    def named(name: str, sam: Any) -> Backbone:
        return Backbone(name, sam, torch.device("cpu"), torch.float32)

    for name, spec in BACKBONES.items():
        assert suited_thresholds(named(name, tiny.private_copy())) == spec.thresholds
    assert suited_thresholds(named("hf:facebook/sam-vit-base", tiny.sam)) == (0.88, 0.95)
    second = named("hf:facebook/sam2.1-hiera-tiny", build_sam2())
    assert suited_thresholds(second) == BACKBONES.get("sam2.1_hiera_tiny").thresholds == (0.8, 0.95)


def test_the_table_as_markdown(add_backbone: Callable[..., None]) -> None:
    add_backbone("bare", build=BACKBONES.get("micro").build)
    header, line, *rows = backbone_table().splitlines()
    assert header.count("|") == line.count("|") == 5 and len(rows) == len(BACKBONES.names())
    assert "| `bare` | A SAM of the tests | `checkpoint=` |  |" in rows
    (row,) = (row for row in rows if "`vit_h`" in row)
    assert "2,565 MB, [download](https://dl.fbaipublicfiles.com/" in row and "Apache-2.0" in row
    assert any("5.5 MB, bundled" in row for row in rows)
    (row,) = (row for row in rows if "`edgetam`" in row)
    assert "edgetam.pt), `checkpoint=` |" in row
