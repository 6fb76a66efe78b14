"""The mathematics of grpo.py against closed forms, exact expectations and plain loops; then rewards and one update of a real model."""

import copy
import math
import random
import re

import pytest
import torch

import config
import data
import grpo
import model as M
import sft

# ------------------------------------------------------------------------------------------------------------- advantages


def test_one_correct_of_eight_stands_out_more_when_divided_by_the_std():
    rewards = torch.tensor([[2.0] + [1.0] * 7])
    mean, std = 9 / 8, math.sqrt(((7 / 8) ** 2 + 7 * (1 / 8) ** 2) / 7)
    divided, plain = grpo.group_advantages(rewards), grpo.group_advantages(rewards, scale_by_std=False)
    assert divided[0, 0].item() == pytest.approx((2 - mean) / (std + 1e-4), rel=1e-6)
    assert [round(x, 2) for x in divided[0, :2].tolist()] == [2.47, -0.35]
    assert [round(x, 3) for x in plain[0, :2].tolist()] == [0.875, -0.125]


def test_each_group_is_compared_with_itself_alone():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 8.0]])
    expected = [[-1 / 1.0001, 0.0, 1 / 1.0001], [-1 / (math.sqrt(3) + 1e-4), -1 / (math.sqrt(3) + 1e-4), 2 / (math.sqrt(3) + 1e-4)]]
    assert torch.allclose(grpo.group_advantages(rewards), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 8])
def test_equal_rewards_have_advantages_of_exactly_zero(group_size, scale_by_std):
    """Also where the fp32 mean is not the number itself and eps is small enough to blow the residue up."""
    rewards = torch.tensor([0.1, 0.7, 1 / 3, 2.0, 0.0])[:, None].expand(-1, group_size).contiguous()
    assert grpo.group_advantages(rewards, scale_by_std, eps=1e-12).tolist() == [[0.0] * group_size] * 5


def test_the_residue_of_equal_rewards_exists_and_would_be_blown_up():
    rewards = torch.full((1, 7), 0.1)
    residue = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-12)
    assert residue.abs().max() > 0.1, "then the test above tests nothing"


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_advantages_of_a_group_sum_to_zero(scale_by_std):
    rewards = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert grpo.group_advantages(rewards, scale_by_std).sum(1).abs().max() < 1e-5


def test_a_group_of_two_gets_plus_and_minus_one_over_root_two():
    advantages = grpo.group_advantages(torch.tensor([[3.0, 1.0], [0.0, 100.0]]), eps=0.0)
    assert torch.allclose(advantages, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / math.sqrt(2))


# --------------------------------------------------------------------------------------------------------------------- KL


@pytest.fixture
def categorical():
    """theta with log pi = log softmax(theta), and a fixed log pi_ref, far enough apart that the two directions of KL differ."""
    theta = torch.tensor([2.0, 0.5, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    return theta, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()


def exact_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_expected_estimate_is_the_exact_kl_and_not_its_flip(categorical, kind):
    theta, log_ref = categorical
    log_pi = theta.detach().log_softmax(0)
    expected = sum(p * k for p, k in zip(log_pi.exp().tolist(), grpo.kl_estimate(log_pi, log_ref, kind).tolist()))
    forward, flipped = exact_kl(log_pi, log_ref).item(), exact_kl(log_ref, log_pi).item()
    assert expected == pytest.approx(forward, rel=1e-12)
    assert expected != pytest.approx(flipped, rel=0.05)


def test_estimates_of_one_token_by_hand():
    logprobs, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -1.0])  # d = -0.5 and 2
    assert torch.allclose(grpo.kl_estimate(logprobs, ref, "k1"), torch.tensor([0.5, -2.0]))
    assert torch.allclose(grpo.kl_estimate(logprobs, ref, "k2"), torch.tensor([0.125, 2.0]))
    assert torch.allclose(grpo.kl_estimate(logprobs, ref, "k3"), torch.tensor([math.exp(-0.5) - 0.5, math.exp(2) - 3]))
    assert torch.equal(grpo.kl_estimate(logprobs, ref), grpo.kl_estimate(logprobs, ref, "k3"))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_expected_gradient_of_the_estimate_as_a_loss(categorical, kind):
    """k1 pushes nowhere, k2 down KL(pi || ref), k3 down KL(ref || pi): the value and the gradient are different estimates."""
    theta, log_ref = categorical
    log_pi = theta.log_softmax(0)
    sampled = log_pi.exp().detach()  # on-policy: tokens come from pi, and sampling passes no gradient
    (gradient,) = torch.autograd.grad((sampled * grpo.kl_estimate(log_pi, log_ref, kind)).sum(), theta, retain_graph=True)
    exact = {"k1": 0 * theta.sum(), "k2": exact_kl(log_pi, log_ref), "k3": exact_kl(log_ref, log_pi)}
    (wanted,) = torch.autograd.grad(exact[kind], theta)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k4"):
        grpo.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


