"""What runs with which extra. Packages that it does not bring are hidden, whether or not they are installed."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from service.settings import Settings
from tests.serving import served
from tests.tiny import png, write_tiny_entry

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def listed(extra: str) -> Iterator[str]:
    """What pyproject.toml lists for an extra, and for extras that it names."""
    for requirement in PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]:
        if own := re.fullmatch(r"prg-service\[(\w+)\]", requirement):
            yield from listed(own[1])
        else:
            yield requirement


def brought(requirements: Iterable[str], found: set[str]) -> set[str]:
    """The distributions of these requirements, and of all that they require."""
    for requirement in requirements:
        name = name_of(requirement)
        if name in found:
            continue
        found.add(name)
        asked = re.findall(r"\[([\w,]+)\]", requirement)
        try:
            further = requires(name) or []
        except PackageNotFoundError:
            continue
        extras = [f"extra == '{e}'" for group in asked for e in group.split(",")]
        wanted = [r for r in further if "extra ==" not in r or any(e in r.replace('"', "'") for e in extras)]
        brought(wanted, found)
    return found


def run(extra: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program by a Python that has what an extra brings, and no more; an empty one: the base alone."""
    there = brought([*listed(""), *(listed(extra) if extra else ())], set())
    hidden = [
        module
        for module, distributions in packages_distributions().items()
        if not {name_of(d) for d in distributions} & (there | {"prg-service"})
    ]
    assert "pytest" in hidden
    code = f"HIDDEN = {hidden!r}\n{HIDE}\n{program}"
    command, environment = [sys.executable, "-c", code, *arguments], os.environ | {"PYTHONWARNINGS": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


HIDE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *where: None if name.partition(".")[0] in HIDDEN else find(name, *where)
)
"""
PRG = "import prg.cli; sys.exit(prg.cli.main(sys.argv[1:]))"
SERVE = "import service.command; sys.exit(service.command.main())"
IMPORT_ALL = (
    "import pkgutil, importlib; "
    "[importlib.import_module(m.name) for name in sys.argv[1:] "
    "for m in pkgutil.walk_packages(importlib.import_module(name).__path__, name + '.')]"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What stands in a command for a folder of pictures, an entry, a service, and the files to write."""
    folder = tmp_path_factory.mktemp("extras")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(png())
    names = {"PHOTOS": folder / "photos", "ENTRY": write_tiny_entry(folder / "models")}
    names |= {"NPY": folder / "a.npy", "PARQUET": folder / "a.parquet"}
    with served(Settings(model_repository=folder / "models")) as address:
        yield {word: str(path) for word, path in names.items()} | {"URL": f"http://{address}"}


@pytest.mark.parametrize(
    ("extra", "program", "arguments"),
    [
        ("", "import prg.client", []),
        ("", PRG, ["--help"]),
        ("", PRG, ["embed", "PHOTOS", "--url", "URL", "--out", "NPY"]),
        ("search", PRG, ["embed", "PHOTOS", "--url", "URL", "--out", "PARQUET"]),
        ("search", "import examples.search", []),
        ("search", "import prg.images.parquet", []),
        ("embedded", PRG, ["embed", "PHOTOS", "--entry", "ENTRY", "--out", "NPY"]),
        ("serve", IMPORT_ALL, ["service"]),
        ("train", IMPORT_ALL, ["entry", "prg"]),
    ],
)
def test_an_extra_is_enough(words: dict[str, str], extra: str, program: str, arguments: list[str]) -> None:
    done = run(extra, program, *(words.get(word, word) for word in arguments))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "program", "arguments", "named"),
    [
        ("", PRG, ["pretrain", "runs/a", "--recipe", "images-32"], "train"),
        ("embedded", PRG, ["export", "runs/a", "entries/a"], "train"),
        ("", PRG, ["embed", "PHOTOS", "--entry", "ENTRY", "--out", "NPY"], "embedded"),
        ("", PRG, ["embed", "PHOTOS", "--url", "URL", "--out", "PARQUET"], "search"),
        ("", SERVE, [], "serve"),
        ("serve", SERVE, [], "embedded"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    words: dict[str, str], extra: str, program: str, arguments: list[str], named: str
) -> None:
    done = run(extra, program, *(words.get(word, word) for word in arguments))
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert f"pip install 'prg-service[{named}]'" in done.stderr


def test_an_endpoint_for_traces_without_their_extra_is_a_warning() -> None:
    program = "import os; os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:9'; "
    done = run("serve", program + "from service import tracing; tracing.start()")
    assert done.returncode == 0, done.stderr
    assert "pip install 'prg-service[otel]'" in done.stdout
