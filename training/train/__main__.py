"""
`python -m training.train RECIPE [key=value ...]`: what `lnfree train` does, for launchers that start a module:

    torchrun --nproc_per_node 2 -m training.train quick variant=SM+R
"""

import sys

from ..cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
