"""How many a second, over the last seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Rate:
    """Counts what happens, in slots of time; `total` is all of it. For one thread. window, slot: seconds."""

    def __init__(self, clock: Callable[[], float], *, window: float = 5.0, slot: float = 0.25):
        self.clock, self.window, self.slot = clock, window, slot
        self.total = 0
        self._slots: deque[tuple[int, int]] = deque()  # (number of the slot, how many)

    def add(self, count: int) -> None:
        self.total += count
        now = int(self.clock() / self.slot)
        if self._slots and self._slots[-1][0] == now:
            count += self._slots.pop()[1]
        self._slots.append((now, count))
        self._forget(now)

    def per_second(self) -> float:
        """Over the window; after a pause over the time since it ended, but no less than a second, so that the first tokens of a
        burst are not shown as a hundredfold speed."""
        now = self.clock()
        self._forget(int(now / self.slot))
        if not self._slots:
            return 0.0
        since = now - self._slots[0][0] * self.slot
        return sum(count for _, count in self._slots) / max(1.0, min(since, self.window))

    def _forget(self, now: int) -> None:
        oldest = now - round(self.window / self.slot)
        while self._slots and self._slots[0][0] <= oldest:
            self._slots.popleft()
