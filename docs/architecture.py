"""The house of the package as a drawing, made from its imports: python docs/architecture.py > house.svg"""

import ast
import html
import sys
from pathlib import Path

WIDTH, HIGH, GAP = 960, 46, 54
PACKAGES = ("convert", "configs", "launch")  # beside the rooms of medplib_jax


def room_of(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "medplib_jax" and len(parts) > 1 else parts[0] if parts[0] in PACKAGES else ""


def imports(root: Path) -> dict[str, set[str]]:
    """{room: the rooms that its modules import}; `__main__.py` composes and does not count."""
    found: dict[str, set[str]] = {}
    for folder in ("medplib_jax", *PACKAGES):
        for path in (root / folder).rglob("*.py"):
            own = room_of(".".join(path.relative_to(root).with_suffix("").parts))
            if not own or own == "__init__":
                continue
            rooms = found.setdefault(own, set())
            if path.name != "__main__.py":
                rooms |= {room for name in _imported(path) if (room := room_of(name)) and room != own}
    return {room: {other for other in others if other in found} for room, others in found.items()}


def _imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports. ValueError where imports run in a circle."""
    known: dict[str, int] = {}

    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise ValueError(f"imports run in a circle: {' -> '.join([*above, room])}")
        if room not in known:
            known[room] = 1 + max((floor(other, (*above, room)) for other in rooms[room]), default=0)
        return known[room]

    for room in rooms:
        floor(room)
    return known


def direct(rooms: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that follow from no others, so that the drawing has few lines."""
    reach: dict[str, set[str]] = {}
    for room in sorted(rooms, key=floors(rooms).get):
        reach[room] = rooms[room].union(*(reach[other] for other in rooms[room]))
    return {
        room: {other for other in others if not any(other in reach[third] for third in others)}
        for room, others in rooms.items()
    }


def draw_house(root: Path) -> str:
    """SVG: a row for each floor, an arrow for each import that follows from no others."""
    rooms = imports(root)
    levels = floors(rooms)
    rows = [sorted(room for room in rooms if levels[room] == level) for level in range(max(levels.values()), 0, -1)]
    height = len(rows) * (HIGH + GAP)
    places, boxes = {}, []
    for number, row in enumerate(rows):
        for place, room in enumerate(row):
            x, y = (place + 0.5) * WIDTH / len(row), number * (HIGH + GAP) + GAP / 2
            places[room] = (x, y)
            boxes.append(
                f'<g><rect x="{x - 62:.0f}" y="{y:.0f}" width="124" height="{HIGH}" rx="8" fill="#0072b2"/>'
                f'<text x="{x:.0f}" y="{y + 29:.0f}" text-anchor="middle" fill="#fff">{html.escape(room)}</text></g>'
            )
    lines = [
        f'<path d="M{places[room][0]:.0f} {places[room][1] + HIGH:.0f}L{places[other][0]:.0f} {places[other][1]:.0f}" '
        'fill="none" stroke="#8896a5" stroke-width="1.5" marker-end="url(#tip)"/>'
        for room, others in direct(rooms).items()
        for other in sorted(others)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="15" role="img"><title>Rooms of the package: arrows are imports</title><defs><marker id="tip" '
        'viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" '
        'fill="#8896a5"/></marker></defs>'
    )
    return "\n".join([head, *lines, *boxes, "</svg>\n"])


if __name__ == "__main__":
    sys.stdout.write(draw_house(Path(__file__).parents[1]))
