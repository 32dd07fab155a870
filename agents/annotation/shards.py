"""Shards of the images of a run, which processes claim one after the other."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from agents.annotation.files import PartialResults, different
from agents.annotation.sources import ImageRecord
from sam_gym.utils.files import write_json

T = TypeVar("T")

#: Bounds on the images of a shard; between them, a run has about as many shards as `_SHARDS`.
_FEW_IMAGES, _MANY_IMAGES = 16, 256
_SHARDS = 1024
_PLAN, _INDEX = "plan.json", "images.jsonl"

#: Key of an item to annotate: an image file, followed by what distinguishes its items.
Key = tuple[Any, ...]
Result = dict[str, Any]


def images_per_shard(images: int, items_per_image: int, batch_size: int) -> int:
    """Return the number of images of a shard, whose items fill whole batches.

    It does not depend on the number of processes: batches, and with them the last bits of results,
    are the same for any number.

    Args:
        images: number of images of the run.
        items_per_image: number of items of each.
        batch_size: items that an annotator processes together.
    """
    step = batch_size // math.gcd(batch_size, items_per_image)
    wanted = min(max(images // _SHARDS, _FEW_IMAGES), _MANY_IMAGES)
    return step * math.ceil(wanted / step)


@dataclass(frozen=True)
class Plan:
    """What all processes of a run share.

    Attributes:
        settings: of the run; a run with others cannot resume it.
        identity: digest of the models.
        categories: name -> id.
        repeated: of `OverlayNames`.
        images_per_shard: number of images of each shard but the last.
        images: digest of the index of the images.
        total: number of images.
        starts: where the images of each shard begin in the index, in bytes, and where it ends.
    """

    settings: dict[str, Any]
    identity: str
    categories: dict[str, int | str]
    repeated: list[int]
    images_per_shard: int
    images: str = ""
    total: int = 0
    starts: list[int] = field(default_factory=list)


class Shards:
    """The index of the images of a run, and the files of its shards, in a folder.

    plan.json is the `Plan`, images.jsonl has a line per image. A shard has NUMBER.jsonl, its
    `PartialResults`, and when it is finished NUMBER.json, its summary. NUMBER.lock is locked by the
    process that works on it.

    Args:
        folder: the folder, which `prepare_shards` has made.

    Raises:
        ValueError: the folder is another.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.plan = Plan(**json.loads((folder / _PLAN).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder}: not what an unfinished run leaves ({error}). Remove it to start over."
            ) from None

    def __len__(self) -> int:
        return len(self.plan.starts) - 1

    def images(self, number: int) -> list[ImageRecord]:
        """Return the images of a shard."""
        start, end = self.plan.starts[number : number + 2]
        with (self.folder / _INDEX).open("rb") as file:
            file.seek(start)
            return [ImageRecord.parse(line) for line in file.read(end - start).splitlines()]

    def results(self, number: int) -> PartialResults:
        """Open the results of a shard."""
        return PartialResults(self._path(number, "jsonl"))

    def stored(self, number: int) -> dict[Key, Result]:
        """Return the results of a shard, without changing its file."""
        return PartialResults.read(self._path(number, "jsonl"))

    def is_finished(self, number: int) -> bool:
        """Return whether a shard has its summary."""
        return self._path(number, "json").exists()

    def finish(self, number: int, summary: dict[str, Any]) -> None:
        """Write the summary of a shard."""
        write_json(self._path(number, "json"), summary)

    def summary(self, number: int) -> dict[str, Any]:
        """Return the summary of a finished shard."""
        return json.loads(self._path(number, "json").read_bytes())

    def finished_images(self) -> int:
        """Return the number of images in finished shards."""
        names = os.listdir(self.folder)
        finished = sum(name.endswith(".json") for name in names) - 1  # the plan
        count = finished * self.plan.images_per_shard
        if self._path(len(self) - 1, "json").name in names:
            count -= len(self) * self.plan.images_per_shard - self.plan.total
        return count

    def claim(self, *, wait: bool = False) -> Iterator[int]:
        """Yield the unfinished shards as `claim` does."""
        return claim(range(len(self)), self.is_finished, lambda n: self._path(n, "lock"), wait=wait)

    def summarized(self, name: str) -> Iterator[Any]:
        """Yield the values of a list in the summaries of all shards, which are finished."""
        for number in range(len(self)):
            yield from self.summary(number)[name]

    def count_done(self, items_per_image: int, batch_size: int) -> int:
        """Return the number of items that need not be done again: those of whole batches."""
        left = (number for number in range(len(self)) if not self.is_finished(number))
        counts = (len(self.stored(number)) for number in left)
        whole = sum(count - count % batch_size for count in counts)
        return self.finished_images() * items_per_image + whole

    def count_results(self) -> int:
        """Return the number of results, in finished and other shards."""
        return sum(len(self.stored(number)) for number in range(len(self)))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"


