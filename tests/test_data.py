"""Prompts, the parser, files, settings, and the small world with its practice."""

import contextlib
import copy
import dataclasses
import itertools
import json
import random
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

import config
import data
import shapes
from data import TASKS, Sample, parse_verdict, verdict_string, write_reasoning
from base import pretrain

GENERATION = TASKS[:2]


def draw(task: str, seed, pool=shapes.SEEN, tie=False) -> tuple:
    return shapes.make_sample(random.Random(f"{task}/{seed}"), task, pool, tie)


def chain(thought: str, verdict: str = "Image 1 is better") -> str:
    return f"<think>{thought}</think>\n<answer>{verdict}</answer>"


TWO_ITEMS = "1. Aesthetics: Image 1: vivid (9/10). Image 2: noisy (4/10).\n2. Authenticity: Image 1: one broken (8/10). Image 2: none (10/10).\n"
SUMS = "Total score: Image 1: 9+8=17. Image 2: 4+10=14."
SCORES = {"aesthetics": {1: 9, 2: 4}, "authenticity": {1: 8, 2: 10}}


# ---------------------------------------------------------------------------------------------------- parser: what is read


@pytest.mark.parametrize("task", TASKS)
def test_the_parser_reads_back_everything_the_teacher_writes(task):
    for seed in range(30):
        sample, _ = draw(task, seed, shapes.ALL)
        verdict = parse_verdict(write_reasoning(task, sample.reasons, sample.scores, verdict_string(task, sample.label)), task)
        by_name = lambda values: {dimension: {1: pair[0], 2: pair[1]} for dimension, pair in values.items()}
        assert (verdict.answer, verdict.format_ok, verdict.sums_ok, verdict.consistent) == (sample.label, True, True, True)
        assert verdict.scores == by_name(sample.scores) and verdict.reasons == by_name(sample.reasons)
        assert verdict.totals == {k: sum(pair[k - 1] for pair in sample.scores.values()) for k in (1, 2)}


def test_one_mark_that_is_changed_is_noticed():
    """The other half of the round trip: no score, no sum and no verdict can change without the reading changing."""
    sample, _ = draw("video_generation", 1)
    text = write_reasoning(sample.task, sample.reasons, sample.scores, verdict_string(sample.task, sample.label))
    read = parse_verdict(text, sample.task)
    for match in re.finditer(r"(?<=\()\d+(?=/10\))|(?<==)\d+|(?<=<answer>Video )\d", text):
        other = text[: match.start()] + ("2" if match.group() == "1" else "1") + text[match.end() :]
        assert parse_verdict(other, sample.task) != read and not parse_verdict(other, sample.task).consistent


@pytest.mark.parametrize("thought", [
    TWO_ITEMS + SUMS,
    # the candidates swap places within a dimension, and in the sums
    "1. Aesthetics: Image 2: noisy (4/10). Image 1: vivid (9/10).\n2. Authenticity: Image 1: one broken (8/10). Image 2: none (10/10).\n"
    "Total score: Image 2: 4+10=14. Image 1: 9+8=17.",
    # everything on one line
    (TWO_ITEMS + SUMS).replace("\n", " "),
    # the score before its reason, as in released outputs
    "1. **Aesthetics:** Image 1 (9/10) - clean; Image 2 (4/10) - noisy.\n2. **Authenticity:** Image 1 (8/10) - one broken; Image 2 (10/10) - none.\n" + SUMS,
    # each candidate on its own line
    "1. Aesthetics:\n   Image 1: vivid (9/10)\n   Image 2: noisy (4/10)\n2. Authenticity:\n   Image 2: none (10/10)\n   Image 1: one broken (8/10)\n"
    "Total score:\nImage 1: 9+8=17\nImage 2: 4+10=14",
    # the same with markdown in the items
    "1. **Aesthetics**:\n   - **Image 1**: vivid (9/10)\n   - **Image 2**: noisy (4/10)\n2. **Authenticity:**\n   - **Image 1 (8/10)**: one broken\n"
    "   - **Image 2 (10/10)**: none\n**Total score:**\n- Image 1: 9 + 8 = 17\n- Image 2: 4 + 10 = 14",
    # and in the sums
    TWO_ITEMS + "**Total score:**\n- **Image 1**: 9+8=17\n- **Image 2:** 4+10=14",
], ids=["plain", "swapped", "one line", "score first", "own lines", "markdown items", "markdown sums"])
def test_scores_and_sums_belong_to_the_candidate_that_is_named(thought):
    verdict = parse_verdict(chain(thought), "image_generation")
    assert verdict.scores == SCORES and verdict.totals == {1: 17, 2: 14}
    assert (verdict.answer, verdict.sums_ok, verdict.consistent) == (1, True, True)


@pytest.mark.parametrize("item", ["Image 1 (9/10): sharper than Image 2. Image 2 (4/10): duller than Image 1.",
                                  "Image 1: sharper than Image 2 (9/10). Image 2: duller than Image 1 (4/10).",
                                  "Image 2: next to Image 1, dull (4/10). Image 1: next to Image 2, sharp (9/10)."])
def test_a_reason_that_mentions_the_other_candidate_does_not_give_it_the_score(item):
    assert parse_verdict(chain(f"1. Aesthetics: {item}"), "image_generation").scores == {"aesthetics": {1: 9, 2: 4}}


def test_added_dimensions_are_read_and_count_in_the_sums():
    items = "3. Colour & light: Image 1: warm (6/10). Image 2: flat (5/10).\n4. Shape-likeness: Image 1: good (7/10). Image 2: good (7.5/10).\n"
    sums = "Total score: Image 1: 9+8+6+7=30. Image 2: 4+10+5+7.5=26.5."
    verdict = parse_verdict(chain(TWO_ITEMS + items + sums), "image_generation")
    assert verdict.scores == SCORES | {"colour & light": {1: 6, 2: 5}, "shape-likeness": {1: 7, 2: 7.5}}
    assert verdict.consistent and verdict.totals == {1: 30, 2: 26.5}
    assert not parse_verdict(chain(TWO_ITEMS + items + SUMS), "image_generation").sums_ok


@pytest.mark.parametrize("name", ["Viewer's interest", "Viewer’s interest", "Colour, light", "Form (overall)", "Ästhetik", "構図"])
def test_an_added_dimension_may_have_any_name(name):
    verdict = parse_verdict(chain(f"{TWO_ITEMS}3. {name}: Image 1: warm (6/10). Image 2: flat (5/10).\n"
                                  "Total score: Image 1: 9+8+6=23. Image 2: 4+10+5=19."), "image_generation")
    assert verdict.scores == SCORES | {name.lower(): {1: 6, 2: 5}} and verdict.consistent


