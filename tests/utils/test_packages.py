"""Another distribution that installs a package named `agents`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code with some folders first on its path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env
    )


def test_a_package_that_hides_ours_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text('"""Agents of somebody else."""\n')
    done = run("import benchmarks", tmp_path, ROOT)
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith(f"ImportError: {tmp_path}/agents/__init__.py belongs to another")
    assert "hides the package 'agents' of sam-gym: install the two in" in last
    assert run("import benchmarks", ROOT, tmp_path).returncode == 0


def test_our_init_overwritten_by_another_distribution(tmp_path: Path) -> None:
    """In one site-packages, both fill the same folder."""
    (tmp_path / "agents").mkdir()
    for path in (ROOT / "agents").iterdir():
        (tmp_path / "agents" / path.name).symlink_to(path)
    (tmp_path / "agents" / "__init__.py").unlink()
    (tmp_path / "agents" / "__init__.py").write_text('"""Agents of somebody else."""\n')
    done = run("import agents.train_ppo", tmp_path, ROOT)
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("ImportError: ") and "hides the package 'agents' of sam-gym" in last
    (tmp_path / "agents" / "__init__.py").unlink()
    *_, last = run("import agents.train_ppo", tmp_path).stderr.strip().splitlines()
    assert "No module named 'sam_gym'" in last or "reinstall sam-gym" in last


def test_our_package_says_that_it_hides_another(tmp_path: Path) -> None:
    info = tmp_path / "openai_agents-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 0.1\n")
    done = run("import agents", ROOT, tmp_path)
    assert done.returncode == 0
    assert "sam-gym's package 'agents' hides the one of the distribution openai-agents" in (
        done.stderr
    )
    assert not run("import agents", ROOT).stderr
