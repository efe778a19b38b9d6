"""Runs that several files of tests read, trained once a process: a test changes none of them."""

from pathlib import Path

import pytest
from workshop import exported, image_folder, trained_run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "photos", each=40)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("run") / "mine", photos)


@pytest.fixture(scope="session")
def entry(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    return exported(run, tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos without a test split, too few for an embedding, and its entry."""
    folder = tmp_path_factory.mktemp("home")
    run = trained_run(folder / "run", image_folder(folder / "photos", each=30, splits=("train",)))
    exported(run, folder / "entry")
    return folder
