"""The images below a folder: files, and members of tar files."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sam_gym.data.io import IMAGE_SUFFIXES, image_size
from sam_gym.utils.text import counted

#: Suffixes of images that are not read: formats that Pillow and OpenCV lack, and camera raw files,
#: of which they would read the thumbnail.
FOREIGN_SUFFIXES = frozenset(
    ".dcm .exr .fits .heic .heif .hif .jxl .nii .svg .3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq "
    ".kdc .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f".split()
)
TAR = ".tar"
_COMPRESSED_TARS = tuple(".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst".split())


class ImageRecord(NamedTuple):
    """An image of a run: a file, or a member of a tar file.

    Attributes:
        file: path relative to the folder, with slashes; a tar file counts as a folder.
        length: of the file, in bytes.
        time: when the file, or the tar file, was modified, in ns.
        archive: path of the tar file, relative to the folder ("" if it is given instead of one), or
            None.
        offset: where the member begins in the tar file.
        id: in COCO files, or None.
        size: annotated (H, W), or None.
    """

    file: str
    length: int
    time: int
    archive: str | None = None
    offset: int = 0
    id: int | str | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def parse(cls, line: str | bytes) -> ImageRecord:
        """Read a record from a line that `line` returned."""
        record = cls(*json.loads(line))
        if record.size is None:
            return record
        height, width = record.size
        return record._replace(size=(height, width))

    def line(self) -> bytes:
        """Return the record as a line of JSON."""
        return json.dumps(self).encode() + b"\n"

    def read(self, root: str) -> bytes:
        """Return the content of the file.

        Args:
            root: the folder, or the tar file.

        Raises:
            OSError: it cannot be read.
            ValueError: the tar file ends before.
        """
        if self.archive is None:
            return (Path(root) / self.file).read_bytes()
        with (Path(root) / self.archive).open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) < self.length:
            raise ValueError(f"{self.file}: the tar file ends within it. Fetch it again.")
        return content


@dataclass
class ImageSearch:
    """Finds the images below a folder, in the order of their paths.

    Args:
        root: the folder, or a tar file.
        written: real paths of files and folders to leave out.
        tars: whether the images in tar files are found, too.

    Attributes:
        skipped: file -> why it is not read.
        others: number of files that are no images, by suffix.

    Raises:
        FileNotFoundError: the folder does not exist.
    """

    root: str
    written: Collection[str] = ()
    tars: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        is_tar = self.tars and os.path.isfile(self.root)
        if not is_tar and not os.path.isdir(self.root):
            also = " or tar file" if self.tars else ""
            raise FileNotFoundError(f"{self.root}: no such folder{also} of images.")

    def __iter__(self) -> Iterator[ImageRecord]:
        if os.path.isdir(self.root):
            return self._below(self.root, "")
        return self._members(self.root, "")

    def ignored(self) -> list[str]:
        """Return a line on the files that are no images, if there are any."""
        if not self.others:
            return []
        counts = ", ".join(f"{suffix} {number}" for suffix, number in sorted(self.others.items()))
        return [f"ignored {counted(self.others.total(), 'file')} of other kinds ({counts})"]

    def left_out(self, most: int) -> list[str]:
        """Return lines on the first `most` files that are not read, and on the number of others."""
        lines = [f"skipped {file}: {reason}" for file, reason in self.skipped.items()]
        more = [f"skipped {len(lines) - most} more"] if len(lines) > most else []
        return lines[:most] + more

    def none_found(self) -> ValueError:
        """Return an error for a folder without images."""
        lines = [f"skipped {file}: {reason}" for file, reason in self.skipped.items()][:3]
        told = "".join(f" {line}." for line in lines + self.ignored())
        return ValueError(f"{self.root}: no image in this folder.{told}")

    def _below(self, folder: str, prefix: str) -> Iterator[ImageRecord]:
        """Yield the images below a folder, whose paths begin with `prefix`."""
        try:
            with os.scandir(folder) as entries:
                # Sorted as the whole paths are, those of folders with their slash.
                names = sorted(map(self._sort_key, entries))
        except OSError as error:
            reason = f"the folder cannot be read ({error.strerror})"
            self.skipped[prefix.rstrip("/") or "."] = reason
            return
        real = os.path.realpath(folder)
        for name in names:
            path = os.path.join(folder, name.rstrip("/"))
            if os.path.join(real, name.rstrip("/")) in self.written:
                continue
            if not os.path.isdir(path):
                yield from self._file(path, prefix + name.rstrip("/"))
            elif os.path.islink(path):
                self.skipped[prefix + name.rstrip("/")] = "links to folders are not followed"
            else:
                yield from self._below(path, prefix + name)

    def _sort_key(self, entry: os.DirEntry[str]) -> str:
        is_folder = entry.is_dir() or (self.tars and entry.name.lower().endswith(TAR))
        return f"{entry.name}/" if is_folder else entry.name

    def _file(self, path: str, file: str) -> Iterator[ImageRecord]:
        """Yield the file if it is an image, or the images in it if it is a tar file."""
        suffix = os.path.splitext(file)[1].lower()
        problem: str | None = None
        if os.path.islink(path) and not self._is_inside(path):
            problem = "the link leaves the folder. Copy the file into it"
        elif not os.path.isfile(path):
            problem = "a broken link" if os.path.islink(path) else "not a regular file"
        elif problem := self._foreign(file, suffix):
            pass
        elif self.tars and suffix == TAR:
            yield from self._members(path, file)
        elif _has_image_suffix(suffix) or _is_image(path):
            status = os.stat(path)
            yield ImageRecord(file, status.st_size, status.st_mtime_ns)
        else:
            self.others[suffix or "no suffix"] += 1
        if problem:
            self.skipped[file] = problem

    def _is_inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(os.path.join(os.path.realpath(self.root), ""))

    def _foreign(self, file: str, suffix: str) -> str | None:
        if suffix in FOREIGN_SUFFIXES:
            return f"{suffix} files are not read. Convert it to PNG, TIFF or JPEG"
        if self.tars and file.lower().endswith(_COMPRESSED_TARS):
            return "compressed tar files are not read. Decompress it"
        return None

    def _members(self, path: str, archive: str) -> Iterator[ImageRecord]:
        """Yield the images in a tar file; of several members of one name, the last counts."""
        found: dict[str, ImageRecord] = {}
        time = os.stat(path).st_mtime_ns
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                    file = posixpath.join(archive, member.name)
                    suffix = os.path.splitext(file)[1].lower()
                    if member.isdir():
                        continue
                    if problem := _problem_of_member(member) or self._foreign(file, suffix):
                        self.skipped[file] = problem
                    elif _has_image_suffix(suffix):
                        file = posixpath.join(archive, posixpath.normpath(member.name))
                        place = archive, member.offset_data
                        found[file] = ImageRecord(file, member.size, time, *place)
                    else:
                        self.others[suffix or "no suffix"] += 1
        except (tarfile.TarError, OSError, EOFError) as error:
            many = f"; {counted(len(found), 'image')} before the damage" if found else ""
            self.skipped[archive or path] = f"not a whole tar file ({error}){many}"
        for _, record in sorted(found.items()):
            yield record


def _problem_of_member(member: tarfile.TarInfo) -> str | None:
    """Return why a member of a tar file is not read, whatever it holds."""
    name = member.name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or os.path.splitdrive(name)[0]:
        return "the name leaves the tar file"
    if not member.isreg() or member.issparse():
        return "links and sparse files in tar files are not read"
    return None


def _has_image_suffix(suffix: str) -> bool:
    return suffix in IMAGE_SUFFIXES or Image.registered_extensions().get(suffix) in Image.OPEN


def _is_image(path: str) -> bool:
    """Return whether the content of a file is an image's."""
    try:
        image_size(path)
    except (ValueError, OSError):
        return False
    return True


class ImageList:
    """The images of a search, in a temporary file, so that any number takes no memory.

    Args:
        search: finds them.
        folder: of the temporary file.

    Attributes:
        search: has the files that are not read.

    Raises:
        ValueError: there is no image.
    """

    def __init__(self, search: ImageSearch, folder: Path) -> None:
        self.search, self._count = search, 0
        self._file: Any = tempfile.TemporaryFile(dir=folder)
        for record in search:
            self._count += 1
            self._file.write(record.line())
        if not self._count:
            raise search.none_found()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ImageRecord]:
        self._file.seek(0)
        return map(ImageRecord.parse, self._file)
