"""How the original asks when it evaluates (model/eval/vqa_infer.py): the prompt is what stands before the last colon,
without regions.
"""

import dataclasses

import numpy as np

from medplib_jax.data import prompts
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record

TEMPLATE, TEMPLATE_WITH_BOXES = "v1", "qwen_raw"  # MedPLIB's, BiRD's
MASK_THRESHOLD = 0.1
UNPAD = "reference"


class ReferenceLoader(Loader):
    """Reads questions as the original does: the whole conversation is encoded and cut behind its last ":", which lies
    inside the answer when that holds one; what the text says of a region stays, but the position of its features is
    left out.
    """

    def encode(self, record: Record, question: bool = False) -> prompts.Encoded:
        if not question:
            return super().encode(record)
        asked, whole = super().encode(record, question=True), super().encode(record)
        colon_id = self.tokenizer.encode("ASSISTANT:")[-1]
        end = np.flatnonzero(whole.tokens == colon_id)[-1] + 1
        image_features = self._data.max_images * self._model.image_tokens
        kept = np.flatnonzero(whole.feature_index[:end] < image_features)
        arrays = {name: getattr(whole, name)[kept] for name in ("tokens", "targets", "loss_weights", "feature_index")}
        return dataclasses.replace(asked, regions=(), region_images=(), **arrays)
