"""Convert annotations to the formats of other tools: `python -m agents.convert --help`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sam_gym.data.coco_export import FORMATS, CocoFile, copy_images
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder
from sam_gym.utils.settings import check_settings
from sam_gym.utils.text import counted, printable


@documented
@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a COCO file, as annotate and the app write it, to the format of another tool.

    "polygons": COCO with polygons instead of RLE. "yolo": text files of YOLO segmentation and
    data.yaml. "labels": label images (PNG with a palette), the objects of each image (16-bit PNG)
    and classes.json. "panoptic": COCO panoptic.

    Example: python -m agents.convert annotations.json --format yolo --images PHOTOS --out yolo
    """

    annotations: tyro.conf.Positional[str]
    """COCO JSON to convert."""
    format: Literal["polygons", "yolo", "labels", "panoptic"]
    """Format to write."""
    out: str
    """Folder to write into, new or empty."""
    images: str | None = None
    """Folder of the images: copy them too, so that `out` is a complete dataset. Paths become names
    without folders (None: copy no images)."""


def convert(config: ConvertConfig) -> Path:
    """Convert a COCO file; returns the folder.

    Raises:
        FileNotFoundError: the file, or an image, is missing.
        FileExistsError: the folder is not empty.
        ValueError: the file is not COCO JSON, a record is invalid, or does not fit the format.
    """
    check_settings(config)
    file = CocoFile.read(config.annotations)
    out = make_folder(config.out)
    if any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty. Pass a new folder, or empty it.")
    if config.images is not None:
        copy_images(file.images, config.images, out)
    FORMATS[config.format](file, out, config.images is not None)
    count = sum(len(image.objects) for image in file.images)
    note = f", {file.empty} without a pixel left out" if file.empty else ""
    print(
        printable(
            f"{counted(count, 'object')} in {counted(len(file.images), 'image')}{note}: {out}"
        )
    )
    return out


def main(args: Sequence[str] | None = None) -> Path:
    """Run the command line."""
    return convert(cli.parse(ConvertConfig, "python -m agents.convert", args))


if __name__ == "__main__":
    cli.run(main)
