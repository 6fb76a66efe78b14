"""The served teacher against a real HTTP server on loopback: every fault a server can have, a killed process, money, and the key."""

import base64
import collections
import dataclasses
import email.utils
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import config
import data
import distill
import evaluate
import model as M
import rejection
import shapes
import stages

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-loopback-5f2c9a7e41"
os.environ["NO_PROXY"] = "127.0.0.1"


def completion(text, finish="stop", refusal=None, tokens=(1000, 200)) -> dict:
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def pictures(body: dict) -> list:
    """The pixels of all pictures of a request, in order."""
    found = []
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            head, _, coded = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            found.append(coded)
        elif part["type"] == "video_url":
            head, *coded = part["video_url"]["url"].split(",")
            assert head == "data:video/jpeg;base64"
            found += coded
    return [Image.open(io.BytesIO(base64.b64decode(coded))).convert("RGB").tobytes() for coded in found]


def pixels(sample) -> tuple:
    return tuple(Image.open(path).convert("RGB").tobytes() for item in sample.media for path in data.flat(item))


class Server(ThreadingHTTPServer):
    """Answers as `behave(attempt, sample, body)` says: attempts count from 0 per sample. It returns a dict (a completion), or a function
    that does with the handler what it likes. `seen`: one row per request."""

    daemon_threads = True

    def __init__(self, samples, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.samples, self.behave = {(pixels(s), s.prompt): s for s in samples}, behave
        self.seen, self.lock, self.busy, self.most_busy = [], threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    def asked(self, since: int = 0) -> collections.Counter:
        return collections.Counter(row["id"] for row in self.seen[since:])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def send(self, status: int, content: bytes, headers=(), length=None) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content) if length is None else length)), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        text = "".join(part.get("text", "") for part in body["messages"][0]["content"])
        shown = tuple(pictures(body))
        sample = next(s for (found, prompt), s in server.samples.items() if found == shown and prompt in text)
        with server.lock:
            attempt = server.asked()[sample.id]
            row = {"id": sample.id, "time": time.time(), "body": body, "authorization": self.headers.get("Authorization"), "paid": False}
            server.seen.append(row)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        made = server.behave(attempt, sample, body)
        with server.lock:
            server.busy -= 1
        if callable(made):
            return made(self)
        row["paid"] = True
        self.send(200, json.dumps(made).encode())


