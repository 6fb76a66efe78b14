"""The small world: scenes of coloured shapes whose every score is known.

A real preference set tells which candidate people liked, never *why*. Here the reasons are drawn first and the pictures after them, by code
and from a seed, so that a model's reasoning can be graded line by line, not only its verdict. A candidate's score on a dimension is a *fact*
turned into a number, and the better candidate is the one with the larger total:

    dimension                                 fact written in the reasoning                      score
    semantic consistency, semantic accuracy   "red circle yes, blue star no, moves left yes"     10, minus 3 for each "no"
    correctness                               "says 3, is 4"; of a clip "says left, is right"    10, 7 if nearly right, else 4
    the others                                "vivid", "one broken", "two fillers", ...          see LADDER

Faded colours and fillers are seen at a glance; whether every item of a caption is in the picture has to be checked item by item, and the
total has to be added up. That is the part thinking is for.

A scene is 32x32 pixels, four cells of 16x16 with at most one shape each; a clip is four frames in which one shape moves to a free
cell. One merged vision token of the small backbone sees exactly one cell.
"""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageDraw

import config
import model as M
from data import (DIMENSIONS, STEPS, TASKS, THINK, Sample, build_prompt, candidate_noun, is_generation, is_video, media_parts, sample_row,
                  steps_text, to_text, verdict_string, write_items, write_jsonl, write_totals)

COLORS = {"red": (214, 48, 44), "green": (46, 160, 67), "blue": (45, 88, 214), "yellow": (238, 200, 40),
          "purple": (146, 62, 190), "black": (35, 35, 40)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Never drawn or named outside the held-out split. Every colour and every shape is still seen, in other company.
HELDOUT = {("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "square"), ("black", "star")}
ALL = [(color, shape) for color in COLORS for shape in SHAPES]
SEEN = [item for item in ALL if item not in HELDOUT]
name = " ".join  # of an item: ("red", "star") is a "red star"
SIDE, CELL, FRAMES, PAPER = 32, 16, 4, (238, 238, 238)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

LADDER = {  # facts of the dimensions that are seen at a glance, best first, with their scores
    "aesthetics": (("vivid", 9), ("pale", 7), ("faded", 4)),
    "temporal coherence": (("steady", 9), ("flicker", 7), ("blank frame", 4)),
    "authenticity": (("none broken", 10), ("one broken", 8), ("two broken", 5)),
    "clarity": (("fluent", 9), ("one filler", 7), ("two fillers", 4)),
}
POSSIBLE = (1, 4, 5, 7, 8, 9, 10)  # every score that a fact can earn

# ---------------------------------------------------------------------------------------------------------------- drawing


def draw_shape(draw: ImageDraw.ImageDraw, item: tuple, x: float, y: float, radius: float, broken: bool) -> None:
    """One shape centred on (x, y); a broken one is torn in two by a slanted gap."""
    color, shape = COLORS[item[0]], item[1]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle((x - radius * 0.85, y - radius * 0.85, x + radius * 0.85, y + radius * 0.85), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius * 0.9), (x - radius, y + radius * 0.9)], fill=color)
    elif shape == "star":
        points = [(radius if k % 2 == 0 else radius * 0.42, math.pi * k / 5 - math.pi / 2) for k in range(10)]
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in points], fill=color)
    else:
        arm = radius * 0.36
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
    if broken:
        draw.line((x - radius, y + radius * 0.6, x + radius, y - radius * 0.6), fill=PAPER, width=4)


def draw_scene(scene: dict) -> list:
    """One picture, or FRAMES pictures of a clip, of `scene` (see `make_scene`). The same scene always gives the same pixels."""
    jitter = np.random.default_rng(scene["seed"]).uniform(-1.0, 1.0, size=(len(scene["items"]), 3))
    frames = []
    for step in range(FRAMES if "moves" in scene else 1):
        image = Image.new("RGB", (SIDE, SIDE), PAPER)
        draw = ImageDraw.Draw(image)
        for k, item in enumerate(scene["items"]):
            column, row = scene["cells"][k] % 2, scene["cells"][k] // 2
            if k == 0 and "moves" in scene:  # the first item is the one that moves, from its cell into the next
                dx, dy = DIRECTIONS[scene["moves"]]
                column, row = column + dx * step / (FRAMES - 1), row + dy * step / (FRAMES - 1)
            x, y = (column + 0.5) * CELL + jitter[k, 0], (row + 0.5) * CELL + jitter[k, 1]
            if not (scene["glance"] == "blank frame" and step == 2):
                draw_shape(draw, item, x, y, 6.3 + 0.7 * jitter[k, 2], broken=k in scene["broken"])
        pixels = np.asarray(image, dtype=np.float32)
        if scene["glance"] == "flicker" and step % 2 == 1:
            pixels = pixels * 0.7
        strength = {"pale": 0.6, "faded": 0.3}.get(scene["glance"], 1.0)
        pixels = PAPER[0] + (pixels - PAPER[0]) * strength
        frames.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return frames


