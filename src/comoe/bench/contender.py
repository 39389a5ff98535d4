"""A model of the joint benchmark: the rungs that it may be served in, what they lose, what they take on this device."""

from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from comoe.bench.ladder import Contest, rung_weights
from comoe.bench.ladder import Scope as LadderScope
from comoe.bench.losses import loss_columns
from comoe.bench.material import Material
from comoe.bench.rows import Row
from comoe.bench.turns import Side
from comoe.device.costs import measured_costs
from comoe.make.calibrate import held_out
from comoe.make.certify import certify
from comoe.make.protocol import Evaluation
from comoe.make.recipe import Recipe
from comoe.make.score import Score
from comoe.make.trace import CONTEXT, record
from comoe.memory.residency import Group
from comoe.plan.ladder import Ladder, ladder_of
from comoe.runtime.load import Loader, Options
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

    Losses are measured on so many windows of each; forms are fitted to about `calibration_tokens`.
    """

    shares: tuple[float, ...]
    ratios: tuple[float, ...]
    domains: int | None
    choosing: int
    judging: int
    windows: int
    calibration_tokens: int


class Contender:
    """The checkpoint in `folder`; packs and recordings are made in `work`, or found there."""

    def __init__(self, folder: Path, material: Material, scope: Scope, work: Path) -> None:
        self._material, self._scope = material, scope
        how = LadderScope(scope.domains, scope.windows, scope.calibration_tokens, (), (), gate=False, upcycled=False)
        self._contest = Contest(folder, material, how, work)
        self._losses: dict[str, Row] = {}
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

    @cached_property
    def _exact(self) -> Score:
        return self._contest.bank.nats(None, self._contest.windows)

    @cached_property
    def traces(self) -> tuple[Trace, Trace]:
        """Of exact decoding, to choose by: calibration text; and to be judged on: other text."""
        calibration = [text.text for text in self._material.calibration]
        texts = ((calibration, self._scope.choosing), (list(self._material.valid.values()), self._scope.judging))
        model = self._loader().resident("exact")
        with model.comoe:
            chosen, judged = (record(model, self._contest.tokenizer, text, each * len(text)) for text, each in texts)
        return chosen, judged

    def group_of(self, rung: str) -> GroupOf:
        """Which blobs an expert needs in a rung."""
        manifest = self.packed.manifest
        forms = manifest.assignment(rung)

        def found(expert: ExpertId) -> Group:
            return manifest.blobs(expert, forms[expert.layer][expert.expert])

        return found

    def timed(self) -> Row:
        """What this device takes, in seconds, with everything in memory: a token outside experts, a use beside its
        computing, computing an expert by form, and a layer of the exact model."""
        model = self._loader().resident("exact")
        window = next(iter(self._contest.windows.values()))[0]
        with model.comoe as handle:
            side = Side(Evaluation.for_model(model, self._contest.tokenizer))
            for _ in range(3):
                side.decode(window, TIMED_TOKENS, perf_counter)
            per_token = side.uses["all"] / (3 * (TIMED_TOKENS - 1))
            expert_s, uses = handle.stats()["expert_s"], handle.stats()["uses"]
        token_s = float(np.median(np.concatenate([ms[1:] for ms in side.ms[1:]]))) / 1e3
        costs = measured_costs(self.packed, perf_counter)
        compute_s = {form: self._compute_s(form, costs.compute_bps.get(form, costs.memory_bps)) for form in self._all}
        use_s = expert_s / uses
        return {
            "outside_s": max(0.0, token_s - per_token * use_s),
            "use_s": max(0.0, use_s - compute_s["exact"]),
            "compute_s": compute_s,
            "layer_s": token_s / len(self.experts),
        }

    @property
    def _all(self) -> list[str]:
        return [form for form in self.packed.manifest.forms if form != "dropped"]

    def _compute_s(self, form: str, bps: float) -> float:
        rung = self.ladder.rung(form)
        return float(rung.groups_beside(None).mean()) / bps

    def _loader(self) -> Loader:
        return Loader(Pack(self.packed.folder), Options(context=CONTEXT))
