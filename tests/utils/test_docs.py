"""Generated tables in README and docs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sam_gym.backbones import BACKBONES
from sam_gym.utils.docs import main


def test_the_command_refreshes_tables_and_nothing_else(
    tmp_path: Path, add_backbone: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    readme, other = tmp_path / "README.md", tmp_path / "docs" / "other.md"
    readme.write_text("before\n<!-- backbones -->\nold\n<!-- /backbones -->\nafter <!-- x -->\n")
    other.write_text("No table.\n")
    add_backbone("own_sam", build=BACKBONES.get("micro").build)
    main(tmp_path)
    assert capsys.readouterr().out == f"{readme}\n"
    assert readme.read_text().startswith("before\n<!-- backbones -->\n| `backbone=` |")
    assert "| `own_sam` | A SAM of the tests |" in readme.read_text()
    assert readme.read_text().endswith("|\n<!-- /backbones -->\nafter <!-- x -->\n")
    assert other.read_text() == "No table.\n"
    other.write_text("<!-- datasets -->\nAll that follows.\n")
    with pytest.raises(ValueError, match="no end marker '<!-- /datasets -->'"):
        main(tmp_path)
