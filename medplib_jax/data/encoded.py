"""One example's text as ids, ready to be written into a row of a batch; what `prompts` and `chatml` make."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example's text, without padding; n positions, spliced features included."""

    tokens: np.ndarray  # int32 [n]; 0 where a feature is spliced in
    targets: np.ndarray  # int32 [n]; targets[t] is the token that position t must predict
    loss_weights: np.ndarray  # float32 [n]; 1 where the target belongs to an answer (its </s> included)
    feature_index: (
        np.ndarray
    )  # int32 [n]; image i, patch p: i * image_tokens + p; region r: max_images * image_tokens + r; token t of all
    # examples' encoded masks: -2 - t; else -1
    seg_positions: tuple[int, ...]  # position that predicts the m-th <SEG> of the answers
    regions: tuple[str, ...]  # references in order of appearance
    region_images: tuple[int, ...]  # which image each region lies on: the last one named before it
    masks: tuple[str, ...]  # references in order of the <SEG>; for a question those of the answer left out
    answer: str  # the answer left out of a question; empty for a whole conversation

    def __len__(self) -> int:
        return len(self.tokens)
