"""The form that every plan has: a YAML file with a list of runs, and defaults for all of them."""

from pathlib import Path

import yaml

from cats.errors import CatsError


def runs(path: Path, wanted: str) -> list[dict]:
    """Each run of the plan, over its `defaults`; raises CatsError for a file that is no plan.

    `wanted` names what a run must have, for the message.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatsError(
            f"The plan {path} cannot be read: {(error.strerror or str(error)).lower()}."
        ) from error
    except yaml.YAMLError as error:
        raise CatsError(f"The plan {path} is not valid YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise CatsError(f"The plan {path} needs a list `runs`, each with {wanted}.")
    return [{**content.get("defaults", {}), **run} for run in content["runs"]]
