"""Mistakes a user can make and faults a machine can have: each ends in one line that says where and what to do, and in exit code 2.

Every case is a real command line, run through the script's own entry in this process.

    python tests/test_faults.py        prints the table of what was tried with the line each prints (Markdown)
"""

import contextlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import safetensors.torch
import torch
from PIL import Image

import config
import conftest  # no net, as a script too
import media
import stages

BASE = str(ROOT / "configs" / "small-base")
STAGE = "data.py --config smoke --out {0}/run --data.distill_pairs 1 --data.pool {0}/pairs.jsonl"
BENCH = f"evaluate.py bench --model {BASE} --benchmark"
JUDGE = f"evaluate.py judge --task image_generation --prompt x --max-new-tokens 2 {{0}}/0.png {{0}}/1.png --model {BASE}"


def command(line: str, folder: Path, *more: str) -> tuple:
    """(exit code, stderr) of a command line; {0} in it is `folder`. Arguments in `more` may hold blanks."""
    script, *arguments = [word.replace("{0}", str(folder)) for word in [*line.split(), *more]]
    before, err = sys.argv, io.StringIO()
    sys.argv = [script, *arguments]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return 0, err.getvalue()
    except SystemExit as stopped:
        return stopped.code, err.getvalue()
    finally:
        sys.argv = before


def pair(**changes) -> str:
    row = {"id": "7", "task": "image_generation", "prompt": "a cat", "media": ["0.png", "1.png"], "label": 1} | changes
    return json.dumps({key: value for key, value in row.items() if value != "LEFT OUT"})


