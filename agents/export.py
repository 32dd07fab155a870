"""Export a trained policy for use without this package: `python -m agents.export --help`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from agents.evaluate import PolicyAgent
from agents.policies.explicit import TextFeatures
from agents.policies.implicit import ClickFeatures, ImplicitPolicy
from sam_gym.utils import cli
from sam_gym.utils.files import write_json

#: How far an exported policy's outputs may be from the original's, absolutely and relatively.
TOLERANCE = 1e-4


@dataclass
class Config:
    """Write a policy as ONNX and as a torch.export program, checked to say the same.

    Both take the tensors that `inputs.json` beside them describes, for any number of images, and
    give the logits of all actions (B, A) and the state value (B, 1).
    """

    policy: str
    """Path of a policy.zip, as train_ppo writes it, hf://USER/NAME[@REVISION], or one of the
    package: implicit, explicit."""
    out: str = "runs/export"
    """Folder for policy.onnx, policy.pt2 and inputs.json."""
    batch: int = 4
    """Images in a batch of the latency that is printed."""
    repeats: int = 20
    """Timed runs, of which the median is printed."""


class ExportablePolicy(nn.Module):
    """A policy as a function of tensors, in the order of `inputs`.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: ImplicitPolicy) -> None:
        super().__init__()
        self.policy = policy
        extractor = policy.features_extractor
        if not isinstance(extractor, ClickFeatures):
            raise ValueError(
                f"{type(policy).__name__} cannot be exported: only click agents (implicit, "
                "explicit) can."
            )
        channels, height, width = extractor.backbone.embedding_shape
        masks = extractor.backbone.mask_shape
        #: Input name -> shape of one row, dtype, and what it is.
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype, str]] = {
            "sam_image_embeddings": (
                (channels, height, width),
                torch.float32,
                "embedding of the image, as the backbone's encode gives it",
            ),
            "sam_pred_mask_prob": (masks, torch.float32, "probability of the mask so far, 0 to 1"),
            "target_category": ((), torch.int64, "number of the category in `categories`"),
            "num_steps": ((), torch.int64, "actions so far"),
        }
        if extractor.has_cue:
            self.inputs["cue_click"] = ((2,), torch.float32, "cue click, 0 to 1 of the frame")
        if isinstance(extractor, TextFeatures):
            shape = (len(policy.features["categories"]), 1 + height * width)
            self.inputs["word_maps"] = (
                shape,
                torch.float32,
                "of agents.policies.explicit",
            )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 (B, A) and value float32 (B, 1) of a batch of inputs."""
        observations = dict(zip(self.inputs, tensors, strict=True))
        return self.policy.logits_and_value(observations)

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of the right kinds."""
        noise = torch.Generator().manual_seed(seed)
        categories = len(self.policy.features["categories"])
        tensors = []
        for name, (shape, dtype, _) in self.inputs.items():
            if dtype is torch.int64:
                top = categories if name == "target_category" else self.policy.features["max_steps"]
                tensors.append(torch.randint(0, top, (batch, *shape), generator=noise))
            else:
                tensors.append(torch.rand((batch, *shape), generator=noise))
        return tuple(tensors)


def export(config: Config) -> dict[str, Any]:
    """Export, check and time; returns what is printed.

    Raises:
        ValueError, FileNotFoundError: the policy is wrong, or an option.
        ImportError: the packages for ONNX are not installed.
        RuntimeError: an exported policy says something else than the original.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (what torch.onnx.export translates with)
    except ImportError as error:
        raise ImportError(
            'Exporting needs more packages: pip install "sam-gym[export]".'
        ) from error
    if config.batch < 1 or config.repeats < 1:
        raise ValueError("--batch and --repeats must be at least 1.")
    policy = PolicyAgent.load(config.policy, "cpu").policy
    policy.set_training_mode(False)
    policy.precision = "32-true"  # runtimes lack bfloat16
    module = ExportablePolicy(policy).eval()
    with TemporaryDirectory() as folder:
        results = _export_into(Path(folder), module, config)
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        for file in Path(folder).iterdir():
            shutil.copyfile(file, out / file.name)
    print(json.dumps(results, indent=2))
    print(f"Wrote policy.onnx, policy.pt2 and inputs.json to {out}.")
    return results


def _export_into(out: Path, module: ExportablePolicy, config: Config) -> dict[str, Any]:
    """Write all files into a folder and check what they say."""
    import onnxruntime

    example = module.example(2)
    dynamic = (tuple({0: torch.export.Dim("batch")} for _ in example),)
    program = torch.export.export(module, example, dynamic_shapes=dynamic)
    torch.export.save(program, out / "policy.pt2")
    torch.onnx.export(
        program,
        f=str(out / "policy.onnx"),
        input_names=list(module.inputs),
        output_names=["logits", "value"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    _write_inputs(module, out / "inputs.json")

    loaded = torch.export.load(out / "policy.pt2").module()
    session = onnxruntime.InferenceSession(str(out / "policy.onnx"))

    def run_onnx(*tensors: Tensor) -> tuple[Tensor, ...]:
        feed = {name: x.numpy() for name, x in zip(module.inputs, tensors, strict=True)}
        return tuple(torch.from_numpy(x) for x in session.run(None, feed))

    ways: dict[str, Callable[..., Any]] = {
        "torch": module,
        "torch.export": loaded,
        "onnx": run_onnx,
    }
    results: dict[str, Any] = {"batch": config.batch}
    inputs = module.example(config.batch, seed=1)
    with torch.no_grad():
        expected = module(*inputs)
        for name, way in ways.items():
            got = way(*inputs)
            for one, other in zip(got, expected, strict=True):
                if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE):
                    raise RuntimeError(
                        f"{name} is off by {float((one - other).abs().max()):.2g}: not exported."
                    )
            results[name] = {
                "largest_difference": max(
                    float((one - other).abs().max())
                    for one, other in zip(got, expected, strict=True)
                ),
                "median_ms": round(1000 * _median_seconds(way, inputs, config.repeats), 3),
            }
    return results


def _write_inputs(module: ExportablePolicy, path: Path) -> None:
    policy = module.policy
    inputs = {
        name: {"shape": ["batch", *shape], "dtype": str(dtype).removeprefix("torch."), "is": what}
        for name, (shape, dtype, what) in module.inputs.items()
    }
    write_json(
        path,
        {
            "inputs": inputs,
            "categories": policy.features["categories"],
            "backbone": policy.features["backbone"],
            "grid": policy.grid,
            "max_steps": policy.features["max_steps"],
            "actions": "grid x grid positive clicks row by row, as many negative, then others",
            "others": policy.others,
        },
    )


def _median_seconds(work: Callable[..., Any], inputs: Sequence[Tensor], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work(*inputs)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    return export(tyro.cli(Config, args=args))


if __name__ == "__main__":
    cli.run(main)
