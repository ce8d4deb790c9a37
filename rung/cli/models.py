"""`rung models`"""

from dataclasses import dataclass

from rung.cli import options

COMMAND = "rung models"


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that can be given by name.  Any Hugging Face folder or .gguf file can be given by its path."""


def help(args: list[str]) -> str:
    return options.help_of(Models, COMMAND)


def run(args: list[str]) -> None:
    options.read(Models, args, command=COMMAND)
    from rung.lm.weights.sources import PACKAGED, is_cached

    for name, packaged in PACKAGED.items():
        where = "on this machine" if is_cached(name) else f"{packaged.size / 1e6:.0f} MB to download"
        print(f"{name:<16} {packaged.about} ({where})")
