"""Stage 3, GRPO: reinforcement learning on the samples the model still gets wrong.

Paper, section 4.3. For each prompt sample G completions y_1..y_G from the policy, reward each, and compare within the group:

    R_i   = format (0/1) + accuracy (0/1)                                     each with its weight (total_reward); more in rewards_of
    A_i   = (R_i - mean R) / (std R + 1e-4)                                   unbiased std over the group
    rho_t = pi(y_t) / pi_old(y_t)
    loss  = mean over rollouts, mean over tokens, of  -(min(rho_t A, clip(rho_t, 1-eps, 1+eps) A) - beta KL_t)
    KL_t  = exp(d) - d - 1,   d = log pi_ref(y_t) - log pi(y_t)               (k3; reference = the model entering the stage)

The value of this loss says nothing: with one update per rollout rho = 1, the advantages of a group sum to zero, and the loss is beta
times a tiny KL (with `normalise` token or constant longer completions weigh more, and the advantages do not quite cancel). Its *gradient* is
that of REINFORCE with the group's mean as baseline. Watch the rewards instead.

Departures from the paper, all off unless the settings say so: pairs are shown in either order (random_order); rewards for sums that add up and
a verdict that follows from them (consistency_weight) and for right scores (dimension_weight); accuracy that counts only with the former (gated);
the SFT loss of some of the base's exercises, added to this one (replay, as InstructGPT's PPO-ptx, arXiv 2203.02155).
Departures from the official code: (1) denominators are those of the whole update, fixed before the micro-batch loop. (2) A group of
equal rewards gets advantages of exactly 0. (3) The format reward wants the whole text to match: nothing after </answer>. (4)
Log-probabilities are those of the distribution that was sampled. (5) The prompt is run once per group. In the
rollout, completions are also run as one text until they differ; in reference and update, equal completions are run once.

    python grpo.py --config small
"""

import random
import re
import time
from pathlib import Path

import torch

import config
import data
import model as M
import stages
from resume import steps_to_go
from sft import add_gradients, batches, finish_update, learning_rate, optimizer_for, practice_examples

# ---------------------------------------------------------------------------------------------------------- the mathematics

