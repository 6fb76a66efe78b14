"""Evaluation: what each stage can do, with intervals, and whether its reasoning is right.

Every pair of the test split is judged greedily in both presentation orders (media, answers and label swap together), the other splits in
one. The verdict is read from inside <answer> only; an unreadable output is wrong, never a tie. Accuracy is the mean over both orders;
its 95% interval resamples pairs.

Beside accuracy, for the thinking rows: is the format kept, do the sums add up, does the verdict follow from them, are the scores and the
facts behind them right, do both orders agree. On the split with ties: diff = accuracy over the pairs that are no tie, tau = plain
three-way accuracy, tau_calibrated = three-way accuracy when totals closer than the best threshold count as a tie (arXiv 2305.14324).

    python evaluate.py --config small
"""

import json
from pathlib import Path

import numpy as np

import config
import data
import distill
import model as M

SPLITS = ("test", "heldout", "ties")

# ---------------------------------------------------------------------------------------------------------------- metrics


def interval(values: np.ndarray, seed: int = 0, draws: int = 1000) -> tuple:
    """95% percentile bootstrap interval of the mean of `values` [pairs]."""
    means = np.random.default_rng(seed).choice(values, size=(draws, len(values))).mean(1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def summarise(rows: list) -> dict:
    """Metrics of the judgements of one task (or of all) on one split; where both orders of a pair were judged they count as one pair."""
    right = [row["answer"] == row["label"] for row in rows]
    pairs = {}
    for row, ok in zip(rows, right):
        pairs.setdefault(row["id"], []).append((ok, row))
    by_pair = np.array([np.mean([ok for ok, _ in both]) for both in pairs.values()])
    low, high = interval(by_pair)
    share = lambda values: round(float(np.mean(list(values))), 4)
    flip = {1: 2, 2: 1}
    made = {"accuracy": share(by_pair), "low": round(low, 4), "high": round(high, 4), "pairs": len(pairs), "unreadable": share(row["answer"] is None for row in rows),
            "first_chosen": share(row["answer"] == 1 for row in rows)}
    if any(row["swapped"] for row in rows):
        answers = [[row["answer"] for _, row in both] for both in pairs.values()]
        made["orders_agree"] = share(one is not None and flip.get(one, one) == other for one, other in answers)
    if rows[0]["mode"] == "think":
        made |= {name: share(row[name] for row in rows) for name in ("format_ok", "sums_ok", "consistent")}
        if all(row["scores_right"] is not None for row in rows):  # the truth is known in the small world only
            made |= {name: share(row[name] for row in rows) for name in ("scores_right", "facts_right")}
            made["right_verdict_wrong_reasoning"] = share(ok and row["scores_right"] < 1 for row, ok in zip(rows, right))
            made["wrong_verdict_right_reasoning"] = share(not ok and row["scores_right"] == 1 for row, ok in zip(rows, right))
    return made


def tie_metrics(rows: list) -> dict:
    """diff, tau and tau_calibrated of judgements on a split with ties. `margin`, the stated totals' difference, is None in direct mode."""
    label, answer = [r["label"] for r in rows], [r["answer"] for r in rows]
    made = {"diff": np.mean([a == b for a, b in zip(label, answer) if a != 0]), "tau": np.mean([a == b for a, b in zip(label, answer)])}
    if any(row["margin"] is not None for row in rows):
        best = 0.0
        for threshold in sorted({abs(row["margin"]) for row in rows if row["margin"] is not None} | {-1.0}):
            guess = [None if row["margin"] is None else 0 if abs(row["margin"]) <= threshold else 1 if row["margin"] > 0 else 2 for row in rows]
            best = max(best, np.mean([a == b for a, b in zip(label, guess)]))
        made["tau_calibrated"] = best
    return {name: round(float(value), 4) for name, value in made.items()}


# ---------------------------------------------------------------------------------------------------------------- judging


def judge(model, processor, samples: list, mode: str, own: config.Evaluate, allow_tie: bool = False, label: str = "") -> list:
    """Judges `samples` greedily, each in the order given; one row per sample. Without a processor `model` is the server: arguments of distill.ask."""
    if processor is None:
        texts = [reply["text"] for reply in distill.ask(samples, own, **model, mode=mode, allow_tie=allow_tie, label=label)]
    else:
        prefix = data.THINK if mode == "think" else ""
        prompts = [M.encode(processor, model, data.build_prompt(s, mode, allow_tie=allow_tie), prefix) for s in samples]
        made = M.generate(model, processor, prompts, max_new_tokens=own.max_new_tokens, temperature=0.0, batch_rows=own.batch_rows, label=label)
        texts = [prefix + processor.text(ids[:length]) for ids, length in zip(made.ids, made.lengths)]
    rows = []
    for sample, text in zip(samples, texts):
        verdict = data.parse_verdict(text, sample.task)
        cells = [(d, k) for d in sample.scores for k in (1, 2)]
        got = lambda found, truth: np.mean([found.get(d, {}).get(k) == truth[d][k - 1] for d, k in cells]) if cells else None
        rows.append({"id": sample.id, "task": sample.task, "mode": mode, "label": sample.label, "answer": verdict.answer, "text": text,
                     "format_ok": verdict.format_ok, "sums_ok": verdict.sums_ok, "consistent": verdict.consistent,
                     "margin": verdict.totals[1] - verdict.totals[2] if len(verdict.totals) == 2 else None,
                     "scores_right": got(verdict.scores, sample.scores), "facts_right": got(verdict.reasons, sample.reasons), "scores": verdict.scores, "truth": sample.scores})
    return rows


def read_split(split: str, settings: config.Settings, out: Path) -> list:
    file, limit = out / "data" / f"{split}.jsonl", settings.evaluate.test_pairs
    samples = data.read_samples(file) if file.is_file() else []  # a test of one's own has no other splits beside it
    return [s for task in data.TASKS for s in [s for s in samples if s.task == task][: limit or None]]


def judge_checkpoint(stage: str, mode: str, settings: config.Settings, out: Path) -> dict:
    """Judges every split with one checkpoint; keeps the judgements in evaluate/STAGE-MODE.jsonl and reuses them while they are valid."""
    folder = out / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    kept, mark = folder / f"{stage}-{mode}.jsonl", folder / f"{stage}-{mode}.json"
    state = [config.made_by(s, out) for s in (stage, "data")] + [config.shaping(settings.evaluate)]
    if not mark.is_file() or json.loads(mark.read_text())["state"] != state:
        model, processor = {"url": settings.evaluate.endpoint, "model": stage, "file": folder / "replies.jsonl", "checkpoint": state[0]}, None
        if not settings.evaluate.endpoint or stage not in settings.evaluate.served.split(","):
            model, processor = M.load(config.checkpoint(stage, settings, out))
        rows = []
        for split in SPLITS:
            if not (samples := read_split(split, settings, out)):
                continue
            orders = [False, True] if split == "test" else [False]
            asked = [(s.swapped() if swapped else s, swapped) for swapped in orders for s in samples]
            judged = judge(model, processor, [s for s, _ in asked], mode, settings.evaluate, allow_tie=split == "ties", label=f"{stage}, {mode}: {split}")
            rows += [{"split": split, "swapped": swapped} | row for row, (_, swapped) in zip(judged, asked)]
        data.write_jsonl(kept, rows)
        made = {"state": state, "splits": {split: {scope: summarise(found) for scope in (*data.TASKS, "all")
                                                   if (found := [r for r in rows if r["split"] == split and scope in (r["task"], "all")])}
                                           for split in ("test", "heldout")}}
        made["ties"] = tie_metrics(ties) if (ties := [r for r in rows if r["split"] == "ties"]) else {}
        config.write_text(mark, json.dumps(made, indent=1))
    return json.loads(mark.read_text())


# ------------------------------------------------------------------------------------------------------------------ table


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(results: list) -> str:
    """The stage table as text: accuracy per task with its interval, then the quality of the reasoning."""
    heads = [task.replace("_", " ").replace("understanding", "und.").replace("generation", "gen.") for task in data.TASKS] + ["mean"]
    lines = []
    for split, title in (("test", "accuracy % on the test split, both orders, 95% interval"), ("heldout", "accuracy % on colour-shape pairs never trained on")):
        lines += [title, "  ".join([f"{'':<28}"] + [f"{head:>18}" for head in heads])]
        for row in results:
            cells = [row["splits"][split].get(scope) for scope in (*data.TASKS, "all")]
            shown = [f"{percent(c['accuracy']):>5} [{percent(c['low']):>5},{percent(c['high']):>5}]".rjust(18) if c else f"{'-':>18}" for c in cells]
            lines.append("  ".join([f"{row['name']:<28}"] + shown))
        lines.append("")
    names = (("format_ok", "format"), ("sums_ok", "sums right"), ("consistent", "follows"), ("scores_right", "scores right"), ("facts_right", "facts right"),
             ("orders_agree", "orders agree"), ("first_chosen", "first chosen"), ("unreadable", "unreadable"))
    lines += ["the reasoning on the test split, % (follows: sums add up and the verdict follows from them)", "  ".join([f"{'':<28}"] + [f"{head:>12}" for _, head in names])]
    for row in results:
        cell = row["splits"]["test"]["all"]
        lines.append("  ".join([f"{row['name']:<28}"] + [f"{percent(cell[key]) if key in cell else '-':>12}" for key, _ in names]))
    lines += ["", "generation pairs of which a third are ties, %", "  ".join([f"{'':<28}"] + [f"{head:>14}" for head in ("diff", "tau", "tau calibrated")])]
    for row in results:
        lines.append("  ".join([f"{row['name']:<28}"] + [f"{percent(row['ties'][key]) if key in row['ties'] else '-':>14}" for key in ("diff", "tau", "tau_calibrated")]))
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------------ stage


def after(stage: str, settings: config.Settings, out: Path) -> None:
    """Judges a checkpoint that was just made, for the one line that says what its stage did."""
    for name, checkpoint, mode in config.ROWS:
        if checkpoint == stage:
            cell = judge_checkpoint(stage, mode, settings, out)["splits"]["test"]["all"]
            print(f"   {name}: {percent(cell['accuracy'])}% [{percent(cell['low'])}, {percent(cell['high'])}] on the test split", flush=True)


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    import report

    out = folder.parent
    results = [{"name": name, "stage": checkpoint, "mode": mode} | judge_checkpoint(checkpoint, mode, settings, out) for name, checkpoint, mode in config.ROWS]
    config.write_text(folder / "results.json", json.dumps({"rows": results}, indent=1))
    config.write_text(folder / "table.txt", table(results))
    report.write(out)
    return f"{len(results)} rows"


if __name__ == "__main__":
    config.main("evaluate")