@pytest.fixture
def serve():
    """A function (samples, behave) -> running Server."""
    running = []

    def start(samples, behave):
        running.append(Server(samples, behave))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A run folder with data/distill.jsonl: 14 image generation pairs."""
    out = tmp_path_factory.mktemp("teacher")
    (out / "data").mkdir()
    shapes.write_split(out / "data", "distill", [("image_generation", False)] * 14, shapes.SEEN, random.Random(1))
    return out


@pytest.fixture
def run_folder(pairs, tmp_path) -> Path:
    """A fresh distill folder beside the same data."""
    (tmp_path / "data").symlink_to(pairs / "data")
    (tmp_path / "distill").mkdir()
    return tmp_path


def right(sample) -> str:
    return data.write_reasoning(sample.task, sample.reasons, sample.scores, data.verdict_string(sample.task, sample.label))


def teacher(server, **changes) -> config.Settings:
    settings = config.Settings()
    settings.distill = config.Distill(teacher="some-model", base_url=server.url, key_variable="LOOPBACK_KEY", timeout=1.0, concurrency=4, retries=3, **changes)
    return settings


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)


def holds_key(folder: Path) -> list:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


# ----------------------------------------------------------------------------------------------------------------- faults


def test_every_fault_of_a_server_ends_in_one_paid_reply_per_sample_with_its_reason(run_folder, serve, capsys):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    hung = threading.Event()
    once = {  # what the first attempt at a sample meets; the second is answered
        0: lambda handler: handler.send(429, b'{"error": {"message": "slow down"}}', [("Retry-After", "2")]),
        1: lambda handler: handler.send(429, b"{}", [("Retry-After", email.utils.formatdate(time.time() + 3, usegmt=True))]),
        2: lambda handler: handler.send(500, b"oops"),
        3: lambda handler: hung.wait(8),
        4: lambda handler: (handler.send(200, json.dumps(completion("half")).encode()[:40], length=400), setattr(handler, "close_connection", True)),
        5: lambda handler: handler.send(200, b'{"choices": [{"message": '),
        6: lambda handler: handler.send(200, b'{"error": "overloaded"}'),
    }
    always = {
        7: lambda s: completion(None, refusal="I would rather not compare these."),
        8: lambda s: completion(right(s.swapped())),  # a well-formed wrong verdict
        9: lambda s: completion(right(s)[:200], finish="length"),
        10: lambda s: completion("", finish="content_filter"),
        11: lambda s: lambda handler: handler.send(400, b'{"error": {"message": "filtered", "code": "content_filter"}}'),
        12: lambda s: completion("Image 1, clearly. \ud800"),  # no format, and half a character that no file can hold
    }

    def behave(attempt, sample, body):
        k = int(sample.id.rsplit("-", 1)[1])
        if k in once and attempt == 0:
            return once[k]
        return always[k](sample) if k in always else completion("\n" + right(sample) + "\n")

    assert [int(s.id.rsplit("-", 1)[1]) for s in samples] == list(range(14))
    server = serve(samples, behave)
    settings = teacher(server, price_in=2.5, price_out=10.0)
    made = distill.run("distill", settings, run_folder / "distill")
    hung.set()

    kept, dropped = data.read_jsonl(run_folder / "distill" / "kept.jsonl"), data.read_jsonl(run_folder / "distill" / "dropped.jsonl")
    number = lambda row: int(row["id"].rsplit("-", 1)[1])
    assert [number(row) for row in kept] == [0, 1, 2, 3, 4, 5, 6, 13]
    by_id = {s.id: s for s in samples}
    assert all(row["conversations"][1]["value"] == right(by_id[row["id"]]) for row in kept)
    wrong = samples[8]
    assert {number(row): row["dropped"] for row in dropped} == {
        7: "refused", 8: f"says {3 - wrong.label}, the label is {wrong.label}", 9: "truncated at max_new_tokens", 10: "stopped by a content filter",
        11: "stopped by a content filter", 12: "malformed"}
    assert "8 agree" in made and "; 2 stopped by a content filter" in made and "; 1 refused" in made and "; 1 truncated at max_new_tokens" in made

    assert {number({"id": name}): count for name, count in server.asked().items()} == {k: 2 if k in once else 1 for k in range(14)}
    assert sum(row["paid"] for row in server.seen) == 13  # all but the prompt refused with 400: each sample's reply was made once
    times = lambda k: [row["time"] for row in server.seen if row["id"] == samples[k].id]
    assert 2.0 <= times(0)[1] - times(0)[0] < 3.5
    assert times(1)[1] - times(1)[0] >= 1.9  # a date has whole seconds
    assert 1.0 <= times(3)[1] - times(3)[0] < 4  # its time limit, not the 8 s of the hang

    rows = data.read_jsonl(run_folder / "distill" / "replies.jsonl")
    assert len({row["key"] for row in rows}) == len(rows) == 14
    assert sum(row["tokens_in"] for row in rows) == 13_000 and sum(row["cost"] for row in rows) == pytest.approx((13_000 * 2.5 + 13 * 200 * 10) / 1e6)
    assert f"0 to go, 13000 + 2600 tokens, cost {13 * 0.0045:.2f}" in capsys.readouterr().out

    distill.run("distill", settings, run_folder / "distill")
    assert len(server.seen) == 21  # nothing was asked again


def test_requests_are_made_side_by_side_up_to_the_bound(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    server = serve(samples, lambda attempt, s, body: time.sleep(0.2) or completion(right(s)))
    distill.run("distill", teacher(server), run_folder / "distill")
    assert server.most_busy == 4


def test_what_will_not_pass_is_one_line_after_one_request_and_says_where_the_key_comes_from(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    echo = lambda status: lambda attempt, sample, body: lambda handler: handler.send(
        status, json.dumps({"error": {"message": f"no:\n{handler.headers['Authorization']}"}}).encode())
    for status, says in ((401, "LOOPBACK_KEY"), (403, "LOOPBACK_KEY"), (400, "(400)"), (404, "(404)")):
        server = serve(samples, echo(status))
        settings = teacher(server)
        settings.distill.concurrency = 1
        with pytest.raises(config.UserError) as caught:
            distill.run("distill", settings, run_folder / "distill")
        assert says in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value) and "Bearer [key]" in str(caught.value)
        assert len(server.seen) == 1 and server.seen[0]["authorization"] == f"Bearer {KEY}"
    os.environ.pop("LOOPBACK_KEY")
    with pytest.raises(config.UserError, match="LOOPBACK_KEY .* is not set"):
        distill.run("distill", settings, run_folder / "distill")


def test_a_server_that_stays_broken_ends_the_run_and_loses_nothing(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    broken = True
    server = serve(samples, lambda attempt, s, body: (lambda handler: handler.send(503, b"{}")) if broken and s.id == samples[5].id else completion(right(s)))
    settings = teacher(server)
    settings.distill.concurrency, settings.distill.retries, settings.distill.max_cost = 1, 1, 0.0  # without a limit they are asked in their order
    with pytest.raises(config.UserError, match="9 replies missing; sample .*5: .*503"):
        distill.run("distill", settings, run_folder / "distill")
    assert server.asked() == {s.id: 1 if k < 5 else 2 for k, s in enumerate(samples[:6])}
    broken, before = False, len(server.seen)
    distill.run("distill", settings, run_folder / "distill")
    assert server.asked(before) == {s.id: 1 for s in samples[5:]}
    assert len(data.read_jsonl(run_folder / "distill" / "kept.jsonl")) == 14
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings.distill.base_url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(config.UserError, match="Connection error"):
        distill.run("distill", settings, run_folder / "distill")


def test_a_torn_last_line_is_asked_again_and_the_others_are_not(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    server = serve(samples, lambda attempt, s, body: completion(right(s)))
    settings, file = teacher(server), run_folder / "distill" / "replies.jsonl"
    distill.run("distill", settings, run_folder / "distill")
    for cut in (1, 30):  # only the newline is missing; half the line is
        whole, before = file.read_bytes(), len(server.seen)
        torn = json.loads(whole.splitlines()[-1])["id"]
        file.write_bytes(whole[:-cut])
        distill.run("distill", settings, run_folder / "distill")
        assert server.asked(before) == {torn: 1}
        assert sorted(row["id"] for row in data.read_jsonl(file)) == sorted(s.id for s in samples)


# --------------------------------------------------------------------------------------------------- a process that is killed


def test_a_killed_run_goes_on_where_it_was_and_the_key_is_nowhere(tmp_path, serve):
    """The script itself: kill -9 among its requests, then again to the end; the server sends the key back in every reply."""
    out, sizes = tmp_path / "run", {"distill_pairs": 12, "pool_pairs": 1, "test_pairs": 1, "heldout_pairs": 1, "tie_pairs": 1}
    stages.do_stage("data", config.load_settings("smoke", [(f"data.{name}", str(value)) for name, value in sizes.items()]), out, "")
    samples = data.read_samples(out / "data" / "distill.jsonl")
    slow = 0.4
    server = serve(samples, lambda attempt, s, body: time.sleep(slow) or completion(right(s).replace("<think>", f"<think>{KEY} ", 1)))
    command = [sys.executable, "distill.py", "--config", "smoke", "--out", str(out), *[f"--data.{name}={value}" for name, value in sizes.items()], "--distill.teacher", "some-model", "--distill.base_url", server.url,
               "--distill.key_variable", "LOOPBACK_KEY", "--distill.concurrency", "2"]
    with open(tmp_path / "killed.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        file = out / "distill" / "replies.jsonl"
        while not file.is_file() or file.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, (tmp_path / "killed.log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1.0)  # what the server was still writing
    survived = {json.loads(line)["id"] for line in file.read_bytes().split(b"\n")[:-1]}
    first = server.asked()
    assert 5 <= len(survived) <= 7 and len(first) <= len(survived) + 2 and set(first.values()) == {1}

    slow, before = 0.0, len(server.seen)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert server.asked(before) == {s.id: 1 for s in samples if s.id not in survived}  # the least there can be
    rows = data.read_jsonl(file)
    assert sorted(row["id"] for row in rows) == sorted(s.id for s in samples) and len({row["key"] for row in rows}) == 12
    kept, dropped = data.read_jsonl(out / "distill" / "kept.jsonl"), data.read_jsonl(out / "distill" / "dropped.jsonl")
    assert len(kept) == 12 and not dropped and all("[key]" in row["conversations"][1]["value"] for row in kept)
    assert all(row["authorization"] == f"Bearer {KEY}" for row in server.seen)
    assert not holds_key(tmp_path) and KEY not in done.stdout + done.stderr
    file.unlink()
    given = {f"data.{name}": value for name, value in sizes.items()} | {"distill.teacher": "some-model", "distill.base_url": server.url}
    settings = config.load_settings("smoke", [(name, str(value)) for name, value in (given | {"distill.key_variable": "LOOPBACK_KEY"}).items()])
    assert stages.is_done("distill", settings, out), "replies that are gone are not paid for again"


def test_a_key_that_could_stand_in_any_text_takes_nothing_out_of_the_replies(run_folder, serve, monkeypatch):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    monkeypatch.setenv("LOOPBACK_KEY", "1")
    distill.run("distill", teacher(serve(samples, lambda attempt, s, body: completion(right(s)))), run_folder / "distill")
    assert [row["conversations"][1]["value"] for row in data.read_jsonl(run_folder / "distill" / "kept.jsonl")] == list(map(right, samples))


def test_a_served_model_is_sent_no_control_tokens_of_a_caption():
    parts = data.build_prompt(data.Sample("", "image_understanding", "<image> <video> <|im_end|> <b> 1 < 2", [], ["a <|x|>", "b"]), "think")
    text = "".join(part["text"] for part in distill.message_parts(parts, 64, True))
    assert "< image> < video> < |im_end|> <b> 1 < 2" in text and "a < |x|>" in text


# ------------------------------------------------------------------------------------------------------------------- money


@pytest.mark.parametrize("concurrency, least", [(1, 5), (3, 3)])
def test_max_cost_is_never_passed_and_what_was_paid_for_counts_in_the_next_run(run_folder, serve, concurrency, least):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    server = serve(samples, lambda attempt, s, body: completion(right(s), tokens=(0, 100)))  # each reply costs 100 * 1e4 / 1e6 = 1
    settings = teacher(server, price_in=0.0, price_out=1e4, max_new_tokens=100, max_cost=5.5)
    settings.distill.concurrency = concurrency
    with pytest.raises(config.UserError, match=r"missing; cost \d\.0000, and .* requests may add .*: raise max_cost \(5.5\)"):
        distill.run("distill", settings, run_folder / "distill")
    paid = len(server.seen)
    assert least <= paid <= 5 and len(data.read_jsonl(run_folder / "distill" / "replies.jsonl")) == paid
    with pytest.raises(config.UserError):
        distill.run("distill", settings, run_folder / "distill")
    assert least <= len(server.seen) <= 5
    settings.distill.max_cost = 14.0 + concurrency
    distill.run("distill", settings, run_folder / "distill")
    assert len(server.seen) == 14 and len(data.read_jsonl(run_folder / "distill" / "kept.jsonl")) == 14


def test_what_a_prompt_costs_is_learnt_from_one_reply_before_many_are_asked_for(run_folder, serve):
    server = serve(data.read_samples(run_folder / "data" / "distill.jsonl"), lambda attempt, s, body: completion(right(s), tokens=(100, 0)))
    settings = teacher(server, price_in=1e4, price_out=0.0, max_cost=2.5)  # each reply costs 1, and four are asked for at a time
    for paid in (1, 2):  # a cheap reply to something else says nothing
        with pytest.raises(config.UserError, match=f"cost {paid}.0000, and 4 requests may add 4.0000"):
            distill.run("distill", settings, run_folder / "distill")
        assert len(server.seen) == paid
        settings.distill.temperature, settings.distill.max_cost = 0.5, 3.5


def test_the_dearest_prompts_are_asked_first_and_a_filter_tells_no_price(run_folder, serve):
    """So that what is under way costs no more than what is known."""
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    filtered = lambda handler: handler.send(400, b'{"error": {"message": "no", "code": "content_policy_violation"}}')
    server = serve(samples, lambda attempt, s, body: completion(right(s), tokens=(100, 0)) if len(server.seen) > 2 else filtered)
    settings = teacher(server, price_in=1e4, price_out=0.0, max_cost=2.5)
    with pytest.raises(config.UserError, match="cost 1.0000, and 4 requests may add 4.0000"):
        distill.run("distill", settings, run_folder / "distill")
    lengths = sorted((len(s.prompt) for s in samples), reverse=True)
    assert [len(next(s for s in samples if s.id == row["id"]).prompt) for row in server.seen] == lengths[:3] and lengths[0] > lengths[-1]


def test_of_prompts_with_as_many_pictures_the_largest_are_the_dearest(run_folder, serve):
    """Their longest text has the smallest pictures, for which a server counts a hundredth of the others'."""
    file = run_folder / "data" / "distill.jsonl"
    samples = data.read_samples(file)
    longest = max(samples, key=lambda s: len(s.prompt)).id
    for sample in samples:
        sample.media = [str(run_folder / f"{sample.id}-{k}.png") for k in (0, 1)]
        for k, path in enumerate(sample.media):
            Image.new("RGB", (40, 40) if sample.id == longest else (400, 400), (k, 0, len(sample.prompt))).save(path)
    file.parent.unlink(), file.parent.mkdir()  # a link to what other tests read as well
    data.write_jsonl(file, map(data.sample_row, samples))
    server = serve(samples, lambda attempt, s, body: completion(right(s), tokens=(1 if s.id == longest else 100, 0)))
    with pytest.raises(config.UserError, match="cost 1.0000, and 4 requests may add 4.0000"):
        distill.run("distill", teacher(server, price_in=1e4, price_out=0.0, max_cost=2.5), run_folder / "distill")
    assert len(server.seen) == 1 and server.seen[0]["id"] != longest


