"""What a person can mend: the exceptions that `prg` explains in one line, each naming the thing and the fix.

PrgError
├── RecipeError       a recipe that can't be used
├── DataError         images that can't be used
├── CheckpointError   a checkpoint that is missing, broken, or of another run
├── ExportError       an exported module that does not equal the trained model
├── FittingError      features that no embedding can be fitted to
├── TrainingError     a training whose loss is not finite
└── ProcessError      processes that can't work together, or no longer
"""


class PrgError(ValueError):
    """Anything below."""


class RecipeError(PrgError):
    """A recipe that can't be used; the message names the file, the key and the fix."""


class DataError(PrgError):
    """Images that can't be used; the message names the source and the fix."""


class CheckpointError(PrgError):
    """A checkpoint that is missing, broken, or of another run; the message names the path and the fix."""


class ExportError(PrgError):
    """The exported module is not what it must be; nothing was written."""


class FittingError(PrgError):
    """Features that no embedding can be fitted to; the message says which images to give."""


class TrainingError(PrgError):
    """The loss is not finite; the last checkpoint is kept."""


class ProcessError(PrgError):
    """The processes of one training can't work together, or no longer."""


class Interrupted(Exception):
    """Stopped by SIGINT or SIGTERM, in all processes after the same step; the checkpoint is written."""
