"""Stage 1a, distillation: a teacher writes the reasoning, and only what agrees with the human label is kept.

Paper, section 4.1: about 10K image generation pairs go to GPT-4o; the 5.5K answers whose verdict equals the label become the cold start
data. Image generation alone: the format is meant to carry over to the other tasks by itself (claim C4).

Departure from the paper: the teacher of the small world is a script that knows every scene, writes its reasoning from the known facts, and errs at
a set rate, so that the filter has work to do. The paper's teacher is one setting away; it is shown the pair and never the label.

    python distill.py --config small
    OPENAI_API_KEY=... python distill.py --config small --distill.teacher gpt-4o --distill.max_cost 5
"""

import base64
import hashlib
import io
import json
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

import config
import data
import model as M
import stages
from media import read_image


def scripted_teacher(sample: data.Sample, rng: random.Random, error_rate: float, with_scores: bool) -> str:
    """Reasoning from the known facts. With probability `error_rate` one fact is misjudged; its score, the sums and the verdict follow
    from the wrong fact, as they do when a real teacher looks carelessly. Without scores the facts and the verdict are all that is written."""
    import shapes

    reasons = {dimension: list(pair) for dimension, pair in sample.reasons.items()}
    if rng.random() < error_rate:
        dimension, k = rng.choice(list(reasons)), rng.randrange(2)
        reasons[dimension][k] = shapes.mistake(rng, dimension, reasons[dimension][k])
    scores = {dimension: [shapes.score_of(dimension, fact) for fact in pair] for dimension, pair in reasons.items()}
    totals = [sum(pair[k] for pair in scores.values()) for k in (0, 1)]
    winner = 1 if totals[0] > totals[1] else 2 if totals[0] < totals[1] else rng.choice([1, 2])
    text = data.write_reasoning(sample.task, reasons, scores, data.verdict_string(sample.task, winner))
    return text if with_scores else re.sub(r" \(\d+/10\)|\nTotal score:.*(?=</think>)", "", text)


def why_dropped(reply: str, sample: data.Sample, reasoned: bool = False) -> str | None:
    """The consistency filter: None keeps the reply, which is well-formed and agrees with the label; if `reasoned`, for reasons that lead to it."""
    verdict = data.parse_verdict(reply, sample.task)
    if not verdict.format_ok:
        return "malformed"
    if verdict.answer is None:
        return "no readable verdict"
    if verdict.answer != sample.label:
        return f"says {verdict.answer}, the label is {sample.label}"
    return "the verdict does not follow from sums that add up" if reasoned and not verdict.consistent else None


def run(stage: str, settings: config.Settings, folder: Path) -> str:
    own, samples = settings.distill, data.read_samples(folder.parent / "data" / "distill.jsonl")
    rng, kept, dropped = random.Random(f"{settings.run.seed}/teacher"), [], []
    if missing := [s.id for s in samples if not {"scripted": s.reasons, "given": s.response}.get(own.teacher, True)]:
        raise config.UserError(f"the {own.teacher} teacher knows nothing of {missing[0]}; ask a served one, for instance --distill.teacher gpt-4o")
    if own.teacher in ("scripted", "given"):  # the latter: SFT rows that have their reasoning already
        write = lambda sample: sample.response if own.teacher == "given" else scripted_teacher(sample, rng, own.error_rate, own.scores)
        replies = [{"text": write(sample), "finish": "stop"} for sample in config.progress(samples, "teacher")]
    else:
        replies = ask(samples, own, own.base_url, own.teacher, folder / "replies.jsonl", temperature=own.temperature, label="teacher")
    for sample, reply in zip(samples, replies):
        text = reply["text"].strip()
        reason = UNFINISHED.get(reply["finish"]) or why_dropped(text, sample)
        row = data.sft_row(sample, text)
        kept.append(row) if reason is None else dropped.append(row | {"dropped": reason})
    data.write_jsonl(folder / "kept.jsonl", kept)
    data.write_jsonl(folder / "dropped.jsonl", dropped)
    why = "".join(f"; {count} {reason}" for reason, count in Counter(row["dropped"] for row in dropped).items())
    return f"the teacher judged {len(samples)} pairs, {len(kept)} agree with the label and are kept, {len(dropped)} dropped{why}"


# ------------------------------------------------------------------------------------------------------ asking a served model

UNFINISHED = {"length": "truncated at max_new_tokens", "content_filter": "stopped by a content filter", "refusal": "refused"}


def ask(samples: list, own: config.Server, url: str, model: str, file: Path, mode: str = "think", temperature: float = 0.0, checkpoint: str = "",
        allow_tie: bool = False, label: str = "asking", style: str = "full") -> list:
    """The reply of the model served as `model` at `url` to each of `samples`: rows with "text" and "finish" (stop, or a key of UNFINISHED).

    Each reply is in `file` once it arrives, under a key of all that shapes it: server, model, sampling, prompt, pixels. Whatever
    ended a run, what is there is never paid for again; with anything changed it is asked anew. `checkpoint` is the fingerprint of one trained
    here, whose turn is begun for it; it is asked for by the name of its stage, so serve it as: vllm serve runs/NAME/grpo --served-model-name grpo"""
    prompts = [data.build_prompt(sample, mode, style, allow_tie) for sample in samples]
    look = lambda image: (hashlib.sha256(b"%d %d " % image.size + image.tobytes()).hexdigest(), image.size)
    shown = [(text, [look(read_image(file)) for file in files]) for text, files in map(data.to_text, prompts)]
    shape = [url, model, checkpoint, mode, temperature, own.max_new_tokens, own.max_side]
    keys = [hashlib.sha256(json.dumps([shape, text, [digest for digest, _ in seen]]).encode()).hexdigest() for text, seen in shown]
    weights = [weight(text, [size for _, size in seen], own.max_side) for text, seen in shown]
    limit = "max_completion_tokens" if "api.openai.com" in url else "max_tokens"  # other servers know the older name
    begun = [{"role": "assistant", "content": data.THINK}] if checkpoint and mode == "think" else []
    request = {"model": model, "temperature": temperature, limit: own.max_new_tokens, "messages": begun}
    if checkpoint:  # for vLLM: the whole distribution, as in model.generate, whatever generation_config.json says; and go on with a turn begun
        request["extra_body"] = dict(top_p=1, top_k=-1, repetition_penalty=1, add_generation_prompt=not begun, continue_final_message=bool(begun))
    if config.is_main():
        asked = {key: (sample.id, parts, heavy) for key, sample, parts, heavy in zip(keys, samples, prompts, weights)}
        fetch(asked, own, url, request, file, label)
    config.wait_for_all()
    replies = {row["key"]: row for row in read_replies(file)}
    return [replies[key] for key in keys]


