"""The code blocks of the documents: found, checked word by word, run, and their answers compared."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prg.cli import main, parser
from service.settings import OTHER_VARIABLES, Settings

ROOT = Path(__file__).parents[1]
LANGUAGES = ("sh", "console", "python", "json", "toml", "mermaid", "text")
"""sh: commands. console: commands after `$ `, and what they answer. The others are what they say."""
MARK = re.compile(r"<!-- not run: (.+) -->")
SERVICE = re.compile(r"\b(localhost|127\.0\.0\.1):8000\b")
BASE64 = "iVBORw0KGgo…"
"""How the documents shorten an image in base64."""
CURL = 'curl() { command curl -sS -w "%{stderr}\\n%{http_code}\\n" "$@"; }\n'
"""curl as it is, its status on stderr: by itself it takes a 422 for a success."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it is not run, if it is not."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order. A comment `<!-- not run: reason -->` marks the block below it."""
    found, fence, reason = [], None, None
    lines: list[str] = []
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if fence is None and line.startswith("```"):
            fence, lines = (number, line[3:].strip()), []
        elif fence is not None and line.startswith("```"):
            name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
            found.append(Block(name, fence[0], fence[1], "\n".join(lines), reason))
            fence, reason = None, None
        elif fence is not None:
            lines.append(line)
        elif line.strip():
            mark = MARK.fullmatch(line.strip())
            reason = mark[1] if mark else None
    return found


def dialogue(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it answers) of a block; a command may go on over lines that end in a backslash."""
    if block.language == "sh":
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip(), ""
        return
    text = block.text.replace("\\\n", " ")
    assert text.startswith("$ "), f"{block}: a console block begins with `$ `"
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, answer = part.partition("\n")
        yield command.strip(), answer.strip()


