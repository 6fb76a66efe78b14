"""Data: one preference pair, the prompt made of it, and the verdict read back.

Everything the other scripts know about the four tasks is here: their nouns, their dimensions, the exact verdict strings, the prompt
text, the text a teacher writes, and the parser that reads such text back. Files are JSON lines (or a JSON list) in the official schemas,

    GRPO   {"problem": "<image><image>...", "solution": "Image 1 is better", "images": [...]}
    SFT    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "images": [...]}

with the parts the prompt was made of ("task", "prompt", "answers", and the known "scores" and "reasons" of the small world) beside them,
or pairs of your own (a video is a file, a folder or a list of frames; label 0 is a tie; generation has no answers):

    {"id": "7", "task": "video_understanding", "prompt": "What happens?", "media": ["clip.mp4"], "answers": ["It rains.", "Snow."], "label": 1}

    python data.py --config small                           the small world, or the sources of [data] -> runs/small/data
    python data.py inspect PATH [--sheet FILE.png]          counts, bad rows, and a contact sheet of the first pairs
"""

import json
import os
import pkgutil
import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import config
import stages
from media import fit_clips, read_image

# ------------------------------------------------------------------------------------------------------------------ tasks

DIMENSIONS = {  # paper, section 3.1: what each task is judged on, from 1 to 10. The small world draws a fact for each (shapes.make_*, LADDER)
    "image_generation": ("semantic consistency", "aesthetics", "authenticity"),
    "video_generation": ("semantic consistency", "temporal coherence", "authenticity"),
    "image_understanding": ("semantic accuracy", "correctness", "clarity"),
    "video_understanding": ("semantic accuracy", "correctness", "clarity"),
}
TASKS = tuple(DIMENSIONS)
flip = lambda answer: {1: 2, 2: 1}.get(answer, answer)  # in the other order; a tie (0) and what is unreadable (None) stay
is_video = lambda task: task.startswith("video")
is_generation = lambda task: task.endswith("generation")


def candidate_noun(task: str) -> str:
    """What a candidate is called: "Image" and "Video" in generation, "Answer" in understanding."""
    return task.split("_")[0].capitalize() if is_generation(task) else "Answer"


def verdict_strings(task: str) -> dict:
    """{exact verdict: 1, 2 or 0 = tie}. Only the direct mode of generation asks for ties (paper, section 3.2)."""
    noun = candidate_noun(task)
    ties = {f"Both {noun.lower()}s are equally good": 0} if is_generation(task) else {}
    return {f"{noun} 1 is better": 1, f"{noun} 2 is better": 2, **ties}


def verdict_string(task: str, label: int) -> str:
    return next(text for text, answer in verdict_strings(task).items() if answer == label)


@dataclass
class Sample:
    """One preference pair. `media`: the two candidates of a generation task, or the one thing asked about; an image is a path, a video a list
    of frames (see `fit_clips`). `label`: 1 or 2 = the better candidate, 0 = tie, None = unknown. `scores` and `reasons`, known in the small
    world only: {dimension: [candidate 1, candidate 2]}. `problem`: the prompt text of an official row without parts; `response`: an SFT row's."""

    id: str
    task: str
    prompt: str = ""
    media: list = field(default_factory=list)
    answers: list = field(default_factory=list)
    label: int | None = None
    scores: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)
    problem: str = ""
    response: str = field(default="", compare=False)

    @property
    def can_swap(self) -> bool:
        """Whether it can be shown in the other order: not where the answers stand somewhere inside the text of an official row."""
        return is_generation(self.task) or not self.problem

    def swapped(self) -> "Sample":
        """The same pair in the other order: media, answers, scores *and* label change places together."""
        media = self.media[::-1] if is_generation(self.task) else self.media
        label = flip(self.label)
        swap = lambda values: {key: pair[::-1] for key, pair in values.items()}
        return Sample(self.id, self.task, self.prompt, media, self.answers[::-1], label, swap(self.scores), swap(self.reasons), self.problem)


