"""`lnfree train`: trains by a recipe, plans what it needs, or shows the fields that one may have."""

from ..errors import UserError
from ..fields import print_fields
from ..recipe import load_recipe


def run(
    recipe: str | None,
    overrides: list[str],
    *,
    fields: bool = False,
    plan: bool = False,
    processes: int | None = None,
    flops: float | None = None,
):
    """
    Args:
        recipe: name or path.
        overrides: `key=value` strings.
        fields: shows the fields instead of training.
        plan: prints what training would need instead, in so many `processes` of so many `flops`.

    Raises:
        UserError: for arguments that do not go together, and as `train` and `print_plan`.
    """
    if fields:
        return print_fields()
    if recipe is None:
        raise UserError("name a recipe: 'lnfree recipes' lists them")
    if not plan and (processes, flops) != (None, None):
        raise UserError("--processes and --flops are of --plan; torchrun starts processes: see docs/training.md")
    checked = load_recipe(recipe, overrides)
    # a plan needs no training loop, and training no planner
    if plan:
        from .plan import print_plan

        print_plan(checked, 1 if processes is None else processes, flops)
    else:
        from .loop import train

        train(checked)
