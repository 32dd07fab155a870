"""Train an agent with PPO: `python -m agents.train_ppo --env SamSeg-v0`, or `--help`.

On N GPUs or processes: `torchrun --nproc_per_node=N -m agents.train_ppo ...`.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecMonitor

import agents.policies.explicit  # noqa: F401  (registers its policy)
from agents.curves import plot_iou_after_steps, plot_learning_curve
from agents.evaluate import (
    Evaluation,
    PolicyAgent,
    baselines_of,
    evaluate,
    film_episodes,
    with_categories,
)
from agents.everything import compared_with_grid
from agents.everything import policy_arguments as everything_arguments
from agents.policies.base import POLICIES, SamPolicy
from agents.policies.recalibration import TrainRecalibration
from agents.ppo.callbacks import MonitorCallback, PinRolloutsCallback
from agents.ppo.checkpoint import (
    Checkpoint,
    check_same_settings,
    checkpoints,
    flat,
    newest_checkpoint,
)
from agents.ppo.config import Config, check_plays, read_config, settings_class
from agents.ppo.distributed import ALONE, CountAllProcesses, DistributedPPO, ProcessGroup, recorded
from agents.ppo.imitation import imitate
from agents.ppo.stages import PerStageSchedule, Stages, StreamCallback
from agents.ppo.tracking import MlflowRun, make_logger, require_mlflow
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.views import check_has_views, draw_views
from sam_gym.data import DATASETS
from sam_gym.data.streams import Stream
from sam_gym.envs.base_core import BaseCore, DatasetConfig, EnvConfig
from sam_gym.envs.click import ClickConfig
from sam_gym.envs.continual import ContinualConfig
from sam_gym.envs.everything import EverythingConfig
from sam_gym.metrics.masks import with_interval
from sam_gym.utils import cli
from sam_gym.utils.files import write_atomic, write_json
from sam_gym.utils.plots import plot_matrix
from sam_gym.utils.render import save_gif, save_image
from sam_gym.version import __version__


def training_settings(config: Config) -> EnvConfig:
    """The environment's settings in training."""
    settings = with_categories(replace(config.settings, obs="handle"), config.categories)
    if isinstance(settings, ContinualConfig):
        # `StreamCallback` says when a domain is over.
        return replace(settings, episodes_per_domain=None)
    assert isinstance(settings, DatasetConfig)
    if DATASETS.get(settings.dataset).procedural and "length" not in settings.dataset_kwargs:
        kwargs = settings.dataset_kwargs | {"length": config.train_images}
        settings = replace(settings, dataset_kwargs=kwargs)
    return settings


def held_out_settings(config: Config, split: str) -> EnvConfig:
    """The same task on data that training never sees."""
    settings = with_categories(replace(config.settings, obs="handle"), config.categories)
    return replace(settings, split=split)


def policy_arguments(
    config: Config, settings: EnvConfig, core: BaseCore[Any, Any]
) -> dict[str, Any]:
    """Arguments of the policy of the config, for an environment."""
    backbone = {
        "name": settings.backbone,
        "checkpoint": settings.checkpoint,
        "device": settings.device,
        "dtype": settings.dtype,
        "compile": settings.compile,
        "adapter": settings.adapter,
    }
    if isinstance(settings, EverythingConfig):
        return everything_arguments(settings, backbone)
    assert isinstance(settings, ClickConfig)
    features: dict[str, Any] = {
        "backbone": backbone,
        "categories": list(core.dataset.categories),
        "max_steps": settings.max_steps,
    }
    if config.policy == "explicit":
        clip = {"name": config.clip, "pretrained": config.clip_pretrained}
        features["clip"] = clip | {"device": settings.device}
        features["allow_unknown"] = config.allow_unknown_words
        features["temperature"] = config.temperature
    features["vocabulary"] = features["categories"] if config.know_category else []
    return {
        "features": features,
        "grid": settings.grid,
        "head": config.head,
        "others": ["stop"] * settings.stop + ["undo"] * settings.undo,
        "recalibrate": config.recalibrate,
    }


