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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prg.cli import main, parser
from service.settings import OTHER_VARIABLES, Settings

ROOT = Path(__file__).parents[1]
LANGUAGES = ("sh", "console", "python", "json", "toml", "mermaid", "text")
"""sh: commands. console: commands after `$ `, and what they answer. The others are what they say."""
FENCED = re.compile(
    r"(<!-- not run: (?P<reason>.+) -->\s*\n)?^```(?P<language>.*)\n(?P<text>[\s\S]*?)\n```$", re.MULTILINE
)
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
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order. A comment `<!-- not run: reason -->` marks the block below it."""
    text, name = page.read_text("utf-8"), os.path.relpath(page, ROOT)
    found = [(text.count("\n", 0, m.start("language")) + 1, m) for m in FENCED.finditer(text)]
    return [Block(name, line, m["language"], m["text"], m["reason"]) for line, m in found]


def dialogue(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it answers) of a block; a command may go on over lines that end in a backslash."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip(), ""
        return
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
        if not set(word) <= set(";&|()"):
            words.append(word)
        elif words:
            named = [w for w in words if re.match(r"[A-Z_]+=", w)]
            yield dict(w.split("=", 1) for w in named), words[len(named) :]
            words = []


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
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in compose.values() for profile in service.get("profiles", ())}
    makefile = (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [entry for entries in (project["dependencies"], *extras.values()) for entry in entries]

    def exist(named: Iterable[str], known: Iterable[str]) -> None:
        assert set(named) <= set(known), f"{where}: {set(named) - set(known)} is none of {set(known)}"

    exist((name for name in environment if name.startswith("PRG_")), settings)
    exist(filter(None, environment.get("COMPOSE_PROFILES", "").split(",")), profiles)
    program, *arguments = words or [""]
    if program == "prg":
        try:
            parser().parse_args(arguments)
        except SystemExit as stop:
            if stop.code:
                raise AssertionError(where) from None
    elif program == "prg-serve":
        exist((w for w in arguments if w.startswith("-")), ("--new-key", "--help"))
    elif program == "make":
        exist((w for w in arguments if "=" not in w), re.findall(r"^([a-z]+):.*##", makefile, re.MULTILINE))
        variables = re.findall(r"^(\w+) \??=", makefile, re.MULTILINE)
        exist((w.split("=")[0] for w in arguments if "=" in w), variables)
    elif program == "docker":
        at = next((i for i, w in enumerate(arguments) if w in ("logs", "restart", "kill", "run")), None)
        named = [w for w in arguments[at + 1 :] if re.fullmatch("[a-z][a-z-]+", w)] if at is not None else []
        exist(named[:1], compose)
    elif program in ("pip", "python") and "install" in arguments:
        exist(re.findall(r"\w+", " ".join(re.findall(r"\[([\w,]+)\]", " ".join(arguments)))), extras)
        asked = {w.strip("'\"") for w in arguments[arguments.index("install") + 1 :] if w[0] not in "-."}
        exist(asked, (re.split(r"[\[><=!~]", entry)[0] for entry in listed))


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
        answer = json.loads(found.strip().splitlines()[-1])
        assert same_shape(parse_answer(expected), answer), f"{where} answers\n{answer}\nnot\n{expected}"
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


def same_shape(expected: Any, found: Any) -> bool:
    """The same keys, types and lengths; errors also of the same type, title and status."""
    if expected == "…":
        return True
    if isinstance(expected, dict) and isinstance(found, dict):
        known = expected.keys() - {"…"}
        fixed = known & {"type", "title", "status", "feature", "object"}
        return (
            (known <= found.keys() if "…" in expected else known == found.keys())
            and all(same_shape(expected[key], found[key]) for key in known)
            and all(expected[key] == found[key] for key in fixed)
        )
    if isinstance(expected, list) and isinstance(found, list):
        more = expected[-1:] == ["…"]
        wanted = expected[:-1] if more else expected
        enough = len(found) >= len(wanted) if more else len(found) == len(wanted)
        return enough and all(map(same_shape, wanted, found))
    return type(expected) is type(found) or {type(expected), type(found)} == {int, float}
