"""Both forms of ADE20K; each is refused as the other."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_gym.data import make_dataset

Write = Callable[[str], Path]


def test_benchmark_values_and_names(write_labels: Write) -> None:
    root = write_labels("ade20k")
    dataset = make_dataset("ade20k", "val", root=str(root))
    file = np.array(Image.open(root / "annotations/validation/ADE_1.png"))
    # As every loader of the benchmark: 0 becomes 255, and the others begin at 0.
    np.testing.assert_array_equal(dataset[0].semantic, file - np.uint8(1))
    assert len(dataset.categories) == 150
    assert [dataset.categories[i] for i in (2, 6, 20)] == ["sky", "road", "car"]
    groups = dataset.category_groups  # type: ignore[attr-defined]
    assert [groups[i] for i in (2, 6, 20)] == ["stuff", "stuff", "thing"]


def test_names_that_are_not_unique_stay_whole(write_labels: Write) -> None:
    root = write_labels("ade20k")
    path = root / "objectInfo150.txt"
    path.write_text(path.read_text().replace("class 9, c", "car, toy"))
    categories = make_dataset("ade20k", "val", root=str(root)).categories
    assert (categories[8], categories[20]) == ("car, toy", "car, auto, automobile")
    path.write_text("Idx\tName\n1\twall\n")
    with pytest.raises(ValueError, match="expected a heading and 150 lines"):
        make_dataset("ade20k", "val", root=str(root))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="names of the classes are missing"):
        make_dataset("ade20k", "val", root=str(root))


def test_each_form_is_refused_as_the_other(write_labels: Write) -> None:
    with pytest.raises(FileNotFoundError, match="this is the full form .* dataset 'ade20k-full'"):
        make_dataset("ade20k", "val", root=str(write_labels("ade20k-full")))
    with pytest.raises(FileNotFoundError, match="this is the SceneParsing form .* 'ade20k'"):
        make_dataset("ade20k-full", "val", root=str(write_labels("ade20k")))


def test_classes_of_the_full_form(write_labels: Write) -> None:
    root = write_labels("ade20k-full")
    dataset = make_dataset("ade20k-full", "val", root=str(root))
    # All are in as many training images; parts are no objects.
    assert dataset.categories == ("car, auto", "road, route", "sky")
    chosen = make_dataset("ade20k-full", "val", root=str(root), classes="sky, car, auto")
    assert chosen.categories == ("sky", "car, auto")
    road = dataset[0].semantic == 1
    sample = chosen[0]
    assert (sample.semantic[road] == 255).all()  # type: ignore[index]
    assert sample.ignore is not None and not sample.ignore[road].any()
    with pytest.raises(ValueError, match="Unknown category 'ski'"):
        make_dataset("ade20k-full", "val", root=str(root), classes="ski")


def test_broken_json_of_the_full_form(write_labels: Write) -> None:
    root = write_labels("ade20k-full")
    path = next((root / "images/ADE/training").rglob("*.json"))
    content = json.loads(path.read_text())
    content["annotation"]["object"][0].pop("name_ndx")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not the JSON of an ADE20K image \(KeyError: 'name_ndx'"):
        make_dataset("ade20k-full", "val", root=str(root))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*.json with the names"):
        make_dataset("ade20k-full", "val", root=str(root))


def test_the_full_form_is_decoded_as_by_its_own_code(
    write_labels: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "ipdb" not in sys.modules:  # it imports a debugger that it does not use
        monkeypatch.setitem(sys.modules, "ipdb", types.ModuleType("ipdb"))
    own = pytest.importorskip("utils_ade20k", reason="utils of CSAILVision/ADE20K are not there")
    root = write_labels("ade20k-full")
    dataset = make_dataset("ade20k-full", "val", root=str(root))
    image = next((root / "images/ADE/validation").rglob("*.jpg"))
    path = image.with_suffix(".json")
    content = json.loads(path.read_text())
    for record in content["annotation"]["object"]:
        record |= {"id": 0, "raw_name": record["name"], "crop": 0, "attributes": []}
        record["polygon"] = {"x": [], "y": []}
    path.write_text(json.dumps(content))
    expected, sample = own.loadAde20K(str(image)), dataset[0]
    codes = np.array([401, 2131, 2420, *[0] * 253])
    codes[255] = 0
    np.testing.assert_array_equal(codes[sample.semantic], expected["class_mask"])
    for mask in sample.masks:
        instance = np.unique(expected["instance_mask"][mask])
        assert len(instance) == 1 and instance[0] > 0
        np.testing.assert_array_equal(mask, expected["instance_mask"] == instance[0])
