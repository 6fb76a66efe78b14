"""Metrics against brute force, benchmarks in their released layouts, comparison of results, and the judge on the shipped base."""

import copy
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import evaluate
import model as M
import report
import shapes
import stages
from results import bench

ROOT = Path(__file__).resolve().parent.parent
BASE = str(ROOT / "configs" / "small-base")


def run(command, *arguments):
    """A command line in this process; a user's mistake is raised."""
    evaluate.command_line(command, list(map(str, arguments)))


def refused(command, *arguments) -> str:
    with pytest.raises(config.UserError) as error:
        run(command, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade % 256, 90, 200)).save(path, "PNG")
    return path


@pytest.fixture(scope="module")
def base():
    return M.load(BASE)


@pytest.fixture
def pictures(tmp_path) -> list:
    return [picture(tmp_path / f"{k}.png", 60 * k) for k in range(3)]


# ---------------------------------------------------------------------------------------------------------------- metrics


def test_fewer_pairs_are_drawn_from_all_of_a_split_and_keep_its_order(tmp_path):
    """Ties come first in the small world's split, and a test of one's own has its sources in blocks."""
    settings = config.Settings()
    shapes.draw_split("ties", settings, tmp_path / "data")
    everything = evaluate.read_split("ties", settings, tmp_path)
    settings.evaluate.test_pairs = 30
    few = evaluate.read_split("ties", settings, tmp_path)
    assert [s.task for s in few] == ["image_generation"] * 30 + ["video_generation"] * 30 and few == [s for s in everything if s in few]
    assert len(everything) == 180 and 10 <= sum(s.label == 0 for s in few) <= 30 and few == evaluate.read_split("ties", settings, tmp_path)


