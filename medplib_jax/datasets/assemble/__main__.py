"""Assembles MeCoVQA on the images of SA-Med2D-20M into one dataset.

COMMAND
    python -m medplib_jax.datasets.assemble --annotations MeCoVQA --images SA-Med2D-20M --out data/assembled
"""

import argparse
import sys

from medplib_jax.datasets.assemble.dataset import assemble, describe
from medplib_jax.datasets.command import add_workers, workers_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, help="folder of the MeCoVQA JSON files")
    parser.add_argument(
        "--images", required=True, help="SA-Med2D-20M: the folder that has images/ and masks/, or SAMed2Dv1/ with them"
    )
    parser.add_argument("--out", required=True)
    add_workers(parser)
    arguments = parser.parse_args()
    try:
        manifest = assemble(arguments.annotations, arguments.images, arguments.out, workers_of(arguments))
    except (ValueError, RuntimeError, OSError) as error:  # DataError among them
        print(error, file=sys.stderr)
        return 1
    print(describe(manifest, arguments.out))
    return 0 if manifest["written"] else 1


if __name__ == "__main__":
    sys.exit(main())
