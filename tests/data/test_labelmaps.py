"""Folders of label maps: classes.json, splits and objects."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_gym.data import make_dataset
from sam_gym.data.labelmaps import LabelMaps

Write = Callable[[str], Path]
Scene = Callable[[int], np.ndarray]
VOID, SKY, ROAD, LEFT, RIGHT, GROUP = range(6)


def change(root: Path, **changes: Any) -> None:
    path = root / "classes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_classes_in_their_order(write_labels: Write) -> None:
    dataset = LabelMaps("val", root=str(write_labels("labelmaps")))
    assert dataset.name == "labelmaps"
    assert dataset.classes == dataset.categories == ("road", "sky", "car")
    assert dataset.category_groups == ("flat", "sky", "vehicle")


def test_a_list_of_names_is_enough(write_labels: Write, label_scene: Scene) -> None:
    root = write_labels("labelmaps")
    (root / "classes.json").write_text('["void", "sky", "road", "left", "right", "group"]')
    for number in range(3):
        cv2.imwrite(str(root / f"labels/{number}.png"), label_scene(number))
    sample = LabelMaps("val", root=str(root))[0]
    np.testing.assert_array_equal(sample.semantic, label_scene(1))
    assert sample.ignore is None and len(sample.masks) == 6


def test_the_background_comes_last(write_labels: Write, label_scene: Scene) -> None:
    root = write_labels("labelmaps")
    change(root, background="road")
    dataset, scene = LabelMaps("val", root=str(root)), label_scene(1)
    assert dataset.classes == ("sky", "car", "road") and dataset.categories == ("sky", "car")
    assert dataset.category_groups == ("sky", "vehicle", "flat")
    sample = dataset[0]
    np.testing.assert_array_equal(sample.semantic == 2, scene == ROAD)
    assert not sample.masks[:, scene == ROAD].any()


def test_objects_of_a_folder_of_instances(write_labels: Write, label_scene: Scene) -> None:
    root = write_labels("labelmaps")
    (root / "instances").mkdir()
    for number in range(3):
        scene = label_scene(number)
        ids = np.array([0, 0, 0, 700, 2, 2], np.uint16)[scene]
        cv2.imwrite(str(root / f"instances/{number}.png"), ids)
    scene, sample = label_scene(1), LabelMaps("val", root=str(root))[0]
    cars = sorted(mask.tobytes() for mask in sample.masks[sample.categories == 2])
    expected = [scene == LEFT, np.isin(scene, (RIGHT, GROUP))]
    assert cars == sorted(mask.tobytes() for mask in expected)
    assert len(LabelMaps("val", root=str(root), target="components")[0].masks) > 0


def test_several_void_values(write_labels: Write, label_scene: Scene) -> None:
    root = write_labels("labelmaps")
    change(root, classes=["sky", "car"], ids=[4, 7], groups=None, void_ids=[2, 9])
    sample = LabelMaps("val", root=str(root))[0]
    np.testing.assert_array_equal(sample.ignore, np.isin(label_scene(1), (VOID, ROAD)))


def test_splits(write_labels: Write) -> None:
    root = write_labels("labelmaps")
    assert [len(LabelMaps(split, root=str(root))) for split in ("train", "all")] == [1, 3]
    with pytest.raises(ValueError, match="split_seed=0 is for folders without splits.json"):
        LabelMaps(root=str(root), split_seed=0)
    (root / "splits.json").unlink()
    dataset = LabelMaps(root=str(root))
    assert len(dataset) == 3 and dataset.unsplit is not None
    assert "splits.json is missing" in dataset.unsplit.reason
    (root / "images/1.png").unlink()
    (root / "splits.json").write_text('{"test": ["1", "2"]}')
    with pytest.raises(FileNotFoundError, match="image '1' of split 'test': image file is missing"):
        LabelMaps(root=str(root))
    with pytest.warns(UserWarning, match="skipped 1 records: 1 x image file is missing"):
        assert len(LabelMaps(root=str(root), on_error="skip")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": []}, "'classes' must be a list of different names, got"),
        ({"classes": ["a", "a", "b"]}, "list of different names"),
        ({"ids": [2, 4]}, "'ids' must hold a different number for each class"),
        ({"ids": [2, 4, 9]}, "different number for each class and for void"),
        ({"ids": [2, 4, 256]}, "'ids' must hold whole numbers from 0 to 255"),
        ({"void_id": "none"}, "'void_id' must hold whole numbers"),
        ({"groups": ["flat"]}, "'groups' must hold the group of each class"),
        ({"background": "ground"}, "'background' must be one of the classes"),
    ],
)
def test_invalid_classes(write_labels: Write, changes: dict[str, Any], message: str) -> None:
    root = write_labels("labelmaps")
    change(root, **changes)
    with pytest.raises(ValueError, match=f"classes.json: .*{message}.* Write for example"):
        LabelMaps(root=str(root))


def test_wrong_folders_are_refused(write_labels: Write) -> None:
    root = write_labels("labelmaps")
    with pytest.raises(FileNotFoundError, match=r"found .*trainannot.*images/, labels/"):
        make_dataset("labelmaps", root=str(write_labels("camvid")))
    with pytest.raises(FileNotFoundError, match="no split 'val'. Found: none. CamVid has val/"):
        make_dataset("camvid", "val", root=str(root))
    (root / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match="classes.json: the list of classes does not exist"):
        make_dataset("labelmaps", root=str(root))


# Real data


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_real_camvid(split: str, count: int) -> None:
    root = os.path.join(os.environ.get("SAM_GYM_DATA", ""), "camvid")
    if not os.environ.get("SAM_GYM_DATA") or not os.path.isdir(root):
        pytest.skip("SAM_GYM_DATA does not name a folder that holds 'camvid'")
    dataset = make_dataset("camvid", split, root=root, target="class")
    assert len(dataset) == count
    for index in range(0, count, 25):
        sample, stem = dataset[index], Path(dataset.files[index]).stem  # type: ignore[attr-defined]
        labels = cv2.imread(f"{root}/{split}annot/{stem}.png", cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(sample.semantic, np.where(labels == 11, 255, labels))
        assert sample.categories.tolist() == np.unique(labels[labels < 11]).tolist()
