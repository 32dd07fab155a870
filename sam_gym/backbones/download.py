"""Published weights: `python -m sam_gym.backbones.download vit_b`."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from filelock import FileLock

from sam_gym.utils.digest import file_digest
from sam_gym.utils.home import home
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.registry import unknown_name

_CHUNK = 2**20
_TIMEOUT = 30.0
_META = "https://dl.fbaipublicfiles.com/segment_anything"
_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"


@dataclass(frozen=True)
class Published:
    """A checkpoint as its authors publish it.

    Attributes:
        url: official address.
        sha256: of the file, hexadecimal.
    """

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


#: Backbone name -> its published checkpoint.
PUBLISHED: dict[str, Published] = {
    "vit_b": Published(
        f"{_META}/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Published(
        f"{_META}/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Published(
        f"{_META}/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "mobile_sam": Published(
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "repvit_sam": Published(
        "https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_sam.pt",
        "1fd2867cf669e6d89b1c91d0eb883d83ef4bcc590143dd2ca35e2705b21a4f2f",
    ),
    "hq_vit_b": Published(
        f"{_HQ}/sam_hq_vit_b.pth",
        "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57",
    ),
    "hq_vit_l": Published(
        f"{_HQ}/sam_hq_vit_l.pth",
        "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343",
    ),
    "hq_vit_h": Published(
        f"{_HQ}/sam_hq_vit_h.pth",
        "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35",
    ),
}


def default_path(name: str) -> Path:
    """Where the published checkpoint of a backbone is kept: `SAM_GYM_HOME/checkpoints/FILE`."""
    if name not in PUBLISHED:
        raise unknown_name("published backbone", name, PUBLISHED)
    return home() / "checkpoints" / PUBLISHED[name].filename


def published_checkpoint(name: str) -> Path:
    """The path of a backbone's published checkpoint, downloaded if it is not there yet.

    A broken download goes on where it stopped; the file appears whole and checked, or not at all;
    of several processes one downloads and the others wait.

    Raises:
        ValueError: unknown name, or the file that was received is not the published one.
        ConnectionError: it could not be fetched; the message says what to put where.
    """
    path = default_path(name)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            _fetch(PUBLISHED[name], path)
    return path


def _fetch(published: Published, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    resumed = partial.is_file()
    try:
        with ProgressBar(in_bytes=True) as bar:
            task = bar.add_task(path.name, total=None)
            _receive(
                published.url, partial, lambda n, total: bar.update(task, completed=n, total=total)
            )
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(
            f"Could not download {published.url} to {path.parent} ({reason}). Call again to go on "
            f"where it stopped; or put the file at {path}; or pass checkpoint='PATH'."
        ) from error
    found = file_digest(partial)
    if found != published.sha256:
        partial.unlink()
        if resumed:  # its beginning may be that of another file
            return _fetch(published, path)
        raise ValueError(
            f"{published.url}: what arrived has sha256 {found}, but {published.sha256} was "
            "published, so it was thrown away. Try again, or look at what your network puts there."
        )
    os.replace(partial, path)


def _receive(url: str, partial: Path, report: Callable[[int, int | None], None]) -> None:
    """Receive the rest of a file, as far as the server can begin in the middle."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "sam-gym"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        # The rest is empty (416): the file is whole, or it is wrong, which its checksum tells.
        if error.code == 416 and have:
            return
        raise
    with response:
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with partial.open("ab" if have else "wb") as file:
            report(have, total)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                report(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


@dataclass
class Config:
    """Download published weights. Without names: list what there is, and what is here already.

    They go to SAM_GYM_HOME/checkpoints; a download that broke off goes on where it stopped.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Backbones, for example: vit_b vit_h."""


def main(config: Config) -> None:
    """Download the checkpoints of the names and print where they are."""
    if not config.names:
        for name in PUBLISHED:
            path = default_path(name)
            print(f"{name}: {path if path.is_file() else 'not here; ' + PUBLISHED[name].url}")
    for name in config.names:
        default_path(name)
    for name in config.names:
        print(f"{name}: {published_checkpoint(name)}")


if __name__ == "__main__":
    from sam_gym.utils import cli

    cli.run(lambda: main(tyro.cli(Config)))
