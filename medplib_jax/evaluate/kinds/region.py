"""Questions about a marked region (MeCoVQA-Region): scored like other questions, but only if the region really is in
the prompt.
"""

from typing import TYPE_CHECKING

import numpy as np

from medplib_jax.data.records import REGION, Record
from medplib_jax.evaluate.kinds.base import Contents
from medplib_jax.evaluate.kinds.vqa import Vqa

if TYPE_CHECKING:
    from medplib_jax.batch import Batch
    from medplib_jax.data.pipeline import Loader


class RegionVqa(Vqa):
    """A question in words whose prompt has to hold the features of its regions."""

    name = "region"

    def claim(self, contents: Contents) -> int:
        return 2 if contents.regions else 0

    def check(self, prompt: "Batch", record: Record, loader: "Loader", protocol: str) -> None:
        """Refuses a prompt in which a region has no points or no place in the text, so that no score is won by
        guessing. The original leaves regions out.
        """
        if protocol == "reference":
            return
        after_opening_L = np.pad(prompt.tokens[0, :-1] == loader.tokenizer.region_ids[0], (1, 0))
        placed = int((after_opening_L & (prompt.feature_index[0] >= 0)).sum())
        expected = sum(len(REGION.findall(text)) for role, text in record.turns if role == "human")
        with_points = int(prompt.region_point_valid[0].any(-1).sum())
        if not expected == with_points == placed:
            raise record.error(
                "region is not in the prompt", f"{expected} regions", f"{with_points} with points, {placed} in the text"
            )


KINDS = (RegionVqa(),)
