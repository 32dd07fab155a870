"""Write `tests/compat/84a4160/`: files as users have saved them, and the numbers that they gave.

Run it on commit 84a4160, the last one before the packages were reordered, and on no other:

    git worktree add /tmp/base 84a4160
    cd /tmp/base && PYTHONPATH=$PWD python REPO/tests/compat/make_fixtures.py

`test_compat.py` loads the files with the present code and measures with the functions of this
module, which therefore use public names that exist on both sides.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

COMMIT = "84a4160"
FIXTURES = Path(__file__).parent / COMMIT

#: Adapter name -> its method and tune target. Between them: every kind of expert, router and head.
ADAPTERS = {
    "decoder": ("naive", "decoder"),
    "lora": ("naive", "lora"),
    "sam_adapter": ("naive", "sam_adapter"),
    "hq_small": ("naive", "hq_small"),
    "classes": ("saom_v2", "decoder"),
    "tokens": ("moda", "lora_decoder"),
    "embeddings": ("samcl", "lora"),
    "l2p": ("l2p", "prompts"),
    "dualprompt": ("dualprompt", "prompts"),
    "coda": ("coda", "prompts"),
}
#: Policy name -> environment id, and settings of the environment.
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "implicit": ("SamSeg-v0", {"max_steps": 3}),
    "explicit": ("SamSeg-v0", {"max_steps": 3}),
    "everything": (
        "SamEverything-v0",
        {"dataset": "scenes", "grid": 8, "budget": 4, "keep_iou": 0.0, "stop": False},
    ),
}
#: What `load_backbone` takes for the SAM of the fixtures, which has `FIXTURES` as working folder.
COMPAT = {"name": "compat", "checkpoint": "compat.pth", "device": "cpu"}
SEED = 7

# The models --------------------------------------------------------------------------------------


def compat_sam() -> Sam:
    """A SAM of the published architecture, so small that its files fit into the repository."""
    size, width, grid = 64, 16, 4
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=size,
            embed_dim=16,
            depth=2,
            num_heads=2,
            out_chans=width,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=32, num_heads=4),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=16,
        ),
    )


def narrow_vit_b() -> Sam:
    """`build_sam_vit_b` with a narrow encoder of two blocks; all else is the original's."""
    return _build_sam(
        encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=[1]
    )


def generated(sam: Sam) -> dict[str, torch.Tensor]:
    """A state dict of seeded numbers for a model; the same with every version of torch."""
    rng = np.random.default_rng(0)
    state = {}
    for name, value in sam.state_dict().items():
        drawn = rng.standard_normal(tuple(value.shape), dtype=np.float32)
        fan_in = max(1, value[0].numel()) if value.dim() > 1 else 1
        scale = 0.1 if value.dim() <= 1 else fan_in**-0.5
        drawn = drawn * np.float32(scale)
        if name.endswith("weight") and value.dim() == 1:
            drawn = drawn + np.float32(1)
        if "output_hypernetworks_mlps" in name and "layers.2" in name:
            drawn = drawn * np.float32(20)
        state[name] = torch.from_numpy(drawn)
    return state


# What they give ----------------------------------------------------------------------------------


def images() -> list[np.ndarray]:
    """Two images, a wide and a tall one: uint8 (H, W, 3)."""
    rng = np.random.default_rng(SEED)
    coarse = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((6, 8), (8, 5))]
    return [np.kron(image, np.ones((8, 8, 1), np.uint8)) for image in coarse]


