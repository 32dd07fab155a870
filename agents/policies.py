"""Policies for the click task: they see SAM's embedding through the current mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones import load_backbone
from sam_gym.backbones.store import shared_store
from sam_gym.registry import Registry

#: Policy name -> class, as `--policy` takes it.
POLICIES: Registry[type[ImplicitPolicy]] = Registry("policy")


class ClickFeatures(BaseFeaturesExtractor):
    """What the implicit agent sees: float32 (B, width, h, w), aligned with SAM's embedding.

    The image embedding, modulated by the target category, enters three times: as it is, times the
    current mask probability, and with the mask and the step beside it (AlignSAM's implicit branch,
    made convolutional). The frozen SAM is not part of this module: embeddings are gathered from the
    store of this process, so neither gradients nor checkpoints touch it.

    Args:
        observation_space: of `SamSeg-v0`, with `obs="full"` or `obs="handle"`.
        backbone: name, checkpoint, device and dtype of the SAM, as `load_backbone` takes them.
        vocabulary: category names that the policy knows; others share one "unknown".
        categories: category names of the environment, in the order of `target_category`.
        max_steps: actions per episode, to scale the step.
        width: feature channels.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        backbone: dict[str, Any],
        vocabulary: Sequence[str],
        categories: Sequence[str],
        max_steps: int,
        width: int = 48,
    ) -> None:
        super().__init__(observation_space, features_dim=width)
        self.backbone = load_backbone(**backbone)
        self.store = shared_store(self.backbone)
        channels, height, width_cells = self.backbone.embedding_shape
        self.cells = (height, width_cells)
        self.max_steps, self.vocabulary = max_steps, tuple(vocabulary)
        self.has_cue = "cue_click" in observation_space.spaces
        # Word 0 is "unknown": it modulates nothing and is never trained.
        self.modulation = nn.Embedding(1 + len(self.vocabulary), 2 * width, padding_idx=0)
        nn.init.normal_(self.modulation.weight, std=0.3)
        with torch.no_grad():
            self.modulation.weight[0] = 0.0
        self.reduce = nn.Conv2d(channels, width, 1)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * width + 2 + int(self.has_cue), width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.words: Tensor
        self.register_buffer("words", torch.zeros(len(categories), dtype=torch.long), False)
        self.set_categories(categories)

    def set_categories(self, categories: Sequence[str]) -> None:
        """Say which names the numbers in `target_category` stand for from now on."""
        index = {name: 1 + k for k, name in enumerate(self.vocabulary)}
        words = [index.get(name, 0) for name in categories]
        self.words = torch.tensor(words, dtype=torch.long, device=self.modulation.weight.device)

    def forward(self, observations: PyTorchObs) -> Tensor:
        assert isinstance(observations, dict)
        embedding, mask = self._image(observations)
        target = self.words[observations["target_category"].flatten().long()]
        gain, bias = self.modulation(target)[:, :, None, None].chunk(2, dim=1)
        image = F.relu(self.reduce(embedding) * (1 + gain) + bias)
        return self.mix(torch.cat(self._planes(image, mask, observations), dim=1))

    def _planes(self, image: Tensor, mask: Tensor, observations: dict[str, Tensor]) -> list[Tensor]:
        """Image features (B, C, h, w) with all that is known of the episode so far."""
        step = observations["num_steps"].reshape(-1, 1, 1, 1).float() / self.max_steps
        planes = [image, image * mask, mask, step.expand_as(mask)]
        if self.has_cue:
            planes.append(self._cue_plane(observations["cue_click"]))
        return planes

    def _image(self, observations: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embedding (B, C, h, w) and mask probability (B, 1, h, w) of either observation form."""
        mask = observations["sam_pred_mask_prob"][:, None].float()
        if "handle" in observations:
            return self.store.gather(observations["handle"][:, 0]), mask / 255.0
        return observations["sam_image_embeddings"], F.adaptive_avg_pool2d(mask, self.cells)

    def _cue_plane(self, cue: Tensor) -> Tensor:
        """A soft spot at the cue click: (B, 1, h, w)."""
        height, width = self.cells
        ys = (torch.arange(height, device=cue.device) + 0.5) / height
        xs = (torch.arange(width, device=cue.device) + 0.5) / width
        dx, dy = xs - cue[:, 0, None], ys - cue[:, 1, None]
        distance = dy.square()[:, :, None] + dx.square()[:, None, :]
        return torch.exp(-distance * height * width)[:, None]


class SplitFeatures(nn.Module):
    """Hands the feature map to the action head, and its pooled form to the value head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = width, 64
        self.value = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return features

    def forward_critic(self, features: Tensor) -> Tensor:
        return self.value(pooled(features))


def pooled(features: Tensor) -> Tensor:
    """Mean and maximum over all places: (B, width, h, w) -> (B, 2 * width)."""
    return torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)