def test_a_reply_in_parts_is_their_text_and_what_a_gateway_says_is_said(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    parts = lambda s: [{"type": "text", "text": right(s)[:20]}, {"type": "text", "text": right(s)[20:]}]
    settings = teacher(serve(samples, lambda attempt, s, body: completion(parts(s))))
    assert f"{len(samples)} agree" in distill.run("distill", settings, run_folder / "distill")
    no = lambda handler: handler.send(200, b'{"error": {"message": "out of quota"}}')
    settings = teacher(serve(samples, lambda attempt, s, body: no))
    settings.distill.retries = 0
    with pytest.raises(config.UserError, match="not with a chat completion in JSON: .*out of quota"):
        distill.run("distill", settings, run_folder / "distill")
    no = lambda handler: handler.send(400, b'{"error": {"message": "bad picture", "code": "invalid_image"}}')
    settings = teacher(serve(samples, lambda attempt, s, body: no))
    with pytest.raises(config.UserError, match="bad picture - if it takes the other pairs, take this one out"):
        distill.run("distill", settings, run_folder / "distill")


def test_the_dearest_prompt_may_meet_the_longest_reply(run_folder, serve):
    """The first reply is short; the next may cost 1 for its prompt and 1 more for its text."""
    tokens = lambda server: (100, 100 if len(server.seen) > 1 else 1)
    server = serve(data.read_samples(run_folder / "data" / "distill.jsonl"), lambda attempt, s, body: completion(right(s), tokens=tokens(server)))
    settings = teacher(server, price_in=1e4, price_out=1e4, max_new_tokens=100, max_cost=2.5)
    settings.distill.concurrency = 1
    with pytest.raises(config.UserError, match="cost 1.0100, and 1 requests may add 2.0000"):
        distill.run("distill", settings, run_folder / "distill")
    assert len(server.seen) == 1


def test_a_server_that_counts_no_tokens_is_taken_at_the_dearest(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    server = serve(samples, lambda attempt, s, body: {key: value for key, value in completion(right(s)).items() if key != "usage"})
    settings = teacher(server, price_in=0.0, price_out=1e4, max_new_tokens=100, max_cost=5.5)
    settings.distill.concurrency = 1
    with pytest.raises(config.UserError, match="cost 5.0000"):
        distill.run("distill", settings, run_folder / "distill")
    assert len(server.seen) == 5


# ------------------------------------------------------------------------------------------------------------ what is asked


def test_the_teacher_sees_the_pair_and_neither_label_nor_scores(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")[:3]
    server = serve(samples, lambda attempt, s, body: completion(right(s)))
    settings = teacher(server)
    blind = [data.Sample(s.id, s.task, s.prompt, s.media, label=3 - s.label) for s in samples]
    for k, asked in enumerate((samples, blind)):
        distill.ask(asked, settings.distill, server.url, "some-model", run_folder / f"{k}.jsonl", temperature=0.7)
    bodies = lambda rows: sorted(json.dumps(row["body"], sort_keys=True) for row in rows)
    assert len(server.seen) == 6 and bodies(server.seen[:3]) == bodies(server.seen[3:])
    for row in server.seen[:3]:
        sample = next(s for s in samples if s.id == row["id"])
        expected = data.build_prompt(sample, "think", style="full")
        assert [part["text"] for part in row["body"]["messages"][0]["content"] if part["type"] == "text"] == [part["text"] for part in expected if part["type"] == "text"]
        assert [part["type"].removesuffix("_url") for part in row["body"]["messages"][0]["content"]] == [part["type"] for part in expected]
        assert {k: v for k, v in row["body"].items() if k != "messages"} == {"model": "some-model", "temperature": 0.7, "max_tokens": 2048}
        assert len(row["body"]["messages"]) == 1


def test_a_reply_is_reused_only_for_the_very_same_request(run_folder, serve, tmp_path):
    sample = data.read_samples(run_folder / "data" / "distill.jsonl")[0]
    server, file = serve([sample], lambda attempt, s, body: completion(right(s))), tmp_path / "replies.jsonl"
    own = teacher(server).distill

    def asked(changed=sample, model="some-model", url=server.url, temperature=1.0, checkpoint="", mode="think", **settings) -> int:
        before = len(server.seen)
        server.samples = {(pixels(changed), changed.prompt): changed} if Path(changed.media[0]).is_file() else {}
        reply, = distill.ask([changed], dataclasses.replace(own, **settings), url, model, file, mode, temperature, checkpoint)
        assert data.parse_answer(reply["text"], changed.task) == changed.label
        return len(server.seen) - before

    repainted = Image.open(sample.media[0]).convert("RGB")
    repainted.putpixel((0, 0), (1, 2, 3))
    repainted.save(tmp_path / "repainted.png")
    same_file_elsewhere = tmp_path / "copy.png"
    same_file_elsewhere.write_bytes(Path(sample.media[0]).read_bytes())
    replace = dataclasses.replace
    assert asked() == 1
    assert asked() == asked(concurrency=1) == asked(retries=7) == asked(max_cost=50.0) == 0
    assert asked(replace(sample, id="renamed")) == asked(replace(sample, media=[str(same_file_elsewhere), sample.media[1]])) == 0
    for change in (dict(model="other"), dict(url=server.url.replace("127.0.0.1", "localhost")), dict(temperature=0.5), dict(checkpoint="a"), dict(checkpoint="b"),
                   dict(mode="answer"), dict(max_new_tokens=100), dict(max_side=256), dict(changed=replace(sample, prompt=sample.prompt + " again")),
                   dict(changed=replace(sample, media=[str(tmp_path / "repainted.png"), sample.media[1]])), dict(changed=sample.swapped())):
        assert asked(**change) == 1 and asked(**change) == 0, change
    assert asked() == 0
    with pytest.raises(config.UserError, match="nowhere.png"):
        asked(replace(sample, media=[str(tmp_path / "nowhere.png"), sample.media[1]]))
    both = distill.ask([sample, sample], own, server.url, "some-model", file, temperature=1.0)  # the same request twice is one request
    assert both[0] == both[1]


def test_pictures_are_sent_as_they_are_or_scaled_to_the_limit_and_clips_frame_by_frame(samples, tmp_path):
    Image.effect_noise((300, 100), 80).convert("RGB").save(tmp_path / "wide.png")
    Image.new("RGBA", (10, 40), (9, 8, 7, 255)).save(tmp_path / "tall.png")
    parts = [{"type": "image", "image": str(tmp_path / "wide.png")}, {"type": "text", "text": "between"}, {"type": "image", "image": str(tmp_path / "tall.png")}]
    sent = lambda side: [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))) for part in distill.message_parts(parts, side, False)
                         if part["type"] == "image_url"]
    assert [image.size for image in sent(150)] == [(150, 50), (10, 40)] and [image.size for image in sent(300)] == [(300, 100), (10, 40)]
    assert sent(300)[0].tobytes() == Image.open(tmp_path / "wide.png").tobytes() and sent(20)[1].size == (5, 20)
    clip = next(s for s in samples if s.task == "video_generation")
    for trained_here, kinds in ((False, {"image_url": 8}), (True, {"video_url": 2})):
        made = distill.message_parts(data.build_prompt(clip, "think"), 1024, trained_here)
        assert collections.Counter(part["type"] for part in made if part["type"] != "text") == kinds
        assert tuple(pictures({"messages": [{"content": made}]})) == pixels(clip)


