"""Baselines and the evaluation that all agents share."""

import base64
import io
import json
import os
import pickle
import re
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import MultiInputActorCriticPolicy

from agents import train_ppo
from agents.baselines.click import BASELINES
from agents.evaluate import (
    EvaluateConfig,
    Evaluation,
    PolicyAgent,
    check_fits,
    evaluate,
    load_agent,
    main,
    policy_help,
    remarks,
    set_search,
    training_images,
)
from agents.policies import POLICIES
from agents.policies import saved as saved_policies
from agents.policies.everything import EverythingPolicy
from agents.policies.implicit import ImplicitPolicy
from agents.policies.saved import SHIPPED
from agents.policies.spaces import space_to_json
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.tasks import TASKS
from sam_gym.backbones import BACKBONES, Backbone, load_backbone
from sam_gym.backbones.spec import FIRST_MICRO
from sam_gym.data import make_dataset
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.everything import EverythingConfig


def settings_of(env: dict[str, Any], **more: Any) -> SamSegConfig:
    return SamSegConfig(split="test", obs="handle", **(env | more))


def core_of(settings: dict[str, Any], count: int = 4, **more: Any) -> Any:
    env = gym.make_vec(
        "SamSeg-v0",
        count,
        vectorization_mode="vector_entry_point",
        obs="handle",
        **(settings | more),
    )
    observations, _ = env.reset(seed=0)
    return env, env.unwrapped.core, observations


@pytest.mark.parametrize("name", BASELINES.names())
def test_baselines_play_valid_actions(tiny_env: dict[str, Any], name: str) -> None:
    env, core, observations = core_of(tiny_env, stop=True)
    agent = BASELINES.get(name)(0)
    for _ in range(3):
        actions = agent.act(core, observations)
        assert actions.shape == (4,)
        observations, *_ = env.step(actions)


def test_center_clicks_the_middle(tiny_env: dict[str, Any]) -> None:
    _, core, observations = core_of(tiny_env, grid=9)
    actions = BASELINES.get("center")(0).act(core, observations)
    middle = (core.backbone.image_size - 1) / 2
    assert core.click_of(actions[0]) == (pytest.approx(middle), pytest.approx(middle), True)


def test_confident_plays_the_click_of_highest_predicted_iou(tiny_env: dict[str, Any]) -> None:
    env, core, observations = core_of(tiny_env, count=3)
    actions = BASELINES.get("confident")(0).act(core, observations)
    env.step(actions)
    chosen = core.predicted_ious[np.arange(3), core.num_clicks].copy()
    for x, y in [(5.0, 5.0), (32.0, 32.0), (60.0, 20.0)]:
        env.reset(seed=0)
        # A click of the tried grid can at best tie with the chosen one.
        step = 64 / 6
        at = [(np.floor(v / step) + 0.5) * step - 0.5 for v in (x, y)]
        env.step(np.full(3, core.action_at(*at, True)))
        assert (core.predicted_ious[np.arange(3), core.num_clicks] <= chosen + 1e-5).all()


def test_oracle_clicks_inside_the_error_it_means(tiny_env: dict[str, Any]) -> None:
    _, core, observations = core_of(tiny_env, count=6, grid=32)
    actions = BASELINES.get("oracle")(0).act(core, observations)
    for slot, action in enumerate(actions):
        x, y, positive = core.click_of(action)
        column, row = core.to_image(slot, x, y)
        assert positive and core.ground_truth(slot).mask[row, column]


def test_all_agents_meet_the_same_episodes(tiny_env: dict[str, Any]) -> None:
    runs = [
        evaluate(
            BASELINES.get(name)(0), settings_of(tiny_env, max_steps=2), episodes=10, num_envs=4
        )
        for name in ("random", "oracle", "random")
    ]
    assert runs[0].sources == runs[1].sources and runs[0].targets == runs[1].targets
    assert np.array_equal(runs[0].ious, runs[2].ious)
    assert len(runs[0].ious) == 12
    assert (runs[0].clicks == 2).all()
    assert np.allclose(runs[0].rewards, runs[0].ious)
    steps = np.array(runs[1].steps)
    assert steps.shape == (12, 2) and np.array_equal(steps[:, 1], runs[1].ious)
    assert (steps[:, 0] != steps[:, 1]).any()
    assert np.allclose(runs[1].curve, steps.mean(axis=0))


