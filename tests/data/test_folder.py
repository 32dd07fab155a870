"""Folder against OpenCV, on generated data and, where present, on real data."""

import json
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_gym.data import Dataset, make_dataset
from sam_gym.data.folder import Folder

HEIGHT, WIDTH = 30, 50
STEMS = ("a", "b", "c")


def read(path: str | Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    return pixels


def tiny_mask() -> np.ndarray:
    """Two components, joined within by a diagonal step, a speck, and pixels to ignore."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:6, 2:6] = mask[6:9, 6:9] = 255  # one component if 8-connected, two if 4-connected
    mask[15:25, 20:40] = 255
    mask[28, 48] = 255
    mask[15:25, 40:42] = 128
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "leaves"
    for folder in ("images", "masks", "instances"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem in STEMS:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / f"{stem}.png"), pixels)
        cv2.imwrite(str(root / "masks" / f"{stem}.png"), tiny_mask())
        labels = np.zeros((HEIGHT, WIDTH), np.uint16)
        labels[2:6, 2:6], labels[2:6, 6:9], labels[20, 20] = 7, 300, 40_000
        cv2.imwrite(str(root / "instances" / f"{stem}.png"), labels)
    return root


def split_into(root: Path, **splits: object) -> None:
    (root / "splits.json").write_text(json.dumps(splits))


def test_is_a_registered_dataset(root: Path) -> None:
    dataset = make_dataset("folder", split="test", root=str(root), category="leaf")
    assert isinstance(dataset, Dataset)
    assert (dataset.name, dataset.categories, len(dataset)) == ("leaves", ("leaf",), 3)


def test_target_mask(root: Path) -> None:
    sample, mask = Folder(root=str(root))[0], tiny_mask()
    expected = read(root / "images" / "a.png")[..., ::-1]
    np.testing.assert_array_equal(sample.image, expected)
    assert sample.image.dtype == np.uint8 and sample.masks.dtype == bool
    np.testing.assert_array_equal(sample.masks, mask[None] == 255)
    np.testing.assert_array_equal(sample.ignore, mask == 128)
    assert sample.categories.tolist() == [0] and sample.categories.dtype == np.int64
    assert sample.source == "leaves/a"


def test_ignore_is_none_without_such_pixels(root: Path) -> None:
    cv2.imwrite(str(root / "masks" / "a.png"), (tiny_mask() == 255) * np.uint8(255))
    for target in ("mask", "components", "instances"):
        assert Folder(root=str(root), target=target)[0].ignore is None  # type: ignore[arg-type]


def test_target_components(root: Path) -> None:
    sample, mask = Folder(root=str(root), target="components")[0], tiny_mask()
    count, labels = cv2.connectedComponents((mask == 255).astype(np.uint8), connectivity=8)
    assert count == 4
    np.testing.assert_array_equal(sample.masks, [labels == i for i in (1, 2, 3)])
    assert sample.categories.tolist() == [0, 0, 0]


def test_target_instances(root: Path) -> None:
    sample = Folder(root=str(root), target="instances")[0]
    labels = read(root / "instances" / "a.png")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(sample.masks, [labels == i for i in (7, 300, 40_000)])


def test_instances_need_no_masks_folder(root: Path) -> None:
    for path in (root / "masks").iterdir():
        path.unlink()
    (root / "masks").rmdir()
    assert len(Folder(root=str(root), target="instances")[0].masks) == 3


@pytest.mark.parametrize("suffix", [".jfif", ".gif", ".pgm", ".JP2"])
def test_suffixes_of_images(root: Path, suffix: str) -> None:
    pixels = read(root / "images" / "a.png")
    formats = {".jfif": "JPEG", ".gif": "GIF", ".pgm": "PPM", ".JP2": "JPEG2000"}
    Image.fromarray(pixels).save(root / "images" / f"a{suffix}", formats[suffix])
    (root / "images" / "a.png").unlink()
    assert len(Folder(root=str(root))) == 3


def test_masks_without_an_image_are_told(root: Path) -> None:
    (root / "images" / "b.png").rename(root / "images" / "b.heic")
    for options in ({}, {"split": "all"}, {"split": "train", "split_seed": 0}):
        with pytest.warns(UserWarning, match=r"masks without an image: 1 \(the first is b.png\)"):
            Folder(root=str(root), **options)  # type: ignore[arg-type]
    split_into(root, test=["a", "c"])
    assert len(Folder(root=str(root))) == 2


def test_the_remedy_is_told(root: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    cv2.imwrite(str(root / "masks" / "b.png"), mask)
    with pytest.raises(ValueError, match=r"got 3 of uint8 \(.*b.png: Save it as grey PNG"):
        Folder(root=str(root))


def test_min_area_ignores_small_ones(root: Path) -> None:
    components = Folder(root=str(root), target="components", min_area=2)[0]
    assert components.masks.sum(axis=(1, 2)).tolist() == [25, 200]
    speck = np.zeros((HEIGHT, WIDTH), bool)
    speck[28, 48] = True
    np.testing.assert_array_equal(components.ignore, speck | (tiny_mask() == 128))
    instances = Folder(root=str(root), target="instances", min_area=13)[0]
    assert instances.masks.sum(axis=(1, 2)).tolist() == [16]
    assert instances.ignore is not None and instances.ignore.sum() == 13
    assert Folder(root=str(root), min_area=10_000)[0].masks.sum() == 226  # not for whole masks


def test_grey_images_and_other_suffixes(root: Path) -> None:
    grey = np.full((HEIGHT, WIDTH), 90, np.uint8)
    (root / "images" / "a.png").unlink()
    cv2.imwrite(str(root / "images" / "a.JPG"), grey)
    (root / "images" / "._a.jpg").touch()
    (root / "images" / "notes.txt").touch()
    dataset = Folder(root=str(root))
    assert len(dataset) == 3
    np.testing.assert_array_equal(dataset[0].image, np.full((HEIGHT, WIDTH, 3), 90))


def test_samples_are_fresh(root: Path) -> None:
    dataset = Folder(root=str(root))
    first = dataset[0]
    first.image[:] = 0
    first.masks[:] = False
    assert dataset[0].image.any() and dataset[0].masks.any()


def test_splits(root: Path) -> None:
    split_into(root, grouped_by="plant", train=["c", "a"], test=["b"])
    assert [s.source for s in map(Folder("train", root=str(root)).__getitem__, (0, 1))] == [
        "leaves/c",
        "leaves/a",
    ]
    assert len(Folder("test", root=str(root))) == 1
    with pytest.raises(ValueError, match="splits.json: split 'val' is not a list .*got 'NoneType'"):
        Folder("val", root=str(root))


def test_without_splits_every_split_is_all_images(root: Path) -> None:
    assert [len(Folder(split, root=str(root))) for split in ("train", "val", "test")] == [3, 3, 3]


def test_draw_is_uniform_and_seeded(root: Path) -> None:
    dataset = Folder(root=str(root))
    draws = [dataset.draw(rng) for rng in [np.random.default_rng(1)] for _ in range(3000)]
    assert {category for _, category in draws} == {None}
    frequencies = np.bincount([index for index, _ in draws]) / 3000
    np.testing.assert_allclose(frequencies, [1 / 3] * 3, atol=0.03)
    rng = np.random.default_rng(1)
    assert [dataset.draw(rng) for _ in range(20)] == draws[:20]


# Bad options, folders and files at construction


def test_unknown_options(root: Path) -> None:
    with pytest.raises(ValueError, match="Unknown split 'tset'. Did you mean 'test'"):
        Folder("tset", root=str(root))
    with pytest.raises(ValueError, match="Unknown target 'component'. Did you mean 'components'"):
        Folder(root=str(root), target="component")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown on_error 'skp'"):
        Folder(root=str(root), on_error="skp")  # type: ignore[arg-type]


def test_missing_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/images: the folder does not exist"):
        Folder(root=str(tmp_path / "nowhere"))
    (root / "masks").rename(root / "other masks")
    with pytest.raises(FileNotFoundError, match="leaves/masks: .*: pass target=instances"):
        Folder(root=str(root))
    (root / "instances").rename(root / "other")
    with pytest.raises(FileNotFoundError, match="leaves/instances: the folder does not exist"):
        Folder(root=str(root), target="instances")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "splits.json: not valid JSON"),
        ("[]", "split 'test' is not a list of stems .got 'NoneType'"),
        ('{"test": "a"}', "split 'test' is not a list of stems .got 'str'"),
        ('{"test": [1]}', "split 'test' is not a list of stems"),
        ('{"test": []}', "split 'test' has no usable image"),
    ],
)
def test_bad_splits_file(root: Path, content: str, match: str) -> None:
    (root / "splits.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        Folder(root=str(root))


def break_stem(root: Path, how: str) -> None:
    """Spoil the record of stem "b"."""
    image, mask = root / "images" / "b.png", root / "masks" / "b.png"
    outside = root.parent / "outside.png"
    if how == "no image":
        image.unlink()
        split_into(root, test=["a", "b", "c"])
    elif how == "no mask":
        mask.unlink()
    elif how == "two images":
        (root / "images" / "b.jpg").touch()
    elif how == "size":
        cv2.imwrite(str(mask), tiny_mask()[1:])
    elif how == "not an image":
        image.write_text("hello")
    elif how == "empty mask file":
        mask.write_bytes(b"")
    elif how == "listed twice":
        split_into(root, test=["b", "a", "b"])
    elif how == "mask link":
        mask.rename(outside)
        mask.symlink_to(outside)
    elif how == "image link":
        image.rename(outside)
        image.symlink_to(outside)
    else:
        split_into(root, test=["a", how])


BAD_STEMS = [
    ("no image", FileNotFoundError, "image 'b' .*: image file is missing .*images/b.*Fix or drop"),
    ("no mask", FileNotFoundError, "image 'b' of split 'test': mask file is missing .*masks/b.png"),
    ("two images", ValueError, "several image files have this stem .*b.jpg, .*b.png"),
    ("size", ValueError, "differ in size .*images/b.png is 50 x 30, .*masks/b.png is 50 x 29"),
    ("not an image", ValueError, "file cannot be read: the file is truncated or .*images/b.png"),
    ("empty mask file", ValueError, "file cannot be read: the file is truncated or .*masks/b.png"),
    ("listed twice", ValueError, "image 'b' of split 'test': image is listed twice"),
    ("mask link", ValueError, "image 'b' .*: file name leaves its folder .*'b.png'"),
    ("image link", ValueError, "image 'b' .*: file name leaves its folder .*'b.png'"),
    ("../masks/a", ValueError, "file name leaves its folder .*'../masks/a.png'"),
    ("/etc/passwd", ValueError, "file name leaves its folder"),
]


@pytest.mark.parametrize(("how", "error", "match"), BAD_STEMS)
def test_bad_stem(root: Path, how: str, error: type[Exception], match: str) -> None:
    break_stem(root, how)
    with pytest.raises(error, match=match):
        Folder(root=str(root))
    with pytest.warns(UserWarning, match="leaves: skipped 1 records: 1 x ") as caught:
        dataset = Folder(root=str(root), on_error="skip")
    assert len(caught) == 1
    assert sum(dataset.skipped.values()) == 1
    assert {dataset[i].source for i in range(len(dataset))} >= {"leaves/a"}


def test_message_in_full(root: Path) -> None:
    break_stem(root, "no mask")
    with pytest.raises(FileNotFoundError) as caught:
        Folder(root=str(root))
    assert str(caught.value) == (
        f"{root}: image 'b' of split 'test': mask file is missing (looked for {root}/masks/b.png). "
        'Fix or drop it, or pass on_error="skip" (--on-error skip) to count and skip such records.'
    )


# Bad contents when read


def values(*found: int) -> np.ndarray:
    mask = tiny_mask()
    mask.ravel()[: len(found)] = found
    return mask


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (
            values(1),
            r"other than 0 .* and 255 .object. .*masks/a.png: found 0, 1, 128, 255; a JPEG",
        ),
        (values(*range(1, 9)), r"found 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.; a JPEG"),
        (np.zeros((HEIGHT, WIDTH), np.uint8), "mask has no object .*masks/a.png"),
        (np.full((HEIGHT, WIDTH), 128, np.uint8), "mask has no object"),
        (cv2.merge([tiny_mask()] * 3), "one channel .*got 3 of uint8 .*masks/a.png"),
    ],
)
def test_bad_mask(root: Path, mask: np.ndarray, match: str) -> None:
    dataset = Folder(root=str(root))
    cv2.imwrite(str(root / "masks" / "a.png"), mask)
    with pytest.raises(ValueError, match="masks/a.png: image 'a' of leaves: .* 255|one channel|no"):
        dataset[0]
    with pytest.raises(ValueError, match=f"image 'a' of split 'test': .*{match}"):
        Folder(root=str(root))
    with pytest.warns(UserWarning, match="leaves: skipped 1 records: 1 x mask"):
        dataset = Folder(root=str(root), on_error="skip")
    assert [dataset[index].source for index in range(2)] == ["leaves/b", "leaves/c"]


def test_no_component_is_large_enough(root: Path) -> None:
    match = "no object of at least 1000 pixels .*largest has [0-9]+; lower min_area=VALUE"
    with pytest.raises(ValueError, match=match):
        Folder(root=str(root), target="components", min_area=1000)


def test_files_that_go_bad_later(root: Path) -> None:
    dataset, image, mask = Folder(root=str(root)), root / "images/a.png", root / "masks/a.png"
    for index in (-1, 3):
        with pytest.raises(IndexError, match="outside 0..2"):
            dataset[index]
    sound = mask.read_bytes()
    cv2.imwrite(str(mask), tiny_mask()[1:])
    with pytest.raises(
        ValueError, match="masks/a.png: .*differ in size .*a.png is 50 x 30, mask is 50 x 29"
    ):
        dataset[0]
    mask.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match="masks/a.png: image 'a' .*truncated or not an image"):
        dataset[0]
    mask.write_bytes(b"")
    with pytest.raises(ValueError, match="masks/a.png: image 'a' .*truncated or not an image"):
        dataset[0]
    image.unlink()
    with pytest.raises(FileNotFoundError, match="images/a.png: image 'a' .*missing"):
        dataset[0]


@pytest.mark.parametrize("progressive", [0, 1])
def test_truncated_jpeg(root: Path, progressive: int) -> None:
    path = root / "images" / "a.jpg"
    (root / "images" / "a.png").unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])
    dataset, sound = Folder(root=str(root)), path.read_bytes()
    assert dataset[0].image.any()
    path.write_bytes(sound + b"\0" * 64)  # padding does no harm
    assert dataset[0].image.any()
    path.write_bytes(sound[: len(sound) * 9 // 10])
    with pytest.raises(ValueError, match="images/a.jpg: .*truncated"):
        dataset[0]


# Real data


def real(folder: str) -> str:
    path = os.path.join(os.environ.get("SAM_GYM_DATA", ""), folder)
    if not os.environ.get("SAM_GYM_DATA") or not os.path.isdir(path):
        pytest.skip(f"SAM_GYM_DATA does not name a folder that holds {folder!r}")
    return path


DOMAINS = (
    "aerial_roads",
    "cracks",
    "crop_weed",
    "magnetic_tile",
    "nuclei",
    "polyps",
    "retina",
    "surgical_tools",
)


@pytest.mark.parametrize("domain", [*DOMAINS, "grabcut"])
def test_real_domain(domain: str) -> None:
    root = real(domain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = {split: Folder(split, root=root) for split in ("train", "val", "test")}
    if domain == "grabcut":
        assert [len(d) for d in splits.values()] == [50, 50, 50]
    else:
        assert sum(map(len, splits.values())) == len(os.listdir(os.path.join(root, "images")))
    dataset, components = splits["test"], Folder("test", root=root, target="components")
    for index in (0, len(dataset) - 1):
        whole, split = dataset[index], components[index]
        stem = whole.source.split("/")[1]
        mask = read(os.path.join(root, "masks", f"{stem}.png"))
        assert whole.image.shape == (*mask.shape, 3)
        np.testing.assert_array_equal(whole.masks[0], mask == 255)
        count = cv2.connectedComponents(np.where(mask == 255, np.uint8(1), np.uint8(0)))[0]
        assert len(split.masks) == count - 1
        np.testing.assert_array_equal(split.masks.sum(axis=0), mask == 255)


def test_real_instances() -> None:
    root = real("nuclei")
    sample = Folder("test", root=root, target="instances")[0]
    stem = sample.source.split("/")[1]
    labels = read(os.path.join(root, "instances", f"{stem}.png"))
    np.testing.assert_array_equal(sample.masks, [labels == i for i in np.unique(labels)[1:]])
