"""The type of a JSON document."""

from __future__ import annotations

from typing import Any

# What `json.load` returns for an object: files on disk, of this version and older ones. A recursive type would have to
# be narrowed at every access without proving anything about the file; whoever reads one checks what it needs.
JsonObject = dict[str, Any]
