"""Entities: what is written is read back, and what is wrong is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_gym.data import Dataset, Sample, make_dataset
from sam_gym.data.entities import Entities
from sam_gym.data.synthetic.rooms.dataset import Rooms

CATEGORIES = ("chair", "table", "lamp")
HEIGHT, WIDTH = 30, 50


def tiny(seed: int) -> Sample:
    """Two objects, the second half hidden."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, HEIGHT, WIDTH), bool)
    masks[0, 5:20, 4:20] = True
    masks[1, 10:28, 15:40] = True
    masks[1] &= ~masks[0]
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Sample(image, masks, rng.permutation(3)[:2].astype(np.int64), f"tiny/{seed}")


@pytest.fixture
def root(tmp_path: Path, write_entities: Callable[..., None]) -> Path:
    root = tmp_path / "whole"
    write_entities(root, CATEGORIES, train=[tiny(0), tiny(1), tiny(2)], val=[tiny(3)])
    return root


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = root / "metadata.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def assert_same(one: Sample, two: Sample) -> None:
    for name in ("image", "masks", "categories"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert getattr(one, name).dtype == getattr(two, name).dtype


def test_is_a_registered_dataset(root: Path) -> None:
    dataset = make_dataset("entities", split="val", root=str(root))
    assert isinstance(dataset, Dataset)
    assert (dataset.name, dataset.categories, len(dataset)) == ("whole", CATEGORIES, 1)
    assert dataset[0].source == "whole/val_000000.png"
    with pytest.raises(ValueError, match="Dataset 'entities' reads files"):
        make_dataset("entities")


def test_what_is_written_is_read_back(root: Path) -> None:
    train = Entities("train", root=str(root))
    assert len(train) == 3
    for index in range(3):
        assert_same(train[index], tiny(index))
        assert train[index].parts is None and train[index].ignore is None
    train[0].image[:] = 0
    assert_same(train[0], tiny(0))


def test_rooms_can_be_exported(tmp_path: Path, write_entities: Callable[..., None]) -> None:
    rooms = {split: Rooms(split, size=64, length=2) for split in ("train", "val", "test")}
    samples = {split: [room[0], room[1]] for split, room in rooms.items()}
    write_entities(tmp_path / "a", Rooms.categories, **samples)
    for split in rooms:
        dataset = Entities(split, root=str(tmp_path / "a"))
        assert dataset.categories == Rooms.categories
        for index in (0, 1):
            assert_same(dataset[index], rooms[split][index])


def test_split_test_is_val_unless_the_file_has_one(root: Path) -> None:
    assert_same(Entities("test", root=str(root))[0], tiny(3))
    change(root, lambda data: data.update(test_data=data["train_data"][1:2]))
    assert_same(Entities("test", root=str(root))[0], tiny(1))


@pytest.mark.parametrize(
    "classes",
    [
        ["chair", "table", "lamp"],
        {"chair": 0, "table": 1, "lamp": 2},
        {"2": "lamp", "0": "chair", "1": "table"},
    ],
)
def test_forms_of_classes(root: Path, classes: object) -> None:
    change(root, lambda data: data.update({"entity classes": classes}))
    dataset = Entities(root=str(root))
    assert dataset.categories == CATEGORIES
    assert_same(dataset[0], tiny(0))


def test_indices_of_classes_may_have_gaps(root: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["entity classes"] = {"lamp": 12, "chair": 3, "table": 7}
        for entry in data["train_data"]:
            entry["entity_indices"] = [[3, 7, 12][i] for i in entry["entity_indices"]]

    change(root, edit)
    dataset = Entities(root=str(root))
    assert dataset.categories == CATEGORIES
    assert_same(dataset[2], tiny(2))


def test_names_may_be_relative_to_the_root(root: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        for entry in data["train_data"]:
            entry["image_name"] = f"images/{entry['image_name']}"
            entry["entity_masks"] = [f"masks/{name}" for name in entry["entity_masks"]]

    change(root, edit)
    assert_same(Entities(root=str(root))[1], tiny(1))
    (root / "masks").rename(root / "labels")
    (root / "images").rename(root / "photos")
    (root / "metadata.json").rename(root / "all.json")
    change_names = {"metadata": "all.json", "images": "photos", "masks": "labels"}
    assert_same(Entities("val", root=str(root), **change_names)[0], tiny(3))


def test_any_value_but_zero_is_the_object(root: Path) -> None:
    cv2.imwrite(str(root / "masks/train_000000_000.png"), tiny(0).masks[0] * np.uint8(1))
    cv2.imwrite(str(root / "masks/train_000000_001.png"), tiny(0).masks[1] * np.uint16(40_000))
    assert_same(Entities(root=str(root))[0], tiny(0))


def test_draw_is_uniform(root: Path) -> None:
    dataset = Entities(root=str(root))
    drawn = {dataset.draw(np.random.default_rng(seed)) for seed in range(40)}
    assert drawn == {(0, None), (1, None), (2, None)}


# What is wrong


def test_unknown_options(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown split 'tset'. Did you mean 'test'"):
        Entities("tset", root=str(root))
    with pytest.raises(ValueError, match="Unknown on_error 'skp'"):
        Entities(root=str(root), on_error="skp")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere: the root folder does not exist"):
        Entities(root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="other.json: the metadata file does not exist"):
        Entities(root=str(root), metadata="other.json")


CLASSES = "entity classes"

BAD_FILES: list[tuple[object, str]] = [
    ([], "metadata.json: expected an object with 'entity classes'.* got 'list'"),
    ({}, "'entity classes' must be a list of names, .* got None"),
    ({CLASSES: []}, "'entity classes' must be a list of names"),
    ({CLASSES: ["a", 3]}, "'entity classes' holds 1 for 3; expected a list of names"),
    ({CLASSES: ["a", ""]}, "'entity classes' holds 1 for ''"),
    ({CLASSES: {"a": -1}}, "'entity classes' holds -1 for 'a'"),
    ({CLASSES: {"a": True}}, "'entity classes' holds True for 'a'"),
    ({CLASSES: {"x": "a"}}, "'entity classes' holds 'x' for 'a'"),
    ({CLASSES: ["a", "a"]}, "'entity classes' holds 'a' or index 1 twice"),
    ({CLASSES: {"a": 0, "b": 0}}, "'entity classes' holds 'b' or index 0 twice"),
    ({CLASSES: ["a"]}, "no list 'train_data' of entries for split 'train' .got 'NoneType'"),
    ({CLASSES: ["a"], "train_data": {}}, "no list 'train_data' .* .got 'dict'"),
    (
        {CLASSES: ["a"], "train_data": []},
        "list 'train_data' has no usable entry .the list is empty",
    ),
]


@pytest.mark.parametrize(("content", "match"), BAD_FILES)
def test_bad_metadata(root: Path, content: object, match: str) -> None:
    (root / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        Entities(root=str(root))


def test_metadata_is_no_json(root: Path) -> None:
    (root / "metadata.json").write_text('{"entity')
    with pytest.raises(ValueError, match="metadata.json: not valid JSON"):
        Entities(root=str(root))


def spoil(key: str, value: object) -> Callable[[Path], None]:
    """Put something else into the second entry."""
    return lambda root: change(root, lambda data: data["train_data"][1].update({key: value}))


def write_mask(pixels: np.ndarray) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        cv2.imwrite(str(root / "masks/train_000001_001.png"), pixels)

    return write


def link(root: Path) -> None:
    path = root / "masks/train_000001_001.png"
    path.rename(root.parent / "outside.png")
    path.symlink_to(root.parent / "outside.png")


MASKS = ["train_000001_000.png", "train_000001_001.png"]
NO_IMAGE = (FileNotFoundError, "image file is missing .looked for .*images/train_000001.png and ")
BAD_ENTRIES: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (lambda root: (root / "images/train_000001.png").unlink(), *NO_IMAGE),
    (
        lambda root: (root / "masks/train_000001_001.png").unlink(),
        FileNotFoundError,
        "mask file is missing .looked for .*masks/train_000001_001.png and ",
    ),
    (spoil("image_name", None), ValueError, "file name is not a non-empty string .got None"),
    (spoil("image_name", "../a.png"), ValueError, "file name leaves its folder .got '../a.png'"),
    (spoil("image_name", "/etc/passwd"), ValueError, "file name leaves its folder"),
    (spoil("image_name", "train_000000.png"), ValueError, "image is listed twice"),
    (spoil("entity_masks", ["../x.png"] * 2), ValueError, "leaves its folder .got '../x.png'"),
    (spoil("entity_masks", [MASKS[0], 7]), ValueError, "not a non-empty string .got 7"),
    (link, ValueError, "file name leaves its folder .got 'train_000001_001.png'"),
    (spoil("entity_masks", "x"), ValueError, "entity_masks is not a list .got 'str'"),
    (spoil("entity_indices", None), ValueError, "entity_indices is not a list .got 'NoneType'"),
    (
        spoil("entity_indices", [0]),
        ValueError,
        "numbers of masks and indices differ .2 masks, 1 indices",
    ),
    (
        spoil("entity_indices", [0, 3]),
        ValueError,
        "index has no class .got 3, classes have 0, 1, 2",
    ),
    (spoil("entity_indices", [0, True]), ValueError, "index is not a whole number .got True"),
    (spoil("entity_indices", [0, "1"]), ValueError, "index is not a whole number .got '1'"),
    (
        lambda root: [spoil(key, [])(root) for key in ("entity_masks", "entity_indices")],
        ValueError,
        "entry has no mask",
    ),
    (
        write_mask(np.full((HEIGHT, WIDTH - 1), 255, np.uint8)),
        ValueError,
        "image and annotation differ in size .*images/train_000001.png is 50 x 30, .* is 49 x 30",
    ),
    (
        write_mask(np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
        ValueError,
        "mask file cannot be read: expected one channel.*got 3 of uint8 .*train_000001_001.png",
    ),
    (
        lambda root: (root / "masks/train_000001_000.png").write_text("hello"),
        ValueError,
        "mask file cannot be read: .*truncated or not an image .*train_000001_000.png",
    ),
    (
        lambda root: (root / "images/train_000001.png").write_text("hello"),
        ValueError,
        "image file cannot be read: .*train_000001.png",
    ),
]


@pytest.mark.parametrize(("how", "error", "match"), BAD_ENTRIES)
def test_bad_entry(
    root: Path, how: Callable[[Path], object], error: type[Exception], match: str
) -> None:
    how(root)
    with pytest.raises(error, match=rf"metadata.json: entry 1 of 'train_data', image .*{match}"):
        Entities(root=str(root))
    with pytest.warns(UserWarning, match="metadata.json: skipped 1 records: 1 x ") as caught:
        dataset = Entities(root=str(root), on_error="skip")
    assert len(caught) == 1
    assert sum(dataset.skipped.values()) == 1 and len(dataset) == 2
    assert_same(dataset[1], tiny(2))


def test_entry_is_no_object(root: Path) -> None:
    change(root, lambda data: data["val_data"].insert(0, "x"))
    with pytest.raises(
        ValueError, match="entry 0 of 'val_data': entry is not an object .got 'str'"
    ):
        Entities("test", root=str(root))


def test_message_in_full(root: Path) -> None:
    spoil("entity_indices", [0, 9])(root)
    with pytest.raises(ValueError) as caught:
        Entities(root=str(root))
    assert str(caught.value) == (
        f"{root}/metadata.json: entry 1 of 'train_data', image 'train_000001.png': index has no "
        "class (got 9, classes have 0, 1, 2). Fix or drop it, "
        'or pass on_error="skip" (--on-error skip) to count and skip such records.'
    )


def test_an_empty_mask_costs_itself_only(root: Path) -> None:
    write_mask(np.zeros((HEIGHT, WIDTH), np.uint8))(root)
    with pytest.raises(ValueError, match="mask is empty .*masks/train_000001_001.png"):
        Entities(root=str(root))
    with pytest.warns(UserWarning, match="skipped 1 records: 1 x mask is empty"):
        dataset = Entities(root=str(root), on_error="skip")
    assert [len(dataset[index].masks) for index in range(3)] == [
        len(tiny(number).masks) - (number == 1) for number in range(3)
    ]


def test_indices_as_floats(root: Path) -> None:
    expected = [Entities(root=str(root))[index].categories.tolist() for index in range(3)]

    def as_floats(data: dict[str, Any]) -> None:
        data["entity classes"] = {name: float(i) for i, name in enumerate(CATEGORIES)}
        for entry in data["train_data"]:
            entry["entity_indices"] = [float(index) for index in entry["entity_indices"]]

    change(root, as_floats)
    dataset = Entities(root=str(root))
    assert dataset.categories == tuple(CATEGORIES)
    assert [dataset[index].categories.tolist() for index in range(3)] == expected


def test_files_that_go_bad_later(root: Path) -> None:
    dataset = Entities(root=str(root))
    for index in (-1, 3):
        with pytest.raises(IndexError, match="whole: index .* is outside 0..2"):
            dataset[index]
    mask = root / "masks/train_000000_000.png"
    for pixels in (np.ones((HEIGHT, WIDTH - 1), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)):
        cv2.imwrite(str(mask), pixels)
        with pytest.raises(ValueError, match="_000.png: image 'train_000000.png' of whole: .*mask"):
            dataset[0]
    mask.unlink()
    with pytest.raises(FileNotFoundError, match="train_000000_000.png: image .* is missing"):
        dataset[0]