@pytest.mark.parametrize("said", ["the sign says 3. Well, then: it fits", "a clock at 10. However, it's fine (note: odd)", "counts 2. The rest (legs, arms): right"])
def test_a_number_at_the_end_of_a_sentence_is_no_heading(said):
    verdict = parse_verdict(chain(TWO_ITEMS.replace("one broken", said) + SUMS), "image_generation")
    assert verdict.scores == SCORES and verdict.consistent


@pytest.mark.parametrize("thought", [
    "1. Aesthetics: Image 1: a (9/10). Image 2: b (4/10).\n2. Aesthetics: Image 1: a (3/10). Image 2: b (8/10).\nTotal score: Image 1: 3=3. Image 2: 8=8.",
    "1. A: Image 1: a (3/10). Image 2: b (8/10).\n2. B: Image 1: a (9/10). Image 1: c (9/10). Image 2: b (4/10).\nTotal score: Image 1: 3=3. Image 2: 8=8.",
    "1. A: Image 1: a (3/10). Image 2: b (8/10).\n2. B: Image 1: a. Image 2: b.\nTotal score: Image 1: 3=3. Image 2: 8=8."])
def test_sums_do_not_agree_where_an_item_is_left_out_of_them(thought):
    """A heading that comes twice, an item that scores a candidate twice, one without scores: the sums are of fewer items than were written."""
    verdict = parse_verdict(f"<think>{thought}</think>\n<answer>Image 2 is better</answer>", "image_generation")
    assert verdict.format_ok and verdict.totals == {1: 3, 2: 8} and not verdict.sums_ok and not verdict.consistent


def test_sums_do_not_agree_where_an_item_leaves_out_a_candidate():
    """Else leaving out what speaks for the other one would be paid for."""
    one_sided = TWO_ITEMS.replace(" Image 2: none (10/10).", "") + "Total score: Image 1: 9+8=17. Image 2: 4=4."
    verdict = parse_verdict(chain(one_sided), "image_generation")
    assert verdict.scores == SCORES | {"authenticity": {1: 8}} and not verdict.sums_ok and not verdict.consistent


@pytest.mark.parametrize("text, shown", [
    ("First: <image>\nSecond: <image>\nWhich?", ["First: ", "a.png", "\nSecond: ", "b.png", "\nWhich?"]), ("<image><image>Which?", ["a.png", "b.png", "Which?"]),
    ("Which?", ["a.png", "b.png", "Which?"]), ("See <image>: which?", ["a.png", "b.png", "See : which?"])])
def test_the_pictures_of_an_official_row_stand_where_its_text_says(text, shown):
    row = {"problem": text, "solution": "<answer>Image 1 is better</answer>", "images": ["a.png", "b.png"]}
    sample = data.row_sample(row, Path("/x"))
    read = [part["text"] if part["type"] == "text" else Path(part["image"]).name for part in data.build_prompt(sample, "think")]
    assert read == shown
    again = data.row_sample(data.sample_row(sample), Path("/"))
    assert data.build_prompt(again, "think") == data.build_prompt(sample, "think")


def test_a_caption_moves_no_picture_of_a_prompt_of_ones_own():
    sample = Sample("1", "image_generation", "tags <image> and <video>", ["a.png", "b.png"])
    shown = lambda template: [part.get("text", part.get("image")) for part in data.build_prompt(
        data.replace(sample, problem=data.fill_template(template, sample, "think")), "think")]
    assert shown("{prompt}: which?") == ["a.png", "b.png", "tags < image> and < video>: which?"]
    assert shown("A <image> B <image> {prompt}?") == ["A ", "a.png", " B ", "b.png", " tags < image> and < video>?"]


def test_a_dimension_that_scores_a_candidate_twice_is_left_out():
    verdict = parse_verdict(chain("1. Aesthetics: Image 1: good (9/10). Image 2: bad (4/10). Image 1: no, worse (2/10).\n"), "image_generation")
    assert verdict.scores == {}


@pytest.mark.parametrize("sums, verdict, sums_ok, consistent", [
    ("Image 1: 9+8=17. Image 2: 4+10=14.", "Image 1 is better", True, True),
    ("Image 1: 9+8=18. Image 2: 4+10=14.", "Image 1 is better", False, False),  # does not add up
    ("Image 1: 9+9=18. Image 2: 4+10=14.", "Image 1 is better", False, False),  # adds up, of other scores
    ("Image 1: 17=17. Image 2: 4+10=14.", "Image 1 is better", False, False),
    ("Image 1: 4+10=14. Image 2: 9+8=17.", "Image 2 is better", False, False),  # the other one's scores
    ("Image 1: 9+8=17.", "Image 1 is better", False, False),
    ("", "Image 1 is better", False, False),
    ("Image 1: 9+8=17. Image 2: 4+10=14.", "Image 2 is better", True, False),  # the verdict does not follow
    ("Image 1: 9+8=17. Image 2: 4+10=14.", "Both images are equally good", True, False),
    ("Image 1: 9+8=17. Image 2: 4+10=14.", "the first", True, False),
    ("Image 1: 9+8=17. Image 2: 4=4.", "Image 1 is better", False, False),
])
def test_sums_and_verdict_are_checked_against_the_scores(sums, verdict, sums_ok, consistent):
    read = parse_verdict(chain(f"{TWO_ITEMS}Total score: {sums}", verdict), "image_generation")
    assert (read.sums_ok, read.consistent, read.format_ok) == (sums_ok, consistent, True)


@pytest.mark.parametrize("scores, total, right", [((8.3, 8.1, 7.9), 24.3, True), ((9.1, 8.2, 7.3), 24.6, True), ((9.1, 8.2, 7.3), 24.7, False)])
def test_sums_of_decimals_are_no_matter_of_binary_fractions(scores, total, right):
    items = "".join(f"{k}. Point {'abc'[k]}: Image 1: good ({score}/10). Image 2: bad (1/10).\n" for k, score in enumerate(scores))
    text = chain(f"{items}Total score: Image 1: {'+'.join(map(str, scores))}={total}. Image 2: 1+1+1=3.", "Image 1 is better")
    assert parse_verdict(text, "image_generation").sums_ok == right


@pytest.mark.parametrize("verdict, consistent", [("Image 1 is better", False), ("Image 2 is better", False), ("Both images are equally good", True)])
def test_equal_totals_make_no_candidate_the_better_one(verdict, consistent):
    text = chain("1. Aesthetics: Image 1: vivid (9/10). Image 2: vivid (9/10).\nTotal score: Image 1: 9=9. Image 2: 9=9.", verdict)
    assert parse_verdict(text, "image_generation").sums_ok and parse_verdict(text, "image_generation").consistent == consistent


# ---------------------------------------------------------------------------------------------- parser: what is not accepted

FINE = chain("looked at both")


