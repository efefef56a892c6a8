"""What the documents show exists: commands and options, recipes, links, names of the library; method pages are up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer

import graftwork
from graftwork.cli import main as cli
from graftwork.recipe import Recipe, load_recipe
from graftwork.registry import AXES

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.is_file()]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(graft [^`\n]+)`")


@cache
def verbs() -> dict:
    """{verb: its command}, as the parser has them."""
    if not cli.app.registered_commands:
        cli._register()
    return typer.main.get_command(cli.app).commands


def commands(text: str) -> list[tuple[str, bool]]:
    """(command line, whether it is whole) of every `graft ...` in a page: lines of blocks are whole, spans may be a part."""
    found = []
    for language, body in BLOCK.findall(text):
        if language in ("", "bash", "sh", "shell", "console", "text"):
            for line in body.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("graft "):
                    found.append((line, language != "text"))
    return found + [(span, False) for span in SPAN.findall(BLOCK.sub("", text))]


def words(line: str) -> list[str]:
    """The words of the first command of a shell line, without comment and redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found = []
    for word in lexer:
        if word[0] in "|&;<>":
            break
        found.append(word)
    return found


def problem_with(line: str, whole: bool) -> str | None:
    """Why a command line cannot be, or None. A whole one must also parse: arguments present, values of the right type."""
    _, verb, *rest = words(line)
    if verb.startswith("-"):
        return None if verb in ("--version", "--help") else f"no option {verb}"
    if not re.fullmatch(r"[a-z]+", verb):  # `graft VERB --help`, `graft ...`
        return None
    if verb not in verbs():
        return f"there is no verb '{verb}'"
    known = {option for parameter in verbs()[verb].params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if re.match(r"--?[a-zA-Z]", word) and word.partition("=")[0] not in known]
    if unknown:
        return f"'{verb}' has no option {unknown[0]}"
    if whole and "--help" not in rest:
        try:
            verbs()[verb].make_context(verb, list(rest))
        except Exception as error:  # click's usage errors, of the click that typer brings
            return error.format_message() if hasattr(error, "format_message") else str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_shown_exist(page):
    wrong = [f"{line}: {why}" for line, whole in commands(page.read_text(encoding="utf-8")) if (why := problem_with(line, whole))]
    assert not wrong, "\n".join(wrong)


def test_examples_in_the_help_exist():
    for verb, command in verbs().items():
        examples = (command.epilog or "").partition(": ")[2]
        wrong = [why for each in examples.split(" | ") if each.startswith("graft ") and (why := problem_with(each, True))]
        assert examples and not wrong, (verb, wrong)


@pytest.mark.parametrize("text, part", [
    ("```bash\ngraft plan r.yaml --bugdet 3GiB\n```", "--bugdet"), ("```bash\ngraft fly r.yaml\n```", "fly"),
    ("```bash\ngraft merge runs/a\n```", "--output"), ("see `graft eval --modle x`", "--modle"),
    ("```bash\ngraft eval runs/a \\\n    --limit none\n```", "--limit")])
def test_a_wrong_command_is_found(text, part):
    (line, whole), = commands(text)
    assert part in problem_with(line, whole)


def test_what_surrounds_a_command_is_left_alone():
    text = "```bash\n$ graft plan r.yaml --json | python -m json.tool  # as JSON\ngraft train r.yaml a=1 > log 2>&1\nmake demo\n```"
    assert [words(line) for line, _ in commands(text)] == [["graft", "plan", "r.yaml", "--json"], ["graft", "train", "r.yaml", "a=1"]]
    assert not any(problem_with(line, whole) for line, whole in commands(text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_example_recipes_load(path):
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe) and recipe.output_dir
    assert load_recipe(recipe.document()).document() == recipe.document()


def test_recipes_shown_load():
    import yaml

    shown = [body for page in PAGES for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "yaml"]
    whole = [document for body in shown if isinstance(document := yaml.safe_load(body), dict) and {"model", "data"} <= set(document)]
    assert whole
    for document in whole:
        load_recipe(document)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_inside_the_repository_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", t)]
    assert not [t for t in targets if t and not (page.parent / t).exists()]


def test_python_shown_parses_and_names_what_is_public():
    for page in PAGES:
        for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                for node in ast.walk(ast.parse(body)):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "graftwork":
                        assert hasattr(graftwork, node.attr), f"{page.name}: graftwork.{node.attr}"


def script(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator():
    return script("generate")


@pytest.mark.parametrize("axis", AXES)
def test_method_pages_are_what_the_registry_says(generator, axis):
    path = ROOT / "docs" / "methods" / f"{axis}.md"
    assert path.is_file() and path.read_text(encoding="utf-8") == generator.page(axis), "run `make docs` and commit the pages"


def test_the_page_of_results_is_what_the_raw_results_say():
    results = script("results")
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results.page(), "run `make docs` and commit the page"
    assert all((results.RAW / name).exists() or name.endswith("tables.md") for _, name, _, _ in results.PARTS)


def test_every_axis_has_a_page_and_no_other_is_left():
    assert {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} == set(AXES)
