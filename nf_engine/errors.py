"""Errors: one family, each with the numbers it speaks of and the exit code that the command line ends with.

Every message says what was expected, what came (with units) and what to do next. This module imports nothing.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "BudgetExceededError",
    "CacheClosedError",
    "CacheCorruptError",
    "CacheError",
    "CacheIncompleteError",
    "CacheStaleError",
    "CheckFailedError",
    "ConfigError",
    "CorruptFileError",
    "DataError",
    "DeviceLostError",
    "DiskFullError",
    "ExportError",
    "InfeasibleBudgetError",
    "MissingExtraError",
    "NFError",
    "NoDeviceError",
    "NonFiniteError",
    "PermissionRefusedError",
    "ResumeMismatchError",
    "RunLockedError",
    "StorageError",
    "UnsupportedModelError",
]


class NFError(Exception):
    """Base of every error that nf_engine raises on purpose."""

    exit_code = 70


class ConfigError(NFError, ValueError):
    """A setting is unknown, of the wrong type, out of range or in conflict with another."""

    exit_code = 2


class BudgetError(NFError):
    """The budget cannot be kept.

    Attributes:
        stage: name of the stage, unit or block that needs too much.
        need: bytes that it needs.
        budget: bytes allowed.
    """

    exit_code = 3

    def __init__(self, message: str, *, stage: str, need: int, budget: int) -> None:
        super().__init__(message)
        self.stage = stage
        self.need = need
        self.budget = budget


class InfeasibleBudgetError(BudgetError):
    """No plan fits; raised before any training. `suggestions` are things to change, most useful first."""

    exit_code = 3

    def __init__(self, message: str, *, stage: str, need: int, budget: int, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message, stage=stage, need=need, budget=budget)
        self.suggestions = suggestions


class BudgetExceededError(BudgetError, RuntimeError):
    """The device ran out of memory, or the peak passed the budget, while training."""

    exit_code = 4


class ResumeMismatchError(NFError):
    """A run folder was begun with other settings, data or software; the message shows each difference."""

    exit_code = 6


class NonFiniteError(NFError):
    """A loss, a weight or an activation became NaN or infinite; nothing was committed after it."""

    exit_code = 7


class CheckFailedError(NFError):
    """A check that was asked for failed."""

    exit_code = 8


class ExportError(CheckFailedError):
    """An exported model could not be written, or does not compute what the trained one does."""

    exit_code = 8


class UnsupportedModelError(NFError):
    """The model cannot be cut into stages; the message names the module and why."""

    exit_code = 65


class DataError(NFError):
    """A data set or one of its files is not what it should be; the message names file, expected and found."""

    exit_code = 65


class CorruptFileError(NFError):
    """A file of a run or of an exported model fails its checks."""

    exit_code = 65


class MissingExtraError(NFError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""

    exit_code = 69


class NoDeviceError(NFError):
    """The device asked for is not there."""

    exit_code = 69


class StorageError(NFError, OSError):
    """A system call failed.

    Attributes:
        op: the operation, such as "pwrite".
        path: the file.
        offset: byte offset of the request, -1 where it has none.
        errno: the operating system's error number.
    """

    exit_code = 74

    def __init__(self, message: str, *, op: str, path: str, offset: int, errno: int) -> None:
        super().__init__(message)
        self.op = op
        self.path = path
        self.offset = offset
        self.errno = errno


class CacheError(NFError):
    """The activation cache cannot be used."""

    exit_code = 74


class CacheCorruptError(CacheError):
    """The bytes of a cache file differ from their checksum."""

    exit_code = 74


class CacheIncompleteError(CacheError):
    """A cache holds fewer or more samples or bytes than it should."""

    exit_code = 74


class CacheStaleError(CacheError):
    """A cache was made by other weights, data or settings."""

    exit_code = 74


class CacheClosedError(CacheError):
    """A cache was used after close() or abort()."""

    exit_code = 74


class DeviceLostError(NFError):
    """A call of the CUDA driver failed: nothing more is asked of the device, and nothing was finished after it.

    Attributes:
        call: name of the driver's function.
        code: its result, 0 where the device had been lost before.
    """

    exit_code = 76

    def __init__(self, message: str, *, call: str, code: int) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class RunLockedError(NFError):
    """Another process writes the run folder.

    Attributes:
        pid, host, since: of the process that holds it, as it wrote them; 0 and "" where it has not yet.
    """

    exit_code = 77

    def __init__(self, message: str, *, pid: int, host: str, since: str) -> None:
        super().__init__(message)
        self.pid = pid
        self.host = host
        self.since = since


class PermissionRefusedError(NFError):
    """A folder or a file belongs to another user, or others may write it, or it is a link or no regular file."""

    exit_code = 77


class DiskFullError(NFError):
    """Not enough room on the disk.

    Attributes:
        path: the file that was to be written.
        needed: bytes needed.
        free: bytes free.
    """

    exit_code = 75

    def __init__(self, message: str, *, path: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.path = path
        self.needed = needed
        self.free = free
