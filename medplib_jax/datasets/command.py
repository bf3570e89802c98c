"""What the builders' command lines have in common."""

import json
import sys
from collections.abc import Callable
from typing import Any


def finish(make: Callable[[], dict[str, Any]]) -> int:
    """Prints the manifest that `make` returns, or in one line what is wrong with its input; the exit status."""
    try:
        manifest = make()
    except (ValueError, RuntimeError) as error:  # DataError among them
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(manifest, indent=1))
    return 0
