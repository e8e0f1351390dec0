"""
The quick start in one process, which imports torch and transformers once: for each of the paper's four variants

    lnfree train quickstart variant=SM+R output_dir=runs/quickstart/SM+R
    lnfree export runs/quickstart/SM+R runs/quickstart/exports/lnfree-gpt2-sm-r-t128

and then `lnfree compare runs/quickstart`. A run that is finished is left as it is.
"""

import sys
from pathlib import Path

from modeling_lnfree.variants import PAPER_VARIANTS, variant_slug
from training.compare.comparison import compare
from training.errors import UserError
from training.hub.export import export
from training.recipe import load_recipe
from training.train.loop import train


RECIPE, RUNS = "quickstart", Path("runs/quickstart")


def main():
    """Trains, exports and compares; an error that a user can mend is one line."""
    try:
        for variant in PAPER_VARIANTS:
            train(load_recipe(RECIPE, [f"variant={variant}", f"output_dir={RUNS / variant}"]))
        for variant in PAPER_VARIANTS:
            export(RUNS / variant, RUNS / "exports" / f"lnfree-gpt2-{variant_slug(variant)}-t128")
        compare(RUNS)
    except UserError as error:
        sys.exit(f"quickstart: error: {error}")
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted; the same command goes on")


if __name__ == "__main__":
    main()
