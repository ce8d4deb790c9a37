"""environment.json holds a list of facts, and nothing of who ran it or what else is on the machine."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

from rung.core.environment import LIBRARIES, environment

FACTS = {
    *("rung", "noise_law", "python", "platform", "torch", "torch_build", *LIBRARIES),
    *("cpu", "capability", "threads", "gpu"),
}
CANARY = "c4n4ry-51"
SNIFFED = """
import os, json, socket, platform, getpass
socket.gethostname = platform.node = getpass.getuser = lambda: os.environ["CANARY"]
from rung.core.environment import environment
print(json.dumps(environment()))
"""


def test_what_is_written_is_exactly_this_list():
    assert environment().keys() == FACTS


def test_every_fact_is_a_short_word_or_a_number():
    for name, value in environment().items():
        assert type(value) in (str, int), name
        assert len(str(value)) <= 200
        assert str(value).isprintable()


def test_nothing_of_a_poisoned_environment_is_written(tmp_path):
    """Every variable, the user, the host, the home and the working folder carry a word that must not come back."""
    place = tmp_path / CANARY
    place.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    kept |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    secrets = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "CUDA_VISIBLE_DEVICES", "OMP_PLACES", "CFLAGS")
    names = ("CANARY", "HOME", "USER", "LOGNAME", "HOSTNAME", "LANG", "PS1", "PIP_INDEX_URL", *secrets)
    done = subprocess.run(
        [sys.executable, "-c", SNIFFED],
        env=dict.fromkeys(names, CANARY) | kept,
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout).keys() == FACTS
    assert CANARY not in done.stdout


def test_no_name_of_this_user_host_or_home_is_written():
    said = json.dumps(environment())
    for word in (socket.gethostname(), platform.node(), getpass.getuser(), str(Path.home()), os.getcwd(), sys.prefix):
        assert len(word) < 3 or f'"{word}' not in said
        assert len(word) < 6 or word not in said
