"""Many images: several processes, interruptions, tar files, memory."""

import io
import json
import os
import shutil
import socket
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agents.annotation.folder import AnnotatedItem, FolderConfig, FolderRun, Key, annotate_folder
from agents.annotation.overlays import NameSet
from agents.annotation.shards import images_per_shard
from agents.annotation.sources import ImageSearch
from sam_gym.data.coco_writer import mask_annotation

SCRIPT = str(Path(__file__).with_name("annotate_squares.py"))
Outcome = tuple[int, str]
Job = Callable[..., list[Outcome]]


def png(number: int, size: int = 8) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three shards of images in two folders, a damaged file, and a link that leads outside."""
    root = tmp_path / "photos"
    for folder in ("a", "b"):
        (root / folder).mkdir(parents=True)
        for number in range(18):
            (root / folder / f"{number}.png").write_bytes(png(number))
    (root / "b" / "4.png").write_bytes(png(4)[:60])
    (tmp_path / "secret.png").write_bytes(png(0))
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    return root


@pytest.fixture
def job(start_script: Callable[..., Any]) -> Job:
    """Runs a command in several processes; exit status of each and what it printed."""

    def job(script: str, *arguments: str, world: int = 2, last: tuple[str, ...] = ()) -> Any:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        processes = [
            start_script(
                script,
                *arguments,
                *(last if rank == world - 1 else ()),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                **(shared if world > 1 else {}),
            )
            for rank in range(world)
        ]
        ended = [process.finish() for process in processes]
        return [(done.returncode, done.stdout + done.stderr) for done in ended]

    return job


class Many:
    """Annotates each image with the same 20 masks."""

    categories, new_categories, description = ("object",), False, ""
    settings: dict[str, Any] = {}
    identity, batch_size = "1", 8
    backbone: Any = SimpleNamespace(input_size=lambda size: size)
    record = mask_annotation(np.eye(8, dtype=bool), score=0.5, category="object")

    def keys(self, file: str) -> list[Key]:
        return [(file,)]

    def label(self, key: Key) -> str:
        return key[0]

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        for key, _ in items:
            yield AnnotatedItem(key, (8, 8), [self.record] * 20, None)


def files(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves, but locks."""
    found = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def test_any_number_of_processes_writes_the_same_files_after_any_interruption(
    photos: Path, job: Job, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    ((status, printed),) = job(SCRIPT, str(photos), str(alone / "o.json"), world=1)
    assert status == 0, printed
    expected = files(alone)
    assert len(json.loads(expected["o.json"])["annotations"]) == 2 * 35
    command = SCRIPT, str(photos), str(together / "o.json")
    (first, message), (second, _) = job(*command, last=("9",))
    assert (first, second) == (1, -9)
    assert "Another rank has stopped; see its message above. Run the same command" in message
    assert not (together / "o.json").exists()
    # What survives of a batch that the kill has cut is done again.
    done = sum(
        len(path.read_text().splitlines()) - 1 for path in (together / "o.partial").glob("0*.jsonl")
    )
    assert 9 <= done < 2 * 35
    outcomes = job(*command, world=3)
    assert [status for status, _ in outcomes] == [0, 0, 0], outcomes
    printed = outcomes[0][1]
    assert files(together) == {
        name: content.replace(bytes(alone), bytes(together)) for name, content in expected.items()
    }
    assert "Resuming: " in printed and "skipped b/4.png: " in printed
    assert "skipped out.png: the link leaves the folder" in printed
    assert "70 masks in 35 images, 2 files skipped" in printed
    assert "annotated by 3 processes: " in printed and "images/s" in printed
    assert not any("skipped" in other for _, other in outcomes[1:])


def test_more_processes_than_images(photos: Path, job: Job, tmp_path: Path) -> None:
    shutil.rmtree(photos / "a")
    for path in [*(photos / "b").iterdir()][1:]:
        path.unlink()
    outcomes = job(SCRIPT, str(photos), str(tmp_path / "out" / "o.json"), world=3)
    assert [status for status, _ in outcomes] == [0, 0, 0], outcomes
    assert len(json.loads((tmp_path / "out" / "o.json").read_text())["images"]) == 1


def test_the_command_shares_images(
    photos: Path, job: Job, tiny_checkpoint: str, tmp_path: Path
) -> None:
    script = str(Path(SCRIPT).with_name("annotate_tiny.py"))
    command = ["--everything", "--images", str(photos), "--device", "cpu", "--grid", "3", "3"]
    command += ["--backbone", "tiny", "--checkpoint", tiny_checkpoint, "--overlays", "none"]
    command += ["--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--out"]
    for world, folder in (1, "alone"), (2, "together"):
        outcomes = job(script, *command, str(tmp_path / folder / "o.json"), world=world)
        assert [status for status, _ in outcomes] == world * [0], outcomes
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert len(json.loads(files(tmp_path / "alone")["o.json"])["annotations"]) > 35


def test_processes_share_videos(job: Job, tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / "videos" / f"v{number}"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(png(number, 64) if number != 1 else b"no image")
    numbers = range(1, 4)
    prompts = {
        "images": [{"id": own, "file_name": f"v{own - 1}/0.png"} for own in numbers],
        "annotations": [
            {"id": own, "image_id": own, "category_id": 1, "bbox": [9, 9, 30, 40]}
            for own in numbers
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = ["--video", str(tmp_path / "videos"), "--prompts", str(tmp_path / "prompts.json")]
    command += ["--device", "cpu", "--overlays", "none", "--out"]
    for world, folder in (1, "alone"), (2, "together"):
        outcomes = job("agents.annotate", *command, str(tmp_path / folder), world=world)
        assert [status for status, _ in outcomes] == world * [0], outcomes
        assert f"skipped {tmp_path / 'videos' / 'v1'}: " in outcomes[0][1]
        assert "2 frames tracked in" in outcomes[0][1]
    alone, together = files(tmp_path / "alone"), files(tmp_path / "together")
    assert alone["annotations.json"] == together["annotations.json"]
    assert len(json.loads(alone["annotations.json"])["images"]) == 2


# Changes -----------------------------------------------------------------------------------------


def test_results_of_images_that_have_not_changed_are_kept(
    photos: Path, job: Job, tmp_path: Path
) -> None:
    command = SCRIPT, str(photos), str(tmp_path / "out" / "o.json")
    ((status, _),) = job(*command, "40", world=1)
    assert status == -9
    (photos / "A.png").write_bytes(png(50))  # before all others
    (photos / "a" / "1.png").unlink()
    (photos / "a" / "2.png").write_bytes(png(51, 9))
    os.utime(photos / "a" / "0.png", (1, 1))  # touched, but the same
    ((status, printed),) = job(*command, world=1)
    assert status == 0, printed
    # Of 40, an image is gone and one has changed.
    assert "Dropped 4 results: the model or their images have changed." in printed
    assert "Resuming: 36 of 72 are done." in printed
    found = {p: c for p, c in files(tmp_path / "out").items() if p.startswith("o_overlays")}
    assert "o_overlays/A.png__star.jpg" in found and "o_overlays/a__1.png__star.jpg" not in found
    names = [
        own["file_name"] for own in json.loads((tmp_path / "out/o.json").read_text())["images"]
    ]
    assert names == sorted(names) and len(names) == 35


def test_a_folder_of_others_is_not_taken_for_results(photos: Path, job: Job) -> None:
    mine = photos.parent / "out" / "o.partial"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    ((status, printed),) = job(SCRIPT, str(photos), str(mine.with_name("o.json")), world=1)
    assert status == 1 and "not what an unfinished run leaves" in printed
    assert (mine / "thesis.txt").exists()


# Sources -----------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_images_in_tar_files_are_those_of_folders(job: Job, tmp_path: Path) -> None:
    folder, packed = tmp_path / "folder", tmp_path / "packed"
    packed.mkdir()
    for shard in ("x.tar", "y.tar"):  # the same names in both
        (folder / shard / "more").mkdir(parents=True)
        contents = {f"{number}.png": png(number + len(shard)) for number in (3, 1, 2)}
        contents["more/4.png"] = png(4)
        for name, content in contents.items():
            (folder / shard / name).write_bytes(content)
        # webdataset has other files of a sample beside the image; the last of two members counts.
        others = {"1.cls": b"7", "1.json": b"{}", "./2.png": png(9)}
        write_tar(packed / shard, others | contents)
    for root in (folder, packed):
        ((status, printed),) = job(SCRIPT, str(root), str(tmp_path / "out" / root.name), world=1)
        assert status == 0, printed
    assert "ignored 4 files of other kinds (.cls 2, .json 2)" in printed
    one, other = ((tmp_path / "out" / name).read_bytes() for name in ("folder", "packed"))
    assert one == other and b'"y.tar/more/4.png"' in one
    # A tar file may be given instead of a folder.
    ((status, printed),) = job(
        SCRIPT, str(packed / "x.tar"), str(tmp_path / "out" / "one.json"), world=1
    )
    assert status == 0, printed
    content = json.loads((tmp_path / "out" / "one.json").read_text())
    names = [own["file_name"] for own in content["images"]]
    assert names == ["1.png", "2.png", "3.png", "more/4.png"]


def test_bad_members_of_tar_files_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"../up.png": png(1), "/root.png": png(1), "good.png": png(1)})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("raw.dng"))
    whole = tmp_path / "whole.tar"
    write_tar(whole, {f"{number}.png": bytes(5000) for number in range(4)})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:14000])
    whole.unlink()
    (tmp_path / "none.tar").write_bytes(b"no tar file" * 99)
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    (tmp_path / "inside.tar").symlink_to(tmp_path / "a.tar")
    outside = tmp_path.parent / f"{tmp_path.name}.tar"
    write_tar(outside, {"secret.png": png(1)})
    (tmp_path / "outside.tar").symlink_to(outside)
    search = ImageSearch(str(tmp_path), tars=True)
    records = {record.file: record for record in search}
    read = ["a.tar/good.png", "cut.tar/0.png", "cut.tar/1.png", "cut.tar/2.png"]
    assert list(records) == [*read, "inside.tar/good.png"]
    assert records["a.tar/good.png"].read(str(tmp_path)) == png(1)
    with pytest.raises(ValueError, match=r"cut.tar/2.png: the tar file ends within it"):
        records["cut.tar/2.png"].read(str(tmp_path))
    for file, reason in {
        "a.tar/../up.png": "the name leaves the tar file",
        "/root.png": "the name leaves the tar file",
        "a.tar/link.png": "links and sparse files",
        "a.tar/raw.dng": ".dng files are not read",
        "cut.tar": "not a whole tar file (unexpected end of data); 3 images before the damage",
        "none.tar": "not a whole tar file",
        "packed.tar.gz": "compressed tar files are not read",
        "outside.tar": "the link leaves the folder",
    }.items():
        assert reason in search.skipped[file]


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["a.png", "a/b.png", "a-b/c.png", "a b/d.png", "ab.png", "a/b/e.png", "a/b.c/f.png"]
    names += ["B/x.png", "é.png", "a.b.png", "a/b-.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    assert [own.file for own in ImageSearch(str(tmp_path))] == sorted(names)


# Numbers -----------------------------------------------------------------------------------------


def test_shards_fill_whole_batches() -> None:
    for images in (1, 1000, 50_000, 10**7):
        for items in (1, 3, 80):
            for batch in (1, 8, 16, 100):
                number = images_per_shard(images, items, batch)
                assert number * items % batch == 0 and 16 <= number <= 256 + batch
    assert images_per_shard(100, 1, 8) == 16 and images_per_shard(10**7, 1, 8) == 256


def test_a_set_of_names() -> None:
    names = [f"{number}.png" for number in range(1000)]
    some = NameSet([*names, "7.png", "a\udcff"])
    assert all(name in some for name in names) and len(some) == 1001 and "a\udcff" in some
    assert "1000.png" not in some and some.repeated == [NameSet.hash("7.png")]
    assert "a" not in NameSet([]) and not NameSet([]).repeated


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    def peak(images: int) -> int:
        root = tmp_path / str(images)
        root.mkdir()
        (root / "0.png").write_bytes(png(0))
        for number in range(1, images):
            os.link(root / "0.png", root / f"{number}.png")
        config = FolderConfig(
            images=str(root), out=str(tmp_path / "out" / f"{images}.json"), overlays="none"
        )
        tracemalloc.reset_peak()
        annotate_folder(FolderRun.prepare(config), Many())
        return tracemalloc.get_traced_memory()[1]

    peak(16)  # what is loaded at the first use
    tracemalloc.start()
    try:
        few, many = peak(40), peak(240)
    finally:
        tracemalloc.stop()
    # The 20 masks of an image take 6 kB as text. Of each image, at most its name is held.
    assert many - few < 200 * 1000, (few, many)
