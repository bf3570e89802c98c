"""Reports what is in a dataset and what is suspicious about it.

COMMAND
    python -m medplib_jax.datasets.audit DIR [--json report.json] [--html report.html] [--patient REGEX]
"""

import argparse
import os
import sys

from medplib_jax.datasets.audit.collect import audit, describe
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
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: this one only")
    arguments = parser.parse_args()
    try:
        report, facts = audit(arguments.folder, arguments.tokenizer, arguments.workers, arguments.patient)
        if arguments.json:
            write_json(arguments.json, report)
        if arguments.html:
            from medplib_jax.datasets.audit.page import write_page

            write_page(report, facts, arguments.folder, arguments.html)
    except (ValueError, OSError) as error:  # DataError among them
        print(error, file=sys.stderr)
        return 1
    print(describe(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
