"""Prefetched draws equal direct draws."""

import multiprocessing
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from sam_gym.envs.prefetch import Prefetcher

INDICES = [0, 1, 2]


class Drawer:
    """Draws three numbers, and notes in which thread; an unlucky first one is an error."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def __call__(self, rng: np.random.Generator) -> list[int]:
        self.threads.append(threading.current_thread().name)
        numbers = rng.integers(0, 1000, 3).tolist()
        if numbers[0] < 200:
            raise ValueError(f"unlucky {numbers[0]}")
        return numbers


def lucky(seed: int, draws: int) -> np.random.Generator:
    """A generator whose first draws raise nothing."""
    while True:
        if (np.random.default_rng(seed).integers(0, 1000, (draws, 3))[:, 0] >= 200).all():
            return np.random.default_rng(seed)
        seed += 1000


@pytest.fixture
def drawer() -> Drawer:
    return Drawer()


@pytest.fixture
def prefetcher(drawer: Drawer) -> Iterator[Prefetcher[list[int]]]:
    prefetcher = Prefetcher(drawer)
    yield prefetcher
    prefetcher.close()


def test_same_values_and_same_generators_as_without(prefetcher: Prefetcher[list[int]]) -> None:
    rngs = [lucky(seed, 4) for seed in INDICES]
    plain = [lucky(seed, 4) for seed in INDICES]
    for _ in range(4):
        drawn = prefetcher.take(INDICES, rngs)
        assert drawn == [rng.integers(0, 1000, 3).tolist() for rng in plain]
        assert [r.bit_generator.state for r in rngs] == [r.bit_generator.state for r in plain]
        prefetcher.begin(INDICES, rngs)
    assert [r.bit_generator.state for r in rngs] == [r.bit_generator.state for r in plain]


def test_a_prefetched_draw_is_made_once_and_in_another_thread(
    prefetcher: Prefetcher[list[int]], drawer: Drawer
) -> None:
    rngs = [lucky(seed, 2) for seed in INDICES]
    prefetcher.begin(INDICES, rngs)
    prefetcher.take(INDICES, rngs)
    assert len(drawer.threads) == 3
    assert threading.current_thread().name not in drawer.threads


def test_a_replaced_or_used_generator_is_drawn_from_again(
    prefetcher: Prefetcher[list[int]],
) -> None:
    replaced, used = lucky(5, 2), lucky(6, 3)
    prefetcher.begin([0, 1], [replaced, used])
    replaced = lucky(7, 2)
    used.integers(0, 1000, 3)
    expected = [lucky(7, 2).integers(0, 1000, 3).tolist()]
    expected.append(lucky(6, 3).integers(0, 1000, (2, 3))[1].tolist())
    assert prefetcher.take([0, 1], [replaced, used]) == expected


def test_a_draw_with_other_arguments_is_dropped() -> None:
    def draw(rng: np.random.Generator, kind: str, size: int) -> list[int]:
        return [len(kind), *rng.integers(0, 1000, size).tolist()]

    prefetcher = Prefetcher(draw)
    rngs, plain = ([np.random.default_rng(seed) for seed in INDICES] for _ in range(2))
    for begun, asked in ((["a"] * 3, ["a", "bb", "a"]), (["a", "a", "bb"], ["ccc"] * 3)):
        prefetcher.begin(INDICES, rngs, begun, [4, 4, 4])
        drawn = prefetcher.take(INDICES, rngs, asked, [4, 4, 5])
        sizes = zip(plain, asked, [4, 4, 5], strict=True)
        assert drawn == [draw(rng, kind, size) for rng, kind, size in sizes]
        assert [r.bit_generator.state for r in rngs] == [r.bit_generator.state for r in plain]
    prefetcher.close()


def test_an_error_is_raised_where_the_draw_is_taken(prefetcher: Prefetcher[list[int]]) -> None:
    seed = next(s for s in range(99) if np.random.default_rng(s).integers(0, 1000) < 200)
    rng = np.random.default_rng(seed)
    prefetcher.begin([0], [rng])
    with pytest.raises(ValueError, match="unlucky"):
        prefetcher.take([0], [rng])


def test_works_after_close(prefetcher: Prefetcher[list[int]]) -> None:
    rng, plain = lucky(3, 2), lucky(3, 2)
    prefetcher.begin([0], [rng])
    prefetcher.close()
    assert prefetcher.take([0], [rng]) == [plain.integers(0, 1000, 3).tolist()]


def test_an_error_uses_up_the_draw(prefetcher: Prefetcher[list[int]]) -> None:
    seed = next(s for s in range(99) if np.random.default_rng(s).integers(0, 1000) < 200)
    rng, plain = np.random.default_rng(seed), np.random.default_rng(seed)
    prefetcher.begin([0], [rng])
    with pytest.raises(ValueError, match="unlucky"):
        prefetcher.take([0], [rng])
    plain.integers(0, 1000, 3)
    assert rng.bit_generator.state == plain.bit_generator.state


def test_stale_draws_are_cancelled() -> None:
    started, go_on, made = threading.Event(), threading.Event(), []

    def draw(rng: np.random.Generator) -> int:
        made.append(int(rng.integers(1000)))
        started.set()
        assert go_on.wait(60)
        return made[-1]

    prefetcher = Prefetcher(draw)
    prefetcher.begin(range(20), [np.random.default_rng(k) for k in range(20)])
    assert started.wait(60)
    threading.Timer(0.2, go_on.set).start()
    prefetcher.take(range(20), [np.random.default_rng(100 + k) for k in range(20)])
    assert len(made) == 21  # the one that had started, and those that were asked for
    prefetcher.close()


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_any_bit_generator(kind: type[np.random.BitGenerator]) -> None:
    prefetcher = Prefetcher(lambda rng: rng.integers(0, 1000, 3).tolist())
    rng, plain = np.random.Generator(kind(1)), np.random.Generator(kind(1))
    prefetcher.begin([0], [rng])
    for _ in range(2):
        assert prefetcher.take([0], [rng]) == [plain.integers(0, 1000, 3).tolist()]
    prefetcher.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_draws_for_itself(prefetcher: Prefetcher[list[int]]) -> None:
    rng = lucky(3, 2)
    prefetcher.begin([0], [rng])
    child = multiprocessing.get_context("fork").Process(target=prefetcher.take, args=([0], [rng]))
    child.start()
    child.join(60)
    assert child.exitcode == 0
