"""The embedding store: encoded once, bounded, pinned, recycled."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.embeddings.store import MAX_HANDLES, EmbeddingStore, shared_store
from sam_gym.utils.digest import image_digest


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def make_store(tiny: Backbone, capacity: int, **more: int) -> EmbeddingStore:
    store = EmbeddingStore(tiny, capacity * int(np.prod(tiny.embedding_shape)) * 4, **more)
    assert store.capacity == capacity
    return store


def touch(store: EmbeddingStore, *numbers: int) -> list[int]:
    """Acquire pictures one after another and let go of each at once."""
    handles = []
    for number in numbers:
        handles += store.acquire([picture(number)])
        store.unpin(handles[-1])
    return handles


def assert_holds(store: EmbeddingStore, handle: int, number: int) -> None:
    expected = store.source.encode([picture(number)]).embedding[0]
    found = store.gather(torch.tensor([handle]), "embedding")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_gather_gives_the_embeddings_in_order(tiny: Backbone) -> None:
    store = make_store(tiny, 8, batch_size=2)
    handles = store.acquire([picture(n) for n in range(5)])
    found = store.gather(torch.tensor(handles[::-1]), "embedding")
    expected = tiny.encode([picture(n) for n in range(5)]).embedding
    torch.testing.assert_close(found.flip(0), expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    found.zero_()
    assert_holds(store, handles[0], 0)


def test_maps_are_channels_last_in_memory(tiny: Backbone) -> None:
    store = make_store(tiny, 70)
    handles = [store.acquire([picture(number)])[0] for number in range(66)]  # grows once
    for index in (torch.tensor(handles[-2:]), torch.tensor(handles[:3])):
        embedding = store.gather(index).embedding
        assert embedding.is_contiguous(memory_format=torch.channels_last)
        assert store.gather(index, "embedding").stride() == embedding.stride()


@pytest.mark.parametrize("name", ["micro", "micro-v0"])
def test_fixed_batches_make_features_independent_of_each_other(name: str) -> None:
    """To the last bit, whatever else is missing, and for registered features too."""
    backbone = load_backbone(name, device="cpu")
    found = []
    for calls in ([[0, 1, 2, 3, 4]], [[5, 6, 0], [1], [4, 2], [3]]):
        store = EmbeddingStore(backbone, batch_size=4)
        store.fixed_batches, sizes = True, []

        def brightness(images: Sequence[np.ndarray], sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(images))
            return torch.tensor([[float(image.mean())] for image in images])

        store.register_feature("brightness", brightness)
        handles = {}
        for numbers in calls:
            handles |= dict(zip(numbers, store.acquire([picture(n) for n in numbers]), strict=True))
        assert set(sizes) == {4} and store.encoded == len(handles)
        wanted = torch.tensor([handles[number] for number in range(5)])
        found.append([store.gather(wanted, kind) for kind in ("embedding", "brightness")])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_same_content_is_encoded_once(tiny: Backbone) -> None:
    store = make_store(tiny, 8)
    first, again, other = store.acquire([picture(1), picture(1).copy(order="F"), picture(2)])
    assert first == again != other and store.encoded == len(store) == 2
    assert store.acquire([picture(2), picture(1)]) == [other, first]
    assert store.encoded == 2


def test_known_digests_are_taken(tiny: Backbone) -> None:
    store = make_store(tiny, 8)
    images = [picture(1), picture(2)]
    handles = store.acquire(images, [image_digest(images[0]), None])
    assert (
        store.acquire(images) == store.acquire(images, [None, image_digest(images[1])]) == handles
    )
    assert store.encoded == 2


def test_key_is_the_content() -> None:
    image = picture(0)
    assert image_digest(image) == image_digest(np.asfortranarray(image))
    assert image_digest(image) != image_digest(image.reshape(32, 128, 3))
    changed = image.copy()
    changed[-1, -1, -1] ^= 1
    assert image_digest(image) != image_digest(changed)


def test_least_recently_used_goes_first(tiny: Backbone) -> None:
    store = make_store(tiny, 3)
    touch(store, 1, 2, 3)
    touch(store, 1)
    touch(store, 4)  # instead of 2
    assert len(store) == 3 and store.encoded == 4
    touch(store, 1, 3, 4)
    assert store.encoded == 4
    touch(store, 2)
    assert store.encoded == 5


def test_rows_are_recycled_and_handles_are_not(tiny: Backbone) -> None:
    store = make_store(tiny, 3)
    handles = touch(store, *range(40))
    assert len(set(handles)) == 40 and len(store) == len(store._table) == 3
    for number in (37, 38, 39):
        assert_holds(store, handles[number], number)


def test_stale_handles_are_refused(tiny: Backbone) -> None:
    store = make_store(tiny, 2)
    first, second, third = touch(store, 1, 2, 3)
    message = rf"2 of 3 handles are stale \(first: {first}\).*pin_new_epoch\(\).*store_gib="
    with pytest.raises(ValueError, match=message):
        store.gather(torch.tensor([first, third, first], dtype=torch.int32), "embedding")
    for impossible in (-1, third + 1, MAX_HANDLES - 1, 2**40):
        with pytest.raises(ValueError, match="1 of 2 handles are stale"):
            store.gather(torch.tensor([second, impossible]))
    (again,) = touch(store, 1)
    assert again != first
    assert_holds(store, again, 1)
    store.gather(torch.tensor([again, third], dtype=torch.float32))  # as SB3 hands them over
    store.gather(np.array([again, third], np.int32))  # as environments return them
    with pytest.raises(
        ValueError, match=r"whole numbers, got \[0\.5.*norm_obs_keys without 'handle'"
    ):
        store.gather(torch.tensor([0.5, 1.0]))


def test_handles_of_another_store_are_refused(tiny: Backbone) -> None:
    stores = make_store(tiny, 2), make_store(tiny, 2)
    handles = [store.acquire([picture(n)])[0] for n, store in enumerate(stores)]
    assert_holds(stores[1], handles[1], 1)
    with pytest.raises(ValueError, match=r"handles are stale.*another backbone.*another store"):
        stores[1].gather(torch.tensor(handles[:1]))


def test_numbers_start_again_without_meeting_an_image_in_memory(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam_gym.backbones.embeddings.store.MAX_HANDLES", 8)
    store = make_store(tiny, 3)
    (kept,) = store.acquire([picture(0)])
    handles = touch(store, *range(1, 30))
    assert kept not in handles and set(handles) == set(range(8)) - {kept}
    assert_holds(store, kept, 0)
    assert_holds(store, handles[-1], 29)


def test_pinned_stays(tiny: Backbone) -> None:
    store = make_store(tiny, 3)
    (kept,) = store.acquire([picture(0)])
    touch(store, *range(1, 9))
    assert_holds(store, kept, 0)
    encoded = store.encoded
    touch(store, 0)
    assert store.encoded == encoded


def test_as_many_unpins_as_pins(tiny: Backbone) -> None:
    store = make_store(tiny, 2)
    handle, _ = store.acquire([picture(0), picture(0)])
    store.pin(handle)
    for remaining in (2, 1, 0):
        touch(store, 1, 2, 3)
        assert_holds(store, handle, 0)
        store.unpin(handle)
        assert store._pins.get(handle, 0) == remaining
    touch(store, 1, 2)
    encoded = store.encoded
    touch(store, 0)
    assert store.encoded == encoded + 1


def test_epoch_keeps_what_was_handed_out(tiny: Backbone) -> None:
    store = make_store(tiny, 4)
    (before,) = store.acquire([picture(0)])
    store.pin_new_epoch()
    (during,) = store.acquire([picture(1)])
    store.unpin(before)
    store.unpin(during)
    touch(store, 2, 3)  # all four are in use until the epoch is over
    with pytest.raises(MemoryError):
        store.acquire([picture(4)])
    assert_holds(store, before, 0)
    assert_holds(store, during, 1)

    store.pin_new_epoch()
    touch(store, 4, 5, 6)
    encoded = store.encoded
    touch(store, 4, 5, 6)
    assert store.encoded == encoded
    store.end_epoch()
    touch(store, 7, 8, 9, 10)
    assert len(store) == 4


def test_full_store_says_what_to_do(tiny: Backbone) -> None:
    store = make_store(tiny, 2)
    store.acquire([picture(0), picture(1)])
    message = r"all of its 2 embeddings are in use\. Raise its bound .*store_gib=.*shorter rollouts"
    with pytest.raises(MemoryError, match=message):
        store.acquire([picture(2)])


@pytest.mark.parametrize("batch_size", [1, 16])
def test_failed_acquire_leaves_no_pins(tiny: Backbone, batch_size: int) -> None:
    store = make_store(tiny, 3, batch_size=batch_size)
    (held,) = store.acquire([picture(0)])
    with pytest.raises(MemoryError):
        store.acquire([picture(0), picture(1), picture(2), picture(3)])
    with pytest.raises(ValueError, match="must be uint8"):
        store.acquire([picture(0), picture(5), np.zeros((64, 64, 3))])
    assert store._pins == {held: 1}
    # Images of a failed call are not taken for encoded ones.
    for number in (1, 2, 3, 5):
        (handle,) = store.acquire([picture(number)])
        assert_holds(store, handle, number)
        store.unpin(handle)
    touch(store, 4, 5)
    assert_holds(store, held, 0)


def test_growing_keeps_embeddings_and_handles(tiny: Backbone) -> None:
    store = make_store(tiny, 150)
    handles = store.acquire([picture(n) for n in range(3)])
    for number in range(3, 140):
        handles += store.acquire([picture(number)])
    assert len(set(handles)) == len(store) == 140
    for number in (0, 1, 2, 63, 64, 65, 127, 128, 139):
        assert_holds(store, handles[number], number)


def test_capacity_is_a_bound(tiny: Backbone) -> None:
    store = make_store(tiny, 70)
    handles = touch(store, *range(200))
    assert len(store) == 70 and len(store._table) == 70
    assert handles == list(range(handles[0], handles[0] + 200))


def test_capacity_has_limits(tiny: Backbone) -> None:
    assert EmbeddingStore(tiny, max_bytes=0).capacity == 1
    # Float32, through which handles travel, holds integers exactly below 2^24.
    assert EmbeddingStore(tiny, max_bytes=2**60).capacity == MAX_HANDLES == 2**24
    assert int(np.float32(MAX_HANDLES - 1)) == MAX_HANDLES - 1


def test_one_store_per_backbone_with_the_largest_bound(tiny: Backbone) -> None:
    own = Backbone("tiny", tiny.private_copy(), torch.device("cpu"), torch.float32)
    size = int(np.prod(tiny.embedding_shape)) * 4
    store = shared_store(own, 2 * size)
    store.acquire([picture(0), picture(1)])
    with pytest.raises(MemoryError):
        store.acquire([picture(2)])
    assert shared_store(own, 3 * size) is store
    store.acquire([picture(2)])
    assert shared_store(own, size).capacity == 3
    assert shared_store(tiny) is not store
