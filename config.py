"""Settings, run folders and the chain of stages: the plumbing every script shares.

    python SCRIPT.py --config NAME [--section.key value ...] [--stage STAGE] [--out DIR] [--force]

`NAME` is configs/NAME.toml or a path. A settings file has one section per stage and states only what differs from the paper's values,
which are the defaults below. Every stage writes runs/NAME/STAGE/; running one first runs the stages before it whose output is missing
or was made with other settings or rows, and prints the command for each.
"""

import dataclasses
import difflib
import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
import tomllib
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from safetensors import SafetensorError

# How long torch's threads wait for each other awake, some 0.1 ms. Asleep at once, two were hardly faster than one here; awake for longer, they
# are several times slower beside another busy process, which has the core that one of them waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
ROOT = Path(__file__).resolve().parent
distributed = lambda: importlib.import_module("torch.distributed")  # torch is imported late: --help and a mistyped setting answer at once
is_main = lambda: world()[0] == 0  # under torchrun only the first process writes files and prints
wait_for_all = lambda: gather([])  # what one process has written is there for all from here on
NAME, URL, STAGE = "[A-Z0-9_]*", r"https?://[^\s/@?#]+(/[^\s@?#]*)?", "(base|cold_start|rejection_sft|direct_sft|grpo|grpo_direct)"  # of settings


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2, no traceback."""


# --------------------------------------------------------------------------------------------------------------- settings


def setting(default, meaning: str, shapes: bool = True, allowed=None):
    """`allowed`: the pattern of a string, or (least, most) of a number; where it is not given, whole numbers begin at 1 and others at 0."""
    return field(default=default, metadata={"help": meaning, "shapes": shapes, "allowed": allowed})


def shaping(section) -> dict:
    """The settings that can change what a stage makes, in more than the last bits of a sum; a new value of another makes no stage stale."""
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if f.metadata["shapes"]}


@dataclass
class Run:
    seed: int = setting(0, "moves the world, the data order and the sampling", allowed=(0, 2**62))
    threads: int = setting(0, "CPU threads of torch; 0 leaves torch's own choice", allowed=(0, 4096))
    shard: bool = setting(False, "under torchrun: each process keeps a part of weights, gradients and Adam's moments (FSDP2)")


@dataclass
class Data:
    distill_pairs: int = setting(1000, "image generation pairs shown to the teacher (paper: about 10K, of which 5.5K were kept)")
    pool_pairs: int = setting(1000, "pairs per task in the unified pool (paper: about 105K in all)")
    distill_tasks: str = setting("image_generation", "the small world's pairs for the teacher: image_generation (the paper) or all tasks",
                                 allowed="image_generation|all")
    test_pairs: int = setting(300, "pairs per task in the in-distribution test")
    heldout_pairs: int = setting(100, "pairs per task whose colour-shape combinations were never trained on", allowed=(0, 1e12))
    tie_pairs: int = setting(90, "pairs per generation task in the split of which a third are ties", allowed=(0, 1e12))
    distill: str = setting("", "files to distil on: PATH, PATH@first:N, PATH@end:N, PATH@random:N, PATH@N%, ...; empty: the small world's own")
    pool: str = setting("", "files that make the unified pool, written alike")
    test: str = setting("", "files that make the test, written alike; the small world's other tests are left out then")
    image_root: str = setting("", "folder that media paths are relative to; empty: the folder of each file")
    media_within: str = setting("", "folder that no medium may lie outside of, symlinks followed; empty: the one paths are relative to", shapes=False)
    on_error: str = setting("stop", "what a bad row does after all have been listed: stop, or skip (it is left out)", allowed="stop|skip")
    frames: int = setting(8, "frames shown of a video")
    pair_frames: int = setting(8, "frames shown of a pair of videos together, half of each")
    max_pixels: int = setting(512 * 512, "pixels of an image or frame; larger ones are scaled down")


@dataclass
class Model:
    path: str = setting("", "where the chain starts: a folder or hub name; empty means runs/NAME/base, trained from random weights")
    hidden_size: int = setting(128, "width of the small text model")
    layers: int = setting(4, "depth of the small text model")
    heads: int = setting(4, "attention heads of the small text model")
    intermediate_size: int = setting(384, "width of its MLPs")
    vision_hidden_size: int = setting(96, "width of the small vision tower")
    vision_layers: int = setting(2, "depth of the small vision tower")
    vocab_size: int = setting(640, "entries of the byte-level BPE trained on the project's own text")


@dataclass
class Learning:  # what SFT and GRPO have in common
    lr: float = setting(2.5e-6, "peak learning rate")
    warmup: float = setting(0.03, "share of the steps in which the learning rate rises; then a cosine brings it to zero", allowed=(0, 1))
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_skipped: int = setting(10, "steps in a row that may be skipped, as loss or gradient is not finite; one more ends the run", False, (0, 1e12))
    freeze_vision: bool = setting(True, "train the language model only")
    gradient_checkpointing: bool = setting(False, "run layers again in backward, not to keep activations (GRPO: prompts once per completion)", False)
    offload: bool = setting(False, "on a GPU: keep fp32 weights, gradients and Adam's moments in host memory", False)
    save_minutes: float = setting(2.0, "minutes between states to go on from after a stop; longer where saving would be 2% of the time", False)


@dataclass
class SFT(Learning):
    epochs: float = setting(3.0, "passes over the data")
    batch_size: int = setting(128, "examples per optimiser step")
    micro_tokens: int = setting(16384, "tokens per forward pass, padding included; changes memory and speed, never the result", False)
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW")
    replay: float = setting(0.0, "practice examples of the base mixed in, per example of the stage's own; keeps direct answering alive")


@dataclass
class Base(SFT):
    rebuild: bool = setting(False, "train the base anew in runs/NAME/base instead of starting from model.path")
    scenes: int = setting(8000, "pairs drawn for practice")
    rows_per_scene: int = setting(5, "exercises written on each of them")
    simple: int = setting(12000, "exercises in the first single skill, naming; shapes.SKILLS says how many in the others", allowed=(0, 1e12))
    simple_lr: float = setting(1e-3, "peak learning rate of the single skills; `lr` is that of the mixture")
    freeze_vision: bool = setting(False, "the base is where seeing is learnt")


@dataclass
class Server:  # how a served model is asked (distill.ask)
    key_variable: str = setting("", "NAME of the environment variable that holds the server's key; empty sends none", False, NAME)
    concurrency: int = setting(32, "requests under way at a time", shapes=False)
    timeout: float = setting(300.0, "seconds until a request is given up and tried again", False, (0.1, 1e6))
    max_new_tokens: int = setting(2048, "longest completion")
    retries: int = setting(8, "attempts after the first, with growing waits or those the server asks for", False, (0, 1000))
    max_cost, price_in, price_out, max_side = 0.0, 0.0, 0.0, 16384  # of one's own server: nothing to pay, and pictures as they are


@dataclass
class Distill(Server):
    teacher: str = setting("scripted", "scripted (the small world), given (SFT rows bring their reasoning), or a served model (paper: gpt-4o)")
    base_url: str = setting("https://api.openai.com/v1", "OpenAI-compatible server of the teacher, https://HOST/v1, no password in it", allowed=URL)
    key_variable: str = setting("OPENAI_API_KEY", "NAME of the environment variable whose key is sent to base_url; empty sends none", False, NAME)
    temperature: float = setting(1.0, "sampling temperature of a served teacher")
    max_side: int = setting(1024, "longer side of the pictures sent, in pixels; larger ones are scaled down")
    max_cost: float = setting(20.0, "stop before all replies, those of earlier runs included, could cost more; 0 sets no limit", shapes=False)
    price_in: float = setting(2.5, "price of a million prompt tokens, in the unit of max_cost (default: gpt-4o in US dollars)", shapes=False)
    price_out: float = setting(10.0, "price of a million reply tokens, in the unit of max_cost (default: gpt-4o in US dollars)", shapes=False)
    error_rate: float = setting(0.1, "share of its judgements in which the scripted teacher scores a dimension wrongly", allowed=(0, 1))
    scores: bool = setting(True, "false: the scripted teacher reasons without scores and sums (with grpo.consistency_weight 0)")


@dataclass
class Rejection(Server):
    endpoint: str = setting("", "server (vLLM: http://HOST:8000/v1) that has the judge as cold_start; empty runs it here", False, f"({URL})?")
    temperature: float = setting(1.0, "sampling temperature of the judge")
    select: str = setting("correct", "what is learnt: correct (the paper); consistent: of these, whose sums add up and lead to the verdict; random: as "
                          "many as are correct, right or wrong (a control)", allowed="correct|consistent|random")
    batch_rows: int = setting(256, "completions decoded together; changes memory and speed", False)


@dataclass
class GRPO(Learning):
    mode: str = setting("think", "think or answer (the control without chain of thought)", allowed="think|answer")
    start: str = setting("rejection_sft", "what is trained: base, cold_start, rejection_sft, direct_sft", allowed="base|cold_start|(rejection|direct)_sft")
    data: str = setting("wrong", "trained on: wrong (what the judge got wrong: the paper), correct, or pool (all)", allowed="wrong|correct|pool")
    random_order: bool = setting(False, "turn each drawn pair round with probability 1/2: what one judge got wrong has more labels on one side")
    steps: int = setting(500, "rollouts, each followed by updates_per_rollout optimiser steps")
    prompts_per_step: int = setting(64, "prompts per rollout (paper: one on each of 64 GPUs)")
    group_size: int = setting(8, "completions per prompt, G", allowed=(2, 1e6))
    updates_per_rollout: int = setting(1, "optimiser steps on each rollout; above 1 the clip begins to matter")
    lr: float = setting(1e-6, "peak learning rate")
    beta: float = setting(0.04, "weight of the KL penalty to the frozen reference; 0 does without a reference")
    kl: str = setting("k3", "KL estimator: k1, k2 or k3", allowed="k[123]")
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", allowed=(0, 1))
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high")
    scale_by_std: bool = setting(True, "divide advantages by the group's standard deviation; false is Dr. GRPO")
    normalise: str = setting("rollout", "token (DAPO), rollout (mean of means, GRPO) or constant (Dr. GRPO)", allowed="token|rollout|constant")
    format_weight: float = setting(1.0, "weight of the format reward")
    accuracy_weight: float = setting(1.0, "weight of the accuracy reward")
    consistency_weight: float = setting(0.0, "weight of a reward for sums that add up and a verdict that follows from them (not in the paper)")
    dimension_weight: float = setting(0.0, "weight of a reward for the share of right scores (VR-Thinker); needs their truth: the small world")
    gated: bool = setting(False, "pay accuracy only where the verdict follows from sums that add up, instead of adding the rewards up")
    temperature: float = setting(1.0, "sampling temperature; log-probabilities are taken at the same one", allowed=(0.01, 100))
    max_new_tokens: int = setting(2048, "longest completion")
    micro_prompts: int = setting(4, "groups per forward pass; changes memory and speed, never the result", False)
    batch_rows: int = setting(256, "completions decoded together; changes memory and speed", False)


@dataclass
class Evaluate(Server):
    endpoint: str = setting("", "server (vLLM: http://HOST:8000/v1) of the checkpoints in `served`; empty runs all here", False, f"({URL})?")
    served: str = setting("grpo", "stages, with commas between, that endpoint serves by these names; others run here", False, f"{STAGE}(,{STAGE})*")
    batch_rows: int = setting(256, "completions decoded together; changes memory and speed", False)
    test_pairs: int = setting(0, "pairs per task used of each split; 0 takes all", allowed=(0, 1e12))


@dataclass
class Settings:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    base: Base = field(default_factory=Base)
    distill: Distill = field(default_factory=Distill)
    cold_start: SFT = field(default_factory=SFT)
    rejection: Rejection = field(default_factory=Rejection)
    rejection_sft: SFT = field(default_factory=SFT)
    direct_sft: SFT = field(default_factory=SFT)
    grpo: GRPO = field(default_factory=GRPO)
    grpo_direct: GRPO = field(default_factory=lambda: GRPO(mode="answer", start="base", data="pool", max_new_tokens=32))
    evaluate: Evaluate = field(default_factory=Evaluate)


def set_value(settings: Settings, name: str, value, source: str) -> None:
    """Sets "section.key", refusing unknown names and wrong types. Strings from the command line are converted to the field's type."""
    known = {f"{s.name}.{f.name}": f for s in dataclasses.fields(Settings) for f in dataclasses.fields(getattr(settings, s.name))}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"{source}: unknown setting {name!r}; did you mean {near!r}?")
    kind, help, allowed = known[name].type, known[name].metadata["help"], known[name].metadata["allowed"]
    least, most = (allowed or (int(kind is int), 1e12)) if kind in (int, float) else (False, True)
    takes = {str: f"str: {help}", bool: "true or false"}.get(kind, f"a number ({kind.__name__}) from {least:g} to {most:g}")
    try:
        if isinstance(value, str) and kind is not str and source.startswith("--"):
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        value = float(value) if kind is float and type(value) is int else value
        fits = type(value) is kind and (re.fullmatch(allowed or "(?s:.*)", value) if kind is str else least <= value <= most)
    except (KeyError, ValueError, OverflowError):
        fits = False
    if not fits:  # a wrong text is not repeated: it may be a key
        raise UserError(f"{source}: {name} takes {takes}" + f"; {value!r} is none" * (kind is not str))
    setattr(getattr(settings, name.split(".")[0]), known[name].name, value)


