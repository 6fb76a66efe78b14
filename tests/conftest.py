"""What the tests share: a few pairs of all four tasks on disk, and a Qwen2.5-VL of some 90,000 random weights that reads them."""

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads that spin while they wait for a busy core take ten times as long
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is not looked for on the net
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import config
import data
import model as M
import shapes
from base import pretrain

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with pairs.jsonl, three pairs per task, and their media."""
    folder = tmp_path_factory.mktemp("world")
    shapes.write_split(folder, "pairs", [(task, False) for task in data.TASKS for _ in range(3)], shapes.SEEN, random.Random(0))
    return folder


@pytest.fixture(scope="session")
def samples(world) -> list:
    return data.read_samples(world / "pairs.jsonl")


@pytest.fixture(scope="session")
def tiny(samples) -> tuple:
    """(model, processor). Random weights hardly ever end a text, so the end token is made likelier; that is all that is special."""
    texts = [part["text"] for s in samples for mode in ("think", "answer") for part in data.build_prompt(s, mode) if part["type"] == "text"]
    texts += [data.write_reasoning(s.task, s.reasons, s.scores, data.verdict_string(s.task, s.label)) for s in samples]
    torch.manual_seed(0)
    settings = config.Model(hidden_size=32, layers=2, heads=2, intermediate_size=48, vision_hidden_size=32, vision_layers=2)
    model, processor = pretrain.build_small(settings, pretrain.train_tokenizer(texts, 512))
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.eos_token_id] *= 2
    return model, processor


@pytest.fixture(scope="session")
def prompts(tiny, samples) -> list:
    """Two prompts per task, encoded: one and two pictures, one and two clips, both modes, so of all lengths."""
    model, processor = tiny
    chosen = [sample for task in data.TASKS for sample in samples if sample.task == task][::3] + [s for s in samples if s.id.endswith(("1", "4", "7"))]
    return [M.encode(processor, model, data.build_prompt(s, mode), data.THINK if mode == "think" else "") for s, mode in zip(chosen, ["think", "answer"] * 4)]
