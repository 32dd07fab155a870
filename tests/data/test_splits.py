"""Held-out images are no training images, or nothing is reported on them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sam_gym.data import Dataset, make_dataset
from sam_gym.data.base import SPLITS
from sam_gym.data.splits import check_held_out, copied_images, seeded_part, shared_images
from sam_gym.data.streams import Domain, dataset_stream

NAMES = [f"{i}.jpg" for i in range(1000)]
#: Datasets over the fixture `squares`, without splits.
KINDS: dict[str, dict[str, Any]] = {"folder": {}, "coco": {"annotations": "all.json"}}


def opened(root: Path, kind: str, split: str, **options: Any) -> Any:
    options = KINDS[kind] | options
    if "annotations" in options:
        options["annotations"] = str(root / options["annotations"])
    return make_dataset(kind, split, root=str(root), **options)


def names(dataset: Any) -> set[str]:
    return {Path(file).stem for file in dataset.files}


def test_a_seed_splits_into_parts() -> None:
    parts = {split: seeded_part(NAMES, split, 3, "here") for split in SPLITS}
    assert set.union(*parts.values()) == set(NAMES)
    assert sum(map(len, parts.values())) == len(NAMES)
    assert 760 < len(parts["train"]) < 840 and 70 < len(parts["val"]) < 130
    assert seeded_part(NAMES, "all", 3, "here") == set(NAMES)
    assert seeded_part(NAMES, "val", 4, "here") != parts["val"]
    # An image never changes its split when others come or go.
    for split, part in parts.items():
        assert seeded_part(NAMES[:300], split, 3, "here") == part & set(NAMES[:300])


def test_a_seed_that_leaves_a_split_empty_names_one_that_does_not() -> None:
    with pytest.raises(ValueError, match=r"here: split_seed=0 puts none of the 4 images") as error:
        for split in SPLITS:
            seeded_part(NAMES[:4], split, 0, "here")
    other = int(str(error.value).partition("Pass split_seed=")[2].partition(" ")[0])
    assert all(seeded_part(NAMES[:4], split, other, "here") for split in SPLITS)
    with pytest.raises(ValueError, match=r"none of the 2 images into '(val|test)'\. Add images"):
        for split in SPLITS:
            seeded_part(["a", "b"], split, 0, "here")


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True, None])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ValueError, match="split_seed must be a whole number from 0"):
        seeded_part(NAMES, "val", seed, "here")


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_splits(squares: Path, kind: str) -> None:
    """Every split is all images, as ever; what reports on it is refused."""
    train, held_out = (opened(squares, kind, split) for split in ("train", "test"))
    assert len(train) == len(held_out) == shared_images(train, held_out) == 12
    with pytest.raises(ValueError, match=r"12 of 12 images of split 'test' are training images"):
        check_held_out(held_out, "test", train)
    with pytest.raises(ValueError, match=r"of split 'val' may be training images.*--split all"):
        check_held_out(held_out, "val")
    check_held_out(opened(squares, kind, "all"), "all")
    check_held_out(train, "train", train)
    with pytest.raises(ValueError, match="--dataset-kwargs split_seed 0"):
        dataset_stream(kind, str(squares), **KINDS[kind] | annotations_of(squares, kind))


def annotations_of(root: Path, kind: str) -> dict[str, str]:
    return {"annotations": str(root / "all.json")} if kind == "coco" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_holds_images_out(squares: Path, kind: str) -> None:
    parts = {split: opened(squares, kind, split, split_seed=1) for split in SPLITS}
    assert set.union(*map(names, parts.values())) == {str(i) for i in range(12)}
    for split, part in parts.items():
        check_held_out(part, split)
        if split != "train":
            assert not names(part) & names(parts["train"])
            check_held_out(part, split, parts["train"])
    assert len(opened(squares, kind, "all", split_seed=1)) == 12
    stream = dataset_stream(kind, str(squares), split_seed=1, **annotations_of(squares, kind))
    assert set(stream[0].datasets) == set(SPLITS) and stream.held_out_split == "test"


def test_options_do_not_move_images_between_splits(squares: Path) -> None:
    data = json.loads((squares / "all.json").read_text())
    data["categories"].append({"id": 2, "name": "other"})
    for number in (1, 4, 7):
        data["annotations"][number]["category_id"] = 2
    (squares / "all.json").write_text(json.dumps(data))
    train = opened(squares, "coco", "train", split_seed=1)
    other = opened(squares, "coco", "train", split_seed=1, categories="square")
    assert names(other) == names(train) - {"1", "4", "7"} != names(train)


def test_a_seed_is_for_data_without_splits(squares: Path) -> None:
    with pytest.raises(ValueError, match="split_seed=0 splits the file that annotations= names"):
        make_dataset("coco", root=str(squares), split_seed=0)
    (squares / "splits.json").write_text(json.dumps({"train": ["1"], "val": ["2"], "test": ["3"]}))
    with pytest.raises(ValueError, match=r"split_seed=0 is for folders without splits\.json"):
        opened(squares, "folder", "train", split_seed=0)
    assert len(opened(squares, "folder", "all")) == 12
    assert opened(squares, "folder", "test").unsplit is None


@pytest.mark.filterwarnings("error")
def test_copies_of_training_images_are_told(squares: Path) -> None:
    lists: dict[str, list[str]] = {"train": ["0", "1", "2"], "val": ["3"], "test": ["4", "copy"]}
    for folder in ("images", "masks"):
        shutil.copy(squares / folder / "1.png", squares / folder / "copy.png")
    (squares / "splits.json").write_text(json.dumps(lists))
    train, val, test = (opened(squares, "folder", split) for split in SPLITS)
    check_held_out(val, "val", train)
    assert (shared_images(train, test), copied_images(train, test)) == (0, 1)
    assert copied_images(train, val) == copied_images(train, train) == 0
    with pytest.warns(UserWarning, match="squares: 1 of 2 images of split 'test' are copies of"):
        check_held_out(test, "test", train)


def test_overlapping_lists(squares: Path) -> None:
    lists = {"train": ["0", "1", "2"], "val": ["3"], "test": ["2", "4"]}
    (squares / "splits.json").write_text(json.dumps(lists))
    with pytest.raises(ValueError, match="squares: 1 of 2 images of split 'test' are training"):
        dataset_stream("folder", str(squares))


def test_overlapping_annotation_files(squares: Path) -> None:
    data = json.loads((squares / "all.json").read_text())
    for split, images in {"train": data["images"], "val": data["images"][:3]}.items():
        held = {image["id"] for image in images}
        own = [a for a in data["annotations"] if a["image_id"] in held]
        path = squares / f"instances_{split}.json"
        path.write_text(json.dumps(data | {"images": images, "annotations": own}))
    with pytest.raises(ValueError, match="coco: 3 of 3 images of split 'val' are training images"):
        dataset_stream("coco", str(squares))


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_the_same_file_count(squares: Path, link: Any) -> None:
    link(squares / "images" / "0.png", squares / "images" / "copy.png")
    shutil.copy(squares / "masks" / "0.png", squares / "masks" / "copy.png")
    lists = {"train": ["0"], "val": ["copy"], "test": ["1"]}
    (squares / "splits.json").write_text(json.dumps(lists))
    with pytest.raises(ValueError, match="1 of 1 images of split 'val' are training images"):
        dataset_stream("folder", str(squares))


def test_a_domain_refuses_training_images(squares: Path) -> None:
    datasets: dict[str, Dataset] = {s: opened(squares, "folder", s) for s in ("train", "test")}
    with pytest.raises(ValueError, match=r"splits\.json is missing"):
        Domain("squares", False, datasets)
