"""Evaluate an adapter and its pretrained SAM on the held-out objects of domains.

A semantic head is evaluated on the label maps of the domains instead.

python -m adaptation.evaluate --adapter runs/adaptation/moda-decoder-0/adapter.safetensors
python -m adaptation.evaluate --adapter PATH --data FOLDER1 FOLDER2 --prompts box clicks5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from adaptation.evaluation import Scores, score, score_labels
from adaptation.features import FeatureBank
from adaptation.options import ModelOptions, PromptName, StreamOptions
from sam_gym.backbones import load_backbone
from sam_gym.backbones.loading import read_adapter
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.files import output_file, write_json
from sam_gym.utils.progress import track
from sam_gym.utils.settings import Count, Seed


@documented
@dataclass
class EvaluateConfig:
    """Evaluate an adapter."""

    adapter: str
    """Adapter file (adapter.safetensors) that `adaptation.train` has written."""
    prompts: tuple[PromptName, ...] = ("box",)
    """Prompts to evaluate with."""
    split: Literal["val", "test"] | None = None
    """Split to evaluate on (None: test, or val if there is none, as in coco)."""
    objects_per_image: Count = 8
    """Maximum number of objects per image."""
    max_images: Count | None = None
    """Maximum number of images per domain (None: all)."""
    seed: Seed = 0
    """Seed of the choice of objects."""
    out: str | None = None
    """JSON file for the results."""
    overwrite: bool = False
    """Replace the file `out`. Without --overwrite, a file there is an error."""
    stream: tyro.conf.OmitArgPrefixes[StreamOptions] = field(default_factory=StreamOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns domain -> prompt -> numbers in %.

    Raises:
        ValueError, FileNotFoundError: a name, a value, the data or the adapter is wrong.
        FileExistsError: the file for the results exists.
    """
    options = cli.parse(EvaluateConfig, "python -m adaptation.evaluate", args, description=__doc__)
    if not options.prompts:
        raise ValueError("--prompts is empty: name at least one of box, click, clicks5.")
    out = None if options.out is None else output_file(options.out, options.overwrite)
    adapter = read_adapter(Path(options.adapter).expanduser())
    backbone = load_backbone(**options.model.arguments)
    model, plain = backbone.adapted_model(adapter, options.adapter), backbone.pretrained
    stream = options.stream.open()
    split = options.split or stream.held_out_split
    extra = options.stream.open_retention()
    bank = FeatureBank(
        backbone, stream, 1, options.objects_per_image, options.max_images, options.seed
    )
    domains = [*stream, *([] if extra is None else [extra])]
    others = [domain.name for domain in stream if domain.name not in adapter.domains]
    if adapter.domains and others:
        print(
            f"The adapter was trained on {', '.join(adapter.domains)}, not on "
            f"{', '.join(others)}: --stream and --data choose what it is evaluated on."
        )
    results: dict[str, Any] = {}
    for domain in track(domains, "evaluating", transient=True):
        own = results.setdefault(domain.name, {})
        if model.segmenter is not None:
            scores = score_labels(model, bank, domain, split)
            own["class"] = _in_percent("adapted", scores) | {"classes": len(scores.iou)}
            continue
        for prompt in options.prompts:
            numbers: dict[str, float] = {}
            for name, which in (("zero_shot", plain), ("adapted", model)):
                scores = score(which, bank, domain, prompt, split)
                numbers |= _in_percent(name, scores)
            own[prompt] = numbers | {"objects": len(scores.iou)}
    columns = ["zero_shot_iou", "adapted_iou", "zero_shot_biou", "adapted_biou", "objects"]
    if model.segmenter is not None:
        columns = ["adapted_iou", "adapted_biou", "classes"]
    rows = [
        [name, prompt, *(str(numbers[column]) for column in columns)]
        for name, prompts in results.items()
        for prompt, numbers in prompts.items()
    ]
    titles = ["domain", "prompt", *(column.replace("_", " ") for column in columns)]
    cli.print_table(f"{options.adapter} ({adapter.method}) on {split}, in %", titles, rows)
    if out is not None:
        write_json(out, results)
    return results


def _in_percent(name: str, scores: Scores) -> dict[str, float]:
    means = {"iou": scores.iou.mean(), "biou": scores.biou.mean()}
    return {f"{name}_{measure}": round(100 * float(x), 2) for measure, x in means.items()}


if __name__ == "__main__":
    cli.run(main)
