"""The one exception for what the user must change; the command line turns it into one sentence."""


class UserError(ValueError):
    """A wrong input: names the file, row, module, value and bound, and says what to do."""


class DivergedError(UserError):
    """Training ended in NaN or infinity: a lower learning rate is needed."""


class GateError(Exception):
    """A gate does not hold: names each with its figure and bound. Exit code 3."""


class ElsewhereError(Exception):
    """What stops this process has been said by another one; `code` is the exit code."""

    def __init__(self, code: int = 2) -> None:
        super().__init__(code)
        self.code = code