def group_advantages(rewards: torch.Tensor, scale_by_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """A = (R - mean) / (std + eps) within each group, unbiased std; `scale_by_std=False` is Dr. GRPO's A = R - mean. [P, G] -> [P, G]

    A group of equal rewards gets exactly 0: in fp32 the mean of eight equal numbers need not be that number, and the residue divided
    by a small eps would be noise in every token's gradient."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_by_std and rewards.shape[1] > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    return advantages.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """Per-token estimate of KL(pi || pi_ref) from tokens sampled from pi (Schulman's k1, k2, k3), d = log pi_ref - log pi.
    k1 = -d is unbiased but its gradient has mean zero; k2 = d^2/2; k3 = exp(d) - d - 1 is unbiased and never negative."""
    d = ref_logprobs - logprobs
    kinds = {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - d - 1}
    if kind not in kinds:
        raise ValueError(f"kl is k1, k2 or k3, not {kind!r}")
    return kinds[kind]


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, clip_low: float = 0.2, clip_high: float = 0.2,
              beta: float = 0.04, kl: str = "k3", normalise: str = "rollout", rollouts: int | None = None, tokens: int | None = None,
              max_length: int | None = None) -> tuple:
    """The clipped objective with its KL penalty, as a loss. logprobs, old_logprobs, ref_logprobs, completion_mask [B, T];
    advantages [B]; ref_logprobs may be None where beta is 0. Returns (loss, metrics).

    normalise: "rollout" = mean over rollouts of the mean over their tokens (GRPO); "token" = sum over all tokens / all tokens (DAPO);
    "constant" = sum / (rollouts * max_length) (Dr. GRPO). `rollouts`, `tokens`: counts of the *whole update* when this is one
    micro-batch of it; losses and metrics of the micro-batches then add up to those of the update."""
    mask = completion_mask.bool()
    lengths = mask.sum(1)
    rollouts, tokens = rollouts or mask.shape[0], tokens or int(lengths.sum())
    # Differences are masked before exp: an overflow on padding would come back as inf * 0 = NaN.
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # [B, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    kl_t = torch.zeros_like(ratio)
    if beta:
        kl_t = kl_estimate(logprobs.masked_fill(~mask, 0.0), ref_logprobs.masked_fill(~mask, 0.0), kl)
    per_token = (beta * kl_t - objective) * mask
    if normalise == "rollout":
        loss = (per_token.sum(1) / lengths.clamp(min=1)).sum() / rollouts
    elif normalise == "token":
        loss = per_token.sum() / tokens
    elif normalise == "constant":
        loss = per_token.sum() / (rollouts * (max_length or mask.shape[1]))
    else:
        raise ValueError(f"normalise is rollout, token or constant, not {normalise!r}")
    with torch.no_grad():
        outside = ((ratio < 1 - clip_low) & (advantages[:, None] < 0)) | ((ratio > 1 + clip_high) & (advantages[:, None] > 0))
        metrics = {"kl": ((kl_t * mask).sum() / tokens).item(), "clip_share": ((outside & mask).sum() / tokens).item(),
                   "ratio": ((ratio * mask).sum() / tokens).item()}
    return loss, metrics


# ---------------------------------------------------------------------------------------------------------------- rewards

def rewards_of(text: str, sample: data.Sample, mode: str) -> dict:
    """The rewards of one completion, each from 0 to 1, kept apart so that they can be logged apart. Format and accuracy are the paper's; consistency
    asks for sums that add up and a verdict for the larger (not for every dimension, and never for a tie, which is not offered and would be paid for
    without a choice); dimension is the share of scores that are right."""
    verdict = data.parse_verdict(text, sample.task)
    format_ok = verdict.format_ok if mode == "think" else bool(re.fullmatch(r"<answer>[^<]*</answer>", text))
    accurate = verdict.answer is not None and verdict.answer == sample.label
    return {"format": float(format_ok), "accuracy": float(accurate), "consistency": float(verdict.consistent and verdict.answer != 0),
            "dimension": data.share_right(verdict.scores, sample.scores) or 0.0}


# -------------------------------------------------------------------------------------------------------- rollout and update

def encode_prompts(processor, model, samples: list, mode: str, style: str) -> list:
    """The prompts of `samples` as tensors, see model.encode; their pictures seen once for rollout, reference and update."""
    prefix = data.THINK if mode == "think" else ""
    prompts = [M.encode(processor, model, data.build_prompt(sample, mode, style), prefix) for sample in samples]
    M.encode_vision(model, prompts)
    return prompts


def total_reward(rewards: dict, own: config.GRPO) -> torch.Tensor:
    """R: the rewards {name: [P, G]}, each times its weight; with own.gated, accuracy counts only where the reasoning leads to it. -> [P, G]"""
    if own.gated:
        rewards = rewards | {"accuracy": rewards["accuracy"] * rewards["consistency"]}
    return sum(getattr(own, f"{name}_weight") * reward for name, reward in rewards.items())


def rollout(model, processor, samples: list, own: config.GRPO, prompts: list, seeds: list | None = None) -> tuple:
    """G completions per prompt: (Completions, texts [P * G], {reward: [P, G]}); of several processes, each samples for its own prompts and
    learns the texts and rewards of all."""
    G, prefix = own.group_size, data.THINK if own.mode == "think" else ""
    M.gather_weights(model, True)
    made = M.generate(model, processor, prompts, G, own.max_new_tokens, own.temperature, own.batch_rows, seeds)
    M.gather_weights(model, False)
    texts = [prefix + processor.text(ids[:length]) for ids, length in zip(made.ids, made.lengths)]
    groups = config.gather([texts[k : k + G] for k in range(0, len(texts), G)])
    rewards = config.gather([[rewards_of(text, sample, own.mode) for text in texts[k * G : (k + 1) * G]] for k, sample in enumerate(samples)])
    return made, sum(groups, []), {name: torch.tensor([[one[name] for one in group] for group in rewards]) for name in rewards[0][0]}


def whole_groups(prompts: list, made: M.Completions, own: config.GRPO):
    """The micro-batches of a rollout: (own.micro_prompts of the prompts, the rows of their completions, the length of the longest of these)."""
    for k in range(0, len(prompts), own.micro_prompts):
        rows = slice(k * own.group_size, (k + own.micro_prompts) * own.group_size)
        yield prompts[k : k + own.micro_prompts], rows, int(made.lengths[rows].max())


@torch.no_grad()
def reference_logprobs(reference, processor, prompts: list, made: M.Completions, own: config.GRPO) -> torch.Tensor:
    """log pi_ref(y_t) of a rollout [P * G, T], in the micro-batches of the update."""
    scored = torch.zeros_like(made.logprobs)
    for some, rows, width in whole_groups(prompts, made, own):
        scored[rows, :width] = M.completion_logprobs(reference, processor, some, made.ids[rows, :width], made.lengths[rows], own.temperature)
    return scored


def update(model, processor, optimizer, prompts: list, made: M.Completions, advantages: torch.Tensor, ref_logprobs, own: config.GRPO,
           replayed: list = ()) -> dict:
    """One optimiser step on a rollout, in micro-batches of whole groups. Prompts, completions and advantages [P, G] are those of this process;
    `replayed`, SFT examples whose loss is added, are those of all. Returns the update's metrics."""
    mask, totals = made.mask, {}
    advantages = advantages.flatten().to(made.ids.device)  # [P * G]
    counts = config.gather([(len(mask), int(mask.sum()))])  # of every process: denominators are those of the whole update
    rollouts, tokens = sum(n for n, _ in counts), sum(n for _, n in counts)
    for some, rows, width in whole_groups(prompts, made, own):
        logprobs, entropy = M.completion_logprobs(model, processor, some, made.ids[rows, :width], made.lengths[rows], own.temperature,
                                                  with_entropy=True)
        # With one update per rollout the policy has not moved since it sampled: pi_old = pi, exactly.
        old = logprobs.detach() if own.updates_per_rollout == 1 else made.logprobs[rows, :width]
        ref = None if ref_logprobs is None else ref_logprobs[rows, :width]
        loss, metrics = grpo_loss(logprobs, old, ref, advantages[rows], mask[rows, :width], own.clip_low, own.clip_high,
                                  own.beta, own.kl, own.normalise, rollouts, tokens, own.max_new_tokens)
        loss.backward()
        metrics |= {"loss": loss.item(), "entropy": entropy.sum().item() / tokens, "length": made.lengths[rows].sum().item() / rollouts,
                    "truncated_share": made.truncated[rows].sum().item() / rollouts}
        totals = {name: totals.get(name, 0.0) + value for name, value in metrics.items()}
    if replayed:
        totals["replay_loss"], _ = add_gradients(model, processor, replayed, own.micro_tokens)
    return finish_update(optimizer, totals, own)


# ------------------------------------------------------------------------------------------------------------------ stage

def training_samples(own: config.GRPO, out: Path) -> list:
    files = {"wrong": "rejection/wrong.jsonl", "correct": "rejection/correct.jsonl", "pool": "data/pool.jsonl"}
    samples = data.read_samples(out / files[own.data])
    if not samples:
        raise config.UserError(f"{out / files[own.data]} is empty, so there is nothing to train on: enlarge the pool, or set grpo.data to pool")
    if own.dimension_weight and not all(sample.scores for sample in samples):
        raise config.UserError("dimension_weight needs the true scores of every pair, which only the small world knows; set it to 0")
    if own.mode == "answer" and (own.consistency_weight or own.dimension_weight or own.gated):
        raise config.UserError("mode answer has no reasoning that consistency_weight, dimension_weight or gated could look at; leave them out")
    return samples


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    own, out = getattr(settings, stage), folder.parent
    samples = training_samples(own, out)
    start = stages.checkpoint(own.start, settings, out)
    processes, replay = config.world()[1], round(own.replay * own.prompts_per_step) or int(own.replay > 0)
    if own.prompts_per_step < processes or (settings.run.shard and (own.prompts_per_step % processes or replay % processes)):
        raise config.UserError(f"prompts_per_step = {own.prompts_per_step}" + f", with {replay} replayed," * (replay > 0) + " cannot be dealt out to "
                               f"{processes} processes" + f": run.shard needs a multiple of {processes}" * settings.run.shard)
    model, processor = M.load(start, shard=settings.run.shard)
    device = M.device_of(model)
    waits = "cpu" if own.offload else device  # where the reference is while it does not score
    reference = M.load(start, shard=settings.run.shard)[0].to(waits) if own.beta else None
    optimizer = optimizer_for(model, own)
    turn = lambda sample, rng: sample.swapped() if own.random_order and sample.can_swap and rng.random() < 0.5 else sample
    drawn = batches(samples, own.prompts_per_step, f"{settings.run.seed}/{stage}", turn)
    practice = practice_examples(stage, settings, folder, replay * own.steps) if replay else []
    drawn = zip(drawn, batches(practice, replay, f"{settings.run.seed}/{stage}/replay"))  # without replay, an empty list beside each batch
    style = stages.style(own.mode, settings, out, stage)
    # One batch a step, whatever the step does with it: a run that goes on after a stop skips as many as there were steps.
    for step, (batch, replayed) in steps_to_go(drawn, own.steps, stage, folder, model, optimizer, own.save_minutes):
        clock, mine = [time.time()], config.share(batch)  # the prompts of this process; all of them, where it is the only one
        prompts = encode_prompts(processor, model, mine, own.mode, style)
        draw = random.Random(f"{settings.run.seed}/{stage}/{step}")  # what is sampled depends on step and prompt, not on the process
        seeds = config.share([draw.getrandbits(32) for _ in batch])
        made, texts, rewards = rollout(model, processor, mine, own, prompts, seeds)
        total = total_reward(rewards, own)  # [P, G]
        advantages = group_advantages(total, own.scale_by_std)
        clock.append(time.time())
        ref_logprobs = None
        if reference is not None:
            ref_logprobs = reference_logprobs(reference.to(device), processor, prompts, made, own)
            reference.to(waits)
        clock.append(time.time())
        optimizer.param_groups[0]["lr"] = rate = learning_rate(step, own.steps, own.lr, own.warmup)
        updates = [update(model, processor, optimizer, prompts, made, config.share(advantages), ref_logprobs, own, replayed)
                   for _ in range(own.updates_per_rollout)]
        metrics = updates[-1] | {"skipped": sum(one["skipped"] for one in updates)}
        clock.append(time.time())
        means = {f"reward_{name}": reward.mean().item() for name, reward in rewards.items()}
        row = {"step": step + 1, "reward": total.mean().item()} | means | metrics | {
            "zero_variance_share": (advantages == 0).all(1).float().mean().item(), "reward_std": total.std(1).mean().item(),
            "lr": rate, "seconds_rollout": clock[1] - clock[0], "seconds_reference": clock[2] - clock[1], "seconds_update": clock[3] - clock[2]}
        config.log(folder, {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()})
        config.say(f"   step {step + 1}: accuracy {row['reward_accuracy']:.2f}, format {row['reward_format']:.2f}, "
                   f"KL {row['kl']:.4f}, {row['length']:.0f} tokens")
        shown = step % len(batch)  # one whole group a step, to be read
        sample, group = batch[shown], slice(shown * own.group_size, (shown + 1) * own.group_size)
        config.log(folder, {"step": step + 1, "id": sample.id, "task": sample.task, "label": sample.label, "prompt": sample.prompt or sample.problem,
                            "answers": sample.answers, "completions": texts[group], "rewards": total[shown].tolist(),
                            "advantages": advantages[shown].tolist()}, "samples.jsonl")
        if step % max(1, own.steps // 5) == 0:
            config.say(f"   {sample.id}, label {sample.label}, reward {total[shown, 0]:g}: {texts[group][0]}")
    M.save(model, processor, folder)
    config.wait_for_all()  # all rows are there
    rewards = [row["reward_accuracy"] for row in data.read_jsonl(folder / "metrics.jsonl")]
    span = max(1, min(own.steps // 2, round(len(samples) / own.prompts_per_step)))  # as many steps as a pass takes, from either end
    first, last = (sum(some) / span for some in (rewards[:span], rewards[-span:]))
    return (f"{own.steps} steps of {own.prompts_per_step} x {own.group_size} completions on {len(samples)} samples; "
            f"accuracy reward {first:.2f} in the first {span} steps, {last:.2f} in the last {span}")


if __name__ == "__main__":
    stages.main("grpo")
