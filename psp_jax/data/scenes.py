"""Draw the scenes of context_scenes: small pictures whose parts only the whole picture can name.

The three kinds of scene hold the three failure cases of PSPNet (Zhao et al., CVPR 2017, section 3.1). In each, two
classes are drawn by the same code in the same colours, and one number of the whole scene tells them apart:

* shore: the same surface is water or road and the same hull a boat or a car. The share of light patches, over sky and
  surface together, is 42 % with water and 58 % with a road.
* street: the same facade is house or skyscraper by its whole extent, the mean height of all its wings.
* bedroom: the same furniture is bed or sofa, and a small lump in its own texture a pillow or a cushion, by the share
  of light patches over wallpaper and cover.

The share and the mean are exact for the whole scene, yet say little in any part of it: the patches are a smooth random
field cut at a quantile, so a window sees a handful of correlated blobs. Evidence that is strong anywhere (a tint, a
clear mark at an edge) would not do: a dilated FCN sees the whole map too, and only a weak sum is hard for it.

Everything is integer arithmetic on draws of a fixed bit generator: each machine draws the same pixels.
"""

import dataclasses

import numpy as np

SPLITS = {"train": 0, "validation": 1}
CLASSES = (
    *("sky", "tree", "grass", "water", "road", "boat", "car", "house", "skyscraper"),
    *("wall", "floor", "bed", "sofa", "pillow", "cushion"),
)
# The classes that each failure case decides; those of no case can be told locally.
FAILURE_CASES = {
    "mismatched_relationship": ("water", "road", "boat", "car"),
    "confusion_categories": ("house", "skyscraper"),
    "inconspicuous_classes": ("bed", "sofa", "pillow", "cushion"),
}

RGB = tuple[int, int, int]
Region = np.ndarray | tuple[slice, slice]  # a mask or a box
_LIGHT = 42  # grey levels of a light patch over its ground
_LIGHT_PERCENT = (42, 58)  # share of light patches for the first and the second class of a pair
_WING_PERCENT = (36, 43)  # mean height of a facade, of the scene's height
_NOISE = 6  # sensor noise: half-width of each of its three uniform parts, in grey levels
_PATCH = 28  # width of a lattice cell of the patches, in pixels of a 128-pixel scene

# Sky, surface, wall and cover have one lightness each in all their colours: what shall be hard is to sum over the
# scene, not to tell a light patch from a light ground.
_SKIES: tuple[RGB, ...] = ((133, 183, 221), (147, 177, 209), (205, 161, 141), (136, 186, 190), (178, 164, 198))
_SURFACES: tuple[RGB, ...] = ((91, 117, 137), (102, 114, 132), (84, 122, 132), (105, 113, 121))
_HULLS: tuple[RGB, ...] = (
    *((206, 62, 52), (236, 178, 48), (44, 138, 130)),
    *((240, 236, 224), (56, 84, 160), (232, 118, 60)),
)
_FACADES: tuple[RGB, ...] = ((188, 110, 86), (206, 170, 122), (150, 146, 156), (170, 132, 128), (126, 144, 150))
_GRASS: tuple[RGB, ...] = ((122, 168, 84), (142, 172, 78), (104, 156, 92))
_CROWNS: tuple[RGB, ...] = ((52, 118, 70), (72, 128, 60), (40, 104, 84))
_WALLS: tuple[RGB, ...] = ((201, 181, 151), (173, 191, 175), (195, 177, 195), (173, 187, 201))
_FLOORS: tuple[RGB, ...] = ((158, 110, 72), (138, 98, 70), (176, 132, 88))
_COVERS: tuple[RGB, ...] = ((173, 85, 89), (84, 116, 162), (98, 124, 84), (133, 95, 143), (156, 104, 34))
_WOODS: tuple[RGB, ...] = ((96, 62, 40), (116, 78, 48), (72, 54, 46))
_GLASS: tuple[RGB, ...] = ((58, 76, 98), (70, 88, 104), (246, 216, 132))


