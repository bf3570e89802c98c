"""Fills in jobset.yaml: prints the manifest of a run on the TPU nodes of a GKE cluster, and starts nothing.

COMMAND
    python -m launch.jobset --name medplib --topology v5e:8x8 --image IMAGE --bucket BUCKET -- \
        python -m medplib_jax.train --config=configs/stage4_moe.py:7b --workdir=runs/7b/stage4 --config.mesh.fsdp=64 \
        | kubectl apply -f -
"""

import argparse
import json
import math
import re
import string
from pathlib import Path

TEMPLATE = Path(__file__).with_name("jobset.yaml")
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# Of the machine types that slices of several hosts are made of: ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t.
CHIPS_PER_HOST = 4


# What Kubernetes and Cloud Storage accept, and how that is said. A JobSet's name is that of a service, too.
NAMES = {
    "name": (r"[a-z]([-a-z0-9]*[a-z0-9])?", "lower-case letters, digits and -, from a letter to a letter or digit"),
    "service_account": (r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", "lower-case letters, digits, - and ."),
    "bucket": (r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]", "3 or more lower-case letters, digits, -, _ and ."),
    "image": (r"[^\s\"'{}]+", "HOST/PROJECT/REPOSITORY/NAME:TAG"),
}
LONGEST_POD_NAME = 63


def render(
    name: str,
    topology: str,
    slices: int,
    image: str,
    bucket: str,
    service_account: str,
    max_restarts: int,
    command: list[str],
) -> str:
    """The manifest; `topology` is written as in `medplib_jax.aot`, for example v5e:8x8.

    Raises ValueError for a topology that is not known, and for names that Kubernetes or Cloud Storage would refuse.
    """
    kind, _, sizes = topology.partition(":")
    if kind not in ACCELERATORS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(
            f"topology {topology!r}: expected KIND:SIZES such as v5e:8x8, with a kind of {', '.join(ACCELERATORS)}"
        )
    chips = math.prod(int(size) for size in sizes.split("x"))
    names = {"name": name, "image": image, "bucket": bucket.removeprefix("gs://"), "service_account": service_account}
    check_names(names, slices, max(chips // CHIPS_PER_HOST, 1))
    values = names | {
        "slices": slices,
        "max_restarts": max_restarts,
        "command": json.dumps(command),
        "accelerator": ACCELERATORS[kind],
        "topology": sizes,
        "hosts": max(chips // CHIPS_PER_HOST, 1),
        "chips_per_host": min(chips, CHIPS_PER_HOST),
    }
    _, _, manifest = TEMPLATE.read_text().partition("apiVersion")
    return string.Template("apiVersion" + manifest).substitute(values)


def check_names(names: dict[str, str], slices: int, hosts: int) -> None:
    """Raises ValueError with what is expected, as `kubectl apply` would only say when the pods are to start."""
    for option, value in names.items():
        pattern, expected = NAMES[option]
        if not re.fullmatch(pattern, value):
            raise ValueError(f"--{option.replace('_', '-')} {value!r}: expected {expected}")
    if slices < 1:
        raise ValueError(f"--slices {slices}: expected 1 or more")
    pod = f"{names['name']}-slice-{slices - 1}-{hosts - 1}-xxxxx"
    if (over := len(pod) - LONGEST_POD_NAME) > 0:
        raise ValueError(f"--name {names['name']!r} is {over} letters too long: pods are called {pod} and the like")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--topology", required=True, help="of one slice, for example v5e:8x8")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", required=True, help="what launch/build_image.sh has pushed")
    parser.add_argument("--bucket", required=True, help="is mounted at /mnt/bucket")
    parser.add_argument(
        "--service-account", default="default", help="Kubernetes service account that may use the bucket"
    )
    parser.add_argument("--max-restarts", type=int, default=100)
    parser.add_argument("command", nargs="+", help="after --: the command of every host")
    given = parser.parse_args()
    try:
        print(render(**vars(given)), end="")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