def simple_commands(command: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """(environment, words) of each simple command of a line of shell."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|()"):
            if words:
                named = [w for w in words if re.match(r"[A-Z_]+=", w)]
                rest = words[len(named) :]
                yield dict(w.split("=", 1) for w in named), rest
            words = []
        elif set(word) <= set("<>&"):
            words.append(word)
        else:
            words.append(word)


def check(block: Block) -> None:
    """A block that may not be run here is still made of words that exist. Raises AssertionError."""
    assert block.language in LANGUAGES, f"{block}: say what it is, one of {', '.join(LANGUAGES)}"
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "json":
        parse_answer(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    if block.language not in ("sh", "console"):
        return
    for command, _ in dialogue(block):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}: {command}: {done.stderr}"
        for environment, words in simple_commands(command):
            check_words(f"{block}: {command}", environment, words)


def check_words(where: str, environment: dict[str, str], words: list[str]) -> None:
    """Options, verbs, settings, services and packages that a command names exist."""
    settings = {f"PRG_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for name in environment:
        assert not name.startswith("PRG_") or name in settings, f"{where}: no setting {name}"
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    if "COMPOSE_PROFILES" in environment:
        known = {profile for s in compose["services"].values() for profile in s.get("profiles", ())}
        assert set(environment["COMPOSE_PROFILES"].split(",")) <= known, f"{where}: profiles are {known}"
    if not words:
        return
    program, arguments = words[0], words[1:]
    if program == "prg":
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                parser().parse_args(arguments)
            except SystemExit as stop:
                if stop.code:
                    raise AssertionError(f"{where}: {said.getvalue()}") from None
    elif program == "prg-serve":
        assert {w for w in arguments if w.startswith("-")} <= {"--new-key", "--help"}, where
    elif program == "make":
        verbs = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^(\w+) \??=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {w for w in arguments if "=" not in w} <= set(verbs), f"{where}: verbs are {verbs}"
        assert {w.split("=")[0] for w in arguments if "=" in w} <= set(variables), f"{where}: {variables}"
    elif program == "docker":
        at = next((i for i, w in enumerate(arguments) if w in ("logs", "restart", "kill", "run")), None)
        named = [w for w in arguments[(at or 0) + 1 :] if re.fullmatch("[a-z][a-z-]+", w)] if at else []
        assert not named or named[0] in compose["services"], f"{where}: {named[0]} is no service"
    elif program in ("pip", "python") and "install" in arguments:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lists = [project["dependencies"], *project["optional-dependencies"].values()]
        known = {re.split(r"[\[><=!~]", entry)[0] for entries in lists for entry in entries}
        for extra in (
            e for group in re.findall(r"\[([\w,]+)\]", " ".join(arguments)) for e in group.split(",")
        ):
            assert extra in project["optional-dependencies"], f"{where}: pyproject.toml has no extra {extra}"
        asked = {w.strip("'\"") for w in arguments[arguments.index("install") + 1 :] if w[0] not in "-."}
        assert asked <= known, f"{where}: pyproject.toml does not name {asked - known}"


@dataclass
class Desk:
    """A folder to run a page's blocks in, one after the other, as a reader would."""

    folder: Path
    service: str
    """host:port of a running service."""
    image: str
    """An image in base64."""
    trial: tuple[str, ...]
    """Flags that make `prg pretrain` a matter of seconds."""
    serve: Callable[[dict[str, str]], None]
    """Start and stop prg-serve with these variables, and see that it answers."""
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def run(self, block: Block) -> None:
        """Run a block that is made to be run. Raises AssertionError where it does not do what it says."""
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(self.here(block.text), str(block), "exec"), self.names)
        elif block.language in ("sh", "console"):
            for command, answer in dialogue(block):
                self.command(f"{block}: {command}", command, answer)

    def here(self, text: str) -> str:
        """The text with the address and the image that are meant."""
        return SERVICE.sub(self.service, text).replace(BASE64, self.image)

    def command(self, where: str, command: str, answer: str) -> None:
        """One line of shell, and whether it answers what is written below it."""
        parts = list(simple_commands(command))
        programs = {words[0] for _, words in parts if words}
        if programs == {"prg"} and not {">", "|"} & set(command):
            printed = "".join(self.prg(where, words[1:]) for _, words in parts)
            compare(answer, printed, where)
        elif programs <= {"make"}:
            done = subprocess.run(["make", "-n", *parts[0][1][1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{where}: {done.stderr}"
        elif programs == {"prg-serve"} and len(parts[0][1]) == 1:
            self.serve(parts[0][0])
        else:
            self.shell(where, command, answer)

    def prg(self, where: str, arguments: list[str]) -> str:
        """The prg command in this process; returns what it printed."""
        trial = self.trial if arguments[0] == "pretrain" else ()
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = main([arguments[0], *trial, *(self.here(a) for a in arguments[1:])])
        assert status == 0, f"{where}: {err.getvalue()}"
        return out.getvalue()

    def shell(self, where: str, command: str, answer: str) -> None:
        """A line of shell by bash."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "KEY": "prg_example"}
        script = "set -eo pipefail\n" + CURL + self.here(command)
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{where}: {done.stderr}{done.stdout}"
        codes = re.findall(r"^(\d{3})$", done.stderr, re.MULTILINE)
        expected = re.findall(r'^\{"type".*"status":(\d+)', answer) if answer else []
        for code in codes:
            assert code == expected[0] if expected else code < "400", f"{where}: {code} {done.stdout}"
        compare(answer, done.stdout, where)


def compare(expected: str, found: str, where: str) -> None:
    """JSON in shape, other text with any numbers; `…` stands for anything. Nothing expected: anything goes."""
    if not expected:
        return
    if expected.lstrip()[0] in "{[":
        same_shape(parse_answer(expected), json.loads(found.strip().splitlines()[-1]), where)
        return
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", plain(expected)))
    assert re.fullmatch(pattern, plain(found), re.DOTALL), f"{where} answers\n{found}\nnot\n{expected}"


def plain(text: str) -> str:
    """Text without its numbers and the spaces around its lines."""
    lines = (" ".join(line.split()) for line in text.strip().splitlines())
    return re.sub(r"\d+(\.\d+)?", "0", "\n".join(lines))


def parse_answer(text: str) -> Any:
    """JSON of a document, in which `…` may end a list, an object or a string, or be one."""
    text = re.sub(r",\s*…\s*\]", ', "…"]', text)
    text = re.sub(r",\s*…\s*\}", ', "…": "…"}', text)
    return json.loads(re.sub(r":\s*…", ': "…"', text))


def same_shape(expected: Any, found: Any, where: str) -> None:
    """The same keys, types and lengths; errors also of the same type, title and status."""
    if expected == "…":
        return
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r} is not an object"
        known = expected.keys() - {"…"}
        assert known == found.keys() if "…" not in expected else known <= found.keys(), (
            f"{where}: has {sorted(found)}, not {sorted(expected)}"
        )
        for key in known:
            same_shape(expected[key], found[key], f"{where}: {key}")
            if key in ("type", "title", "status", "feature", "object"):
                assert expected[key] == found[key], f"{where}: {key} is {found[key]!r}, not {expected[key]!r}"
    elif isinstance(expected, list):
        assert isinstance(found, list), f"{where}: {found!r} is not a list"
        more = bool(expected) and expected[-1] == "…"
        wanted = expected[:-1] if more else expected
        assert len(found) >= len(wanted) if more else len(found) == len(wanted), (
            f"{where}: {len(found)} items, not {len(wanted)}"
        )
        for i, item in enumerate(wanted):
            same_shape(item, found[i], f"{where}[{i}]")
    elif isinstance(expected, bool) or expected is None or isinstance(expected, str):
        assert type(found) is type(expected), f"{where}: {found!r}, not {expected!r}"
    else:
        assert type(found) in (int, float), f"{where}: {found!r}, not a number"
