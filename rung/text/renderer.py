"""The child process that renders chat templates: `python renderer.py CPU_SECONDS`, which loads Jinja, not Rung.

In, on stdin, JSON lines {"template", "values"}; out, on stdout, one line each: {"text"} or {"refused"}.

A template is a program that came with a model.  Jinja's sandbox keeps it from attributes, and a process of its own
from all else that costs: `range(99999)` in `range(99999)`, `'a' * 10 ** 10`, `9 ** (9 ** 9)`, endless recursion.
The limits are the kernel's, so that there is no list of tricks to be complete.
"""

import json
import math
import sys
from functools import lru_cache
from typing import Any

CPU_SECONDS = 5  # of one rendering; a long conversation takes milliseconds
MEMORY_BYTES = 512 << 20
MAX_TEXT = 4 << 20  # characters that a rendering may have
MAX_SAID = 500  # characters of an error that are passed on


@lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """Compiled with the switches, filters and functions that published templates are written for  [transformers]."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks answers for training; its content is all that matters here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    del env.globals["lipsum"], env.filters["random"]  # a prompt is the same each time
    return env.from_string(template)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The rendering of one request, or why there is none."""
    try:
        text = compiled(request["template"]).render(request["values"])
    except Exception as error:  # whatever a template makes Python raise; the class says what a bare number would not
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        return {"refused": f"{kind}{error}"[:MAX_SAID]}
    if len(text) > MAX_TEXT:
        return {"refused": f"it made {len(text)} characters of them; at most {MAX_TEXT} are taken"}
    return {"text": text}


def main(cpu_seconds: int) -> None:
    """Answer requests until stdin ends."""
    import resource

    limits = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  # before the limits, which are for templates

    for kind, amount in limits.items():
        _limit(kind, amount)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds)
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _limit(kind: int, amount: int) -> None:
    import resource

    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    main(int(sys.argv[1]))
