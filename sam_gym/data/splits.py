"""Held-out images: splits by seed, and the check that no training image is among them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from typing import Any

from sam_gym.data.base import SPLITS, Dataset, Unsplit
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
        advice = f"Pass split_seed={other}, or list" if other is not None else "Add images, or list"
        raise ValueError(
            f"{where}: split_seed={seed} puts none of the {len(names)} images into {split!r}. "
            f"{advice} the images of each split in files of your own."
        )
    return part


def _split_of(name: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < _TRAIN else "val" if place < _TRAIN + _VAL else "test"


def check_held_out(held_out: Dataset, split: str, train: Dataset | None = None) -> None:
    """Raise `ValueError` if images to report results on are training images.

    Everything that reports on held-out data asks this, before work starts. Results on the split
    "train" are labelled as such, and pass.

    Args:
        held_out: the images to report on.
        split: their split.
        train: the training images; None if they are not at hand: data without splits is refused,
            unless all of it is asked for by the split "all".
    """
    if split == "train":
        return
    unsplit: Unsplit | None = getattr(held_out, "unsplit", None)
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
        count = f"{shared} of {len(held_out)} images of split {split!r} are training images"
        if unsplit is None:
            raise ValueError(
                f"{held_out.name}: {count}. Put every image into one split only, and train on "
                "another split than the results are for."
            )
        raise ValueError(f"{unsplit.reason}, so {count}. {unsplit.remedy}; or {by_seed}.")


def shared_images(train: Dataset, other: Dataset) -> int:
    """Return the number of image files of a dataset that are also in the training data.

    Files are compared, not paths, so links to the same file count. Datasets without files share no
    image.
    """
    trained, files = _identities(train), _identities(other)
    return len(trained & files)


def _identities(dataset: Dataset) -> set[tuple[int, int]]:
    found = set()
    for path in getattr(dataset, "files", ()):
        status = os.stat(path)
        found.add((status.st_dev, status.st_ino))
    return found
