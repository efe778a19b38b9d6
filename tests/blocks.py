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

from prg.cli import main, parser

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
    elif block.language in ("sh", "console"):
        for command, _ in dialogue(block):
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {command}: {done.stderr}"
            for _, words in simple_commands(command):
                check_words(f"{block}: {command}", *words[:1] or [""], words[1:])


def check_words(where: str, program: str, arguments: list[str]) -> None:
    """Options of `prg`, targets of make, services of compose and extras of the package exist."""
    asked, known, line = set(), set(), " ".join(arguments)
    if program == "prg" and "--help" not in arguments:
        parser().parse_args(arguments)
    elif program == "make":
        asked = {word for word in arguments if "=" not in word}
        known = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif program == "docker":
        asked = set(re.findall(r"(?:logs|restart|kill) ([a-z][a-z0-9-]+)", line))
        files = re.findall(r"-f (\S+\.yml)", line) if "compose" in arguments else []
        text = "".join((ROOT / name).read_text("utf-8") for name in files or ["docker-compose.yml"])
        # Not as YAML: it has tags of Compose's own.
        known = set(re.findall(r"^  ([a-z][a-z0-9-]+):", text, re.MULTILINE))
    elif "install" in arguments:
        asked = {extra for extras in re.findall(r"\[([\w,]+)\]", line) for extra in extras.split(",")}
        known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert asked <= known, f"{where}: {asked - known}"


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
            compare(answer, "".join(self.prg(where, words[1:]) for _, words in parts), where)
        elif programs == {"prg-serve"} and len(parts[0][1]) == 1:
            self.serve(parts[0][0])
        elif programs != {"make"}:
            self.shell(where, command, answer)

    def prg(self, where: str, arguments: list[str]) -> str:
        """The prg command in this process; returns what it printed."""
        trial = self.trial if arguments[0] == "pretrain" else ()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main([arguments[0], *trial, *(self.here(a) for a in arguments[1:])])
        assert status == 0, where
        return out.getvalue()

    def shell(self, where: str, command: str, answer: str) -> None:
        """A line of shell by bash."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "KEY": "prg_example"}
        script = ["bash", "-c", "set -eo pipefail\n" + CURL + self.here(command)]
        done = subprocess.run(script, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {done.stderr}{done.stdout}"
        expected = re.findall(r'^\{"type".*"status":(\d+)', answer)
        for code in re.findall(r"^(\d{3})$", done.stderr, re.MULTILINE):
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
    wanted, given = (re.sub(r"\d+(\.\d+)?", "0", " ".join(text.split())) for text in (expected, found))
    pattern = ".*".join(map(re.escape, wanted.split("…")))
    assert re.fullmatch(pattern, given), f"{where} answers\n{found}\nnot\n{expected}"


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
        if expected[-1:] == ["…"]:
            expected, found = expected[:-1], found[: len(expected) - 1]
        return len(expected) == len(found) and all(map(same_shape, expected, found))
    return type(expected) is type(found) or {type(expected), type(found)} == {int, float}
