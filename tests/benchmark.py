"""How fast: this code against TRL, against `generate`, and against a plain loop. Not a test; pytest does not collect it.

    python tests/benchmark.py                      all tables (under 20 minutes on 2 quiet cores)
    python tests/benchmark.py --quick              the small size only, few rounds (under 2 minutes)
    python tests/benchmark.py --only small group   some of: small 10m long layers group prompt processes
    python tests/benchmark.py --real 3b            on a GPU: a Qwen2.5-VL of the real shape (3b or 7b) with random weights

TRL is optional (tried: trl 1.16.0 with datasets 5.2.0 and accelerate 1.15.0): pip install trl

Contestants, on the same weights, prompts (pictures included), group size, lengths, micro-batches, loss, precision and optimiser:

    this code   grpo.rollout, reference, grpo.update, as grpo.run calls them
    plain loop  `generate` prompt by prompt, each row a whole sequence of its own; then the same grpo.update on
                completion_logprobs(share_prompt=False), which runs the prompt, pictures too, once per completion
    generate    transformers' generate on all prompts at once with num_return_sequences=G: the rollout alone
    TRL         GRPOTrainer, its own loop, generation by transformers (vLLM needs a GPU)

How it is measured. Contestants take turns within one process, so that a machine busy with something else slows all of them: the first
turn is warm-up, the others give medians; "x2.9 [2.7-3.1]" is how many times better this code did, the median over pairs of one turn, with its
range. No text ends early, as the end token is one that everybody suppresses: all make the same number of tokens. "update" is a whole step: pictures
and text to tensors, rollout, rewards, reference, gradient, Adam; "learning" is that without the rollout. Peak memory is that of a process which runs
one contestant only (getrusage; torch.cuda.max_memory_allocated on a GPU). "of matmul rate" is what learning needs at least, over its
time, over the rate of one large square matmul measured between the turns. The need is counted from parameters and tokens: 2 FLOPs per weight of a
layer and token, prompts once and completions G times, the vocabulary at completion positions, 4 * width per layer and pair of tokens that see each
other, 2 per weight of the vision tower and patch; forward once for the reference and three times (backward is two) for the policy, whose tower is
frozen. All contestants are held against the same need, so repeated work counts as lost. SFT tokens are those of prompt and response without
padding; the plain loop takes 8 rows at a time as they come, pads them, and lets the model's own loss see every position.
"""

import argparse
import functools
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # brings no torch: a child's peak memory would start from that of a parent grown large

WORK = dict(width=128, layers=4, vocabulary=0, prompts=8, group=8, new=100, prompt_tokens=0, micro=4, sft=0, rounds=2)
SIZES = {
    "small": (WORK | dict(sft=128, rounds=6), "the small model, the small world's prompts"),
    "10m": (WORK | dict(width=320, layers=8, prompts=4, new=64, sft=64, rounds=6), "about 10M parameters, the small world's prompts"),
    "long": (WORK | dict(prompts=1, new=300, prompt_tokens=1200, vocabulary=152064, rounds=3), "long prompts and 152k vocabulary; most work is the vocabulary's"),
    "layers": (WORK | dict(width=256, layers=8, prompts=1, new=300, prompt_tokens=1200, rounds=3), "the same lengths; most work is the layers', as in a model of billions"),
}
GROWTH = {  # what grows: (key, values, the rest)
    "group": ("group", (1, 2, 4, 8, 16), WORK | dict(prompts=4, new=64)),
    "prompt": ("prompt_tokens", (0, 300, 600, 1200), WORK | dict(prompts=2, new=64, width=256)),
}
REAL = {
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}

# ----------------------------------------------------------------------------------------------------------- model and prompts


