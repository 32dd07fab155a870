#!/usr/bin/env bash
# The observation space of a gymnasium vector environment takes 2.5 times the memory of a batch.
#
# Versions: gymnasium 1.2.2, numpy 2.2.6.
# Expected: a Box whose bounds are two numbers, repeated for N environments, keeps two numbers, or
#   views of them: a vector environment of float32 observations takes the memory of its batch.
# Seen: batch_space(Box(-inf, inf, shape), N), the `observation_space` of every vector environment,
#   holds four arrays of the shape of the whole batch: low and high (float32), bounded_below and
#   bounded_above (bool), together 10 bytes for each 4 of the batch. With image embeddings of SAM
#   (256 x 64 x 64) as observations of 64 environments that is 671 MB for bounds that say "any
#   number", on top of 268 MB for the observations.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" gymnasium==1.2.2 numpy==2.2.6
PYTHONPATH="$work/site" python3 - <<'PYTHON'
import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space

NAMES = ("low", "high", "bounded_below", "bounded_above")


class Embeddings(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (256, 16, 16), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


def held(array):
    """Bytes of the array that keeps the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes


envs = gym.vector.SyncVectorEnv([Embeddings] * 32)
batch = envs.reset()[0].nbytes
for name, space in (
    ("SyncVectorEnv.observation_space", envs.observation_space),
    ("batch_space", batch_space(Embeddings.observation_space, 32)),
):
    bounds = [held(getattr(space, own)) for own in NAMES]
    distinct = [len(np.unique(getattr(space, own))) for own in NAMES]
    print(f"{name}: {sum(bounds) / batch:.2f} times a batch; values in each array: {distinct}")
    assert distinct == [1] * 4
    assert sum(bounds) == 2.5 * batch, bounds
PYTHON
