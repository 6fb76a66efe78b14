"""The figures of results/README.md, as SVG files beside it, from what `evaluate.py table --keep results` wrote. Needs: pip install matplotlib

    python results/plots.py
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib.pyplot as plt
import numpy as np

import data
from results.claims import KEYS, REASONING, changed, differs, estimate, gain, per_pair, read_run

STAGES = {"base-answer": "base\n(direct)", "cold_start-think": "cold\nstart", "rejection_sft-think": "rejection\nsampling", "grpo-think": "GRPO\n(full)"}
PASS = 31  # steps of `small` in which GRPO sees its wrong samples about once


def percents(samples: list) -> np.ndarray:
    """(mean, low, high) over the seeds, in per cent."""
    return 100 * np.array(estimate([list(values) for values in samples]))


def draw(axis, points: list, label: str, shift: float = 0.0) -> None:
    """A line through (mean, low, high) points, with their intervals."""
    mean, low, high = np.array(points).T
    axis.errorbar(np.arange(len(points)) + shift, mean, [mean - low, high - mean], marker="o", capsize=3, label=label)


def finish(figure, name: str) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def stages_plot(runs: list) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    for k, task in enumerate(data.TASKS):
        draw(axis, [percents([per_pair(run, key, task=task).values() for run in runs]) for key in STAGES], task.replace("_", " "), 0.06 * (k - 1.5))
    axis.set(xticks=range(len(STAGES)), xticklabels=STAGES.values(), ylabel="accuracy %, both orders", title=f"Every stage, mean of {len(runs)} seeds and 95% interval")
    axis.legend(frameon=False)
    finish(figure, "stages")


def reasoning_plot(runs: list) -> None:
    thinking = list(STAGES)[1:]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, value in REASONING.items():
        axis = axes[int(", " in name)]
        draw(axis, [percents([per_pair(run, key, value=value).values() for run in runs]) for key in thinking], name)
    for axis, title in zip(axes, ("right, % of the judgements", "verdict and scores disagree, %")):
        axis.set(xticks=range(len(thinking)), xticklabels=[STAGES[key] for key in thinking], title=title)
        axis.margins(y=0.25)
        axis.legend(frameon=False)
    finish(figure, "reasoning")


def curves_plot(runs: list) -> None:
    """GRPO's rewards, averaged over a window of one pass, since prompts differ in difficulty and come again with the next pass."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for name in ("reward_accuracy", "reward_consistency", "zero_variance_share"):
        smooth = np.array([np.convolve(run["curves"][name], np.ones(PASS) / PASS, "valid") for run in runs])  # [seeds, steps]
        steps = np.arange(PASS, PASS + smooth.shape[1])
        line, = axis.plot(steps, smooth.mean(0), label=name.replace("_", " "))
        axis.fill_between(steps, smooth.min(0), smooth.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
    axis.set(xlabel=f"step (mean of the last {PASS})", title=f"GRPO on the wrong samples: mean and range of {len(runs)} seeds")
    axis.legend(frameon=False)
    finish(figure, "grpo")


def changes_plot(named: dict) -> None:
    """The full model of every changed run against the plain run of its seed; what is far off stands at the edge, with its figure."""
    points = {what: percents(gain(runs, "grpo-think", "grpo-think", than=seeds)) for what, (runs, seeds) in changed(named).items()
              if all(differs(run, seed, "grpo-think") for run, seed in zip(runs, seeds))}  # of some, only a control was changed
    order = sorted(points, key=lambda what: points[what][0])
    mean, low, high = np.array([points[what] for what in order]).T
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.28 * len(order)))
    edge = -3
    axis.errorbar(mean, range(len(order)), xerr=[mean - low, high - mean], fmt="o", capsize=3)
    for row in np.flatnonzero(mean < edge):
        axis.text(edge + 0.15, row, f"\N{BLACK LEFT-POINTING TRIANGLE} {mean[row]:.1f}", va="center")
    axis.set_xlim(edge, max(high) + 0.5)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(yticks=range(len(order)), yticklabels=order, title="Full model, points of accuracy against the plain run")
    finish(figure, "changes")


if __name__ == "__main__":
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "results", "font.family": "sans-serif"}
    files = sorted(HERE.glob("seed*.jsonl.gz"), key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])
    named = {file.name.removesuffix(".jsonl.gz"): read_run(file) for file in files}
    named = {name: named[name.partition("-")[0]] | run for name, run in named.items()}
    plain = [run for name, run in named.items() if "-" not in name]
    assert all(key in run for run in plain for _, key in KEYS)
    stages_plot(plain), reasoning_plot(plain), curves_plot(plain)
    if len(named) > len(plain):
        changes_plot(named)
