"""The base: a small Qwen2.5-VL trained from random weights, which stands for the pretrained UnifiedReward that the paper starts from.

What it learns is written here: single skills on all four tasks, and direct answers, never a whole chain of thought. The result is shipped in
configs/small-base (made in two goes, see results/README.md), so nobody has to run this; it takes about an hour and three quarters on two cores:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 sft.py --config small --stage base --base.rebuild true
"""

import dataclasses
import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import config
import data
import model as M
import sft
from data import (DIMENSIONS, STEPS, TASKS, THINK, Sample, build_prompt, candidate_noun, is_generation, is_video, media_parts, steps_text,
                  to_text, verdict_string, write_items, write_jsonl, write_totals)
from resume import last_step
from shapes import DIRECTIONS, PAIRED, POSSIBLE, SEEN, change, checks, name, write_split

# --------------------------------------------------------------------------------------------------------------- practice
# But for naming, tags and the direct answer, each exercise is a contiguous piece of check, score, total, decide; none is the whole on any
# pair. Dimensions come in any order and number, so that reading them from the prompt is the only way to be right.

PRACTICE = {"name": 1, "name_pair": 1, "check": 2, "rate": 3, "compare": 8, "total": 1, "decide": 2, "total_decide": 3, "tagged": 2, "direct": 7}
CONSOLIDATION = PRACTICE | {"compare": 16, "conclude": 8, "direct": 8}

# Before the mixture, one skill at a time: (skill, exercises relative to base.simple, kinds of exercise, tasks, dimensions). Alone, each
# is learnt in 100 to 800 steps; in a mixture from the start most stay at chance. Naming the shapes of *one of two* pictures comes before any
# comparison: it has the most to say per token about which picture is meant, and what is learnt there carries over. Some naming goes along
# with the checks: without it checking stayed at chance for as long as it was tried.
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
# Last, on pairs drawn anew, half of them of clips: each of those practised above was seen tens of times, and which of two clips moves how was
# still wrong in one pair of seven. Half of the exercises compare, on the first dimension and none, any or all of the others: learnt with
# one number of them it is lost with another, as the pictures then stand nearer or farther. (phase, pairs relative to base.scenes, peak learning
# rate, numbers of others)
FRESH = (("fresh-one", 1.5, 5e-4, [0]), ("fresh-any", 1, 4e-4, [0, 1, 1, 2]), ("fresh-all", 1, 5e-4, [2]), ("fresh-some", 0.9, 4e-4, [0, 1, 2, 2]))


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
    allow_tie = is_generation(task) and (sample.label == 0 or rng.random() < 0.5)  # of the prompts that allow a tie a third show one, or 18% (FRESH)
    return build_prompt(sample, "answer", allow_tie=allow_tie), f"<answer>{verdict_string(task, sample.label)}</answer>"


