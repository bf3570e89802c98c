"""Compiles a program for a TPU topology or for nodes of NVIDIA GPUs on any machine and prints what it needs.

COMMAND
    python -m medplib_jax.aot --config=configs/stage4_moe.py:7b --topology=v5e:8x8|h200:8 [--program=train|eval|decode]
        [--json=FILE] [--length=1024] [--rows=128] [--quantize=int8] [--sweep]
        [--config.mesh.fsdp=32 --config.mesh.dcn_data=2 ...]

Memory, FLOPs, collectives, kernels and a roofline of one step; no TPU or GPU is needed, only its compiler: libtpu (the
extra `tpu`) or JAX's CUDA plugin (the extra `gpu`). A program at 7B compiles for about a minute. `--sweep` tries batch
sizes, remat policies and meshes and lists those that fit, best first.
"""

import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: a TPU or GPU of this machine is not needed

import jax
from absl import app, flags

from medplib_jax.aot.programs import PROGRAMS
from medplib_jax.aot.report import Request, as_text, examine
from medplib_jax.aot.sweep import as_table, sweep
from medplib_jax.config.base import flags_parser, from_config_dict
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.files import define_config
from medplib_jax.decode.layout import QUANTIZE

_CONFIG = define_config("configs/NAME.py:SIZE, or NAME:SIZE of one that comes with the package")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPUs KIND:SHAPE, such as v5e:8x8, v5p:4x4x4; GPUs of a node KIND:NUMBER, such as h200:8;"
    " config.mesh.dcn_data is the number of such slices or nodes",
)
_PROGRAM = flags.DEFINE_enum("program", "train", PROGRAMS, "what to compile")
_LENGTH = flags.DEFINE_integer("length", None, "positions per row; default: the longest of data.bucket_lengths")
_ROWS = flags.DEFINE_integer(
    "rows", None, "global batch; default: data.batch_size, for eval and decode eval.batch_size"
)
_QUANTIZE = flags.DEFINE_enum("quantize", "", QUANTIZE, "what has 8 bits in generation, as in predict")
_SWEEP = flags.DEFINE_bool("sweep", False, "try batch sizes, remat policies and meshes")
_JSON = flags.DEFINE_string("json", None, "file to write the report to")


def main(_) -> None:
    try:
        report = sweep(_request()) if _SWEEP.value else examine(_request())
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(as_table(report) if _SWEEP.value else as_text(report))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n")


def _request() -> Request:
    config = from_config_dict(_CONFIG.value, ExperimentConfig)
    rows = config.data.batch_size if _PROGRAM.value == "train" else config.eval.batch_size
    return Request(
        config,
        _TOPOLOGY.value,
        _PROGRAM.value,
        _ROWS.value or rows,
        _LENGTH.value or config.data.bucket_lengths[-1],
        _QUANTIZE.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    jax.config.update("jax_enable_compilation_cache", False)  # of a compiler for another platform
    app.run(main, flags_parser=flags_parser(ExperimentConfig))
