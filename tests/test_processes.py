"""Several processes under torchrun make what one makes: the same samples, judgements, losses and weights. pytest is the one process; the others
run this file as a script."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from safetensors.torch import load_file

import config
import data
import evaluate
import grpo
import model as M
import sft
import stages

OVERRIDES = [("grpo_direct.steps", "3"), ("grpo_direct.prompts_per_step", "6"), ("grpo_direct.random_order", "true"),
             ("grpo_direct.updates_per_rollout", "2"), ("grpo_direct.replay", "1"), ("cold_start.epochs", "1"), ("cold_start.micro_tokens", "600")]


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    """A stage of which the first process still writes, and leaves much to be tidied up, when the others are done."""
    for k in range(3000 if config.is_main() else 0):
        (folder / f"{k}.state").touch()
    for k in range(100):
        config.write_text(folder / f"{k}.jsonl", "x" * 100_000)
    while not (folder / "30.jsonl").exists():
        time.sleep(0.001)
    return "much"


def work(out: Path, *jobs) -> None:
    """What every process does, one or many."""
    settings = config.load_settings("smoke", OVERRIDES)
    for job in jobs:
        for part, name in ((settings.run, "shard"), (settings.cold_start, "gradient_checkpointing"), (settings.grpo_direct, "gradient_checkpointing")):
            setattr(part, name, job.endswith("shard"))
        if job == "slow":
            stages.STAGES[job] = ("test_processes", [], [])
            stages.do_stage(job, settings, out, "")
            assert not [*(out / job).glob("*.state")], "none goes on before all is tidy"
        elif job in stages.STAGES:
            stages.do_stage(job, settings, out, "")
        elif job.startswith(("policy", "cold_start")):
            (out / job).mkdir(exist_ok=True)
            grpo.run("grpo_direct", settings, out / job) if job.startswith("policy") else sft.run("cold_start", settings, out / job)
        elif job == "widths_shard":  # one process has completions of one token only, the other longer ones
            model, processor = M.load(str(config.ROOT / "configs" / "small-base"), shard=True)
            for checkpointing in (False, True):
                sft.optimizer_for(model, config.GRPO(gradient_checkpointing=checkpointing))
                prompts, width = [M.encode(processor, model, [{"type": "text", "text": "a red circle"}])], (1, 5)[config.world()[0]]
                made = M.completion_logprobs(model, processor, prompts, torch.arange(30, 30 + 2 * width).view(2, width), torch.full((2,), width))
                made.sum().backward()
                assert made.shape == (2, width)
            path = str(config.ROOT / "configs" / "small-base")
            (halves, _), (whole, _) = M.load(path, torch.bfloat16, shard=True), M.load(path, torch.bfloat16)
            for mine, its in zip(halves.parameters(), whole.parameters()):  # fp32 to learn on, bf16 to compute with and in the saved files
                assert mine.dtype == torch.float32 and torch.equal(mine.full_tensor(), its.float())
            for name, one in (("sharded", halves), ("whole", whole)):
                M.save(one, processor, out / name)
            if config.is_main():
                assert (out / "sharded" / "config.json").read_text() == (out / "whole" / "config.json").read_text()
        elif job == "too_few":
            settings.grpo_direct.prompts_per_step = 3
            grpo.run("grpo_direct", settings, out / "policy")
        else:  # judge; or a picture is missing in the share of the second process
            samples, own = data.read_samples(out / "data" / "test.jsonl")[:5], config.Evaluate(max_new_tokens=16)
            if job == "missing":
                samples[1].media = [str(out / "missing.png")] * 2
            judge = M.load(str(config.ROOT / "configs" / "small-base"))
            orders = (False,) if job == "missing" else (False, True)
            made = {votes: evaluate.judge(*judge, samples, "answer", own, False, "", orders, votes=votes) for votes in (0, 3)}
            config.write_text(out / "judged.json", json.dumps(made))


def torchrun(processes: int, out: Path, *jobs) -> tuple:
    """(exit code, what all wrote to stderr)"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, __file__, out, *jobs]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """{processes: (folder, exit code, stderr)}; those of several end with a fault, which costs less than runs of their own."""
    folders = {n: tmp_path_factory.mktemp(f"processes-{n}") for n in (1, 2, 4)}
    stages = ("data", "base", "distill", "cold_start", "rejection", "policy", "judge")
    work(folders[1], *stages)
    return {1: (folders[1], 0, ""), 2: (folders[2], *torchrun(2, folders[2], *stages, "cold_start_shard", "policy_shard", "widths_shard", "slow", "missing")),
            4: (folders[4], *torchrun(4, folders[4], "data", "policy", "too_few"))}


def assert_same_training(one: Path, other: Path) -> None:
    rows, again = (data.read_jsonl(folder / "metrics.jsonl") for folder in (one, other))
    assert len(rows) == len(again) > 2
    for row, same in zip(rows, again):
        numbers = {name: value for name, value in row.items() if not name.startswith(("seconds", "phase"))}
        assert {name: same[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=3e-6)
    weights, same = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == same.keys() and {w.dtype for w in same.values()} == {torch.float32}
    start = load_file(config.ROOT / "configs" / "small-base" / "model.safetensors")
    apart = lambda some: sum((weights[name] - some[name].float()).square().sum().item() for name in weights) ** 0.5
    assert apart(same) < 1e-3 * apart(start) and apart(start) > 1e-3, "the same way from the start, and not none"
    assert (one / "config.json").read_text() == (other / "config.json").read_text()


@pytest.mark.parametrize("processes, shard", [(2, ""), (4, ""), (2, "_shard")])
def test_grpo_is_the_same_run_on_any_number_of_processes(runs, processes, shard):
    one, other = runs[1][0] / "policy", runs[processes][0] / f"policy{shard}"
    assert_same_training(one, other)
    rows, again = (data.read_jsonl(folder / "samples.jsonl") for folder in (one, other))
    assert [row["completions"] for row in rows] == [row["completions"] for row in again] and rows == again
    assert len({text for row in rows for text in row["completions"]}) > 1 and any(row["kl"] for row in data.read_jsonl(one / "metrics.jsonl"))


@pytest.mark.parametrize("shard", ["", "_shard"])
def test_sft_is_the_same_run_on_two_processes(runs, shard):
    assert_same_training(runs[1][0] / "cold_start", runs[2][0] / f"cold_start{shard}")


def test_rejection_and_judging_say_the_same_on_two_processes(runs):
    (one, *_), (other, *_) = runs[1], runs[2]
    for file in ("rejection/correct.jsonl", "rejection/wrong.jsonl", "rejection/yield.json", "judged.json"):
        assert (one / file).read_text() == (other / file).read_text(), file
    assert sum(len((one / "rejection" / f"{name}.jsonl").read_text().splitlines()) for name in ("correct", "wrong")) == 24
    judged = json.loads((one / "judged.json").read_text())
    assert len(judged["3"]) == 3 * len(judged["0"]) and len({row["text"] for row in judged["3"]}) > 1


@pytest.mark.parametrize("processes, says", [(2, "missing.png"), (4, "prompts_per_step = 3")])
def test_what_fails_in_one_or_all_processes_ends_all_and_is_said_once(runs, processes, says):
    _, code, stderr = runs[processes]
    assert code != 0
    assert [line for line in stderr.splitlines() if line.startswith("error: ")] == [line for line in stderr.splitlines() if says in line][:1] != []


def test_no_process_looks_at_a_stage_while_the_first_still_writes_it(runs):
    folder, _, stderr = runs[2]
    assert len([*(folder / "slow").iterdir()]) == 101 and stages.made_by("slow", folder), stderr


def test_shares_put_together_are_what_was_dealt_out(monkeypatch):
    items, dealt = list(range(7)), []
    for processes in (1, 2, 3, 9):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            dealt += config.share(items)
        assert sorted(dealt) == items
        dealt = []


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 200, 600, 10_000])
def test_micro_batches_of_all_processes_are_as_many_and_none_is_too_long(processes, limit):
    lengths = [10, 50, 90, 90, 100, 100, 101, 150, 160, 170, 180, 300]
    shares = [sorted(random.Random(0).sample(lengths, 12)[rank::processes]) for rank in range(processes)]  # of examples in any order
    pieces = sft.micro_batches([length for some in zip(*shares) for length in some], limit, processes)
    for share in shares:
        parts = [share[piece] for piece in pieces]
        assert sum(parts, []) == share and all(len(part) == 1 or 0 < len(part) * max(part) <= limit for part in parts)
    most = lambda piece, end: max((end - piece.start) * max(share[piece.start : end]) for share in shares)
    assert all(most(piece, piece.stop + 1) > limit for piece in pieces[:-1]), "none is smaller than it has to be"


def test_a_share_that_is_one_example_short_has_its_pieces_too():
    """Three examples for one process, two for the other, as config.gather puts their lengths together: the last piece is empty for the other."""
    pieces = sft.micro_batches([10, 20, 30, 40, 300], 80, 2)
    assert [[share[piece] for piece in pieces] for share in ([10, 30, 300], [20, 40])] == [[[10, 30], [300]], [[20, 40], []]]


if __name__ == "__main__":
    stages.join_processes()
    try:
        work(Path(sys.argv[1]), *sys.argv[2:])
    except config.UserError as error:
        stages.give_up(str(error))
    config.wait_for_all()
