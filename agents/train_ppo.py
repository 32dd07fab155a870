"""Train an agent with PPO: `python -m agents.train_ppo --env SamSeg-v0`, or `--help`.

On N GPUs or processes: `torchrun --nproc_per_node=N -m agents.train_ppo ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.ppo.command_line import read_config
from agents.ppo.distributed import recorded
from agents.ppo.run import train
from sam_gym.utils import cli


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line."""
    return train(read_config(args))


if __name__ == "__main__":
    cli.run(recorded(main), "Pass --resume to resume from the last checkpoint.")
