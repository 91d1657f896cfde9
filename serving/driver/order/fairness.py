"""Service shared out between tenants by counters, as in VTC (Sheng et al., OSDI 2024).

A tenant's counter is what it was served, in weighted tokens: one for a prompt token computed, two
for one decoded. Among tenants with prompts waiting, one that is more than `lead` ahead of the least
served has to wait. A tenant that comes back is lifted to the least served of those who wait, so
that nobody saves up service by staying away.
"""

from __future__ import annotations

from collections import Counter

_PROMPT, _ANSWER = 1, 2
_MOST_KEPT = 4096


class Deficits:
    """`lead` in weighted tokens."""

    def __init__(self, lead: int) -> None:
        self.lead = lead
        self.served: dict[str, int] = {}
        self._waiting: Counter[str] = Counter()
        # What the least served of those who wait has had, or had when the last of them left: it
        # never falls, and everybody who comes is lifted to it.
        self._floor = 0

    def enter(self, tenant: str) -> None:
        """One more prompt of a tenant waits."""
        self._raise_floor()
        self._waiting[tenant] += 1
        if self._waiting[tenant] == 1:
            self.served[tenant] = max(self.served.get(tenant, 0), self._floor)
            if len(self.served) > _MOST_KEPT:
                self._forget()

    def leave(self, tenant: str) -> None:
        """One prompt of a tenant is planned to its end, or gone."""
        self._raise_floor()
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def charge(self, tenant: str, prompt: int = 0, answer: int = 0) -> None:
        had = self.served.get(tenant, self._floor)
        self.served[tenant] = had + _PROMPT * prompt + _ANSWER * answer

    def ahead(self) -> set[str]:
        """Waiting tenants that have to wait for others."""
        if len(self._waiting) < 2:
            return set()
        self._raise_floor()
        return {one for one in self._waiting if self.served[one] > self._floor + self.lead}

    def _raise_floor(self) -> None:
        if self._waiting:
            least = min(self.served[tenant] for tenant in self._waiting)
            self._floor = max(self._floor, least)

    def _forget(self) -> None:
        """Drop counters that would be lifted anyway; those furthest ahead last, if need be."""
        absent = [one for one in self.served if one not in self._waiting]
        absent.sort(key=lambda one: self.served[one])
        for number, tenant in enumerate(absent):
            if self.served[tenant] > self._floor and len(absent) - number <= _MOST_KEPT // 2:
                break
            del self.served[tenant]
