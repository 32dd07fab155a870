"""Coco against pycocotools, on generated data and, where present, on real data."""

import json
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from sam_gym.data import Dataset, make_dataset
from sam_gym.data.coco import Coco

HEIGHT, WIDTH = 40, 60
SQUARE = [[5, 5, 25, 5, 25, 25, 5, 25]]
TRIANGLE = [[30, 2, 55, 30, 32.5, 33.25]]
NO_PIXEL = [[5.0, 5.0, 5.1, 5.0, 5.1, 5.1]]


def blob(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def compressed(mask: np.ndarray) -> dict:
    encoded = rle.encode(np.asfortranarray(mask))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def reference(segmentation: list | dict, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """pycocotools' own reading: bool (height, width)."""
    if isinstance(segmentation, list):
        return rle.decode(rle.merge(rle.frPyObjects(segmentation, height, width))).astype(bool)
    if isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return rle.decode(segmentation).astype(bool)


def annotation(id: int, image: int, category: int, segmentation: object, **more: object) -> dict:
    record = {"id": id, "image_id": image, "category_id": category, "iscrowd": 0}
    return {**record, "segmentation": segmentation, **more}


def tiny() -> dict:
    """Three images; dogs in one, cats in all, a crowd of cats that overlaps a dog, no birds."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
            for i in (11, 12, 13)
        ],
        "categories": [
            {"id": 9, "name": "bird"},
            {"id": 2, "name": "dog"},
            {"id": 1, "name": "cat"},
        ],
        "annotations": [
            annotation(1, 11, 1, SQUARE),
            annotation(2, 11, 2, [*SQUARE, *TRIANGLE]),
            annotation(3, 12, 1, uncompressed(blob(0, 0, 7, 9))),
            annotation(4, 13, 1, compressed(blob(20, 30, 15, 25))),
            annotation(5, 11, 1, uncompressed(blob(20, 20, 15, 15)), iscrowd=1),
        ],
    }


def write(root: Path, data: object, name: str = "instances_train.json") -> str:
    """Write the annotation file and an image file for each sound image record; returns root."""
    (root / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for id in (11, 12, 13):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / f"{id}.png"), pixels)
    (root / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return str(root)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write(tmp_path, tiny())


def test_is_a_registered_dataset(root: str) -> None:
    with pytest.warns(
        UserWarning, match="crowd regions .* are ignored pixels: 1; include_crowd=True"
    ):
        dataset = make_dataset("coco", root=root)
    assert isinstance(dataset, Dataset)
    assert (dataset.name, len(dataset)) == ("coco", 3)
    assert dataset.categories == ("cat", "dog", "bird")


def test_masks_equal_pycocotools(root: str) -> None:
    data, dataset = tiny(), Coco(root=root)
    for index, image in enumerate(data["images"]):
        records = [
            a for a in data["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]
        ]
        sample = dataset[index]
        expected = np.stack([reference(a["segmentation"]) for a in records])
        assert sample.masks.dtype == bool and sample.masks.flags.c_contiguous
        np.testing.assert_array_equal(sample.masks, expected)
        assert sample.categories.dtype == np.int64
        assert sample.categories.tolist() == [{1: 0, 2: 1}[a["category_id"]] for a in records]


def test_image_is_rgb_and_fresh_at_every_call(root: str) -> None:
    dataset = Coco(root=root)
    sample = dataset[0]
    stored = cv2.imread(os.path.join(root, "images", "11.png"))
    assert stored is not None
    expected = stored[..., ::-1]
    np.testing.assert_array_equal(sample.image, expected)
    assert sample.image.dtype == np.uint8
    assert sample.source == "instances_train/11.png"
    sample.image[:] = 0
    sample.masks[:] = False
    np.testing.assert_array_equal(dataset[0].image, expected)
    assert dataset[0].masks.any()


def test_crowd_is_ignored_except_where_an_instance_is_known(root: str) -> None:
    dataset = Coco(root=root)
    sample = dataset[0]
    assert sample.ignore is not None
    np.testing.assert_array_equal(
        sample.ignore, blob(20, 20, 15, 15).astype(bool) & ~sample.masks.any(axis=0)
    )
    assert dataset[1].ignore is None
    assert Coco(root=root, categories="dog")[0].ignore is None  # a crowd of cats is no dog


def test_include_crowd(root: str) -> None:
    sample = Coco(root=root, include_crowd=True)[0]
    assert sample.ignore is None
    np.testing.assert_array_equal(sample.masks[2], blob(20, 20, 15, 15))


def test_min_area_ignores_small_instances(tmp_path: Path) -> None:
    data = tiny()
    data["annotations"].append(annotation(6, 12, 1, uncompressed(blob(30, 30, 2, 2))))
    root = write(tmp_path, data)
    assert len(Coco(root=root, min_area=4)[1].masks) == 2
    sample = Coco(root=root, min_area=5)[1]
    assert len(sample.masks) == 1
    np.testing.assert_array_equal(sample.ignore, blob(30, 30, 2, 2))
    assert len(Coco(root=root, min_area=100)) == 2  # image 12 is left out


@pytest.mark.parametrize(
    ("categories", "names", "length"),
    [("dog", ("dog",), 1), ("dog, cat", ("dog", "cat"), 3), (["cat"], ("cat",), 3)],
)
def test_categories_select(
    root: str, categories: str | list[str], names: tuple, length: int
) -> None:
    dataset = Coco(root=root, categories=categories)
    assert dataset.categories == names
    assert len(dataset) == length
    assert all(dataset[i].categories.max() < len(names) for i in range(length))
    if names[0] == "dog":
        np.testing.assert_array_equal(dataset[0].category_mask(0), reference([*SQUARE, *TRIANGLE]))


def test_unknown_and_empty_categories(root: str) -> None:
    with pytest.raises(ValueError, match="Unknown category 'dgo'. Did you mean 'dog'"):
        Coco(root=root, categories="dgo")
    with pytest.raises(ValueError, match="category 'bird' has no instance"):
        Coco(root=root, categories="cat,bird")
    with pytest.raises(ValueError, match="categories is empty"):
        Coco(root=root, categories=[])
    with pytest.raises(ValueError, match="no image has an instance .* of at least 1e\\+06 pixels"):
        Coco(root=root, min_area=1e6)


def test_draw_balances_categories(root: str) -> None:
    dataset, rng = Coco(root=root), np.random.default_rng(0)
    draws = [dataset.draw(rng) for _ in range(3000)]
    for index, category in draws[:50]:
        assert category in dataset[index].categories
    categories = np.array([c for _, c in draws])
    np.testing.assert_allclose(np.bincount(categories) / 3000, [0.5, 0.5], atol=0.03)
    images = np.array([i for i, c in draws if c == 0])
    np.testing.assert_allclose(np.bincount(images) / len(images), [1 / 3] * 3, atol=0.04)


def test_draw_balances_images(root: str) -> None:
    dataset, rng = Coco(root=root, balance="image"), np.random.default_rng(0)
    draws = [dataset.draw(rng) for _ in range(3000)]
    assert {c for _, c in draws} == {None}
    images = np.bincount([i for i, _ in draws])
    np.testing.assert_allclose(images / 3000, [1 / 3] * 3, atol=0.03)


def test_draw_depends_on_the_generator_only(root: str) -> None:
    dataset = Coco(root=root)
    first, second = (
        [dataset.draw(rng) for _ in range(20)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    )
    assert first == second


def test_compressed_rle_round_trips_any_mask(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    masks = [(rng.random((HEIGHT, WIDTH)) < p).astype(np.uint8) for p in (0.02, 0.3, 0.5, 0.9)]
    masks += [np.ones((HEIGHT, WIDTH), np.uint8), blob(0, 0, 1, 1), blob(39, 59, 1, 1)]
    data = tiny()
    data["annotations"] = [
        annotation(i, 11, 1, form(mask))
        for i, (mask, form) in enumerate((m, f) for m in masks for f in (compressed, uncompressed))
    ]
    decoded = Coco(root=write(tmp_path, data))[0].masks
    np.testing.assert_array_equal(decoded, np.repeat(masks, 2, axis=0))


def test_masks_without_pixels_are_dropped_and_reported(tmp_path: Path) -> None:
    data = tiny()
    data["annotations"].append(annotation(6, 12, 2, NO_PIXEL))
    with pytest.warns(UserWarning, match="skipped 1 records: 1 x mask covers no pixel"):
        dataset = Coco(root=write(tmp_path, data))
    assert dataset.skipped == {"mask covers no pixel": 1}
    assert dataset[1].categories.tolist() == [0]


def test_category_whose_only_mask_has_no_pixel_is_never_drawn(tmp_path: Path) -> None:
    data = tiny()
    data["annotations"][1]["segmentation"] = NO_PIXEL
    root = write(tmp_path, data)
    with pytest.warns(UserWarning, match="no pixel"):
        dataset = Coco(root=root)
    rng = np.random.default_rng(0)
    assert {dataset.draw(rng)[1] for _ in range(50)} == {0}
    with pytest.raises(
        ValueError, match="category 'dog' has no instance .*1 x mask covers no pixel"
    ):
        Coco(root=root, categories="dog")


# Files of other tools


BOX = {"bbox": [30.2, 29.5, 9.8, 5.5]}  # columns 30 to 39, rows 29 to 34


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "no segmentation"),
        (None, "no segmentation"),
        ({}, "no segmentation"),
        (float("nan"), "no segmentation"),
        ([[]], "no segmentation"),
        ([[31, 31], [31, 31, 33, 31]], "no segmentation"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "no segmentation"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "no segmentation"),
        ({"size": [0, 0], "counts": None}, "no segmentation"),
        (NO_PIXEL, "mask covers no pixel"),
    ],
)
def test_object_without_a_mask_is_ignored(
    tmp_path: Path, segmentation: object, reason: str
) -> None:
    """As supervision, fiftyone, Label Studio, datumaro, SAHI and globox write some objects."""
    data = tiny()
    data["annotations"].append(annotation(6, 12, 2, segmentation, **BOX))
    with pytest.warns(UserWarning, match=f"skipped 1 records: 1 x {reason}"):
        dataset = Coco(root=write(tmp_path, data))
    assert dataset.skipped == {reason: 1}
    assert len(dataset[1].masks) == 1
    np.testing.assert_array_equal(dataset[1].ignore, blob(29, 30, 6, 10))


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": "x"},
        {"segmentation": [[[31, 31], [36, 31], [36, 36]]]},
        {"segmentation": {"size": [1, 1], "counts": [1]}},
        {"category_id": 99},
        {"iscrowd": "no"},
        {"id": 1},
    ],
)
def test_skipped_object_is_ignored(tmp_path: Path, changes: dict) -> None:
    data = tiny()
    data["annotations"].append(annotation(6, 12, 2, SQUARE, **BOX) | changes)
    with pytest.warns(UserWarning, match="skipped 1 records"):
        dataset = Coco(root=write(tmp_path, data), on_error="skip")
    np.testing.assert_array_equal(dataset[1].ignore, blob(29, 30, 6, 10))


@pytest.mark.parametrize(
    ("box", "ignored"),
    [
        ([50, 35, 100, 100], blob(35, 50, 5, 10)),
        ([5, 30, 20, 0], blob(30, 5, 1, 20)),
        ([30.0, 30.0, 1e300, 2], None),
        ([-50, 0, 10, 10], None),
        ([1, 2, 3], None),
        ([1, 2, -3, 4], None),
        ([1, 2, None, 4], None),
        ("x", None),
        (None, None),
    ],
)
def test_box_of_a_skipped_object(tmp_path: Path, box: object, ignored: np.ndarray | None) -> None:
    data = tiny()
    data["annotations"].append(annotation(6, 12, 2, [], bbox=box))
    with pytest.warns(UserWarning, match="no segmentation"):
        found = Coco(root=write(tmp_path, data))[1].ignore
    if ignored is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, ignored)


@pytest.mark.parametrize("specks", [[[26, 26]], [[26, 26, 27, 27]], [[]], [[1.0], [2, 2, 3]]])
def test_polygons_of_fewer_than_three_points_are_dropped(tmp_path: Path, specks: list) -> None:
    """As detectron2 and mmdetection do."""
    data = tiny()
    data["annotations"].append(annotation(6, 12, 2, [*specks, *SQUARE, *specks]))
    count = 2 * len(specks)
    reason = "polygon of fewer than 3 points"
    with pytest.warns(UserWarning, match=f"skipped {count} records: {count} x {reason}"):
        dataset = Coco(root=write(tmp_path, data))
    assert dataset.skipped == {reason: count}
    np.testing.assert_array_equal(dataset[1].masks[1], reference(SQUARE))
    assert dataset[1].ignore is None


@pytest.mark.parametrize("ring", [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 1e9, 5, 6], "x", [["x"] * 6], 5])
def test_an_invalid_polygon_costs_itself_only(tmp_path: Path, ring: object) -> None:
    data = tiny()
    data["annotations"].append(annotation(6, 12, 2, [*SQUARE, ring]))
    root = write(tmp_path, data)
    with pytest.raises(ValueError, match="annotation 6 of image 12: polygon"):
        Coco(root=root)
    with pytest.warns(UserWarning, match="skipped 1 records: 1 x polygon"):
        dataset = Coco(root=root, on_error="skip")
    np.testing.assert_array_equal(dataset[1].masks[1], reference(SQUARE))


def test_crowds_only(tmp_path: Path) -> None:
    """As CVAT and datumaro write brush masks."""
    data = tiny()
    for record in data["annotations"]:
        record["iscrowd"] = int(record["category_id"] == 1)
    root = write(tmp_path, data)
    advice = r"include_crowd=True \(--dataset-kwargs include_crowd True\) makes them instances"
    with pytest.raises(ValueError, match=rf"category 'cat' .*Crowd regions .*: 4; {advice}"):
        Coco(root=root, categories="cat")
    with pytest.warns(UserWarning, match=f"are ignored pixels: 4; {advice}"):
        assert Coco(root=root).crowds == 4
    data["annotations"][1]["iscrowd"] = 1
    with pytest.raises(ValueError, match=f"no image has an instance .*: 5; {advice}"):
        Coco(root=write(tmp_path, data))
    assert len(Coco(root=root, include_crowd=True)) == 3


def test_few_crowds_are_usual(tmp_path: Path) -> None:
    data = tiny()
    data["annotations"] += [annotation(i, 12, 1, SQUARE) for i in range(10, 30)]
    dataset = Coco(root=write(tmp_path, data))  # a warning would be an error
    assert dataset.crowds == 1


def test_boxes_only(tmp_path: Path) -> None:
    data = tiny()
    for record in data["annotations"]:
        record["segmentation"] = []
    root = write(tmp_path, data)
    with pytest.raises(ValueError, match="no image has .* .skipped 5 records: 5 x no segmentation"):
        Coco(root=root)


@pytest.mark.parametrize("first", [0, 50])
def test_a_category_without_annotations_never_takes_a_name(tmp_path: Path, first: int) -> None:
    """Roboflow's files begin with a category that groups the others."""
    data = tiny()
    data["categories"].insert(0, {"id": first, "name": "dog", "supercategory": "none"})
    data["categories"].append({"id": 60, "name": "dog"})
    dataset = Coco(root=write(tmp_path, data))
    assert dataset.categories == ("cat", "dog", "bird")
    assert dataset.skipped == {}
    assert dataset[0].categories.tolist() == [0, 1]


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    data = tiny()
    data["categories"][2]["name"] = "dog"
    root = write(tmp_path, data)
    with pytest.raises(ValueError, match="category 1: name is taken by an earlier category"):
        Coco(root=root)
    with pytest.warns(UserWarning, match="4 x category_id is not among"):
        assert len(Coco(root=root, on_error="skip")) == 1


def floats(value: object) -> object:
    """The same JSON with every whole number as float, as pandas writes it."""
    if isinstance(value, dict):
        return {key: floats(own) for key, own in value.items()}
    if isinstance(value, list):
        return [floats(own) for own in value]
    return float(value) if isinstance(value, int) else value


def texts(data: dict, table: str) -> dict:
    """The same file with the ids in a table, or those that refer to it, as text."""
    key = {"images": "image_id", "categories": "category_id"}.get(table, "id")
    rows = "annotations" if table in ("images", "categories") else "images"
    data[rows] = [row | {key: str(row[key])} for row in data[rows]]
    return data


def without(data: dict, *keys: str) -> dict:
    for record in data["annotations"]:
        for key in keys:
            record.pop(key, None)
    return data


@pytest.mark.parametrize(
    "change",
    [
        floats,
        lambda data: texts(data, "images"),
        lambda data: texts(data, "categories"),
        lambda data: texts(data, "ids of images"),
        lambda data: json.loads(json.dumps(data).replace('"iscrowd": 0', '"iscrowd": null')),
        lambda data: json.loads(json.dumps(data).replace('"iscrowd": 0', '"iscrowd": NaN')),
        lambda data: json.loads(json.dumps(data).replace('"iscrowd": 1', '"iscrowd": true')),
        lambda data: json.loads(json.dumps(data).replace('"iscrowd": 1', '"iscrowd": "1"')),
        lambda data: without(data, "area", "bbox"),
    ],
)
def test_dialects_read_the_same(tmp_path: Path, change: object) -> None:
    root = write(tmp_path, tiny())
    with pytest.warns(UserWarning, match="crowd"):
        expected = Coco(root=root)
        found = Coco(root=write(tmp_path, change(tiny())))  # type: ignore[operator]
    assert found.categories == expected.categories
    for index in range(3):
        one, other = found[index], expected[index]
        np.testing.assert_array_equal(one.masks, other.masks)
        np.testing.assert_array_equal(one.categories, other.categories)
        np.testing.assert_array_equal(one.ignore, other.ignore)
        assert one.source == other.source


@pytest.mark.parametrize(
    "segmentation",
    [
        [[str(value) for value in TRIANGLE[0]]],
        [uncompressed(blob(0, 0, 9, 9)), uncompressed(blob(20, 20, 9, 9))],
    ],
)
def test_segmentations_that_pycocotools_reads(tmp_path: Path, segmentation: object) -> None:
    data = tiny()
    data["annotations"] = [annotation(1, 11, 1, segmentation)]
    mask = Coco(root=write(tmp_path, data))[0].masks[0]
    np.testing.assert_array_equal(mask, reference(segmentation))  # type: ignore[arg-type]


def test_one_polygon_without_a_list(tmp_path: Path) -> None:
    """As VGG Image Annotator writes it."""
    data = tiny()
    data["annotations"] = [annotation(1, 11, 1, TRIANGLE[0])]
    mask = Coco(root=write(tmp_path, data))[0].masks[0]
    np.testing.assert_array_equal(mask, reference(TRIANGLE))


def test_category_names_that_are_numbers(tmp_path: Path) -> None:
    data = tiny()
    del data["annotations"][4]
    data["categories"][0]["name"], data["categories"][1]["name"] = 7, 8.0
    root = write(tmp_path, data)
    assert Coco(root=root).categories == ("cat", "8", "7")
    assert Coco(root=root, categories="8").categories == ("8",)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    data = tiny()
    data["categories"][1]["name"] = "café"
    del data["annotations"][4]
    root = write(tmp_path, data)
    text = json.dumps(data, ensure_ascii=False)
    (tmp_path / "instances_train.json").write_text(text, encoding=encoding)
    assert Coco(root=root).categories == ("cat", "café", "bird")


def test_backslashes_in_file_names(tmp_path: Path) -> None:
    data = tiny()
    del data["annotations"][4]
    root = write(tmp_path, data)
    (tmp_path / "images" / "day 1").mkdir()
    (tmp_path / "images" / "12.png").rename(tmp_path / "images" / "day 1" / "12.png")
    (tmp_path / "images" / "13.png").rename(tmp_path / "images" / "a\\13.png")
    for image, name in zip(
        data["images"], (".\\11.png", "day 1\\12.png", "a\\13.png"), strict=True
    ):
        image["file_name"] = name
    (tmp_path / "instances_train.json").write_text(json.dumps(data))
    dataset = Coco(root=root)
    assert [dataset[index].image.shape for index in range(3)] == [(HEIGHT, WIDTH, 3)] * 3


def test_commas_in_category_names(tmp_path: Path) -> None:
    data = tiny()
    data["categories"][1]["name"] = "dog, brown"
    data["categories"][2]["name"] = "dog"
    del data["annotations"][4]
    root = write(tmp_path, data)
    for given, names in {
        "dog, brown": ("dog, brown",),
        "dog,brown": ("dog, brown",),
        "dog,dog, brown": ("dog", "dog, brown"),
        "dog, brown ,dog": ("dog, brown", "dog"),
    }.items():
        assert Coco(root=root, categories=given).categories == names
    with pytest.raises(ValueError, match="Unknown category 'brown'"):
        Coco(root=root, categories="dog, brown, brown")


# Bad files


def test_missing_root_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="root folder does not exist"):
        Coco(root=str(tmp_path / "nowhere"))
    root = write(tmp_path, tiny(), "instances_val.json")
    with pytest.raises(
        FileNotFoundError, match="'test'. Found: instances_val.json. .*another split"
    ):
        Coco("test", root=root)
    Path(root, "labels.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="Found: instances_val.json, labels.json. .*anno"):
        Coco("test", root=root)
    with pytest.raises(FileNotFoundError, match="annotation file does not exist"):
        Coco(root=root, annotations=str(tmp_path / "other.json"))


def test_annotations_may_lie_anywhere(root: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.json"
    elsewhere.write_text(json.dumps(tiny()))
    assert len(Coco(root=root, annotations=str(elsewhere))) == 3


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"images": [', "instances_train.json: not valid JSON .*line 1"),
        ("[" * 100_000, "not valid JSON"),
        ([], "no list 'images' at the top .got 'NoneType'"),
        ({"images": [], "categories": []}, "no list 'annotations'"),
        ({"images": [], "annotations": [], "categories": {}}, "no list 'categories'.*got 'dict'"),
        ({"images": [], "annotations": [], "categories": []}, "no image has an instance"),
    ],
)
def test_not_coco(tmp_path: Path, content: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Coco(root=write(tmp_path, content))


def test_unknown_options(root: str) -> None:
    with pytest.raises(ValueError, match="Unknown balance 'imgae'. Did you mean 'image'"):
        Coco(root=root, balance="imgae")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown on_error 'skp'. Did you mean 'skip'"):
        Coco(root=root, on_error="skp")  # type: ignore[arg-type]


# Bad records: (table, position, changes to the record, message)

RLE_SIZE = {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}
LONE = compressed(blob(20, 30, 15, 25))["counts"]


def with_counts(counts: object) -> dict:
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}


BAD_RECORDS = [
    ("images", 1, {"id": 11}, "image 11: id is taken by an earlier record"),
    ("images", 1, {"id": [1]}, "image .*: id is neither whole number nor string"),
    ("images", 1, {"id": None}, "image None: id is neither whole number nor string"),
    ("images", 1, {"height": 0}, "image 12: height is not a positive whole number .got 0"),
    ("images", 1, {"width": "60"}, "image 12: width is not a positive whole number"),
    ("images", 1, {"file_name": None}, "image 12: file name is not a non-empty string"),
    ("images", 1, {"file_name": ""}, "image 12: file name is not a non-empty string"),
    ("images", 1, {"file_name": "a\0b"}, "image 12: file name is not a non-empty string"),
    ("images", 1, {"file_name": "\ud800.png"}, "image 12: file name cannot be encoded"),
    ("images", 1, {"file_name": "../11.png"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "..\\11.png"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "a/../11.png"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "/etc/hostname"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "link.png"}, "image 12: file name leaves its folder"),
    ("categories", 1, {"id": 9}, "category 9: id is taken"),
    ("categories", 1, {"name": [5]}, "category 2: name is not a non-empty string"),
    ("images", 1, {"id": True}, "image True: id is neither whole number nor string"),
    ("images", 1, {"id": 1.5}, "image 1.5: id is neither whole number nor string"),
    ("images", 1, {"height": 40.5}, "image 12: height is not a positive whole number .got 40.5"),
    ("annotations", 2, {"id": 1}, "annotation 1 of image 12: id is taken"),
    ("annotations", 2, {"image_id": 99}, "annotation 3 of image 99: image_id is not among"),
    ("annotations", 2, {"image_id": {}}, "image_id is neither whole number nor string"),
    ("annotations", 2, {"category_id": 99}, "annotation 3 of image 12: category_id is not among"),
    ("annotations", 2, {"iscrowd": "no"}, "annotation 3 of image 12: iscrowd is neither 0 nor 1"),
    ("annotations", 2, {"segmentation": "x"}, "segmentation is neither polygon nor RLE .got 'str'"),
    ("annotations", 2, {"segmentation": {"counts": [1]}}, "neither polygon nor RLE .got 'dict'"),
    ("annotations", 2, {"segmentation": [["x"], SQUARE[0]]}, "polygon holds something other"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon is not .*got 7 numbers"),
    ("annotations", 2, {"segmentation": [1, 2, 3, 4, 5, 6, 7]}, "polygon is not .*got 7"),
    ("annotations", 2, {"segmentation": [["x"] * 6]}, "polygon holds something other than numbers"),
    ("annotations", 2, {"segmentation": [[[1, 2]] * 3]}, "something other than numbers"),
    ("annotations", 2, {"segmentation": ["x"]}, "polygon is not a list .*got 'x'"),
    ("annotations", 2, {"segmentation": [[[1]] * 6]}, "polygon holds something other than numbers"),
    ("annotations", 2, {"segmentation": [[1, [2], 3, 4, 5, 6]]}, "something other than numbers"),
    ("annotations", 2, {"segmentation": [[1, 2, None, 4, 5, 6]]}, "something other than numbers"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, 1e9, 5, 6]]}, "polygon lies far outside"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, float("nan"), 5, 6]]}, "polygon holds NaN"),
    ("annotations", 2, {"segmentation": RLE_SIZE}, r"RLE size is not .*got \[60, 40\], expected"),
    (
        "annotations",
        2,
        with_counts([10, 20]),
        "do not sum to height x width .got 30, expected 2400",
    ),
    ("annotations", 2, with_counts([2500, -100]), "counts are not non-negative whole numbers"),
    ("annotations", 2, with_counts([2399.5, 0.5]), "counts are not non-negative whole numbers"),
    ("annotations", 2, with_counts(["x"]), "RLE counts holds something other than numbers"),
    ("annotations", 2, with_counts(2400), "RLE counts are neither list nor string .got 'int'"),
    ("annotations", 2, with_counts("\x7f\x10"), "not COCO's compressed form"),
    ("annotations", 2, with_counts("\ud800"), "not COCO's compressed form"),
    ("annotations", 2, with_counts("Pl" * 20), "not COCO's compressed form"),  # never ends
    ("annotations", 2, with_counts("l" * 20 + "0"), "not COCO's compressed form"),  # no such run
    ("annotations", 2, with_counts(LONE[:-1]), "do not sum|not COCO's compressed form"),
    ("annotations", 2, with_counts("11111"), "do not sum"),
]


