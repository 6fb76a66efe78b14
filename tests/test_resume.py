"""What is stopped goes on: real command lines in real processes, killed (kill -9) at chosen points of every kind of stage, end with the bits of a
run that nobody stopped. The processes are forked from one that has everything imported, which saves the seconds of that and nothing else."""

import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import load_file

import config
import model as M
import sft

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["distill", "evaluate", "grpo", "rejection", "report", "sft", "shapes"])
SMALLER = ("--data.distill_pairs 10 --data.pool_pairs 2 --data.test_pairs 1 --data.heldout_pairs 1 --data.tie_pairs 1 --cold_start.batch_size 4 --cold_start.lr 3e-4 --rejection.batch_rows 1 "
           "--grpo.steps 3 --grpo.data pool --grpo.random_order true --grpo.max_new_tokens 40 --grpo_direct.steps 3 --grpo_direct.updates_per_rollout 2 "
           "--evaluate.max_new_tokens 30 --evaluate.batch_rows 1 --rejection.max_new_tokens 140")
CHAIN = f"grpo.py --config smoke --out {{0}} {SMALLER}"
BASE = ("sft.py --config smoke --out {0} --stage base --base.rebuild true --base.scenes 10 --base.simple 6 --base.batch_size 4 --model.hidden_size 48 "
        "--model.heads 2 --model.layers 1 --model.vision_hidden_size 32")
OFTEN = "".join(f" --{stage}.save_minutes 0" for stage in ("base", "cold_start", "rejection_sft", "direct_sft", "grpo", "grpo_direct"))


def entry(line: str, printed: str, limits: dict) -> None:
    """What a process does: the script's own entry, with what it prints in a file."""
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    torch.set_num_threads(1)
    stream = open(printed, "w")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.path.insert(0, str(ROOT))
    script, *sys.argv[1:] = line.split()
    sys.argv[0] = script
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(line: str, out: Path, until=None, how: int = signal.SIGKILL, limits: dict = {}) -> tuple:
    """(exit code, what was printed) of a command line, {0} in it being `out`; as soon as `until()` holds the process gets the signal `how`."""
    printed = out.parent / f"{out.name}.printed"
    process = FORKS.Process(target=entry, args=(line.replace("{0}", str(out)), str(printed), limits))
    process.start()
    while process.is_alive() and not (until and until()):
        time.sleep(0.002)
    if process.is_alive():
        os.kill(process.pid, how)
    process.join()
    return process.exitcode, printed.read_text()


def has(out: Path, pattern: str, count: int):
    """Whether the files of this name have `count` lines or more, or, named otherwise than logs and texts, are as many."""
    lines = lambda file: file.read_bytes().count(b"\n") if file.suffix in (".jsonl", ".texts") else 1
    def holds():
        try:
            return sum(map(lines, out.glob(pattern))) >= count
        except FileNotFoundError:  # deleted between the two
            return False
    return holds


def rows(file: Path) -> list:
    parse = lambda row: {key: value for key, value in row.items() if not key.startswith("seconds")}
    return [parse(json.loads(line)) for line in file.read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    """The same files, bit for bit, but for seconds and for what names a run."""
    names = [{str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} for out in (one, other)]
    assert names[0] == names[1]
    kinds = {"weights": 0, "rows": 0}
    for name in sorted(names[0]):
        if name.endswith(".safetensors"):
            weights, same = load_file(one / name), load_file(other / name)
            assert weights.keys() == same.keys() and all(torch.equal(weights[key], same[key]) for key in weights), name
            kinds["weights"] += 1
        elif name.endswith(".jsonl"):
            assert rows(one / name) == rows(other / name), name
            kinds["rows"] += 1
        elif not (name.endswith("done.json") or name.startswith("evaluate/") and name.endswith(("json", "html"))):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert min(kinds.values()) > 0


def results(out: Path) -> list:
    return [{key: row[key] for key in ("name", "splits", "ties")} for row in json.loads((out / "evaluate" / "results.json").read_text())["rows"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The chain, run by one process that nobody stopped, with no state kept but the last of each stage."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, printed = run(CHAIN, out)
    assert code == 0, printed
    return out


STOPS = [  # (what is there when the signal comes, how many, signal)
    ("data/media/*", 9, signal.SIGKILL), ("cold_start/begun.json", 1, signal.SIGKILL), ("cold_start/metrics.jsonl", 2, signal.SIGKILL),
    ("cold_start/metrics.jsonl", 3, signal.SIGTERM), ("cold_start/*.safetensors", 1, signal.SIGKILL), ("rejection/texts.jsonl", 1, signal.SIGKILL),
    ("rejection/wrong.jsonl", 1, signal.SIGINT), ("rejection_sft/*.state", 1, signal.SIGKILL), ("evaluate/*.texts", 1, signal.SIGKILL),
    ("grpo/metrics.jsonl", 1, signal.SIGKILL), ("grpo/samples.jsonl", 2, signal.SIGINT), ("grpo_direct/metrics.jsonl", 1, signal.SIGTERM),
    ("grpo_direct/metrics.jsonl", 3, signal.SIGKILL), ("evaluate/grpo-*.texts", 2, signal.SIGKILL), ("evaluate/results.json", 1, signal.SIGKILL)]


def test_a_chain_killed_everywhere_ends_with_the_bits_of_one_that_was_not(whole, tmp_path):
    out, went_on = tmp_path / "run", 0
    for pattern, count, how in STOPS:
        code, printed = run(CHAIN + OFTEN, out, has(out, pattern, count), how)
        assert code in (-how, 130), (pattern, code, printed)
        if code == 130:
            assert [line for line in printed.splitlines() if "interrupted" in line] == ["interrupted; what was made is kept, and the same command goes on"]
        went_on += printed.count("goes on after step")
    code, printed = run(CHAIN + OFTEN, out)
    assert code == 0 and went_on >= 4, (went_on, printed)
    assert_same(whole, out)
    assert results(whole) == results(out)


def test_a_base_killed_in_several_of_its_phases_is_the_same_base(tmp_path):
    one, other, went_on = tmp_path / "one", tmp_path / "other", ""
    assert run(BASE, one)[0] == 0
    for count in (1, 7, 8, 20, 30):
        code, printed = run(BASE + OFTEN, other, has(other, "base/metrics.jsonl", count))
        assert code == -signal.SIGKILL, printed
        went_on += printed
    assert run(BASE + OFTEN, other)[0] == 0
    assert went_on.count("goes on after step") >= 3
    assert_same(one, other)
