"""The recipes that come with the package, by name; reading this loads nothing else."""

from importlib import resources


def shipped_recipes() -> list[str]:
    """Their names."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def read_shipped(name: str) -> bytes:
    """The text of one."""
    return resources.files(__name__).joinpath(f"{name}.toml").read_bytes()
