"""Sequential fine-tuning, without any measure against forgetting."""

from __future__ import annotations

from adaptation.strategy import STRATEGIES, Strategy


@STRATEGIES.register("naive")
class Naive(Strategy):
    """Fine-tunes on each domain in turn; the lower bound of continual learning."""
