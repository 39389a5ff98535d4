"""The ledger: quality that a request has spent so far, against its bound. Pure bookkeeping."""

from dataclasses import dataclass, field

from comoe.plan.ladder import Ladder, Prices
from comoe.plan.likeness import Likeness, likeness_of
from comoe.plan.planner import Plan
from comoe.store.manifest import Manifest


@dataclass(slots=True)
class Account:
    """Gates so far, the sum of their prices, and the gates that a routing bias moved."""

    spent: float = 0.0
    total: float = 0.0
    moved: float = 0.0


@dataclass(slots=True)
class Ledger:
    """Counts gates by form and prices them by the certified losses.

    The estimate is linear: a use costs its layer's price in the plan's target, or in its floor, times its share of all
    gates. `bound` is a fraction; 0 is exact. The bound is on the answer: a long exact prompt earns no credit for it,
    so decoding has an account of its own.

    `routing_price` is the loss where a routing bias moves all gates, None where it may move none: see
    docs/decisions/018. What a request spends costs more where `likeness` finds its text unlike the calibration: see
    docs/decisions/023.
    """

    prices: Prices
    bound: float
    routing_price: float | None = None
    likeness: Likeness | None = None
    gates: dict[str, float] = field(default_factory=dict)
    prompt: Account = field(default_factory=Account)
    answer: Account = field(default_factory=Account)

    def add(self, layer: int, form: str, gate: float, *, floor: bool = False, decode: bool = True) -> float:
        """Record uses in `layer` of an expert in the plan's target, or in its floor, for the answer or for its prompt.

        It is in `form` there; their gates sum to `gate`. What was spent on them.
        """
        spent = gate * (self.prices.floor if floor else self.prices.target)[layer]
        self._book(form, gate, spent, decode)
        return spent

    def take_back(self, form: str, gate: float, spent: float, *, decode: bool = True) -> None:
        """Uses that were recorded and came to nothing: whatever prices are now, they cost what was `spent` on them."""
        self._book(form, -gate, -spent, decode)

    def _book(self, form: str, gate: float, spent: float, decode: bool) -> None:
        self.gates[form] = self.gates.get(form, 0.0) + gate
        account = self.answer if decode else self.prompt
        account.spent += spent
        account.total += gate

    @property
    def loss(self) -> float:
        """Estimated loss of the answer so far, of the prompt where there is no more yet."""
        account = self.answer if self.answer.total else self.prompt
        return self._charge * account.spent / account.total if account.total else 0.0

    @property
    def _charge(self) -> float:
        return self.likeness.charge if self.likeness is not None else 1.0

    def allows_floor(self, layer: int, gate: float, *, decode: bool = True) -> bool:
        """Whether the estimate stays within the bound after `gate` more of the answer, or its prompt, in the floor."""
        account = self.answer if decode else self.prompt
        spent = account.spent + gate * self.prices.floor[layer]
        return self._charge * spent <= self.bound * (account.total + gate)

    def move(self, layer: int, gate: float, share: float) -> bool:
        """Record that a bias moves a `share` of gates that sum to `gate`, unless the estimate would leave the bound.

        The uses themselves are still to come, in the target at best; `add` has their price.
        """
        if self.routing_price is None:
            return False
        account, price = self.answer, gate * share * self.routing_price
        spent = account.spent + price + gate * self.prices.target[layer]
        if self._charge * spent > self.bound * (account.total + gate):
            return False
        account.spent += price
        account.moved += gate * share
        return True

    @property
    def moved(self) -> float:
        """Share of the answer's gates that a routing bias moved."""
        return self.answer.moved / self.answer.total if self.answer.total else 0.0

    def shares(self) -> dict[str, float]:
        """Share of all gates by form."""
        gates = dict(self.gates)  # others may ask while it is added to
        total = sum(gates.values())
        return {form: gate / total if total else 0.0 for form, gate in gates.items()}

    def clear(self) -> None:
        """Start a request."""
        self.gates.clear()
        self.prompt, self.answer = Account(), Account()
        if self.likeness is not None:
            self.likeness.clear()


def ledger_of(manifest: Manifest, ladder: Ladder, plan: Plan, bound: float) -> Ledger:
    """The ledger of a plan; text is held against the calibration where it may lose anything."""
    likeness = likeness_of(manifest) if bound > 0 else None
    return Ledger(ladder.prices(plan.target, plan.floor), bound, manifest.routing_price, likeness)
