"""Files of torch.save."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from sam_gym.utils.training import read_state, save_state


def test_files_unpack_to_no_more_than_their_size(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state({"x": torch.zeros(100_000)}, path)
    assert read_state(path)["x"].shape == (100_000,)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for file in (packed, io.BytesIO(packed.read_bytes())):
        with pytest.raises(ValueError, match="bytes that unpack to 40"):
            read_state(file)
