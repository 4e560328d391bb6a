"""What a training may cost at most: time, and accuracy on held-out clean images."""

import dataclasses

from bibau_jax import parallel
from bibau_jax.checkpoint import Keeper


@dataclasses.dataclass
class Clock:
    """The time that a stage's trainings may take together: seconds of whole epochs, those before a kill too; 0 for ever."""

    limit: float = 0.0
    spent: float = 0.0
    whole: "Clock | None" = None  # of which this one's time is a share
    has_cut: bool = False  # whether it ended a training before its last epoch

    @property
    def is_over(self) -> bool:
        """Whether no further epoch is to begin; the first process decides for all."""
        if self.whole is not None and self.whole.is_over:
            return True
        return self.limit > 0 and parallel.agreed(self.spent >= self.limit)

    def share(self, left: int) -> "Clock":
        """The clock of the next of `left` trainings, which may take an equal share of the time that is left."""
        rest = self.limit - self.spent
        return Clock(rest / left, whole=self) if self.limit > 0 and rest > 0 else self

    def take(self, seconds: float) -> None:
        """Counts time that was spent."""
        self.spent += seconds
        if self.whole is not None:
            self.whole.take(seconds)

    def cut(self) -> None:
        """Notes that a training was ended before its last epoch."""
        self.has_cut = True
        if self.whole is not None:
            self.whole.cut()


@dataclasses.dataclass
class Guard:
    """How much held-out clean accuracy a training may cost: `limit` points of what it was `before` (0..1); 0 for any.

    Adversarial training begins far below where it ends, so an epoch beyond the limit ends it only after one within. Where the
    last epoch is beyond, the one with the highest accuracy is given back.
    """

    limit: float = 0.0
    before: float = 0.0
    keeper: Keeper | None = None
    told: str = ""  # what it did, for the reader

    def keeps(self, entry: dict) -> bool:
        """Whether an epoch's accuracy is within the limit."""
        return 100 * (self.before - entry["held_out_accuracy"]) <= self.limit

    def watches(self, history: list[dict]) -> bool:
        """Whether there is a limit, and an accuracy to hold against it."""
        return self.limit > 0 and bool(history) and "held_out_accuracy" in history[-1]

    def see(self, state, history: list[dict]) -> None:
        """Keeps the state after an epoch where it is the best yet."""
        if self.watches(history) and self.keeper.latest() != int(state.step):
            earlier = [entry["held_out_accuracy"] for entry in history[:-1]]
            if history[-1]["held_out_accuracy"] > max(earlier, default=-1.0):
                self.keeper.save(int(state.step), {"params": state.params, "statistics": state.statistics}, {})

    def is_over(self, history: list[dict]) -> bool:
        """Whether no further epoch is to begin."""
        return self.watches(history) and not self.keeps(history[-1]) and any(map(self.keeps, history[:-1]))

    def judge(self, accuracy: float) -> None:
        """Says so where what a defence gave, of this held-out accuracy, is beyond the limit and no epoch was within it."""
        lost = 100 * (self.before - accuracy)
        if lost > self.limit and not self.told:
            self.told = (
                f"The limit on the loss of clean accuracy was passed, and nothing within it was made: what is given back costs "
                f"{lost:.1f} points (the limit is {self.limit:g}). Do not deploy it."
            )

    def best(self, state, history: list[dict]):
        """The state to give back: the last, or the best where the last is beyond the limit."""
        if not self.watches(history) or self.keeps(history[-1]):
            return state
        chosen = max(history, key=lambda entry: entry["held_out_accuracy"])
        _, tree, _ = self.keeper.restore({"params": state.params, "statistics": state.statistics})
        lost = 100 * (self.before - chosen["held_out_accuracy"])
        self.told = (
            f"The limit on the loss of clean accuracy was passed: what is given back is epoch {chosen['epoch']} "
            f"of {history[-1]['epoch']} that were run, which costs {lost:.1f} points (the limit is {self.limit:g})."
        )
        return state.replace(**parallel.replicate(tree))
