"""All parameters, in Python."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stackwise.config.params import Params, find_problems, read_yaml
from stackwise.errors import UserError


@dataclass(frozen=True)
class StackWiseConfig:
    """All parameters, validated."""

    params: Params

    @classmethod
    def from_yaml(cls, path: str | Path = "params.yaml") -> Self:
        """Of a params file.

        Raises:
            UserError: naming every problem of the file.
        """
        return cls.from_dict(read_yaml(Path(path)), name=str(path))

    @classmethod
    def from_dict(cls, tree: Any, *, name: str = "config") -> Self:
        """Of nested mappings, as a params file holds them.

        Raises:
            UserError: naming every problem, after `name`.
        """
        if not isinstance(tree, dict):
            raise UserError(f"{name} = {tree!r}: expected a mapping of sections, as in docs/parameters.md")
        problems = list(find_problems(tree))
        if len(problems) == 1:
            raise UserError(f"{name}: {problems[0]}")
        if problems:
            raise UserError("\n  ".join((f"{name}: {len(problems)} problems", *problems)))
        return cls(Params.model_validate(tree))

    def override(self, **values: Any) -> Self:
        """The same with other values by dotted name: `override(**{"stack.steps": 10, "stacks.1.lr": 1e-3})`. Two
        underscores may stand for a dot: `override(stack__steps=10)`.

        Raises:
            UserError: naming every problem.
        """
        tree = self.params.model_dump(exclude_unset=True)
        for name, value in values.items():
            _set(tree, name.replace("__", ".").split("."), value)
        return self.from_dict(tree)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """See to it that a value is one of some.

    Raises:
        UserError: it is not.
    """
    *first, last = choices
    if value not in (*first, last):
        raise UserError(f"{name} = {value}: expected {', '.join(first)} or {last}")


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put a value at a path. Sections that are not there begin empty, and the list of what stacks do differently gets
    as long as it must."""
    *parents, last = path
    node: Any = tree
    for key in parents:
        if isinstance(node, list):
            node = node[_item(node, key, path)]
        else:
            if not isinstance(node.get(key), dict | list):
                node[key] = {}
            node = node[key]
    node[_item(node, last, path) if isinstance(node, list) else last] = value


def _item(items: list[Any], key: str, path: Sequence[str]) -> int:
    """The place of an item; the list reaches that far afterwards."""
    if not key.isdecimal():
        raise UserError(f"config: {'.'.join(path)}: expected the number of an item in place of {key}")
    items += [{} for _ in range(int(key) + 1 - len(items))]
    return int(key)
