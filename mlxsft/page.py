"""HTML pages that need nothing but themselves: one style, light and dark, and files written whole."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from mlxsft.errors import UsageError
from mlxsft.outputs import refuse_existing

STYLE = """
:root{color-scheme:light dark;--fg:#1d2329;--dim:#66707a;--bg:#f6f7f9;--card:#fff;--line:#e2e6ea;--bar:#3f74d8;
--error:#c62f35;--warning:#a86400;--note:#2a6fa8}
@media(prefers-color-scheme:dark){:root{--fg:#e4e8ec;--dim:#98a2ad;--bg:#14181c;--card:#1c2127;--line:#2f363d;
--bar:#7aa5f5;--error:#ff7b7f;--warning:#efb04c;--note:#79b8ee}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .7rem}h3{font-size:1rem;margin:0}p{margin:.3rem 0}.dim{color:var(--dim)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.2rem;margin-bottom:.8rem}
.grid{display:grid;gap:.8rem;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}.grid .card{margin:0}.row{display:flex;gap:.6rem;
justify-content:space-between}.num{font-variant-numeric:tabular-nums;white-space:nowrap}
table{border-collapse:collapse;width:100%;margin:.6rem 0}td{padding:.25rem .8rem .25rem 0;vertical-align:top;
border-top:1px solid var(--line);overflow-wrap:anywhere}svg{width:100%;height:auto;display:block}
"""


def model_name(model: str) -> str:
    """What a page calls a model: its id on the Hub, or the name of its folder."""
    return Path(model).name if Path(model).is_absolute() else model


def document(title: str, parts: list[str], style: str = "") -> str:
    """The HTML of a page around its parts, which are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def write_page(html: str, path: Path, *, force: bool = False) -> None:
    """The page at `path`, whole or not at all. Raises UsageError where a file is there and `force` is not given."""
    refuse_existing(path, force=force)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(html, encoding="utf-8", errors="backslashreplace")
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}", "Name another file.") from error
    finally:
        aside.unlink(missing_ok=True)
