"""Every script end to end through its command line, on configs/smoke.toml, with real files and real processes."""

import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config
import data
import grpo
import model as M
import sft
import stages
from base import pretrain
from test_resume import run  # a process forked from one that has everything imported


def script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """One run of the whole chain: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    done = script("grpo.py", "--config", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_the_chain_makes_every_stage_and_ends_with_table_and_report(chain):
    out, printed = chain
    for stage in ("data", "base", "distill", "cold_start", "rejection", "rejection_sft", "direct_sft", "grpo", "grpo_direct", "evaluate"):
        assert f"== {stage}: python " in printed
        done = json.loads((out / stage / "done.json").read_text())
        assert done["settings"]["run"]["seed"] == 0 and done["made"]
    for name, _, _ in stages.ROWS:
        assert name in printed.split("accuracy % on the test split")[1]
    assert (out / "evaluate" / "report.html").stat().st_size > 10_000
    rows = json.loads((out / "evaluate" / "results.json").read_text())["rows"]
    assert [row["splits"]["test"]["all"]["pairs"] for row in rows] == [16] * 7
    assert all(0 <= row["splits"]["test"][task]["accuracy"] <= 1 for row in rows for task in data.TASKS)


def test_a_second_run_reuses_everything(chain):
    out, _ = chain
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    code, printed = run("grpo.py --config smoke --out {0}", out)
    assert code == 0 and "\n== " not in printed and "accuracy % on the test split" in printed
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_changing_grpo_alone_reuses_all_before_it(chain, tmp_path):
    out, _ = chain
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    code, printed = run("grpo.py --config smoke --out {0} --grpo.beta 0 --grpo.updates_per_rollout 2 --grpo.random_order true --grpo.steps 6", copy)
    assert code == 0, printed[-3000:]
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("== ")] == ["== grpo", "== evaluate"]
    metrics = data.read_jsonl(copy / "grpo" / "metrics.jsonl")
    assert len(metrics) == 6 and all(row["kl"] == 0 for row in metrics)
    wrong = {s.id: s for s in data.read_samples(out / "rejection" / "wrong.jsonl")}
    turned = [(wrong[row["id"]].label != row["label"], wrong[row["id"]].answers != row["answers"]) for row in data.read_jsonl(copy / "grpo" / "samples.jsonl")]
    assert {label for label, _ in turned} == {True, False} and all(label or not answers for label, answers in turned), "some pairs turned round, whole"


def test_a_repeated_stage_makes_what_was_built_on_it_stale(chain, tmp_path):
    out, _ = chain
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    assert run("distill.py --config smoke --out {0} --force", copy)[0] == 0
    _, printed = run("sft.py --config smoke --out {0} --stage cold_start", copy)
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("== ")] == ["== cold_start"]


@pytest.mark.parametrize("command, gone, again", [
    ("rejection.py", "data/pool.jsonl", ["data"]), ("rejection.py", "cold_start/model.safetensors", ["cold_start", "rejection"]),
    ("grpo.py", "evaluate/report.html", ["evaluate"]), ("evaluate.py", "evaluate/results.json", ["evaluate"]), ("distill.py", "data/media", [])])
def test_what_is_gone_is_made_again_and_nothing_else(chain, tmp_path, command, gone, again):
    """The data are the same again, so what was trained on them still counts. Media are not looked for: they may be anywhere."""
    shutil.copytree(chain[0], tmp_path / "run")
    lost = tmp_path / "run" / gone
    before = lost.read_bytes() if lost.is_file() else shutil.rmtree(lost)
    lost.unlink(missing_ok=True)
    code, printed = run(command + " --config smoke --out {0}", tmp_path / "run")
    assert code == 0 and [line.split()[1].strip(":") for line in printed.splitlines() if line.startswith("== ")] == again
    assert not again or lost.stat().st_size and (lost.suffix != ".jsonl" or lost.read_bytes() == before)


def test_explained_are_the_run_itself_and_its_formulas(chain, tmp_path):
    shutil.copytree(chain[0], out := tmp_path / "run")
    shown = {script: run(script + " --config smoke --out {0} --explain", out) for script in ("sft.py", "rejection.py", "grpo.py")}
    assert [code for code, _ in shown.values()] == [0, 0, 0]
    learnt = [float(row[-1]) for line in shown["sft.py"][1].splitlines() if len(row := line.rsplit(maxsplit=2)) == 3 and row[1] == "yes"]
    part, tokens = re.search(r"its part of the loss: ([\d.]+) / (\d+) =", shown["sft.py"][1]).groups()
    assert len(learnt) > 20 and sum(learnt) == pytest.approx(float(part), abs=0.0005 * len(learnt)) and int(tokens) > len(learnt)
    wrong, correct = (data.read_jsonl(out / "rejection" / f"{name}.jsonl") for name in ("wrong", "correct"))
    texts = {row["id"]: (row["judged"], "wrong.jsonl -> GRPO") for row in wrong}
    texts |= {row["id"]: (row["conversations"][1]["value"], "correct.jsonl -> SFT") for row in correct}
    ids = re.findall(r"_(?:generation|understanding), (pool-\d+): ", shown["rejection.py"][1])
    assert len(ids) == 4
    for id in ids:
        said = shown["rejection.py"][1].partition(f", {id}: ")[2]
        assert texts[id][0] in said and re.search(r"the label is \d: (.*)", said)[1] == texts[id][1]
    rows = [line.split() for line in shown["grpo.py"][1].splitlines() if re.match(r"\s+\d+ .* [+-]\d", line)]
    R, A = (torch.tensor([[float(row[k]) for row in rows]]) for k in (-3, -2))
    assert len(rows) == 4 and R.unique().numel() > 1 and torch.allclose(grpo.group_advantages(R), A, atol=0.006)


def test_grpo_reads_what_its_settings_name_and_that_is_made_first(tmp_path):
    order = lambda *changes: stages.plan(["grpo", "grpo_direct"], config.load_settings("smoke", list(changes)))
    assert order() == ["base", "data", "distill", "cold_start", "rejection", "rejection_sft", "grpo", "grpo_direct"]
    assert order(("grpo.start", "direct_sft"), ("grpo.data", "pool")) == ["base", "data", "distill", "cold_start", "rejection", "direct_sft", "grpo", "grpo_direct"]
    assert order(("grpo.start", "base"), ("grpo.data", "pool")) == ["base", "data", "grpo", "grpo_direct"]
    assert "rejection" in order(("grpo.start", "base"), ("grpo.data", "correct"))
    reads = stages.made_of("grpo", config.load_settings("smoke", [("grpo.start", "direct_sft")]), tmp_path)
    assert {"direct_sft", "rejection", "data"} < set(reads) and "rejection_sft" not in reads


def test_a_base_from_elsewhere_is_told_the_verdicts_and_what_is_compared_with_it_too(chain, tmp_path):
    for base, asked in ((ROOT / "configs" / "small-base", "Answer directly."), (tmp_path, "Write exactly one of: <answer>")):
        settings = config.load_settings("smoke", [("model.path", str(base))])
        _, examples = sft.start_and_examples("direct_sft", settings, chain[0])
        assert examples and all(asked in parts[-1]["text"] for parts, _ in examples)
    assert stages.style("answer", config.load_settings("smoke", []), chain[0], "base") == "short", "trained in the run itself"
    style = lambda start: stages.style("think", config.load_settings("smoke", [("model.path", str(tmp_path)), ("grpo.start", start)]), chain[0], "grpo")
    assert [style(start) for start in ("base", "direct_sft", "cold_start", "rejection_sft")] == ["full", "full", "short", "short"]


def test_filters_sort_by_label_and_lose_nothing(chain):
    out, _ = chain
    pool = {s.id: s for s in data.read_samples(out / "data" / "pool.jsonl")}
    correct, wrong = data.read_jsonl(out / "rejection" / "correct.jsonl"), data.read_jsonl(out / "rejection" / "wrong.jsonl")
    assert sorted([row["id"] for row in correct + wrong]) == sorted(pool)
    for row in correct:
        verdict = data.parse_verdict(row["conversations"][1]["value"], row["task"])
        assert verdict.format_ok and verdict.answer == pool[row["id"]].label
    for row in wrong:
        verdict = data.parse_verdict(row["judged"], row["task"])
        assert not verdict.format_ok or verdict.answer != pool[row["id"]].label
    kept, dropped = data.read_jsonl(out / "distill" / "kept.jsonl"), data.read_jsonl(out / "distill" / "dropped.jsonl")
    assert len(kept) + len(dropped) == 24 and all(row["dropped"] for row in dropped)
    assert {row["task"] for row in kept + dropped} == {"image_generation"}
    for path in ("distill/kept.jsonl", "rejection/correct.jsonl", "rejection/wrong.jsonl"):
        for sample in data.read_samples(out / path):
            assert all(Path(file).is_file() for item in sample.media for file in data.flat(item))


def test_grpo_logs_its_health_and_its_samples(chain):
    out, _ = chain
    for row in data.read_jsonl(out / "grpo" / "metrics.jsonl"):
        for name in ("reward", "reward_format", "reward_accuracy", "zero_variance_share", "kl", "entropy", "clip_share", "length", "truncated_share", "grad_norm",
                     "seconds_rollout", "seconds_reference", "seconds_update"):
            assert isinstance(row[name], (int, float)), name
    for stage, file in (("grpo", "rejection/wrong.jsonl"), ("grpo_direct", "data/pool.jsonl")):
        label = {s.id: s.label for s in data.read_samples(out / file)}
        for row in data.read_jsonl(out / stage / "samples.jsonl"):
            assert len(row["completions"]) == len(row["rewards"]) == len(row["advantages"]) == 4
            assert row["label"] == label[row["id"]], "random_order is off"
            assert row["advantages"] == pytest.approx(grpo.group_advantages(torch.tensor([row["rewards"]]))[0].tolist()), "scale_by_std is on"


@pytest.mark.parametrize("stage", ["cold_start", "rejection_sft", "grpo"])
def test_a_checkpoint_is_an_ordinary_folder_with_the_vision_tower_untouched(chain, stage):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    out, _ = chain
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(out / stage, dtype=torch.float32).eval()
    model, processor = M.load(str(out / stage))
    sample = data.read_samples(out / "data" / "test.jsonl")[0]
    encoded = M.encode(processor, model, data.build_prompt(sample, "think"), data.THINK)
    inputs = M.collate([encoded], "left", 0, "cpu")
    by_itself = dict(inputs)
    by_itself.pop("position_ids")  # transformers works the positions out itself
    with torch.no_grad():
        assert torch.allclose(plain(**by_itself).logits, model(**inputs).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out / stage).decode(encoded["ids"]) == processor.tokenizer.decode(encoded["ids"])
    start, end = load_file(ROOT / "configs" / "small-base" / "model.safetensors"), load_file(out / stage / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name].float(), end[name].float())}
    assert changed and not any("visual" in name for name in changed)


def test_the_base_is_the_mean_of_its_last_two_phases(tmp_path):
    settings = config.load_settings("smoke", [("base.scenes", "4"), ("base.simple", "4"), ("model.hidden_size", "48"), ("model.heads", "2")])
    pretrain.build_base(settings, tmp_path)
    ends = [next(tmp_path.glob(f"base: {phase}.*.0.state")) for phase, *_ in pretrain.FRESH[-2:]]
    for parameter, one, other in zip(M.load(str(tmp_path))[0].parameters(), *(torch.load(file)["learnt"] for file in ends), strict=True):
        assert torch.equal(parameter, ((one + other) / 2).half().float()) and not torch.equal(one, other)


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2_of_a_real_process():
    done = script("grpo.py", "--config", "smoke", "--grpo.stesp", "3")  # many more: test_faults.py, all in one process
    assert done.returncode == 2 and done.stderr == "error: --grpo.stesp: unknown setting 'grpo.stesp'; did you mean 'grpo.steps'?\n"


def test_help_lists_every_setting_with_its_meaning_and_default(tmp_path):
    _, printed = run("grpo.py --help", tmp_path / "run")
    for section in dataclasses.fields(config.Settings):
        for field in dataclasses.fields(section.default_factory()):
            assert f"--{section.name}.{field.name} = {getattr(section.default_factory(), field.name)!r}: {field.metadata['help']}" in printed


def test_the_shipped_base_has_the_figures_written_beside_it(tmp_path):
    settings, folder = config.load_settings("small", []), ROOT / "configs" / "small-base"
    model, processor = M.load(str(folder))
    figures = json.loads((folder / "figures.json").read_text())
    (tmp_path / "base").mkdir()
    exercises = sft.practice_examples("base", settings, tmp_path / "base", 256)
    assert pretrain.mean_loss(model, processor, exercises) == pytest.approx(figures["practice_loss"], rel=1e-3)
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000


def test_the_shipped_tokenizer_is_the_one_its_recipe_makes(tmp_path):
    settings = config.load_settings("small", [])
    pretrain.write_practice(tmp_path, settings.base.scenes, settings.base.rows_per_scene, settings.base.simple, random.Random(f"{settings.run.seed}/base"))
    tokenizer = pretrain.train_tokenizer([pretrain.all_text(example) for example in data.read_conversations(tmp_path / "practice.jsonl")], settings.model.vocab_size)
    assert tokenizer.get_vocab() == M.load(str(ROOT / "configs" / "small-base"))[1].tokenizer.get_vocab()
