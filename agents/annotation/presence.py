"""Presence: the probability that an image shows a category that a click agent is asked for.

An agent always clicks something, and SAM always finds a mask there: its predicted IoU tells how
good the outline is, not what it surrounds. Presence asks a CLIP. Two logistic models, fitted by
`python -m agents.presence` and stored beside the agent's policy.zip, give the probability: one
before the first click, so that an agent stops at once where a category is clearly absent, the other
one after the last click, when its mask is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from agents.baselines.base import TrainedAgent
from agents.clip.models import load_clip
from agents.clip.surgery import ClipSurgery
from agents.policies.explicit import WordMaps
from agents.sharing.pull import local_policy
from agents.sharing.repository import PRESENCE
from sam_gym.backbones import BackboneService
from sam_gym.data.io import read_json
from sam_gym.envs.click import ClickCore
from sam_gym.utils.digest import file_digest
from sam_gym.utils.files import write_json

#: Fraction of the cells whose similarity counts before the first click: the most similar ones.
_TOP = 0.04
#: L2 penalty on the weights of a logistic model, whose inputs are standardised.
_PENALTY = 1e-3


@dataclass(frozen=True)
class Logistic:
    """A logistic model: sigmoid(weights . x + bias)."""

    weights: tuple[float, ...]
    bias: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map inputs (..., K) to probabilities (...)."""
        return np.asarray(expit(x @ np.array(self.weights) + self.bias))

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Logistic:
        """Fit by penalised maximum likelihood.

        Args:
            x: float64 (N, K).
            y: bool (N,).
            weight: of each row, float64 (N,).
        """
        mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
        z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
        weight = weight / weight.sum()

        def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
            logits = z @ b
            value = weight @ (np.logaddexp(0.0, logits) - y * logits)
            penalty = _PENALTY * np.append(b[:-1], 0.0)
            return value + penalty @ b, z.T @ (weight * (expit(logits) - y)) + 2 * penalty

        from scipy.optimize import minimize  # here, since it takes long to import

        b = minimize(loss, np.zeros(z.shape[1]), jac=True).x
        weights = b[:-1] / scale
        return cls(tuple(weights.tolist()), float(b[-1] - weights @ mean))


class Similarity:
    """Similarity of words and images by a CLIP, on the cells of a SAM's embedding.

    Args:
        clip: `name` and `pretrained` of `load_clip`.
        backbone: the SAM.
        words: the words.

    Raises:
        ValueError: the CLIP has no word for one of them.
        OSError: its weights could not be loaded.
    """

    def __init__(
        self, clip: Mapping[str, Any], backbone: BackboneService, words: Sequence[str]
    ) -> None:
        surgery = ClipSurgery(load_clip(**clip, device=str(backbone.device)))
        self.identity = surgery.clip.identity
        self._maps = WordMaps(surgery, backbone, words)

    def maps(self, image: np.ndarray) -> np.ndarray:
        """Return the maps of all words, float32 (N, h * w), of an image uint8 (H, W, 3)."""
        return self._maps([image])[0, :, 1:].float().cpu().numpy()


def before(maps: np.ndarray) -> np.ndarray:
    """Return the evidence before the first click: the mean of the most similar cells.

    Args:
        maps: of words, float32 (N, h * w).

    Returns:
        float64 (N, 1).
    """
    count = max(1, round(_TOP * maps.shape[1]))
    top = np.partition(maps, -count, axis=1)[:, -count:]
    return top.mean(axis=1, dtype=np.float64)[:, None]


def after(core: ClickCore, env_index: int, words: np.ndarray) -> np.ndarray:
    """Return the evidence after the last click of an episode.

    Args:
        core: of an environment with `obs="handle"`.
        env_index: sub-environment of the episode.
        words: map of its target, float32 (h * w,).

    Returns:
        float64 (3,): as of `before`; mean similarity of the mask; mean predicted IoU of the masks
        after each click.
    """
    predicted = core.predicted_ious[env_index, 1 : int(core.num_clicks[env_index]) + 1]
    return of_mask(core.shown[env_index], predicted, words)