def put(name: str, content=""):
    """Writes a file of the folder: (folder) -> None."""
    return lambda folder: (folder / name).parent.mkdir(parents=True, exist_ok=True) or (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def model(**changes):
    """A copy of the small base with files replaced, or left out where the text is None; `__` in a name stands for the dot."""
    def make(folder):
        for file in Path(BASE).iterdir():
            put(f"model/{file.name}", changes.get(file.name.replace(".", "__"), file.read_bytes()) or b"")(folder)
            if changes.get(file.name.replace(".", "__"), "") is None:
                (folder / "model" / file.name).unlink()
        for name in changes.keys() - {file.name.replace(".", "__") for file in Path(BASE).iterdir()}:
            put(f"model/{name.replace('__', '.')}", changes[name])(folder)
    return make


def safetensors_of(**numbers) -> bytes:
    return safetensors.torch.save({name: torch.tensor([number]) for name, number in numbers.items()}, {"format": "pt"})


SETTING = "grpo.py --config smoke --out {0}/run"
JUDGE_MODEL = JUDGE.replace(BASE, "{0}/model")
own_config = json.loads(Path(BASE, "config.json").read_text())
CASES = {  # what is wrong: (command line, what the line has to say[, what makes the files])
    "no settings named": ("grpo.py", "--config small"),
    "settings misspelt": ("grpo.py --config smal", "configs/ has"),
    "settings file missing": ("grpo.py --config {0}/x.toml", "x.toml"),
    "settings are a folder": ("grpo.py --config {0}/x.toml", "x.toml", lambda folder: (folder / "x.toml").mkdir()),
    "a size of the model beside its path": ("sft.py --config small --stage base --out {0}/run --model.layers 8", "model.layers is that of a base trained"),
    "--out is a folder of one's own": ("data.py --config smoke --out {0}", "data is of no run, and would be emptied", put("data/mine.txt")),
    "settings are no TOML": ("grpo.py --config {0}/x.toml", "x.toml: ", put("x.toml", "[grpo\nlr = 1")),
    "settings are no UTF-8": ("grpo.py --config {0}/x.toml", "x.toml: ", put("x.toml", b"[grpo]\nkl = '\xff'")),
    "the same key twice": ("grpo.py --config {0}/x.toml", "Cannot overwrite", put("x.toml", "[grpo]\nlr = 1.0\nlr = 2.0")),
    "value outside a section": ("grpo.py --config {0}/x.toml", "outside a section", put("x.toml", "lr = 1")),
    "unknown section": ("grpo.py --config {0}/x.toml", "did you mean 'grpo.lr'", put("x.toml", "[grop]\nlr = 1.0")),
    "unknown key": (SETTING + " --grpo.stesp 3", "grpo.steps"),
    "text for a number": (SETTING + " --grpo.steps many", "takes a number .int. from 1"),
    "text for a number in a file": ("grpo.py --config {0}/x.toml", "grpo.lr takes a number", put("x.toml", "[grpo]\nlr = '1e-6'")),
    "neither true nor false": (SETTING + " --base.rebuild maybe", "true or false"),
    "half a step": (SETTING + " --grpo.steps 1.5", "grpo.steps takes a number"),
    "no steps": (SETTING + " --grpo.steps 0", r"grpo.steps takes a number .\w+. from 1"),
    "a negative rate": (SETTING + " --grpo.lr -1", r"grpo.lr takes a number .\w+. from 0"),
    "a rate that is no number": (SETTING + " --cold_start.lr nan", r"cold_start.lr takes a number .\w+. from 0"),
    "an infinite penalty": (SETTING + " --grpo.beta inf", r"grpo.beta takes a number .\w+. from 0"),
    "a group of one": (SETTING + " --grpo.group_size 1", r"grpo.group_size takes a number .\w+. from 2"),
    "sampling at temperature 0": (SETTING + " --grpo.temperature 0", r"grpo.temperature takes a number .\w+. from 0.01"),
    "a share above one": (SETTING + " --cold_start.warmup 3", r"cold_start.warmup takes a number .\w+. from 0 to 1"),
    "an unknown estimator": (SETTING + " --grpo.kl k4", "k1, k2 or k3"),
    "an unknown normalisation": (SETTING + " --grpo.normalise tokens", "token"),
    "an unknown mode": (SETTING + " --grpo.mode thinking", "think or answer"),
    "an unknown set": (SETTING + " --grpo.data right", "correct, or pool"),
    "a start that is no checkpoint": (SETTING + " --grpo.start rejection", "rejection_sft"),
    "unknown treatment of bad rows": (SETTING + " --data.on_error ignore", "stop, or skip"),
    "a server without http://": (SETTING + " --rejection.endpoint localhost:8000/v1", "http://HOST:8000/v1"),
    "a password in the server's address": (SETTING + " --distill.base_url https://me:hunter2@example.org/v1", "distill.base_url takes"),
    "a key where a variable's name belongs": (SETTING + " --distill.key_variable sk-hunter2", "NAME of the environment variable"),
    "a served stage misspelt": (SETTING + " --evaluate.served grpoo", "evaluate.served takes"),
    "blanks between served stages": (SETTING + " --evaluate.served", "evaluate.served takes", None, "grpo, base"),
    "heads that do not divide the width": ("sft.py --config smoke --out {0}/run --stage base --base.rebuild true --model.heads 3", "model.heads"),
    "sharded weights in host memory": (SETTING + " --run.shard true --grpo.offload true", "exclude each other: --grpo.offload false"),
    "a setting without a value": (SETTING + " --grpo.steps", "needs a value"),
    "a word too many": ("grpo.py smoke", "unexpected argument"),
    "an unknown option": (SETTING + " --fast 1", "unknown option --fast"),
    "another script's stage": (SETTING + " --stage sft", "grpo, grpo_direct"),
    "--out is a file": (SETTING.replace("run", "0.png"), "0.png"),
    "--out below a file": (SETTING.replace("run", "0.png/run"), "0.png"),
    "--out on a system that is read only": ("data.py --config smoke --out /sys/run", "Errno .*/sys/run"),
    "a source that is missing": (STAGE, "no file"),
    "a source that is a folder": (STAGE, "no file", lambda folder: (folder / "pairs.jsonl").mkdir()),
    "a source with a strategy misspelt": (STAGE + "@frist:3", "PATH@first:N", put("pairs.jsonl", pair())),
    "an empty source": (STAGE, "0 pairs", put("pairs.jsonl")),
    "ties alone": (STAGE, "0 pairs", put("pairs.jsonl", pair(label=0))),
    "a source that is no text": (STAGE, "cannot read", put("pairs.jsonl", b"\x80\x81")),
    "a list without its end": (STAGE, "cannot read", put("pairs.jsonl", "[" + pair())),
    "no image root": (STAGE + " --data.image_root {0}/none", "none/0.png", put("pairs.jsonl", pair())),
    **{f"row: {name}": (STAGE, f"pairs.jsonl, line 2: .*{said}", put("pairs.jsonl", f"{pair()}\n{row}\n")) for name, row, said in (
        ("broken off", '{"id": "x", ', "JSON"), ("no object", "3", "int"), ("no pair", '{"task": "image_generation", "label": 1}', "no pair"), ("a list", "[1]", "list"), ("nested too deep", "[" * 200_000, "Recursion"),
        ("half a character", pair(prompt="\ud800"), "surrogates"), ("no prompt", pair(prompt="LEFT OUT"), "prompt is empty"), ("prompt a number", pair(prompt=3), "prompt is empty"),
        ("a million characters", pair(prompt="x" * 1_000_000), "1000000 characters"), ("no task", pair(task="LEFT OUT"), "no task"),
        ("unknown task", pair(task="image"), "unknown task 'image'"), ("task a list", pair(task=[]), "no task"), ("no label", pair(label="LEFT OUT"), "None"),
        ("label 3", pair(label=3), "is 3"), ("label as text", pair(label="1"), "is '1'"), ("one candidate", pair(media=["0.png"]), "1 media"),
        ("no media", pair(media=[]), "0 media"), ("media a number", pair(media=3), "int"), ("media a map", pair(media=[{"a": 1}, "0.png"]), "Error|cannot"),
        ("missing file", pair(media=["0.png", "no.png"]), "no.png: there is no such file"), ("a folder for a picture", pair(media=["0.png", "."]), "no such file"),
        ("one answer", pair(task="image_understanding", media=["0.png"], answers=["a"]), "two answers"),
        ("answers as text", pair(task="image_understanding", media=["0.png"], answers="ab"), "TypeError"),
        ("answer empty", pair(task="image_understanding", media=["0.png"], answers=["a", " "]), "two answers"),
        ("a video where an image belongs", pair(media=["0.png", "a.mp4"]), "a video where an image belongs"),
        ("images no list", pair(media="LEFT OUT", images=3), "TypeError"))},
    "row: text for a picture": (STAGE, "line 1: .*cannot identify", lambda folder: [put("pairs.jsonl", pair(media=["0.png", "t.png"]))(folder), put("t.png", "text")(folder)]),
    "row: a picture broken off": (STAGE, "line 1: .*t.png", lambda folder: [put("pairs.jsonl", pair(media=["0.png", "t.png"]))(folder),
                                                                            put("t.png", (folder / "0.png").read_bytes()[:60])(folder)]),
    "inspect: no file": ("data.py inspect {0}/none.jsonl", "cannot read"),
    "inspect: no path": ("data.py inspect", "inspect PATH"),
    "judge: no such picture": (JUDGE.replace("0.png", "no.png"), "no.png: there is no such file"),
    "judge: one picture": (JUDGE.replace("{0}/1.png", ""), "got 1 files"),
    "judge: unknown task": (JUDGE.replace("image_generation", "images"), "invalid choice"),
    "judge: votes below none": (JUDGE + " --votes -1", "--votes"),
    "judge: no new tokens": (JUDGE + " --max-new-tokens 0", "--max-new-tokens"),
    "judge: prompt file no UTF-8": (JUDGE + " --prompt-file {0}/p.txt", "p.txt", put("p.txt", b"\xff")),
    "judge: placeholder unknown": (JUDGE + " --prompt-file {0}/p.txt", "the placeholders of", put("p.txt", "{caption}")),
    "judge: placeholder with a dot": (JUDGE + " --prompt-file {0}/p.txt", "the placeholders of", put("p.txt", "{prompt.x}")),
    "judge: a text that does not fit": (JUDGE + " --prompt-file {0}/p.txt", "tokens, and the model takes 4096", put("p.txt", "word " * 20_000)),
    "bench: no file": (f"{BENCH} genai_video --path {{0}}/none.json", "no such file"),
    "bench: no rows": (f"{BENCH} genai_video --path {{0}}/b.json", "no row reads as", put("b.json", '{"x": 1}')),
    "bench: rows no objects": (f"{BENCH} genai_video --path {{0}}/b.json", "no row reads as", put("b.json", "[1, 2]")),
    "bench: no UTF-8": (f"{BENCH} videogen_rewardbench --path {{0}}/b.csv", "b.csv", put("b.csv", b"\xff\xfe\n1")),
    "bench: unknown benchmark": (f"{BENCH} x --path {{0}}/b.csv", "none of vl_rewardbench"),
    "judge: a run in the place of its model": (JUDGE.replace(BASE, "{0}"), "holds no model; the folder of a trained stage does"),
    "judge: nothing asked": (JUDGE.replace("--prompt x", "--prompt="), "--prompt, or one of --answer, is empty"),
    "judge: a password in the address": (JUDGE + " --endpoint http://me:hunter2@host/v1", "--endpoint: no password in it"),
    "compare: results missing": ("evaluate.py compare {0}/a.json {0}/b.json", "a.json has no judgements beside it"),
    "compare: results broken off": ("evaluate.py compare {0}/a.json {0}/a.json", "a.jsonl, line 1", put("a.jsonl", '{"id"')),
    "report: no folder": ("report.py {0}/none", "RUN_FOLDER: .*none holds no run"),
    "report: a folder that is no run": ("report.py {0}", "holds no run"),
    "model: no such folder": (JUDGE.replace(BASE, "{0}/none"), "none"),
    "model: no such name": (JUDGE.replace(BASE, "no/such"), "cannot load no/such"),
    "model: empty folder": (JUDGE_MODEL, "holds no model", lambda folder: (folder / "model").mkdir()),
    "model: settings broken off": (JUDGE_MODEL, "cannot load", model(config__json='{"model_type": "qwen2_5_vl"')),
    "model: settings a list": (JUDGE_MODEL, "cannot load", model(config__json="[]")),
    "model: another family": (JUDGE_MODEL, "this project runs", model(config__json='{"model_type": "bert"}')),
    "model: no weights": (JUDGE_MODEL, "cannot load", model(model__safetensors=None)),
    "model: weights broken off": (JUDGE_MODEL, "cannot load", model(model__safetensors=Path(BASE, "model.safetensors").read_bytes()[:5000])),
    "model: weights no safetensors": (JUDGE_MODEL, "cannot load", model(model__safetensors=b"weights")),
    "model: weights of another width": (JUDGE_MODEL, "cannot load", model(config__json=json.dumps(own_config | {"text_config": own_config["text_config"] | {"intermediate_size": 99}}))),
    "model: no tokenizer": (JUDGE_MODEL, "cannot load|is not that of the model", model(tokenizer__json=None, tokenizer_config__json=None)),
    "model: tokenizer broken off": (JUDGE_MODEL, "cannot load", model(tokenizer__json='{"version": "1.0"')),
    "model: no image processor": (JUDGE_MODEL, "cannot load", model(preprocessor_config__json=None)),
    "model: no chat template": (JUDGE_MODEL, "chat.template", model(chat_template__jinja=None)),
    "model: chat template broken": (JUDGE_MODEL, "cannot load .*Expected an expression", model(chat_template__jinja="{% for %}")),
    "model: tokenizer of another form": (JUDGE_MODEL, "cannot load", model(tokenizer__json="{}")),
    "model: pickled weights": (JUDGE_MODEL, "cannot load", model(model__safetensors=None, pytorch_model__bin=b"\x80\x04cos\nsystem\n")),
    "model: weights of other names": (JUDGE_MODEL, "lacks", model(model__safetensors=safetensors_of(x=1))),
}


def prepare(folder: Path, make=None) -> None:
    folder.mkdir(exist_ok=True)
    for k in (0, 1):
        Image.new("RGB", (32, 32), ("red", "blue")[k]).save(folder / f"{k}.png")
    if make:
        make(folder)


def told(name: str, folder: Path) -> str:
    """The line a case prints; an AssertionError where it is not one line, or exit code 2 is missing."""
    line, said, make, *more = (*CASES[name], None)[:3] if len(CASES[name]) < 4 else CASES[name]
    prepare(folder, make)
    code, printed = command(line, folder, *more)
    printed = "\n".join(text for text in printed.splitlines() if not text.startswith("model: "))  # judge and bench say which they take
    assert code == 2 and printed.startswith("error: ") and "\n" not in printed and re.search(said, printed), (code, printed)
    assert "hunter2" not in printed, "a key or a password is never repeated"
    return printed


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "limits", media.limits)  # a run puts its own there
    told(name, tmp_path)