def build_real(shape: dict, tokenizer) -> tuple:
    """A Qwen2.5-VL of real size with random weights; only the tokenizer is the small world's."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    import model as M

    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), tokenizer.convert_tokens_to_ids(list(M.VISION))))
    text = shape | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}, max_position_embeddings=128000,
                        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112, out_hidden_size=shape["hidden_size"],
                  fullatt_block_indexes=[7, 15, 23, 31])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape["tie_word_embeddings"], **ids), dtype=torch.bfloat16)
    return made, M.Processor(tokenizer, Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56, max_pixels=512 * 512))


def make_world(size: dict, out: Path) -> None:
    """Writes what the stages read: rejection/wrong.jsonl with the prompts, rejection_sft/ with the model, sft.jsonl."""
    import numpy
    import torch
    from PIL import Image

    import data
    import model as M
    import shapes

    rng = random.Random(0)
    pairs = shapes.write_split(out / "rejection", "wrong", [("image_generation", False)] * size["prompts"], shapes.SEEN, rng)
    mixed = shapes.write_split(out, "mixed", [(task, False) for task in data.TASKS for _ in range(size["sft"] // 4)], shapes.SEEN, rng)
    samples = data.read_samples(out / "mixed.jsonl") if mixed else []
    answers = [data.write_reasoning(s.task, s.reasons, s.scores, data.verdict_string(s.task, s.label)) for s in samples]
    data.write_jsonl(out / "sft.jsonl", (data.sft_row(s, "think", text) for s, text in zip(samples, answers)))
    texts = [part["text"] for s, _ in pairs for part in data.build_prompt(s, "think") if part["type"] == "text"]
    tokenizer = shapes.train_tokenizer(texts + answers + [data.write_reasoning(s.task, s.reasons, s.scores, "Image 1 is better") for s, _ in pairs], 640)
    tokenizer.eos_token = M.VISION[1]  # suppressed by every contestant: no text ends early
    torch.manual_seed(0)
    width = size["width"]
    model, processor = build_real(REAL[size["real"]], tokenizer) if "real" in size else shapes.build_small(
        config.Model(hidden_size=width, layers=size["layers"], heads=width // 32 if width < 256 else width // 64, intermediate_size=3 * width), tokenizer)
    if size["vocabulary"]:
        model.resize_token_embeddings(size["vocabulary"], mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=width ** -0.5)
    M.save(model, processor, out / "rejection_sft")
    if size["prompt_tokens"]:  # two thirds of it pictures of noise, the rest caption
        cell = processor.image_processor.patch_size * processor.image_processor.merge_size
        side = cell * int((size["prompt_tokens"] / 3) ** 0.5) if "real" not in size else 512
        for k in range(2 * size["prompts"]):
            Image.fromarray(numpy.random.default_rng(k).integers(0, 256, (side, side, 3), numpy.uint8)).save(out / "rejection" / f"{k}.png")
        rows = []
        for k, sample in enumerate(data.read_samples(out / "rejection" / "wrong.jsonl")):
            sample.media = [str(out / "rejection" / f"{2 * k + side}.png") for side in (0, 1)]
            length = lambda: len(M.encode(processor, model, data.build_prompt(sample, "think"), data.THINK)["ids"])
            while (missing := size["prompt_tokens"] - length()) > 0:
                sample.prompt += " star" * (-(-missing // 2) if missing > 8 else 1)
            rows.append(data.sample_row(sample))
        data.write_jsonl(out / "rejection" / "wrong.jsonl", rows)


def open_world(size: dict, out: Path) -> dict:
    """Makes it if that was not done yet; loads policy, samples and settings."""
    import torch

    import data
    import model as M
    import sft

    if config.is_main() and not (out / "ready").is_file():
        make_world(size, out)
        (out / "ready").touch()
    config.wait_for_all()
    settings = config.load_settings(f"qwen2.5-vl-{size['real']}", []) if "real" in size else config.Settings()
    own = config.dataclasses.replace(settings.grpo, group_size=size["group"], max_new_tokens=size["new"], micro_prompts=size["micro"],
                                     prompts_per_step=size["prompts"], steps=size["rounds"] + 1, lr=1e-4)
    settings.grpo = own
    model, processor = M.load(str(out / "rejection_sft"))
    samples = data.read_samples(out / "rejection" / "wrong.jsonl")
    encode = lambda: [M.encode(processor, model, data.build_prompt(s, own.mode), data.THINK) for s in samples]
    coin = torch.Generator().manual_seed(0)  # rewards of a random model are all 0 and would make every gradient 0: a coin stands in
    return {"settings": settings, "own": own, "model": model, "processor": processor, "samples": samples, "encode": encode, "out": out, "size": size,
            "coin": lambda: torch.rand(len(samples), own.group_size, generator=coin).round(), "optimizer": functools.cache(lambda: sft.optimizer_for(model, own)),
            "reference": functools.cache(lambda: M.load(str(out / "rejection_sft"))[0])}


# --------------------------------------------------------------------------------------------------------------- contestants


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def generated(world: dict, prompts: list, repeat: int, samples: int):
    """Completions that transformers' generate makes: of each prompt `repeat` rows, each of which gives `samples`."""
    import torch

    import model as M

    model, tokenizer, new = world["model"], world["processor"].tokenizer, world["own"].max_new_tokens
    inputs = M.collate([p for p in prompts for _ in range(repeat)], "left", tokenizer.pad_token_id, M.device_of(model))
    del inputs["position_ids"]
    with torch.no_grad():
        ids = model.eval().generate(**inputs, num_return_sequences=samples, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                    suppress_tokens=M.banned_ids(model, tokenizer).tolist(), disable_compile=True)[:, inputs["input_ids"].shape[1] :]
    assert ids.shape == (len(prompts) * repeat * samples, new), "a text ended early: the contestants would not do the same work"
    return ids


