"""Talk to base and tuned side by side: every question goes to both."""

from collections.abc import Iterable, Iterator

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from milora.adapter import base_only
from milora.data import Message, prompt_ids
from milora.evaluate import generate


def replies(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
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
            if state == "base":
                with base_only(model):
                    (answer,) = generate(model, tokenizer, prompt, max_new_tokens)  # type: ignore[arg-type]
            else:
                (answer,) = generate(model, tokenizer, prompt, max_new_tokens)  # type: ignore[arg-type]
            messages.append({"role": "assistant", "content": answer.text})
            said[state] = answer.text
        yield said["base"], said["tuned"]
