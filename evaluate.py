"""Evaluation: what each stage can do, with intervals, and whether its reasoning is right.

Every pair of the test split is judged greedily in both presentation orders (media, answers and label swap together), the other splits in
one. The verdict is read from inside <answer> only; an unreadable output is wrong, never a tie. Accuracy is the mean over both orders;
its 95% interval resamples pairs.

Beside accuracy, for the thinking rows: is the format kept, do the sums add up, does the verdict follow from them, are the scores and the
facts behind them right, do both orders agree. On the split with ties: diff = accuracy over the pairs that are no tie, tau = plain
three-way accuracy, tau_calibrated = three-way accuracy of the stated totals: a tie where they differ by no more than the best threshold, else
the larger wins (arXiv 2305.14324).

    python evaluate.py --config small                        the stage table and the report
    python evaluate.py bench|compare|judge|table|votes -h    benchmarks, differences, pairs of one's own, several seeds, voting
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import pkgutil
import random
import sys
from pathlib import Path

import numpy as np

import config
import data
import distill
import media
import model as M
import report
import stages
from report import SPLITS, percent

# ---------------------------------------------------------------------------------------------------------------- metrics

def interval(values: np.ndarray) -> dict:
    """{"low", "high"}: 95% percentile interval of the mean of `values` [pairs], 1,000 resamples; of [choices, pairs] each resample takes the choice
    that is best on it."""
    values = np.atleast_2d(values)
    taken = np.random.default_rng(0).choice(values.shape[1], size=(1000, values.shape[1]))
    means = np.max([row[taken].mean(1) for row in values], axis=0)
    return {name: round(float(np.percentile(means, q)), 4) for name, q in (("low", 2.5), ("high", 97.5))}


def pair_scores(rows: list, value=lambda row: row["answer"] == row["label"]) -> dict:
    """{id: mean of `value` over its judgements; the share that is right}: where both orders of a pair were judged they count as one pair."""
    found = {}
    for row in rows:
        found.setdefault(row["id"], []).append(value(row))
    return {key: float(np.mean(values)) for key, values in found.items()}


def summarise(rows: list) -> dict:
    """Metrics of the judgements of one task (or of all) on one split."""
    by_pair = np.array(list(pair_scores(rows).values()))
    share = lambda values: round(float(np.mean(list(values))), 4)
    made = {"accuracy": share(by_pair), **interval(by_pair), "pairs": len(by_pair), "unreadable": share(row["answer"] is None for row in rows),
            "first_chosen": share(row["answer"] == 1 for row in rows)}
    given, turned = ({row["id"]: row["answer"] for row in rows if row["swapped"] == swapped} for swapped in (False, True))
    if both := given.keys() & turned.keys():
        made["orders_agree"] = share(given[k] is not None and data.flip(given[k]) == turned[k] for k in both)
    if rows[0]["mode"] == "think":
        made |= {name: share(row[name] for row in rows) for name in ("format_ok", "sums_ok", "consistent")}
        if all(row["scores_right"] is not None and row["facts_right"] is not None for row in rows):  # the truth is known in the small world only
            made |= {name: share(row[name] for row in rows) for name in ("scores_right", "facts_right")}
    return made


def tie_metrics(rows: list) -> dict:
    """Metrics of judgements with ties: "diff" and "tau" as `summarise` gives them, "tau_calibrated" where totals were stated (think mode)."""
    made = {name: summarise(some) for name, some in (("diff", [row for row in rows if row["label"] != 0]), ("tau", rows)) if some}
    margins = [None if row["answer"] is None else row["margin"] for row in rows]  # what cannot be read is wrong, whatever its totals
    if any(margin is not None for margin in margins):
        guess = lambda margin, threshold: None if margin is None else 0 if abs(margin) <= threshold else 1 if margin > 0 else 2
        thresholds = {abs(margin) for margin in margins if margin is not None} | {0.0}
        fits = [[float(guess(margin, threshold) == row["label"]) for margin, row in zip(margins, rows)] for threshold in thresholds]
        _, pair, count = np.unique([row["id"] for row in rows], return_inverse=True, return_counts=True)
        by_pair = np.array([np.bincount(pair, fit) / count for fit in fits])  # [thresholds, pairs]
        made["tau_calibrated"] = {"accuracy": round(float(by_pair.mean(1).max()), 4), **interval(by_pair)}
    return made


# ---------------------------------------------------------------------------------------------------------------- judging

def judge(model, processor, samples: list, mode: str, own: config.Evaluate, allow_tie: bool = False, label: str = "", orders: tuple = (False,),
          style: str = "short", template: str = "", votes: int = 0, file: Path | None = None) -> list:
    """Judges each of `samples` in each of `orders` (False: as given, True: swapped, where it can be), greedily or `votes` times at temperature 1;
    one row per judgement, those of a sample together. `template` replaces the text of the prompt. Where `processor` is None a server is asked, once
    for each: `model` is then the rest of distill.ask's arguments. `file` keeps the texts, see distill.generate_texts."""
    asked = [(s.swapped() if swapped else s, swapped) for s in samples for swapped in orders if s.can_swap or not swapped]
    shown = [dataclasses.replace(s, problem=data.fill_template(template, s, mode)) if template else s for s, _ in asked]
    if processor is None:
        texts = [reply["text"] for reply in distill.ask(shown, own, **model, mode=mode, allow_tie=allow_tie, label=label or "asking", style=style)]
    else:
        prompts, prefix = [data.build_prompt(s, mode, style, allow_tie) for s in shown], data.THINK if mode == "think" else ""
        texts = distill.generate_texts(model, processor, prompts, own, prefix, votes or 1, 1.0 if votes else 0.0, label=label, file=file)
    rows = []
    for (sample, swapped), text in zip([one for one in asked for _ in range(votes or 1)], texts):
        verdict = data.parse_verdict(text, sample.task)
        read = {name: getattr(verdict, name) for name in ("answer", "format_ok", "sums_ok", "consistent", "totals", "scores")}
        rows.append({"id": sample.id, "swapped": swapped, "task": sample.task, "mode": mode, "label": sample.label, "text": text, **read,
                     "margin": verdict.totals[1] - verdict.totals[2] if len(verdict.totals) == 2 else None,
                     "scores_right": data.share_right(verdict.scores, sample.scores),
                     "facts_right": data.share_right(verdict.reasons, sample.reasons)})
    return rows


