"""Perplexity, speed, memory and continuations against what can be worked out by hand."""

import json
import math
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from billhook import cli
from billhook.data import Text, Windows
from billhook.data import windows as cut_windows
from billhook.errors import BillhookError
from billhook.evaluation import perplexity as perplexity_module
from billhook.evaluation import side_by_side, speed
from billhook.evaluation.continuations import continuations, variety
from billhook.evaluation.perplexity import perplexities, perplexity
from billhook.evaluation.speed import memory, speeds
from billhook.models import cached, sizes
from billhook.models.plan import Plan
from billhook.reports import records
from billhook.runtime.memory import peak_growth

CPU = torch.device("cpu")
MEGABYTE = 10**6


def windows(count: int = 5, length: int = 12) -> Windows:
    return Windows("words", tiny.tokens(count, length), count, "hash of the text", "hash of the tokens")


def losses_by_hand(model: torch.nn.Module, ids: Tensor) -> list[float]:
    """Mean loss of each window: log-softmax in plain Python floats."""
    means = []
    for window in ids:
        logits = model(window[None]).logits[0].tolist()
        losses = []
        for position, target in enumerate(window.tolist()[1:]):
            top = max(logits[position])
            total = math.fsum(math.exp(value - top) for value in logits[position])
            losses.append(math.log(total) + top - logits[position][target])
        means.append(math.fsum(losses) / len(losses))
    return means


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "opt_350m"])
def test_perplexity_is_that_by_hand(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.model(family), windows()
    for param in model.parameters():
        param.data /= 3  # perplexities of some hundreds
    by_hand = losses_by_hand(model, given.tokens)
    expected = math.exp(statistics.fmean(by_hand))
    for batch_tokens in (1, 24, 10_000):
        monkeypatch.setattr(perplexity_module, "HEAD_TOKENS", batch_tokens)
        found = perplexity(model, given)
        assert found.perplexity == pytest.approx(expected, rel=1e-5)
        spread = math.sqrt(sum((loss - statistics.fmean(by_hand)) ** 2 for loss in by_hand) / 4)
        assert found.standard_error == pytest.approx(expected * spread / math.sqrt(5), rel=1e-4)
        assert (found.text, found.seq_len, found.tokens, found.text_sha256) == ("words", 12, 55, "hash of the text")


def test_perplexity_of_one_window_can_be_written_down() -> None:
    found = perplexity(tiny.model("llama"), windows(count=1))
    assert json.loads(records.to_json(asdict(found)))["standard_error"] is None


def test_perplexity_reports_its_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(tiny.model("llama"), windows(), lambda *step: seen.append(step))
    assert seen[-1] == ("perplexity on words", 5, 5) and all(done <= total for _, done, total in seen)


@dataclass
class Sleeper:
    """A model that takes known times on a clock of its own making: `prompt` by turn, and a fixed time for each
    token."""

    name: str
    now: list[float]
    order: list[str]
    prompt: Iterator[float]
    token: float
    lengths: list[int] = field(default_factory=list)
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(vocab_size=7))
    device: torch.device = CPU

    def __call__(self, ids: Tensor, **given: Any) -> SimpleNamespace:
        seen = given.get(cached.NAME, 0)
        assert ids.shape[0] == 1 and ids.shape[1] == (1 if seen else 16)
        self.now[0] += self.token if seen else next(self.prompt)
        self.order += [] if seen else [self.name]
        self.lengths.append(ids.shape[1])
        return SimpleNamespace(logits=torch.zeros(1, 1, 7), **{cached.NAME: seen + ids.shape[1]})


