"""Panoramas of rooms, their camera images, and stitching: exact, and by OpenCV."""

import re
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from sam_gym.data import Dataset, make_dataset
from sam_gym.data.synthetic.rooms.dataset import MIN_AREA, Rooms
from sam_gym.data.synthetic.rooms.panoramas import CameraImage, RoomsPanoramas, stitch, stitch_exact


@pytest.fixture(scope="module")
def panoramas() -> RoomsPanoramas:
    return RoomsPanoramas(height=128, width=448)


@pytest.fixture(scope="module")
def cameras(panoramas: RoomsPanoramas) -> list[CameraImage]:
    return panoramas.camera_images(1)


def test_is_a_registered_dataset() -> None:
    dataset = make_dataset("rooms-panoramas", split="val", length=5)
    assert isinstance(dataset, Dataset)
    assert (dataset.name, len(dataset)) == ("rooms-panoramas", 5)
    assert dataset.categories == Rooms.categories
    sample = dataset[4]
    assert sample.image.shape == (256, 1024, 3)
    assert sample.source == "rooms-panoramas/val/4"
    assert 16 <= len(sample.masks) <= 36
    assert sample.masks.sum(axis=0).max() == 1
    assert sample.masks.sum(axis=(1, 2)).min() >= MIN_AREA * 256**2
    assert sample.parts is not None and (sample.parts <= sample.masks.any(axis=0)).all()


def test_same_index_gives_the_same_panorama(panoramas: RoomsPanoramas) -> None:
    again = RoomsPanoramas(height=128, width=448, camera_width=100, overlap=0.2)
    np.testing.assert_array_equal(panoramas[2].image, again[2].image)
    others = [panoramas[3], RoomsPanoramas("test", height=128, width=448)[2]]
    others.append(RoomsPanoramas(height=128, width=448, seed=1)[2])
    assert len({sample.image.tobytes() for sample in [panoramas[2], *others]}) == 4


def test_draw_stays_inside() -> None:
    panoramas = RoomsPanoramas(length=4)
    drawn = {panoramas.draw(np.random.default_rng(seed)) for seed in range(40)}
    assert drawn == {(index, None) for index in range(4)}
    with pytest.raises(IndexError, match=re.escape("panorama 4 is not in range(4)")):
        panoramas[4]


@pytest.mark.parametrize(
    ("camera_width", "overlap"), [(None, 0.5), (100, 0.0), (200, 0.9), (448, 0.5)]
)
def test_camera_images_overlap_and_cover_all(camera_width: int | None, overlap: float) -> None:
    panoramas = RoomsPanoramas(height=128, width=448, camera_width=camera_width, overlap=overlap)
    cameras, sample, width = panoramas.camera_images(0), panoramas[0], camera_width or 128
    assert (cameras[0].x, cameras[-1].x) == (0, 448 - width)
    for camera, after in pairwise(cameras):
        assert camera.x < after.x <= camera.x + (1 - overlap) * width + 1
    for camera in cameras:
        columns = slice(camera.x, camera.x + width)
        np.testing.assert_array_equal(camera.image, sample.image[:, columns])
        np.testing.assert_array_equal(camera.masks, sample.masks[camera.instances][:, :, columns])
        np.testing.assert_array_equal(camera.categories, sample.categories[camera.instances])
        assert camera.masks.any(axis=(1, 2)).all()


def test_exact_stitching_gives_the_panorama_back(
    panoramas: RoomsPanoramas, cameras: list[CameraImage]
) -> None:
    sample = panoramas[1]
    for order in (cameras, cameras[::-1]):
        image, masks = stitch_exact(order)
        np.testing.assert_array_equal(image, sample.image)
        np.testing.assert_array_equal(masks, sample.masks)


