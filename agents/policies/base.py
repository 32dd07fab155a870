"""The base of all policies: features of SAM's embedding, an actor and a critic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sam_gym.backbones import load_backbone
from sam_gym.backbones.embeddings.store import shared_store
from sam_gym.utils.digest import digest_of
from sam_gym.utils.registry import Registry
from sam_gym.utils.settings import checked


def _adopt(found: Any, name: str) -> type[SamPolicy]:
    if not (isinstance(found, type) and issubclass(found, SamPolicy)):
        raise ValueError(f"The policy {name!r} is no subclass of SamPolicy, got {found!r}.")
    return found


#: Policy name, as `--policy` takes it -> class; "module:Class" is a name, too.
POLICIES: Registry[type[SamPolicy]] = Registry("policy", _adopt)


def register_policy(name: str, policy: type[SamPolicy]) -> type[SamPolicy]:
    """Add a policy, so that `train_ppo --policy` and saved policies know its name.

    It plays the environments of the policy whose subclass it is, or those whose `Task.policies`
    have its name. Worker processes know it if they import the module that calls this;
    `--policy module:Class` works without registration, except to load a saved policy, for which
    its module must be imported.

    Raises:
        ValueError: the name is taken.
    """
    return POLICIES.add(name, policy)


#: Logit of an impossible action; finite, so that exported policies can be compared.
NEVER = -1e9
_COMPUTATION = ("precision", "gradient_checkpointing")
#: Observation entry that holds the image -> number of its axes.
_IMAGE_AXES = {"handle": 1, "sam_image_embeddings": 3}


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return what "auto" stands for: "bf16-mixed" on a CPU with matrix units for bfloat16.

    Args:
        precision: "auto", or the precision to return.
        device: of the policy.
    """
    if precision != "auto":
        return precision
    has_matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16-mixed" if device.type == "cpu" and has_matrix_units() else "32-true"


class StoredFeatures(BaseFeaturesExtractor):
    """Base class of features (B, width, h, w) of SAM's embedding, from this process's store.

    The frozen SAM is not a submodule: gradients and checkpoints do not touch it.

    Args:
        observation_space: of an environment, with `obs="full"` or `obs="handle"`.
        backbone: arguments of `load_backbone`.
        width: feature channels.
    """

    def __init__(
        self, observation_space: gym.spaces.Dict, backbone: dict[str, Any], width: int
    ) -> None:
        super().__init__(observation_space, features_dim=width)
        self.backbone = load_backbone(**backbone)
        self.store = shared_store(self.backbone)
        #: (h, w) of the embedding.
        self.cells: tuple[int, int] = self.backbone.embedding_shape[1:]
        #: Whether the policy is being trained (see `SamPolicy.playing`).
        self.learning = False

    @property
    def identity(self) -> str:
        """Hex digest of the frozen models that the features depend on."""
        return self.backbone.identity

    def frozen_weights(self) -> dict[str, str]:
        """Return digests of weights: "backbone", and "adapter" if it has one."""
        backbone: Any = self.backbone
        adapter = getattr(backbone, "adapter", None)
        # The identity would depend on the precision, so on the device.
        digest = getattr(backbone, "weights_digest", None) or self.backbone.identity
        own = {} if adapter is None else {"adapter": digest_of(adapter.state)}
        return {"backbone": digest} | own

    def embedding(self, observations: dict[str, Tensor]) -> Tensor:
        """Return the embedding (B, C, h, w) of full or handle observations."""
        if "handle" in observations:
            return self.store.gather(observations["handle"][:, 0], "embedding")
        return observations["sam_image_embeddings"]

    def plane(self, observations: dict[str, Tensor], name: str) -> Tensor:
        """Return a map, 0 to 1, of full or handle observations: (B, 1, h, w)."""
        values = observations[name][..., None].float().permute(0, 3, 1, 2)
        if "handle" in observations:
            return values / 255.0
        return F.adaptive_avg_pool2d(values, self.cells)


