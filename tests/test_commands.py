"""The command `sam-gym`."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sam_gym.__main__ import COMMANDS, main
from sam_gym.utils import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sam-gym"])
    monkeypatch.setattr(cli, "called_as", cli.called_as)


def test_help_lists_every_command_without_torch() -> None:
    probe = (
        "import sys; from sam_gym.__main__ import main; main(['--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed[: len(COMMANDS)] == list(COMMANDS)


def test_every_command_is_a_module_that_runs() -> None:
    for module in COMMANDS.values():
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(), module


def test_pyproject_installs_it() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sam-gym"].partition(":")
    assert importlib.import_module(module).__dict__[function] is main


def test_an_unknown_command_is_one_line_with_the_nearest() -> None:
    with pytest.raises(SystemExit, match=r"^error: Unknown command 'trian'. Did you mean 'train'"):
        main(["trian"])


def test_modules_of_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script `sam-gym` begins without that folder in its path."""
    (tmp_path / "plugin_of_folder.py").write_text("raise SystemExit('found')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAM_GYM_PLUGINS", "plugin_of_folder")
    monkeypatch.setattr(sys, "path", [own for own in sys.path if own])
    with pytest.raises(SystemExit, match="found"):
        main(["train"])
    assert sys.path[-1] == str(tmp_path)


def test_a_command_takes_its_options_and_names_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["download", "--help"])
    assert not end.value.code
    assert "usage: sam-gym download" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Unknown benchmark 'continuall'. Did you mean"):
        main(["bench", "continuall"])
