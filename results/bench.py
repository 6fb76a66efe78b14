"""Benchmarks in their released layouts, and whether two results over the same pairs differ.

    python evaluate.py bench --benchmark vl_rewardbench --path FILES --model CHECKPOINT
    python evaluate.py compare A.json B.json

docs/real.md says which files each benchmark has. Each pair is judged in both orders; an unreadable output is wrong.
"""

import csv
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

import config
import data
import media
import stages
from evaluate import LIMITS, choose_model, find_media, interval, judge, pair_scores, summarise, tie_metrics
from report import judged_of, percent

BENCHMARKS = {  # the released layouts: (task, keys of the prompt, the media, the answers and the label); "|" between spellings of one key
    "vl_rewardbench": ("image_understanding", "query", ["image"], "response", "human_ranking"),  # JSON or parquet
    "genai_image": ("image_generation", "prompt", ["left_image|image_left", "right_image|image_right"], "", "vote_type"),  # parquet
    "genai_video": ("video_generation", "prompt", ["left_video|video_left", "right_video|video_right"], "", "vote_type"),  # JSON or parquet
    "videogen_rewardbench": ("video_generation", "prompt", ["path_A", "path_B"], "", "Overall"),  # CSV
    "sharegptvideo": ("video_understanding", "prompt", ["video"], "chosen|rejected", "")}  # JSON lines of the DPO release: the first is better
LABELS = {"[0, 1]": 1, "[1, 0]": 2, "leftvote": 1, "rightvote": 2, "tievote": 0, "bothbad_vote": 0, "A": 1, "B": 2, "same": 0}


def group_of(benchmark: str, key: str) -> str:
    """The official groups of VLRewardBench, by the prefix of the id; other benchmarks have none."""
    names = {"hallucination": ("hallucination", "RLAIF", "RLHF"), "reasoning": ("mathverse", "mmmu"), "general": ""}
    return next(name for name in names if key.startswith(names[name])) if benchmark == "vl_rewardbench" else ""


def benchmark_rows(file: Path):
    try:
        if file.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile
            yield from (row for batch in ParquetFile(file).iter_batches(64) for row in batch.to_pylist())
        else:
            yield from csv.DictReader(open(file, encoding="utf-8-sig", newline="")) if file.suffix == ".csv" else data.read_jsonl(file)
    except ImportError:
        raise config.UserError(f"{file}: parquet is read with pyarrow; pip install pyarrow")
    except (OSError, ValueError, csv.Error) as error:
        raise config.UserError(f"cannot read {file}: {error}")


def read_benchmark(name: str, paths: list, folder: str | None = None) -> tuple:
    """({id: sample}, [what is wrong with which row]) of files or their folder; images and videos stand there too, or in `folder`."""
    if name not in BENCHMARKS:
        raise config.UserError(f"--benchmark {name}: it is none of {', '.join(BENCHMARKS)}")
    (task, asked, shown, said, label), samples, broken, kinds = BENCHMARKS[name], {}, [], (".json", ".jsonl", ".csv", ".parquet")
    for file in [f for path in map(Path, paths) for f in (sorted(f for f in path.iterdir() if f.suffix in kinds) if path.is_dir() else [path])]:
        if not file.is_file():
            raise config.UserError(f"no such file: {file}; name the .json, .jsonl, .csv or .parquet files of {name} after --path")
        for number, row in enumerate(benchmark_rows(file), 1):
            try:
                found = [row[next((key for key in keys.split("|") if key in row), keys)] for keys in shown]
                found = [find_media(value, data.is_video(task), folder or file.parent, file.with_suffix(".media")) for value in found]
                answers = row["response"] if said == "response" else [row[key] for key in said.split("|") if key]
                prompt, key = re.sub(r"<(?:image|video)>\n?", "", row[asked]), str(row.get("id", ""))
                key = f"{key}#{file.name}:{number}" if not key or key in samples else key  # some lists have no ids or repeat one
                better = LABELS[str(row[label])] if label else 1
                made = {"id": key, "task": task, "prompt": prompt, "media": found, "answers": answers, "label": better}
                samples[key] = data.usable(made, file.parent, dataclasses.replace(media.limits, image_root="", media_within="/"))
            except (LookupError, ValueError, TypeError, AttributeError, OSError, config.UserError) as error:
                broken.append(f"{file}, row {number}: {type(error).__name__}: {error}")
    if not samples:
        elsewhere = "; images or videos that are elsewhere: --media FOLDER" * any("no such file" in line for line in broken[:1])
        raise config.UserError(f"{', '.join(paths)}: no row reads as {name}" + "".join(f"; {line}" for line in broken[:1]) + elsewhere)
    return samples, broken


def benchmark_metrics(rows: list) -> dict:
    """{"overall", each group, "macro" = mean of the groups, and with ties "diff", "tau", "tau_calibrated": {"accuracy", "low", "high", ...}}"""
    groups = {name: [row for row in rows if row["group"] == name] for name in sorted({row["group"] for row in rows} - {""})}
    made = {name: summarise(members) for name, members in {"overall": rows, **groups}.items()}
    if groups:
        scores = [np.array(list(pair_scores(members).values())) for members in groups.values()]
        mean, share = np.mean([s.mean() for s in scores]), sum(map(len, scores)) / len(scores)
        # A pair moves the macro mean by its distance from the mean of its group, the more the smaller the group.
        span = interval(np.concatenate([mean + (s - s.mean()) * share / len(s) for s in scores]))
        made["macro"] = {"accuracy": round(float(mean), 4), **{end: min(1.0, max(0.0, value)) for end, value in span.items()}}
    return made | (tie_metrics(rows) if any(row["label"] == 0 for row in rows) else {})


