"""Learning to Prompt (Wang et al., CVPR 2022): see `sam_gym.backbones.adapters.prompt_pools`."""

from __future__ import annotations

from typing import ClassVar

from adaptation.strategies.prompted import Prompted
from adaptation.strategy import STRATEGIES


@STRATEGIES.register("l2p")
class L2P(Prompted):
    """Learning to Prompt (Wang et al., CVPR 2022), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "l2p"
