"""Says which build of torch pip will install and how large it is.  Standard library only: nothing else is there yet."""

import json
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run", "--report", "-"]


def main() -> int:
    """Ask pip, say it in one line; an unanswered question is not an error, since pip's own message follows."""
    command = [*PIP, "--no-deps", "--constraint", str(CONSTRAINTS), "torch>=2.11"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        print("torch: pip cannot say yet what it will install.")
        return 0
    installs = json.loads(answer.stdout)["install"]
    print(describe(installs[0]) if installs else "torch is installed already.", flush=True)
    return 0


def describe(install: dict) -> str:
    """One line from one entry of pip's installation report."""
    version = install["metadata"]["version"]
    needs = install["metadata"].get("requires_dist", [])
    build, remark = "CPU", ""
    if any(need.startswith(("nvidia-", "cuda-", "triton")) for need in needs):
        build, remark = (
            "CUDA",
            ", and several GB of CUDA packages beside it; for the CPU build see docs/guide/install.md",
        )
    size = _size(install["download_info"]["url"])
    return f"torch {version.split('+')[0]}, {build} build: {size}{remark}."


def _size(url: str) -> str:
    where = urllib.parse.urlsplit(url)
    if where.scheme == "file":
        path = Path(urllib.request.url2pathname(where.path))
        return f"{path.stat().st_size / 1e6:.0f} MB, from this machine's disk"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as reply:
            return f"{int(reply.headers['Content-Length']) / 1e6:.0f} MB to download"
    except (OSError, TypeError, ValueError):
        return "of a size that pip tells as it downloads"


if __name__ == "__main__":
    sys.exit(main())
