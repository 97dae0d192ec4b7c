"""Draw the rooms of the package from the list of floors in `tests/test_import_graph.py`."""

import ast

from .results import ROOT

# Room -> a few words for the picture. Every room of the floors needs an entry.
ROOMS = {
    "cli": "ofb-hf, recipes",
    "workflow": "a run from checkpoint to folder",
    "frozen": "compression without training",
    "search": "widths, depth, tokens",
    "choice": "best sizes under a budget",
    "token_search": "token counts alone",
    "masks": "bi-masks and gates",
    "training": "runs, teacher, checkpoints",
    "release": "Hub, cards, export",
    "pictures": "plots",
    "space": "what may change",
    "tokens": "token schedules",
    "pruning": "slice and compensate",
    "cost": "MACs, parameters, ms",
    "families": "what a ViT or Swin is",
    "data": "images",
    "models": "classes that go to the Hub",
    "metrics": "top-k accuracy",
    "hub_retries": "patience with the Hub",
    "durable": "files that survive",
    "argument_checks": "finite numbers",
}
FILES = ("cli", "hub_retries", "durable", "argument_checks")  # the others are folders
HIDDEN = ("__main__", "_moved", "_version")  # the package's own bookkeeping

WIDTH = 960
ROOM_HEIGHT = 46
FLOOR_HEIGHT = 62
MARGIN = 20
GAP = 12
FONT = 'font-family="Helvetica, Arial, sans-serif"'


def listed_floors() -> tuple[tuple[str, ...], ...]:
    """Return FLOORS of `tests/test_import_graph.py`, the ground floor first."""
    source = (ROOT / "tests" / "test_import_graph.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
    raise LookupError("tests/test_import_graph.py has no FLOORS.")


def floors() -> list[list[str]]:
    """Return the floors of the package, the top floor first, without bookkeeping modules."""
    visible = [[room for room in floor if room not in HIDDEN] for floor in listed_floors()]
    return [floor for floor in reversed(visible) if floor]


def rooms_svg() -> str:
    """Return the drawing: one row per floor, one box per room, an arrow down at the side."""
    rows = floors()
    unknown = {room for floor in rows for room in floor} - ROOMS.keys()
    if unknown:
        raise LookupError(f"docs/generators/rooms.py says nothing about {sorted(unknown)}.")
    height = 2 * MARGIN + FLOOR_HEIGHT * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" '
        'aria-label="Rooms of the package, floor by floor">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<path d="M 34 30 V ' + f'{height - 34}" stroke="#777777" stroke-width="2" fill="none"/>',
        f'<path d="M 28 {height - 42} L 34 {height - 26} L 40 {height - 42} Z" fill="#777777"/>',
        f'<text x="20" y="{height // 2}" transform="rotate(-90 20 {height // 2})" {FONT} '
        'font-size="13" fill="#555555" text-anchor="middle">imports go down only</text>',
    ]
    left = 60
    for number, floor in enumerate(rows):
        top = MARGIN + number * FLOOR_HEIGHT
        room_width = (WIDTH - left - MARGIN - GAP * (len(floor) - 1)) // len(floor)
        for position, room in enumerate(floor):
            x = left + position * (room_width + GAP)
            lines += _box(room, x, top, room_width)
    return "\n".join([*lines, "</svg>", ""])


def _box(room: str, x: int, y: int, width: int) -> list[str]:
    """Return the lines of one room: a box, its name and what happens there."""
    middle = x + width // 2
    name = room if room in FILES else f"{room}/"
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{ROOM_HEIGHT}" rx="6" fill="#eef4fa" '
        'stroke="#0b5fa5"/>',
        f'<text x="{middle}" y="{y + 19}" {FONT} font-size="15" font-weight="bold" '
        f'fill="#12355b" text-anchor="middle">{name}</text>',
        f'<text x="{middle}" y="{y + 37}" {FONT} font-size="12" fill="#333333" '
        f'text-anchor="middle">{ROOMS[room]}</text>',
    ]
