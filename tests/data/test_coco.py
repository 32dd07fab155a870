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
    with pytest.raises(ValueError, match="category 'dog' has no instance .*1 records were skipped"):
        Coco(root=root, categories="dog")


# Bad files


def test_missing_root_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="root folder does not exist"):
        Coco(root=str(tmp_path / "nowhere"))
    root = write(tmp_path, tiny(), "instances_val.json")
    with pytest.raises(FileNotFoundError, match="'test'. Found: instances_val.json. .*split="):
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
    ("images", 1, {"id": [1]}, "image .*: id is neither number nor string"),
    ("images", 1, {"id": None}, "image None: id is neither number nor string"),
    ("images", 1, {"height": 0}, "image 12: height is not a positive whole number .got 0"),
    ("images", 1, {"width": "60"}, "image 12: width is not a positive whole number"),
    ("images", 1, {"file_name": None}, "image 12: file name is not a non-empty string"),
    ("images", 1, {"file_name": ""}, "image 12: file name is not a non-empty string"),
    ("images", 1, {"file_name": "a\0b"}, "image 12: file name is not a non-empty string"),
    ("images", 1, {"file_name": "../11.png"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "..\\11.png"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "a/../11.png"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "/etc/hostname"}, "image 12: file name leaves its folder"),
    ("images", 1, {"file_name": "link.png"}, "image 12: file name leaves its folder"),
    ("categories", 1, {"id": 9}, "category 9: id is taken"),
    ("categories", 1, {"name": 5}, "category 2: name is not a non-empty string"),
    ("categories", 1, {"name": "bird"}, "category 2: name is taken by an earlier category"),
    ("annotations", 2, {"id": 1}, "annotation 1 of image 12: id is taken"),
    ("annotations", 2, {"image_id": 99}, "annotation 3 of image 99: image_id is not among"),
    ("annotations", 2, {"image_id": {}}, "image_id is neither number nor string"),
    ("annotations", 2, {"category_id": 99}, "annotation 3 of image 12: category_id is not among"),
    ("annotations", 2, {"iscrowd": "no"}, "annotation 3 of image 12: iscrowd is neither 0 nor 1"),
    ("annotations", 2, {"segmentation": "x"}, "segmentation is neither polygon nor RLE .got 'str'"),
    ("annotations", 2, {"segmentation": None}, "neither polygon nor RLE .got 'NoneType'"),
    ("annotations", 2, {"segmentation": {"counts": []}}, "neither polygon nor RLE .got 'dict'"),
    ("annotations", 2, {"segmentation": []}, "segmentation has no polygon"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, 4]]}, "polygon is not .*got 4 numbers"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon is not .*got 7 numbers"),
    ("annotations", 2, {"segmentation": [1, 2, 3, 4, 5, 6]}, "polygon is not a list .*got 1"),
    ("annotations", 2, {"segmentation": [["1"] * 6]}, "polygon holds something other than numbers"),
    ("annotations", 2, {"segmentation": [[[1]] * 6]}, "polygon holds something other than numbers"),
    ("annotations", 2, {"segmentation": [[1, [2], 3, 4, 5, 6]]}, "something other than numbers"),
    ("annotations", 2, {"segmentation": [[1, 2, None, 4, 5, 6]]}, "something other than numbers"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, 1e9, 5, 6]]}, "polygon lies far outside"),
    ("annotations", 2, {"segmentation": [[1, 2, 3, float("nan"), 5, 6]]}, "lies far outside"),
    ("annotations", 2, {"segmentation": RLE_SIZE}, r"RLE size is not .*got \[60, 40\], expected"),
    (
        "annotations",
        2,
        with_counts([10, 20]),
        "do not sum to height x width .got 30, expected 2400",
    ),
    ("annotations", 2, with_counts([]), "counts are not non-negative whole numbers"),
    ("annotations", 2, with_counts([2500, -100]), "counts are not non-negative whole numbers"),
    ("annotations", 2, with_counts([2400.0]), "counts are not non-negative whole numbers"),
    ("annotations", 2, with_counts(["2400"]), "RLE counts holds something other than numbers"),
    ("annotations", 2, with_counts(2400), "RLE counts are neither list nor string .got 'int'"),
    ("annotations", 2, with_counts(""), "not COCO's compressed form"),
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
        "RLE (got 'str'). Fix or drop it, or pass on_error=\"skip\" to count and skip such records."
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
