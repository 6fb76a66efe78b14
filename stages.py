"""The chain of stages, and the entry point of every script.

    python SCRIPT.py --config NAME [--section.key value ...] [--stage STAGE] [--out DIR] [--force] [--explain]

Every stage writes runs/NAME/STAGE/. Running one first runs the stages before it whose output is missing or was made with other settings,
rows or files, and prints the command for each. done.json, written last, makes a stage count.
"""

import dataclasses
import fcntl
import gc
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from safetensors import SafetensorError

import config
from config import ROOT, Settings, UserError, distributed, is_main, one_line, wait_for_all, world, write_text

STAGES = {  # name: (script, stages whose output it reads, see `inputs`, sections that shape its output)
    "data": ("data", [], ["data"]),
    "base": ("sft", [], ["model", "base"]),
    "distill": ("distill", ["data"], ["distill"]),
    "cold_start": ("sft", ["base", "distill"], ["cold_start"]),
    "rejection": ("rejection", ["data", "cold_start"], ["rejection"]),
    "rejection_sft": ("sft", ["cold_start", "rejection"], ["rejection_sft"]),
    "direct_sft": ("sft", ["base", "rejection"], ["direct_sft"]),
    "grpo": ("grpo", ["data"], ["grpo"]),
    "grpo_direct": ("grpo", ["data"], ["grpo_direct"]),
    "evaluate": ("evaluate", ["data", "base", "direct_sft", "grpo_direct", "cold_start", "rejection_sft", "grpo"], ["evaluate"]),
}
ROWS = [  # of the stage table, the paper's and one control: (name, checkpoint, mode)
    ("base, direct answer", "base", "answer"), ("+ SFT on bare verdicts", "direct_sft", "answer"), ("+ GRPO without CoT", "grpo_direct", "answer"),
    ("+ cold start", "cold_start", "think"), ("+ rejection sampling", "rejection_sft", "think"), ("+ GRPO (full)", "grpo", "think"),
    ("full, answered without CoT", "grpo", "answer")]


def read_facts(file: Path) -> dict:
    """What a done.json or begun.json says; empty where it is missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def made_by(stage: str, out: Path) -> str | None:
    """Names the run of a stage that its folder holds; None if it is not finished. A repeated stage gets a new name."""
    return read_facts(out / stage / "done.json").get("id")


def checkpoint(stage: str, settings: Settings, out: Path) -> str:
    """Path of the weights a stage ended with. The base may be one that was not trained here."""
    if stage != "base" or settings.base.rebuild or not settings.model.path:
        return str(out / stage)
    return str(ROOT / settings.model.path) if (ROOT / settings.model.path).is_dir() else settings.model.path


def style(mode: str, settings: Settings, out: Path, stage: str) -> str:
    """Of a stage's prompts (data.build_prompt). Whoever learnt to think in the cold start was trained on the short ones. A base from elsewhere never
    saw them: it gets the full ones, and for bare verdicts so do all that are compared with it. One of these files: it was trained here."""
    here = any(Path(checkpoint("base", settings, out), name).is_file() for name in ("figures.json", "done.json"))
    taught = (settings.grpo.start if stage == "grpo" else stage) in ("cold_start", "rejection_sft")
    return "short" if here or mode == "think" and taught else "full"


def inputs(stage: str, settings: Settings) -> list:
    """The stages whose output `stage` reads; GRPO's settings say what it starts from and which samples it takes."""
    if STAGES[stage][0] != "grpo":
        return STAGES[stage][1]
    own = getattr(settings, stage)
    return [own.start] + ["rejection"] * (own.data != "pool") + STAGES[stage][1]


