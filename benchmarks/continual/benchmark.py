"""`continual`: adapt to domain after domain without forgetting (CoSAM, arXiv 2412.06418)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adaptation.method_flags import options_from_flags
from adaptation.results import RunResult
from adaptation.trainer import Trainer
from benchmarks.continual.config import Config, grouped, make_jobs, orders_of, with_defaults
from benchmarks.continual.report import pictures, write_report
from benchmarks.continual.summary import summarize
from benchmarks.report import output_folder, refuse_unfinished


def run(config: Config) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
    """
    config = with_defaults(config)
    jobs = make_jobs(config)
    streams = {order: config.stream.open(order) for order in orders_of(config)}
    retention = config.stream.open_retention()
    out = output_folder(config.out)
    refuse_unfinished(out, "runs/*/*/checkpoint.pt", config.resume)

    runs: dict[str, list[RunResult]] = {}
    first = next(iter(streams.values()))
    for number, ((seed, order), group) in enumerate(grouped(jobs)):
        # Methods with the same seed and order share a trainer, and so a feature bank.
        trainer = Trainer(
            replace(config.train, seed=seed),
            config.model.arguments,
            out / "runs" / _slug(order),
            retention,
        )
        for job in group:
            options = options_from_flags(config.method_options, job.method)
            done = trainer.fit(
                streams[order],
                job.method,
                job.tune,
                method_options=options,
                resume=config.resume,
            )
            runs.setdefault(job.label, []).append(done)
            numbers = done.summary(config.train.prompts[0])
            last, forgotten = numbers["last_iou"], numbers["ff_iou"]
            print(
                f"{job.label:<22} seed {seed}  last {last:5.1f}"
                + (f"  forgotten {forgotten:5.1f}" if forgotten is not None else " " * 17)
                + f"  {done.seconds:6.1f} s",
                flush=True,
            )
        if number == 0:
            sheet = pictures(trainer, first, group, out)
    summary = summarize(config, first, runs, trainer.bank(first))
    write_report(config, summary, runs, first, sheet, out)
    return summary


def _slug(order: str | None) -> str:
    return "given" if order is None else order.replace(":", "-").replace(",", "_")[:80]
