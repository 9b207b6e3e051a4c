"""The documents say what the code does: every option is told with its default, and the examples run."""

import inspect
import re
from pathlib import Path

import pytest

import mita_ext

ROOT = Path(__file__).parent.parent
SECTIONS = dict(section.split("\n", 1) for section in (ROOT / "docs/api.md").read_text().split("\n## ")[1:])
FUNCTIONS = [name for name in mita_ext.__all__ if inspect.isfunction(getattr(mita_ext, name))]


def told(section):
    """name -> the rest of its row in the tables of a section; a row may tell several."""
    rows = re.findall(r"^\| (`.*?) \| (.*)\|$", SECTIONS[section], re.MULTILINE)
    return {name: rest for names, rest in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_option_is_told(function):
    parameters = inspect.signature(getattr(mita_ext, function)).parameters.values()
    parameters = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    rows = told(function)
    assert set(rows) == set(parameters)
    for name, default in parameters.items():
        _, cell, *_ = (cell.strip() for cell in rows[name].split("|"))
        assert cell == "" if default is inspect.Parameter.empty else cell.startswith(f"`{default!r}`"), name


def test_every_function_and_field_is_told():
    assert set(FUNCTIONS) <= set(SECTIONS)
    assert set(told("MiTAAux")) == set(mita_ext.MiTAAux._fields)
    assert {name for name in told("Costs") if name in mita_ext.__all__} == set(FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_readme_has_the_signatures(function):
    names = list(inspect.signature(getattr(mita_ext, function)).parameters)
    line = re.search(rf"^\| `{function}\((.*?)\)` \|", (ROOT / "README.md").read_text(), re.MULTILINE).group(1)
    assert re.findall(r"(\w+)(?==|,|$)", re.sub(r"=[\w.]+", "=", line)) == [n for n in names if n != "unsupported"]


@pytest.mark.parametrize("document", ["README.md", "docs/api.md"])
def test_examples_run(document):
    for example in re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(example, document, "exec"), {})
