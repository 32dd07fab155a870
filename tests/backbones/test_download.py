"""Downloads against a local server that breaks off, forgets and lies."""

import hashlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from sam_gym.backbones import PublishedWeights, download
from sam_gym.backbones.download import default_path, published_checkpoint, published_weights

CONTENT = np.random.default_rng(0).bytes(3_000_000)


@dataclass
class Server:
    """What the server does, and what it was asked for."""

    content: bytes = CONTENT
    ranges: bool = True
    break_after: int | None = None
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    behaviour = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            behaviour.asked.append(asked)
            start = 0
            if asked and behaviour.ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(behaviour.content):
                    self.send_error(416)
                    return
            self.send_response(206 if asked and behaviour.ranges else 200)
            rest = behaviour.content[start:]
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: behaviour.break_after])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        behaviour.url = f"http://127.0.0.1:{listening.server_port}/sam.pth"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield behaviour
        listening.shutdown()


@pytest.fixture(autouse=True)
def published(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    add_backbone: Callable[..., None],
) -> None:
    monkeypatch.setenv("SAM_GYM_HOME", str(tmp_path))
    entry = PublishedWeights(server.url, hashlib.sha256(CONTENT).hexdigest(), 3)
    add_backbone("vit_b", weights=entry)


def test_downloads_once(server: Server, tmp_path: Path) -> None:
    path = published_checkpoint("vit_b")
    assert path == tmp_path / "checkpoints" / "sam.pth"
    assert path.read_bytes() == CONTENT
    assert published_checkpoint("vit_b") == path
    assert server.asked == [None]
    assert not list(path.parent.glob("*.partial"))


def test_goes_on_where_it_stopped(server: Server) -> None:
    server.break_after = 1_200_000
    with pytest.raises(ConnectionError, match="1200000 of 3000000"):
        published_checkpoint("vit_b")
    assert not default_path("vit_b").exists()
    server.break_after = None
    assert published_checkpoint("vit_b").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1200000-"]


def test_starts_over_where_the_server_cannot_go_on(server: Server) -> None:
    server.break_after, server.ranges = 1_200_000, False
    with pytest.raises(ConnectionError):
        published_checkpoint("vit_b")
    server.break_after = None
    assert published_checkpoint("vit_b").read_bytes() == CONTENT


def test_a_whole_partial_file_is_taken(server: Server) -> None:
    path = default_path("vit_b")
    path.parent.mkdir(parents=True)
    path.with_name("sam.pth.partial").write_bytes(CONTENT)
    assert published_checkpoint("vit_b").read_bytes() == CONTENT


def test_a_beginning_of_another_file_is_not_gone_on_with(server: Server) -> None:
    path = default_path("vit_b")
    path.parent.mkdir(parents=True)
    path.with_name("sam.pth.partial").write_bytes(b"an earlier version" * 1000)
    assert published_checkpoint("vit_b").read_bytes() == CONTENT
    assert server.asked == ["bytes=18000-", None]


def test_another_file_is_thrown_away(server: Server) -> None:
    server.content = b"a login page"
    with pytest.raises(ValueError, match="sha256"):
        published_checkpoint("vit_b")
    assert [p for p in default_path("vit_b").parent.iterdir() if ".lock" not in p.name] == []
    server.content = CONTENT
    assert published_checkpoint("vit_b").read_bytes() == CONTENT


def test_without_network_says_what_to_put_where(
    server: Server, add_backbone: Callable[..., None]
) -> None:
    nobody = PublishedWeights("http://127.0.0.1:9/sam.pth", "0" * 64, 3)
    add_backbone("vit_b", weights=nobody)
    with pytest.raises(ConnectionError, match="refused") as error:
        published_checkpoint("vit_b")
    assert str(default_path("vit_b")) in str(error.value) and nobody.url in str(error.value)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="vit_b"):
        published_checkpoint("vit_bb")


def test_two_processes_download_once(server: Server) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map(published_checkpoint, ["vit_b", "vit_b"])
    assert paths[0] == paths[1] and paths[0].read_bytes() == CONTENT
    assert server.asked == [None]


def test_command(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    download.main(download.DownloadConfig(("vit_b",)))
    assert str(default_path("vit_b")) in capsys.readouterr().out
    download.main(download.DownloadConfig())
    listed = capsys.readouterr().out.splitlines()
    assert f"vit_b: {default_path('vit_b')}" in listed
    assert any(line.startswith("vit_h: not here; https://") for line in listed)
    with pytest.raises(ValueError, match="vit_h"):
        download.main(download.DownloadConfig(("vit_b", "vit_hh")))


@pytest.mark.parametrize("name", sorted(published_weights()))
def test_table_is_well_formed(name: str) -> None:
    entry = published_weights()[name]
    assert len(entry.sha256) == 64 and int(entry.sha256, 16)
    assert entry.filename and "/" not in entry.filename
