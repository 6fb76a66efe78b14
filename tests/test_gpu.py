"""What a GPU would refuse, without one (tests/pretend_gpu.py): every stage that trains or samples, as the scripts call them, meets no tensor that was
left behind, also after a stop and with the fp32 copies of a bf16 model in host memory; and the numbers are the CPU's."""

import contextlib
import signal

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import config
import data
import evaluate
import grpo
import model as M
import sft
import stages
from base import pretrain
from pretend_gpu import OnGPU, a_gpu


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with a_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert isinstance(here.to("cuda"), OnGPU) and there.device.type == "cuda" and not isinstance(there.cpu(), OnGPU)
        assert (there * here.to(there.device)).sum().item() == 3 and there[here.long()[:2]].tolist() == [1, 1] and (there * here[0]).is_cuda
        for mixed in (lambda: there * here, lambda: torch.cat([there, here]), lambda: here[there.long()], lambda: there.add_(here)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError):
            there.numpy()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, samples, tiny):
    """A folder with what the stages read, and a model of bf16 size: 512 wide."""
    out, processor = tmp_path_factory.mktemp("gpu"), tiny[1]
    (out / "rejection").mkdir()
    data.write_jsonl(out / "rejection" / "wrong.jsonl", map(data.sample_row, samples))
    torch.manual_seed(0)
    wide = config.Model(hidden_size=512, layers=1, heads=4, intermediate_size=64, vision_hidden_size=32, vision_layers=1)
    for name, model in (("small", tiny[0]), ("wide", pretrain.build_small(wide, processor.tokenizer)[0])):
        M.save(model, processor, out / name)
    return out


@contextlib.contextmanager
def stopped_after(steps: int):
    """Ctrl-C in the given step of an optimiser."""
    seen = []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(1) or len(seen) == steps and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        yield
    hook.remove()
    assert len(seen) == steps


def same(one: list, other: list) -> bool:
    """Whether two logs have the same numbers."""
    numbers = lambda rows: [{key: x for key, x in row.items() if isinstance(x, float) and not key.startswith("seconds")} for row in rows]
    return len(one) == len(other) == 3 and all(a == pytest.approx(b, rel=1e-3, abs=1e-5) for a, b in zip(numbers(one), numbers(other)))


@pytest.mark.parametrize("name, own", [
    ("small", dict(replay=0.5, updates_per_rollout=2)), ("small", dict(gradient_checkpointing=True, offload=True)), ("wide", dict(beta=0.0)),
    ("wide", dict(gradient_checkpointing=True, offload=True, replay=0.5))])
def test_grpo(chain, name, own, monkeypatch, tmp_path):
    """Three steps, stopped in the second; and on the CPU, where the wide model is not rounded to bf16."""
    monkeypatch.setattr(stages, "checkpoint", lambda *_: str(chain / name))
    settings, gpu, cpu = config.Settings(), chain / f"{tmp_path.name} gpu", chain / f"{tmp_path.name} cpu"
    settings.grpo = config.GRPO(steps=3, prompts_per_step=4, group_size=3, max_new_tokens=8, micro_prompts=2, lr=1e-3, save_minutes=0, **own)
    gpu.mkdir(), cpu.mkdir()
    with a_gpu():
        with stopped_after(2 * settings.grpo.updates_per_rollout):
            grpo.run("grpo", settings, gpu)
        assert {(p.device.type, p.dtype) for p in M.load(str(gpu.parent / name))[0].parameters()} == {
            ("cuda", torch.float32 if name == "small" else torch.bfloat16)}
        grpo.run("grpo", settings, gpu)
    grpo.run("grpo", settings, cpu)
    logs = [data.read_jsonl(folder / "metrics.jsonl") for folder in (gpu, cpu)]
    assert same(*logs) or name == "wide" and len(logs[0]) == 3


@pytest.mark.parametrize("name", ["small", "wide"])
def test_sft_and_judging(chain, samples, name, tmp_path):
    own = config.SFT(lr=1e-3, epochs=1, batch_size=4, micro_tokens=600, gradient_checkpointing=True, offload=True, save_minutes=0)
    written = lambda s: data.write_reasoning(s.task, s.reasons, s.scores, data.verdict_string(s.task, s.label))
    examples = [(data.build_prompt(s, "think"), written(s)) for s in samples]
    judge = lambda: evaluate.judge_pairs(*M.load(str(chain / name)), samples[:3], own=config.Evaluate(max_new_tokens=8))
    train = lambda folder: sft.train(*M.load(str(chain / name)), examples, own, folder, "seed", "sft")
    (tmp_path / "gpu").mkdir(), (tmp_path / "cpu").mkdir()
    with a_gpu():
        with stopped_after(2):
            train(tmp_path / "gpu")
        train(tmp_path / "gpu")
        judged = judge()
    train(tmp_path / "cpu")
    logs = [data.read_jsonl(tmp_path / side / "metrics.jsonl") for side in ("gpu", "cpu")]
    assert same(*logs) or name == "wide" and len(logs[0]) == 3
    assert name == "wide" or judged == judge()
