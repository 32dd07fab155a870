"""Annotate a folder of images with all that is in them: `annotate --everything --help`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from pycocotools import mask as rle

from agents.annotation.files import Ids, Progress, Reader, image_files, overlay_folder
from sam_gym.backbones import load_backbone
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
from sam_gym.mask_generation.masks import Masks
from sam_gym.utils.files import write_json
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.render import draw_masks, save_image

#: The one category of a model that tells no classes.
OBJECT = "object"


@dataclass(frozen=True)
class Generator(GeneratorOptions):
    """Everything mode's options, but for the form of a mask, which is COCO's."""

    output: tyro.conf.Suppress[str] = "coco_rle"


@dataclass
class Config:
    """Annotate a folder of images with the masks of all that is in them and write COCO JSON.

    Clicks on a grid of points, keeps the masks that SAM trusts, and no duplicates. An annotation
    has the mask (RLE), a `score` (what SAM takes the mask's IoU for) and a `stability_score`. The
    category is that of the adapter's class head, with its `category_score`, or else "object".
    A run that was cut off goes on where it was when it is started again. Files that are no images
    are reported and skipped.
    """

    images: str
    """Folder of images; folders within it are looked through too."""
    out: str = "annotations.json"
    """COCO JSON to write."""
    overlays: str | None = None
    """Folder for pictures of the masks (left out: beside `out`; "none": no pictures)."""
    coco: str | None = None
    """COCO JSON whose image and category ids are used, so that COCOeval can compare with it;
    classes that it does not have get ids that it does not use."""
    backbone: str = "micro"
    """SAM to use: micro, hq_micro, vit_b/l/h, hq_vit_b/l/h, mobile_sam, repvit_sam, hf:..."""
    checkpoint: str | None = None
    """Its weights (.safetensors or .pth); left out: its own."""
    adapter: str | None = None
    """Adapter file, as adaptation.train writes it."""
    device: str = "auto"
    """Where to work: auto, cpu, mps, cuda."""
    dtype: str = "auto"
    """Precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    generator: Annotated[Generator, tyro.conf.arg(name="")] = field(default_factory=Generator)
    """Where to click and what to keep."""


def annotate_everything(config: Config) -> dict[str, Any]:
    """Annotate and write; returns what stands in the COCO file.

    Raises:
        ValueError, FileNotFoundError: an option, the weights or the folder is wrong.
    """
    config.generator.validate()
    files = image_files(config.images)
    backbone = load_backbone(
        config.backbone, config.checkpoint, config.device, config.dtype, adapter=config.adapter
    )
    generator = MaskGenerator(backbone, config.generator)
    ids = Ids(config.coco, files, generator.names or [OBJECT], new_categories=True)
    files, left_out = ids.known(files, config.images)

    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    overlays = overlay_folder(config.overlays, out)
    if overlays is not None:
        overlays.mkdir(parents=True, exist_ok=True)
    model = {"thresholds": generator.thresholds, "weights": backbone.identity}
    progress = Progress(out.with_suffix(".partial.jsonl"), asdict(config) | model)
    todo = [file for file in files if (file,) not in progress.done]
    if progress.done:
        print(f"Going on: {len(progress.done)} of {len(files)} images are done.")
    reader = Reader(config.images, backbone)
    waiting: list[tuple[str, np.ndarray]] = []
    with ProgressBar() as bar:
        task = bar.add_task("annotating", total=len(files), completed=len(progress.done))

        def readable() -> Iterator[np.ndarray]:
            for file in todo:
                image = reader.read(file)
                if image is None:
                    bar.advance(task)
                    continue
                waiting.append((file, image))
                yield image

        for masks in generator.stream(readable()):
            file, image = waiting.pop(0)
            progress.add((file,), {"size": masks.size, "annotations": list(_annotations(masks))})
            if overlays is not None:
                drawn = map(masks.mask, range(len(masks)))
                picture = draw_masks(image, drawn, caption=f"{file}  {len(masks)} masks")
                save_image(overlays / f"{file}.jpg".replace("/", "__"), picture)
            bar.advance(task)

    content = _as_coco(config, progress, ids)
    images, annotations = content["images"], content["annotations"]
    write_json(out, content)
    progress.finish()
    reader.report(left_out, config.coco)
    counts = f"{len(annotations)} masks in {len(images)} images"
    print(f"{counts}, {len(reader.broken)} files skipped: {out}")
    if images and not annotations:
        trust, stability = generator.thresholds
        print(
            f"SAM trusts no mask more than {trust}, or none is as stable as {stability}: "
            "lower --pred-iou-thresh and --stability-score-thresh."
        )
    if overlays is not None:
        print(f"Pictures: {overlays}")
    return content


def _as_coco(config: Config, progress: Progress, ids: Ids) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for (file,), result in sorted(progress.done.items()):
        if file not in ids.images:
            continue
        (height, width), number = result["size"], ids.images[file]
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for own in result["annotations"]:
            category = ids.categories[own["category"]]
            known = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append(known | {key: own[key] for key in own if key != "category"})
    return {
        "info": {"description": f"everything that {config.backbone} finds"},
        "images": images,
        "categories": [{"id": number, "name": name} for name, number in ids.categories.items()],
        "annotations": annotations,
    }


def _annotations(masks: Masks) -> Iterator[dict[str, Any]]:
    """The masks of an image that have a pixel, without ids."""
    for record in masks.records("coco_rle"):
        if not record["area"]:
            continue
        annotation = {
            "segmentation": record["segmentation"],
            "area": record["area"],
            "bbox": rle.toBbox(record["segmentation"]).tolist(),
            "iscrowd": 0,
            "category": record.get("category", OBJECT),
            "score": record["predicted_iou"],
            "stability_score": record["stability_score"],
        }
        if "category_score" in record:
            annotation["category_score"] = record["category_score"]
        yield annotation


def main(args: Sequence[str]) -> dict[str, Any]:
    """The command line, without --everything."""
    return annotate_everything(
        tyro.cli(Config, args=args, prog="python -m agents.annotate --everything")
    )
