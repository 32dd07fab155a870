"""Upload agents to the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.sharing.card import model_card
from agents.sharing.repository import (
    CARD,
    PICTURES,
    POLICY,
    PREFIX,
    PRESENCE,
    RESULTS,
    TAG,
    check_repo_name,
    hub_errors,
    is_card,
)
from agents.sharing.run import TrainingRun
from sam_gym.utils.fields import documented
from sam_gym.utils.files import write_atomic

#: Files that a repo may hold before the first push.
_INITIAL_FILES = {".gitattributes", CARD}


@documented
@dataclass
class HubPushConfig:
    """Write a model card and upload a run, as one commit, to a model repo of the hub.

    Creates the repo if necessary, and refuses one that holds anything but an agent. Options in
    results.json and in the card are uploaded without folders and servers; policy.zip is uploaded
    unchanged, with the path of a backbone's checkpoint if the run had one, and presence.json, the
    calibration of its presence score, if it has one.
    """

    run: str
    """Folder of a finished run of train_ppo."""
    repo: str
    """USER/NAME of the repo."""
    private: bool = False
    """Make the repo private."""
    license: str = "apache-2.0"
    """License of the agent, by its name on the hub."""
    card_only: bool = False
    """Write the card to README.md in the run's folder, to review it, and upload nothing."""


def push(config: HubPushConfig) -> str:
    """Upload a run, or only write its card; returns the URL of the commit, or the card's path.

    Raises:
        ValueError: the name of the repo is malformed, the run's files are damaged, or agents of its
            environment cannot be shared.
        FileNotFoundError: the run lacks a file.
        FileExistsError: the repo holds something else, or is public and should be private; or the
            card would replace another README.md.
        PermissionError: there is no token, or the hub refuses it.
        ConnectionError: the hub cannot be reached, or fails.
    """
    check_repo_name(config.repo)
    run = TrainingRun.read(Path(config.run))
    card = model_card(run, config.repo, config.license)
    if config.card_only:
        path = run.folder / CARD
        if path.exists() and not is_card(path):
            raise FileExistsError(f"{path} is no model card of sam-gym. Rename it.")
        write_atomic(path, card)
        print(f"Wrote {path}; nothing was uploaded.")
        return str(path)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    from agents.annotation.presence import Calibration

    if get_token() is None:
        raise PermissionError(
            "No token of the hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    api = HfApi()
    results = run.results | {"config": run.config}
    contents: dict[str, Any] = {name: run.folder / name for name in (POLICY, *run.pictures)}
    contents |= {
        CARD: card.encode(errors="backslashreplace"),
        RESULTS: json.dumps(results, indent=2).encode(),
    }
    if Calibration.read(run.folder / POLICY) is not None:  # of this policy, else it raises
        contents[PRESENCE] = run.folder / PRESENCE
    present = _check_target(api, config)
    operations: list[Any] = [CommitOperationAdd(*own) for own in contents.items()]
    for name in (PRESENCE, *PICTURES):
        if name in present and name not in contents:  # of an earlier agent
            operations.append(CommitOperationDelete(name))
    with hub_errors(config.repo):
        # None leaves the choice to the defaults of the organisation.
        api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        commit = api.create_commit(
            config.repo,
            operations,
            commit_message=f"Agent with a mean IoU of {run.results['agent']['mean_iou']:.3f}",
        )
    print(f"Pushed to {commit.commit_url}; its name is {PREFIX}{config.repo}.")
    return str(commit.commit_url)


def _check_target(api: Any, config: HubPushConfig) -> set[str]:
    """Return the files of the repo; raise `FileExistsError` if it must not be pushed to."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(config.repo):
        try:
            info = api.model_info(config.repo)
        except RepositoryNotFoundError:
            return set()
    present = {file.rfilename for file in info.siblings or []}
    files = sorted(present - _INITIAL_FILES)
    if files and TAG not in (info.tags or []):
        raise FileExistsError(
            f"{config.repo} holds something other than an agent of sam-gym ({files[0]}, ...). "
            "Choose another --repo."
        )
    if config.private and not info.private:
        raise FileExistsError(
            f"{config.repo} exists and is public. Make it private there, or leave out --private."
        )
    return present
