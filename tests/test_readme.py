"""README and guides are true: Python runs, commands and links exist."""

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaptation.strategies  # noqa: F401  (registers the methods)
from adaptation.strategy import STRATEGIES
from agents.ppo.config import TrainPPOConfig
from sam_gym import ENVIRONMENTS
from sam_gym.backbones import Backbone
from sam_gym.backbones.adapters.tuning import TUNINGS
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.rewards import REWARDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
#: Guides that go on where the README ends.
GUIDES = [
    ROOT / "docs" / "guides" / f"{name}.md"
    for name in (
        "segmenting",
        "using_environments",
        "training_agents",
        "annotating",
        "adapting",
    )
]
TEXTS = {path: path.read_text() for path in (ROOT / "README.md", *GUIDES)}

#: Settings of the README's snippets -> those of the test.
SMALLER = {
    "num_envs=64": "num_envs=2",
    "grid=(32, 32)": "grid=(4, 4)",
    "Trainer(out=": "Trainer(TrainConfig(steps=1, max_images=1), out=",
    'fit("SamContinual-v0"': 'fit(make_stream(domains="cells,night")',
    'VideoTracker("sam2.1_hiera_tiny")': "VideoTracker(tiny_sam2)",
    '["clip.mp4", "folder/of/frames"]': "videos",
}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_python_runs_from_top_to_bottom(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    build_sam2: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sam2 = Backbone("tiny_sam2", build_sam2(), torch.device("cpu"), torch.float32)
    tiny_sam2.memory = VideoMemory((4, 4), 32, 16, hidden=32, depth=2)
    videos = np.random.default_rng(0).integers(0, 256, (2, 14, 400, 300, 3), dtype=np.uint8)
    code = "\n".join(block for text in TEXTS.values() for block in blocks("python", text))
    assert code.count("import") > 5
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    imports = (
        "from adaptation.options import TrainConfig\nfrom sam_gym.data.streams import make_stream"
    )
    exec(f"{imports}\n{code}", {"tiny_sam2": tiny_sam2, "videos": videos})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(3, 256, 256)"
    assert "(2, 3, 256, 256)" in printed


def test_all_names_are_mentioned() -> None:
    # Other tests register methods of their own.
    methods = {
        name for name, item in STRATEGIES.items() if item.__module__.startswith("adaptation")
    }
    assert {"moda", "ewc"} <= methods
    names = {*ENVIRONMENTS, *methods, *TUNINGS.names(), *REWARDS.names()}
    # The reference of every method, and the default reward.
    names -= {"zero_shot", "iou_gain"}
    said = "".join(TEXTS.values())
    missing = {name for name in names if f"`{name}`" not in said and f'"{name}"' not in said}
    assert not missing


def test_modules_and_options_of_commands_exist() -> None:
    text = "".join(TEXTS.values()).replace("\\\n", " ")
    commands = re.findall(r"python -m ([\w.]+)([^`\n]*)", text)
    assert len(commands) > 50
    for module, _ in commands:
        if module != "pytest":
            assert importlib.util.find_spec(module) is not None, module
    options = {
        word.removeprefix("--").replace("-", "_")
        for module, rest in commands
        if module == "agents.train_ppo"
        for word in shlex.split(rest.rstrip("."))
        if word.startswith("--")
    }
    fields = {*TrainPPOConfig.__dataclass_fields__, *SamSegConfig.__dataclass_fields__}
    assert options <= fields | {"config", "help"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[path]) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link
