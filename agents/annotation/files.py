"""Read images of a folder and write overlays beside the annotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sam_gym.backbones import BackboneService
from sam_gym.data.io import IMAGE_SUFFIXES, read_image
from sam_gym.utils.render import save_image


def image_files(folder: str) -> list[str]:
    """List the image files below a folder as sorted paths relative to it.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images.")
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not files:
        raise ValueError(
            f"{folder}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    return files


class ImageReader:
    """Read images and remember those that cannot be read.

    The last image is kept, so that consecutive reads of one file decode it once.

    Args:
        folder: root of the files.
        backbone: the SAM that will see the images.

    Attributes:
        broken: file -> why it cannot be used.
    """

    def __init__(self, folder: str, backbone: BackboneService) -> None:
        self.folder, self.backbone = Path(folder), backbone
        self.broken: dict[str, str] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, file: str) -> np.ndarray | None:
        """Return an image, uint8 (H, W, 3), or None if it is broken or too thin for SAM."""
        if self._last is not None and self._last[0] == file:
            return self._last[1]
        if file in self.broken:
            return None
        try:
            image = read_image(str(self.folder / file), "image")
            if not all(self.backbone.input_size(image.shape[:2])):
                height, width = image.shape[:2]
                raise ValueError(f"{width} x {height} pixels are too thin for SAM.")
        except (ValueError, OSError) as error:
            self.broken[file] = str(error)
            return None
        self._last = (file, image)
        return image


class OverlayWriter:
    """Write overlays, images with masks drawn over them, into one flat folder.

    Args:
        option: the folder; None: beside `out`; "none": write nothing.
        out: path of the annotation file.
    """

    def __init__(self, option: str | None, out: Path) -> None:
        beside = out.with_suffix("").as_posix() + "_overlays"
        #: The folder, or None if nothing is written.
        self.folder = None if option == "none" else Path(option or beside)

    def write(self, name: str, overlay: np.ndarray) -> None:
        """Save an overlay, uint8 (H, W, 3), as NAME.jpg; slashes in the name become "__"."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_image(self.folder / f"{name}.jpg".replace("/", "__"), overlay)