def read_split(split: str, settings: config.Settings, out: Path) -> list:
    file, limit = out / "data" / f"{split}.jsonl", settings.evaluate.test_pairs
    samples = data.read_samples(file) if file.is_file() else []  # a test of one's own has no other splits beside it
    rng = random.Random(f"{settings.run.seed}/{split}")  # not the first ones: ties stand together, and so do the pairs of a source
    drawn = lambda rows: [rows[k] for k in sorted(rng.sample(range(len(rows)), min(limit or len(rows), len(rows))))]
    return [s for task in data.TASKS for s in drawn([s for s in samples if s.task == task])]


def judge_checkpoint(stage: str, mode: str, settings: config.Settings, out: Path) -> dict:
    """Judges every split with one checkpoint; keeps the judgements in evaluate/STAGE-MODE.jsonl and reuses them while they are valid."""
    folder = out / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    kept, mark = folder / f"{stage}-{mode}.jsonl", folder / f"{stage}-{mode}.json"
    state = report.judged_of(stage, out) + [config.shaping(settings.evaluate)]
    if stages.read_facts(mark).get("state") != state:
        model, processor = {"url": settings.evaluate.endpoint, "model": stage, "file": folder / "replies.jsonl", "checkpoint": state[0]}, None
        if not settings.evaluate.endpoint or stage not in settings.evaluate.served.split(","):
            model, processor = M.load(stages.checkpoint(stage, settings, out))
        rows = []
        for split in SPLITS:
            if not (samples := read_split(split, settings, out)):
                continue
            orders = (False, True) if split == "test" else (False,)
            file = folder / f"{stage}-{mode}-{split}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}.texts"
            judged = judge(model, processor, samples, mode, settings.evaluate, split == "ties", f"{stage}, {mode}: {split}", orders,
                           stages.style(mode, settings, out, stage), file=file)
            rows += [{"split": split} | row for row in judged]
        data.write_jsonl(kept, rows)
        made = {"state": state, "splits": {split: {scope: summarise(found) for scope in (*data.TASKS, "all")
                                                   if (found := [r for r in rows if r["split"] == split and scope in (r["task"], "all")])}
                                           for split in ("test", "heldout")}}
        ties = [r for r in rows if r["split"] == "ties"]
        made["ties"] = {name: cell["accuracy"] for name, cell in tie_metrics(ties).items()} if ties else {}
        config.write_text(mark, json.dumps(made, indent=1))
        for file in folder.glob(f"{stage}-{mode}-*.texts") if config.is_main() else []:
            file.unlink()
    config.wait_for_all()
    return json.loads(mark.read_text())


