"""The report: a run folder as one HTML file that opens anywhere, without network and without a server.

Captions, answers and model text are somebody else's: in the markup they are escaped; to the script they go as JSON in which every "<"
is escaped, and it shows them as text nodes only; the page's policy lets no other script run and nothing be loaded.

    python report.py runs/small        writes runs/small/evaluate/report.html, also while the run is going: what is missing is left out
"""

import base64
import hashlib
import io
import json
import math
import random
import string
import sys
from html import escape
from pathlib import Path

from PIL import Image

import config
import data
import stages
from media import fit_clips, read_image

SPLITS = ("test", "heldout", "ties")
PAIRS, BYTES = 400, 12_000_000  # at most so many pairs in the browser, and so much JSON, pictures included
FRAMES, SIDE = 8, 192  # at most so many frames of a clip, and no picture larger than this

QUALITY = {  # metric of evaluate.summarise: its column
    "format_ok": "format", "sums_ok": "sums right", "consistent": "follows", "scores_right": "scores right", "facts_right": "facts right",
    "orders_agree": "orders agree", "first_chosen": "first chosen", "unreadable": "unreadable"}
CURVES = {  # metric of metrics.jsonl: unit of its y axis
    "loss": "nats per token", "reward_accuracy": "share", "reward_format": "share", "reward_consistency": "share", "reward_dimension": "share",
    "kl": "nats per token", "length": "tokens", "entropy": "nats per token", "zero_variance_share": "share", "clip_share": "share",
    "grad_norm": "before clipping"}

# ---------------------------------------------------------------------------------------------------------------- reading

def read_rows(path: Path) -> list:
    """Rows of a JSON lines file that may be growing: the line that is just being written, without its end, is left out."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    try:
        return [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError as error:
        raise config.UserError(f"{path} is damaged: {config.one_line(error)}; make its stage again with --force, or delete the file")


def judged_of(stage: str, out: Path) -> list:
    """The checkpoint and the pairs that the judgements of a stage are of, as they are now."""
    files = {split: out / "data" / f"{split}.jsonl" for split in SPLITS}
    return [stages.made_by(stage, out), stages.made_by("data", out), {split: stages.digest(file) for split, file in files.items() if file.is_file()}]


def read_results(out: Path) -> list:
    """The rows of the stage table, of the checkpoints judged so far: evaluate.py writes a file for each. What was judged before its checkpoint or
    the pairs were made again is left out."""
    judged = {row: stages.read_facts(out / "evaluate" / f"{row[1]}-{row[2]}.json") for row in stages.ROWS}
    return [dict(zip(("name", "stage", "mode"), row)) | made for row, made in judged.items() if made.get("state", [])[:-1] == judged_of(row[1], out)]


# ----------------------------------------------------------------------------------------------------------------- tables

def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def tables(results: list) -> dict:
    """The stage table in four parts, {part: (title, width of a column, heads, [[name, cell, ...]])}; a cell is a share, a dict with its interval
    as well, or None."""
    lines = lambda cells: [[row["name"], *cells(row)] for row in results]
    accuracy = lambda split: lines(lambda row: [row["splits"][split].get(scope) for scope in (*data.TASKS, "all")])
    tasks = [task.replace("_", " ").replace("understanding", "und.").replace("generation", "gen.") for task in data.TASKS] + ["all pairs"]
    return {"test": ("accuracy % on the test split, both orders, 95% interval", 18, tasks, accuracy("test")),
            "heldout": ("accuracy % on colour-shape pairs never trained on", 18, tasks, accuracy("heldout")),
            "quality": ("the reasoning on the test split, % (follows: sums add up and the verdict follows from them)", 12, QUALITY.values(),
                        lines(lambda row: [row["splits"]["test"]["all"].get(key) for key in QUALITY])),
            "ties": ("generation pairs of which a third are ties, %", 14, ("diff", "tau", "tau calibrated"),
                     lines(lambda row: [row["ties"].get(key) for key in ("diff", "tau", "tau_calibrated")]))}


def is_empty(lines: list) -> bool:
    """Whether nothing was judged of what a part is about: a test of one's own has no held-out pairs and no ties beside it."""
    return all(cell is None for _, *cells in lines for cell in cells)


