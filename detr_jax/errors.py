"""Errors that a user can mend: what was given is wrong, missing, or already there.

Each is also the built-in error that research code would catch. Commands print these as one line; any other error is our
own fault and shows its traceback.
"""

from typing import Any, get_args, get_type_hints


class UserError(Exception):
    """Base of all errors that a user can mend."""


class InputError(UserError, ValueError):
    """A value, file or combination of options is wrong; the message says what would be right."""


class InputTypeError(UserError, TypeError):
    """A value is of a type that is not taken."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder does not exist."""


class ExistingFileError(UserError, FileExistsError):
    """A file or run exists and may not be overwritten."""


class OutputError(UserError, OSError):
    """A file cannot be written: no space, no permission, no network."""


class MissingDependencyError(UserError, ImportError):
    """An optional package is needed and not installed."""


def require_choices(options: Any, *names: str) -> None:
    """Raises an InputError if one of the named options, fields of a dataclass of type `Literal`, is no choice of it."""
    types = get_type_hints(type(options))
    for name in names:
        choices = get_args(types[name])
        if getattr(options, name) not in choices:
            raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, not {getattr(options, name)!r}")


def require_counts(options: object, *names: str) -> None:
    """Raises an InputError if one of the named options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise InputError(f"{name} must be at least 1, not {getattr(options, name)}")
