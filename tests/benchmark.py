"""How fast: this code against TRL, against `generate`, and against a plain loop. Not a test; pytest does not collect it.

    python tests/benchmark.py                      all tables (an hour and a half on 2 cores)
    python tests/benchmark.py --quick              the small size only, few rounds, and processes
    python tests/benchmark.py --only small group   some of them; --help has their names
    python tests/benchmark.py --real 3b            on a GPU: a Qwen2.5-VL of the real shape (3b or 7b) with random weights

TRL is optional: pip install trl (tried: trl 1.16.0 with datasets 5.2.0, accelerate 1.15.0, pyarrow 26.0.1)

Contestants, on the same weights, prompts (pictures included), group size, lengths, micro-batches, loss, precision and optimiser:

    this code   grpo.rollout, the reference, grpo.update, as grpo.run calls them
    plain loop  `generate` prompt by prompt, each row a whole sequence of its own; then the same grpo.update on
                completion_logprobs(share_prompt=False), which runs the prompt, pictures too, once per completion
    general     this code's rollout through transformers' layers, as every backbone but Qwen2.5-VL has it: decode.ENABLED = False
    generate    transformers' generate on all prompts at once with num_return_sequences=G: the rollout alone
    TRL         GRPOTrainer's own loop, which samples with transformers' generate on prompts repeated G times

Contestants take turns in one process, so that whatever else the machine does slows all of them. The first turn warms up; the others give
medians. "x2.90 [2.71-3.08]" says how many times better this code did: the median over turns, and its range. Nobody's text ends early, since
the end token is one that all suppress: every contestant makes the same number of tokens. An untrained model never says the same twice. A
trained one does, and this code runs what is equal once: "trained" shows what that is worth in `small`, whose texts end where they end, and
"trained-10m" at 11M parameters. The small world's prompts are short, and sharing them saves the less; "-220" has longer ones.

"update" is a whole step: files to tensors (this code and the plain loop keep what a picture became, as grpo.run does), rollout, rewards,
reference, gradient, Adam. "learning" is that without the rollout, which has the vision tower's work of this code. Peak memory is that of a
process which runs one contestant only (getrusage; on a GPU torch.cuda.max_memory_allocated). "of matmul rate" is the work needed over the
time taken, as a share of what one large square matmul reaches, measured after every turn. The work needed is counted from parameters and
tokens, prompts once and completions G times: per token 2 FLOPs for each weight of a layer; per completion token 2 for each weight of the
vocabulary's matrix; per pair of tokens that see each other 4 * width in each layer; per patch 2 for each weight of the vision tower. Rollout
and reference take that once, the policy's pass three times (backward is two); the frozen tower is needed once, in the rollout. All contestants
are held to the same need: work done twice counts as time lost. SFT's tokens are those of prompts and responses, without padding; the plain
loop there takes 8 rows at a time as they come, and the model's own loss over all positions.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config

import numpy
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import decode
import grpo
import model as M
import sft
import shapes
import stages
from base import pretrain

GPU = torch.cuda.is_available()
WORK = dict(width=128, layers=4, vocabulary=0, prompts=8, group=8, new=100, prompt_tokens=0, micro=4, sft=0, rounds=2, real="", run="",
            checkpointing=False)
LAYERS = WORK | dict(width=256, layers=8, prompts=1, new=300, prompt_tokens=1200, rounds=3)
MIDDLE = WORK | dict(width=320, layers=8, prompts=4, new=64, rounds=6)
TRAINED = WORK | dict(run="runs/small", prompts=16, new=160, rounds=6)
SIZES = {  # name: (work, what it stands for)
    "trained": (TRAINED, "GRPO of `small` itself, from runs/small: its model, the pairs of images that it judged wrongly, texts that end"),
    "trained-10m": (TRAINED | dict(width=320, layers=8), "the same texts, by a model of 11M parameters: that of `small` made wider and deeper"),
    "small": (WORK | dict(sft=128, rounds=6), "the small model and the small world's prompts"),
    "10m": (MIDDLE | dict(sft=64), "about 11M parameters, the small world's prompts"),
    "small-220": (WORK | dict(new=64, prompt_tokens=220, rounds=6), "the small model, each prompt with two pictures of 128 x 128"),
    "10m-220": (MIDDLE | dict(prompt_tokens=220), "about 11M parameters, each prompt with two pictures of 128 x 128"),
    "long": (WORK | dict(prompts=1, new=300, prompt_tokens=1200, vocabulary=152064, rounds=3),
             "long prompts, 152k vocabulary; at this width most of the work is the vocabulary's"),
    "layers": (LAYERS, "the same lengths; most of the work is the layers', as in a model of billions"),
    "checkpointed": (LAYERS | dict(checkpointing=True), "the same, and backward runs layers again, as the settings of real backbones have it"),
}
GROWTH = {  # name: (what grows, its values, the rest of the work)
    "group": ("group", (1, 2, 4, 8, 16), WORK | dict(prompts=4, new=64)),
    "prompt": ("prompt_tokens", (0, 300, 600, 1200), WORK | dict(prompts=2, new=64, width=256)),
}
REAL = {
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936,
               tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
               tie_word_embeddings=False),
}

# ----------------------------------------------------------------------------------------------------------- model and prompts


def build_real(shape: dict, tokenizer) -> tuple:
    """A Qwen2.5-VL of real size with random weights; only the tokenizer is the small world's."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(M.VISION))))
    text = shape | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}, max_position_embeddings=128000,
                        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
                  out_hidden_size=shape["hidden_size"], fullatt_block_indexes=[7, 15, 23, 31])
    with torch.device("cuda" if GPU else "cpu"):
        settings = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape["tie_word_embeddings"], **ids)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(settings, dtype=torch.bfloat16)
    return model, M.Processor(tokenizer, Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, max_pixels=512 * 512))