def of_mask(cells: np.ndarray, predicted: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return the evidence of a mask that clicks have made; see `after`.

    Args:
        cells: uint8 (h, w), the mask on the cells of the embedding.
        predicted: predicted IoU of the masks after each click, float (N,).
        words: map of the category, float32 (h * w,).
    """
    weights = cells.astype(np.float64).ravel()
    inside = float(words @ weights / max(weights.sum(), 1e-6))
    mean = float(predicted.mean()) if len(predicted) else 0.0
    return np.array([before(words[None])[0, 0], inside, mean])


@dataclass(frozen=True)
class Calibration:
    """The models of presence for an agent.

    Attributes:
        policy: SHA-256 of the policy.zip.
        clip: `name` and `pretrained` of the CLIP.
        weights: `identity` of the CLIP.
        before, after: maps evidence to the probability.
        stop: probability before the first click below which the agent does not begin.
        threshold: probability after the last click from which a category counts as present.
        held_out: measured on held-out data.
    """

    policy: str
    clip: dict[str, Any]
    weights: str
    before: Logistic
    after: Logistic
    stop: float
    threshold: float
    held_out: dict[str, Any]

    @classmethod
    def read(cls, policy: Path) -> Calibration | None:
        """Read the file beside a policy.zip; None if there is none.

        Raises:
            ValueError: the file is damaged, or belongs to another policy.
        """
        path = policy.with_name(PRESENCE)
        if not path.is_file():
            return None
        remedy = "Run python -m agents.presence again."
        try:
            data = read_json(str(path), "calibration")
            models = {name: Logistic(**data[name]) for name in ("before", "after")}
            found = cls(**data | models)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: no calibration of presence ({error}). {remedy}") from None
        if found.policy != file_digest(policy):
            raise ValueError(f"{path}: calibrated for another policy.zip. {remedy}")
        return found

    def write(self, policy: Path) -> Path:
        """Write the file beside a policy.zip; returns its path."""
        return write_json(policy.with_name(PRESENCE), asdict(self))


class Presence:
    """Decides which categories images show.

    Args:
        calibration: of the agent.
        backbone: its SAM.
        words: the categories.
        least: minimum presence (None: `calibration.threshold`; 0: every category is present).

    Raises:
        ValueError: the CLIP has other weights than in the calibration, or no word for a category.
    """

    def __init__(
        self,
        calibration: Calibration,
        backbone: BackboneService,
        words: Sequence[str],
        least: float | None = None,
    ) -> None:
        self.calibration = calibration
        self.least = calibration.threshold if least is None else least
        self._similarity = Similarity(calibration.clip, backbone, words)
        if self._similarity.identity != calibration.weights:
            raise ValueError(
                f"{calibration.clip['name']} has other weights than presence was calibrated with. "
                "Run python -m agents.presence again."
            )
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def identity(self) -> str:
        """What scores depend on, as text."""
        return json.dumps([asdict(self.calibration), self.least])

    def _maps(self, image: np.ndarray) -> np.ndarray:
        """Return the maps of all words; those of the last image are kept."""
        if self._last is None or self._last[0] is not image:
            self._last = image, self._similarity.maps(image)
        return self._last[1]

    def is_absent(self, image: np.ndarray, word: int) -> bool:
        """Return whether a category is so clearly absent that an agent need not begin.

        Args:
            image: uint8 (H, W, 3).
            word: index of the category.
        """
        own = before(self._maps(image)[word, None])[0]
        return self.least > 0 and float(self.calibration.before(own)) < self.calibration.stop

    def score(self, core: ClickCore, env_index: int, image: np.ndarray, word: int) -> float:
        """Return the presence of a category after the last click of an episode.

        Args:
            core: as of `after`.
            env_index: sub-environment of the episode.
            image: uint8 (H, W, 3).
            word: index of the category.
        """
        return float(self.calibration.after(after(core, env_index, self._maps(image)[word])))

    def score_of_mask(
        self, cells: np.ndarray, predicted: np.ndarray, image: np.ndarray, word: int
    ) -> float:
        """Return the presence of a category whose mask clicks have made; see `of_mask`."""
        evidence = of_mask(cells, predicted, self._maps(image)[word])
        return float(self.calibration.after(evidence))


def presence_of(
    agent: TrainedAgent, policy: str, words: Sequence[str], least: float | None
) -> Presence | None:
    """Return the presence of an agent; None without calibration, or with `least` 0 and without one.

    Args:
        agent: the agent.
        policy: as `local_policy` takes it.
        words: the categories.
        least: minimum presence (None: as calibrated).

    Raises:
        ValueError: `least` is given, and the agent is not calibrated; or as of `Presence`.
    """
    calibration = Calibration.read(local_policy(policy))
    if calibration is None:
        command = f"python -m agents.presence --policy {policy}"
        if least:
            raise ValueError(f"--min-presence: this agent has no {PRESENCE}. Run {command} first.")
        if least is None:
            print(
                "This agent cannot tell that an image does not show a category: every image gets a "
                f"mask of each. Calibrate it: {command}"
            )
        return None
    return Presence(calibration, agent.policy.features_extractor.backbone, words, least)
