"""What users have saved with commit 84a4160 still loads, and gives the numbers that it gave.

`make_fixtures.py` made the files. Where a test fails after a refactoring, the file is right and the
code is wrong: see `HOLDS`.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from adaptation import train as adaptation_train
from agents import evaluate as agents_evaluate
from agents import train_ppo
from agents.evaluate import PolicyAgent
from agents.sharing.push import HubPushConfig, push
from sam_gym import Prompts, load_backbone
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator

_SPEC = importlib.util.spec_from_file_location(
    "make_fixtures", Path(__file__).with_name("make_fixtures.py")
)
assert _SPEC is not None and _SPEC.loader is not None
made: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)

NUMBERS = json.loads((made.FIXTURES / "numbers.json").read_text())

#: What must hold for each kind of file; the message of a failing comparison.
HOLDS = {
    "backbone": "A backbone must give the logits and predicted IoU of 84a4160: encode, decode and "
    "the loading of weights may be moved, not changed.",
    "adapter": "An adapter file of 84a4160 must load and give the same masks. Its metadata holds "
    "registry names (backbone, method, tune, chooser) and its tensors the prefixes 'chooser.', "
    "'head.' and 'expertN.': whoever renames them reads the old ones through an alias table.",
    "policy": "A policy.zip of 84a4160 must load and act the same. It pickles the class by its old "
    "module (agents.policies, agents.explicit, agents.everything) and arguments by their old "
    "names: agents.policies.saved maps them.",
    "run": "A checkpoint of 84a4160 must resume to the same numbers. It holds the run's config "
    "under its old names ('settings.*', 'views', ...): comparing configs must rename them first.",
    "hub": "A hub repository of 84a4160 must load: results.json and the card hold the config under "
    "its old names.",
}


def evaluate(arguments: list[str]) -> Any:
    return agents_evaluate.main([*arguments, "--no-pictures"])


def check(found: Any, recorded: Any, kind: str, at: str = "") -> None:
    """Compare nested numbers; floats to 1e-4, since another CPU or torch rounds differently."""
    message = f"{at}: {found!r}, recorded was {recorded!r}. {HOLDS[kind]}"
    if isinstance(recorded, dict):
        assert isinstance(found, dict) and found.keys() >= recorded.keys(), message
        for key, value in recorded.items():
            check(found[key], value, kind, f"{at}/{key}")
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), message
        for number, (own, value) in enumerate(zip(found, recorded, strict=True)):
            check(own, value, kind, f"{at}/{number}")
    elif isinstance(recorded, float):
        assert found == pytest.approx(recorded, rel=1e-4, abs=1e-4), message
    else:
        assert found == recorded, message


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    backbone_added: Callable[..., AbstractContextManager[None]],
) -> Iterator[Path]:
    """A copy of the fixtures as working folder, with the SAM that they are for."""
    folder = tmp_path_factory.mktemp("compat") / made.COMMIT
    shutil.copytree(made.FIXTURES, folder)
    torch.save(made.generated(made.compat_sam()), folder / made.COMPAT["checkpoint"])
    added = backbone_added(made.COMPAT["name"], build=made.compat_sam)
    with pytest.MonkeyPatch.context() as patch, added:
        patch.chdir(folder)
        yield folder


def test_backbones(folder: Path) -> None:
    check(made.numbers_of(load_backbone(**made.COMPAT), Prompts), NUMBERS["compat"], "backbone")
    bundled = load_backbone("micro-v0", device="cpu")  # its present name
    check(made.numbers_of(bundled, Prompts), NUMBERS["micro"], "backbone")


def test_a_narrow_vit_b(
    tmp_path: Path, backbone_added: Callable[..., AbstractContextManager[None]]
) -> None:
    path = tmp_path / "narrow.pth"
    torch.save(made.generated(made.narrow_vit_b()), path)
    with backbone_added("vit_b", build=made.narrow_vit_b):
        backbone = load_backbone("vit_b", checkpoint=str(path), device="cpu")
        check(made.numbers_of(backbone, Prompts), NUMBERS["narrow_vit_b"], "backbone")


@pytest.mark.parametrize("name", made.ADAPTERS)
def test_adapters(folder: Path, name: str) -> None:
    backbone = load_backbone(**made.COMPAT, adapter=f"adapters/{name}.safetensors")
    found = made.numbers_of(backbone, Prompts)
    if name == "classes":
        generator = MaskGenerator(backbone, GeneratorOptions((4, 4), 0.0, 0.0))
        found["everything"] = made.masks_of(generator)
    check(found, NUMBERS["adapters"][name], "adapter", name)


def test_a_stopped_adaptation_resumes(folder: Path) -> None:
    arguments = made.adapt_arguments("ewc", "hq_small", "adaptation")
    run = adaptation_train.main([*arguments, "--resume"])
    found = {"scores": run.scores, "zero_shot": run.zero_shot}
    check(found, NUMBERS["adapters"]["resumed"], "run")


@pytest.mark.parametrize("name", made.POLICIES)
def test_policies(folder: Path, name: str, tmp_path: Path) -> None:
    found = made.policy_numbers(PolicyAgent, evaluate, name, made.policy_path(name), tmp_path)
    check(found, NUMBERS["policies"][name], "policy", name)


def test_a_stopped_training_resumes(folder: Path) -> None:
    arguments = [*made.train_arguments("ppo"), "--max-steps", "3", "--resume", "--no-pictures"]
    check(made.curves_of(train_ppo.main(arguments)), NUMBERS["resumed"], "run")


def test_a_hub_repository(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "cache" / "models--me--clicker"
    shutil.copytree(folder / "hub", repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = made.policy_numbers(PolicyAgent, evaluate, "implicit", "hf://me/clicker", tmp_path)
    check(found, NUMBERS["policies"]["implicit"], "hub")

    again = shutil.copytree(folder / "hub", tmp_path / "again")
    card = (again / "README.md").read_text()
    push(HubPushConfig(str(again), "me/clicker", card_only=True))
    assert "mean_iou" in (again / "README.md").read_text(), HOLDS["hub"]
    config = tmp_path / "config.yaml"
    config.write_text(card.partition("```yaml\n")[2].partition("```")[0])
    assert train_ppo.read_config(["--config", str(config)]).total_timesteps == 64, HOLDS["hub"]
