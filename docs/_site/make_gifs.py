"""Make the moving pictures of the environments: `python docs/_site/make_gifs.py [ID ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agents.evaluate import film_episodes, load_agent
from agents.tasks import task_of
from sam_gym.utils.render import save_gif

FOLDER = Path(__file__).parents[1] / "assets" / "environments"


class Film(NamedTuple):
    """What a picture shows: an agent in three held-out episodes."""

    agent: str
    arguments: dict[str, Any]
    seed: int
    caption: str


#: Environment id -> its picture.
FILMS = {
    "SamSeg-v0": Film(
        "implicit",
        {},
        5,
        "The bundled agent `implicit` on held-out scenes. White: the target; blue: SAM's mask; "
        "green and red: positive and negative clicks.",
    ),
    "SamContinual-v0": Film(
        "oracle",
        {},
        0,
        "The baseline `oracle`, which sees the ground truth, in three domains of the stream. "
        "White: the target; the ring: the cue click.",
    ),
    "SamEverything-v0": Film(
        "greedy",
        {"dataset": "rooms", "budget": 11},
        1,
        "The baseline `greedy` on held-out rooms. Each colour is a kept mask; white: objects.",
    ),
    "SamVideo-v0": Film(
        "samurai", {"frames": 9}, 3, "The baseline `samurai` on held-out clips. White: the truth."
    ),
}


def main(ids: Sequence[str] = ()) -> None:
    """Write the picture of each environment, or of some, and print their sizes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for env_id in ids or FILMS:
        film = FILMS[env_id]
        agent = load_agent(film.agent, env_id=env_id)
        config = task_of(env_id).config_class(split="test", **film.arguments)
        path = FOLDER / f"{env_id}.gif"
        frames = film_episodes(agent, config, env_id=env_id, count=3, seed=film.seed)
        save_gif(path, frames, max_width=600)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
