"""Evaluates checkpoints on tasks and writes one report.

COMMAND
    python -m medplib_jax.evaluate --config=configs/eval_sweep.py --workdir=runs/sweep --config.checkpoints='runs/7b/*'
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:data/phantom --workdir=runs/results \\
        --config.checkpoints=runs/demo/stage_IV

The same command again goes on where it stood, and with one more task or checkpoint it runs only what is new. On several
hosts the same command runs on each with one workdir that all of them see. Commands with other checkpoints or tasks may
run side by side in one workdir. It then holds predictions/, sweep.json (every figure) and report.html.
--config.metrics=my_metrics.py scores with metrics of your own (`own.py`).

Ends with 1 when a checkpoint or task that is there could not be used, or when a cell is not complete.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from medplib_jax.parallel.imports import without_collection

with without_collection():
    import absl.logging
    import jax
    from absl import app, flags

    from medplib_jax.config.base import flags_parser, from_config_dict
    from medplib_jax.config.files import define_config
    from medplib_jax.config.sweep import SweepConfig
    from medplib_jax.data.errors import DataError
    from medplib_jax.evaluate.own import MetricFailed, OwnMetric, load_metrics
    from medplib_jax.evaluate.plan import SweepPlan, plan_sweep
    from medplib_jax.evaluate.provenance import note_run
    from medplib_jax.evaluate.report.sweep import write_sweep_report
    from medplib_jax.evaluate.rescore import rescore
    from medplib_jax.evaluate.result import SweepResult
    from medplib_jax.evaluate.sweep import IncompleteSweep, answer_plan
    from medplib_jax.parallel.compilation import use_cache
    from medplib_jax.parallel.processes import abort_together, initialize_distributed, require_shared, wait_for_others


def print_summary(result: SweepResult) -> None:
    """The figures over all modalities; those by modality are in sweep.json."""
    for cell in result.cells:
        records = f"{cell.records} records, {len(cell.skipped)} skipped"
        if cell.cut_off != 0:
            count = "an unknown number" if cell.cut_off is None else cell.cut_off
            records += f", {count} cut off after {cell.max_new_tokens} tokens"
        print(f"\n{cell.checkpoint}, {cell.task}, protocol {cell.protocol}: {records}")
        for metric, value in cell.metrics.items():
            if "/" not in metric:
                print(f"  {metric:26} {value:8.4f}")
    for left in result.left_out:
        print(f"\n{left}")


def evaluate(plan: SweepPlan, own: Sequence[OwnMetric]) -> int:
    """Answers a plan, scores with the user's own metrics and writes the report; returns the exit code."""
    result = answer_plan(plan)
    if jax.process_index() == 0:
        note_run(plan.workdir, f"{jax.device_count()} {jax.devices()[0].device_kind}")
        print_summary(rescore(plan.workdir, own))
        print(f"\nReport: {write_sweep_report(plan.workdir)}")
    wait_for_others("reported")  # for one that leaves, the others must follow in minutes
    return int(any(left.failed and left.what in plan.asked for left in result.left_out))


def parse_flags(arguments: list[str]) -> list[str]:
    """The flags' parser; a config file or folder that cannot be read is one line."""
    try:
        return flags_parser(SweepConfig)(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def main() -> None:
    config = define_config(
        "configs/eval_sweep.py or configs/eval_folder.py:FOLDER; without configs/ and .py: the package's"
    )
    workdir = flags.DEFINE_string("workdir", None, "Folder of predictions, sweep.json and the report.", required=True)
    flags.mark_flag_as_required("config")

    def run(_) -> int:
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
        logging.getLogger("medplib_jax").setLevel(logging.INFO)
        use_cache()
        initialize_distributed()
        with abort_together():
            try:
                folder = Path(workdir.value).absolute()
                folder.mkdir(parents=True, exist_ok=True)
                require_shared(folder)
                settings = from_config_dict(config.value, SweepConfig)
                own = load_metrics(settings.metrics)
                plan = plan_sweep(settings, folder)
            except (ValueError, OSError) as error:  # what was given cannot be used
                return refuse(error)
            try:
                return evaluate(plan, own)
            except (DataError, IncompleteSweep, MetricFailed) as error:
                return refuse(error)

    app.run(run, flags_parser=parse_flags)


def refuse(error: Exception) -> int:
    """Says in one line what is wrong; among several processes it is raised, so that all of them end."""
    if jax.process_count() > 1:
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