class Mixer(nn.Sequential):
    """A small convolutional network: (B, channels, h, w) -> (B, width, h, w).

    Its input is an image, the same times a mask, and further planes.

    Args:
        image: channels of the image.
        planes: number of further planes.
        width: output channels.
    """

    def __init__(self, image: int, planes: int, width: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(2 * image + planes, width, 1), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        super().__init__(*layers)

    def forward(  # type: ignore[override]
        self, image: Tensor, mask: Tensor, planes: Tensor
    ) -> Tensor:
        """Mix the image (B, C, h, w), the same times a mask (B, 1, h, w), and planes (B, N, h, w).

        Nothing of the size of the image is copied to put its channels side by side.
        """
        first, *rest = cast(Any, self).children()
        channels = image.shape[1]
        own, masked, others = first.weight.split([channels, channels, planes.shape[1]], dim=1)
        seen, seen_masked = F.conv2d(image, torch.cat([own, masked])).chunk(2, dim=1)
        x = seen + seen_masked * mask + F.conv2d(planes, others, first.bias)
        for layer in rest:
            x = layer(x)
        return x


def pooled(features: Tensor) -> Tensor:
    """Pool mean and maximum over all cells, and frames if there are several.

    (B, width, h, w) or (B, T, width, h, w) -> (B, 2 * width).
    """
    where = (2, 3) if features.ndim == 4 else (1, 3, 4)
    return torch.cat([features.mean(dim=where), features.amax(dim=where)], dim=1)


class SplitFeatures(nn.Module):
    """Passes the features to the action head, and their pooled form to the value head."""

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


class SamPolicy(ActorCriticPolicy):
    """Base class of policies: an actor-critic over one feature map.

    It takes observations as the environments return them. A subclass sets `extractor_class`, builds
    its action head in `_build`, and says in `action_config` which environments it fits.

    Args:
        observation_space: as SB3 passes it.
        action_space: as SB3 passes it.
        lr_schedule: as SB3 passes it.
        features: arguments of `extractor_class`; names and numbers only, since SB3 pickles them.
        precision: "32-true", or "bf16-mixed" for features in bfloat16; weights, heads and
            probabilities are float32.
        gradient_checkpointing: recompute features in the backward pass to save memory.
    """

    extractor_class: type[StoredFeatures]
    #: Whether the features need the pixels of full observations.
    needs_image = False
    #: Number of likeliest actions that a test-time search decodes; 0: no search.
    search = 0
    #: Arguments that a saved policy holds, in addition to SB3's.
    arguments: tuple[str, ...] = ("features", *_COMPUTATION)

    @checked
    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        action_space: gym.spaces.Discrete,
        lr_schedule: Schedule,
        *,
        features: dict[str, Any],
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        self.precision, self.gradient_checkpointing = precision, gradient_checkpointing
        self.features = features
        kwargs |= {
            "features_extractor_class": self.extractor_class,
            "features_extractor_kwargs": features,
            "ortho_init": False,
        }
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        # The embeddings in a store are channels-last, too.
        self.to(memory_format=torch.channels_last)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("features_extractor_class", "features_extractor_kwargs", "ortho_init"):
            data.pop(name, None)
        return data | {name: getattr(self, name) for name in self.arguments}

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = SplitFeatures(self.features_dim)  # type: ignore[assignment]

    def _build_heads(self, action_net: nn.Module, num_choices: int, lr_schedule: Schedule) -> None:
        """Set the action head, its distribution, the value head and the optimizer.

        The children of the action head are the layers that output the logits.
        """
        # Replaces SB3's distribution over all actions.
        self.action_dist = CategoricalDistribution(num_choices)
        self.action_net = action_net
        # Small logits: all actions are about equally likely at first.
        for layer in cast(Any, action_net).children():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.value_net = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        make_optimizer: Any = self.optimizer_class
        self.optimizer = make_optimizer(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )

    def action_config(self, num_actions: int) -> dict[str, Any]:
        """Return the fields of the env config that decide what an action means to this policy.

        Args:
            num_actions: of that environment.
        """
        raise NotImplementedError

    def obs_to_tensor(self, observation: Any) -> tuple[PyTorchObs, bool]:
        """Return observations as a batch of tensors, and whether they were a batch.

        They may have either form, `obs="full"` or `obs="handle"`, whatever the policy was trained
        on, and come from a scalar or a vector environment.

        Raises:
            ValueError: they have neither form, or are of another SAM.
        """
        form = next((name for name in _IMAGE_AXES if name in observation), None)
        if form is None:
            got = ", ".join(observation) if isinstance(observation, dict) else type(observation)
            raise ValueError(
                f"Expected an observation with {' or '.join(map(repr, _IMAGE_AXES))}, got {got}. "
                'Make the environment with obs="full" or obs="handle".'
            )
        shape = np.shape(observation[form])
        is_batch = len(shape) > _IMAGE_AXES[form]
        own = cast(StoredFeatures, self.features_extractor).backbone.embedding_shape
        if form != "handle" and shape[-3:] != own:
            raise ValueError(
                f"The policy was trained with embeddings of shape {own}, got {shape[-3:]}. Make "
                "the environment with the backbone that it had."
            )
        tensors = self.to_tensors(observation)
        return tensors if is_batch else {k: v[None] for k, v in tensors.items()}, is_batch

    # SB3 would preprocess observations (one-hot, float images); the extractor takes them raw.

    def extract_features(self, obs: PyTorchObs, features_extractor: Any = None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16-mixed"):
            try:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    features = checkpoint(self.features_extractor, obs, use_reentrant=False)
                else:
                    features = self.features_extractor(obs)
            except KeyError as error:
                if error.args[0] not in cast(gym.spaces.Dict, self.observation_space).spaces:
                    raise
                raise ValueError(
                    f"The policy needs {error.args[0]!r}, which is not in the observation "
                    f"({', '.join(cast(Any, obs))}). Make the environment as it was in training."
                ) from error
        return cast(Tensor, features).float()

    def _choice_logits_and_value(self, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Return logits (B, choices) of the distribution, and state values (B, 1)."""
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        return self._adjusted(self.action_net(latent_pi), obs), self.value_net(latent_vf)

    def _adjusted(self, logits: Tensor, obs: PyTorchObs) -> Tensor:
        """Return logits (B, choices) after fixed rules: `NEVER` for impossible choices, for one."""
        return logits

    def _judged(self, obs: PyTorchObs) -> tuple[Distribution, Tensor]:
        """Return the distribution over choices, and state values (B, 1)."""
        logits, values = self._choice_logits_and_value(obs)
        return self.action_dist.proba_distribution(action_logits=logits), values

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return self._judged(obs)[0]

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        distribution, values = self._judged(obs)
        choices = distribution.get_actions(deterministic=deterministic)
        return self._to_actions(choices, obs), values, distribution.log_prob(choices)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        distribution, values = self._judged(obs)
        return values, distribution.log_prob(self._to_choices(actions)), distribution.entropy()

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._to_actions(super()._predict(observation, deterministic), observation)

    def _to_actions(self, choices: Tensor, obs: PyTorchObs) -> Tensor:
        """Convert choices to actions (B,) of the environment."""
        return choices

    def _to_choices(self, actions: Tensor) -> Tensor:
        """Convert actions to the choices (B,) that the distribution is over."""
        return actions

    def logits_and_value(self, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Return logits float32 (B, A) of all actions, and state values (B, 1)."""
        return self._choice_logits_and_value(obs)

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        return self.value_net(self.mlp_extractor.forward_critic(self.extract_features(obs)))

    def frozen_weights(self) -> dict[str, str]:
        """Return the digests of the frozen models that the features come from, by what they are."""
        return cast(StoredFeatures, self.features_extractor).frozen_weights()

    def set_categories(self, categories: Sequence[str]) -> None:
        """Set the names of the environment's categories."""

    def set_learning(self, learning: bool) -> None:
        """Set whether the policy is being trained; some features augment their inputs then."""
        for module in self.modules():
            if isinstance(module, StoredFeatures):
                module.learning = learning

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Act without training-time augmentations in this context."""
        learning = cast(StoredFeatures, self.features_extractor).learning
        self.set_learning(False)
        try:
            yield
        finally:
            self.set_learning(learning)

    def get_value(self, obs: dict[str, Any]) -> Tensor:
        """Return state values float32 (B, 1), for CleanRL-style loops.

        Args:
            obs: a batch of observations, arrays or tensors.
        """
        return self.predict_values(self.to_tensors(obs))

    def get_action_and_value(
        self, obs: dict[str, Any], action: Tensor | None = None, *, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample or evaluate actions, for CleanRL-style loops.

        Args:
            obs: a batch of observations, arrays or tensors.
            action: int64 (B,), actions to evaluate instead of sampling.
            deterministic: take the most likely action instead of sampling.

        Returns:
            action int64 (B,), log-probability (B,), entropy (B,), value (B, 1).
        """
        tensors = self.to_tensors(obs)
        distribution, values = self._judged(tensors)
        if action is None:
            choice = distribution.get_actions(deterministic=deterministic)
            action = self._to_actions(choice, tensors)
        else:
            choice = self._to_choices(action)
        entropy = distribution.entropy()
        assert entropy is not None
        return action, distribution.log_prob(choice), entropy, values

    def to_tensors(self, obs: dict[str, Any]) -> dict[str, Tensor]:
        """Return a batch of observations as tensors on the policy's device."""
        seen = (key for key in obs if key != "image" or self.needs_image)
        return {key: torch.as_tensor(obs[key], device=self.device) for key in seen}
