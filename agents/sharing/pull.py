"""Download agents from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.policies.saved import SHIPPED
from agents.sharing.repository import (
    CARD,
    POLICY,
    PREFIX,
    PRESENCE,
    RUN_FILES,
    check_repo_name,
    hub_errors,
)
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_atomic
from sam_gym.utils.runs import refuse_finished, remove_files

#: Type of an option that names a policy, as `local_policy` takes it.
PolicyOption = Annotated[
    str,
    tyro.conf.arg(
        help="Path of a policy.zip that train_ppo wrote, hf://USER/NAME[@REVISION], or a bundled "
        f"agent: {', '.join(SHIPPED)}."
    ),
]


@documented
@dataclass
class HubPullConfig:
    """Download an agent and print the path of its policy.zip.

    Files in the hub's cache are not downloaded again, and are used while the hub is unreachable.
    """

    repo: str
    """USER/NAME of the repo."""
    revision: str | None = None
    """Branch, tag or commit (None: main)."""
    out: str | None = None
    """Folder to copy the files to (None: none; the files stay in the hub's cache)."""
    overwrite: bool = False
    """Replace the agent in `out`. Without --overwrite, an agent in `out` is an error."""


def pull(config: HubPullConfig) -> Path:
    """Download an agent; returns the path of its policy.zip.

    Raises:
        ValueError: the name of the repo is malformed, or `out` cannot be written to.
        FileExistsError: `out` holds an agent.
        FileNotFoundError: the repo or revision does not exist, or holds no agent.
        PermissionError: the hub refuses the token.
        ConnectionError: the hub cannot be reached, or fails, and the cache has no copy.
    """
    files = [*RUN_FILES, PRESENCE, CARD]
    check_repo_name(config.repo)
    if config.out is not None and not config.overwrite:
        refuse_finished(Path(config.out).expanduser(), POLICY)
    folder = _download(config.repo, config.revision, files)
    if config.out is not None:
        out = make_folder(config.out)
        remove_files(out, files)
        for name in files:
            if (folder / name).is_file():
                write_atomic(out / name, (folder / name).read_bytes())
        folder = out
    print(folder / POLICY)
    return folder / POLICY


def local_policy(policy: str | Path) -> Path:
    """Return the local path of a policy, downloading it from the hub if necessary.

    Args:
        policy: name of a bundled agent (`SHIPPED`), hf://USER/NAME[@REVISION], or a path, which is
            returned unchanged.

    Raises:
        ValueError, OSError: as of `pull`.
    """
    name = str(policy)
    if name in SHIPPED:
        return SHIPPED[name]
    if name.startswith(PREFIX):
        repo, _, revision = name.removeprefix(PREFIX).partition("@")
        return _download(repo, revision or None, [POLICY, PRESENCE]) / POLICY
    return Path(policy)


def _download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Return a folder of the hub's cache with the files that exist, policy.zip among them."""
    from huggingface_hub import snapshot_download

    check_repo_name(repo)
    with hub_errors(repo):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    if not (folder / POLICY).is_file():
        raise FileNotFoundError(f"{repo} holds no {POLICY}: it is no agent of sam-gym.")
    return folder
