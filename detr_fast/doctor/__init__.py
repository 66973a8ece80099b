"""``detr-fast doctor``: what is installed, which native paths run here, and whether they are right and worth it.

Every op is tried on every device against its definition, and every supported package that is installed before and after
it computes with this one. Nothing is downloaded, and nothing is left changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detr_fast.doctor import library, machine, report
from detr_fast.files import write_atomically

__all__ = ["doctor"]


def doctor(quick: bool = False, json_file: Path | None = None) -> int:
    """Examines this machine, prints what it finds, and returns the exit code.

    Args:
        quick: no times, launches and waits of the packages.
        json_file: where everything is also written, at the end.

    Returns:
        0 if all is well; 1 if the native library cannot be used, or an op or a package's numbers are wrong. Versions
        of packages that are not supported are no failure.
    """
    problem = library.problem()
    found: dict[str, Any] = {"installed": machine.installed(), "library_problem": problem}
    _say(report.pairs("installed", found["installed"]))
    failures = ["native library"] if problem else _examine(found, quick)
    if problem:
        _say([problem])
    found |= {"failures": failures, "exit_code": 1 if failures else 0}
    if json_file is not None:
        write_atomically(json_file, json.dumps(_plain(found), indent=1) + "\n")
    missed = found.get("code_bases", {}).get("not_compared", 0)
    well = f"all that was tried is well; not compared: {missed}, see the notes" if missed else "all is well"
    print(f"FAILED: {'; '.join(failures)}" if failures else well, flush=True)
    return int(found["exit_code"])


def _examine(found: dict[str, Any], quick: bool) -> list[str]:
    """All that needs the native library: adds it to `found` and returns what failed."""
    import torch  # behind the check that it is there

    from detr_fast.doctor import code_bases, self_test

    found["native"] = machine.native_paths()
    _say(report.pairs("native paths", found["native"]))

    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    checks = [check for device in devices for check in self_test.run_checks(device)]
    found["self_test"] = [dataclasses.asdict(check) for check in checks]
    _say(report.self_test(checks))
    failures = [f"{check.name} on {check.device}" for check in checks if not check.ok]

    broken = {check.device for check in checks if not check.ok}
    device = next((device for device in devices[1:] if str(device) not in broken), devices[0])
    packages = list(code_bases.examine(device, quick))
    counted = device.type == "cuda"
    found["code_bases"] = {
        "device": str(device),
        "counted_by": "profiler" if counted else "operators",
        "packages": [_as_json(package) for package in packages],
        "not_installed": code_bases.absent(),
        "not_compared": sum(not row.compared for package in packages for row in package.rows),
    }
    _say(report.code_bases(packages, code_bases.absent(), str(device), counted, quick))
    return failures + [f"{package.name} {row.case}" for package in packages for row in package.rows if not row.ok]


def _as_json(package: Any) -> dict[str, Any]:
    content = dataclasses.asdict(package)
    for entry, row in zip(content["rows"], package.rows, strict=True):
        before_after = {"milliseconds": row.milliseconds, "launches": None, "waits": None}
        if row.activity is not None:
            before_after["launches"] = [activity.launches for activity in row.activity]
            before_after["waits"] = [activity.waits for activity in row.activity]
        del entry["activity"], entry["milliseconds"]
        entry |= {
            name: None if value is None else dict(zip(("before", "after"), value, strict=True))
            for name, value in before_after.items()
        }
    return content


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _say(lines: Iterable[str]) -> None:
    """As each part is done, because the whole takes half a minute."""
    print("\n".join(lines), end="\n\n", flush=True)
