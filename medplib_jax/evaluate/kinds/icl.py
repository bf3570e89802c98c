"""Masks of what examples show (MedPLIB-ICL): scored as for grounding, after as many examples as the task's `shots`."""

from medplib_jax.evaluate.kinds.base import Contents
from medplib_jax.evaluate.kinds.grounding import Grounding


class InContext(Grounding):
    """Every record asks for one target; what is sought stands in its examples alone."""

    name = "icl"

    def claim(self, contents: Contents) -> int:
        return 0  # a task says so itself


KINDS = (InContext(),)
