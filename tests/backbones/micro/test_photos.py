"""Photographs as training images: masks stay on their objects."""

import numpy as np
import pytest

from sam_gym.backbones.micro.data import NO_LABEL, MicroStream
from sam_gym.backbones.micro.photos import MIN_AREA, SIZE, PhotoMixer
from sam_gym.data.base import Sample

COLOURS = np.array([[250, 20, 20], [20, 20, 250], [20, 250, 20]], np.uint8)


class Squares:
    """Photographs of 120 x 160 pixels with a red, a blue and an unknown green square on grey."""

    name, categories = "squares", ("square",)

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        masks = np.zeros((3, 120, 160), bool)
        masks[0, 20:70, 20 + 5 * index : 60 + 5 * index] = True
        masks[1, 80:110, 100:140] = True
        masks[2, 10:40, 110:150] = True
        image = np.full((120, 160, 3), 128, np.uint8)
        for mask, colour in zip(masks, COLOURS, strict=True):
            image[mask] = colour
        return Sample(image, masks[:2], np.zeros(2, np.int64), f"squares/{index}", masks[2])

    def draw(self, rng: np.random.Generator) -> tuple[int, None]:
        return int(rng.integers(self.count)), None


@pytest.fixture
def mixer(monkeypatch: pytest.MonkeyPatch) -> PhotoMixer:
    """Without changes of colour, so that colours tell what a mask should show."""
    monkeypatch.setattr("sam_gym.backbones.micro.photos.degraded", lambda rng, image: image)
    return PhotoMixer([Squares(), Squares(2)], [3.0, 1.0])


def test_masks_follow_the_objects_through_every_view(mixer: PhotoMixer) -> None:
    unknown = objects = 0
    for seed in range(60):
        image, masks, ignore = mixer.view(np.random.default_rng(seed))
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert masks.shape[1:] == ignore.shape == (SIZE, SIZE)
        objects += len(masks)
        for mask in masks:
            assert np.count_nonzero(mask) >= MIN_AREA
            red, green, blue = np.median(image[mask], axis=0)
            assert max(red, blue) > 180 and green < 90
        if ignore.sum() > 500:
            unknown += 1
            assert np.median(image[ignore], axis=0)[1] > 180
    assert objects > 60 and unknown > 5


def test_views_are_seeded_and_differ(mixer: PhotoMixer) -> None:
    one, same, other = (mixer.view(np.random.default_rng(seed)) for seed in (3, 3, 4))
    for got, expected in zip(one, same, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(one.image, other.image)


def test_the_stream_mixes_photographs_and_scenes(mixer: PhotoMixer) -> None:
    stream = MicroStream(0, 40, mixer, targets_per_image=3, photo_fraction=0.5)
    items = [stream[index] for index in range(40)]
    photos = [item for item in items if (item.labels == NO_LABEL).all()]
    assert 10 < len(photos) < 30
    for item in items:
        assert item.image.shape == (SIZE, SIZE, 3) and len(item.targets) == 3
        for target in item.targets:
            assert target.mask.shape == (SIZE, SIZE)
            for x, y in target.clicks:
                assert target.mask[y, x]
    again = stream[7]
    np.testing.assert_array_equal(again.image, items[7].image)


def test_datasets_are_drawn_by_their_weights() -> None:
    assert PhotoMixer([Squares(16), Squares(4)]).chances.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert PhotoMixer([Squares(), Squares()], [3, 1]).chances.tolist() == [0.75, 0.25]
