"""Read what a cut cost: every output has its record beside it, billhook.json.

    billhook prune demo --method fasp --ratio 0.2 -o smaller
    python examples/read_report.py [FOLDER]

report.html shows the same to people.  An error is relative: the norm of what a layer's output lost, over that of the
output, on text that the repair was not fitted on.
"""

import json
import sys
from pathlib import Path


def main(folder: str = "smaller") -> None:
    report = json.loads((Path(folder) / "billhook.json").read_text(encoding="utf-8"))
    recipe, sizes = report["recipe"], report["sizes"]
    before, after = sizes["before"], sizes["after"]
    print(f"{report['parent']} by {recipe['method']} ({report['paper']}), {sizes['budget']}, layout {report['layout']}")
    for what in ("parameters", "decoder_parameters"):
        share = 1 - after[what] / before[what]
        print(f"{what:18} {before[what]:>13,} → {after[what]:>13,}  (−{share:.2%})")
    if report["dropped_layers"]:
        print(f"layers that went: {', '.join(map(str, report['dropped_layers']))}")

    print(f"\n{'layer':>5}  {'axis':8} {'units':>13}  {'error: cut':>10}  {'repaired':>8}")
    for cut in report["cuts"]:
        units = f"{cut['units']:,} → {cut['units'] - cut['dropped']:,}"
        repaired = (
            cut["error"] if cut["error_held_out"] is None else cut["error_held_out"]
        )  # few windows: none held out
        errors = f"{cut['error_without']:>10.4f}  {repaired:>8.4f}"
        print(f"{cut['layer']:>5}  {cut['kind']:8} {units:>13}  {errors}")
    print(
        f"\n{sum(report['seconds'].values()):.0f} s; {', '.join(load['client'] for load in report['loads'])} loads it"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