def test_speeds_are_medians_of_turns_taken_by_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    slow = Sleeper("slow", now, order, iter([100.0, 4.0, 2.0, 8.0]), 0.5)  # the first turn warms up
    fast = Sleeper("fast", now, order, iter([0.001, 1.0, 1.0, 1.0]), 0.25)
    (first,), (second,) = speeds([slow, fast], [(1, 16)], new_tokens=6, repeats=3)
    assert order == ["slow", "fast"] * 4
    assert slow.lengths == ([16] + [1] * 6) * 4
    assert (first.prefill, *first.prefill_range) == pytest.approx((4, 2, 8))
    assert (first.decode, *first.decode_range) == pytest.approx((2, 2, 2))
    assert (second.prefill, second.decode) == pytest.approx((16, 4))
    assert (first.batch, first.context, first.new_tokens, first.repeats) == (1, 16, 6, 3)
    assert (first.first_token_seconds, first.token_seconds) == pytest.approx((4, 0.5))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_speeds_of_real_models_are_numbers(family: str) -> None:
    found = speeds([tiny.model(family)] * 2, [(1, 20), (3, 7)], new_tokens=3, repeats=2)
    assert [[(one.batch, one.context) for one in of_model] for of_model in found] == [[(1, 20), (3, 7)]] * 2
    for one in (one for of_model in found for one in of_model):
        assert 0 < one.prefill_range[0] <= one.prefill <= one.prefill_range[1] < math.inf
        assert 0 < one.decode_range[0] <= one.decode <= one.decode_range[1] < math.inf


