"""Tiny folders of label maps in the layout of each dataset."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (48, 64)
#: Values of a scene: unlabelled pixels, sky, road, a car on the left, one on the right, several
#: cars that are not told apart.
VOID, SKY, ROAD, LEFT, RIGHT, GROUP = range(6)


def draw_scene(number: int) -> np.ndarray:
    """Draw the scene of an image: uint8 (48, 64)."""
    scene = np.full(SIZE, SKY, np.uint8)
    scene[24:] = ROAD
    scene[46:] = VOID
    scene[16:32, 4:20] = LEFT
    scene[18:34, 20:36] = RIGHT  # touches the other
    scene[20:28, 50:60] = GROUP
    return np.roll(scene, number, axis=1)


def values(scene: np.ndarray, *table: int) -> np.ndarray:
    """Translate a scene: the value of void, sky, road, left and right car, group."""
    return np.array(table)[scene]


def save(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if pixels.max() > 255 else np.uint8
    image = Image.fromarray(pixels.astype(kind))
    if palette:
        # The bits of an index, from the lowest, are spread over the highest bits of its colour.
        colours = np.zeros((256, 3), np.uint8)
        for index in range(256):
            for bit in range(8):
                colours[index, bit % 3] |= (index >> bit & 1) << 7 - bit // 3
        image.putpalette(colours.tobytes())
        assert image.mode == "P"
    image.save(path)


def save_photo(path: Path, scene: np.ndarray, number: int) -> None:
    """Save a photograph of a scene, different for each number."""
    colours = np.random.default_rng(number).integers(0, 256, (6, 3), dtype=np.uint8)
    save(path, colours[scene])


def write_cityscapes(root: Path) -> None:
    for number, split in enumerate(("train", "val")):
        scene, stem = draw_scene(number), f"ulm/ulm_00000{number}_000019"
        save_photo(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", scene, number)
        labels = root / f"gtFine/{split}"
        save(labels / f"{stem}_gtFine_labelIds.png", values(scene, 0, 23, 7, 26, 26, 26))
        ids = values(scene, 0, 23, 7, 26000, 26001, 26)
        save(labels / f"{stem}_gtFine_instanceIds.png", ids)


def write_camvid(root: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        scene = draw_scene(number)
        save_photo(root / f"{split}/{number}.png", scene, number)
        save(root / f"{split}annot/{number}.png", values(scene, 11, 0, 3, 8, 8, 8))


def write_ade20k(root: Path) -> None:
    for number, split in enumerate(("training", "validation")):
        scene = draw_scene(number)
        save_photo(root / f"images/{split}/ADE_{number}.jpg", scene, number)
        save(root / f"annotations/{split}/ADE_{number}.png", values(scene, 0, 3, 7, 21, 21, 21))
    names = {3: "sky", 7: "road, route", 21: "car, auto, automobile"}
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for index in range(1, 151):
        name = names.get(index, f"class {index}, c")
        rows.append(f"{index}\t0.1\t9\t1\t{int(index in (3, 7))}\t{name:<30}")
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")


def write_ade20k_full(root: Path) -> None:
    codes = {"sky": 2420, "road, route": 2131, "car, auto": 401}
    for number, split in enumerate(("training", "validation")):
        scene, stem = draw_scene(number), root / f"images/ADE/{split}/urban/street/ADE_{number}"
        save_photo(stem.with_suffix(".jpg"), scene, number)
        ids = values(scene, 0, 2420, 2131, 401, 401, 401)
        instances = values(scene, 0, 90, 80, 10, 20, 30)
        coded = np.stack([ids // 256 * 10 + 3 * (ids > 0), ids % 256, instances], axis=-1)
        save(stem.with_name(f"{stem.name}_seg.png"), coded)
        objects = [
            {"name": name, "name_ndx": code, "parts": {"part_level": 0}}
            for name, code in codes.items()
        ]
        objects.append({"name": "wheel", "name_ndx": 2978, "parts": {"part_level": 1}})
        stem.with_suffix(".json").write_text(json.dumps({"annotation": {"object": objects}}))


def write_voc(root: Path) -> None:
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        scene, stem = draw_scene(number), f"2007_00000{number}"
        save_photo(root / f"JPEGImages/{stem}.jpg", scene, number)
        for folder, ids in (("Class", (255, 0, 0, 7, 7, 7)), ("Object", (255, 0, 0, 1, 2, 3))):
            save(root / f"Segmentation{folder}/{stem}.png", values(scene, *ids), palette=True)
        (lists / f"{split}.txt").write_text(f"{stem}\n")


def write_coco_panoptic(root: Path) -> None:
    categories = [
        {"id": 187, "name": "sky", "supercategory": "sky", "isthing": 0},
        {"id": 149, "name": "road", "supercategory": "ground", "isthing": 0},
        {"id": 3, "name": "car", "supercategory": "vehicle", "isthing": 1},
    ]
    ids = (0, 70_000, 300, 9, 65_536, 257)
    for number, split in enumerate(("train", "val")):
        scene = draw_scene(number)
        save_photo(root / f"images/{split}.jpg", scene, number)
        coded = values(scene, *ids)
        colours = np.stack([coded % 256, coded // 256 % 256, coded // 65_536], axis=-1)
        save(root / f"panoptic_{split}/{split}.png", colours)
        segments = [
            {"id": own, "category_id": category, "iscrowd": int(own == 257)}
            for own, category in zip(ids[1:], (187, 149, 3, 3, 3), strict=True)
        ]
        data = {
            "images": [{"id": 5, "file_name": f"{split}.jpg", "height": 48, "width": 64}],
            "annotations": [
                {"image_id": 5, "file_name": f"{split}.png", "segments_info": segments}
            ],
            "categories": categories,
        }
        (root / f"panoptic_{split}.json").write_text(json.dumps(data))


def write_labelmaps(root: Path) -> None:
    splits = {}
    for number, split in enumerate(("train", "val", "test")):
        scene = draw_scene(number)
        save_photo(root / f"images/{number}.png", scene, number)
        save(root / f"labels/{number}.png", values(scene, 9, 4, 2, 7, 7, 7))
        splits[split] = [str(number)]
    (root / "splits.json").write_text(json.dumps(splits))
    classes = {"classes": ["road", "sky", "car"], "ids": [2, 4, 7], "void_id": 9}
    classes["groups"] = ["flat", "sky", "vehicle"]
    (root / "classes.json").write_text(json.dumps(classes))


WRITERS: dict[str, Callable[[Path], None]] = {
    "ade20k": write_ade20k,
    "ade20k-full": write_ade20k_full,
    "camvid": write_camvid,
    "cityscapes": write_cityscapes,
    "coco-panoptic": write_coco_panoptic,
    "labelmaps": write_labelmaps,
    "voc": write_voc,
}


@pytest.fixture
def label_scene() -> Callable[[int], np.ndarray]:
    """The scene of an image, 0 in train and 1 in val, whose values are those above."""
    return draw_scene


@pytest.fixture
def write_labels(tmp_path: Path) -> Callable[[str], Path]:
    """Write the folder of a dataset; return its root."""

    def write(name: str) -> Path:
        root = tmp_path / name
        WRITERS[name](root)
        return root

    return write
