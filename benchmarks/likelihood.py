"""Time of 200 ARC-Easy rows by likelihood on SmolLM2: ours against lm-evaluation-harness.

    python benchmarks/likelihood.py     # benchmarks/results/likelihood.json; some minutes

Both score the same prompts and options with one model in one process, in turns; the figure is the
ratio of the medians. Needs the extra `harness` and the folder SHARED_DATA.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from svd import RESULTS, ROOT, machine, write

DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
ROWS, REPEATS, BATCH = 200, 3, 16


def main() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from milora.choices import PROMPT, encode_question, log_probabilities, read_questions
    from milora.pretrained import BUNDLED, load_pretrained

    questions = read_questions(str(DATA / "commonsense" / "ARC-Easy_test.json"))[:ROWS]
    loaded = load_pretrained(BUNDLED, "float32")
    encoded = [encode_question(loaded.tokenizer, question) for question in questions]
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=BATCH)
    requests = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(PROMPT.replace("{question}", question.question), f" {option}"),
            idx=place,
        )
        for question in questions
        for place, option in enumerate(question.options)
    ]
    seconds: dict[str, list[float]] = {"milora": [], "lm-eval": []}
    ours: list[list[float]] = []
    theirs: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        ours = log_probabilities(loaded.model, encoded, BATCH)
        seconds["milora"].append(round(time.perf_counter() - began, 2))
        began = time.perf_counter()
        theirs = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        seconds["lm-eval"].append(round(time.perf_counter() - began, 2))
        print(json.dumps(seconds), flush=True)
    same, right, place = 0, 0, 0
    worst = 0.0
    for question, log_p in zip(questions, ours, strict=True):
        other = theirs[place : place + len(log_p)]
        place += len(log_p)
        same += log_p.index(max(log_p)) == other.index(max(other))
        right += log_p.index(max(log_p)) == question.right
        worst = max(worst, *(abs(a - b) for a, b in zip(log_p, other, strict=True)))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    write(
        RESULTS / "likelihood.json",
        {
            "rows": ROWS, "batch": BATCH, "seconds": seconds,
            "ratio": round(median["milora"] / median["lm-eval"], 3), "same_choice": same,
            "largest_difference_nats": worst, "accuracy": right / ROWS, "device": machine("cpu"),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
