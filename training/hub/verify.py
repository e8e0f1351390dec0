"""What was published, loaded back from the Hub by id and commit."""

import json
import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants

from ..errors import UserError
from .clean_process import find_failure
from .client import without_token
from .export import PROBE
from .publication import Publication


HUB_CHECK = Path(__file__).with_name("hub_check.py")


def verify(api: HfApi, publications: list[Publication]):
    """
    Loads everything by id and commit in a clean process with an empty cache, and prints what was found.

    Raises:
        UserError: if something does not load, or a model's logits are not those of the trained one.
    """
    asked = [
        {"repo_id": item.repo_id, "revision": item.commit, "kind": item.kind, "probe": PROBE.as_posix()}
        for item in publications
    ]
    with tempfile.TemporaryDirectory(prefix="lnfree-") as outside:
        questions, answers = Path(outside) / "asked.json", Path(outside) / "found.json"
        questions.write_text(json.dumps(asked), encoding="utf-8")
        # the token by the client's own two ways: the variable, or the file that a login wrote
        environment = {"HF_TOKEN_PATH": constants.HF_TOKEN_PATH, "HF_ENDPOINT": api.endpoint}
        environment |= {key: os.environ[key] for key in ("HF_TOKEN", "HF_HUB_DISABLE_XET") if key in os.environ}
        failure = find_failure(HUB_CHECK, [questions, answers], Path(outside), **environment)
        if failure is not None:
            raise UserError(f"published, but not as it should be: {without_token(failure)}")
        found = json.loads(answers.read_text(encoding="utf-8"))
    rows = []
    for publication, result in zip(publications, found, strict=True):
        if publication.kind == "model":
            # another processor sums in another order
            if not result["difference"] <= 1e-5 * result["scale"]:
                raise UserError(f"published, but {publication} has logits that differ by {result['difference']:.3g}")
            checked = f"logits differ by {result['difference']:.1g}; every Auto class; generates"
        elif publication.kind == "space":
            checked = f"evaluate.load; {result['mean_entropy']:.3f} nats on a text"
        else:
            checked = f"load_dataset: {result['rows']} rows"
        rows.append((str(publication), publication.commit[:12], checked))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print("loaded back by id in a clean process with an empty cache:")
    for name, commit, checked in rows:
        print(f"  {name:{widths[0]}}  {commit:{widths[1]}}  {checked}")
