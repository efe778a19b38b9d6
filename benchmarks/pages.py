"""What a benchmark writes into the documents: a region of a page, between two comments that name who writes it."""

import re
import subprocess
from pathlib import Path

from entry.files import write_atomically


def write_region(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME writes what follows -->` and the next `<!-- to here -->`."""
    place = rf"(?<=<!-- {re.escape(name)} writes what follows -->\n).*?(?=<!-- to here -->)"
    content, found = re.subn(place, lambda _: f"\n{text}\n\n", page.read_text("utf-8"), flags=re.DOTALL)
    if not found:
        raise ValueError(f"{page} has no region of {name}")
    write_atomically(page, content.encode())


def commit() -> str:
    """The one that is checked out; with a + where the tree differs, but for docs/, into which figures are written."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], capture_output=True, text=True)

    name = git("describe", "--always", "--exclude=*").stdout.strip() or "unknown"
    return name + "+" * bool(git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode)
