"""Kills every kind of stage at random moments, fills its disk and lets its teacher fail, starts the same command again, and prints what survived.

    python tests/soak.py [--kills 200] [--seed 0] [--stages grpo,served]       about 4 s a kill on a quiet core; not a test that pytest collects

Each stage is run once by a process that is left alone. Then it is run in the same surroundings by processes that are stopped after a random share of that
time: most by kill -9, some by SIGTERM or Ctrl-C, and some on a disk on which no file may grow beyond a random size. What the last one ends with is
compared with the first, weights bit by bit and logs line by line but for seconds; then it begins again. `served` is distillation from a loopback
server that answers one request in three with an error, half an answer, or text that is none; every reply it was paid for has to be in the file, once."""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import data
from test_distill import KEY, Server, completion, right
from test_resume import BASE, CHAIN, OFTEN, SMALLER, assert_same, results, run

os.environ["LOOPBACK_KEY"] = KEY  # now: all processes are forked from one that is about to start
STAGES = {"data": "data.py", "base": BASE, "distill": "distill.py", "served": "distill.py", "cold_start": "sft.py", "rejection": "rejection.py",
          "rejection_sft": "sft.py", "direct_sft": "sft.py", "grpo_direct": "grpo.py", "grpo": "grpo.py", "evaluate": "evaluate.py"}


def faulty(draw: random.Random, lock=threading.Lock()):
    """What the server does with a request."""
    def behave(attempt, sample, body):
        time.sleep(0.02)
        with lock:
            chance = draw.random()
        broken = [lambda handler: handler.send(429, b"{}", [("Retry-After", "0.1")]), lambda handler: handler.send(200, b'{"choices": ['),
                  lambda handler: (handler.send(200, b'{"choi', length=400), setattr(handler, "close_connection", True))]
        return broken[int(chance * 9)] if chance < 1 / 3 else completion(right(sample))
    return behave


def compare(stage: str, reference: Path, out: Path) -> str:
    """Empty where the stage is what it would have been; else what is not."""
    folder = "distill" if stage == "served" else stage
    try:
        if stage == "served":  # replies come in any order
            assert all((reference / folder / name).read_text() == (out / folder / name).read_text() for name in ("kept.jsonl", "dropped.jsonl")), "kept or dropped"
            return ""
        assert_same(reference / folder, out / folder, {"data": [], "base": ["weights", "rows"], "evaluate": ["rows"]}.get(stage, ["rows"]))
        assert stage not in ("evaluate", "grpo") or results(reference) == results(out), "results.json"
        return ""
    except (AssertionError, FileNotFoundError) as error:
        return f"{stage}: {str(error).splitlines()[0]}"


def soak(kills: int, seed: int, stages: list, place: Path) -> list:
    """One row per stage: counts by name, and "wrong", a list of sentences."""
    draw, whole, table = random.Random(seed), place / "whole" / "run", []
    whole.parent.mkdir()
    code, printed = run(CHAIN, whole)
    assert code == 0, printed
    for number, stage in enumerate(stages):
        count, out, reference = collections.Counter(), place / stage / "run", whole
        row, share, server = {"stage": stage, "wrong": []}, kills // len(stages) + (number < kills % len(stages)), None
        line = f"{STAGES[stage]} --config smoke --out {{0}} --stage {stage} {SMALLER}{OFTEN}"
        if stage == "base":
            line = BASE + OFTEN
        if stage == "served":
            server = Server(data.read_samples(whole / "data" / "distill.jsonl"), faulty(draw))
            line = line.replace("--stage served", f"--stage distill --distill.teacher t --distill.base_url {server.url} --distill.key_variable LOOPBACK_KEY "
                                                  "--distill.retries 9 --distill.concurrency 2")

        def fresh(to: Path) -> Path:
            """The run as it was before this stage."""
            shutil.rmtree(to, ignore_errors=True)
            to.parent.mkdir(exist_ok=True)
            if stage not in ("data", "base"):
                shutil.copytree(whole, to, ignore=lambda folder, names: [{"served": "distill"}.get(stage, stage)] if Path(folder) == whole else [])
            return to

        reference, started = fresh(place / stage / "left-alone"), time.time()
        code, printed = run(line, reference)
        duration = time.time() - started
        assert code == 0, printed
        ended = not fresh(out)
        while count["stops"] < share or not ended:
            way = draw.choices(["kill -9", "told to stop", "disk full"], [7, 2, 1])[0] if count["stops"] < share else "left alone"
            deadline = time.time() + draw.random() * duration if way in ("kill -9", "told to stop") else float("inf")
            limits = {resource.RLIMIT_FSIZE: int(2 ** draw.uniform(12, 24))} if way == "disk full" else {}
            how = signal.SIGKILL if way == "kill -9" else draw.choice([signal.SIGTERM, signal.SIGINT])
            code, printed = run(line, out, lambda: time.time() > deadline, how, limits)
            count["went on inside"] += "goes on after step" in printed
            ended, lines = code == 0, [text for text in printed.splitlines() if text.startswith("error:")]
            if not ended:
                count["stops"] += 1
                count[way] += 1
                answers = {"kill -9": [-9], "told to stop": [130, -2, -15, 1], "disk full": [2]}.get(way, [])  # 1: Python's own, outside of main
                if code not in answers or way == "disk full" and len(lines) != 1 or "Traceback" in printed and not printed.strip().endswith("KeyboardInterrupt"):
                    row["wrong"].append(f"{stage}, {way}: exit code {code}: {printed[-300:]}")
                    if way == "left alone":
                        break
                continue
            count["ended"] += 1
            if difference := compare(stage, reference, out):
                row["wrong"].append(difference)
            else:
                count["identical"] += 1
            if server:
                replies = [json.loads(text)["key"] for text in (out / "distill" / "replies.jsonl").read_text().splitlines()]
                count["lost"] += len(server.samples) - len(set(replies))
                count["doubled"] += len(replies) - len(set(replies))
            fresh(out)
        if server:
            server.shutdown()
        table.append(row | {name: count[name] for name in ("stops", "kill -9", "told to stop", "disk full", "went on inside", "ended", "identical", "lost", "doubled")})
        print("| " + " | ".join(str(value) for name, value in table[-1].items() if name != "wrong") + " |", *row["wrong"], sep="\n  " if row["wrong"] else "", flush=True)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES))
    options = parser.parse_args()
    print("| stage | stops | kill -9 | told to stop | disk full | went on inside | runs ended | bit-identical | replies lost | doubled |\n|" + "---|" * 10)
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(options.kills, options.seed, options.stages, Path(folder))
    total = lambda name: sum(row[name] for row in rows)
    print(f"\n{total('stops')} stops; {total('identical')} of {total('ended')} runs that went on to their end are bit-identical; {total('lost')} replies lost, "
          f"{total('doubled')} doubled; {sum(len(row['wrong']) for row in rows)} things wrong")
    sys.exit(any(row["wrong"] for row in rows))
