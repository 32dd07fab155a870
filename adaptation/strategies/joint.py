"""Joint training: all domains at once, in one run."""

from __future__ import annotations

from typing import ClassVar

from adaptation.strategy import STRATEGIES, Strategy


@STRATEGIES.register("joint")
class Joint(Strategy):
    """Trains on all domains together, each equally often; the upper bound.

    It takes as many steps as a sequential method on all domains.
    """

    joint: ClassVar[bool] = True
