"""The command `sam-gym COMMAND ...`, also `python -m sam_gym COMMAND ...`.

It knows the commands by the names of their modules only, and imports the one that it runs.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from sam_gym.utils import cli
from sam_gym.utils.packages import check_agents
from sam_gym.utils.registry import unknown_name
from sam_gym.version import __version__

#: Heading -> command -> its module and what it does.
GROUPS = {
    "Agents": {
        "train": ("agents.train_ppo", "Train an agent with PPO and compare it with baselines."),
        "evaluate": ("agents.evaluate", "Evaluate an agent or a baseline on held-out images."),
        "annotate": ("agents.annotate", "Annotate a folder of images, or videos, as COCO JSON."),
        "app": ("agents.app", "Annotate in a browser, with an agent at your side."),
        "convert": ("agents.convert", "Convert annotations to the formats of other tools."),
        "presence": ("agents.presence", "Calibrate how an agent tells that nothing is there."),
        "play": ("agents.play", "Play an environment yourself, by mouse and keys."),
        "export": ("agents.export", "Write a policy as ONNX and as a torch.export program."),
        "hub": ("agents.hub", "Share agents on the Hugging Face hub."),
    },
    "Adaptation": {
        "adapt": ("adaptation.train", "Adapt the SAM to a stream of domains, or to your folders."),
        "evaluate-adapter": ("adaptation.evaluate", "Evaluate an adapter of adapt."),
        "adapt-video": ("adaptation.train_video", "Fine-tune a video tracker on clips."),
        "evaluate-video": ("adaptation.evaluate_video", "Evaluate a video tracker."),
    },
    "Tools": {
        "bench": ("benchmarks.run", "Run a benchmark and write its report."),
        "precompute": (
            "sam_gym.backbones.embeddings.precompute",
            "Encode a dataset once, for all later runs.",
        ),
        "download": ("sam_gym.backbones.download", "Download the weights of a SAM."),
    },
}
#: Command -> its module.
COMMANDS = {name: module for commands in GROUPS.values() for name, (module, _) in commands.items()}
_EXAMPLES = """
Examples:
  sam-gym train --env SamSeg-v0 --out runs/ppo
  sam-gym evaluate --policy runs/ppo/policy.zip --out runs/evaluate
  sam-gym annotate --policy explicit --images PHOTOS --categories star,ring --out out.json
  sam-gym adapt --method moda --data FOLDER1 FOLDER2 --out runs/adaptation
  sam-gym bench continual

`sam-gym COMMAND --help` lists the options of a command. Each command is a module, too: those of
`sam-gym train` are also run by `python -m agents.train_ppo`, for torchrun for example.
"""


def describe() -> str:
    """Return the text of `sam-gym --help`."""
    lines = [f"sam-gym {__version__}", "", "Usage: sam-gym COMMAND [options]"]
    width = max(map(len, COMMANDS))
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:"]
        lines += [f"  {name:{width}}  {what}" for name, (_, what) in commands.items()]
    return "\n".join(lines) + "\n" + _EXAMPLES


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that a command line names, as `python -m MODULE` does.

    Args:
        args: the command line without the program; None: that of the process.

    Raises:
        SystemExit: after --help and --version, for an unknown command, and as the command ends.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(describe(), end="")
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        raise SystemExit(f"error: {unknown_name('command', name, COMMANDS)}")
    else:
        module = COMMANDS[name]
        # Modules of the current folder are found ("my_module:MyDataset"), as by `python -m`; but
        # none of them hides an installed package.
        if not sys.flags.safe_path and {"", os.getcwd()}.isdisjoint(sys.path):
            sys.path.append(os.getcwd())
        if module.startswith("agents."):
            cli.run(check_agents)
        cli.called_as = (f"python -m {module}", f"sam-gym {name}")
        sys.argv = [sys.argv[0], *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
