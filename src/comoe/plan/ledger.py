"""The ledger: quality that a request has spent so far, against its bound. Pure bookkeeping."""

from dataclasses import dataclass, field

from comoe.plan.ladder import Ladder


@dataclass(slots=True)
class Ledger:
    """Counts gates by (layer, form) and prices them by the certified losses.

    The estimate is linear: a use in a form costs the form's certified loss, split over layers by their measured
    errors, times its share of all gates. `bound` is a fraction; 0 is exact.
    """

    ladder: Ladder
    bound: float
    gates: dict[tuple[int, str], float] = field(default_factory=dict)
    spent: float = 0.0
    total: float = 0.0

    def add(self, layer: int, form: str, gate: float) -> None:
        """Record uses of `form` in `layer` whose gates sum to `gate`."""
        key = (layer, form)
        self.gates[key] = self.gates.get(key, 0.0) + gate
        self.spent += gate * self.ladder.rung(form).loss_rate(layer)
        self.total += gate

    @property
    def loss(self) -> float:
        """Estimated loss of everything served so far."""
        return self.spent / self.total if self.total else 0.0

    def allows(self, layer: int, form: str, gate: float) -> bool:
        """Whether the estimate stays within the bound after `gate` more in `form`."""
        spent = self.spent + gate * self.ladder.rung(form).loss_rate(layer)
        return spent <= self.bound * (self.total + gate)

    def shares(self) -> dict[str, float]:
        """Share of all gates by form."""
        forms: dict[str, float] = {}
        for (_, form), gate in self.gates.items():
            forms[form] = forms.get(form, 0.0) + (gate / self.total if self.total else 0.0)
        return forms

    def clear(self) -> None:
        """Start a request."""
        self.gates.clear()
        self.spent = self.total = 0.0
