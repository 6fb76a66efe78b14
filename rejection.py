"""Stage 2a, rejection sampling: the cold-started model judges the whole unified pool.

Paper, section 4.2: what it judges correctly becomes SFT data on all tasks (its own reasoning, written back to it); what it judges
wrongly, or without keeping the format, is left for GRPO, where there is still something to learn. One sample per pair at temperature 1.

    python rejection.py --config small

Writes correct.jsonl (SFT schema: correct and well-formed), wrong.jsonl (GRPO schema: wrong or malformed) and yield.json. `select`, for controls,
puts others into the former: only those whose sums lead to the verdict (the rest goes to the latter), or as many drawn by chance.
"""

import json
import random
from pathlib import Path

import config
import data
import distill
import model as M
import stages


def seeds(samples: list, settings: config.Settings) -> list:
    """What decides the judgement of each sample, in whatever batch or process it is sampled."""
    rng = random.Random(f"{settings.run.seed}/rejection")
    return [rng.getrandbits(32) for _ in samples]


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    own, out = settings.rejection, folder.parent
    samples = data.read_samples(out / "data" / "pool.jsonl")
    if own.endpoint:  # a large pool on a server: distill.ask says how to serve the checkpoint
        texts = [reply["text"] for reply in distill.ask(samples, own, own.endpoint, "cold_start", folder / "replies.jsonl", "think", own.temperature,
                                                        stages.made_by("cold_start", out), label="judging the pool", style="short")]
    else:
        model, processor = M.load(stages.checkpoint("cold_start", settings, out))
        prompts = [data.build_prompt(sample, "think") for sample in samples]
        texts = distill.generate_texts(model, processor, prompts, own, data.THINK, 1, own.temperature, seeds(samples, settings),
                                       "judging the pool", folder / "texts.jsonl")
    good = [distill.why_dropped(text, sample, own.select == "consistent") is None for sample, text in zip(samples, texts)]
    learnt = random.Random(f"{settings.run.seed}/random").sample(good, len(good)) if own.select == "random" else good  # shuffled
    correct, wrong, counts = [], [], {task: {"pairs": 0, "correct": 0, "malformed": 0} for task in data.TASKS}
    for sample, text, is_good, is_learnt in zip(samples, texts, good, learnt):
        verdict = data.parse_verdict(text, sample.task)
        counts[sample.task]["pairs"] += 1
        counts[sample.task]["correct"] += distill.why_dropped(text, sample) is None
        counts[sample.task]["malformed"] += not (verdict.format_ok and verdict.answer is not None)
        if is_learnt:
            correct.append(data.sft_row(sample, text))
        if not is_good:
            wrong.append(data.sample_row(sample) | {"judged": text})
    data.write_jsonl(folder / "correct.jsonl", correct)
    data.write_jsonl(folder / "wrong.jsonl", wrong)
    config.write_text(folder / "yield.json", json.dumps(counts, indent=1))
    for task, count in counts.items():
        print(f"   {task:<22} {count['correct']:>5} of {count['pairs']} correct ({count['correct'] / max(1, count['pairs']):.1%}), "
              f"{count['malformed']} malformed")
    chosen, left = {"correct": ("correct", "wrong or malformed"), "consistent": ("correct and consistent", "others"),
                    "random": ("drawn by chance", "wrong or malformed")}[own.select]
    return f"{len(correct)} {chosen} -> SFT, {len(wrong)} {left} -> GRPO"


if __name__ == "__main__":
    stages.main("rejection")