def make_model(
    config: Config,
    settings: EnvConfig,
    env: VecMonitor,
    core: BaseCore[Any, Any],
    ranks: ProcessGroup = ALONE,
    stages: Stages | None = None,
) -> DistributedPPO:
    """PPO with the policy of the config, on the environments of this rank."""
    schedule: Any = LinearSchedule(config.learning_rate, 0.1 * config.learning_rate, 0.9)
    model = DistributedPPO(
        POLICIES.get(config.policy),
        env,
        learning_rate=schedule if stages is None else PerStageSchedule(schedule, stages),
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        policy_kwargs={
            **policy_arguments(config, settings, core),
            "precision": config.precision,
            "gradient_checkpointing": config.gradient_checkpointing,
        },
        seed=config.seed,
        device=core.device,
        ranks=ranks,
    )
    cast(SamPolicy, model.policy).set_learning(True)
    return model


def _state_to_resume(config: Config, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from, if that is what was asked for."""
    if config.resume:
        state = newest_checkpoint(folder)
        check_same_settings(state["settings"], asdict(config))
        return state
    if checkpoints(folder):
        raise FileExistsError(
            f"{folder} holds the checkpoints of a run that is not finished. Pass --resume to go "
            "on with it, delete that folder to begin anew, or take another --out."
        )
    return None


@contextmanager
def _encoded_alone(core: BaseCore[Any, Any]) -> Iterator[None]:
    """Encode image by image on a CPU.

    There, an embedding differs in its last bits with the batch that it is computed in, and which
    images share a batch depends on where a run was resumed and on how many processes it has.
    """
    store, before = core.store, core.store.batch_size
    if core.device.type == "cpu":
        store.batch_size = 1
    try:
        yield
    except BaseException:
        # Whoever interrupts a run may go on in the same process: nothing of it may stay pinned.
        store.end_epoch()
        core.close()
        raise
    finally:
        store.batch_size = before


def _in_folder(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / name


def _save_policy(model: DistributedPPO, path: Path) -> None:
    buffer = io.BytesIO()
    model.save(buffer)
    write_atomic(path, buffer.getvalue())


def _mlflow_place(config: Config) -> str | Path:
    return config.mlflow_uri or Path(config.out).absolute().parent / "mlflow"


def _check_tracking(config: Config) -> None:
    name = config.register_model
    if not config.mlflow and (name or config.mlflow_uri):
        raise ValueError("--register-model and --mlflow-uri take effect with --mlflow only.")
    if name is not None and (not name.strip() or set(name) & set("/:")):
        raise ValueError(f"register_model must be a name without '/' and ':', got {name!r}.")
    if config.mlflow:
        require_mlflow(_mlflow_place(config))


@contextmanager
def _in_mlflow(
    config: Config, state: dict[str, Any] | None, ranks: ProcessGroup
) -> Iterator[MlflowRun | None]:
    """The run in MLflow, if that is asked for and this is the rank that writes."""
    if not (config.mlflow and ranks.is_first):
        yield None
        return
    known = state["parts"].get("mlflow", {}) if state else {}
    with MlflowRun(
        _mlflow_place(config),
        config.mlflow_experiment,
        name=Path(config.out).absolute().name,
        settings={k: v for k, v in flat(asdict(config)).items() if k != "mlflow_uri"},
        tags={
            "sam_gym.version": __version__,
            "env": config.env,
            "policy": config.policy,
            "backbone": config.settings.backbone,
        },
        run_id=known.get("run_id"),
    ) as run:
        yield run


def train(config: Config) -> dict[str, Any]:
    """Train, evaluate and write everything; returns what stands in results.json.

    Raises:
        ValueError, FileNotFoundError: a name, a value or the data is wrong (before work starts).
        ImportError: MLflow was asked for and is not installed (before work starts).
        FileExistsError: `out` holds an unfinished run, which was not to be resumed.
        ConnectionError: another process of the job has stopped, or MLflow does not answer.
    """
    _check_tracking(config)
    if config.recalibration_updates is not None:
        if not config.recalibrate:
            raise ValueError("--recalibration-updates takes effect with --recalibrate only.")
        if config.recalibration_updates < 1:
            raise ValueError(
                f"recalibration_updates must be at least 1, got {config.recalibration_updates}."
            )
    if not 0 <= config.warm_start <= config.total_timesteps:
        raise ValueError(
            f"warm_start must be from 0 to total_timesteps ({config.total_timesteps}), "
            f"got {config.warm_start}."
        )
    POLICIES.get(config.policy)
    check_plays(config.policy, config.env)
    kind = settings_class(config.env)
    if type(config.settings) is not kind:
        raise ValueError(
            f"{config.env} has settings of class {kind.__name__}, got "
            f"{type(config.settings).__name__}. Pass Config(env=..., settings={kind.__name__}())."
        )
    settings = training_settings(config)
    settings.validate()
    _check_fits_task(config, settings)
    held_out = held_out_settings(config, config.held_out or settings.held_out_split)
    validation = held_out_settings(config, "val")
    # Held on to, since evaluations then do not open it again.
    stream = settings.open_stream() if isinstance(settings, ContinualConfig) else None
    for checked in (held_out, validation):
        checked.open_dataset()
    if stream is not None:
        _stages(config, stream).validate()
        if config.warm_start * len(stream) > config.total_timesteps:
            raise ValueError(
                f"warm_start must be from 0 to the steps of the first of {len(stream)} domains "
                f"({config.total_timesteps // len(stream)}), got {config.warm_start}."
            )

    state = _state_to_resume(config, Path(config.out) / "checkpoints")
    ranks = ProcessGroup.join(settings.device)
    with _in_mlflow(config, state, ranks) as mlflow:
        return _train(config, settings, validation, held_out, stream, state, ranks, mlflow)


def _check_fits_task(config: Config, settings: EnvConfig) -> None:
    """Raise `ValueError` for options that make no sense for the task of an environment."""
    if isinstance(settings, ClickConfig):
        return
    if config.recalibrate:
        raise ValueError(
            f"--recalibrate labels clicks, of which {config.env} has none. Leave it out."
        )
    if config.views:
        check_has_views(settings)
    if isinstance(settings, EverythingConfig):
        everything_arguments(settings, {})


def _stages(config: Config, stream: Stream) -> Stages:
    return Stages(config.total_timesteps, config.n_steps * config.num_envs, len(stream))


def _train(
    config: Config,
    settings: EnvConfig,
    validation: EnvConfig,
    held_out: EnvConfig,
    stream: Stream | None,
    state: dict[str, Any] | None,
    ranks: ProcessGroup,
    mlflow: MlflowRun | None,
) -> dict[str, Any]:
    """What `train` does once everything is checked."""
    out = Path(config.out)
    vector, core = make_vector_env(config.env, ranks.share(config.num_envs), settings)
    env = VecMonitor(VectorEnvAdaptor(vector))
    stages = None if stream is None else _stages(config, stream)
    model = make_model(config, settings, env, core, ranks, stages)
    agent = PolicyAgent(cast(SamPolicy, model.policy))
    baselines = baselines_of(settings)

    @contextmanager
    def elsewhere() -> Iterator[None]:
        """Play on other data, and know the categories of the training again after that."""
        yield
        agent.policy.set_categories(core.dataset.categories)

    @elsewhere()
    def validate() -> float:
        result = evaluate(
            agent, validation, env_id=config.env, episodes=config.eval_episodes, seed=1
        )
        return float(result.ious.mean())

    out.mkdir(parents=True, exist_ok=True)

    @elsewhere()
    def draw(step: int) -> Path:
        picture = draw_views(agent, validation, env_id=config.env, seed=4)
        path = _in_folder(out / "views", f"step-{step:08d}.png")
        save_image(path, picture)
        return path

    @elsewhere()
    def film(step: int) -> Path:
        frames = film_episodes(agent, validation, env_id=config.env, count=1, seed=4)
        path = _in_folder(out / "videos", f"step-{step:08d}.gif")
        save_gif(path, frames)
        return path

    @elsewhere()
    def judge() -> Evaluation:
        return evaluate(agent, held_out, env_id=config.env, episodes=config.final_episodes, seed=2)

    watch = MonitorCallback(
        config.total_timesteps,
        config.eval_every,
        validate,
        ranks,
        draw if config.views else None,
        config.video_every,
        film,
    )
    parts: dict[str, Any] = {"watch": watch}
    walk: StreamCallback | None = None
    if stream is not None and stages is not None:
        walk = StreamCallback(cast(Any, vector.unwrapped), stream.names, stages, judge, ranks)
        parts["walk"] = walk
    if mlflow is not None:
        parts["mlflow"] = mlflow
    if config.recalibrate:
        updates = config.recalibration_updates
        if updates is None:
            updates = 5 if config.policy == "explicit" else 1
        parts["recalibration"] = TrainRecalibration(
            agent.policy, cast(Any, core), updates, config.learning_rate, ranks=ranks
        )
    checkpoint = Checkpoint(
        out / "checkpoints", asdict(config), config.checkpoint_every, env, parts
    )
    if ranks.is_first:
        data = settings.dataset if isinstance(settings, DatasetConfig) else core.dataset.name
        what = f"{config.policy} on {config.env} ({data}) with {core.backbone}"
        print(f"Going on from step {state['step']} with {what}." if state else f"Training {what}.")
    with _encoded_alone(core):
        done = state["step"] if state else -1
        model.set_logger(make_logger(out / "tensorboard", done, ranks, mlflow=mlflow))
        if state:
            checkpoint.restore(model, state)
        elif config.warm_start:
            imitate(model, core, baselines.get("oracle")(config.seed), config.warm_start)
        callbacks = [
            checkpoint,
            CountAllProcesses(ranks),
            PinRolloutsCallback(core.store),
            *parts.values(),
        ]
        with watch.bar:
            model.learn(
                config.total_timesteps - model.num_timesteps,
                callback=callbacks,
                reset_num_timesteps=model.num_timesteps == 0,
            )
        ranks.leave()
        if not ranks.is_first:
            return {}
        watch.evaluate_now()
        outcomes = {} if walk is None else {"agent": walk.evaluate_now()}
    # SB3 has written the last step itself, before the last update.
    model.logger.dump(model.num_timesteps + 1)
    model.logger.close()
    _save_policy(model, out / "policy.zip")
    env.close()
    trained = time.monotonic()

    print(f"Evaluating on {held_out.split}, {config.final_episodes} episodes each.")
    agents = {"agent": agent} | {
        name: baselines.get(name)(config.seed) for name in baselines.names()
    }
    results: dict[str, Any] = {}
    curves: dict[str, list[float]] = {}
    for name, player in agents.items():
        outcome = outcomes.get(name) or evaluate(
            player, held_out, env_id=config.env, episodes=config.final_episodes, seed=2
        )
        results[name], curves[name] = outcome.summary(), outcome.curve.round(4).tolist()
        row = results[name]
        print(f"  {name:10s} mean IoU {with_interval(row['mean_iou'], row['ci95'])}")
    gap = results["oracle"]["mean_iou"] - results["random"]["mean_iou"]
    results["gap_closed"] = (
        round((results["agent"]["mean_iou"] - results["random"]["mean_iou"]) / gap, 4)
        if gap
        else None
    )
    print(f"  gap closed (agent - random) / (oracle - random): {results['gap_closed']}")
    if isinstance(settings, EverythingConfig):
        compared_with_grid(results, agents)
        own = results["agent"]
        print(
            f"  against the full grid: {own['share_of_grid_iou']:.1%} of its IoU "
            f"with {own['share_of_grid_points']:.1%} of its points"
        )
    pictures = ("learning_curve.png", "iou_after_steps.png", "episodes.gif")
    files = [out / name for name in ("results.json", *pictures)]
    if walk is not None:
        results["continual"] = continual = walk.results()
        print(
            "  " + ", ".join(f"{n} {continual[n]:.3f}" for n in ("last_iou", "avg_iou", "ff_iou"))
        )
        title = f"{config.policy} on {core.dataset.name}: held-out episodes after each domain"
        files.append(plot_matrix(out / "forgetting.png", walk.matrix, walk.names, title))
    results |= {
        "held_out_split": held_out.split,
        "training_seconds": round(trained - watch.started, 1),
        "total_seconds": round(time.monotonic() - watch.started, 1),
        "config": asdict(config),
        "train_curve": watch.train_curve,
        "eval_curve": watch.eval_curve,
        "iou_after_steps": curves,
    }
    write_json(out / "results.json", results)
    references = {name: results[name]["mean_iou"] for name in baselines.names()}
    plot_learning_curve(out / "learning_curve.png", watch.train_curve, watch.eval_curve, references)
    plot_iou_after_steps(out / "iou_after_steps.png", curves)
    save_gif(out / "episodes.gif", film_episodes(agent, held_out, env_id=config.env, seed=3))
    if mlflow is not None:
        mlflow.finish(files, out / "policy.zip", config.register_model)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    *others, final = ["policy.zip", *(file.name for file in files)]
    print(f"Wrote {', '.join(others)} and {final} to {out}.")
    return results


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    return train(read_config(args))


if __name__ == "__main__":
    cli.run(recorded(main))
