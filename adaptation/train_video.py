"""Train a tracker on videos: a SAM 2, or micro_video.

    python -m adaptation.train_video --config seed --dataset coco-video --data PATH --out runs/mine
    python -m adaptation.train_video --config sam2 --config mine.yaml --steps 1000
    python -m adaptation.evaluate_video --adapter runs/mine/adapter.safetensors --data PATH ...

Writes into --out: adapter.safetensors (for `load_backbone(..., adapter=PATH)`), config.yaml (which
repeats the run), run.json (J&F on held-out videos), pictures of held-out videos, TensorBoard logs
and a checkpoint.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptation.video.clips import check_clips
from adaptation.video.options import parse_config
from sam_gym.data.splits import check_held_out
from sam_gym.utils import cli


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns the content of run.json.

    Raises:
        ValueError, FileNotFoundError: a name, a value, the data or the checkpoint is wrong.
        FileExistsError: the folder holds a run.
    """
    config = parse_config(args)
    video = config.video
    train = video.open("train")
    check_clips(train, video)
    held_out = None if video.held_out == "none" else video.open(video.held_out)
    if held_out is not None:
        check_held_out(held_out, video.held_out, train)
    if config.run.out is not None:
        out = Path(config.run.out).expanduser()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Several processes need one folder: pass --out.")
    else:
        out = Path("outputs") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"
    # Wrong data is refused before torch is imported.
    from adaptation.video.trainer import TrackerTrainer

    result = TrackerTrainer(config, train, held_out).fit(out)
    print(f"Everything is in {out}.")
    return result


if __name__ == "__main__":
    cli.run(main, "Pass --resume to resume from the last checkpoint, if there is one.", status=2)
