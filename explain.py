"""--explain: one batch of a stage as a person would draw it, printed instead of running the stage, of which nothing is written; the
stages before it are run where they are missing.

    python sft.py --config small --stage cold_start --explain          tokens, which of them are learnt, the loss of each
    python rejection.py --config small --explain                       what the judge wrote, what was read from it, where it goes
    python grpo.py --config small --explain                            one group: rewards, advantages, and one update token by token
"""

import itertools
from pathlib import Path

import torch

import config
import data
import distill
import grpo
import model as M
import rejection
import sft
import stages


def pieces(processor, ids) -> list:
    """What each token stands for, as it can stand in a line."""
    return [repr(processor.tokenizer.decode([token]))[1:-1] for token in ids]


def prompt_line(processor, ids) -> str:
    """A prompt's tokens with | between them, a run of equal ones (placeholders of an image) as one."""
    runs = [(piece, len(list(equal))) for piece, equal in itertools.groupby(pieces(processor, ids))]
    return "|".join(piece + (f" x {count}" if count > 1 else "") for piece, count in runs)


@torch.no_grad()
def explain_sft(stage: str, settings: config.Settings, out: Path) -> None:
    """A batch's denominator, and one example token by token with its loss under the model that the stage starts from."""
    if stage == "base":
        raise config.UserError("--explain shows the later stages; the base's exercises are in base/*.jsonl after --base.rebuild true")
    own, (start, examples) = getattr(settings, stage), sft.start_and_examples(stage, settings, out)
    model, processor = M.load(start)
    batch = next(sft.batches(examples, own.batch_size, f"{settings.run.seed}/{stage}"))
    batch = [sft.encode_example(processor, model, example) for example in batch]
    tokens, first = sum(len(e["ids"]) - e["prompt_length"] for e in batch), batch[0]
    inputs = M.collate([first], "right", processor.tokenizer.pad_token_id, M.device_of(model))
    logprobs = model(**inputs, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    losses = -logprobs.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]  # [L - 1]: of the token after each
    mask = sft.response_mask([first], len(first["ids"]))[0].tolist()
    print(f"{stage} starts from {start}; a batch of {len(batch)} of its {len(examples)} examples has {tokens} response tokens,\n"
          f"by which every gradient is divided (replayed exercises, which the stage mixes in, are left out here)\n")
    print(f"prompt, not learnt:\n{prompt_line(processor, first['ids'][: first['prompt_length']])}\n")
    print(f"{'position':>8}  {'token':<16}{'learnt':>7}{'-log p':>8}")
    for k, piece in enumerate(pieces(processor, first["ids"])):
        if k >= first["prompt_length"] - 1:
            print(f"{k:>8}  {piece:<16}{'yes' if mask[k] else 'no':>7}{losses[k - 1].item():>8.3f}")
    mine = losses[first["prompt_length"] - 1 :]
    print(f"\nits part of the loss: {mine.sum():.3f} / {tokens} = {mine.sum() / tokens:.5f}; mean over its own {len(mine)} tokens {mine.mean():.3f}")


def explain_rejection(stage: str, settings: config.Settings, out: Path) -> None:
    """One pair of each task, judged once."""
    samples, own = data.read_samples(out / "data" / "pool.jsonl"), settings.rejection
    drawn = list(zip(samples, rejection.seeds(samples, settings)))
    samples, seeds = zip(*[next(one for one in drawn if one[0].task == task) for task in data.TASKS if any(s.task == task for s in samples)])
    model, processor = M.load(stages.checkpoint("cold_start", settings, out))
    prompts = [data.build_prompt(sample, "think") for sample in samples]
    texts = distill.generate_texts(model, processor, prompts, own, data.THINK, temperature=own.temperature, seeds=seeds)
    for sample, text in zip(samples, texts):
        verdict = data.parse_verdict(text, sample.task)
        good, by_chance = distill.why_dropped(text, sample, own.select == "consistent") is None, own.select == "random"
        goes = " and ".join(["wrong.jsonl -> GRPO"] * (not good) + ["correct.jsonl -> SFT" + ", by chance" * by_chance] * (good or by_chance))
        print(f"{sample.task}, {sample.id}: {sample.prompt or sample.problem}")
        print("".join(f"  {k}. {answer}\n" for k, answer in enumerate(sample.answers, 1)) + text)
        print(f"format {'kept' if verdict.format_ok else 'broken'}, says {verdict.answer}, the label is {sample.label}: {goes}\n")


