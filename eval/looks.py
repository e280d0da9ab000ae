"""The ledger of looks at reporting sets: which released versions were measured on which set, and how often.

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
    """Enters a result into the ledger, as one JSON line, and returns its `versions` and `look`.

    `versions` are those that were measured on the set in this task, with this one; `look` is the number of this
    version's look, 1 for the first. A repeated run with the same weights, calibration and prompt gives the same numbers
    and is no further look. Raises X2DFDError where the ledger cannot be read or written.
    """
    model = result["model"]
    setting = {"manifest": result["data"]["sha256"], "split": result["data"]["split"], "task": result["task"]["name"]}
    version = str(model["stated"].get("name") or model["name"])
    model_sha256 = model_hash({key: value for key, value in model["stated"].items() if key != "runs_on"})
    entry = setting | {"version": version, "model_sha256": model_sha256}
    try:
        lines = ledger.read_text("utf-8").splitlines() if ledger.exists() else []
        earlier = [line for line in map(parse_json, lines) if {key: line[key] for key in setting} == setting]
        hashes = [line["model_sha256"] for line in earlier if line["version"] == version]
        if model_sha256 not in hashes:
            hashes.append(model_sha256)
            with ledger.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise X2DFDError(f"the ledger {ledger} cannot be read or written: {error}", code="ledger_unusable") from error
    versions = sorted({str(line["version"]) for line in earlier} | {version})
    return {"versions": versions, "look": hashes.index(model_sha256) + 1}