def test_exact_stitching_refuses_what_does_not_fit(cameras: list[CameraImage]) -> None:
    with pytest.raises(ValueError, match="no images to stitch"):
        stitch_exact([])
    with pytest.raises(ValueError, match="No image covers column 128 of the panorama"):
        stitch_exact([cameras[0], cameras[-1]])
    with pytest.raises(ValueError, match="Image 1 at x=60 contradicts the images before it"):
        stitch_exact([cameras[0], replace(cameras[1], x=60)])
    with pytest.raises(ValueError, match="Image 1 at x=64 contradicts"):
        stitch_exact([cameras[0], replace(cameras[1], masks=~cameras[1].masks)])
    low = replace(cameras[1], image=cameras[1].image[:99], masks=cameras[1].masks[:, :99])
    with pytest.raises(ValueError, match="differ in height: 99, 128 pixels"):
        stitch_exact([cameras[0], low])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tran"}, "Unknown split 'tran'"),
        ({"height": 32}, "size must be from 64 to 1024 pixels, got 32"),
        ({"width": 200}, "width must be from 256 to 2048 pixels, got 200"),
        ({"camera_width": 2000}, "camera_width must be from 64 to 1024, got 2000"),
        ({"overlap": 0.95}, "overlap must be from 0 to 0.9, got 0.95"),
        ({"seed": -1}, "seed must not be negative"),
        ({"categories": "sofs"}, "Unknown category 'sofs'. Did you mean 'sofa'"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoomsPanoramas(**arguments)


# By OpenCV


def textured(seed: int = 0) -> np.ndarray:
    """Something flat with corners at every scale: uint8 (240, 640, 3)."""
    rng = np.random.default_rng(seed)
    scene = np.full((240, 640, 3), 128, np.uint8)
    for _ in range(500):
        x, y, w, h = rng.integers((0, 0, 4, 4), (640, 240, 50, 50)).tolist()
        cv2.rectangle(scene, (x, y), (x + w, y + h), rng.integers(0, 256, 3).tolist(), -1)
    return cv2.GaussianBlur(scene, (0, 0), 0.8)


def turned(scene: np.ndarray, angle: float) -> np.ndarray:
    """What a camera with a field of camera of 60 degrees sees of a wall, turned by degrees."""
    focal, (height, width) = 260.0, scene.shape[:2]
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    camera = np.array([[focal, 0, 150], [0, focal, 100], [0, 0, 1.0]])
    wall = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    return cv2.warpPerspective(scene, camera @ turn @ np.linalg.inv(wall), (300, 200))


def similarity(panorama: np.ndarray, scene: np.ndarray) -> float:
    """The greatest correlation of the middle of the panorama with a place in the scene."""
    h, w = panorama.shape[:2]
    middle = panorama[h // 4 : 3 * h // 4, w // 3 : 2 * w // 3]
    return float(cv2.matchTemplate(scene, middle, cv2.TM_CCOEFF_NORMED).max())


def test_stitching_what_a_moving_camera_sees() -> None:
    scene = textured()
    crops = [scene[:, x : x + 300] for x in (0, 170, 340)]
    panorama = stitch(crops, mode="scans")
    assert panorama.dtype == np.uint8
    np.testing.assert_allclose(panorama.shape, scene.shape, atol=6)
    assert similarity(panorama, scene) > 0.9
    np.testing.assert_array_equal(panorama, stitch(crops, mode="scans"))


def test_stitching_what_a_turning_camera_sees() -> None:
    shots = [turned(textured(), angle) for angle in (-20, 0, 20)]
    panorama = stitch(shots)
    assert panorama.shape[1] > 1.3 * 300
    assert panorama.shape[0] > 0.7 * 200
    assert similarity(panorama, textured()) > 0.8


def test_stitching_rooms() -> None:
    panoramas = RoomsPanoramas(overlap=0.6)
    cameras = panoramas.camera_images(0)[:3]
    panorama = stitch([camera.image for camera in cameras], mode="scans")
    expected = panoramas[0].image[:, : cameras[-1].x + 256]
    np.testing.assert_allclose(panorama.shape, expected.shape, atol=12)
    assert similarity(panorama, expected) > 0.9


@pytest.mark.parametrize("mode", ["panorama", "scans"])
def test_stitching_says_why_it_failed(mode) -> None:
    scene = textured()
    with pytest.raises(
        ValueError, match="Stitching 2 images failed: need more images: they do not overlap enough"
    ):
        stitch([scene[:, :200], textured(1)[:, 400:]], mode=mode)
    with pytest.raises(ValueError, match="need more images.*match none of the others: 2"):
        stitch([scene[:, :300], scene[:, 150:450], textured(1)], mode=mode)
    with pytest.raises(ValueError, match="need more images"):
        stitch([np.full((200, 200, 3), 90, np.uint8)] * 2, mode=mode)


def test_stitching_refuses_what_is_no_list_of_images() -> None:
    scene = textured()
    with pytest.raises(ValueError, match="at least two images, got 1"):
        stitch([scene])
    with pytest.raises(ValueError, match=re.escape("Image 1 must be uint8 (H, W, 3), got float64")):
        stitch([scene, scene.astype(float)])
    with pytest.raises(ValueError, match=re.escape("Image 0 must be uint8 (H, W, 3), got uint8")):
        stitch([scene[..., 0], scene])
    with pytest.raises(ValueError, match="Unknown mode 'scan'. Did you mean 'scans'"):
        stitch([scene, scene], mode="scan")  # type: ignore[arg-type]
