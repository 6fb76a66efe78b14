"""Stage 1a, distillation: a teacher writes the reasoning, and only what agrees with the human label is kept.

Paper, section 4.1: about 10K image generation pairs go to GPT-4o; the 5.5K answers whose verdict equals the label become the cold start
data. Image generation alone: the format is meant to carry over to the other tasks by itself (claim C4).

Departure: (1) the teacher of the small world is a script that knows every scene, writes its reasoning from the known facts, and errs at
a set rate, so that the filter has work to do. A teacher is any function (sample, rng) -> reply text.

    python distill.py --config small
"""

import random
from pathlib import Path

import config
import data


def scripted_teacher(sample: data.Sample, rng: random.Random, error_rate: float) -> str:
    """Reasoning from the known facts. With probability `error_rate` one fact is misjudged; its score, the sums and the verdict follow
    from the wrong fact, as they do when a real teacher looks carelessly."""
    import shapes

    reasons = {dimension: list(pair) for dimension, pair in sample.reasons.items()}
    if rng.random() < error_rate:
        dimension, k = rng.choice(list(reasons)), rng.randrange(2)
        reasons[dimension][k] = shapes.mistake(rng, dimension, reasons[dimension][k])
    scores = {dimension: [shapes.score_of(dimension, fact) for fact in pair] for dimension, pair in reasons.items()}
    totals = [sum(pair[k] for pair in scores.values()) for k in (0, 1)]
    winner = 1 if totals[0] > totals[1] else 2 if totals[0] < totals[1] else rng.choice([1, 2])
    return data.write_reasoning(sample.task, reasons, scores, data.verdict_string(sample.task, winner))


def why_dropped(reply: str, sample: data.Sample) -> str | None:
    """The consistency filter: None keeps the reply."""
    verdict = data.parse_verdict(reply, sample.task)
    if not verdict.format_ok:
        return "malformed"
    if verdict.answer is None:
        return "no readable verdict"
    if verdict.answer != sample.label:
        return f"says {verdict.answer}, the label is {sample.label}"
    return None


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    samples = data.read_samples(folder.parent / "data" / "distill.jsonl")
    rng = random.Random(f"{settings.run.seed}/teacher")
    kept, dropped = [], []
    for sample in config.progress(samples, "teacher"):
        reply = scripted_teacher(sample, rng, settings.distill.error_rate)
        reason = why_dropped(reply, sample)
        row = data.sft_row(sample, "think", reply)
        kept.append(row) if reason is None else dropped.append(row | {"dropped": reason})
    data.write_jsonl(folder / "kept.jsonl", kept)
    data.write_jsonl(folder / "dropped.jsonl", dropped)
    return f"the teacher judged {len(samples)} image generation pairs, {len(kept)} agree with the label and are kept, {len(dropped)} dropped"


if __name__ == "__main__":
    config.main("distill")
