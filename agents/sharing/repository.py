"""A model repository of the hub that holds an agent: its names, and errors on the way to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Prefix of the names of policies on the hub.
PREFIX = "hf://"
POLICY, RESULTS, CARD = "policy.zip", "results.json", "README.md"
#: Calibration of an agent's presence score, which not every agent has.
PRESENCE = "presence.json"
#: Pictures of a training run: its curve, the IoU after each step of final episodes, and a film.
CURVE, STEPS, FILM = "learning_curve.png", "iou_after_steps.png", "episodes.gif"
#: That of a run over a stream of domains.
FORGETTING = "forgetting.png"
#: Pictures that a repository holds, unless the run drew none.
PICTURES = (CURVE, FILM)
#: Files of a training run that a repository holds, beside the card.
RUN_FILES = (POLICY, RESULTS, *PICTURES)
#: Tag of the repositories that hold an agent of sam-gym.
TAG = "sam-gym"


def is_card(path: Path) -> bool:
    """Return whether a file is a model card of this package."""
    return path.is_file() and f"library_name: {TAG}" in path.read_text(errors="replace")


def check_repo_name(repo: str) -> None:
    """Raise `ValueError` unless a name has the form USER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, flags=re.ASCII):
        raise ValueError(f"{repo!r} cannot be a repo of the hub: expected USER/NAME.")


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client into builtin errors with a message of one line.

    Raises:
        FileNotFoundError: the repository or revision does not exist.
        PermissionError: the token may not do this.
        ConnectionError: the hub cannot be reached, or fails.
        ValueError: the client refuses an argument.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The base class of the hub's errors belongs to its HTTP client, which varies by version.
    client_errors: Any = HfHubHTTPError.__bases__
    try:
        yield
    except (OSError, ValueError, RuntimeError, *client_errors) as error:
        not_cached = isinstance(error, LocalEntryNotFoundError)
        cause = error.__cause__ if not_cached and error.__cause__ is not None else error
        raise _plain_error(repo, cause) from error


def _plain_error(repo: str, error: BaseException) -> Exception:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, message = constants.ENDPOINT, " ".join(str(error).split())
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo}: {hub} has no such revision of it.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo}: {hub} has no such repo, or it is private and your token (`hf auth login`, "
            "HF_TOKEN) may not see it."
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        message = error.server_message or message
        if status in (401, 403):
            return PermissionError(
                f"{repo}: {hub} refuses ({status}: {message}). Run `hf auth login`, or set "
                "HF_TOKEN to a token that may do this."
            )
        return ConnectionError(f"{repo}: {hub} fails ({status}: {message}).")
    if isinstance(error, ValueError):
        return ValueError(f"{repo}: {message}")
    return ConnectionError(
        f"{repo}: {hub} could not be reached, or the transfer was interrupted "
        f"({type(error).__name__}: {message})."
    )
