"""Settings from YAML files and flags."""

from pathlib import Path
from typing import Any

import pytest

from agents.ppo.command_line import CONFIGS, policy_help, read_config
from agents.ppo.config import TrainPPOConfig
from agents.tasks import TASKS, task_of


def test_yaml_sets_defaults_that_flags_override(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 7\nmax_steps: 3\nlearning_rate: 0.002\nsettings: {reward: dice_gain}\n")
    config = read_config(["--config", str(path), "--seed", "9"])
    assert (config.seed, config.learning_rate) == (9, 0.002)
    assert (config.env_config.max_steps, config.env_config.reward) == (3, "dice_gain")
    assert read_config([]) == TrainPPOConfig()


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\ngamma: 1\nclick_cost: 2e-2\n")
    config = read_config([f"--config={path}"])
    assert (config.learning_rate, config.gamma, config.env_config.click_cost) == (1e-4, 1.0, 0.02)


def test_an_agent_and_an_environment_by_name() -> None:
    config = read_config(["--config", "alignsam", "--config", "few_clicks", "--seed", "3"])
    assert (config.recalibrate, config.gamma, config.seed) == (True, 0.99, 3)
    # Of both, and what neither says stays as it is.
    assert (config.env_config.grid, config.env_config.stop) == (10, True)
    assert (config.env_config.obs, config.n_steps) == ("handle", TrainPPOConfig().n_steps)
    later = read_config(["--config", "alignsam", "--config", "alignsam_explicit"])
    assert (later.policy, later.recalibration_updates) == ("explicit", 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_in_the_package_is_valid(name: str) -> None:
    config = read_config(["--config", name])
    assert config != TrainPPOConfig()
    config.env_config.validate()


def test_wrong_configs_are_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"bad\.yaml.*Did you mean 'learning_rate'"):
        read_config(["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        read_config(["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ValueError, match="Did you mean 'alignsam'"):
        read_config(["--config", "aligsam"])
    with pytest.raises(ValueError, match="needs a name or the path"):
        read_config(["--config"])
    (tmp_path / "text.yaml").write_text("recalibrate: 'no'\n")
    with pytest.raises(ValueError, match="recalibrate must be True or False, got 'no'"):
        read_config(["--config", str(tmp_path / "text.yaml")])
    (tmp_path / "half.yaml").write_text("settings: {grid: 9.5}\n")
    with pytest.raises(ValueError, match="grid must be a whole number, got 9.5"):
        read_config(["--config", str(tmp_path / "half.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected 'name: value' lines, got list"):
        read_config(["--config", str(tmp_path / "list.yaml")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed:\n\tb: 1", r"not a readable YAML file \(.*line 2"),
        ("seed: [1", "not a readable YAML file"),
        ("[" * 5000, "not a readable YAML file"),
        (b"seed: \xff", "not a readable YAML file"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("1: 2", "Unknown option '1'"),
        ("seed:", "seed must be a whole number, got None"),
        ("seed: '3'", "seed must be a whole number, got '3'"),
        ("learning_rate: '1e-4'", "learning_rate must be a finite number, got '1e-4'"),
        ("learning_rate: .nan", "learning_rate must be a finite number, got nan"),
        ("learning_rate: true", "learning_rate must be a finite number, got True"),
        ("gamma: 5", "gamma must be from 0 to 1, got 5"),
        ("iou_target: high", "iou_target must be a finite number or None, got 'high'"),
        ("env_config: 3", "env_config must be EnvConfig, got 3"),
        ("obs: full", "training observes handles"),
    ],
)
def test_wrong_yaml(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_config(["--config", str(path)])
    assert "\n" not in str(error.value) and (str(path) in str(error.value) or "obs" in content)


def test_numbers_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\ngamma: 1\nbatch_size: 64\niou_target: 9e-1\n")
    config = read_config(["--config", str(path)])
    assert (config.learning_rate, config.gamma, config.batch_size) == (1e-4, 1, 64)
    assert config.env_config.iou_target == 0.9  # type: ignore[attr-defined]


def test_former_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("views: true\nhead: spatial\nsettings: {grid: 10}\n")
    config = read_config(["--config", str(path)])
    assert config.policy_plots and config.env_config.grid == 10
    assert read_config(["--views"]).policy_plots and not read_config(["--no-views"]).policy_plots
    path.write_text("head: flat\n")
    with pytest.raises(ValueError, match=r"run\.yaml: the action head 'flat' was removed"):
        read_config(["--config", str(path)])


def test_help_has_groups_and_ends_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_config(["--env", "SamContinual-v0", "--help"])
    printed = capsys.readouterr().out
    titles = [f"{name} options" for name in ("run", "environment", "PPO", "policy", "evaluation")]
    places = [printed.index(title) for title in titles]
    assert places == sorted(places)
    assert places[0] < printed.index("--total-timesteps") < printed.index("--stream")
    assert printed.index("--stream") < places[2] < printed.index("--learning-rate")
    assert "examples:" in printed[printed.index("tracking options") :]
    assert "usage: python -m agents.train_ppo" in printed
    shown = " ".join(printed.replace("│", " ").split())
    assert policy_help() in shown and ", ".join(CONFIGS) in shown
    for _, task in TASKS.items():
        assert ", ".join(task.policies) in policy_help() and task.env_id in policy_help()


def test_options_of_the_dataset_are_names_and_values() -> None:
    env_config: Any = read_config(["--dataset-kwargs", "kind", "night", "length", "4"]).env_config
    assert env_config.dataset_kwargs == {"kind": "night", "length": 4}


def test_procedural_data_has_as_many_images_as_asked_for(tmp_path: Path) -> None:
    def training(*args: str) -> Any:
        config = read_config(args)
        return task_of(config.env).training_config(config)

    path = tmp_path / "run.yaml"
    path.write_text("dataset: domain\ndataset_kwargs: {kind: cells}\n")
    config = training("--config", str(path), "--train-images", "5")
    assert len(config.open_dataset()) == 5
    assert training("--dataset", "coco", "--data", "x").dataset_kwargs == {}
    with pytest.raises(ValueError, match="needs a kind: one of aerial"):
        training("--dataset", "domain").open_dataset()
