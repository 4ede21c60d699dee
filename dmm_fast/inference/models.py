"""Networks that serve many runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.proposals.sources import open_proposer


class Models:
    """The segmenter and the detector that were loaded last, for runs that ask for the same.

    A run gives the results that it would give with models of its own: a segmenter forgets its session at `start`, a detector has
    none. A run that changes its networks (online learning) must not share them: it takes a `Models()` of its own.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def detector(self, name: Any, weights: Any, **how: Any) -> Callable:
        """As `open_proposer`."""
        return self._same("detector", (str(name), str(weights), how), lambda: open_proposer(name, weights, **how))

    def segmenter(self, config: Any, **how: Any) -> Segmenter:
        """As `Segmenter`."""
        return self._same("segmenter", (config, how), lambda: Segmenter(config, **how))

    def _same(self, kind: str, asked: Any, make: Callable) -> Any:
        if kind not in self._kept or self._kept[kind][0] != asked:
            self._kept.pop(kind, None)  # its memory first
            self._kept[kind] = asked, make()
        return self._kept[kind][1]
