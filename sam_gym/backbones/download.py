"""Download published weights: `python -m sam_gym.backbones.download vit_b`."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from filelock import FileLock

from sam_gym.backbones.spec import PublishedWeights, backbones_by_size, find_spec
from sam_gym.utils.digest import file_digest
from sam_gym.utils.home import home
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.registry import check_choice

_CHUNK = 2**20
_TIMEOUT = 30.0


def published_weights() -> dict[str, PublishedWeights]:
    """Published checkpoint, with checksum, of each backbone that has one; the smallest first."""
    return {
        spec.name: spec.weights
        for spec in backbones_by_size()
        if isinstance(spec.weights, PublishedWeights) and spec.weights.sha256 is not None
    }


def default_path(name: str) -> Path:
    """Return the path of a published checkpoint: `SAM_GYM_HOME/checkpoints/FILE`.

    Raises:
        ValueError: no published checkpoint with a checksum belongs to this name.
    """
    published, spec = published_weights(), find_spec(name)
    weights = None if spec is None else spec.weights
    if isinstance(weights, PublishedWeights) and weights.sha256 is None:
        raise ValueError(
            f"Backbone {name!r} is not downloaded, since no checksum of its weights is known: get "
            f"{weights.url} yourself and pass checkpoint='PATH'."
        )
    check_choice("published backbone", name, published)
    return home() / "checkpoints" / published[name].filename


def published_checkpoint(name: str) -> Path:
    """Return the path of a backbone's published checkpoint; download it if it is missing.

    Interrupted downloads resume. The file appears whole and checked, or not at all. Of several
    processes, one downloads and the others wait.

    Raises:
        ValueError: unknown name, or the received file is not the published one.
        ConnectionError: the download failed; the message says where to put the file by hand.
    """
    path = default_path(name)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            _fetch(published_weights()[name], path)
    return path


def _fetch(published: PublishedWeights, path: Path) -> None:
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
            f"Could not download {published.url} to {path.parent} ({reason}). Call again to resume "
            f"the download, put the file at {path}, or pass checkpoint='PATH'."
        ) from error
    found = file_digest(partial)
    if found != published.sha256:
        partial.unlink()
        if resumed:  # the partial file may belong to another version
            return _fetch(published, path)
        raise ValueError(
            f"{published.url}: the received file has sha256 {found}, expected {published.sha256}; "
            "it was deleted. Try again, and check for a proxy that replaces the file."
        )
    os.replace(partial, path)


def _receive(url: str, partial: Path, report: Callable[[int, int | None], None]) -> None:
    """Receive the rest of a file, or all of it if the server does not support ranges."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "sam-gym"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        # 416: nothing is left to receive. The checksum tells whether the file is right.
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
class DownloadConfig:
    """Download published weights to SAM_GYM_HOME/checkpoints. Interrupted downloads resume.

    Without names, list all published weights and where they are.
    """

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(help=f"Backbones: {', '.join(published_weights())}."),
    ] = ()


def main(config: DownloadConfig) -> None:
    """Download the checkpoints of the named backbones and print their paths."""
    for name in config.names:
        default_path(name)
    for name in config.names:
        print(f"{name}: {published_checkpoint(name)}")
    if not config.names:
        for name, weights in published_weights().items():
            path = default_path(name)
            absent = f"not here; {weights.url} ({weights.megabytes:,} MB)"
            print(f"{name}: {path if path.is_file() else absent}")


if __name__ == "__main__":
    from sam_gym.utils import cli

    cli.run(
        lambda: main(cli.parse(DownloadConfig, "python -m sam_gym.backbones.download")),
        "Run the same command again to resume.",
    )
