"""A chart of a report's page as a picture of its own: python benchmarks/readme_chart.py REPORT.html OUT.svg [--number
N]"""

import argparse
import re
from pathlib import Path

from billhook.errors import BillhookError
from billhook.reports.charts import PICTURE
from billhook.runtime import atomic

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("page", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--number", type=int, default=0)
args = parser.parse_args()

found = re.findall(
    r"<svg[^>]*\bwide chart\b.*?</svg>|<svg[^>]*\bchart wide\b.*?</svg>", args.page.read_text(), re.DOTALL
)
if len(found) <= args.number:
    raise BillhookError(f"{args.page} has {len(found)} charts")
head, rest = found[args.number].split(">", 1)
name = "" if "xmlns=" in head else ' xmlns="http://www.w3.org/2000/svg"'
atomic.write_text(args.out, f"{head}{name}><style>{PICTURE}</style>{rest}\n")
