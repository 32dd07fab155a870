"""Model cards of trained agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from agents.sharing import markdown
from agents.sharing.repository import PREFIX, RESULTS, TAG
from agents.sharing.run import TrainingRun
from agents.tasks import CardFacts, task_of
from sam_gym.data import DATASETS
from sam_gym.metrics.masks import with_interval

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
#: Agents whose names in the results table need an explanation.
_SHOWN = {
    "agent": "**this agent**",
    "no_search": "this agent without search",
    "oracle": "oracle (sees the ground truth)",
}


def model_card(run: TrainingRun, repo: str, license: str) -> str:
    """Return the model card of a run: YAML metadata, then Markdown.

    Args:
        run: the run.
        repo: USER/NAME of the repo that the card is for.
        license: license of the agent, by its name on the hub.

    Raises:
        ValueError: agents of the run's environment cannot be shared, or results.json lacks an
            entry that train_ppo writes.
    """
    try:
        return _model_card(run, repo, license)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run.folder / RESULTS}: not what train_ppo writes ({type(error).__name__}: {error})."
        ) from error


def _model_card(run: TrainingRun, repo: str, license: str) -> str:
    results, config = run.results, run.config
    task = task_of(config["env"])
    task.require("hub")
    policy, split = f"{PREFIX}{repo}", results["held_out_split"]
    facts = task.card_facts(run, policy)
    metadata = ModelCardData(
        license=license,
        library_name=TAG,
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "stable-baselines3", TAG, "segment-anything"],
        model_name=repo.partition("/")[2],
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name=facts.task_name,
                dataset_type=facts.dataset,
                dataset_name=f"{config['env']} on {facts.dataset}",
                dataset_split=split,
                metric_type="mean_iou",
                metric_name="mean IoU",
                metric_value=results["agent"]["mean_iou"],
            )
        ],
    )
    card = ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        text=markdown.text,
        code=markdown.code,
        block=markdown.block,
        name=metadata.model_name,
        env=config["env"],
        facts=facts,
        agent=results["agent"],
        split=split,
        unseen=_is_unseen(results, config["env_config"]),
        rows=_rows(results, facts),
        gap_closed=results["gap_closed"],
        policy=policy,
        pictures=run.pictures,
        config=yaml.safe_dump(config, sort_keys=False).rstrip(),
    )
    return f"{card}\n"


def _is_unseen(results: dict[str, Any], env_config: dict[str, Any]) -> bool:
    """Return whether training saw none of the images of the results, as far as is known.

    Former versions did not compare the image files.
    """
    name = env_config.get("dataset")
    reads_files = name is not None and DATASETS.get_from_file(name).reads_files
    shared = results.get("shared_images", None if reads_files else 0)
    return shared == 0 and results["held_out_split"] != env_config["split"]


def _rows(results: dict[str, Any], facts: CardFacts) -> list[list[str]]:
    """Cells of the results table, one row per agent, the best first."""
    agents = [(n, row) for n, row in results.items() if isinstance(row, dict) and "mean_iou" in row]
    return [
        [
            _SHOWN.get(name, markdown.text(name)) + _fewer(row, results["agent"]),
            with_interval(row["mean_iou"], row["ci95"]),
            *(f"{row[f'mean_{count}']:.1f}" for count in facts.counts),
        ]
        for name, row in sorted(agents, key=lambda item: -item[1]["mean_iou"])
    ]


def _fewer(row: dict[str, Any], agent: dict[str, Any]) -> str:
    """Return the episodes of a baseline that played fewer than the agent."""
    own = row.get("episodes", agent.get("episodes"))
    return "" if own == agent.get("episodes") else f" ({markdown.text(own)} of these episodes)"
