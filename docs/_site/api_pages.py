"""The Python reference: which objects stand on which page."""

from __future__ import annotations

import sam_gym

#: Page -> title, and what stands on it: names of `sam_gym`, or dotted paths.
PAGES: dict[str, tuple[str, list[str]]] = {
    "models": (
        "SAMs and predictions",
        [
            "Predictor",
            "Predictions",
            "load_backbone",
            "Backbone",
            "Prompts",
            "ImageFeatures",
            "BackboneSpec",
            "register_backbone",
        ],
    ),
    "everything": ("Everything mode", ["MaskGenerator", "GeneratorOptions"]),
    "videos": ("Tracking", ["VideoTracker", "TrackingSession", "TrackedFrame"]),
    "data": (
        "Datasets",
        [
            "make_dataset",
            "make_video_dataset",
            "Sample",
            "Dataset",
            "Video",
            "VideoDataset",
            "DatasetSpec",
            "register_dataset",
            "register_video_dataset",
            "sam_gym.data.streams.Stream",
            "sam_gym.data.streams.make_stream",
        ],
    ),
    "environments": (
        "Environment classes",
        [
            "sam_gym.envs.base_env.BaseEnv",
            "sam_gym.envs.base_env.BaseVectorEnv",
            "sam_gym.envs.base_core.BaseCore",
            "sam_gym.envs.config.EnvConfig",
            "Transition",
            "register_reward",
            "sam_gym.envs.rewards.iou_gain",
            "sam_gym.envs.rewards.dice_gain",
            "sam_gym.envs.rewards.click_correct",
            "sam_gym.envs.rewards.foreground",
            "sam_gym.envs.rewards.shaped",
            "sam_gym.backbones.embeddings.store.EmbeddingStore",
        ],
    ),
    "metrics": (
        "Metrics",
        [
            "sam_gym.metrics.masks",
            "sam_gym.metrics.panoptic",
            "sam_gym.metrics.semantic",
            "sam_gym.metrics.video",
            "sam_gym.metrics.continual",
        ],
    ),
    "agents": (
        "Agents",
        [
            "agents.evaluate.PolicyAgent",
            "agents.evaluate.load_agent",
            "agents.evaluate.evaluate",
            "agents.evaluate.Evaluation",
            "agents.evaluate.film_episodes",
            "agents.baselines.base.Agent",
            "agents.policies.base.SamPolicy",
            "agents.policies.base.register_policy",
            "agents.policies.implicit.ImplicitPolicy",
            "agents.policies.explicit.ExplicitPolicy",
            "agents.policies.everything.EverythingPolicy",
            "agents.policies.video.VideoPolicy",
            "agents.tasks.base.Task",
            "agents.tasks.base.register",
            "agents.ppo.config.TrainPPOConfig",
        ],
    ),
    "adaptation": (
        "Adaptation",
        [
            "adaptation.trainer.Trainer",
            "adaptation.options.TrainConfig",
            "adaptation.strategy.Strategy",
            "adaptation.evaluation",
            "sam_gym.backbones.adapters.adapter",
        ],
    ),
}


def path_of(name: str) -> str:
    """Return the dotted path of a public name of `sam_gym`; others are paths already."""
    if "." in name:
        return name
    return f"{getattr(sam_gym, name).__module__}.{name}"


def api_page(page: str) -> str:
    """Return a page of the reference as Markdown, for mkdocstrings."""
    title, names = PAGES[page]
    blocks = [f"# {title}", *(f"::: {path_of(name)}" for name in names)]
    return "\n\n".join(blocks) + "\n"


def api_index() -> str:
    """Return the page that lists the reference."""
    rows = ["# Python reference", ""]
    for page, (title, names) in PAGES.items():
        listed = ", ".join(f"`{name.rpartition('.')[2]}`" for name in names)
        rows.append(f"- [{title}]({page}.md): {listed}")
    rows += ["", "`from sam_gym import ...` takes the names that stand without a path:", ""]
    rows.append(", ".join(f"`{name}`" for name in sam_gym.__all__) + ".")
    return "\n".join(rows) + "\n"
