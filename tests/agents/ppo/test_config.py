"""Settings from YAML files and flags."""

from pathlib import Path

import pytest

from agents.ppo.config import CONFIGS, TrainPPOConfig, read_config


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
    assert name in (TrainPPOConfig.__doc__ or "")
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
    with pytest.raises(ValueError, match="recalibrate must be of type bool, got 'no'"):
        read_config(["--config", str(tmp_path / "text.yaml")])
    (tmp_path / "half.yaml").write_text("settings: {grid: 9.5}\n")
    with pytest.raises(ValueError, match="grid must be of type int, got 9.5"):
        read_config(["--config", str(tmp_path / "half.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected 'name: value' lines, got list"):
        read_config(["--config", str(tmp_path / "list.yaml")])
