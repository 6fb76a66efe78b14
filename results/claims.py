"""The paper's claims C1 to C6 over several seeds, the stage table with error bars, and one row for each thing that was changed.

    for seed in $(seq 0 24); do python grpo.py --config small --out runs/seed$seed --run.seed $seed; done
    cp -r runs/seed0 runs/seed0-beta0 && python grpo.py --config small --out runs/seed0-beta0 --run.seed 0 --grpo.beta 0
    python evaluate.py table runs/seed*                      # or from what --keep wrote: results/seed*.jsonl.gz

A run is named seedN, or seedN-WHAT where something differs from the settings of seedN; what differs is read from the two runs. Each seed
draws its own world and its own noise, so the spread of the seeds' figures holds the choice of pairs too: intervals are Student's t over seeds.
A difference is taken within a seed, on the same pairs. With a single seed its interval resamples pairs, and says nothing about training again.
"""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

import config
import data
import report
import stages
from evaluate import interval, pair_scores

KEYS = [(title, f"{stage}-{mode}") for title, stage, mode in stages.ROWS]
CURVES = ("reward_accuracy", "reward_format", "reward_consistency", "kl", "entropy", "length", "zero_variance_share")
COLUMNS = ("split", "id", "swapped", "task", "mode", "label", "answer", "format_ok", "sums_ok", "consistent", "scores_right", "facts_right")
STUDENT = (  # t at 97.5%, 1 to 24 degrees of freedom; more seeds take the last
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788,
    2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639)
DEFAULTS = {f"{section}.{key}": value for section, values in dataclasses.asdict(config.Settings()).items() for key, value in values.items()}
PAPER = {  # accuracy as printed: VLRewardBench, GenAI-Bench image and video (diff), VideoGen-RewardBench (diff)
    "base-answer": (67.5, 70.9, 77.2, 79.3), "grpo_direct-answer": (69.0, 71.3, 78.4, 79.5), "cold_start-think": (66.9, 68.6, 75.3, 76.8),
    "rejection_sft-think": (72.1, 72.0, 78.9, 79.7), "grpo-think": (73.8, 72.5, 82.3, 80.5), "grpo-answer": (73.1, 71.9, 81.6, 79.9)}
REASONING = {  # of one judgement; the last two: a right verdict although a score is wrong, a wrong one although all are right
    "sums right": lambda row: row["sums_ok"],
    "verdict follows": lambda row: row["consistent"],
    "scores right": lambda row: row["scores_right"],
    "facts right": lambda row: row["facts_right"],
    "right verdict, wrong scores": lambda row: row["answer"] == row["label"] and row["scores_right"] < 1,
    "wrong verdict, right scores": lambda row: row["answer"] != row["label"] and row["scores_right"] == 1}


# ------------------------------------------------------------------------------------------------------------- the runs

def read_run(path: Path) -> dict:
    """A run folder, or a file written by `keep`, as {STAGE-MODE: rows of its judgements, "settings": {section.key: value}, "curves": {metric of
    GRPO: its value at every step}}. Judgements of a checkpoint or of pairs that were made again since are left out."""
    if not path.is_dir():
        try:
            head, *lines = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
            run = {"settings": head["settings"], "curves": head["curves"], "copy_of": head.get("copy_of")}
            for key, *cells in lines:
                run.setdefault(key, []).append(dict(zip(COLUMNS, cells, strict=True)))
            return run
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise config.UserError(f"cannot read {path}: {config.one_line(error)}; runs are folders, or files that --keep wrote")
    settings, shaping = {}, {s.name: config.shaping(s.default_factory()) for s in dataclasses.fields(config.Settings)}
    for file in sorted(path.glob("*/done.json")):
        for section, values in stages.read_facts(file).get("settings", {}).items():
            settings |= {f"{section}.{key}": value for key, value in values.items() if key in shaping[section]}
    metrics = path / "grpo" / "metrics.jsonl"
    steps = list(data.read_jsonl(metrics)) if metrics.is_file() else []
    judged = {f"{row['stage']}-{row['mode']}" for row in report.read_results(path)}
    return {"settings": settings, "curves": {name: [row[name] for row in steps] for name in CURVES},
            **{key: data.read_jsonl(path / "evaluate" / f"{key}.jsonl") for _, key in KEYS if key in judged}}


def keep(run: dict, file: Path, plain: dict | None = None) -> None:
    """Settings, curves, and the judgements without their texts, one JSON list a line; the same bytes for the same run. What is judged as in the
    run `plain`, of which this one is a changed copy, is left out."""
    short = lambda value: round(value, 4) if isinstance(value, float) else value
    head = {"settings": run["settings"], "curves": {name: [short(value) for value in values] for name, values in run["curves"].items()}}
    head |= {"copy_of": fingerprint(plain)} if plain else {}
    rows = [[key] + [short(row[c]) for c in COLUMNS] for _, key in KEYS if not plain or differs(run, plain, key) for row in run[key]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in [head, *rows]).encode(), mtime=0))


def fingerprint(run: dict) -> str:
    """Of all that was judged in a run, as `keep` keeps it."""
    said = [[row["id"], row["swapped"], row["answer"]] for _, key in KEYS for row in run[key]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def differs(run: dict, plain: dict, key: str) -> bool:
    """Whether a row of the stage table was judged by another checkpoint in the two runs, as far as its judgements show."""
    said = lambda rows: [(row["split"], row["id"], row["swapped"], row["answer"]) for row in rows]
    return key in run and said(run[key]) != said(plain[key])


def changed(named: dict) -> dict:
    """Of {name: run}: {WHAT: ([the runs named seedN-WHAT], [the plain ones of the same seeds])}."""
    found = {}
    for name, run in named.items():
        seed, _, what = name.partition("-")
        if what:
            runs, plain = found.setdefault(what, ([], []))
            runs.append(run), plain.append(named[seed])
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------------------------------ statistics

def estimate(samples: list) -> tuple:
    """(mean, low, high) of one array of per-pair values for each seed: t interval over the seeds' means, or over the pairs of a single seed."""
    means = [float(np.mean(values)) for values in samples]
    if len(means) == 1:
        span = interval(np.array(samples[0]))
        return means[0], span["low"], span["high"]
    half = STUDENT[min(len(means) - 1, len(STUDENT)) - 1] * np.std(means, ddof=1) / len(means) ** 0.5
    return float(np.mean(means)), float(np.mean(means) - half), float(np.mean(means) + half)


def per_pair(run: dict, key: str, split: str = "test", task: str = "all", **value) -> dict:
    """evaluate.pair_scores of one row of the stage table, on one split and one task or all."""
    return pair_scores([row for row in run[key] if row["split"] == split and task in (row["task"], "all")], **value)


def gain(runs: list, after: str, before: str, task: str = "all", than: list = ()) -> list:
    """For each seed the differences of its pairs: right after - right before, the latter in the runs `than` if they are given."""
    both = [(per_pair(run, after, task=task), per_pair(other, before, task=task)) for run, other in zip(runs, than or runs)]
    return [np.array([one[k] - two[k] for k in one]) for one, two in both]


def claims(runs: list) -> list:
    """The paper's, and what each stage adds. [(claim, what is measured, [(scope, (mean, low, high))])]; see `decision`."""
    tasks, others = data.TASKS, [task for task in data.TASKS if task != "image_generation"]
    rise = lambda after, before, scopes: [(scope, estimate(gain(runs, after, before, scope))) for scope in scopes]
    well_formed = lambda row: row["format_ok"] - 0.8
    formed = [(s, estimate([list(per_pair(run, "cold_start-think", task=s, value=well_formed).values()) for run in runs])) for s in others]
    full, direct = gain(runs, "grpo-think", "base-answer"), gain(runs, "grpo_direct-answer", "base-answer")
    return [("C1", "the cold start alone lowers accuracy: base direct - cold start", rise("base-answer", "cold_start-think", ["all"])),
            ("C2", "rejection sampling lifts every task: rejection SFT - base direct", rise("rejection_sft-think", "base-answer", tasks)),
            ("C3", "GRPO lifts every task: GRPO - rejection SFT", rise("grpo-think", "rejection_sft-think", tasks)),
            ("C4", "the format carries over: well-formed answers of the cold start on tasks it had no data of - 80%", formed),
            ("C5", "implicit reasoning: full model answering directly - base direct", rise("grpo-answer", "base-answer", ["all"])),
            ("C6", "GRPO without CoT gains little: half of the full model's gain - its gain",
             [("all", estimate([0.5 * one - two for one, two in zip(full, direct)]))]),
            ("2", "stage 2 adds: rejection SFT - cold start", rise("rejection_sft-think", "cold_start-think", ["all"])),
            ("3", "stage 3 adds: GRPO - rejection SFT", rise("grpo-think", "rejection_sft-think", ["all"])),
            ("1-3", "all of it: full model - base direct", rise("grpo-think", "base-answer", ["all"]))]


def decision(found: list) -> str:
    """Of [(scope, (mean, low, high))]: "holds" if every interval lies above 0, "does not hold" if one lies below, else "undecided"."""
    if all(low > 0 for _, (_, low, _) in found):
        return "holds"
    return "does not hold" if any(high < 0 for _, (_, _, high) in found) else "undecided"


# ---------------------------------------------------------------------------------------------------------------- tables

def cell(samples: list, plus: str = "") -> str:
    mean, low, high = (100 * value for value in estimate([list(values) for values in samples]))
    return f"{mean:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"


def markdown(heads: list, lines: list) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [heads, ["---"] * len(heads), *lines]) + "\n"


def stage_table(runs: list, split: str) -> str:
    """Accuracy of every stage by task, mean over seeds and interval; the paper's figures, of its four benchmarks, in the last column."""
    lines = []
    for name, key in KEYS:
        cells = [cell([per_pair(run, key, split, task).values() for run in runs]) for task in (*data.TASKS, "all")]
        lines.append([name, *cells, " / ".join(map(str, PAPER.get(key, "-")))])
    return markdown(["", *(task.replace("_", " ") for task in data.TASKS), "mean", "paper: VLRewardBench / GenAI image / GenAI video / VideoGen"], lines)