# ---------------------------------------------------------------------------------------------------------------- prompts

STEPS = ("check", "score", "total", "decide")
THINK = "<think>"  # opened by the prompt in think mode, so that the completion starts inside the block


def media_parts(sample: Sample) -> list:
    """The content parts that show the pair, up to the instruction. Parts are in the chat format of transformers and OpenAI."""
    kind = "video" if is_video(sample.task) else "image"
    show = [{"type": kind, kind: item} for item in sample.media]
    if sample.problem:
        return show
    if is_generation(sample.task):
        named = [[{"type": "text", "text": f"{kind.capitalize()} {k}: "}, part] for k, part in enumerate(show, 1)]
        return sum(named, []) + [{"type": "text", "text": f"\nCaption: {sample.prompt}\n"}]
    answers = "".join(f"Answer {k}: {answer}\n" for k, answer in enumerate(sample.answers, 1))
    return show + [{"type": "text", "text": f"\nQuestion: {sample.prompt}\n{answers}"}]


def with_media(text: str, shown: list) -> list:
    """Content parts of a text whose <image> and <video> are where `shown` belongs; where they are not as many, it stands before the text."""
    texts = re.split("<image>|<video>", text)
    if len(texts) != len(shown) + 1:
        texts = [""] * len(shown) + ["".join(texts)]
    parts = [part for k, said in enumerate(texts) for part in ({"type": "text", "text": said}, *shown[k : k + 1])]
    return [part for part in parts if part.get("text", True)]


def build_prompt(sample: Sample, mode: str, style: str = "short", allow_tie: bool = False) -> list:
    """The user turn for one pair as content parts. `mode` "think" asks for reasoning in the format that `write_reasoning` writes and
    `parse_verdict` reads, "answer" for the bare verdict. `style` "short" only names the dimensions and the steps, which a model that
    was trained on them understands; "full" explains them to a model that never saw the task. `allow_tie`: direct mode of generation. A sample's own
    text (`problem`) is kept instead; in "answer" mode one that asks for <think> gets a line to leave that out."""
    noun, dimensions = candidate_noun(sample.task), DIMENSIONS[sample.task]
    ties = allow_tie and mode == "answer" and is_generation(sample.task)
    choices = " or ".join(f"<answer>{text}</answer>" for text in list(verdict_strings(sample.task))[: 3 if ties else 2])
    if sample.problem:
        text = sample.problem
        if mode == "answer" and THINK in text:  # the official rows ask for reasoning, which the direct controls are to do without
            text += f"\nLeave the reasoning out: write exactly one of {choices} and nothing else."
        return with_media(text, media_parts(sample))
    if style == "short":
        direct = f"Which is better, {noun} 1 or {noun} 2{', or are both equally good' if ties else ''}? Answer directly."
        text = steps_text(sample.task, dimensions, STEPS) if mode == "think" else direct
    else:
        generation = "how well it fits the caption and how well it is made"
        asked = generation if is_generation(sample.task) else "how well it answers the question about what is shown"
        text = f"Two candidates, {noun} 1 and {noun} 2, are to be compared by {asked}.\n"
        text += f"Do not explain. Write exactly one of: {choices}" if mode == "answer" else (
            f"Work inside <think> and </think>. Take these dimensions one after the other: {', '.join(dimensions)}; add one or two of your own "
            f"only where the pair calls for it. Give each dimension a numbered item, and in it, for {noun} 1 and for {noun} 2, first what you "
            f"observe and then a whole-number score from 1 to 10 written as (x/10). Close with a line that starts with \"Total score:\" and "
            f"writes out both sums, for example \"{noun} 1: 7+8+6=21. {noun} 2: 9+6+5=20.\" The larger sum wins; keep the sums from being equal.\n"
            f"Then, on a new line, write exactly one of: {choices}")
    return media_parts(sample) + [{"type": "text", "text": text}]


