"""What a GPU would refuse, without one (tests/pretend_gpu.py): every stage that trains or samples, as the scripts call them, meets no tensor that was
left behind, also after a stop and with the fp32 copies of a bf16 model in host memory; and the numbers are the CPU's."""

import contextlib
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import benchmark
import config
import data
import evaluate
import grpo
import model as M
import sft
from pretend_gpu import OnGPU, a_gpu


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with a_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert isinstance(here.to("cuda"), OnGPU) and there.device.type == "cuda" and not isinstance(there.cpu(), OnGPU)
        assert (there * here.to(there.device)).sum().item() == 3 and there[here.long()[:2]].tolist() == [1, 1] and (there * here[0]).is_cuda
        for mixed in (lambda: there * here, lambda: torch.cat([there, here]), lambda: here[there.long()], lambda: there.add_(here),
                      lambda: setattr(there, "grad", here)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError):
            there.numpy()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, samples):
    """A folder with what the stages read: the small base, and one that writes the same and is wide enough for bf16."""
    out = tmp_path_factory.mktemp("gpu")
    (out / "rejection").mkdir()
    data.write_jsonl(out / "rejection" / "wrong.jsonl", map(data.sample_row, samples))
    for name in ("small", "wide"):
        shutil.copytree(config.ROOT / "configs" / "small-base", out / name)
    benchmark.grow(out / "wide", {"width": 512, "layers": 4})
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


def same(one: list, other: list, rel: float = 1e-3) -> bool:
    """Whether two logs have the same numbers."""
    numbers = lambda rows: [{key: x for key, x in row.items() if isinstance(x, float) and not key.startswith("seconds")} for row in rows]
    least = 1e-5 if rel < 0.01 else 0.1
    return len(one) == len(other) == 3 and all(a == pytest.approx(b, rel=rel, abs=least) for a, b in zip(numbers(one), numbers(other)))


@pytest.mark.parametrize("name, own", [
    ("small", dict(replay=0.5, updates_per_rollout=2)), ("small", dict(gradient_checkpointing=True, offload=True)), ("wide", dict(beta=0.0)),
    ("wide", dict(gradient_checkpointing=True, offload=True, replay=0.5))])
def test_grpo(chain, name, own, tmp_path):
    """Three steps, stopped in the second; and on the CPU, where the wide model is not rounded to bf16."""
    settings, gpu, cpu = config.Settings(), chain / f"{tmp_path.name} gpu", chain / f"{tmp_path.name} cpu"
    settings.model.path = str(chain / name)
    settings.grpo = config.GRPO(steps=3, prompts_per_step=4, group_size=6, max_new_tokens=8, micro_prompts=2, lr=1e-4, save_minutes=0, mode="answer",
                                start="base", **own)
    gpu.mkdir(), cpu.mkdir()
    with a_gpu():
        with stopped_after(2 * settings.grpo.updates_per_rollout):
            grpo.run("grpo", settings, gpu)
        assert {(p.device.type, p.dtype) for p in M.load(settings.model.path)[0].parameters()} == {
            ("cuda", torch.float32 if name == "small" else torch.bfloat16)}
        grpo.run("grpo", settings, gpu)
    grpo.run("grpo", settings, cpu)
    logs = [data.read_jsonl(folder / "metrics.jsonl") for folder in (gpu, cpu)]
    assert all(row["grad_norm"] > 0.1 and row["zero_variance_share"] < 1 and row["reward_accuracy"] > 0.2 for rows in logs for row in rows)
    assert same(*logs, rel=1e-3 if name == "small" else 0.1)
    before, *after = (load_file(folder / "model.safetensors") for folder in (chain / name, gpu, cpu))
    moved = [torch.cat([(weights[key].float() - before[key]).flatten() for key in before]) for weights in after]
    assert torch.cosine_similarity(*moved, dim=0) > (0.99 if name == "small" else 0.3)
    copies = torch.load(gpu / "grpo.3.0.state", weights_only=True)["learnt"]
    model, _ = M.load(str(gpu), torch.float32 if name == "small" else torch.bfloat16)
    M.freeze_vision(model)
    assert all(torch.equal(p, copy.to(p.dtype)) for p, copy in zip([p for p in model.parameters() if p.requires_grad], copies, strict=True))


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
    assert same(*logs, rel=1e-3 if name == "small" else 0.2)
    assert name == "wide" or judged == judge()
