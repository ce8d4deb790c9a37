"""Every error Rung raises for a person, drawn as a tree.

    RungError (ValueError)
    ├── ConfigError        a name, option or value that cannot be used
    ├── ModelError         a model folder, weight file or tokenizer that cannot be loaded or written
    ├── RequestError       a request the engine cannot serve (too long, empty, ...)
    ├── TaskError          a task file, data set or verifier that failed
    ├── RunError           a run folder that cannot be opened, resumed or written
    └── NonFiniteError     a loss, gradient or weight that is NaN or infinite

A message says what was needed, what came, and what to do.  `nearest` finds the name that was probably meant.
"""

import difflib
from collections.abc import Iterable


class RungError(ValueError):
    """Base of all errors meant for a person; the command line prints it without a traceback."""


class ConfigError(RungError):
    """A name, option or value that cannot be used."""


class ModelError(RungError):
    """A model folder, weight file or tokenizer that cannot be loaded or written."""


class RequestError(RungError):
    """A request the engine cannot serve."""


class TaskError(RungError):
    """A task file, data set or verifier that failed."""


class RunError(RungError):
    """A run folder that cannot be opened, resumed or written."""


class NonFiniteError(RungError):
    """A loss, gradient or weight that is NaN or infinite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence that ends a message about an unknown `name`: the closest known name, else the list of all."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(choices)}."
