"""Importing is cheap, and the public names are there."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import sam_gym

PROBE = """
import json, sys, time
started = time.perf_counter()
import sam_gym
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def test_import_is_cheap() -> None:
    """Under two seconds (the best of three: other processes may be busy), nothing heavy loaded."""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
        )
        probe = json.loads(done.stdout)
        seconds.append(probe["seconds"])
        heavy = {"torch", "torchvision", "cv2", "segment_anything", "scipy", "matplotlib"}
        assert not heavy & set(probe["modules"])
        assert not done.stderr
        if seconds[-1] < 2.0:
            break
    assert min(seconds) < 2.0


@pytest.mark.parametrize("name", sam_gym.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    assert getattr(sam_gym, name) is not None


def test_public_names_are_those_of_their_modules() -> None:
    from sam_gym.backbones import load_backbone
    from sam_gym.data import make_dataset
    from sam_gym.mask_generation.generator import MaskGenerator

    assert sam_gym.load_backbone is load_backbone
    assert sam_gym.make_dataset is make_dataset
    assert sam_gym.MaskGenerator is MaskGenerator


def test_public_names_are_listed_before_they_are_imported() -> None:
    probe = "import sam_gym, sys; print('torch' in sys.modules, *dir(sam_gym))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    loaded, *listed = done.stdout.split()
    assert loaded == "False" and set(sam_gym.__all__) <= set(listed)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sam_gym' has no attribute 'load_backbones'"):
        sam_gym.load_backbones  # noqa: B018


def test_version_is_that_of_the_file() -> None:
    from sam_gym.version import __version__

    assert sam_gym.__version__ == __version__
    assert [part.isdigit() for part in __version__.split(".")[:2]] == [True, True]
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation


@pytest.mark.parametrize("env_id", sam_gym.ENVIRONMENTS)
def test_environments_are_registered_with_strings(env_id: str) -> None:
    spec = gym.spec(env_id)
    assert (spec.entry_point, spec.vector_entry_point) == sam_gym.ENVIRONMENTS[env_id]
