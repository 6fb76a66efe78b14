"""How much voting helps, and whether the share of the votes says how sure to be: `python evaluate.py votes RUN --votes 15`.

Every test pair is judged K times at temperature 1, half of them in each order (an odd one out as given, and all of a pair that cannot be turned).
The accuracy of k votes is the mean over the pairs and over draws of k of the K judgements; an undecided vote counts half. Calibration: the pairs by
the share of votes that the winner got.
"""

import random
from pathlib import Path

import numpy as np

import config
import data
import evaluate
import model as M
import stages
from results.claims import markdown

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.01)


def majority(answers: list, label: int) -> float:
    """1, 0 or 1/2 (undecided, or nothing readable): is the majority of `answers` (1, 2 or None) the label?"""
    lead = sum((answer == label) - (answer == 3 - label) for answer in answers)
    return 0.5 if lead == 0 else float(lead > 0)


def accuracy_of(votes: list, count: int, draws: int = 200) -> float:
    """Mean accuracy of `count` of the votes of each pair, [(answers, label)]."""
    rng = random.Random(0)
    return float(np.mean([majority(rng.sample(answers, count), label) for answers, label in votes for _ in range(draws)]))


def calibration(votes: list) -> list:
    """[(from, to, pairs, mean share of the winner in the votes that can be read, share of these pairs whose winner is right)] of what was decided."""
    counts = [[sum(answer == k for answer in answers) for k in (label, 3 - label)] for answers, label in votes]
    found = [(max(count) / sum(count), count[0] > count[1]) for count in counts if count[0] != count[1]]
    bins = [[pair for pair in found if low <= pair[0] < high] for low, high in zip(EDGES, EDGES[1:])]
    return [(low, min(high, 1.0), len(some), *np.mean(some, axis=0)) for low, high, some in zip(EDGES, EDGES[1:], bins) if some]


def votes(options) -> None:
    """Accuracy of 1, 3, 5 .. K votes, and calibration of the vote share, of a run's full model on its test pairs."""
    run, checkpoint = Path(options.run), Path(options.run) / "grpo"
    if not (checkpoint / "done.json").is_file() or options.votes < 1:
        raise config.UserError(f"{checkpoint} holds no finished model: python grpo.py makes one; --votes is 1 or more")
    samples, settings = data.read_samples(run / "data" / "test.jsonl"), evaluate.settings_of(run)
    style = stages.style("think", settings, run, "grpo")
    model, processor, made = *M.load(str(checkpoint)), []
    for turns, count in ((True, -(-options.votes // 2)), (False, options.votes)):  # an official row of understanding is judged as given only
        some = [sample for sample in samples if sample.can_swap == turns]
        results = evaluate.judge_pairs(model, processor, some, votes=count, style=style, own=settings.evaluate, label="voting")
        made += [([row["answer"] for row in result["judgements"]][: options.votes], sample.label) for sample, result in zip(some, results)]
    said = [answer for answers, _ in made for answer in answers]
    print(f"{said.count(None)} of {len(said)} judgements cannot be read\n")
    print(markdown(["votes", "accuracy %"], [[k, f"{100 * accuracy_of(made, k):.1f}"] for k in (1, 3, 5, 9, 15) if k <= options.votes]))
    print(markdown(["share of the winner's votes", "pairs", "mean share %", "winner right %"],
                   [[f"{low:.0%} to {high:.0%}", pairs, f"{100 * share:.1f}", f"{100 * right:.1f}"] for low, high, pairs, share, right in calibration(made)]))