def spoil(root: Path, table: str, position: int, changes: dict) -> str:
    data = tiny()
    data[table][position].update(changes)
    (root / "secret.png").touch()
    write(root, data)
    (root / "images" / "link.png").symlink_to(root / "secret.png")
    return str(root)


@pytest.mark.parametrize(("table", "position", "changes", "match"), BAD_RECORDS)
def test_bad_record_raises(
    tmp_path: Path, table: str, position: int, changes: dict, match: str
) -> None:
    root = spoil(tmp_path, table, position, changes)
    with pytest.raises(ValueError, match=f"^instances_train.json: .*{match}"):
        Coco(root=root)


@pytest.mark.parametrize(("table", "position", "changes", "match"), BAD_RECORDS)
def test_bad_record_is_counted_and_skipped(
    tmp_path: Path, table: str, position: int, changes: dict, match: str
) -> None:
    root = spoil(tmp_path, table, position, changes)
    with pytest.warns(UserWarning, match="instances_train.json: skipped . records: 1 x ") as caught:
        dataset = Coco(root=root, on_error="skip")
    assert len(caught) == 1
    # What referred to a skipped image or category is skipped as well.
    assert sum(dataset.skipped.values()) == (1 if table == "annotations" else 2)
    assert all(len(dataset[i].masks) for i in range(len(dataset)))


