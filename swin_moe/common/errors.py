"""Exceptions that end a run on all ranks; each message is one line for the user."""


class TrainingError(RuntimeError):
    """Training cannot go on."""


class RunRemoved(Exception):
    """The run directory is gone. One rank may see it first, while others are still in an update."""


class Preempted(Exception):
    """A signal has stopped the training, and the checkpoint is written.

    Attributes:
        interrupted: by Ctrl-C; a scheduler or launcher would start the job again.
    """

    def __init__(self, message: str, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted
