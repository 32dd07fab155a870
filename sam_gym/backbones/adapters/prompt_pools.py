"""Trained prompts that depend on the image: further tokens of the mask decoder.

The query of an image is its mean embedding under the frozen encoder, normalised.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.adapters.model import ADAPTER_MODULES, AdapterModule, Model
from sam_gym.backbones.decode import MaskTokens, decode_tokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import Prompts


def query_of(embeddings: Tensor) -> Tensor:
    """Queries (B, C) of embeddings (B, C, h, w)."""
    return F.normalize(embeddings.mean(dim=(2, 3)), dim=1)


class PromptPool(AdapterModule):
    """Chooses tokens by an image's query.

    Args:
        channels: of a token and of a query.
        num_tasks: number of domains in the stream.
    """

    #: Rows of `keys` that each domain adds.
    keys_per_task: ClassVar[int]
    keys: Tensor

    def __init__(self, channels: int, num_tasks: int) -> None:
        super().__init__()
        self.channels, self.num_tasks = channels, num_tasks

    @abstractmethod
    def forward(self, queries: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, C) for queries (B, C), and a loss that goes with the choice (scalar).

        Args:
            queries: of `query_of`.
            task: the domain that is being learned; None: it is not known.
        """

    @classmethod
    def from_weights(cls, sam: Sam, weights: Mapping[str, Tensor], num_experts: int) -> Self:
        # The pool may be for more domains than were learned so far.
        return cls(sam.prompt_encoder.embed_dim, len(weights["keys"]) // cls.keys_per_task)

    def wrap(self, sam: Sam, experts: Sequence[Sam], raw: str) -> PromptedModel:
        return PromptedModel(sam, self)

    def begin_task(self, task: int) -> None:
        """Prepare to learn a domain; nothing by default."""


def _uniform(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-1, 1))


@ADAPTER_MODULES.register("l2p")
class L2PPool(PromptPool):
    """Learning to Prompt (Wang et al., CVPR 2022): the prompts whose keys are nearest.

    The sizes are those of CoSAM's release. While a domain is learned, it has its own slice of the
    pool (the paper's diversified selection), which keeps one prompt from serving all domains.
    """

    keys_per_task = 5

    def __init__(
        self, channels: int, num_tasks: int, size: int = 40, length: int = 5, top_k: int = 5
    ) -> None:
        super().__init__(channels, num_tasks)
        size = max(size, num_tasks * top_k)
        self.top_k = top_k
        self.prompts, self.keys = _uniform(size, length, channels), _uniform(size, channels)

    def forward(self, queries: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        similarity = queries @ F.normalize(self.keys, dim=1).T
        if task is None:
            chosen = similarity.topk(self.top_k, dim=1).indices
        else:
            own = torch.arange(task * self.top_k, (task + 1) * self.top_k, device=queries.device)
            chosen = own.expand(len(queries), -1)
        pull = similarity.gather(1, chosen).sum(dim=1).mean()
        return self.prompts[chosen].flatten(1, 2), -pull


@ADAPTER_MODULES.register("dualprompt")
class DualPromptPool(PromptPool):
    """DualPrompt (Wang et al., ECCV 2022): general prompts for all, expert prompts for a domain.

    There they are put before keys and values of several layers; here both are decoder tokens.
    """

    keys_per_task = 1

    def __init__(self, channels: int, num_tasks: int, general: int = 5, expert: int = 20) -> None:
        super().__init__(channels, num_tasks)
        self.general = _uniform(general, channels)
        self.expert, self.keys = (
            _uniform(num_tasks, expert, channels),
            _uniform(num_tasks, channels),
        )
        self.seen: Tensor
        self.register_buffer("seen", torch.tensor(0))

    def begin_task(self, task: int) -> None:
        self.seen.fill_(max(int(self.seen), task + 1))

    def forward(self, queries: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        similarity = queries @ F.normalize(self.keys[: int(self.seen)], dim=1).T
        if task is None:
            chosen = similarity.argmax(dim=1)
        else:
            chosen = torch.full((len(queries),), task, device=queries.device)
        pull = similarity.gather(1, chosen[:, None]).mean()
        general = self.general.expand(len(queries), -1, -1)
        return torch.cat([general, self.expert[chosen]], dim=1), -pull


@ADAPTER_MODULES.register("coda")
class CodaPool(PromptPool):
    """CODA-Prompt (Smith et al., CVPR 2023): a sum of components, weighted by attention.

    The weight of a component is the cosine of its key with the query that its own attention vector
    has filtered. Each domain adds components; those of earlier ones stay as they are. The loss
    keeps components, keys and attention vectors of different components orthogonal.
    """

    keys_per_task = 10

    def __init__(self, channels: int, num_tasks: int, per_task: int = 10, length: int = 8) -> None:
        super().__init__(channels, num_tasks)
        self.per_task = per_task
        size = num_tasks * per_task
        self.prompts = nn.Parameter(torch.empty(size, length, channels))
        self.keys = nn.Parameter(torch.empty(size, channels))
        self.attention = nn.Parameter(torch.empty(size, channels))
        for weight in self.parameters():
            nn.init.orthogonal_(weight.flatten(1))
        self.seen: Tensor
        self.register_buffer("seen", torch.tensor(0))

    def begin_task(self, task: int) -> None:
        self.seen.fill_(max(int(self.seen), task + 1))

    def forward(self, queries: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        last = (int(self.seen) if task is None else task + 1) * self.per_task
        first = last if task is None else task * self.per_task

        def known(weight: Tensor) -> Tensor:
            return torch.cat([weight[:first].detach(), weight[first:last]])

        prompts, keys, attention = map(known, (self.prompts, self.keys, self.attention))
        filtered = F.normalize(queries[:, None] * attention, dim=2)
        weights = (filtered * F.normalize(keys, dim=1)).sum(dim=2)
        tokens = torch.einsum("bm,mlc->blc", weights, prompts)
        penalty = sum(
            (_not_orthogonal(w) for w in (prompts, keys, attention)), queries.new_zeros(())
        )
        return tokens, penalty


def _not_orthogonal(weight: Tensor) -> Tensor:
    """Mean squared deviation of the rows' Gram matrix from the identity."""
    rows = weight.flatten(1)
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()


class PromptedModel(Model):
    """A frozen SAM whose decoder takes further tokens, chosen by the image.

    Args:
        sam: the pretrained SAM.
        pool: chooses the tokens.
    """

    def __init__(self, sam: Sam, pool: PromptPool) -> None:
        super().__init__(sam, "embedding")
        self.pool = pool
        #: The domain that is being learned, or None.
        self.task: int | None = None
        #: The pool's loss in the last call of `decode`.
        self.pool_loss: Tensor | None = None

    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskTokens:
        tokens, self.pool_loss = self.pool(query_of(features.embedding), self.task)
        if prompts.rows is not None:
            tokens = tokens[prompts.rows]
        return decode_tokens(self.sam, features, prompts, tokens)
