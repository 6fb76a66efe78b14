"""results/claims.py: intervals against closed forms, differences within pairs, decisions, and the kept files."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest

from results import claims
import config
import data
import evaluate
import report
import stages


def row(task, number, answer, mode="think", split="test", swapped=False, scores_right=1.0):
    return {"split": split, "id": f"{task}-{number}", "swapped": swapped, "task": task, "mode": mode, "label": 1, "answer": answer, "format_ok": answer is not None,
            "sums_ok": True, "consistent": answer == 1, "scores_right": scores_right, "facts_right": 1 / 3, "text": "x" * 400}


def make_run(right: dict) -> dict:
    """A run of 10 pairs per task in both splits of which, by key of the stage table, so many are judged right."""
    return {f"{stage}-{mode}": [row(task, k, 1 if k < right.get(f"{stage}-{mode}", 5) else 2, mode, split) for task in data.TASKS for split in ("test", "heldout")
                                for k in range(10)] for _, stage, mode in stages.ROWS} | {"settings": {}, "curves": {}}


def test_interval_over_seeds_is_students_t():
    # t(0.975, 2) = 4.3027: of 1, 2, 3 the mean is 2, s = 1, half = 4.3027 / sqrt(3)
    mean, low, high = claims.estimate([[0, 2], [2, 2], [4, 2]])
    assert mean == 2.0 and math.isclose(high - mean, 4.3027 / 3**0.5, rel_tol=1e-4) and math.isclose(mean - low, high - mean)


def test_students_quantiles_against_the_density():
    for k, quantile in enumerate(claims.STUDENT, 1):  # integrate the density of t with k degrees of freedom from 0 to the quantile
        t = np.linspace(0, quantile, 400001)
        density = math.gamma((k + 1) / 2) / (math.sqrt(k * math.pi) * math.gamma(k / 2)) * (1 + t**2 / k) ** (-(k + 1) / 2)
        assert math.isclose(0.5 + np.trapezoid(density, t), 0.975, abs_tol=2e-5)


def test_one_seed_resamples_its_pairs():
    values = [1.0] * 30 + [0.0] * 10
    mean, low, high = claims.estimate([values])
    assert mean == 0.75 and abs((high - low) / 2 - 1.96 * math.sqrt(0.75 * 0.25 / 40)) < 0.02


def test_a_difference_is_taken_pair_by_pair():
    run = make_run({"base-answer": 5, "grpo-think": 5})
    run["grpo-think"] = [one | {"answer": 3 - one["answer"]} for one in run["grpo-think"]]  # as many right, each of the other pairs
    values, = claims.gain([run], "grpo-think", "base-answer")
    assert sorted(values) == [-1.0] * 20 + [1.0] * 20


@pytest.mark.parametrize("spans, says", [([(0.1, 0.3)], "holds"), ([(-0.1, 0.3)], "undecided"), ([(-0.3, -0.1)], "does not hold"), ([(0.1, 0.2), (-0.1, 0.1)], "undecided"),
                                         ([(0.1, 0.2), (-0.2, -0.1)], "does not hold"), ([(0.0, 0.2)], "undecided")])
def test_decision(spans, says):
    assert claims.decision([("a task", ((low + high) / 2, low, high)) for low, high in spans]) == says


def test_claims_of_known_runs():
    right = {"base-answer": 5, "grpo_direct-answer": 6, "cold_start-think": 4, "rejection_sft-think": 7, "grpo-think": 9, "grpo-answer": 5}
    found = {name: scopes for name, _, scopes in claims.claims([make_run(right)] * 3)}  # equal seeds: intervals of width 0
    mean = lambda name: {scope: round(e[0], 9) for scope, e in found[name]}
    assert mean("C1") == {"all": 0.1} and mean("C2") == dict.fromkeys(data.TASKS, 0.2) and mean("C3") == dict.fromkeys(data.TASKS, 0.2)
    assert mean("C4") == dict.fromkeys([t for t in data.TASKS if t != "image_generation"], 0.2)
    assert mean("C5") == {"all": 0.0} and mean("C6") == {"all": 0.1}  # half of 40 points, less 10
    assert mean("2") == {"all": 0.3} and mean("3") == {"all": 0.2} and mean("1-3") == {"all": 0.4}
    assert [claims.decision(found[name]) for name in ("C1", "C2", "C3", "C4", "C5", "C6")] == ["holds"] * 4 + ["undecided", "holds"]


def write_folder(folder, run, settings):
    (folder / "evaluate").mkdir(parents=True)
    for key, rows in run.items():
        data.write_jsonl(folder / "evaluate" / f"{key}.jsonl", rows)
        config.write_text(folder / "evaluate" / f"{key}.json", json.dumps({"state": report.judged_of(key.rpartition("-")[0], folder) + [{}]}))
    config.write_text(folder / "evaluate" / "done.json", json.dumps({"settings": settings}))
    return str(folder)


def test_command_prints_the_same_from_folders_and_from_what_it_kept(tmp_path, capsys):
    plain = [write_folder(tmp_path / f"seed{k}", make_run({"grpo-think": 8 + k}), {"run": {"seed": k}, "grpo": {"beta": 0.04}}) for k in (0, 1)]
    changed = write_folder(tmp_path / "seed1-beta0", make_run({"grpo-think": 7}), {"run": {"seed": 1}, "grpo": {"beta": 0.0}})
    evaluate.command_line("table", [*plain, changed, "--keep", str(tmp_path / "kept"), "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert "| beta0 | `--grpo.beta 0.0` | 1 | + GRPO (full) | 70.0 [" in printed and "| -20.0 [" in printed  # against seed1 alone, where 90 are right
    assert "mean over 2 seeds" in printed and "| + GRPO (full) | 85.0 [" in printed
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == ["seed0", "seed1", "seed1-beta0"]
    assert printed.count("| beta0 |") == 1, "a row for what was judged by another checkpoint, and none for the rest"
    files = [tmp_path / "kept" / f"{name}.jsonl.gz" for name in ("seed0", "seed1", "seed1-beta0")]
    assert files[2].stat().st_size < files[1].stat().st_size / 2
    evaluate.command_line("table", [str(file) for file in files])
    assert capsys.readouterr().out == printed


def test_judgements_of_a_checkpoint_that_was_made_again_are_no_result(tmp_path):
    folder = Path(write_folder(tmp_path / "seed0", make_run({}), {}))
    (folder / "grpo").mkdir()
    (folder / "grpo" / "done.json").write_text('{"id": "grpo 2"}')
    with pytest.raises(config.UserError, match="seed0: no judgements grpo-think; finish the run"):
        claims.table(argparse.Namespace(runs=[str(folder)], keep="", json=""))


def test_mistakes_are_named(tmp_path):
    run = make_run({})
    del run["grpo-think"]
    folder = write_folder(tmp_path / "seed0", run, {})
    options = argparse.Namespace(runs=[folder], keep="", json="")
    with pytest.raises(config.UserError, match="seed0: no judgements grpo-think"):
        claims.table(options)
    with pytest.raises(config.UserError, match="cannot read .*nothing"):
        claims.table(argparse.Namespace(runs=[str(tmp_path / "nothing.jsonl.gz")], keep="", json=""))
    (tmp_path / "seed1.jsonl.gz").write_bytes(b"text")
    with pytest.raises(config.UserError, match="cannot read .*seed1"):
        claims.table(argparse.Namespace(runs=[str(tmp_path / "seed1.jsonl.gz")], keep="", json=""))


def test_a_kept_run_beside_a_folder_differs_only_where_it_was_judged_otherwise(tmp_path, capsys):
    run = make_run({"grpo-think": 8})
    for key in run.keys() - {"settings", "curves"}:
        run[key] = [one | {"scores_right": 1 / 3} for one in run[key]]
    plain = write_folder(tmp_path / "seed0", run, {"grpo": {"beta": 0.04}})
    (tmp_path / "seed0" / "grpo").mkdir()
    steps = [dict.fromkeys(claims.CURVES, 0.123456) for _ in range(3)]
    data.write_jsonl(tmp_path / "seed0" / "grpo" / "metrics.jsonl", steps)
    evaluate.command_line("table", [plain, "--keep", str(tmp_path / "kept")])
    kept = claims.read_run(tmp_path / "kept" / "seed0.jsonl.gz")
    assert kept["settings"] == {"grpo.beta": 0.04} and kept["curves"] == {name: [0.1235] * 3 for name in claims.CURVES}
    write_folder(tmp_path / "seed0-same", run, {"grpo": {"beta": 0.04}})
    changed = write_folder(tmp_path / "seed0-beta0.1", make_run({"grpo-think": 7}), {"grpo": {"beta": 0.1}})
    capsys.readouterr()
    evaluate.command_line("table", [str(tmp_path / "kept" / "seed0.jsonl.gz"), str(tmp_path / "seed0-same"), changed, "--keep", str(tmp_path / "kept")])
    printed = capsys.readouterr().out
    assert "| beta0.1 | `--grpo.beta 0.1` | 1 | + GRPO (full) |" in printed and "| same |" not in printed
    write_folder(tmp_path / "again" / "seed0", make_run({"grpo-think": 6}), {})
    for runs, says in (([str(tmp_path / "again" / "seed0"), str(tmp_path / "kept" / "seed0-beta0.1.jsonl.gz")], "kept from a copy of another run"),
                       ([plain, str(tmp_path / "kept" / "seed0.jsonl.gz")], "two of the runs have the same name")):
        with pytest.raises(config.UserError, match=says):
            claims.table(argparse.Namespace(runs=runs, keep="", json=""))


def test_runs_without_known_scores_are_refused(tmp_path):
    run = make_run({})
    run["grpo-think"][0]["scores_right"] = None
    with pytest.raises(config.UserError, match="seed0 was tested on pairs whose true scores nobody knows"):
        claims.table(argparse.Namespace(runs=[write_folder(tmp_path / "seed0", run, {})], keep="", json=""))


def test_runs_of_the_same_seed_or_of_other_pairs_are_refused(tmp_path):
    more = make_run({})
    more["base-answer"] = more["base-answer"][1:]
    for runs, says in (({"seed0": (make_run({}), 0), "seed1": (make_run({}), 0)}, "the same seed"), ({"seed2": (make_run({}), 2), "seed2-x": (make_run({}), 3)}, "other pairs"),
                       ({"seed3": (make_run({}), 3), "seed3-x": (more, 3)}, "seed3-x was tested on other pairs than seed3")):
        folders = [write_folder(tmp_path / name, run, {"run": {"seed": seed}}) for name, (run, seed) in runs.items()]
        with pytest.raises(config.UserError, match=says):
            claims.table(argparse.Namespace(runs=folders, keep="", json=""))


def test_a_changed_run_without_the_run_of_its_seed_is_named(tmp_path):
    folders = [write_folder(tmp_path / name, make_run({}), {}) for name in ("seed0", "seed5-beta0")]
    with pytest.raises(config.UserError, match="seed5-beta0 is compared with seed5"):
        claims.table(argparse.Namespace(runs=folders, keep="", json=""))


def test_more_seeds_than_the_quantiles_reach():
    for seeds, quantile in (25, 2.0639), (26, 2.0639), (100, 2.0639):
        mean, low, high = claims.estimate([[float(k)] for k in range(seeds)])
        assert mean == (seeds - 1) / 2 and math.isclose(high - mean, quantile * np.std(range(seeds), ddof=1) / seeds**0.5, rel_tol=1e-4)


def test_each_split_has_its_own_table_and_claims_are_of_the_test(tmp_path, capsys):
    run = make_run({key: 9 for _, key in claims.KEYS})
    for rows in (run[key] for _, key in claims.KEYS):
        rows[:] = [one | {"answer": 2} if one["split"] == "heldout" and int(one["id"][-1]) >= 4 else one for one in rows]
    evaluate.command_line("table", [write_folder(tmp_path / "seed0", run, {})])
    printed = capsys.readouterr().out
    test, held_out = printed.partition("never trained on\n\n")[0], printed.partition("never trained on\n\n")[2].partition("The reasoning")[0]
    assert test.count("| 90.0 [") == held_out.count("| 40.0 [") == 5 * len(claims.KEYS) and "| 40.0 [" not in test and "| 90.0 [" not in held_out


def test_reasoning_that_disagrees_with_the_verdict_is_counted_on_either_side():
    said = lambda answer, scores_right: {name: value(row("image_generation", 0, answer, scores_right=scores_right)) for name, value in claims.REASONING.items()}
    right, wrong = "right verdict, wrong scores", "wrong verdict, right scores"
    assert [(said(a, s)[right], said(a, s)[wrong]) for a in (1, 2, None) for s in (1.0, 0.5)] == [
        (False, False), (True, False), (False, True), (False, False), (False, True), (False, False)]
    assert said(1, 0.5)["verdict follows"] and said(1, 0.5)["scores right"] == 0.5 and said(1, 0.5)["facts right"] == 1 / 3
