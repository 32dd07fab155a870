"""Trained agents to and from the Hugging Face hub.

    python -m agents.hub push --run runs/ppo --repo USER/NAME --card-only
    python -m agents.hub push --run runs/ppo --repo USER/NAME
    python -m agents.hub pull --repo USER/NAME

Whatever takes the path of a policy.zip takes hf://USER/NAME or hf://USER/NAME@REVISION too. The
hub's own settings hold: a token of `hf auth login` or HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import tyro
import yaml

from agents.policies.saved import SHIPPED, read_data
from agents.ppo.config import with_present_names
from agents.tasks import task_of
from sam_gym.metrics.masks import with_interval
from sam_gym.utils import cli
from sam_gym.utils.files import write_atomic

#: Names of policies that begin with this are on the hub.
PREFIX = "hf://"
POLICY, RESULTS, CARD = "policy.zip", "results.json", "README.md"
#: What train_ppo leaves and a repo holds, beside the card.
RUN_FILES = (POLICY, RESULTS, "learning_curve.png", "episodes.gif")
#: The tag that tells a repo of this kind.
TAG = "sam-gym"
#: Files that a repo may hold before the first push.
_BLANK = {".gitattributes", CARD}


@dataclass
class Push:
    """Write a model card and upload a run, as one commit, to a model repo of the hub.

    The repo is made if there is none. One that holds anything but an agent is left alone. The
    settings in results.json and in the card are without folders and servers; policy.zip is uploaded
    as it is, with the path of a backbone's checkpoint if it was given one.
    """

    run: str
    """Folder of a finished run of train_ppo."""
    repo: str
    """USER/NAME of the repo."""
    private: bool = False
    """Make the repo private."""
    license: str = "apache-2.0"
    """Licence of the agent, by its name on the hub."""
    card_only: bool = False
    """Write the card to README.md of the run's folder, to be read first, and upload nothing."""


@dataclass
class Pull:
    """Download an agent and print the path of its policy.zip.

    What is in the cache is not downloaded again, and serves while the hub cannot be reached.
    """

    repo: str
    """USER/NAME of the repo."""
    revision: str | None = None
    """Branch, tag or commit (default: main)."""
    out: str | None = None
    """Folder to copy the files to (default: they stay in the hub's cache)."""


@dataclass(frozen=True)
class Run:
    """A finished run of train_ppo.

    Attributes:
        folder: where it is.
        results: of its results.json.
        features: what the policy's features were made with, as far as that is plain.
    """

    folder: Path
    results: dict[str, Any]
    features: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read and check a run's folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: policy.zip or results.json is damaged.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder. Pass that of a run of train_ppo.")
        for name in RUN_FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder}: no {name} in this folder. A run of train_ppo writes it at its end."
                )
        try:
            results = json.loads((folder / RESULTS).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / RESULTS}: not readable ({error}).") from error
        arguments = read_data(folder / POLICY).get("policy_kwargs", {})
        features = arguments.get("features")
        return cls(folder, results, features if isinstance(features, dict) else {})


def local_policy(policy: str | Path) -> Path:
    """Path of a policy: of an agent in the package, or on the hub (downloaded if need be).

    Args:
        policy: a name in `SHIPPED`, `hf://USER/NAME[@REVISION]`, or a path, which is given back.

    Raises:
        ValueError, OSError: as `pull`.
    """
    name = str(policy)
    if name in SHIPPED:
        return SHIPPED[name]
    if name.startswith(PREFIX):
        repo, _, revision = name.removeprefix(PREFIX).partition("@")
        return _snapshot(repo, revision or None, [POLICY]) / POLICY
    return Path(policy)


def pull(config: Pull) -> Path:
    """Download an agent; returns the path of its policy.zip.

    Raises:
        ValueError: the name of the repo cannot be one.
        FileNotFoundError: there is no such repo or revision, or it holds no agent.
        PermissionError: the hub wants another token.
        ConnectionError: the hub cannot be reached, or fails, and the cache has no copy.
    """
    files = [*RUN_FILES, CARD]
    folder = _snapshot(config.repo, config.revision, files)
    if config.out is not None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            if (folder / name).is_file():
                write_atomic(out / name, (folder / name).read_bytes())
        folder = out
    print(folder / POLICY)
    return folder / POLICY


