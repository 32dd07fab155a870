"""Agents to and from a local hub that answers the requests of huggingface_hub."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from agents import train_ppo
from agents.annotation.presence import Calibration, Logistic
from agents.evaluate import PolicyAgent, evaluate
from agents.hub import main
from agents.sharing.card import model_card
from agents.sharing.pull import HubPullConfig, local_policy, pull
from agents.sharing.push import HubPushConfig, push
from agents.sharing.repository import RUN_FILES
from agents.sharing.run import TrainingRun
from agents.tasks.base import shell_option
from sam_gym.envs.click import SamSegConfig
from sam_gym.utils import cli
from sam_gym.utils.digest import file_digest

Hub = Any


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    arguments: Callable[..., list[str]],
    build_tiny: Callable[[], Any],
    backbone_added: Callable[..., AbstractContextManager[None]],
) -> Path:
    """Folder of a short run of train_ppo."""
    out = tmp_path_factory.mktemp("trained") / "ppo"
    with backbone_added("tiny", build=build_tiny):
        short = ("--total-timesteps", "32", "--eval-every", "32", "--checkpoint-every", "32")
        train_ppo.main(arguments(out, *short, "--max-steps", "2", "--pictures"))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A writable copy of a run's folder."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def pushed(run: Path, repo: str = "me/clicker", **more: Any) -> str:
    return push(HubPushConfig(str(run), repo, **more))


def test_what_is_pulled_is_what_was_pushed(
    hub: Hub, run: Path, tiny_env: dict[str, Any], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    url = pushed(run)
    repo = hub.repos["me/clicker"]
    assert not repo.private and len(repo.commits) == 2 and url.endswith(repo.sha(1))
    assert set(repo.commits[1]) == {".gitattributes", "README.md", *RUN_FILES}
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    path = pull(HubPullConfig("me/clicker"))
    assert str(path).startswith(str(tmp_path / "cache"))
    copied = pull(HubPullConfig("me/clicker", out=str(tmp_path / "out")))
    assert copied == tmp_path / "out" / "policy.zip"
    (copied.parent / "episodes.gif").write_bytes(b"of another agent")
    with pytest.raises(FileExistsError, match=r"policy.zip.*--overwrite"):
        pull(HubPullConfig("me/clicker", out=str(tmp_path / "out")))
    pull(HubPullConfig("me/clicker", out=str(tmp_path / "out"), overwrite=True))
    for name in RUN_FILES:
        assert (path.parent / name).read_bytes() == (copied.parent / name).read_bytes()
        if name != "results.json":
            assert (path.parent / name).read_bytes() == (run / name).read_bytes()
    got, sent = (json.loads((at / "results.json").read_text()) for at in (path.parent, run))
    assert set(sent["config"]) - set(got["config"]) >= {"out", "resume", "mlflow_uri"}
    assert got | {"config": None} == sent | {"config": None}

    settings = SamSegConfig(obs="handle", split="test", **tiny_env)
    agents = [PolicyAgent.load(name, "cpu") for name in (run / "policy.zip", "hf://me/clicker")]
    first, second = (evaluate(agent, settings, episodes=6, num_envs=3) for agent in agents)
    assert np.array_equal(first.ious, second.ious) and first.targets == second.targets


def test_the_calibration_of_presence_goes_along(hub: Hub, run: Path, tmp_path: Path) -> None:
    policy, model = run / "policy.zip", Logistic((1.0,), 0.5)
    values = {"clip": {"name": "clip_micro"}, "weights": "w", "before": model, "after": model}
    calibration = Calibration(file_digest(policy), stop=0.1, threshold=0.5, held_out={}, **values)
    written = calibration.write(policy).read_bytes()
    pushed(run)
    repo = hub.repos["me/clicker"]
    assert repo.commits[1]["presence.json"] == written
    copied = pull(HubPullConfig("me/clicker", out=str(tmp_path / "out")))
    for path in (copied, local_policy("hf://me/clicker")):
        found = Calibration.read(path)
        assert found is not None and found.threshold == 0.5
    # Of another policy: refused; without one, that of the agent before goes.
    policy.write_bytes(policy.read_bytes() + b"newer")
    with pytest.raises(ValueError, match="calibrated for another"):
        pushed(run)
    assert len(repo.commits) == 2
    (run / "presence.json").unlink()
    pushed(run)
    assert "presence.json" not in repo.commits[2]
    pull(HubPullConfig("me/clicker", out=str(tmp_path / "out"), overwrite=True))
    assert not (tmp_path / "out" / "presence.json").exists()


def test_a_revision_is_an_agent_of_its_own(hub: Hub, run: Path, tiny_env: dict[str, Any]) -> None:
    pushed(run)
    (run / "policy.zip").write_bytes((run / "policy.zip").read_bytes() + b"newer")
    pushed(run)
    repo = hub.repos["me/clicker"]
    assert [len(commit) for commit in repo.commits] == [1, 6, 6]
    newest, oldest = (
        pull(HubPullConfig("me/clicker")),
        pull(HubPullConfig("me/clicker", repo.sha(1))),
    )
    assert newest.read_bytes() == oldest.read_bytes() + b"newer"
    assert PolicyAgent.load(f"hf://me/clicker@{repo.sha(1)}", "cpu")
    with pytest.raises(FileNotFoundError, match=r"me/clicker: .* no such revision"):
        pull(HubPullConfig("me/clicker", "next"))


def test_the_card_says_what_results_say(run: Path, hub: Hub) -> None:
    (run / "README.md").write_text("My notes.")
    with pytest.raises(FileExistsError, match=r"README.md is no model card of sam-gym. Rename"):
        pushed(run, card_only=True)
    (run / "README.md").unlink()
    path = pushed(run, card_only=True)
    assert path == pushed(run, card_only=True) == str(run / "README.md") and hub.asked == []
    card, results = ModelCard.load(path), json.loads((run / "results.json").read_text())
    (measured,) = card.data.eval_results or []
    assert (measured.metric_type, measured.metric_value) == (
        "mean_iou",
        results["agent"]["mean_iou"],
    )
    assert measured.dataset_split == "test" and measured.dataset_type == "scenes"
    assert card.data.license == "apache-2.0" and card.data.library_name == "sam-gym"
    assert {"reinforcement-learning", "stable-baselines3", "sam-gym"} <= set(card.data.tags or [])
    for name in ("random", "center", "confident"):
        row = results[name]
        assert f"| {name} | {row['mean_iou']:.3f} ± {row['ci95']:.3f} | 2.0 |" in card.text
    assert "**this agent**" in card.text and f"**{results['gap_closed']:.2f}**" in card.text
    assert "annotate --policy hf://me/clicker" in card.text and "cross, fish" in card.text
    assert "which training never saw" in card.text
    # Nothing tells where the run was, and its settings can be trained with again.
    assert str(run.parent) not in card.text and "tiny.pth" in card.text
    config = run.parent / "config.yaml"
    config.write_text(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert train_ppo.read_config(["--config", str(config)]).total_timesteps == 32


def test_the_card_of_other_kinds_of_agents(run: Path) -> None:
    made = TrainingRun.read(run)
    config = made.results["config"]
    config["env_config"] |= {"target": "instance", "dataset": "coco", "checkpoint": None}
    config |= {"policy": "explicit", "clip": "ViT-B-16"}
    made.results.update(gap_closed=None, held_out_split="train")
    made.results["agent"]["episodes"], made.results["confident"]["episodes"] = 64, 16
    text = model_card(made, "me/clicker", "mit")
    assert "agents.evaluate --policy hf://me/clicker --target instance --dataset coco" in text
    assert "--data PATH --split train" in text
    assert "told in words, through the CLIP `ViT-B-16`" in text and "no gap to close" in text
    for said in ("procedural", "same path", "never saw"):
        assert said not in text
    assert "license: mit" in text and "over 64 episodes" in text
    assert "| confident (16 of these episodes) |" in text


def test_the_card_claims_unseen_images_only_where_they_were_compared(run: Path) -> None:
    made = TrainingRun.read(run)
    assert made.results["shared_images"] == 0
    # Former versions trained and reported on the same files, without a word.
    made.results["config"]["env_config"] |= {"dataset": "folder", "checkpoint": None}
    for shared, unseen in ((None, False), (0, True), (3, False)):
        made.results.pop("shared_images", None)
        made.results.update({} if shared is None else {"shared_images": shared})
        assert ("never saw" in model_card(made, "me/clicker", "mit")) is unseen


def test_a_finished_run_is_replaced_as_a_whole_and_on_request_only(
    run: Path,
    arguments: Callable[..., list[str]],
    build_tiny: Callable[[], Any],
    add_backbone: Callable[..., None],
) -> None:
    add_backbone("tiny", build=build_tiny)
    pushed(run, card_only=True)
    (run / "notes.txt").write_text("mine")
    (run / "videos").mkdir(exist_ok=True)
    (run / "videos" / "step-99999999.gif").write_bytes(b"GIF")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = arguments(run, "--total-timesteps", "32", "--eval-every", "32", "--seed", "1")
    again += ["--max-steps", "2"]
    with pytest.raises(
        FileExistsError, match=r"holds a finished run \(results.json\).*--overwrite"
    ):
        train_ppo.main(again)
    with pytest.raises(ValueError, match="pass one of them"):
        train_ppo.main([*again, "--resume", "--overwrite"])
    (run / "results.json").rename(run / "moved.json")
    with pytest.raises(FileExistsError, match=r"holds a finished run \(policy.zip\)"):
        train_ppo.main(again)
    (run / "moved.json").rename(run / "results.json")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    results = train_ppo.main([*again, "--overwrite"])
    assert results["config"]["seed"] == 1
    assert (run / "policy.zip").read_bytes() != before[run / "policy.zip"]
    # Nothing of the former run stays, its model card and pictures neither; other files do.
    former = ("README.md", "videos/step-99999999.gif", "episodes.gif", "iou_after_steps.png")
    assert not [name for name in former if (run / name).exists()]
    assert len(list((run / "tensorboard").rglob("events*"))) == 1
    assert (run / "notes.txt").read_text() == "mine"


def test_an_agent_of_everything_is_pushed(
    hub: Hub,
    tmp_path: Path,
    arguments: Callable[..., list[str]],
    tiny_env: dict[str, Any],
) -> None:
    short = ("--total-timesteps", "32", "--eval-every", "32", "--checkpoint-every", "32")
    options = ("--env", "SamEverything-v0", "--dataset", "rooms", "--grid", "4", "--budget", "2")
    train_ppo.main(arguments(tmp_path / "run", *options, *short))
    pushed(tmp_path / "run", "me/finder")
    path = pull(HubPullConfig("me/finder"))
    # The run drew no pictures, and its card shows none.
    assert set(hub.repos["me/finder"].commits[1]) == {
        *(".gitattributes", "README.md", "policy.zip", "results.json")
    }
    card, results = (
        ModelCard.load(path.with_name("README.md")),
        json.loads(path.with_name("results.json").read_text()),
    )
    (measured,) = card.data.eval_results or []
    assert measured.metric_value == results["agent"]["mean_iou"]
    assert measured.dataset_type == "rooms" and "SamEverything-v0" in measured.dataset_name
    assert "| | mean IoU | points |" in card.text and "4 x 4 cells" in card.text
    command = "evaluate --policy hf://me/finder --dataset rooms --backbone tiny --grid 4 --budget 2"
    assert f"{command} --stop --checkpoint PATH --split test --env SamEver" in card.text
    assert "on SAM's low-res masks, with its 95% interval" in card.text
    assert "![" not in card.text
    assert PolicyAgent.load("hf://me/finder", "cpu").policy.grid == 4


def test_strings_of_a_run_stay_text(run: Path) -> None:
    made = TrainingRun.read(run)
    made.features["categories"] = ["{{ 6 * 7 }}", "{% raw %}"]
    card = model_card(made, "me/clicker", "mit\ntags: [x]")
    assert "{{ 6 * 7 }}, {% raw %}" in card and "42" not in ModelCard(card).data.to_yaml()
    assert ModelCard(card).data.license == "mit\ntags: [x]"
    assert "sam-gym" in (ModelCard(card).data.tags or [])


def test_names_in_a_card_are_inert(run: Path) -> None:
    made = TrainingRun.read(run)
    hostile = "$(touch x)'`id`;\n```\n---\n<img src=x onerror=y> [a](b)"
    made.features["categories"] = [hostile, "--out=x", "soccer_ball"]
    made.results["config"]["env_config"]["backbone"] = hostile
    made.results["held_out_split"] = "test; touch x"
    made.results["<b>bold</b>"] = made.results["agent"]
    card = model_card(made, "me/clicker", hostile)
    assert ModelCard(card).data.license == hostile
    # Whatever is not code:
    parts = re.split(r"^(`{3,}).*?^\1$", ModelCard(card).text, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", "".join(parts[::2]))
    assert "<" not in outside and "&lt;b&gt;bold" in outside and r"soccer\_ball" in outside
    assert "\n---\n" not in outside and r"\[a\](b)" in outside
    (command,) = (line for line in card.splitlines() if line.startswith("python -m agents.annot"))
    words = shlex.split(command)
    named = f"{' '.join(hostile.split())},--out=x"
    assert words[words.index("--categories") + 1] == named and "touch" not in words
    assert shell_option("split", "-x; y") == "'--split=-x; y'"


def test_a_run_with_former_option_names_is_pushed(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    config = results["config"]
    config["settings"], config["head"] = config.pop("env_config"), "spatial"
    config["views"] = config.pop("policy_plots")
    card = model_card(TrainingRun.read(run), "me/clicker", "mit")
    (run / "results.json").write_text(json.dumps(results))
    again = model_card(TrainingRun.read(run), "me/clicker", "mit")
    assert sorted(again.splitlines()) == sorted(card.splitlines())


def test_a_run_on_the_first_micro_is_pushed_by_its_present_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json.loads((run / "results.json").read_text())
    results["config"]["env_config"] |= {"backbone": "micro", "checkpoint": None}
    (run / "results.json").write_text(json.dumps(results))
    # Policies of earlier versions do not say which weights they are for.
    for data, name in (({}, "micro-v0"), ({"policy_weights": {"backbone": "0"}}, "micro")):
        monkeypatch.setattr("agents.sharing.run.read_data", lambda path, data=data: data)
        card = model_card(TrainingRun.read(run), "me/clicker", "mit")
        assert f"**Backbone**: `{name}`" in card and f"`{name}` is a demonstration model" in card


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_that_lacks_a_file_is_not_pushed(hub: Hub, run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in this folder"):
        pushed(run)
    assert hub.asked == []


def test_what_is_no_run_is_not_pushed(hub: Hub, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        pushed(run / "nowhere")
    with pytest.raises(ValueError, match="'clicker' cannot be a repo.*USER/NAME"):
        pushed(run, "clicker")
    (run / "results.json").write_text('{"agent": {}, "config": {}}')
    with pytest.raises(ValueError, match=r"results.json: not what train_ppo .* 'env'"):
        pushed(run)
    (run / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json: not readable"):
        pushed(run)
    assert hub.asked == []


def test_a_damaged_policy_is_not_pushed(hub: Hub, run: Path) -> None:
    (run / "policy.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"policy.zip: not a readable policy"):
        pushed(run)
    assert hub.asked == []


def test_repos_that_are_not_pushed_to(hub: Hub, run: Path) -> None:
    other = {"config.json": b"{}", "model.safetensors": b"", ".gitattributes": b""}
    hub.repos["me/bert"] = hub.Repo(commits=[other])
    with pytest.raises(FileExistsError, match=r"me/bert holds .*config.json.*Choose another"):
        pushed(run, "me/bert")
    assert hub.repos["me/bert"].commits == [other]
    hub.repos["me/blank"] = hub.Repo(commits=[{".gitattributes": b"", "README.md": b"soon"}])
    with pytest.raises(FileExistsError, match="me/blank exists and is public"):
        pushed(run, "me/blank", private=True)
    assert len(hub.repos["me/blank"].commits) == 1
    pushed(run, "me/blank")
    assert len(hub.repos["me/blank"].commits) == 2


def test_tokens(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(run, private=True)
    assert hub.repos["me/clicker"].private
    assert pull(HubPullConfig("me/clicker")).is_file()
    hub.asked.clear()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="No token of the hub: run `hf auth login`"):
        pushed(run)
    assert hub.asked == []
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(FileNotFoundError, match="no such repo, or it is private"):
        PolicyAgent.load("hf://me/clicker")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for refused in (lambda: pushed(run), lambda: pull(HubPullConfig("me/clicker"))):
        with pytest.raises(PermissionError, match=r"refuses \(401: .*HF_TOKEN") as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_no_agent_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="me/none: .* no such repo") as caught:
        pull(HubPullConfig("me/none"))
    assert "\n" not in str(caught.value)
    hub.repos["me/bert"] = hub.Repo(commits=[{"config.json": b"{}"}])
    with pytest.raises(FileNotFoundError, match=r"me/bert holds no policy.zip"):
        pull(HubPullConfig("me/bert", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected USER/NAME"):
        PolicyAgent.load("hf://bert")


def test_nobody_answers(no_hub: str, run: Path) -> None:
    for call in (lambda: pushed(run), lambda: pull(HubPullConfig("me/clicker"))):
        with pytest.raises(ConnectionError, match=f"{no_hub} could not be reached") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_cache_serves_while_nobody_answers(
    hub: Hub, run: Path, request: pytest.FixtureRequest
) -> None:
    pushed(run)
    path = pull(HubPullConfig("me/clicker"))
    request.getfixturevalue("no_hub")
    assert pull(HubPullConfig("me/clicker")) == path


@pytest.mark.slow
def test_the_command_in_another_process(
    hub: Hub, run: Path, start_script: Callable[..., Any], tmp_path: Path
) -> None:
    home = str(tmp_path / "home")
    settings = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": home, "HF_HUB_CACHE": home}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        # Processes of `start_script` have not imported huggingface_hub, which reads settings then.
        return start_script("agents.hub", *arguments, **settings, HF_HUB_OFFLINE="0").finish()

    done = command("push", "--run", str(run), "--repo", "me/clicker", "--private")
    assert done.returncode == 0 and "its name is hf://me/clicker" in done.stdout
    assert hub.repos["me/clicker"].private
    path = pull(HubPullConfig("me/clicker"))
    assert path.read_bytes() == (run / "policy.zip").read_bytes()
    failed = command("pull", "--repo", "me/none")
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("error: me/none: ")
    assert "Traceback" not in failed.stderr


def test_the_command_line(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", "--run", str(run), "--repo", "me/clicker", "--card-only"])
    assert "nothing was uploaded" in capsys.readouterr().out and hub.repos == {}
    with pytest.raises(SystemExit, match="error: me/clicker: .* no such repo"):
        cli.run(lambda: main(["pull", "--repo", "me/clicker"]))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "hf://USER/NAME@REVISION" in capsys.readouterr().out
