"""Questions about a marked region (MeCoVQA-Region): scored like other questions, but only if the region really is in the batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from medplib_jax.data.sources import REGION
from medplib_jax.decode import Generation
from medplib_jax.evaluators.common import Row
from medplib_jax.evaluators.vqa import VqaEvaluator
from medplib_jax.types import Batch


class RegionVqaEvaluator(VqaEvaluator):
    """Refuses a batch in which a question's region has no points or no place in the text, so that no score is won by guessing."""

    def _rows(self, batch: Batch, generation: Generation) -> Iterator[Row]:
        after_opening_BxL = np.pad(batch.tokens[:, :-1] == self._tokenizer.region_ids[0], ((0, 0), (1, 0)))
        placed_B = (after_opening_BxL & (batch.feature_index >= 0)).sum(-1)
        for i in np.flatnonzero(batch.record >= 0):
            record = self._loader.record(int(batch.record[i]))
            expected = sum(len(REGION.findall(text)) for role, text in record.turns if role == "human")
            with_points = int(batch.region_point_valid[i].any(-1).sum())
            if not expected == with_points == placed_B[i]:
                found = f"{with_points} with points, {placed_B[i]} in the text"
                raise record.error("region is not in the batch", f"{expected} regions", found)
        return super()._rows(batch, generation)

    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        """Beside the scores of other questions, `accuracy`: the share of right answers, closed ones and (exactly matched) open ones."""
        right = [row["scores"].get("closed_accuracy", row["scores"].get("open_exact_match")) for row in rows]
        return {"accuracy": float(np.mean(right))} | super().summarise(rows)
