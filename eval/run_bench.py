"""`python eval/run_bench.py TASK --data MANIFEST --out DIR` or `python -m eval.run_bench`: see `eval.command`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, whose rooms are imported, not this folder
    from eval.command import main

    sys.exit(main())
