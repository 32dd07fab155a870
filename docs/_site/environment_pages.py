"""One page per registered environment, from its docstring, its spaces and its config."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
from gymnasium import spaces
from make_gifs import FILMS

from sam_gym import ENVIRONMENTS
from sam_gym.utils.fields import field_docs
from sam_gym.utils.registry import load_entry_point
from sam_gym.utils.settings import Range

#: A row of a docstring's table, and rows below it whose first cell is empty: they continue it.
_SPLIT_ROW = re.compile(r"^\| *[^ |].*\n(?:\|  +\|.*(?:\n|$))+", re.MULTILINE)


def environment_page(env_id: str) -> str:
    """Return the page of an environment as Markdown, in the form of Gymnasium's pages."""
    scalar, vector = map(load_entry_point, ENVIRONMENTS[env_id])
    text = inspect.cleandoc(scalar.__doc__)
    text = re.split(r"^Args:$", text, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    summary, _, rest = text.partition("\n")
    rest = _SPLIT_ROW.sub(_joined, rest)
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n?)+)", rest, re.MULTILINE))
    env = gym.make(env_id)
    sections["Observation Space"] += "\n" + _space_tables(env_id, env.observation_space)
    sections["Arguments"] += "\n" + arguments_table(scalar.config_class)
    parts = [f"# {env_id}", _picture(env_id), summary, _facts(env_id, env, scalar, vector)]
    parts += [f"## {title}\n\n{body.strip()}" for title, body in sections.items()]
    env.close()
    return "\n\n".join(parts) + "\n"


def environment_index() -> str:
    """Return the page that lists all environments."""
    rows = ["# Environments", "", "| id | task |", "|---|---|"]
    for env_id, (scalar, _) in ENVIRONMENTS.items():
        summary = inspect.cleandoc(load_entry_point(scalar).__doc__).splitlines()[0]
        rows.append(f"| [`{env_id}`]({env_id}.md) | {summary} |")
    rows += [
        "",
        "All are scalar and vector environments over one backbone. `gym.make(ID)` makes the scalar",
        'one, `gym.make_vec(ID, num_envs=64, vectorization_mode="vector_entry_point")` the vector',
        "one, which decodes all sub-environments in one batch. Importing `sam_gym` registers them.",
    ]
    return "\n".join(rows) + "\n"


def arguments_table(config: type[Any]) -> str:
    """Return the fields of a config as a table: name, type and range, default, meaning.

    The fields of the task itself come first, those that all environments share last.
    """
    docs = field_docs(config)
    hints = get_type_hints(config, include_extras=True)
    rows = ["| argument | type | default | meaning |", "|---|---|---|---|"]
    own = "| `render_mode` | `None`, `'rgb_array'` or `'human'` | `None` | What `render()` does: "
    rows.append(f"{own}nothing, return a frame, or show it in a window. |")
    names = [name for cls in config.__mro__[:-1] for name in vars(cls).get("__annotations__", ())]
    by_name = {each.name: each for each in fields(config)}
    for each in [by_name[name] for name in dict.fromkeys(names) if name in by_name]:
        cells = [f"`{each.name}`", kind_text(hints[each.name]), _default(each), docs[each.name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def kind_text(hint: Any) -> str:
    """Return a type in words: "int, from 1 to 100, or None"."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        ranges = [own.text for own in extras if isinstance(own, Range)]
        return ", ".join([kind_text(kind), *ranges])
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice!r}`" for choice in get_args(hint))
    if type(None) in get_args(hint):
        others = [kind_text(kind) for kind in get_args(hint) if kind is not type(None)]
        return " or ".join([*others, "None"])
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else f"`{hint}`"


def _joined(rows: re.Match[str]) -> str:
    """Join the rows of `_SPLIT_ROW` into one, cell by cell."""
    cells = zip(*(row.split("|")[1:-1] for row in rows[0].splitlines()), strict=True)
    return f"|{'|'.join(' '.join(' '.join(cell).split()) for cell in cells)}|\n"


def _default(each: Field[Any]) -> str:
    if each.default is not MISSING:
        return f"`{each.default!r}`"
    return f"`{each.default_factory()!r}`" if each.default_factory is not MISSING else "required"


def _picture(env_id: str) -> str:
    return f"![{env_id}](../assets/environments/{env_id}.gif)\n\n*{FILMS[env_id].caption}*"


def _facts(env_id: str, env: gym.Env[Any, Any], scalar: type[Any], vector: type[Any]) -> str:
    rows = {
        "Make": f'`gym.make("{env_id}")`',
        "Make many": f'`gym.make_vec("{env_id}", num_envs=64, '
        'vectorization_mode="vector_entry_point")`',
        "Action space": f"`{env.action_space}`",
        "Observation space": f"`Dict` of {len(spaces_of(env.observation_space))}, see below",
        "Classes": f"`{scalar.__module__}.{scalar.__name__}`, `{vector.__name__}`",
        "Arguments": f"`{scalar.config_class.__module__}.{scalar.config_class.__name__}`",
        "Train an agent": f"`python -m agents.train_ppo --env {env_id}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def spaces_of(space: Any) -> dict[str, Any]:
    """Return the entries of a Dict space."""
    assert isinstance(space, spaces.Dict)
    return dict(space.spaces)


def _space_tables(env_id: str, full: Any) -> str:
    handle = gym.make(env_id, obs="handle")
    text = ""
    for obs, space in (("full", full), ("handle", handle.observation_space)):
        text += f'\nWith the default arguments and `obs="{obs}"`:\n\n'
        text += "| key | space | shape | dtype | range |\n|---|---|---|---|---|\n"
        for key, own in spaces_of(space).items():
            kind = type(own).__mro__[type(own).__module__.startswith("sam_gym")].__name__
            values = f"0 to {own.n - 1}" if isinstance(own, spaces.Discrete) else ""
            if isinstance(own, spaces.Box):
                low, high = own.low.min(), own.high.max()
                values = f"{low:g} to {high:g}".replace("-inf to inf", "unbounded")
            text += f"| `{key}` | {kind} | {own.shape} | {own.dtype} | {values} |\n"
    handle.close()
    return text
