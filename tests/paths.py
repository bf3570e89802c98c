"""Where the tests find the checkout and the recorded arrays, from whichever folder they lie in."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
