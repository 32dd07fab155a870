"""Push trained agents to the Hugging Face hub, and pull them.

    python -m agents.hub push --run runs/ppo --repo USER/NAME --card-only
    python -m agents.hub push --run runs/ppo --repo USER/NAME
    python -m agents.hub pull --repo USER/NAME

Commands that take the path of a policy.zip also take hf://USER/NAME or hf://USER/NAME@REVISION.
The hub's own settings apply: a token of `hf auth login` or HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from agents.sharing.pull import HubPullConfig, pull
from agents.sharing.push import HubPushConfig, push
from sam_gym.utils import cli
from sam_gym.utils.settings import check_settings


def main(args: Sequence[str] | None = None) -> str:
    """Run the command line."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"push": HubPushConfig, "pull": HubPullConfig},
        prog="python -m agents.hub",
        description=__doc__,
        args=args,
    )
    check_settings(config, cli.option)
    return push(config) if isinstance(config, HubPushConfig) else str(pull(config))


if __name__ == "__main__":
    cli.run(main)
