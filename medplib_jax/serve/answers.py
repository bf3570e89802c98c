"""Text of an answer while it is drawn: what may be shown of it, and where it stops."""

from collections.abc import Callable, Sequence

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class AnswerText:
    """The text of an answer, token by token.

    In the end it is the tokenizer's text without white space around it, cut before a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stops)
        self._held = (
            max((len(stop) for stop in stops), default=1) - 1
        )  # the beginning of a stop string may stand at the end
        self._shown = 0
        self.text, self.stopped = "", False

    def update(self, tokens: Sequence[int], ended: bool) -> str:
        """What is new and will not change any more, after the answer has grown to `tokens`."""
        text = self._decode(tokens).strip() if ended else self._decode(tokens).lstrip()
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            text, self.stopped, ended = text[: min(places)].strip(), True, True
        if not ended:
            text = text.rstrip(_HALF_CHARACTER)
            text = text[: len(text) - self._held] if self._held else text
            text = text.rstrip()
        new = text[self._shown :]
        self.text, self._shown = text, max(self._shown, len(text))
        return new
