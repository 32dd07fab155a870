"""Each reward against its rule, written out case by case."""

import numpy as np
import pytest

from sam_gym.envs.rewards import REWARDS, Transition, checked_rewards

INF = np.inf
#: is_click, positive, on_target, distance, IoU before, IoU after
CASES = [
    (True, True, True, INF, 0.0, 0.6),
    (True, True, True, 0.25, 0.6, 0.7),
    (True, True, True, 0.04, 0.6, 0.5),
    (True, True, True, 0.0, 0.5, 0.5),
    (True, True, False, 0.2, 0.6, 0.3),
    (True, False, False, 0.2, 0.5, 1.0),
    (True, False, False, 0.2, 0.5, 0.25),
    (True, False, True, 0.2, 0.5, 0.25),
    (False, False, False, INF, 0.5, 0.5),
    (False, False, False, INF, 0.5, 0.2),
]


def played() -> Transition:
    columns = [np.array(column) for column in zip(*CASES, strict=True)]
    return Transition(*columns)


EXPECTED = {
    "iou_gain": [0.6, 0.1, -0.1, 0.0, -0.3, 0.5, -0.25, -0.25, 0.0, -0.3],
    # Dice is 2 IoU / (1 + IoU): 0 0, 0.6 3/4, 0.7 14/17, 0.5 2/3, 0.3 6/13, 0.25 2/5, 0.2 1/3.
    "dice_gain": [
        3 / 4,
        14 / 17 - 3 / 4,
        2 / 3 - 3 / 4,
        0.0,
        6 / 13 - 3 / 4,
        1 - 2 / 3,
        2 / 5 - 2 / 3,
        2 / 5 - 2 / 3,
        0.0,
        1 / 3 - 2 / 3,
    ],
    "click_correct": [1, 1, 1, 1, -1, 1, 1, -1, 0, 0],
    "foreground": [1, 1, 1, 1, -1, -1, -1, 1, 0, 0],
    "shaped": [1.0, 1.0, 0.4, 0.0, -1.0, 1 / 3, 0.0, -0.5, 0.0, 0.0],
}


def test_every_reward_is_tested() -> None:
    assert set(REWARDS.names()) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_closed_form(name: str) -> None:
    rewards = REWARDS.get(name)(played())
    assert rewards.shape == (len(CASES),)
    np.testing.assert_allclose(rewards, EXPECTED[name], atol=1e-12)


@pytest.mark.parametrize("name", ["iou_gain", "dice_gain"])
def test_gains_add_up_to_the_final_value(name: str) -> None:
    ious = np.concatenate([[0.0], np.random.default_rng(0).random(9)])
    n = len(ious) - 1
    flags = np.ones(n, bool)
    t = Transition(flags, flags, flags, np.full(n, INF), ious[:-1], ious[1:])
    final = ious[-1] if name == "iou_gain" else 2 * ious[-1] / (1 + ious[-1])
    assert REWARDS.get(name)(t).sum() == pytest.approx(final)


def test_misspelt_reward_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Unknown reward 'iou_gian'\. Did you mean 'iou_gain'\?"):
        REWARDS.get("iou_gian")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), r"The reward 'own' returned the shape \(3,\), expected \(2,\)"),
        (np.zeros((2, 1)), r"returned the shape \(2, 1\), expected \(2,\)"),
        (np.array([0.0, np.nan]), "no finite numbers"),
        (np.array(["a", "b"]), "no finite numbers"),
    ],
)
def test_what_a_reward_returns_is_checked(returned: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_rewards(returned, "own", 2)
    np.testing.assert_array_equal(checked_rewards([1, 2], "own", 2), [1, 2])


def test_a_class_is_no_reward() -> None:
    with pytest.raises(ValueError, match="'decimal:Decimal' is no function of a Transition"):
        REWARDS.get("decimal:Decimal")
