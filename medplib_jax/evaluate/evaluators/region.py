"""Questions about a marked region (MeCoVQA-Region): scored like other questions, but only if the region really is in
the prompt.
"""

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.data.records import REGION, Record
from medplib_jax.evaluate.evaluators.vqa import VqaEvaluator


class RegionVqaEvaluator(VqaEvaluator):
    def check(self, prompt: Batch, record: Record) -> None:
        """Refuses a prompt in which a region has no points or no place in the text, so that no score is won by
        guessing. The original leaves regions out.
        """
        if self.protocol == "reference":
            return
        after_opening_L = np.pad(prompt.tokens[0, :-1] == self._loader.tokenizer.region_ids[0], (1, 0))
        placed = int((after_opening_L & (prompt.feature_index[0] >= 0)).sum())
        expected = sum(len(REGION.findall(text)) for role, text in record.turns if role == "human")
        with_points = int(prompt.region_point_valid[0].any(-1).sum())
        if not expected == with_points == placed:
            raise record.error(
                "region is not in the prompt", f"{expected} regions", f"{with_points} with points, {placed} in the text"
            )
