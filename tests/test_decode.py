"""The decoder of Qwen2.5-VL's text layers against the model's own forward: the same tokens, the same log-probabilities."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import config
import data
import decode
import model as M


@pytest.fixture(scope="module")
def base(samples) -> tuple:
    """(the shipped base, its processor, 8 prompts: two of every task, both modes)"""
    model, processor = M.load(str(config.ROOT / "configs" / "small-base"))
    chosen = zip(samples[::3] + samples[1::3], ["think", "answer"] * 4)
    return model, processor, [M.encode(processor, model, data.build_prompt(s, mode), data.THINK if mode == "think" else "") for s, mode in chosen]


@pytest.fixture(scope="module")
def grouped(tiny, prompts) -> tuple:
    """Six heads that share two of keys and values, and a head of its own; random norms and biases, which new models have at 1 and 0."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = tiny[0].config.text_config.to_dict() | dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
                                                       layer_types=None, rope_parameters=rope, tie_word_embeddings=False)
    shape = tiny[0].config.to_dict() | {"text_config": text, "tie_word_embeddings": False}
    shape["vision_config"]["out_hidden_size"] = 48
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(parameter.ndim == 1 and "norm" in name), parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
        output = model(**M.collate(prompts, "left", 0, "cpu"), output_hidden_states=True)
        model.lm_head.weight[tiny[1].tokenizer.eos_token_id] += 0.06 * output.hidden_states[-1][:, -1].mean(0)  # so that some texts end soon
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    return model, tiny[1], prompts


def both_ways(monkeypatch, *given, **how) -> tuple:
    """(what the decoder makes, what the model's own forward makes, the rows at every step of the decoder)"""
    rows, step = [], decode.Decoder.step
    monkeypatch.setattr(decode.Decoder, "step", lambda self, token, position: rows.append(len(token)) or step(self, token, position))
    fast, before = M.generate(*given, **how), len(rows)
    monkeypatch.setattr(decode, "ENABLED", False)
    plain = M.generate(*given, **how)
    assert len(rows) == before > 0, "each in its own way"
    return fast, plain, rows


drawn = lambda p, group_size: torch.rand(group_size, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(p))  # as M.generate draws


