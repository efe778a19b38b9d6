"""The model card."""

from pathlib import Path

from entry.config import read_entry
from prg.export import write_card
from tests.tiny import write_tiny_entry


def test_what_people_noted_on_a_card_stays(tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path)
    card = directory / "MODEL_CARD.md"
    write_card(directory, read_entry(directory))
    plain = card.read_text()
    card.write_text(plain.replace("# tiny", "# another name") + "\n## Notes\nFor research alone.\n")
    for _ in range(2):
        write_card(directory, read_entry(directory))
        assert card.read_text() == plain + "\n## Notes\nFor research alone.\n"
