"""The grids of the IQ1, IQ2 and IQ3 formats: the groups of levels that a block may hold, and neighbours of all others.

A group is 8 weights of 3 levels (IQ1, IQ2) or 4 weights of 8 levels (IQ3). A format stores the number of a grid point
in place of the levels. The points are those of ``kgrid_*`` in ``ggml/src/ggml-quants.c`` at the pinned commit; the
lists are those that ``iq2xs_init_impl`` and ``iq3xs_init_impl`` build there, in their order.
"""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """``levels`` (points, weights of a group) int64 in the order of the points' numbers; each below ``n_levels``."""

    levels: NDArray[np.int64]
    n_levels: int

    @property
    def group(self) -> int:
        """Weights of a group."""
        return int(self.levels.shape[1])

    @property
    def n_codes(self) -> int:
        """Number of possible groups of levels, on the grid or off it."""
        return int(self.n_levels**self.group)

    @property
    def place_values(self) -> list[int]:
        """The factors of the levels of a group, whose sum of products is the group's code."""
        return [self.n_levels**i for i in range(self.group)]

    @property
    def codes(self) -> NDArray[np.int64]:
        """The code of each point, ascending."""
        return np.asarray(self.levels @ np.array(self.place_values))

    def all_groups(self) -> NDArray[np.int64]:
        """The levels of each code, (n_codes, group)."""
        return np.asarray(np.arange(self.n_codes)[:, np.newaxis] // np.array(self.place_values) % self.n_levels)


@dataclass(frozen=True)
class Neighbours:
    """Lists of grid points, one after another: ``points[starts[code]:starts[code + 1]]`` are those of a code."""

    starts: NDArray[np.int64]
    points: NDArray[np.int64]

    def selected(self, kept: NDArray[np.bool_]) -> Neighbours:
        """The lists with only the entries that ``kept`` marks."""
        starts = np.concatenate([[0], np.cumsum(kept)])[self.starts]
        return Neighbours(starts, self.points[kept])

    @property
    def codes(self) -> NDArray[np.int64]:
        """The code of the list to which each entry belongs."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def positions(self) -> NDArray[np.int64]:
        """The place of each entry in its list."""
        return np.arange(len(self.points)) - self.starts[self.codes]


@cache
def grid(name: str) -> Grid:
    """The grid of a format: IQ1 (IQ1_S and IQ1_M), IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS or IQ3_S."""
    group, n_levels, text = _POINTS[name]
    is_point = np.unpackbits(np.frombuffer(b64decode(text), np.uint8), bitorder="little")
    levels = np.nonzero(is_point)[0][:, np.newaxis] // n_levels ** np.arange(group) % n_levels
    return Grid(levels, n_levels)


@cache
def neighbours(name: str, n_shells: int) -> Neighbours:
    """List for each code the grid points at its ``n_shells`` least distances, by distance, then by number.

    The list of a code on the grid has only its own point. ggml measures distances between values 2 * level + 1, which
    gives the same order.
    """
    points = grid(name)
    groups = points.all_groups()
    squares = (groups**2).sum(axis=1)[:, np.newaxis] + (points.levels**2).sum(axis=1)
    # float32 products of small integers are exact, and much faster than those of integers
    distances = squares.astype(np.int16) - 2 * (groups.astype(np.float32) @ points.levels.T.astype(np.float32)).astype(
        np.int16
    )
    farthest = np.zeros(len(groups), np.int16)
    on_grid = np.zeros(len(groups), np.bool_)
    on_grid[points.codes] = True
    shell = np.full(len(groups), -1, np.int16)
    for _ in range(n_shells):
        shell = np.where(distances > shell[:, np.newaxis], distances, np.int16(32767)).min(axis=1)
        farthest = np.where(on_grid, np.int16(0), shell)
    codes, found = np.nonzero(distances <= farthest[:, np.newaxis])
    order = np.lexsort((found, distances[codes, found], codes))
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(groups)))])
    return Neighbours(starts, found[order])


@cache
def undominated(name: str, n_shells: int) -> Neighbours:
    """The neighbours without those that cannot be nearest to values that round to the code, whatever the weights.

    A neighbour is left out if one before it in the list has in each place the same level or one nearer to the code's.
    Then no term of its weighted distance is less, in floats either, and ggml takes the first of the nearest. This
    holds for values that are not within 4e-6 of half a level step from being rounded to another level.
    """
    whole, points = neighbours(name, n_shells), grid(name)
    n_levels = points.n_levels
    levels = np.arange(n_levels)
    offsets = np.abs(levels[:, np.newaxis] - levels)  # [level, code's level]
    nearer = offsets[np.newaxis] < offsets[:, np.newaxis]  # [entry's level, other's level, code's level]
    harmless = nearer | (levels[:, np.newaxis] == levels)[..., np.newaxis]
    masks = (harmless * (1 << levels)[:, np.newaxis]).sum(axis=1)  # [entry's level, code's level]
    shifts = n_levels * np.arange(points.group)
    own, code = points.levels[whole.points], points.all_groups()[whole.codes]
    present = (1 << (own + shifts)).sum(axis=1).astype(np.uint32)
    excluded = ~(masks[own, code] << shifts).sum(axis=1).astype(np.uint32)
    kept, positions = np.ones(len(own), np.bool_), whole.positions
    later = np.arange(len(own))
    for distance in range(1, int(positions.max()) + 1):
        later = later[positions[later] >= distance]
        dominated = (present[later - distance] & excluded[later]) == 0
        kept[later[dominated]] = False
        later = later[~dominated]
    return whole.selected(kept)


# each grid: weights of a group, their levels, and a bit for each code, the lowest first
_POINTS = {
    "IQ1": (
        8,
        3,
        "VSUUhaACQlEIRTGohiCKohoIKiAUhVAUgiBERSUVBaACgiCIGAAIgqADKqCIu6oKkKoLACIACqqMgqAIQFEIRSGIgFAUQlEIijAI"
        "mKAIgCoIRSEUhSBIQlUIRQEswqAgiiYAKiSoqqII4q8ICCgoAKACQiiqKCCogCAKmwi5uqggyq6Joq6qOnzr6rq7gg64IrrK0w6S"
        "AiIAIiCoiroKggIIACpK4KI7IiArogCBQIGqiigIIgEUhVAVgiAJRSFUhaAIAiOoOiCEgiBUQlEIoiAIlVAUAioIuKiCgKBIAiAI"
        "gqJoogIoqyoIhSAIgjAIRUAARSEUhaAAQlEARQEpggCKgioIoTAUBVAUgigIRSEUhSACAiCqKgAgErGKriiouqGqqHAAggoIAigi"
        "AoQAggBIgKDqsCqqwiCLuiLq2qeLi26okrAqqnKLikQMKiBIhEAoiioIqiDIzKIioq+aoOioAgACACqoiAAggKCLoqIouqCAgjIK"
        "ur64uv7roqArogiKCijqogChMgIM+qTq3u8rqC6Nvn7r+vd/v+Z9ut5p+yf/vyb6EunhiiIQqr4OhKoIsqgLgq7/uiTpg4AEYixo"
        "8qgKpCsAAioICOKqEgACgioKpiDJgomQgigAogCMgBMAgggIAGyKqqq7Aqa+iqDKAoBrly7QsukQghAuqt4oFdGlBAAKggCKgiAI"
        "AaEggqo5uiIyhKAJgBgAiqJiAoEURFEARSGsglAUQlEIqiAoqocKEioIRSEUBaAIQlEIRQEgAqBAoiIAiAAIoghqim64qqqAACAK"
        "guLIIiEIRFAUQlEJiiAVhVAUhgoIqioqgAAKQlEIRSGoAFAUQlEI4iCIggoYgioIqqKqirCLAgoqqiAogoCqCigIKACpiAIioL4L"
        "KLgIirpLsq7/uqT4rqogUihotqAw5oAKAigIImpigCAKAqqqK6rqoqmgoggIECCgiiIAgg4ARSEUhaAKQFEIRSGpBgBKqgIIpQAQ"
        "DUQUgigIRSEUBQAIgoKs8iAAAACqCigKuiDqogIAgkgJKOkUABFLRVEARQGoAlAUQlEIiCQIiCgKQAgARQEUBaACQFEIRQE=",
    ),
    "IQ2_XXS": (
        8,
        3,
        "VRUUVRBEQUEABBREABAAAAAEQAAUAEAAAAAABAAAUBBAQREAARQEQFAEQAAQAAAFEAAAUAAAAQAAQAAAQRQEQBQUAAAEAAAEAAAE"
        "AAAAAAAABBAAAAAAAAAAABQEEBAAQAAEEQAEARAAQEAAAQAAAAAAAQQAAAAAABAEQARAAAAEAAAAABAAAAAQAAAAQAAQAAAAAAAA"
        "AAAFAQAEAABAAAAAEQAAAAAAAAAAAQAAAABAAAAAAAAUBAAAAQABBQAAAAAAEBAAAAAAAFAAAAAAAAAAAABAQQAAAUAAAAAAQAAA"
        "AAQAQAAAAAAAAAAAAAAAQAAAQAAEAAAAAAAEAAAAAAAAAAAAAAAAAAAAAQAAAAAAUBBEQRAQARQEABAAQAAAAAREAABAQAAAQEAA"
        "AQAAQBAAAQAAABAAEAAABBAAAAAAAAAAAQAAAAAAAAAAABQEABABAAAAAAAEAAAAABABBAAAAAAAAAQAAAAEABBEUAAAAAAEAQAA"
        "AQAABAAAAAAAAQAAAAAAAABAAAAAAAAAAAAAQAEAAAEAAAAAAAAAAAQAAAAAAQAAAAAEEAQAAAAEAAAAAAAAQAAAAAAAAAAEAAAA"
        "AAAAAAAAQQAAAQAAAQAAQAAAAABAAAAAAAAAQAAAABAAAAAAEQAAAAAAAAAAAAAUAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAEAAAAA"
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAQEEAAAQAAEAAAAAEQAAEAAAAAAAAAAQAAAAAAAAAABREABAAQAAAAAAEAAAABAAAABAAAAQA"
        "QAAAAQAAAEAAAAAAAAAAAAAAAQAAAAAAAAAAAAABAAAAAAAAAAAEARAEAAAAAAABAEAAAAAAQAAAAAAAAAABAAAAAAAEAEAAAQAA"
        "AAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAQAAAAAAAAAAAAAAAAAAAAAABAAAABAAAAQAAAABAAAAAAAAAAAE"
        "AAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    ),
    "IQ2_XS": (
        8,
        3,
        "VVVVUVVFQRVFAVRVVVBFQRAFAQBUURBAQQQAAQEAUFVFQRUVARQEAFBFQQAFAQQEAABAQQAQBQAAQAAAQFUFERQEARAAQEAFAQAE"
        "AABAEAAAAQAEAQAAAAAQAVRVUVBFQUAFAQBUURBAQQAAAVAAUBEAQAAAAQAAAFBFQQBFARAEAABAQQAAAQAAAAAAQAAEAAABAAAA"
        "AAAFBQAEQAAABAAAEQAAAAAABAAAAAAAAABAAAAAAABVVRBAQQAAAQAEUBAAQBAAEAAAABAAAAEAAAAEAABEQQBAAQAAAAAAQAAA"
        "AAQQAAAAEAABAAEAAAAAAAAQQQEEAAABABAABAAAAAAAABAAAQAAARAAAAAARAEAUFVFQVUFERQEAFBFQQAFAQBEAEBAQQFAAQAA"
        "AAAAQBVFARQEABAAAQAFARAEAAAAAEAAAQEAQBAAAAAAABQEABABAQEAAAAEEAAAQQBAAAAAQAAAAAAAAAAAAFBFQRAFAQAEAABA"
        "QQQABQAAAAAAQAAAABAAAAAAAEAFAQQEABBAAAABQQAAAAAAQBAAAAAAEAAAABAAAAQEQABAQAAAAAABAAAQQAEAAAAAAAAAAAAA"
        "AABAAABAQQAAARAQAAEAUAAAAAAAAAAAAAAAABAABAAAAAEAAUAAAAAAAAAAAAAEABABAAAAABAAAAAAAAAAAAAAEAAAAAAAAAEA"
        "AAAAAAQAAAAAAAAABAAAABAQAAAAQBUFARUEAFAAAFAVAQAEEAQAAAAAAQAEAAAAQAEAQRRUABAAQABAAAAEAAAAAQAAAABAAAAE"
        "AAAAAAEAABAEAAQAAAEUAAAEBAAAAAAAAAAAAAAABAAAABAEBBAFAQAEAAEAAQAAAQAQAAAAAQAAAAAAAAAABABAAABEAAAAQRAA"
        "AAAAAAAAEAAAAAAUAAAAAAABAAAAAAAAAAAAAAQAAAAABAAAAAABAAAAAAAAEAAAABAAAAAARQEEBAAAAAAAAQAAAABAEAAAAEAU"
        "AQAQAAAAAQAEAAAAQAAAAABAAAAAAAAAAAAAAAAAAAAAAABAAAAEAEAARQAAAAAAQBAEAAAAAAAABQAAAAAABQAAAAABAAE=",
    ),
    "IQ2_S": (
        8,
        3,
        "VVVVUVVFVRUFEVVVUVBFVRQFFRRUURBQVQQAEREQUFVFVVVVFVRFUVBVVRRVVRRUURBAVQQAURQEUBAAQBVVEVVVURABAUAFVQRE"
        "URBAQAAAARQQBRAAAABAAFRVUVFFVRUVURRUVVVFVRUFVRQAUBRBQQQFABQEAFBFVRRVVRRUURBAVRUFVRQEUBAAQBQFARQEABAA"
        "AEBVUQRUURBAAQAAVRQEUBAAEAAABBAEABAABAAAAABUURVRQQUEAREAVFBBQAUFARQEABAQAFEEAQAABQBEVRQFVRQEUBAAQBQF"
        "ARQEABEAAAAFAQAEAAQAAAAAERQAUBAAAEAAABUEAAAAAAAAEAAABEAAAAAEQAEAUFVVRVVVFRREUVBFVQVVVRRUURBAQRUEURQE"
        "UAAAQFVVVVRVUVBFQQBVVRRUURBQQQAAVRQEUBAAQAAAEBRVUVBFQQAEAQBUURBAQQAAAUAAUBAAQAAAAAAAAFBFVRVVVRRUUQBA"
        "VRUFVRQEUBAAQBQFARQEABQAAABVVRRUURBAQQAAVRQEUBAAQAAAABQEABEAAAAAAABUURBAQUAAAQAAUBAAQAAAAAAAABAAEAAA"
        "AABAAABERRUFURQEQBAAQBUFARQEABAAEAAEAQAEAAEAAAABURQEUBAAQAAAABQEABAQABAABAAEAAAAAAAAABAAUBAAAAAAEAAA"
        "ARAAAEAAAAAAAAAAAAAABAAAAABAQBVFERRUERBBAQBFVRRUUQBAQQBAERUAUBAAAAAAAFRVEVBFQQAFAQBUURBAQQAAAQEAUBAA"
        "UAAAAAAAABBBAQAFAQAAAEBAAQAAAQBAAAAAAAAABAAABUAAAAFFVRBUURBAQQAAERQAUBAQAAAAABQEABAAAAAAAEBUURBAQQAA"
        "AUAAUBAAQAAAAAAAERAAAAAQABAAAABAQQAQAQAAAAAAUAAAAAARAAAAAAAAAAAAAAAAQAAAEREQVBAAAAAABAEAABAAAAQAAAAQ"
        "BEAUAAAARAEAURAAQAAAAAABQBAAEAAAAAAAAAAAAAAAAAQAAAAAAEAAQAAAAAAAAAEAAAAAQAAABAAAQAEUAQAAABAAAAE=",
    ),
    "IQ3_XXS": (
        4,
        8,
        "FYoFAgQAACgKBSIFAhAAARUCBYoAggAgggUgAAAAAAEACACAEIAAKIIAAAQABAAAAAAAIAAAEAAAUQAACAACAAoFChWAAQAABQIF"
        "AAAAAAAKBQIBAAAABAUAAQJAAEAAIgAAAAABAAAAABEAQAAAAiAAAAAAAAAAAAAEAAEAAAAFCkUCBAAAACoFAgEAAIgBBYIFgAEg"
        "AAACEQAAAAAAEQAAACAACAAACACAAAIAABAAAAAAAAAAAApAAAAgAAAAAgUKAAABIAQFAAECUAAAAAoBIAAABAAEAAIACAAAAAAA"
        "AAABgAAABEEABAAAIAAAABAAQAAACAAAAAAIAAABABCAAKAAiAAAAAAAAAAAABAAAAGAAQBBAIAAAAAgAAAAEAAAAAACEAAAACAA"
        "CAAAAQAAAAAAAAAAIAUAAQAAAAAABAAAAgAAAUEAQAAAIAAAABAABAAAAAQEAAAAAAgAAAABiAAAAAAEBAAAAgAAAAAAAAAAAAEA"
        "AAAAEAAEAAAAAAAQAFAAEAAAAAIAAAACAACAAAAAABAAAAAAQQAAAAAAAAAAEAAAACAAAAAABAAAAAAACAAAAAAIAAIAAAAAAKgB"
        "AAQABAAAAABAAAEAAAAABAAAIAQAAAEgAAgAAAEAAAACAAIAAAAFABAAAAAAAAAAAAEAAAAAAAAAAAAAAAA=",
    ),
    "IQ3_S": (
        4,
        8,
        "p1cjCKUKBZIXI4kiEAAiBKNJIhGkCgAJCCIFShAFgCIBiBIECQIAARQARQiiAEAIQAoAAgAEAAIVAEUIABEAABerBVIAUAIESxEC"
        "CQIFAEEBpBEECSABBJIJghECAAQBKBQACkQRAAACCQIFAAIAAAAAkQBQAAAACgUCIAIABAGrVYoFKgWAKQWJJBIEAgAAkgAKgQKI"
        "ABIlAhQKBAFAAIIACSQCAAAkEAIEgAEIAAGFAAIAACACACACQAEIAQAABKoEKpQCCAIqEAoAAQABRAEEARQAAQAAAhGKAYogAAgI"
        "QgQCAAQRAAIFIAQQQAAIAEAAAAIAAAAKAAUgAAAAABEEkQQCAQABhAoEIQgiAAAKIQIIAYAEARAKBSIAAAAABQAQgAEAAAKgAAIA"
        "AAAEAAAIABAAAAEAACEAAQgCAAAEEQQAkQRAECoEAgQAAAAEAQIIQQAIAACEAYAAEAIgCBIAAQRAAAAAAARAAAAKAAAAAAAABAAA"
        "ABQABAAAAAAAACoACgAAAQABAIEAAAAQAAAEABAEIAQBARACAAEAAAAAACAACAAEAAkAABAAAAEAIAAAAAEAAAAACgAAAAAAAJEA"
        "BUABEAQABAIQACgAAAASQQIBAAIAAAQAACQACAAAIggBAAABAAAAAAQABAAAAAQAAAIAAAAAAQAAAAAAAAA=",
    ),
}
