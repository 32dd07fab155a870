"""Step a vector environment on request: a script for one checkout and one process.

    PYTHONPATH=CHECKOUT python stepping.py

It imports nothing of its own checkout: it plays the environment of the one on the path, which may
be older, through gymnasium's interface. Requests are lines of JSON on stdin, replies on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

#: Names of the object of a core that draws episodes ahead, in this checkout or in older ones.
PREFETCHERS = ("prefetcher", "ahead")
#: Modules with `keep_freed_memory`, which commands call, alike.
ALLOCATORS = ("sam_gym.utils.memory", "sam_gym.backbones.memory")
#: Maximum number of resets in which all images are drawn.
MAX_RESETS = 10_000


def keep_freed_memory() -> None:
    """Set up the allocator as the commands of the checkout do, if they do."""
    for name in ALLOCATORS:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        module.keep_freed_memory()
        return


class Player:
    """A vector environment that plays given actions.

    Args:
        num_envs: number of sub-environments.
        seed: of the first reset.
        images: number of images that are encoded before anything is timed; 0: none.
        settings: further arguments of `SamSeg-v0`.
    """

    def __init__(self, num_envs: int, seed: int, images: int, settings: dict[str, Any]) -> None:
        keep_freed_memory()
        self.package = importlib.import_module("sam_gym")
        self.env = gym.make_vec(
            "SamSeg-v0",
            num_envs=num_envs,
            vectorization_mode="vector_entry_point",
            autoreset_mode="SameStep",
            **settings,
        )
        core: Any = self.env.unwrapped.core  # type: ignore[attr-defined]
        self.prefetchers = [getattr(core, name) for name in PREFETCHERS if hasattr(core, name)]
        self._encode_all(images)
        self.env.reset(seed=seed)

    def _encode_all(self, images: int) -> None:
        """Reset until every image was drawn: no checkout encodes it again."""
        seen: set[str] = set()
        for number in range(MAX_RESETS):
            if len(seen) >= images:
                return
            _, info = self.env.reset(seed=number * self.env.num_envs)
            seen.update(info["source"])
        raise RuntimeError(f"{MAX_RESETS} resets drew {len(seen)} of {images} images.")

    def about(self) -> dict[str, Any]:
        """Return the folder of the checkout, and the number of actions."""
        space: Any = self.env.single_action_space
        folder = Path(str(self.package.__file__)).resolve().parents[1]
        return {"checkout": str(folder), "actions": int(space.n)}

    def play(self, actions: list[list[int]]) -> dict[str, Any]:
        """Step through actions (T, N).

        Returns:
            Seconds of all steps, rewards (T, N), and the peak memory so far in MiB.
        """
        rewards, seconds = [], 0.0
        for row in np.array(actions):
            started = time.perf_counter()
            reward = self.env.step(row)[1]
            # Prefetching and pending device work belong to this side.
            for prefetcher in self.prefetchers:
                prefetcher.wait()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds += time.perf_counter() - started
            rewards.append(reward.tolist())
        return {"seconds": seconds, "rewards": rewards, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Return the peak memory in MiB: of the GPU if it is used, or else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage may report the peak of the parent process.
        line = next(own for own in status.read_text().splitlines() if own.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    """Make the environment that the first line describes; play the actions of each further one."""
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    player = Player(**json.loads(sys.stdin.readline()))
    print(json.dumps(player.about()), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(player.play(json.loads(line))), file=replies, flush=True)
    player.env.close()


if __name__ == "__main__":
    main()