# ------------------------------------------------------------------------------------- the loss, against loops over floats


def random_case(seed: int, rows: int = 4, width: int = 7):
    """Ragged completions whose ratios fall on both sides of the clip for both signs of the advantage."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    old = -draw(rows, width).abs() - 0.1
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[seed % rows] = width
    return {"logprobs": old + 0.4 * draw(rows, width), "old_logprobs": old, "ref_logprobs": old + 0.5 * draw(rows, width), "advantages": draw(rows),
            "completion_mask": torch.arange(width) < lengths[:, None]}


def loss_by_loops(case, clip_low=0.2, clip_high=0.2, beta=0.04, kl="k3", normalise="rollout", rollouts=None, tokens=None, max_length=None):
    """(loss, d loss / d logprobs, clip share, ratio, kl) one token at a time, with the derivative written out by hand."""
    lp, old, ref = (case[name].tolist() for name in ("logprobs", "old_logprobs", "ref_logprobs"))
    mask, advantages = case["completion_mask"].tolist(), case["advantages"].tolist()
    tokens = tokens or sum(map(sum, mask))
    rollouts = rollouts or len(mask)
    loss, gradient, clipped, ratios, kls = 0.0, [[0.0] * len(row) for row in mask], 0, 0.0, 0.0
    for b, A in enumerate(advantages):
        weight = {"rollout": 1 / (rollouts * sum(mask[b])), "token": 1 / tokens, "constant": 1 / (rollouts * (max_length or len(mask[b])))}[normalise]
        for t in range(sum(mask[b])):
            ratio, d = math.exp(lp[b][t] - old[b][t]), ref[b][t] - lp[b][t]
            stopped = ratio > 1 + clip_high if A > 0 else ratio < 1 - clip_low
            objective = (1 + clip_high if A > 0 else 1 - clip_low) * A if stopped else ratio * A
            penalty, slope = {"k1": (-d, 1.0), "k2": (d * d / 2, -d), "k3": (math.exp(d) - d - 1, 1 - math.exp(d))}[kl]
            loss += weight * (beta * penalty - objective)
            gradient[b][t] = weight * (beta * slope - (0.0 if stopped else ratio * A))
            clipped, ratios, kls = clipped + stopped, ratios + ratio, kls + penalty
    return loss, gradient, clipped / tokens, ratios / tokens, kls / tokens


def loss_and_gradient(case, **options):
    logprobs = case["logprobs"].clone().requires_grad_()
    loss, metrics = grpo.grpo_loss(**case | {"logprobs": logprobs}, **options)
    loss.backward()
    return loss.item(), logprobs.grad, metrics


VARIANTS = [{}, {"normalise": "token"}, {"normalise": "constant"}, {"normalise": "constant", "max_length": 50}, {"kl": "k1", "beta": 0.5},
            {"kl": "k2", "beta": 0.5}, {"beta": 0.7}, {"clip_low": 0.1, "clip_high": 0.4}, {"clip_low": 0.5, "clip_high": 0.05, "normalise": "token"}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_gradient_and_metrics_equal_plain_loops(options):
    clipped = 0.0
    for seed in range(12):
        case = random_case(seed)
        loss, gradient, metrics = loss_and_gradient(case, **options)
        wanted, wanted_gradient, clip_share, ratio, kl = loss_by_loops(case, **options)
        assert loss == pytest.approx(wanted, rel=1e-10, abs=1e-12)
        assert torch.allclose(gradient, torch.tensor(wanted_gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)
        assert metrics == pytest.approx({"clip_share": clip_share, "ratio": ratio, "kl": kl}, rel=1e-6)
        clipped += clip_share
    assert clipped > 1, "cases that are hardly ever clipped show little"


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 1.0, False),  # already likelier than the clip allows, and good: no further
    (0.5, 1.0, True),  # good but became unlikely: back up
    (1.5, -1.0, True),  # bad but became likelier: back down
    (0.5, -1.0, False),  # bad and already unlikely: no further
    (1.1, 1.0, True), (0.9, 1.0, True), (1.1, -1.0, True), (0.9, -1.0, True)])
def test_the_clip_stops_only_what_has_gone_far_enough(ratio, advantage, moves):
    case = {"logprobs": torch.tensor([[math.log(ratio)]]), "old_logprobs": torch.zeros(1, 1), "ref_logprobs": None, "advantages": torch.tensor([advantage]),
            "completion_mask": torch.ones(1, 1)}
    _, gradient, metrics = loss_and_gradient(case, beta=0)
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert metrics["clip_share"] == (not moves)


@pytest.mark.parametrize("clip_low, clip_high, moves", [(0.2, 0.2, False), (0.2, 0.6, True), (0.6, 0.2, False)])
def test_clip_low_and_clip_high_are_not_mistaken_for_each_other(clip_low, clip_high, moves):
    case = {"logprobs": torch.tensor([[math.log(1.5)]]), "old_logprobs": torch.zeros(1, 1), "ref_logprobs": None, "advantages": torch.ones(1),
            "completion_mask": torch.ones(1, 1)}
    assert (loss_and_gradient(case, beta=0, clip_low=clip_low, clip_high=clip_high)[1].item() != 0) == moves


def test_with_one_update_the_loss_is_zero_and_its_gradient_is_reinforce():
    """rho = 1 for every token and the advantages of a group sum to 0. What moves is each token's log-probability, by its advantage."""
    case = random_case(0, rows=8)
    case["advantages"] = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 2, 1, 0, 2, 2]], dtype=torch.float64))[0]
    case["old_logprobs"] = case["logprobs"].clone()
    loss, gradient, metrics = loss_and_gradient(case | {"ref_logprobs": None}, beta=0)
    logprobs, mask = case["logprobs"].clone().requires_grad_(), case["completion_mask"]
    reinforce = -sum(A * row[keep].mean() for A, row, keep in zip(case["advantages"], logprobs, mask)) / 8
    reinforce.backward()
    assert abs(loss) < 1e-12 and metrics["ratio"] == pytest.approx(1) and metrics["clip_share"] == 0
    assert torch.allclose(gradient, logprobs.grad, atol=1e-14) and gradient.abs().max() > 0.01


