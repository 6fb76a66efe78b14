"""results/votes.py: majorities against enumeration, calibration by hand, and the command's mistakes."""

import dataclasses
import itertools

import numpy as np
import pytest

import config
import data
import evaluate
import model as M
from results import votes


@pytest.mark.parametrize("answers, label, value", [([1, 1, 2], 1, 1.0), ([1, 1, 2], 2, 0.0), ([1, 2], 1, 0.5), ([None, None, 2], 2, 1.0), ([None], 1, 0.5)])
def test_majority(answers, label, value):
    assert votes.majority(answers, label) == value


@pytest.mark.parametrize("count", [1, 3, 5])
def test_accuracy_of_k_votes_is_the_mean_over_all_draws_of_k(count):
    cast = [([1, 1, 1, 2, 2, None, 1], 1), ([2, 2, 2, 1, 1, 1, 2], 1), ([2] * 7, 2)]
    exact = np.mean([np.mean([votes.majority(list(some), label) for some in itertools.combinations(answers, count)]) for answers, label in cast])
    assert abs(votes.accuracy_of(cast, count, draws=4000) - exact) < 0.015  # standard error below 0.005


def test_calibration_sorts_pairs_by_the_winners_share():
    cast = [([1] * 9 + [2], 1), ([1] * 9 + [2], 2), ([1] * 6 + [2] * 4, 1), ([1] * 5 + [2] * 5, 1), ([2] * 10, 2)]
    assert votes.calibration(cast) == [(0.6, 0.7, 1, 0.6, 1.0), (0.9, 1.0, 2, pytest.approx(0.9), 0.5), (1.0, 1.0, 1, 1.0, 1.0)]
    assert votes.calibration([([1] * 3 + [2] + [None] * 9, 1)]) == [(0.7, 0.8, 1, 0.75, 1.0)], "what cannot be read is nobody's vote"


def test_a_pair_that_cannot_be_turned_has_all_its_votes_as_given(tiny, samples, tmp_path, capsys):
    official = dataclasses.replace(next(s for s in samples if s.task == "image_understanding"), problem="Which answer is better?")
    (tmp_path / "data").mkdir()
    data.write_jsonl(tmp_path / "data" / "test.jsonl", [data.sample_row(s) for s in (samples[0], dataclasses.replace(official, prompt="", answers=[]))])
    assert [s.can_swap for s in data.read_samples(tmp_path / "data" / "test.jsonl")] == [True, False]
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "done.json").write_text('{"settings": {"evaluate": {"max_new_tokens": 4}, "of another version": {"x": 1}}}')
    M.save(*tiny, tmp_path / "grpo")
    (tmp_path / "grpo" / "done.json").write_text('{"id": "grpo 1"}')
    evaluate.command_line("votes", [str(tmp_path), "--votes", "5"])
    printed = capsys.readouterr().out
    assert "10 of 10 judgements cannot be read" in printed and "| 5 | 50.0 |" in printed


def test_a_run_without_a_model_is_refused(tmp_path):
    with pytest.raises(config.UserError, match="no finished model"):
        evaluate.command_line("votes", [str(tmp_path)])
