"""How a scan's values become grey: by the file's own window, a named one, percentiles, or three windows as R, G, B.

The file's window is applied as DICOM PS3.3 C.11.2 says. A window is fixed for a whole scan: a value has the same
grey on every slice.
"""

import dataclasses

import numpy as np

NAMED = {  # (centre, width) in HU
    "soft_tissue": (40.0, 400.0),
    "lung": (-160.0, 1500.0),
    "brain": (40.0, 80.0),
    "bone": (400.0, 1800.0),
    "liver": (30.0, 150.0),
    "mediastinum": (50.0, 350.0),
    "stroke": (40.0, 40.0),
    "angio": (300.0, 600.0),
}
PERCENTILE = "percentile"
PERCENTILES = (0.5, 99.5)  # of a scan's values: black and white where no window is known
WINDOW_HELP = f"centre,width in the scan's units; {', '.join(NAMED)} (CT); {PERCENTILE}; three of them as R/G/B"


@dataclasses.dataclass(frozen=True)
class Tone:
    """Values to grey.

    Up to `low` is black, from `high` on white, between them a line; or what `sigmoid` or `table` say.

    sigmoid: PS3.3 C.11.2.1.3.1, with low and high = centre -+ width / 2. table: grey of the values low, low + 1, ... (a
    VOI LUT), 0 to 1.
    """

    low: float
    high: float
    sigmoid: bool = False
    table: tuple[float, ...] = ()

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """uint8 of the values' shape; what is not a number is black."""
        values = np.nan_to_num(values.astype(np.float32), nan=self.low, posinf=self.high, neginf=self.low)
        if self.table:
            index = np.clip(np.round(values - self.low), 0, len(self.table) - 1).astype(np.int64)
            grey = np.asarray(self.table, np.float32)[index]
        else:
            grey = (values - self.low) / max(self.high - self.low, 1e-6)
            if self.sigmoid:
                grey = 1 / (1 + np.exp(np.clip(-4 * (grey - 0.5), -80, 80)))
        return np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8)


Windows = tuple[tuple[float, float] | str, ...]  # one or three; (centre, width) or `PERCENTILE`


def parse_window(text: str) -> Windows:
    """The windows that a command line names; see `WINDOW_HELP`. ValueError for anything else."""
    windows = tuple(map(_parse_one, text.split("/")))
    if len(windows) not in (1, 3):
        raise ValueError(f"--window: expected one window or three as R/G/B, found {len(windows)}: {text!r}")
    return windows


def _parse_one(text: str) -> tuple[float, float] | str:
    if text == PERCENTILE:
        return text
    if text in NAMED:
        return NAMED[text]
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--window: expected {WINDOW_HELP}; found {text!r}") from None
    if not (width > 0 and np.isfinite([centre, width]).all()):
        raise ValueError(f"--window: expected a width above 0, found {text!r}")
    return centre, width


def centred(centre: float, width: float) -> Tone:
    return Tone(centre - width / 2, centre + width / 2)