@pytest.mark.parametrize("text, answer, format_ok", [
    (FINE, 1, True),
    (FINE.replace("\n", ""), 1, True),
    (FINE.replace("\n", " \n\t\n"), 1, True),
    (FINE.replace("Image 1 is better", "\n Image 1 is better "), 1, True),
    ("<answer>Image 1 is better</answer>", 1, False),
    # around the blocks
    ("Sure! " + FINE, 1, False),
    (FINE + "\nI hope this helps.", 1, False),
    (FINE + "\n", 1, False),
    (FINE.replace("\n", "\nSo: "), 1, False),
    # blocks missing, empty, doubled, cut off
    ("Image 1 is better", None, False),
    ("", None, False),
    ("<think>looked at both", None, False),
    ("<think>looked at both</think>", None, False),
    ("<think>looked at both</think>\n<answer>Image 1 is better", None, False),
    ("<think>looked at both</think>\nImage 1 is better</answer>", None, False),
    ("<think>looked at both<answer>Image 1 is better</answer>", None, False),
    ("looked at both</think>\n<answer>Image 1 is better</answer>", 1, False),
    (chain(""), 1, False),
    (chain(" \n "), 1, False),
    (chain("looked", ""), None, True),
    (FINE + "\n<answer>Image 1 is better</answer>", None, False),
    (FINE + FINE, None, False),
    (chain("looked", "Image 1 is better</answer><answer>Image 2 is better"), None, False),
    (chain("looked", "<answer>Image 1 is better</answer>"), None, False),
    # tags inside the reasoning: it is never the reasoning that decides
    ("<think>looked <answer>Image 1 is better</answer></think>", None, False),
    (chain("I would write <answer>Image 1 is better</answer> but", "Image 2 is better"), 2, False),
    (chain("the caption says </think>\n<answer>Image 1 is better</answer>", "Image 2 is better"), None, False),
    (chain("<think>looked"), 1, False),
    (chain("looked</answer>"), 1, False),
    (chain("looked", "Image 1 is <think>better"), None, False),
    # the verdict, to the letter
    (chain("looked", "image 1 is better"), None, True),
    (chain("looked", "Image 1 is better."), None, True),
    (chain("looked", "I think Image 1 is better"), None, True),
    (chain("looked", "Image 1  is better"), None, True),
    (chain("looked", "Image 3 is better"), None, True),
    (chain("looked", "Image 1 is better, or Image 2 is better"), None, True),
    (chain("looked", "Video 1 is better"), None, True),
    (chain("looked", "Answer 1 is better"), None, True),
    (chain("looked", "Both videos are equally good"), None, True),
    (chain("looked", "Both images are equally good"), 0, True),
])
def test_verdict_and_format_are_judged_apart_and_strictly(text, answer, format_ok):
    verdict = parse_verdict(text, "image_generation")
    assert (verdict.answer, verdict.format_ok) == (answer, format_ok)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_knows_its_own_verdicts_only(task):
    own = {"image_generation": "Image", "video_generation": "Video"}.get(task, "Answer")
    for noun in ("Image", "Video", "Answer"):
        for k in (1, 2):
            assert parse_verdict(chain("looked", f"{noun} {k} is better"), task).answer == (k if noun == own else None)
        tie = parse_verdict(chain("looked", f"Both {noun.lower()}s are equally good"), task).answer
        assert tie == (0 if noun == own and task in GENERATION else None)


def test_scores_under_another_tasks_noun_are_not_read():
    verdict = parse_verdict(chain(TWO_ITEMS + SUMS), "video_generation")
    assert (verdict.answer, verdict.scores, verdict.totals, verdict.consistent) == (None, {}, {}, False)


# ------------------------------------------------------------------------------------------------- parser: hostile text


