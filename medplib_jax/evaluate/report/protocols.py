"""What the two protocols do, for the pages.

The arithmetic itself is `metrics.protocol`, asking and drawing `evaluate`.
"""

from collections.abc import Sequence

from medplib_jax.evaluate.report.sweep_load import ScoredCell

SUMMARY = {
    "exact": "asks as the model was trained, draws every mask of the answer and nothing without <SEG>, "
    "scores as the literature defines",
    "reference": "reproduces the originals' evaluation with its quirks, so that published figures can be compared",
}
# (subject, exact, reference)
DIFFERENCES = (
    (
        "prompt",
        "the whole question, in the template of training",
        "the template v1; the conversation is cut behind its last colon, which lies in the answer if that holds one",
    ),
    ("region", "the marked region's features are passed to the model", "only the words around it are"),
    ("mask threshold", "as configured, 0.5 by default", "0.1 on the sigmoid"),
    ("which mask", "the k-th <SEG> draws the k-th mask", "the first <SEG> only"),
    ("answer without <SEG>", "draws nothing", "a mask is drawn all the same"),
    ("un-padding", "as the model was trained", "the 256-scale window is subtracted on the 64-scale grid"),
    (
        "Dice",
        "an empty union counts 1; questions without a target stay out of mDice and mIoU",
        "2 IoU / (1 + IoU); an empty union counts 0 and stays in",
    ),
    ("surplus masks", "a mask beyond the true ones is a pair of IoU 0", "ignored"),
    ("gIoU", "mean IoU", "1e-5 is added to every union"),
    ("exact match", "1 when the normalised answers are equal", "distinct true words found over predicted words"),
    ("F1", "overlap of multisets (SQuAD)", "a shared word counts as often as it was predicted"),
    ("candidates", "an answer without a word of any candidate has no nearest one", "it takes the first"),
    ("BLEU-1 to BLEU-3", "cumulative", "the n-gram order alone, times the brevity penalty"),
    ("mean over modalities (Med-GRIT)", "over those that occur", "over eight: an absent one counts 0"),
)


def settings(cells: Sequence[ScoredCell]) -> str:
    """One line for a table: what its cells of one protocol were made with."""
    thresholds, lengths = (
        {getattr(cell.entry, name) for cell in cells} - {None} for name in ("mask_threshold", "max_new_tokens")
    )
    found = []
    if thresholds and any("gIoU" in cell.statistics for cell in cells):
        found.append(f"masks where the sigmoid exceeds {' or '.join(f'{value:g}' for value in sorted(thresholds))}")
    if lengths:
        found.append(f"greedy decoding of at most {' or '.join(map(str, sorted(lengths)))} tokens")
    return "; ".join(found) or "settings not recorded"
