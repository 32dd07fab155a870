"""Make the moving pictures of the environments: `python docs/_site/make_gifs.py [ID ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.evaluate import film_episodes, load_agent
from agents.tasks import task_of
from sam_gym.utils.render import save_gif

FOLDER = Path(__file__).parents[1] / "assets" / "environments"

#: Environment id -> agent, arguments, episodes, seed. The captions are in `environment_pages`.
FILMS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "SamSeg-v0": ("implicit", {"split": "test"}, 3, 5),
    "SamContinual-v0": ("oracle", {"split": "test"}, 3, 0),
    "SamEverything-v0": ("greedy", {"split": "test", "dataset": "rooms", "budget": 11}, 3, 1),
    "SamVideo-v0": ("samurai", {"split": "test", "frames": 9}, 3, 3),
}


def main(ids: Sequence[str] = ()) -> None:
    """Write a GIF of each environment, or of some, and print their sizes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for env_id in ids or FILMS:
        name, arguments, count, seed = FILMS[env_id]
        agent = load_agent(name, env_id=env_id)
        config = task_of(env_id).config_class(**arguments)
        path = FOLDER / f"{env_id}.gif"
        frames = film_episodes(agent, config, env_id=env_id, count=count, seed=seed)
        save_gif(path, frames, max_width=600)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
