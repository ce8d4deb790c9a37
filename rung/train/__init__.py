"""Learners of language models.  The folder is also the public function: `rung.train(recipe)` is `rung.train.run.train`.

A package and a function of one name would hide each other, depending on what was imported first; so the package itself
can be called.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rung.train.run import Run


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> "Run":
        from rung.train.run import train

        return train(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
