"""DualPrompt (Wang et al., ECCV 2022): see `sam_gym.backbones.adapters.prompt_pools`."""

from __future__ import annotations

from typing import ClassVar

from adaptation.strategies.prompted import Prompted
from adaptation.strategy import STRATEGIES


@STRATEGIES.register("dualprompt")
class DualPrompt(Prompted):
    """DualPrompt (Wang et al., ECCV 2022), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "dualprompt"