def steps_text(task: str, dimensions, steps) -> str:
    """Instruction of the short style. The base model practises pieces of the steps, never all four (see base.pretrain.practice)."""
    noun = candidate_noun(task)
    return f"Compare {noun} 1 and {noun} 2 on {', '.join(dimensions)}. Steps: {', '.join(steps)}."


def fill_template(template: str, sample: Sample, mode: str) -> str:
    """A prompt text of the user's own (--prompt-file) for one pair, to be its `problem` (see with_media): it replaces all other text."""
    values = {"noun": candidate_noun(sample.task), "prompt": sample.prompt, "dimensions": ", ".join(DIMENSIONS[sample.task]),
              "verdicts": " or ".join(list(verdict_strings(sample.task))[: 2 if mode == "think" else 3])}
    values |= {f"answer_{k}": answer for k, answer in enumerate(sample.answers, 1)}
    values = {name: re.sub("<(?=(image|video)>)", "< ", value) for name, value in values.items()}  # pictures stand where the template says
    try:
        return template.format_map(values)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise config.UserError(f"prompt file, at {error}: the placeholders of {sample.task} are {', '.join(values)}; a brace is written {{{{ or }}}}")


# -------------------------------------------------------------------------------------------------------------- reasoning

def write_items(noun: str, reasons: dict, scores: dict) -> str:
    """One numbered line per dimension; `noun` "Image" names the candidates "Image 1" and "Image 2" (one candidate: plain "Image")."""
    lines = []
    for number, dimension in enumerate(reasons, 1):
        pairs = list(zip(reasons[dimension], scores[dimension]))
        said = [f"{noun}{f' {k}' if len(pairs) > 1 else ''}: {reason} ({score}/10)." for k, (reason, score) in enumerate(pairs, 1)]
        lines.append(f"{number}. {dimension.capitalize()}: {' '.join(said)}")
    return "\n".join(lines)


def write_totals(noun: str, scores: dict) -> str:
    sums = [[pair[k] for pair in scores.values()] for k in (0, 1)]
    return "Total score: " + " ".join(f"{noun} {k}: {'+'.join(map(str, values))}={sum(values)}." for k, values in enumerate(sums, 1))


def write_reasoning(task: str, reasons: dict, scores: dict, verdict: str) -> str:
    """The chain of thought of paper figure 2: items, totals, verdict. `parse_verdict` is its inverse."""
    noun = candidate_noun(task)
    return f"{THINK}{write_items(noun, reasons, scores)}\n{write_totals(noun, scores)}</think>\n<answer>{verdict}</answer>"


@dataclass
class Verdict:
    """What `parse_verdict` read. `scores` and `reasons`: {dimension: {candidate: value}}; `totals`: {candidate: stated sum};
    `sums_ok`: all items score both, and each stated sum has these terms and adds up; `consistent`: sums_ok and the verdict follows from them."""

    answer: int | None
    format_ok: bool
    scores: dict
    reasons: dict
    totals: dict
    sums_ok: bool
    consistent: bool


INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # text without tags
# The whole text: one non-empty think block without tags inside, white space, one answer block, and nothing else.
FORMAT = re.compile(rf"<think>(?!\s*</think>){INSIDE}</think>\s*<answer>{INSIDE}</answer>", re.DOTALL)
# A dimension: "2. Name:" at the start of a line or after the end of a sentence, so that "the sign says 3. Well, then: ..." opens none.
HEADING = re.compile(r"(?:^ ?|(?<=\n)|(?<=\s\s)|(?<=[.)!?:] ))\d{1,2}\. {0,3}\**([^\W\d_](?:[^\W\d_]|[ &/'’,()-]){1,60}?)\** {0,3}:")
NUMBER = r"\d{1,3}(?:\.\d)?"


def parse_answer(text: str, task: str) -> int | None:
    """1, 2, 0 = tie, or None = unreadable. The verdict is the content of the one answer block after </think> (of the one block, if
    there is no reasoning) and must be one of the task's strings to the letter: reasoning that merely mentions a verdict decides nothing."""
    if "<think>" in text or "</think>" in text:
        text = text.partition("</think>")[2]
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    block = re.search(r"<answer>(.*)</answer>", text, re.DOTALL)
    return verdict_strings(task).get(block.group(1).strip()) if block else None


