"""Whose image a file is.

All images of a patient go into one split; so names are read in favour of too few patients, never too many.
"""

import hashlib
import re

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.mecovqa import parse_image_name, stem, without_sequence

_BIDS = re.compile(r"sub-[A-Za-z0-9]+")


def patient_of(image: str, pattern: str = "", source: str = "") -> str:
    """The patient of an image or scan, from its path relative to images/.

    pattern: a regular expression that is searched in the path; its first group, or the whole match, is the patient.
    Without one it is BIDS's sub-NAME, what a name in SA-Med2D-20M's form says, the first folder, or the name without
    the sequence at its end. DataError (file: `source`) when the pattern does not match.
    """
    if pattern:
        match = re.search(pattern, image)
        if not match or not (patient := match[1] if match.re.groups else match[0]):
            raise DataError(source or image, None, "name does not tell the patient", f"a match of {pattern!r}", image)
        return patient
    if match := _BIDS.search(image):
        return match[0]
    folder = image.split("/")[0] if "/" in image else ""
    return parse_image_name(image).patient or folder or without_sequence(stem(image))


def anonymous(patient: str) -> str:
    """A name for the patient that does not tell who it is: 12 hex digits; empty for none.

    A hash: who knows an identifier can tell whether it is this one.
    """
    return hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""


def split_of(patient: str, test_share: float) -> str:
    """ "test" or "train", the same for all images of a patient, whatever others there are."""
    fraction = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    return "test" if fraction < test_share else "train"


def check_pattern(pattern: str) -> None:
    """ValueError when the option is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--patient: expected a regular expression, found {pattern!r} ({error})") from error