@dataclasses.dataclass
class _Canvas:
    """A scene while it is drawn: RGB in integers that may leave 0..255, train ids, and the dice."""

    image: np.ndarray  # i16[S, S, 3]
    label: np.ndarray  # u8[S, S]
    rng: np.random.Generator

    @property
    def size(self) -> int:
        return self.label.shape[0]

    def px(self, pixels: int) -> int:
        """Scale a length given for a scene of 128 pixels."""
        return pixels * self.size // 128

    def between(self, low: int, high: int) -> int:
        """Draw a length from low to high inclusive, both given for a scene of 128 pixels."""
        return int(self.rng.integers(self.px(low), self.px(high) + 1))

    def pick(self, colors: tuple[RGB, ...]) -> RGB:
        return colors[int(self.rng.integers(len(colors)))]

    def paint(self, region: Region, color: RGB, name: str | None = None) -> None:
        self.image[region] = color
        if name is not None:
            self.label[region] = CLASSES.index(name)

    def shade(self, region: Region, levels: int) -> None:
        self.image[region] += levels

    def where(self, *names: str) -> np.ndarray:
        """Return the mask of the pixels that bear one of these classes so far."""
        wanted = np.zeros(256, bool)
        wanted[[CLASSES.index(name) for name in names]] = True
        return wanted[self.label]

    def ellipse(self, y: int, x: int, ry: int, rx: int, power: int = 2) -> np.ndarray:
        """Return the mask of an ellipse (power 2) or of a cushion-like superellipse (power 4), in exact integers."""
        along = np.arange(self.size)
        dy, dx = (np.abs(along - y) * rx) ** power, (np.abs(along - x) * ry) ** power
        return dy[:, None] + dx < (rx * ry) ** power * 7 // 8  # the 7/8 keeps small discs round on the pixel grid