# ------------------------------------------------------------------------------------------------------- scenes and scores


def make_scene(rng: random.Random, items: list, video: bool, glance: str = "vivid", broken: int = 0, moves: str | None = None) -> dict:
    """Places `items` (at most 4, at most 3 in a clip: the mover needs a free cell) and says how the picture is spoilt."""
    scene = {"items": items, "glance": glance, "broken": rng.sample(range(len(items)), min(broken, len(items))), "seed": rng.randrange(2**31)}
    cells = rng.sample(range(4), 4)
    if video:
        dx, dy = DIRECTIONS[moves]
        start = rng.choice([cell for cell in range(4) if 0 <= cell % 2 + dx < 2 and 0 <= cell // 2 + dy < 2])
        target = start + dx + 2 * dy
        cells = [start] + [cell for cell in cells if cell not in (start, target)]
        scene["moves"] = moves
    scene["cells"] = cells[: len(items)]
    return scene


def change(rng: random.Random, item: tuple, items: list, taken: list) -> tuple:
    """Another item of the same colour or of the same shape: the hard kind of wrong."""
    near = [other for other in items if (other[0] == item[0]) != (other[1] == item[1]) and other not in taken]
    return rng.choice(near or [other for other in items if other not in taken])


def checks(wanted: list, present: list) -> list:
    return [f"{name(item)} {'yes' if item in present else 'no'}" for item in wanted]


def score_of(dimension: str, fact: str) -> int:
    """The score that a fact earns on a dimension: the table at the top of this file."""
    if dimension in LADDER:
        return dict(LADDER[dimension])[fact]
    if fact.startswith("says "):
        said, true = fact[len("says "):].split(", is ")
        if said == true:
            return 10
        return 7 if OPPOSITE.get(said) == true or (said.isdigit() and abs(int(said) - int(true)) == 1) else 4
    return max(1, 10 - 3 * sum(item.endswith(" no") for item in fact.split(", ")))


def mistake(rng: random.Random, dimension: str, fact: str) -> str:
    """Another fact of the same form: what a careless judge might have seen instead."""
    if dimension in LADDER:
        return rng.choice([other for other, _ in LADDER[dimension] if other != fact])
    if fact.startswith("says "):
        said, true = fact[len("says "):].split(", is ")
        return f"says {said}, is {rng.choice([v for v in (DIRECTIONS if true in DIRECTIONS else map(str, range(1, 5))) if v != true])}"
    items = fact.split(", ")
    k = rng.randrange(len(items))
    items[k] = items[k][:-3] + "no" if items[k].endswith("yes") else items[k][:-2] + "yes"
    return ", ".join(items)


def join(rng: random.Random, names: list) -> str:
    """A natural list; how items are joined and whether they carry an article varies."""
    article = rng.choice(["a ", "a ", "one ", ""])
    *names, last = [article + n for n in names]
    return ", ".join(names) + rng.choice([" and ", ", ", " with ", " next to "]) + last if names else last


def choose_items(rng: random.Random, count: int, pool: list) -> list:
    items = rng.sample(pool, count)
    if pool is ALL and not any(item in HELDOUT for item in items):  # a held-out sample always turns on a held-out item
        items[rng.randrange(count)] = rng.choice(sorted(HELDOUT))
    return items


def make_sample(rng: random.Random, task: str, pool: list = SEEN, allow_tie: bool = False) -> tuple:
    """(Sample without media paths, the scenes to draw). Draws candidates until their totals differ, or until they tie where
    `allow_tie` asks for it, so that a label always follows from the scores."""
    while True:
        prompt, answers, facts, scenes = (make_generation if is_generation(task) else make_understanding)(rng, task, pool)
        reasons = {dimension: list(pair) for dimension, pair in zip(DIMENSIONS[task], zip(*facts))}
        scores = {dimension: [score_of(dimension, fact) for fact in pair] for dimension, pair in reasons.items()}
        first, second = (sum(pair[k] for pair in scores.values()) for k in (0, 1))
        if (first == second) == allow_tie:
            return Sample("", task, prompt, [], answers, 0 if allow_tie else 1 if first > second else 2, scores, reasons), scenes


def make_generation(rng: random.Random, task: str, pool: list) -> tuple:
    """(caption, no answers, the facts of both candidates in the order of the task's dimensions, a scene for each)."""
    video = is_video(task)
    wanted = choose_items(rng, rng.choice([2, 3] if video else [2, 3, 3, 4]), pool)
    moves = rng.choice(list(DIRECTIONS)) if video else None
    first, *others = map(name, wanted)
    if video:
        first = f"{first} {rng.choice(['moving', 'that moves', 'going'])} {moves}"
    listed = join(rng, [first, *others])
    caption = rng.choice(["{}", "a clip of {}", "a video with {}", "show {}"] if video else
                         ["{}", "a picture of {}", "an image with {}", "draw {}", "{} on a plain background"]).format(listed)
    facts, scenes = [], []
    for _ in (0, 1):
        shown = list(wanted)
        for k in range(len(shown)):
            if rng.random() < 0.3:
                shown[k] = change(rng, shown[k], pool, wanted + shown)
        if not video and len(shown) < 4 and rng.random() < 0.3:
            shown.append(change(rng, rng.choice(wanted), pool, wanted + shown))
        moved = rng.choice([d for d in DIRECTIONS if d != moves]) if video and rng.random() < 0.3 else moves
        glance, broken = rng.randrange(3), rng.choice([0, 0, 1, 2])
        checked = checks(wanted, shown) + ([f"moves {moves} {'yes' if moved == moves else 'no'}"] if video else [])
        facts.append((", ".join(checked), LADDER[DIMENSIONS[task][1]][glance][0], LADDER["authenticity"][broken][0]))
        scenes.append(make_scene(rng, shown, video, facts[-1][1], broken, moved))
    return caption, [], facts, scenes


def make_understanding(rng: random.Random, task: str, pool: list) -> tuple:
    """(question, two answers, their facts in the order of the task's dimensions, the one scene)."""
    video = is_video(task)
    present = choose_items(rng, rng.choice([2, 3] if video else [2, 3, 4]), pool)
    moves = rng.choice(list(DIRECTIONS)) if video else None
    question = rng.choice(["What happens in the video?", "Describe the clip.", "What do you see and how does it move?"] if video else
                          ["What is in the image?", "Describe the picture.", "Which shapes are there and how many?"])
    truth, possible = (moves, DIRECTIONS) if video else (len(present), range(1, 6))
    facts, answers = [], []
    for _ in (0, 1):
        named = rng.sample(present, rng.randint(1 if len(present) == 2 else 2, len(present)))
        for k in range(len(named)):
            if rng.random() < 0.35:
                named[k] = change(rng, named[k], pool, present + named)
        if pool is ALL and not any(item in HELDOUT for item in named):
            named[0] = next(item for item in present if item in HELDOUT)
        said = truth if rng.random() < 0.5 else rng.choice([other for other in possible if other != truth])
        tail = rng.choice(["it moves {}", "one moves {}", "movement goes {}"] if video else
                          ["{} shapes in all", "that makes {}", "{} in total"]).format(said)
        fillers = rng.randrange(3)
        words = (rng.choice(["I see ", "There is ", ""]) + join(rng, [name(item) for item in named]) + ", " + tail + ".").split(" ")
        for position in sorted(rng.sample(range(1, len(words)), fillers), reverse=True):
            words.insert(position, rng.choice(["um", "uh", "er"]))
        answers.append(" ".join(words))
        facts.append((", ".join(checks(named, present)), f"says {said}, is {truth}", LADDER["clarity"][fillers][0]))
    return question, answers, facts, [make_scene(rng, present, video, "steady" if video else "vivid", 0, moves)]


# ------------------------------------------------------------------------------------------------------------------- files


def write_split(folder, split: str, plan: list, pool: list, rng: random.Random) -> list:
    """Draws and saves one split: `plan` is [(task, tie)]; media go to folder/media, rows to folder/SPLIT.jsonl. The better candidate
    stands first in exactly half of each task's pairs (give or take one). Returns [(sample, its scenes)]."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    made, first = [], dict.fromkeys(DIMENSIONS, True)
    for number, (task, tie) in enumerate(plan):
        sample, scenes = make_sample(rng, task, pool, tie)
        if not tie:
            if (sample.label == 1) != first[task]:
                sample, scenes = sample.swapped(), scenes[::-1] if is_generation(task) else scenes
            first[task] = not first[task]
        sample.id = f"{split}-{number:05d}"
        for k, scene in enumerate(scenes):
            files = [f"media/{sample.id}-{k}{f'-{t}' if 'moves' in scene else ''}.png" for t in range(FRAMES if "moves" in scene else 1)]
            for file, image in zip(files, draw_scene(scene) if config.is_main() else []):
                image.save(folder / file)
            sample.media.append(files if "moves" in scene else files[0])
        made.append((sample, scenes))
    write_jsonl(folder / f"{split}.jsonl", (sample_row(sample) for sample, _ in made))
    return made


def draw_split(split: str, settings: config.Settings, folder) -> dict:
    """One split of the small world (distill, pool, test, heldout or ties) as settings.data asks for it; returns {split: pairs}."""
    taught = TASKS if settings.data.distill_tasks == "all" else ("image_generation",)
    tasks = {"distill": taught, "ties": PAIRED}.get(split, TASKS)
    count = getattr(settings.data, f"{'tie' if split == 'ties' else split}_pairs") // (len(tasks) if split == "distill" else 1)
    plan = [(task, split == "ties" and k < count / 3) for task in tasks for k in range(count)]
    write_split(folder, split, plan, ALL if split == "heldout" else SEEN, random.Random(f"{settings.run.seed}/{split}"))
    return {split: len(plan)}


# --------------------------------------------------------------------------------------------------------------- practice
# What the base learns before it ever sees a chain of thought, on all four tasks. But for naming, tags and the direct answer, each exercise is
# a contiguous piece of check, score, total, decide; none is the whole on any pair. Dimensions come in any order and number, so that reading
# them from the prompt is the only way to be right.

PRACTICE = {"name": 1, "name_pair": 1, "check": 2, "rate": 3, "compare": 8, "total": 1, "decide": 2, "total_decide": 3, "tagged": 2, "direct": 7}
CONSOLIDATION = PRACTICE | {"compare": 16, "conclude": 8, "direct": 8}

# Before the mixture, one skill at a time: (skill, exercises relative to base.simple, kinds of exercise, tasks, dimensions). Alone, each
# is learnt in 100 to 800 steps; in a mixture from the start most stay at chance. Naming the shapes of *one of two* pictures comes before any
# comparison: it has the most to say per token about which picture is meant, and what is learnt there carries over. Some naming goes along
# with the checks: without it checking stayed at chance for as long as it was tried.
PAIRED = ("image_generation", "video_generation")
CONSISTENCY = ("compare", "compare", "compare", "name_pair"), PAIRED, ["semantic consistency"]
SKILLS = (
    ("naming", 1.0, ("name",), ("image_generation", "image_understanding"), None),
    ("checking", 2.0, ("check", "check", "check", "name"), ("image_generation", "image_understanding"), None),
    ("name_pair", 1.5, ("name_pair",), PAIRED, None),
    ("aesthetics", 0.5, ("compare",), ("image_generation",), ["aesthetics"]),
    ("authenticity", 0.6, ("compare",), PAIRED, ["authenticity"]),
    ("correctness", 0.5, ("compare",), ("image_understanding", "video_understanding"), ["correctness"]),
    ("consistency", 1.5, *CONSISTENCY),
)
# After it, what the mixture has not taught: which of the items are in which of two pictures takes by far the longest, and a candidate's line
# has to be found again with all dimensions around it.
COMPARISONS = (("pairing", 2.5, *CONSISTENCY), ("comparing", 4.0, ("compare",) * 6 + ("name_pair",) + ("direct",) * 2, TASKS, None))


def practice(rng: random.Random, kind: str, sample: Sample, scenes: list, dimensions: list | None = None) -> tuple:
    """(content parts, response) of one exercise of `kind` (a key of CONSOLIDATION) on `sample`; `dimensions` are drawn if not given."""
    task, noun = sample.task, candidate_noun(sample.task)
    medium = "video" if is_video(task) else "image"
    k = rng.randrange(len(sample.media))  # the picture looked at
    scene, show = scenes[k], {"type": medium, medium: sample.media[k]}
    text = lambda words: {"type": "text", "text": words}
    order = sorted(range(len(scene["items"])), key=lambda i: scene["cells"][i])
    named = ", ".join(name(scene["items"][i]) + (f" moves {scene['moves']}" if i == 0 and "moves" in scene else "") for i in order)
    dimensions = dimensions or rng.sample(DIMENSIONS[task], rng.choice([1, 2, 2, 3]))
    chosen = lambda values, side=None: {d: values[d] if side is None else [values[d][side]] for d in dimensions}
    sums = lambda scores: [sum(pair[side] for pair in scores.values()) for side in (0, 1)]
    closing = lambda scores: (write_totals(noun, scores), f"<answer>{verdict_string(task, 1 if sums(scores)[0] > sums(scores)[1] else 2)}</answer>")
    if kind == "name":
        return [show, text(rng.choice(["Name the shapes.", "What is shown?"]))], named
    if kind == "name_pair":  # of an understanding pair there is only one picture
        return media_parts(sample) + [text(f"Name the shapes of {medium} {k + 1}.")], f"{medium.capitalize()} {k + 1}: {named}"
    if kind == "check":
        wanted = []
        for _ in range(rng.choice([2, 3, 4])):  # half of them shown; of the others some are easy to tell apart, some hard
            draw = rng.random()
            item = rng.choice([item for item in SEEN if item not in scene["items"]] if draw >= 0.75 else scene["items"])
            wanted.append(change(rng, item, SEEN, scene["items"]) if 0.5 <= draw < 0.75 else item)
        facts = checks(list(dict.fromkeys(wanted)), scene["items"])
        if "moves" in scene:
            asked = scene["moves"] if rng.random() < 0.5 else rng.choice(list(DIRECTIONS))
            facts.append(f"moves {asked} {'yes' if asked == scene['moves'] else 'no'}")
        return [show, text("Check: " + ", ".join(fact.rsplit(" ", 1)[0] for fact in facts) + ".")], ", ".join(facts)
    if kind == "rate":
        k = rng.randrange(2)
        show = {"type": medium, medium: sample.media[k % len(sample.media)]}
        about = f"\nCaption: {sample.prompt}\n" if is_generation(task) else f"\nQuestion: {sample.prompt}\nAnswer: {sample.answers[k]}\n"
        asked = text(f"{about}Rate {noun} on {', '.join(dimensions)}. Steps: check, score.")
        named = [text(f"{noun}: ")] if is_generation(task) else []
        return named + [show, asked], write_items(noun, chosen(sample.reasons, k), chosen(sample.scores, k))
    if kind == "compare":
        steps = STEPS[: rng.choice([2, 3] if len(dimensions) > 1 else [2])]
        totals = "\n" + write_totals(noun, chosen(sample.scores)) if "total" in steps else ""
        response = f"{THINK}{write_items(noun, chosen(sample.reasons), chosen(sample.scores))}{totals}</think>"
        return media_parts(sample) + [text(steps_text(task, dimensions, steps))], response
    if kind in ("total", "decide", "total_decide"):
        scores = {}
        while len(set(sums(scores))) == 1:
            scores = {d: [rng.choice(POSSIBLE), rng.choice(POSSIBLE)] for d in dimensions + [None] * (len(dimensions) == 1)}
        totals, verdict = closing(scores)
        given = " ".join(f"{noun} {side + 1}: {', '.join(f'({pair[side]}/10)' for pair in scores.values())}." for side in (0, 1))
        asked, response = {"total": (f"{given}\nSteps: total.", totals), "decide": (f"{totals}\nSteps: decide.", verdict),
                           "total_decide": (f"{given}\nSteps: total, decide.", f"{THINK}{totals}</think>\n{verdict}")}[kind]
        return [text(asked)], response
    if kind == "conclude":  # the same at the end of a judgement that is given
        while len(set(sums(chosen(sample.scores)))) == 1:
            dimensions = rng.sample(DIMENSIONS[task], rng.choice([2, 3]))
        given, (totals, verdict) = write_items(noun, chosen(sample.reasons), chosen(sample.scores)), closing(chosen(sample.scores))
        if rng.random() < 0.3:
            return media_parts(sample) + [text(f"{given}\n{totals}\nSteps: decide.")], verdict
        return media_parts(sample) + [text(f"{given}\nSteps: total, decide.")], f"{THINK}{totals}</think>\n{verdict}"
    if kind == "tagged":  # the tags, on questions that are no preference
        if rng.random() < 0.5:
            return [show, text("How many shapes are shown? Steps: check, decide.")], f"{THINK}{named}</think>\n<answer>{len(order)}</answer>"
        fact = rng.choice(sample.reasons[DIMENSIONS[task][0]][k].split(", "))
        asked, answer = fact.rsplit(" ", 1)
        return [show, text(f"Is this shown: {asked}? Steps: check, decide.")], f"{THINK}{fact}</think>\n<answer>{answer}</answer>"
    allow_tie = is_generation(task) and (sample.label == 0 or rng.random() < 0.5)  # a third of the prompts that allow a tie show one
    return build_prompt(sample, "answer", allow_tie=allow_tie), f"<answer>{verdict_string(task, sample.label)}</answer>"


def write_practice(folder, pairs: int, rows_per_pair: int, simple: int, rng: random.Random) -> None:
    """Practice of the base in the official SFT schema, one file for each phase of `sft.build_base`: SKILLS (`simple` exercises times the
    factor); practice.jsonl, a mixture of all exercises, and if `simple` is 0 the only file; COMPARISONS; consolidation.jsonl, the mixture again, with
    more comparing and less of understanding, which is learnt sooner. One generation pair in five is a tie, which only the direct mode can say."""
    made = write_split(folder, "pairs", [(TASKS[k % 4], is_generation(TASKS[k % 4]) and k % 40 < 8) for k in range(pairs)], SEEN, rng)

    def exercise(kind, sample, scenes, dimensions=None):
        parts, response = practice(rng, kind, sample, scenes, dimensions)
        text, images = to_text(parts)
        return {"kind": kind, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": response}], "images": images}

    def skill(factor, kinds, among, dimensions):
        able = [pair for pair in made if pair[0].task in among]
        return [exercise(kind, *rng.choice(able), dimensions) for kind in rng.choices(kinds, k=round(factor * simple))]

    def mixture(weights, of_understanding):
        rows = []
        for sample, scenes in made:
            kinds = rng.choices(list(weights), list(weights.values()), k=rows_per_pair if is_generation(sample.task) else of_understanding)
            rows += [exercise(kind, sample, scenes) for kind in kinds if sample.label or kind != "conclude"]
        return rows

    files = {name: skill(*rest) for name, *rest in SKILLS if simple}
    files["practice"] = mixture(PRACTICE, rows_per_pair)
    if simple:
        files |= {name: skill(*rest) for name, *rest in COMPARISONS}
        files["consolidation"] = mixture(CONSOLIDATION, rows_per_pair // 3)
    for file, rows in files.items():
        write_jsonl(folder / f"{file}.jsonl", rows)


# ----------------------------------------------------------------------------------------------------- the small backbone


def train_tokenizer(texts: list, vocab_size: int):
    """Byte-level BPE on the project's own text: any string can be written with it, and words of the small world are one token each.
    Candidates ("Image 1"), tags and numbers up to two digits stay whole: shorter sequences, and one token per number of a sum."""
    from tokenizers import Regex, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    words = Regex(r"</?(?:think|answer)>| ?(?:Image|Video|Answer) [12]|/10\)\.?|[0-9]{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}<]+|<|\s+")
    core.pre_tokenizer = Sequence([Split(words, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = {"special_tokens": [M.PAD, M.IM_START, M.IM_END, *M.VISION], "initial_alphabet": ByteLevel.alphabet()}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=M.IM_END, pad_token=M.PAD, additional_special_tokens=[M.IM_START, *M.VISION])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] != 'text' %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


def build_small(settings: config.Model, tokenizer) -> tuple:
    """A Qwen2.5-VL of one to two million random weights, N(0, 1/sqrt(fan_in)): the usual 0.02 learns slowly at this width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    width, heads, depth, vision_width = settings.hidden_size, settings.heads, settings.vision_layers, settings.vision_hidden_size
    if width % (2 * heads) or vision_width % 16:
        raise config.UserError("model.hidden_size has to be a multiple of 2 * model.heads, model.vision_hidden_size of 16")
    half = width // heads // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
                num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, tie_word_embeddings=True, rope_parameters=rope,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(depth=depth, hidden_size=vision_width, intermediate_size=2 * vision_width, num_heads=4, patch_size=8, spatial_merge_size=2,
                  temporal_patch_size=2, window_size=64, out_hidden_size=width, fullatt_block_indexes=[depth - 1], tokens_per_second=1)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(M.VISION))))
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=16 * 16, max_pixels=512 * 512)
    return model.eval(), M.Processor(tokenizer, processor)
