# SPDX-License-Identifier: Apache-2.0
"""What the docs name is there: files, headings, functions, options of commands, generated parts."""

import ast
import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from meshwen.cli.app import app
from meshwen.models.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/meshwen/**/*.md")]
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def without_code(text: str) -> str:
    """The page without its blocks of code, in which brackets mean something else."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", without_code(page.read_text("utf-8")), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        taken = sum(other == anchor or other.startswith(f"{anchor}-") for other in found)
        found.add(anchor if anchor not in found else f"{anchor}-{taken}")
    return found


def defined(source: Path) -> set[str]:
    """The functions, classes, methods (`Class.method`) and variables that a file defines."""

    def names(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{prefix}{node.name}.")
            targets = [node.target] if isinstance(node, ast.AnnAssign) else []
            targets += node.targets if isinstance(node, ast.Assign) else []
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return names(ast.parse(source.read_text("utf-8")).body, "")


def links() -> list[tuple[Path, str, str]]:
    """Page, text and target of every relative link."""
    return [
        (page, text, target)
        for page in PAGES
        for text, target in LINK.findall(without_code(page.read_text("utf-8")))
        if not re.match(r"[a-z]+:", target)
    ]


def test_there_are_pages_and_links():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}
    assert len(links()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for where, _, target in links():
        if where != page:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert ROOT in file.parents, target
        if anchor:
            assert anchor in anchors(file), target


def test_a_name_that_links_to_a_file_is_defined_there():
    wrong = []
    for page, text, target in links():
        name = NAME.fullmatch(text)
        if not name or not target.endswith(".py") or name[1].endswith(".py"):
            continue
        if name[1] not in defined((page.parent / target).resolve()):
            wrong.append(f"{page.name}: {name[1]} is not in {target}")
    assert not wrong


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of each `meshwen` command in a block of code, fenced or indented."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        fenced = re.findall(r"^```\w*$(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        indented = re.findall(r"^ {4}.+$", without_code(text), re.MULTILINE)
        for line in "\n".join((*fenced, *indented)).splitlines():
            command = re.fullmatch(r"\s*(?:\$ |srun .*?)?(meshwen .*)", line)
            if command and not command[1].startswith("meshwen:"):
                found.append((page.name, shlex.split(command[1].rstrip(" &"), comments=True)))
    return found


def test_every_command_in_the_docs_has_the_options_it_is_shown_with():
    group = typer.main.get_command(app)
    lines = commands()
    assert len(lines) > 10
    for page, words in lines:
        command, rest = group, words[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, (page, words)
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for param in command.params for option in param.opts}
        allowed = known | set(group.params[0].opts) | {"--install-completion", "--help"}
        if command.context_settings.get("ignore_unknown_options"):
            continue  # The harness's own options follow.
        for word in rest:
            if word.startswith("-") and word != "-":
                assert word.partition("=")[0] in allowed, (page, words)


def test_the_chart_is_what_its_script_draws_from_its_data(script):
    data = json.loads((ROOT / "docs/speed.json").read_text("utf-8"))
    assert script("speed_svg").chart(data) == (ROOT / "docs/speed.svg").read_text("utf-8")


def test_the_chart_has_the_numbers_of_the_table():
    data = json.loads((ROOT / "docs/speed.json").read_text("utf-8"))
    page = (ROOT / "docs/performance.md").read_text("utf-8").replace("*", "").replace(",", "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    for engine in data["engines"]:
        name = f"{engine['name']} {engine['format']}"
        found = [[float(cell) for cell in row[1:]] for row in rows if row[:1] == [name]]
        assert found == [engine["milliseconds"]], name


def test_the_readme_has_the_memory_that_inspect_computes(script):
    """One size's row is computed here, and all are named: `scripts/memory_table.py README.md`."""
    table = (ROOT / "README.md").read_text("utf-8")
    assert script("memory_table").row("qwen2.5-7b") in table
    for preset in PRESETS:
        assert f"\n| `{preset}` | " in table


def test_the_source_distribution_has_every_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"docs", *(page.name for page in ROOT.glob("*.md"))} <= set(included)
