"""CODA-Prompt (Smith et al., CVPR 2023): see `sam_gym.backbones.prompt_pools`."""

from __future__ import annotations

from typing import ClassVar

from adaptation.prompted import Prompted
from adaptation.strategy import STRATEGIES


@STRATEGIES.register("coda")
class CodaPrompt(Prompted):
    """CODA-Prompt (Smith et al., CVPR 2023), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "coda"