# -------------------------------------------------------------------------------------------------- checkpoints that are served


@pytest.fixture
def pool_folder(world, tmp_path):
    """A run folder whose pool is to be judged by a cold-started model."""
    (tmp_path / "data").symlink_to(world)
    (tmp_path / "rejection").mkdir()
    (tmp_path / "cold_start").mkdir()
    (tmp_path / "cold_start" / "done.json").write_text('{"id": "cold_start 1"}')
    pool = tmp_path / "data" / "pool.jsonl"
    pool.write_bytes((world / "pairs.jsonl").read_bytes())
    yield tmp_path
    pool.unlink()


def test_rejection_takes_its_judgements_from_a_server(samples, pool_folder, tmp_path, serve):
    judged_right = {s.id for s in samples[::2]}
    reply = lambda s: right(s if s.id in judged_right else s.swapped()).removeprefix(data.THINK)  # the prompt has opened <think>
    server = serve(samples, lambda attempt, s, body: completion(reply(s)))
    settings = config.Settings()
    settings.rejection = config.Rejection(endpoint=server.url, max_new_tokens=140, temperature=0.9)
    rejection.run("rejection", settings, tmp_path / "rejection")
    correct, wrong = (data.read_jsonl(tmp_path / "rejection" / f"{name}.jsonl") for name in ("correct", "wrong"))
    assert {row["id"] for row in correct} == judged_right and {row["id"] for row in wrong} == {s.id for s in samples} - judged_right
    assert all(row["conversations"][1]["value"].startswith(data.THINK) for row in correct) and all(row["judged"].startswith(data.THINK) for row in wrong)
    for row in server.seen:
        body = row["body"]
        assert body["messages"][1:] == [{"role": "assistant", "content": data.THINK}] and body["continue_final_message"] and not body["add_generation_prompt"]
        assert (body["model"], body["temperature"], body["max_tokens"], body["top_p"], body["top_k"], body["repetition_penalty"]) == ("cold_start", 0.9, 140, 1, -1, 1)
        assert row["authorization"] == "Bearer none"  # no key of anybody's goes to a server that asked for none
    assert server.asked() == {s.id: 1 for s in samples}