class SpatialHead(nn.Module):
    """Click logits read off the feature map, place by place; stop and undo from the pooled map."""

    def __init__(self, width: int, grid: int, num_others: int) -> None:
        super().__init__()
        self.grid = grid
        self.clicks = nn.Conv2d(width, 2, 1)
        self.others = nn.Linear(2 * width, num_others) if num_others else None

    def forward(self, features: Tensor) -> Tensor:
        clicks = F.adaptive_avg_pool2d(self.clicks(features), self.grid).flatten(1)
        if self.others is None:
            return clicks
        return torch.cat([clicks, self.others(pooled(features))], dim=1)


class FlatHead(nn.Module):
    """One linear layer from the whole feature map to all actions, as in the reference design."""

    def __init__(self, width: int, cells: tuple[int, int], num_actions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width * cells[0] * cells[1], num_actions)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.flatten(1))


@POLICIES.register("implicit")
class ImplicitPolicy(ActorCriticPolicy):
    """The implicit agent: SAM's own features tell where to click, no language model.

    After AlignSAM (Huang et al., CVPR 2024), with a spatial action head.

    Args:
        observation_space, action_space, lr_schedule: as SB3 passes them.
        features: arguments of `ClickFeatures` (names and numbers only, since SB3 pickles them).
        grid: clicks fall on grid x grid cells.
        head: "spatial" or "flat".
        others: actions beyond clicks, in their order: "stop", "undo".
    """

    extractor_class: type[ClickFeatures] = ClickFeatures
    #: Whether the features need the pixels of observations in full form.
    needs_image = False

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        action_space: gym.spaces.Discrete,
        lr_schedule: Schedule,
        *,
        features: dict[str, Any],
        grid: int,
        head: str = "spatial",
        others: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if head not in ("spatial", "flat"):
            from sam_gym.registry import unknown_name

            raise unknown_name("head", head, ["spatial", "flat"])
        self.grid, self.head, self.features = grid, head, features
        self.others = list(others)
        kwargs |= {
            "features_extractor_class": self.extractor_class,
            "features_extractor_kwargs": features,
            "ortho_init": False,
        }
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        extractor = self.features_extractor
        assert isinstance(extractor, ClickFeatures)
        width, num_actions = self.features_dim, int(self.action_space.n)  # type: ignore[attr-defined]
        self.mlp_extractor = SplitFeatures(width)  # type: ignore[assignment]
        if self.head == "flat":
            self.action_net = FlatHead(width, extractor.cells, num_actions)
            last: Any = self.action_net.linear
        else:
            self.action_net = SpatialHead(width, self.grid, num_actions - 2 * self.grid**2)
            last = self.action_net.clicks
        # Small logits at first: every action is about as likely as any other.
        for layer in (last, getattr(self.action_net, "others", None)):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        self.value_net = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        make_optimizer: Any = self.optimizer_class
        self.optimizer = make_optimizer(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("features_extractor_class", "features_extractor_kwargs", "ortho_init"):
            data.pop(name, None)
        own = {"features": self.features, "grid": self.grid, "head": self.head}
        return data | own | {"others": self.others}

    # SB3 would turn observations into one-hot codes and floats first; the extractor takes them raw.

    def extract_features(self, obs: PyTorchObs, features_extractor: Any = None) -> Tensor:
        return self.features_extractor(obs)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return self._get_action_dist_from_latent(self.extract_features(obs))

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        return self.value_net(self.mlp_extractor.forward_critic(self.extract_features(obs)))

    def set_categories(self, categories: Sequence[str]) -> None:
        """Say which names the numbers in `target_category` stand for from now on."""
        cast(ClickFeatures, self.features_extractor).set_categories(categories)

    def get_value(self, obs: dict[str, Any]) -> Tensor:
        """State values, float32 (B, 1), for CleanRL-style loops.

        Args:
            obs: a batch of observations, arrays or tensors.
        """
        return self.predict_values(self._to_tensors(obs))

    def get_action_and_value(
        self, obs: dict[str, Any], action: Tensor | None = None, *, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample (or judge) actions, for CleanRL-style loops.

        Args:
            obs: a batch of observations, arrays or tensors.
            action: int64 (B,), actions to judge instead of sampling.
            deterministic: the most likely action instead of a sample.

        Returns:
            action int64 (B,), log-probability (B,), entropy (B,), value (B, 1).
        """
        features = self.extract_features(self._to_tensors(obs))
        latent_pi, latent_vf = self.mlp_extractor(features)
        distribution = self._get_action_dist_from_latent(latent_pi)
        if action is None:
            action = distribution.get_actions(deterministic=deterministic)
        entropy = distribution.entropy()
        assert entropy is not None
        return action, distribution.log_prob(action), entropy, self.value_net(latent_vf)

    def _to_tensors(self, obs: dict[str, Any]) -> dict[str, Tensor]:
        return {
            key: torch.as_tensor(np.asarray(value) if not torch.is_tensor(value) else value).to(
                self.device
            )
            for key, value in obs.items()
            if key != "image" or self.needs_image
        }
