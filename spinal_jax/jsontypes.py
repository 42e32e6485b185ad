"""Types of JSON documents, whose values have the types that the schema of the document gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]  # a JSON object
ReadJson = Mapping[str, Any]  # a JSON object that is only read
