"""Reports what is in a dataset and what is suspicious about it.

COMMAND
    python -m medplib_jax.datasets.audit DIR [--json report.json] [--html report.html] [--patient REGEX]
"""

import argparse
import sys

from medplib_jax.datasets.audit.collect import audit, describe
from medplib_jax.datasets.command import add_workers, parse, workers_of
from medplib_jax.datasets.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--json", help="file for the whole report")
    parser.add_argument("--html", help="file for the report as a page with pictures")
    parser.add_argument("--tokenizer", default="", help="folder of a tokenizer; lengths are then in tokens")
    parser.add_argument(
        "--patient", default="", metavar="REGEX", help="finds the patient in an image's path below images/"
    )
    add_workers(parser)
    parser.add_argument(
        "--beam_folder", default="", help="folder that all of Beam's workers see, for what they find until all is found"
    )
    arguments = parse(parser)
    if bool(arguments.beam_runner) != bool(arguments.beam_folder):
        parser.error("--beam_runner and --beam_folder: expected both or neither")
    try:
        workers = workers_of(arguments)
        report, facts = audit(arguments.folder, arguments.tokenizer, workers, arguments.patient, arguments.beam_folder)
        if arguments.json:
            write_json(arguments.json, report)
        if arguments.html:
            from medplib_jax.datasets.audit.page import write_page

            write_page(report, facts, arguments.folder, arguments.html)
    except (ValueError, RuntimeError, OSError) as error:  # DataError among them
        print(error, file=sys.stderr)
        return 1
    print(describe(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