def bench(options) -> None:
    """Judges a benchmark, each pair in both orders; the same command goes on where it was stopped. FILE.json has the metrics, FILE.jsonl the
    judgements. Broken rows are named, counted and left out; an unreadable output is wrong."""
    source, style, template, own, load = choose_model(options)
    samples, broken = read_benchmark(options.benchmark, options.path, options.media)
    out = Path(options.out or config.ROOT / "runs" / "bench" / f"{options.benchmark}-{'-'.join(Path(source).parts[-2:])}-{options.mode}.json")
    weights = [file.stat().st_mtime_ns for file in sorted(Path(source).glob("*.safetensors"))]
    shown = [own.max_new_tokens, *(getattr(media.limits, name) for name in LIMITS[:3])]
    asked = {key: value for key, value in vars(options).items() if key not in ("out", "key_variable", *LIMITS)}
    state = {"state": [asked, source, weights, style, template, shown]}
    if out.suffix != ".json" or (out.exists() and not out.read_bytes().startswith(json.dumps(state, indent=1)[:-2].encode())):
        raise config.UserError(f"{out} is no .json file, or holds results of another model, benchmark or setting; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = stages.alone(out.with_suffix(".lock"), out)  # until this returns
    config.write_text(out, json.dumps(state, indent=1))
    ties = any(sample.label == 0 for sample in samples.values())
    texts = out.with_suffix(f".{hashlib.sha256(repr(samples).encode()).hexdigest()[:16]}.texts")
    rows = judge(*load(out.with_suffix(".replies.jsonl")), list(samples.values()), options.mode, own, ties, options.benchmark, (False, True), style,
                 template, file=texts)
    rows = [row | {"group": group_of(options.benchmark, row["id"])} for row in rows]
    data.write_jsonl(out.with_suffix(".jsonl"), rows)
    cells = benchmark_metrics(rows)
    config.write_text(out, json.dumps(state | {"broken": broken, "metrics": cells}, indent=1))
    print("".join(f"left out: {line}\n" for line in broken) + f"{source}, {options.mode}: {len(broken)} broken rows left out; {out}")
    print(f"{'%':<16}accuracy    95% interval   pairs  unreadable  orders agree")
    for name, cell in cells.items():
        unreadable, agree = percent(cell.get("unreadable")), percent(cell.get("orders_agree"))
        span = f"[{percent(cell['low'])}, {percent(cell['high'])}]"
        print(f"{name:<16}{percent(cell['accuracy']):>8}{span:>16}{cell.get('pairs', '-'):>8}{unreadable:>12}{agree:>14}")


def mcnemar(first: int, second: int) -> float:
    """Exact two-sided p of `first` against `second` discordant pairs: 2 P(X <= the smaller), X ~ Binomial(first + second, 1/2), at most 1."""
    return min(1.0, 2 * sum(math.comb(first + second, k) for k in range(min(first, second) + 1)) / 2 ** (first + second))


def compare(options) -> None:
    """Two results over the same pairs: the difference of accuracies with its paired bootstrap interval, and exact McNemar on the pairs that
    one of them judged better (where both orders were judged a pair can be half right, and this is the sign test). Of a run with several splits
    "all" and the tasks are those of its test split, as in its table."""
    read = lambda row, _: row | {key: row[key] for key in ("task", "id", "swapped", "label", "answer")}  # else it is no file of judgements
    if bare := [name for name in options.results if not Path(name).with_suffix(".jsonl").is_file()]:
        raise config.UserError(f"{bare[0]} has no judgements beside it: give FILE.json of a bench run, or runs/NAME/evaluate/STAGE-MODE.json")
    both = [data.read_rows(Path(name).with_suffix(".jsonl"), read) for name in options.results]
    one, two = ({(row["task"], row["id"], row["swapped"], row["label"]) for row in rows} for rows in both)
    marks = [stages.read_facts(Path(name).with_suffix(".json")) for name in options.results]
    judged = [mark["state"][:3] for mark in marks if "splits" in mark]  # of a run: what judged which pairs
    if len(judged) == 2 and judged[0][2] != judged[1][2]:
        raise config.UserError(f"{' and '.join(options.results)} judge different pairs: the runs have another seed or other data")
    for name, mark in zip(map(Path, options.results), marks):
        stage, run = name.stem.rpartition("-")[0], name.absolute().parent.parent
        if "splits" in mark and stages.made_by(stage, run) and mark["state"][:3] != judged_of(stage, run):
            raise config.UserError(f"{name} was judged before its checkpoint or its pairs were made again: run evaluate.py first")
    if one != two or not one:
        raise config.UserError(f"{' and '.join(options.results)} judge different pairs: {len(one)} and {len(two)} rows, {len(one & two)} in common")
    print(f"A {options.results[0]}\nB {options.results[1]}\n{'%':<22}  pairs       A       B   B - A    95% interval  A only  B only         p")
    scopes = [(key, name) for key in ("task", "group", "split") for name in sorted({row.get(key, "") for row in both[0]} - {""})]
    for key, name in [("", "all")] + scopes:
        counts = lambda row: row.get(key, "all") == name and (key == "split" or row.get("split", "test") == "test")
        a, b = (np.array([score for _, score in sorted(pair_scores(filter(counts, rows)).items())]) for rows in both)
        span, worse, better = "[{low:+.1f}, {high:+.1f}]".format_map(interval(100 * (b - a))), int((b < a).sum()), int((b > a).sum())
        print(f"{name:<22}{len(a):>7}{percent(a.mean()):>8}{percent(b.mean()):>8}{100 * (b - a).mean():>+8.1f}"
              f"{span:>16}{worse:>8}{better:>8}{mcnemar(worse, better):>10.3g}")
