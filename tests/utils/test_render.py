"""Pictures are checked where their colours follow from the rules."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_gym.data.synthetic.clips import Clips
from sam_gym.utils import render
from sam_gym.utils.render import (
    draw_episode,
    draw_masks,
    draw_overlays,
    save_gif,
    save_image,
    save_video,
    tile,
)

GREY = 100


@pytest.fixture
def image() -> np.ndarray:
    return np.full((64, 96, 3), GREY, np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((64, 96), bool)
    mask[16:48, 24:72] = True
    return mask


def test_mask_is_tinted_and_the_rest_is_dimmed(image: np.ndarray, mask: np.ndarray) -> None:
    picture = draw_episode(image, mask, height=128)
    assert picture.shape == (128, 192, 3) and picture.dtype == np.uint8
    tint = [int(0.6 * GREY + 0.4 * colour) for colour in render.MASK_COLOUR]
    assert picture[64, 96].tolist() == tint
    assert picture[4, 4].tolist() == [int(0.62 * GREY)] * 3
    assert picture[64, 48].tolist() == list(render.MASK_COLOUR)  # the outline


def test_arguments_are_not_changed(image: np.ndarray, mask: np.ndarray) -> None:
    clicks = [(10.0, 10.0, True)]
    draw_episode(image, mask, clicks, target=mask, cue=(3.0, 3.0), caption="x", height=64)
    assert (image == GREY).all() and mask.sum() == 32 * 48 and clicks == [(10.0, 10.0, True)]


def test_target_is_outlined_in_white(image: np.ndarray, mask: np.ndarray) -> None:
    nothing = np.zeros_like(mask)
    picture = draw_episode(image, nothing, target=mask, height=64)
    white = (picture > 220).all(axis=2)
    assert white[16, 26:70].all() and white[47, 26:70].all() and white[18:46, 24].all()
    assert not white[20:44, 28:68].any() and not white[:12].any()
    assert draw_episode(image, nothing, height=64).max() < 100


def test_clicks_are_marked_by_sign_at_their_place(image: np.ndarray) -> None:
    nothing = np.zeros((64, 96), bool)
    picture = draw_episode(image, nothing, [(20, 12, True), (70, 40, False)], height=640)
    plus, minus = (125, 205), (405, 705)  # (row, column): 10 (y + 0.5), 10 (x + 0.5)
    for (row, column), colour in (
        (plus, render.POSITIVE_COLOUR),
        (minus, render.NEGATIVE_COLOUR),
    ):
        assert picture[row, column].tolist() == [255, 255, 255]
        assert picture[row - 8, column - 8].tolist() == list(colour)
    assert picture[plus[0] - 5, plus[1]].tolist() == [255, 255, 255]
    assert picture[minus[0] - 5, minus[1]].tolist() == list(render.NEGATIVE_COLOUR)


def test_cue_is_a_ring(image: np.ndarray) -> None:
    picture = draw_episode(image, np.zeros((64, 96), bool), cue=(20, 12), height=640)
    assert picture[125, 205 + 20].tolist() == list(render.CUE_COLOUR)
    assert picture[125, 205].tolist() == [int(0.62 * GREY)] * 3


def test_caption_is_a_line_below(image: np.ndarray, mask: np.ndarray) -> None:
    plain = draw_episode(image, mask, height=64)
    captioned = draw_episode(image, mask, caption="cat  IoU 0.93", height=64)
    assert captioned.shape[1:] == plain.shape[1:] and captioned.shape[0] > 64
    np.testing.assert_array_equal(captioned[:64], plain)
    strip = captioned[64:]
    assert strip.max() > 150
    other = draw_episode(image, mask, caption="dog  IoU 0.11", height=64)[64:]
    assert (strip != other).any()


def test_tile_fills_row_by_row() -> None:
    frames = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = tile(frames, columns=2)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::3, 0].tolist() == [[10, 20], [30, 0]]
    np.testing.assert_array_equal(sheet[:2, 3:], frames[1])


def test_tile_pads_smaller_frames() -> None:
    sheet = tile([np.full((2, 3, 3), 10, np.uint8), np.full((4, 1, 3), 20, np.uint8)], columns=2)
    assert sheet.shape == (4, 6, 3)
    assert (sheet[:2, :3] == 10).all() and (sheet[:, 3] == 20).all()
    assert sheet.astype(int).sum() == 3 * (6 * 10 + 4 * 20)


def test_saved_image_reads_back(tmp_path: Path, image: np.ndarray) -> None:
    image[5, 7] = 10, 20, 30
    save_image(tmp_path / "picture.png", image)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "picture.png")), image)
    with pytest.raises(OSError, match=r"picture\.png: could not be written"):
        save_image(tmp_path / "no" / "picture.png", image)
    with pytest.raises(OSError, match=r"could not be encoded \(70000 x 1 pixels\)"):
        save_image(tmp_path / "wide.jpg", np.zeros((1, 70_000, 3), np.uint8))


def test_names_that_are_no_utf8(tmp_path: Path, image: np.ndarray, mask: np.ndarray) -> None:
    name = os.fsdecode(b"caf\xe9\x1b.png")  # at which OpenCV's writer and its font crash
    save_image(tmp_path / name, draw_episode(image, mask, caption=name))
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2)])
def test_thin_images_are_drawn(size: tuple[int, int]) -> None:
    frame = draw_episode(np.zeros((*size, 3), np.uint8), np.ones(size, bool), [(1, 1, True)])
    assert min(frame.shape[:2]) >= 1 and max(frame.shape) <= 2**14


def test_saved_gif_plays_all_frames(tmp_path: Path) -> None:
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (0, 120, 240)]
    save_gif(tmp_path / "episode.gif", frames, fps=4)
    with Image.open(tmp_path / "episode.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 250, 0)
        for number, frame in enumerate(frames):
            gif.seek(number)
            np.testing.assert_allclose(np.array(gif.convert("RGB")), frame, atol=2)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_videos_hold_the_frames(tmp_path: Path, suffix: str) -> None:
    shades = [40, 120, 200]
    frames = (np.full((48, 63, 3), (shade, 10, 10), np.uint8) for shade in shades)
    path = tmp_path / f"clip{suffix}"
    save_video(path, frames, fps=5)
    capture = cv2.VideoCapture(str(path))
    for shade in shades:
        bgr = capture.read()[1]
        assert bgr is not None and bgr.shape == (48, 63 if suffix == ".gif" else 62, 3)
        assert abs(float(bgr[..., 2].mean()) - shade) < 8 and bgr[..., 0].mean() < 25
    assert capture.read()[1] is None


def test_videos_that_cannot_be_written(tmp_path: Path) -> None:
    frame = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"written as \.gif or \.mp4"):
        save_video(tmp_path / "a.avi", [frame])
    with pytest.raises(ValueError, match="no frame to write"):
        save_video(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="frames differ in size"):
        save_video(tmp_path / "a.mp4", [frame, frame[:8]])
    with pytest.raises(OSError, match="could not be written"):
        save_video(tmp_path / "none" / "a.mp4", [frame])


def test_overlays_have_one_colour_per_object() -> None:
    clip = Clips(frames=3, size=96)[0]
    masks = [clip.annotation(frame).masks for frame in range(3)]
    drawn = list(draw_overlays(clip, masks, truth=False, height=96))
    assert len(drawn) == 3 and drawn[0].shape[1] == 96
    for frame, image in enumerate(drawn):
        expected = draw_masks(clip.image(frame), masks[frame], height=96)
        assert (image[:96] == expected).all()
