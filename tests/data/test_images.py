"""Image files as cameras, scanners and geographic software write them."""

import io
import json
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, features

from sam_gym.data.coco import Coco
from sam_gym.data.entities import Entities
from sam_gym.data.folder import Folder
from sam_gym.data.images import Unreadable, check_file, decode_colours
from sam_gym.data.io import image_size, read_image, read_labels

HEIGHT, WIDTH = 40, 56
ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
SUFFIXES = {
    ".jpg": {"quality": 100, "subsampling": 0},
    ".png": {},
    ".webp": {"lossless": True},
    ".tif": {},
}


def photo(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth image that no turn and no flip leaves as it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * y, 4 * x, 255 - 2 * (x + y)], axis=-1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **SUFFIXES[path.suffix])
    return path


def assert_close(image: np.ndarray, expected: np.ndarray) -> None:
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_of_a_palette_are_its_indices(tmp_path: Path, bits: int) -> None:
    indices = np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.png"
        image.save(path, bits=bits, exif=exif)
        assert path.read_bytes()[24:26] == bytes((bits, 3))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        np.testing.assert_array_equal(read_labels(str(path), "labels"), expected)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not an image"):
        read_labels(str(path), "labels")


def test_colour_codes(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = save(tmp_path / "a.png", colours).read_bytes()
    np.testing.assert_array_equal(decode_colours(data), colours)
    for other in (colours[..., 0], np.dstack([colours, colours[..., 0]])):
        data = save(tmp_path / "a.png", other).read_bytes()
        with pytest.raises(Unreadable, match="expected three channels of uint8 colour codes, got"):
            decode_colours(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_images_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = save(tmp_path / f"a{suffix}", photo(), orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert image_size(str(path)) == expected.shape[:2]
    assert_close(read_image(str(path), "image"), expected)
    assert_close(read_image(str(path), "image", expected.shape[:2]), expected)
    stored = photo() if orientation in QUARTER_TURNS else expected
    assert_close(read_image(str(path), "image", (HEIGHT, WIDTH)), stored)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff", b"x" * 50])
def test_broken_exif(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path, exif=exif)
    assert (read_image(str(path), "image") == photo()).all()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation(tmp_path: Path, orientation: int) -> None:
    path = save(tmp_path / "a.png", photo(), orientation)
    assert (read_image(str(path), "image") == photo()).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp", ".bmp"])
def test_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.fromarray(photo()).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(60)
    path = tmp_path / f"a{suffix}"
    try:
        image.save(path, **({"exact": True, "lossless": True} if suffix == ".webp" else {}))
    except OSError:
        pytest.skip(f"Pillow writes no {suffix} of mode {mode}")
    expected = Image.open(path).convert("RGB")
    assert_close(read_image(str(path), "image"), np.asarray(expected))


def test_transparent_palette(tmp_path: Path) -> None:
    image = Image.fromarray(photo()).quantize(16)
    image.save(tmp_path / "a.png", transparency=3)
    expected = np.asarray(image.convert("RGB"))
    assert (read_image(str(tmp_path / "a.png"), "image") == expected).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_low_bits_are_scaled(tmp_path: Path, suffix: str, bits: int) -> None:
    full = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    path = str(tmp_path / f"a{suffix}")
    cv2.imwrite(path, full >> (16 - bits))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = read_image(path, "image")
    assert_close(image, (full >> 8)[..., ::-1])
    told = [str(warning.message) for warning in caught]
    expected = f"values fit into {bits} are scaled as images of {bits} bits"
    assert (bits == 16 and not told) or expected in told[0]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_a_known_range(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(photo()[..., 0].astype(dtype)).save(path)
    expected = f"expected samples of uint8 or uint16, got {dtype.__name__}.*Scale it to 8 bits"
    with pytest.raises(ValueError, match=expected):
        read_image(str(path), "image")
    with pytest.raises(Unreadable, match=expected):
        check_file(str(path))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_no_limit_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", photo(), 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert image_size(str(path)) == (WIDTH, HEIGHT)
    assert_close(read_image(str(path), "image"), np.rot90(photo(), -1))


def test_more_pixels_than_opencv_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    path.write_bytes(header + (40000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24))
    with pytest.raises(ValueError, match="a.bmp: image: 40000 x 40000 pixels are more than OpenCV"):
        read_image(str(path), "image")


def formats() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    found: dict[str, bytes] = {}
    for name, format, options in (
        ("jpeg", "JPEG", {}),
        ("progressive jpeg", "JPEG", {"progressive": True}),
        ("png", "PNG", {}),
        ("webp", "WEBP", {}),
        ("tiff", "TIFF", {}),
        ("lzw tiff", "TIFF", {"compression": "tiff_lzw"}),
        ("bmp", "BMP", {}),
        ("ppm", "PPM", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("name", "data"), formats().items())
def test_cut_files_are_found_without_decoding(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    assert check_file(str(path)).size == (HEIGHT, WIDTH)
    for length in (0, 1, 10, 30, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:length])
        with pytest.raises(Unreadable, match="truncated or not an image"):
            check_file(str(path))


def test_what_phones_append_does_no_harm(tmp_path: Path) -> None:
    for name in ("jpeg", "progressive jpeg"):
        whole = formats()[name]
        for appended in (b"\xff\xda", b"\xff\xd9\xff\xda", whole[:-100]):
            path = tmp_path / name
            path.write_bytes(whole + appended)
            assert check_file(str(path)).size == (HEIGHT, WIDTH)
            assert read_image(str(path), "image").shape == (HEIGHT, WIDTH, 3)


def tiff(**tags: int) -> bytes:
    """A TIFF file of three bands with some tags changed."""
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    for name, value in tags.items():
        tag = int(ExifTags.Base[name])
        place = data.index(struct.pack("<HHI", tag, 3, 3 if name == "BitsPerSample" else 1))
        if name == "BitsPerSample":
            place = int.from_bytes(data[place + 8 : place + 12], "little") - 8
            data[place + 8 : place + 14] = struct.pack("<HHH", value, value, value)
        else:
            data[place + 8 : place + 10] = struct.pack("<H", value)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.tif", tiff(Compression=50000), "compression zstd are not read. Convert it"),
        ("a.tif", tiff(Compression=34712), "compression 34712 are not read"),  # OpenCV: black
        ("a.tif", tiff(PhotometricInterpretation=1), "has 3 bands that are not marked as RGB"),
        ("a.tif", tiff(BitsPerSample=12), "not an image in a supported kind of TIFF"),
        ("a.tga", None, "TGA files of mode RGB are not read"),
        ("a.eps", None, "EPS files of mode RGB are not read"),
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(50), "HEIF files are not read"),
        ("a.pfm", b"PF\n4 4\n-1\n" + np.full(48, 0.5, "<f4").tobytes(), "float32 have no known"),
    ],
)
def test_kinds_that_are_not_read(tmp_path: Path, name: str, data: bytes | None, match: str) -> None:
    path = tmp_path / name
    if data is None:
        Image.fromarray(photo()).save(path)
    else:
        path.write_bytes(data)
    with pytest.raises(Unreadable, match=match):
        check_file(str(path))
    with pytest.raises(ValueError, match=f"{name}: image: .*{match}"):
        read_image(str(path), "image")


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_damaged_avif(tmp_path: Path) -> None:
    """Pillow raises RuntimeError."""
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, "AVIF")
    path = tmp_path / "a.avif"
    path.write_bytes(buffer.getvalue().replace(b"iinf", b"free", 1))
    with pytest.raises(ValueError, match="truncated or not an image"):
        read_image(str(path), "image")


def test_padding_does_no_harm(tmp_path: Path) -> None:
    for name, data in formats().items():
        for padding in (64, 70_000):
            (tmp_path / name).write_bytes(data + bytes(padding))
            assert check_file(str(tmp_path / name)).size == (HEIGHT, WIDTH)


# Datasets


def write_coco(root: Path, **sizes: tuple[int, int]) -> str:
    """A COCO dataset of images whose records have the given (height, width)."""
    (root / "images").mkdir()
    images, annotations = [], []
    for number, (name, (height, width)) in enumerate(sizes.items()):
        file = f"{name}.jpg"
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        box = [4, 8, 12, 8, 12, 20, 4, 20]
        annotations.append({"id": number, "image_id": number, "category_id": 1})
        annotations[-1]["segmentation"] = [box]
        save(root / "images" / file, photo())
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "instances_train.json").write_text(json.dumps(data))
    return str(root)


