"""README.md and docs/ against the code: names, settings, files and links have to exist, so that they cannot rot."""

import importlib
import re
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")]}
TEXT = "\n".join(text for page, text in PAGES.items() if page != "docs/reliability.md")  # which shows mistakes
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", sorted({name for name in re.findall(r"`(\w+\.\w+)`", TEXT) if name.partition(".")[0] in SCRIPTS and not name.endswith(".py")}))
def test_every_function_that_is_named_exists(name):
    module, attribute = name.split(".")
    found = importlib.import_module(module)
    section = getattr(config.Settings(), module, None)  # `distill.ask` is a function, `grpo.lr` a setting
    assert hasattr(found, attribute) or hasattr(section, attribute)


def test_the_paper_to_code_table_names_at_least_twenty_functions():
    table = PAGES["README.md"].split("## From the paper to the code")[1].split("\n## ")[0]
    assert len(set(re.findall(r"`(\w+\.\w+)`", table))) >= 20


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--(\w+\.\w+) ([^\s`]+)", TEXT))))
def test_every_setting_that_is_named_exists_and_takes_the_value(flag):
    config.load_settings("smoke", [flag])


def test_the_files_table_lists_every_script_and_nothing_else():
    table = PAGES["README.md"].split("## Files, in reading order")[1].split("\n## ")[0]
    assert {name.removesuffix(".py") for name in re.findall(r"`(\w+\.py)`", table)} == SCRIPTS


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], (target, anchor)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:tests|configs|docs)/[\w./-]+)`", TEXT))))
def test_files_that_are_named_exist(name):
    assert (ROOT / name).exists()


def test_python_examples_compile():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 2 and all(compile(block, "README", "exec") for block in blocks)


def test_metrics_that_are_explained_are_those_that_are_logged():
    table = PAGES["README.md"].split("## What each logged metric means")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))))
    source = (ROOT / "grpo.py").read_text()
    assert named and all(f'"{name}"' in source or name.startswith("reward_") or f'"{name}"' in (ROOT / "sft.py").read_text() for name in named)
