"""CPU seconds before a command line answers, user and system: python benchmarks/startup.py

The least of --times runs of each, as Markdown, and whether torch was imported.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

import results

COMMANDS = (
    *("--version", "--help", "prun", "methods", "methods fasp", "prune --help", "search --help", "recover --help"),
    *("prune . --ratio 2 -o out", "recover . --tokens 3 -o out", "compare . --methods fsap --ratio 0.2"),
)
RUN = """
import json, resource, sys
from billhook.__main__ import main
try:
    main()
except SystemExit:
    pass
print(json.dumps("torch" in sys.modules), file=sys.__stderr__)
"""


def seconds(command: list[str]) -> tuple[float, bool]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", RUN, *command], capture_output=True, text=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, json.loads(done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    print("| `billhook …` | CPU seconds | imports torch |\n|---|---|---|")
    for line in COMMANDS:
        runs = [seconds(line.split()) for _ in range(times)]
        least = min(spent for spent, _ in runs)
        print(f"| `{line}` | {least:.2f} | {'yes' if runs[0][1] else 'no'} |", flush=True)
        results.write("startup", [{"line": line, "cpu_seconds": least, "imports_torch": runs[0][1]}])
