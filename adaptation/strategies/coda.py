"""CODA-Prompt (Smith et al., CVPR 2023): see `sam_gym.backbones.adapters.prompt_pools`."""

from __future__ import annotations

from typing import ClassVar

from adaptation.strategies.prompted import Prompted
from adaptation.strategy import STRATEGIES


@STRATEGIES.register("coda")
class CodaPrompt(Prompted):
    """CODA-Prompt (Smith et al., CVPR 2023), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "coda"