def load_settings(config: str, overrides: list) -> Settings:
    """Defaults, then the settings file, then `overrides` [(section.key, text)]."""
    path = Path(config) if config.endswith(".toml") else ROOT / "configs" / f"{config}.toml"
    if not path.is_file():
        raise UserError(f"no settings file {path}; configs/ has {', '.join(sorted(p.stem for p in (ROOT / 'configs').glob('*.toml')))}")
    try:
        table = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}")
    if loose := [name for name, values in table.items() if not isinstance(values, dict)]:
        raise UserError(f"{path}: {loose[0]!r} stands outside a section; write it under [section]")
    settings, given = Settings(), [(f"{section}.{key}", value, str(path)) for section, values in table.items() for key, value in values.items()]
    for name, value, source in given + [(name, value, f"--{name}") for name, value in overrides]:
        set_value(settings, name, value, source)
    return settings


# ----------------------------------------------------------------------------------------------------------------- stages

STAGES = {  # name: (script, stages whose output it reads, sections that shape its output)
    "data": ("data", [], ["data"]),
    "base": ("sft", [], ["model", "base"]),
    "distill": ("distill", ["data"], ["distill"]),
    "cold_start": ("sft", ["base", "distill"], ["cold_start"]),
    "rejection": ("rejection", ["data", "cold_start"], ["rejection"]),
    "rejection_sft": ("sft", ["cold_start", "rejection"], ["rejection_sft"]),
    "direct_sft": ("sft", ["base", "rejection"], ["direct_sft"]),
    "grpo": ("grpo", ["rejection_sft", "rejection", "data"], ["grpo"]),
    "grpo_direct": ("grpo", ["base", "data"], ["grpo_direct"]),
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


def made_of(stage: str, settings: Settings, out: Path) -> dict:
    """What decides the result of a stage, by name: its settings, which runs of the stages it reads, and the rows that these wrote."""
    _, inputs, sections = STAGES[stage]
    facts = {f"{section}.{key}": value for section in sections for key, value in shaping(getattr(settings, section)).items()}
    rows = {f"{s}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[:16] for s in inputs for file in (out / s).glob("*.jsonl")}
    return facts | rows | {"run.seed": settings.run.seed} | {s: made_by(s, out) for s in inputs}


def is_done(stage: str, settings: Settings, out: Path) -> bool:
    """Finished, with these settings, from what its inputs hold now."""
    return read_facts(out / stage / "done.json").get("made_of") == made_of(stage, settings, out)


def plan(targets: list) -> list:
    """The stages to have for `targets`, each after the ones it reads."""
    return list(dict.fromkeys(stage for target in targets for stage in plan(STAGES[target][1]) + [target]))


def begin(stage: str, settings: Settings, folder: Path, again: str, anew: bool) -> None:
    """Readies the folder of a stage. What was stopped is gone on with, if it is made of the same; else all goes, but for replies of a server."""
    threads = importlib.import_module("torch").get_num_threads()
    facts = made_of(stage, settings, folder.parent) | {"processes that share the weights": world()[1] if settings.run.shard else 1}
    worth_it = any(folder.glob("*.state")) or (folder / "texts.jsonl").is_file()  # else a corrected mistake would be taken for a change
    begun = read_facts(folder / "begun.json") if worth_it and not anew and not made_by(stage, folder.parent) else {}
    was = begun.get("made_of", facts)
    if changed := [f"{key} was {was.get(key)}, is {facts.get(key)}" for key in was | facts if was.get(key) != facts.get(key)]:
        raise UserError(f"{folder} was begun otherwise: {'; '.join(changed)}. Put that back, or begin anew: {again} --force")
    if begun.get("threads", threads) != threads:
        print(f"   was begun with {begun['threads']} threads, goes on with {threads}: sums may differ in their last bits", flush=True)
    kept, going_on = ["replies.jsonl"] + ["begun.json", "texts.jsonl"] * bool(begun), begun and any(folder.glob("*.0.state"))
    for item in sorted(folder.iterdir(), key=lambda item: item.name != "begun.json"):  # that first: what is half removed is not gone on with
        if item.suffix == ".tmp" or not going_on and item.name not in kept:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    write_text(folder / "begun.json", json.dumps({"made_of": facts, "threads": threads}))


def tidy(folder: Path) -> None:
    """Deletes what only an unfinished stage needs."""
    for file in [*folder.glob("*.state"), folder / "texts.jsonl", folder / "begun.json"] if is_main() else []:
        file.unlink(missing_ok=True)


def do_stage(stage: str, settings: Settings, out: Path, command: str, anew: bool = False) -> None:
    """Runs one stage, from its start or from where it was stopped; done.json, written last, makes it count."""
    (script, _, sections), torch = STAGES[stage], importlib.import_module("torch")
    started, folder, again, facts = time.time(), out / stage, f"python {script}.py {command} --stage {stage}", made_of(stage, settings, out)
    print(f"\n== {stage}: {again}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    if is_main() and stage != "evaluate":  # evaluate keeps its judgements and knows which of them are still valid
        begin(stage, settings, folder, again, anew)
    elif is_main() and anew:  # evaluate --force judges again
        for mark in folder.glob("*-*.json"):
            mark.unlink()
    wait_for_all()
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{settings.run.seed}/{stage}".encode()).digest()[:4], "big"))
    made = importlib.import_module(script).run(stage, settings, folder)
    for file in filter(Path.is_file, folder.iterdir()):
        flush(file)  # rows and weights are on the disk before done.json says so
    facts = {"id": f"{stage} {time.time_ns()}", "made": made, "seconds": round(time.time() - started, 1), "made_of": facts,
             "settings": {section: dataclasses.asdict(getattr(settings, section)) for section in ["run", *sections]}}
    write_text(folder / "done.json", json.dumps(facts, indent=1))
    wait_for_all()
    tidy(folder)
    print(f"   {made} ({facts['seconds']:.0f} s) -> {folder}", flush=True)


def world() -> tuple:
    """(rank, processes), as torchrun says, on however many machines; they share the run folder."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes() -> None:
    if world()[1] == 1:
        return
    if gpu := importlib.import_module("torch").cuda.is_available():
        importlib.import_module("torch").cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    # One may wait for hours while another asks a teacher; a process that dies is torchrun's to notice, and it ends the others.
    distributed().init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(days=7))
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def give_up(error: str) -> None:
    """Ends this process; torchrun then ends the others. What several processes meet is said once, by the first."""
    if world()[1] == 1 or distributed().distributed_c10d._get_default_store().add(error, 1) == 1:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def share(items):
    """This process's part of what there is to do, of a list or the rows of a tensor: every n-th, since neighbours are alike in cost."""
    return items[world()[0] :: world()[1]]


def gather(made: list) -> list:
    """One result for each item of this process's `share` -> the results for all items, in their order, in every process."""
    parts = [made] * world()[1]
    if len(parts) > 1:
        distributed().all_gather_object(parts, made)
    return [parts[k % len(parts)][k // len(parts)] for k in range(sum(map(len, parts)))]


def checkpoint(stage: str, settings: Settings, out: Path) -> str:
    """Path of the weights a stage ended with. The base may be one that was not trained here."""
    if stage != "base" or settings.base.rebuild or not settings.model.path:
        return str(out / stage)
    return str(ROOT / settings.model.path) if (ROOT / settings.model.path).is_dir() else settings.model.path


def one_line(text) -> str:
    """`text` as it can stand in a terminal: no line breaks, control characters or halves of characters, which a file's name or a row may hold."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))[:2000]


def main(default_stage: str, commands=None) -> None:
    """Entry point of every script: runs a command, {its name: function of the arguments after it}, or the stage and what it needs. A mistake of the
    user's and a fault of the machine's disk or memory are one line on stderr; --debug shows where they came up."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    after = "; what was made is kept, and the same command goes on"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        join_processes()
        commands[arguments[0]](arguments[1:]) if arguments and arguments[0] in (commands or {}) else run_stages(default_stage, arguments)
        if world()[1] > 1:  # unasked, the threads of gloo may abort a process that exits
            wait_for_all()
            distributed().destroy_process_group()
    except KeyboardInterrupt:
        print("" if not is_main() else f"\ninterrupted{after}" + " without --force" * ("--force" in arguments), file=sys.stderr, flush=True)
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError, SafetensorError, UnicodeEncodeError) as error:
        said = str(error) or type(error).__name__
        if isinstance(error, (RuntimeError, MemoryError)):  # torch has no other word for these two
            if not (kind := re.search(r"(?i)(MemoryError|allocate|out of memory)|gloo|nccl|connection (closed|reset)", type(error).__name__ + said)):
                raise
            said = "out of memory: lower micro_tokens (SFT), micro_prompts (GRPO) or batch_rows" if kind[1] else "another process has ended"
        if "--debug" in sys.argv:
            traceback.print_exc()
        give_up(one_line(said) + ("" if isinstance(error, UserError) else f"{after} (--debug says where this was)"))


def run_stages(default_stage: str, arguments: list) -> None:
    import __main__

    options, overrides = {}, []
    words = iter([word for argument in arguments for word in argument.split("=", 1 if argument.startswith("--") else 0)])
    for name in words:
        if name in ("-h", "--help", "--force", "--explain"):
            options[name] = True
        elif not name.startswith("--"):
            raise UserError(f"unexpected argument {name!r}; settings are given as --section.key value")
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
    settings = load_settings(options["--config"], overrides)
    importlib.import_module("media").limits = settings.data
    out = Path(options.get("--out", ROOT / "runs" / Path(options["--config"]).stem)).resolve()
    command = " ".join([f"--config {options['--config']}"] + [f"--{n} {v}" for n, v in overrides] + ([f"--out {options['--out']}"] if "--out" in options else []))
    whole = stage in ("grpo", "evaluate")  # the last stages of the paper: end with the table
    if (explaining := "--explain" in options) and STAGES[stage][0] not in ("sft", "rejection", "grpo"):
        raise UserError(f"--explain is for sft.py, rejection.py and grpo.py, not for {stage}")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"lock{os.environ.get('RANK', '0')}", "w") as lock:  # the system lets go of it when the process ends, however that ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {out}: wait for it, or give another --out")
        for step in plan(STAGES[stage][1] if explaining else ["data", stage, "evaluate"] if whole else [stage]):
            if not is_done(step, settings, out) or ("--force" in options and step == stage):
                do_stage(step, settings, out, command, "--force" in options and step == stage)
            else:
                tidy(out / step)  # it may have been killed when it was done and its states were still there
            if whole and not explaining:  # a chain that takes minutes shows early what each stage did
                importlib.import_module("evaluate").after(step, settings, out)
        if explaining:
            return importlib.import_module("explain").explain(stage, settings, out)
    ready = f"\n{(out / 'evaluate' / 'table.txt').read_text()}\nreport: {out / 'evaluate' / 'report.html'}" if whole else ""
    print(ready or f"{stage} is ready in {out / stage}")


# ------------------------------------------------------------------------------------------------------------- small tools


def read_text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}")


def flush(path: Path) -> int:
    """Has a file on the disk before it returns its length."""
    with open(path) as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def write_file(path: Path, write) -> None:
    """What `write` puts into the stream it is given becomes `path` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError, UnicodeError) as error:
        temporary.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else error.__context__ or error  # torch.save calls what the disk said "unexpected pos"
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    if is_main():
        write_file(path, lambda stream: stream.write(text.encode()))


def log(folder: Path, row: dict, file: str = "metrics.jsonl") -> None:
    with open(folder / file if is_main() else os.devnull, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def say(line: str) -> None:
    """Prints a line, above the bar that may be being drawn."""
    importlib.import_module("tqdm").tqdm.write(line) if is_main() else None


def progress(items, label: str):
    """Yields from the sequence `items`: a tqdm bar on a terminal; in a log file, where a bar is unreadable, a line every twenty seconds."""
    if sys.stderr.isatty() and is_main():
        yield from importlib.import_module("tqdm").tqdm(items, f"   {label}", leave=False, mininterval=0.5)
        return
    started = shown = time.time()
    for done, item in enumerate(items):
        if time.time() - shown > 20:
            shown = time.time()
            left = (shown - started) / done * (len(items) - done)
            print(f"   {label}: {done} of {len(items)}, {shown - started:.0f} s so far, about {left:.0f} s to go", flush=True)
        yield item