def upright_photo(height: int, width: int) -> np.ndarray:
    """Grey with one red rectangle, rows 8 to 20, columns 4 to 12."""
    image = np.full((height, width, 3), 90, np.uint8)
    image[8:20, 4:12] = (220, 60, 40)
    return image


def store(path: Path, upright: np.ndarray, orientation: int) -> None:
    """Save an image whose pixels the orientation turns upright."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = inverse
    Image.fromarray(upright).save(buffer, "PNG", exif=exif)
    save(path, np.asarray(ImageOps.exif_transpose(Image.open(buffer))), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_coco_annotated_upright(tmp_path: Path, orientation: int) -> None:
    root = write_coco(tmp_path, a=(WIDTH, HEIGHT))
    store(tmp_path / "images" / "a.jpg", upright_photo(WIDTH, HEIGHT), orientation)
    sample = Coco(root=root)[0]
    assert sample.image.shape == (WIDTH, HEIGHT, 3)
    assert_close(sample.image[sample.masks[0]].mean(0).astype(np.uint8), np.array([220, 60, 40]))


def test_coco_annotated_as_stored(tmp_path: Path) -> None:
    root = write_coco(tmp_path, a=(HEIGHT, WIDTH))
    save(tmp_path / "images" / "a.jpg", upright_photo(HEIGHT, WIDTH), 6)
    sample = Coco(root=root)[0]
    assert_close(sample.image[sample.masks[0]].mean(0).astype(np.uint8), np.array([220, 60, 40]))


@pytest.mark.parametrize("turn", [(1, 1), (6, 1), (6, 6), (1, 6), (3, 1), (8, 8)])
def test_masks_fit_images(tmp_path: Path, turn: tuple[int, int]) -> None:
    upright = upright_photo(WIDTH, HEIGHT)
    mask = np.where(upright[..., 0] > 200, 255, 0).astype(np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    store(tmp_path / "images" / "a.jpg", upright, turn[0])
    store(tmp_path / "masks" / "a.png", mask, turn[1])
    folder = Folder(root=str(tmp_path))
    (tmp_path / "metadata.json").write_text(
        json.dumps(
            {
                "entity classes": ["a"],
                "train_data": [
                    {"image_name": "a.jpg", "entity_masks": ["a.png"], "entity_indices": [0]}
                ],
            }
        )
    )
    for sample in (folder[0], Entities(root=str(tmp_path))[0]):
        assert sample.image.shape[:2] == sample.masks[0].shape == (WIDTH, HEIGHT)
        assert (sample.masks[0] == (mask > 0)).all()
        colour = sample.image[sample.masks[0]].mean(0).astype(np.uint8)
        assert_close(colour, np.array([220, 60, 40]))


def test_a_mask_of_the_stored_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", upright_photo(HEIGHT, WIDTH), 6)
    save(tmp_path / "a.png", upright_photo(HEIGHT, WIDTH)[..., 0])
    assert read_labels(str(tmp_path / "a.png"), "mask", (WIDTH, HEIGHT)).shape == (HEIGHT, WIDTH)
    image = read_image(str(tmp_path / "a.jpg"), "image", (HEIGHT, WIDTH))
    assert_close(image, upright_photo(HEIGHT, WIDTH))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def resize(path: Path) -> None:
    save(path, photo(HEIGHT + 1, WIDTH))


def replace(path: Path) -> None:
    path.write_text("<html>404</html>")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (cut, "image file cannot be read: the file is truncated or not an image .*/images/b.jpg"),
        (resize, "differ in size .*/images/b.jpg is 56 x 41, record is 56 x 40"),
        (replace, "image file cannot be read: the file is truncated or not an image"),
    ],
)
def test_coco_checks_files_at_construction(
    tmp_path: Path, spoil: Callable[[Path], Any], match: str
) -> None:
    size = HEIGHT, WIDTH
    root = write_coco(tmp_path, a=size, b=size, c=size)
    spoil(tmp_path / "images" / "b.jpg")
    with pytest.raises(ValueError, match=f"instances_train.json: image 1: .*{match}.*--on-error"):
        Coco(root=root)
    with pytest.warns(UserWarning, match="skipped 2 records: 1 x image"):
        dataset = Coco(root=root, on_error="skip")
    assert [dataset[index].source for index in range(2)] == [
        "instances_train/a.jpg",
        "instances_train/c.jpg",
    ]


def test_no_thread_outlives_the_checks(tmp_path: Path) -> None:
    root = write_coco(tmp_path, a=(HEIGHT, WIDTH), b=(HEIGHT, WIDTH))
    cut(tmp_path / "images" / "a.jpg")
    before = threading.active_count()
    with pytest.raises(ValueError, match="truncated") as caught:  # keeps the frames alive
        Coco(root=root)
    assert caught.tb is not None and threading.active_count() == before


def test_coco_does_not_check_images_without_annotations(tmp_path: Path) -> None:
    root = write_coco(tmp_path, a=(HEIGHT, WIDTH), b=(HEIGHT, WIDTH))
    data = json.loads((tmp_path / "instances_train.json").read_text())
    del data["annotations"][1]
    (tmp_path / "instances_train.json").write_text(json.dumps(data))
    cut(tmp_path / "images" / "b.jpg")
    assert len(Coco(root=root)) == 1


def test_sizes_are_compared_before_anything_is_rasterised(tmp_path: Path) -> None:
    root = write_coco(tmp_path, a=(10**9, 10**9))
    with pytest.raises(ValueError, match="a.jpg is 56 x 40, record is 1000000000 x 1000000000"):
        Coco(root=root)


def test_images_that_lose_their_height(tmp_path: Path, micro_checkpoint: str) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "thin.png", np.full((2, 3000), 255, np.uint8))
    env = gym.make(
        "SamSeg-v0",
        checkpoint=micro_checkpoint,
        device="cpu",
        dataset="folder",
        data=str(tmp_path),
    )
    with pytest.raises(ValueError, match="/thin: An image of 2 x 3000 pixels has no pixels left"):
        env.reset(seed=0)
