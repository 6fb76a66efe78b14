"""Supervised fine-tuning: the one loop behind the base, the cold start (1b), rejection-sampled SFT (2b) and the direct control.

Paper, section 4: L = - sum_t log p(y_t | x, y_<t), over the response only (EOS included), averaged over the response tokens of a batch.
The stages differ in their data alone:

    base            exercises on all four tasks, no chain of thought; stands for the pretrained UnifiedReward
    cold_start      the teacher's reasoning on image generation: teaches the format
    rejection_sft   the cold-started model's own correct reasoning on all tasks
    direct_sft      control: the same samples as rejection_sft with the bare verdict as response

Departures from the paper: (1) `replay` mixes base exercises into the later stages; without them the cold start erases direct answers.
(2) Every gradient is divided by the number of response tokens of the whole batch, counted before the micro-batch loop, so the
micro-batch size never changes the result. (3) Adam's second beta is 0.99, in GRPO too, where the official trainer's default is 0.999: in runs of
some hundred steps the latter would average over all of them.

    python sft.py --config small --stage cold_start
"""

import importlib
import math
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import config
import data
import model as M
import stages
from resume import steps_to_go

# --------------------------------------------------------------------------------------------------------------- the loss

def sft_loss(logits: torch.Tensor, ids: torch.Tensor, response_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """- sum over response tokens of log p(y_t | x, y_<t) / `tokens`, the response tokens of the *whole* batch.
    logits [B, L, V], ids [B, L], response_mask [B, L] (1 where ids is part of the response) -> scalar"""
    mask = response_mask[:, 1:].bool()  # the logits at t predict the token at t + 1
    return F.cross_entropy(logits[:, :-1][mask].float(), ids[:, 1:][mask], reduction="sum") / tokens


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear to the peak over the first `warmup` share of the steps, then a cosine that would reach 0 one step after the last. Step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising)))


