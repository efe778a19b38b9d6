"""Images to train and evaluate on: where they come from, decoded once, some held out, augmented."""

from prg.errors import DataError
from prg.images.sets import check_classes_were_seen
from prg.images.splits import splits

__all__ = ["DataError", "check_classes_were_seen", "splits"]
