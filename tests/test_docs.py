"""The programs in the documentation run, and its links lead somewhere."""

import importlib
import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = [ROOT / "docs" / "start.md", *sorted((ROOT / "docs" / "recipes").glob("*.md"))]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


OPTIONAL = ("timm", "torch_geometric", "pytorch_forecasting")
"""Libraries that a recipe is about, and that the tests do not bring."""


@pytest.mark.filterwarnings("ignore")  # of small programs, as their readers run them
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_the_program_of_a_recipe_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for library in OPTIONAL:
        if re.search(rf"^(import|from) {library}\b", program, re.MULTILINE):
            pytest.importorskip(library, reason=f"the recipe needs {library}")
    if "devices=2" not in program:
        exec(compile(program, str(page), "exec"), {"__name__": "__main__"})
        return
    Path("program.py").write_text(program)  # Lightning starts it again for the second process
    done = subprocess.run(
        [sys.executable, "program.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_functions_of_the_page_on_the_article_exist():
    named = re.findall(r"`([\w/]+)\.py:([\w.]+)`", (ROOT / "docs" / "article.md").read_text())
    assert len(named) > 15
    for file, function in named:
        module = importlib.import_module(f"lightning_lora.{file.replace('/', '.')}")
        assert callable(reduce(getattr, function.split("."), module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_repository_that_a_page_names_exist(page):
    for name in re.findall(r"`(?:python )?((?:tests|benchmarks|examples|studies|docs)/[\w/]+\.\w+)", page.read_text()):
        assert (ROOT / name).exists(), name
