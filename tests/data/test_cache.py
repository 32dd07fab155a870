"""The sample cache: what comes out is what the dataset gives, within a bound."""

from dataclasses import replace

import numpy as np
import pytest

from sam_gym.data import Sample
from sam_gym.data.cache import SampleCache
from sam_gym.utils.digest import image_digest

HEIGHT, WIDTH = 20, 27
IMAGE_BYTES = HEIGHT * WIDTH * 3
PACKED_BYTES = 2 * HEIGHT * 4  # two masks, 27 pixels in 4 bytes


class Counted:
    """Two random masks on a random image; counts how often each is read."""

    name = "counted"
    categories = ("one", "two")

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        self.reads.append(index)
        rng = np.random.default_rng(index)
        return Sample(
            image=rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
            masks=rng.random((2, HEIGHT, WIDTH)) < 0.5,
            categories=np.array([0, 1]),
            source=f"counted/{index}",
            ignore=rng.random((HEIGHT, WIDTH)) < 0.1,
            parts=rng.random((4, HEIGHT, WIDTH)) < 0.5,
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(10)), None


@pytest.fixture
def dataset() -> Counted:
    return Counted()


class Labelled(Counted):
    """The same with a label map."""

    def __getitem__(self, index: int) -> Sample:
        labels = np.full((HEIGHT, WIDTH), index, np.uint8)
        return replace(super().__getitem__(index), semantic=labels)


def test_label_maps_are_kept_and_counted() -> None:
    size = IMAGE_BYTES + PACKED_BYTES + HEIGHT * WIDTH
    cache = SampleCache(Labelled(), 2 * size)
    for index in (0, 1, 2, 2):
        assert (cache[index].semantic == index).all()
    assert (len(cache), cache.nbytes, cache.misses) == (2, 2 * size, 3)


def test_kept_sample_equals_the_dataset(dataset: Counted) -> None:
    cache = SampleCache(dataset, 2**20)
    for _ in range(2):
        sample, expected = cache[3], Counted()[3]
        for name in ("image", "masks", "categories", "ignore"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(expected, name))
            assert getattr(sample, name).dtype == getattr(expected, name).dtype
        assert sample.source == "counted/3"
        assert sample.parts is None
        assert sample.digest == image_digest(expected.image)
    assert dataset.reads == [3] and len(cache) == 1


def test_changed_masks_do_not_reach_the_cache(dataset: Counted) -> None:
    cache = SampleCache(dataset, 2**20)
    for _ in range(2):
        cache[3].masks[:] = False
    np.testing.assert_array_equal(cache[3].masks, Counted()[3].masks)


def test_least_recently_used_goes_first(dataset: Counted) -> None:
    cache = SampleCache(dataset, 2 * (IMAGE_BYTES + PACKED_BYTES))
    for index in (1, 2, 1, 3):
        cache[index]
    assert len(cache) == 2 and dataset.reads == [1, 2, 3]
    cache[1], cache[3]
    assert dataset.reads == [1, 2, 3]
    cache[2]
    assert dataset.reads == [1, 2, 3, 2]


def test_bound_holds(dataset: Counted) -> None:
    cache = SampleCache(dataset, 3 * (IMAGE_BYTES + PACKED_BYTES) + 1)
    for index in (0, 1, 2, 3, 4, 5, 0, 1):
        cache[index]
        assert len(cache) <= 3


@pytest.mark.parametrize("bound", [0, IMAGE_BYTES + PACKED_BYTES - 1])
def test_what_does_not_fit_is_read_again(dataset: Counted, bound: int) -> None:
    cache = SampleCache(dataset, bound)
    np.testing.assert_array_equal(cache[1].image, cache[1].image)
    assert dataset.reads == [1, 1] and len(cache) == 0


def test_images_are_checked_when_they_are_read(dataset: Counted) -> None:
    checked: list[tuple[int, ...]] = []

    def check(image: np.ndarray) -> None:
        checked.append(image.shape)
        if len(checked) == 2:
            raise ValueError("too thin")

    cache = SampleCache(dataset, 2**20, check)
    for _ in range(2):
        assert cache[3].source == "counted/3"
    assert checked == [(HEIGHT, WIDTH, 3)]
    with pytest.raises(ValueError, match="counted/4: too thin"):
        cache[4]
