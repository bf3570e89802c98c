"""Training.

COMMAND
    python -m medplib_jax.train --config=configs/stage3_grounding.py:tiny --workdir=runs/stage3 \
        [--config.optim.lr=1e-4 ...]

The same command again resumes from the last checkpoint with the same losses, bit for bit. A finished workdir returns at
once. On several hosts the same command runs on each with one workdir that all of them see.

EXIT CODES
    0    finished
    75   SIGTERM, SIGUSR1 or a preemption notice: saved; or a step hung, or another process was lost. Start it again.
    130  Ctrl-C: saved
    1    an error that would only come again: bad data, a loss that is not finite, a config that does not fit
"""

import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence

from medplib_jax.parallel.imports import without_collection

with without_collection():
    import absl.logging
    import jax
    from absl import app, flags
    from jax.sharding import Mesh

    from medplib_jax.config.base import flags_parser, from_config_dict
    from medplib_jax.config.experiment import ExperimentConfig
    from medplib_jax.config.files import define_config
    from medplib_jax.parallel.compilation import Compilations, use_cache
    from medplib_jax.parallel.processes import RESTART, exit_code, initialize_distributed
    from medplib_jax.train.loop import Evaluate, train

log = logging.getLogger("medplib_jax.train")


def main() -> None:
    config = define_config("configs/NAME.py:SIZE, or NAME:SIZE of one that comes with the package")
    workdir = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics.jsonl and TensorBoard events.")
    flags.mark_flags_as_required(["config", "workdir"])

    def run(_) -> int:
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
        logging.getLogger("medplib_jax").setLevel(logging.INFO)
        use_cache()
        compilations = Compilations()
        try:
            initialize_distributed()
        except jax.errors.JaxRuntimeError as error:
            # the others do not come, or one of them is still the last attempt's
            log.error("joining the other processes failed: %s", error)
            return exit_code(error)
        try:
            experiment = epochs_asked_for(from_config_dict(config.value, ExperimentConfig), sys.argv)
            result = train(experiment, workdir.value, held_out_figures)
        except (ValueError, OSError, FloatingPointError) as error:
            log.debug("where it came from", exc_info=True)
            print(f"error: {error}", file=sys.stderr)
            return 1
        log.info("compiled %s", compilations)
        return {None: 0, signal.SIGINT: 130}.get(result["interrupted"], RESTART)

    app.run(run, flags_parser=flags_parser(ExperimentConfig))


def held_out_figures(config: ExperimentConfig, mesh: Mesh) -> Evaluate:
    """`evaluate.in_training.HeldOutFigures`, for runs that evaluate: importing it takes others more than a second."""
    from medplib_jax.evaluate.in_training import HeldOutFigures

    return HeldOutFigures(config, mesh)


def epochs_asked_for(config: ExperimentConfig, arguments: Sequence[str]) -> ExperimentConfig:
    """The config without its steps when only epochs stand on the command line: steps would win over them."""
    given = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    if "config.train.epochs" not in given or "config.train.steps" in given:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=0))


if __name__ == "__main__":
    main()
