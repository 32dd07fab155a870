"""A CLIP with random weights, tiny training runs and their outcomes, and a local hub."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from huggingface_hub import constants, file_download
from stable_baselines3.common.save_util import load_from_zip_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.clip.train import ClipTrainer, TrainClipConfig

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_clip_micro` writes, untrained: 64 x 64 input, a grid of 8 x 8 patches."""
    folder = tmp_path_factory.mktemp("clip") / "clip_micro"
    with torch.random.fork_rng():
        trainer = ClipTrainer(
            TrainClipConfig(image_size=64, width=32, layers=2), torch.device("cpu")
        )
    trainer.export(folder, surgical_blocks=1)
    return folder


@pytest.fixture(scope="session")
def arguments(tiny_checkpoint: str) -> Callable[..., list[str]]:
    """Arguments of a run of six rollouts into a folder, over the tiny SAM; later ones override.

    Without pictures, which take as long as the rest.
    """

    def arguments(out: Path, *more: str) -> list[str]:
        # Other environments have data of other kinds.
        small = () if "--env" in more else ("--dataset-kwargs", "size", "64")
        return [
            "--no-pictures",
            *small,
            *("--out", str(out), "--backbone", "tiny", "--checkpoint", tiny_checkpoint),
            *("--device", "cpu", "--train-images", "8", "--num-envs", "4", "--n-steps", "8"),
            *("--batch-size", "16", "--n-epochs", "2", "--total-timesteps", "192"),
            *("--checkpoint-every", "64"),
            *("--eval-every", "64", "--eval-episodes", "2", "--final-episodes", "2", *more),
        ]

    return arguments


@pytest.fixture(scope="session")
def start_training(start_script: Callable[..., Any]) -> Callable[..., Any]:
    """Starts `train_tiny.py` with arguments, and with more environment variables as keywords."""
    return partial(start_script, str(HERE / "train_tiny.py"))


def learned(out: Path) -> dict[str, torch.Tensor]:
    """All parameters and the optimizer's moments, by name."""
    _, parameters, _ = load_from_zip_file(out / "policy.zip", device="cpu", load_data=False)
    moments = parameters["policy.optimizer"]["state"]
    return parameters["policy"] | {
        f"optimizer.{number}.{name}": value
        for number, state in moments.items()
        for name, value in state.items()
    }


def logged(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for times."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/")
    }


def reported(out: Path) -> dict[str, Any]:
    """results.json, but for times and settings."""
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in _VARYING}


_VARYING = ("training_seconds", "total_seconds", "config")


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """Everything that a run has learned, logged and reported."""
    return lambda out: {
        "learned": learned(out),
        "logged": logged(out),
        "reported": reported(out),
    }


@pytest.fixture(scope="session")
def assert_same(outcome: Callable[[Path], dict[str, Any]]) -> Callable[[Path, Path], None]:
    """Asserts that two runs came to the same, to the last bit."""

    def assert_same(out: Path, expected: Path) -> None:
        got, wanted = outcome(out), outcome(expected)
        torch.testing.assert_close(got["learned"], wanted["learned"], rtol=0, atol=0)
        assert got["logged"] == wanted["logged"]
        assert got["reported"] == wanted["reported"]

    return assert_same


TOKEN = "hf_secret"


@dataclass
class Repo:
    """A model repo: its commits, the oldest first, each with all of its files."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    def sha(self, number: int) -> str:
        content = json.dumps([number, *sorted(self.commits[number])])
        return hashlib.sha1(content.encode()).hexdigest()

    def at(self, revision: str) -> int | None:
        """Number of the commit of a branch or hash."""
        shas = [self.sha(number) for number in range(len(self.commits))]
        if revision == "main":
            return len(shas) - 1
        return shas.index(revision) if revision in shas else None


class Hub(BaseHTTPRequestHandler):
    """The requests that a push and a pull consist of."""

    protocol_version = "HTTP/1.1"
    Repo = Repo
    repos: dict[str, Repo]
    asked: list[str]

    def log_message(self, *args: Any) -> None: ...

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, message: str, **headers: str) -> None:
        self.answer({"error": message}, status, X_Error_Message=message, **headers)

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, name: str, revision: str) -> tuple[Repo, int] | None:
        """The repo and the number of the commit, or an error has been answered."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and not self.may_write):
            self.fail(404, "Repository not found", X_Error_Code="RepoNotFound")
            return None
        number = repo.at(revision)
        if number is None:
            self.fail(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
            return None
        return repo, number

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            return self.fail(401, "Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
            found = self.find(name, rest[1] if len(rest) > 1 else "main")
            if found is not None:
                tree = rest[:1] == ["tree"]
                self.answer(self.tree(*found) if tree else self.info(name, *found))
        elif parts[2:3] == ["resolve"]:
            found = self.find("/".join(parts[:2]), parts[3])
            if found is not None:
                repo, number = found
                content = repo.commits[number]["/".join(parts[4:])]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(content, ETag=etag, X_Repo_Commit=repo.sha(number))
        else:
            self.fail(404, "Nothing here")

    do_HEAD = do_GET

    def info(self, name: str, repo: Repo, number: int) -> dict[str, Any]:
        files = repo.commits[number]
        _, _, card = files.get("README.md", b"").decode().partition("---\n")
        metadata = yaml.safe_load(card.partition("---\n")[0]) or {}
        return {
            "id": name,
            "sha": repo.sha(number),
            "private": repo.private,
            "tags": metadata.get("tags", []),
            "siblings": [{"rfilename": file} for file in files],
        }

    def tree(self, repo: Repo, number: int) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for path, content in repo.commits[number].items()
        ]

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.may_write:
            return self.fail(401, "Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            valid = json.loads(body)["content"].startswith("---\n")
            errors = [] if valid else [{"message": "no metadata"}]
            self.answer({"errors": errors, "warnings": []}, 200 if valid else 400)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private", False)
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, Repo(private))
            self.answer({"url": f"{constants.ENDPOINT}/{name}"}, status)
        elif parts[4:5] == ["preupload"]:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file} | modes for file in files]})
        else:
            assert parts[4:] == ["commit", "main"]
            name = "/".join(parts[2:4])
            lines = [json.loads(line) for line in body.splitlines()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            gone = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
            repo = self.repos[name]
            kept = {file: own for file, own in repo.commits[-1].items() if file not in gone}
            repo.commits.append(kept | added)
            sha = repo.sha(len(repo.commits) - 1)
            url = f"{constants.ENDPOINT}/{name}/commit/{sha}"
            self.answer({"commitUrl": url, "commitOid": sha})


def use_endpoint(patch: pytest.MonkeyPatch, url: str) -> None:
    patch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Before 1.0, huggingface_hub copied it when it was imported.
    patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that runs, with an empty cache and a token that may write."""
    handler: type[Hub] = type("Handler", (Hub,), {"repos": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_hub(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's address, where nobody answers any more."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    use_endpoint(monkeypatch, url)
    return url
