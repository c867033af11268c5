"""Runs `unet-diffusion check` on a data set, and keeps what it found and how long it took.

    python benchmarks/checks.py NAME --config RECIPE [--data.root DIR] ...

NAME is that of the data set in benchmarks/results/checks.json, whose other data sets stay.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from measure import RESULTS, environment

SEVERITIES = ("warning", "advice", "note")


def findings_in(text: str) -> list[dict[str, str]]:
    """The findings in what `check` prints."""
    lines = [line.strip().partition(": ") for line in text.splitlines()]
    return [{"severity": severity, "text": said} for severity, _, said in lines if severity in SEVERITIES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the data set")
    parser.add_argument("--output", type=Path, default=RESULTS / "checks.json", help="the file of the findings")
    options, words = parser.parse_known_args()
    begun = time.perf_counter()
    command = [sys.executable, "-m", "unet_diffusion", "check", *words]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - begun
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    stored[options.name] = {"environment": environment(), "arguments": [word for word in words if "/" not in word],
                    "seconds": seconds, "findings": findings_in(text)}  # fmt: skip
    options.output.write_text(json.dumps(stored, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
