"""Options of datasets, on every command line that reads one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tyro

from adaptation.evaluate import EvaluateConfig
from adaptation.options import StreamOptions
from adaptation.train import AdaptConfig
from agents.evaluate import EvaluateConfig as EvaluatePolicyConfig
from agents.ppo.checkpoint import check_same_config
from agents.ppo.command_line import read_config
from benchmarks.run import load
from sam_gym.backbones.embeddings.precompute import PrecomputeConfig
from sam_gym.backbones.micro.train import TrainMicroConfig
from sam_gym.data import DATASETS
from sam_gym.data.options import DatasetOptions
from sam_gym.data.streams import make_stream
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.continual import ContinualConfig

SKIP = ["--on-error", "skip"]
KWARGS = ["--dataset-kwargs", "include_crowd", "True", "min_area", "2"]


def write_coco(root: Path) -> Path:
    """Three splits, each with a sound object and a broken one on an image."""
    (root / "images").mkdir(parents=True)
    own = {"image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [20, 20, 4, 4]}
    square = [[4, 4, 14, 4, 14, 14, 4, 14]]
    data: dict[str, Any] = {
        "images": [{"id": 1, "height": 32, "width": 32}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            own | {"id": 1, "segmentation": square},
            own | {"id": 2, "segmentation": "x"},
        ],
    }
    for shade, split in enumerate(("train", "val")):
        cv2.imwrite(str(root / f"images/{split}.png"), np.full((32, 32, 3), 90 + shade, np.uint8))
        data["images"][0]["file_name"] = f"{split}.png"
        (root / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def shown(config_class: Any, *args: str) -> Any:
    return tyro.cli(config_class, args=[*args, *SKIP, *KWARGS])


COMMANDS: dict[str, Callable[[], Any]] = {
    "precompute": lambda: shown(PrecomputeConfig),
    "micro.train": lambda: shown(TrainMicroConfig),
    "adaptation.train": lambda: shown(tyro.conf.OmitArgPrefixes[AdaptConfig]).stream,
    "adaptation.evaluate": lambda: shown(EvaluateConfig, "--adapter", "x").stream,
    "continual": lambda: shown(load("continual")[1]).stream,
    "train_ppo": lambda: read_config([*SKIP, *KWARGS]).env_config,
    "train_ppo everything": lambda: (
        read_config(["--env", "SamEverything-v0", *SKIP, *KWARGS]).env_config
    ),
    "evaluate": lambda: shown(EvaluatePolicyConfig, "--policy", "random").env_config,
    **{
        name: lambda name=name: shown(load(name)[1])
        for name in ("everything", "generator", "interactive", "pointing")
    },
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines(command: str, tmp_path: Path) -> None:
    options = COMMANDS[command]()
    assert (options.on_error, options.dataset_kwargs) == (
        "skip",
        {"include_crowd": True, "min_area": 2},
    )
    made = {"on_error": "skip", "include_crowd": True, "min_area": 2}
    assert options.options_of("coco") == made


def test_on_error_reaches_the_dataset(tmp_path: Path) -> None:
    root = str(write_coco(tmp_path))
    options = DatasetOptions(dataset="coco", data=root)
    with pytest.raises(ValueError, match=r'on_error="skip" \(--on-error skip\)'):
        options.make_dataset("val")
    skipping = {"dataset": "coco", "data": root, "on_error": "skip"}
    for config in (DatasetOptions(**skipping), SamSegConfig(**skipping)):  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="skipped 1 records"):
            dataset = config.make_dataset("val")
        assert len(dataset[0].masks) == 1
    stream = StreamOptions(stream="coco", data=(root,), on_error="skip", retention=root)
    with pytest.warns(UserWarning, match="skipped 1 records"):
        assert len(stream.open()[0].split("val")) == 1
        assert stream.open_retention() is not None
    # Nothing is read, so nothing is skipped.
    assert len(DatasetOptions(on_error="skip").make_dataset("val", length=3)) == 3


def test_kwargs_with_an_option_of_their_own() -> None:
    for name, own in {"split": "--split", "root": "--data"}.items():
        options = DatasetOptions(dataset_kwargs={name: "x"})
        with pytest.raises(ValueError, match=f"dataset_kwargs may not hold '{name}': use .*{own}"):
            options.make_dataset("val")


def test_kwargs_of_a_stream() -> None:
    stream = StreamOptions(dataset_kwargs={"size": 64, "train_images": 2}, on_error="skip").open()
    assert stream[0].split("train")[0].image.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="Unknown option of stream 'scenes-domains' 'sise'"):
        StreamOptions(dataset_kwargs={"sise": 64}).open()


def write_domain(root: Path) -> Path:
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    stems = {split: [f"{split}{i}" for i in range(2)] for split in ("train", "val", "test")}
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for stem in [stem for own in stems.values() for stem in own]:
        cv2.imwrite(str(root / f"images/{stem}.png"), np.full((32, 32, 3), 90, np.uint8))
        cv2.imwrite(str(root / f"masks/{stem}.png"), mask)
    (root / "splits.json").write_text(json.dumps(stems))
    return root


def test_folders_skip_images(tmp_path: Path) -> None:
    root = write_domain(tmp_path / "blocks")
    (root / "masks/train0.png").unlink()
    with pytest.raises(FileNotFoundError, match="--on-error skip"):
        make_stream("folders", [str(root)])
    with pytest.warns(UserWarning, match="skipped 1 records: 1 x mask file is missing"):
        stream = make_stream("folders", [str(root)], on_error="skip")
    assert [len(stream[0].split(split)) for split in ("train", "val", "test")] == [1, 2, 2]
    config = ContinualConfig(stream="folders", data=[str(root)], on_error="skip")
    with pytest.warns(UserWarning, match="mask file is missing"):
        assert len(config.open_stream()[0].split("train")) == 1


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.reads_files])
def test_messages_name_the_options(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data PATH; environments: data='PATH'"):
        DatasetOptions(dataset=name).make_dataset("val")
    with pytest.raises(FileNotFoundError) as caught:
        DatasetOptions(dataset=name, data=str(tmp_path / "none")).make_dataset("val")
    assert "root=" not in str(caught.value)
    assert "Check the path" in str(caught.value)


def test_runs_from_before_the_option_resume() -> None:
    now = {"env_config": {"dataset": "coco", "on_error": "raise"}}
    check_same_config({"env_config": {"dataset": "coco"}}, now)
    with pytest.raises(ValueError, match="'raise' then, 'skip' now"):
        check_same_config(
            {"env_config": {"dataset": "coco"}},
            {"env_config": {"dataset": "coco", "on_error": "skip"}},
        )