def digest(file: Path) -> str:
    """Of a file's bytes; of weights, which are gigabytes, of 64 KB spread over them, and their size."""
    with open(file, "rb") as stream:
        if file.suffix != ".safetensors":
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        size, made = file.stat().st_size, hashlib.sha256()
        for k in range(64):
            stream.seek(k * size // 64)
            made.update(stream.read(1024))
        return f"{size} {made.hexdigest()[:16]}"


def made_of(stage: str, settings: Settings, out: Path) -> dict:
    """What decides the result of a stage, by name: its settings, the files they name (one that is gone counts as it was), which runs of the stages
    it reads, and the rows that these wrote."""
    read, files, was = inputs(stage, settings), {}, read_facts(out / stage / "done.json").get("made_of", {})
    facts = {f"{section}.{key}": value for section in STAGES[stage][2] for key, value in config.shaping(getattr(settings, section)).items()}
    if stage == "data":
        named = [one for split in ("distill", "pool", "test") for one in importlib.import_module("data").sources(split, settings.data)]
        files = {path: Path(path) for _, path, _ in named}
    if stage == "base" and settings.model.path and not settings.base.rebuild:
        files = {name: Path(name) for name in was if name.startswith("model.path/")}
        files = {f"model.path/{file.name}": file for file in Path(checkpoint(stage, settings, out)).glob("*.safetensors")} or files
    files = {name: digest(file) if file.is_file() else was.get(name) for name, file in files.items()}
    rows = {f"{s}/{file.name}": digest(file) for s in read for file in (out / s).glob("*.jsonl")}
    return facts | files | rows | {"run.seed": settings.run.seed} | {s: made_by(s, out) for s in read}


def is_done(stage: str, settings: Settings, out: Path) -> bool:
    """Finished, with these settings, from what its inputs hold now, and nothing of it is gone."""
    facts = read_facts(out / stage / "done.json")
    return facts.get("made_of") == made_of(stage, settings, out) and all((out / stage / name).is_file() for name in facts.get("files", []))


def plan(targets: list, settings: Settings) -> list:
    """The stages to have for `targets`, each after the ones it reads."""
    return list(dict.fromkeys(stage for target in targets for stage in plan(inputs(target, settings), settings) + [target]))


def begin(stage: str, settings: Settings, folder: Path, again: str, anew: bool) -> None:
    """Readies the folder of a stage. What was stopped is gone on with, and refused if it is made of something else;
    with `anew`, or where nothing was begun, all goes, but for replies of a server."""
    import torch  # late, see config.distributed

    threads = torch.get_num_threads()
    facts = made_of(stage, settings, folder.parent) | {"processes that share the weights": world()[1] if settings.run.shard else 1}
    worth_it = any(folder.glob("*.state")) or (folder / "texts.jsonl").is_file()  # else a corrected mistake would be taken for a change
    begun = read_facts(folder / "begun.json") if worth_it and not anew and not made_by(stage, folder.parent) else {}
    was = begun.get("made_of", facts)
    if changed := [f"{key} was {was.get(key)}, is {facts.get(key)}" for key in was | facts if was.get(key) != facts.get(key)]:
        raise UserError(f"{folder} was begun otherwise: {'; '.join(changed)}. Put that back, or begin anew: {again} --force")
    if begun.get("threads", threads) != threads:
        print(f"   was begun with {begun['threads']} threads, goes on with {threads}: sums may differ in their last bits", flush=True)
    kept, going_on = ["replies.jsonl"] + ["begun.json", "texts.jsonl"] * bool(begun), begun and any(folder.glob("*.0.state"))
    first = ("done.json", "begun.json")  # what is half removed is neither finished nor gone on with
    for item in sorted(folder.iterdir(), key=lambda item: item.name not in first):
        if item.suffix == ".tmp" or not going_on and item.name not in kept:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    write_text(folder / "begun.json", json.dumps({"made_of": facts, "threads": threads}))


def passing(folder: Path) -> list:
    """The files that only an unfinished stage needs."""
    return [*folder.glob("*.state"), folder / "texts.jsonl", folder / "begun.json"]


def tidy(folder: Path) -> None:
    """Deletes what is passing, before anyone looks at what the folder holds."""
    for file in passing(folder) if is_main() else []:
        file.unlink(missing_ok=True)
    wait_for_all()


def is_run(out: Path) -> bool:
    return any([*out.glob("lock*"), *out.glob("*/done.json")])


def do_stage(stage: str, settings: Settings, out: Path, command: str, anew: bool = False) -> None:
    """Runs one stage, from its start or from where it was stopped; done.json, written last, makes it count."""
    import torch

    script, _, sections = STAGES[stage]
    started, folder, again, facts = time.time(), out / stage, f"python {script}.py {command} --stage {stage}", made_of(stage, settings, out)
    print(f"\n== {stage}: {again}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    if is_main() and stage != "evaluate":  # evaluate keeps its judgements and knows which of them are still valid
        begin(stage, settings, folder, again, anew)
    elif is_main() and anew:  # evaluate --force judges again
        for mark in [*folder.glob("*-*.json"), *folder.glob("*.texts")]:
            mark.unlink()
    wait_for_all()
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{settings.run.seed}/{stage}".encode()).digest()[:4], "big"))
    made = importlib.import_module(script).run(stage, settings, folder)
    gc.collect()  # a sharded model holds itself
    files = [file for file in folder.iterdir() if file.is_file()] if is_main() else []  # the others would meet files that it is still renaming
    for file in files:
        config.flush(file)  # rows and weights are on the disk before done.json says so
    kept = {file.name for file in files if file.suffix != ".tmp" and file not in passing(folder)} - {"done.json", "replies.jsonl"}
    # Data, or a base that is only pointed at, is the same again when a mistake in a setting was put back, and what was trained on it still counts.
    fixed = not anew and (stage == "data" or checkpoint(stage, settings, out) != str(folder))
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16] if fixed else time.time_ns()
    facts = {"id": f"{stage} {name}", "made": made, "seconds": round(time.time() - started, 1), "made_of": facts,
             "settings": {section: dataclasses.asdict(getattr(settings, section)) for section in ["run", *sections]},
             "files": sorted(kept)}  # without the replies of a server: were they gone, all would be paid for again
    write_text(folder / "done.json", json.dumps(facts, indent=1))
    wait_for_all()
    tidy(folder)
    print(f"   {made} ({facts['seconds']:.0f} s) -> {folder}", flush=True)


# --------------------------------------------------------------------------------------------------------- the entry point

def join_processes() -> None:
    """Under torchrun, lets the processes find each other; only the first one prints."""
    if world()[1] == 1:
        return
    import torch

    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    # One may wait for hours while another asks a teacher; a process that dies is torchrun's to notice, and it ends the others.
    distributed().init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(days=7))
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def leave(code: int) -> None:
    """Ends this process. One of several goes without Python's tidying up: gloo's threads (FSDP keeps them alive beyond destroy_process_group) let go
    of tensors when they come to it, and in the middle of tidying up that aborts the process (pytorch/pytorch issue 190489)."""
    if world()[1] == 1:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)


