"""What every test may ask for: the shared models, a tiny checkpoint and its pack, the command line.

And the rule that CI skips nothing by surprise. torch is imported inside fixtures only, so that the tests that need none
start at once.
"""

import json
import os
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from commands import Comoe

THREADS = "2"
SHARED = Path(os.environ.get("COMOE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
NEEDS_SHARED = "needs the shared models and data (COMOE_SHARED)"
EXPECTED_SKIPS = (
    "needs a writable memory cgroup",
    "needs the shared models",
    "needs root for network namespaces",
    "needs ip of iproute2",
    "needs tc of iproute2",
    "needs network namespaces",
)
"""How the reasons begin for which a test may be skipped under CI=true."""

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<|doc|>", "<extra_id_0>")
VOCABULARY_SIZE = 128

os.environ.setdefault("OMP_NUM_THREADS", THREADS)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads crawl on a busy machine


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the shared models and data."""
    if not SHARED.is_dir():
        pytest.skip(NEEDS_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def network() -> None:
    """Network namespaces and shaped wires can be made here."""
    from comoe.testbed.namespaces import missing

    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of 2 layers with 8 experts, top-2, in bf16 as hubs lay it out; its tokenizer beside it.

    Shared by all tests: read it, never write into it.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "qwen3moe"
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def self_contained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the tiny checkpoint that needs no other file. Shared by all tests: read it."""
    from commands import calibration_text

    from comoe.make.calibrate import texts_of
    from comoe.make.pack import pack
    from comoe.make.recipe import Recipe

    folder = tmp_path_factory.mktemp("published")
    recipe = Recipe(texts=texts_of([calibration_text(folder)]), num_tokens=4096, self_contained=True)
    pack(tiny_checkpoint, folder / "tiny.comoe", recipe, lambda step, done: None)
    return folder / "tiny.comoe"


@pytest.fixture
def published(self_contained: Path, tmp_path: Path) -> Path:
    """A copy of it, of the test's own, as somebody publishes it."""
    return Path(shutil.copytree(self_contained, tmp_path / "published"))


@pytest.fixture(scope="session")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the tiny checkpoint in all forms, with a certificate. Shared by all tests: read it."""
    from commands import calibration_text

    from comoe.make.calibrate import texts_of
    from comoe.make.pack import pack
    from comoe.make.recipe import Recipe

    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(tiny_checkpoint, folder / "source")
    recipe = Recipe(texts=texts_of([calibration_text(folder)]), num_tokens=4096)
    pack(folder / "source", folder / "tiny.comoe", recipe, lambda step, done: None)
    return folder / "tiny.comoe"


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A pack of one's own, and its checkpoint beside it."""
    shutil.copytree(packed.parent / "source", tmp_path / "source")
    shutil.copytree(packed, tmp_path / "own.comoe")
    manifest = json.loads((tmp_path / "own.comoe" / "comoe.json").read_bytes())
    manifest["source"]["folder"] = str(tmp_path / "source")
    (tmp_path / "own.comoe" / "comoe.json").write_text(json.dumps(manifest))
    return tmp_path / "own.comoe"


@pytest.fixture
def one_floor(copied: Path) -> tuple[Path, str]:
    """A pack of which one step is certified, at 4 %, and that step's name: it has many forms, dropped among them."""
    from packs import edit

    from comoe.store.manifest import read_manifest

    manifest = read_manifest(copied)
    kinds = {step.name: {*"".join(step.assignment)} for step in manifest.chain}
    name = max(kinds, key=lambda name: ("0" in kinds[name], len(kinds[name])))
    assert len(kinds[name]) > 2 and manifest.forms[0] == "dropped"
    found = {"loss": 0.04, "loss_ci95": [0.03, 0.04], "worst_domain": "fox"}
    found |= {"loss_worst_domain": 0.05, "loss_worst_domain_ci95": [0.04, 0.06]}
    edit(copied, lambda document: [step.update(certificate=None) for step in document["chain"]])
    edit(copied, lambda document: document["chain"][list(kinds).index(name)].update(certificate=found))
    return copied, name


@pytest.fixture
def comoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Comoe":
    """Call the command line from an empty folder, without settings of the environment."""
    from commands import call

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("COMOE_")]:
        monkeypatch.delenv(name)
    return lambda *words: call(capsys, monkeypatch, *words)


def save_tokenizer(folder: Path) -> None:
    """One token per printable character, 128 in all; decoding is the inverse of encoding."""
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *string.printable]
    words += [f"<unused_{i}>" for i in range(VOCABULARY_SIZE - len(words))]
    characters = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    characters.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|doc|>", "<extra_id_0>"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI=true, an unexpected skip fails the run: a test that silently stopped running proves nothing."""
    passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if passed and any(_unexpected_skips(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the skips that failed the run."""
    for line in _unexpected_skips(config):
        terminalreporter.write_line(f"UNEXPECTED SKIP {line}", red=True)


def _unexpected_skips(config: pytest.Config) -> Iterator[str]:
    """`file:line: reason` of every unexpected skip; none outside CI."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return
    for report in reporter.stats.get("skipped", []):
        file, line, message = report.longrepr
        reason = message.removeprefix("Skipped: ")
        if not reason.startswith(EXPECTED_SKIPS):
            yield f"{file}:{line}: {reason}"
