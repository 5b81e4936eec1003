"""The limits that counted bytes are held to, from the rows of bench/bytes.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.rows import Row

SMALLEST = "Qwen2.5-1.5B"
GROUPS = ("qkv", "o", "gate_up", "down")
SIZES = ("25", "50")
"""MB of L2 cache."""
ONLY_AT = {"logprob_over_compulsory": "50"}
"""Held at one size and shown at the other: in 25 MB the log-prob's h (8,192 × 1,536: 25.2 MB) cannot stay while W passes."""
Case = tuple[str, str]
"""(model, case): `("Qwen2.5-1.5B", "qkv r 32")`."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The worst of a ratio over its cases, at one size of the cache."""

    key: str
    what: str
    value: float
    limit: float | None
    """None: only shown."""
    worst: str
    """Its case."""

    @property
    def met(self) -> bool:
        """Within the limit, if there is one."""
        return self.limit is None or self.value <= self.limit

    @property
    def verdict(self) -> str:
        """`≤ 1.25, met`."""
        return "shown" if self.limit is None else f"≤ {self.limit}, {'met' if self.met else 'MISSED'}"

    def sentence(self) -> str:
        """For people."""
        return f"{self.what}: {self.value:.3f} ({self.worst}), {self.verdict}"


def floors(rows: Sequence[Row], orders: Sequence[Row]) -> list[Floor]:
    """Those for which there are rows. `orders`: of bench/tile_orders.py."""
    groups = [row for row in rows if row["case"].split()[0] in GROUPS]
    heads = [row for row in rows if row["case"] == "head" and row["part"] == "forward"]
    found = []
    for size in SIZES:
        ours = sums(groups, "fastlora", f"dram_{size}")
        even = {case: bytes_ for case, bytes_ in ours.items() if case[1].endswith("r 32")}
        ragged = {case: bytes_ for case, bytes_ in ours.items() if case not in even}
        peft = sums(groups, "PEFT", f"dram_{size}")
        small = {case: bytes_ for case, bytes_ in ours.items() if case[0] == SMALLEST}
        large = {case: bytes_ for case, bytes_ in ours.items() if case[0] != SMALLEST}
        head = {case: bytes_ for case, bytes_ in sums(heads, "fastlora", f"dram_{size}").items() if case[0] == SMALLEST}
        for key, what, numerator, denominator, limit in (
            ("lora_over_compulsory", f"{SMALLEST}, both passes over compulsory", small, sums(groups, "fastlora", "compulsory"), 1.25),
            ("lora_over_best_order", "larger models, both passes over the best order found", large, best_orders(orders, size), 1.1),
            ("lora_over_peft", "both passes over PEFT's, rank 32", even, peft, 0.5),
            (
                "lora_ragged_over_peft",
                "both passes over PEFT's, ragged with modules of rank 0, which PEFT leaves alone",
                ragged,
                peft,
                None,
            ),
            ("logprob_over_compulsory", f"{SMALLEST}, log-prob forward over compulsory", head, sums(heads, "fastlora", "compulsory"), 1.1),
        ):
            ratios = {case: bytes_ / denominator[case] for case, bytes_ in numerator.items() if case in denominator}
            if ratios:
                worst = max(ratios, key=ratios.__getitem__)
                held = limit if ONLY_AT.get(key, size) == size else None
                found.append(Floor(f"{key}_{size}", f"L2 of {size} MB, {what}", ratios[worst], held, " ".join(worst)))
    return found


def sums(rows: Sequence[Row], side: str, key: str) -> dict[Case, float]:
    """A number of all launches of both passes of a side."""
    found: dict[Case, float] = {}
    for row in rows:
        if row["side"] == side:
            case = (row["model"], row["case"])
            found[case] = found.get(case, 0) + sum(launch[key] for launch in row["launches"])
    return found


def best_orders(orders: Sequence[Row], size: str) -> Mapping[Case, float]:
    """Bytes from memory of both passes, every launch in the order that moves least."""
    found: dict[Case, float] = {}
    for row in orders:
        case = (row["model"], row["case"])
        found[case] = found.get(case, 0) + min(moved[SIZES.index(size)] for moved in row["orders"].values())
    return found