@contextlib.contextmanager
def cpu_seconds(limit: float):
    """Stops what takes longer, in processor time: other work on the machine does not count."""

    def stop(*_):
        raise TimeoutError(f"more than {limit} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


REPEATED = ["(", "9", " ", "\n", "*", "a", "=", "1. a", "1. ", "1. a:", "1. **a", "(9/10", "(9/10)", "Image 1 ",
            "Image 1: (9/10). ", "1+", "1 + ", "11 ", "Image 1: 1+1",
            "<answer>", "</answer>", "<think>", "</think>", "</think>\n", "</think><answer>", "</think><answer></answer>.", "Total score"]


@pytest.mark.parametrize("around", ["{}", "<think>{}", "<think>1. A: Image 1: {}", "<think>Total score: Image 1: {}",
                                    "<think>{}</think>\n<answer>Image 1 is better</answer>", "<think>looked</think>{}<answer>Image 1 is better</answer>"])
def test_a_million_hostile_characters_are_read_in_under_a_second(around):
    slow = []
    for piece in REPEATED:
        text = around.format(piece * (1_000_000 // len(piece)))
        try:
            with cpu_seconds(1.0):
                parse_verdict(text, "image_generation")
        except TimeoutError:
            slow.append(piece)
    assert slow == []


def test_a_chain_with_pieces_lost_doubled_and_moved_is_read_only_where_that_is_safe():
    whole = re.split(r"(</?\w+>|\n| (?=Image))", chain(TWO_ITEMS + SUMS))
    rng, read, well_formed = random.Random(0), 0, 0
    for _ in range(5000):
        pieces = list(whole)
        for _ in range(rng.randint(1, 4)):
            piece = pieces.pop(rng.randrange(len(pieces))) if rng.random() < 0.7 else rng.choice(pieces)
            if rng.random() < 0.5:
                pieces.insert(rng.randrange(len(pieces) + 1), piece)
        text = "".join(pieces)
        verdict, tags = parse_verdict(text, "image_generation"), re.findall(r"</?\w+>", text)
        if verdict.answer is not None:
            read += 1
            assert verdict.answer == 1 and "<answer>Image 1 is better</answer>" in re.sub(r"\s*(</?answer>)\s*", r"\1", text.split("</think>", 1)[-1])
        if verdict.format_ok:
            well_formed += 1
            assert tags == ["<think>", "</think>", "<answer>", "</answer>"] and text.startswith("<think>") and text.endswith("</answer>")
        if verdict.consistent:
            assert verdict.answer == 1 and verdict.sums_ok and verdict.totals == {k: sum(pair[k] for pair in verdict.scores.values()) for k in (1, 2)}
    assert read > 1000 and well_formed > 1000


# ---------------------------------------------------------------------------------------------------------------- prompts


def words(parts: list) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text")


@pytest.mark.parametrize("style", ["short", "full"])
def test_a_prompt_shows_every_candidate_and_names_every_dimension(samples, style):
    for sample in samples:
        parts = data.build_prompt(sample, "think", style)
        assert [part[part["type"]] for part in parts if part["type"] != "text"] == sample.media
        assert {part["type"] for part in parts} == {"text", "video" if sample.task.startswith("video") else "image"}
        noun = data.candidate_noun(sample.task)
        for said in [sample.prompt, f"{noun} 1", f"{noun} 2", *sample.answers, *sample.scores]:
            assert said in words(parts)


def test_a_caption_stands_with_its_pictures_in_order(samples):
    parts = data.build_prompt(next(s for s in samples if s.task == "image_generation"), "answer")
    assert [part.get("text", part["type"])[:8] for part in parts[:4]] == ["Image 1:", "image", "Image 2:", "image"]


@pytest.mark.parametrize("task", TASKS)
def test_the_full_prompt_offers_exactly_the_verdicts_that_can_be_read(samples, task):
    sample = next(s for s in samples if s.task == task)
    offered = lambda mode, tie: [parse_verdict(chain("x", text), task).answer
                                 for text in re.findall("<answer>(.*?)</answer>", words(data.build_prompt(sample, mode, "full", tie)))]
    assert offered("think", False) == offered("answer", False) == [1, 2]
    assert offered("think", True) == [1, 2], "reasoning is forced choice"
    assert offered("answer", True) == ([1, 2, 0] if task in GENERATION else [1, 2])


def test_only_the_direct_mode_of_generation_speaks_of_ties(samples):
    for sample, mode, tie in itertools.product(samples, ("think", "answer"), (False, True)):
        said = "equally good" in words(data.build_prompt(sample, mode, allow_tie=tie))
        assert said == (tie and mode == "answer" and sample.task in GENERATION)


# ------------------------------------------------------------------------------------------------------ swapping, writing


@pytest.mark.parametrize("task", TASKS)
def test_swapping_moves_media_answers_scores_reasons_and_label_together(task):
    media = {"image_generation": ["a", "b"], "video_generation": [["a", "b"], ["c", "d"]],
             "image_understanding": ["a"], "video_understanding": [["a", "b"]]}[task]
    sample = Sample("7", task, "caption", media, ["one", "two"], 1, {"clarity": [9, 4]}, {"clarity": ["fluent", "two fillers"]}, "problem")
    before, swapped = copy.deepcopy(sample), sample.swapped()
    assert swapped == Sample("7", task, "caption", media[::-1], ["two", "one"], 2, {"clarity": [4, 9]}, {"clarity": ["two fillers", "fluent"]}, "problem")
    assert swapped.media[0] == media[-1], "the frames of a clip keep their order"
    assert swapped.swapped() == sample == before


@pytest.mark.parametrize("label, swapped", [(1, 2), (2, 1), (0, 0), (None, None)])
def test_ties_and_unknown_labels_stay_when_swapped(label, swapped):
    assert Sample("1", "image_generation", label=label).swapped().label == swapped


def test_swapping_a_reasoned_pair_swaps_its_totals(samples):
    for sample in samples:
        totals = lambda s: [sum(pair[k] for pair in s.scores.values()) for k in (0, 1)]
        assert totals(sample.swapped()) == totals(sample)[::-1] and sample.swapped().label != sample.label


def test_parts_survive_the_way_through_the_official_schema():
    parts = [{"type": "text", "text": "first "}, {"type": "image", "image": "a.png"}, {"type": "text", "text": " then "},
             {"type": "video", "video": ["b", "c", "d"]},
             {"type": "video", "video": ["e", "f", "g"]}, {"type": "text", "text": "\nwhich?"}, {"type": "image", "image": "h.png"}]
    assert data.to_text(parts) == ("first <image> then <video><video>\nwhich?<image>", ["a.png", *"bcdefg", "h.png"])
    assert data.from_text(*data.to_text(parts)) == parts


def test_prompts_survive_the_way_through_the_official_schema(samples):
    for sample, mode in itertools.product(samples, ("think", "answer")):
        parts = data.build_prompt(sample, mode)
        back = data.from_text(*data.to_text(parts))
        assert words(back) == words(parts) and data.to_text(back) == data.to_text(parts)
        assert [part for part in back if part["type"] != "text"] == [part for part in parts if part["type"] != "text"]


AWKWARD = 'say "hi" \\ <image> {"a": 1}\n\ttab é 漢字 🙂 <|im_end|>'


@pytest.mark.parametrize("label", [1, 2, 0, None])
def test_a_sample_survives_writing_and_reading(tmp_path, label):
    path = lambda name: str(tmp_path / "media" / name)
    written = [
        Sample("a", "image_generation", AWKWARD, [path("1.png"), path("2.png")], [], label, {"x": [1, 2]}, {"x": ["p", "q"]}),
        Sample("b", "video_generation", "", [[path("1.png"), path("2.png")], [path("3.png"), path("4.png")]], [], label),
        Sample("c", "image_understanding", AWKWARD, [path("1.png")], [AWKWARD, ""], label or None),
        Sample("d", "video_understanding", "?", [[path("1.png"), path("2.png"), path("3.png")]], ["x", "y"], label or None),
    ]
    data.write_jsonl(tmp_path / "rows.jsonl", map(data.sample_row, written))
    assert data.read_samples(tmp_path / "rows.jsonl") == written


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r"])
def test_a_line_ends_at_a_newline_and_at_nothing_else(tmp_path, separator):
    """JSON may hold U+2028 and its kind as they are; str.splitlines would cut the row there."""
    sample = Sample("a", "image_understanding", f"two{separator}lines", [str(tmp_path / "1.png")], ["x", "y"], 1)
    data.write_jsonl(tmp_path / "rows.jsonl", [data.sample_row(sample)] * 2)
    assert data.read_samples(tmp_path / "rows.jsonl") == [sample] * 2


def test_a_folder_can_be_moved_with_its_files(tmp_path, samples):
    (tmp_path / "here").mkdir()
    row = data.sample_row(Sample("a", "image_generation", "c", [str(tmp_path / "here" / "m" / "1.png"), str(tmp_path / "there" / "2.png")], label=1))
    data.write_jsonl(tmp_path / "here" / "rows.jsonl", [row])
    (tmp_path / "here").rename(tmp_path / "moved")
    assert data.read_samples(tmp_path / "moved" / "rows.jsonl")[0].media[0] == str(tmp_path / "moved" / "m" / "1.png")


def test_a_taught_response_survives_writing_and_reading(world, samples):
    written = [(sample, mode) for sample in samples for mode in ("think", "answer")]
    data.write_jsonl(world / "taught.jsonl", [data.sft_row(sample, f"reply to {sample.id}") | {"mode": mode} for sample, mode in written])
    assert data.read_conversations(world / "taught.jsonl") == [(data.build_prompt(sample, mode), f"reply to {sample.id}") for sample, mode in written]
    assert [sample.response for sample in data.read_samples(world / "taught.jsonl")] == [f"reply to {sample.id}" for sample, _ in written]
    assert data.read_samples(world / "taught.jsonl") == [sample for sample, _ in written], "the label stays the sample's, whatever the reply says"


# ---------------------------------------------------------------------------------------------------------- official rows

OFFICIAL = [  # task, verdict, number of files, media as read
    ("image_generation", "Image 2 is better", 2, lambda f: f),
    ("video_generation", "Video 1 is better", 8, lambda f: [f[:4], f[4:]]),
    ("image_understanding", "Answer 2 is better", 1, lambda f: f),
    ("video_understanding", "Answer 1 is better", 6, lambda f: [f]),
]


@pytest.mark.parametrize("schema", ["grpo", "grpo with tags", "sft"])
@pytest.mark.parametrize("task, verdict, count, media", OFFICIAL, ids=TASKS)
def test_official_rows_are_read_without_our_keys(tmp_path, task, verdict, count, media, schema):
    files = [f"frames/{k}.png" for k in range(count)]
    question = "<image>" * count + "A cat on a mat. Which of the two is better?"
    response = f"<think>1. Clarity: Answer 1 is fine, Image 1 too.</think>\n<answer>{verdict}</answer>"
    solution = verdict if schema == "grpo" else f"<answer>{verdict}</answer>"  # the official rows have it bare
    row = {"problem": question, "solution": solution, "images": files} if schema != "sft" else {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": response}], "images": files}
    (tmp_path / "rows.json").write_text(json.dumps([row]))  # the official files are JSON lists
    (sample,) = data.read_samples(tmp_path / "rows.json")
    assert (sample.task, sample.label) == (task, int(verdict.split()[1]))
    assert sample.media == media([str(tmp_path / file) for file in files])
    prompt = data.build_prompt(sample, "think")
    assert words(prompt) == "A cat on a mat. Which of the two is better?"
    assert [part[part["type"]] for part in prompt if part["type"] != "text"] == sample.media
    if schema == "sft":
        (parts, said), = data.read_conversations(tmp_path / "rows.json")
        assert said == response and words(parts) == words(prompt)


def test_an_official_row_that_asks_for_reasoning_can_be_asked_directly():
    sample = Sample("a", "image_generation", media=["a.png", "b.png"], label=1, problem="Reason between <think> and </think>, then answer.")
    asked = words(data.build_prompt(sample, "answer"))
    assert asked.startswith(sample.problem) and all(f"<answer>Image {k} is better</answer>" in asked for k in (1, 2)) and "equally" not in asked
    assert "equally" in words(data.build_prompt(sample, "answer", allow_tie=True))
    plain = dataclasses.replace(sample, problem="Which is better?")
    assert words(data.build_prompt(sample, "think")) == sample.problem and words(data.build_prompt(plain, "answer")) == plain.problem


def test_one_picture_may_stand_under_the_key_image(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "<image>What is it? ...", "solution": "Answer 2 is better", "image": "a.png"}')
    (sample,) = data.read_samples(tmp_path / "rows.jsonl")
    assert (sample.task, sample.label, sample.media) == ("image_understanding", 2, [str(tmp_path / "a.png")])


@pytest.mark.parametrize("task", GENERATION)
def test_an_official_tie_is_read_as_a_tie(tmp_path, task):
    noun = data.candidate_noun(task).lower()
    row = {"problem": "?", "solution": f"<answer>Both {noun}s are equally good</answer>", "images": ["a.png", "b.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (sample,) = data.read_samples(tmp_path / "rows.jsonl")
    assert (sample.task, sample.label) == (task, 0)


def test_an_official_row_can_be_written_again_and_keeps_its_question(tmp_path):
    """Stage 2 writes what it read into wrong.jsonl, and stage 3 reads that."""
    row = {"problem": "<image><image>A cat. Which is better?", "solution": "Image 1 is better", "images": ["a.png", "b.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    samples = data.read_samples(tmp_path / "rows.jsonl")
    data.write_jsonl(tmp_path / "again.jsonl", map(data.sample_row, samples))
    assert row.items() <= json.loads((tmp_path / "again.jsonl").read_text()).items()
    again = data.read_samples(tmp_path / "again.jsonl")
    assert data.build_prompt(again[0], "think") == data.build_prompt(samples[0], "think")


@pytest.mark.parametrize("lines, said", [
    (['{"task": "image_generation", "prompt": ""}', '{"id": '], "line 2"),
    (['{"problem": "?", "images": []}'], "line 1.*image_generation"),  # no task, no verdict: the message lists the tasks
    (['{"task": "image_generation", "prompt": "", "solution": "", "images": 3}'], "line 1"),
    (['"only a string"'], "line 1"),
    (["[1, 2"], "rows.jsonl"),
])
def test_a_broken_row_is_an_error_that_names_it(tmp_path, lines, said):
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(config.UserError, match=said):
        data.read_samples(tmp_path / "rows.jsonl")


def test_an_unknown_task_is_an_error_that_lists_the_tasks(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"task": "image_genration", "prompt": "", "solution": "", "images": []}')
    with pytest.raises(config.UserError, match="image_generation"):
        data.read_samples(tmp_path / "rows.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    data.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(TypeError):
        data.write_jsonl(tmp_path / "rows.jsonl", [{"a": 2}, {"a": object()}])
    assert data.read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]


# --------------------------------------------------------------------------------------------------------------- settings


def settings_of(tmp_path, text: str = "", *overrides):
    (tmp_path / "mine.toml").write_text(text)
    return config.load_settings(str(tmp_path / "mine.toml"), list(overrides))


def test_the_defaults_are_the_papers(tmp_path):
    made = settings_of(tmp_path)
    assert (made.grpo.lr, made.grpo.beta, made.grpo.group_size, made.grpo.prompts_per_step, made.grpo.temperature) == (1e-6, 0.04, 8, 64, 1.0)
    assert (made.grpo.kl, made.grpo.normalise, made.grpo.scale_by_std, made.grpo.updates_per_rollout) == ("k3", "rollout", True, 1)
    assert (made.cold_start.lr, made.cold_start.warmup, made.cold_start.batch_size, made.cold_start.epochs) == (2.5e-6, 0.03, 128, 3.0)
    assert made.cold_start == made.rejection_sft and made.grpo.freeze_vision and made.cold_start.freeze_vision


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    made = settings_of(tmp_path, "[grpo]\nsteps = 7\nbeta = 0.5", ("grpo.steps", "9"), ("grpo.scale_by_std", "false"), ("run.threads", "3"))
    assert (made.grpo.steps, made.grpo.beta, made.grpo.scale_by_std, made.run.threads, made.grpo.group_size) == (9, 0.5, False, 3, 8)


@pytest.mark.parametrize("text", ["[grpo]\ngroup_sise = 4", "[gpro]\ngroup_size = 4", "[grpo]\ngroupsize = 4"])
def test_an_unknown_setting_is_refused_and_the_nearest_one_named(tmp_path, text):
    with pytest.raises(config.UserError, match="grpo.group_size'"):
        settings_of(tmp_path, text)


@pytest.mark.parametrize("line", ["steps = 1.5", "steps = true", 'steps = "many"', "lr = true", 'lr = "fast"', "lr = [1.0]",
                                  "scale_by_std = 1", "scale_by_std = 0.0",
                                  'scale_by_std = "maybe"', "mode = 3", "mode = true"])
def test_a_wrong_type_is_refused_and_the_setting_named(tmp_path, line):
    with pytest.raises(config.UserError, match=f"grpo.{line.split()[0]}"):
        settings_of(tmp_path, f"[grpo]\n{line}")


@pytest.mark.parametrize("name, value", [("grpo.steps", "1.5"), ("grpo.steps", "ten"), ("grpo.steps", ""),
    ("distill.concurrency", "0"), ("data.max_pixels", "0"), ("distill.retries", "-1"), ("grpo.lr", "nan"),
    ("grpo.lr", "1e-"), ("grpo.scale_by_std", "1"), ("grpo.nothing", "1"), ("nothing.lr", "1")])
def test_a_wrong_override_is_refused_and_named(tmp_path, name, value):
    with pytest.raises(config.UserError, match=f"--{name}"):
        settings_of(tmp_path, "", (name, value))


def test_a_whole_number_will_do_for_a_float(tmp_path):
    made = settings_of(tmp_path, "[grpo]\nlr = 1", ("grpo.beta", "2"))
    assert (made.grpo.lr, made.grpo.beta) == (1.0, 2.0) and type(made.grpo.lr) is type(made.grpo.beta) is float


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_true_and_false_are_read_as_such(tmp_path, text, value):
    assert settings_of(tmp_path, "", ("grpo.freeze_vision", text), ("base.freeze_vision", text)).grpo.freeze_vision is value


def test_settings_never_leak_from_one_run_into_the_next(tmp_path):
    settings_of(tmp_path, "[grpo]\nsteps = 7\n[cold_start]\nlr = 1.0")
    assert settings_of(tmp_path) == config.Settings() and config.Settings().grpo.steps == 500 and config.Settings().rejection_sft.lr == 2.5e-6


def test_a_value_outside_a_section_and_broken_toml_are_refused(tmp_path):
    with pytest.raises(config.UserError, match="'steps' stands outside a section"):
        settings_of(tmp_path, "steps = 3")
    with pytest.raises(config.UserError, match="mine.toml"):
        settings_of(tmp_path, "[grpo\nsteps = 3")
    with pytest.raises(config.UserError, match="small"):
        config.load_settings("no-such-name", [])


# -------------------------------------------------------------------------------------------------------- the small world

MIXED = [(task, False) for task in TASKS for _ in range(8)]


def files_of(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_rows_and_pixels(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.write_split(tmp_path / name, "pairs", MIXED, shapes.SEEN, random.Random(seed))
    first, same, other = (files_of(tmp_path / name) for name in "abc")
    assert first == same and len(first) == 1 + 8 * (2 + 8 + 1 + 4)
    assert first["pairs.jsonl"] != other["pairs.jsonl"] and first["media/pairs-00000-0.png"] != other["media/pairs-00000-0.png"]


def test_every_file_of_a_row_is_a_picture_on_disk(samples):
    for sample in samples:
        files = [file for item in sample.media for file in data.flat(item)]
        assert len(files) == {"image_generation": 2, "video_generation": 8, "image_understanding": 1, "video_understanding": 4}[sample.task]
        assert {Image.open(file).size for file in files} == {(32, 32)}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """{SEEN or ALL: [(sample, scenes)]}, forty pairs of every task."""
    folder, plan = tmp_path_factory.mktemp("splits"), [(task, False) for task in TASKS for _ in range(40)]
    return {name: shapes.write_split(folder, name, plan, pool, random.Random(name)) for name, pool in (("SEEN", shapes.SEEN), ("ALL", shapes.ALL))}


def test_labels_follow_from_the_totals_and_half_of_them_are_one(split):
    for made in split.values():
        for sample, _ in made:
            totals = [sum(pair[k] for pair in sample.scores.values()) for k in (0, 1)]
            assert totals[0] != totals[1] and sample.label == 1 + (totals[1] > totals[0])
        for task in TASKS:
            assert sum(sample.label == 1 for sample, _ in made if sample.task == task) == 20


@pytest.mark.parametrize("task", GENERATION)
def test_a_tie_is_drawn_only_when_asked_for(task):
    for seed in range(20):
        sample, _ = draw(task, seed, tie=True)
        assert sample.label == 0 and len({sum(pair[k] for pair in sample.scores.values()) for k in (0, 1)}) == 1


def test_scores_are_those_of_the_facts_and_within_one_to_ten(split):
    for sample, _ in itertools.chain(*split.values()):
        assert tuple(sample.scores) == tuple(sample.reasons) == data.DIMENSIONS[sample.task]
        for dimension, facts in sample.reasons.items():
            assert sample.scores[dimension] == [shapes.score_of(dimension, fact) for fact in facts]
            assert set(sample.scores[dimension]) <= set(shapes.POSSIBLE) <= set(range(1, 11))


def test_facts_are_true_of_what_was_drawn(split):
    """Also after a pair was swapped to balance the labels."""
    for sample, scenes in itertools.chain(*split.values()):
        for k in (0, 1):
            scene = scenes[k] if sample.task in GENERATION else scenes[0]
            first, second, third = (sample.reasons[dimension][k] for dimension in data.DIMENSIONS[sample.task])
            for fact in first.split(", "):
                thing, said = fact.rsplit(" ", 1)
                true = thing == f"moves {scene.get('moves')}" if thing.startswith("moves") else tuple(thing.split()) in scene["items"]
                assert said == ("yes" if true else "no")
            if sample.task in GENERATION:
                assert second == scene["glance"] and third == ("none broken", "one broken", "two broken")[len(scene["broken"])]
                assert all(fact.rsplit(" ", 1)[0].split()[0] in sample.prompt for fact in first.split(", ") if not fact.startswith("moves"))
            else:
                said, true = second.removeprefix("says ").split(", is ")
                assert true == (scene["moves"] if sample.task == "video_understanding" else str(len(scene["items"])))
                assert said in re.findall(r"\w+", sample.answers[k])
                assert third == ("fluent", "one filler", "two fillers")[len(re.findall(r"\b(?:um|uh|er)\b", sample.answers[k]))]


def test_a_clean_picture_has_the_colours_of_its_items_and_no_other(split):
    seen = 0
    for _, scenes in split["SEEN"]:
        for scene in scenes:
            if scene["glance"] in ("vivid", "steady"):
                seen += 1
                found = {rgb for _, rgb in shapes.draw_scene(scene)[-1].getcolors()}
                assert {color for color, rgb in shapes.COLORS.items() if rgb in found} == {item[0] for item in scene["items"]}
    assert seen > 50


def test_the_mover_ends_where_it_was_said_to_go():
    for moves, (dx, dy) in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items():
        for seed in range(5):
            scene = shapes.make_scene(random.Random(seed), [("red", "circle"), ("blue", "square")], True, "steady", 0, moves)
            red = lambda frame: [(x, y) for x in range(32) for y in range(32) if frame.getpixel((x, y)) == shapes.COLORS["red"]]
            first, *_, last = ([sum(axis) / len(axis) for axis in zip(*red(frame))] for frame in shapes.draw_scene(scene))
            assert [round(b - a) for a, b in zip(first, last)] == [16 * dx, 16 * dy]


def text_of(sample) -> str:
    return " | ".join([sample.prompt, *sample.answers, *itertools.chain(*sample.reasons.values())])


def named_items(text: str) -> set:
    return {item for item in shapes.ALL if re.search(rf"\b{item[0]} {item[1]}\b", text)}


def test_held_out_combinations_are_never_named_or_drawn_where_the_model_learns(split):
    held_out = {("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "square"), ("black", "star")}
    for sample, scenes in split["SEEN"]:
        assert not named_items(text_of(sample)) & held_out
        assert not {item for scene in scenes for item in scene["items"]} & held_out
    seen = set.union(*(named_items(text_of(sample)) for sample, _ in split["SEEN"]))
    assert {color for color, _ in seen} == set(shapes.COLORS) and {shape for _, shape in seen} == set(shapes.SHAPES)


def test_a_held_out_pair_always_turns_on_a_held_out_combination(split):
    """It is asked for, claimed or denied in what the judge compares; to be somewhere in the picture alone would not test anything."""
    missing = [sample.id for sample, _ in split["ALL"] if not named_items(text_of(sample)) & shapes.HELDOUT]
    assert missing == []


@pytest.mark.parametrize("dimension, fact, score", [  # the table at the top of shapes.py, by hand
    ("semantic consistency", "red circle yes", 10), ("semantic consistency", "red circle yes, blue star no", 7),
    ("semantic consistency", "a b no, c d no, moves left no", 1),
    ("semantic accuracy", "red circle no, blue cross no", 4), ("semantic accuracy", "a b no, c d no, e f no, g h no", 1),
    ("aesthetics", "vivid", 9), ("aesthetics", "pale", 7), ("aesthetics", "faded", 4),
    ("temporal coherence", "steady", 9), ("temporal coherence", "flicker", 7), ("temporal coherence", "blank frame", 4),
    ("authenticity", "none broken", 10), ("authenticity", "one broken", 8), ("authenticity", "two broken", 5),
    ("clarity", "fluent", 9), ("clarity", "one filler", 7), ("clarity", "two fillers", 4),
    ("correctness", "says 3, is 3", 10), ("correctness", "says 3, is 4", 7), ("correctness", "says 5, is 4", 7), ("correctness", "says 1, is 4", 4),
    ("correctness", "says left, is left", 10), ("correctness", "says left, is right", 7),
    ("correctness", "says up, is down", 7), ("correctness", "says up, is left", 4),
])
def test_a_fact_earns_the_score_of_the_table(dimension, fact, score):
    assert shapes.score_of(dimension, fact) == score


def form_of(dimension: str, fact: str) -> str:
    """What a mistake leaves as it is: the items that were checked, the claim that was made, the ladder that was stood on."""
    if dimension in shapes.LADDER:
        return dimension if fact in dict(shapes.LADDER[dimension]) else "unknown"
    return fact.split(", ")[0] if fact.startswith("says ") else re.sub(r" (?:yes|no)\b", " ?", fact)


def test_a_mistake_is_always_another_fact_of_the_same_form(split):
    rng, changed_score = random.Random(0), 0
    for sample, _ in split["SEEN"]:
        for dimension, facts in sample.reasons.items():
            for fact in facts:
                wrong = shapes.mistake(rng, dimension, fact)
                assert wrong != fact and form_of(dimension, wrong) == form_of(dimension, fact)
                changed_score += shapes.score_of(dimension, wrong) != shapes.score_of(dimension, fact)
    assert changed_score > 0.8 * 160 * 6, "hardly any mistake goes without consequence"


# --------------------------------------------------------------------------------------------------------------- practice


@pytest.fixture(scope="module")
def exercises(split) -> list:
    """[(kind, task, prompt text, response)]: every kind on every task, many times."""
    rng = random.Random(1)
    return [(kind, sample.task, words(parts), response) for sample, scenes in split["SEEN"] for kind in pretrain.CONSOLIDATION for _ in range(3)
            for parts, response in [pretrain.practice(rng, kind, sample, scenes)]]


def test_every_exercise_is_practised_on_every_task_in_its_own_words(exercises):
    assert set(pretrain.CONSOLIDATION) == {"name", "name_pair", "check", "rate", "compare", "total", "decide", "total_decide", "conclude", "tagged", "direct"}
    for kind, task in itertools.product(("rate", "compare", "total", "decide", "total_decide", "conclude", "direct"), TASKS):
        own, others = data.candidate_noun(task), {"Image", "Video", "Answer"} - {data.candidate_noun(task)}
        for _, _, prompt, response in [e for e in exercises if e[:2] == (kind, task)]:
            assert re.search(rf"\b{own}\b", response) and not re.search(rf"\b(?:{'|'.join(others)}) [12]", prompt + response)
    for kind in ("name", "name_pair", "check", "tagged"):
        assert {e[1] for e in exercises if e[0] == kind and e[3]} == set(TASKS)


def test_no_exercise_is_a_whole_chain_of_thought(exercises):
    for kind, _, prompt, response in exercises:
        assert "Steps: check, score, total, decide" not in prompt
        assert not (re.search(r"^\d\. ", response, re.MULTILINE) and "<answer>" in response)
        assert kind != "compare" or "<answer>" not in response, "what is reasoned about a pair is not decided"
        assert kind not in ("total_decide", "decide") or not re.search("Caption|Question", prompt), "what is decided is given as numbers"


def test_what_an_exercise_names_and_checks_is_true_of_the_picture_it_shows(split):
    rng, said = random.Random(3), {"yes": 0, "no": 0}
    for sample, scenes in split["SEEN"]:
        for kind in ("name", "name_pair", "check"):
            parts, response = pretrain.practice(rng, kind, sample, scenes)
            shown = [part[part["type"]] for part in parts if part["type"] != "text"]
            which = int(re.search(r"shapes of (?:image|video) (\d)", words(parts))[1]) - 1 if kind == "name_pair" else 0
            scene = scenes[sample.media.index(shown[which])]
            if kind != "check":
                assert named_items(response) == set(scene["items"])
                assert kind == "name" or re.match(r"(?:Image|Video) (\d): ", response)[1] == str(which + 1)
                continue
            for thing, answer in (fact.rsplit(" ", 1) for fact in response.split(", ")):
                true = thing == f"moves {scene.get('moves')}" if thing.startswith("moves") else tuple(thing.split()) in scene["items"]
                assert thing in words(parts) and answer == ("yes" if true else "no")
                said[answer] += 1
    assert min(said.values()) > 50


def test_sums_and_verdicts_of_the_exercises_are_right(exercises):
    checked = 0
    for kind, task, prompt, response in exercises:
        for terms, total in re.findall(r"([\d+]+)=(\d+)", prompt + response):
            checked += 1
            assert sum(map(int, terms.split("+"))) == int(total)
        if kind in ("decide", "total_decide", "conclude"):
            totals = dict(re.findall(r"\w+ ([12]): [\d+]+=(\d+)", prompt + response))
            assert f" {max(totals, key=lambda k: int(totals[k]))} is better" in response and totals["1"] != totals["2"]
        if kind == "total":
            given = [re.findall(r"\((\d+)/10\)", half) for half in prompt.split(" 2: ")]
            assert re.findall(r"([\d+]+)=", response) == ["+".join(side) for side in given]
    assert checked > 1000


def test_written_practice_has_every_kind_no_held_out_item_and_ties_only_where_asked(tmp_path):
    pretrain.write_practice(tmp_path, pairs=120, rows_per_pair=6, simple=30, rng=random.Random(2))
    rows = data.read_jsonl(tmp_path / "practice.jsonl")
    assert {row["kind"] for row in rows} == set(pretrain.PRACTICE)
    assert {row["kind"] for row in data.read_jsonl(tmp_path / "consolidation.jsonl")} == set(pretrain.CONSOLIDATION)
    for skill, factor, kinds, tasks, dimensions in pretrain.SKILLS + pretrain.COMPARISONS:
        simple = data.read_jsonl(tmp_path / f"{skill}.jsonl")
        assert len(simple) == round(30 * factor) and {row["kind"] for row in simple} <= set(kinds)
        if dimensions:
            assert all(set(data.parse_verdict(row["conversations"][1]["value"], tasks[0]).scores) <= set(dimensions) for row in simple)
    ties = 0
    for row, (parts, response) in zip(rows, data.read_conversations(tmp_path / "practice.jsonl"), strict=True):
        prompt = row["conversations"][0]["value"]
        assert not named_items(prompt + response) & shapes.HELDOUT
        ties += "equally good" in response
        assert "equally good" not in response or "are both equally good?" in prompt
        assert all(Image.open(file).size == (32, 32) for part in parts if part["type"] != "text" for file in data.flat(part[part["type"]]))
    assert ties >= 6


def test_fresh_practice_compares_on_the_first_dimension_and_as_many_others_as_its_phase_says(tmp_path, monkeypatch):
    mixture = pretrain.mixture
    monkeypatch.setattr(pretrain, "mixture", lambda *given: [row | {"mixed": True} for row in mixture(*given)])
    pretrain.write_fresh(tmp_path, 80, random.Random(2))
    for phase, factor, _, others in pretrain.FRESH:
        rows, found = data.read_jsonl(tmp_path / f"{phase}.jsonl"), set()
        pairs = data.read_samples(tmp_path / f"{phase}-pairs.jsonl")
        assert len(pairs) == 4 * round(20 * factor) and sum(sample.task == "video_generation" for sample in pairs) == len(pairs) / 2
        assert {"direct", "conclude"} < {row["kind"] for row in rows if "mixed" in row}
        chosen = [row for row in rows if "mixed" not in row]
        assert len(chosen) == 1.5 * len(pairs) and {row["kind"] for row in chosen} == {"compare", "name_pair"}
        for row in chosen:
            said = row["conversations"][1]["value"]
            assert not named_items(row["conversations"][0]["value"] + said) & shapes.HELDOUT
            if row["kind"] == "compare":
                scored = max((data.parse_verdict(said, task).scores for task in data.TASKS), key=len)
                found.add(len(scored))
                assert {"semantic consistency", "semantic accuracy"} & set(scored)
        assert found == {1 + count for count in others}


def test_the_splits_are_drawn_apart_by_seed_and_held_out_items_stand_where_they_belong(tmp_path):
    def drawn(split, seed=0, **changes):
        own = config.Data(**dict(distill_pairs=16, pool_pairs=8, test_pairs=8, heldout_pairs=8, tie_pairs=9) | changes)
        shapes.draw_split(split, config.Settings(config.Run(seed=seed), own), tmp_path / f"{split}{seed}")
        return data.read_samples(tmp_path / f"{split}{seed}" / f"{split}.jsonl")

    made = {split: drawn(split) for split in ("distill", "pool", "test", "heldout", "ties")} | {"pool of seed 1": drawn("pool", 1)}
    texts = {split: {text_of(sample) for sample in some} for split, some in made.items()}
    assert all(not texts[one] & texts[other] for one, other in itertools.combinations(texts, 2)), "no pair is tested that was learnt from"
    for split, some in texts.items():
        assert [bool(named_items(text) & shapes.HELDOUT) for text in some] == [split == "heldout"] * len(some), split
    count = lambda some, **wanted: {task: sum(s.task == task and all(getattr(s, k) == v for k, v in wanted.items()) for s in some) for task in TASKS}
    assert count(made["distill"]) == dict.fromkeys(TASKS, 0) | {"image_generation": 16} and count(drawn("distill", distill_tasks="all")) == dict.fromkeys(TASKS, 4)
    assert count(made["ties"]) == {task: 9 * (task in GENERATION) for task in TASKS} and count(made["ties"], label=0) == {task: 3 * (task in GENERATION) for task in TASKS}
    assert count(made["test"]) == dict.fromkeys(TASKS, 8) and count(made["test"], label=1) == dict.fromkeys(TASKS, 4)


def test_answers_stand_in_a_prompt_under_their_own_numbers(samples):
    for sample in (s for s in samples if s.task not in GENERATION):
        assert words(data.build_prompt(sample, "answer")).startswith(f"\nQuestion: {sample.prompt}\nAnswer 1: {sample.answers[0]}\nAnswer 2: {sample.answers[1]}\n")