def test_what_is_learnt_is_what_was_right_or_also_well_reasoned_or_as_many_by_chance(samples, pool_folder, tmp_path, serve):
    wrong, badly = {s.id for s in samples[::3]}, {s.id for s in samples[1::3]}  # the latter with a verdict that their sums do not lead to
    spoil = lambda text: re.sub(r"=(\d+)\.", lambda m: f"={int(m[1]) + 1}.", text)
    reply = lambda s: right(s.swapped()) if s.id in wrong else spoil(right(s)) if s.id in badly else right(s)
    server, settings, ids = serve(samples, lambda attempt, s, body: completion(reply(s).removeprefix(data.THINK))), config.Settings(), {s.id for s in samples}
    for select, learnt, kept_back in (("correct", ids - wrong, wrong), ("consistent", ids - wrong - badly, wrong | badly), ("random", None, wrong)):
        settings.rejection = config.Rejection(endpoint=server.url, select=select)
        rejection.run("rejection", settings, tmp_path / "rejection")
        made, left = ([row["id"] for row in data.read_jsonl(tmp_path / "rejection" / f"{name}.jsonl")] for name in ("correct", "wrong"))
        assert set(left) == kept_back and (set(made) == learnt if learnt else len(made) == len(ids - wrong) and set(made) & wrong and set(made) < ids)


