"""The annotation command, which also knows the tiny SAM of the tests."""

import sys
from pathlib import Path

from agents.annotate import main
from sam_gym.utils import cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_tiny import add_tiny

if __name__ == "__main__":
    add_tiny()
    cli.run(main)