def table(results: list) -> str:
    """The stage table as text."""
    span = lambda c: f"{percent(c['accuracy']):>5} [{percent(c['low']):>5},{percent(c['high']):>5}]" if isinstance(c, dict) else percent(c)
    parts = []
    for title, width, heads, lines in report.tables(results).values():
        if report.is_empty(lines):
            continue
        rows = [["", *heads]] + [[name, *map(span, cells)] for name, *cells in lines]
        parts.append("\n".join([title] + ["  ".join([f"{name:<28}"] + [f"{cell:>{width}}" for cell in cells]) for name, *cells in rows]) + "\n")
    return "\n".join(parts)


def after(stage: str, settings: config.Settings, out: Path) -> None:
    """Judges a checkpoint that was just made, for the one line that says what its stage did."""
    for name, checkpoint, mode in stages.ROWS:
        if checkpoint == stage:
            cell = judge_checkpoint(stage, mode, settings, out)["splits"]["test"]["all"]
            print(f"   {name}: {percent(cell['accuracy'])}% [{percent(cell['low'])}, {percent(cell['high'])}] on the test split", flush=True)


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    out = folder.parent
    results = [{"name": name, "stage": checkpoint, "mode": mode} | judge_checkpoint(checkpoint, mode, settings, out)
               for name, checkpoint, mode in stages.ROWS]
    config.write_text(folder / "results.json", json.dumps({"rows": results}, indent=1))
    config.write_text(folder / "table.txt", table(results))
    if config.is_main():
        report.write(out)
    return f"{len(results)} rows"


# ----------------------------------------------------------------------------------------------- judging pairs of one's own

def settings_of(run: Path, options=None) -> config.Settings:
    """Those of a run's data, base, GRPO and evaluation, or the defaults, if `run` is none; `options` that are given come first. Pictures and
    clips are shown by them from here on."""
    settings = config.Settings()
    for stage in ("data", "base", "grpo", "evaluate"):
        for section, values in stages.read_facts(run / stage / "done.json").get("settings", {}).items():
            for name, value in values.items():
                if hasattr(getattr(settings, section, None), name):  # what another version wrote may have other names
                    setattr(getattr(settings, section), name, value)
    for section, names in ((settings.data, LIMITS[:3]), (settings.evaluate, LIMITS[3:])):
        vars(section).update({name: getattr(options, name) for name in names if getattr(options, name, None) is not None})
        if wrong := [name for name in names if getattr(section, name) < 1]:
            raise config.UserError(f"--{wrong[0].replace('_', '-')} is 1 or more")
    media.limits = settings.data
    return settings


