"""The ledger of looks at reporting sets: which released version was measured on which set, and how often.

A version is chosen on a development set and measured once on a reporting set. A second look by the same version, with
other weights, calibration or prompt, is choosing by the reporting set: its result says so and is not quoted.
"""

from __future__ import annotations

import json
from pathlib import Path

from x2dfd.errors import X2DFDError
from x2dfd.files import Json, parse_json
from x2dfd.rows import model_hash


def count(ledger: Path, result: Json) -> Json:
    """Enter a result into the ledger, a JSON line a look, and say how it stands there.

    `versions`: those that have looked at the set with this task, this one included; `look`: the number of this one's
    looks, 1 for the first. A run with the same weights, calibration and prompt gives the same numbers: it is no further
    look. Raises X2DFDError where the ledger cannot be read or written.
    """
    model = result["model"]
    of = {"manifest": result["data"]["sha256"], "split": result["data"]["split"], "task": result["task"]["name"]}
    version = str(model["stated"].get("name") or model["name"])
    by = model_hash({key: value for key, value in model["stated"].items() if key != "runs_on"})
    entry = of | {"version": version, "model_sha256": by}
    try:
        lines = ledger.read_text("utf-8").splitlines() if ledger.exists() else []
        before = [line for line in map(parse_json, lines) if {key: line[key] for key in of} == of]
        own = [line["model_sha256"] for line in before if line["version"] == version]
        if by not in own:
            own.append(by)
            with ledger.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise X2DFDError(f"the ledger {ledger} cannot be read or written: {error}", code="ledger_unusable") from error
    versions = sorted({str(line["version"]) for line in before} | {version})
    return {"versions": versions, "look": own.index(by) + 1}