def parse_verdict(text: str, task: str) -> Verdict:
    """Reads a judgement. Scores are bound to the candidate *named* before them, never to position: candidates may swap places within a
    dimension, stand on lines of their own, and dimensions may be added. A dimension that scores a candidate twice is left out."""
    noun = candidate_noun(task)
    answer, format_ok = parse_answer(text, task), FORMAT.fullmatch(text) is not None
    thought, _, closing = text.partition("</think>")[0].rpartition(THINK)[2].partition("Total score")
    scores, reasons = {}, {}
    pieces = HEADING.split(thought)  # what stands before the first heading, then headings and items by turns
    for heading, item in zip(pieces[1::2], pieces[2::2]):
        found = {}
        # Where candidates are announced with a colon only that binds: "Image 1: sharper than Image 2 (9/10)" scores Image 1.
        mention = rf"\b{noun} ([12])\b" + (r"\** {0,3}:" if re.search(rf"\b{noun} [12]\** {{0,3}}:", item) else "")
        candidate, start = None, 0
        for match in re.finditer(rf"{mention}|\(({NUMBER})/10\)", item):
            if match.group(1):
                candidate, start = int(match.group(1)), match.end()
            elif candidate:
                found.setdefault(candidate, []).append((float(match.group(2)), item[start : match.start()].strip()))
        if found and all(len(entries) == 1 for entries in found.values()):
            dimension = heading.strip().lower()
            scores[dimension] = {k: entries[0][0] for k, entries in found.items()}
            reasons[dimension] = {k: entries[0][1] for k, entries in found.items()}
    stated = {}
    for match in re.finditer(rf"\b{noun} ([12])\b[:*\s]{{0,9}}({NUMBER}(?:\s*\+\s*{NUMBER})*)\s*=\s*({NUMBER})", closing):
        stated.setdefault(int(match.group(1)), ([float(term) for term in match.group(2).split("+")], float(match.group(3))))
    totals = {k: total for k, (_, total) in stated.items()}
    sums_ok = set(stated) == {1, 2} and len(scores) == len(pieces) // 2 > 0 and all(len(pair) == 2 for pair in scores.values()) and all(
        abs(sum(terms) - total) < 0.05 and sorted(terms) == sorted(pair[k] for pair in scores.values())
        for k, (terms, total) in stated.items()
    )
    follows = sums_ok and answer == (0 if totals[1] == totals[2] else 1 if totals[1] > totals[2] else 2)
    return Verdict(answer, format_ok, scores, reasons, totals, sums_ok, follows)


def share_right(found: dict, truth: dict) -> float | None:
    """The share of a Verdict's scores or reasons that equal a Sample's; None where the truth is not known."""
    right = [found.get(dimension, {}).get(k) == value for dimension, pair in truth.items() for k, value in enumerate(pair, 1)]
    return sum(right) / len(right) if right else None


# ------------------------------------------------------------------------------------------------------------------ files

def to_text(parts: list) -> tuple:
    """Content parts -> (text with <image> and <video> placeholders, flat list of files), as the official schemas hold them."""
    text = "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts)
    files = [item for part in parts if part["type"] != "text" for item in flat(part[part["type"]])]
    return text, files


def from_text(text: str, files: list) -> list:
    """The inverse of `to_text`: an <image> takes one file, the <video>s share the rest evenly; ValueError where that does not come out."""
    kinds, rest = re.findall("<(image|video)>", text), iter(files)
    pictures, clips = kinds.count("image"), kinds.count("video")
    length = (len(files) - pictures) // clips if clips else 0
    if len(files) != pictures + clips * length or (clips and not length):
        raise ValueError(f"{pictures} <image> and {clips} <video> do not go with {len(files)} files")
    return with_media(text, [{"type": kind, kind: [next(rest) for _ in range(length)] if kind == "video" else next(rest)} for kind in kinds])