def give_up(error: str) -> None:
    """Ends this process; torchrun then ends the others. What several processes meet is said once, by the first."""
    if world()[1] == 1 or distributed().distributed_c10d._get_default_store().add(error, 1) == 1:
        print(f"error: {error}", file=sys.stderr, flush=True)
    leave(2)


def main(default_stage: str, commands=()) -> None:
    """Entry point of every script: runs a command, {its name: function of the arguments after it}, or the stage and what it needs. A mistake of the
    user's and a fault of the machine's disk or memory are one line on stderr; --debug shows where they came up."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    after = "; what was made is kept, and the same command goes on"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        join_processes()
        commands[arguments[0]](arguments[1:]) if arguments and arguments[0] in commands else run_stages(default_stage, arguments, commands)
        if world()[1] > 1:
            wait_for_all()
            distributed().destroy_process_group()
            leave(0)
    except KeyboardInterrupt:
        print("" if not is_main() else f"\ninterrupted{after}" + " without --force" * ("--force" in arguments), file=sys.stderr, flush=True)
        leave(130)
    except (UserError, OSError, MemoryError, RuntimeError, SafetensorError, UnicodeEncodeError) as error:
        said = str(error) or type(error).__name__
        if isinstance(error, (RuntimeError, MemoryError)):  # torch has no other word for these two
            if not (kind := re.search(r"(?i)(MemoryError|allocate|out of memory)|gloo|nccl|connection (closed|reset)", type(error).__name__ + said)):
                raise
            said = "out of memory: lower micro_tokens (SFT), micro_prompts (GRPO) or batch_rows" if kind[1] else "another process has ended"
        if "--debug" in sys.argv:
            traceback.print_exc()
        give_up(one_line(said) + ("" if isinstance(error, UserError) else f"{after} (--debug says where this was)"))


def alone(file: Path, at: Path):
    """An open file which tells every other process that this one is at work in `at`; UserError if another is. The system lets go of it when the
    process ends, however that ends."""
    lock = open(f"{file}{os.environ.get('RANK', '0')}", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {at}: wait for it, or give another --out")
    return lock


def run_stages(default_stage: str, arguments: list, commands) -> None:
    import __main__

    options, overrides = {}, []
    words = iter([word for argument in arguments for word in argument.split("=", 1 if argument.startswith("--") else 0)])
    for name in words:
        if name in ("-h", "--help", "--force", "--explain"):
            options[name] = True
        elif not name.startswith("--"):
            known = f", commands are {', '.join(commands)}" if commands else ""
            raise UserError(f"unexpected argument {name!r}; settings are given as --section.key value{known}")
        elif "." not in name and name not in ("--config", "--stage", "--out"):
            raise UserError(f"unknown option {name}; options are --config, --stage, --out, --force, --explain, --help, --debug and --section.key")
        elif (value := next(words, None)) is None:
            raise UserError(f"{name} needs a value")
        else:
            overrides.append((name[2:], value)) if "." in name else options.update({name: value})
    if "--help" in options or "-h" in options:
        lines = [__main__.__doc__.strip(), "", "settings (section.key = default: meaning)"]
        for section in dataclasses.fields(Settings):
            values = section.default_factory()
            lines += [""] + [f"  --{section.name}.{f.name} = {getattr(values, f.name)!r}: {f.metadata['help']}" for f in dataclasses.fields(values)]
        return print("\n".join(lines))
    if "--config" not in options:
        raise UserError("say which settings: --config small (or a path to a .toml file); --help lists everything")
    stage = options.get("--stage", default_stage)
    if stage not in (allowed := [name for name, entry in STAGES.items() if entry[0] == STAGES[default_stage][0]]):
        raise UserError(f"--stage {stage}: {STAGES[default_stage][0]}.py runs {', '.join(allowed)}")
    settings = config.load_settings(options["--config"], overrides)
    if settings.run.shard and (sections := [name for name, values in vars(settings).items() if getattr(values, "offload", False)]):
        raise UserError(f"run.shard and offload exclude each other: {' '.join(f'--{name}.offload false' for name in sections)}")
    importlib.import_module("media").limits = settings.data
    out = Path(options.get("--out", ROOT / "runs" / Path(options["--config"]).name.removesuffix(".toml"))).resolve()
    given = {name: options[name] for name in ("--config", "--out") if name in options} | {f"--{name}": value for name, value in overrides}
    command = " ".join(f"{name} {shlex.quote(value)}" for name, value in given.items())
    whole = stage in ("grpo", "evaluate")  # the last stages of the paper: end with the table
    if (explaining := "--explain" in options) and STAGES[stage][0] not in ("sft", "rejection", "grpo"):
        raise UserError(f"--explain is for sft.py, rejection.py and grpo.py, not for {stage}")
    if explaining and world()[1] > 1:
        raise UserError("--explain shows one process; leave torchrun out")
    if foreign := [name for name in STAGES if not is_run(out) and any((out / name).glob("*"))]:
        raise UserError(f"{out / foreign[0]} is of no run, and would be emptied: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / "lock", out):
        # "data" comes first: `evaluate.after` judges the base on its pairs before any stage would ask for them.
        for step in plan(inputs(stage, settings) if explaining else ["data", stage, "evaluate"] if whole else [stage], settings):
            if not is_done(step, settings, out) or ("--force" in options and step == stage):
                do_stage(step, settings, out, command, "--force" in options and step == stage)
            else:
                tidy(out / step)  # it may have been killed when it was done and its states were still there
            if whole and not explaining:  # a chain that takes minutes shows early what each stage did
                importlib.import_module("evaluate").after(step, settings, out)
        if explaining:
            return importlib.import_module("explain").explain(stage, settings, out)
    table, page = out / "evaluate" / "table.txt", out / "evaluate" / "report.html"
    print(f"\n{table.read_text()}\nreport: {page}" if whole else f"{stage} is ready in {out / stage}")