def exercise(rng: random.Random, kind: str, sample: Sample, scenes: list, dimensions: list | None = None) -> dict:
    """One exercise of `practice` in the official SFT schema."""
    parts, response = practice(rng, kind, sample, scenes, dimensions)
    text, images = to_text(parts)
    return {"kind": kind, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": response}], "images": images}


def mixture(rng: random.Random, pair: tuple, weights: dict, count: int) -> list:
    """`count` exercises of `weights` on one (sample, scenes); a tie has no verdict to conclude."""
    return [exercise(rng, kind, *pair) for kind in rng.choices(list(weights), list(weights.values()), k=count) if pair[0].label or kind != "conclude"]


def write_practice(folder, pairs: int, rows_per_pair: int, simple: int, rng: random.Random) -> None:
    """Practice of the base, one file for each phase of `build_base` up to FRESH: SKILLS (`simple` exercises times the factor); practice.jsonl,
    a mixture of all exercises, and if `simple` is 0 the only file; COMPARISONS; consolidation.jsonl, the mixture again, with more comparing and
    less of understanding, which is learnt sooner. One generation pair in five is a tie, which only the direct mode can say."""
    made = write_split(folder, "pairs", [(TASKS[k % 4], is_generation(TASKS[k % 4]) and k % 40 < 8) for k in range(pairs)], SEEN, rng)

    def skill(factor, kinds, among, dimensions):
        able = [pair for pair in made if pair[0].task in among]
        return [exercise(rng, kind, *rng.choice(able), dimensions) for kind in rng.choices(kinds, k=round(factor * simple))]

    def whole(weights, of_understanding):
        return [row for pair in made for row in mixture(rng, pair, weights, rows_per_pair if is_generation(pair[0].task) else of_understanding)]

    files = {name: skill(*rest) for name, *rest in SKILLS if simple}
    files["practice"] = whole(PRACTICE, rows_per_pair)
    if simple:
        files |= {name: skill(*rest) for name, *rest in COMPARISONS}
        files["consolidation"] = whole(CONSOLIDATION, rows_per_pair // 3)
    for file, rows in files.items():
        write_jsonl(folder / f"{file}.jsonl", rows)


def write_fresh(folder, pairs: int, rng: random.Random) -> None:
    """The files of FRESH; `pairs`: those of write_practice. One generation pair in ten is a tie."""
    for phase, factor, _, others in FRESH:
        plan = [(task, is_generation(task) and k % 10 == 0) for k in range(max(1, round(factor * pairs / 4)))
                for task in ("image_generation", "video_generation", "video_generation", TASKS[2 + k % 2])]
        rows = []
        for sample, scenes in write_split(folder, f"{phase}-pairs", plan, SEEN, rng):
            paired = is_generation(sample.task)
            for kind in rng.choices(CONSISTENCY[0] if paired else ("compare",), k=2 if sample.task == "video_generation" else 1):
                first, *rest = DIMENSIONS[sample.task]
                dimensions = [first] + rng.sample(rest, rng.choice(others))
                rows.append(exercise(rng, kind, sample, scenes, rng.sample(dimensions, len(dimensions))))
            rows += mixture(rng, (sample, scenes), CONSOLIDATION, 1 if paired else 2)
        write_jsonl(folder / f"{phase}.jsonl", rows)


# ----------------------------------------------------------------------------------------------------- the small backbone

def train_tokenizer(texts: list, vocab_size: int):
    """Byte-level BPE on the project's own text: any string can be written with it, and most words of the small world are one token each.
    Candidates ("Image 1") and tags stay whole, and numbers of two digits if they are frequent: in the shipped base 10 to 19."""
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


# ---------------------------------------------------------------------------------------------------------------- the run

@torch.no_grad()
def mean_loss(model, processor, examples: list) -> float:
    """The loss of `examples` under the model, per response token."""
    total = tokens = 0
    for k in range(0, len(examples), 32):
        encoded = [sft.encode_example(processor, model, example) for example in examples[k : k + 32]]
        inputs = M.collate(encoded, "right", processor.tokenizer.pad_token_id, M.device_of(model))
        logits = model(**inputs, use_cache=False).logits
        total += sft.sft_loss(logits, inputs["input_ids"], sft.response_mask(encoded, logits.shape[1]).to(logits.device), 1).item()
        tokens += sum(len(e["ids"]) - e["prompt_length"] for e in encoded)
    return total / tokens


def all_text(example: tuple) -> str:
    parts, response = example
    return " ".join([part["text"] for part in parts if part["type"] == "text"] + [response])


def build_base(settings: config.Settings, folder: Path) -> str:
    """Draws the practice, trains the tokenizer on it, then the model: single skills one after the other, then the mixture. Told apart,
    skills are learnt in minutes each; from the mixture alone, checking was still near chance after ten. Then once more: comparing two pictures,
    of which the mixture had left 15 to 70% of the lines right, and the mixture; and both together on fresh pairs.
    What is saved is the mean of the weights after the last two phases."""
    base = settings.base
    if not any(folder.glob("*.state")):  # else it was written before the first of them
        write_practice(folder, base.scenes, base.rows_per_scene, base.simple, random.Random(f"{settings.run.seed}/base"))
        write_fresh(folder, base.scenes, random.Random(f"{settings.run.seed}/base/fresh"))
    config.wait_for_all()
    practice = data.read_conversations(folder / "practice.jsonl")
    tokenizer = train_tokenizer([all_text(example) for example in practice], settings.model.vocab_size)
    model, processor = build_small(settings.model, tokenizer)
    skill, once = dataclasses.replace(base, epochs=1.0, lr=base.simple_lr), dataclasses.replace(base, epochs=1.0)
    phases = [(name, skill) for name, *_ in SKILLS] + [("practice", base)]
    phases += [(name, once) for name, *_ in COMPARISONS] + [("consolidation", base)]
    phases += [(name, dataclasses.replace(once, lr=lr)) for name, _, lr, _ in FRESH]
    begun = [k for k, (phase, _) in enumerate(phases) if last_step(folder, f"base: {phase}")]
    for phase, own in phases[max(begun, default=0) :]:  # a state has all that was learnt before it
        sft.train(model, processor, data.read_conversations(folder / f"{phase}.jsonl"), own, folder, phase, f"base: {phase}")
    ends = [folder / f"base: {phase}.{last_step(folder, f'base: {phase}')}.0.state" for phase, _ in phases[-2:]]
    with torch.no_grad():  # the mean of the last two phases' weights: what is learnt in the last alone carries over to the cold start less evenly
        learning = [p for p in model.parameters() if p.requires_grad]
        for parameter, *learnt in zip(learning, *(torch.load(file, weights_only=True)["learnt"] for file in ends), strict=True):
            parameter.copy_(sum(learnt) / 2)
    M.save(model, processor, folder, torch.float16)
    config.wait_for_all()
    parameters = sum(p.numel() for p in model.parameters())
    examples = sft.practice_examples("base", settings, folder, 256)
    figures = {"parameters": parameters, "practice_loss": mean_loss(M.load(str(folder))[0], processor, examples)}
    config.write_text(folder / "figures.json", json.dumps(figures))
    return f"{parameters / 1e6:.2f}M parameters, {len(phases)} phases"