def test_debug_shows_where_it_was(tmp_path):
    code, printed = command("grpo.py --config smoke --grpo.kl k4 --debug", tmp_path)
    assert code == 2 and printed.startswith("Traceback") and printed.splitlines()[-1].startswith("error: --grpo.kl")


# --------------------------------------------------------------------------------------------------- disks and processes

SMALL = "data.py --config smoke --out {0}/run --data.distill_pairs 6 --data.pool_pairs 1 --data.test_pairs 1 --data.heldout_pairs 1 --data.tie_pairs 1"
BUILD = ("sft.py --config smoke --out {0}/run --stage base --base.rebuild true --base.scenes 4 --base.simple 4 --base.batch_size 2 --model.hidden_size 48 "
         "--model.heads 2 --model.layers 1 --model.vision_hidden_size 32 --model.intermediate_size 400")


@contextlib.contextmanager
def full_after(size: int):
    """A disk on which no file may grow beyond `size` bytes: the kernel refuses the write as it does on a full one, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "done.json"}


@pytest.mark.parametrize("line, size", [(SMALL, 100), (SMALL, 3000), (BUILD, 60_000)], ids=["in a picture", "in the rows", "in the weights"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(line, size, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "limits", media.limits)
    for folder in (tmp_path / "full", tmp_path / "large"):
        folder.mkdir()
    with full_after(size):
        code, printed = command(line, tmp_path / "full")
    assert code == 2 and "the same command goes on" in printed and len(printed.splitlines()) == 1 and "File too large" in printed
    assert not list((tmp_path / "full").rglob("done.json"))
    assert [command(line, tmp_path / name) for name in ("full", "large")] == [(0, "")] * 2
    kept = [{name: text for name, text in contents(tmp_path / folder / "run").items() if "metrics" not in name} for folder in ("full", "large")]
    assert kept[0] == kept[1] and len(kept[0]) > 10, "nothing of the first attempt is left"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    config.write_text(tmp_path / "a", "old")
    with full_after(1000), pytest.raises(OSError):
        config.write_text(tmp_path / "a", "new" * 1000)
    assert (tmp_path / "a").read_text() == "old"


def test_a_damaged_done_file_is_seen_and_its_stage_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "limits", media.limits)
    assert command(SMALL, tmp_path) == (0, "")
    before, file = contents(tmp_path / "run"), tmp_path / "run" / "data" / "done.json"
    for damaged in (file.read_text()[:50], "", "[]", "null", "\x00" * 100):
        file.write_text(damaged)
        (tmp_path / "run" / "data" / "pool.jsonl").write_text("half")
        assert stages.made_by("data", tmp_path / "run") is None and command(SMALL, tmp_path) == (0, "")
        assert contents(tmp_path / "run") == before and stages.made_by("data", tmp_path / "run")


def test_of_two_processes_in_a_run_folder_the_second_is_refused_until_the_first_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "limits", media.limits)
    hold = "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(600)"
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run" / "lock0")], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"held\n"
            code, printed = command(SMALL, tmp_path)
            assert code == 2 and "another process is at work in" in printed and len(printed.splitlines()) == 1
            assert os.listdir(tmp_path / "run") == ["lock0"], "nothing was touched"
        finally:
            first.kill()  # it has no chance to clean up
    assert command(SMALL, tmp_path) == (0, "")


if __name__ == "__main__":
    import tempfile

    print("| what is wrong | the line |\n|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for name in CASES:
            line = told(name, Path(made, "t"))
            print(f"| {name} | `{line.removeprefix('error: ').replace(made + '/t/', '').replace(str(ROOT) + '/', '')[:200].replace('|', chr(92) + '|')}` |", flush=True)
            shutil.rmtree(Path(made, "t"))
    print(f"\n{len(CASES)} mistakes, each one line and exit code 2")
