"""Exploration and minibatches that belong to slots."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.distributions import Categorical

from agents.ppo.rng import PerEnvCategorical, PerEnvRolloutBuffer, env_generators

STEPS, SLOTS = 6, 4


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    distribution = PerEnvCategorical(4, env_generators(0, [0])).proba_distribution(logits)
    drawn = torch.cat([distribution.sample() for _ in range(4000)])
    expected = 4000 * logits.double().softmax(dim=1)[0].numpy()
    assert chisquare(np.bincount(drawn, minlength=4), expected).pvalue > 0.01


def test_log_probabilities_are_those_of_torch() -> None:
    logits = torch.randn((SLOTS, 5), generator=torch.Generator().manual_seed(0))
    distribution = PerEnvCategorical(5, env_generators(0, range(SLOTS))).proba_distribution(logits)
    actions = distribution.sample()
    assert actions.shape == (SLOTS,) and actions.dtype == torch.int64
    torch.testing.assert_close(
        distribution.log_prob(actions), Categorical(logits=logits).log_prob(actions)
    )


def test_slots_draw_the_same_wherever_they_are() -> None:
    logits = torch.zeros((SLOTS, 50))
    together = PerEnvCategorical(50, env_generators(3, range(SLOTS))).proba_distribution(logits)
    halves = [
        PerEnvCategorical(50, env_generators(3, slots)).proba_distribution(logits[:2])
        for slots in ([0, 1], [2, 3])
    ]
    for _ in range(3):
        torch.testing.assert_close(together.sample(), torch.cat([half.sample() for half in halves]))


def test_another_number_of_rows_is_an_error() -> None:
    distribution = PerEnvCategorical(3, env_generators(0, range(2)))
    with pytest.raises(ValueError, match="2 sub-environments, got a batch of 5"):
        distribution.proba_distribution(torch.zeros((5, 3))).sample()


def filled(
    slots: range = range(SLOTS), total: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
) -> PerEnvRolloutBuffer:
    """A rollout whose observation says which step of which slot it is."""
    buffer = PerEnvRolloutBuffer(
        STEPS,
        gym.spaces.Dict({"place": gym.spaces.Box(0, 1000, (2,), np.int64)}),
        gym.spaces.Discrete(9),
        n_envs=len(slots),
        generators=env_generators(0, slots),
        total=total,
    )
    for step in range(STEPS):
        buffer.add(
            {"place": np.array([[step, slot] for slot in slots])},
            np.array(slots),
            np.zeros(len(slots)),
            np.zeros(len(slots)),
            torch.zeros(len(slots)),
            torch.zeros(len(slots)),
        )
    buffer.advantages[:] = [[step * SLOTS + slot for slot in slots] for step in range(STEPS)]
    return buffer


def test_a_pass_holds_each_sample_once_and_each_minibatch_all_slots() -> None:
    buffer = filled()
    orders = []
    for _ in range(2):
        batches = [batch.observations["place"].numpy() for batch in buffer.get(2 * SLOTS)]
        assert len(batches) == STEPS // 2
        for batch in batches:
            assert np.bincount(batch[:, 1]).tolist() == [2] * SLOTS
        order = [tuple(place) for batch in batches for place in batch]
        assert len(set(order)) == len(order) == STEPS * SLOTS
        orders.append(order)
    assert orders[0] != orders[1]


def test_advantages_are_normalised_as_stable_baselines_does() -> None:
    buffer = filled()
    for batch in buffer.get(3 * SLOTS):
        step, slot = batch.observations["place"].T
        raw = (step * SLOTS + slot).float()
        torch.testing.assert_close(batch.advantages, (raw - raw.mean()) / (raw.std() + 1e-8))


def test_a_minibatch_of_one_sample_keeps_its_advantage() -> None:
    buffer = filled(range(1))
    assert all(batch.advantages.isfinite().all() for batch in buffer.get(1))
