"""A budget of what may be done again: a share of what is done once, so that trouble is not multiplied."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Budget"]


@dataclass(slots=True)
class Budget:
    """Tokens that requests earn and that repetitions cost.

    Attributes:
        share: what one request earns.
        spare: what there is at the beginning, and at most.
    """

    share: float
    spare: float
    left: float = -1.0
    spent: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        self.left = self.spare

    def earn(self) -> None:
        """A request was made."""
        self.left = min(self.spare, self.left + self.share)

    def spend(self) -> bool:
        """Take one token, if there is one."""
        if self.left < 1:
            self.refused += 1
            return False
        self.left -= 1
        self.spent += 1
        return True
