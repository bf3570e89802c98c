"""The two protocols of evaluation, and where their arithmetic differs.

`exact` is the definition of the literature; `reference` is the arithmetic of the original program (MedPLIB model/eval),
kept so that published figures can be compared. Where they differ:

    exact match
        exact: 1 when the normalised answers are equal
        reference: distinct truth words found / predicted words (a precision)
    F1
        exact: overlap of multisets (SQuAD)
        reference: a shared word counts as often as it was predicted
    ideographs
        exact: each is a word, full-width punctuation does not count
        reference: what stands between two spaces is one word
    candidates
        exact: a prediction without a word of any candidate hits none
        reference: it hits the first
    empty answers
        exact: an answer of articles only ("A" of a multiple choice) is compared as it stands
        reference: its scores are 0
    BLEU-1..3
        exact: cumulative, as the literature
        reference: the precision of that n-gram order alone, times the brevity penalty
    IoU, Dice
        exact: an empty union is 1, and questions without a target stay out of mIoU and mDice
        reference: it is 0 and stays in
    boxes in text
        exact: (x1,y1),(x2,y2), bare ones with spaces, too; each serves one true box
        reference: any four numbers between the tags, bare ones without spaces; each serves every true box it meets
    words of captions
        exact: brackets are punctuation
        reference: they are words ("-lrb-"), as pycocoevalcap leaves them
    surplus masks
        exact: a drawn mask beyond the true ones counts as a pair with IoU 0
        reference: it is ignored
    gIoU
        reference adds 1e-5 to every union
Unlike the original's, the normalisation strips every full stop, not only the first 32.
"""

PROTOCOLS = ("exact", "reference")


def check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is not one of {PROTOCOLS}")
