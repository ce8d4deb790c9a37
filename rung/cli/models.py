"""`rung models`"""

from dataclasses import dataclass

from rung.cli import options

COMMAND = "rung models"


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that can be given by name, what is on this machine, and how to get others.

    remove: take this model out of the cache; its name as it is listed
    """

    remove: str = ""


def help(args: list[str]) -> str:
    return options.help_of(Models, COMMAND)


def run(args: list[str]) -> None:
    asked = options.read(Models, args, command=COMMAND)
    from rung.lm.weights.sources import PACKAGED, cache_folder, cached_models, forget, is_cached

    if asked.remove:
        gone = forget(asked.remove)
        print(f"removed {gone.name} ({gone.size / 1e6:.0f} MB)")
        return
    held = cached_models()
    print("Packaged:")
    for name, packaged in PACKAGED.items():
        where = "on this machine" if is_cached(name) else f"{packaged.size / 1e6:.0f} MB to download"
        print(f"  {name:<16} {packaged.about} ({where})")
    print(f"In {cache_folder()}:")
    for one in held:
        print(f"  {one.name}  {one.size / 1e6:.0f} MB, from {one.source}")
    print("  " + ("`rung models --remove NAME` makes room." if held else "nothing yet"))
    print(
        "Others: an id of the Hugging Face Hub (org/name, or org/name@revision), the path of a Hugging Face folder, or"
    )
    print("of a .gguf file. Families, types and what is refused: docs/guide/models.md")