def grow(folder: Path, size: dict) -> None:
    """Makes the model in `folder` as wide and deep as `size` says, and it writes what it wrote: what is new is 0, so that new numbers of the
    residual stream stay 0, and new heads and layers add nothing. RMS norms then average over more numbers: their weights and eps make up for that."""
    old, processor = M.load(str(folder))
    width, wide = old.config.text_config.hidden_size, size["width"]
    model, _ = pretrain.build_small(config.Model(hidden_size=wide, layers=size["layers"], heads=wide // 32, intermediate_size=3 * wide),
                                    processor.tokenizer)
    known = dict(old.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name in known:
                shrunk = (width / wide) ** 0.5 if "language_model" in name and "norm" in name else 1.0
                parameter[tuple(map(slice, known[name].shape))] = known[name] * shrunk
    model.config.text_config.rms_norm_eps = old.config.text_config.rms_norm_eps * width / wide
    M.save(model, processor, folder)


def copy_world(size: dict, out: Path) -> None:
    """Takes from a finished run what make_world would make; pairs of clips are left out, which would want torchvision of TRL."""
    run, prompts = config.ROOT / size["run"], size["prompts"]
    if not (run / "grpo" / "done.json").is_file():
        raise config.UserError(f"{run} is not finished: python grpo.py --config small")
    samples = random.Random(0).sample([s for s in data.read_samples(run / "rejection" / "wrong.jsonl") if not data.is_video(s.task)], prompts)
    shutil.copytree(run / "rejection_sft", out / "rejection_sft", ignore=shutil.ignore_patterns("*.state", "replay"))
    (out / "rejection" / "media").mkdir(parents=True)
    moved = lambda item: list(map(moved, item)) if isinstance(item, list) else shutil.copy(item, out / "rejection" / "media")
    for sample in samples:
        sample.media = moved(sample.media)
    data.write_jsonl(out / "rejection" / "wrong.jsonl", map(data.sample_row, samples))
    data.write_jsonl(out / "sft.jsonl", [])
    if size["width"] > WORK["width"]:
        grow(out / "rejection_sft", size)


def make_world(size: dict, out: Path) -> None:
    """Writes what the stages read: rejection/wrong.jsonl with the prompts, rejection_sft/ with the model, sft.jsonl."""
    rng, width = random.Random(0), size["width"]
    written = lambda s: data.write_reasoning(s.task, s.reasons, s.scores, data.verdict_string(s.task, s.label))
    shapes.write_split(out / "rejection", "wrong", [("image_generation", False)] * size["prompts"], shapes.SEEN, rng)
    shapes.write_split(out, "mixed", [(task, False) for task in data.TASKS for _ in range(size["sft"] // 4 or 1)], shapes.SEEN, rng)
    samples, mixed = data.read_samples(out / "rejection" / "wrong.jsonl"), data.read_samples(out / "mixed.jsonl")
    data.write_jsonl(out / "sft.jsonl", (data.sft_row(s, written(s)) for s in mixed))
    tokenizer = pretrain.train_tokenizer([pretrain.all_text((data.build_prompt(s, "think"), written(s))) for s in samples + mixed], 640)
    tokenizer.eos_token = M.VISION[1]  # never sampled, so no text ends early
    torch.manual_seed(0)
    if size["real"]:
        model, processor = build_real(REAL[size["real"]], tokenizer)
    else:
        small = config.Model(hidden_size=width, layers=size["layers"], heads=width // (32 if width < 256 else 64), intermediate_size=3 * width)
        model, processor = pretrain.build_small(small, tokenizer)
    if size["vocabulary"]:
        model.resize_token_embeddings(size["vocabulary"], mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=width ** -0.5)
    M.save(model, processor, out / "rejection_sft")
    side = 512 if size["real"] else 16 * int((size["prompt_tokens"] / 3) ** 0.5)  # pixels; two pictures make two thirds of the prompt
    for k, sample in enumerate(samples if size["prompt_tokens"] else []):
        sample.media = [str(out / "rejection" / f"{k}-{n}.png") for n in (1, 2)]
        for path in sample.media:
            Image.fromarray(numpy.random.default_rng(k).integers(0, 256, (side, side, 3), numpy.uint8)).save(path)
        while (missing := size["prompt_tokens"] - len(M.encode(processor, model, data.build_prompt(sample, "think"), data.THINK)["ids"])) > 0:
            sample.prompt += " star" * (missing // 2 or 1)
    data.write_jsonl(out / "rejection" / "wrong.jsonl", (data.sample_row(sample) for sample in samples))


def open_world(size: dict, out: Path) -> dict:
    """What all contestants work on; made first if it is not there."""
    if config.is_main() and not (out / "ready").is_file():
        copy_world(size, out) if size["run"] else make_world(size, out)
        (out / "ready").touch()
    config.wait_for_all()
    settings = config.load_settings(f"qwen2.5-vl-{size['real']}", []) if size["real"] else config.Settings()
    settings.grpo = own = dataclasses.replace(settings.grpo, group_size=size["group"], max_new_tokens=size["new"], micro_prompts=size["micro"],
                                                     prompts_per_step=size["prompts"], steps=size["rounds"] + 1,
                                                     gradient_checkpointing=settings.grpo.gradient_checkpointing or size["checkpointing"],
                                                     lr=0.0 if size["run"] else 1e-4)  # a trained policy stays what it is, for all contestants
    path, chance = str(out / "rejection_sft"), torch.Generator().manual_seed(0)
    model, processor = M.load(path)
    samples = data.read_samples(out / "rejection" / "wrong.jsonl")
    return {"settings": settings, "own": own, "out": out, "model": model, "processor": processor, "samples": samples,
            "encode": lambda: [M.encode(processor, model, data.build_prompt(s, own.mode), data.THINK) for s in samples],
            "ends": bool(size["run"]),
            # An untrained model earns 0 everywhere, and every gradient would be 0: a coin stands in for the rewards.
            "coin": lambda: torch.rand(len(samples), own.group_size, generator=chance).round(),
            "optimizer": functools.cache(lambda: sft.optimizer_for(model, own)), "reference": functools.cache(lambda: M.load(path)[0])}


# ---------------------------------------------------------------------------------------------------------------- contestants


def clock() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.process_time() if "BENCHMARK_CPU_TIME" in os.environ else time.perf_counter()


def generated(world: dict, prompts: list, samples: int) -> torch.Tensor:
    """Ids of the completions that transformers' generate makes, `samples` of each prompt."""
    model, tokenizer, new = world["model"], world["processor"].tokenizer, world["own"].max_new_tokens
    inputs = M.collate(prompts, "left", tokenizer.pad_token_id, M.device_of(model))
    del inputs["position_ids"]
    with torch.no_grad():
        ids = model.eval().generate(**inputs, num_return_sequences=samples, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                    suppress_tokens=M.banned_ids(model, tokenizer).tolist(), disable_compile=True)[:, inputs["input_ids"].shape[1] :]
    assert world["ends"] or ids.shape == (len(prompts) * samples, new), "a text ended early: the contestants would not do the same work"
    return ids


def step_of_generate(world: dict) -> dict:
    prompts, start = world["encode"](), clock()
    generated(world, prompts, world["own"].group_size)
    return {"rollout": clock() - start}


def step_of_general(world: dict) -> dict:
    prompts, start = world["encode"](), clock()
    with patch.object(decode, "ENABLED", False):
        M.encode_vision(world["model"], prompts)
        grpo.rollout(world["model"], world["processor"], world["samples"], world["own"], prompts)
    return {"rollout": clock() - start}


def step_of_this(world: dict, plain: bool = False) -> dict:
    """One step as grpo.run makes it, or that of the plain loop. Returns seconds."""
    model, processor, own, start = world["model"], world["processor"], world["own"], clock()
    prompts = world["encode"]()
    encoded = clock()
    if plain:
        ids = torch.cat([generated(world, [prompt] * own.group_size, 1) for prompt in prompts])
        lengths, logprobs = torch.full((len(ids),), own.max_new_tokens, device=ids.device), torch.zeros(ids.shape, device=ids.device)
        made = M.Completions(ids, lengths, logprobs, torch.ones_like(lengths))
        [grpo.rewards_of(processor.text(row), world["samples"][k // own.group_size], own.mode) for k, row in enumerate(ids)]
    else:
        M.encode_vision(model, prompts)
        made, *_ = grpo.rollout(model, processor, world["samples"], own, prompts)
        assert world["ends"] or int(made.lengths.min()) == own.max_new_tokens
    rollout = clock() - encoded
    advantages = grpo.group_advantages(world["coin"]())
    with patch.object(M, "completion_logprobs", functools.partial(M.completion_logprobs, share_prompt=not plain)):
        reference = grpo.reference_logprobs(world["reference"](), processor, prompts, made, own)
        for group in world["optimizer"]().param_groups:
            group["lr"] = own.lr
        grpo.update(model, processor, world["optimizer"](), prompts, made, advantages, reference, own)
    whole = clock() - start
    return {"rollout": rollout, "update": whole, "learning": whole - rollout}


def train_trl(world: dict, policy, rounds: int, between) -> list:
    """GRPOTrainer's own loop on `policy` (whose forward it replaces) for `rounds` steps; calls between() after each. Returns seconds of each step."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import GRPOConfig, GRPOTrainer

    own, processor, samples = world["own"], world["processor"], world["samples"]

    class Qwen2_5_VLProcessor(transformers.Qwen2_5_VLProcessor):
        """Pictures only: a processor's parts are read off this signature, and its video part would want torchvision."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    class Rows(Dataset):
        """Pictures are opened anew each time, as those of a data set of files."""

        def __getitem__(self, number: int) -> dict:
            show = lambda part: part | {"image": Image.open(part["image"]).convert("RGB")} if part["type"] == "image" else part
            return {"prompt": [{"role": "user", "content": [show(part) for part in data.build_prompt(samples[number], own.mode)]}], "number": number}

        def __getitems__(self, numbers: list) -> list:
            return [self[number] for number in numbers]

    def reward(prompts, completions, completion_ids, number, **_) -> list:
        assert world["ends"] or {len(ids) for ids in completion_ids} == {own.max_new_tokens}
        [grpo.rewards_of(data.THINK + said[0]["content"], samples[k], own.mode) for said, k in zip(completions, number)]
        return world["coin"]().flatten().tolist()

    processor.tokenizer.padding_side = "left"  # TRL pads the types of tokens on this side; with the other they would be misplaced
    template = processor.tokenizer.chat_template + "{% if add_generation_prompt %}" + data.THINK + "{% endif %}"
    pieces = max(1, len(samples) // own.micro_prompts)
    arguments = GRPOConfig(
        output_dir=str(world["out"] / "trl"), max_steps=rounds, per_device_train_batch_size=len(samples) * own.group_size // pieces,
        gradient_accumulation_steps=pieces, num_generations=own.group_size, max_completion_length=own.max_new_tokens, learning_rate=own.lr,
        adam_beta2=0.99, weight_decay=0.0, max_grad_norm=own.max_grad_norm, beta=own.beta, epsilon=own.clip_low, temperature=own.temperature,
        top_p=1.0, top_k=0, loss_type="grpo", scale_rewards="group", use_bias_correction_kl=False, bf16=False, use_cpu=not GPU,
        gradient_checkpointing=own.gradient_checkpointing, remove_unused_columns=False, dataloader_pin_memory=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        generation_kwargs={"suppress_tokens": M.banned_ids(policy, processor.tokenizer).tolist()})
    seconds, started, sampling = [], [0.0], [0.0]
    tokens = sum(len(prompt["ids"]) for prompt in world["encode"]()) * own.group_size

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            started[0] = clock()

        def on_step_end(self, *_, **__):
            whole = clock() - started[0]
            seconds.append({"rollout": sampling[0], "update": whole, "learning": whole - sampling[0]})
            between()
            sampling[0], started[0] = 0.0, clock()

    table = InMemoryTable(pyarrow.table({"number": list(range(len(samples)))}))
    M.freeze_vision(policy)
    trainer = GRPOTrainer(policy, reward, arguments, Rows(table, fingerprint="benchmark"), callbacks=[Turns()],
                          processing_class=Qwen2_5_VLProcessor(processor.image_processor, processor.tokenizer, chat_template=template))
    sample = trainer._generate_single_turn

    def timed(prompt_ids, *given):
        assert abs(sum(map(len, prompt_ids)) / tokens - 1) < 0.01, "TRL's prompts are not as long as ours"
        start = clock()
        made = sample(prompt_ids, *given)
        sampling[0] += clock() - start
        return made

    trainer._generate_single_turn = timed
    trainer.train()
    return seconds


def sft_of_this(world: dict, examples: list) -> float:
    """Seconds of one epoch of sft.train."""
    for state in world["out"].glob("sft.*.state"):
        state.unlink()  # or there would be nothing to go on with
    start = clock()
    settings = config.SFT(batch_size=32, micro_tokens=2048, epochs=1.0, lr=1e-4)
    sft.train(world["model"], world["processor"], examples, settings, world["out"], "", "sft")
    return clock() - start


def sft_of_plain(world: dict, examples: list) -> float:
    model, processor, start = world["model"], world["processor"], clock()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for k in range(0, len(examples), 32):
        optimizer.zero_grad()
        for j in range(k, min(k + 32, len(examples)), 8):
            rows = [sft.encode_example(processor, model, example) for example in examples[j : j + 8]]
            inputs = M.collate(rows, "right", processor.tokenizer.pad_token_id, M.device_of(model))
            labels = inputs["input_ids"].masked_fill(~sft.response_mask(rows, inputs["input_ids"].shape[1]).to(model.device), -100)
            (model(**inputs, labels=labels, use_cache=False).loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return clock() - start


# ------------------------------------------------------------------------------------------------------------ what is measured


def needed_flops(model, prompts: list, group: int, new: int) -> dict:
    """The least work of {"rollout", "learning"} for these prompts, as counted at the top of the file."""
    text, vision = model.config.text_config, model.config.vision_config
    count = lambda *within: sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and any(w in name for w in within))
    lengths, completed = [len(p["ids"]) for p in prompts], len(prompts) * group * new
    pairs = sum(n * n / 2 + group * new * (n + new / 2) for n in lengths)
    merged = count("visual.merger") / vision.spatial_merge_size**2  # which sees one row for that many patches
    tower = 2 * sum(len(p["patches"][1]) for p in prompts) * (count("visual.patch_embed", "visual.blocks") + merged)
    forward = 2 * (sum(lengths) + completed) * count("language_model.layers") + 2 * completed * text.vocab_size * text.hidden_size
    forward += 4 * text.hidden_size * text.num_hidden_layers * pairs
    return {"rollout": tower + forward, "learning": 4 * forward}


def matmul_rate(model) -> float:
    """FLOPs a second of one large square product in the model's precision."""
    side, times = 8192 if GPU else 1024, []
    a, b = (torch.randn(side, side, device=model.device, dtype=model.dtype) for _ in range(2))
    for _ in range(8):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * side**3 / statistics.median(times[2:])


def measure(size: dict, out: Path, names: list) -> dict:
    """All of `names` in turns in this process."""
    world, rounds = open_world(size, out), []
    examples = random.Random(0).sample(found := data.read_conversations(out / "sft.jsonl"), len(found))
    steps = {"this code": step_of_this, "plain loop": functools.partial(step_of_this, plain=True), "general": step_of_general,
             "generate": step_of_generate}

    def turn():
        row = {name: steps[name](world) for name in names if name in steps}
        if size["sft"]:
            row["this code"]["sft"], row["plain loop"]["sft"] = sft_of_this(world, examples), sft_of_plain(world, examples)
        rounds.append(row | {"matmul": matmul_rate(world["model"])})

    if "TRL" in names:
        for row, seconds in zip(rounds, train_trl(world, M.load(str(out / "rejection_sft"))[0], size["rounds"] + 1, turn)):
            row["TRL"] = seconds
    else:
        for _ in range(size["rounds"] + 1):
            turn()
    prompts = world["encode"]()
    return {"rounds": rounds[1:], "parameters": sum(p.numel() for p in world["model"].parameters()), "prompt": [len(p["ids"]) for p in prompts],
            "sft_tokens": sum(len(sft.encode_example(world["processor"], world["model"], example)["ids"]) for example in examples),
            "need": needed_flops(world["model"], prompts, size["group"], size["new"]),
            "device": torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads"}


def alone(size: dict, out: Path, names: list) -> dict:
    """One contestant with the process to itself: peak memory in MB, that before its work began, and the seconds of its steps but the first."""
    if names == ["TRL"]:
        importlib.import_module("trl")  # what it imports is not its work
    world, resident = open_world(size, out), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, rounds = resident(), size["rounds"] + 1
    if names == ["TRL"]:
        seconds = train_trl(world, world["model"], rounds, lambda: None)
    else:
        one = {"this code": step_of_this, "plain loop": functools.partial(step_of_this, plain=True), "generate": step_of_generate}[names[0]]
        seconds = [one(world) for _ in range(rounds)]
    return {"peak": torch.cuda.max_memory_allocated() / 2**20 if GPU else resident(), "before": before, "seconds": seconds[1:]}


def shared(size: dict, out: Path, names: list) -> dict:
    """This process is one of several (torchrun). Seconds per step of sft.train and of grpo.run, from their own logs, and SFT's losses."""
    stages.join_processes()
    world = open_world(size, out)
    for stage in ("sft", "grpo"):
        if config.is_main():
            (out / stage).mkdir(exist_ok=True)
            for file in (out / stage).iterdir():
                file.unlink()
        config.wait_for_all()
        if stage == "grpo":
            grpo.run("grpo", world["settings"], out / "grpo")
        else:
            examples, settings = data.read_conversations(out / "sft.jsonl"), config.SFT(batch_size=32, micro_tokens=2048, epochs=2.0, lr=1e-4)
            sft.train(world["model"], world["processor"], examples, settings, out / "sft", "", "sft")
    config.wait_for_all()
    read = lambda stage: [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
    trained, steps = read("sft"), [sum(value for key, value in row.items() if key.startswith("seconds_")) for row in read("grpo")]
    return {"losses": [row["loss"] for row in trained], "sft": (trained[-1]["seconds"] - trained[0]["seconds"]) / (len(trained) - 1),
            "grpo": statistics.median(steps[1:])}


# ------------------------------------------------------------------------------------------------------------------ the tables


def child(part: str, size: dict, out: Path, names: list = (), processes: int = 0, threads: int = 0) -> dict:
    """Runs measure, alone or shared in a process of its own, or in several under torchrun."""
    job = json.dumps({"part": part, "size": size, "out": str(out), "names": list(names)})
    start = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else [])
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(start + [__file__, "--child", job], capture_output=True, text=True, env=environment)
    answers = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not answers:
        raise config.UserError(f"{part} of {', '.join(names) or 'this code'} failed, exit code {done.returncode}:\n{done.stderr[-1500:]}")
    return json.loads(answers[0])


def versus(values: list, ours: list, more_is_better: bool = False) -> str:
    """Median of `values`, and how many times better `ours` did, pair by pair, with the range."""
    ratios = [a / b if more_is_better else b / a for a, b in zip(ours, values)]
    spread = f" [{min(ratios):.2f}-{max(ratios):.2f}]" if len(ratios) > 1 else ""
    middle = statistics.median(values)
    return (f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}") + ("" if values is ours else f" x{statistics.median(ratios):.2f}{spread}")


def show(rows: list) -> None:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        print("  " + row[0].ljust(widths[0]) + "".join("   " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), flush=True)


def size_table(name: str, size: dict, title: str, threads: int) -> None:
    names = ["this code"] + ["plain loop"] * (not size["run"]) + ["general", "generate"] + ["TRL"] * bool(trl_version())
    learners = [c for c in names if c not in ("general", "generate")]
    with tempfile.TemporaryDirectory() as out:
        found = child("measure", size, Path(out), names, threads=threads)
        peaks = {c: child("alone", size | {"rounds": 1}, Path(out), [c], threads=threads) for c in learners}
    rounds, need, rates = found["rounds"], found["need"], [row["matmul"] for row in found["rounds"]]
    print(f"\n== {name}: {title}\n   {found['parameters'] / 1e6:.1f}M parameters; {size['prompts']} prompts of {min(found['prompt'])} to "
          f"{max(found['prompt'])} tokens x {size['group']} completions of {'at most ' * bool(size['run'])}{size['new']}; "
          f"{len(rounds)} rounds; {found['device']}, matmul "
          f"{statistics.median(rates) / 1e9:,.0f} [{min(rates) / 1e9:,.0f}-{max(rates) / 1e9:,.0f}] GFLOP/s")
    table = [["", *names]]

    def line(label: str, among: list, values, more_is_better: bool = False):
        columns = {c: values(c) for c in among}
        table.append([label, *(versus(columns[c], columns["this code"], more_is_better) if c in among else "-" for c in names)])

    seconds = lambda key: lambda c: [row[c][key] for row in rounds]
    rate = lambda key, tokens: lambda c: [tokens / s for s in seconds(key)(c)]
    if size["run"]:  # whose texts are as long as they are
        line("rollout, s", names, seconds("rollout"))
    else:
        line("rollout, tokens/s", names, rate("rollout", size["prompts"] * size["group"] * size["new"]), True)
    line("update, s", learners, seconds("update"))
    line("learning, s", learners, seconds("learning"))
    for key, work in (("learning", need["learning"]), ("update", sum(need.values()))) if not size["run"] else ():
        share = lambda c: f"{statistics.median(work / row[c][key] / row['matmul'] for row in rounds):.1%}"
        table.append([f"{key}, of matmul rate", *(share(c) if c in learners else "-" for c in names)])
    if size["sft"]:
        line("SFT, tokens/s", names[:2], rate("sft", found["sft_tokens"]), True)
    line("peak memory, MB", learners, lambda c: [peaks[c]["peak"]])
    if not GPU:
        line("of that above the loaded model", learners, lambda c: [peaks[c]["peak"] - peaks[c]["before"]])
    show(table)


def growth_table(name: str, key: str, values: tuple, size: dict, threads: int) -> None:
    print(f"\n== growth with the {name}; the rest: {size['prompts']} prompts, {size['group']} completions of {size['new']}, "
          f"width {size['width']}, {size['layers']} layers")
    table = [[name, "tokens of a prompt", "rollout, tokens/s", "update, s", "learning, s", "plain loop: update, s", "plain loop: learning, s"]]
    for value in values:
        size = size | {key: value}
        with tempfile.TemporaryDirectory() as out:
            found = child("measure", size, Path(out), ["this code", "plain loop"], threads=threads)
        ours, plain = ({k: [row[c][k] for row in found["rounds"]] for k in ("rollout", "update", "learning")} for c in ("this code", "plain loop"))
        speed = [size["prompts"] * size["group"] * size["new"] / s for s in ours["rollout"]]
        table.append([str(value or "own"), f"{statistics.mean(found['prompt']):.0f}", versus(speed, speed),
                      *(versus(which[k], ours[k]) for which in (ours, plain) for k in ("update", "learning"))])
    show(table)


def process_table(size: dict, counts: list) -> None:
    """Every count three times, in turns; each process has one thread."""
    print("\n== processes under torchrun, one thread each; a step's batch is the same for all. x: the seconds over those of one process")
    with tempfile.TemporaryDirectory() as out:
        runs = [{n: child("shared", size, Path(out), processes=n, threads=1) for n in counts} for _ in range(3)]
    table = [["processes", "SFT step, s", "GRPO step, s", "SFT's losses apart by at most"]]
    for n in counts:
        seconds = {k: [run[n][k] for run in runs] for k in ("sft", "grpo")}
        apart = max(abs(a - b) for run in runs for a, b in zip(run[n]["losses"], runs[0][counts[0]]["losses"]))
        table.append([str(n), *(versus(seconds[k], [run[counts[0]][k] for run in runs]) for k in ("sft", "grpo")), f"{apart:.1e}"])
    show(table)


def real_table(name: str) -> None:
    if not GPU:
        raise config.UserError(f"--real {name} needs a GPU; without one leave --real out")
    size = WORK | dict(real=name, new=300, prompt_tokens=700, micro=1)
    print(f"\n== real shape {name}, {torch.cuda.get_device_name()}: random weights, 8 prompts with two pictures of 512 x 512, 8 completions of 300\n"
          f"   tokens each; settings of configs/qwen2.5-vl-{name}.toml. Each contestant in a process of its own. TRL's Adam works on bf16 weights,\n"
          "   this code's on fp32 copies of them")
    table = [["", "rollout, tokens/s", "update, s", "learning, s", "peak GPU memory, GB"]]
    with tempfile.TemporaryDirectory() as out:
        for contestant in ["this code", "plain loop", "generate"] + ["TRL"] * bool(trl_version()):
            try:
                found = child("alone", size, Path(out), [contestant])
            except config.UserError as error:  # such as no memory left: the others still count
                table.append([contestant, str(error).strip().splitlines()[-1][:100], "-", "-", "-"])
                continue
            middle = {key: statistics.median(row[key] for row in found["seconds"]) for key in found["seconds"][0]}
            rest = (f"{middle[key]:.1f}" if key in middle else "-" for key in ("update", "learning"))
            table.append([contestant, f"{8 * 8 * 300 / middle['rollout']:,.0f}", *rest, f"{found['peak'] / 1024:.1f}"])
    show(table)


def trl_version() -> str:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    parts = [*SIZES, *GROWTH, "processes"]
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--quick", action="store_true", help="the small size with few rounds, and processes")
    reader.add_argument("--only", nargs="+", choices=parts, metavar="NAME", help=", ".join(parts))
    reader.add_argument("--real", choices=list(REAL), help="on a GPU")
    reader.add_argument("--rounds", type=int, default=0, help="turns after the first; 0: each table's own number")
    reader.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    reader.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread in place of the clock's: for a machine that is not quiet")
    reader.add_argument("--child", help=argparse.SUPPRESS)
    given = reader.parse_args()
    if given.child:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        job = json.loads(given.child)
        made = {"measure": measure, "alone": alone, "shared": shared}[job["part"]](job["size"], Path(job["out"]), job["names"])
        return print("RESULT " + json.dumps(made), flush=True)
    if given.cpu_time:
        os.environ["BENCHMARK_CPU_TIME"], given.threads = "1", 1
    started, load = time.time(), os.getloadavg()[0]
    trl = trl_version() or "is missing (pip install trl adds its column)"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl}; {'CPU seconds' if given.cpu_time else 'seconds'}; "
          f"load at the start {load:.1f} on {os.cpu_count()} cores{' (NOT QUIET)' if load > 0.4 else ''}{'' if GPU else '; not measured on a GPU'}",
          flush=True)
    if given.real:
        real_table(given.real)
    for name in [] if given.real else given.only or (["small", "processes"] if given.quick else parts):
        less = {"rounds": given.rounds} if given.rounds else {"rounds": 2} if given.quick else {}
        if name in SIZES:
            size, title = SIZES[name]
            if size["run"] and not given.only and not (config.ROOT / size["run"] / "grpo" / "done.json").is_file():
                print(f"\n== {name}: left out, {size['run']} is not finished (python grpo.py --config small)")
                continue
            size_table(name, size | ({"prompts": 4, "new": 32, "sft": min(32, size["sft"])} if given.quick else {}) | less, title, given.threads)
        elif name in GROWTH:
            key, values, size = GROWTH[name]
            growth_table(key.replace("_", " "), key, values, size | less, given.threads)
        else:
            counts = [n for n in (1, 2, 4) if n <= max(2, os.cpu_count())]
            work = dict(prompts=4, new=32, sft=64) if given.quick else dict(prompts=16, sft=128)  # 16 as in `small`
            process_table(WORK | work | less, counts)
    print(f"\n{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except config.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
