"""Tests of the documentation site."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def generator() -> Iterator[None]:
    """The modules that generate pages and tables, importable."""
    folder = str(Path(__file__).parents[2] / "docs" / "_site")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
