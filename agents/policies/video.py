"""The policy of `SamVideo-v0`."""

from __future__ import annotations

import math
from typing import Any, cast

import gymnasium as gym
import torch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.base import NEVER, POLICIES, SamPolicy, StoredFeatures
from sam_gym.utils.settings import Count, checked


class VideoFeatures(StoredFeatures):
    """Features of each place: float32 (B, places, width).

    They mix what is known of the place and its memory with the same of the prompted and the present
    frame, the masks that were not chosen, and the progress. The embedding of the frame is not
    read: memories hold what SAM has seen of the object.

    Args:
        observation_space: of `SamVideo-v0`, with `obs="full"` or `obs="handle"`.
        backbone: arguments of `load_backbone`.
        width: feature channels.
    """

    @checked
    def __init__(
        self, observation_space: gym.spaces.Dict, backbone: dict[str, Any], width: Count = 48
    ) -> None:
        super().__init__(observation_space, backbone, width)
        shapes = {name: own.shape for name, own in observation_space.spaces.items()}
        (places, columns), (_, depth) = shapes["places"], shapes["memories"]  # type: ignore[misc]
        scalars = ["rivals", "progress", *(["budget"] if "budget" in shapes else [])]
        #: Entries that describe the present frame as a whole.
        self.scalars = tuple(scalars)
        self.reduce_memory = nn.Sequential(nn.LayerNorm(depth), nn.Linear(depth, width))
        self.of_place = nn.Linear(columns + 2 * width, width)
        self.position = nn.Parameter(torch.zeros(places, width))
        count = sum(math.prod(shapes[name] or ()) for name in self.scalars)
        self.of_frame = nn.Linear(count, width)
        self.mix = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, observations: PyTorchObs) -> Tensor:
        assert isinstance(observations, dict)
        places = observations["places"].float()
        exists = places[..., :1]
        memories = self.reduce_memory(observations["memories"].float()) * exists
        # How a memory differs from that of the present frame tells the object from others.
        differs = (memories - memories[:, -1:]) * exists
        own = torch.cat([places, memories, differs], dim=2)
        scalars = [observations[name].flatten(1).float() for name in self.scalars]
        frame = torch.cat(scalars, dim=1)
        tokens = F.relu(self.of_place(own) + self.position + self.of_frame(frame)[:, None])
        ends = torch.cat([tokens[:, :1], tokens[:, -1:]], dim=2).expand(-1, tokens.shape[1], -1)
        return F.relu(self.mix(torch.cat([tokens, ends], dim=2)))


class PooledPlaces(nn.Module):
    """Passes the features of places to the action head, and their means to the value head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = width, 64
        self.value = nn.Sequential(nn.Linear(3 * width, 64), nn.ReLU())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return features

    def forward_critic(self, features: Tensor) -> Tensor:
        pooled = [features.mean(dim=1), features.amax(dim=1), features[:, -1]]
        return self.value(torch.cat(pooled, dim=1))


class SlotHead(nn.Module):
    """A logit for keeping nothing, by the present frame, and one for each slot.

    Args:
        width: channels of the features.
        num_prompted: number of places before the slots.
    """

    def __init__(self, width: int, num_prompted: int = 1) -> None:
        super().__init__()
        self.num_prompted = num_prompted
        self.nothing, self.slots = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        slots = self.slots(features[:, self.num_prompted : -1])[..., 0]
        return torch.cat([self.nothing(features[:, -1]), slots], dim=1)


class ClickHead(nn.Module):
    """Logits for going on and for buying a click, by the present frame.

    Args:
        width: channels of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.choices = nn.Linear(width, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.choices(features[:, -1])


@POLICIES.register("video")
class VideoPolicy(SamPolicy):
    """Decides, by what is known of all memories, which one the present frame replaces, or whether
    a click is bought in it.

    Args:
        *args: as SB3 passes them.
        task: of the environment: "memory" or "when".
        rule_bias: logit that SAM 2's own action has more than the others at first.
        **kwargs: as `SamPolicy` takes them; `features` has the arguments of `VideoFeatures`.
    """

    extractor_class = VideoFeatures
    arguments = (*SamPolicy.arguments, "task", "rule_bias")

    def __init__(
        self, *args: Any, task: str = "memory", rule_bias: float = 0.0, **kwargs: Any
    ) -> None:
        self.task, self.rule_bias = task, rule_bias
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = PooledPlaces(self.features_dim)  # type: ignore[assignment]
        choices = int(cast(gym.spaces.Discrete, self.action_space).n)
        head = SlotHead if self.task == "memory" else ClickHead
        self._build_heads(head(self.features_dim), choices, lr_schedule)

    def _adjusted(self, logits: Tensor, obs: PyTorchObs) -> Tensor:
        # A start at SAM 2's own action, the last or the first, from which there is nothing to
        # unlearn.
        if self.task == "memory":
            return torch.cat([logits[:, :-1], logits[:, -1:] + self.rule_bias], dim=1)
        go_on, click = (logits + logits.new_tensor([self.rule_bias, 0.0])).unbind(dim=1)
        spent = cast(dict[str, Tensor], obs)["budget"][:, 0] <= 0
        return torch.stack([go_on, torch.where(spent, NEVER, click)], dim=1)

    def action_config(self, num_actions: int) -> dict[str, Any]:
        return {"task": self.task}
