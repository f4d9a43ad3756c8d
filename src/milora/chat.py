"""Talk to base and tuned side by side: every question goes to both."""

from collections.abc import Iterable, Iterator

from milora.errors import UserError
from milora.forms import answers_apart, prompt_for
from milora.generation import generate
from milora.logits import Pair
from milora.pretrained import positions, task_of
from milora.rows import Message
from milora.vision import Reader


def replies(
    pair: Pair,
    tokenizer: Reader,
    questions: Iterable[str],
    max_new_tokens: int = 256,
) -> Iterator[tuple[str, str]]:
    """(base, tuned) for each question. Each keeps its own conversation; greedy decoding."""
    if task_of(pair.model) == "SEQ_CLS":
        raise UserError(
            "this model names classes and cannot talk: use milora eval RUN --tasks FILE"
        )
    longest = positions(pair.model)
    heard: dict[str, list[Message]] = {"base": [], "tuned": []}
    for question in questions:
        said = {}
        for state, messages in heard.items():
            messages.append({"role": "user", "content": question})
            apart = answers_apart(pair.model)
            prompt = [prompt_for(tokenizer, messages, apart)]
            room = longest - (0 if apart else len(prompt[0]))
            if room < 1 or len(prompt[0]) > longest:
                raise UserError(
                    f"the conversation has {len(prompt[0])} tokens, and the model {longest} "
                    "positions for it and its answer: start anew, or ask for less"
                )
            with (pair.base if state == "base" else pair.tuned)() as model:
                (answer,) = generate(model, tokenizer, prompt, min(max_new_tokens, room))
            messages.append({"role": "assistant", "content": answer.text})
            said[state] = answer.text
        yield said["base"], said["tuned"]