def test_growth_is_what_was_touched_inside() -> None:
    before = torch.ones(100 * MEGABYTE // 4)
    with peak_growth(CPU) as growth:
        held = torch.ones(200 * MEGABYTE // 4)
        time.sleep(0.05)
        del held
        time.sleep(0.05)
    assert 190 * MEGABYTE < growth() < 260 * MEGABYTE  # the peak, though it is gone
    with peak_growth(CPU) as growth:
        time.sleep(0.05)
    assert 0 <= growth() < 5 * MEGABYTE
    after = torch.ones(100 * MEGABYTE // 4)
    assert growth() < 5 * MEGABYTE and len(before) == len(after)


def test_the_watcher_goes_when_the_work_fails() -> None:
    threads = threading.active_count()
    with pytest.raises(KeyError), peak_growth(CPU):
        assert threading.active_count() == threads + 1
        raise KeyError
    assert threading.active_count() == threads


def test_memory_counts_tied_weights_once() -> None:
    model = tiny.model("llama")
    stored = sum(p.numel() for p in model.parameters()) * 4
    assert model.lm_head.weight is model.get_input_embeddings().weight
    found = memory(model, 1, 16)
    assert found["weights_bytes"] == stored <= found["peak_bytes"]
    assert memory(model.bfloat16(), 1, 16)["weights_bytes"] == stored // 2
    assert sizes.parameters(model)["parameters"] * 4 == stored


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "opt"])
def test_continuations_are_greedy_and_leave_out_the_prompt(family: str) -> None:
    model, tokenizer, prompts = tiny.model(family), tiny.tokenizer(), ["abc", "a longer prompt"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        while ids.shape[1] < start + 8 and ids[0, -1] != model.config.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    found, said = continuations(model, tokenizer, prompts, new_tokens=8)
    assert found == expected and all(len(text) > 0 for text in found)
    assert 0 < said["distinct_1"] <= said["distinct_2"] <= 1


def test_variety_by_hand() -> None:
    said = variety([[1, 2, 3, 4, 1, 2, 3, 4], [5, 5, 5]])
    assert said["repetition"] == pytest.approx(1 - 4 / 5)  # runs of four: 1234 2341 3412 4123 1234; the other has none
    assert said["distinct_1"] == pytest.approx(5 / 11)
    assert said["distinct_2"] == pytest.approx(5 / 9)
    assert variety([[], [1]]) == {"repetition": None, "distinct_1": 1.0, "distinct_2": None, "distinct_3": None}


def test_against_a_reference_by_hand() -> None:
    dense, other, given = tiny.model("llama"), tiny.model("llama", seed=1), windows()
    assert not torch.equal(dense.lm_head.weight, other.lm_head.weight)
    of_dense, of_other = perplexities([dense, other], given, reference=True)
    alone = perplexity(other, given)
    assert of_dense.against is None and of_other.perplexity == alone.perplexity and alone.against is None
    kl, same = [], []
    for window in given.tokens:
        p, q = (torch.log_softmax(m(window[None]).logits[0, :-1].double(), -1) for m in (dense, other))
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        same.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    found = of_other.against
    assert found is not None
    assert found.kl == pytest.approx(statistics.fmean(kl), rel=1e-4)
    assert found.kl_standard_error == pytest.approx(statistics.stdev(kl) / math.sqrt(5), rel=1e-3)
    assert found.agreement == pytest.approx(statistics.fmean(same))
    assert found.factor == pytest.approx(of_other.perplexity / of_dense.perplexity)


def test_a_model_against_itself_loses_nothing() -> None:
    model = tiny.model("llama")
    _, again = perplexities([model, model], windows(), reference=True)
    assert again.against is not None
    found = again.against
    assert (found.agreement, found.factor, found.factor_standard_error) == (1.0, 1.0, 0.0)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_bits_per_byte_count_the_text_behind_the_predicted_tokens() -> None:
    plain = cut_windows(Text("plain", "so green is the heath. " * 40), tiny.tokenizer(), 16, spans=True)
    assert plain.bytes == (15,) * plain.available  # one token a byte
    cut = cut_windows(Text("mixed", "Grün ist die Heide, so weit. " * 40), tiny.tokenizer(), 16, spans=True)
    assert all(abs(size - 15) <= 1 for size in cut.bytes)  # a letter of two bytes may lie on the edge
    found = perplexity(tiny.model("llama"), cut)
    assert found.bytes == sum(cut.bytes)
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * found.tokens / found.bytes)


@pytest.mark.parametrize("family", ["llama", "opt", "opt_350m"])
def test_macs_are_what_torch_counts(family: str) -> None:
    """A forward of n tokens: each costs the linear weights, and attention to n positions (masked ones are computed
    too)."""
    model, length = tiny.model(family), 24
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted:
        model(tiny.tokens(1, length), use_cache=False)
    rotary = counted.get_total_flops() // 2 - length * sizes.macs_per_token(model, length)
    assert 0 <= rotary < 0.01 * length * sizes.macs_per_token(model, length)  # the angles are a product, too


def test_side_by_side_says_everything_twice_and_compares() -> None:
    models = [tiny.model("llama"), tiny.model("llama", seed=1)]
    subjects = [side_by_side.Subject(name, m, tiny.tokenizer()) for name, m in zip(("a", "b"), models, strict=True)]
    asked = side_by_side.Measures(
        texts=[Text("words", tiny.text())],
        seq_len=16,
        max_windows=3,
        contexts=(8,),
        batch_sizes=(1, 2),
        new_tokens=4,
        repeats=1,
    )
    first, second = side_by_side.side_by_side(subjects, asked, reference=True)
    assert first["perplexities"][0]["against"] is None and second["perplexities"][0]["against"]["kl"] > 0
    assert len(first["speeds"]) == 2 and len(first["continuations"]) == len(first["prompts"]) == 5
    cached = sizes.kv_cache_entries(models[0], Plan(), 8, 1) * 4
    assert first["memory"]["kv_cache_bytes"] == cached
    assert side_by_side.same_tokenizer([first, second])


def test_a_context_beyond_the_positions_is_refused() -> None:
    model = tiny.model("llama")
    subject = side_by_side.Subject("tiny", model, tiny.tokenizer())
    longest = model.config.max_position_embeddings
    with pytest.raises(BillhookError, match=f"context {longest}: tiny has {longest} positions"):
        side_by_side.side_by_side([subject], side_by_side.Measures(contexts=(longest,)))


def test_a_model_left_in_its_files_has_the_same_perplexity_and_nothing_timed(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(tiny.text())
    common = ["evaluate", str(tmp_path / "m"), "--text", str(tmp_path / "text.txt"), "--seq-len", "32", "--json", "-"]
    streamed, whole = (
        json.loads(CliRunner().invoke(cli.app, [*common, *more]).stdout)["models"][0]
        for more in (["--stream-weights"], ["--parts", "none"])
    )
    assert streamed == whole
    assert streamed["perplexities"] and "speeds" not in streamed and "continuations" not in streamed
    wrong = CliRunner().invoke(cli.app, [*common, "--parts", "sped"])
    assert isinstance(wrong.exception, BillhookError) and "did you mean 'speed'?" in str(wrong.exception)