def _snapshot(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Folder in the cache with some files of an agent, of which policy.zip is sure to be there."""
    from huggingface_hub import snapshot_download

    _check_name(repo)
    with _plain_errors(repo):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    if not (folder / POLICY).is_file():
        raise FileNotFoundError(f"{repo} holds no {POLICY}: it is no agent of sam-gym.")
    return folder


def push(config: Push) -> str:
    """Upload a run, or only write its card; returns the address of the commit, or the card's path.

    Raises:
        ValueError: the name of the repo cannot be one, or the run's files are damaged.
        FileNotFoundError: the run lacks a file.
        FileExistsError: the repo holds something else, or is public and should be private.
        PermissionError: there is no token, or the hub wants another.
        ConnectionError: the hub cannot be reached, or fails.
    """
    _check_name(config.repo)
    run = Run.read(Path(config.run))
    card = model_card(run, config.repo, config.license)
    if config.card_only:
        path = write_atomic(run.folder / CARD, card)
        print(f"Wrote {path}; nothing was uploaded.")
        return str(path)
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise PermissionError(
            "No token of the hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    api = HfApi()
    contents: dict[str, Any] = {name: run.folder / name for name in RUN_FILES}
    results = run.results | {"config": _shareable(run.results["config"])}
    contents |= {CARD: card.encode(), RESULTS: json.dumps(results, indent=2).encode()}
    _check_free(api, config)
    with _plain_errors(config.repo):
        # None: as the organisation wants it.
        api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        commit = api.create_commit(
            config.repo,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=f"Agent with a mean IoU of {run.results['agent']['mean_iou']:.3f}",
        )
    print(f"Pushed to {commit.commit_url}; its name is {PREFIX}{config.repo}.")
    return str(commit.commit_url)


def _check_name(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, flags=re.ASCII):
        raise ValueError(f"{repo!r} cannot be a repo of the hub: expected USER/NAME.")


def _check_free(api: Any, config: Push) -> None:
    """Raise `FileExistsError` for a repo that an agent must not be pushed to."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with _plain_errors(config.repo):
        try:
            info = api.model_info(config.repo)
        except RepositoryNotFoundError:
            return
    files = sorted({file.rfilename for file in info.siblings or []} - _BLANK)
    if files and TAG not in (info.tags or []):
        raise FileExistsError(
            f"{config.repo} holds something other than an agent of sam-gym ({files[0]}, ...). "
            "Choose another --repo."
        )
    if config.private and not info.private:
        raise FileExistsError(
            f"{config.repo} exists and is public. Make it private there, or leave out --private."
        )


@contextmanager
def _plain_errors(repo: str) -> Iterator[None]:
    """Say in one line what can go wrong between here and the hub."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The base of the hub's errors is that of its HTTP client, which differs between its versions.
    of_client: Any = HfHubHTTPError.__bases__
    try:
        yield
    except (OSError, ValueError, RuntimeError, *of_client) as error:
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

    hub, said = constants.ENDPOINT, " ".join(str(error).split())
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo}: {hub} has no such revision of it.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo}: {hub} has no such repo, or it is private and your token (`hf auth login`, "
            "HF_TOKEN) may not see it."
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or said
        if status in (401, 403):
            return PermissionError(
                f"{repo}: {hub} refuses ({status}: {said}). Run `hf auth login`, or set HF_TOKEN "
                "to a token that may do this."
            )
        return ConnectionError(f"{repo}: {hub} fails ({status}: {said}).")
    if isinstance(error, ValueError):
        return ValueError(f"{repo}: {said}")
    reason = f"{type(error).__name__}: {said}"
    return ConnectionError(
        f"{repo}: {hub} could not be reached, or the transfer broke off ({reason})."
    )


def model_card(run: Run, repo: str, license: str) -> str:
    """The model card of a run, as the hub shows it: YAML, then Markdown.

    Args:
        run: what it is about.
        repo: USER/NAME of the repo that it will be in.
        license: of the agent, by its name on the hub.

    Raises:
        ValueError: results.json lacks something that train_ppo writes.
    """
    try:
        return _model_card(run, repo, license)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run.folder / RESULTS}: not what train_ppo writes ({type(error).__name__}: {error})."
        ) from error


def _model_card(run: Run, repo: str, license: str) -> str:
    results, name = run.results, repo.partition("/")[2]
    config = with_present_names(results["config"], str(run.folder / RESULTS))
    task, split = task_of(config["env"]), results["held_out_split"]
    task.require("hub")
    facts = task.card_facts(_shareable(config), run.features, results, f"{PREFIX}{repo}")
    measured = {
        "task": {"type": "reinforcement-learning", "name": facts.task_name},
        "dataset": {
            "name": f"{config['env']} on {facts.dataset}",
            "type": facts.dataset,
            "split": split,
        },
        "metrics": [
            {"type": "mean_iou", "name": "mean IoU", "value": results["agent"]["mean_iou"]}
        ],
    }
    metadata = {
        "license": license,
        "library_name": TAG,
        "pipeline_tag": "reinforcement-learning",
        "tags": ["reinforcement-learning", "stable-baselines3", TAG, "segment-anything"],
        "model-index": [{"name": name, "results": [measured]}],
    }
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=name,
        env=config["env"],
        summary=facts.summary,
        facts=_as_list(facts.facts),
        episodes=results["agent"]["episodes"],
        split=split,
        dataset=facts.dataset,
        unseen="" if split == config["env_config"]["split"] else ", which training never saw",
        counts="".join(f" {count} |" for count in facts.counts),
        rule="---|" * len(facts.counts),
        rows="\n".join(_rows(results, facts.counts)),
        gap=_gap(results["gap_closed"]),
        command=facts.command,
        policy=f"{PREFIX}{repo}",
        config=yaml.safe_dump(_shareable(config), sort_keys=False).rstrip(),
        limits=_as_list(facts.limits),
        license=license,
    )


_CARD = """---
{metadata}---

# {name}

{summary} It was trained with PPO (stable-baselines3) on `{env}` of sam-gym.

![Episodes on held-out images](episodes.gif)

{facts}

## Results

Mean IoU at the size of the image, with its 95% interval, over {episodes} episodes on the `{split}`
split of `{dataset}`{unseen}. All play the same episodes under the same rules.

| | mean IoU |{counts}
|---|---|{rule}
{rows}

{gap}

![Learning curve](learning_curve.png)

## Use

```
{command}
```

```python
from agents.evaluate import PolicyAgent

agent = PolicyAgent.load("{policy}")
```

`PolicyAgent.load` rebuilds the policy from names, numbers and weights: no code that policy.zip may
hold runs. `PPO.load` of stable-baselines3 unpickles all of it, which runs code of whoever made the
file: do that only with files of people whom you trust.

## Training

`python -m agents.train_ppo --config FILE.yaml` with this file (absolute paths are cut to their last
part):

```yaml
{config}
```

## Limits

{limits}

## Licence

{license}, for what is in this repo. The weights of SAM and the data have licences of their own.
"""


def _as_list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _rows(results: Mapping[str, Any], counts: Sequence[str]) -> list[str]:
    """A line of the table for the agent and each baseline, the best first."""
    players = {
        name: row for name, row in results.items() if isinstance(row, dict) and "mean_iou" in row
    }
    shown = {"agent": "**this agent**", "oracle": "oracle (sees the truth)"}
    lines = []
    for name, row in sorted(players.items(), key=lambda item: -item[1]["mean_iou"]):
        means = "".join(f" {row[f'mean_{count}']:.1f} |" for count in counts)
        iou = with_interval(row["mean_iou"], row["ci95"])
        lines.append(f"| {shown.get(name, name)} | {iou} |{means}")
    return lines


def _gap(closed: float | None) -> str:
    if closed is None:
        return "The oracle is no better than random here: there is no gap to close."
    return f"Gap closed, (agent - random) / (oracle - random): **{closed:.2f}**, from one seed."


def _last_part(value: str) -> str:
    """A path without the folders that only exist on the machine of the run."""
    return PurePath(value).name if PurePath(value).is_absolute() else value


def _shareable(value: Any) -> Any:
    """Settings without what belongs to one machine or one call."""
    if isinstance(value, dict):
        return {key: _shareable(item) for key, item in value.items() if key not in _NOT_SHARED}
    return _last_part(value) if isinstance(value, str) else value


#: Settings that say where a run wrote and how it was started, not what it was.
_NOT_SHARED = (
    *("out", "resume", "disk"),
    *("mlflow", "mlflow_uri", "mlflow_experiment", "register_model"),
)


def main(args: Sequence[str] | None = None) -> str:
    """The command line."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"push": Push, "pull": Pull},
        prog="python -m agents.hub",
        description=__doc__,
        args=args,
    )
    return push(config) if isinstance(config, Push) else str(pull(config))


if __name__ == "__main__":
    cli.run(main)
