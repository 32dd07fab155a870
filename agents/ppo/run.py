"""A training run from its config to its results."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecMonitor

from agents.evaluate import Evaluation, PolicyAgent, evaluate, film_episodes
from agents.policies import POLICIES, ImplicitPolicy, SamPolicy
from agents.policies.base import resolve_precision
from agents.policies.plots import draw_policy_plots
from agents.policies.target_map import TrainTargetMap
from agents.ppo.callbacks import MonitorCallback, PinRolloutsCallback
from agents.ppo.checkpoint import Checkpoint, check_same_config, checkpoints, newest_checkpoint
from agents.ppo.config import VALIDATION_SEED, TrainPPOConfig, flat, with_present_names
from agents.ppo.distributed import CountAllProcesses, DistributedPPO
from agents.ppo.imitation import imitate
from agents.ppo.plan import Plan
from agents.ppo.results import baselines_on_validation, write_results
from agents.ppo.stages import PerStageSchedule, Stages, StreamCallback
from agents.ppo.tracking import MlflowRun, make_logger, require_mlflow
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.sharing.repository import CARD, CURVE, FILM, FORGETTING, POLICY, RESULTS, STEPS, is_card
from agents.tasks import task_of
from sam_gym.backbones.loading import resolve_device
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import EnvConfig
from sam_gym.utils.files import make_folder, write_atomic
from sam_gym.utils.memory import release_freed_memory
from sam_gym.utils.process_group import ALONE, ProcessGroup
from sam_gym.utils.provenance import own_commit
from sam_gym.utils.render import save_gif, save_image
from sam_gym.utils.runs import refuse_finished, remove_files
from sam_gym.utils.text import listed
from sam_gym.version import __version__

T = TypeVar("T")

#: Images per encoder call on a CPU.
_ENCODED_TOGETHER = 4
#: Options that `PPO` takes as they are.
_OF_PPO = ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "ent_coef")


#: Files that a run writes into its folder.
_WRITTEN = (
    *(POLICY, RESULTS, CURVE, STEPS, FILM, FORGETTING),
    *("policy_plots/step-*.png", "videos/step-*.gif", "checkpoints/*.ckpt"),
    "tensorboard/**/events.out.tfevents.*",
)


def train(config: TrainPPOConfig) -> dict[str, Any]:
    """Train, evaluate and write everything; return the content of results.json.

    With --resume, a complete run returns what it has written.

    Raises:
        ValueError, FileNotFoundError: a name, a value or the data is wrong (before work starts).
        ImportError: MLflow is asked for and not installed (before work starts).
        FileExistsError: `out` holds a run, and neither --resume nor --overwrite is given.
        ConnectionError: another process of the job has stopped, or MLflow does not answer.
    """
    own_commit()  # for results.json
    if config.mlflow:
        require_mlflow(_mlflow_place(config))
    plan = Plan.of(config)
    if config.resume and (results := _complete_results(config)) is not None:
        return results
    state = _state_to_resume(config)
    if state is not None:
        plan = replace(plan, config=_as_begun(config, state["settings"]))
    make_folder(config.folder)
    ranks = ProcessGroup.join(
        cuda=resolve_device(plan.training.device).type == "cuda", resume="Resume with --resume."
    )
    with mlflow_run(config, state, ranks) as mlflow:
        return _train(plan, state, ranks, mlflow)


def make_model(
    config: TrainPPOConfig,
    env_config: EnvConfig,
    env: VecMonitor,
    core: BaseCore[Any, Any],
    ranks: ProcessGroup = ALONE,
    stages: Stages | None = None,
) -> DistributedPPO:
    """Make PPO with the policy of the config, on the environments of this rank."""
    schedule: Any = LinearSchedule(config.learning_rate, 0.1 * config.learning_rate, 0.9)
    model = DistributedPPO(
        POLICIES.get(config.policy),
        env,
        learning_rate=schedule if stages is None else PerStageSchedule(schedule, stages),
        **{name: getattr(config, name) for name in _OF_PPO},
        policy_kwargs={
            **task_of(config.env).policy_arguments(config, env_config, core),
            "precision": resolve_precision(config.precision, core.device),
            "gradient_checkpointing": config.gradient_checkpointing,
        },
        seed=config.seed,
        device=core.device,
        ranks=ranks,
    )
    cast(SamPolicy, model.policy).set_learning(True)
    return model


class HeldOutEpisodes:
    """Plays the policy on held-out data while it is trained.

    Every method leaves the policy with the categories of the training.

    Args:
        plan: of the run.
        agent: the policy.
        categories: of the training.
    """

    def __init__(self, plan: Plan, agent: PolicyAgent, categories: tuple[str, ...]) -> None:
        self.plan, self.agent, self.categories = plan, agent, categories

    def _play(self, play: Callable[..., T], env_config: EnvConfig, **options: Any) -> T:
        result = play(self.agent, env_config, env_id=self.plan.config.env, **options)
        self.agent.policy.set_categories(self.categories)
        return result

    def validate(self) -> float:
        """Return the mean IoU on the validation split."""
        episodes = self.plan.config.eval_episodes
        played = self._play(evaluate, self.plan.validation, episodes=episodes, seed=VALIDATION_SEED)
        return float(played.ious.mean())

    def final(self) -> Evaluation:
        """Evaluate as the final evaluation does, after a domain of a stream too."""
        episodes = self.plan.config.final_episodes
        return self._play(evaluate, self.plan.held_out, episodes=episodes, seed=2)

    def draw(self, step: int) -> Path:
        """Draw policy plots of validation episodes; return the path of the PNG."""
        path = self._file("policy_plots", f"step-{step:08d}.png")
        save_image(path, self._play(draw_policy_plots, self.plan.validation, seed=4))
        return path

    def film(self, step: int) -> Path:
        """Film a validation episode; return the path of the GIF."""
        path = self._file("videos", f"step-{step:08d}.gif")
        save_gif(path, self._play(film_episodes, self.plan.validation, count=1, seed=4))
        return path

    def _file(self, folder: str, name: str) -> Path:
        path = self.plan.config.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        return path


def _train(
    plan: Plan, state: dict[str, Any] | None, ranks: ProcessGroup, mlflow: MlflowRun | None
) -> dict[str, Any]:
    config, out, stages = plan.config, plan.config.folder, plan.stages
    vector, core = make_vector_env(config.env, ranks.share(config.num_envs), plan.training)
    precision, *_ = ranks.gather(resolve_precision(config.precision, core.device))
    config = replace(config, precision=cast(Any, precision))
    env = VecMonitor(VectorEnvAdaptor(vector))
    model = make_model(config, plan.training, env, core, ranks, stages)
    agent = PolicyAgent(cast(SamPolicy, model.policy))
    # Checkpoints and results have the precision and the search themselves: a run may be resumed on
    # other hardware, or by a version with other defaults.
    config = replace(config, search=agent.policy.search)
    plan = replace(plan, config=config)
    held_out = HeldOutEpisodes(plan, agent, tuple(core.dataset.categories))
    if state is None and ranks.is_first:
        _clear(out)

    monitor = MonitorCallback(
        config.total_timesteps,
        config.eval_every,
        held_out.validate,
        ranks,
        held_out.draw if config.policy_plots else None,
        config.video_every,
        held_out.film,
    )
    walk: StreamCallback | None = None
    if plan.stream is not None and stages is not None:
        walk = StreamCallback(
            cast(Any, vector.unwrapped), plan.stream.names, stages, held_out.final, ranks
        )
    target_map = _target_map(config, agent, core, ranks)
    parts = {
        # The names under which checkpoints keep them, those of earlier versions too.
        "watch": monitor,
        "walk": walk,
        "mlflow": mlflow,
        "recalibration": target_map,
    }
    callbacks: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
    checkpoint = Checkpoint(
        out / "checkpoints",
        asdict(config),
        config.checkpoint_every,
        env,
        callbacks,
        *([] if mlflow is None else [mlflow.on_checkpoint]),
    )
    if ranks.is_first:
        what = f"{config.policy} on {config.env} ({core.dataset.name}) with {core.backbone}"
        print(f"Resuming at step {state['step']}: {what}." if state else f"Training {what}.")
    with checkpoint.written_when_interrupted(), _encoded_in_fixed_batches(core):
        done = state["step"] if state else -1
        model.set_logger(make_logger(out / "tensorboard", done, ranks, mlflow=mlflow))
        if state:
            checkpoint.restore(model, state)
        elif config.warm_start:
            expert = plan.task.baselines.get("oracle")(config.seed)
            after_step = None
            if target_map is not None:  # it learns from every step
                target_map.init_callback(model)
                after_step = target_map.update
            imitate(model, core, expert, config.warm_start, after_step)
        with monitor.bar:
            model.learn(
                config.total_timesteps - model.num_timesteps,
                callback=[
                    checkpoint,
                    CountAllProcesses(ranks),
                    PinRolloutsCallback(core.store),
                    *callbacks.values(),
                ],
                reset_num_timesteps=model.num_timesteps == 0,
            )
        ranks.leave()
        if not ranks.is_first:
            return {}
        release_freed_memory()
        monitor.evaluate_now()
        outcome = None if walk is None else walk.evaluate_now()
        references = baselines_on_validation(plan)
    with checkpoint.written_when_interrupted():
        # SB3 has written the last step itself, before the last update.
        model.logger.dump(model.num_timesteps + 1)
        model.logger.close()
        policy = out / POLICY
        _save(model, policy)
        env.close()
        release_freed_memory()

        results, files = write_results(plan, agent, outcome, references, monitor, walk, core)
        if mlflow is not None:
            mlflow.finish(files, policy, config.register_model)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    print(f"Wrote {listed([policy.name, *(file.name for file in files)])} to {out}.")
    return results


def _target_map(
    config: TrainPPOConfig, agent: PolicyAgent, core: BaseCore[Any, Any], ranks: ProcessGroup
) -> TrainTargetMap | None:
    policy: ImplicitPolicy = agent.policy
    if getattr(policy, "target_map", None) is None:
        return None
    updates = config.recalibration_updates or policy.recalibration_updates
    return TrainTargetMap(policy, cast(Any, core), updates, ranks=ranks)


def _complete_results(config: TrainPPOConfig) -> dict[str, Any] | None:
    """Return the content of results.json if the run is complete, else None."""
    out = config.folder
    path = out / RESULTS
    if checkpoints(out / "checkpoints") or not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    check_same_config(with_present_names(results["config"], str(path)), asdict(config))
    print(f"{out} holds the complete run. Pass --overwrite instead of --resume to train again.")
    return results


def _as_begun(config: TrainPPOConfig, settings: dict[str, Any]) -> TrainPPOConfig:
    """Return the config with the defaults that its run had when it began."""
    own: dict[str, Any] = {}
    if config.precision == "auto":
        own["precision"] = settings.get("precision", "32-true")
    if config.search is None:
        own["search"] = settings.get("search", 0)
    return replace(config, **own)


def _clear(out: Path) -> None:
    """Remove what an earlier run has left in the folder: its model card would be untrue."""
    remove_files(out, _WRITTEN)
    card = out / CARD
    if is_card(card):
        card.unlink()


def _state_to_resume(config: TrainPPOConfig) -> dict[str, Any] | None:
    """Return the checkpoint to resume from, or None to start."""
    folder = config.folder / "checkpoints"
    if config.overwrite:
        return None
    if not checkpoints(folder):
        for finished in (RESULTS, POLICY):
            refuse_finished(config.folder, finished)
        if config.resume:
            print(f"{folder}: no checkpoint yet. Starting the run.")
        return None
    if not config.resume:
        raise FileExistsError(
            f"{folder} holds the checkpoints of a run that is not finished. Pass --resume to "
            "resume it, --overwrite to start over, or another --out."
        )

    def check(settings: dict[str, Any]) -> None:
        check_same_config(with_present_names(settings, str(folder)), asdict(config))

    return newest_checkpoint(folder, check)


@contextmanager
def _encoded_in_fixed_batches(core: BaseCore[Any, Any]) -> Iterator[None]:
    """Encode images in batches of one size on a CPU.

    On a CPU, an embedding differs in its last bits with the size of the batch that it is computed
    in, though not with the other images. How many images are missing at a time depends on where a
    run was resumed and on the number of processes.
    """
    store, before = core.store, core.store.batch_size
    if core.device.type == "cpu":
        store.batch_size, store.fixed_batches = _ENCODED_TOGETHER, True
    try:
        yield
    except BaseException:
        # An interrupted run may be resumed in the same process: nothing may stay pinned.
        store.end_epoch()
        core.close()
        raise
    finally:
        store.batch_size, store.fixed_batches = before, False


def _save(model: DistributedPPO, path: Path) -> None:
    # Files hold no classes of ours that a later version may move.
    if isinstance(model.learning_rate, PerStageSchedule):
        model.learning_rate = model.learning_rate.schedule
    buffer = io.BytesIO()
    model.save(buffer, exclude=["lr_schedule"])
    write_atomic(path, buffer.getvalue())


def _mlflow_place(config: TrainPPOConfig) -> str | Path:
    return config.mlflow_uri or config.folder.absolute().parent / "mlflow"


@contextmanager
def mlflow_run(
    config: TrainPPOConfig, state: dict[str, Any] | None, ranks: ProcessGroup
) -> Iterator[MlflowRun | None]:
    """Open the run in MLflow, if the config asks for it and this is the rank that writes.

    Args:
        config: of the run.
        state: the checkpoint to resume from, which knows the id of the run in MLflow.
        ranks: the processes of the run.
    """
    if not (config.mlflow and ranks.is_first):
        yield None
        return
    known = state["parts"].get("mlflow", {}) if state else {}
    with MlflowRun(
        _mlflow_place(config),
        config.mlflow_experiment,
        name=config.folder.absolute().name,
        params={k: v for k, v in flat(asdict(config)).items() if k != "mlflow_uri"},
        tags={"sam_gym.version": __version__, "env": config.env, "policy": config.policy}
        | {"backbone": config.env_config.backbone},
        run_id=known.get("run_id"),
    ) as run:
        yield run
