"""The methods; importing this registers them all, and lets them be combined."""

import adaptation.combined  # noqa: F401
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
    semantic,
)
