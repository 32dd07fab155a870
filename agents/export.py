"""Export a trained policy for use without this package: `python -m agents.export --help`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.evaluate import PolicyAgent
from agents.sharing.pull import PolicyOption
from agents.tasks import task_of_policy
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_atomic, write_json
from sam_gym.utils.runs import refuse_finished
from sam_gym.utils.settings import Count, check_settings
from sam_gym.utils.text import listed

#: Files of an exported policy.
FILES = ("policy.onnx", "policy.pt2", "inputs.json")
#: Absolute and relative tolerance between the outputs of an exported policy and the original.
TOLERANCE = 1e-4


@documented
@dataclass
class ExportConfig:
    """Export a policy as ONNX and as a torch.export program, and check that both agree with it.

    Both take the tensors that inputs.json describes, for any number of images, and return the
    logits of all actions (B, A) and the state value (B, 1). A policy's search decodes masks, so it
    is not exported.

    Example: python -m agents.export --policy runs/ppo/policy.zip
    """

    policy: PolicyOption
    out: str = "runs/export"
    """Folder for policy.onnx, policy.pt2 and inputs.json."""
    overwrite: bool = False
    """Replace the policy in `out`. Without --overwrite, an exported policy in `out` is an error."""
    batch: Count = 4
    """Batch size of the latency measurement."""
    repeats: Count = 20
    """Timed calls; the median is reported."""


class ExportablePolicy(nn.Module):
    """A policy as a function of tensors, in the order of `inputs`.

    Args:
        policy: the policy.

    Raises:
        ValueError: policies of its environment cannot be exported.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.task = policy, task_of_policy(policy)
        self.task.require("export")
        #: Input name -> `ExportInput`.
        self.inputs = self.task.export_inputs(policy)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits float32 (B, A) and values float32 (B, 1) of a batch of inputs."""
        observations = dict(zip(self.inputs, tensors, strict=True))
        return self.policy.logits_and_value(observations)

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs within their bounds."""
        noise = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randint(0, own.high, (batch, *own.shape), generator=noise)
            if own.dtype is torch.int64
            else torch.rand((batch, *own.shape), generator=noise)
            for own in self.inputs.values()
        )


def export(config: ExportConfig) -> dict[str, Any]:
    """Export, check and time a policy; returns the printed results.

    Raises:
        ValueError, FileNotFoundError: the policy or an option is wrong.
        FileExistsError: `out` holds an exported policy.
        ImportError: the packages for ONNX are not installed.
        RuntimeError: an exported policy disagrees with the original.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch.onnx.export needs it)
    except ImportError as error:
        message = 'Exporting needs more packages: pip install "sam-gym[export]".'
        raise ImportError(message) from error
    check_settings(config)
    if not config.overwrite:
        for name in FILES:
            refuse_finished(Path(config.out).expanduser(), name)
    out = make_folder(config.out)
    policy = PolicyAgent.load(config.policy, "cpu").policy
    policy.set_training_mode(False)
    policy.precision = "32-true"  # runtimes lack bfloat16
    module = ExportablePolicy(policy).eval()
    with TemporaryDirectory() as folder:
        results = _export_into(Path(folder), module, config)
        for name in FILES:
            write_atomic(out / name, (Path(folder) / name).read_bytes())
    print(json.dumps(results, indent=2))
    print(f"Wrote {listed(FILES)} to {out}.")
    return results


def _export_into(out: Path, module: ExportablePolicy, config: ExportConfig) -> dict[str, Any]:
    """Write all files into a folder, and compare their outputs with the original's."""
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

    runtimes: dict[str, Any] = {"torch": module, "torch.export": loaded, "onnx": run_onnx}
    results: dict[str, Any] = {"batch": config.batch}
    inputs = module.example(config.batch, seed=1)
    with torch.no_grad():
        expected = module(*inputs)
        for name, run in runtimes.items():
            pairs = list(zip(run(*inputs), expected, strict=True))
            difference = max(float((one - other).abs().max()) for one, other in pairs)
            if not all(torch.allclose(*pair, rtol=TOLERANCE, atol=TOLERANCE) for pair in pairs):
                raise RuntimeError(f"{name} is off by {difference:.2g}: not exported.")
            results[name] = {
                "largest_difference": difference,
                "median_ms": round(1000 * _median_seconds(run, inputs, config.repeats), 3),
            }
    return results


def _write_inputs(module: ExportablePolicy, path: Path) -> None:
    inputs = {}
    for name, own in module.inputs.items():
        dtype = str(own.dtype).removeprefix("torch.")
        inputs[name] = {"shape": ["batch", *own.shape], "dtype": dtype, "is": own.meaning}
    facts = {"backbone": module.policy.features["backbone"]}
    write_json(path, {"inputs": inputs} | facts | module.task.export_facts(module.policy))


def _median_seconds(work: Callable[..., Any], inputs: Sequence[Tensor], repeats: int) -> float:
    """Return the median time of a call, after one call to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work(*inputs)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line."""
    return export(cli.parse(ExportConfig, "python -m agents.export", args))


if __name__ == "__main__":
    cli.run(main)