def markup(heads: list, lines: list) -> str:
    if is_empty(lines):
        return '<p class="muted">No checkpoint has been judged on such pairs.</p>'
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{meter(cell)}</td>" for cell in cells)}</tr>' for name, *cells in lines)
    return f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def meter(cell) -> str:
    if not isinstance(cell, dict):
        return percent(cell)
    value, low, high = (percent(cell[key]) for key in ("accuracy", "low", "high"))
    return f"""<b>{value}</b> <small>{low}–{high}</small><svg class="meter" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
<rect class="fill" width="{value}" height="8"/><path d="M50 0V8"/><path class="whisker" d="M{low} 4H{high}"/></svg>"""


# ----------------------------------------------------------------------------------------------------------------- curves

def curve(values: list, name: str, unit: str) -> str:
    """Every step as a thin line, the mean of its neighbourhood as a thick one; nothing where there are no values."""
    values = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if not values:
        return ""
    count, reach = len(values), max(1, len(values) // 30)
    smooth = [sum(near) / len(near) for near in (values[max(0, k - reach) : k + reach + 1] for k in range(count))]
    low = 0.0 if 0 <= min(values) <= max(values) / 2 or unit == "share" else min(values)
    high = 1.0 if unit == "share" and max(values) > 0.2 else max(values) if max(values) > low else low + 1
    x, y = lambda k: 44 + 246 * k / max(1, count - 1), lambda value: 122 - 106 * (value - low) / (high - low)
    points = lambda line: " ".join(f"{x(k):.1f},{y(line[k]):.1f}" for k in range(0, count, math.ceil(count / 400)))
    said = f"{name}: from {smooth[0]:.3g} to {smooth[-1]:.3g} in {count} steps"
    ticks = "".join(f'<path class="rule" d="M44 {y(value):.1f}H290"/><text x="40" y="{y(value) + 3:.1f}" class="end">{value:.3g}</text>'
                    for value in (low, (low + high) / 2, high))
    return f"""<svg viewBox="0 0 300 140" role="img" aria-label="{said}">{ticks}<text x="44" y="9">{unit}</text>
<text x="44" y="136">1</text><text x="167" y="136" class="mid">step</text><text x="290" y="136" class="end">{count}</text>
<polyline class="raw" points="{points(values)}"/><polyline points="{points(smooth)}"/></svg>"""


def states_and_curves(out: Path) -> dict:
    """{"STAGE_state": what the stage reported, "STAGE_METRIC": a curve} for every stage."""
    made = {}
    for stage in stages.STAGES:
        done, rows = stages.read_facts(out / stage / "done.json"), read_rows(out / stage / "metrics.jsonl")
        state = f'{escape(str(done["made"]))} ({done["seconds"]:,.0f} s)' if done else "not finished" + f", {len(rows)} steps so far" * bool(rows)
        made[f"{stage}_state"] = f'<span class="{"made" if done else "muted"}">{state}</span>'
        made |= {f"{stage}_{key}": curve([row.get(key) for row in rows], key, unit) for key, unit in CURVES.items()}
    return made


# ------------------------------------------------------------------------------------------------------- browser of pairs

def strip(item) -> Image.Image:
    """One image, or frames of a clip side by side, none larger than SIDE."""
    frames = [read_image(file) for file in (fit_clips([item], FRAMES)[0] if isinstance(item, list) else [item])]
    for frame in frames:
        frame.thumbnail((SIDE, SIDE))
    made = Image.new("RGB", (sum(frame.width + 1 for frame in frames) - 1, max(frame.height for frame in frames)), (128, 128, 128))
    for k, frame in enumerate(frames):
        made.paste(frame, (sum(before.width + 1 for before in frames[:k]), 0))
    return made


def picture(item) -> dict | None:
    """A strip as a data URI with the width to show it at; None where it cannot be read."""
    try:
        made, stream = strip(item), io.BytesIO()
    except config.UserError:
        return None
    kind = "png" if made.height <= 64 else "jpeg"  # a small picture is kept without loss and scaled up by a whole number
    made.save(stream, kind)
    source = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"src": source, "width": made.width * (96 // made.height if kind == "png" else 1), "small": kind == "png"}


def said_by(judged: dict, sample: data.Sample) -> dict:
    """What one stage said about a pair. `scores`: [dimension, [its scores], [true scores] or null], added dimensions last."""
    dimensions = dict.fromkeys([*sample.scores, *judged["scores"]]) if judged["scores"] else {}
    scores = [[dimension, [judged["scores"].get(dimension, {}).get(k) for k in ("1", "2")], sample.scores.get(dimension)] for dimension in dimensions]
    right = judged["answer"] is not None and judged["answer"] == sample.label
    return {"right": right, "answer": verdict(sample.task, judged["answer"]), "text": judged["text"], "scores": scores}


def verdict(task: str, answer: int | None, otherwise: str = "unreadable") -> str:
    return {number: text for text, number in data.verdict_strings(task).items()}.get(answer, otherwise)


def choose_pairs(samples: dict, judged: list) -> list:
    """[(split, id)] of judged pairs: first those on which stages disagree; tasks and splits are mixed."""
    keys = [key for key in samples if any(key in rows for rows in judged)]
    agree = {key: len({rows[key]["answer"] for rows in judged if key in rows}) == 1 for key in keys}
    return sorted(random.Random(0).sample(keys, len(keys)), key=agree.get)


def browser_data(out: Path, results: list) -> dict:
    """What the script shows: {"stages": [name], "full": index of the full model's, "pairs": [...], "of": number of judged pairs}."""
    drawn = {split: out / "data" / f"{split}.jsonl" for split in SPLITS}
    samples = {(split, sample.id): sample for split, file in drawn.items() if file.is_file() for sample in data.read_samples(file)}
    files = [out / "evaluate" / f"{row['stage']}-{row['mode']}.jsonl" for row in results]
    judged = [{(row["split"], row["id"]): row for row in read_rows(file) if not row["swapped"]} for file in files]
    chosen, pairs, size = choose_pairs(samples, judged), [], 0
    for key in chosen[:PAIRS]:
        sample = samples[key]
        facts = [[dimension, list(zip(pair, sample.reasons.get(dimension, ["", ""])))] for dimension, pair in sample.scores.items()]
        pairs.append({"id": sample.id, "split": key[0], "task": sample.task, "noun": data.candidate_noun(sample.task),
                      "prompt": sample.prompt or sample.problem, "answers": sample.answers, "media": [picture(item) for item in sample.media],
                      "label": verdict(sample.task, sample.label, "unknown"), "facts": facts,
                      "said": [said_by(rows[key], sample) if key in rows else None for rows in judged]})
        size += len(json.dumps(pairs[-1]))
        if size > BYTES:
            break
    full = next((k for k, row in enumerate(results) if (row["stage"], row["mode"]) == ("grpo", "think")), len(results) - 1)
    return {"stages": [row["name"] for row in results], "full": full, "pairs": pairs, "of": len(chosen)}


def write(out: Path) -> Path:
    """Writes out/evaluate/report.html from what is in the run folder `out`, and returns its path."""
    results = read_results(out)
    judged = browser_data(out, results)
    page = (config.ROOT / "report_page.html").read_text(encoding="utf-8")
    script = base64.b64encode(hashlib.sha256(page.rpartition("<script>")[2].partition("</script>")[0].encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    values = {**states_and_curves(out), **{part: markup(*shown) for part, (_, _, *shown) in tables(results).items()}, "policy": policy,
              "title": f"Report of the run {escape(out.resolve().name)}", "data": json.dumps(judged, separators=(",", ":")).replace("<", "\\u003c"),
              "judged": f"{len(judged['pairs'])} of {judged['of']} judged pairs." if judged["pairs"] else "Nothing has been judged yet."}
    page = string.Template(page).substitute(values)
    (out / "evaluate").mkdir(parents=True, exist_ok=True)
    config.write_text(out / "evaluate" / "report.html", page)
    return out / "evaluate" / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not stages.is_run(Path(sys.argv[1])):
        stages.give_up(f"python report.py RUN_FOLDER: {' '.join(sys.argv[1:]) or 'nothing'} holds no run")
    try:
        print(write(Path(sys.argv[1])))
    except (config.UserError, OSError) as error:
        stages.give_up(config.one_line(error))
