"""Names that may be published in place of names that may not: HMAC-SHA256 with a salt that no artifact holds.

The salt is a file of the user's, made on first need: ``MWM_SALT_FILE``, else ``mwm/salt`` in the user's
configuration folder. The same salt gives the same names, so another machine that is to make or read the same
ids needs a copy of that file (by a safe way: who holds it can test a guessed name). It is read by the main
process only; workers get finished names. Its content is never logged, printed or put into an artifact. What writes
nothing (`unsalted`) makes do with a salt of its own where there is none yet.
"""

from __future__ import annotations

import hmac
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Literal

from shared.errors import InputMissingError, UsageError

SALT_VARIABLE = "MWM_SALT_FILE"
_SALT_BYTES = 32
_DIGITS = 24
_WRITER_WAIT_S = 2.0

_unwritten: ContextVar[bytes | None] = ContextVar("unwritten", default=None)

Kind = Literal["dicom", "patient", "study"]


def pseudonym(kind: Kind, name: str) -> str:
    """The published name of something: ``kind-`` and 96 bits of HMAC-SHA256 over kind and name.

    Args:
        kind: What is named; equal names of different kinds get unrelated pseudonyms.
        name: A patient's id, a path, ...; white space around it does not count.

    Raises:
        UsageError: The salt cannot be read or made; `InputMissingError` where ``MWM_SALT_FILE`` names no file.
    """
    digest = hmac.new(_salt_now(), f"{kind}\0{name.strip()}".encode("utf-8", "surrogatepass"), "sha256")
    return f"{kind}-{digest.hexdigest()[:_DIGITS]}"


def salt_path() -> Path:
    """Where the salt is, or will be made."""
    named = os.environ.get(SALT_VARIABLE)
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA")
    return (Path(folder) if folder else Path.home() / ".config") / "mwm" / "salt"


@contextmanager
def unsalted() -> Iterator[None]:
    """Make no salt in here, or in a function that this decorates; where there is none yet, a passing one serves."""
    token = _unwritten.set(_unwritten.get() or os.urandom(_SALT_BYTES))  # the same one inside of another
    try:
        yield
    finally:
        _unwritten.reset(token)


def _salt_now() -> bytes:
    path, unwritten = salt_path(), _unwritten.get()
    if unwritten is not None and not os.environ.get(SALT_VARIABLE) and not path.exists():
        return unwritten
    return _salt(path)


@lru_cache(maxsize=4)
def _salt(path: Path) -> bytes:
    if not path.exists():
        if os.environ.get(SALT_VARIABLE):  # a mistyped name must not quietly change every id
            raise InputMissingError(
                f"{SALT_VARIABLE}: names no file",
                hint="copy the salt from the machine whose ids you need, or unset the variable to have one made",
            )
        _make(path)
    until = time.monotonic() + _WRITER_WAIT_S
    while True:
        try:
            salt = bytes.fromhex(path.read_text(encoding="ascii"))
        except OSError as error:
            raise UsageError(f"salt {path}: cannot be read ({error.strerror})") from None
        except ValueError:
            salt = b""
        if len(salt) >= _SALT_BYTES:
            return salt
        if time.monotonic() > until:  # until then, another process may be writing it
            raise UsageError(f"salt {path}: expected {2 * _SALT_BYTES} hexadecimal digits")
        time.sleep(0.05)


def _make(path: Path) -> None:
    """Written aside and linked to its name whole: a kill leaves no half salt, and of two processes one is first."""
    aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(place, "wb") as file:
            file.write(os.urandom(_SALT_BYTES).hex().encode())
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        return  # another process was first
    except OSError as error:
        raise UsageError(
            f"salt {path}: cannot be made ({error.strerror})",
            hint=f"{SALT_VARIABLE} may name a file elsewhere that holds {2 * _SALT_BYTES} hexadecimal digits",
        ) from None
    finally:
        with suppress(OSError):
            aside.unlink()
    print(
        f"made {path}, the secret behind DICOM ids and patient groups: keep it, and copy it to other machines that "
        "are to have the same ids",
        file=sys.stderr,
    )
