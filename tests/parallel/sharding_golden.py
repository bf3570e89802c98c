"""The PartitionSpec of every parameter of the full-size models on three meshes.

`python -m tests.parallel.sharding_golden` writes the files that the test reads.
"""

import gzip
import json

from jax.sharding import AbstractMesh

from configs import bird_grit, stage4_moe
from medplib_jax.batch import flatten
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.layers import model_shardings
from medplib_jax.parallel.mesh import MESH_AXES
from medplib_jax.train.step import abstract_model
from tests.paths import GOLDEN

FILES = {GOLDEN / "sharding_7b.json.gz": stage4_moe.large, GOLDEN / "sharding_bird_9b.json.gz": bird_grit.large}
MESHES = {"fsdp": (1, 64, 1, 1), "data x fsdp": (4, 16, 1, 1), "fsdp x expert x tensor": (1, 16, 2, 2)}


def specs(config: ExperimentConfig) -> dict[str, dict[str, list]]:
    """{mesh: {parameter: one entry per axis: None, a mesh axis or several}}."""
    model = abstract_model(config.model, config.sharding)
    meshes = {name: AbstractMesh(sizes, MESH_AXES) for name, sizes in MESHES.items()}
    return {
        name: {path: list(sharding.spec) for path, sharding in flatten(model_shardings(model, mesh)).items()}
        for name, mesh in meshes.items()
    }


if __name__ == "__main__":
    for file, make in FILES.items():
        file.write_bytes(gzip.compress(json.dumps(specs(make()), indent=0).encode(), mtime=0))
