"""The training command, at a tiny size, from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest

from agents.evaluate import PolicyAgent
from agents.ppo.command_line import read_config
from agents.ppo.config import TrainPPOConfig
from agents.ppo.plan import Plan
from agents.ppo.results import episodes_of_slow
from agents.train_ppo import main
from sam_gym.envs.click import SamSegConfig


def arguments(env: dict[str, Any], out: Path) -> list[str]:
    return [
        *("--env", "SamSeg-v0", "--out", str(out), "--backbone", "tiny"),
        *("--checkpoint", env["checkpoint"], "--device", "cpu", "--train-images", "8"),
        *("--num-envs", "4", "--n-steps", "8", "--batch-size", "16", "--total-timesteps", "96"),
        *("--eval-every", "32", "--eval-episodes", "2", "--final-episodes", "2"),
        *("--checkpoint-every", "32"),
    ]


@pytest.mark.slow
def test_a_run_leaves_everything_it_promises(tiny_env: dict[str, Any], tmp_path: Path) -> None:
    main(arguments(tiny_env, tmp_path))
    stored = json.loads((tmp_path / "results.json").read_text())
    for name in ("agent", "random", "center", "confident", "oracle"):
        assert set(stored[name]) >= {"mean_iou", "ci95", "episodes"}
        assert stored[name]["episodes"] == 2
    span = stored["oracle"]["mean_iou"] - stored["random"]["mean_iou"]
    gain = stored["agent"]["mean_iou"] - stored["random"]["mean_iou"]
    assert stored["gap_closed"] == pytest.approx(gain / span, abs=1e-3)
    # A baseline of many decodes per step is left out of the curve of the training.
    assert set(stored["eval_baselines"]) == {"random", "center", "oracle"}
    assert stored["backbone"] == "tiny" and stored["versions"].keys() >= {"sam-gym", "torch"}
    assert stored["held_out_split"] == "test" and stored["config"]["seed"] == 0
    assert stored["config"]["precision"] in ("32-true", "bf16-mixed")
    for picture in ("learning_curve.png", "iou_after_steps.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "episodes.gif").read_bytes()[:3] == b"GIF"
    assert list((tmp_path / "tensorboard").rglob("events*"))
    assert not (tmp_path / "checkpoints").exists()
    PolicyAgent.load(tmp_path / "policy.zip")


def test_a_slow_baseline_plays_a_quarter_of_many_episodes() -> None:
    found = {episodes: episodes_of_slow(episodes) for episodes in (2, 16, 20, 64, 66, 256)}
    assert found == {2: 2, 16: 16, 20: 16, 64: 16, 66: 17, 256: 64}


def test_wrong_input_is_an_error_before_work_starts(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="Did you mean 'SamSeg-v0'"):
        main(["--env", "SamSegg-v0", *out])
    with pytest.raises(ValueError, match="Did you mean 'iou_gain'"):
        main(["--reward", "iou_gains", *out])
    with pytest.raises(ValueError, match="Did you mean 'implicit'"):
        main(["--policy", "implicid", *out])
    with pytest.raises(FileNotFoundError):
        main(["--dataset", "coco", "--data", str(tmp_path / "nothing"), *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "folder"}, r"splits\.json is missing, .*12 of 12 images of split 'val'"),
        ({"dataset": "coco", "annotations": "all.json"}, r"all\.json: annotations= names one file"),
        ({"split": "test"}, "trained and evaluated on split 'test'.* --split or --held-out"),
        ({"split": "val"}, "trained and evaluated on split 'val'"),
    ],
)
def test_training_images_are_not_held_out(
    tiny_env: dict[str, Any], squares: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(TrainPPOConfig(env_config=env_config(tiny_env, squares, options)))


@pytest.mark.parametrize("options", [{"dataset": "folder"}, {"annotations": "all.json"}])
def test_a_seed_holds_images_out(
    tiny_env: dict[str, Any], squares: Path, options: dict[str, str]
) -> None:
    own = env_config(tiny_env, squares, {"dataset": "coco", "split_seed": 1} | options)
    plan = Plan.of(TrainPPOConfig(env_config=own))
    assert plan.shared_images == 0
    train, held_out = (config.open_dataset() for config in (plan.training, plan.held_out))
    assert len(train) + len(held_out) + len(plan.validation.open_dataset()) >= 12
    # Results on the training split are labelled as such.
    assert Plan.of(TrainPPOConfig(env_config=own, held_out="train")).shared_images == len(train)


def env_config(tiny_env: dict[str, Any], root: Path, options: dict[str, Any]) -> SamSegConfig:
    own = {k: v for k, v in options.items() if k in ("dataset", "split")}
    more = {k: v for k, v in options.items() if k not in own}
    if "annotations" in more:
        more["annotations"] = str(root / more["annotations"])
    data = {"data": str(root)} if "dataset" in own else {}
    return SamSegConfig(**(tiny_env | own | data | {"dataset_kwargs": more}))


def test_the_default_folder_names_environment_policy_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for args, name in (
        ([], "SamSeg-v0-implicit-0"),
        (["--policy", "explicit", "--seed", "3"], "SamSeg-v0-explicit-3"),
        (["--env", "SamEverything-v0"], "SamEverything-v0-everything-0"),
        (["--out", "elsewhere"], "elsewhere"),
    ):
        assert read_config(args).folder.name == name
    # Refused before any work, and so is a former run of which a policy is left.
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "SamSeg-v0-implicit-0"
    folder.mkdir(parents=True)
    (folder / "policy.zip").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="runs/SamSeg-v0-implicit-0 holds a finished run"):
        main([])
    assert (folder / "policy.zip").read_bytes() == b"mine"
