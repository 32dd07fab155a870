"""Presets of annotators."""

from pathlib import Path

import pytest
import tyro

from agents.annotation.clicks import AnnotateConfig
from agents.annotation.everything import AnnotateEverythingConfig
from agents.annotation.presets import CONFIGS, with_presets


def parsed(words: list[str]) -> AnnotateEverythingConfig:
    assert "--everything" in words
    return tyro.cli(AnnotateEverythingConfig, args=[w for w in words if w != "--everything"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_preset_is_read(name: str) -> None:
    words = with_presets(["--images", "photos", "--config", name])
    parsed(words).generator.validate()
    for config in (AnnotateConfig, AnnotateEverythingConfig):
        assert name in (config.__doc__ or "")


def test_flags_override_presets_and_later_presets_earlier_ones(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("segmentation: polygons\ngrid: [8, 4]\npred_iou_thresh: 1e-1\noverlays: null\n")
    command = ["--config", "dense", f"--config={own}", "--images", "a b", "--crop-n-layers", "2"]
    config = parsed(with_presets(command))
    assert (config.images, config.segmentation, config.overlays) == ("a b", "polygons", None)
    assert (config.generator.grid, config.generator.crop_n_layers) == ((8, 4), 2)
    assert config.generator.pred_iou_thresh == 0.1
    assert config.generator.min_mask_region_area == 100


def test_agents_and_videos_have_presets(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("policy: explicit\ncategories: star,ring\nkeep_best: true\n")
    words = with_presets(["--config", str(own), "--images", "a"])
    config = tyro.cli(AnnotateConfig, args=words)
    assert (config.policy, config.categories, config.keep_best) == ("explicit", "star,ring", True)
    own.write_text("everything: true\nframes: false\n")
    words = with_presets(["--video", "a.mp4", "--config", str(own)])
    assert words == ["--everything", "--no-frames", "--video", "a.mp4"]


def test_wrong_presets_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown config 'dens'. Did you mean 'dense'\?"):
        with_presets(["--config", "dens"])
    own = tmp_path / "own.yaml"
    own.write_text("everything: true\npred_iou_tresh: 0.5\n")
    with pytest.raises(ValueError, match=r"own.yaml: Unknown option 'pred_iou_tresh'.*'pred_iou_"):
        with_presets(["--config", str(own), "--images", "a"])
