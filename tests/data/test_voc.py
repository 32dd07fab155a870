"""Pascal VOC against torchvision's reader."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCSegmentation

from sam_gym.data import make_dataset
from sam_gym.data.voc import CATEGORIES

Write = Callable[[str], Path]


def test_classes_are_those_that_torchvision_reads(write_labels: Write, tmp_path: Path) -> None:
    year = tmp_path / "VOCdevkit/VOC2012"
    year.parent.mkdir()
    write_labels("voc").rename(year)
    for split in ("train", "val"):
        theirs = VOCSegmentation(str(tmp_path), year="2012", image_set=split)
        ours = make_dataset("voc", split, root=str(year))
        assert len(ours) == len(theirs) == 1
        image, target = theirs[0]
        assert target.mode == "P"
        np.testing.assert_allclose(ours[0].image, np.array(image), atol=2)
        labels = np.array(target)
        expected = np.where(labels == 255, 255, np.where(labels == 0, 20, labels - 1))
        np.testing.assert_array_equal(ours[0].semantic, expected)
        objects = np.array(Image.open(year / f"SegmentationObject/{ours[0].source[4:]}.png"))
        assert sorted(mask.tobytes() for mask in ours[0].masks) == sorted(
            (objects == number).tobytes() for number in (1, 2, 3)
        )


def test_raw_indices_are_read_too(write_labels: Write) -> None:
    root = write_labels("voc")
    before = make_dataset("voc", "val", root=str(root))[0]
    for path in (root / "SegmentationClass").iterdir():
        indices = np.array(Image.open(path))
        Image.fromarray(indices).save(path)  # grey, as many converters write it
    np.testing.assert_array_equal(
        make_dataset("voc", "val", root=str(root))[0].semantic, before.semantic
    )


def test_the_background_is_no_object(write_labels: Write) -> None:
    dataset = make_dataset("voc", "val", root=str(write_labels("voc")), target="class")
    assert dataset.categories == CATEGORIES
    assert dataset.classes == (*CATEGORIES, "background")  # type: ignore[attr-defined]
    assert dataset[0].categories.tolist() == [CATEGORIES.index("car")]


def test_wrong_folders_are_refused(write_labels: Write) -> None:
    root = write_labels("voc")
    with pytest.raises(FileNotFoundError, match="pass the folder of a year"):
        make_dataset("voc", "val", root=str(root.parent))
    with pytest.raises(FileNotFoundError, match="no list of split 'test'"):
        make_dataset("voc", "test", root=str(root))
    path = root / "SegmentationClass/2007_000001.png"
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(ValueError, match="expected one channel .* got 3"):
        make_dataset("voc", "val", root=str(root))