def numbers_of(backbone: Any, prompts_class: Any) -> dict[str, Any]:
    """Mask logits and predicted IoU of a backbone for a box and for two clicks on each image."""
    scale = backbone.image_size / 64
    boxes = torch.tensor([[8.0, 8, 40, 50], [20, 5, 40, 60]]) * scale
    points = torch.tensor([[[20.0, 20], [50, 40]], [[30, 30], [10, 12]]]) * scale
    labels = torch.tensor([[1, 0], [1, -2]])
    features, found = backbone.encode(images()), {}
    for name, prompts in (
        ("box", prompts_class(boxes=boxes)),
        ("clicks", prompts_class(points=points, labels=labels)),
    ):
        logits, iou = backbone.decode(features, prompts)[:2]
        logits = logits.float()
        found[name] = {
            "shape": list(logits.shape),
            "logits": logits.flatten(2)[:, :, :: logits[0, 0].numel() // 8].tolist(),
            "mean": logits.mean((2, 3)).tolist(),
            "area": (logits > 0).sum((2, 3)).tolist(),
            "iou": iou.float().tolist(),
        }
    return found


def masks_of(generator: Any) -> list[dict[str, Any]]:
    """Records of everything mode on the first image, without the masks themselves."""
    return [
        {key: value for key, value in record.items() if key != "segmentation"}
        for record in generator.generate(images()[0])
    ]


def first_actions(agent: Any, env_id: str, **env: Any) -> dict[str, Any]:
    """Actions and values of a policy on the first two observations of three episodes."""
    envs = gym.make_vec(env_id, num_envs=3, obs="full", **env)
    observations, _ = envs.reset(seed=SEED)
    found: dict[str, Any] = {"actions": [], "values": [], "log_probs": [], "entropy": []}
    for _ in range(2):
        with torch.no_grad(), agent.policy.playing():
            values = agent.policy.get_value(observations)
            actions, log_probs, entropy, _ = agent.policy.get_action_and_value(
                observations, deterministic=True
            )
        found["actions"].append(actions.tolist())
        for key, numbers in (("values", values), ("log_probs", log_probs), ("entropy", entropy)):
            found[key].append(numbers.flatten().tolist())
        observations, *_ = envs.step(actions.numpy())
    envs.close()
    return found


def episodes_of(evaluate_main: Callable[[list[str]], Any], out: Path, *options: str) -> list[Any]:
    """Rows of episodes.csv, as `python -m agents.evaluate` writes it."""
    fixed = ("--device", "cpu", "--episodes", "4", "--num-envs", "2", "--seed", str(SEED))
    evaluate_main(["--out", str(out), *fixed, *options])
    with (out / "episodes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train_arguments(out: str) -> list[str]:
    """Arguments of a run of train_ppo of four rollouts over the SAM of the fixtures."""
    return [
        *("--out", out, "--backbone", "compat", "--checkpoint", "compat.pth", "--device", "cpu"),
        *("--train-images", "8", "--num-envs", "4", "--n-steps", "8", "--batch-size", "16"),
        *("--total-timesteps", "128", "--checkpoint-every", "64", "--eval-every", "64"),
        *("--eval-episodes", "4", "--final-episodes", "4"),
    ]


def adapt_arguments(method: str, tune: str, out: str) -> list[str]:
    """Arguments of a run of adaptation.train of few steps over the SAM of the fixtures."""
    stream = ("--domains", "cells,night")
    if method.startswith("saom"):
        stream = ("--stream", "scenes")
    if tune != "prompts":
        stream = (*stream, "--tune", tune)
    if method in ("moda", "samcl"):
        stream = (*stream, "--selector-steps", "4")
    return [
        *("--method", method, "--out", out, *stream, "--backbone", "compat"),
        *("--checkpoint", "compat.pth", "--device", "cpu", "--steps", "6", "--batch-size", "4"),
        *("--max-images", "3", "--learning-rate", "0.004", "--checkpoint-every", "4"),
    ]


def curves_of(results: dict[str, Any]) -> dict[str, Any]:
    """What a run of train_ppo has measured: the curves, and how agents do in the end."""
    names = ("train_curve", "eval_curve", "iou_after_steps", "gap_closed", "agent", "random")
    return {name: results[name] for name in names}


# Writing, on commit 84a4160 -----------------------------------------------------------------------


class _Stop(Exception):
    """A run is stopped here."""


def _stopping(function: Any, after: int) -> Any:
    calls = 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == after:
            raise _Stop
        return result

    return stopping


def _add_backbones() -> None:
    from sam_gym.backbones.loading import BACKBONES

    BACKBONES["compat"] = compat_sam
    torch.save(generated(compat_sam()), COMPAT["checkpoint"])


def _write_adapters(scratch: Path) -> dict[str, Any]:
    from sam_gym.everything import GeneratorOptions, MaskGenerator

    import adaptation.trainer
    from adaptation.train import main
    from sam_gym import Prompts, load_backbone

    numbers: dict[str, Any] = {}
    for name, (method, tune) in ADAPTERS.items():
        main(adapt_arguments(method, tune, str(scratch / name)))
        (written,) = (scratch / name).rglob("adapter.safetensors")
        path = Path("adapters", f"{name}.safetensors")
        path.parent.mkdir(exist_ok=True)
        shutil.copy(written, path)
        backbone = load_backbone(**COMPAT, adapter=str(path))
        numbers[name] = numbers_of(backbone, Prompts)
        if name == "classes":
            options = GeneratorOptions((4, 4), 0.0, 0.0)
            numbers[name]["everything"] = masks_of(MaskGenerator(backbone, options))

    # A run that is stopped when it writes its second checkpoint, and what it comes to in the end.
    save = adaptation.trainer.save_state
    adaptation.trainer.save_state = _stopping(save, 2)
    try:
        main(adapt_arguments("ewc", "hq_small", "adaptation"))
    except _Stop:
        adaptation.trainer.save_state = save
    shutil.rmtree(Path("adaptation", "ewc-hq_small-0", "tensorboard"))
    run = main(adapt_arguments("ewc", "hq_small", str(scratch / "whole")))
    numbers["resumed"] = {"scores": run.scores, "zero_shot": run.zero_shot}
    return numbers


def _write_policies(scratch: Path) -> dict[str, Any]:
    import agents.evaluate
    from agents import train_ppo
    from agents.evaluate import PolicyAgent

    numbers: dict[str, Any] = {}
    arguments = train_ppo.policy_arguments

    def narrow(*given: Any) -> dict[str, Any]:
        made = arguments(*given)
        return made | {"features": made["features"] | {"width": 8}}

    train_ppo.policy_arguments = narrow
    for name, (env, settings) in POLICIES.items():
        out = scratch / f"ppo-{name}"
        short = ("--total-timesteps", "64", "--policy", name, "--env", env)
        train_ppo.main([*train_arguments(str(out)), *short, *flags(settings)])
        path = policy_path(name)
        if name == "implicit":
            _write_hub(out, path.parent)
        else:
            path.parent.mkdir(exist_ok=True)
            shutil.copy(out / "policy.zip", path)
        numbers[name] = policy_numbers(PolicyAgent, agents.evaluate.main, name, path, scratch)
    train_ppo.policy_arguments = arguments
    return numbers


def policy_path(name: str) -> Path:
    """Of a policy.zip: that of the hub's repository, or one that lies alone."""
    return Path("hub", "policy.zip") if name == "implicit" else Path("policies", f"{name}.zip")


def policy_numbers(
    agent_class: Any, evaluate_main: Any, name: str, path: str | Path, scratch: Path
) -> dict[str, Any]:
    """What a policy over the SAM of the fixtures does."""
    env_id, settings = POLICIES[name]
    env = {"backbone": COMPAT["name"], "checkpoint": COMPAT["checkpoint"], "device": "cpu"}
    found = first_actions(agent_class.load(path, "cpu"), env_id, **env, **settings, split="test")
    given = ("--policy", str(path), "--env", env_id, "--backbone", COMPAT["name"])
    given = (*given, "--checkpoint", COMPAT["checkpoint"], *flags(settings))
    return found | {"episodes": episodes_of(evaluate_main, scratch / f"eval-{name}", *given)}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line options."""
    given = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        given += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return given


def _write_checkpoint(scratch: Path) -> dict[str, Any]:
    import agents.checkpoint

    from agents import train_ppo

    write = agents.checkpoint.write_checkpoint
    agents.checkpoint.write_checkpoint = _stopping(write, 1)
    try:
        train_ppo.main([*train_arguments("ppo"), "--max-steps", "3"])
    except _Stop:
        agents.checkpoint.write_checkpoint = write
    shutil.rmtree("ppo/tensorboard")
    return curves_of(
        train_ppo.main([*train_arguments(str(scratch / "whole-ppo")), "--max-steps", "3"])
    )


def _write_hub(run: Path, folder: Path) -> None:
    """What `agents.hub push` uploads of a run, with its pictures made small."""
    from PIL import Image

    from agents import hub

    for name in hub.RUN_FILES:
        folder.mkdir(exist_ok=True)
        shutil.copy(run / name, folder / name)
    hub.push(hub.Push(str(folder), "me/clicker", card_only=True))
    results = json.loads((folder / "results.json").read_text())
    results["config"] = hub._shareable(results["config"])
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    for name in ("learning_curve.png", "episodes.gif"):
        picture = Image.open(folder / name).convert("P")
        picture.thumbnail((64, 64))
        picture.save(folder / name)


def main() -> None:
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if head != COMMIT:
        raise SystemExit(f"error: run this on commit {COMMIT}, not on {head}.")
    from sam_gym import Prompts, load_backbone
    from sam_gym.backbones.loading import BACKBONES

    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    sys.path.insert(0, os.getcwd())
    os.chdir(FIXTURES)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        _add_backbones()
        numbers: dict[str, Any] = {"compat": numbers_of(load_backbone(**COMPAT), Prompts)}
        numbers["micro"] = numbers_of(load_backbone("micro", device="cpu"), Prompts)
        BACKBONES["vit_b"] = narrow_vit_b
        torch.save(generated(narrow_vit_b()), scratch / "vit_b.pth")
        narrow = load_backbone("vit_b", checkpoint=str(scratch / "vit_b.pth"), device="cpu")
        numbers["narrow_vit_b"] = numbers_of(narrow, Prompts)
        numbers["adapters"] = _write_adapters(scratch)
        numbers["policies"] = _write_policies(scratch)
        numbers["resumed"] = _write_checkpoint(scratch)
    Path(COMPAT["checkpoint"]).unlink()
    Path("numbers.json").write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
