"""How long a ranking of four completions takes by keys alone, in a real browser, without the reading.

    python benchmarks/label_keys.py [--items 20] [--pace 0.28]

An item takes four keys for the qualities, Enter, four keys for the ranks, and Enter; without qualities and flags half
of that. Between two keys `pace` seconds pass: 0.28 is what Card, Moran and Newell (1983) give for an average typist.
With 0 what is left is the page's own time: showing, saving each change on the disk, and the next item. Prints a line of
JSON: median and largest seconds from one item to the next.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import browser
from tests.labeling_pages import ranking, serving

_READY = "document.querySelectorAll('.output').length === 4 && !document.querySelector('#main').inert"


def measure(items: int, pace: float, quality: bool) -> dict[str, float]:
    """Seconds an item."""
    flags = ("hallucination", "harm") if quality else ()
    found, keys = list[float](), [*("5432" if quality else ""), *["Enter"] * quality, *"1223", "Enter"]
    with tempfile.TemporaryDirectory() as folder, browser() as tab:
        work = [ranking(f"i{n}") for n in range(items)]
        with serving(Path(folder), work, quality=quality, flags=flags) as served:
            tab.open(f"{served.url}/#{served.tokens['Anna']}")
            for _ in range(items - 1):
                tab.wait(_READY)
                started = time.monotonic()
                for key in keys:
                    time.sleep(pace)
                    tab.press(key)
                tab.wait(_READY)
                found.append(time.monotonic() - started)
            assert len(served.events("submitted")) == items - 1
    return {"median_s": round(statistics.median(found), 3), "longest_s": round(max(found), 3), "keys": len(keys)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--pace", type=float, default=0.28)
    given = parser.parse_args()
    print(
        json.dumps(
            {
                f"{name}, {pace:g} s a key": measure(given.items, pace, quality)
                for name, quality in (("qualities and ranks", True), ("ranks", False))
                for pace in (given.pace, 0.0)
            }
        )
    )


if __name__ == "__main__":
    main()