def read_replies(file: Path) -> list:
    """Rows of a replies file; a last line that a killed process left torn is cut off, and so asked for again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return data.read_jsonl(file)


def generate_texts(model, processor, prompts: list, own, prefix: str = "", group_size: int = 1, temperature: float = 0.0, seeds=None,
                   label: str = "", file: Path | None = None) -> list:
    """Where nothing is served: `prefix` and what M.generate writes after it to prompts given as content parts. Four batches' worth of them at
    a time for each process: the pixels of 100,000 pairs of 512 x 512 are a terabyte. Their texts are then in `file`, a line for them all,
    and what is there already is not sampled again. The file belongs to these prompts, seeds and settings: whoever names it sees to that."""
    texts, size = [text for row in read_replies(file) for text in row["texts"]] if file else [], 4 * own.batch_rows * config.world()[1]
    config.wait_for_all()  # all have read what the first will now add to
    seeds = seeds or range(len(prompts))
    for k in range(len(texts) // group_size, len(prompts), size):
        place = f", from {k} of {len(prompts)}" if label and len(prompts) > size else ""
        encoded = [M.encode(processor, model, parts, prefix) for parts in config.share(prompts[k : k + size])]
        made = M.generate(model, processor, encoded, group_size, own.max_new_tokens, temperature, own.batch_rows,
                          config.share(seeds[k : k + size]), label + place)
        some = [prefix + processor.text(ids[:length]) for ids, length in zip(made.ids, made.lengths)]
        groups = config.gather([some[row : row + group_size] for row in range(0, len(some), group_size)])
        some = [text for group in groups for text in group]
        if file:
            config.log(file.parent, {"texts": some}, file.name)
        texts += some
    return texts


def weight(text: str, sizes: list, max_side: int) -> float:
    """What a prompt with pictures of these sizes costs beside another, as servers count: a token for 1,000 pixels or 4 letters, and some 64 for the
    least of pictures."""
    return len(text) / 4 + sum(64 + width * height * min(1.0, max_side / max(width, height)) ** 2 / 1000 for width, height in sizes)


def fetch(asked: dict, own: config.Server, url: str, request: dict, file: Path, label: str) -> None:
    """Appends to `file` a row for each of `asked`, {key: (sample id, content parts, weight)}, that it lacks; own.concurrency requests at a time.
    After a problem, or when max_cost could be passed, nothing new is sent, but what is under way is waited for and kept."""
    secret = os.environ.get(own.key_variable, "").strip()
    if own.key_variable and not secret:
        raise config.UserError(f"the environment variable {own.key_variable} is to hold the key of {url}, and is not set")
    if not secret.isascii() or re.search(r"\s", secret) or not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?(/\S*)?", url):
        raise config.UserError(f"{url!r} is to be http(s)://HOST[:PORT]/PATH, and the key in {own.key_variable or 'no variable'} plain ASCII")
    told = secret if len(secret) > 15 else "\0"  # "none" or "1", which servers of one's own take, stand in any text
    hide = lambda text: text.encode("utf-8", "replace").decode().replace(told, "[key]")  # a server may send the key back
    client = openai.OpenAI(base_url=url, api_key=secret or "none", max_retries=own.retries, timeout=own.timeout)
    rows, problems, lock = read_replies(file), [], threading.Lock()
    missing = dict.fromkeys(asked.keys() - {row["key"] for row in rows})
    total = lambda name: sum(row[name] for row in rows)
    longest = own.max_new_tokens * own.price_out / 1e6  # what the text of a reply may cost; with it, the dearest prompt so far (others may cost less)
    dearest = lambda: max((max(row["cost"], row["tokens_in"] * own.price_in / 1e6 + longest) for row in rows if row["key"] in asked), default=longest)
    reserve = lambda: own.concurrency * dearest()  # for what is under way

    def one(key: str) -> None:
        sample, parts, _ = asked[key]
        if problems or own.max_cost and total("cost") + reserve() > own.max_cost:
            return
        try:
            content = message_parts(parts, own.max_side, "extra_body" in request)
            row = answer(client, request | {"messages": [{"role": "user", "content": content}] + request["messages"]}, own, url)
        except config.UserError as error:
            return problems.append(hide(f"{f'sample {sample}' if sample else 'the pair'}: {error}"))
        row |= {"key": key, "id": sample, "text": hide("".join(turn["content"] for turn in request["messages"]) + row["text"]),
                "cost": (row["tokens_in"] * own.price_in + row["tokens_out"] * own.price_out) / 1e6}
        with lock, open(file, "ab", buffering=0) as stream:
            stream.write(json.dumps(row).encode() + b"\n")
            os.fsync(stream.fileno())
            rows.append(row)
            del missing[key]
            if len(missing) % (len(asked) // 100 + 1) == 0:
                priced = f", cost {total('cost'):.2f}" * bool(own.price_in or own.price_out)
                print(f"   {label}: {len(missing)} to go, {total('tokens_in')} + {total('tokens_out')} tokens" + priced, flush=True)

    keys = [key for key in asked if key in missing]
    if own.max_cost:  # the dearest first: what is under way then costs no more than what is known
        keys.sort(key=lambda key: -asked[key][2])
    if there := len(asked) - len(keys):
        print(f"   {label}: {there} of {len(asked)} replies are there from before", flush=True)
    if keys:
        print(f"   {label}: asking {hide(url)} for {len(keys)}", flush=True)
    for key in keys if own.max_cost else []:  # what a prompt costs is known from its reply only, and not from that of a filter
        if problems or any(row["finish"] != "content_filter" for row in rows if row["key"] in asked):
            break
        one(key)
    with ThreadPoolExecutor(own.concurrency) as pool:
        list(pool.map(one, [key for key in keys if key in missing]))
    if missing:
        cost = f"cost {total('cost'):.4f}, and {own.concurrency} requests may add {reserve():.4f}: raise max_cost ({own.max_cost})"
        why = (problems or [cost])[0].removesuffix(".")
        raise config.UserError(f"{label}: {len(missing)} replies missing; {why}. The rest is in {file}; the same command goes on")


def answer(client, request: dict, own: config.Server, url: str) -> dict:
    """One reply; it is data, and only parsed. The client itself tries again what may pass (429, 5xx, time limit, broken connection) after
    growing waits or the server's Retry-After; an answer nobody can read is left to us. UserError when in vain and for what will not pass."""
    said = ""
    for attempt in range(own.retries + 1):
        try:
            said = client.chat.completions.with_raw_response.create(**request).text
            body = json.loads(said)
            choice, usage = body["choices"][0], body.get("usage") or {}
            refusal, content = choice["message"].get("refusal"), choice["message"].get("content")
            content = "".join(part.get("text") or "" for part in content) if isinstance(content, list) else content
            finish = "refusal" if refusal else choice.get("finish_reason")
            return {"text": str(refusal or content or ""), "finish": finish if str(finish) in UNFINISHED else "stop",
                    "tokens_in": int(usage.get("prompt_tokens") or 0), "tokens_out": int(usage.get("completion_tokens", own.max_new_tokens) or 0)}
        except openai.APIError as error:
            if error.code in ("content_filter", "content_policy_violation"):  # some servers judge the prompt before they answer
                return {"text": "", "finish": "content_filter", "tokens_in": 0, "tokens_out": 0}
            status = getattr(error, "status_code", "no answer")
            key = f", with the key in the environment variable {own.key_variable or '(none)'}" if status in (401, 403) else ""
            alone = " - if it takes the other pairs, take this one out of the data" * (status == 400)
            raise config.UserError(f"{url} ({status}{key}): {' '.join(error.message.split())[:300]}{alone}")
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            time.sleep(min(60.0, 0.5 * 2.0**attempt))
    raise config.UserError(f"{url} answers, but not with a chat completion in JSON: {' '.join(said.split())[:200]}")


def message_parts(parts: list, max_side: int, trained_here: bool) -> list:
    """Content parts as the API takes them: pictures as PNG data URLs (JPEG would add artefacts to what is judged) of at most `max_side`
    pixels a side. A clip goes as its frames, one picture each; to a model trained here as one video, in the form vLLM reads frames."""
    made = []
    for part in parts:
        # "<|im_end|>" would end the turn, and "<image>" stand for a picture, where a server reads control tokens out of any text.
        part, pictures = part | {"text": re.sub(r"<(?=\||(image|video)>)", "< ", part.get("text", ""))}, []
        for path in data.to_text([part])[1]:
            image, buffer = read_image(path), io.BytesIO()
            image.thumbnail((max_side, max_side))
            image.save(buffer, "PNG")
            pictures.append(base64.b64encode(buffer.getvalue()).decode())
        if part["type"] == "video" and trained_here:
            made.append({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(pictures)}})
        else:
            made += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}} for picture in pictures] or [part]
    return made


if __name__ == "__main__":
    stages.main("distill")
