"""The table of datasets, and a dataset that is registered from outside."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tyro

import sam_gym  # noqa: F401 (registers the environments)
from adaptation.options import StreamOptions
from agents.ppo.command_line import read_config
from agents.tasks import task_of
from benchmarks import pointing
from benchmarks.everything import benchmark as everything
from benchmarks.interactive import benchmark as interactive
from sam_gym.backbones.embeddings import precompute
from sam_gym.data import (
    DATASETS,
    Dataset,
    DatasetSpec,
    Sample,
    dataset_help,
    make_dataset,
    register_dataset,
)
from sam_gym.data.streams import dataset_stream
from sam_gym.data.synthetic.domains.dataset import DOMAINS
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.everything import EverythingConfig


class Squares:
    """One square per image, as an outsider writes it."""

    name = "squares"
    categories = ("square",)

    def __init__(self, split: str = "train", *, side: int = 24, length: int | None = None) -> None:
        self.split, self.side, self.length = split, side, length

    def __len__(self) -> int:
        return 1000 if self.length is None else self.length

    def __getitem__(self, index: int) -> Sample:
        mask = np.zeros((1, 64, 64), bool)
        mask[0, 10 : 10 + self.side, 20 : 20 + self.side] = True
        image = np.full((64, 64, 3), 40, np.uint8)
        image[mask[0]] = 200
        return Sample(image, mask, np.zeros(1, np.int64), f"squares/{self.split}/{index}")

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(len(self))), None


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> DatasetSpec:
    monkeypatch.setattr(DATASETS, "_items", dict(DATASETS.items()))
    return register_dataset(
        DatasetSpec(
            name="squares",
            entry_point=f"{__name__}:Squares",
            description="A square.",
            procedural=True,
            held_out_split="val",
        )
    )


def test_a_dataset_from_outside_is_made_by_name(squares: DatasetSpec) -> None:
    dataset = make_dataset("squares", "val", side=8)
    assert isinstance(dataset, Dataset) and dataset[0].masks.sum() == 64
    assert set(squares.parameters) == {"side", "length"}
    with pytest.raises(ValueError, match=r"Unknown option of dataset 'squares' 'sides'\."):
        make_dataset("squares", sides=8)
    with pytest.raises(ValueError, match="dataset 'squares' is registered already"):
        register_dataset(squares)


def test_a_dataset_from_outside_plays_in_an_environment(squares: DatasetSpec) -> None:
    env = gym.make("SamSeg-v0", dataset="squares", dataset_kwargs={"side": 30})
    _, info = env.reset(seed=0)
    assert info["target_name"] == "square" and info["source"].startswith("squares/train/")
    assert env.unwrapped.core.config.held_out_split == "val"
    env.close()


def test_a_dataset_from_outside_is_a_stream(squares: DatasetSpec) -> None:
    stream = dataset_stream("squares", length=3)
    assert stream.names == ("squares",) and len(stream[0].split("val")) == 3
    assert StreamOptions(stream="squares").open().names == ("squares",)


@pytest.mark.parametrize("name", DATASETS.names())
def test_specs_say_what_the_factories_take(name: str) -> None:
    spec = DATASETS.get(name)
    assert spec.name == name and spec.description.endswith(".")
    assert ("length" in spec.parameters) == spec.procedural
    assert ("root" in spec.parameters) == spec.reads_files
    assert spec.held_out_split in ("val", "test")


def test_a_domain_without_its_kind_lists_the_kinds() -> None:
    with pytest.raises(ValueError, match=f"needs a kind: one of {', '.join(DOMAINS)}"):
        gym.make("SamSeg-v0", dataset="domain")


def test_train_images_limit_a_domain() -> None:
    options = ["--dataset", "domain", "--dataset-kwargs", "kind", "cells", "--train-images", "7"]
    run = read_config(options)
    training = task_of("SamSeg-v0").training_config(run)
    assert isinstance(training, SamSegConfig) and len(training.open_dataset()) == 7


def test_a_required_option_is_named(squares: DatasetSpec) -> None:
    spec = DatasetSpec(name="needy", entry_point=f"{__name__}:needy", description="Needs.")
    with pytest.raises(ValueError, match=r"Dataset 'needy' needs the option 'colour'\."):
        spec.make("val")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scenes", {"categories": 3}, "categories must be text or a list or None, got 3"),
        ("scenes", {"material": "wood"}, "material must be a function, got 'wood'"),
        ("rooms-panoramas", {"width": "wide"}, "width must be a whole number, got 'wide'"),
        ("domain", {"kind": ["cells"]}, r"kind must be text or None, got \['cells'\]"),
        ("coco", {"root": ".", "min_area": "large"}, "min_area must be a finite number"),
        ("coco", {"root": ".", "include_crowd": "yes"}, "include_crowd must be True or False"),
        ("folder", {"root": ".", "split_seed": 0.5}, "split_seed must be a whole number or None"),
        ("entities", {"root": 3}, "root must be text, got 3"),
        ("scenes", {"root": "photos"}, "'scenes' reads no files.*leave out --data"),
    ],
)
def test_values_of_another_type_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DATASETS.get(name).make("val", **options)


def test_sets_of_categories_and_paths_are_taken(tmp_path: Path) -> None:
    assert DATASETS.get("scenes").make(categories={"star"}).categories == ("star",)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        DATASETS.get("folder").make(root=tmp_path / "nowhere")


def needy(split: str, colour: str) -> Dataset:
    raise AssertionError(f"{split} {colour}")


@pytest.mark.parametrize(
    "config",
    [
        SamSegConfig,
        EverythingConfig,
        precompute.PrecomputeConfig,
        pointing.PointingBenchmarkConfig,
        interactive.InteractiveBenchmarkConfig,
        everything.EverythingBenchmarkConfig,
    ],
)
def test_help_lists_the_table(config: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert dataset_help() in shown and ", ".join(DATASETS.names()) in dataset_help()
