"""HTML pages that need nothing else: pictures are embedded, values from outside are escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

TEMPLATE_DIR = Path(__file__).with_name("templates")


def to_data_uri(data: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def render_template(template: str, **context: Any) -> str:
    """A template filled in; what comes from outside can't be HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATE_DIR)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["big"] = format_compact
    environment.filters["score"] = lambda value: "-" if value is None else f"{value:.4f}"
    return environment.get_template(template).render(**context)


def format_compact(number: float) -> str:
    """Readable at a glance: 14,714,688 is 14.7 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
