"""The exceptions of Pilotfish. Each message says what was wrong and what would be right."""


class PilotfishError(Exception):
    """Base of every error that Pilotfish raises on purpose."""


class ConfigError(PilotfishError, ValueError):
    """A setting cannot work; raised before anything is started."""


class ParameterError(PilotfishError, ValueError):
    """A request asks for something that cannot be done.

    `param` is the request field at fault (OpenAI's name for it where there is one), so that the server can put it into
    `error.param`.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


class ModelError(PilotfishError):
    """A model's files cannot be found, read, or are of a kind that the engine does not know."""


class EngineDeadError(PilotfishError):
    """The engine process has ended or was stopped; requests in flight cannot finish."""


class EngineRestartingError(EngineDeadError):
    """The engine process has ended with this request, and is being restarted: it is worth sending the request again."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds until the engine will probably be ready."""


class RankError(EngineDeadError):
    """A rank of a sharded model has ended, hangs, or cannot start; the engine ends with it. The message names it."""


class CollectiveError(RankError):
    """A collective operation failed because another rank has ended or does not answer; the cause lies there."""


class EngineNotReadyError(PilotfishError):
    """The engine is still loading its model, or is stopping: the request was not taken."""


def one_line(error: Exception) -> str:
    """Return an error's first line, to end a sentence with; prefixed by its type unless it is a PilotfishError."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, PilotfishError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shown(value: object) -> str:
    """Return a client's value as a message quotes it: whole unless it is long, such as a number of 400 digits."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