def reasoning_cells(runs: list, key: str) -> list:
    return [cell([per_pair(run, key, value=value).values() for run in runs]) for value in REASONING.values()]


def changes_table(named: dict) -> str:
    """The runs named seedN-WHAT against the plain ones of the same seeds: for each WHAT the rows of the stage table that it changes."""
    lines = []
    for what, (runs, seeds) in changed(named).items():
        ours, plain = runs[0]["settings"], DEFAULTS | seeds[0]["settings"]  # what was kept before there was a setting had its default
        flags = " ".join(f"--{key} {json.dumps(value).strip(chr(34))}" for key, value in ours.items() if plain.get(key) != value)
        for title, key in KEYS[:-1]:  # the last is another look at the full model
            if all(differs(run, seed, key) for run, seed in zip(runs, seeds)):
                accuracy, change = [per_pair(run, key).values() for run in runs], gain(runs, key, key, than=seeds)
                reasoning = reasoning_cells(runs, key) if key.endswith("think") else ["-"] * len(REASONING)
                lines.append([what, f"`{flags}`", len(runs), title, cell(accuracy), cell(change, "+"), *reasoning])
    return "What was changed, on the test pairs\n\n" + markdown(
        ["changed", "settings", "seeds", "row of the stage table", "accuracy", "difference", *REASONING], lines) if lines else ""


def table(options) -> None:
    """Tables of several runs (folders, or files that --keep wrote): claims, stages, reasoning, and what changed settings do."""
    paths = [Path(name) for name in options.runs]
    named = {path.name.removesuffix(".jsonl.gz"): read_run(path) for path in paths}
    if len(named) < len(paths):
        raise config.UserError("two of the runs have the same name; the name says which seed and what was changed, so give one of them")
    if alone := [name for name in named if name.partition("-")[0] not in named]:
        raise config.UserError(f"{alone[0]} is compared with {alone[0].partition('-')[0]}: give that run too")
    for name, path in zip(named, paths):
        seed = named[name.partition("-")[0]]
        named[name] = run = named[name] if path.is_dir() else seed | named[name]  # what was kept of a changed run is what differs
        if missing := [key for _, key in KEYS if key not in run]:
            raise config.UserError(f"{name}: no judgements {missing[0]}; finish the run with python grpo.py, or give other runs")
        if any(row["scores_right"] is None for row in run["grpo-think"]):
            raise config.UserError(f"{name} was tested on pairs whose true scores nobody knows; these tables are for the small world")
        if run.get("copy_of") not in (None, fingerprint(seed)):
            raise config.UserError(f"{path} is kept from a copy of another run than this {name.partition('-')[0]}: keep both again")
        pairs_of = lambda one: {(row["split"], row["id"], row["swapped"]) for row in one["base-answer"]}
        if (run["settings"].get("run.seed"), pairs_of(run)) != (seed["settings"].get("run.seed"), pairs_of(seed)):
            raise config.UserError(f"{name} was tested on other pairs than {name.partition('-')[0]}")
        if options.keep:
            keep(run, Path(options.keep) / f"{name}.jsonl.gz", seed if "-" in name else None)
    plain = [run for name, run in named.items() if "-" not in name]
    seeds = [run["settings"].get("run.seed", name) for name, run in named.items() if "-" not in name]
    if len(set(seeds)) < len(seeds):
        raise config.UserError("two of the runs have the same seed: give each its own --run.seed")
    found, rows = claims(plain), [(title, key) for title, key in KEYS if key.endswith("think")]
    points = lambda scope, e: f"{scope.replace('_', ' ')} {100 * e[0]:+.1f} [{100 * e[1]:+.1f}, {100 * e[2]:+.1f}]"
    lines = [[name, what, "<br>".join(points(*one) for one in scopes), decision(scopes)] for name, what, scopes in found]
    over = f"mean over {len(plain)} seeds and 95% interval" if len(plain) > 1 else "one seed, 95% interval over its pairs"
    print(f"Claims, differences in points ({over})\n\n" + markdown(["", "claim", "difference", ""], lines))
    print("Accuracy % on the test pairs, both orders\n\n" + stage_table(plain, "test"))
    print("Accuracy % on colour-shape pairs never trained on\n\n" + stage_table(plain, "heldout"))
    print("The reasoning on the test pairs, %\n\n" + markdown(["", *REASONING], [[name, *reasoning_cells(plain, key)] for name, key in rows]))
    print(changes_table(named))
    if options.json:
        spans = lambda scopes: {scope: dict(zip(("mean", "low", "high"), e)) for scope, e in scopes}
        made = [{"claim": name, "measures": what, "decision": decision(scopes), "differences": spans(scopes)} for name, what, scopes in found]
        config.write_text(Path(options.json), json.dumps({"runs": list(named), "claims": made}, indent=1))