def explain_grpo(stage: str, settings: config.Settings, out: Path) -> None:
    """The first group of unequal rewards: its advantages, and what one update with it alone changes in its best completion."""
    own = getattr(settings, stage)
    samples, start = grpo.training_samples(own, out), stages.checkpoint(own.start, settings, out)
    model, processor = M.load(start)
    optimizer = sft.optimizer_for(model, own)
    for sample in samples[:32]:
        prompts = grpo.encode_prompts(processor, model, [sample], own.mode, stages.style(own.mode, settings, out, stage))
        made, texts, rewards = grpo.rollout(model, processor, [sample], own, prompts, [settings.run.seed])
        total = grpo.total_reward(rewards, own)
        if total.unique().numel() > 1:
            break
    else:
        print(f"none of the first {len(samples[:32])} groups has unequal rewards; this is the last, and only the KL penalty moves it\n")
    advantages = grpo.group_advantages(total, own.scale_by_std)
    print(f"{sample.task}, {sample.id}, label {sample.label}\nprompt:\n{prompt_line(processor, prompts[0]['ids'])}\n")
    print(f"{'completion':>10}{''.join(f'{name:>13}' for name in rewards)}{'R':>8}{'A':>8}   says")
    for k, text in enumerate(texts):
        says = data.parse_verdict(text, sample.task).answer
        print(f"{k + 1:>10}{''.join(f'{reward[0, k]:>13.3g}' for reward in rewards.values())}{total[0, k]:>8.2f}{advantages[0, k]:>+8.2f}   {says}")
    print(f"\nmean R {total.mean():.3f}, std {total.std():.3f}: A = {'(R - mean) / (std + 1e-4)' if own.scale_by_std else 'R - mean'}"
          + " (gated: accuracy counts where consistency is 1)" * own.gated)
    best = int(advantages.argmax())
    score = torch.no_grad()(lambda: M.completion_logprobs(model, processor, prompts, made.ids, made.lengths, own.temperature))
    old = score()  # before its first update the policy is its own reference
    optimizer.param_groups[0]["lr"] = own.lr
    metrics = grpo.update(model, processor, optimizer, prompts, made, advantages, old, own)
    new = score()
    ratio, kl = (new - old).exp(), grpo.kl_estimate(new, old, own.kl)
    print(f"\none update with this group alone, lr {own.lr:g}: loss {metrics['loss']:+.2e}, whose value says nothing, "
          f"gradient norm {metrics['grad_norm']:.3f}\ncompletion {best + 1}, A = {advantages[0, best]:+.2f}; "
          f"ratio = new / old probability, clipped outside [{1 - own.clip_low:g}, {1 + own.clip_high:g}]\n")
    print(f"{'token':<18}{'old p':>8}{'new p':>8}{'ratio':>8}{own.kl + ' to reference':>18}")
    for k, piece in enumerate(pieces(processor, made.ids[best, : made.lengths[best]].tolist())):
        print(f"{piece:<18}{old[best, k].exp():>8.4f}{new[best, k].exp():>8.4f}{ratio[best, k]:>8.4f}{kl[best, k]:>18.2e}")


def explain(stage: str, settings: config.Settings, out: Path) -> None:
    {"sft": explain_sft, "rejection": explain_rejection, "grpo": explain_grpo}[stages.STAGES[stage][0]](stage, settings, out)
