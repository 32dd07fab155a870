"""Where results come from."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from sam_gym.backbones import load_backbone
from sam_gym.utils.provenance import commit_of, provenance
from sam_gym.version import __version__


@dataclass
class Options:
    size: tuple[int, int] = (3, 4)


def test_parts_that_are_there() -> None:
    alone = provenance()
    assert set(alone) == {"threads", "versions", "commit"}
    assert alone["versions"]["sam-gym"] == __version__
    backbone = load_backbone("micro-v0", device="cpu")
    full = provenance(Options(), backbone)
    assert full["settings"] == {"size": [3, 4]}  # as JSON has it
    assert (full["backbone"], full["dtype"], full["compiled"]) == ("micro-v0", "float32", False)
    assert full["backbone_identity"] == backbone.identity and full["device"].startswith("cpu (")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    command = [*git, "rev-parse", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == commit
    subprocess.run([*git, "tag", "-a", "v1", "-m", "release"], check=True)
    assert commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert commit_of(tmp_path) == f"{commit}-dirty"
    # An environment inside of a project is no checkout of that project.
    inside = tmp_path / "venv" / "site-packages"
    inside.mkdir(parents=True)
    assert commit_of(inside) is None
