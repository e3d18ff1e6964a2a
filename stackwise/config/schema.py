"""The reference of `params.yaml`, generated from its definitions.

python -m stackwise.config.schema            write docs/params.schema.json and docs/parameters.md
python -m stackwise.config.schema --check    exit with 1 if they differ from the definitions
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from stackwise.config.allowed import Schema, as_yaml, dereference, in_words
from stackwise.config.params import Params, section_of
from stackwise.config.section import Section
from stackwise.errors import UserError

DOCS = Path("docs")
GENERATE = "python -m stackwise.config.schema"

_INTRODUCTION = f"""\
<!-- Generated from the definitions in stackwise/config by `{GENERATE}`. Do not edit. -->
# Parameters

All parameters of a pipeline stand in `params.yaml`. Every section must be there (`{{}}` takes all its defaults); within
a section each key has a default. Keys that are not listed here, values that are not allowed and combinations that
cannot be stop every command before it does anything, with all problems at once.

Numbers with an exponent need a point and a sign, as in `1.0e-4`: YAML takes `1e-4` for text. Editors that know
[JSON schemas](params.schema.json) check and complete `params.yaml` while you type.
"""


def json_schema() -> Schema:
    """The JSON schema of params.yaml."""
    schema = Params.model_json_schema(schema_generator=_Generator)
    for section in _sections(Params):
        part = schema if section is Params else schema["$defs"][section.__name__]
        for name, meaning in meanings(section).items():
            part["properties"][name]["description"] = meaning
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "params.yaml of StackWise"}


def meanings(section: type[Section]) -> dict[str, str]:
    """The docstring of each key of a section, those of its base classes too."""
    found = {}
    for base in reversed(section.__mro__):
        if base is not Section and issubclass(base, Section):
            body = ast.parse(inspect.getsource(base)).body[0]
            assert isinstance(body, ast.ClassDef)
            for key, text in pairwise(body.body):
                if (
                    isinstance(key, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[ast.unparse(key.target)] = inspect.cleandoc(str(text.value.value))
    return found


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section's class and those of all sections within it."""
    yield section
    for field in section.model_fields.values():
        if (inner := section_of(field.annotation)) is not None:
            yield from _sections(inner)


def reference() -> str:
    """The reference of all parameters (Markdown)."""
    schema = json_schema()
    parts = [_INTRODUCTION, _table(_rows(schema, schema, "", deep=False))]
    for name, part in schema["properties"].items():
        inner = dereference(schema, part)
        prefix = f"{name}."
        if "items" in inner:
            inner, prefix = dereference(schema, inner["items"]), f"{name}.<k>."
        elif isinstance(inner.get("additionalProperties"), dict):
            inner, prefix = dereference(schema, inner["additionalProperties"]), f"{name}.<name>."
        if "properties" in inner:
            parts.append(f"## {name}\n\n{_meaning(schema, part)}\n\n{_table(_rows(schema, inner, prefix, deep=True))}")
    return "\n".join(parts)


def generate() -> dict[Path, str]:
    """The text of each generated file."""
    return {
        DOCS / "params.schema.json": json.dumps(json_schema(), indent=1) + "\n",
        DOCS / "parameters.md": reference(),
    }


def check(directory: Path = Path()) -> None:
    """Hold the files of a project against the definitions.

    Raises:
        UserError: they differ.
    """
    old = [str(p) for p, text in generate().items() if not _holds(directory / p, text)]
    if old:
        raise UserError(f"{', '.join(old)}: out of date with stackwise/config; run `{GENERATE}`")


class _Generator(GenerateJsonSchema):
    """Without titles, which would only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _rows(root: Schema, section: Schema, prefix: str, *, deep: bool) -> Iterator[tuple[str, str, str, str]]:
    """Path, allowed values, default and meaning of each parameter of a section, and of those within it if `deep`."""
    for name, part in section["properties"].items():
        inner = dereference(root, part)
        default = f"`{as_yaml(part['default'])}`" if "default" in part else "required"
        is_section = "properties" in inner
        if is_section and deep and part.get("default") is not None:
            default = ""  # those of its keys, which follow
        yield f"`{prefix}{name}`", in_words(root, part), default, _meaning(root, part)
        item = dereference(root, inner["items"]) if isinstance(inner.get("items"), dict) else {}
        if is_section and deep:
            yield from _rows(root, inner, f"{prefix}{name}.", deep=True)
        elif "properties" in item and deep:
            yield from _rows(root, item, f"{prefix}{name}.<i>.", deep=True)


def _meaning(root: Schema, part: Schema) -> str:
    # pydantic does not repeat the description of a section's class.
    return " ".join((part.get("description") or dereference(root, part)["description"]).split())


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| Parameter | Allowed | Default | Meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        print(__doc__)
        sys.exit(arguments not in (["--help"], ["-h"]))
    try:
        if arguments:
            check()
            print("the reference of params.yaml is current")
            return
    except UserError as error:
        sys.exit(f"error: {error}")
    DOCS.mkdir(exist_ok=True)
    for path, text in generate().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path} written")


if __name__ == "__main__":
    main()
