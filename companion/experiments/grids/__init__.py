"""What each section of a paper trains and measures at every scale; each paper has a module of its own."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from companion.runs.names import seeded

# {"run": a run name without its seed, and columns that name it}, or the whole name of one run
Network = Mapping[str, object] | str


@dataclass(frozen=True)
class Grid:
    """What one section needs at one scale.

    Attributes:
        needs: by item, its networks. Each is {"run": a run name without its seed (see names.seeded), and other columns
            that its rows repeat}, trained from every seed (from its own "seeds" if it has these), or the whole name of
            one run.
        seeds: every two of them are a pair.
        settings: what else differs between scales, by name; also attributes of the grid.
        reads: by item, the items of other notebooks that it sums up.
        compares: by item, the column of its networks whose values it compares: without one of them it shows nothing.
        passes: over test and calibration images with each network, roughly, if they are far more than usual. The batch
            begins early with a notebook that takes long, and knows it by this before its first execution.
    """

    needs: Mapping[str, Sequence[Network]]
    seeds: tuple[int, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)
    compares: Mapping[str, str] = field(default_factory=dict)
    passes: int | None = None

    def __getattr__(self, name: str) -> object:
        settings = self.__dict__.get("settings", {})
        if name not in settings:
            raise AttributeError(f"the grid has no setting {name!r}; there are: {', '.join(settings)}")
        return settings[name]

    def networks(self, items: Iterable[str]) -> list[dict]:
        """The networks that some items need, each once, without those that are whole run names.

        Items that the grid does not have, perhaps because `only` has dropped them, need none.
        """
        found = [network for item in items for network in self.needs.get(item, ()) if not isinstance(network, str)]
        return [dict(pairs) for pairs in dict.fromkeys(tuple(network.items()) for network in found)]

    def runs(self, items: Iterable[str]) -> list[str]:
        """Names of the runs that some items need, each once."""
        found: list[str] = []
        for network in itertools.chain.from_iterable(self.needs[item] for item in items):
            if isinstance(network, str):
                found.append(network)
            else:
                found += [seeded(network["run"], seed) for seed in network.get("seeds", self.seeds)]
        return list(dict.fromkeys(found))

    def only(self, has: Callable[[str], bool]) -> "Grid":
        """The grid without the runs that cannot be had.

        A network keeps the seeds that are there if they make a pair; one that has seeds of its own needs them all. An
        item that no network is left of is dropped, and so is one that lacks a run that it names in full, or a kind of
        network that it compares with others.

        Args:
            has: of a run's name, whether it can be had.
        """
        needs = {}
        for item, networks in self.needs.items():
            left = [found for network in networks if (found := self._having(network, has))]
            if self._kinds(item, left) == self._kinds(item, networks):
                needs[item] = left
        return replace(self, needs=needs)

    def _kinds(self, item: str, networks: Sequence[Network]) -> set:
        """What an item needs at least one of: each run that is named in full, and each kind of network."""
        column = self.compares.get(item)
        return {network if isinstance(network, str) else (column and network[column],) for network in networks}

    def _having(self, network: Network, has: Callable[[str], bool]) -> Network | None:
        """A network with the seeds that can be had; None if these are too few."""
        if isinstance(network, str):
            return network if has(network) else None
        wanted = network.get("seeds", self.seeds)
        seeds = tuple(seed for seed in wanted if has(seeded(network["run"], seed)))
        if seeds == tuple(wanted):
            return network
        return {**network, "seeds": seeds} if len(seeds) > 1 and "seeds" not in network else None