@torch.no_grad()
def cumulated(model, processor, prompt: dict, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """[V], the probability of every token and of those before it in the vocabulary to follow `prompt` and `ids`."""
    at = prompt["positions"].max() + 1 + torch.arange(len(ids)).expand(3, -1)
    whole = prompt | {"ids": torch.cat([prompt["ids"], ids]), "types": F.pad(prompt["types"], (0, len(ids)))}
    whole["positions"] = torch.cat([prompt["positions"], at], 1)
    logits = model(**M.collate([whole], "left", 0, "cpu")).logits[0, -1].index_fill(0, M.banned_ids(model, processor.tokenizer), float("-inf"))
    return (logits / temperature).softmax(0).cumsum(0)


@pytest.mark.parametrize("group_size, temperature", [(1, 0.0), (1, 1.0), (4, 0.7), (8, 1.0)])
@pytest.mark.parametrize("which", ["base", "grouped"])
def test_tokens_and_log_probabilities_are_those_of_the_models_own_forward(request, monkeypatch, which, group_size, temperature):
    model, processor, prompts = request.getfixturevalue(which)
    fast, plain, rows = both_ways(monkeypatch, model, processor, prompts, group_size, 50, temperature, seeds=range(8))
    assert any(after < before for before, after in zip(rows, rows[1:])) or not temperature, "rows drop out on the way"
    assert len({len(p["ids"]) for p in prompts}) > 4 and len(rows) > 2 * decode.BLOCK
    width, double = max(fast.ids.shape[1], plain.ids.shape[1]), copy.deepcopy(model).double()
    one, other = (F.pad(made.ids, (0, width - made.ids.shape[1]), value=processor.tokenizer.pad_token_id) for made in (fast, plain))
    same = (one == other).all(1)
    for row in (~same).nonzero()[:, 0].tolist():
        at, (p, g) = int((one[row] != other[row]).nonzero()[0]), divmod(row, group_size)
        low, high = sorted([int(one[row, at]), int(other[row, at])])
        borders = cumulated(double, processor, prompts[p], one[row, :at], temperature or 1.0)[low:high]
        assert temperature and (borders - drawn(p, group_size)[g, at]).abs().max() < 1e-5, "on the border between the two tokens"
    assert (~same).sum() <= 1 and fast.lengths[same].tolist() == plain.lengths[same].tolist()
    with torch.no_grad():
        exact = M.completion_logprobs(double, processor, prompts, fast.ids, fast.lengths, temperature or 1.0, False)
    error = lambda made: (made.logprobs - exact[:, : made.logprobs.shape[1]])[same].abs().max().item()
    assert error(fast) < max(1e-5, 2 * error(plain))  # the base's logits reach tens: fp32 rounds the model's own forward no finer


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_completions_that_are_still_equal_are_run_once(base, monkeypatch, enabled, temperature):
    """At every step as many rows as there are different texts of their prompt, less those that have ended if they were dropped."""
    (model, processor, prompts), rows = base, []
    monkeypatch.setattr(decode, "ENABLED", enabled)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    made = M.generate(model, processor, prompts, 8, 50, temperature, seeds=range(8))
    handle.remove()
    for step, run in enumerate(rows[1:], 1):  # the first is that of the prompts
        texts = [(row // 8, *made.ids[row, :step].tolist()) for row in range(64)]
        going = {text for text, length in zip(texts, made.lengths) if length > step}
        assert run == len(going) or len(going) < run == rows[step - 1], "ended rows may stay until texts part or a quarter has ended"
    assert any(after < before for before, after in zip(rows, rows[1:])) or not temperature
    assert max(rows) > 3 * len(prompts) if temperature > 1 else max(rows) < 2 * len(prompts)


@pytest.mark.parametrize("which", ["base", "grouped"])
def test_greedy_tokens_are_those_of_transformers(request, which):
    model, processor, prompts = request.getfixturevalue(which)
    inputs = M.collate(prompts, "left", processor.tokenizer.pad_token_id, "cpu")
    del inputs["position_ids"]
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=40, suppress_tokens=M.banned_ids(model, processor.tokenizer).tolist(),
                            eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id)
    made = M.generate(model, processor, prompts, 1, 40, temperature=0)
    assert decode.fits(model) and made.ids.tolist() == theirs[:, inputs["input_ids"].shape[1] :].tolist()


def test_every_row_attends_to_its_own_prompt_and_tokens_whichever_rows_are_dropped(grouped):
    """Attention by its definition, row by row, after a choice that leaves 3 (two of them from one), 0, 1 and 2 rows of 4 prompts, the third
    padded by two tokens."""
    model, chance = grouped[0], torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=chance)
    cache = transformers.DynamicCache()
    for layer in range(3):
        cache.update(random(4, 2, 5, 8), random(4, 2, 5, 8), layer)
    mask = torch.ones(4, 5).long()
    mask[2, :2] = 0
    decoder = decode.Decoder(model, cache, mask)
    decoder.batch_select_indices(torch.arange(4).repeat_interleave(3))
    decoder.own = [[random(24, 7, 8) for _ in "kv"] for _ in range(3)]
    keep, prompt = torch.tensor([0, 1, 1, 7, 9, 11]), [0, 0, 0, 2, 3, 3]
    keys, values = (x[decoder.taken.view(12, 2)[keep]] for x in decoder.own[1])  # [6 rows, 2 heads, 7, 8]
    decoder.batch_select_indices(keep)
    q, unused = random(6, 6, 8), torch.tensor([0.0] * 4 + [float("-inf")] * 3)
    seated = q.view(12, 3, 8)[decoder.sitting]  # [4 prompts * 2 heads * 3 seats, 3, 8], less the prompt without a row
    made = decoder.attend(seated, *decoder.prompts[1], *decoder.own[1], unused)[decoder.taken].view(6, 6, 8)
    for row, p in enumerate(prompt):
        for head in range(6):
            first = slice(int((mask[p] == 0).sum()), None)
            k = torch.cat([cache.layers[1].keys[p, head // 3, first][:, decoder.pairs], keys[row, head // 3, :4]])
            v = torch.cat([cache.layers[1].values[p, head // 3, first], values[row, head // 3, :4]])
            assert torch.allclose(made[row, head], (k @ q[row, head] / 8**0.5).softmax(0) @ v, atol=1e-5)


def test_other_layers_and_the_flag_lead_to_the_general_path(tiny, monkeypatch):
    model = copy.deepcopy(tiny[0])
    assert decode.fits(model)
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    assert not decode.fits(model) and decode.fits(tiny[0])
    monkeypatch.setattr(decode, "ENABLED", False)
    assert not decode.fits(tiny[0])


def test_weights_that_moved_are_sampled_from(tiny, prompts):
    """Nothing of the model is kept from one call to the next."""
    model = copy.deepcopy(tiny[0])
    before = M.generate(model, tiny[1], prompts, 1, 20, temperature=0)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = M.generate(model, tiny[1], prompts, 1, 20, temperature=0)
    with torch.no_grad():
        scored = M.completion_logprobs(model, tiny[1], prompts, after.ids, after.lengths)
    assert after.ids.tolist() != before.ids.tolist() and (after.logprobs - scored).abs().max() < 1e-5


def test_in_bf16_scores_of_attention_are_not_rounded(base):
    """Biases of queries and keys that add 120 to all scores of a row, which softmax does not see; bf16 would round such scores to whole numbers."""
    model, processor, prompts = base
    model = copy.deepcopy(model).to(torch.bfloat16)
    for layer in model.model.language_model.layers:
        size = layer.self_attn.head_dim
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.bias.data.view(-1, size)[:, size // 2 - 1] += 120**0.5 * size**0.25  # which RoPE hardly turns
    assert decode.fits(model)
    made = M.generate(model, processor, prompts, 4, 12, seeds=range(8))
    with torch.no_grad():
        scored = M.completion_logprobs(model, processor, prompts, made.ids, made.lengths)
    assert (scored - made.logprobs)[made.mask].abs().mean() < 0.05