def choose_model(options) -> tuple:
    """(checkpoint, prompt style, prompt text, limits, a function that loads it or lets `judge` ask --endpoint, with replies kept in a file).
    Without --model the newest GRPO checkpoint under runs/, else one of an earlier stage. What these scripts trained (done.json is in it;
    figures.json: the base) knows the short prompts, and is served by the name of its stage; a model from elsewhere needs the full ones."""
    made = [file.parent for stage in ("grpo", "rejection_sft", "cold_start")
            for file in sorted((config.ROOT / "runs").glob(f"*/{stage}/done.json"), key=lambda file: -file.stat().st_mtime)]
    if not options.model and not made:
        raise config.UserError(f"no trained run under {config.ROOT / 'runs'}: python grpo.py --config small makes one, or give --model CHECKPOINT")
    source, file, votes = str(options.model or made[0]), options.prompt_file, getattr(options, "votes", 0)
    if not options.endpoint and not Path(source).is_dir() and source.count("/") != 1:
        raise config.UserError(f"--model {source}: no such folder, and no hub name")
    if votes < 0 or (options.endpoint and (votes or not options.model)):
        raise config.UserError("--votes 0 or more; --endpoint has no votes and needs --model, a name or the folder of what is served")
    template = config.read_text(file) if file else ""
    if file and not template.strip():
        raise config.UserError(f"--prompt-file {file}: it is empty")
    stage, run = Path(source).absolute().name, Path(source).absolute().parent
    if options.endpoint and "@" in options.endpoint:
        raise config.UserError("--endpoint: no password in it; --key-variable names the environment variable that holds one")
    settings, made_here, moved = settings_of(run, options), stages.made_by(stage, run), not stages.made_by("base", run)
    trained = Path(source, "figures.json").is_file() or made_here and (moved or stages.style(options.mode, settings, run, stage) == "short")
    learnt = run / "data" / "distill.jsonl"
    known = template or options.style or not made_here or stage == "base" or not learnt.is_file()
    if not known and any(sample.problem for sample in data.read_samples(learnt)):
        raise config.UserError(f"{source} learnt from rows with prompts of their own ({learnt}): give that text as --prompt-file, or --style full")
    style = options.style or ("short" if trained else "full")
    print(f"model: {source} ({style} prompts)", file=sys.stderr)
    own = dataclasses.replace(settings.evaluate, key_variable=options.key_variable)
    served = {"url": options.endpoint, "model": stage if made_here else source, "checkpoint": made_here or (source if style == "short" else "")}
    return source, style, template, own, lambda file: (served | {"file": file}, None) if options.endpoint else M.load(source)


def judge_pairs(model, processor, samples: list, mode: str = "think", votes: int = 0, orders: tuple = (False, True), style: str = "short",
                template: str = "", own: config.Evaluate | None = None, label: str = "") -> list:
    """Judges pairs in batches, each order (False: as given, True: swapped) once and greedily, or `votes` times at temperature 1:
    judge_pairs(*M.load("runs/small/grpo"), [data.Sample("1", "image_generation", "a red square", ["a.png", "b.png"])], votes=5)
    One dict per sample: "answer" 1, 2, 0 (undecided) or None (nothing readable), "votes" {answer: count}, "margin" (votes for 1 - for 2) / all,
    "total_margin" mean difference of stated totals or None, "judgements" rows of `judge` in the sample's own numbering (not so their texts)."""
    samples = [dataclasses.replace(s, media=media.fit_clips(s.media)) if data.is_video(s.task) else s for s in samples]
    rows = judge(model, processor, samples, mode, own or config.Evaluate(), False, label, orders, style, template, votes)
    results, turn = [], lambda pair: {3 - k: value for k, value in pair.items()}
    for row in [row for row in rows if row["swapped"]]:
        row |= {key: data.flip(row[key]) for key in ("answer", "label")} | {"margin": None if row["margin"] is None else -row["margin"]}
        row |= {"totals": turn(row["totals"]), "scores": {name: turn(pair) for name, pair in row["scores"].items()}}
    for sample in samples:
        each = (votes or 1) * sum(sample.can_swap or not swapped for swapped in orders)
        mine, rows = rows[:each], rows[each:]
        count = {answer: sum(row["answer"] == answer for row in mine) for answer in (1, 2, 0, None)}
        margins, lead = [row["margin"] for row in mine if row["margin"] is not None], count[1] - count[2]
        answer = 1 if lead > 0 else 2 if lead < 0 else None if count[None] == each else 0
        results.append({"id": sample.id, "answer": answer, "votes": count, "margin": lead / each,
                        "total_margin": float(np.mean(margins)) if margins else None, "judgements": mine})
    return results