def scene(seed: int, index: int, size: int = 128, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene, a pure function of the arguments: image u8[size, size, 3] RGB, label u8[size, size] of train ids.

    Kinds and sides alternate with the index, so that every six scenes in a row hold each class pair once.

    Raises ValueError for a split that is not one of SPLITS or a size outside 64..512.
    """
    if split not in SPLITS:
        raise ValueError(f"context_scenes has no split {split!r}; its splits are {', '.join(SPLITS)}.")
    if not 64 <= size <= 512:  # less cannot hold the objects, more overflows the ellipses' integers
        raise ValueError(f"Scenes of {size} pixels cannot be drawn; ask for 64 to 512.")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, SPLITS[split], index))))
    canvas = _Canvas(np.zeros((size, size, 3), np.int16), np.zeros((size, size), np.uint8), rng)
    kind, side = (_shore, _street, _bedroom)[index % 3], index // 3 % 2
    kind(canvas, side)
    # The sum of three uniform draws is near enough to a Gaussian, and exact where a Gaussian's last bit is not.
    noise = rng.integers(-_NOISE, _NOISE + 1, (3, size, size, 3), dtype=np.int8).sum(0, dtype=np.int8)
    return np.clip(canvas.image + noise, 0, 255).astype(np.uint8), canvas.label


def _shore(canvas: _Canvas, side: int) -> None:
    surface, hull = (("water", "boat"), ("road", "car"))[side]
    size, horizon = canvas.size, canvas.between(38, 52)
    canvas.paint(_box(0, horizon, 0, size), canvas.pick(_SKIES), "sky")
    canvas.paint(_box(horizon, size, 0, size), canvas.pick(_SURFACES), surface)
    _hills(canvas, horizon)
    for _ in range(int(canvas.rng.integers(2, 5))):
        _tree(canvas, horizon, canvas.between(4, 124), canvas.between(12, 20))
    canvas.shade(_patches(canvas, canvas.where("sky", surface), _LIGHT_PERCENT[side]), _LIGHT)
    # Seen from far to near, so that a nearer hull covers a farther one.
    for base in sorted(canvas.between(70, 122) for _ in range(int(canvas.rng.integers(2, 4)))):
        _hull(canvas, base, canvas.between(16, 112), canvas.px(18) + base * 3 // 16, surface, hull)


def _hills(canvas: _Canvas, horizon: int) -> None:
    """Draw a low green skyline that stands on the horizon."""
    height = canvas.px(3) + _field(canvas, 1, 24)[0] * canvas.px(9) // 1024
    rows = np.arange(canvas.size)[:, None]
    canvas.paint((rows >= horizon - height) & (rows < horizon), canvas.pick(_GRASS), "grass")


def _tree(canvas: _Canvas, base: int, x: int, height: int) -> None:
    color, radius = canvas.pick(_CROWNS), height * 3 // 10
    canvas.paint(_box(base - height // 2, base, x - height // 12 - 1, x + height // 12 + 1), (92, 66, 48), "tree")
    for dy, dx in ((0, -radius * 2 // 3), (0, radius * 2 // 3), (-radius * 2 // 3, 0)):
        canvas.paint(canvas.ellipse(base - height * 6 // 10 + dy, x + dx, radius, radius), color, "tree")
    canvas.shade(canvas.ellipse(base - height * 3 // 4, x - radius // 3, radius // 2 + 1, radius // 2 + 1), 22)


def _hull(canvas: _Canvas, base: int, x: int, width: int, surface: str, name: str) -> None:
    """Draw a rounded body with a cabin and two dark discs: portholes or wheels, as you like."""
    rows, cols = np.ogrid[: canvas.size, : canvas.size]
    height, color = width * 3 // 10, canvas.pick(_HULLS)
    shadow = canvas.ellipse(base, x, height // 3, width * 9 // 16)
    canvas.shade(shadow & canvas.where(surface), -30)
    depth = rows - (base - height)
    body = (depth >= 0) & (rows < base) & (np.abs(cols - x) * 2 * height <= width * height - depth * depth // 2)
    rise = (base - height) - rows
    cabin = (rise > 0) & (rise <= height * 4 // 5) & (np.abs(cols - x) <= width * 3 // 10 - rise // 2)
    canvas.paint(cabin, (236, 232, 222), name)
    canvas.paint(body, color, name)
    canvas.shade(body & (depth < height // 4), 16)
    canvas.shade(_rim(body | cabin), -52)
    pane = (rise > height // 5) & (rise < height * 13 // 20) & (np.abs(np.abs(cols - x) - width // 8) < width // 12)
    canvas.paint(pane, (70, 98, 122))
    for dx in (-width // 4, width // 4):
        for radius, color in ((height * 5 // 16, (40, 42, 50)), (height // 8, (196, 200, 204))):
            canvas.paint(canvas.ellipse(base - height * 3 // 8, x + dx, radius, radius) & body, color)


def _street(canvas: _Canvas, side: int) -> None:
    size, ground = canvas.size, canvas.size - canvas.between(12, 20)
    canvas.paint(_box(0, ground, 0, size), canvas.pick(_SKIES), "sky")
    canvas.shade(_patches(canvas, canvas.where("sky"), int(canvas.rng.integers(30, 71))), _LIGHT)
    canvas.paint(_box(ground, size, 0, size), canvas.pick(_GRASS), "grass")
    color, roof = canvas.pick(_FACADES), canvas.pick(_HULLS[:3] + _WOODS)
    for left, right, height in _wings(canvas, size * _WING_PERCENT[side] // 100, ground):
        _wing(canvas, ground - height, ground, left, right, color, roof, ("house", "skyscraper")[side])
    for _ in range(int(canvas.rng.integers(2, 5))):
        _tree(canvas, ground + canvas.between(2, 10), canvas.between(4, 124), canvas.between(22, 36))


def _wings(canvas: _Canvas, mean: int, ground: int) -> list[tuple[int, int, int]]:
    """Cut the street into wings (left, right, height) of any height whose mean over the columns is `mean` pixels."""
    edges = [0]
    while edges[-1] < canvas.size:
        edges.append(min(edges[-1] + canvas.between(14, 28), canvas.size))
    widths = np.diff(edges)
    draws = canvas.rng.integers(-canvas.px(48), canvas.px(48) + 1, len(widths))
    shifts = np.arange(canvas.size)[:, None]
    options = np.clip(draws + shifts, canvas.px(10), ground - canvas.px(4))
    heights = options[np.abs((options * widths).sum(1) - mean * canvas.size).argmin()]
    return [(edges[i], edges[i + 1], int(heights[i])) for i in range(len(widths))]


def _wing(canvas: _Canvas, top: int, bottom: int, left: int, right: int, color: RGB, roof: RGB, name: str) -> None:
    wall = _box(top, bottom, left, right)
    canvas.paint(wall, color, name)
    canvas.shade(wall, int(canvas.rng.integers(-10, 11)))
    canvas.paint(_box(top, min(top + canvas.px(4), bottom), left, right), roof)
    canvas.shade(_box(top, bottom, right - 1, right), -40)
    floor, column = max(canvas.px(9), 5), max(canvas.px(8), 5)
    for y in range(top + canvas.px(7), bottom - floor // 2, floor):
        for x in range(left + canvas.px(3), right - column // 2 - 1, column):
            canvas.paint(_box(y, y + floor // 2 + 1, x, x + column // 2), canvas.pick(_GLASS))


def _bedroom(canvas: _Canvas, side: int) -> None:
    furniture, lump = (("bed", "pillow"), ("sofa", "cushion"))[side]
    size, skirting = canvas.size, canvas.between(56, 72)
    canvas.paint(_box(0, skirting, 0, size), canvas.pick(_WALLS), "wall")
    _planks(canvas, skirting)
    left, right = canvas.between(8, 18), size - canvas.between(8, 18)
    top, bottom = skirting - canvas.between(16, 26), size - canvas.between(8, 16)
    _frame(canvas, top, bottom, left, right, furniture)
    cover = np.zeros_like(canvas.label, dtype=bool)
    cover[_box(top, bottom, left, right)] = True
    canvas.paint(cover, canvas.pick(_COVERS), furniture)
    canvas.shade(_patches(canvas, cover | canvas.where("wall"), _LIGHT_PERCENT[side]), _LIGHT)
    canvas.shade(_rim(cover), -36)
    count = int(canvas.rng.integers(2, 4))
    for i in range(count):
        x = left + (right - left) * (2 * i + 1) // (2 * count) + canvas.between(0, 8) - canvas.px(4)
        y = top + canvas.between(14, 34)
        pad = canvas.ellipse(y, x, canvas.between(9, 11), canvas.between(12, 15), power=4) & cover
        canvas.label[pad] = CLASSES.index(lump)
        # Nothing but its seam and a breath of light and shadow sets the lump off from the cover.
        canvas.shade(pad, 22)
        canvas.shade(pad & ~np.roll(pad, -canvas.px(4), axis=0), -34)
        canvas.shade(_rim(pad), -60)


def _frame(canvas: _Canvas, top: int, bottom: int, left: int, right: int, name: str) -> None:
    """Draw posts and an arched back, which make a piece of furniture of the cover between them."""
    wood, middle, width = canvas.pick(_WOODS), (left + right) // 2, right - left
    canvas.paint(canvas.ellipse(top, middle, canvas.px(13), width // 2, power=4), wood, name)
    canvas.shade(canvas.ellipse(top, middle, canvas.px(10), width // 2 - canvas.px(4), power=4), 18)
    for x in (left, right):
        canvas.paint(_box(top - canvas.px(8), bottom + canvas.px(6), x - canvas.px(3), x + canvas.px(3)), wood, name)
        canvas.paint(canvas.ellipse(top - canvas.px(9), x, canvas.px(4), canvas.px(4)), wood, name)


def _planks(canvas: _Canvas, top: int) -> None:
    canvas.paint(_box(top, canvas.size, 0, canvas.size), canvas.pick(_FLOORS), "floor")
    canvas.shade(_box(top, top + 2, 0, canvas.size), -36)
    step = max(canvas.px(7), 4)
    for row, y in enumerate(range(top + step, canvas.size, step)):
        canvas.shade(_box(y, y + 1, 0, canvas.size), -24)
        joint = canvas.px(20) * (row % 3)
        for x in range(joint, canvas.size, canvas.px(60)):
            canvas.shade(_box(y - step, y, x, x + 1), -24)


def _patches(canvas: _Canvas, region: np.ndarray, percent: int) -> np.ndarray:
    """Return a mask of smooth random blobs that cover `percent` of the region: exactly, but nowhere evenly."""
    field = 3 * _field(canvas, _PATCH * 3 // 4, _PATCH) + _field(canvas, 8, 8)
    values = field[region]
    rank = len(values) * (100 - percent) // 100
    return region & (field >= np.partition(values, rank)[rank])


def _field(canvas: _Canvas, cell_y: int, cell_x: int) -> np.ndarray:
    """Return smooth noise i64[S, S] in 0..1023: random values on a lattice, blended by smoothstep in whole numbers."""
    size, weights, cells = canvas.size, [], []
    for cell in (max(canvas.px(cell_y), 1), max(canvas.px(cell_x), 1)):
        position = np.arange(size) + int(canvas.rng.integers(cell))
        t = position % cell
        cells.append(position // cell)
        weights.append((3 * t * t * cell - 2 * t**3) * 256 // cell**3)
    lattice = canvas.rng.integers(0, 1024, (int(cells[0][-1]) + 2, int(cells[1][-1]) + 2))
    (y, x), (wy, wx) = cells, weights
    rows = lattice[y] * (256 - wy)[:, None] + lattice[y + 1] * wy[:, None]
    return (rows[:, x] * (256 - wx) + rows[:, x + 1] * wx) >> 16


def _box(top: int, bottom: int, left: int, right: int) -> Region:
    """Return rows top..bottom-1 and columns left..right-1, cut at the picture's border."""
    return slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))


def _rim(mask: np.ndarray) -> np.ndarray:
    """Return the outermost pixels of a mask: those with a neighbour outside it."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner
