"""Exports of a COCO file, read back by our readers, pycocotools, and readers written here."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from agents.convert import main
from sam_gym.data.coco import Coco
from sam_gym.data.coco_export import FORMATS, joined_outline
from sam_gym.data.coco_writer import CocoWriter, mask_annotation
from sam_gym.data.labelmaps import LabelMaps
from sam_gym.data.panoptic import CocoPanoptic

SIZE = (40, 50)


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


#: A ring with a gap to a second region, a star on the ring, and a speck in the corner.
RING = box(5, 5, 30, 30) & ~box(10, 10, 20, 15) | box(40, 32, 50, 40)
STAR, SPECK = box(4, 4, 9, 12), box(49, 0, 50, 1)
#: Image -> its objects.
OBJECTS = {"a.png": [(RING, "ring"), (STAR, "star"), (SPECK, "star")], "more/a.jpg": []}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    for name in OBJECTS:
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    writer = CocoWriter({"star": 7, "ring": 3}, "made by a test")
    for number, (name, objects) in enumerate(OBJECTS.items(), start=11):
        own = [mask_annotation(mask, category=kind, score=0.5) for mask, kind in objects]
        writer.add(number, name, SIZE, own)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(writer.content))
    return path


def exported(annotations: Path, photos: Path, kind: str) -> Path:
    out = annotations.parent / kind
    main([str(annotations), "--format", kind, "--images", str(photos), "--out", str(out)])
    assert sorted(path.name for path in (out / "images").iterdir()) == ["a.png", "more__a.jpg"]
    return out


def test_polygons_cover_the_same_pixels(annotations: Path, photos: Path) -> None:
    out = exported(annotations, photos, "polygons")
    truth = COCO(str(out / "annotations.json"))
    found = truth.loadAnns(truth.getAnnIds(imgIds=[11]))
    for annotation, (mask, _) in zip(found, OBJECTS["a.png"], strict=True):
        assert isinstance(annotation["segmentation"][0], list)
        np.testing.assert_array_equal(truth.annToMask(annotation), mask)
        assert annotation["area"] == mask.sum() and annotation["score"] == 0.5
    (sample,) = (Coco("train", root=str(out), annotations=str(out / "annotations.json")),)
    np.testing.assert_array_equal(sample[0].masks, [mask for mask, _ in OBJECTS["a.png"]])


def read_yolo(folder: Path, stem: str) -> list[tuple[int, np.ndarray]]:
    """Read labels as Ultralytics does: corners in whole pixels, filled by OpenCV."""
    found = []
    for line in (folder / "labels" / f"{stem}.txt").read_text().splitlines():
        category, *numbers = line.split()
        points = np.array(numbers, np.float32).reshape(-1, 2)
        assert len(numbers) >= 6 and (points >= 0).all() and (points <= 1).all()
        corners = np.asarray(points * np.float32(SIZE[::-1]), np.int32)
        mask = np.zeros(SIZE, np.uint8)
        cv2.fillPoly(mask, [corners], 1)
        found.append((int(category), mask.astype(bool)))
    return found


def test_yolo(annotations: Path, photos: Path) -> None:
    out = exported(annotations, photos, "yolo")
    names = yaml.safe_load((out / "data.yaml").read_text())["names"]
    assert names == {0: "ring", 1: "star"}
    found = read_yolo(out, "a")
    assert [names[category] for category, _ in found] == ["ring", "star", "star"]
    np.testing.assert_array_equal(found[1][1], STAR)
    np.testing.assert_array_equal(found[2][1], SPECK)
    ring = found[0][1]
    # All of the ring, its hole is open, and a line of one pixel joins its two regions.
    assert ring[RING].all() and not ring[11:14, 11:19].any()
    assert np.count_nonzero(ring & ~RING) <= 12
    assert read_yolo(out, "more__a") == []


def test_outlines_fill_the_pixels_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = cv2.GaussianBlur(rng.random((60, 70)), (0, 0), 3)
        count, regions = cv2.connectedComponents((noise > np.median(noise)).astype(np.uint8))
        for number in range(1, count):  # regions with holes
            region = regions == number
            filled = np.zeros(region.shape, np.uint8)
            cv2.fillPoly(filled, [joined_outline(region).astype(np.int32)], 1)
            assert filled[region].all()
            assert np.count_nonzero(filled) <= 1.01 * np.count_nonzero(region) + 1


def test_label_images(annotations: Path, photos: Path) -> None:
    out = exported(annotations, photos, "labels")
    picture = Image.open(out / "labels" / "a.png")
    assert picture.mode == "P" and len(picture.convert("RGB").getcolors() or ()) == 3
    expected = np.where(RING, 1, 0)
    expected[STAR | SPECK] = 2
    np.testing.assert_array_equal(picture, expected)
    classes = json.loads((out / "classes.json").read_text())
    assert classes == {"classes": ["background", "ring", "star"], "background": "background"}
    sample = LabelMaps("all", root=str(out))[0]
    assert sample.semantic is not None
    # Smaller objects lie on larger ones: what is left of the ring is around the star.
    masks = {tuple(mask.ravel()) for mask in (RING & ~STAR, STAR, SPECK)}
    assert {tuple(mask.ravel()) for mask in sample.masks} == masks


def test_panoptic(annotations: Path, photos: Path) -> None:
    out = exported(annotations, photos, "panoptic")
    content = json.loads((out / "panoptic.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "more__a.jpg"]
    for record in content["annotations"]:
        # The checks of panopticapi: every segment of the PNG is in the JSON, with its area.
        pixels = np.array(Image.open(out / "panoptic" / record["file_name"]), np.uint32)
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]
        areas = dict(zip(*np.unique(ids[ids > 0], return_counts=True), strict=True))
        assert {own["id"]: own["area"] for own in record["segments_info"]} == areas
        for own in record["segments_info"]:
            code = rle.encode(np.asfortranarray(ids == own["id"], np.uint8))
            assert own["bbox"] == rle.toBbox(code).tolist()
    sample = CocoPanoptic("train", root=str(out), annotations="panoptic.json")[0]
    masks = {tuple(mask.ravel()) for mask in (RING & ~STAR, STAR, SPECK)}
    assert {tuple(mask.ravel()) for mask in sample.masks} == masks


def test_ids_beyond_one_byte(tmp_path: Path) -> None:
    writer = CocoWriter({"dot": 1})
    places = [(x, y) for y in range(0, 40, 2) for x in range(0, 50, 2)]
    dots = [mask_annotation(box(x, y, x + 1, y + 1), category="dot") for x, y in places]
    writer.add(1, "a.png", SIZE, dots)
    (tmp_path / "a.json").write_text(json.dumps(writer.content))
    main([str(tmp_path / "a.json"), "--format", "panoptic", "--out", str(tmp_path / "out")])
    pixels = np.array(Image.open(tmp_path / "out" / "panoptic" / "a.png"), np.uint32)
    ids = pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]
    assert len(np.unique(ids)) == len(places) + 1 > 256


def test_names_that_collide_or_leave_the_folder(tmp_path: Path) -> None:
    writer = CocoWriter({"star": 1})
    for number, name in enumerate(("a/b.png", "a__b.png", "A__B.jpg", "../out.png")):
        writer.add(number, name, SIZE, [mask_annotation(STAR, category="star")])
    (tmp_path / "a.json").write_text(json.dumps(writer.content))
    command = [str(tmp_path / "a.json"), "--format", "yolo"]
    main([*command, "--out", str(tmp_path / "deep" / "out")])
    labels = sorted(path.name for path in (tmp_path / "deep" / "out" / "labels").iterdir())
    assert labels == ["..__out.txt", "A__B-3.txt", "a__b-2.txt", "a__b.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "deep"}
    writer.content["images"] = writer.content["images"][3:]
    writer.content["annotations"] = []
    (tmp_path / "a.json").write_text(json.dumps(writer.content))
    with pytest.raises(ValueError, match="leaves its folder"):
        main([*command, "--out", str(tmp_path / "more"), "--images", str(tmp_path / "deep")])


@pytest.mark.parametrize("kind", list(FORMATS))
def test_wrong_inputs(kind: str, annotations: Path, tmp_path: Path) -> None:
    command = [str(annotations), "--format", kind, "--out", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match="no such image"):
        main([*command, "--images", str(tmp_path)])
    main(command)
    with pytest.raises(FileExistsError, match="not empty"):
        main(command)
    content: dict[str, Any] = json.loads(annotations.read_text())
    content["annotations"][0]["segmentation"]["size"] = [1, 1]
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 1: RLE size is not"):
        main([*command, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_too_many_categories_for_label_images(tmp_path: Path) -> None:
    writer = CocoWriter({f"kind {number}": number for number in range(255)})
    writer.add(1, "a.png", SIZE, [])
    (tmp_path / "a.json").write_text(json.dumps(writer.content))
    with pytest.raises(ValueError, match="at most 254"):
        main([str(tmp_path / "a.json"), "--format", "labels", "--out", str(tmp_path / "out")])