def optimizer_for(model, own, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Freezes what the settings `own` of a stage do not let learn, and returns AdamW for the rest. A bf16 model (on a GPU) gets fp32 copies, and
    these are optimised: at a step of 1e-6 most bf16 weights, good for three digits, would not move. Gradients are added up in fp32, and every step
    rounds the copies back into the model, which so has the numerics it is served with. Bytes per learning parameter: 2 (bf16) + 4 (copy) +
    4 (gradient) + 8 (moments) = 18 on the GPU; own.offload leaves 2 there, and the gradient until the step, and has 16 in host memory, where
    the step is slower. fp32 weights under autocast would take as much, and every sampled token would wait for all weights to be cast."""
    if own.freeze_vision:
        M.freeze_vision(model)
    if own.gradient_checkpointing:
        model.train().activation_checkpointing_enable()  # transformers runs layers again in training mode only; none has dropout
        model.disable_input_require_grads()  # which reentrant checkpointing alone needs: a frozen vision tower would be differentiated, too
        for layer in model.model.language_model.layers:
            layer._can_checkpoint_with_cache = True  # transformers' own switch; it may be on, since model.SharedPrompt is not written to twice
    learning = [p for p in model.parameters() if p.requires_grad]
    halves = [p for p in learning if p.dtype == torch.bfloat16]
    copies = [p.detach().to("cpu" if own.offload else p.device).float().requires_grad_() for p in halves]
    # In host memory one fused pass is faster; foreach, torch's own choice on a GPU, takes 4 bytes more for each parameter while it steps.
    optimizer = torch.optim.AdamW([{"params": copies or learning, "learning": learning}], lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay,
                                  fused=True if copies and own.offload else None, foreach=False)

    def hand_over(*_):  # once for all micro-batches
        for copy, parameter in zip(copies, halves):
            copy.grad = None if parameter.grad is None else parameter.grad.to(copy.device)

    for parameter in halves:
        parameter.grad_dtype = torch.float32
    optimizer.register_step_pre_hook(hand_over)
    optimizer.register_step_post_hook(lambda *_: [parameter.data.copy_(copy) for copy, parameter in zip(copies, halves)])
    return optimizer


def response_mask(encoded: list, length: int) -> torch.Tensor:
    """[B, length] for right-padded rows: 1 on the response and its EOS."""
    position = torch.arange(length)
    return torch.stack([(position >= e["prompt_length"]) & (position < len(e["ids"])) for e in encoded])


# --------------------------------------------------------------------------------------------------------------- the loop

def finish_update(optimizer, totals: dict, own) -> dict:
    """The end of an update: adds up gradients and `totals`, one of them "loss", of all processes, scales the gradient down to own.max_grad_norm,
    steps, and clears the gradients, whose memory the next rollout may want. Under torchrun every process runs its config.share of the batch;
    denominators count the whole batch, so the sum is what one process alone would have; of a sharded model FSDP has added up the gradients in
    backward. A loss or gradient that is not finite would spoil every weight: that step is skipped; more than own.max_skipped in a row end the run.
    Returns totals, "grad_norm", "skipped" (0, 1)."""
    group = optimizer.param_groups[0]
    parameters = group.get("learning", group["params"])  # the model's own, not copies
    if config.world()[1] > 1:
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        for p in plain:
            p.grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad
        large, small = ([p for p in plain if (p.numel() >= 2**16) == is_large] for is_large in (True, False))
        for p in large:  # where they are: in one message they would all be there twice
            dist.all_reduce(p.grad)
        flat = torch.cat([p.grad.flatten() for p in small] + [torch.tensor(list(totals.values()), device=parameters[0].device)])
        dist.all_reduce(flat)
        for p, gradient in zip(small, flat.split([p.numel() for p in small] + [len(totals)])):
            p.grad = gradient.view_as(p)
        totals = dict(zip(totals, flat[-len(totals) :].tolist()))
    norm = torch.nn.utils.clip_grad_norm_(parameters, own.max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if finite := math.isfinite(totals["loss"]) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    for p in parameters:
        p.grad = None
    group["skipped"] = 0 if finite else group.get("skipped", 0) + 1  # in the optimiser, where resume.keep finds it
    if group["skipped"] > own.max_skipped:
        raise config.UserError(f"{group['skipped']} steps in a row were not finite in loss or gradient; lower the learning rate (lr = {own.lr})")
    return totals | {"grad_norm": norm, "skipped": int(not finite)}


def batches(items: list, size: int, seed: str, change=lambda item, rng: item):
    """Batches without end: all `items` in a random order, then in another, each put through `change`, which may draw from the same generator."""
    rng, order = random.Random(seed), []
    while True:
        while len(order) < size:
            order += rng.sample(items, len(items))
        yield [change(item, rng) for item in order[:size]]
        order = order[size:]


def encode_example(processor, model, example: tuple) -> dict:
    """(content parts, response) -> tensors. The prompt opens <think>, so the tag itself is not learnt."""
    parts, response = example
    prefix = data.THINK if response.startswith(data.THINK) else ""
    return M.encode(processor, model, parts, prefix, response[len(prefix):])


def micro_batches(lengths: list, limit: int, processes: int = 1) -> list:
    """Cuts a batch into pieces of which every process's part has at most `limit` tokens, padding included (one example at least): slices of the
    examples that a process has. `lengths` as config.gather puts them together, those of each process rising. As many pieces for each process, since
    the processes of a sharded model run its layers together."""
    starts = []
    for k in range(0, len(lengths), processes):
        place, longest = k // processes, max(lengths[k : k + processes])
        if not starts or (place + 1 - starts[-1]) * longest > limit:
            starts.append(place)
    return list(map(slice, starts, [*starts[1:], None]))


def add_gradients(model, processor, examples: list, micro_tokens: int) -> tuple:
    """Adds the gradient of the SFT loss of one batch, [(content parts, response)]. Returns (this process's part of the loss, the response tokens of
    all processes, by which all gradients were divided)."""
    pad, device, total = processor.tokenizer.pad_token_id, M.device_of(model), 0.0
    mine = [encode_example(processor, model, example) for example in config.share(examples)]
    mine.sort(key=lambda e: len(e["ids"]))  # like lengths together
    sizes = config.gather([(len(e["ids"]), e["prompt_length"]) for e in mine])
    tokens = sum(length - prompt for length, prompt in sizes)  # the denominator of the whole update
    for micro in filter(None, (mine[piece] for piece in micro_batches([length for length, _ in sizes], micro_tokens, config.world()[1]))):
        inputs = M.collate(micro, "right", pad, device)
        kept = inputs["input_ids"].shape[1] - min(e["prompt_length"] for e in micro) + 1  # the first response token is predicted one before it
        logits, mask = model(**inputs, use_cache=False, logits_to_keep=kept).logits, response_mask(micro, inputs["input_ids"].shape[1])
        loss = sft_loss(logits, inputs["input_ids"][:, -kept:], mask[:, -kept:].to(device), tokens)
        loss.backward()
        total += loss.item()
    return total, tokens


def train(model, processor, examples: list, settings: config.SFT, folder: Path, seed: str, label: str) -> None:
    """Plain SFT of `model`, in place, on [(content parts, response)]; writes folder/metrics.jsonl, and goes on from a state of this label there."""
    if not examples:
        raise config.UserError(f"{label}: there is nothing to train on")
    optimizer = optimizer_for(model, settings, settings.weight_decay)
    started, processes = time.time(), config.world()[1]
    steps = max(1, round(len(examples) * settings.epochs / settings.batch_size))
    if isinstance(model, FSDPModule) and settings.batch_size % processes:
        raise config.UserError(f"{label}: batch_size = {settings.batch_size} is no multiple of the {processes} processes, which run.shard needs")
    for step, taken in steps_to_go(batches(examples, settings.batch_size, seed), steps, label, folder, model, optimizer, settings.save_minutes):
        optimizer.param_groups[0]["lr"] = rate = learning_rate(step, steps, settings.lr, settings.warmup)
        total, tokens = add_gradients(model, processor, taken, settings.micro_tokens)
        totals = finish_update(optimizer, {"loss": total}, settings)
        row = {"phase": label, "step": step + 1, "loss": round(totals["loss"], 5), "lr": rate, "grad_norm": round(totals["grad_norm"], 4)}
        config.log(folder, row | {"skipped": totals["skipped"], "tokens": tokens, "seconds": round(time.time() - started, 2)})


# ----------------------------------------------------------------------------------------------------------------- stages

def practice_examples(stage: str, settings: config.Settings, folder: Path, count: int) -> list:
    """`count` of the base's exercises, drawn afresh under folder/replay: a shipped base does not bring its practice along. Later stages get no
    comparisons, which close the think block without a verdict: replayed, they would keep the other tasks from the format."""
    from base.pretrain import write_practice

    write_practice(folder / "replay", max(count, 8), 2, 0, random.Random(f"{settings.run.seed}/{stage}/replay"))  # a few might all be comparisons
    config.wait_for_all()
    file = folder / "replay" / "practice.jsonl"
    rows = zip(data.read_jsonl(file), data.read_conversations(file))
    return [example for row, example in rows if stage == "base" or row["kind"] != "compare"][:count]


def start_and_examples(stage: str, settings: config.Settings, out: Path) -> tuple:
    """(path of the weights that a stage goes on training, its [(content parts, response)]). UserError: there are none."""
    start = {"cold_start": "base", "rejection_sft": "cold_start", "direct_sft": "base"}[stage]
    file, others = ("distill/kept.jsonl", "dropped.jsonl") if stage == "cold_start" else ("rejection/correct.jsonl", "wrong.jsonl")
    examples = data.read_conversations(out / file)
    if not examples:
        raise config.UserError(f"{stage}: {out / file} is empty, so there is nothing to train on; {others} beside it has what came instead. "
                               "Texts that are cut off need a larger max_new_tokens")
    if stage == "direct_sft":
        style, verdict = stages.style("answer", settings, out, stage), lambda s: f"<answer>{data.verdict_string(s.task, s.label)}</answer>"
        examples = [(data.build_prompt(s, "answer", style), verdict(s)) for s in data.read_samples(out / file)]
    return stages.checkpoint(start, settings, out), examples


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    own = getattr(settings, stage)
    if stage == "base":
        if settings.model.path and not settings.base.rebuild:
            if idle := [key for key, value in vars(settings.model).items() if key != "path" and value != getattr(config.Model, key)]:
                raise config.UserError(f"model.{idle[0]} is that of a base trained here (--base.rebuild true); {settings.model.path} has its own")
            return f"starts from {settings.model.path}"
        return importlib.import_module("base.pretrain").build_base(settings, folder)
    start, examples = start_and_examples(stage, settings, folder.parent)
    count = round(own.replay * len(examples))
    replayed = practice_examples(stage, settings, folder, count) if count else []
    model, processor = M.load(start, shard=settings.run.shard)
    train(model, processor, examples + replayed, own, folder, f"{settings.run.seed}/{stage}", stage)
    M.save(model, processor, folder)
    return f"{len(examples)} examples" + (f" + {len(replayed)} of the base's exercises" if replayed else "") + f", {own.epochs:g} epochs"


if __name__ == "__main__":
    stages.main("rejection_sft")
