"""A validated training run."""

from __future__ import annotations

from dataclasses import dataclass

from agents.policies import POLICIES
from agents.ppo.config import TrainPPOConfig
from agents.ppo.stages import Stages
from agents.tasks import Task, task_of
from sam_gym.data.splits import check_held_out, copied_images, shared_images
from sam_gym.data.streams import Stream
from sam_gym.envs.config import EnvConfig


@dataclass(frozen=True)
class Plan:
    """A validated run: what it trains on, and what it is evaluated on.

    Attributes:
        config: of the run.
        task: of the environment.
        training: env config of the training episodes.
        validation: env config of the evaluations during training.
        held_out: env config of the final evaluation.
        stream: the domains, held so that no environment opens them again; None without.
        shared_images: number of training images, or copies of them, among those of the final
            evaluation.
    """

    config: TrainPPOConfig
    task: Task
    training: EnvConfig
    validation: EnvConfig
    held_out: EnvConfig
    stream: Stream | None
    shared_images: int

    @classmethod
    def of(cls, config: TrainPPOConfig) -> Plan:
        """Validate a config, and the data that it names.

        Raises:
            ValueError, FileNotFoundError: a name, a value or the data is wrong, or held-out images
                are training images.
        """
        config.validate()
        POLICIES.get(config.policy)
        task = task_of(config.env)
        task.check_run(config)
        training = task.training_config(config)
        training.validate()
        validation, held_out = (task.held_out_config(config, split) for split in ("val", None))
        stream = task.stream(training)  # held, so that it is opened once
        train, shared = training.open_dataset(), 0
        for own in (validation, held_out):
            if own.split == training.split != "train":
                raise ValueError(
                    f"The agent would be trained and evaluated on split {own.split!r}: its results "
                    "would be results on training images. Pass another --split or --held-out "
                    "('val' is for the evaluations during training)."
                )
            images = own.open_dataset()
            check_held_out(images, own.split, train)
            shared = shared_images(train, images) + copied_images(train, images)
        plan = cls(config, task, training, validation, held_out, stream, shared)
        if plan.stages is not None:
            plan.stages.validate()
            first = config.total_timesteps // plan.stages.count
            if config.warm_start > first:
                raise ValueError(
                    f"warm_start must be from 0 to the steps of the first of {plan.stages.count} "
                    f"domains ({first}), got {config.warm_start}."
                )
        return plan

    @property
    def stages(self) -> Stages | None:
        """When each domain of the stream is learned."""
        if self.stream is None:
            return None
        rollout = self.config.n_steps * self.config.num_envs
        return Stages(self.config.total_timesteps, rollout, len(self.stream))
