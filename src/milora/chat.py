"""Talk to base and tuned side by side: every question goes to both."""

from collections.abc import Iterable, Iterator

from milora.data import Message, prompt_ids
from milora.evaluate import Pair, generate
from milora.vision import Reader


def replies(
    pair: Pair,
    tokenizer: Reader,
    questions: Iterable[str],
    max_new_tokens: int = 256,
) -> Iterator[tuple[str, str]]:
    """(base, tuned) for each question. Each keeps its own conversation; greedy decoding."""
    heard: dict[str, list[Message]] = {"base": [], "tuned": []}
    for question in questions:
        said = {}
        for state, messages in heard.items():
            messages.append({"role": "user", "content": question})
            prompt = [prompt_ids(tokenizer, messages)]
            with (pair.base if state == "base" else pair.tuned)() as model:
                (answer,) = generate(model, tokenizer, prompt, max_new_tokens)
            messages.append({"role": "assistant", "content": answer.text})
            said[state] = answer.text
        yield said["base"], said["tuned"]