def test_the_three_normalisations_weigh_a_short_and_a_long_completion_as_they_say():
    """Lengths 1 and 3 of at most 4, all ratios 1: the weight of a token is minus its gradient over its advantage."""
    case = {"logprobs": torch.zeros(2, 4), "old_logprobs": torch.zeros(2, 4), "ref_logprobs": None, "advantages": torch.tensor([1.0, -1.0]),
            "completion_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])}
    weights = lambda **options: (-loss_and_gradient(case, beta=0, **options)[1] * case["advantages"][:, None])[:, :3].flatten().tolist()
    assert weights(normalise="rollout") == pytest.approx([1 / 2, 0, 0, 1 / 6, 1 / 6, 1 / 6])
    assert weights(normalise="token") == pytest.approx([1 / 4, 0, 0, 1 / 4, 1 / 4, 1 / 4])
    assert weights(normalise="constant") == pytest.approx([1 / 8, 0, 0, 1 / 8, 1 / 8, 1 / 8])
    assert weights(normalise="constant", max_length=10) == pytest.approx([1 / 20, 0, 0, 1 / 20, 1 / 20, 1 / 20])


@pytest.mark.parametrize("normalise", ["rollout", "token", "constant"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_update(normalise, size):
    case = random_case(5, rows=8)
    counts = {"rollouts": 8, "tokens": int(case["completion_mask"].sum()), "max_length": 7}
    loss, gradient, metrics = loss_and_gradient(case, normalise=normalise)
    parts = [loss_and_gradient({name: value[k : k + size] for name, value in case.items()}, normalise=normalise, **counts) for k in range(0, 8, size)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-10)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient, rtol=1e-10, atol=1e-14)
    assert {name: sum(part[2][name] for part in parts) for name in metrics} == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("junk", [1e4, -1e4, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("tensor", ["logprobs", "old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("normalise", ["rollout", "token", "constant"])
def test_what_stands_after_the_end_of_a_completion_changes_nothing(tensor, junk, normalise):
    case = random_case(1)
    loss, gradient, metrics = loss_and_gradient(case, normalise=normalise)
    spoilt = case | {tensor: case[tensor].masked_fill(~case["completion_mask"], junk)}
    assert not torch.equal(spoilt[tensor], case[tensor])
    spoilt_loss, spoilt_gradient, spoilt_metrics = loss_and_gradient(spoilt, normalise=normalise)
    assert spoilt_loss == loss and torch.equal(spoilt_gradient, gradient) and spoilt_metrics == metrics
    assert gradient[~case["completion_mask"]].eq(0).all()


def test_beta_zero_needs_no_reference_and_is_the_loss_without_penalty():
    case = random_case(2)
    loss, gradient, metrics = loss_and_gradient(case | {"ref_logprobs": None}, beta=0)
    wanted, wanted_gradient, *_ = loss_by_loops(case, beta=0)
    assert loss == pytest.approx(wanted) and torch.allclose(gradient, torch.tensor(wanted_gradient, dtype=torch.float64))
    assert metrics["kl"] == 0


def test_equal_rewards_still_feel_the_kl():
    case = random_case(3) | {"advantages": torch.zeros(4, dtype=torch.float64)}
    assert loss_and_gradient(case)[1].abs().max() > 0
    assert loss_and_gradient(case, beta=0)[1].abs().max() == 0


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="sequence"):
        grpo.grpo_loss(**random_case(0), normalise="sequence")


# ---------------------------------------------------------------------------------------------------------------- rewards

PAIR = data.Sample("1", "image_generation", label=1)
GOOD = ("<think>1. Aesthetics: Image 1: vivid (9/10). Image 2: faded (4/10).\nTotal score: Image 1: 9=9. Image 2: 4=4.</think>\n"
        "<answer>Image 1 is better</answer>")


@pytest.mark.parametrize("text, mode, rewards", [
    (GOOD, "think", (1, 1, 1)),
    (GOOD + " So it is.", "think", (0, 1, 1)),  # a readable verdict in a malformed text is still right
    ("Well: " + GOOD, "think", (0, 1, 1)),
    (GOOD.replace("Image 1 is better", "Image 2 is better"), "think", (1, 0, 0)),
    (GOOD.replace("9=9", "9=8"), "think", (1, 1, 0)),
    (GOOD.replace("4", "9").replace("Image 1 is better", "Both images are equally good"), "think", (1, 0, 0)),  # it follows, and is no choice
    (GOOD.replace("Image 1 is better", "the first"), "think", (1, 0, 0)),
    ("<think>I like the first.</think><answer>Image 1 is better</answer>", "think", (1, 1, 0)),
    ("<answer>Image 1 is better</answer>", "think", (0, 1, 0)),
    ("<answer>Image 1 is better</answer>", "answer", (1, 1, 0)),
    ("<answer>Image 2 is better</answer>", "answer", (1, 0, 0)),
    ("<answer>Image 1 is better</answer>.", "answer", (0, 1, 0)),
    (GOOD, "answer", (0, 1, 1)),
    ("Image 1 is better", "answer", (0, 0, 0)),
    ("", "think", (0, 0, 0)),
])
def test_format_accuracy_and_consistency_are_rewarded_apart(text, mode, rewards):
    assert grpo.rewards_of(text, PAIR, mode) == dict(zip(("format", "accuracy", "consistency", "dimension"), (*rewards, 0.0)))


def test_an_unreadable_verdict_is_never_right_even_where_the_label_is_unknown():
    assert grpo.rewards_of("no verdict at all", data.Sample("1", "image_generation", label=None), "think")["accuracy"] == 0


def test_the_share_of_right_scores_is_a_reward_where_they_are_known():
    known = data.Sample("1", "image_generation", label=1, scores={"aesthetics": [9, 7], "authenticity": [10, 10]})
    assert grpo.rewards_of(GOOD, known, "think")["dimension"] == 1 / 4  # 9 is right, 4 is not, and of two nothing is said


@pytest.mark.parametrize("gated, expected", [(False, [3.5, 2.5, 2.5, 1.0]), (True, [3.5, 0.5, 2.5, 1.0])])
def test_rewards_are_weighted_and_accuracy_may_depend_on_the_reasoning(gated, expected):
    rewards = {"format": [1, 1, 1, 0], "accuracy": [1, 1, 0, 0], "consistency": [1, 0, 1, 0], "dimension": [0, 0, 1, 1]}
    own = config.GRPO(format_weight=0.5, accuracy_weight=2.0, consistency_weight=1.0, dimension_weight=1.0, gated=gated)
    assert grpo.total_reward({name: torch.tensor([values]) for name, values in rewards.items()}, own).tolist() == [expected]


@pytest.mark.parametrize("changes, says", [({"mode": "answer", "gated": True}, "mode answer has no reasoning"), ({"dimension_weight": 1.0}, "true scores")])
def test_rewards_that_nothing_could_earn_are_refused(tmp_path, samples, changes, says):
    (tmp_path / "rejection").mkdir()
    data.write_jsonl(tmp_path / "rejection" / "wrong.jsonl", [{key: value for key, value in data.sample_row(s).items() if key != "scores"} for s in samples])
    with pytest.raises(config.UserError, match=says):
        grpo.training_samples(config.GRPO(**changes), tmp_path)


# --------------------------------------------------------------------------------------------------- one update of a model


def own_settings(**changes):
    defaults = dict(group_size=4, max_new_tokens=12, micro_prompts=2, mode="think", beta=0.04, freeze_vision=False, max_grad_norm=1e9)
    return config.GRPO(**defaults | changes)


@pytest.fixture(scope="module")
def rolled(tiny, prompts):
    """Four prompts, four completions each, and rewards without meaning."""
    model, processor = tiny
    made = M.generate(model, processor, prompts[:4], 4, 12, seeds=range(4))
    rewards = torch.randint(0, 3, (4, 4), generator=torch.Generator().manual_seed(2)).float()
    return prompts[:4], made, grpo.group_advantages(rewards)


def one_update(tiny, rolled, lr=0.05, replayed=(), **changes):
    """(model after one update, metrics). Plain SGD shows the size of the gradient, which Adam hides."""
    model, (prompts, made, advantages) = copy.deepcopy(tiny[0]), rolled
    optimizer, reference = torch.optim.SGD(model.parameters(), lr=lr), made.logprobs + 0.1
    return model, grpo.update(model, tiny[1], optimizer, prompts, made, advantages, reference, own_settings(**changes), replayed)


def distance(one, other) -> float:
    return math.sqrt(sum((p - q).square().sum().item() for p, q in zip(one.parameters(), other.parameters())))


@pytest.mark.parametrize("normalise", ["rollout", "token", "constant"])
def test_the_micro_batch_size_changes_neither_the_update_nor_its_metrics(tiny, rolled, normalise):
    whole, metrics = one_update(tiny, rolled, normalise=normalise, micro_prompts=4)
    step = distance(whole, tiny[0])
    assert step > 1e-3
    for size in (1, 2, 3):
        model, same = one_update(tiny, rolled, normalise=normalise, micro_prompts=size)
        assert distance(whole, model) < 1e-4 * step and same == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_the_reference_scores_every_group_no_wider_than_it_is(tiny, rolled):
    """Of two micro-batches the first has 2 tokens at most: the values are those of the plain form, the tokens run those that are needed."""
    prompts, made, _ = rolled
    made, widths = copy.copy(made), []
    made.lengths = torch.cat([made.lengths[:8].clamp(max=2), made.lengths[8:]])
    handle = tiny[0].model.language_model.layers[0].register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    scored = grpo.reference_logprobs(tiny[0], tiny[1], prompts, made, own_settings(micro_prompts=2))
    handle.remove()
    plain = M.completion_logprobs(*tiny, prompts, made.ids, made.lengths, share_prompt=False)
    assert torch.allclose(scored, plain.detach(), atol=1e-5) and not scored[~made.mask].any() and not scored.requires_grad
    assert widths[1::2] == [1, int(made.lengths[8:].max()) - 1], "after each prompt its completions, without their last tokens"


def test_an_update_is_one_step_of_reinforce(tiny, rolled):
    """Against the textbook: the gradient of - mean over completions of advantage times mean log-probability, each row run in full."""
    prompts, made, advantages = rolled
    textbook = copy.deepcopy(tiny[0])
    logprobs = M.completion_logprobs(textbook, tiny[1], prompts, made.ids, made.lengths, share_prompt=False)
    (-(logprobs.sum(1) / made.lengths * advantages.flatten()).mean()).backward()
    with torch.no_grad():
        for parameter in textbook.parameters():
            parameter -= 0.05 * parameter.grad
    model, metrics = one_update(tiny, rolled, beta=0.0)
    assert distance(model, textbook) < 1e-4 * distance(model, tiny[0])
    assert metrics["loss"] == pytest.approx(0, abs=1e-6) and metrics["grad_norm"] == pytest.approx(distance(model, tiny[0]) / 0.05, rel=1e-3)


def test_replay_adds_the_sft_gradient_of_its_examples(tiny, rolled, samples):
    """Against transformers' own loss, whose mean over a row is weighed by the row's tokens: micro-batches of 200 tokens hold one or two rows."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    examples = [(data.build_prompt(s, "answer"), f"<answer>{data.verdict_string(s.task, s.label)}</answer>" + " really" * k) for k, s in enumerate(samples[::3])]
    encoded = [sft.encode_example(processor, model, example) for example in examples]
    responses = [len(e["ids"]) - e["prompt_length"] for e in encoded]
    for one, tokens in zip(encoded, responses):
        inputs = M.collate([one], "right", 0, "cpu")
        labels = inputs["input_ids"].clone()
        labels[:, : one["prompt_length"]] = -100
        loss = model(**inputs, labels=labels).loss * tokens / sum(responses)
        loss.backward()
    plain, before = one_update(tiny, rolled)
    both, metrics = one_update(tiny, rolled, replayed=examples, micro_tokens=200)
    assert len(set(responses)) == 4 and metrics["loss"] == before["loss"] and metrics["replay_loss"] > 1
    for one, two, parameter in zip(plain.parameters(), both.parameters(), model.parameters()):
        moved = torch.zeros_like(one) if parameter.grad is None else -0.05 * parameter.grad
        assert torch.allclose(two - one, moved, atol=1e-6)


def test_the_gradient_is_scaled_down_to_max_grad_norm(tiny, rolled):
    model, metrics = one_update(tiny, rolled, max_grad_norm=0.01)
    assert metrics["grad_norm"] > 0.02 and distance(model, tiny[0]) == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_groups_of_equal_rewards_leave_the_model_where_it_is(tiny, rolled):
    prompts, made, _ = rolled
    model, metrics = one_update(tiny, (prompts, made, torch.zeros(4, 4)), beta=0.0)
    assert metrics["grad_norm"] == 0 and all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny[0].parameters()))


def test_a_second_update_on_the_same_rollout_is_measured_from_the_policy_that_sampled(tiny, rolled):
    """With updates_per_rollout above 1 the ratio is pi / pi_old; shifting the recorded log-probabilities must show in it."""
    prompts, made, advantages = rolled
    shifted = M.Completions(made.ids, made.lengths, made.logprobs - math.log(1.3), made.truncated)
    _, first = one_update(tiny, (prompts, shifted, advantages), updates_per_rollout=1)
    _, later = one_update(tiny, (prompts, shifted, advantages), updates_per_rollout=2)
    assert first["ratio"] == pytest.approx(1) and first["clip_share"] == 0
    assert later["ratio"] == pytest.approx(1.3, rel=1e-3) and later["clip_share"] > 0


def test_an_update_scores_at_the_temperature_that_was_sampled_at(tiny, rolled):
    prompts, _, advantages = rolled
    cool = M.generate(*tiny, prompts, 4, 12, 0.6, seeds=range(8))
    ratio = lambda temperature: one_update(tiny, (prompts, cool, advantages), temperature=temperature, updates_per_rollout=2)[1]["ratio"]
    assert ratio(0.6) == pytest.approx(1, abs=1e-5) and ratio(1.0) != pytest.approx(1, abs=0.01)


def test_a_rollout_keeps_completions_and_rewards_of_a_prompt_together(tiny, samples, tmp_path):
    """A model that was taught the right verdict on every other prompt earns the accuracy reward there, and only there."""
    model, chosen = copy.deepcopy(tiny[0]), samples[::2]
    taught = [(s if k % 2 else s.swapped()).label for k, s in enumerate(chosen)]
    examples = [(data.build_prompt(s, "answer"), f"<answer>{data.verdict_string(s.task, label)}</answer>") for s, label in zip(chosen, taught)]
    sft.train(model, tiny[1], examples, config.SFT(lr=1e-2, epochs=60, batch_size=6, freeze_vision=False), tmp_path, "seed", "test")
    prompts = [M.encode(tiny[1], model, parts) for parts, _ in examples]
    made, texts, rewards = grpo.rollout(model, tiny[1], chosen, own_settings(group_size=3, max_new_tokens=20, mode="answer", temperature=0.0), prompts)
    assert texts == [examples[p][1] for p in range(6) for _ in range(3)]
    assert rewards["accuracy"].tolist() == [[0.0] * 3, [1.0] * 3] * 3 and rewards["format"].tolist() == [[1.0] * 3] * 6


def test_a_thinking_completion_is_judged_with_the_tag_its_prompt_opened(tiny, prompts, samples):
    _, texts, _ = grpo.rollout(*tiny, samples[:2], own_settings(group_size=2, max_new_tokens=4, temperature=0.0), prompts[:2])
    assert len(texts) == 4 and all(text.startswith("<think>") and text.count("<think>") == 1 for text in texts)


def test_a_prompt_that_is_to_think_has_opened_the_tag(tiny, samples):
    for mode, opened in (("think", data.THINK), ("answer", "")):
        for prompt in grpo.encode_prompts(tiny[1], copy.deepcopy(tiny[0]), samples[::4], mode, "short"):
            assert tiny[1].text(prompt["ids"]).endswith(f"assistant\n{opened}")


def test_the_penalty_of_an_update_is_the_estimator_that_is_set(tiny, rolled):
    """The reference lies 0.1 above the policy, so d = 0.1 at every token."""
    for kl, value in (("k1", -0.1), ("k2", 0.005), ("k3", math.exp(0.1) - 1.1)):
        _, metrics = one_update(tiny, rolled, kl=kl, lr=0.0)
        assert metrics["kl"] == pytest.approx(value, rel=1e-3)
    made = rolled[1]
    assert 0 < made.truncated.sum() < 16 and metrics["truncated_share"] == made.truncated.float().mean()
    assert metrics["length"] == made.lengths.float().mean()


def test_control_tokens_after_a_judgement_cost_it_the_format(tiny):
    tokenizer = tiny[1].tokenizer
    ids = lambda text: torch.tensor(M.tokenize(tokenizer, text, plain=False))
    assert tiny[1].text(ids(GOOD + M.IM_END)) == tiny[1].text(ids(GOOD)) == GOOD and tokenizer.eos_token == M.IM_END
    for text in (GOOD + M.PAD, GOOD + M.IM_START + M.IM_END):
        assert grpo.rewards_of(tiny[1].text(ids(text)), PAIR, "think")["format"] == 0


def test_a_run_is_its_formulas_in_a_plain_loop(tiny, samples, tmp_path):
    """Three steps of two updates, no setting at its default, one rollout and one row after the other: draws, prompts, rewards, advantages, the frozen
    reference, schedule, clipping and AdamW are those of the run; and so is what it logs. Official rows cannot be turned round."""
    verdict = lambda s, label: f"<answer>{data.verdict_string(s.task, label)}</answer>"
    official = lambda s: {key: value for key, value in data.sample_row(s).items() if data.is_generation(s.task) or key not in ("prompt", "answers")}
    (tmp_path / "data").mkdir(), (tmp_path / "grpo").mkdir()
    data.write_jsonl(tmp_path / "data" / "pool.jsonl", map(official, samples))
    pool, taught, processor = data.read_samples(tmp_path / "data" / "pool.jsonl"), copy.deepcopy(tiny[0]), tiny[1]
    examples = [(data.build_prompt(s, "answer", "full"), verdict(s, label)) for s in pool for label in (1, 2)]  # so it wavers
    sft.train(taught, processor, examples, config.SFT(lr=1e-2, epochs=15, batch_size=12, freeze_vision=False), tmp_path, "seed", "test")
    M.save(taught, processor, tmp_path / "direct_sft")
    settings = config.Settings(config.Run(seed=5), grpo=config.GRPO(
        mode="answer", start="direct_sft", data="pool", random_order=True, steps=3, prompts_per_step=4, group_size=5, updates_per_rollout=2, lr=2e-3,
        warmup=0.5, max_grad_norm=0.01, beta=0.5, kl="k2", clip_low=0.1, clip_high=0.3, scale_by_std=False, normalise="constant", format_weight=0.5,
        temperature=1.3, max_new_tokens=40, micro_prompts=3, replay=0.5))
    grpo.run("grpo", settings, tmp_path / "grpo")
    (policy, _), (reference, _), (made, _) = (M.load(str(tmp_path / name)) for name in ("direct_sft", "direct_sft", "grpo"))
    learning = [p for name, p in policy.named_parameters() if "visual" not in name]
    optimizer, rng = torch.optim.AdamW(learning, betas=(0.9, 0.99), weight_decay=0.0), random.Random("5/grpo")
    order, chosen = rng.sample(pool, 12), 0
    practice = sft.practice_examples("grpo", settings, tmp_path, 6)  # half an exercise per prompt, three steps of four prompts
    practice = random.Random("5/grpo/replay").sample(practice, 6)
    for step, (row, shown) in enumerate(zip(data.read_jsonl(tmp_path / "grpo" / "metrics.jsonl"), data.read_jsonl(tmp_path / "grpo" / "samples.jsonl"))):
        batch = [s.swapped() if data.is_generation(s.task) and rng.random() < 0.5 else s for s in order[4 * step : 4 * step + 4]]
        prompts, draw = [M.encode(processor, policy, data.build_prompt(s, "answer", "full")) for s in batch], random.Random(f"5/grpo/{step}")
        rolled = M.generate(policy, processor, prompts, 5, 40, 1.3, seeds=[draw.getrandbits(32) for _ in batch])
        texts = [[processor.text(rolled.ids[5 * p + g, : rolled.lengths[5 * p + g]]) for g in range(5)] for p in range(4)]
        rewards = torch.tensor([[0.5 * bool(re.fullmatch("<answer>[^<]*</answer>", text)) + (text == verdict(s, s.label)) for text in group]
                                for s, group in zip(batch, texts)])
        advantages, equal = rewards - rewards.mean(1, keepdim=True), [len(set(group)) == 1 for group in rewards.tolist()]
        logprobs = lambda model: M.completion_logprobs(model, processor, prompts, rolled.ids, rolled.lengths, 1.3, share_prompt=False)
        with torch.no_grad():
            old, ref = logprobs(policy), logprobs(reference)
        for _ in range(2):
            now, entropy = M.completion_logprobs(policy, processor, prompts, rolled.ids, rolled.lengths, 1.3, share_prompt=False, with_entropy=True)
            ratio, A = (now - old).exp(), advantages.view(-1, 1)
            per_token = 0.5 * (ref - now).square() / 2 - torch.minimum(ratio * A, ratio.clamp(0.9, 1.3) * A)
            optimizer.zero_grad()
            encoded = [sft.encode_example(processor, policy, example) for example in practice[2 * step : 2 * step + 2]]
            losses = [torch.nn.functional.cross_entropy(policy(**M.collate([e], "right", 0, "cpu")).logits[0, e["prompt_length"] - 1 : -1],
                                                        e["ids"][e["prompt_length"] :], reduction="sum") for e in encoded]
            replay_loss = sum(losses) / sum(len(e["ids"]) - e["prompt_length"] for e in encoded)
            (per_token[rolled.mask].sum() / (20 * 40) + replay_loss).backward()
            norm = torch.nn.utils.clip_grad_norm_(learning, 0.01)
            optimizer.param_groups[0]["lr"] = 2e-3 * (0.5, 1, 0.5)[step]
            optimizer.step()
        assert (shown["id"], shown["label"], shown["completions"]) == (batch[step].id, batch[step].label, texts[step])
        assert shown["rewards"] == rewards[step].tolist() and shown["advantages"] == pytest.approx(advantages[step].tolist(), abs=1e-6)
        expected = {"reward": rewards.mean(), "reward_std": rewards.std(1).mean(), "zero_variance_share": sum(equal) / 4, "grad_norm": norm,
                    "lr": optimizer.param_groups[0]["lr"], "length": rolled.lengths.float().mean(), "truncated_share": rolled.truncated.float().mean(),
                    "entropy": entropy[rolled.mask].mean(), "ratio": ratio[rolled.mask].mean(), "replay_loss": replay_loss,
                    "kl": ((ref - now).square() / 2)[rolled.mask].mean(), "loss": per_token[rolled.mask].sum() / (20 * 40)}
        assert {name: row[name] for name in expected} == pytest.approx({name: float(torch.as_tensor(value).detach()) for name, value in expected.items()}, rel=1e-3, abs=1e-6)
        chosen += 4 - sum(equal)
    assert chosen > 3 and distance(made, policy) < 1e-3 * distance(made, reference)


def test_without_a_gradient_the_stages_own_optimiser_moves_nothing(tiny, rolled):
    """No weight decay in GRPO: equal rewards and no KL leave every bit."""
    model, (prompts, made, _) = copy.deepcopy(tiny[0]), rolled
    optimizer = sft.optimizer_for(model, own_settings())
    optimizer.param_groups[0]["lr"] = 0.1
    grpo.update(model, tiny[1], optimizer, prompts, made, torch.zeros(4, 4), None, own_settings(beta=0.0))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny[0].parameters()))
