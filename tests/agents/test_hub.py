"""Agents to and from a hub: one that runs here and speaks what huggingface_hub asks for."""

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants, file_download

from agents import train_ppo
from agents.evaluate import PolicyAgent, evaluate
from agents.hub import RUN_FILES, Pull, Push, Run, main, model_card, pull, push
from sam_gym.backbones.loading import BACKBONES
from sam_gym.envs.click import SamSegConfig
from sam_gym.utils import cli

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
            repo = self.repos[name]
            repo.commits.append(repo.commits[-1] | added)
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


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    arguments: Callable[..., list[str]],
    build_tiny: Callable[[], Any],
) -> Path:
    """What a short run of train_ppo leaves."""
    out = tmp_path_factory.mktemp("trained") / "ppo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "tiny", build_tiny)
        short = ("--total-timesteps", "32", "--eval-every", "32", "--checkpoint-every", "32")
        train_ppo.main(arguments(out, *short, "--max-steps", "2"))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run's folder, to be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def pushed(run: Path, repo: str = "me/clicker", **more: Any) -> str:
    return push(Push(str(run), repo, **more))


def test_what_is_pulled_is_what_was_pushed(
    hub: type[Hub], run: Path, tiny_env: dict[str, Any], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    url = pushed(run)
    repo = hub.repos["me/clicker"]
    assert not repo.private and len(repo.commits) == 2 and url.endswith(repo.sha(1))
    assert set(repo.commits[1]) == {".gitattributes", "README.md", *RUN_FILES}
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    path = pull(Pull("me/clicker"))
    assert str(path).startswith(str(tmp_path / "cache"))
    copied = pull(Pull("me/clicker", out=str(tmp_path / "out")))
    assert copied == tmp_path / "out" / "policy.zip"
    for name in RUN_FILES:
        assert (path.parent / name).read_bytes() == (copied.parent / name).read_bytes()
        if name != "results.json":
            assert (path.parent / name).read_bytes() == (run / name).read_bytes()
    got, sent = (json.loads((at / "results.json").read_text()) for at in (path.parent, run))
    assert set(sent["config"]) - set(got["config"]) >= {"out", "resume", "mlflow_uri"}
    assert got | {"config": None} == sent | {"config": None}

    settings = SamSegConfig(obs="handle", split="test", **tiny_env)
    agents = [PolicyAgent.load(name, "cpu") for name in (run / "policy.zip", "hf://me/clicker")]
    first, second = (evaluate(agent, settings, episodes=6, num_envs=3) for agent in agents)
    assert np.array_equal(first.ious, second.ious) and first.targets == second.targets


def test_a_revision_is_an_agent_of_its_own(
    hub: type[Hub], run: Path, tiny_env: dict[str, Any]
) -> None:
    pushed(run)
    (run / "policy.zip").write_bytes((run / "policy.zip").read_bytes() + b"newer")
    pushed(run)
    repo = hub.repos["me/clicker"]
    assert [len(commit) for commit in repo.commits] == [1, 6, 6]
    newest, oldest = pull(Pull("me/clicker")), pull(Pull("me/clicker", repo.sha(1)))
    assert newest.read_bytes() == oldest.read_bytes() + b"newer"
    assert PolicyAgent.load(f"hf://me/clicker@{repo.sha(1)}", "cpu")
    with pytest.raises(FileNotFoundError, match=r"me/clicker: .* no such revision"):
        pull(Pull("me/clicker", "next"))


def test_the_card_says_what_results_say(run: Path, hub: type[Hub]) -> None:
    path = pushed(run, card_only=True)
    assert path == str(run / "README.md") and hub.asked == []
    card, results = ModelCard.load(path), json.loads((run / "results.json").read_text())
    (measured,) = card.data.eval_results or []
    assert (measured.metric_type, measured.metric_value) == (
        "mean_iou",
        results["agent"]["mean_iou"],
    )
    assert measured.dataset_split == "test" and measured.dataset_type == "scenes"
    assert card.data.license == "apache-2.0" and card.data.library_name == "sam-gym"
    assert {"reinforcement-learning", "stable-baselines3", "sam-gym"} <= set(card.data.tags or [])
    for name in ("random", "center", "confident"):
        row = results[name]
        assert f"| {name} | {row['mean_iou']:.3f} ± {row['ci95']:.3f} | 2.0 |" in card.text
    assert "**this agent**" in card.text and f"**{results['gap_closed']:.2f}**" in card.text
    assert "annotate --policy hf://me/clicker" in card.text and "cross, fish" in card.text
    assert "which training never saw" in card.text
    # Nothing tells where the run was, and its settings can be trained with again.
    assert str(run.parent) not in card.text and "tiny.pth" in card.text
    config = run.parent / "config.yaml"
    config.write_text(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert train_ppo.read_config(["--config", str(config)]).total_timesteps == 32


def test_the_card_of_other_kinds_of_agents(run: Path) -> None:
    made = Run.read(run)
    config = made.results["config"]
    config["env_config"] |= {"target": "instance", "dataset": "coco", "checkpoint": None}
    config |= {"policy": "explicit", "clip": "ViT-B-16"}
    made.results.update(gap_closed=None, held_out_split="train")
    text = model_card(made, "me/clicker", "mit")
    assert "agents.evaluate --policy hf://me/clicker --target instance --dataset coco" in text
    assert "told in words, through the CLIP `ViT-B-16`" in text and "no gap to close" in text
    for said in ("procedural", "same path", "never saw"):
        assert said not in text
    assert "license: mit" in text


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_that_lacks_a_file_is_not_pushed(hub: type[Hub], run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in this folder"):
        pushed(run)
    assert hub.asked == []


def test_what_is_no_run_is_not_pushed(hub: type[Hub], run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        pushed(run / "nowhere")
    with pytest.raises(ValueError, match="'clicker' cannot be a repo.*USER/NAME"):
        pushed(run, "clicker")
    (run / "results.json").write_text('{"agent": {}, "config": {}}')
    with pytest.raises(ValueError, match=r"results.json: not what train_ppo .* 'env'"):
        pushed(run)
    (run / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json: not readable"):
        pushed(run)
    assert hub.asked == []


def test_a_damaged_policy_is_not_pushed(hub: type[Hub], run: Path) -> None:
    (run / "policy.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"policy.zip: not a readable policy"):
        pushed(run)
    assert hub.asked == []


def test_repos_that_are_not_pushed_to(hub: type[Hub], run: Path) -> None:
    other = {"config.json": b"{}", "model.safetensors": b"", ".gitattributes": b""}
    hub.repos["me/bert"] = Repo(commits=[other])
    with pytest.raises(FileExistsError, match=r"me/bert holds .*config.json.*Choose another"):
        pushed(run, "me/bert")
    assert hub.repos["me/bert"].commits == [other]
    hub.repos["me/blank"] = Repo(commits=[{".gitattributes": b"", "README.md": b"soon"}])
    with pytest.raises(FileExistsError, match="me/blank exists and is public"):
        pushed(run, "me/blank", private=True)
    assert len(hub.repos["me/blank"].commits) == 1
    pushed(run, "me/blank")
    assert len(hub.repos["me/blank"].commits) == 2


def test_tokens(hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(run, private=True)
    assert hub.repos["me/clicker"].private
    assert pull(Pull("me/clicker")).is_file()
    hub.asked.clear()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="No token of the hub: run `hf auth login`"):
        pushed(run)
    assert hub.asked == []
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(FileNotFoundError, match="no such repo, or it is private"):
        PolicyAgent.load("hf://me/clicker")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for refused in (lambda: pushed(run), lambda: pull(Pull("me/clicker"))):
        with pytest.raises(PermissionError, match=r"refuses \(401: .*HF_TOKEN") as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_no_agent_there(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="me/none: .* no such repo") as caught:
        pull(Pull("me/none"))
    assert "\n" not in str(caught.value)
    hub.repos["me/bert"] = Repo(commits=[{"config.json": b"{}"}])
    with pytest.raises(FileNotFoundError, match=r"me/bert holds no policy.zip"):
        pull(Pull("me/bert", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected USER/NAME"):
        PolicyAgent.load("hf://bert")


def test_nobody_answers(no_hub: str, run: Path) -> None:
    for call in (lambda: pushed(run), lambda: pull(Pull("me/clicker"))):
        with pytest.raises(ConnectionError, match=f"{no_hub} could not be reached") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_cache_serves_while_nobody_answers(
    hub: type[Hub], run: Path, request: pytest.FixtureRequest
) -> None:
    pushed(run)
    path = pull(Pull("me/clicker"))
    request.getfixturevalue("no_hub")
    assert pull(Pull("me/clicker")) == path


def test_the_command_in_another_process(hub: type[Hub], run: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    settings = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": home, "HF_HUB_CACHE": home}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agents.hub", *arguments],
            env=os.environ | settings | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )

    done = command("push", "--run", str(run), "--repo", "me/clicker", "--private")
    assert done.returncode == 0 and "its name is hf://me/clicker" in done.stdout
    assert hub.repos["me/clicker"].private
    done = command("pull", "--repo", "me/clicker")
    path = Path(done.stdout.strip())
    assert path.read_bytes() == (run / "policy.zip").read_bytes()
    failed = command("pull", "--repo", "me/none")
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("error: me/none: ")
    assert "Traceback" not in failed.stderr


def test_the_command_line(hub: type[Hub], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", "--run", str(run), "--repo", "me/clicker", "--card-only"])
    assert "nothing was uploaded" in capsys.readouterr().out and hub.repos == {}
    with pytest.raises(SystemExit, match="error: me/clicker: .* no such repo"):
        cli.run(lambda: main(["pull", "--repo", "me/clicker"]))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "hf://USER/NAME@REVISION" in capsys.readouterr().out
