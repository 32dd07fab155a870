"""The training command over the tiny SAM, in two processes at once.

python train_tiny.py [training arguments]
"""

import importlib.util
import os
import socket
import sys
from functools import partial
from pathlib import Path

from adaptation.train import main
from sam_gym.backbones import BackboneSpec, register_backbone
from sam_gym.utils import cli


def register_tiny() -> None:
    spec = importlib.util.spec_from_file_location(
        "sams", Path(__file__).parent.parent / "conftest.py"
    )
    assert spec is not None and spec.loader is not None
    sams = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sams)
    build = partial(sams.seeded, sams.tiny_sam)
    register_backbone(BackboneSpec(name="tiny", build=build, description="A SAM of the tests"))


def become_a_rank() -> int:
    """Fork once (the imports take longer than the training), and say as whom this goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    child = os.fork()
    rank = "0" if child else "1"
    # What torchrun sets.
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= job | {"RANK": rank, "LOCAL_RANK": rank}
    return child


if __name__ == "__main__":
    register_tiny()
    other = become_a_rank()
    cli.run(lambda: main(sys.argv[1:]))
    if other and os.waitpid(other, 0)[1]:
        raise SystemExit("error: the other rank has failed.")
