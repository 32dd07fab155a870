#!/usr/bin/env bash
# gymnasium's RecordVideo writes frames of odd size in a pixel format that few players show.
#
# Versions: gymnasium 1.2.2, moviepy 2.2.1, imageio-ffmpeg 0.6.0, numpy 2.2.6.
# Expected: the recorder writes files of one format, or refuses a size that it cannot.
# Seen: an environment whose frames are 64 x 64 is recorded as H.264 in yuv420p; with 65 x 65, in
#   yuv444p (profile High 4:4:4 Predictive), without a warning. Many players, QuickTime and Firefox
#   among them, do not decode that profile.
# Consequence: whether a recorded episode can be watched depends on the parity of the image's size.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" gymnasium==1.2.2 moviepy==2.2.1 \
    imageio-ffmpeg==0.6.0 numpy==2.2.6
cd "$work"
PYTHONPATH="$work/site" python3 - <<'PYTHON'
import re
import subprocess
import warnings

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
from gymnasium.wrappers import RecordVideo


class Noise(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(1)
    render_mode = "rgb_array"

    def __init__(self, side):
        self.side = side

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, 0.0, False, False, {}

    def render(self):
        return self.np_random.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)


formats = {}
for side in (64, 65):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = RecordVideo(
            Noise(side), f"videos{side}", episode_trigger=lambda _: True, disable_logger=True
        )
        env.reset(seed=0)
        for _ in range(5):
            env.step(0)
        env.close()
    told = [str(item.message) for item in caught if "pix" in str(item.message)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", f"videos{side}/rl-video-episode-0.mp4"]
    shown = subprocess.run(command, capture_output=True, text=True).stderr
    formats[side] = re.search(r"yuv\w+", shown)[0]
    print(f"{side} x {side}: {formats[side]}, warnings about it: {len(told)}")
    assert not told
assert formats == {64: "yuv420p", 65: "yuv444p"}, formats
PYTHON