def rollout_of_generate(world: dict) -> dict:
    prompts, start = world["encode"](), clock()
    generated(world, prompts, 1, world["own"].group_size)
    return {"rollout": clock() - start}


def step(world: dict, plain: bool) -> dict:
    """One step of grpo.run, or of a plain loop; returns seconds."""
    import torch

    import grpo
    import model as M

    model, processor, own, start = world["model"], world["processor"], world["own"], clock()
    prompts = world["encode"]()
    sampling = clock()
    if plain:
        ids = torch.cat([generated(world, [prompt], own.group_size, 1) for prompt in prompts])
        made = M.Completions(ids, torch.full((len(ids),), ids.shape[1], device=ids.device), torch.zeros(ids.shape, device=ids.device), torch.ones(len(ids)))
        [grpo.rewards_of(processor.text(row), world["samples"][k // own.group_size], own.mode) for k, row in enumerate(ids)]
    else:
        made, *_ = grpo.rollout(model, processor, world["samples"], own, prompts)
        assert int(made.lengths.min()) == own.max_new_tokens
    sampled = clock()
    advantages = grpo.group_advantages(world["coin"]()).to(made.ids.device)
    with patch.object(M, "completion_logprobs", functools.partial(M.completion_logprobs, share_prompt=not plain)):
        with torch.no_grad():
            reference = M.completion_logprobs(world["reference"](), processor, prompts, made.ids, made.lengths, own.temperature)
        referred = clock()
        for group in world["optimizer"]().param_groups:
            group["lr"] = own.lr
        grpo.update(model, processor, world["optimizer"](), prompts, made, advantages, reference, own)
    end = clock()
    return {"rollout": sampled - sampling, "update": end - start, "learning": end - start - (sampled - sampling), "reference": referred - sampled}


def trl_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return ""


def train_trl(world: dict, rounds: int, between) -> list:
    """GRPOTrainer's own loop for `rounds` steps on a model of its own; calls between() after each. Returns seconds of each step."""
    import pyarrow
    import transformers
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    import data
    import grpo
    import model as M

    own, processor = world["own"], world["processor"]

    class Qwen2_5_VLProcessor(transformers.Qwen2_5_VLProcessor):
        """Pictures only: the video processor wants torchvision, and a processor's parts are read off this signature."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    policy, _ = M.load(str(world["out"] / "rejection_sft"))
    M.freeze_vision(policy)
    opened = "{% if add_generation_prompt %}" + data.THINK + "{% endif %}"
    joint = Qwen2_5_VLProcessor(processor.image_processor, processor.tokenizer, chat_template=processor.tokenizer.chat_template + opened)

    class Rows(Dataset):
        """Pictures are opened anew each time, as those of a data set of files."""

        def __getitem__(self, number: int) -> dict:
            show = lambda part: part | {"image": Image.open(part["image"]).convert("RGB")} if part["type"] == "image" else part
            return {"prompt": [{"role": "user", "content": [show(p) for p in data.build_prompt(world["samples"][number], own.mode)]}], "k": number}

        def __getitems__(self, numbers: list) -> list:
            return [self[number] for number in numbers]

    def reward(prompts, completions, completion_ids, k, **_):
        assert {len(ids) for ids in completion_ids} == {own.max_new_tokens}
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        [grpo.rewards_of(data.THINK + str(text), world["samples"][number], own.mode) for text, number in zip(texts, k)]
        return world["coin"]().flatten().tolist()

    accumulate = len(world["samples"]) // own.micro_prompts or 1
    arguments = GRPOConfig(
        output_dir=str(world["out"] / "trl"), max_steps=rounds, per_device_train_batch_size=len(world["samples"]) * own.group_size // accumulate,
        gradient_accumulation_steps=accumulate, num_generations=own.group_size, max_completion_length=own.max_new_tokens, learning_rate=own.lr, adam_beta2=0.99,
        weight_decay=0.0, max_grad_norm=own.max_grad_norm, beta=own.beta, epsilon=own.clip_low, temperature=own.temperature, top_p=1.0, top_k=0, loss_type="grpo",
        scale_rewards="group", use_bias_correction_kl=False, bf16=False, gradient_checkpointing=own.gradient_checkpointing, remove_unused_columns=False,
        use_cpu=not world["model"].device.type == "cuda", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        generation_kwargs={"suppress_tokens": M.banned_ids(policy, processor.tokenizer).tolist()})
    seconds, last, sampling = [], [0.0], [0.0]

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            last[0] = clock()

        def on_step_end(self, *_, **__):
            whole = clock() - last[0]
            seconds.append({"rollout": sampling[0], "update": whole, "learning": whole - sampling[0]})
            between()
            sampling[0], last[0] = 0.0, clock()

    table = InMemoryTable(pyarrow.table({"k": list(range(len(world["samples"])))}))  # with a name, as datasets cannot make one with pyarrow 26
    trainer = GRPOTrainer(policy, reward, arguments, Rows(table, fingerprint="benchmark"), processing_class=joint, callbacks=[Turns()])
    inner = trainer._generate_single_turn

    lengths = sum(len(p["ids"]) for p in world["encode"]()) * own.group_size

    def timed(prompt_ids, *given):
        assert abs(sum(map(len, prompt_ids)) / lengths - 1) < 0.01, "TRL's prompts are not as long"
        start = clock()
        made = inner(prompt_ids, *given)
        sampling[0] += clock() - start
        return made

    trainer._generate_single_turn = timed
    trainer.train()
    return seconds


def sft_examples(world: dict) -> list:
    import data

    return data.read_conversations(world["out"] / "sft.jsonl")


def sft_of_this(world: dict) -> float:
    """Seconds of one epoch of sft.train."""
    import sft

    settings, examples, folder = config.SFT(batch_size=32, micro_tokens=2048, epochs=1.0, lr=1e-4), sft_examples(world), world["out"]
    start = clock()
    sft.train(world["model"], world["processor"], examples, settings, folder, "benchmark", "sft")
    return clock() - start


def sft_of_plain(world: dict) -> float:
    import torch

    import model as M
    import sft

    model, processor, examples = world["model"], world["processor"], sft_examples(world)
    random.Random(0).shuffle(examples)
    start = clock()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for k in range(0, len(examples), 32):
        optimizer.zero_grad()
        for j in range(k, k + 32, 8):
            rows = [sft.encode_example(processor, model, example) for example in examples[j : j + 8]]
            inputs = M.collate(rows, "right", processor.tokenizer.pad_token_id, M.device_of(model))
            labels = inputs["input_ids"].masked_fill(~sft.response_mask(rows, inputs["input_ids"].shape[1]).to(model.device), -100)
            (model(**inputs, labels=labels, use_cache=False).loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return clock() - start


# ------------------------------------------------------------------------------------------------------------ what is measured


def needed_flops(model, prompts: list, group: int, new: int) -> dict:
    """The least FLOPs of {"rollout", "learning"} for these prompts; see the top of the file."""
    text = model.config.text_config
    count = lambda *within: sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and any(w in name for w in within))
    lengths = [len(p["ids"]) for p in prompts]
    tokens, completed = sum(lengths) + len(prompts) * group * new, len(prompts) * group * new
    pairs = sum(n * n / 2 + group * new * (n + new / 2) for n in lengths)
    patches = sum(len(p["patches"][1]) for p in prompts if p["patches"][1] is not None)
    merge = model.config.vision_config.spatial_merge_size ** 2
    tower = 2 * patches * (count("visual.patch_embed", "visual.blocks") + count("visual.merger") / merge)
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    forward = 2 * tokens * count("language_model.layers") + 2 * completed * text.vocab_size * text.hidden_size + 4 * width * text.num_hidden_layers * pairs
    return {"rollout": tower + forward, "learning": 2 * tower + 4 * forward}


def matmul_rate(model) -> float:
    """FLOPs a second of one large square product in the model's precision."""
    import torch

    side = 8192 if model.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=model.device, dtype=model.dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * side ** 3 / statistics.median(times[2:])


def measure(size: dict, out: Path, names: list) -> dict:
    """All of `names` in turns in this process."""
    import torch

    world, rounds = open_world(size, out), []
    others = {"this code": functools.partial(step, world, False), "plain loop": functools.partial(step, world, True), "generate": functools.partial(rollout_of_generate, world)}

    def turn():
        row = {name: others[name]() for name in names if name != "TRL"}
        if size["sft"]:
            row["this code"]["sft"], row["plain loop"]["sft"] = sft_of_this(world), sft_of_plain(world)
        rounds.append(row | {"matmul": matmul_rate(world["model"])})

    if "TRL" in names:
        for row, seconds in zip(rounds, train_trl(world, size["rounds"] + 1, turn)):
            row["TRL"] = seconds
    else:
        for _ in range(size["rounds"] + 1):
            turn()
    import sft

    prompts = world["encode"]()
    tokens = sum(len(sft.encode_example(world["processor"], world["model"], example)["ids"]) for example in sft_examples(world)) if size["sft"] else 0
    return {"rounds": rounds[1:], "parameters": sum(p.numel() for p in world["model"].parameters()), "prompt": [len(p["ids"]) for p in prompts], "sft_tokens": tokens,
            "need": needed_flops(world["model"], prompts, size["group"], size["new"]), "threads": torch.get_num_threads(), "rounds_sft": bool(size["sft"]),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


def alone(size: dict, out: Path, names: list) -> dict:
    """One contestant with the process to itself: peak memory in MB, and the seconds of its steps (the first is left out)."""
    import torch

    world, seconds = open_world(size, out), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if names == ["TRL"]:
        world.pop("model"), world.update(model=torch.nn.Linear(1, 1).to("cuda" if torch.cuda.is_available() else "cpu"))
        world["model"].device = next(world["model"].parameters()).device
        seconds = train_trl(world, size["rounds"] + 1, lambda: None)
    else:
        for _ in range(size["rounds"] + 1):
            seconds.append(rollout_of_generate(world) if names == ["generate"] else step(world, names == ["plain loop"]))
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": peak, "before": before, "seconds": seconds[1:]}


def shared(size: dict, out: Path, names: list) -> dict:
    """This process is one of several (torchrun): seconds per step of sft.train and of grpo.run, from their own logs, and the losses."""
    import grpo
    import sft

    config.join_processes()
    world = open_world(size, out)
    folder, made = out / f"processes-{os.environ.get('WORLD_SIZE', 1)}-{time.time_ns() if config.is_main() else 0}", {}
    settings = config.SFT(batch_size=32, micro_tokens=2048, epochs=2.0, lr=1e-4)
    if config.is_main():
        (folder / "sft").mkdir(parents=True)
    sft.train(world["model"], world["processor"], sft_examples(world), settings, folder / "sft", "benchmark", "sft")
    config.seed_everything(world["settings"], "grpo")
    stage = out / "grpo"
    if config.is_main():
        stage.mkdir(exist_ok=True)
        (stage / "metrics.jsonl").unlink(missing_ok=True)
    config.wait_for_all()
    grpo.run("grpo", world["settings"], stage)
    config.wait_for_all()
    if config.is_main():
        read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]
        rows = read(folder / "sft" / "metrics.jsonl")
        made = {"sft": (rows[-1]["seconds"] - rows[0]["seconds"]) / (len(rows) - 1), "losses": [row["loss"] for row in rows],
                "grpo": statistics.median(sum(v for k, v in row.items() if k.startswith("seconds_")) for row in read(stage / "metrics.jsonl")[1:])}
    return made


# ------------------------------------------------------------------------------------------------------------------ the tables


def child(part: str, size: dict, out: Path, names: list = (), processes: int = 0, threads: int = 0) -> dict:
    """Runs one of the functions above in a process of its own, or in several under torchrun."""
    job = json.dumps({"part": part, "size": size, "out": str(out), "names": list(names)})
    start = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else [])
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(start + [__file__, "--child", job], capture_output=True, text=True, env=environment)
    answers = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not answers:
        raise config.UserError(f"{part} of {', '.join(names) or 'this code'} failed:\n{done.stderr[-3000:]}")
    return json.loads(answers[0])


def versus(values: list, ours: list, more_is_better: bool = False) -> str:
    """Median of `values`, and how many times better `ours` did, pair by pair, with the range."""
    ratios = [a / b if more_is_better else b / a for a, b in zip(ours, values)]
    same = "" if values is ours else f" x{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
    middle = statistics.median(values)
    return (f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}") + same


def show(rows: list) -> None:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        print("  " + row[0].ljust(widths[0]) + "".join("   " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), flush=True)


def size_table(name: str, size: dict, title: str, threads: int, trl: str) -> None:
    names = ["this code", "plain loop", "generate"] + ["TRL"] * bool(trl)
    with tempfile.TemporaryDirectory() as out:
        found = child("measure", size, Path(out), names, threads=threads)
        once = size | {"rounds": 1, "sft": 0}
        peaks = {contestant: child("alone", once, Path(out), [contestant], threads=threads) for contestant in names if contestant != "generate"}
    rounds, tokens = found["rounds"], size["prompts"] * size["group"] * size["new"]
    column = lambda contestant, key: [row[contestant][key] for row in rounds]
    rate = statistics.median(row["matmul"] for row in rounds)
    print(f"\n== {name}: {title}. {found['parameters'] / 1e6:.1f}M parameters, {size['prompts']} prompts of {min(found['prompt'])} to {max(found['prompt'])} tokens x "
          f"{size['group']} completions of {size['new']}; {len(rounds)} rounds, {found['threads']} threads, {found['device']}, matmul {rate / 1e9:,.0f} GFLOP/s "
          f"[{min(r['matmul'] for r in rounds) / 1e9:,.0f}-{max(r['matmul'] for r in rounds) / 1e9:,.0f}]")
    speed = {contestant: [tokens / s for s in column(contestant, "rollout")] for contestant in names}
    table = [["", *names], ["rollout, tokens/s", *(versus(speed[c], speed["this code"], True) for c in names)]]
    for key, label in (("update", "update, s"), ("learning", "learning, s")):
        table.append([label, *(versus(column(c, key), column("this code", key)) if c != "generate" else "-" for c in names)])
    need = found["need"]["learning"]
    reached = {c: [need / s / row["matmul"] for s, row in zip(column(c, "learning"), rounds)] for c in names if c != "generate"}
    table.append(["learning, of matmul rate", *(f"{statistics.median(reached[c]):.0%}" if c in reached else "-" for c in names)])
    whole = {c: [sum(found["need"].values()) / s / row["matmul"] for s, row in zip(column(c, "update"), rounds)] for c in reached}
    table.append(["update, of matmul rate", *(f"{statistics.median(whole[c]):.0%}" if c in whole else "-" for c in names)])
    if size["sft"]:
        speed = {c: [found["sft_tokens"] / s for s in column(c, "sft")] for c in names[:2]}
        table.append(["SFT, tokens/s", *(versus(speed[c], speed["this code"], True) if c in speed else "-" for c in names)])
    extra = {c: [peak["peak"] - peak["before"]] for c, peak in peaks.items()}
    table.append(["peak memory, MB", *(versus([peaks[c]["peak"]], [peaks["this code"]["peak"]]).partition(" [")[0] if c in peaks else "-" for c in names)])
    table.append(["above the loaded model, MB", *(versus(extra[c], extra["this code"]).partition(" [")[0] if c in peaks else "-" for c in names)])
    show(table)


def growth_table(name: str, key: str, values: tuple, size: dict, threads: int) -> None:
    print(f"\n== growth with {'the group size' if key == 'group' else 'the length of the prompt'}: {size['prompts']} prompts, {size['new']} new tokens, width {size['width']}")
    table = [[name, "tokens of prompt", "rollout, tokens/s", "update, s", "learning, s", "plain loop: update, s", "learning, s"]]
    for value in values:
        with tempfile.TemporaryDirectory() as out:
            found = child("measure", size | {key: value}, Path(out), ["this code", "plain loop"], threads=threads)
        column = lambda c, key: [row[c][key] for row in found["rounds"]]
        tokens = size["prompts"] * (size | {key: value})["group"] * size["new"]
        table.append([str(value or "-"), f"{statistics.mean(found['prompt']):.0f}", f"{tokens / statistics.median(column('this code', 'rollout')):,.0f}",
                      *(versus(column(c, k), column("this code", k)) if c != "this code" else f"{statistics.median(column(c, k)):.3g}"
                        for c in ("this code", "plain loop") for k in ("update", "learning"))])
    show(table)


def process_table(size: dict, counts: list) -> None:
    """Every count twice, in turns; each process has one thread."""
    print("\n== processes of one thread each under torchrun; the batches of a step are the same")
    with tempfile.TemporaryDirectory() as out:
        runs = [{n: child("shared", size, Path(out), processes=n, threads=1) for n in counts} for _ in range(2)]
    table = [["processes", "SFT step, s", "GRPO step, s", "SFT losses differ by at most"]]
    for n in counts:
        apart = max(abs(a - b) for a, b in zip(runs[0][n]["losses"], runs[0][1]["losses"]))
        table.append([str(n), *(versus([r[n][k] for r in runs], [r[n][k] for r in runs] if n == 1 else [r[1][k] for r in runs]) for k in ("sft", "grpo")), f"{apart:.1e}"])
    show(table)
    print("  x: seconds of n processes over those of one; below 1 is faster")


def real_table(name: str, trl: str) -> None:
    size = WORK | dict(real=name, new=300, prompt_tokens=700, micro=1)
    print(f"\n== real shape {name}: random weights, 8 prompts x 8 completions of 300 tokens, two pictures of 512 x 512; settings of configs/qwen2.5-vl-{name}.toml\n"
          "  each contestant in a process of its own, one after the other; TRL keeps weights, gradients and moments in bf16, this code fp32 copies")
    table = [["", "rollout, tokens/s", "update, s", "peak GPU memory, GB"]]
    with tempfile.TemporaryDirectory() as out:
        for contestant in ["this code", "plain loop", "generate"] + ["TRL"] * bool(trl):
            try:
                found = child("alone", size, Path(out), [contestant])
            except config.UserError as error:  # most likely out of memory: the others still count
                table.append([contestant, "failed: " + str(error).strip().splitlines()[-1][:60], "", ""])
                continue
            middle = lambda key: statistics.median(row[key] for row in found["seconds"])
            table.append([contestant, f"{8 * 8 * 300 / middle('rollout'):,.0f}", f"{middle('update'):.1f}" if contestant != "generate" else "-", f"{found['peak'] / 1024:.1f}"])
    show(table)


def main() -> None:
    parts = [*SIZES, *GROWTH, "processes"]
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--quick", action="store_true", help="the small size with few rounds, and processes")
    reader.add_argument("--only", nargs="+", choices=parts, default=[], metavar="NAME", help=", ".join(parts))
    reader.add_argument("--real", choices=list(REAL), help="on a GPU")
    reader.add_argument("--rounds", type=int, default=0, help="turns of each size after the warm-up; 0: its own number")
    reader.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 leaves torch's choice")
    reader.add_argument("--child", help=argparse.SUPPRESS)
    given = reader.parse_args()
    if given.child:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        job = json.loads(given.child)
        made = {"measure": measure, "alone": alone, "shared": shared}[job["part"]](job["size"], Path(job["out"]), job["names"])
        return print("RESULT " + json.dumps(made), flush=True)
    started, trl = time.time(), trl_version()
    print(f"torch and transformers as installed; TRL {trl or 'is missing: pip install trl adds its column'}; load of the machine before the start {os.getloadavg()[0]:.1f} "
          f"of {os.cpu_count()} cores{' (NOT QUIET: take ratios, not seconds)' if os.getloadavg()[0] > 0.4 else ''}")
    if given.real:
        real_table(given.real, trl)
    for name in [] if given.real else given.only or (["small", "processes"] if given.quick else parts):
        if name in SIZES:
            size, title = SIZES[name]
            size = size | ({"rounds": 2, "prompts": 4, "new": 32, "sft": 32} if given.quick else {}) | ({"rounds": given.rounds} if given.rounds else {})
            size_table(name, size, title, given.threads, trl)
        elif name in GROWTH:
            key, values, size = GROWTH[name]
            growth_table(name, key, values, size | ({"rounds": given.rounds} if given.rounds else {}), given.threads)
        else:
            process_table(WORK | dict(prompts=4, new=32 if given.quick else 100, sft=64 if given.quick else 128, rounds=2),
                          [n for n in (1, 2, 4) if n <= max(2, os.cpu_count())])
    print(f"\n{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except config.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
