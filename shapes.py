"""The small world: scenes of coloured shapes whose every score is known.

A real preference set tells which candidate people liked, never *why*. Here the reasons are drawn first and the pictures after them, by code
and from a seed, so that a model's reasoning can be graded line by line, not only its verdict. A candidate's score on a dimension is a *fact*
turned into a number, and the better candidate is the one with the larger total:

    dimension                                 fact written in the reasoning                      score
    semantic consistency, semantic accuracy   "red circle yes, blue star no, moves left yes"     10, minus 3 for each "no"
    correctness                               "says 3, is 4"; of a clip "says left, is right"    10, 7 if one off or opposite, else 4
    the others                                "vivid", "one broken", "two fillers", ...          see LADDER

Faded colours and fillers are seen at a glance; whether every item of a caption is in the picture has to be checked item by item, and the
total has to be added up. That is the part thinking is for.

A scene is 32x32 pixels, four cells of 16x16 with at most one shape each; a clip is four frames in which one shape moves to a free
cell. One merged vision token of the small backbone sees exactly one cell.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

import config
from data import DIMENSIONS, TASKS, Sample, is_generation, is_video, sample_row, write_jsonl

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
PAIRED = ("image_generation", "video_generation")
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

def make_scene(rng: random.Random, items: list, video: bool, glance: str, broken: int, moves: str | None) -> dict:
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


def make_sample(rng: random.Random, task: str, pool: list, allow_tie: bool) -> tuple:
    """(Sample without media paths, the scenes to draw). Draws candidates until their totals differ, or until they tie where
    `allow_tie` asks for it, so that a label always follows from the scores."""
    while True:
        prompt, answers, facts, scenes = (make_generation if is_generation(task) else make_understanding)(rng, task, pool)
        reasons = {dimension: list(pair) for dimension, pair in zip(DIMENSIONS[task], zip(*facts), strict=True)}
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


def draw_split(split: str, settings: config.Settings, folder) -> int:
    """One split of the small world (distill, pool, test, heldout or ties) as settings.data asks for it; returns the number of pairs."""
    taught = TASKS if settings.data.distill_tasks == "all" else ("image_generation",)
    tasks = {"distill": taught, "ties": PAIRED}.get(split, TASKS)
    count = getattr(settings.data, f"{'tie' if split == 'ties' else split}_pairs") // (len(tasks) if split == "distill" else 1)
    plan = [(task, split == "ties" and k < count / 3) for task in tasks for k in range(count)]
    write_split(folder, split, plan, ALL if split == "heldout" else SEEN, random.Random(f"{settings.run.seed}/{split}"))
    return len(plan)
