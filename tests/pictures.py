"""The pictures of README.md, made by the program from a run of the quickstart.

    python -m tests.pictures [--run RUN]

Without a run that has a card (`mlxsft quickstart`, then `mlxsft eval`), one is made first, in two minutes. Needs
Chromium and Pillow.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from mlxsft.cli import call
from tests.chat.browser import browsing

FOLDER = Path(__file__).resolve().parents[1] / ".github" / "pictures"
WIDTH = 1040  # of what is shown, in CSS pixels
HEIGHTS = {"run": 740, "card": 567}
SAMPLES = ["We need a slogan for the Zanora rug.", "Which team gets this ticket? Where is my Torent apron?"]
COLOURS = 128  # a page has few; a palette makes the file small


def run_of_quickstart(folder: Path) -> Path:
    """The folder of a quickstart's run that has a card."""
    run = folder / "runs" / "quickstart"
    samples = ", ".join(f'"{sample}"' for sample in SAMPLES)
    assert call(["quickstart", "--out", str(run), "--set", f"eval.samples=[{samples}]"]) == 0
    assert call(["eval", str(run)]) == 0
    return run


def take(pages: dict[str, Path], folder: Path) -> None:
    """The top of each page, light and dark, as PNG files of FOLDER."""
    with browsing(folder) as tab:
        tab.call("Emulation.setScrollbarsHidden", hidden=True)
        for name, page in pages.items():
            size = {"width": WIDTH, "height": HEIGHTS[name]}
            tab.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1.5, mobile=False)
            for scheme in ("light", "dark"):
                tab.scheme(scheme)
                tab.open(page.resolve().as_uri())
                file = FOLDER / f"{name}-{scheme}.png"
                tab.picture(file)
                Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
                print(f"{file}: {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    asked = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = asked.run or run_of_quickstart(folder)
        page = folder / "run.html"
        assert call(["runs", "show", str(run), "--html", str(page)]) == 0
        (folder / "profile").mkdir()
        take({"run": page, "card": run / "card.html"}, folder / "profile")


if __name__ == "__main__":
    main()