def test_what_has_ended_keeps_its_iou() -> None:
    steps = [[0.5], [0.1, 0.2, 0.6]]
    result = Evaluation(np.array([0.5, 0.6]), np.zeros(2), ["a", "b"], {}, steps)
    assert np.allclose(result.curve, [0.3, 0.35, 0.55])


def test_summary_holds_mean_and_interval(tiny_env: dict[str, Any]) -> None:
    result = evaluate(BASELINES.get("center")(0), settings_of(tiny_env), episodes=8, num_envs=8)
    summary = result.summary()
    assert summary["episodes"] == 8
    assert summary["mean_iou"] == pytest.approx(result.ious.mean(), abs=1e-4)
    spread = result.ious.std(ddof=1) / np.sqrt(8)
    assert summary["ci95"] == pytest.approx(2.3646 * spread, abs=1e-4)


def test_unknown_policies_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'oracle'"):
        load_agent("orakle")
    with pytest.raises(FileNotFoundError, match="policy.zip"):
        load_agent(str(tmp_path / "policy.zip"))
    (tmp_path / "broken.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.zip: not a readable policy"):
        load_agent(str(tmp_path / "broken.zip"))


def test_a_missing_device_is_no_fault_of_the_policy() -> None:
    with pytest.raises(ValueError, match="^Unknown device 'gpu'"):
        PolicyAgent.load("implicit", "gpu")


