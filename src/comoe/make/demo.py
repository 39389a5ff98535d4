"""`comoe demo`: the main job on the model that ships: pack, plan, run in 30 % of the experts' bytes, compare."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from comoe.make.calibrate import texts_of
from comoe.make.measure import Measured, measure, sample_windows
from comoe.make.pack import pack
from comoe.make.recipe import Recipe, Report
from comoe.plan.planner import Plan, frontier
from comoe.runtime.generate import Answer, Sampling, generate, prompt_ids, tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.pack import Pack
from comoe.store.shipped import calibration_files, demo_checkpoint, sample_files
from comoe.types import Progress

SHARE = 0.3
"""Of the experts' bytes, the memory that the demo gives them."""

BOUND = 0.02
BOUND_SHARE = 0.15
"""The loss bound that the last part allows, and the memory that it gives the experts."""

OWN_FORMS = ("dropped", "q2", "q3", "q4", "q8")
"""All that a whole `comoe pack` of this model keeps: its experts have nothing in common (docs/analysis.md), and trying
what they might share takes as long as all else."""

CALIBRATION_TOKENS = 12288
MEASURED_TOKENS = 512
PROMPT = "Emma had never been so much"
SAMPLING = Sampling(max_new_tokens=96, temperature=0.7, top_p=0.9, seed=3, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Act:
    """One configuration at work: its plan, what it wrote, and what decoding the sample text measured."""

    plan: Plan
    answer: Answer
    measured: Measured


@dataclass(frozen=True, slots=True)
class Demo:
    """Everything that the demo shows."""

    report: Report
    plans: list[Plan]
    expert_bytes_total: int
    budget_bytes: int
    bounded_budget_bytes: int
    resident: Act
    streamed: Act
    bounded: Act
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether text and every probability of the sample text are those of the resident model."""
        same_nats = bool((self.streamed.measured.decoded.nats == self.resident.measured.decoded.nats).all())
        return self.streamed.answer.token_ids == self.resident.answer.token_ids and same_nats

    @property
    def quality_loss(self) -> float:
        return self.bounded.measured.loss(self.resident.measured)

    def document(self) -> dict[str, Any]:
        """The contract's keys."""
        return {
            "identical": self.identical,
            "budget_bytes": self.budget_bytes,
            "resident_expert_bytes": self.streamed.measured.resident_bytes,
            "expert_bytes_total": self.expert_bytes_total,
            "ms_per_token": self.streamed.measured.ms_per_token,
            "resident_ms_per_token": self.resident.measured.ms_per_token,
            "hit_rate": self.streamed.measured.hit_rate,
            "bytes_read": self.streamed.measured.bytes_read,
            "tokens": len(self.streamed.measured.decoded.nats),
            "quality_bound": BOUND,
            "quality_loss": self.quality_loss,
            "bounded_budget_bytes": self.bounded_budget_bytes,
            "bounded_ms_per_token": self.bounded.measured.ms_per_token,
            "text": PROMPT + self.streamed.answer.text,
            "plans": [plan.document() for plan in self.plans],
            "seconds": self.seconds,
        }


def demo(folder: Path, progress: Progress, say: Callable[[str], None]) -> Demo:
    """Make the pack `folder` of the shipped model and let it work."""
    start_s = perf_counter()
    recipe = Recipe(forms=OWN_FORMS, texts=texts_of(calibration_files()), num_tokens=CALIBRATION_TOKENS)
    report = pack(demo_checkpoint(), folder, recipe, lambda step, done: progress(f"packing: {step}", 0.4 * done), say)
    opened = Pack(folder)
    whole = opened.manifest.expert_bytes_bf16
    planner = Loader(opened, Options()).planner()
    progress("the resident model", 0.4)
    loader = Loader(opened, Options(context=512))
    resident = _act(loader.resident("exact"))
    progress(f"experts in {SHARE:.0%} of their bytes", 0.6)
    streamed = _act(loader.within_experts(int(SHARE * whole)))
    progress(f"a loss bound of {BOUND:.0%}", 0.8)
    bounded = _act(Loader(opened, Options(max_loss=BOUND, context=512)).within_experts(int(BOUND_SHARE * whole)))
    return Demo(
        report=report,
        plans=frontier(planner, int(SHARE * whole), BOUND),
        expert_bytes_total=whole,
        budget_bytes=int(SHARE * whole),
        bounded_budget_bytes=int(BOUND_SHARE * whole),
        resident=resident,
        streamed=streamed,
        bounded=bounded,
        seconds=perf_counter() - start_s,
    )


def _act(model: Any) -> Act:
    tokenizer = tokenizer_of(model.comoe.pack.folder)
    with model.comoe:
        answer = generate(model, tokenizer, prompt_ids(tokenizer, model.config, PROMPT), SAMPLING)
        windows = sample_windows(model, tokenizer, sample_files(), 2)
        return Act(model.comoe.plan, answer, measure(model, tokenizer, windows, MEASURED_TOKENS))
