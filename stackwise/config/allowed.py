"""What a parameter may be, in words: the same in error messages and in the reference.

The functions here read the JSON schema that pydantic makes of the definitions, so that nothing is said twice.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

Schema = dict[str, Any]


def at(root: Schema, path: Iterable[int | str]) -> Schema | None:
    """The part of a schema that describes what stands at `path`; None if the schema knows no such place."""
    found: Schema | None = root
    for key in path:
        inner = dereference(root, found or {})
        if isinstance(key, int):
            found = inner.get("items")
        else:
            own, others = inner.get("properties", {}), inner.get("additionalProperties")
            found = own.get(key, others if isinstance(others, dict) else None)
    return found


def dereference(root: Schema, part: Schema) -> Schema:
    """`part` with its reference followed, if it is one, be it to something that may also be null."""
    part = next((option for option in part.get("anyOf", ()) if option != {"type": "null"}), part)
    name = part.get("$ref", "").removeprefix("#/$defs/")
    return root["$defs"][name] if name else part


def in_words(root: Schema, part: Schema) -> str:
    """What `part` of a schema allows, such as `an integer of at least 1, or null`."""
    if options := part.get("anyOf", ()):
        return ", or ".join("null" if option == {"type": "null"} else in_words(root, option) for option in options)
    part = dereference(root, part)
    if "enum" in part:
        *first, last = part["enum"]
        return f"{', '.join(first)} or {last}"
    match part["type"]:
        case "integer":
            return "an integer" + _integers(part)
        case "number":
            return "a number" + _interval(part)
        case "array":
            return f"a list; each item: {in_words(root, part['items'])}"
        case "object" if isinstance(values := part.get("additionalProperties"), dict):
            return f"a mapping; each value: {in_words(root, values)}"
        case simple:
            return {"string": "a text", "boolean": "true or false", "object": "a mapping of keys to values"}[simple]


def as_yaml(value: object) -> str:
    """A default as one writes it in params.yaml."""
    if isinstance(value, float):
        # YAML 1.1, which Python reads, wants a point and a sign in a number with an exponent.
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    return value if isinstance(value, str) else json.dumps(value)


def _integers(part: Schema) -> str:
    low = part.get("minimum")
    high = part["exclusiveMaximum"] - 1 if "exclusiveMaximum" in part else part.get("maximum")
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"


def _interval(part: Schema) -> str:
    low, high = (part.get(f"exclusive{end}", part.get(end.lower())) for end in ("Minimum", "Maximum"))
    if low is not None and high is not None:
        left = "(" if "exclusiveMinimum" in part else "["
        right = ")" if "exclusiveMaximum" in part else "]"
        return f" in {left}{low:g}, {high:g}{right}"
    if low is not None:
        return f" above {low:g}" if "exclusiveMinimum" in part else f" of at least {low:g}"
    if high is not None:
        return f" below {high:g}" if "exclusiveMaximum" in part else f" of at most {high:g}"
    return ""