def claim(
    items: Iterable[T],
    is_finished: Callable[[T], bool],
    lock_of: Callable[[T], Path],
    *,
    wait: bool = False,
) -> Iterator[T]:
    """Yield the unfinished items, each locked until the next.

    The system releases a lock when the process that holds it ends in any way.

    Args:
        items: what processes share.
        is_finished: whether an item is finished.
        lock_of: path of the file that is locked.
        wait: wait for items that other processes work on, instead of leaving them out.
    """
    for item in items:
        if is_finished(item):
            continue
        lock = FileLock(lock_of(item), timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            continue
        try:
            if not is_finished(item):
                yield item
        finally:
            lock.release()


def prepare_shards(
    folder: Path,
    records: Iterable[ImageRecord],
    plan: Plan,
    keep: Callable[[ImageRecord, ImageRecord, Key, Result], bool],
) -> Shards:
    """Write the index and the plan of a run; results of an interrupted run are kept.

    If images have changed since, the results that are still good move to the new shards.

    Args:
        folder: of the shards; its parent exists.
        records: the images, sorted by `file`.
        plan: of the run; `images`, `total` and `starts` are filled in.
        keep: whether a result is still good, given the image as it was and as it is now.

    Raises:
        ValueError: the folder belongs to a run with other settings, or is none of annotate.
    """
    new, old = (folder.with_name(f".{folder.name}-{name}") for name in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed while the new shards took its place
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    earlier = Shards(folder) if folder.exists() else None
    if earlier is not None and earlier.plan.settings != plan.settings and earlier.count_results():
        names = different(earlier.plan.settings, plan.settings)
        raise ValueError(
            f"{folder}: left by a run with other settings ({', '.join(names)}). Finish that run "
            "with its own settings, or remove the folder to start over."
        )
    new.mkdir()
    plan = _write_index(new / _INDEX, records, plan)
    write_json(new / _PLAN, asdict(plan))
    if earlier is not None and earlier.plan == plan:
        shutil.rmtree(new)
        return earlier
    shards = Shards(new)
    dropped = 0
    if earlier is not None and earlier.plan.identity == plan.identity:
        dropped = _carry_over(earlier, shards, keep)
    elif earlier is not None:
        dropped = earlier.count_results()
    if dropped:
        print(f"Dropped {dropped} results: the model or their images have changed.")
    if earlier is not None:
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return Shards(folder)


def _write_index(path: Path, records: Iterable[ImageRecord], plan: Plan) -> Plan:
    """Write the index; return the plan with what it says of it."""
    digest, total, end, starts = hashlib.sha256(), 0, 0, []
    with path.open("wb") as file:
        for total, record in enumerate(records, start=1):
            if (total - 1) % plan.images_per_shard == 0:
                starts.append(end)
            line = record.line()
            file.write(line)
            digest.update(line)
            end += len(line)
    return replace(plan, images=digest.hexdigest(), total=total, starts=[*starts, end])


def _carry_over(
    earlier: Shards,
    shards: Shards,
    keep: Callable[[ImageRecord, ImageRecord, Key, Result], bool],
) -> int:
    """Copy results to shards of other images; returns the number of those that are dropped."""
    stored, dropped = _stored(earlier), 0
    before = next(stored, None)
    for number in range(len(shards)):
        kept = {}
        for record in shards.images(number):
            while before is not None and before[0].file < record.file:
                dropped += len(before[1])
                before = next(stored, None)
            if before is not None and before[0].file == record.file:
                for key, result in before[1].items():
                    if keep(before[0], record, key, result):
                        kept[key] = result
                    else:
                        dropped += 1
                before = next(stored, None)
        if kept:
            results = shards.results(number)
            for key, result in kept.items():
                results.add(key, result)
    while before is not None:
        dropped += len(before[1])
        before = next(stored, None)
    return dropped


def _stored(shards: Shards) -> Iterator[tuple[ImageRecord, dict[Key, Result]]]:
    """Yield the images that have results, with these."""
    for number in range(len(shards)):
        of_file: dict[str, dict[Key, Result]] = {}
        for key, result in shards.stored(number).items():
            of_file.setdefault(key[0], {})[key] = result
        for record in shards.images(number):
            if record.file in of_file:
                yield record, of_file[record.file]
