"""Imaging modalities: the prefix of a file name that groups figures, and how a sentence names it."""

from medplib_jax.data.records import modality

UNKNOWN = "unknown"
LABELS = {
    "ct": "CT",
    "mr": "MR",
    "x_ray": "X-ray",
    "pet": "PET",
    "ultrasound": "ultrasound",
    "endoscopy": "endoscopy",
    "dermoscopy": "dermoscopy",
    "fundus": "fundus photography",
    "oct": "OCT",
    "histopathology": "histopathology",
    "microscopy": "microscopy",
    "mammography": "mammography",
    "angiography": "angiography",
    "nuclear": "nuclear medicine",
    "photography": "photography",
    "infrared": "infrared",
    "colposcopy": "colposcopy",
}
# Words as datasets write them; the first that occurs decides, so the more special one stands before the more general
# one.
_WORDS = (
    ("optical coherence", "oct"),
    ("oct", "oct"),
    ("pet", "pet"),
    ("positron", "pet"),
    ("spect", "nuclear"),
    ("nuclear", "nuclear"),
    ("mammogra", "mammography"),
    ("angiogram", "angiography"),
    ("venogram", "angiography"),
    ("ct", "ct"),
    ("cta", "ct"),
    ("computed tomography", "ct"),
    ("tomography", "ct"),
    ("mri", "mr"),
    ("mra", "mr"),
    ("mr", "mr"),
    ("magnetic resonance", "mr"),
    ("x-ray", "x_ray"),
    ("x_ray", "x_ray"),
    ("xray", "x_ray"),
    ("x ray", "x_ray"),
    ("xr", "x_ray"),
    ("radiograph", "x_ray"),
    ("plain film", "x_ray"),
    ("ultraso", "ultrasound"),
    ("us", "ultrasound"),
    ("us-d", "ultrasound"),
    ("endoscop", "endoscopy"),
    ("colonoscop", "endoscopy"),
    ("gastroscop", "endoscopy"),
    ("dermoscop", "dermoscopy"),
    ("dermatoscop", "dermoscopy"),
    ("fundus", "fundus"),
    ("histolog", "histopathology"),
    ("histopatholog", "histopathology"),
    ("pathology", "histopathology"),
    ("microscop", "microscopy"),
    ("infrared", "infrared"),
    ("colposcop", "colposcopy"),
    ("photograph", "photography"),
)
_SHORT = 4  # words up to this length must be a word of their own


def prefix_of(text: str) -> str:
    """The prefix for a dataset's own word for a modality; "unknown" when none fits.

    Such words: "MRI", "CT(Computed Tomography)", "X-Ray".
    """
    text = text.casefold()
    words = "".join(letter if letter.isalnum() or letter in "-_" else " " for letter in text).split()
    for word, prefix in _WORDS:
        if word in words if len(word) <= _SHORT else word in text:
            return prefix
    return UNKNOWN


def of_file(name: str) -> str:
    """The prefix that an image's file name begins with; "unknown" when it begins with no modality."""
    prefix = modality(name)
    return prefix if prefix in LABELS else UNKNOWN


def with_prefix(name: str, prefix: str) -> str:
    """The file name so that it tells the modality: unchanged when it does, else with "<prefix>_00--" before it."""
    return name if of_file(name) != UNKNOWN else f"{prefix}_00--{name}"
