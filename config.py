"""The settings, and the small tools that every script shares: files written whole or not at all, and the work of several processes.

A settings file, configs/NAME.toml, has one section per stage (`own`, in the code of the stages) and states only what differs from the defaults
below, which are the paper's where it states a value (but for the sizes of the small world); `--section.key value` on the command line goes before it.
"""

import dataclasses
import difflib
import importlib
import json
import os
import re
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
NAME, URL, STAGE = "[A-Z0-9_]*", r"https?://[^\s/@?#]+(/[^\s@?#]*)?", "(base|cold_start|rejection_sft|direct_sft|grpo|grpo_direct)"  # for `allowed`


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2, no traceback."""


def setting(default, meaning: str, shapes: bool = True, allowed=None):
    """`allowed`: the pattern of a string, or (least, most) of a number; where it is not given, whole numbers begin at 1 and others at 0."""
    return field(default=default, metadata={"help": meaning, "shapes": shapes, "allowed": allowed})


def shaping(section) -> dict:
    """The settings that can change what a stage makes, in more than the last bits of a sum; no stage is run again for a change of the others."""
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if f.metadata["shapes"]}


@dataclass
class Run:
    seed: int = setting(0, "moves the world, the data order and the sampling", allowed=(0, 2**62))
    threads: int = setting(0, "CPU threads of torch; 0 leaves torch's own choice", False, (0, 4096))
    shard: bool = setting(False, "under torchrun: each process keeps a part of weights, gradients and Adam's moments (FSDP2)", False)


@dataclass
class Data:
    distill_pairs: int = setting(1000, "the small world's pairs for the teacher (paper: about 10K, of which 5.5K were kept); files take @first:N")
    pool_pairs: int = setting(1000, "the small world's pairs per task in the unified pool (paper: about 105K in all)")
    distill_tasks: str = setting("image_generation", "the small world's pairs for the teacher: image_generation (the paper) or all tasks",
                                 allowed="image_generation|all")
    test_pairs: int = setting(300, "the small world's pairs per task in the in-distribution test")
    heldout_pairs: int = setting(100, "pairs per task whose colour-shape combinations were never trained on", allowed=(0, 1e12))
    tie_pairs: int = setting(90, "pairs per generation task in the split of which a third are ties", allowed=(0, 1e12))
    distill: str = setting("", "files to distil on: PATH, PATH@first:N, PATH@end:N, PATH@random:N, PATH@N%, ...; empty: the small world's own")
    pool: str = setting("", "files that make the unified pool, written alike")
    test: str = setting("", "files that make the test, written alike; the small world's other tests are left out then")
    image_root: str = setting("", "folder that media paths are relative to; empty: the folder of each file")
    media_within: str = setting("", "folder that no medium may lie outside of, symlinks followed; empty: the one paths are relative to")
    on_error: str = setting("stop", "what a bad row does after all have been listed: stop, or skip (it is left out)", allowed="stop|skip")
    frames: int = setting(8, "frames shown of a video")
    pair_frames: int = setting(8, "frames shown of a pair of videos together, half of each")
    max_pixels: int = setting(512 * 512, "pixels of an image or frame; larger ones are scaled down")


@dataclass
class Model:
    path: str = setting("", "where the chain starts: a folder (of the repository, else from here) or hub name; empty: trained anew")
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
    warmup: float = setting(0.03, "share of steps in which the rate rises (script; paper: 0.3), before a cosine lowers it to 0", allowed=(0, 1))
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_skipped: int = setting(10, "steps in a row that may be skipped, as loss or gradient is not finite; one more ends the run", False, (0, 1e12))
    freeze_vision: bool = setting(True, "train the language model only")
    micro_tokens: int = setting(8192, "tokens of SFT examples per forward pass, padding included; changes memory and speed, never the result", False)
    gradient_checkpointing: bool = setting(False, "run layers again in backward, not to keep activations", False)
    offload: bool = setting(False, "on a GPU: keep fp32 weights, gradients, Adam's moments and a waiting reference in host memory", False)
    save_minutes: float = setting(2.0, "minutes between states to go on from after a stop; longer where saving would be 2% of the time", False)


@dataclass
class SFT(Learning):
    epochs: float = setting(3.0, "passes over the data")
    batch_size: int = setting(128, "examples per optimiser step")
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW")
    replay: float = setting(0.0, "practice examples of the base mixed in, per example of the stage's own; keeps direct answering alive")


@dataclass
class Base(SFT):
    rebuild: bool = setting(False, "train the base anew in runs/NAME/base instead of starting from model.path")
    scenes: int = setting(8000, "pairs drawn for practice; base.pretrain.FRESH says how many more after it")
    rows_per_scene: int = setting(5, "exercises written on each of them")
    simple: int = setting(12000, "exercises in the first single skill, naming; base.pretrain.SKILLS says how many in the others", allowed=(0, 1e12))
    simple_lr: float = setting(1e-3, "peak learning rate of the single skills; `lr` is that of the mixture")
    freeze_vision: bool = setting(False, "the base is where seeing is learnt")
    replay: float = setting(0.0, "0: what later stages replay is all that the base learns", allowed=(0, 0))


@dataclass
class Server:  # how a served model is asked (distill.ask)
    key_variable: str = setting("", "NAME of the environment variable that holds the server's key; empty sends none", False, NAME)
    concurrency: int = setting(32, "requests under way at a time", shapes=False)
    timeout: float = setting(300.0, "seconds until a request is given up and tried again", False, (0.1, 1e6))
    max_new_tokens: int = setting(2048, "longest completion")
    retries: int = setting(8, "attempts after the first, with growing waits or those the server asks for", False, (0, 1000))
    max_cost, price_in, price_out, max_side = 0.0, 0.0, 0.0, 16384  # of one's own server: nothing to pay, no other limit than max_pixels


@dataclass
class Distill(Server):
    teacher: str = setting("scripted", "scripted (the small world), given (SFT rows bring their reasoning), or a served model (paper: gpt-4o)")
    base_url: str = setting("https://api.openai.com/v1", "OpenAI-compatible server of the teacher, https://HOST/v1, no password in it", allowed=URL)
    key_variable: str = setting("OPENAI_API_KEY", "NAME of the environment variable whose key is sent to base_url; empty sends none", False, NAME)
    temperature: float = setting(1.0, "sampling temperature of a served teacher")
    max_side: int = setting(1024, "longer side of the pictures sent, in pixels; larger ones are scaled down, and all to data.max_pixels before")
    max_cost: float = setting(20.0, "stop before all replies, those of earlier runs included, could cost more; 0 sets no limit", shapes=False)
    price_in: float = setting(2.5, "price of a million prompt tokens, in the unit of max_cost (default: gpt-4o in US dollars)", shapes=False)
    price_out: float = setting(10.0, "price of a million reply tokens, in the unit of max_cost (default: gpt-4o in US dollars)", shapes=False)
    error_rate: float = setting(0.1, "share of its judgements in which the scripted teacher sees another fact", allowed=(0, 1))
    scores: bool = setting(True, "false: the scripted teacher reasons without scores and sums (then no consistency_weight, gated, select consistent)")


@dataclass
class Rejection(Server):
    endpoint: str = setting("", "server (vLLM: http://HOST:8000/v1) that has the judge as cold_start; empty runs it here", False, f"({URL})?")
    temperature: float = setting(1.0, "sampling temperature of the judge")
    select: str = setting("correct", "learnt: correct (the paper); consistent: if sums also lead to the verdict; random: as many by chance",
                          allowed="correct|consistent|random")
    batch_rows: int = setting(256, "completions decoded together; changes memory and speed", False)


@dataclass
class GRPO(Learning):
    mode: str = setting("think", "think or answer (the control without chain of thought)", allowed="think|answer")
    start: str = setting("rejection_sft", "what is trained: base, cold_start, rejection_sft, direct_sft",
                         allowed="base|cold_start|(rejection|direct)_sft")
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
    replay: float = setting(0.0, "practice examples of the base per prompt, the same in all updates of a rollout; their mean SFT loss is added "
                                 "(after InstructGPT's PPO-ptx; not in the paper)")
    micro_prompts: int = setting(4, "groups per forward pass; changes memory and speed, never the result", False)
    batch_rows: int = setting(256, "completions decoded together; changes memory and speed", False)


@dataclass
class Evaluate(Server):
    endpoint: str = setting("", "server (vLLM: http://HOST:8000/v1) of the checkpoints in `served`; empty runs all here", False, f"({URL})?")
    served: str = setting("grpo", "stages, with commas between, that endpoint serves by these names; others run here", False, f"{STAGE}(,{STAGE})*")
    batch_rows: int = setting(256, "completions decoded together; changes memory and speed", False)
    test_pairs: int = setting(0, "pairs per task drawn of each split; 0 takes all", allowed=(0, 1e12))


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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


say = tqdm.write  # prints a line, above the bar that may be being drawn


def progress(items, label: str):
    """Yields from the sequence `items`: a tqdm bar on a terminal; in a log file, where a bar is unreadable, a line every twenty seconds."""
    bar, started = sys.stderr.isatty() and is_main(), time.time()
    shown = started
    for done, item in enumerate(tqdm(items, f"   {label}", leave=False, disable=not bar)):
        if not bar and is_main() and time.time() - shown > 20:
            shown = time.time()
            left = (shown - started) / done * (len(items) - done)
            print(f"   {label}: {done} of {len(items)}, {shown - started:.0f} s so far, about {left:.0f} s to go", file=sys.stderr, flush=True)
        yield item


def one_line(text) -> str:
    """`text` as it can stand in a terminal: no line breaks, control characters or halves of characters, which a file's name or a row may hold."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))[:2000]


# --------------------------------------------------------------------------------------------------------------- processes

distributed = lambda: importlib.import_module("torch.distributed")  # torch late: data.py and report.py answer at once
is_main = lambda: world()[0] == 0  # under torchrun only the first process writes files and prints
wait_for_all = lambda: gather([])  # what one process has written is there for all from here on


def world() -> tuple:
    """(rank, processes), as torchrun says, on however many machines; they share the run folder."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(items):
    """This process's part of what there is to do, of a list or the rows of a tensor: every n-th, since neighbours are alike in cost."""
    return items[world()[0] :: world()[1]]


def gather(made: list) -> list:
    """One result for each item of this process's `share` -> the results for all items, in their order, in every process: item k is that of
    process k % n, its k // n-th."""
    parts = [made] * world()[1]
    if len(parts) > 1:
        distributed().all_gather_object(parts, made)
    return [parts[k % len(parts)][k // len(parts)] for k in range(sum(map(len, parts)))]