def test_message_in_full(tmp_path: Path) -> None:
    data = tiny()
    data["annotations"].append(annotation(4711, 12, 1, "polygon"))
    with pytest.raises(ValueError) as caught:
        Coco(root=write(tmp_path, data))
    assert str(caught.value) == (
        "instances_train.json: annotation 4711 of image 12: segmentation is neither polygon nor "
        "RLE (got 'str'). Fix or drop it, or pass on_error=\"skip\" (--on-error skip) to count and "
        "skip such records."
    )


def test_record_that_is_no_object(tmp_path: Path) -> None:
    data = tiny()
    data["annotations"][2] = "x"
    with pytest.raises(ValueError, match="annotation at position 2: record is not an object"):
        Coco(root=write(tmp_path, data))


def test_missing_image_file(root: str) -> None:
    os.remove(os.path.join(root, "images", "12.png"))
    with pytest.raises(FileNotFoundError, match="image 12: image file is missing .*12.png.*Fix or"):
        Coco(root=root)
    with pytest.warns(UserWarning, match="image file is missing"):
        assert len(Coco(root=root, on_error="skip")) == 2


def test_images_folder_may_be_a_link(root: str, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    assert len(Coco(root=root, images="linked")) == 3


def test_reading(root: str, tmp_path: Path) -> None:
    dataset, path = Coco(root=root), tmp_path / "images" / "11.png"
    for index in (-1, 3):
        with pytest.raises(IndexError, match="outside 0..2"):
            dataset[index]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="11.png: image 11 of .*truncated or not an image. Fetch"):
        dataset[0]
    cv2.imwrite(str(path), np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(ValueError, match="11.png: .*is 40 x 60 pixels, the JSON says 60 x 40"):
        dataset[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="11.png: image 11 of .*missing"):
        dataset[0]


# Real data


def real(folder: str) -> str:
    path = os.path.join(os.environ.get("SAM_GYM_DATA", ""), folder)
    if not os.environ.get("SAM_GYM_DATA") or not os.path.isdir(path):
        pytest.skip(f"SAM_GYM_DATA does not name a folder that holds {folder!r}")
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco(split: str) -> None:
    root = real("coco")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = Coco(split, root=root)
    with open(os.path.join(root, f"instances_{split}.json")) as file:
        data = json.load(file)
    assert len(dataset.categories) == len(data["categories"])
    images = {os.path.basename(i["file_name"]): i for i in data["images"]}
    for index in range(0, len(dataset), 20):
        sample = dataset[index]
        image = images[os.path.basename(sample.source)]
        size = image["height"], image["width"]
        assert sample.image.shape == (*size, 3)
        records = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        masks = [reference(a["segmentation"], *size) for a in records if not a["iscrowd"]]
        np.testing.assert_array_equal(sample.masks, np.stack(masks))
        crowd = [reference(a["segmentation"], *size) for a in records if a["iscrowd"]]
        assert (sample.ignore is not None) == bool(crowd)
        if crowd:
            expected = np.any(crowd, axis=0) & ~np.any(masks, axis=0)
            np.testing.assert_array_equal(sample.ignore, expected)


def test_real_indoor() -> None:
    annotations = os.path.join(real("indoor"), "instances_indoor.json")
    dataset = Coco(root=real("coco"), annotations=annotations)
    rng = np.random.default_rng(0)
    for _ in range(3):
        index, category = dataset.draw(rng)
        assert category is not None and dataset[index].category_mask(category).any()