def random_rows(seed: int, both: bool = True) -> list:
    """Judgements with ties, unreadable outputs, and totals that are sometimes missing or equal."""
    rng, rows = random.Random(seed), []
    for k in range(rng.randrange(8, 40)):
        label, group = rng.choice([0, 1, 1, 2, 2]), rng.choice(["general", "hallucination", "reasoning"])
        for swapped in (False, True) if both else (False,):
            shown = {1: 2, 2: 1}.get(label, label) if swapped else label
            rows.append({"id": f"{k}", "swapped": swapped, "task": "image_generation", "mode": "think", "label": shown, "group": group,
                         "answer": rng.choice([1, 2, 1, 2, 0, None]), "margin": rng.choice([None, -6, -2, -1, 0, 0, 1, 3, 5]),
                         "format_ok": True, "sums_ok": True, "consistent": True, "scores_right": None})
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_metrics_equal_brute_force_with_ties_and_unreadable_outputs(seed):
    rows = random_rows(seed, both=seed % 3 > 0)
    made = bench.benchmark_metrics(rows)

    def accuracy(some):  # in whole numbers: right judgements / judgements
        right = 0
        for row in some:
            if row["answer"] is not None and row["answer"] == row["label"]:
                right += 1
        return right / len(some)

    assert made["overall"]["accuracy"] == pytest.approx(accuracy(rows), abs=1e-4)
    assert made["overall"]["unreadable"] == pytest.approx(sum(row["answer"] is None for row in rows) / len(rows), abs=1e-4)
    assert made["diff"]["accuracy"] == pytest.approx(accuracy([row for row in rows if row["label"] in (1, 2)]), abs=1e-4)
    assert made["tau"]["accuracy"] == made["overall"]["accuracy"]
    groups = {row["group"] for row in rows}
    assert made["macro"]["accuracy"] == pytest.approx(sum(accuracy([r for r in rows if r["group"] == g]) for g in groups) / len(groups), abs=1e-4)
    best = 0
    for threshold in range(0, 8):  # margins are whole numbers below 8
        right = 0
        for row in rows:
            if row["answer"] is None or row["margin"] is None:
                continue  # wrong
            said = 0 if -threshold <= row["margin"] <= threshold else 1 if row["margin"] > 0 else 2
            right += said == row["label"]
        best = max(best, right / len(rows))
    assert made["tau_calibrated"]["accuracy"] == pytest.approx(best, abs=1e-4)
    if seed % 3:
        agree = 0
        for first, second in zip(rows[::2], rows[1::2]):
            agree += first["answer"] is not None and {1: 2, 2: 1, 0: 0}[first["answer"]] == second["answer"]
        assert made["overall"]["orders_agree"] == pytest.approx(agree / (len(rows) // 2), abs=1e-4)
    for cell in made.values():
        assert cell["low"] <= cell["accuracy"] <= cell["high"]


def test_an_unreadable_output_is_wrong_and_never_a_tie():
    row = random_rows(0)[0] | {"label": 0, "answer": None, "margin": 0}
    made = bench.benchmark_metrics([row, row | {"id": "other", "answer": 0}])
    assert (made["tau"]["accuracy"], made["tau_calibrated"]["accuracy"], made["overall"]["unreadable"]) == (0.5, 0.5, 0.5) and "diff" not in made


def test_the_interval_is_that_of_a_mean_over_pairs_not_over_judgements():
    rng = np.random.default_rng(1)
    values = (rng.random(400) < 0.7).astype(float)
    made, error = evaluate.interval(values), 1.96 * values.std() / 20
    assert made["low"] == pytest.approx(values.mean() - error, abs=0.01) and made["high"] == pytest.approx(values.mean() + error, abs=0.01)
    rows = [random_rows(0)[0] | {"id": f"{k}", "label": 1, "answer": int(2 - value)} for k, value in enumerate(values)]
    doubled = rows + [row | {"swapped": True, "label": 2, "answer": 3 - row["answer"]} for row in rows]  # the same verdicts once more
    once, twice = evaluate.summarise(rows), evaluate.summarise(doubled)
    assert (once["low"], once["high"], once["pairs"]) == (twice["low"], twice["high"], twice["pairs"])


def test_the_macro_interval_follows_from_the_errors_of_the_groups():
    rng, rows = np.random.default_rng(2), []
    for group, count, p in (("general", 183, 0.6), ("hallucination", 749, 0.8), ("reasoning", 318, 0.5)):
        rows += [random_rows(0)[0] | {"id": f"{group}{k}", "group": group, "label": 1, "answer": 1 if rng.random() < p else 2} for k in range(count)]
    made = bench.benchmark_metrics(rows)
    variance = sum(made[g]["accuracy"] * (1 - made[g]["accuracy"]) / made[g]["pairs"] for g in ("general", "hallucination", "reasoning")) / 9
    assert made["macro"]["high"] - made["macro"]["low"] == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_the_macro_interval_of_small_groups_stays_between_0_and_1():
    rows = [random_rows(0)[0] | {"id": f"{group}{k}", "group": group, "label": 1, "answer": 2 - (k == 0)} for group in ("general", "reasoning") for k in range(2 + 10 * (group == "general"))]
    for right in (1, 2):
        made = bench.benchmark_metrics([row | {"label": right} for row in rows])["macro"]
        assert 0 <= made["low"] <= made["accuracy"] <= made["high"] <= 1


def test_official_groups_have_their_sizes_on_a_list_made_by_the_rules():
    sources = {"hallucination_pair-": 301, "RLAIF-V-": 400, "RLHF-V-": 48, "mathverse_": 200, "mmmu_pro_test_Art_": 118,
               "wildvision-battle-": 150, "LRVInstruction-": 20, "jailbreak-": 13}
    ids = [f"{prefix}{k}" for prefix, count in sources.items() for k in range(count)]
    found = [bench.group_of("vl_rewardbench", key) for key in ids]
    assert len(ids) == 1250 and [found.count(name) for name in ("general", "hallucination", "reasoning")] == [183, 749, 318]
    assert bench.group_of("genai_image", "RLHF-V-1") == ""


@pytest.mark.parametrize("first, second", [(0, 0), (0, 1), (0, 6), (2, 5), (4, 4), (5, 4), (7, 3), (1, 11)])
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_lopsided(first, second):
    n = first + second
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    lopsided = [abs(2 * heads - n) >= abs(first - second) for heads in tosses]
    assert bench.mcnemar(first, second) == pytest.approx(sum(lopsided) / len(tosses), rel=1e-12)


def test_mcnemar_of_thousands_agrees_with_its_normal_limit():
    z = (3100 - 2900 - 1) / 6000**0.5  # with continuity correction
    assert bench.mcnemar(2900, 3100) == pytest.approx(math.erfc(z / 2**0.5), rel=0.01)


# ------------------------------------------------------------------------------------------------------------- benchmarks


def image_bytes(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def vl_row(name: str, ranking=(0, 1), **more) -> dict:
    return {"id": name, "query": "<image>\nWhat is it?", "response": ["a square", "a circle"], "image": f"images/{name}.png",
            "human_ranking": list(ranking), "models": ["x", "y"], "judge": "human", "rationale": "", "query_source": "z", "ground_truth": ""} | more


def vl_file(folder: Path) -> Path:
    rows = [vl_row("RLAIF-V-1"), vl_row("mathverse_2", (1, 0)), vl_row("wildvision-3"), vl_row("RLAIF-V-1", (1, 0))]
    for row in rows:
        picture(folder / row["image"])
    rows += [vl_row("gone"), vl_row("mmmu_4", (1, 1), image=rows[0]["image"]), vl_row("mmmu_5", image=rows[0]["image"], response=["", "x"]), "no row"]
    (folder / "torn.png").write_bytes(image_bytes(1)[:40])
    rows.append(vl_row("torn", image="torn.png"))
    (folder / "vl.json").write_text(json.dumps(rows, indent=1))
    return folder / "vl.json"


def test_vl_rewardbench_reads_labels_and_names_every_broken_row(tmp_path):
    samples, broken = bench.read_benchmark("vl_rewardbench", [str(vl_file(tmp_path))])
    assert [(s.label, s.task, s.answers, s.prompt) for s in samples.values()] == [
        (label, "image_understanding", ["a square", "a circle"], "What is it?") for label in (1, 2, 1, 2)]
    assert [key.split("#")[0] for key in samples] == ["RLAIF-V-1", "mathverse_2", "wildvision-3", "RLAIF-V-1"]  # an id that comes twice is two pairs
    assert samples["RLAIF-V-1"].media == [str(tmp_path / "images" / "RLAIF-V-1.png")]
    assert [line.split(": ")[0] for line in broken] == [f"{tmp_path / 'vl.json'}, row {number}" for number in (5, 6, 7, 8, 9)]
    assert "gone.png" in broken[0] and "[1, 1]" in broken[1] and "empty" in broken[2] and "torn.png" in broken[4]


def test_genai_video_takes_frames_from_the_folder_of_the_videos_name(tmp_path):
    votes = {"leftvote": 1, "rightvote": 2, "tievote": 0, "bothbad_vote": 0}
    rows = [{"id": k, "prompt": "a train", "video_left": f"l{k}.mp4", "video_right": f"r{k}.mp4", "vote_type": vote} for k, vote in enumerate(votes)]
    for row in rows:
        for side in ("video_left", "video_right"):
            for frame in range(12):
                picture(tmp_path / "clips" / row[side].removesuffix(".mp4") / f"{frame}.png")
    (tmp_path / "genai.json").write_text(json.dumps(rows))
    samples, broken = bench.read_benchmark("genai_video", [str(tmp_path)], str(tmp_path / "clips"))
    assert not broken and [s.label for s in samples.values()] == [1, 2, 0, 0] and list(samples) == ["0", "1", "2", "3"]
    assert [Path(file).name for file in samples["0"].media[1]] == ["1.png", "4.png", "7.png", "10.png"]  # four of twelve, 10 after 9
    assert samples["0"].media[0][0] == str(tmp_path / "clips" / "l0" / "1.png")


def test_a_line_separator_in_a_caption_ends_no_csv_row_and_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for name in "ab":
        picture(tmp_path / name / "1.png")
    table, head = tmp_path / "x.csv", "path_A,path_B,prompt,Overall\n"
    table.write_text(head + "a,b,one\u2028two,A\na,b,one\x85two,B\n", encoding="utf-8")
    samples, broken = bench.read_benchmark("videogen_rewardbench", [str(table)])
    assert not broken and [(s.prompt, s.label) for s in samples.values()] == [("one\u2028two", 1), ("one\x85two", 2)]
    for content in ((head + "a,b,café,A\n").encode("latin-1"), (head + "a,b," + "x" * 200_000 + ",A\n").encode()):
        table.write_bytes(content)
        with pytest.raises(config.UserError, match="cannot read .*x.csv"):
            bench.read_benchmark("videogen_rewardbench", [str(table)])


@pytest.mark.parametrize("more", [{"response": "ab"}, {"response": ["a", "b", "c"]}, {"response": ["a"]}])
def test_a_benchmark_row_without_two_answers_is_broken(tmp_path, more):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "vl.json").write_text(json.dumps([vl_row("a"), vl_row("a", **more)]))
    samples, broken = bench.read_benchmark("vl_rewardbench", [str(tmp_path / "vl.json")])
    assert len(samples) == 1 and len(broken) == 1 and "row 2" in broken[0]


def test_videogen_rewardbench_reads_the_overall_verdict_of_its_csv(tmp_path):
    with open(tmp_path / "videogen-rewardbench.csv", "w", newline="") as stream:
        table = csv.DictWriter(stream, ["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall"])
        table.writeheader()
        for overall in ("A", "B", "same", "?"):
            sides = {"path_A": "videos/a/1.mp4", "path_B": "videos/b/1.mp4"}
            table.writerow(sides | {"prompt": 'two\nlines, "quoted"', "VQ": "same", "Overall": overall})
    picture(tmp_path / "videos/a/1/1.png"), picture(tmp_path / "videos/b/1/1.png")
    samples, broken = bench.read_benchmark("videogen_rewardbench", [str(tmp_path)])
    assert [s.label for s in samples.values()] == [1, 2, 0] and len(broken) == 1 and "row 4" in broken[0]
    assert all(s.task == "video_generation" and s.prompt == 'two\nlines, "quoted"' for s in samples.values())


def test_sharegptvideo_takes_the_chosen_answer_as_the_better_one(tmp_path):
    for frame in range(3):
        picture(tmp_path / "v_1" / f"frame_{frame}.png")
    row = {"id": "v_1_0", "video": "v_1", "prompt": "<video>\nWhat happens?", "chosen": "rain", "rejected": "snow", "chosen_score": 5}
    rows = [row, {k: v for k, v in row.items() if k != "rejected"}, row | {"video": "x" * 5000}]
    data.write_jsonl(tmp_path / "test.jsonl", rows)
    samples, broken = bench.read_benchmark("sharegptvideo", [str(tmp_path / "test.jsonl")])
    frames = [str(tmp_path / "v_1" / f"frame_{k}.png") for k in range(3)]
    assert samples["v_1_0"] == data.Sample("v_1_0", "video_understanding", "What happens?", [frames], ["rain", "snow"], 1)
    assert len(broken) == 2 and "row 2" in broken[0] and "rejected" in broken[0] and "row 3" in broken[1]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is optional")
def test_parquet_images_are_written_once(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a cat", "left_model": "x", "left_image": {"bytes": image_bytes(k), "path": "l.png"}, "right_model": "y",
             "right_image": {"bytes": image_bytes(9), "path": None}, "vote_type": "leftvote"} for k in (1, 2)]
    file = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    samples, broken = bench.read_benchmark("genai_image", [str(file)])
    assert not broken and len(samples) == 2
    written = {path: path.stat().st_mtime_ns for path in file.with_suffix(".media").iterdir()}
    assert len(written) == 3  # the right one is the same in both rows
    assert [Image.open(path).getpixel((0, 0)) for path in list(samples.values())[1].media] == [(2, 0, 0), (9, 0, 0)]
    bench.read_benchmark("genai_image", [str(file)])
    assert written == {path: path.stat().st_mtime_ns for path in file.with_suffix(".media").iterdir()}


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refused("bench", "--benchmark", "genai_image", "--path", tmp_path / "x.parquet", "--model", BASE)


def test_bench_counts_broken_rows_goes_on_where_it_was_stopped_and_keeps_its_results(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results" / "vl.json"
    line = ["bench", "--benchmark", "vl_rewardbench", "--path", vl_file(tmp_path), "--model", BASE, "--mode", "answer"]
    line += ["--batch-rows", 1, "--max-new-tokens", 10, "--out", out]
    with stages.alone(tmp_path / "busy.lock", out):
        assert "another process is at work in " in refused(*line[:-1], tmp_path / "busy.json")
    run(*line)
    printed, first, kept = capsys.readouterr().out, json.loads(out.read_text()), out.with_suffix(".jsonl").read_text()
    assert "5 broken rows left out" in printed and printed.count("left out: ") == 5 == len(first["broken"])
    rows = data.read_jsonl(out.with_suffix(".jsonl"))
    assert len(rows) == 8 and all(sum(row["swapped"] for row in rows if row["id"] == key) == 1 for key in {row["id"] for row in rows})
    assert first["metrics"]["overall"]["pairs"] == 4 and {"general", "hallucination", "reasoning", "macro"} < set(first["metrics"])
    texts, = out.parent.glob("*.texts")
    whole = texts.read_bytes()
    for stopped in (whole[: whole.index(b"\n") + 1], whole[:-40]):  # after the first two pairs; in the middle of a line
        texts.write_bytes(stopped)
        out.with_suffix(".jsonl").unlink()
        run(*line)
        assert texts.read_bytes() == whole and out.with_suffix(".jsonl").read_text() == kept and json.loads(out.read_text()) == first
    assert "give another --out" in refused(*line[:-4], "--max-new-tokens", 9, "--out", out)
    assert out.with_suffix(".jsonl").read_text().count("\n") == 8
    monkeypatch.setattr(M, "generate", None)
    run(*line)  # nothing is left to sample
    assert out.with_suffix(".jsonl").read_text() == kept and json.loads(out.read_text()) == first
    (tmp_path / "mine.json").write_text("my own")
    for name in (out.with_suffix(".jsonl"), tmp_path / "mine.json", tmp_path):
        assert "give another --out" in refused(*line[:-1], name)
    assert out.with_suffix(".jsonl").read_text() == kept and (tmp_path / "mine.json").read_text() == "my own"


@pytest.mark.parametrize("mode", ["answer", "think"])
def test_a_swapped_pair_scores_the_same(base, samples, mode):
    own, turned = config.Evaluate(max_new_tokens=120), [s.swapped() for s in samples]
    judged = [evaluate.judge(*base, some, mode, own, orders=(False, True)) for some in (samples, turned)]
    first, second = (sorted(((r["id"], r["label"], r["answer"], r["text"]) for r in rows), key=str) for rows in judged)
    assert first == second and {label for _, label, *_ in first} == {1, 2}
    metrics = [evaluate.summarise(rows) for rows in judged]
    assert metrics[0] == metrics[1]


def test_a_pair_whose_answers_stand_in_an_official_prompt_is_judged_in_one_order(base, samples):
    """The text of such a row cannot be turned round, so its second order would have the wrong label."""
    rows = [data.row_sample({key: value for key, value in data.sample_row(s).items() if key not in ("prompt", "answers")}, data.Path("/")) for s in samples]
    judged = evaluate.judge(*base, rows, "answer", config.Evaluate(max_new_tokens=8), orders=(False, True))
    orders = {task: sorted(row["swapped"] for row in judged if row["task"] == task) for task in data.TASKS}
    assert orders == {task: [False] * 3 + [True] * 3 * data.is_generation(task) for task in data.TASKS}


# -------------------------------------------------------------------------------------------------------------- comparing


def result(path: Path, rights: list, **more) -> Path:
    """A result file of which pair k is right in both orders, in one, or in none."""
    rows = [{"id": f"{k}", "task": "image_generation", "swapped": swapped, "label": 1, "answer": 1 if swapped < right else 2} | more
            for k, right in enumerate(rights) for swapped in (False, True)]
    data.write_jsonl(path.with_suffix(".jsonl"), rows)
    return path


def test_compare_counts_the_test_split_alone_in_all_and_in_the_tasks(tmp_path, capsys):
    """So they are the table's figures; ties, which a thinking judge is not offered, and pairs never trained on have lines of their own."""
    rights = {"a": {"test": [2, 2, 1, 0], "ties": [0] * 6}, "b": {"test": [2, 2, 2, 2], "ties": [0] * 6}}
    for name, splits in rights.items():
        rows = [row | {"id": split + row["id"]} for split, some in splits.items()
                for row in data.read_jsonl(result(tmp_path / "part.json", some, split=split).with_suffix(".jsonl"))]
        data.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    run("compare", tmp_path / "a.json", tmp_path / "b.json")
    cells = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert cells == [["all", "4", "62.5", "100.0"], ["image_generation", "4", "62.5", "100.0"], ["test", "4", "62.5", "100.0"], ["ties", "6", "0.0", "0.0"]]


def test_compare_reports_difference_and_discordant_pairs(tmp_path, capsys):
    rng = random.Random(0)
    a, b = [rng.choice([0, 1, 2]) for _ in range(60)], [rng.choice([0, 2, 2, 2, 2]) for _ in range(60)]
    run("compare", result(tmp_path / "a.json", a), result(tmp_path / "b.json", b))
    lines = capsys.readouterr().out.splitlines()
    worse, better = sum(y < x for x, y in zip(a, b)), sum(y > x for x, y in zip(a, b))
    for line in lines[-2:]:  # all, and the one task
        cells = line.replace("[", " ").replace("]", " ").replace(",", " ").split()
        assert [int(cells[1]), int(cells[7]), int(cells[8])] == [60, worse, better]
        assert float(cells[2]) == pytest.approx(100 * sum(a) / 120, abs=0.06) and float(cells[3]) == pytest.approx(100 * sum(b) / 120, abs=0.06)
        assert float(cells[4]) == pytest.approx(100 * (sum(b) - sum(a)) / 120, abs=0.06)
        assert 0 < float(cells[5]) < float(cells[4]) < float(cells[6])
        assert float(cells[9]) == pytest.approx(bench.mcnemar(worse, better), rel=0.01)
    assert [line.split()[0] for line in lines[-2:]] == ["all", "image_generation"]


def test_compare_refuses_different_pairs(tmp_path):
    a = result(tmp_path / "a.json", [1, 2, 0])
    assert "different pairs" in refused("compare", a, result(tmp_path / "b.json", [1, 2]))
    assert "different pairs" in refused("compare", a, result(tmp_path / "c.json", [1, 2, 0], label=2))
    assert "missing.json" in refused("compare", a, tmp_path / "missing.json")
    for name, digest in (("seed0", "x"), ("again", "x"), ("seed1", "y")):  # ids are the same whatever the seed
        run_folder = tmp_path / name
        (run_folder / "evaluate").mkdir(parents=True), (run_folder / "data").mkdir()
        (run_folder / "data" / "test.jsonl").write_text(digest), (run_folder / "data" / "done.json").write_text('{"id": "data 1"}')
        state = ["grpo 1", "data 1", {"test": stages.digest(run_folder / "data" / "test.jsonl")}, {}]
        result(run_folder / "evaluate" / "grpo-think.json", [1, 2, 0]).write_text(json.dumps({"splits": {}, "state": state}))
    first, again, other = (tmp_path / name / "evaluate" / "grpo-think.json" for name in ("seed0", "again", "seed1"))
    run("compare", first, again)
    assert "another seed" in refused("compare", first, other)
    (tmp_path / "again" / "grpo").mkdir(), (tmp_path / "again" / "grpo" / "done.json").write_text('{"id": "grpo 1"}')
    run("compare", first, again)
    (tmp_path / "again" / "grpo" / "done.json").write_text('{"id": "grpo 2"}')
    assert "before its checkpoint" in refused("compare", first, again)
    (tmp_path / "pairs.jsonl").write_text('{"id": "1", "task": "image_generation", "label": 1}\n')
    assert "pairs.jsonl, line 1: KeyError: 'swapped'" in refused("compare", a, tmp_path / "pairs.jsonl")


# ------------------------------------------------------------------------------------------------------------------ judge


def test_judge_on_the_command_line_prints_reasoning_table_and_verdict(samples, capsys):
    sample = next(s for s in samples if s.task == "image_generation")
    run("judge", "--model", BASE, "--task", sample.task, "--prompt", sample.prompt, "--max-new-tokens", 160, *sample.media)
    out, err = capsys.readouterr()
    assert out.startswith("<think>") and "Image 1   Image 2" in out and out.splitlines()[-1].startswith("verdict: ")
    assert err.splitlines()[-1] == f"model: {BASE} (short prompts)"


def test_judge_json_has_votes_of_both_orders_in_the_numbering_given(pictures, capsys):
    run("judge", "--model", BASE, "--task", "image_generation", "--prompt", "a red square", "--votes", 3, "--json", "--mode", "answer",
        "--max-new-tokens", 10, *pictures[:2])
    made = json.loads(capsys.readouterr().out)
    pair = made["pairs"][0]
    assert made["style"] == "short" and pair["candidates"] == [str(path) for path in pictures[:2]]
    assert [row["swapped"] for row in pair["judgements"]] == [False] * 3 + [True] * 3
    said = []
    for row in pair["judgements"]:
        shown = data.parse_answer(row["text"], "image_generation")
        said.append(3 - shown if row["swapped"] and shown in (1, 2) else shown)
        assert row["answer"] == said[-1]
    assert pair["votes"] == {"1": said.count(1), "2": said.count(2), "0": said.count(0), "null": said.count(None)}
    assert pair["margin"] == pytest.approx((said.count(1) - said.count(2)) / 6)


def test_judge_pairs_is_batched_and_turns_scores_of_the_swapped_order_back(base, samples):
    own = config.Evaluate(max_new_tokens=160)
    together = evaluate.judge_pairs(*base, samples, own=own)
    assert [result["id"] for result in together] == [s.id for s in samples] and len(together) == 12
    turned = 0
    for sample, result in zip(samples, together):
        given, swapped = result["judgements"]
        for row, shown in ((given, sample), (swapped, sample.swapped())):
            verdict = data.parse_verdict(row["text"], shown.task)
            at = (lambda k: 3 - k) if row["swapped"] else (lambda k: k)
            assert row["scores"] == {name: {at(k): score for k, score in pair.items()} for name, pair in verdict.scores.items()}
            assert row["totals"] == {at(k): total for k, total in verdict.totals.items()}
            assert row["margin"] == (row["totals"][1] - row["totals"][2] if len(row["totals"]) == 2 else None)
            turned += row["swapped"] and bool(verdict.scores)
    assert turned


def test_judge_pairs_shows_a_pair_that_cannot_be_turned_in_one_order(base, samples):
    """The answers of such a row stand inside its prompt; what follows it in the batch keeps its own judgements."""
    fixed = data.Sample("fixed", "image_understanding", media=samples[6].media, label=1, problem="Answer 1: a cat. Answer 2: a dog. Which is better?")
    own = config.Evaluate(max_new_tokens=12)
    made = evaluate.judge_pairs(*base, [fixed, samples[0]], own=own)
    alone = evaluate.judge_pairs(*base, [samples[0]], own=own)[0]
    assert [row["swapped"] for row in made[0]["judgements"]] == [False] and sum(made[0]["votes"].values()) == 1
    assert [(row["id"], row["text"]) for row in made[1]["judgements"]] == [(row["id"], row["text"]) for row in alone["judgements"]]
    assert made[1]["votes"] == alone["votes"] and [row["id"] for row in alone["judgements"]] == [samples[0].id] * 2


def test_ranking_goes_by_points_then_by_total_margin():
    pairs = [(0, 1), (0, 2), (1, 2)]
    results = [{"answer": 2, "total_margin": -3.0}, {"answer": 1, "total_margin": 1.0}, {"answer": 2, "total_margin": None}]  # b > a > c > b
    rows = evaluate.ranking(pairs, results, ["a", "b", "c"])
    assert [(row["candidate"], row["points"], row["total_margin"]) for row in rows] == [("b", 1, 3), ("c", 1, -1), ("a", 1, -2)]
    results = [{"answer": None, "total_margin": None}, {"answer": 0, "total_margin": 0.0}, {"answer": 1, "total_margin": 4.0}]
    assert [(row["candidate"], row["points"]) for row in evaluate.ranking(pairs, results, ["a", "b", "c"])] == [("b", 1.5), ("a", 1.0), ("c", 0.5)]


def test_rank_judges_every_pair_in_both_orders(pictures, capsys):
    run("judge", "--model", BASE, "--task", "image_generation", "--prompt", "a red square", "--rank", "--json", "--mode", "answer",
        "--max-new-tokens", 10, *pictures)
    made = json.loads(capsys.readouterr().out)
    names = [str(path) for path in pictures]
    assert sorted(map(sorted, (pair["candidates"] for pair in made["pairs"]))) == [sorted(pair) for pair in itertools.combinations(names, 2)]
    assert all(len(pair["judgements"]) == 2 for pair in made["pairs"])
    points = dict.fromkeys(names, 0.0)
    for pair in made["pairs"]:
        for k, name in enumerate(pair["candidates"], 1):
            points[name] += 0.5 if not pair["answer"] else float(pair["answer"] == k)
    assert {row["candidate"]: row["points"] for row in made["ranking"]} == points and sum(points.values()) == 3


@pytest.mark.parametrize("as_folder", [True, False])
def test_video_understanding_takes_a_folder_or_the_frames(tmp_path, capsys, as_folder):
    frames = [picture(tmp_path / "clip" / f"{k}.png", 50 * k) for k in range(4)]
    run("judge", "--model", BASE, "--task", "video_understanding", "--prompt", "What moves?", "--answer", "a square", "--answer", "a circle",
        "--json", "--mode", "answer", "--max-new-tokens", 10, *([tmp_path / "clip"] if as_folder else frames))
    pair = json.loads(capsys.readouterr().out)["pairs"][0]
    sample = data.Sample("", "video_understanding", "What moves?", [list(map(str, frames))], ["a square", "a circle"])
    alone = evaluate.judge_pairs(*M.load(BASE), [sample], "answer", orders=(False,), own=config.Evaluate(max_new_tokens=10))[0]
    assert pair["candidates"] == ["a square", "a circle"] and pair["judgements"][0]["text"] == alone["judgements"][0]["text"]


@pytest.mark.parametrize("arguments, says", [
    (["--task", "image_generation", "nowhere.png", "nowhere.png"], "nowhere.png"),
    (["--task", "image_generation", __file__, __file__], "cannot identify image"),
    (["--task", "images", "A", "B"], "invalid choice: 'images'"),
    (["--task", "image_generation", "A"], "got 1 files"),
    (["--task", "image_generation", "A", "B", "A"], "--rank"),
    (["--task", "image_generation", "--answer", "x", "A", "B"], "1 answers"),
    (["--task", "image_understanding", "--answer", "x", "A"], "1 answers"),
    (["--task", "image_understanding", "--answer", "x", "--answer", "y", "A", "B"], "one medium"),
    (["--task", "image_generation", "--model", "no/such/folder", "A", "B"], "no/such/folder"),
    (["--task", "image_generation", "--prompt-file", "nowhere.txt", "A", "B"], "nowhere.txt"),
    (["--task", "image_generation", "--votes", "many", "A", "B"], "invalid int value"),
    (["--task", "image_generation", "--votes", "-2", "A", "B"], "--votes 0 or more"),
    (["--task", "image_generation", "--max-new-tokens", "0", "A", "B"], "1 or more"),
    (["--task", "image_generation", "--batch-rows", "0", "A", "B"], "1 or more"),
    (["--task", "image_generation", "--votes", "2", "--endpoint", "http://x", "A", "B"], "no votes"),
    (["--task", "image_generation", "--endpoint", "x:8000", "A", "B"], "'x:8000' is to be http(s)://"),
    (["--task", "image_generation"], "media"),
])
def test_mistakes_get_one_line(arguments, says, pictures):
    files = {"A": str(pictures[0]), "B": str(pictures[1])}
    known = [] if "--model" in arguments else ["--model", BASE]
    assert says in refused("judge", "--prompt", "a red square", *known, *[files.get(argument, argument) for argument in arguments])


def test_without_model_the_newest_run_is_taken_and_its_style_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    options = Namespace(model=None, style=None, prompt_file=None, mode="think", max_new_tokens=5, batch_rows=2, votes=0, endpoint="",
                        key_variable="")
    with pytest.raises(config.UserError, match="no trained run under"):
        evaluate.choose_model(options)
    for age, name in enumerate(["old/cold_start", "old/grpo", "new/grpo", "newest/rejection_sft"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        done = tmp_path / "runs" / name / "done.json"
        done.write_text('{"id": "1"}')
        os.utime(done, (age + 1, age + 1))
        expected = {0: "old/cold_start", 1: "old/grpo", 2: "new/grpo", 3: "new/grpo"}[age]  # GRPO before any earlier stage
        assert evaluate.choose_model(options)[:2] == (str(tmp_path / "runs" / expected), "short")
        assert f"{expected} (short prompts)" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    assert evaluate.choose_model(Namespace(**vars(options) | {"model": str(tmp_path / "elsewhere")}))[1] == "full"
    of = lambda mode: evaluate.choose_model(Namespace(**vars(options) | {"model": str(tmp_path / "runs" / "new" / "grpo"), "mode": mode}))[1]
    for base, direct in ((BASE, "short"), (tmp_path / "elsewhere", "full")):  # which bare verdicts were asked of a base from elsewhere with
        (tmp_path / "runs" / "new" / "base").mkdir(exist_ok=True)
        (tmp_path / "runs" / "new" / "base" / "done.json").write_text(json.dumps({"id": "base 1", "settings": {"model": {"path": str(base)}}}))
        assert (of("think"), of("answer")) == ("short", direct)
    (tmp_path / "runs" / "new" / "grpo" / "done.json").write_text('{"id": "1", "settings": {"grpo": {"start": "base"}}}')  # it never learnt the short ones
    assert of("think") == "full"
    assert evaluate.choose_model(Namespace(**vars(options) | {"model": "someone/model", "style": "short"}))[:2] == ("someone/model", "short")


def test_a_prompt_file_replaces_the_text_in_the_order_shown(base, pictures, tmp_path, capsys):
    template = "{prompt}? {noun} 1: {answer_1}; {noun} 2: {answer_2}. {dimensions}. {verdicts} {{x}}"
    sample = data.Sample("", "image_understanding", "what {noun}", [str(pictures[0])], ["a", "b"])
    assert data.fill_template(template, sample.swapped(), "think") == (
        "what {noun}? Answer 1: b; Answer 2: a. semantic accuracy, correctness, clarity. Answer 1 is better or Answer 2 is better {x}")
    (tmp_path / "own.txt").write_text("Which is better, {noun} 1 ({answer_1}) or {noun} 2 ({answer_2})? Answer directly.")
    run("judge", "--model", BASE, "--task", sample.task, "--prompt", "what", "--answer", "a", "--answer", "b", "--prompt-file", tmp_path / "own.txt",
        "--mode", "answer", "--max-new-tokens", 10, "--json", pictures[0])
    own = json.loads(capsys.readouterr().out)["pairs"][0]["judgements"][0]["text"]
    asked = [{"type": "image", "image": str(pictures[0])}]
    asked += [{"type": "text", "text": "Which is better, Answer 1 (a) or Answer 2 (b)? Answer directly."}]
    model, processor = base
    made = M.generate(model, processor, [M.encode(processor, model, asked)], max_new_tokens=10, temperature=0.0)
    assert own == processor.text(made.ids[0, : made.lengths[0]])
    wrong = [(b"{caption}", "caption"), (b"{prompt.x}", "no attribute 'x'"), (b"{prompt[a]}", "indices"), (b'{"a": 1}', "{{ or }}"),
             (b"{", "{{ or }}"), (b"", "it is empty"), (b" \n", "it is empty"), (b"caf\xe9", "wrong.txt: 'utf-8' codec")]
    for text, said in wrong:
        (tmp_path / "wrong.txt").write_bytes(text)
        assert said in refused("judge", "--model", BASE, "--task", sample.task, "--prompt", "what", "--answer", "a", "--answer", "b",
                               "--prompt-file", tmp_path / "wrong.txt", pictures[0])


# ------------------------------------------------------------------------------------------------------------- the report


def test_every_figure_stands_under_its_own_head():
    """No two figures of the row are the same, so none can stand in another's column."""
    figures = iter(range(1, 100))
    cells = lambda: {scope: next(figures) / 100 for scope in (*data.TASKS, "all")}
    test, heldout, ties = cells(), cells(), {name: next(figures) / 100 for name in ("tau_calibrated", "diff", "tau")}
    quality = {name: next(figures) / 100 for name in report.QUALITY}
    row = {"name": "row", "splits": {"test": test | {"all": quality}, "heldout": heldout}, "ties": ties}
    shown = {part: dict(zip(heads, cells[1:])) for part, (_, _, heads, [cells]) in report.tables([row]).items()}
    assert shown["test"]["image gen."] == test["image_generation"] and shown["test"]["all pairs"] == quality
    assert list(shown["heldout"].values()) == list(heldout.values())
    assert shown["ties"] == {"diff": ties["diff"], "tau": ties["tau"], "tau calibrated": ties["tau_calibrated"]}
    names = {"format_ok": "format", "sums_ok": "sums right", "consistent": "follows", "scores_right": "scores right", "facts_right": "facts right",
             "orders_agree": "orders agree", "first_chosen": "first chosen", "unreadable": "unreadable"}
    assert shown["quality"] == {head: quality[name] for name, head in names.items()}


def test_the_browser_calls_right_only_what_is_the_label():
    sample = data.Sample("1", "image_generation", label=1)
    said = lambda answer: report.said_by({"answer": answer, "scores": {}, "text": ""}, sample)["right"]
    assert [said(answer) for answer in (1, 2, 0, None)] == [True, False, False, False]


def test_the_report_is_written_from_a_run_that_is_still_going(world, samples, tmp_path):
    """Stages are missing, one checkpoint is judged on some of the pairs, and a line of metrics is being written."""
    out = tmp_path / "run"
    assert "No checkpoint has been judged on such pairs" in report.write(out).read_text()
    for stage in ("data", "cold_start", "grpo"):
        (out / stage).mkdir()
    data.write_jsonl(out / "data" / "test.jsonl", map(data.sample_row, samples))
    texts = [data.write_reasoning(s.task, s.reasons, s.scores, data.verdict_string(s.task, s.label)) for s in samples[:9]]
    judged = [(sample, text, data.parse_verdict(text, sample.task)) for sample, text in zip(samples, texts)]
    rows = [{"split": "test", "id": s.id, "swapped": False, "task": s.task, "mode": "think", "label": s.label, "answer": v.answer, "text": text,
             "scores": v.scores, "scores_right": 1.0, "facts_right": 1.0, "format_ok": True, "sums_ok": True, "consistent": True} for s, text, v in judged]
    data.write_jsonl(out / "evaluate" / "cold_start-think.jsonl", rows)
    cells = {"state": report.judged_of("cold_start", out) + [{}], "splits": {"test": {"all": evaluate.summarise(rows)}, "heldout": {}}, "ties": {}}
    (out / "evaluate" / "cold_start-think.json").write_text(json.dumps(cells))
    (out / "cold_start" / "done.json").write_text(json.dumps({"made": "9 examples", "seconds": 2.0}))
    steps = [json.dumps({"step": k, "reward_accuracy": 0.25 * k, "kl": 0.001 * k}) + "\n" for k in (1, 2, 3)]
    (out / "grpo" / "metrics.jsonl").write_text("".join(steps)[:-20])
    done = subprocess.run([sys.executable, ROOT / "report.py", out], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(out / "evaluate" / "report.html")
    page = (out / "evaluate" / "report.html").read_text()
    assert "9 examples (2 s)" in page and "not finished, 2 steps so far" in page and "9 of 9 judged pairs" in page
    assert "reward_accuracy: from 0.375 to 0.375 in 2 steps" in page and "in 3 steps" not in page and "entropy: from" not in page
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert shown["stages"] == ["+ cold start"] and {pair["id"] for pair in shown["pairs"]} == {sample.id for sample in samples[:9]}
    by_id = {sample.id: sample for sample in samples}
    for pair in shown["pairs"]:
        sample, said = by_id[pair["id"]], pair["said"][0]
        assert said["right"] and said["scores"] == [[name, truth, truth] for name, truth in sample.scores.items()]
        assert pair["facts"] == [[name, [list(fact) for fact in zip(sample.scores[name], sample.reasons[name])]] for name in sample.scores]
        assert len(pair["media"]) == len(sample.media) and all(item["src"].startswith("data:image/png;base64,") for item in pair["media"])
    (out / "cold_start" / "done.json").write_text(json.dumps({"id": "cold_start 2", "made": "9 examples", "seconds": 2.0}))
    assert "No checkpoint has been judged on such pairs" in report.write(out).read_text(), "the checkpoint is not the one that was judged"
    (out / "cold_start" / "done.json").write_text(json.dumps({"made": "9 examples", "seconds": 2.0}))
    data.write_jsonl(out / "data" / "test.jsonl", map(data.sample_row, samples[1:]))
    assert "No checkpoint has been judged on such pairs" in report.write(out).read_text(), "these are not the pairs that were judged"
    (out / "grpo" / "metrics.jsonl").write_text(steps[0] + steps[1][:9] + "\n" + steps[2])
    done = subprocess.run([sys.executable, ROOT / "report.py", out], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {out / 'grpo' / 'metrics.jsonl'} is damaged") and done.stderr.count("\n") == 1


def test_no_margin_need_count_as_a_tie():
    """Where every larger total wins rightly the best threshold is 0, though no margin is."""
    rows = [random_rows(0)[0] | {"id": f"{k}", "label": 1 + k % 2, "answer": 1 + k % 2, "margin": (3, -1)[k % 2]} for k in range(6)]
    assert evaluate.tie_metrics(rows)["tau_calibrated"]["accuracy"] == 1


def test_each_resample_takes_its_own_best_threshold():
    """Of two choices of which one is right exactly where the other is wrong, the better is right in half or more of any resample."""
    one = np.arange(100) % 2
    assert evaluate.interval(one)["low"] < 0.45 < 0.5 <= evaluate.interval(np.array([one, 1 - one]))["low"]


def test_facts_and_scores_are_held_against_their_own_truth(tiny, samples, tmp_path):
    """A text that was kept before a stop: the right scores for both candidates, and for one of them a fact that is none."""
    sample = samples[0]
    facts = {name: ["nothing", pair[1]] for name, pair in sample.reasons.items()}
    text = data.write_reasoning(sample.task, facts, sample.scores, data.verdict_string(sample.task, sample.label))
    data.write_jsonl(tmp_path / "texts.jsonl", [{"texts": [text]}])
    row, = evaluate.judge(*tiny, [sample], "think", config.Evaluate(), file=tmp_path / "texts.jsonl")
    assert (row["text"], row["scores_right"], row["facts_right"]) == (text, 1.0, 0.5)


def test_votes_are_drawn_at_temperature_one(base, samples):
    rows = evaluate.judge(*base, samples, "answer", config.Evaluate(max_new_tokens=12), votes=6)
    prompts = [M.encode(base[1], base[0], data.build_prompt(sample, "answer")) for sample in samples]
    drawn = lambda temperature: M.generate(*base, prompts, 6, 12, temperature, seeds=range(len(samples)))
    texts = lambda made: [base[1].text(ids[:length]) for ids, length in zip(made.ids, made.lengths)]
    assert [row["text"] for row in rows] == texts(drawn(1.0)) != texts(drawn(0.7))


@pytest.fixture
def checkpoint(tiny, samples, tmp_path) -> Path:
    """A run folder with a finished direct_sft whose base comes from elsewhere, and pairs in all splits."""
    M.save(*tiny, tmp_path / "direct_sft")
    (tmp_path / "direct_sft" / "done.json").write_text('{"id": "direct_sft 1"}')
    (tmp_path / "data").mkdir()
    for split in ("test", "heldout", "ties"):
        some = [s for s in samples if split != "ties" or data.is_generation(s.task)]
        data.write_jsonl(tmp_path / "data" / f"{split}.jsonl", [data.sample_row(dataclasses.replace(s, id=f"{split}-{s.id}")) for s in some])
    return tmp_path


def test_a_checkpoint_is_judged_in_both_orders_with_ties_offered_where_there_are_some_and_anew_with_other_settings(tiny, checkpoint):
    settings = config.Settings(evaluate=config.Evaluate(max_new_tokens=6))
    def judged():
        evaluate.judge_checkpoint("direct_sft", "answer", settings, checkpoint)
        return [(row["split"], row["id"], row["swapped"], row["text"]) for row in data.read_jsonl(checkpoint / "evaluate" / "direct_sft-answer.jsonl")]
    def expected(style="full", ties=True):
        found = []
        for split in ("test", "heldout", "ties"):
            for s in data.read_samples(checkpoint / "data" / f"{split}.jsonl"):
                for swapped in (False, True) if split == "test" else (False,):
                    prompt = M.encode(tiny[1], tiny[0], data.build_prompt(s.swapped() if swapped else s, "answer", style, ties and split == "ties"))
                    made = M.generate(*tiny, [prompt], 1, settings.evaluate.max_new_tokens, 0.0)
                    found.append((split, s.id, swapped, tiny[1].text(made.ids[0, : made.lengths[0]])))
        return found
    first = judged()
    assert first == expected() and first != expected(style="short") and first != expected(ties=False)
    settings.evaluate.max_new_tokens = 3
    assert judged() == expected() != first


def test_who_learnt_from_prompts_of_their_own_is_judged_with_those_only_or_when_asked_to(samples, checkpoint, capsys):
    official = {key: value for key, value in data.sample_row(samples[0]).items() if key != "prompt"}
    judge = ("judge", "--task", "image_generation", "--prompt", "x", "--model", checkpoint / "direct_sft", "--max-new-tokens", "2", *samples[0].media)
    for rows in ([data.sample_row(s) for s in samples], [data.sample_row(samples[0]), official]):
        data.write_jsonl(checkpoint / "data" / "distill.jsonl", rows)
        run(*judge) if len(rows) > 2 else None
    assert "learnt from rows with prompts of their own" in refused(*judge) and "distill.jsonl" in refused(*judge)
    run(*judge, "--style", "full")
    assert "(full prompts)" in capsys.readouterr().err


def test_what_an_earlier_checkpoint_said_before_a_stop_is_not_taken_for_the_present_ones(tiny, checkpoint):
    settings, ties = config.Settings(evaluate=config.Evaluate(max_new_tokens=6)), checkpoint / "data" / "ties.jsonl"
    row = lambda: data.read_jsonl(checkpoint / "evaluate" / "direct_sft-answer.jsonl")[0]["text"]
    evaluate.judge_checkpoint("direct_sft", "answer", settings, checkpoint)
    whole, first = ties.read_bytes(), row()
    ties.write_text("{}\n")
    with pytest.raises(config.UserError, match="ties.jsonl"):  # after the test was judged
        evaluate.judge_checkpoint("direct_sft", "answer", settings, checkpoint)
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    M.save(model, tiny[1], checkpoint / "direct_sft")
    (checkpoint / "direct_sft" / "done.json").write_text('{"id": "direct_sft 2"}')
    ties.write_bytes(whole)
    evaluate.judge_checkpoint("direct_sft", "answer", settings, checkpoint)
    prompt = M.encode(tiny[1], model, data.build_prompt(data.read_samples(checkpoint / "data" / "test.jsonl")[0], "answer", "full"))
    made = M.generate(model, tiny[1], [prompt], 1, 6, 0.0)
    assert row() == tiny[1].text(made.ids[0, : made.lengths[0]]) != first
