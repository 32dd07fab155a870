"""What each SAM costs, computed without weights or arithmetic (torch's device "meta")."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from sam_gym import Backbone
from sam_gym.backbones.spec import BackboneSpec, backbones_by_size


def cost_row(spec: BackboneSpec) -> str:
    """Return the row of a SAM in `costs_table`."""
    with torch.device("meta"):
        model = spec.build()
    parameters = sum(each.numel() for each in model.parameters())
    frame = torch.empty(1, 3, spec.input_size, spec.input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.image_encoder(frame)
    # `Backbone` replaces parts of the encoder, so it comes after the count.
    service = spec.service or Backbone
    features = service(spec.name, model, torch.device("meta"), torch.float32).feature_spec.nbytes
    cells = [
        f"`{spec.name}`",
        f"{parameters / 1e6:,.1f} M",
        f"{4 * parameters / 2**20:,.0f} MiB",
        f"{counter.get_total_flops() / 1e9:,.0f} GFLOP",
        f"{features / 2**20:g} MiB",
        f"{2**30 // features:,}",
    ]
    return f"| {' | '.join(cells)} |"


def costs_table() -> str:
    """Return a table of all SAMs: parameters, encoder, and features of an image."""
    head = "| `backbone=` | parameters | in float32 | encode an image | its features | per GiB |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(cost_row, backbones_by_size())])
