"""The methods, one file each; importing this registers them all."""

from adaptation.strategies import (  # noqa: F401
    coda,
    dualprompt,
    er,
    ewc,
    joint,
    l2p,
    lwf,
    moda,
    naive,
    regcl,
    samcl,
    saom,
    zero_shot,
)
