"""The implicit policy: it sees SAM's embedding through the current mask of the click task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import gymnasium as gym
import torch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.base import NEVER, POLICIES, Mixer, SamPolicy, StoredFeatures, pooled
from sam_gym.utils.settings import Count, checked, whole

#: Largest number of likeliest clicks that a search decodes.
MAX_SEARCH = 4096
#: Name of the only action head, in files of earlier versions.
SPATIAL = "spatial"
#: What a cell that the target map finds surely missed, or surely superfluous, adds to the logit of
#: the click that mends it, and takes from that of the other.
_GUIDANCE = 5.0
#: Largest upscale factor of a target map.
MAX_UPSCALE = 16
#: Prefix of the target map's weights in files of earlier versions.
FORMER_TARGET_MAP = "recalibration."


def check_head(head: str, where: str) -> None:
    """Raise `ValueError` for a policy with an action head that no longer exists.

    Args:
        head: its name.
        where: the file or policy that names it.
    """
    if head != SPATIAL:
        raise ValueError(
            f"{where}: the action head {head!r} was removed, only {SPATIAL!r} remains. Train the "
            "policy again."
        )


class ClickFeatures(StoredFeatures):
    """Features of the implicit policy: float32 (B, width, h, w), aligned with SAM's embedding.

    A convolutional form of AlignSAM's implicit branch. It mixes the image embedding, modulated by
    the target category; the same times the current mask probability; the mask; and the step.

    Args:
        observation_space: of `SamSeg-v0`, with `obs="full"` or `obs="handle"`.
        backbone: arguments of `load_backbone`.
        vocabulary: category names that the policy knows; all others share one "unknown".
        categories: category names of the environment, in the order of `target_category`.
        max_steps: actions per episode, to scale the step.
        width: feature channels.
    """

    @checked
    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        backbone: dict[str, Any],
        vocabulary: Sequence[str],
        categories: Sequence[str],
        max_steps: Count,
        width: Count = 48,
    ) -> None:
        super().__init__(observation_space, backbone, width)
        channels = self.backbone.embedding_shape[0]
        self.max_steps, self.vocabulary = max_steps, tuple(vocabulary)
        self.has_cue = "cue_click" in observation_space.spaces
        # Word 0 is "unknown": no modulation, never trained.
        self.modulation = nn.Embedding(1 + len(self.vocabulary), 2 * width, padding_idx=0)
        nn.init.normal_(self.modulation.weight, std=0.3)
        with torch.no_grad():
            self.modulation.weight[0] = 0.0
        self.reduce = nn.Conv2d(channels, width, 1)
        self.mix = Mixer(width, 2 + int(self.has_cue), width)
        self.words: Tensor
        self.register_buffer("words", torch.zeros(len(categories), dtype=torch.long), False)
        self.set_categories(categories)

    def set_categories(self, categories: Sequence[str]) -> None:
        """Set the names that the numbers in `target_category` stand for."""
        index = {name: 1 + k for k, name in enumerate(self.vocabulary)}
        words = [index.get(name, 0) for name in categories]
        self.words = torch.tensor(words, dtype=torch.long, device=self.modulation.weight.device)

    def forward(self, observations: PyTorchObs) -> Tensor:
        assert isinstance(observations, dict)
        embedding, mask = self._image(observations)
        target = self.words[observations["target_category"].flatten().long()]
        image = self._modulated(embedding, target)
        return self.mix(image, mask, self._planes(mask, observations))

    def _modulated(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Return image features (B, C, h, w) of an embedding, modulated by words (B,)."""
        gain, bias = self.modulation(target)[:, :, None, None].chunk(2, dim=1)
        return F.relu(self.reduce(embedding) * (1 + gain) + bias)

    def _planes(self, mask: Tensor, observations: dict[str, Tensor]) -> Tensor:
        """Return planes of mask, step and cue: (B, 2 or 3, h, w)."""
        step = observations["num_steps"].reshape(-1, 1, 1, 1).float() / self.max_steps
        planes = [mask, step.expand_as(mask)]
        if self.has_cue:
            planes.append(self._cue_plane(observations["cue_click"]))
        return torch.cat(planes, dim=1)

    def _image(self, observations: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return embedding (B, C, h, w) and mask probability (B, 1, h, w)."""
        return self.embedding(observations), self.plane(observations, "sam_pred_mask_prob")

    def _cue_plane(self, cue: Tensor) -> Tensor:
        """Return a Gaussian at the cue click: (B, 1, h, w)."""
        height, width = self.cells
        ys = (torch.arange(height, device=cue.device) + 0.5) / height
        xs = (torch.arange(width, device=cue.device) + 0.5) / width
        dx, dy = xs - cue[:, 0, None], ys - cue[:, 1, None]
        distance = dy.square()[:, :, None] + dx.square()[:, None, :]
        return torch.exp(-distance * height * width)[:, None]


class SpatialHead(nn.Module):
    """Click logits from each cell of the feature map; stop and undo from the pooled map."""

    def __init__(self, width: int, grid: int, polarities: int, num_others: int) -> None:
        super().__init__()
        self.grid = grid
        self.clicks = nn.Conv2d(width, polarities, 1)
        self.others = nn.Linear(2 * width, num_others) if num_others else None

    def forward(self, features: Tensor) -> Tensor:
        clicks = F.adaptive_avg_pool2d(self.clicks(features), self.grid).flatten(1)
        if self.others is None:
            return clicks
        return torch.cat([clicks, self.others(pooled(features))], dim=1)


class TargetMap(nn.Module):
    """Predicts the target: logits (B, factor * h, factor * w) from features (B, width, h, w).

    AlignSAM's recalibration module takes the embedding times the current mask (and, with words,
    times the map of the word). The policy's features do too, so this is a second copy of them with
    a head. As in SAM's decoder, masks come out finer than the embedding.

    Args:
        features: a copy of the policy's.
        upscale_factor: that of the pixel shuffle, from the features to the map.
    """

    def __init__(self, features: ClickFeatures, upscale_factor: int = 1) -> None:
        super().__init__()
        self.features, self.upscale_factor = features, upscale_factor
        self.head = nn.Conv2d(features.features_dim, upscale_factor**2, 1)

    def forward(self, observations: PyTorchObs) -> Tensor:
        return F.pixel_shuffle(self.head(self.features(observations)), self.upscale_factor)[:, 0]

    @torch.no_grad()
    def coverage(self, observations: PyTorchObs, grid: int) -> Tensor:
        """Return the fraction of each cell that the target covers: (B, grid, grid)."""
        return F.adaptive_avg_pool2d(self(observations).sigmoid(), grid)

    def missed(self, observations: dict[str, Tensor], grid: int) -> Tensor:
        """Return how much more of each cell the target covers than the mask does.

        Returns:
            -1 to 1, float (B, grid, grid).
        """
        mask = self.features.plane(observations, "sam_pred_mask_prob")[:, 0]
        return self.coverage(observations, grid) - F.adaptive_avg_pool2d(mask, grid)


@POLICIES.register("implicit")
class ImplicitPolicy(SamPolicy):
    """The implicit agent: it clicks by SAM's features alone, without a language model.

    After AlignSAM (Huang et al., CVPR 2024), with a spatial action head.

    Args:
        *args: as SB3 passes them.
        grid: clicks fall on grid x grid cells.
        others: actions other than clicks, in order: "stop", "undo".
        initial_mask: the masks that episodes begin with, see `ClickConfig`.
        recalibrate: choose among places only; a target map (see `agents.policies.target_map`)
            labels the click positive or negative.
        search: number of likeliest clicks that are decoded before one is played, see
            `agents.search`; 0: play the likeliest one. With a search, the errors of the mask, as
            the target map sees them, are added to the logits of clicks.
        upscale_factor: of the target map, over the embedding; policies of earlier versions have 1.
        **kwargs: as `SamPolicy` takes them; `features` has the arguments of `ClickFeatures`.
    """

    extractor_class: type[StoredFeatures] = ClickFeatures
    #: Updates of a target map per environment step, unless the user says otherwise.
    recalibration_updates = 2
    arguments = (
        *SamPolicy.arguments,
        *("grid", "others", "initial_mask", "recalibrate", "search", "upscale_factor"),
    )

    @checked
    def __init__(
        self,
        *args: Any,
        grid: int,
        others: Sequence[str] = (),
        initial_mask: str = "empty",
        recalibrate: bool = False,
        search: Annotated[int, whole(0, MAX_SEARCH)] = 0,
        upscale_factor: Annotated[int, whole(1, MAX_UPSCALE)] = 1,
        **kwargs: Any,
    ) -> None:
        # Policies of earlier versions name their action head.
        check_head(kwargs.pop("head", SPATIAL), type(self).__name__)
        self.grid, self.others, self.recalibrate = grid, list(others), recalibrate
        self.initial_mask, self.search = initial_mask, search
        self.upscale_factor = upscale_factor
        self.target_map: TargetMap | None = None
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        width, num_actions = self.features_dim, int(self.action_space.n)  # type: ignore[attr-defined]
        polarities = 1 if self.recalibrate else 2
        num_others = num_actions - 2 * self.grid**2
        num_choices = polarities * self.grid**2 + num_others
        self._build_mlp_extractor()
        head = SpatialHead(width, self.grid, polarities, num_others)
        self._build_heads(head, num_choices, lr_schedule)
        if self.initial_mask != "empty" and head.others is not None:
            # A good mask is soon lost to random clicks: each other action is at first as likely as
            # all clicks together.
            nn.init.constant_(head.others.bias, math.log(polarities * self.grid**2))
        # After the optimizer: PPO does not train this module.
        if self.recalibrate or self.search:
            features = cast(ClickFeatures, self.make_features_extractor())
            self.target_map = TargetMap(features, self.upscale_factor)

    def _adjusted(self, logits: Tensor, obs: PyTorchObs) -> Tensor:
        """Guide the clicks by the target map, if the policy searches."""
        if self.target_map is None or self.recalibrate:
            return logits
        missed = self.target_map.missed(cast(Any, obs), self.grid).flatten(1)
        guidance = _GUIDANCE * torch.cat([missed, -missed], dim=1)
        return logits + F.pad(guidance, (0, logits.shape[1] - guidance.shape[1]))

    def action_config(self, num_actions: int) -> dict[str, Any]:
        extractor = cast(ClickFeatures, self.features_extractor)
        own = {
            "grid": self.grid,
            "target": "instance" if extractor.has_cue else "category",
            "initial_mask": self.initial_mask,
        }
        # A policy made by hand may have unnamed other actions.
        if self.others or cast(Any, self.action_space).n != num_actions:
            own |= {name: name in self.others for name in ("stop", "undo")}
        return own

    def _to_actions(self, choices: Tensor, obs: PyTorchObs) -> Tensor:
        """Convert choices to actions (B,); with `recalibrate`, the target map labels places."""
        if not self.recalibrate:
            return choices
        places = self.grid**2
        negative = self._is_negative(obs).gather(1, choices.clamp(max=places - 1)[:, None])[:, 0]
        return choices + places * (negative | (choices >= places))

    def _to_choices(self, actions: Tensor) -> Tensor:
        """Convert actions to choices (B,): with `recalibrate`, places without labels."""
        if not self.recalibrate:
            return actions
        places = self.grid**2
        return torch.where(actions < 2 * places, actions % places, actions - places)

    def _is_negative(self, obs: PyTorchObs) -> Tensor:
        """Return whether the target map labels each place negative: bool (B, grid * grid)."""
        assert self.target_map is not None
        return self.target_map.coverage(obs, self.grid).flatten(1) < 0.5

    def logits_and_value(self, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Return logits float32 (B, A) of all actions, and state values (B, 1).

        With `recalibrate`, clicks of the other label have `NEVER`.
        """
        logits, value = self._choice_logits_and_value(obs)
        if not self.recalibrate:
            return logits, value
        places = self.grid**2
        clicks, negative = logits[:, :places], self._is_negative(obs)
        never = torch.full_like(clicks, NEVER)
        signed = [torch.where(negative, never, clicks), torch.where(negative, clicks, never)]
        return torch.cat([*signed, logits[:, places:]], dim=1), value

    def set_categories(self, categories: Sequence[str]) -> None:
        """Set the names that the numbers in `target_category` stand for."""
        cast(ClickFeatures, self.features_extractor).set_categories(categories)
        if self.target_map is not None:
            self.target_map.features.set_categories(categories)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights, those of earlier versions too, whose target map had another name."""
        renamed = {
            name.replace(FORMER_TARGET_MAP, "target_map.", 1)
            if name.startswith(FORMER_TARGET_MAP)
            else name: own
            for name, own in state_dict.items()
        }
        return super().load_state_dict(renamed, *args, **kwargs)
