"""Generates a dataset in the form of MeCoVQA out of drawings.

COMMAND
    python -m medplib_jax.datasets.phantom --out data/phantom --examples 2000 --test-examples 200 --seed 0
"""

import argparse
import json

from medplib_jax.datasets.phantom.generate import generate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--examples", type=int, default=2000, help="training images")
    parser.add_argument("--test-examples", type=int, default=200, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    manifest = generate(arguments.out, arguments.examples, arguments.test_examples, arguments.seed)
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