@pytest.mark.parametrize("mode", ["think", "answer"])
def test_a_served_checkpoint_reads_the_prompt_it_was_trained_on(tiny, samples, serve, tmp_path, mode):
    """What a server renders from the request with the checkpoint's own chat template is what model.encode feeds it here."""
    model, processor = tiny
    tokenizer = processor.tokenizer
    server = serve(samples, lambda attempt, s, body: completion("x"))
    distill.ask(samples, config.Evaluate(), server.url, "grpo", tmp_path / "replies.jsonl", mode, checkpoint="0123", style="short")
    for row in server.seen:
        turns = [{"role": turn["role"], "content": turn["content"] if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]}
                 for turn in row["body"]["messages"]]
        for part in turns[0]["content"]:
            part["type"] = part["type"].removesuffix("_url")
        flags = {name: row["body"][name] for name in ("add_generation_prompt", "continue_final_message")}
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, **flags)
        sample = next(s for s in samples if s.id == row["id"])
        encoded = M.encode(processor, model, data.build_prompt(sample, mode), data.THINK if mode == "think" else "")
        ids = [int(t) for k, t in enumerate(encoded["ids"]) if k == 0 or encoded["types"][k] == 0 or encoded["types"][k - 1] == 0]  # one placeholder for each medium
        assert tokenizer.decode(ids) == rendered


def test_evaluate_judges_by_a_server_in_both_orders_and_a_changed_server_makes_nothing_stale(samples, serve, tmp_path):
    both = samples + [s.swapped() for s in samples if data.is_generation(s.task)]
    server = serve(both, lambda attempt, s, body: completion(right(s).removeprefix(data.THINK)))
    where = {"url": server.url, "model": "grpo", "checkpoint": "0123", "file": tmp_path / "replies.jsonl"}
    for asked in (samples, [s.swapped() for s in samples if data.is_generation(s.task)]):
        rows = evaluate.judge(where, None, asked, "think", config.Evaluate())
        assert [row["answer"] for row in rows] == [s.label for s in asked] and all(row["consistent"] and row["scores_right"] == 1 for row in rows)
    assert len(server.seen) == len(both)
    settings, other = config.Settings(), config.Settings()
    other.evaluate = config.Evaluate(endpoint=server.url, served="base,grpo", concurrency=3)
    other.rejection = config.Rejection(endpoint=server.url)
    other.distill = config.Distill(concurrency=2, timeout=9.0, max_cost=1.0)
    assert stages.made_of("evaluate", settings, tmp_path) == stages.made_of("evaluate", other, tmp_path)
    for change in (dict(teacher="x"), dict(base_url="http://x"), dict(temperature=0.1), dict(max_side=9), dict(max_new_tokens=9)):
        other.distill = config.Distill(**change)
        assert stages.made_of("distill", settings, tmp_path) != stages.made_of("distill", other, tmp_path), change


def test_a_benchmark_and_a_pair_are_judged_by_a_server_of_any_model(samples, serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)  # where judge keeps its replies
    sample = next(s for s in samples if s.task == "image_understanding")
    row = {"id": "RLHF-1", "query": sample.prompt, "response": sample.answers, "image": sample.media[0], "human_ranking": [0, 1]}
    (tmp_path / "vl.json").write_text(json.dumps([row]))
    text, endless = "<think>x</think>\n<answer>Answer 1 is better</answer>", (float("inf"), 1)  # a count that is no number is asked again
    server = serve([sample], lambda attempt, s, body: completion(text, tokens=endless if attempt == 0 else (9, 9)))
    served = ["--endpoint", server.url, "--model", "big-72b", "--key-variable", "LOOPBACK_KEY"]
    line = ["--benchmark", "vl_rewardbench", "--path", str(tmp_path / "vl.json"), "--out", str(tmp_path / "vl-72b.json"), *served]
    for _ in range(2):  # the second time nothing is left to ask
        evaluate.command_line("bench", line)
        cell = json.loads((tmp_path / "vl-72b.json").read_text())["metrics"]["hallucination"]
        assert (cell["accuracy"], cell["orders_agree"], cell["pairs"]) == (0.5, 0.0, 1) and len(server.seen) == 3
    assert all(row["body"]["model"] == "big-72b" and row["authorization"] == f"Bearer {KEY}" for row in server.seen) and not holds_key(tmp_path)
    said = capsys.readouterr().out
    assert f": asking {server.url} for 2\n" in said and ": 2 of 2 replies are there from before\n" in said
    pair = ["--task", sample.task, "--prompt", sample.prompt, "--answer", sample.answers[0], "--answer", sample.answers[1], sample.media[0]]
    capsys.readouterr()
    evaluate.command_line("judge", [*pair, *served])
    assert "verdict: Answer 1 is better" in capsys.readouterr().out and len(server.seen) == 4
    for number in (1, 2, 2):  # a checkpoint of a run: named by its stage, its turn begun, asked again after it was trained again
        (tmp_path / "run" / "grpo").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "grpo" / "done.json").write_text(json.dumps({"id": f"grpo {number}"}))
        evaluate.command_line("judge", [*pair, "--json", "--endpoint", server.url, "--model", str(tmp_path / "run" / "grpo")])
        assert json.loads(capsys.readouterr().out)["style"] == "short" and len(server.seen) == 4 + number
    assert server.seen[-1]["body"]["model"] == "grpo" and server.seen[-1]["body"]["messages"][-1] == {"role": "assistant", "content": data.THINK}


