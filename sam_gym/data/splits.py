"""Held-out images: splits by seed, and the check that no training image is among them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sam_gym.data.base import SPLITS, Dataset, Unsplit, VideoDataset
from sam_gym.data.io import flag
from sam_gym.utils.digest import file_digest
from sam_gym.utils.registry import check_choice

#: The split that holds every image, of data that comes without splits.
ALL = "all"
#: Fractions of train and val in a split by seed; the rest is test.
_TRAIN, _VAL = 0.8, 0.1


def seeded_part(names: Collection[str], split: str, seed: Any, where: str) -> set[str]:
    """Return the images that a seed puts into a split: 80% train, 10% val, 10% test.

    The split of an image depends on its name and the seed only, so that it stays the same when
    images are added or left out.

    Args:
        names: of all images.
        split: "train", "val", "test"; or "all" for all images.
        seed: a whole number from 0.
        where: the file or folder, for messages.

    Raises:
        ValueError: the split is unknown, the seed is no such number, or no image is in the split.
    """
    check_choice("split", split, (*SPLITS, ALL))
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"split_seed must be a whole number from 0, got {seed!r}.")
    if split == ALL:
        return set(names)
    part = {name for name in names if _split_of(name, seed) == split}
    if not part:
        fits = (s for s in range(1000) if len({_split_of(name, s) for name in names}) == 3)
        other = next(fits, None)
        passed = f"Pass {flag('split_seed', str(other))}" if other is not None else "Add images"
        raise ValueError(
            f"{where}: split_seed={seed} puts none of the {len(names)} images into {split!r}. "
            f"{passed}, or list the images of each split in files of your own."
        )
    return part


def _split_of(name: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < _TRAIN else "val" if place < _TRAIN + _VAL else "test"


def check_held_out(
    held_out: Dataset | VideoDataset, split: str, train: Dataset | VideoDataset | None = None
) -> None:
    """Raise `ValueError` if images to report results on are training images; warn of copies.

    The images of a dataset of videos are its frames.

    Everything that reports on held-out data asks this, before work starts. Results on the split
    "train" are labelled as such, and pass.

    Args:
        held_out: the images to report on.
        split: their split.
        train: the training images; None if they are unknown: data without splits is then refused,
            unless the split is "all".
    """
    if split == "train":
        return
    unsplit: Unsplit | None = getattr(held_out, "unsplit", None)
    total = len(getattr(held_out, "files", ()))
    by_seed = (
        "pass the dataset's option split_seed (--dataset-kwargs split_seed 0) to split the images "
        "by a seed"
    )
    if train is None:
        if unsplit is not None and split != ALL:
            raise ValueError(
                f"{unsplit.reason}, so images of split {split!r} may be training images. "
                f"{unsplit.remedy}; or {by_seed}, as in the training; or pass --split all if none "
                "of the images was trained on."
            )
    elif shared := shared_images(train, held_out):
        count = f"{shared} of {total} images of split {split!r} are training images"
        if unsplit is None:
            raise ValueError(
                f"{held_out.name}: {count}. Put every image into one split only, and train on "
                "another split than the results are for."
            )
        raise ValueError(f"{unsplit.reason}, so {count}. {unsplit.remedy}; or {by_seed}.")
    elif copied := copied_images(train, held_out):
        warnings.warn(
            f"{held_out.name}: {copied} of {total} images of split {split!r} are copies of "
            "training images, so results on them are no held-out results. Remove them from one of "
            "the splits.",
            stacklevel=2,
        )


def shared_images(train: Dataset | VideoDataset, other: Dataset | VideoDataset) -> int:
    """Return the number of image files of a dataset that are also in the training data.

    Files are compared, not paths, so links to the same file count, and copies do not. Datasets
    without files share no image.
    """
    return len(_identities(train).keys() & _identities(other).keys())


def copied_images(train: Dataset | VideoDataset, other: Dataset | VideoDataset) -> int:
    """Return the number of image files of a dataset that are copies of training images' files."""
    trained, files = _identities(train), _identities(other)
    by_size: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, (one, another) in enumerate(((trained, files), (files, trained))):
        for identity in one.keys() - another.keys():
            size, path = one[identity]
            by_size[size][side].append(path)
    copied = 0
    for originals, others in by_size.values():
        if not originals or not others:
            continue
        # Most files of one size differ at their end already, which is cheap to read.
        ends = [{path: _end_of(path) for path in paths} for paths in (originals, others)]
        same = {*ends[0].values()} & {*ends[1].values()}
        originals, others = ([path for path in own if own[path] in same] for own in ends)
        known = {file_digest(Path(path)) for path in originals}
        copied += sum(file_digest(Path(path)) in known for path in others)
    return copied


def _end_of(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return file.read()


def _identities(dataset: Dataset | VideoDataset) -> dict[tuple[int, int], tuple[int, str]]:
    """Return size and path of the image files of a dataset, without links to the same file."""
    found = {}
    for path in getattr(dataset, "files", ()):
        status = os.stat(path)
        found[status.st_dev, status.st_ino] = status.st_size, path
    return found
