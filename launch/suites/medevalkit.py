"""A checkpoint as a model of MedEvalKit (https://github.com/alibaba-damo-academy/MedEvalKit).

Two lines at the end of MedEvalKit's LLMs.py, with this repository on PYTHONPATH:

    from launch.suites.medevalkit import MedplibModel
    LLMRegistry.register("medplib_jax")(MedplibModel)

and its command with --model_name medplib_jax --model_path runs/7b/stage4. Its data sets ask one question about one
picture; another number of pictures is an error, because the model has seen none in training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from medplib_jax.data.errors import DataError
from medplib_jax.decode.many import answer_questions
from medplib_jax.decode.predictor import Predictor, Question, read_question
from medplib_jax.decode.sampling import Sampling
from medplib_jax.parallel.compilation import use_cache


class MedplibModel:
    """What MedEvalKit asks of a model: `process_messages`, `generate_output`, `generate_outputs`.

    `args` are its command line's temperature, top_p, max_new_tokens and repetition_penalty. ValueError for a penalty,
    which this package does not know, and for what the checkpoint cannot do.
    """

    def __init__(self, model_path: str, args: Any):
        if (penalty := getattr(args, "repetition_penalty", 1) or 1) != 1:
            raise ValueError(f"repetition_penalty {penalty}: expected 1")
        use_cache()
        sampling = Sampling(getattr(args, "temperature", 0) or 0.0, getattr(args, "top_p", 1) or 1.0)
        self._seed = getattr(args, "seed", 0) or 0
        self._predictor = Predictor(model_path, sampling=sampling, max_new_tokens=getattr(args, "max_new_tokens", None))

    def process_messages(self, messages: Mapping[str, Any]) -> Question:
        """{"prompt", "image"} (or one in "images"; a PIL image or a path), and "system" if any, as a question."""
        pictures = [messages["image"]] if messages.get("image") is not None else list(messages.get("images") or ())
        if len(pictures) != 1 or "prompt" not in messages:
            raise ValueError(
                f"expected a prompt and one picture, found {sorted(messages)} with {len(pictures)} pictures"
            )
        words = [messages["system"]] if messages.get("system") else []
        return read_question(pictures[0], "\n".join([*words, messages["prompt"]]))

    def generate_output(self, messages: Mapping[str, Any]) -> str:
        return self.generate_outputs([messages])[0]

    def generate_outputs(self, messages_list: Sequence[Mapping[str, Any]]) -> list[str]:
        """The answers in order, by continuous batching."""
        asked = {number: self.process_messages(messages) for number, messages in enumerate(messages_list)}
        answers: dict[int, str] = {}
        for number, found in answer_questions(self._predictor, asked, self._seed):
            if isinstance(found, DataError):
                raise found
            answers[number] = found.answer
        return [answers[number] for number in range(len(messages_list))]
