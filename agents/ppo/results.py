"""The results of a training run: the final evaluation, results.json and its pictures."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.baselines import Agent
from agents.curves import plot_iou_after_steps, plot_learning_curve
from agents.evaluate import Arena, Evaluation, PolicyAgent, evaluate, film_episodes
from agents.ppo.callbacks import MonitorCallback
from agents.ppo.config import VALIDATION_SEED
from agents.ppo.plan import Plan
from agents.ppo.stages import StreamCallback
from agents.sharing.repository import CURVE, FILM, FORGETTING, RESULTS, STEPS
from sam_gym.envs.base_core import BaseCore
from sam_gym.metrics.masks import with_interval
from sam_gym.utils.files import write_json
from sam_gym.utils.plots import plot_matrix
from sam_gym.utils.provenance import provenance
from sam_gym.utils.render import save_gif

#: A baseline that decodes many times per step plays one in so many of the final episodes, but not
#: fewer than this. The oracle plays all: the gap is measured by it.
_SLOW_SHARE, _FEWEST = 4, 16


def write_results(
    plan: Plan,
    agent: PolicyAgent,
    outcome: Evaluation | None,
    eval_baselines: dict[str, float],
    monitor: MonitorCallback,
    walk: StreamCallback | None,
    core: BaseCore[Any, Any],
) -> tuple[dict[str, Any], list[Path]]:
    """Compare a trained policy with the baselines; write results.json and, if asked for, pictures.

    Args:
        plan: the run.
        agent: the policy.
        outcome: of its final evaluation, if that was made already.
        eval_baselines: from `baselines_on_validation`.
        monitor: has the curves of the training.
        walk: has the results after each domain, of a run over a stream.
        core: the sub-environments of the training.

    Returns:
        The content of results.json, and the files written.
    """
    config, task, held_out = plan.config, plan.task, plan.held_out
    out, trained = config.folder, time.monotonic()
    outcomes = _final_evaluation(plan, agent, outcome)
    results: dict[str, Any] = {name: own.summary() for name, own in outcomes.items()}
    curves = {name: own.curve.round(4).tolist() for name, own in outcomes.items()}
    results["gap_closed"] = _gap_closed(results)
    print(f"  gap closed (agent - random) / (oracle - random): {results['gap_closed']}")
    for line in task.compare(results, tuple(outcomes)):
        print(f"  {line}")

    if walk is not None:
        results["continual"] = own = walk.results()
        print("  " + ", ".join(f"{n} {own[n]:.3f}" for n in ("last_iou", "avg_iou", "ff_iou")))
    results |= {
        "held_out_split": held_out.split,
        "shared_images": plan.shared_images,
        "training_seconds": round(trained - monitor.started, 1),
        "total_seconds": round(time.monotonic() - monitor.started, 1),
        "config": asdict(config),
        **provenance(backbone=core.backbone),
        "train_curve": monitor.train_curve,
        "eval_curve": monitor.eval_curve,
        "eval_baselines": eval_baselines,
        "iou_after_steps": curves,
    }
    write_json(out / RESULTS, results)
    files = [out / RESULTS]
    if config.pictures:
        files += _draw(plan, agent, results, walk, core.dataset.name)
    return results, files


def _draw(
    plan: Plan, agent: PolicyAgent, results: dict[str, Any], walk: StreamCallback | None, title: str
) -> list[Path]:
    """Draw the pictures of a run; return the files."""
    config = plan.config
    learning, steps, film = files = [config.folder / name for name in (CURVE, STEPS, FILM)]
    plot_learning_curve(
        learning,
        results["train_curve"],
        results["eval_curve"],
        results["eval_baselines"],
        plan.validation.split,
    )
    plot_iou_after_steps(steps, results["iou_after_steps"])
    save_gif(film, film_episodes(agent, plan.held_out, env_id=config.env, seed=3))
    if walk is not None:
        heading = f"{config.policy} on {title}: held-out episodes after each domain"
        path = config.folder / FORGETTING
        files.append(plot_matrix(path, walk.matrix, walk.names, heading))
    return files


def episodes_of_slow(episodes: int) -> int:
    """Return how many of the final episodes a baseline plays that decodes many times per step."""
    return min(episodes, max(-(-episodes // _SLOW_SHARE), _FEWEST))


def _final_evaluation(
    plan: Plan, agent: PolicyAgent, outcome: Evaluation | None
) -> dict[str, Evaluation]:
    """Evaluate the policy ("agent") and all baselines on the same episodes.

    A policy that searches also plays without ("no_search"). Baselines that are `slow` play a part
    of the episodes.
    """
    config, held_out, episodes = plan.config, plan.held_out, plan.config.final_episodes
    players = plan.task.players(held_out)
    few = episodes_of_slow(episodes)
    slow = {name for name, make in players.items() if getattr(make, "slow", False)} - {"oracle"}
    least = f", {few} for {' and '.join(sorted(slow))}" if slow and few < episodes else ""
    print(f"Evaluating on {held_out.split}, {episodes} episodes each{least}.")
    others: dict[str, Agent] = {name: make(config.seed) for name, make in players.items()}
    if agent.policy.search:
        others = {"no_search": PolicyAgent(agent.policy, search=False)} | others
    outcomes = {} if outcome is None else {"agent": outcome}
    arena = Arena()
    for name, player in {"agent": agent, **others}.items():
        if name not in outcomes:
            count = few if name in slow else episodes
            outcomes[name] = evaluate(
                player, held_out, env_id=config.env, episodes=count, seed=2, arena=arena
            )
        row = outcomes[name].summary()
        print(f"  {name:10s} mean IoU {with_interval(row['mean_iou'], row['ci95'])}")
    arena.close()
    return outcomes


def baselines_on_validation(plan: Plan) -> dict[str, float]:
    """Return the mean IoU of baselines on the episodes that the learning curve is made of.

    Baselines that are `slow` are left out.
    """
    config, arena = plan.config, Arena()
    found = {
        name: float(
            evaluate(
                make(config.seed),
                plan.validation,
                env_id=config.env,
                episodes=config.eval_episodes,
                seed=VALIDATION_SEED,
                arena=arena,
            ).ious.mean()
        )
        for name, make in plan.task.players(plan.validation).items()
        if not getattr(make, "slow", False)
    }
    arena.close()
    return found


def _gap_closed(results: dict[str, Any]) -> float | None:
    """Return (agent - random) / (oracle - random); None if the oracle is no better."""
    random, oracle, agent = (results[k]["mean_iou"] for k in ("random", "oracle", "agent"))
    return round((agent - random) / (oracle - random), 4) if oracle - random else None
