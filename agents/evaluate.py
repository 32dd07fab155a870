"""Evaluate an agent on held-out data: `python -m agents.evaluate --help`.

All agents play the same episodes (images and targets) under the same rules. Clicks
are scored at the size of the image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from textwrap import shorten
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import tyro
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from agents.baselines import Agent
from agents.curves import plot_iou_after_steps
from agents.policies.base import SamPolicy, StoredFeatures
from agents.policies.explicit import ExplicitPolicy
from agents.policies.implicit import MAX_SEARCH
from agents.policies.saved import SHIPPED, load_policy
from agents.ppo.command_line import env_of
from agents.ppo.config import with_present_names
from agents.ppo.vec_env import make_vector_env
from agents.search import best_clicks
from agents.sharing.pull import local_policy
from agents.sharing.repository import FILM, POLICY, PREFIX, RESULTS, STEPS
from agents.tasks import check_plays, names_by_environment, task_of
from sam_gym.data import DATASETS, Dataset
from sam_gym.data.splits import check_held_out
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.config import EnvConfig
from sam_gym.metrics.masks import mean_and_ci95
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_csv, write_json
from sam_gym.utils.provenance import own_commit, provenance
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import save_gif, tile
from sam_gym.utils.runs import refuse_finished, remove_files
from sam_gym.utils.settings import Count, Seed, checked, whole
from sam_gym.utils.text import listed

#: Approximate maximum number of frames of a film.
MAX_FRAMES = 32
#: Files that the command writes beside results.json and episodes.csv: a plot and a film.
_PICTURES = (STEPS, FILM)


@dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        ious: float64 (episodes,), final IoU per episode.
        rewards: float64 (episodes,), sum of rewards per episode.
        sources: origin of each episode's image.
        counts: name in `BaseCore.reported` (clicks, ...) -> value per episode.
        steps: IoU after each step, per episode.
        targets: name of the target per episode, if the environment has one.
        domains: name of the domain per episode, if the environment has a stream.
    """

    ious: np.ndarray
    rewards: np.ndarray
    sources: list[str]
    counts: dict[str, np.ndarray]
    steps: list[list[float]]
    targets: list[str] | None = None
    domains: list[str] | None = None

    @property
    def curve(self) -> np.ndarray:
        """Mean IoU after each step, float64 (steps,); finished episodes keep their IoU."""
        longest = max(map(len, self.steps))
        held = [own + own[-1:] * (longest - len(own)) for own in self.steps]
        return np.mean(held, axis=0)

    @property
    def clicks(self) -> np.ndarray:
        """Number of clicks per episode, int64 (episodes,)."""
        return self.counts["clicks"]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per episode with the columns that are not None."""
        columns: dict[str, Any] = {
            "source": self.sources,
            "target": self.targets,
            "iou": self.ious,
            "reward": self.rewards,
            **self.counts,
            "domain": self.domains,
        }
        columns = {name: column for name, column in columns.items() if column is not None}
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def iou_by_domain(self) -> dict[str, float]:
        """Return the mean IoU per domain, in the order of the stream; empty without a stream."""
        names = np.array(self.domains or [], object)
        return {
            name: float(self.ious[names == name].mean())
            for name in dict.fromkeys(self.domains or [])
        }

    def summary(self) -> dict[str, Any]:
        """Return `mean_iou`, `ci95` (half-width; None for one episode), `episodes`, more means,
        half-widths `ci95_NAME` of those that are no counts, and `by_domain` with a stream."""
        mean, half = mean_and_ci95(self.ious)
        measures = {k: v for k, v in self.counts.items() if np.issubdtype(v.dtype, np.floating)}
        by_domain = {name: round(value, 4) for name, value in self.iou_by_domain().items()}
        return {
            "mean_iou": mean,
            "ci95": half,
            "episodes": len(self.ious),
            "mean_reward": round(float(self.rewards.mean()), 4),
            **{f"mean_{k}": round(float(v.mean()), 3) for k, v in self.counts.items()},
            **{f"ci95_{k}": mean_and_ci95(v)[1] for k, v in measures.items()},
        } | ({"by_domain": by_domain} if by_domain else {})


def num_actions(space: spaces.Space) -> int:
    """Return the number of actions of a Discrete or MultiDiscrete space."""
    own: Any = space
    return int(np.prod(own.nvec)) if isinstance(space, spaces.MultiDiscrete) else int(own.n)


def check_fits(policy: SamPolicy, core: BaseCore[Any, Any]) -> None:
    """Raise `ValueError` if actions mean something else in an environment than to a policy.

    Args:
        policy: the policy.
        core: of the environment.
    """
    config, here = core.config, num_actions(core.action_space)
    check_plays(policy, config)
    extractor = cast(StoredFeatures, policy.features_extractor)
    own = policy.action_config(here)
    missing = [name for name in own if not hasattr(config, name)]
    if missing:
        raise ValueError(
            f"The policy was trained in another environment, with {', '.join(missing)}, which "
            "this one does not have. Pass the --env that it had."
        )
    wanted = {name: getattr(config, name) for name in own} | {"backbone": core.backbone}
    own |= {"backbone": extractor.backbone}
    different = [
        f"{name} {own[name]} (the environment has {wanted[name]})"
        for name in own
        if own[name] != wanted[name]
    ]
    if different:
        raise ValueError(
            f"The policy was trained with {'; '.join(different)}. Pass the options that it had."
        )
    trained = num_actions(policy.action_space)
    if trained != here:
        raise ValueError(
            f"The policy was trained with {trained} actions, the environment has {here}. "
            "Pass the --env and the options that it had."
        )


class PolicyAgent:
    """A trained policy as an agent.

    Args:
        policy: the policy.
        deterministic: take the most likely action, or what the policy's search finds, instead of
            sampling.
        search: let a policy with a search use it.
    """

    #: A `SamPolicy`; typed `Any`, since its subclass depends on the file.
    policy: Any

    def __init__(
        self, policy: SamPolicy, *, deterministic: bool = True, search: bool = True
    ) -> None:
        self.policy, self.deterministic, self.search = policy, deterministic, search

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> PolicyAgent:
        """Load a trained policy. No code that the file may hold runs (unlike with SB3's `load`).

        Args:
            path: of a policy.zip; the name of a bundled agent (implicit, explicit); or
                hf://USER/NAME[@REVISION] on the Hugging Face hub.
            device: "auto" (CUDA, then MPS, then CPU), or a torch device.

        Raises:
            FileNotFoundError: the file or repository does not exist.
            ValueError: the file holds no policy that is registered in `POLICIES`.
            OSError: the policy, or the weights of its SAM or CLIP, could not be loaded.
        """
        file = local_policy(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: no such policy. Pass the policy.zip of a training run, "
                f"{PREFIX}USER/NAME, or one of {', '.join(SHIPPED)}."
            )
        return cls(load_policy(file, device))

    @torch.no_grad()
    def act(self, core: BaseCore[Any, Any], observations: dict[str, Any]) -> Any:
        """Return the actions of a vector environment, int64 (B,), or that of a scalar one.

        Args:
            core: of the environment, `env.unwrapped.core`.
            observations: of the environment, with `obs="full"` or `obs="handle"`.

        Raises:
            ValueError: the policy plays another environment.
        """
        check_fits(self.policy, core)
        self.policy.set_training_mode(False)
        self.policy.set_categories(core.dataset.categories)
        core.compute_features()
        tensors, is_batch = self.policy.obs_to_tensor(observations)
        with self.policy.playing():
            if self.search and self.deterministic and self.policy.search:
                logits, _ = self.policy.logits_and_value(tensors)
                actions = best_clicks(self.policy, cast(Any, core), tensors, logits)
            else:
                act = self.policy.get_action_and_value
                action, *_ = act(tensors, deterministic=self.deterministic)
                actions = action.cpu().numpy()
        return actions if is_batch else actions[0]


class Arena:
    """Keeps the environment of an evaluation for the next one, if that has the same arguments.

    Its data stays open, and its images need not be read or drawn again.
    """

    def __init__(self) -> None:
        self._arguments: tuple[Any, ...] | None = None
        self._env: VectorEnv | None = None

    def enter(
        self, env_id: str, num_envs: int, env_config: EnvConfig
    ) -> tuple[VectorEnv, BaseCore[Any, Any]]:
        """Return an environment that resets nothing by itself, and its core; reset it first."""
        arguments = (env_id, num_envs, env_config)
        if self._env is None or arguments != self._arguments:
            self.close()
            mode = {"autoreset_mode": "Disabled"}
            self._env, _ = make_vector_env(env_id, num_envs, env_config, **mode)
            self._arguments = arguments
        return self._env, cast(Any, self._env.unwrapped).core

    def close(self) -> None:
        """Close the environment, if there is one."""
        if self._env is not None:
            self._env.close()
        self._env = None


@checked
def evaluate(
    agent: Agent,
    env_config: EnvConfig,
    *,
    env_id: str = "SamSeg-v0",
    episodes: Count = 256,
    num_envs: Count = 64,
    seed: Seed = 0,
    score: Literal["low", "full"] = "full",
    arena: Arena | None = None,
) -> Evaluation:
    """Play episodes and record their outcomes.

    All sub-environments play equally many episodes, so that short ones do not count more often.
    The same env config and seed give the same episodes. With a stream, all sub-environments play
    equally many episodes of each domain, domain by domain.

    Args:
        agent: the policy or baseline.
        env_config: of the environment; its `obs` is ignored.
        env_id: a registered environment.
        episodes: minimum number, over all domains; rounded up to a multiple of `num_envs`.
        num_envs: maximum number of sub-environments.
        seed: of the episodes.
        score: "full" (IoU at the size of the image) or "low", if the environment has the choice.
        arena: holds the environment for further evaluations; None: it is made and closed here.

    Raises:
        ValueError: an argument is wrong, or the agent does not play the environment.
    """
    task = task_of(env_id)
    env_config = task.env_config_for(agent, task.scored_at(env_config, score))
    # Held, so that the environment does not open it again.
    stream = task.stream(env_config)
    env_config, num_envs, per_env = task.share_episodes(env_config, episodes, num_envs)
    own_arena = arena or Arena()
    env, core = own_arena.enter(env_id, num_envs, env_config)
    del stream
    observations, _ = env.reset(seed=seed)
    totals = np.zeros(num_envs)
    rows: list[list[dict[str, Any]]] = [[] for _ in range(num_envs)]
    steps: list[list[float]] = [[] for _ in range(num_envs)]
    names = ("iou", *core.reported, "source", "target_name", "domain")
    while True:
        if all(len(row) + 1 >= per_env for row in rows):
            core.prefetcher.close()  # no episode follows these
        actions = agent.act(core, observations)
        observations, reward, terminated, truncated, infos = env.step(actions)
        totals += reward
        ended = terminated | truncated
        for index, so_far in enumerate(steps):
            so_far.append(float(infos["iou"][index]))
        for i in np.flatnonzero(ended):
            if len(rows[i]) < per_env:
                own = {name: infos[name][i] for name in names if name in infos}
                rows[i].append(own | {"reward": totals[i], "steps": steps[i]})
            totals[i], steps[i] = 0.0, []
        if all(len(row) == per_env for row in rows):
            break
        if ended.any():
            observations, _ = env.reset(options={"reset_mask": ended})
    if arena is None:
        own_arena.close()
    played = [row for own in rows for row in own]
    columns = {name: [row[name] for row in played] for name in played[0]}
    return Evaluation(
        np.array(columns["iou"]),
        np.array(columns["reward"]),
        columns["source"],
        {name: np.array(columns[name]) for name in core.reported},
        columns["steps"],
        columns.get("target_name"),
        columns.get("domain"),
    )


@checked
def film_episodes(
    agent: Agent,
    env_config: EnvConfig,
    *,
    env_id: str = "SamSeg-v0",
    count: Count = 6,
    seed: Seed = 0,
) -> list[np.ndarray]:
    """Return frames uint8 (H, W, 3) of episodes side by side; the last frame is repeated.

    Long episodes have fewer frames than steps.
    """
    task = task_of(env_id)
    env_config = task.env_config_for(agent, task.scored_at(env_config, "full"))
    options = {"autoreset_mode": "NextStep", "render_mode": "rgb_array"}
    env, core = make_vector_env(env_id, count, env_config, **options)
    observations, _ = env.reset(seed=seed, options=task.reset_options(core))
    current = list(cast(Any, env.render()))
    columns = min(count, 3)
    frames = [tile(current, columns)]
    ended = np.zeros(count, bool)
    stride = -(-env_config.max_episode_steps // MAX_FRAMES)
    for step in range(1, env_config.max_episode_steps + 1):
        observations, _, terminated, truncated, _ = env.step(agent.act(core, observations))
        ends = (terminated | truncated) & ~ended
        if step % stride == 0 or ends.any():
            drawn = cast(Any, env.render())
            for i in np.flatnonzero(~ended):
                current[i] = drawn[i]
            frames.append(tile(current, columns))
        ended |= ends
        if ended.all():
            break
    env.close()
    return [*frames, frames[-1], frames[-1]]


def policy_help() -> str:
    """Return the help text of `--policy`: bundled agents and the baselines of each environment."""
    baselines = names_by_environment(lambda task: task.baselines.names())
    return (
        f"Path of a policy.zip, hf://USER/NAME[@REVISION], a bundled agent: {', '.join(SHIPPED)}; "
        f"or a baseline: {baselines}."
    )


@documented
@dataclass
class EvaluateConfig:
    """Evaluate a trained policy or a baseline on held-out data."""

    policy: Annotated[str, tyro.conf.arg(help=policy_help())]
    env: str = "SamSeg-v0"
    """Environment id."""
    out: str | None = None
    """Folder for results.json, episodes.csv, iou_after_steps.png and episodes.gif (None:
    runs/evaluate/ENV-POLICY-SEED)."""
    overwrite: bool = False
    """Replace the results in `out`. Without --overwrite, a finished evaluation is an error."""
    episodes: Count = 256
    """Episodes to play, rounded up to a multiple of the number of sub-environments."""
    num_envs: Count = 64
    """Number of sub-environments, at most as many as episodes."""
    seed: Seed = 1000
    """Seed of the episodes. They are the same for every policy, with the same --episodes and
    --num-envs."""
    search: Annotated[int, whole(0, MAX_SEARCH)] | None = None
    """Number of likeliest clicks that a policy trained with a search decodes at each step (0: play
    the likeliest click; None: as it was trained)."""
    categories: str | None = None
    """Comma-separated categories: the only objects in scenes, the targets in coco."""
    pictures: bool = True
    """Draw iou_after_steps.png and episodes.gif."""
    env_config: Annotated[EnvConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamSegConfig(split="test")
    )

    @property
    def folder(self) -> Path:
        """Folder of the results: `out`, or its default."""
        on_hub = self.policy.startswith(PREFIX)
        path = PurePath(self.policy.partition("@")[0] if on_hub else self.policy)
        # runs/ppo/policy.zip is called ppo, and hf://USER/NAME is called NAME.
        name = path.parent.name if path.name == POLICY else path.name
        name = (name or path.name).removesuffix(".zip")
        return Path(self.out or f"runs/evaluate/{self.env}-{name}-{self.seed}").expanduser()


def load_agent(
    policy: str, seed: int = 0, device: str = "auto", env_id: str = "SamSeg-v0"
) -> Agent:
    """Return a baseline by name, or load a trained policy by path or by its name on the hub.

    Args:
        policy: the name or path.
        seed: of a baseline.
        device: of a trained policy.
        env_id: environment of the baseline.
    """
    known = task_of(env_id).baselines
    if policy in known.names():
        return known.get(policy)(seed)
    if policy not in SHIPPED and not policy.startswith(PREFIX):
        if Path(policy).suffix != ".zip" and not Path(policy).exists():
            kinds = [*known.names(), *SHIPPED, "PATH/policy.zip", f"{PREFIX}USER/NAME"]
            raise unknown_name("policy", policy, kinds)
    return PolicyAgent.load(policy, device)


def set_search(agent: Agent, search: int) -> None:
    """Set the number of clicks that a trained policy decodes before one is played.

    Raises:
        ValueError: the agent was trained without a search, and has no target map to judge masks.
    """
    trained = agent.policy.search if isinstance(agent, PolicyAgent) else 0
    if search and not trained:
        raise ValueError(
            f"--search {search} needs a policy that was trained with --search. Leave it out."
        )
    if trained:
        cast(PolicyAgent, agent).policy.search = search


def training_images(policy: str) -> Dataset | None:
    """Open the training images that results.json beside a policy names.

    Returns:
        The images; None if there is no such file, or they cannot be opened here.
    """
    path = Path(policy).with_name(RESULTS)
    if policy.startswith(PREFIX) or not path.is_file():
        return None
    try:
        run = with_present_names(json.loads(path.read_text())["config"], str(path))
        if "dataset" in run["env_config"]:
            DATASETS.get_from_file(run["env_config"]["dataset"])
        return task_of(run["env"]).config_class(**run["env_config"]).open_dataset()
    except (LookupError, TypeError, ValueError, OSError):
        return None


def remarks(
    agent: Agent,
    policy: str,
    env_config: EnvConfig,
    dataset: Dataset,
    train: Dataset | None = None,
) -> list[str]:
    """Return what people should know before a policy plays images that it was not trained for.

    Args:
        agent: the policy.
        policy: its name or path.
        env_config: of the environment that it plays.
        dataset: the images there.
        train: its training images, if they are known.
    """
    if not isinstance(agent, PolicyAgent) or not isinstance(env_config, SamSegConfig):
        return []
    lines = []
    if train is not None and train.name != dataset.name:
        lines.append(f"{policy} was trained on {train.name}, and plays {dataset.name} here.")
    known = list(agent.policy.features.get("vocabulary", ()))
    # No index: all categories are targets.
    chosen = env_config.target_indices(dataset.categories) or range(len(dataset.categories))
    names = [dataset.categories[k] for k in chosen]
    unknown = [name for name in names if name not in known]
    sees_words = isinstance(agent.policy, ExplicitPolicy)
    if known and unknown and env_config.target == "category" and not sees_words:
        lines.append(
            f"{policy} has learned {shorten(', '.join(known), 200)}. It does not know "
            f"{shorten(', '.join(unknown), 200)}, and segments anything for them."
        )
    return lines


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line."""
    given = sys.argv[1:] if args is None else list(args)
    env_id = env_of(given) or EvaluateConfig.env
    task = task_of(env_id)
    default = EvaluateConfig(
        policy=tyro.MISSING, env=env_id, env_config=task.config_class(split="test")
    )
    config = cli.parse(EvaluateConfig, "python -m agents.evaluate", given, default=default)
    env_config = task.with_categories(config.env_config, config.categories)
    if not config.overwrite:
        refuse_finished(config.folder, RESULTS)
    agent = load_agent(config.policy, config.seed, env_config.device, env_id)
    if config.search is not None:
        set_search(agent, config.search)
    trained_on_other_data = config.policy in (*task.baselines.names(), *SHIPPED)
    # Baselines have learned nothing: their images are opened by the evaluation alone.
    if isinstance(agent, PolicyAgent) or env_config.adapter is not None:
        dataset = env_config.open_dataset()
        train = None if trained_on_other_data else training_images(config.policy)
        for line in remarks(agent, config.policy, env_config, dataset, train):
            print(line)
    if not trained_on_other_data or env_config.adapter is not None:
        if train is None or env_config.adapter is not None:
            check_held_out(dataset, env_config.split)
        if train is not None:
            check_held_out(dataset, env_config.split, train)
    own_commit()  # for results.json
    out = make_folder(config.folder)
    remove_files(out, _PICTURES)  # of an earlier evaluation
    counts: dict[str, Any] = {"episodes": config.episodes, "num_envs": config.num_envs}
    result = evaluate(agent, env_config, env_id=env_id, seed=config.seed, **counts)
    summary, curve = result.summary(), result.curve.round(4).tolist()
    written = {config.policy: summary, "iou_after_steps": curve, "config": asdict(config)}
    write_json(out / RESULTS, written | provenance())
    write_csv(out / "episodes.csv", result.rows())
    files = [RESULTS, "episodes.csv"]
    if config.pictures:
        plot, film = (out / name for name in _PICTURES)
        name = config.policy if config.policy in task.baselines.names() else "agent"
        plot_iou_after_steps(plot, {name: curve})
        save_gif(film, film_episodes(agent, env_config, env_id=env_id, seed=config.seed))
        files += _PICTURES
    print(json.dumps(summary, indent=2))
    print(f"Wrote {listed(files)} to {out}.")
    return summary


if __name__ == "__main__":
    cli.run(main)
