"""A model of the joint benchmark: the rungs that it may be served in, what they lose, what they take on this device."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.ladder import Contest, rung_weights
from comoe.bench.ladder import Scope as LadderScope
from comoe.bench.losses import loss_columns
from comoe.bench.material import Material
from comoe.bench.published import METHODS
from comoe.bench.rows import Row
from comoe.bench.staged import Answer, columns, score, staged
from comoe.bench.turns import Side, decode_in_turns
from comoe.device.costs import measured_costs
from comoe.device.probe import wake_s
from comoe.make.calibrate import held_out
from comoe.make.certify import certify
from comoe.make.protocol import Evaluation
from comoe.make.recipe import Recipe
from comoe.make.score import Score
from comoe.make.trace import CONTEXT, Turn, record, turns
from comoe.memory.residency import Group
from comoe.plan.ladder import Ladder, ladder_of
from comoe.plan.pin import Pin
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.sim.reader import Times
from comoe.sim.replay import GroupOf
from comoe.store.foresight import Foresight, read_foresight
from comoe.store.pack import Pack
from comoe.store.trace import Trace
from comoe.types import ExpertId

UNIFORM = ("q2", "q3", "q4", "q8", "exact")
"""Forms that a method without a chain gives to all experts alike."""

TIMED_TOKENS = 64


class Scope(NamedTuple):
    """How much is measured: budgets, rates, domains (None: all), tokens of each to choose by and to be judged on.

    Losses are measured on so many windows of each; forms are fitted to about `calibration_tokens`. Live, `tokens` of
    each of `live` windows are timed.
    """

    shares: tuple[float, ...]
    ratios: tuple[float, ...]
    domains: int | None
    choosing: int
    judging: int
    windows: int
    calibration_tokens: int
    live: int
    tokens: int


class Contender:
    """The checkpoint in `folder`; packs and recordings are made in `work`, or found there."""

    def __init__(self, folder: Path, material: Material, scope: Scope, work: Path) -> None:
        self._material, self._scope = material, scope
        how = LadderScope(scope.domains, scope.windows, scope.calibration_tokens, (), (), gate=False, upcycled=False)
        self._contest = Contest(folder, material, how, work)
        self._losses: dict[str, Row] = {}
        self._scores: dict[bool, Score] = {}
        self.name, self.hash = self._contest.name, self._contest.hash

    @cached_property
    def packed(self) -> Pack:
        """Of all forms, so that uniform ones are there too."""
        texts, tokens = self._material.calibration, self._scope.calibration_tokens
        return Pack(self._contest.pack(Recipe(texts=texts, num_tokens=tokens, pruned=False)))

    @cached_property
    def ladder(self) -> Ladder:
        return ladder_of(self.packed.manifest)

    @cached_property
    def experts(self) -> list[int]:
        return [layer.num_experts for layer in self.packed.manifest.layers]

    @cached_property
    def foresight(self) -> Foresight:
        return read_foresight(self.packed.folder, self.experts)

    @property
    def forms(self) -> list[str]:
        """Those that all experts may have alike, coarse to exact."""
        return [form for form in UNIFORM if form in self.packed.manifest.forms]

    @property
    def steps(self) -> list[str]:
        """The chain's, coarse to exact."""
        return [step.name for step in self.packed.manifest.chain]

    @cached_property
    def told(self) -> dict[str, float]:
        """What every rung loses on calibration text that nothing was fitted to."""
        forms = [form for form in self.forms if form != "exact"]
        found = certify(self.packed.folder, forms, held_out(self._contest.calibration), lambda done: None)
        steps = {step.name: step.certificate for step in self.packed.manifest.chain if step.certificate}
        return {"exact": 0.0} | {name: certificate.loss for name, certificate in (found | steps).items()}

    def loss(self, rung: str) -> Row:
        """What a rung loses on text that nothing was chosen by, every use in it."""
        if rung not in self._losses:
            bank = self._contest.bank
            weights = rung_weights(self.packed, self.packed.manifest, bank, rung)
            found = self._exact if rung == "exact" else bank.nats(weights, self._contest.windows)
            self._losses[rung] = loss_columns(found, self._exact)
        return self._losses[rung]

    def published(self, method: str, share: float) -> Row | None:
        """What a published method loses in a share of the experts' bytes; None where it reaches no such size."""
        made = METHODS[method](self._contest.bank, share)
        if made is None:
            return None
        found = self._contest.bank.nats(made, self._contest.windows)
        return {"resident_bytes": made.nbytes, **loss_columns(found, self._exact)}

    @cached_property
    def depth(self) -> int:
        """Sparse layers that decoding a token goes through."""
        trace = self.traces[1]
        return int(np.diff(trace.chunks)[trace.tokens == 1][0])

    @cached_property
    def _exact(self) -> Score:
        return self._contest.bank.nats(None, self._contest.windows)

    @property
    def texts(self) -> tuple[tuple[list[str], int], tuple[list[str], int]]:
        """To choose by: calibration text; and to be judged on: other text. Each with the tokens to be decoded of it."""
        calibration = [text.text for text in self._material.calibration]
        valid = list(self._material.valid.values())
        return (calibration, self._scope.choosing * len(calibration)), (valid, self._scope.judging * len(valid))

    @cached_property
    def traces(self) -> tuple[Trace, Trace]:
        """Of exact decoding, to choose by and to be judged on."""
        model = self.loader(Pin(None, "exact")).resident("exact")
        with model.comoe:
            chosen, judged = (record(model, self._contest.tokenizer, *text) for text in self.texts)
        return chosen, judged

    @cached_property
    def use(self) -> dict[ExpertId, int]:
        """How often experts are used while the choosing text is decoded."""
        trace = self.traces[0]
        layers = np.repeat(trace.layers, np.diff(trace.uses))
        return {ExpertId(*of): n for of, n in Counter(zip(layers.tolist(), trace.expert.tolist(), strict=True)).items()}

    def staged(self, pin: Pin, capacity: int, times: Times, *, judging: bool, **options: Any) -> tuple[Row, Score]:
        """What serving so takes on a virtual clock and what it loses, measured in one run. Raises DoesNotFit."""
        turns, domains = self._turns[judging]
        answers = self.answers(pin, capacity, times, turns, **options)
        return columns(answers), score(answers, turns, domains)

    def answers(self, pin: Pin, capacity: int, times: Times, turns: Sequence[Turn], **options: Any) -> list[Answer]:
        """What serving so makes of `turns` on a virtual clock. Raises DoesNotFit."""
        return staged(self.loader(pin, **options), capacity, times, self._contest.tokenizer, turns)

    def exact_score(self, *, judging: bool) -> Score:
        """The score of the exact model on the same turns."""
        if judging not in self._scores:
            whole = self.packed.manifest.expert_bytes_bf16 * 2
            self._scores[judging] = self.staged(Pin(None, "exact"), whole, Times(), judging=judging, prefetch="off")[1]
        return self._scores[judging]

    @cached_property
    def _turns(self) -> tuple[tuple[list[Turn], list[str]], tuple[list[Turn], list[str]]]:
        """What is decoded, to choose by and to be judged on, and the domains of the texts."""
        model = self.loader(Pin(None, "exact")).resident("exact")
        with model.comoe:
            evaluation = Evaluation.for_model(model, self._contest.tokenizer)
            chosen, judged = (turns(evaluation, *text) for text in self.texts)
        domains = [text.domain for text in self._material.calibration]
        return (chosen, domains), (judged, list(self._material.valid))

    def group_of(self, rung: str) -> GroupOf:
        """Which blobs an expert needs in a rung."""
        manifest = self.packed.manifest
        forms = manifest.assignment(rung)

        def found(expert: ExpertId) -> Group:
            return manifest.blobs(expert, forms[expert.layer][expert.expert])

        return found

    def timed(self) -> Row:
        """What this device takes, in seconds, with everything in memory: see `timing`."""
        with ExitStack() as stack:
            sides = self.references(stack)
            decode_in_turns(sides, self.windows[:1] * 3, TIMED_TOKENS, perf_counter)
        return self.timing(*sides, self.compute_s())

    def references(self, stack: ExitStack) -> tuple[Side, Side]:
        """Exact experts in memory, and all but one of them beside foretelling all the time: what sets the clock."""
        exact = Pin(None, "exact")
        resident = self.loader(exact).resident("exact")
        foretelling = self.loader(exact, prefetch="on").as_pinned(self.ladder.exact.nbytes - 1)
        for model in (resident, foretelling):
            stack.enter_context(model.comoe)
        return self.side(resident), self.side(foretelling)

    def timing(self, resident: Side, foretelling: Side, compute_s: dict[str, float]) -> Row:
        """From `references` that have decoded: seconds of a token outside experts, of a use beside its computing, of
        computing an expert by form, and of a layer; as `sim.reader.Times` has them, of waking and of foretelling.

        The first window does not count. Of tokens the median: what else a machine does is not the device's.
        """
        tokens = sum(map(len, resident.ms)) - len(resident.ms)
        per_token, use_s = resident.uses["all"] / tokens, resident.expert_s / resident.uses["all"]
        token_s, foretold_s = (_token_s(side) for side in (resident, foretelling))
        return {
            "outside_s": max(0.0, token_s - per_token * use_s),
            "use_s": max(0.0, use_s - compute_s["exact"]),
            "compute_s": compute_s,
            "layer_s": token_s / self.depth,
            "wake_s": wake_s(perf_counter),
            "ahead_s": max(0.0, foretold_s - token_s) / self.depth,
        }

    def compute_s(self) -> dict[str, float]:
        """Seconds of computing an expert by form, from what this device was just measured to do."""
        costs = measured_costs(self.packed, perf_counter)
        return {form: self._compute_s(form, costs.compute_bps.get(form, costs.memory_bps)) for form in self._all}

    @cached_property
    def windows(self) -> list[list[int]]:
        """One of each domain, of validation text."""
        return [found[0] for found in self._contest.windows.values()]

    def side(self, model: Any) -> Side:
        """A served model, to be decoded with."""
        return Side(Evaluation.for_model(model, self._contest.tokenizer))

    @property
    def _all(self) -> list[str]:
        return [form for form in self.packed.manifest.forms if form != "dropped"]

    def _compute_s(self, form: str, bps: float) -> float:
        rung = self.ladder.rung(form)
        return float(rung.groups_beside(None).mean()) / bps

    def loader(self, pin: Pin, **options: Any) -> Loader:
        """The pack in float32, as losses are measured, to be served by this pin."""
        found = Loader(Pack(self.packed.folder), Options(context=CONTEXT, dtype="float32", **options))
        found.pin = pin
        return found


def _token_s(side: Side) -> float:
    return float(np.median(np.concatenate([ms[1:] for ms in side.ms[1:]]))) / 1e3
