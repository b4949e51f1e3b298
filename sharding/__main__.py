"""``python -m sharding CONFIG key=value`` from a checkout, as a Ray job runs it: nothing need be installed."""

import os
import sys
from pathlib import Path


def _find_packages() -> None:
    """Makes our packages importable here and in the processes that a local Ray starts."""
    here = Path(__file__).resolve().parent
    folders = [str(here), str(here.parent)]
    sys.path[:0] = folders
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(folders + ([inherited] if inherited else []))


if __name__ == "__main__":
    _find_packages()
    from alpro_sharding import main

    sys.exit(main(sys.argv[1:]))
