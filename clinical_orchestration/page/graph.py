"""Layout of a task graph: layers from top to bottom, drawn as SVG by the template. Pure.

Narrow on purpose, so that it is readable at the width of a phone: names are broken at their underscores.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Task

NODE_WIDTH, NODE_HEIGHT = 106, 50
GAP_X, GAP_Y, MARGIN = 14, 24, 4
LINE_LENGTH = 13
_SWEEPS = 4

_Item = tuple[str, int]
"""A task in its layer, or the place where an edge passes a layer between."""


@dataclass(frozen=True)
class Node:
    """One task: the corner at the top left, in units of the drawing, and its name in lines."""

    task_id: str
    x: float
    y: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A drawing of `width` times `height` units, nodes from top to bottom; `paths` are the edges as SVG path data."""

    nodes: tuple[Node, ...]
    paths: tuple[str, ...]
    width: float
    height: float


def lay_out(tasks: Mapping[str, Task]) -> Graph:
    """Return the drawing of a graph of tasks; an edge goes from each task down to its downstream tasks."""
    depth = _depths(tasks)
    layers: list[list[_Item]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    links: dict[_Item, list[_Item]] = {}
    chains: list[list[_Item]] = []
    for task_id in tasks:
        layers[depth[task_id]].append((task_id, depth[task_id]))
    for task_id, task in tasks.items():
        for below in task.downstream:
            first, last = depth[task_id], depth.get(below, -1)
            if last <= first:  # no such task, or a circle
                continue
            # an edge that passes layers has a place in each, so that it goes around their tasks
            between = [(f"{task_id}>{below}", layer) for layer in range(first + 1, last)]
            for item in between:
                layers[item[1]].append(item)
            chain = [(task_id, first), *between, (below, last)]
            chains.append(chain)
            for upper, lower in itertools.pairwise(chain):
                links.setdefault(upper, []).append(lower)
                links.setdefault(lower, []).append(upper)
    for sweep in range(_SWEEPS):
        _order(layers, links, downward=sweep % 2 == 0)
    columns = max((len(layer) for layer in layers), default=0)
    width = 2 * MARGIN + columns * NODE_WIDTH + max(0, columns - 1) * GAP_X
    centre: dict[_Item, tuple[float, float]] = {}
    for number, layer in enumerate(layers):
        taken = len(layer) * NODE_WIDTH + (len(layer) - 1) * GAP_X
        for place, item in enumerate(layer):
            x = (width - taken) / 2 + place * (NODE_WIDTH + GAP_X) + NODE_WIDTH / 2
            centre[item] = (x, MARGIN + number * (NODE_HEIGHT + GAP_Y) + NODE_HEIGHT / 2)
    nodes = tuple(
        Node(name, x - NODE_WIDTH / 2, y - NODE_HEIGHT / 2, broken(name))
        for (name, _), (x, y) in centre.items()
        if name in tasks
    )
    height = 2 * MARGIN + len(layers) * NODE_HEIGHT + max(0, len(layers) - 1) * GAP_Y
    return Graph(nodes, tuple(_path([centre[item] for item in chain]) for chain in chains), width, height)


def broken(name: str) -> tuple[str, ...]:
    """Return a name in lines of at most :data:`LINE_LENGTH` characters where its underscores allow it."""
    lines = [""]
    words = name.split("_")
    for number, word in enumerate(words):
        part = word if number == len(words) - 1 else f"{word}_"
        if lines[-1] and len(lines[-1]) + len(part) > LINE_LENGTH:
            lines.append("")
        lines[-1] += part
    return tuple(lines)


def _depths(tasks: Mapping[str, Task]) -> dict[str, int]:
    """Return the layer of each task: one below the lowest of its upstream tasks."""
    depth: dict[str, int] = {}

    def of(task_id: str, above: frozenset[str]) -> int:
        if task_id not in depth:
            upstream = [name for name in tasks[task_id].upstream if name in tasks and name not in above]
            depth[task_id] = max((of(name, above | {task_id}) + 1 for name in upstream), default=0)
        return depth[task_id]

    for task_id in tasks:
        of(task_id, frozenset({task_id}))
    return depth


def _order(layers: list[list[_Item]], links: Mapping[_Item, Sequence[_Item]], *, downward: bool) -> None:
    """Order each layer by where its neighbours in the layer before are, which leaves few edges crossing."""
    for number in range(1, len(layers)) if downward else range(len(layers) - 2, -1, -1):
        fixed = layers[number - 1 if downward else number + 1]
        place = {item: index / max(1, len(fixed) - 1) for index, item in enumerate(fixed)}
        here = {item: index / max(1, len(layers[number]) - 1) for index, item in enumerate(layers[number])}

        def mean(item: _Item, place: Mapping[_Item, float] = place, here: Mapping[_Item, float] = here) -> float:
            found = [place[other] for other in links.get(item, ()) if other in place]
            return sum(found) / len(found) if found else here[item]

        layers[number].sort(key=mean)


def _path(points: Sequence[tuple[float, float]]) -> str:
    half = NODE_HEIGHT / 2
    parts = [f"M{points[0][0]:g} {points[0][1] + half:g}"]
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        start, end = y + half, to_y - half
        middle = (start + end) / 2
        parts.append(f"C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {end:g}")
        if (to_x, to_y) != points[-1]:
            parts.append(f"V{to_y + half:g}")
    return "".join(parts)
