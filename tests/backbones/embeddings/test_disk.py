"""Embeddings on disk: exact, never stale, safe under several writers, bounded."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.model import RAW_KINDS
from sam_gym.backbones.embeddings import disk as disk_module
from sam_gym.backbones.embeddings import store
from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.embeddings.precompute import PrecomputeConfig, parse_shard, precompute
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data import Sample
from sam_gym.data.options import DatasetOptions
from sam_gym.envs.click import ClickCore, SamSegConfig
from sam_gym.utils.digest import image_digest


def key_of(number: int) -> bytes:
    return image_digest(np.full((1, 1, 3), number, np.uint8))


def features_of(number: int, backbone: Backbone) -> ImageFeatures:
    """What each writer of a number writes."""
    noise = torch.Generator().manual_seed(number)
    return ImageFeatures({"embedding": torch.randn(1, *backbone.embedding_shape, generator=noise)})


def same(one: ImageFeatures | None, other: ImageFeatures) -> bool:
    return one is not None and torch.equal(one.embedding, other.embedding)


@pytest.fixture
def disk(tiny: Backbone, tmp_path: Path) -> DiskStore:
    return DiskStore(tiny, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_what_is_put_is_got(tiny: Backbone, tmp_path: Path, dtype: str, error: float) -> None:
    disk, features = DiskStore(tiny, tmp_path, dtype), features_of(1, tiny)
    returned = disk.put(key_of(1), features)
    got = DiskStore(tiny, tmp_path, dtype).get(key_of(1))
    assert got is not None and got.spec == tiny.feature_spec
    assert same(got, returned)
    embedding = features.embedding
    assert ((got.embedding - embedding).abs() <= error * embedding.abs() + 1e-7).all()
    assert disk.get(key_of(2)) is None


def test_files_are_safetensors_in_shards(disk: DiskStore, tiny: Backbone) -> None:
    disk.put(key_of(1), features_of(1, tiny))
    path = disk.path(key_of(1))
    assert path.parent.name == key_of(1).hex()[:2]
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("embedding"), features_of(1, tiny).embedding[0])


def test_another_checkpoint_or_precision_finds_nothing(
    tiny: Backbone, micro: Backbone, disk: DiskStore, tmp_path: Path
) -> None:
    disk.put(key_of(1), features_of(1, tiny))
    other = Backbone("tiny", tiny.private_copy(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        other.sam.image_encoder.pos_embed[0, 0, 0, 0] += 1e-6
    assert DiskStore(other, tmp_path).get(key_of(1)) is None
    assert DiskStore(tiny, tmp_path, "float16").get(key_of(1)) is None


@pytest.mark.parametrize("kind", ["empty", "truncated", "flipped", "header", "not json"])
def test_damaged_files_count_as_missing_and_are_replaced(
    disk: DiskStore, tiny: Backbone, kind: str
) -> None:
    features = features_of(1, tiny)
    disk.put(key_of(1), features)
    path = disk.path(key_of(1))
    content = bytearray(path.read_bytes())
    if kind == "empty":
        content.clear()
    elif kind == "truncated":
        del content[-5:]
    elif kind == "flipped":
        content[-100] ^= 0x10
    elif kind == "header":
        at = content.index(b"F32")
        content[at : at + 3] = b"I32"
    else:
        content[8] = 0
    path.write_bytes(content)
    assert disk.get(key_of(1)) is None
    assert disk.damaged == 1 and not path.exists()
    disk.put(key_of(1), features)
    assert same(disk.get(key_of(1)), features)


def test_values_that_do_not_fit_are_refused(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        DiskStore(tiny, tmp_path, "float16").put(
            key_of(1), features_of(1, tiny).map(lambda x: 1e5 * x)
        )
    with pytest.raises(ValueError, match="Expected one image with embedding"):
        DiskStore(tiny, tmp_path).put(
            key_of(1), ImageFeatures({"embedding": torch.zeros(1, 1, 2, 3)})
        )
    with pytest.raises(ValueError, match="bfloat16"):
        DiskStore(tiny, tmp_path, "bfloat")


def test_least_recently_used_go_first(tiny: Backbone, tmp_path: Path) -> None:
    disk = DiskStore(tiny, tmp_path)
    disk.put(key_of(0), features_of(0, tiny))
    size = disk.path(key_of(0)).stat().st_size
    bounded = DiskStore(tiny, tmp_path, max_bytes=10 * size)
    for number in range(1, 10):
        bounded.put(key_of(number), features_of(number, tiny))
    for number in range(10):  # the order of use, in a clock that is coarser than this loop
        os.utime(disk.path(key_of(number)), (number, number))
    assert bounded.get(key_of(0)) is not None
    bounded.put(key_of(10), features_of(10, tiny))
    there = [number for number in range(11) if key_of(number) in bounded]
    assert there == [0, *range(3, 11)]


def test_abandoned_pieces_are_removed(disk: DiskStore, tiny: Backbone) -> None:
    disk.put(key_of(1), features_of(1, tiny))
    folder = disk.path(key_of(1)).parent
    old, new = folder / ".old.safetensors.1.2", folder / ".new.safetensors.3.4"
    for piece in (old, new):
        piece.write_bytes(b"half of")
    os.utime(old, (time.time() - 7200,) * 2)
    disk.evict()
    assert not old.exists() and new.exists() and key_of(1) in disk


def test_memory_store_takes_from_disk_and_keeps_there(tiny: Backbone, tmp_path: Path) -> None:
    images = [np.full((64, 64, 3), shade, np.uint8) for shade in (10, 90, 200)]
    first = EmbeddingStore(tiny, disk=DiskStore(tiny, tmp_path))
    expected = first.gather(torch.tensor(first.acquire(images[:2])))
    second = EmbeddingStore(tiny, disk=DiskStore(tiny, tmp_path))
    got = second.gather(torch.tensor(second.acquire(images)))
    assert (first.encoded, second.encoded) == (2, 1)
    assert same(got[:2], expected)
    assert same(got[2:], tiny.encode(images[2:]))


@pytest.mark.parametrize("kind", [kind for kind in RAW_KINDS if kind != "pixels"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_of_heads_and_decoders_are_kept_in_the_dtypes_that_they_have(
    kind: str, dtype: str, micro: Backbone, hq_micro: str, tmp_path: Path
) -> None:
    """Features of several strides are half precision, beside an embedding in float32."""
    backbone = load_backbone(hq_micro, device="cpu") if kind == "early" else micro
    source = backbone.raw_source(kind)
    images = [np.full((64, 96, 3), shade, np.uint8) for shade in (10, 90)]
    stores = []
    for _ in range(2):
        own = EmbeddingStore(source, disk=DiskStore(source, tmp_path, dtype))
        stores.append((own, own.gather(torch.tensor(own.acquire(images)))))
    (first, written), (second, read) = stores
    assert (first.encoded, second.encoded) == (2, 0)
    assert written.spec == read.spec == source.feature_spec
    direct = source.encode(images)
    for name, tensor in read.tensors.items():
        assert torch.equal(tensor, written[name])
        exact = dtype == "float32" or tensor.dtype == torch.float16
        expected = direct[name] if exact else direct[name].half().float()
        assert torch.equal(tensor, expected)


def test_environment_with_a_disk_store(
    tiny_env: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_GYM_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_stores", {})  # nothing was encoded yet
    core = ClickCore(SamSegConfig(**tiny_env, disk="home"), 2)
    core.reset([0, 1], [np.random.default_rng(0), np.random.default_rng(1)])
    core.close()
    assert list((tmp_path / "embeddings").rglob("*.safetensors"))
    with pytest.raises(ValueError, match="float16"):
        SamSegConfig(**tiny_env, disk_dtype="flota16").validate()


# Several processes ------------------------------------------------------------------------------


def write_forever(folder: Path, backbone: Backbone) -> None:
    """Write the same few embeddings over and over."""
    torch.set_num_threads(1)
    disk = DiskStore(backbone, folder)
    while True:
        for number in range(8):
            disk.put(key_of(number), features_of(number, backbone))


def test_two_writers_of_which_one_is_killed(tiny: Backbone, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_forever, args=(tmp_path, tiny)) for _ in range(2)]
    for writer in writers:
        writer.start()
    reader, deadline = DiskStore(tiny, tmp_path), time.monotonic() + 60
    read = 0
    try:
        while read < 400 and time.monotonic() < deadline:
            for number in range(8):
                got = reader.get(key_of(number))
                if got is not None:
                    assert same(got, features_of(number, tiny))
                    read += 1
            if read > 200 and writers[0].is_alive():
                os.kill(writers[0].pid, signal.SIGKILL)
                writers[0].join()
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert read >= 400 and reader.damaged == 0
    assert all(key_of(number) in reader for number in range(8))


def write_beyond_the_bound(folder: Path, backbone: Backbone, bound: int, first: int) -> None:
    """Write 60 embeddings, and read back those of the neighbours that are still there."""
    torch.set_num_threads(1)
    disk = DiskStore(backbone, folder, max_bytes=bound)
    for number in range(first, first + 60):
        disk.put(key_of(number), features_of(number, backbone))
        got = disk.get(key_of((number + 30) % 120))
        assert got is None or same(got, features_of((number + 30) % 120, backbone))
    assert disk.damaged == 0


def test_three_processes_evict_at_once(tiny: Backbone, tmp_path: Path) -> None:
    one = DiskStore(tiny, tmp_path / "one")
    one.put(key_of(0), features_of(0, tiny))
    size = one.path(key_of(0)).stat().st_size
    bound, folder = 20 * size, tmp_path / "shared"
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_beyond_the_bound, args=(folder, tiny, bound, first))
        for first in (0, 30, 60)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    # Each process looks at the folder after every twentieth of the bound that it wrote.
    kept = list(folder.rglob("*.safetensors"))
    assert 10 <= len(kept) <= 20 + 3 * 2
    reader = DiskStore(tiny, folder, max_bytes=bound)
    reader.evict()
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= bound
    assert sum(reader.get(key_of(number)) is not None for number in range(120)) >= 10


# Filling it -------------------------------------------------------------------------------------


def config(checkpoint: str, folder: Path, **more: object) -> PrecomputeConfig:
    settings = {"dataset": "scenes", "limit": 5, "batch_size": 2, "device": "cpu"} | more
    return PrecomputeConfig(checkpoint=checkpoint, folder=str(folder), **settings)  # type: ignore[arg-type]


def test_precompute_resumes_and_repairs(
    micro_checkpoint: str, micro: Backbone, tmp_path: Path
) -> None:
    assert precompute(config(micro_checkpoint, tmp_path, limit=3)) == {"encoded": 3, "found": 0}
    damaged = next(tmp_path.rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert precompute(config(micro_checkpoint, tmp_path)) == {"encoded": 3, "found": 2}
    assert precompute(config(micro_checkpoint, tmp_path)) == {"encoded": 0, "found": 5}


def test_shards_make_up_the_whole(micro_checkpoint: str, tmp_path: Path) -> None:
    counts = [precompute(config(micro_checkpoint, tmp_path, shard=f"{k}/2")) for k in range(2)]
    assert [c["encoded"] for c in counts] == [3, 2]
    assert precompute(config(micro_checkpoint, tmp_path))["found"] == 5


def test_precompute_refuses_what_would_evict_itself(micro_checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--disk-gib"):
        precompute(config(micro_checkpoint, tmp_path, disk_gib=4 * 2**17 / 2**30))
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        precompute(config(micro_checkpoint, tmp_path, limit=0))


def test_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_shard(None) == (0, 1) and parse_shard("2/3") == (2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_shard(None) == (1, 4)
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="shard"):
            parse_shard(wrong)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("call", ["write_atomic", "FileLock"])
def test_a_disk_that_cannot_be_written_is_told_once(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def fail(path: Path, *args: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    kept = DiskStore(tiny, tmp_path)
    kept.put(key_of(0), features_of(0, tiny))
    disk = DiskStore(tiny, tmp_path)
    monkeypatch.setattr(disk_module, call, fail)
    images = [np.full((64, 64, 3), number, np.uint8) for number in range(3)]
    own = EmbeddingStore(tiny, disk=disk)
    with pytest.warns(UserWarning, match=f"not kept on disk.*{os.strerror(code)}") as told:
        handles = own.acquire(images)
        own.acquire([images[0], 255 - images[0]])
    assert len(told) == 1 and len(own) == 4
    gathered = own.gather(torch.tensor(handles)).embedding
    assert torch.equal(gathered, tiny.encode(images).embedding)
    assert same(disk.get(key_of(0)), features_of(0, tiny))


def test_a_folder_that_cannot_be_made_is_told_once(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no folder for embeddings, since a part of the path"):
        DiskStore(tiny, tmp_path / "file")
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.warns(UserWarning, match="not kept on disk") as told:
        disk = DiskStore(tiny, tmp_path / "new")
        assert same(disk.put(key_of(1), features_of(1, tiny)), features_of(1, tiny))
        assert disk.get(key_of(1)) is None
    assert len(told) == 1


def test_a_file_that_cannot_be_read_counts_as_missing(disk: DiskStore, tiny: Backbone) -> None:
    disk.path(key_of(1)).mkdir(parents=True)
    with pytest.warns(UserWarning, match="not kept on disk"):
        assert disk.get(key_of(1)) is None


def test_precompute_ends_on_a_full_disk(
    micro_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(disk_module, "write_atomic", fail)
    with pytest.warns(UserWarning), pytest.raises(OSError, match="No space left.*--folder"):
        precompute(config(micro_checkpoint, tmp_path, limit=1))


def test_precompute_names_the_image(
    micro_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slivers:
        """Images of which nothing is left in the input frame."""

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Sample:
            masks = np.ones((1, 1, 3000), bool)
            return Sample(np.zeros((1, 3000, 3), np.uint8), masks, np.zeros(1, int), "sliver.png")

    monkeypatch.setattr(DatasetOptions, "make_dataset", lambda *args, **kwargs: Slivers())
    with pytest.raises(ValueError, match=r"sliver\.png: An image of 1 x 3000 pixels has no"):
        precompute(config(micro_checkpoint, tmp_path))
