"""The documents say what the code does: every option is told with its default, and the examples run."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import mita_ext
from mita_ext.nn import MiTAAttention

ROOT = Path(__file__).parent.parent
SECTIONS = dict(section.split("\n", 1) for section in (ROOT / "docs/api.md").read_text().split("\n## ")[1:])
FUNCTIONS = [name for name in mita_ext.__all__ if inspect.isfunction(getattr(mita_ext, name))]


def told(section):
    """name -> the rest of its row in the tables of a section; a row may tell several."""
    rows = re.findall(r"^\| (`.*?) \| (.*)\|$", SECTIONS[section], re.MULTILINE)
    return {name: rest for names, rest in rows for name in re.findall(r"`(\w+)`", names)}


def needs(*libraries):
    for library in libraries:
        pytest.importorskip(library, reason=f"{library} is not installed: pip install mita-ext[{library}]")


def assert_told(section, parameters):
    rows = told(section)
    assert set(rows) == {p.name for p in parameters}
    for p in parameters:
        _, cell, *_ = (cell.strip() for cell in rows[p.name].split("|"))
        assert cell == "" if p.default is p.empty else cell.startswith(f"`{p.default!r}`"), p.name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_option_is_told(function):
    parameters = inspect.signature(getattr(mita_ext, function)).parameters.values()
    assert_told(function, [p for p in parameters if p.kind is not p.VAR_KEYWORD])


def test_every_option_of_the_module_is_told():
    parameters = inspect.signature(MiTAAttention).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert_told("MiTAAttention", own)
    line = re.search(r"MiTAAttention\((.*?), \*, \.\.\.\)", SECTIONS["MiTAAttention"], re.DOTALL).group(1)
    assert re.findall(r"(\w+)(?==|,)", re.sub(r"=[\w.]+", "=", line)) == [p.name for p in parameters if p not in own]


def test_every_option_of_transformers_is_told():
    needs("transformers")
    register = importlib.import_module("mita_ext.integrations.transformers").register
    assert_told("transformers", inspect.signature(register).parameters.values())


def test_every_function_and_field_is_told():
    assert set(FUNCTIONS) <= set(SECTIONS)
    assert set(told("MiTAAux")) == set(mita_ext.MiTAAux._fields)
    assert {name for name in told("Costs") if name in mita_ext.__all__} == set(FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_readme_has_the_signatures(function):
    names = list(inspect.signature(getattr(mita_ext, function)).parameters)
    line = re.search(rf"^\| `{function}\((.*?)\)` \|", (ROOT / "README.md").read_text(), re.MULTILINE).group(1)
    assert re.findall(r"(\w+)(?==|,|$)", re.sub(r"=[\w.]+", "=", line)) == [n for n in names if n != "unsupported"]


def examples():
    for document in ("README.md", "docs/api.md"):
        found = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
        yield from (pytest.param(example, id=f"{document}-{i}") for i, example in enumerate(found))


@pytest.mark.parametrize("example", list(examples()))
def test_examples_run(example, tmp_path, monkeypatch):
    needs(*re.findall(r"^(?:from|import) (timm|transformers)\b", example, re.MULTILINE))
    if "viz" in example:
        needs("matplotlib")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})


def test_every_drawing_is_told():
    needs("matplotlib")
    viz = importlib.import_module("mita_ext.viz")
    rows = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", SECTIONS["viz"], re.MULTILINE))
    functions = {name for name, x in vars(viz).items() if inspect.isfunction(x) and x.__module__ == viz.__name__}
    drawings = {name for name in functions if not name.startswith("_")}
    assert set(rows) == drawings - {"look"}
    for name, arguments in rows.items():
        plain = [p.replace(annotation=p.empty) for p in inspect.signature(getattr(viz, name)).parameters.values()]
        assert str(inspect.Signature(plain)) == f"({arguments})"


def test_every_command_of_the_readme_is_run():
    """By `make newcomer`, or by a test: those of bench.train; bench.bench_attention by `make bench`, on a GPU."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(make \w+) ", readme, re.MULTILINE) + re.findall(r"`((?:make|pip|python3?) [^`]*)`", readme)
    newcomer = re.search(r"^newcomer:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    for command in commands:
        if extra := re.fullmatch(r'pip install "\.\[(\w+)\]"', command):
            assert extra[1] in re.search(r'"\.\[([\w,]+)\]"', newcomer)[1].split(","), command
        elif module := re.fullmatch(r"python3 -m bench\.(\w+)(?: \w+)?", command):
            assert module[1] in ("bench_attention", "train"), command
        else:
            assert command in newcomer, command


def test_profiling_tells_every_range():
    ranges = set(re.findall(r'"(mita_ext::\w+)"', (ROOT / "csrc/cuda/mita_cuda.cpp").read_text()))
    assert set(re.findall(r"^\| `(mita_ext::\w+)`", (ROOT / "docs/profiling.md").read_text(), re.MULTILINE)) == ranges
