"""What one MPI rank of test_petsc.py does: solves a model of the zoo, and saves its own share.

python petsc_ranks.py FOLDER MODEL OPTIONS_AS_JSON; PETSc's own options may follow."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rung.mdp import zoo
from rung.mdp.petsc import rows_of, solve


def main() -> None:
    folder, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    mdp = getattr(zoo, name)(**options)
    share = solve(rows_of(mdp), mdp.gamma, num_states=mdp.num_states)
    np.savez(folder / f"{share.first}.npz", **asdict(share))


if __name__ == "__main__":
    main()
