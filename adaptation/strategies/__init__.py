"""The methods; importing this registers them all."""

from adaptation.strategies import (  # noqa: F401
    baselines,
    er,
    ewc,
    lwf,
    moda,
    prompted,
    regcl,
    samcl,
    saom,
)
