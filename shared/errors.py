"""The error tree: every failure a user can cause has a stable kind, an exit code and a hint.

Each class also subclasses the builtin that a caller would expect to catch, so library users need not
import this module to write ``except ValueError``.
"""

from __future__ import annotations


class MwmError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: One line that names the thing, the value found and the value expected.
        hint: What to do next, one line, or None.

    Attributes:
        kind: Stable code printed as ``error[kind]: message``.
        exit_code: Process exit code of the command line.
    """

    kind = "bug"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only hint: errors cross process borders (Dask, DataLoader) and must arrive whole.
        return _rebuild, (type(self), self.message, self.hint)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[MwmError], message: str, hint: str | None) -> MwmError:
    return cls(message, hint=hint)


class UsageError(MwmError, ValueError):
    """A command, argument or input that cannot be used (exit 2)."""

    kind = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A recipe or ``--set`` that does not resolve (exit 2)."""

    kind = "config"


class InputMissingError(UsageError, FileNotFoundError):
    """A named input file or folder does not exist (exit 2)."""

    kind = "missing-input"


class SpecMismatchError(UsageError):
    """The output folder holds a run of another specification (exit 2)."""

    kind = "other-run"


class PromptError(UsageError):
    """A text prompt that is empty, or outside a closed vocabulary (exit 2)."""

    kind = "prompt"


class DriftError(MwmError):
    """An audit recomputed something else than was recorded (exit 3)."""

    kind = "drift"
    exit_code = 3


class CorruptError(MwmError, OSError):
    """Published bytes are not what was published (exit 4)."""

    kind = "corrupt"
    exit_code = 4


class IncompatibleError(MwmError):
    """An artifact of another kind or version, or one never published (exit 5)."""

    kind = "incompatible"
    exit_code = 5


class QuarantineError(MwmError):
    """More inputs were quarantined than ``max_failures`` allows (exit 6)."""

    kind = "too-many-quarantined"
    exit_code = 6


class LockedError(MwmError):
    """Another live writer holds the lease (exit 7)."""

    kind = "locked"
    exit_code = 7


class InterruptedRun(MwmError):
    """Stopped after a saved state; the same command continues (exit 75)."""

    kind = "interrupted"
    exit_code = 75


class DiskFullError(MwmError, OSError):
    """The disk is full; the same command continues once there is room (exit 75)."""

    kind = "disk-full"
    exit_code = 75


class DecodeError(MwmError, OSError):
    """One input that cannot be decoded: quarantined by its reason, never fatal to a job (exit 2 alone).

    Args:
        message: What was wrong, without patient data or absolute paths.
        reason: Stable quarantine code, e.g. ``decode_failed``, ``nonfinite``, ``too_large``.
    """

    kind = "decode"
    exit_code = 2

    def __init__(self, message: str, *, reason: str = "decode_failed", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_decode, (self.message, self.reason, self.hint)


def _rebuild_decode(message: str, reason: str, hint: str | None) -> DecodeError:
    return DecodeError(message, reason=reason, hint=hint)