def ranking(pairs: list, results: list, names: list) -> list:
    """Best first, from a round robin: a point for a pair won, half a point for one undecided; equal points go by the sum of total margins."""
    table = [{"candidate": name, "points": 0.0, "total_margin": 0.0} for name in names]
    for pair, result in zip(pairs, results):
        for k, candidate in enumerate(pair, 1):
            table[candidate]["points"] += float(result["answer"] == k) if result["answer"] else 0.5
            table[candidate]["total_margin"] += (result["total_margin"] or 0.0) * (3 - 2 * k)
    return sorted(table, key=lambda row: (-row["points"], -row["total_margin"]))


def find_media(value, video: bool, root="", cache: Path | None = None):
    """Path of an image or a video. `value`: a path under `root`, or a parquet file's image, whose bytes go to `cache` once."""
    path = cache / hashlib.sha256(value["bytes"]).hexdigest()[:24] if isinstance(value, dict) else Path(root, value)
    if isinstance(value, dict) and not path.is_file():
        cache.mkdir(exist_ok=True)
        config.write_file(path, lambda stream: stream.write(value["bytes"]))
    if video and not path.exists() and path.with_suffix("").is_dir():
        path = path.with_suffix("")  # the frames of x.mp4 may stand in the folder x
    return str(path.absolute())


def judge_command(options) -> None:
    """Judges two candidates: once and in the order given, with --votes K times in each order; with --rank any number, each pair in both orders."""
    task, generation, video = options.task, data.is_generation(options.task), data.is_video(options.task)
    names, shown = options.media if generation else options.answer, [find_media(file, video) for file in options.media]
    shown = [shown] if video and not generation else shown  # several files: the frames of one video
    if len(names) < 2 or (len(names) > 2 and not options.rank) or (options.answer if generation else len(shown) > 1):
        raise config.UserError(f"{task} takes {'two files' if generation else 'one medium, --answer A and --answer B'} (more candidates: --rank); "
                               f"got {len(options.media)} files and {len(options.answer)} answers")
    if not all(text.strip() for text in [options.prompt, *options.answer]):
        raise config.UserError("--prompt, or one of --answer, is empty")
    pairs, of = [(i, j) for j in range(len(names)) for i in range(j)], lambda values, pair: [values[k] for k in pair]
    source, style, template, own, load = choose_model(options)
    samples = [data.Sample("", task, options.prompt, of(shown, p) if generation else shown, [] if generation else of(names, p)) for p in pairs]
    orders, noun = (False, True) if options.votes or options.rank else (False,), data.candidate_noun(task)
    with contextlib.redirect_stdout(sys.stderr):  # for --json what is said on the way is no part of the result
        results = judge_pairs(*load(config.ROOT / "runs" / "judge.replies.jsonl"), samples, options.mode, options.votes, orders, style, template, own)
    said = {answer: text for text, answer in data.verdict_strings(task).items()} | {0: "undecided", None: "unreadable"}
    results = [{"candidates": of(names, pair), "verdict": said[result["answer"]]} | result for pair, result in zip(pairs, results)]
    ranks = ranking(pairs, results, names) if options.rank else []
    if options.json:
        return print(json.dumps({"model": source, "style": style, "task": task, "pairs": results, "ranking": ranks}, indent=1))
    for place, row in enumerate(ranks, 1):
        print(f"{place}. {row['candidate']}: {row['points']:g} of {len(names) - 1} points, total margin {row['total_margin']:+g}")
    for result in results if not options.rank else []:
        row = next((row for row in result["judgements"] if row["answer"] == result["answer"]), result["judgements"][0])
        print(f"{row['text']}\n\n{'':<24}{noun + ' 1':>10}{noun + ' 2':>10}" + "  (the text saw them in the other order)" * row["swapped"])
        for name, pair in (row["scores"] | {"total": row["totals"]}).items():
            print(f"{name:<24}" + "".join(f"{pair[k]:>10g}" if k in pair else f"{'-':>10}" for k in (1, 2)))
        if options.votes:
            print(f"votes: {', '.join(f'{count} {said[answer]}' for answer, count in result['votes'].items())}; margin {result['margin']:+.2f}")
        print(f"verdict: {result['verdict']}")


