"""How answers are generated: what a caller of `Generator` chooses, besides the model and its tokens."""

import dataclasses

from medplib_jax.config.base import require
from medplib_jax.decode.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Options of decoding, the same for all answers of a generator.

    max_new_tokens: the longest answer, in tokens.
    max_masks: the masks drawn per answer; a `<SEG>` beyond it stays in the text without a mask.
    sampling: how a token is drawn from its logits.
    original_masks: one mask is drawn as the original does (model/MedPLIB.py evaluate): from the first `<SEG>` of prompt
        and answer, and where there is none from the second last state.
    quantize: what has 8 bits, one of `layout.QUANTIZE`.
    """

    max_new_tokens: int
    max_masks: int
    sampling: Sampling = GREEDY
    original_masks: bool = False
    quantize: str = ""

    def __post_init__(self):
        require(self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}, an answer has at least one token")
        require(self.max_masks >= 0, f"max_masks is {self.max_masks}, expected 0 or more")
        require(
            not self.original_masks or self.max_masks == 1,
            f"the original draws one mask per answer, not {self.max_masks}",
        )
