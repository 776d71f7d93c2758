"""Self-contained HTML pages: images are embedded, values from outside are escaped."""

from __future__ import annotations

import base64
from pathlib import Path

TEMPLATE_DIR = Path(__file__).with_name("templates")


def to_data_uri(data: bytes) -> str:
    """Encodes a PNG as a `data:` URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def render_template(template: str, **context: object) -> str:
    """Renders a template; all values are escaped, so that none can become markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATE_DIR)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["big"] = format_compact
    environment.filters["score"] = lambda value: "-" if value is None else f"{value:.4f}"
    return environment.get_template(template).render(**context)


def format_compact(number: float) -> str:
    """Formats a number with three digits and a unit: 14,714,688 becomes 14.7 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
