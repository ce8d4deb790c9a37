"""The distributed solver with two ranks, where some Python here has petsc4py: Debian's, or the one of the tests."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rung.core.errors import ConfigError
from rung.mdp import zoo
from rung.mdp.finite import from_batches
from rung.mdp.petsc import rows_of, solve
from rung.mdp.planning import solve as solve_here

ROOT = Path(__file__).parents[2]
DEBIAN = sorted(Path("/usr/lib/petscdir").glob("petsc*/*-real"))  # where python3-petsc4py keeps its module
PETSC = os.environ.get("PETSC_DIR") or (str(DEBIAN[0]) if DEBIAN else "")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PETSC_DIR": PETSC}
MODELS = {
    "garnet": {"states": 301, "actions": 4, "branching": 5, "gamma": 0.97},
    "lqr": {"points": 25, "actions": 9},
    "zhao": {"gamma": 0.9, "target": "end"},
}


@cache
def pythons_with_petsc() -> list[str]:
    """Interpreters that import all that a rank needs."""
    found = [sys.executable, *(path for path in [shutil.which("python3", path="/usr/bin")] if path)]
    probe = "import petsc4py.PETSc, scipy.sparse"
    if shutil.which("mpiexec") is None:
        return []
    return [p for p in found if not subprocess.run([p, "-c", probe], capture_output=True, env=ENVIRONMENT).returncode]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_together_find_what_one_machine_finds(name, ranks, tmp_path):
    if not pythons_with_petsc():
        pytest.skip("no Python here has petsc4py, or there is no mpiexec")
    command = ["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), pythons_with_petsc()[0]]
    script = [str(Path(__file__).with_name("petsc_ranks.py")), str(tmp_path), name, json.dumps(MODELS[name])]
    done = subprocess.run([*command, *script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [np.load(tmp_path / f"{first}.npz") for first in sorted(int(p.stem) for p in tmp_path.glob("*.npz"))]
    assert len(shares) == ranks

    def whole(field: str) -> np.ndarray:
        return np.concatenate([share[field] for share in shares])

    mdp = getattr(zoo, name)(**MODELS[name])
    here = solve_here(mdp, "policy", epsilon=1e-9)
    assert np.abs(whole("v_S") - here.v_S).max() <= 1e-6
    assert (whole("lower_S") <= here.v_S + 1e-9).all()
    assert (whole("upper_S") >= here.v_S - 1e-9).all()
    acting = ~mdp.terminal_S
    taken = [mdp.pair(s, a) for s, a in enumerate(whole("action_S")) if acting[s]]
    assert here.optimal_N[taken].all()
    assert (whole("action_S")[~acting] == -1).all()


def test_a_model_cut_into_stretches_and_joined_is_the_model():
    mdp = zoo.zhao(0.9, target="end")
    rows = rows_of(mdp)
    joined = from_batches([rows(0, 7), rows(7, 25)], 0.9, num_states=25, num_actions=5)
    assert np.array_equal(joined.next_M, mdp.next_M)
    assert np.allclose(solve_here(joined).v_S, solve_here(mdp).v_S, atol=1e-6)


def test_without_petsc_the_error_says_what_to_install():
    if sys.executable in pythons_with_petsc():
        pytest.skip("petsc4py is here")
    mdp = zoo.zhao(0.9)
    with pytest.raises(ConfigError, match="petsc4py is not installed"):
        solve(rows_of(mdp), 0.9, num_states=25)
