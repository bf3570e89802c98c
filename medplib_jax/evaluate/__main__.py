"""Evaluates checkpoints on tasks and writes one report.

COMMAND
    python -m medplib_jax.evaluate --config=configs/eval_sweep.py --workdir=runs/sweep --config.checkpoints='runs/7b/*'
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:data/phantom --workdir=runs/results --config.checkpoints=runs/demo/stage_IV

The same command again goes on where it stood, and with one more task or checkpoint it runs only what is new. On several hosts the same
command runs on each with one workdir that all of them see. The workdir then holds predictions/, sweep.json (every figure) and report.html.
"""

import logging

import absl.logging
import jax
from absl import app, flags

from medplib_jax.config.base import flags_parser, from_config_dict
from medplib_jax.config.files import define_config
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.parallel.compilation import use_cache
from medplib_jax.parallel.processes import abort_together, initialize_distributed, wait_for_others


def print_summary(result: dict) -> None:
    """The figures over all modalities; those by modality are in sweep.json."""
    for cell in result["cells"]:
        print(
            f"\n{cell['checkpoint']}, {cell['task']}, protocol {cell['protocol']}: {cell['records']} records, {len(cell['skipped'])} skipped"
        )
        for metric, value in cell["metrics"].items():
            if "/" not in metric:
                print(f"  {metric:26} {value:8.4f}")


def main() -> None:
    config = define_config(
        "configs/eval_sweep.py or configs/eval_folder.py:FOLDER; without configs/ and .py: the package's"
    )
    workdir = flags.DEFINE_string("workdir", None, "Folder of predictions, sweep.json and the report.")
    flags.mark_flags_as_required(["config", "workdir"])

    def run(_) -> int:
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
        logging.getLogger("medplib_jax").setLevel(logging.INFO)
        use_cache()
        initialize_distributed()
        with abort_together():
            result = run_sweep(from_config_dict(config.value, SweepConfig), workdir.value)
            if jax.process_index() == 0:
                print_summary(result)
                print(f"\nReport: {write_sweep_report(workdir.value)}")
            wait_for_others("reported")  # for one that leaves, the others must follow in minutes
        return 0

    app.run(run, flags_parser=flags_parser(SweepConfig))


if __name__ == "__main__":
    main()