LIMITS = ("max_pixels", "frames", "pair_frames", "max_new_tokens", "batch_rows")
OF_MODELS = {"--model": dict(help="checkpoint folder or hub name; the newest trained run if not given"),
             "--mode": dict(choices=("think", "answer"), default="think"), "--style": dict(choices=("short", "full"), help="if not the model's own"),
             "--prompt-file": dict(help="own text: {noun} {prompt} {dimensions} {verdicts} {answer_1} ..."),
             "--endpoint": dict(default="", help="server (vLLM: http://HOST:8000/v1) that has --model; without it the model is run here"),
             "--key-variable": dict(default="", help="NAME of the environment variable that holds the server's key"),
             **{f"--{name.replace('_', '-')}": dict(type=int, help="in place of the run's own, or of the default") for name in LIMITS}}
COMMANDS = {  # name: (function, or where it is, options as argparse takes them)
    "bench": ("results.bench:bench", {"--benchmark": dict(required=True, help="its name, see docs/real.md"),
                      "--path": dict(nargs="+", required=True, help="files or folder"),
                      "--media": dict(help="folder of images, videos, frames"), "--out": dict(help="FILE.json"), **OF_MODELS}),
    "compare": ("results.bench:compare", {"results": dict(nargs=2, help="FILE.json of a bench run, or evaluate/STAGE-MODE.json of a run")}),
    "table": ("results.claims:table", {
        "runs": dict(nargs="+", help="run folders named seedN or seedN-WHAT, or files made by --keep"),
        "--keep": dict(help="folder for the judgements without their texts, 70 KB a run"), "--json": dict(help="FILE.json for the claims")}),
    "votes": ("results.votes:votes", {
        "run": dict(help="run folder, for instance runs/small"), "--votes": dict(type=int, default=15, help="judgements of each pair")}),
    "judge": (judge_command, {"media": dict(nargs="+", help="candidates, or what is asked about: images, folders of frames, frames of one video"),
                              "--task": dict(choices=data.TASKS, required=True), "--prompt": dict(required=True, help="caption or question"),
                              "--answer": dict(action="append", default=[], help="candidate of an understanding task; give two"),
                              "--votes": dict(type=int, default=0, help="sample so many judgements in each order"),
                              "--rank": dict(action="store_true", help="order the candidates"), "--json": dict(action="store_true"), **OF_MODELS})}


def command_line(command: str, arguments: list) -> None:
    def refuse(message):
        raise config.UserError(message)
    run_command, options = COMMANDS[command]
    run_command = run_command if callable(run_command) else pkgutil.resolve_name(run_command)
    parser = argparse.ArgumentParser(prog=f"evaluate.py {command}", description=run_command.__doc__, allow_abbrev=False)
    parser.error = refuse
    for name, how in options.items():
        parser.add_argument(name, **how)
    run_command(parser.parse_intermixed_args(arguments))


if __name__ == "__main__":
    stages.main("evaluate", {name: functools.partial(command_line, name) for name in COMMANDS})