def test_a_file_is_no_folder_for_results(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*file is a file: name a folder"):
        main(["--policy", "random", "--out", str(tmp_path / "file")])


@pytest.fixture
def saved(tiny_env: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Saves an untrained PPO, made with some arguments."""
    vector, core = make_vector_env("SamSeg-v0", 2, settings_of(tiny_env))
    names = list(core.dataset.categories)
    backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    features = {"backbone": backbone, "vocabulary": names, "categories": names, "max_steps": 5}

    def save(
        policy: Any = ImplicitPolicy, obs: str = "handle", nan: bool = False, **arguments: Any
    ) -> Path:
        if policy is ImplicitPolicy:
            arguments["policy_kwargs"] = {"features": features, "grid": 16}
        env: Any = VectorEnvAdaptor(vector)
        if obs == "full":
            env = gym.make("SamSeg-v0", **tiny_env)
        model = PPO(policy, env, device="cpu", **arguments)
        if nan:
            torch.nn.init.constant_(model.policy.value_net.bias, torch.nan)
        model.save(tmp_path / "policy.zip")
        return tmp_path / "policy.zip"

    return save


def test_a_policy_in_bfloat16_plays_in_float32_where_that_is_faster(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved()
    with zipfile.ZipFile(path) as archive:
        own = json.loads(archive.read("data"))["policy_kwargs"]
    changed(path, policy_kwargs=own | {"precision": "bf16-mixed"})
    for fast, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        assert PolicyAgent.load(path, "cpu").policy.precision == expected


def test_policies_that_read_features_as_channels_are_refused(saved: Callable[..., Path]) -> None:
    """On HQ backbones and routed adapters, policies of 84a4160 read more than the embedding."""
    path, name = saved(), "features_extractor.reduce.weight"
    with zipfile.ZipFile(path) as file:
        entries = {entry: file.read(entry) for entry in file.namelist()}
    weights = torch.load(io.BytesIO(entries["policy.pth"]), weights_only=True)
    weights[name] = weights[name].repeat(1, 3, 1, 1)
    content = io.BytesIO()
    torch.save(weights, content)
    with zipfile.ZipFile(path, "w") as file:
        for entry, data in (entries | {"policy.pth": content.getvalue()}).items():
            file.writestr(entry, data)
    with pytest.raises(ValueError, match="reads 96 channels per image, the embedding has 32"):
        PolicyAgent.load(path, "cpu")


def test_a_loaded_policy_is_the_one_that_sb3_loads(saved: Callable[..., Path]) -> None:
    path = saved()
    policy, expected = PolicyAgent.load(path, "cpu").policy, PPO.load(path, device="cpu").policy
    assert type(policy) is type(expected)
    assert policy.observation_space == expected.observation_space
    assert policy.action_space == expected.action_space
    torch.testing.assert_close(policy.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_how_a_policy_was_trained_need_not_be_importable(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # RL-Zoo's schedules are objects of a class of its own.
    zoo = types.ModuleType("zoo_utils")
    exec("class Linear:\n    def __call__(self, left): return 1e-3 * left", zoo.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "zoo_utils", zoo)
        path = saved(learning_rate=zoo.Linear())
    with pytest.raises(ModuleNotFoundError, match="zoo_utils"):
        PPO.load(path, device="cpu")
    assert isinstance(PolicyAgent.load(path, "cpu").policy, ImplicitPolicy)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_zip_runs(saved: Callable[..., Path], tmp_path: Path) -> None:
    path, sprung = saved(), tmp_path / "sprung"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(content["data"])
    trap = {":serialized:": base64.b64encode(pickle.dumps(Trap(sprung))).decode()}

    def put(name: str) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for file, own in content.items():
                changed = json.dumps(data | {name: trap}).encode()
                archive.writestr(file, changed if file == "data" else own)

    for name, reason in (
        ("policy_class", "mkdir is no policy of "),
        ("observation_space", "mkdir is no space of a policy"),
        ("action_space", "mkdir is no space of a policy"),
        ("policy_kwargs", "mkdir makes no numbers, lists or arrays"),
    ):
        put(name)
        with pytest.raises(ValueError, match=reason):
            PolicyAgent.load(path, "cpu")
    put("_last_obs")
    PolicyAgent.load(path, "cpu")
    assert not sprung.exists()
    PPO.load(path, device="cpu")
    assert sprung.exists()


def changed(path: Path, **data: Any) -> Path:
    """Write a policy.zip anew with other entries in its data."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["data"] = json.dumps(json.loads(content["data"]) | data).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, own in content.items():
            archive.writestr(name, own)
    return path


def test_zips_unpack_to_what_a_policy_needs(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(saved())  # compressed anew
    assert isinstance(PolicyAgent.load(path, "cpu").policy, ImplicitPolicy)
    for name in ("data", "policy.pth"):
        with monkeypatch.context() as patch:
            patch.setitem(saved_policies._LIMITS, name, 1000)
            with pytest.raises(ValueError, match=f"'{name}' unpacks to .* bytes, more than 1,000"):
                PolicyAgent.load(path, "cpu")
    with zipfile.ZipFile(path) as archive:
        arguments = json.loads(archive.read("data"))["policy_kwargs"]
    spaces = {"observation": {"dict": {}}, "action": {"discrete": 9**9, "start": 0}}
    changed(path, policy_spaces=spaces)
    with pytest.raises(ValueError, match="387420489 actions on a grid of 16"):
        PolicyAgent.load(path, "cpu")
    changed(path, policy_kwargs=arguments | {"grid": 10**6})
    with pytest.raises(ValueError, match="grid must be from 1 to 4096, got 1000000"):
        PolicyAgent.load(path, "cpu")


def test_only_click_policies_are_loaded(saved: Callable[..., Path]) -> None:
    pickled = base64.b64encode(pickle.dumps(MultiInputActorCriticPolicy)).decode()
    path = changed(saved(), policy_class={":serialized:": pickled})
    with pytest.raises(ValueError, match="MultiInputActorCriticPolicy is no policy of "):
        PolicyAgent.load(path, "cpu")


def test_command_line_writes_its_files(tiny_env: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--policy", "random", "--out", str(out), "--episodes", "8", "--num-envs", "4"]
    arguments += ["--backbone", "tiny", "--checkpoint", tiny_env["checkpoint"], "--device", "cpu"]
    summary = main(arguments)
    results = json.loads((out / "results.json").read_text())
    assert results["random"] == summary
    rows = (out / "episodes.csv").read_text().splitlines()
    assert len(rows) == 9
    mean = np.mean([float(row.split(",")[2]) for row in rows[1:]])
    assert mean == pytest.approx(summary["mean_iou"], abs=1e-3)
    assert (out / "episodes.gif").read_bytes()[:3] == b"GIF"
    assert results["iou_after_steps"][-1] == pytest.approx(mean, abs=1e-3)
    assert (out / "iou_after_steps.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileExistsError, match="out holds a finished run"):
        main([*arguments, "--seed", "1"])
    assert json.loads((out / "results.json").read_text()) == results
    assert main([*arguments, "--overwrite", "--no-pictures"]) == summary
    assert {path.name for path in out.iterdir()} == {"results.json", "episodes.csv"}


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("oracle", "oracle"),
        ("runs/mine/policy.zip", "mine"),
        ("policy.zip", "policy"),
        ("best.zip", "best"),
        ("hf://USER/NAME@v1.0", "NAME"),
    ],
)
def test_the_default_folder_names_environment_policy_and_seed(policy: str, name: str) -> None:
    folder = EvaluateConfig(policy, seed=2).folder
    assert str(folder) == f"runs/evaluate/SamSeg-v0-{name}-2"


@pytest.mark.parametrize("dataset", ["folder", "coco"])
def test_a_trained_agent_does_not_play_images_that_may_be_training_images(
    saved: Callable[..., Path],
    tiny_env: dict[str, Any],
    squares: Path,
    tmp_path: Path,
    dataset: str,
) -> None:
    policy = saved()
    arguments = ["--dataset", dataset, "--data", str(squares), "--backbone", "tiny"]
    arguments += ["--checkpoint", tiny_env["checkpoint"], "--device", "cpu", "--episodes", "2"]
    arguments += ["--num-envs", "2", "--out", str(tmp_path / "out"), "--no-pictures"]
    options = ["--dataset-kwargs"]
    if dataset == "coco":
        options += ["annotations", str(squares / "all.json")]
    unsplit = [*arguments, *options] if dataset == "coco" else arguments
    with pytest.raises(ValueError, match="of split 'test' may be training images"):
        main([*unsplit, "--policy", str(policy)])
    assert not (tmp_path / "out").exists()
    # The advice of the error, and what nothing was trained for.
    main([*arguments, *options, "split_seed", "1", "--policy", str(policy)])
    main([*unsplit, "--policy", str(policy), "--split", "all", "--overwrite"])
    main([*unsplit, "--policy", "random", "--overwrite"])


def test_images_that_a_policy_was_trained_on_are_known_from_its_run(
    saved: Callable[..., Path], tiny_env: dict[str, Any], squares: Path, tmp_path: Path
) -> None:
    policy = saved()
    trained = {"dataset": "coco", "data": str(squares)}
    trained["dataset_kwargs"] = {"annotations": str(squares / "all.json"), "split_seed": 1}
    run = {"env": "SamSeg-v0", "env_config": trained}
    (policy.parent / "results.json").write_text(json.dumps({"config": run}))
    arguments = ["--policy", str(policy), "--dataset", "coco", "--data", str(squares)]
    arguments += ["--backbone", "tiny", "--checkpoint", tiny_env["checkpoint"], "--device", "cpu"]
    arguments += ["--episodes", "2", "--num-envs", "2", "--out", str(tmp_path / "out")]
    arguments += ["--no-pictures", "--dataset-kwargs", "annotations", str(squares / "all.json")]
    for options in (["split_seed", "2"], ["split_seed", "1", "--split", "all"], ["--split", "all"]):
        with pytest.raises(ValueError, match=r"images of split '(test|all)' are training images"):
            main([*arguments, *options])
    assert not (tmp_path / "out").exists()
    main([*arguments, "split_seed", "1"])
    # Of a run whose images are not here, nothing is known.
    trained["data"] = str(tmp_path / "gone")
    (policy.parent / "results.json").write_text(json.dumps({"config": run}))
    assert training_images(str(policy)) is None


def test_help_lists_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: python -m agents.evaluate" in shown and policy_help() in shown
    for _, task in TASKS.items():
        assert ", ".join(task.baselines.names()) in policy_help() and task.env_id in policy_help()
    assert "--dataset-kwargs kind night" in shown


def test_a_policy_plays_only_what_it_was_trained_on(
    tiny_env: dict[str, Any], saved: Callable[..., Path]
) -> None:
    agent = PolicyAgent.load(saved(), "cpu")
    with pytest.raises(ValueError, match=r"grid 16 \(the environment has 10\)"):
        evaluate(agent, settings_of(tiny_env, grid=10), episodes=2)
    with pytest.raises(ValueError, match=r"stop False \(the environment has True\)"):
        evaluate(agent, settings_of(tiny_env, stop=True), episodes=2)


def test_a_policy_plays_only_its_own_environment(
    tiny_env: dict[str, Any], saved: Callable[..., Path]
) -> None:
    own = {key: tiny_env[key] for key in ("backbone", "checkpoint", "device")}
    everything = EverythingConfig(split="test", obs="handle", grid=8, **own)
    env, core = make_vector_env("SamEverything-v0", 2, everything)
    backbone = {"name": "tiny", "checkpoint": own["checkpoint"], "device": "cpu"}
    features = {"backbone": backbone, "budget": everything.budget}
    policy = EverythingPolicy(
        core.observation_space,
        env.single_action_space,  # type: ignore[arg-type]
        lambda _: 0.0,
        features=features,
        grid=8,
        stop=True,
    )
    clicks = settings_of(tiny_env, grid=8, stop=True)
    with pytest.raises(ValueError, match="not play SamSeg-v0. Pass --env SamEverything-v0"):
        evaluate(PolicyAgent(policy), clicks, episodes=2)
    implicit = PolicyAgent.load(saved(), "cpu")
    with pytest.raises(
        ValueError, match="SamEverything-v0. Pass --env SamContinual-v0 or --env SamSeg-v0"
    ):
        evaluate(implicit, everything, env_id="SamEverything-v0", episodes=2)
    _, core = make_vector_env("SamSeg-v0", 1, settings_of(tiny_env))
    core.action_space = gym.spaces.Discrete(513)
    implicit.policy.others = ["stop"]  # as if it knew a "stop" that it has no logit for
    core.config = settings_of(tiny_env, stop=True)
    with pytest.raises(ValueError, match="with 512 actions, the environment has 513"):
        check_fits(implicit.policy, core)


@pytest.mark.parametrize("trained_on", ["handle", "full"])
def test_a_trained_policy_plays_both_forms_scalar_and_vector(
    tiny_env: dict[str, Any], saved: Callable[..., Path], trained_on: str
) -> None:
    path = saved(obs=trained_on)
    model, agent = PPO.load(path, device="cpu"), PolicyAgent.load(path, "cpu")
    chosen = []
    for obs in ("full", "handle"):
        env = gym.make("SamSeg-v0", **tiny_env, obs=obs, split="test")
        single, _ = env.reset(seed=0)
        action, _ = model.predict(single, deterministic=True)
        assert action.shape == () and env.action_space.contains(action[()])
        assert agent.act(env.unwrapped.core, single) == action
        env.step(agent.act(env.unwrapped.core, single))
        envs, core = make_vector_env("SamSeg-v0", 2, settings_of(tiny_env))
        batch, _ = envs.reset(seed=0)
        actions, _ = model.predict(batch, deterministic=True)
        assert actions.shape == (2,) and actions.tolist() == agent.act(core, batch).tolist()
        chosen.append((int(action), int(actions[0])))
    assert len({*chosen[0], *chosen[1]}) == 1


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_sb3_evaluates_a_policy_on_the_default_environment(
    tiny_env: dict[str, Any], saved: Callable[..., Path]
) -> None:
    model = PPO.load(saved(), device="cpu")
    rewards, lengths = evaluate_policy(
        model, gym.make("SamSeg-v0", **tiny_env), 2, return_episode_rewards=True
    )
    assert len(rewards) == 2 and lengths == [5, 5]


def test_observations_that_a_policy_cannot_read_are_refused(saved: Callable[..., Path]) -> None:
    policy = PolicyAgent.load(saved(), "cpu").policy
    with pytest.raises(ValueError, match="'handle' or 'sam_image_embeddings', got pixels"):
        policy.predict({"pixels": np.zeros(3)})
    with pytest.raises(ValueError, match=r"shape \(32, 4, 4\), got \(256, 64, 64\)"):
        policy.predict({"sam_image_embeddings": np.zeros((256, 64, 64), np.float32)})
    with pytest.raises(
        ValueError, match=r"needs 'sam_pred_mask_prob', .* \(sam_image_embeddings\)"
    ):
        policy.predict({"sam_image_embeddings": np.zeros((32, 4, 4), np.float32)})


def test_a_policy_is_read_from_its_file_each_time(saved: Callable[..., Path]) -> None:
    path = saved()
    first = PolicyAgent.load(path, "cpu").policy.state_dict()
    saved(seed=3)
    second = PolicyAgent.load(path, "cpu").policy.state_dict()
    assert any(not torch.equal(first[name], value) for name, value in second.items())


def test_policies_with_nan_weights_are_refused(saved: Callable[..., Path]) -> None:
    path = saved(nan=True)
    with pytest.raises(ValueError, match=r"policy\.zip: not a readable .* 1 of .* NaN or infinite"):
        PolicyAgent.load(path, "cpu")


@pytest.mark.parametrize("name", SHIPPED)
def test_agents_in_the_package_play_well(name: str) -> None:
    assert SHIPPED[name].stat().st_size < 16e6
    agent = load_agent(name, device="cpu")
    settings = SamSegConfig(split="test", device="cpu", obs="handle")
    played = evaluate(agent, settings, episodes=16, num_envs=16, seed=5)
    random = evaluate(load_agent("random"), settings, episodes=16, num_envs=16, seed=5)
    assert played.targets == random.targets
    assert played.ious.mean() > 0.6 > 2 * random.ious.mean()


@pytest.mark.parametrize("name", SHIPPED)
def test_agents_in_the_package_are_loaded_by_sb3_too(name: str) -> None:
    path = SHIPPED[name]
    policy, own = PPO.load(path, device="cpu").policy, PolicyAgent.load(path, "cpu").policy
    assert type(policy) is type(own) is POLICIES.get(name)
    torch.testing.assert_close(policy.state_dict(), own.state_dict(), rtol=0, atol=0)
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    assert data["policy_name"] == name and data["policy_class"]["__module__"] == "agents.policies"


def test_policies_know_their_sam_by_its_weights(tmp_path: Path) -> None:
    """What was called micro once is found under its present name; other weights are refused."""

    def loaded(weights: dict[str, str] | None) -> str:
        path = changed(shutil.copy(SHIPPED["implicit"], tmp_path), policy_weights=weights)
        return PolicyAgent.load(path, "cpu").policy.features_extractor.backbone.name

    # Files of earlier versions do not say which weights they are for.
    assert loaded(None) == loaded({"backbone": FIRST_MICRO}) == "micro-v0"
    with pytest.raises(ValueError, match="trained with other weights of the backbone: restore"):
        loaded({"backbone": "0" * 32})


def test_policies_of_other_programs_know_their_sam(tmp_path: Path) -> None:
    """By its checkpoint, or by the masks in their observations."""

    def loaded(**data: Any) -> str:
        path = changed(shutil.copy(SHIPPED["implicit"], tmp_path), policy_weights=None, **data)
        return PolicyAgent.load(path, "cpu").policy.features_extractor.backbone.name

    policy: Any = PolicyAgent.load(SHIPPED["implicit"], "cpu").policy
    arguments = {"features": policy.features, "grid": policy.grid, "search": policy.search}
    first = str(BACKBONES.get("micro-v0").weights)
    sam = {"name": "micro", "checkpoint": first, "device": "cpu", "dtype": "auto"}
    assert loaded(policy_kwargs=arguments | {"features": policy.features | {"backbone": sam}}) == (
        "micro-v0"
    )
    seen = policy.observation_space
    masks = gym.spaces.Box(0, 1, load_backbone("micro", device="cpu").mask_shape, np.float32)
    seen = gym.spaces.Dict({**seen.spaces, "sam_pred_mask_prob": masks})
    own = {"observation": space_to_json(seen), "action": space_to_json(policy.action_space)}
    sam = {"name": "micro", "checkpoint": None, "device": "cpu", "dtype": "auto"}
    arguments["features"] = policy.features | {"backbone": sam}
    assert loaded(policy_spaces=own, policy_kwargs=arguments) == "micro"


def test_policies_of_other_services_load_in_any_precision(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only `Backbone` has a digest that does not depend on it."""
    path = saved()
    shared: Any = PolicyAgent.load(path, "cpu").policy.features_extractor.backbone
    changed(path, policy_weights={"backbone": "another precision"})
    with pytest.raises(ValueError, match="other weights of the backbone"):
        PolicyAgent.load(path, "cpu")
    monkeypatch.delattr(Backbone, "weights_digest")
    monkeypatch.delitem(vars(shared), "weights_digest")
    assert isinstance(PolicyAgent.load(path, "cpu").policy, ImplicitPolicy)


def test_saved_policies_name_nothing_that_may_move(
    tiny_env: dict[str, Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A policy.zip holds the registry name; SB3's own entry names the package `agents.policies`."""
    options = (
        *("--env", "SamContinual-v0", "--total-timesteps", "64", "--max-steps", "2"),
        *("--stream-kwargs", "domains", "cells,night", "train_images", "4"),
        *("val_images", "4", "test_images", "4", "size", "64"),
    )
    train_ppo.main(arguments(tmp_path / "out", *options))
    path = tmp_path / "out" / "policy.zip"
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    assert data["policy_name"] == "implicit" and data["policy_weights"].keys() == {"backbone"}
    assert data["policy_spaces"]["action"] == {"discrete": 512, "start": 0}
    pickled = b"".join(
        base64.b64decode(value[":serialized:"])
        for value in data.values()
        if isinstance(value, dict) and ":serialized:" in value
    )
    ours = re.findall(rb"(?:agents|sam_gym)\.[a-z_.]+", pickled)
    assert set(ours) <= {b"agents.policies"}
    assert isinstance(PolicyAgent.load(path, "cpu").policy, ImplicitPolicy)
    assert isinstance(PPO.load(path, device="cpu").policy, ImplicitPolicy)


def test_a_policy_says_what_it_does_not_know() -> None:
    agent = load_agent("implicit", device="cpu")
    assert remarks(agent, "implicit", SamSegConfig(), make_dataset("scenes", "test")) == []
    rooms = make_dataset("rooms", "test")
    explicit = load_agent("explicit", device="cpu")  # it sees where its CLIP finds a word
    assert remarks(explicit, "explicit", SamSegConfig(dataset="rooms"), rooms) == []
    (line,) = remarks(agent, "implicit", SamSegConfig(dataset="rooms"), rooms)
    assert "has learned" in line and f"It does not know {rooms.categories[0]}" in line


def test_the_search_of_a_policy_can_be_set() -> None:
    agent = load_agent("implicit", device="cpu")
    assert isinstance(agent, PolicyAgent) and agent.policy.search
    for search in (0, 8):
        agent = load_agent("implicit", device="cpu")
        set_search(agent, search)
        assert cast(PolicyAgent, agent).policy.search == search
    random = load_agent("random")
    set_search(random, 0)
    with pytest.raises(ValueError, match="--search 8 needs a policy that was trained with"):
        set_search(random, 8)
