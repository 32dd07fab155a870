"""COCO panoptic against panopticapi, on files that it codes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_gym.data.panoptic import CocoPanoptic

Write = Callable[[str], Path]
CATEGORIES = [
    {"id": 3, "name": "car", "isthing": 1, "color": [0, 0, 142], "supercategory": "vehicle"},
    {"id": 149, "name": "road", "isthing": 0, "color": [128, 64, 128], "supercategory": "ground"},
    {"id": 187, "name": "sky", "isthing": 0, "color": [70, 130, 180], "supercategory": "sky"},
]


def test_segments_are_those_that_panopticapi_codes(tmp_path: Path) -> None:
    utils = pytest.importorskip("panopticapi.utils", reason="panopticapi is not installed")
    scene = np.zeros((40, 60), int)
    scene[:20], scene[20:38] = 1, 2
    scene[10:30, 5:20], scene[12:30, 20:35], scene[15:25, 40:55] = 3, 4, 5
    generator = utils.IdGenerator({own["id"]: own for own in CATEGORIES})
    np.random.seed(0)  # its colours are random
    of = {1: 187, 2: 149, 3: 3, 4: 3, 5: 3}
    ids = {own: generator.get_id(category) for own, category in of.items()}
    assert len(set(ids.values())) == 5
    coded = np.array([0, *ids.values()])[scene]
    for folder in ("images", "panoptic_val"):
        (tmp_path / folder).mkdir()
    Image.fromarray(utils.id2rgb(coded)).save(tmp_path / "panoptic_val/1.png")
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "images/1.jpg")
    segments = [
        {"id": ids[own], "category_id": category, "iscrowd": int(own == 5)}
        for own, category in of.items()
    ]
    images = [{"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}]
    annotations = [{"image_id": 1, "file_name": "1.png", "segments_info": segments}]
    data = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    utils.save_json(data, str(tmp_path / "panoptic_val.json"))

    dataset = CocoPanoptic("val", root=str(tmp_path))
    sample = dataset[0]
    assert dataset.categories == ("car", "road", "sky")
    assert dataset.category_groups == ("vehicle", "ground", "sky")
    read = utils.rgb2id(np.array(Image.open(tmp_path / "panoptic_val/1.png")))
    for own, category in of.items():
        name = next(one["name"] for one in CATEGORIES if one["id"] == category)
        index, mask = dataset.categories.index(str(name)), read == ids[own]
        assert (sample.semantic[mask] == index).all()  # type: ignore[index]
        of_class = sample.masks[sample.categories == index]
        assert any(np.array_equal(mask, one) for one in of_class) == (own != 5)
    assert (sample.semantic[read == 0] == 255).all()  # type: ignore[index]
    np.testing.assert_array_equal(sample.ignore, (read == 0) | (read == ids[5]))


def test_annotations_of_another_name(write_labels: Write) -> None:
    root = write_labels("coco-panoptic")
    (root / "panoptic_val.json").rename(root / "all.json")
    with pytest.raises(FileNotFoundError, match="no annotation file for split 'val'. Found: pan"):
        CocoPanoptic("val", root=str(root))
    dataset = CocoPanoptic("val", root=str(root), annotations="all.json", segments="panoptic_val")
    assert dataset.unsplit is not None and len(dataset) == 1
    with pytest.raises(FileNotFoundError, match="all: the folder does not exist"):
        CocoPanoptic("val", root=str(root), annotations="all.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 4}, "category_id is not among the categories .got 4"),
        ({"id": 2**24}, "whole number of 24 bits"),
        ({"id": 300}, "id is taken by an earlier segment .id 300"),
        ({"iscrowd": 2}, "iscrowd is neither 0 nor 1 .got 2"),
    ],
)
def test_invalid_segments(write_labels: Write, change: dict[str, int], message: str) -> None:
    root = write_labels("coco-panoptic")
    path = root / "panoptic_val.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["segments_info"][2].update(change)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        CocoPanoptic("val", root=str(root))
