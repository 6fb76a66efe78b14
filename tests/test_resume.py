"""What is stopped goes on: real command lines in real processes, killed (kill -9) at chosen points of every kind of stage, end with the bits of a
run that nobody stopped. The processes are forked from one that has everything imported, which saves the seconds of that and nothing else."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import load_file

import config
import resume
import sft
import stages

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
    own = {resource.RLIMIT_DATA: 1024 * int(re.search(r"VmData:\s+([0-9]+)", Path("/proc/self/status").read_text())[1])}  # what it has already
    for kind, most in limits.items():
        resource.setrlimit(kind, (most + own.get(kind, 0), resource.getrlimit(kind)[1]))
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
    printed.write_text("")
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


def assert_same(one: Path, other: Path, there=("weights", "rows")) -> None:
    """The same files, bit for bit, but for seconds and for what names a run; both kinds that are `there`."""
    names = [{str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} for out in (one, other)]
    assert names[0] == names[1], f"files {sorted(names[0] ^ names[1])}"
    kinds = {"weights": 0, "rows": 0}
    for name in sorted(names[0]):
        if name.endswith(".safetensors"):
            weights, same = load_file(one / name), load_file(other / name)
            assert weights.keys() == same.keys() and all(torch.equal(weights[key], same[key]) for key in weights), name
            kinds["weights"] += 1
        elif name.endswith(".jsonl"):
            assert rows(one / name) == rows(other / name), name
            kinds["rows"] += 1
        elif not (name.endswith("done.json") or Path(one, name).parent.name == "evaluate" and name.endswith(("json", "html"))):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert all(kinds[kind] for kind in there)


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
    ("rejection/yield.json", 1, signal.SIGTERM), ("rejection_sft/*.state", 1, signal.SIGKILL), ("evaluate/*.texts", 1, signal.SIGKILL),
    ("grpo/metrics.jsonl", 1, signal.SIGKILL), ("grpo/samples.jsonl", 2, signal.SIGINT), ("evaluate/grpo-think-*.texts", 2, signal.SIGKILL),
    ("grpo_direct/metrics.jsonl", 1, signal.SIGTERM), ("grpo_direct/metrics.jsonl", 3, signal.SIGKILL), ("evaluate/results.json", 1, signal.SIGKILL)]


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
    losses = [row["loss"] for row in rows(one / "base" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    total = len(losses)
    for count in (1, total // 4, total // 4 + 1, total // 2, total - 3):
        code, printed = run(BASE + OFTEN, other, has(other, "base/metrics.jsonl", count))
        assert code == -signal.SIGKILL, printed
        went_on += printed
    assert run(BASE + OFTEN, other)[0] == 0
    assert went_on.count("goes on after step") >= 3
    assert_same(one, other)


# ------------------------------------------------------------------------------------------------- what a state belongs to


@pytest.fixture
def stopped(tmp_path) -> tuple:
    """(settings, folder) of a grpo stage that was stopped after its first state; its inputs are rows and names of runs, and no models."""
    for stage in ("data", "rejection", "rejection_sft"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "done.json").write_text(json.dumps({"id": f"{stage} 1"}))
        (tmp_path / stage / "pool.jsonl").write_text('{"id": "1"}\n')
    settings, folder = config.load_settings("smoke", []), tmp_path / "grpo"
    folder.mkdir()
    stages.begin("grpo", settings, folder, "python grpo.py", False)
    for name in ("grpo.1.0.state", "metrics.jsonl", "grpo.2.0.state.tmp"):
        (folder / name).write_text("x\n")
    return settings, folder


LEFT = {"begun.json", "grpo.1.0.state", "metrics.jsonl"}


def test_the_same_command_goes_on_and_what_was_half_written_is_not_read(stopped):
    stages.begin("grpo", stopped[0], stopped[1], "python grpo.py", False)
    assert set(os.listdir(stopped[1])) == LEFT


@pytest.mark.parametrize("change, said", [
    (lambda s, out: setattr(s.grpo, "lr", 0.5), "grpo.lr was 0.0001, is 0.5"), (lambda s, out: setattr(s.run, "seed", 7), "run.seed was 0, is 7"),
    (lambda s, out: (out / "data" / "pool.jsonl").write_text("other"), "data/pool.jsonl was 5e3b"),
    (lambda s, out: (out / "rejection" / "pool.jsonl").unlink(), "rejection/pool.jsonl was .*, is None"),
    (lambda s, out: (out / "rejection_sft" / "done.json").write_text('{"id": "rejection_sft 2"}'), "rejection_sft was rejection_sft 1, is rejection_sft 2")],
    ids=["a setting", "the seed", "a data file", "a data file gone", "an input made anew"])
def test_a_stage_begun_otherwise_is_refused_with_what_changed_until_it_is_put_back_or_forced(stopped, change, said):
    settings, folder = stopped
    backup = folder.parent.parent / f"{folder.parent.name}-backup"
    shutil.copytree(folder.parent, backup)
    change(settings, folder.parent)
    with pytest.raises(config.UserError, match=f"{said.replace('5e3b', '')}.*or begin anew: python grpo.py --force"):
        stages.begin("grpo", settings, folder, "python grpo.py", False)
    assert LEFT <= set(os.listdir(folder)), "nothing was touched"
    stages.begin("grpo", config.load_settings("smoke", []), backup / "grpo", "python grpo.py", False)
    assert set(os.listdir(backup / "grpo")) == LEFT, "put back, it goes on"
    stages.begin("grpo", settings, folder, "python grpo.py", True)
    assert os.listdir(folder) == ["begun.json"], "forced, it begins anew"
    stages.begin("grpo", settings, folder, "python grpo.py", False)


def test_settings_that_change_no_result_may_change_and_another_number_of_threads_is_said(stopped, capsys, monkeypatch):
    settings, folder = stopped
    settings.grpo.save_minutes, settings.grpo.max_skipped = 9.0, 3
    stages.begin("grpo", settings, folder, "", False)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    stages.begin("grpo", settings, folder, "", False)
    assert "goes on with 77: sums may differ in their last bits" in capsys.readouterr().out and set(os.listdir(folder)) == LEFT


def test_a_stage_that_was_half_cleared_when_it_was_stopped_is_not_taken_for_finished(stopped, monkeypatch):
    settings, folder = stopped
    tidied = [name for name in LEFT if name != "metrics.jsonl"]
    [(folder / name).unlink() for name in tidied]
    for number in range(20):
        (folder / f"rows{number}.jsonl").write_text("x\n")
    (folder / "done.json").write_text(json.dumps({"id": "grpo 1"}))
    removed, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda file, **_: (removed.append(file.name), unlink(file), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        stages.begin("grpo", settings, folder, "python grpo.py", True)
    assert removed == ["done.json"] and stages.made_by("grpo", folder.parent) is None


def test_a_changed_source_file_makes_the_data_anew_and_other_weights_a_new_base(tmp_path):
    rows, weights = tmp_path / "pairs.jsonl", tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    rows.write_text("one\n"), weights.write_bytes(bytes(10**6))
    settings = config.load_settings("smoke", [("data.pool", f"{rows}@first:1"), ("model.path", str(weights.parent))])
    facts = lambda stage: stages.made_of(stage, settings, tmp_path)
    before, base = facts("data"), facts("base")
    assert before[str(rows)] == hashlib.sha256(b"one\n").hexdigest()[:16] and facts("data") == before and facts("base") == base
    rows.write_text("two\n"), weights.write_bytes(bytes(5 * 10**5) + b"\1" * (5 * 10**5))
    assert facts("data") != before and facts("base") != base
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "done.json").write_text(json.dumps({"made_of": facts("data")}))
    assert stages.is_done("data", settings, tmp_path)
    rows.unlink()
    assert stages.is_done("data", settings, tmp_path), "the run has its own copy of the rows"
    rows.write_text("three\n")
    assert not stages.is_done("data", settings, tmp_path)


# ------------------------------------------------------------------------------------------------------------------ faults


def test_batches_are_the_same_when_they_are_drawn_again_and_every_pass_has_every_item():
    import itertools

    turn = lambda item, rng: (item, rng.random() < 0.5)
    drawn = list(itertools.islice(sft.batches(list(range(7)), 3, "seed", turn), 14))
    assert drawn[5:] == list(itertools.islice(sft.batches(list(range(7)), 3, "seed", turn), 5, 14))
    flat = [item for batch in drawn for item, _ in batch]
    assert all(sorted(flat[k : k + 7]) == list(range(7)) for k in range(0, 42, 7)) and flat[:7] != flat[7:14]


def test_a_step_that_is_not_finite_moves_nothing_and_too_many_in_a_row_end_the_run():
    weight, own = torch.nn.Parameter(torch.ones(3)), config.SFT(max_skipped=2, max_grad_norm=1e9)
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    def step(gradient: float, loss: float = 1.0) -> dict:
        weight.grad = torch.full((3,), gradient)
        return sft.finish_update(optimizer, {"loss": loss}, own)

    assert step(1.0) == {"loss": 1.0, "grad_norm": pytest.approx(3**0.5), "skipped": 0}
    good = weight.detach().clone(), {name: value.clone() for name, value in optimizer.state[weight].items()}
    assert torch.allclose(good[0], torch.full((3,), 0.9))  # Adam's first step is lr
    for gradient, loss in ((float("nan"), 1.0), (1.0, float("inf"))):
        assert step(gradient, loss)["skipped"] == 1
        assert torch.equal(weight, good[0]) and all(torch.equal(optimizer.state[weight][name], value) for name, value in good[1].items())
    assert step(1.0)["skipped"] == 0 and not torch.equal(weight, good[0])  # and counting begins again
    after = weight.detach().clone()
    step(float("inf")), step(float("nan"))
    with pytest.raises(config.UserError, match="3 steps in a row"):
        step(float("nan"))
    assert torch.equal(weight, after)


def test_how_many_steps_in_a_row_were_skipped_outlives_a_stop(tmp_path):
    optimizers = []
    for skipped in (2, 0):
        model = torch.nn.Linear(2, 2)
        optimizers.append(torch.optim.AdamW(model.parameters()))
        model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
        optimizers[-1].step()
        optimizers[-1].param_groups[0]["skipped"] = skipped
    resume.keep(tmp_path, "grpo", 7, optimizers[0])
    assert resume.restore(tmp_path, "grpo", model, optimizers[1]) == 7 and optimizers[1].param_groups[0]["skipped"] == 2


SFT = "sft.py --config smoke --out {0} --stage cold_start " + SMALLER


def inputs(whole: Path, out: Path) -> None:
    for stage in ("data", "base", "distill"):
        shutil.copytree(whole / stage, out / stage)


def test_an_exploding_run_ends_with_one_line_and_its_last_state(whole, tmp_path):
    inputs(whole, tmp_path / "run")
    code, printed = run(SFT.replace("cold_start.lr 3e-4", "cold_start.lr 1e12") + " --cold_start.max_skipped 2 --cold_start.epochs 9", tmp_path / "run")
    assert code == 2 and printed.splitlines()[-1].startswith("error: 3 steps in a row") and "Traceback" not in printed, printed
    assert [row["skipped"] for row in rows(tmp_path / "run" / "cold_start" / "metrics.jsonl")][-2:] == [1, 1]


def test_a_full_disk_leaves_the_state_before_and_the_same_command_goes_on(whole, tmp_path):
    out = tmp_path / "run"
    inputs(whole, out)
    code, printed = run(SFT + OFTEN, out, has(out, "cold_start/*.state", 1))
    state, = (out / "cold_start").glob("*.state")
    before = state.read_bytes()
    code, printed = run(SFT + OFTEN, out, limits={resource.RLIMIT_FSIZE: len(before) - 1000})
    assert code == 2 and printed.splitlines()[-1].startswith("error: [Errno 27] File too large") and "the same command goes on" in printed, printed
    assert state.read_bytes() == before and "goes on after step" in printed and not list(out.rglob("*.tmp"))
    assert run(SFT, out)[0] == 0
    assert_same(whole / "cold_start", out / "cold_start")


def test_memory_that_runs_out_is_one_line_that_names_what_to_lower(whole, tmp_path):
    inputs(whole, tmp_path / "run")
    code, printed = run(SFT + " --cold_start.batch_size 64", tmp_path / "run", limits={resource.RLIMIT_DATA: 90 * 2**20})
    assert code == 2 and "Traceback" not in printed and printed.splitlines()[-1].startswith("error: out of memory: lower micro_tokens"), printed


def test_a_worker_that_dies_ends_all_with_one_line_and_the_same_command_goes_on(whole, tmp_path):
    """Two processes that share the weights (FSDP2), each with a state of its own; the run of one process is the same but for rounding."""
    out, line = tmp_path / "run", f"grpo.py --config smoke --out {tmp_path / 'run'} --stage grpo_direct {SMALLER} --grpo_direct.prompts_per_step 4{OFTEN}"
    one, shared = tmp_path / "one", " --run.shard true"
    for stage in ("data", "base"):
        shutil.copytree(whole / stage, out / stage)
        shutil.copytree(whole / stage, one / stage)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *(line + shared).split()]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    holds = has(out, "grpo_direct/*.0.state", 1)
    with subprocess.Popen(command, **how) as first:
        while first.poll() is None and not holds():
            time.sleep(0.005)
        os.kill(int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[1]), signal.SIGKILL)
        stderr = first.communicate(timeout=120)[1]
    assert first.returncode != 0 and [text for text in stderr.splitlines() if text.startswith("error: ")] in (
        [], ["error: another process has ended; what was made is kept, and the same command goes on (--debug says where this was)"]), stderr
    again = subprocess.run(command, timeout=300, **how)
    assert again.returncode == 0 and "grpo_direct: goes on after step" in again.stdout, again.stderr
    assert run(line.replace(str(out), "{0}"), one)[0] == 0
    numbers, same = ([{key: row[key] for key in ("step", "reward", "kl", "grad_norm", "lr")} for row in rows(folder / "grpo_direct" / "metrics.jsonl")] for folder in (one, out))
    assert [row["step"] for row in same] == [1, 2, 3] and all(row == pytest.approx(other, rel=1e-3, abs=1e-5) for row, other in zip(same, numbers))
    assert not list(out.rglob("*.state"))


@pytest.mark.parametrize("split", ["distill", "pool", "test"])
def test_a_changed_source_of_any_split_makes_the_data_anew(tmp_path, split):
    rows = tmp_path / "pairs.jsonl"
    settings, made = config.load_settings("smoke", [(f"data.{split}", f"{rows}@first:1")]), []
    for text in ("one\n", "two\n"):
        rows.write_text(text)
        made.append(stages.made_of("data", settings, tmp_path)[str(rows)])
    assert made == [hashlib.sha256(text).hexdigest()[:16] for text in (b"one\n", b"two\n")]


def test_a_mistake_in_a_setting_that_is_put_back_takes_nothing_away(tmp_path):
    """The base is pointed at, the data are drawn from settings: both are the same again, and what was trained on them still counts."""
    settings, made = config.load_settings("smoke", [("data.pool_pairs", "1"), ("data.distill_pairs", "2"), ("data.test_pairs", "1")]), []
    own = tmp_path / "own"
    shutil.copytree(ROOT / settings.model.path, own)
    for path, pairs, anew in ((own, 1, False), (tmp_path / "typo", 2, False), (own, 1, False), (own, 1, True)):
        settings.model.path, settings.data.pool_pairs = str(path), pairs
        for stage in ("data", "base"):
            stages.do_stage(stage, settings, tmp_path / "run", "", anew)
        made.append([stages.made_by(stage, tmp_path / "run") for stage in ("data", "base")])
    assert made[0] == made[2] and all(a != b for k in (1, 3) for a, b in zip(made[0], made[k]))
    shutil.rmtree(own)  # a disk that is not there: what was made counts
    assert stages.is_done("base", settings, tmp_path / "run")


def test_a_run_has_the_whole_name_of_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    for name in ("m2.5-3b", "m2.5-7b"):
        (tmp_path / f"{name}.toml").write_text(f"[model]\npath = '{ROOT}/configs/small-base'\n")
        stages.run_stages("rejection_sft", ["--config", str(tmp_path / f"{name}.toml"), "--stage", "base"], ())
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"m2.5-3b", "m2.5-7b"}


def test_two_processes_write_one_file_without_meeting(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import config, pathlib\nfor k in range(300): config.write_file(pathlib.Path(sys.argv[1]), lambda s: s.write(b'x'))"
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file")], stderr=subprocess.PIPE) for _ in range(2)]
    assert [(one.communicate()[1], one.returncode) for one in both] == [(b"", 0)] * 2 and (tmp_path / "file").read_bytes() == b"x"


LEARNING = {"max_skipped", "micro_tokens", "gradient_checkpointing", "offload", "save_minutes"}
SERVER = {"key_variable", "concurrency", "timeout", "retries"}


@pytest.mark.parametrize("section, harmless", [
    ("run", {"threads", "shard"}), ("data", set()), ("model", set()), ("base", LEARNING), ("cold_start", LEARNING), ("rejection_sft", LEARNING),
    ("direct_sft", LEARNING), ("distill", SERVER | {"max_cost", "price_in", "price_out"}), ("rejection", SERVER | {"endpoint", "batch_rows"}),
    ("evaluate", SERVER | {"endpoint", "served", "batch_rows"}), ("grpo", LEARNING | {"micro_prompts", "batch_rows"}),
    ("grpo_direct", LEARNING | {"micro_prompts", "batch_rows"})])
def test_every_setting_but_these_makes_its_stage_anew(tmp_path, section, harmless):
    """One that is wrongly taken for harmless would leave results of other settings standing."""
    settings, stage = config.Settings(), {"model": "base", "run": "grpo"}.get(section, section)
    own = getattr(settings, section)
    facts = stages.made_of(stage, settings, tmp_path)
    assert {f"{section}.{name}" for name in config.shaping(own)} <= facts.keys()
    assert {field.name for field in dataclasses.fields(own)} - config.shaping(own).keys() == harmless
