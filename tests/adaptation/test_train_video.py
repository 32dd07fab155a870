"""Training and evaluation of trackers on videos, over a tiny SAM 2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as rle
from safetensors.torch import load_file

from adaptation import evaluate_video, train_video
from adaptation.evaluate_video import gain
from adaptation.video.clips import Clip, draw_clip
from adaptation.video.options import CONFIGS, VideoOptions, parse_config
from adaptation.video.trainer import TrackerTrainer
from sam_gym.backbones import load_backbone
from sam_gym.backbones.sam2 import Sam2
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data import make_video_dataset
from sam_gym.data.base import FrameAnnotation


@pytest.fixture
def tiny(tiny_video: str) -> str:
    return tiny_video


#: Small clips, few steps.
FEW = (
    *("--device", "cpu", "--dataset", "clips", "--dataset-kwargs", "size", "64", "frames", "6"),
    *("--frames", "4", "--objects", "2", "--batch-size", "2", "--steps", "3", "--evaluate", "1"),
    *("--learning-rate", "1e-3", "--clip", "1", "--prompt.clicks", "2", "--videos", "4"),
    *("--pictures", "0"),
)


def run(tiny: str, out: Path, *more: str) -> dict[str, Any]:
    return train_video.main(["--backbone", tiny, *FEW, "--out", str(out), *more])


def test_a_run_and_its_evaluation(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    result = run(tiny, out, "--pictures", "1", "--evaluate", "2")
    names = {"adapter.safetensors", "checkpoint.pt", "config.yaml", "run.json"}
    assert {path.name for path in out.iterdir()} == names | {"pictures", "tensorboard"}
    assert len(list((out / "pictures").iterdir())) == 2
    assert json.loads((out / "run.json").read_text()) == result
    assert list(result["scores"]) == ["0", "3"]
    with pytest.raises(FileExistsError, match="finished run"):
        run(tiny, out)

    report = evaluate_video.main(
        [
            *("--backbone", tiny, "--device", "cpu", "--out", str(tmp_path / "report")),
            *("--dataset", "clips", "--split", "val", "--videos", "2", "--overlays", "1"),
            *("--dataset-kwargs", "size", "64", "frames", "6", "length", "4"),
            *("--adapter", str(out / "adapter.safetensors")),
        ]
    )
    # The training has measured the same videos before its first step and after its last.
    for name, step in (("adapted", "3"), ("without adapter", "0")):
        measured = result["scores"][step]["J&F"]
        assert report["scores"][name]["J&F"] == pytest.approx(measured, abs=2e-4)
    folder = tmp_path / "report"
    assert len(list(folder.glob("overlay-*.gif"))) == 1
    header, *rows = (folder / "objects.csv").read_text().splitlines()
    assert header.startswith("method,video,object,category,frames,J&F,J,")
    assert len(rows) == 2 * report["scores"]["adapted"]["objects"]
    assert "gain" in capsys.readouterr().out

    adapted = load_backbone(tiny, device="cpu", adapter=str(out / "adapter.safetensors"))
    plain = load_backbone(tiny, device="cpu")
    assert adapted.identity != plain.identity
    changed = {
        name
        for name, value in adapted.model.sam.state_dict().items()
        if not torch.equal(value, plain.sam.state_dict()[name])
    }
    assert changed and all(name.startswith(("mask_decoder.", "no_mem_embed")) for name in changed)
    assert not torch.equal(
        adapted.memory.memory_encoder.out_proj.weight, plain.memory.memory_encoder.out_proj.weight
    )


class CutOff(Exception):
    """The process dies."""


def test_a_run_cut_off_and_a_run_repeated_give_the_same_weights(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, again = (tmp_path / name for name in ("whole", "parts", "again"))
    result = run(tiny, whole)
    step = TrackerTrainer._descend

    def dying_step(self: TrackerTrainer, *args: Any) -> dict[str, float]:
        if self.step == 2:
            raise CutOff
        return step(self, *args)

    monkeypatch.setattr(TrackerTrainer, "_descend", dying_step)
    with pytest.raises(CutOff):
        run(tiny, parts, "--checkpoint-every", "1")
    monkeypatch.setattr(TrackerTrainer, "_descend", step)
    with pytest.raises(FileExistsError, match="unfinished run"):
        run(tiny, parts)
    with pytest.raises(ValueError, match="with another settings"):
        run(tiny, parts, "--resume", "--seed", "1")
    assert "seed: 1" not in (parts / "config.yaml").read_text()
    assert run(tiny, parts, "--resume") == result
    repeated = train_video.main(["--config", str(whole / "config.yaml"), "--out", str(again)])
    assert repeated == result
    expected = load_file(whole / "adapter.safetensors")
    for folder in (parts, again):
        weights = load_file(folder / "adapter.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config", ["sam2", "seed", "dice_loss_only"])
def test_configs_train_their_parts(config: str, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / config
    rest = [arg for arg in FEW if arg not in ("--learning-rate", "1e-3")]
    train_video.main(
        [
            *("--config", config, "--backbone", tiny, *rest, "--held-out", "none"),
            *("--steps", "1", "--precision", "32-true", "--out", str(out)),
        ]
    )
    trained = {name.split(".")[1] for name in load_file(out / "adapter.safetensors")}
    memory = {"memory_attention", "memory_encoder"}
    if config == "sam2":
        memory |= {"maskmem_tpos_enc", "no_obj_ptr", "no_obj_embed_spatial", "mask_downsample"}
        memory |= {"obj_ptr_proj", "obj_ptr_tpos_proj"}
        memory |= {"mask_decoder", "no_mem_embed", "prompt_encoder", "image_encoder"}
    assert trained == memory
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["loss"]["dice"] == (20 if config == "dice_loss_only" else 1)
    assert set(CONFIGS) == {"sam2", "seed", "dice_loss_only"}


def test_the_loss_falls_on_one_clip(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    def record(self: TrackerTrainer, name: str, value: float) -> None:
        if name == "train/loss":
            losses.append(value)

    monkeypatch.setattr(TrackerTrainer, "_record", record)
    same = ("--videos", "1", "--reverse", "0", "--flip", "0", "--dataset-kwargs", "size", "64")
    run(
        *(tiny, tmp_path / "run", "--held-out", "none", *same, "frames", "4"),
        *("--prompt.kind", "mask", "--prompt.corrected", "0", "--steps", "30"),
        *("--learning-rate", "3e-3", "--parts", "memory", "decoder", "image_encoder"),
        *("--batch-size", "1"),
    )
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses


def test_training_goes_on_from_an_adapter(tiny: str, tmp_path: Path) -> None:
    """The new adapter holds what both trainings have changed."""
    run(tiny, tmp_path / "one", "--parts", "decoder", "--held-out", "none")
    first = str(tmp_path / "one" / "adapter.safetensors")
    run(tiny, tmp_path / "two", "--parts", "memory_encoder", "--adapter", first)
    one, two = (load_file(tmp_path / k / "adapter.safetensors") for k in ("one", "two"))
    kept = one.keys() & two.keys()  # what the first training left as published is left out
    assert kept and all(torch.equal(two[name], one[name]) for name in kept)
    assert any(name.startswith("memory.memory_encoder.") for name in two)
    backbone = load_backbone(
        tiny, device="cpu", adapter=str(tmp_path / "two" / "adapter.safetensors")
    )
    assert isinstance(VideoTracker(backbone).sam, Sam2)


def test_edgetam_is_trained(tiny_edgetam: str, tmp_path: Path) -> None:
    """Its perceiver with the memory encoder; statistics of its encoder stay."""
    parts = ("--parts", "memory_encoder", "image_encoder")
    run(tiny_edgetam, tmp_path / "run", *parts, "--held-out", "none")
    path = tmp_path / "run" / "adapter.safetensors"
    names = load_file(path).keys()
    trained = ("memory.spatial_perceiver.latents", "memory.memory_encoder.out_proj.weight")
    assert names >= {*trained} and not any("memory_attention" in name for name in names)
    plain, adapted = (
        load_backbone(tiny_edgetam, device="cpu", adapter=adapter) for adapter in (None, str(path))
    )
    for memory in (plain.memory, adapted.memory):
        assert memory is not None
    moved = adapted.memory.spatial_perceiver.latents - plain.memory.spatial_perceiver.latents
    assert moved.abs().max() > 0
    before, after = (own.model.sam.state_dict() for own in (plain, adapted))
    assert not torch.equal(
        *(own["image_encoder.trunk.stem.conv1.c.weight"] for own in (before, after))
    )
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)


def write_videos(root: Path, lengths: dict[str, int], **changes: Any) -> str:
    """Videos of a moving square, train and val alike, as COCO-style JSON."""
    for split in ("train", "val"):
        (root / "images").mkdir(parents=True, exist_ok=True)
        tables: dict[str, list[Any]] = {"images": [], "annotations": []}
        for video, length in lengths.items():
            for order in range(length):
                name = f"{split}-{video}-{order}.png"
                mask = np.zeros((32, 32), np.uint8)
                mask[8:20, 4 + order : 16 + order] = 1
                cv2.imwrite(str(root / "images" / name), np.dstack([40 + 180 * mask] * 3))
                number = len(tables["images"]) + 1
                counts = rle.encode(np.asfortranarray(mask))["counts"].decode()
                tables["images"].append(
                    {"id": number, "file_name": name, "height": 32, "width": 32}
                    | {"video_id": video, "order_in_video": order}
                )
                tables["annotations"].append(
                    {"id": number, "image_id": number, "category_id": 1, "track_id": 1}
                    | {"segmentation": {"size": [32, 32], "counts": counts}, "iscrowd": 0}
                )
        content = tables | {"categories": [{"id": 1, "name": "square"}]} | changes
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return str(root)


#: The command, and whether it has imported torch.
COMMAND = """
import sys
from adaptation import train_video
from sam_gym.utils import cli
try:
    cli.run(lambda: train_video.main(sys.argv[1:]), status=2)
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no categories", r"instances_train.json: categories is empty"),
        ("short video", r"train-b-0.png: video 'b' has 5 frames, .* needs 6: lower --frames"),
        ("missing frame", r"train-a-3.png"),
    ],
)
def test_wrong_data_is_refused_before_torch_is_imported(
    case: str, message: str, tmp_path: Path
) -> None:
    changes = {"categories": []} if case == "no categories" else {}
    root = write_videos(tmp_path / "data", {"a": 8, "b": 5}, **changes)
    if case == "missing frame":
        (tmp_path / "data" / "images" / "train-a-3.png").unlink()
    done = subprocess.run(
        [
            *(sys.executable, "-c", COMMAND, "--dataset", "coco-video", "--data", root),
            *("--frames", "6", "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == "False" and done.stderr.count("\n") == 1
    import re

    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_training_on_coco_json(tiny: str, tmp_path: Path) -> None:
    root = write_videos(tmp_path / "data", {"a": 5, "b": 5})
    result = train_video.main(
        [
            *("--backbone", tiny, "--device", "cpu", "--dataset", "coco-video", "--data", root),
            *("--frames", "3", "--batch-size", "2", "--steps", "2", "--config", "seed"),
            *("--pictures", "0", "--out", str(tmp_path / "run")),
        ]
    )
    assert set(result["scores"]) == {"0", "2"}


def test_the_smallest_object_is_prompted_by_its_pixel(tiny: str) -> None:
    """Not by the whole frame, where resizing skips the object."""

    class Speck:
        objects, size = (1,), (600, 800)

        def annotation(self, frame: int) -> FrameAnnotation:
            masks = np.zeros((1, *self.size), bool)
            masks[0, 311, 409] = True
            return FrameAnnotation(masks, np.ones(1, bool), None)

    config = parse_config(["--backbone", tiny, *FEW])
    trainer = TrackerTrainer(config, config.video.open("train"), None)
    speck: Any = Speck()
    first, *_ = trainer._truth(Clip(speck, 0, (0, 1), (0,), False))
    assert 1 <= np.count_nonzero(first) <= 4


def test_clips_show_their_objects() -> None:
    """The first frame has every object; frames and masks are mirrored together."""
    dataset = make_video_dataset("clips", size=64, frames=12, length=3)
    options = VideoOptions(frames=4, stride=2, objects=2)
    seen = set()
    for seed in range(24):
        clip = draw_clip(np.random.default_rng(seed), dataset, options)
        steps = np.diff(clip.frames)
        assert len(clip.frames) == 4 and set(steps) <= {2, -2}
        masks, known, _ = clip.masks(0)
        assert masks.any(axis=(1, 2)).all() and known.all() and 1 <= len(masks) <= 2
        video = dataset[clip.number]
        truth = video.annotation(clip.frames[0]).masks[list(clip.objects)]
        image = video.image(clip.frames[0])
        side = slice(None, None, -1 if clip.is_flipped else 1)
        assert np.array_equal(masks, truth[..., side])
        assert np.array_equal(clip.image(0), image[:, side])
        seen.add((steps[0] > 0, clip.is_flipped))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "sam3"], "Did you mean 'sam2'"),
        (["--parts", "decodr"], None),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--overwrite", "--out", "x"], "pass one of them"),
        (
            ["--loss.focal", "0", "--loss.dice", "0", "--loss.iou", "0", "--loss.score", "0"],
            "are 0",
        ),
        (["--dataset", "davis", "--data", "nowhere"], "nowhere"),
        (["--dataset", "clips", "--frames", "30"], "has 24 frames, and a clip of 30"),
    ],
)
def test_wrong_options(arguments: list[str], message: str | None) -> None:
    if message is None:
        with pytest.raises(SystemExit):
            parse_config(arguments)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_video.main(arguments)


def test_the_interval_of_a_gain() -> None:
    """Two videos whose objects gain 0.1 and 0.3: the mean, and resamples between the two."""
    rows = []
    for video, value in (("a", 0.1), ("b", 0.3)):
        for number in range(3):
            rows.append({"method": "one", "video": video, "object": number, "J&F": 0.5 + value})
            rows.append({"method": "other", "video": video, "object": number, "J&F": 0.5})
    found = gain(rows, "one", "other")
    assert found["J&F"] == pytest.approx(0.2)
    assert found["low"] == pytest.approx(0.1) and found["high"] == pytest.approx(0.3)
    one = gain([row for row in rows if row["video"] == "a"], "one", "other")
    assert one == {"J&F": pytest.approx(0.1), "low": None, "high": None}