def test_a_pair_is_decided_by_both_orders_in_the_numbering_given(samples, serve, tmp_path):
    given = [s for s in samples if data.is_generation(s.task)]
    said = {s.id: replies for s, replies in zip(given, [(1, 2), (2, 1), (1, 1), (2, None), (None, None), (0, None)])}  # shown as given, shown turned
    def reply(attempt, shown, body):
        answer = said[shown.id][shown not in given]
        return completion(f"<think>x</think>\n<answer>{data.verdict_string(shown.task, answer) if answer is not None else 'neither'}</answer>")

    server = serve(given + [s.swapped() for s in given], reply)
    made = evaluate.judge_pairs({"url": server.url, "model": "m", "file": tmp_path / "replies.jsonl"}, None, given)
    assert [row["answer"] for row in made] == [1, 2, 0, 2, None, 0] and len(server.seen) == 12
    assert [row["margin"] for row in made] == [1, -1, 0, -0.5, 0, 0]
    assert [row["votes"] for row in made[1:4]] == [{1: 0, 2: 2, 0: 0, None: 0}, {1: 1, 2: 1, 0: 0, None: 0}, {1: 0, 2: 1, 0: 0, None: 1}]


@pytest.mark.parametrize("change, said", [(dict(base_url="localhost:8000/v1"), "http"), (dict(base_url="http://[::1"), "http"),
                                          (dict(base_url=""), "http"), (dict(key_variable="ODD_KEY"), "ODD_KEY")])
def test_an_address_or_a_key_that_cannot_work_is_said_before_anything_is_sent(run_folder, serve, monkeypatch, change, said):
    server, settings = serve([], None), config.Settings()
    monkeypatch.setenv("ODD_KEY", "schlüssel")
    settings.distill = config.Distill(**dict(teacher="some-model", base_url=server.url, key_variable="LOOPBACK_KEY", retries=8) | change)
    with pytest.raises(config.UserError, match=said) as error:
        distill.run("distill", settings, run_folder / "distill")
    assert "\n" not in str(error.value) and "schlüssel" not in str(error.value) and not server.seen


@pytest.mark.parametrize("error_rate", [0.0, 1.0])
def test_a_teacher_without_scores_writes_the_same_facts_and_verdict(samples, error_rate):
    for sample in samples:
        scored, bare = (distill.scripted_teacher(sample, random.Random(1), error_rate, with_scores) for with_scores in (True, False))
        assert not re.search("[0-9]/|[0-9]=|Total", bare)
        facts = [fact for pair in data.parse_verdict(scored, sample.task).reasons.values() for fact in pair.values()]
        assert len(facts) >= 4 and all(fact in bare for fact in facts)
        assert data.parse_verdict(bare, sample.task).format_ok and data.parse_answer(bare, sample.task) == data.parse_answer(scored, sample.task)