def sample_row(sample: Sample) -> dict:
    """The official GRPO row of a sample, with the sample's own parts beside it."""
    problem, files = to_text(build_prompt(sample, "think"))
    row = {"id": sample.id, "task": sample.task, "problem": problem, "images": files} | ({} if sample.problem else {"prompt": sample.prompt})
    if sample.label is not None:
        row["solution"] = verdict_string(sample.task, sample.label)
    return row | {key: getattr(sample, key) for key in ("answers", "scores", "reasons", "response") if getattr(sample, key)}


def sft_row(sample: Sample, response: str) -> dict:
    """The official SFT row: the prompt of `sample` and the text the model is to learn."""
    row = sample_row(replace(sample, response=""))
    return row | {"mode": "think", "conversations": [{"from": "human", "value": row.pop("problem")}, {"from": "gpt", "value": response}]}


def row_sample(row: dict, root: Path) -> Sample:
    """A row of any schema -> Sample. An official row without our parts is read by its verdict and its files; ValueError where they do not tell."""
    files = [str(root / file) for file in flat(row.get("images", row.get("image", [])))]
    response = row["conversations"][1]["value"] if "conversations" in row else ""
    text = row.get("solution", response)  # tells the label, with or without tags
    text = text if "<answer>" in text else f"<answer>{text}</answer>"
    video = len(files) != 1 or "<video>" in f"{row.get('problem')}{row.get('conversations')}"
    told = [task for task in TASKS if parse_answer(text, task) is not None][:: -1 if video else 1]  # understanding: the same verdicts
    task = row.get("task") or next(iter(told), "")
    if task not in TASKS:
        raise ValueError((f"unknown task {task!r}; " if task else "no task and no verdict that tells it; ") + f'"task" is one of {", ".join(TASKS)}')
    if not row.keys() & {"prompt", "media", "problem", "conversations"}:
        raise ValueError('no pair: neither "prompt" and "media" nor "problem" or "conversations"')
    clips = (2 if is_generation(task) else 1) if is_video(task) else 0
    if clips and len(files) % clips:
        raise ValueError(f"{len(files)} frames are no two videos of equal length")
    media = [files[k * len(files) // clips : (k + 1) * len(files) // clips] for k in range(clips)] if clips else files
    if "media" in row:
        media = [str(root / item) if isinstance(item, str) else [str(root / file) for file in item] for item in flat(row["media"])]
    problem = "" if "prompt" in row or "media" in row else row.get("problem") or row["conversations"][0]["value"]
    label, parts = row.get("label", parse_answer(text, task)), (row.get("prompt", ""), media, row.get("answers", []))
    known = {"response": response} | ({} if "media" in row else row)  # "scores" of one's own may be anything
    return Sample(str(row.get("id", "")), task, *parts, label, known.get("scores", {}), known.get("reasons", {}), problem, known["response"])


def read_rows(path, read, choose=None, bad: list | None = None, label: str = "") -> list:
    """[read(row, folder of the file)] of a JSON lines file or a JSON list. `choose` picks among the rows; `bad` takes what is wrong with which
    line of the file, without it the first such row is fatal."""
    text = config.read_text(path)
    listed = text.lstrip().startswith("[")
    try:
        lines = json.loads(text) if listed else text.split("\n")  # splitlines would cut at U+2028 too
    except (ValueError, RecursionError) as error:
        raise config.UserError(f"cannot read {path}: {error}")
    rows = [(f"{'row' if listed else 'line'} {number}", line) for number, line in enumerate(lines, 1) if listed or line.strip()]
    made, rows = [], choose(rows) if choose else rows
    for place, row in config.progress(rows, label) if label else rows:
        try:
            value = row if listed else json.loads(row)
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could be neither tokenised nor written again
            made.append(read(value, Path(path).parent))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, OSError, RecursionError, config.UserError) as error:
            kind = "" if type(error) in (ValueError, config.UserError) else f"{type(error).__name__}: "
            said = config.one_line(f"{path}, {place}: {kind}{error}")
            if bad is None:
                raise config.UserError(said)
            bad.append(said)
    return made


def row_conversation(row: dict, root: Path) -> tuple:
    """An SFT row -> (content parts, response text). A row with a sample's parts is prompted anew from them."""
    human, response = (turn["value"] for turn in row["conversations"])
    if "mode" in row:
        return build_prompt(row_sample(row, root), row["mode"]), response
    return from_text(human, [str(root / file) for file in row.get("images", [])]), response


flat = lambda item: list(item) if isinstance(item, (list, tuple)) else [item]
read_jsonl = lambda path: read_rows(path, lambda row, _: row)  # the rows of a file as they are; a fault in one is fatal
read_samples = lambda path: read_rows(path, row_sample)  # as Samples
read_conversations = lambda path: read_rows(path, row_conversation)  # as [(content parts, response)]


def write_jsonl(path, rows) -> None:
    """Writes the whole file or nothing: a reader never sees half of it. Files of "images" are named from the file's own folder, so a
    run folder can be moved."""
    folder, lines = Path(path).parent, []
    for row in rows:
        if "images" in row:
            row = row | {"images": [os.path.relpath(file, folder) if os.path.isabs(file) else file for file in row["images"]]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    config.write_text(Path(path), "".join(lines))


# ------------------------------------------------------------------------------------------------------- stage and sources

def run(stage: str, settings: config.Settings, out: Path) -> str:
    """Reads each split from its sources, or draws it: the small world, whose two further tests go along with its own only."""
    import shapes  # here, because the small world itself is written in this file's terms

    splits = ["distill", "pool", "test"]
    named = [split for split in splits if getattr(settings.data, split)]
    for split in [split for split in splits if named and split not in named]:
        print(f"   {split}: data.{split} names no files, so pairs of the small world are drawn", flush=True)
    splits += ["heldout", "ties"] * (not settings.data.test)
    counts = {split: (write_sources if split in named else shapes.draw_split)(split, settings, out) for split in splits}
    if named:
        config.wait_for_all()  # the first process has written them
        made = {split: read_samples(out / f"{split}.jsonl") for split in splits}
        if len({bool(s.problem) for some in made.values() for s in some}) > 1:
            print("   some pairs bring prompts of their own, others are in parts: who learns from the one kind is judged with the other", flush=True)
        if "test" in named:
            content = lambda s: (s.task, s.prompt, s.problem, *sorted(map(str, s.media)), *sorted(s.answers))
            learnt, tested = ({content(s) for split in some for s in made[split]} for some in (splits[:2], splits[2:]))
            if twice := len(learnt & tested):
                print(f"   test: {twice} of its pairs are learnt from, too", flush=True)
    return ", ".join(f"{split} {count}" for split, count in counts.items()) + " pairs"


def pick(rows: list, strategy: str, rng) -> list:
    """"all", "first:N", "end:N", "random:N" or "N%" (a random share, rounded up) of `rows`, in their order."""
    kind, _, number = strategy.removesuffix("%").rpartition(":")
    count = len(rows) if number == "all" else -(-len(rows) * int(number) // 100) if strategy.endswith("%") else int(number)
    chosen = sorted(rng.sample(range(len(rows)), min(count, len(rows))))
    return rows[:count] if kind == "first" else rows[max(0, len(rows) - count) :] if kind == "end" else [rows[k] for k in chosen]


def usable(row: dict, folder: Path, own: config.Data) -> Sample:
    """The pair of a row, its videos fitted; ValueError or UserError says why it is of no use. All media are decoded: better here than hours later.
    A row written by a stranger shows nothing from outside own.media_within (or the folder its paths begin at), wherever `..` and links lead."""
    root = Path(os.path.realpath(own.image_root or folder))
    sample, within = row_sample(row, root), os.path.realpath(own.media_within or root)
    if any(len(pair) != 2 for pair in [*sample.scores.values(), *sample.reasons.values()]):
        raise ValueError("scores and reasons hold a pair for each dimension")
    allowed, media, texts = list(verdict_strings(sample.task).values()), 2 if is_generation(sample.task) else 1, [sample.prompt] + sample.answers
    if type(sample.label) is not int or sample.label not in allowed:
        raise ValueError(f"the label (or the verdict in its place) is {sample.label!r}; {sample.task} has {', '.join(map(str, allowed))}")
    if len(sample.media) < media or len(sample.media) > media == 2:
        raise ValueError(f"{len(sample.media)} media; {sample.task} has {media}")
    if sample.task == "video_understanding" and len(sample.media) > 1:
        raise ValueError(f"{len(sample.media)} media; {sample.task} has one, whose frames are a list in the list: [[...]]")
    if sample.problem and not re.sub("<image>|<video>", "", sample.problem).strip():
        raise ValueError("the prompt is empty")
    if not sample.problem and (len(texts) != 5 - 2 * media or not all(isinstance(text, str) and text.strip() for text in texts)):
        raise ValueError("the prompt is empty, or there are not two answers with text in them (generation: none)")
    if (length := len("".join(texts) + sample.problem)) > 100_000:  # whether it fits the model is seen when it is tokenised
        raise ValueError(f"{length} characters of text; at most 100000 are taken")
    sample.media = fit_clips(sample.media, own.frames, own.pair_frames) if is_video(sample.task) else sample.media
    for file in sum(map(flat, sample.media), []):
        if not Path(os.path.realpath(re.sub("#[0-9]+of[0-9]+$", "", file))).is_relative_to(within):
            raise ValueError(f"{file} lies outside of {within}; if that is meant, name a folder around both in data.media_within")
    for item in sample.media:
        if len({read_image(file).size for file in (item if is_video(sample.task) else [item])}) > 1:
            raise ValueError(f"the frames of {item[0]} ... differ in size")
    return sample


def sources(split: str, own: config.Data) -> list:
    """[(source, path, strategy of `pick`)] of the mix that own.distill, pool or test names."""
    found = filter(None, map(str.strip, getattr(own, split).split(",")))
    return [(source, *re.fullmatch(r"(.+?)(?:@(all|(?:first|end|random):[0-9]+|[0-9]+%))?", source).groups("all")) for source in found]


def write_sources(split: str, settings: config.Settings, out: Path) -> int:
    """Reads the mix of sources of a split into out/SPLIT.jsonl; returns the number of pairs. Reasoning is a forced choice: ties are left out."""
    own, rng, bad, samples = settings.data, random.Random(f"{settings.run.seed}/{split}"), [], []
    for source, path, strategy in sources(split, own):
        if not Path(path).is_file():
            raise config.UserError(f"data.{split}: no file {path}; a source is PATH, PATH@all, PATH@first:N, PATH@end:N, PATH@random:N or PATH@N%")
        read, choose, before = lambda row, folder: usable(row, folder, own), lambda rows: pick(rows, strategy, rng), len(samples)
        samples += read_rows(path, read, choose, bad, f"{split}: {path}")
        print(f"   {split}: {len(samples) - before} pairs from {source}", flush=True)
    print("".join(f"   bad row: {line}\n" for line in bad), end="", flush=True)
    kept = [sample for sample in samples if sample.label != 0]
    print(f"   {split}: {len(bad)} bad rows, {len(samples) - len(kept)} ties", flush=True)
    if not kept or (bad and own.on_error != "skip"):
        raise config.UserError(f"data.{split}: {len(kept)} pairs, {len(bad)} bad rows; repair them or set data.on_error to skip. {''.join(bad[:1])}")
    for number, sample in enumerate(kept):
        sample.id = f"{split}-{number:06d}-{sample.id}".removesuffix("-")  # judgements are kept by id: no two may be alike
    write_jsonl(out / f"{split}.jsonl", map(sample_row, kept))
    return len(kept)


if __name__ == "__main__":
    stages.main("data", {"inspect": lambda arguments: pkgutil.resolve_name("results.sheet:inspect")(arguments)})
