"""Streams of domains for continual learning.

`make_stream("scenes-domains")` is procedural and needs no files; `make_stream("folders",
data=["cells", "roads"])` makes one domain per folder.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from sam_gym.data import make_dataset
from sam_gym.data.base import SPLITS, Dataset, MissingSplit, Sample, check_index
from sam_gym.data.folder import BACKGROUND, IGNORE, OBJECT, Folder
from sam_gym.data.io import OnError, check_image, check_size, image_size, read_json, read_labels
from sam_gym.data.splits import check_held_out, shared_images
from sam_gym.data.synthetic.domains.dataset import DOMAINS, ProceduralDomain
from sam_gym.metrics.masks import iou
from sam_gym.utils.lowres import frame_mask, low_res
from sam_gym.utils.registry import Registry, unknown_name
from sam_gym.utils.settings import Count, Natural, checked, real
from sam_gym.utils.text import counted

#: A folder domain is thin if the low-res ceiling of its objects (`low_res_ceiling`) is below this.
THIN_BELOW = 0.7

#: Number of validation images on which the ceiling is measured.
_CEILING_IMAGES = 8
_THRESHOLDS = np.arange(0.1, 0.95, 0.1)


@dataclass(frozen=True)
class Domain:
    """One domain of a stream.

    Attributes:
        name: name for reports; not part of observations.
        thin: whether its objects are thin or branching; such domains are reported separately.
        datasets: the dataset of each split, "train", "val" and "test".

    Raises:
        ValueError: images of another split are training images.
    """

    name: str
    thin: bool
    datasets: Mapping[str, Dataset]

    def __post_init__(self) -> None:
        if "train" in self.datasets:
            for split, dataset in self.datasets.items():
                check_held_out(dataset, split, self.datasets["train"])

    def split(self, name: str) -> Dataset:
        """Return the dataset of a split; raise `ValueError` if it is missing."""
        if name not in self.datasets:
            raise unknown_name(f"split of domain {self.name!r}", name, self.datasets)
        return self.datasets[name]


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of domains.

    Attributes:
        name: name of the stream.
        domains: the domains, with unique names.

    Raises:
        ValueError: held-out images of a domain are training images of another.
    """

    name: str
    domains: tuple[Domain, ...]

    def __post_init__(self) -> None:
        for own, other in itertools.permutations(self.domains, 2):
            for split in own.datasets.keys() - {"train"} if "train" in other.datasets else ():
                held_out = own.datasets[split]
                if shared := shared_images(other.datasets["train"], held_out):
                    raise ValueError(
                        f"{shared} of {len(held_out)} images of split {split!r} of domain "
                        f"{own.name!r} are training images of {other.name!r}. Put every image into "
                        "one split only."
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the domains, in order."""
        return tuple(domain.name for domain in self.domains)

    @property
    def held_out_split(self) -> Literal["val", "test"]:
        """Split to report results on: "test", or "val" if a domain has no test, as COCO."""
        return "test" if all("test" in domain.datasets for domain in self) else "val"

    def __len__(self) -> int:
        return len(self.domains)

    def __iter__(self) -> Iterator[Domain]:
        return iter(self.domains)

    def __getitem__(self, index: int) -> Domain:
        return self.domains[index]

    def ordered(self, order: str | Sequence[str] | None) -> Stream:
        """Return the stream with its domains in another order.

        Args:
            order: every name once, as a sequence or comma-separated; or "random:SEED" for a seeded
                permutation; None: unchanged.

        Raises:
            ValueError: a name is unknown, missing or repeated, or the seed is not an integer.
        """
        if order is None:
            return self
        if isinstance(order, str) and order.startswith("random:"):
            shuffled = np.random.default_rng(_seed(order)).permutation(len(self))
            return replace(self, domains=tuple(self.domains[index] for index in shuffled))
        wanted = _names(order)
        by_name = {domain.name: domain for domain in self}
        for name in wanted:
            if name not in by_name:
                raise unknown_name(f"domain of stream {self.name!r}", name, by_name)
        _refuse_repeated(wanted, "order", "Name every domain once.")
        missing = [name for name in self.names if name not in wanted]
        if missing:
            raise ValueError(
                f"order lacks {', '.join(missing)}. Name every domain of stream {self.name!r} "
                f"once ({', '.join(self.names)}), or make the stream with fewer domains."
            )
        return replace(self, domains=tuple(by_name[name] for name in wanted))


#: Stream name -> factory with keyword arguments, including `data` if it reads files.
STREAMS: Registry[Callable[..., Stream]] = Registry("stream")


def make_stream(
    name: str = "scenes-domains",
    data: Sequence[str] | str | None = None,
    order: str | Sequence[str] | None = None,
    on_error: OnError = "raise",
    **kwargs: Any,
) -> Stream:
    """Make a registered stream.

    Args:
        name: one of `STREAMS`.
        data: folders of a stream that reads files, as a sequence or comma-separated.
        order: see `Stream.ordered`.
        on_error: handling of invalid files of a stream that reads files: "raise" or "skip".
        **kwargs: options of the stream; see its function below.

    Raises:
        ValueError: a name or an option is unknown, or the data does not validate.
        FileNotFoundError: a file or folder is missing.
    """
    factory = STREAMS.get(name)
    takes = inspect.signature(factory).parameters
    if on_error != "raise" and "data" in takes:
        kwargs["on_error"] = on_error
    for option in kwargs:
        if option not in takes:
            raise unknown_name(f"option of stream {name!r}", option, takes)
    if "data" in takes:
        kwargs["data"] = data
    elif data is not None:
        raise ValueError(
            f"Stream {name!r} reads no files, got data={data!r}. "
            "Leave data out, or make stream 'folders'."
        )
    return factory(**kwargs).ordered(order)


def dataset_stream(dataset: str, data: str | None = None, **kwargs: Any) -> Stream:
    """Make a stream of one domain from a dataset, with the splits that it has.

    Args:
        dataset: one of `DATASETS`.
        data: root folder of a dataset that reads files.
        **kwargs: further options of the dataset.

    Raises:
        ValueError: the name or an option is unknown, the data does not validate, or training images
            are among the held-out ones.
        FileNotFoundError: its training split is missing.
    """
    root = {} if data is None else {"root": data}
    splits = {"train": make_dataset(dataset, "train", **root, **kwargs)}
    for split in ("val", "test"):
        # A missing split is an error only when it is requested.
        with suppress(MissingSplit):
            splits[split] = make_dataset(dataset, split, **root, **kwargs)
    return Stream(dataset, (Domain(dataset, False, splits),))


@STREAMS.register("scenes-domains")
@checked
def scenes_domains(
    *,
    domains: str | Sequence[str] | None = None,
    train_images: Count = 64,
    val_images: Count = 16,
    test_images: Count = 32,
    size: int = 256,
    seed: Natural = 0,
) -> Stream:
    """Make a stream of procedural domains (see `sam_gym.data.synthetic.domains.dataset`).

    Args:
        domains: names, in this order, as a sequence or comma-separated (None: all).
        train_images: number of training images per domain.
        val_images: number of validation images per domain.
        test_images: number of test images per domain.
        size: height and width of the images, in pixels.
        seed: seed of the images.

    Raises:
        ValueError: a domain is unknown or repeated, no domain is given, or a number is too small.
    """
    kinds = list(DOMAINS.names()) if domains is None else _names(domains)
    if not kinds:
        raise ValueError("domains is empty. Name at least one, or pass None for all.")
    _refuse_repeated(kinds, "domains", "Name each once.")
    lengths = {"train": train_images, "val": val_images, "test": test_images}
    made = []
    for kind in kinds:
        datasets = {
            split: ProceduralDomain(kind, split, length=length, size=size, seed=seed)
            for split, length in lengths.items()
        }
        made.append(Domain(kind, DOMAINS.get(kind).thin, datasets))
    return Stream("scenes-domains", tuple(made))


@STREAMS.register("folders")
@checked
def folders(
    *,
    data: str | Sequence[str] | None,
    on_error: OnError = "raise",
    min_area: Annotated[float, real(0, below=1)] = 0.0005,
    max_images: Count | None = None,
    seed: Natural = 0,
) -> Stream:
    """Make a stream of folders, one domain each, in the layout of `sam_gym.data.folder.Folder`.

    A folder contains `images/`, `splits.json`, and `masks/` (objects are connected components) or
    `instances/` (objects are ids; preferred if both exist). All masks in use are read once, on
    construction. Images without an object are left out, with one warning per folder.

    Args:
        data: the folders, as a sequence or comma-separated.
        on_error: handling of invalid images, as for `Folder`.
        min_area: minimum area of an object, as a fraction of the area of the folder's median
            image; smaller objects are ignored pixels.
        max_images: maximum number of images per split, sampled with `seed` (None: all).
        seed: seed of the sampling.

    Raises:
        FileNotFoundError: a folder or file is missing, including splits.json: without it, training
            would use images of the test split.
        ValueError: a folder is repeated or empty, a file is invalid, an image is in two splits, an
            argument is out of range, or a split has no image with an object.
    """
    roots = [] if data is None else _names(data)
    if not roots:
        raise ValueError(
            f"Stream 'folders' needs folders, got data={data!r}. "
            "Pass data=['PATH', ...], or one string with commas."
        )
    names = [os.path.basename(os.path.realpath(root)) for root in roots]
    for name, count in Counter(names).items():
        if count > 1:
            same = ", ".join(r for r, n in zip(roots, names, strict=True) if n == name)
            raise ValueError(
                f"Several folders are called {name!r} ({same}), and a domain has the name of its "
                "folder. Rename one, or leave it out."
            )
    return Stream(
        "folders",
        tuple(_folder_domain(root, on_error, min_area, max_images, seed) for root in roots),
    )


def low_res_ceiling(
    dataset: Dataset,
    image_size: int = 256,
    mask_size: int = 64,
    max_images: int | None = None,
    squash: bool = False,
) -> float:
    """Return the mean IoU that true masks reach at SAM's low resolution, over objects.

    Each mask is placed in SAM's square frame, averaged to the size of low-res masks, and upsampled
    to the size of the image as in `Backbone.masks_at`, with the best threshold for the object.
    Compare results on thin objects with this ceiling. It is not a strict bound: logits fitted to
    one object can represent slightly finer lines.

    Args:
        dataset: source of the objects.
        image_size: side of SAM's input frame, in pixels.
        mask_size: side of its low-res masks.
        max_images: number of images, the first of the dataset (None: all).
        squash: images are stretched to the frame, as by SAM 2; otherwise padded.
    """
    count = len(dataset) if max_images is None else min(max_images, len(dataset))
    return float(
        np.mean(
            [
                _low_res_iou(mask, image_size, mask_size, squash)
                for index in range(count)
                for mask in dataset[index].masks
            ]
        )
    )


def _low_res_iou(mask: np.ndarray, image_size: int, mask_size: int, squash: bool) -> float:
    height, width = mask.shape
    scale = image_size / max(height, width)
    h, w = (image_size if squash else int(side * scale + 0.5) for side in (height, width))
    low = low_res(frame_mask(mask, (h, w), image_size), (mask_size, mask_size))
    full = torch.from_numpy(low)[None, None]
    size = mask.shape if squash else (image_size, image_size)
    full = F.interpolate(full, size, mode="bilinear", align_corners=False)
    if mask.shape != size:
        full = F.interpolate(full[..., :h, :w], mask.shape, mode="bilinear", align_corners=False)
    cover = full[0, 0].numpy()
    # Most pixels are outside of the object at every threshold.
    seen = mask | (cover > _THRESHOLDS[0])
    cover, inside = cover[seen], mask[seen]
    return max(iou(cover > threshold, inside) for threshold in _THRESHOLDS)


class _Subset:
    """A subset of the images of a folder."""

    categories: tuple[str, ...]

    def __init__(self, folder: Folder, indices: Sequence[int]) -> None:
        self.name, self.categories = folder.name, folder.categories
        self._folder, self._indices = folder, tuple(indices)

    @property
    def files(self) -> list[str]:
        files = self._folder.files
        return [files[index] for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        check_index(self.name, index, len(self))
        return self._folder[self._indices[index]]

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(len(self))), None


class _DomainFolder(Folder):
    """A folder with images without an object, which domains leave out."""

    def _check(self, pair: tuple[str, str]) -> None:
        image, mask = pair
        check_size(image, check_image(image), check_image(mask, kind="mask").size, mask)


def _folder_domain(
    root: str, on_error: OnError, min_area: float, max_images: int | None, seed: int
) -> Domain:
    target = _layout(root)
    masks = os.path.join(root, "instances" if target == "instances" else "masks")
    least = max(1, math.ceil(min_area * _median_area(masks)))
    whole = {
        split: _DomainFolder(split, root=root, target=target, min_area=least, on_error=on_error)
        for split in SPLITS
    }
    _check_disjoint_splits(root)
    datasets: dict[str, Dataset] = {}
    empty = 0
    for number, (split, folder) in enumerate(whole.items()):
        kept: list[int] = []
        for index in np.random.default_rng([seed, number]).permutation(len(folder)):
            if len(kept) == max_images:
                break
            if _has_object(folder, int(index), target, least):
                kept.append(int(index))
            else:
                empty += 1
        if not kept:
            raise ValueError(
                f"{root}: no image of split {split!r} has an object of at least {least} pixels "
                f"({counted(len(folder), 'image')}). Check {masks}, or lower min_area={min_area}."
            )
        datasets[split] = _Subset(folder, sorted(kept))
    if empty:
        warnings.warn(
            f"{root}: left out {empty} images without an object of at least {least} pixels.",
            stacklevel=6,
        )
    thin = low_res_ceiling(datasets["val"], max_images=_CEILING_IMAGES) < THIN_BELOW
    return Domain(whole["train"].name, thin, datasets)


def _layout(root: str) -> Literal["components", "instances"]:
    """Validate the layout of a domain's folder; return how it defines objects."""
    try:
        found = set(os.listdir(root))
    except FileNotFoundError:
        raise FileNotFoundError(f"{root}: the folder does not exist. Check the path.") from None
    except OSError as error:
        raise ValueError(
            f"{root}: not a folder that can be read ({error.strerror}). Check the path."
        ) from error
    layout = (
        "A domain is a folder with images/, splits.json and masks/ or instances/; for COCO JSON "
        "pass --stream coco, for label maps --stream labelmaps."
    )
    within = {name for name in found if os.path.isdir(os.path.join(root, name))}
    if "images" not in within or not within & {"masks", "instances"}:
        shown = ", ".join(sorted(found)[:8]) or "nothing"
        raise FileNotFoundError(f"{root}: found {shown}. {layout}")
    if "splits.json" not in found:
        raise FileNotFoundError(
            f"{root}: splits.json is missing, so every split would be all images, and training "
            'would use test images. Write {"train": [stems], "val": [...], "test": [...]}.'
        )
    return "instances" if "instances" in within else "components"


def _median_area(masks: str) -> float:
    """Return the median area of the masks in a folder, in pixels, from their headers."""
    areas = []
    for name in os.listdir(masks):
        with suppress(OSError, ValueError):
            areas.append(math.prod(image_size(os.path.join(masks, name))))
    return float(np.median(areas)) if areas else 0.0


def _check_disjoint_splits(root: str) -> None:
    """Check that no stem, as validated by `Folder`, is in two splits."""
    path = os.path.join(root, "splits.json")
    splits = read_json(path, "list of splits")
    seen: dict[str, str] = {}
    for split in SPLITS:
        for stem in splits[split]:
            if stem in seen:
                raise ValueError(
                    f"{path}: image {stem!r} is in {seen[stem]!r} and in {split!r}. "
                    "Keep it in one of them, or test data leaks into training."
                )
            seen[stem] = split


def _has_object(folder: Folder, index: int, target: str, least: int) -> bool:
    """Return whether an image has an object of `least` pixels; reads only its mask.

    Raises:
        ValueError: the file is corrupt or has values that a mask may not have.
    """
    labels = read_labels(folder.mask_path(index), f"domain {folder.name}")
    if target == "components":
        present = np.flatnonzero(np.bincount(labels.ravel()))
        if np.setdiff1d(present, (BACKGROUND, IGNORE, OBJECT)).size:
            folder[index]  # raises, and names the values
        labels = (labels == OBJECT).astype(np.uint8)
        areas = cv2.connectedComponentsWithStats(labels, connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    else:
        areas = np.bincount(labels.ravel())[1:]
    return bool((areas >= least).any())


def _names(text: str | Sequence[str]) -> list[str]:
    """Return names as a list, from a sequence or a comma-separated string."""
    if isinstance(text, str):
        return [name.strip() for name in text.split(",") if name.strip()]
    return list(text)


def _refuse_repeated(names: Sequence[str], what: str, remedy: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{what} names {', '.join(twice)} more than once. {remedy}")


def _seed(order: str) -> int:
    digits = order.removeprefix("random:")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(
            f"order={order!r}: expected a whole number after 'random:', as in 'random:0'."
        )
    return int(digits)