def test_only_the_small_world_has_a_scripted_teacher_and_sft_rows_bring_their_own(tmp_path):
    picture = Image.new("RGB", (32, 32))
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    texts = ["<think>1. A: x</think>\n<answer>Image 2 is better</answer>", "<answer>Image 1 is better</answer>"]
    said = [[{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": text}] for text in texts]
    rows = [{"conversations": turns, "images": ["a.png", "b.png"]} for turns in said]
    pair = {"task": "image_generation", "prompt": "a cat", "media": ["a.png", "b.png"], "label": 1}
    data.write_jsonl(tmp_path / "sft.jsonl", rows), data.write_jsonl(tmp_path / "pairs.jsonl", [pair])
    for folder in ("data", "distill"):
        (tmp_path / folder).mkdir()
    for source, teacher_name, refused in (("pairs", "scripted", True), ("pairs", "given", True), ("sft", "scripted", True), ("sft", "given", False)):
        settings = config.load_settings("smoke", [("data.distill", str(tmp_path / f"{source}.jsonl")), ("distill.teacher", teacher_name)])
        data.write_sources("distill", settings, tmp_path / "data")
        if refused:
            with pytest.raises(config.UserError, match=f"the {teacher_name} teacher knows nothing of distill-000000"):
                distill.run("distill", settings, tmp_path / "distill")
    distill.run("distill", settings, tmp_path / "distill")
    (parts, response), = data.read_conversations(tmp_path / "distill" / "kept.jsonl")
    assert response == texts[0] and [part["type"] for part in parts] == ["image", "image", "text"] and parts[-1]["text"] == "Which?"
    assert [row["dropped"] for row in data.read_jsonl(tmp_path / "distill" / "dropped.jsonl")] == ["malformed"]


def test_the_scripted_teacher_writes_itself_where_rows_bring_a_response(samples, tmp_path):
    """Rows of kept.jsonl or correct.jsonl hold the facts and what another model wrote about them."""
    some = [s for s in samples if s.task == "image_generation"]
    data.write_jsonl(tmp_path / "rows.jsonl", [data.sft_row(s, distill.scripted_teacher(s, random.Random(k), 1.0, True)) for k, s in enumerate(some)])
    settings = config.load_settings("smoke", [("data.distill", str(tmp_path / "rows.jsonl")), ("data.media_within", str(tmp_path.parent)),
                                              ("distill.error_rate", "0")])
    for folder in ("data", "distill"):
        (tmp_path / folder).mkdir()
    data.write_sources("distill", settings, tmp_path / "data")
    distill.run("distill", settings, tmp_path / "distill")
    kept = [response for _, response in data.read_conversations(tmp_path / "distill" / "kept.jsonl")]
    assert len(kept) == len(some) == 3
    for sample, text in zip(some, kept):
        assert data.parse_verdict(text, sample.task).scores == {name: dict(enumerate(pair, 1)) for name, pair in sample.scores.items()}


def test_a_stage_that_starts_again_keeps_its_replies_and_nothing_else(run_folder, serve):
    samples = data.read_samples(run_folder / "data" / "distill.jsonl")
    server = serve(samples, lambda attempt, s, body: completion(right(s)))
    settings, folder = teacher(server), run_folder / "distill"
    stages.do_stage("distill", settings, run_folder, "")
    (folder / "half-made").mkdir()
    (folder / "half-made" / "file").write_text("x")
    (folder / "done.json").unlink()
    stages.do_stage("distill", settings, run_folder, "")
    assert len(server.seen) == 14 and stages.is_done("distill", settings, run_folder)
    assert {path.name for path in folder.iterdir()} == {"replies.jsonl", "kept.jsonl", "dropped.jsonl", "done.json"}


def test_the_teacher_errs_at_its_rate_and_in_one_fact(samples):
    """What it writes with one fact misjudged follows from that fact; undecided sums are called for either candidate."""
    for error_rate, erring in ((0.0, (0, 0)), (0.1, (20, 70)), (1.0, (400, 400))):
        wrong, ties = 0, set()
        for k in range(400):
            sample = samples[k % len(samples)]
            verdict = data.parse_verdict(distill.scripted_teacher(sample, random.Random(k), error_rate, True), sample.task)
            changed = sum(verdict.reasons[d][side] != fact for d, pair in sample.reasons.items() for side, fact in enumerate(pair, 1))
            wrong += changed
            assert changed <= 1 and verdict.format_ok and verdict.sums_ok and (changed or verdict.consistent and verdict.answer == sample.label)
            if verdict.totals[1] == verdict.totals[2]:
                ties.add(verdict.answer)
        assert erring[0] <= wrong <= erring[1] and ties in (({1, 2},) if error_rate == 1.0 else (set(), {1}, {2}, {1, 2}))


def test_an_answer_nobody_can_read_is_asked_for_again_after_growing_waits(samples, serve, tmp_path):
    server = serve(samples, lambda attempt, s, body: completion("x") if attempt == 2 else (lambda handler: handler.send(200, b"nonsense")))
    distill.ask(samples[:1], config.Distill(key_variable="", retries=2), server.url, "m", tmp_path / "replies.jsonl")
    first, second, third = (row["time"] for row in server.seen)
    assert second - first >= 0.5 and third - second >= 1.0


def test_rejection_samples_at_its_temperature_by_the_seed_of_the_run(tiny, samples, pool_folder, tmp_path):
    """The judgements of a model that is run here are those of M.generate, whatever the slices; with another temperature or seed they are others."""
    M.save(*tiny, tmp_path / "cold_start")
    def judged(seed, **changes):
        settings = config.Settings(config.Run(seed=seed), rejection=config.Rejection(**dict(temperature=0.8, max_new_tokens=8, batch_rows=1) | changes))
        (tmp_path / "rejection" / "texts.jsonl").unlink(missing_ok=True)
        rejection.run("rejection", settings, tmp_path / "rejection")
        return [row["judged"] for row in data.read_jsonl(tmp_path / "rejection" / "wrong.jsonl")]
    rng = random.Random("3/rejection")
    prompts = [M.encode(tiny[1], tiny[0], data.build_prompt(s, "think"), data.THINK) for s in samples]
    made = M.generate(*tiny, prompts, 1, 8, 0.8, seeds=[rng.getrandbits(32) for _ in samples])
    wanted = [data.THINK + tiny[1].text(ids[:length]) for ids, length in zip(made.ids, made.lengths)]
    assert judged(3) == wanted == judged(3, batch_rows=256)
    assert len({*map(tuple, (wanted, judged(4), judged(3, temperature=0.3), judged(3, temperature=1.0)))}) == 4


def test_where_the_scripted_teacher_errs_depends_on_the_seed_of_the_run(run_folder):
    def written(seed):
        distill.run("distill", config.Settings(config.Run(seed=seed), distill=config.Distill(error_rate=0.5)), run_folder / "distill")
        rows = [row for name in ("kept", "dropped") for row in data.read_jsonl(run_folder / "distill" / f"{name}.jsonl")]
        return {row["id"]: row["conversations"][1]["value"] for row in rows}
    assert written(0) == written(0) != written(1)
