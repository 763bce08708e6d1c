"""The one family of exceptions: each says what was expected, what came, and what to do."""


class LoraWsError(Exception):
    """Base of every error this library raises on purpose; the CLI prints it as one line."""

    exit_code = 2


class ConfigError(LoraWsError, ValueError):
    """A flag, YAML key or constructor argument cannot be used."""


class LayoutError(LoraWsError, ValueError):
    """Weights do not have the layout they are said to have."""


class AdapterError(LoraWsError, ValueError):
    """An adapter file cannot be read as an adapter."""


class DataError(LoraWsError, ValueError):
    """A collection, or a row of one, is not what its schema says."""


class TrainingError(LoraWsError, RuntimeError):
    """Training ran and failed."""

    exit_code = 1


class NotAvailableError(LoraWsError, FileNotFoundError):
    """Something named is neither on this machine nor reachable from it."""

    def __str__(self) -> str:
        # FileNotFoundError formats errno pairs; a message is all there is here.
        return str(self.args[0]) if self.args else ""
