"""A sparse model trained back: every zero stays, what is not zero learns, and nobody fills zeros unasked."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import Child
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from billhook import cli
from billhook.checkpoints import load
from billhook.checkpoints.result import Result
from billhook.errors import BillhookError
from billhook.models import surgery
from billhook.models.families import layers
from billhook.pruning import prune
from billhook.recovery import recover as recover_module
from billhook.recovery import student
from billhook.recovery.recover import recovery
from billhook.training import keep_zeros, schedule, trainables, trainer

LENGTH = 16
SETS = ["all", "decoder", "head+last3", "lora", "spp"]  # seam needs a cut: a test of its own
PATTERNS = {
    "half": lambda w: w.abs() < w.abs().median(),
    "2:4": lambda w: (
        torch.zeros_like(w)
        .bool()
        .unflatten(-1, (-1, 4))
        .scatter(-1, w.abs().unflatten(-1, (-1, 4)).argsort(-1)[..., :2], True)
        .flatten(-2)
    ),
}


def linears(model: Any) -> dict[str, Tensor]:
    """The linear weights of the decoder layers, found without billhook.training.keep_zeros."""
    found = [(n, *pair) for n, layer in enumerate(layers(model)) for pair in layer.named_modules()]
    return {f"{n}.{name}": module.weight for n, name, module in found if isinstance(module, nn.Linear)}


def masked(model: Any, pattern: str = "half") -> Any:
    """Prune by magnitude in place; one zero of each weight is a negative one."""
    for weight in linears(model).values():
        mask = PATTERNS[pattern](weight.data)
        weight.data[mask] = 0.0
        weight.data.view(-1)[int(mask.flatten().nonzero()[0])] = -0.0
    return model


def written(model: Any, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    surgery.cast(model, dtype)
    model.save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return out


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with a sparse student and two texts."""
    written(masked(tiny.model("llama")), tmp_path / "sparse")
    words = tiny.text(1200)
    (tmp_path / "train.txt").write_text(words[:3000])
    (tmp_path / "held.txt").write_text(words[3000:4000])
    return tmp_path


def settings(bench: Path, **more: Any) -> dict[str, Any]:
    found = {
        "objective": "ce",
        "tokens": 5 * LENGTH,
        "text": (str(bench / "train.txt"),),
        "held_out": (str(bench / "held.txt"),),
        "seq_len": LENGTH,
        "lr": 1e-2,
        "rank": 4,
        "device": "cpu",
        "precision": "float32",
        "guard": False,
        "keep_zeros": True,
    }
    return {**found, **more}


def recover(bench: Path, student: str = "sparse", work: str = "work", **more: Any) -> Result:
    return recover_module.recover(bench / student, work=bench / work, **settings(bench, **more))


def law(before: Any, after: Any, names: set[str] | None = None) -> None:
    """Every zero is one still, and most of what is not has changed (of the weights `names`, if not of all)."""
    old, new = linears(before), linears(after)
    assert old.keys() == new.keys()
    for name, weight in old.items():
        zero = weight == 0
        assert zero.any() and not new[name][zero].count_nonzero(), name
        changed = (new[name] != weight)[~zero].float().mean()
        assert changed > 0.3 if names is None or name in names else changed == 0, (name, changed)


# ---- whole runs


@pytest.mark.parametrize("trainable", SETS)
@pytest.mark.covering(some={"trainable": 2})
def test_every_zero_stays_and_the_rest_learns(trainable: str, bench: Path) -> None:
    found = recover(bench, trainable=trainable)
    before = load.load(bench / "sparse")
    law(before, found.model)
    count = sum(int((weight == 0).sum()) for weight in linears(before).values())
    assert found.healing["zeros"] == count > 0 and found.healing["keep_zeros"] is True
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in found.model.modules())
    (bench / "out").mkdir()
    found.write(bench / "out")
    law(before, load.load(bench / "out"))
    assert found.healing["losses"][-1] != found.healing["losses"][0]


@pytest.mark.parametrize("trainable", ["decoder", "spp"])
def test_zeros_of_a_bfloat16_student(trainable: str, bench: Path) -> None:
    written(masked(tiny.model("llama")), bench / "bf16", torch.bfloat16)
    found = recover(bench, "bf16", trainable=trainable, precision="bfloat16")
    assert {param.dtype for param in found.model.parameters()} == {torch.bfloat16}
    law(load.load(bench / "bf16"), found.model)


@pytest.mark.parametrize("trainable", ["decoder", "lora", "spp"])
def test_two_of_four_is_two_of_four_still(trainable: str, bench: Path) -> None:
    written(masked(tiny.model("llama"), "2:4"), bench / "patterned")
    found = recover(bench, "patterned", trainable=trainable)
    for weight in linears(found.model).values():
        assert ((weight.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all()


def test_every_checkpoint_has_the_zeros(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "KEPT", 100)
    recover(bench, trainable="all")
    found = schedule.checkpoints(bench / "work")
    assert len(found) == 5
    old = linears(load.load(bench / "sparse"))
    for one in found:
        tensors = load_file(one / "model.safetensors")
        assert not any(tensors[f"model.layers.{name}.weight"][w == 0].count_nonzero() for name, w in old.items())


def test_the_layers_beside_a_cut_keep_theirs(bench: Path) -> None:
    deep = written(tiny.model("llama", num_hidden_layers=4), bench / "deep")
    prune.prune(str(deep), method="layerchop", drop="2").save(bench / "cut")
    masked(load.load(bench / "cut")).save_pretrained(bench / "cut")  # its record stays beside it
    found = recover(bench, "cut", trainable="seam")
    before = load.load(bench / "cut")
    law(before, found.model, {name for name in linears(before) if name[0] in "12"})


def test_a_rate_is_found_by_trials_that_keep_zeros(bench: Path) -> None:
    law(load.load(bench / "sparse"), recover(bench, lr="auto", trainable="spp").model)


# ---- the forms


@pytest.mark.parametrize("make", [trainables.train_multipliers, trainables.train_masked_adapters])
@pytest.mark.parametrize("rank", [4, 5, 64])  # fits the rows, does not, is more than there are
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_merged_computes_the_same(family: str, rank: int, make: Any) -> None:
    ids, plain = tiny.tokens(), masked(tiny.model(family))
    with torch.no_grad():
        start = plain(ids).logits
    model = make(masked(tiny.model(family)), None, rank)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, start)  # before a step nothing is changed
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(0.3 * torch.randn_like(param))
        before = model(ids).logits
        assert not torch.allclose(before, start, atol=1e-2)
        merged = trainables.merged(model)
        assert torch.equal(merged(ids).logits, before)
    law(plain, merged)
    assert type(next(iter(layers(merged)[0].children()))).__name__.endswith("Attention")
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_multipliers_are_those_of_the_paper() -> None:
    form = trainables.Multiplier(torch.ones(6, 5), 3)
    form.b.data.normal_()
    weight = torch.randn(6, 5)
    expected = weight * (1 + 2 * form.a.repeat_interleave(2, 0) * form.b)
    torch.testing.assert_close(form(weight), expected)


def test_masks_are_of_trained_weights_that_have_zeros() -> None:
    model = tiny.model("llama")
    weights = linears(model)
    assert keep_zeros.census(model).total == 0 and keep_zeros.census(model).share == 0.0
    weights["1.mlp.up_proj"].data[0] = 0.0
    weights["2.mlp.up_proj"].data[0] = 0.0
    assert keep_zeros.zeros(model) == {}  # all of it is frozen
    weights["1.mlp.up_proj"].requires_grad_(True)
    weights["1.mlp.down_proj"].requires_grad_(True)
    masks = keep_zeros.zeros(model)
    assert set(masks) == {"1.mlp.up_proj"} and masks["1.mlp.up_proj"].dtype is torch.bool
    found = keep_zeros.census(model)
    assert found.total == 64 and found.share == 64 / sum(weight.numel() for weight in weights.values())
    weights["2.mlp.up_proj"].data[0, :3] = 1.0
    weights["2.mlp.up_proj"].data[5, :9] = 0.0  # of another place
    weights["0.mlp.up_proj"].data[5, :9] = 0.0  # of another weight
    assert found.filled(model) == 0
    weights["2.mlp.up_proj"].data[5, :9] = 1.0
    assert found.filled(model) == 3


def test_moments_know_nothing_of_zeros_and_decay_cannot_fill_them() -> None:
    model = masked(tiny.model("llama")).requires_grad_(True)
    before, keeper = masked(tiny.model("llama")), keep_zeros.ZeroKeeper(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
        optimizer.step()
        keeper.on_optimizer_step()
        optimizer.zero_grad()
    law(before, model)
    for name, weight in linears(model).items():
        state, zero = optimizer.state[weight], keeper.masks[name]
        assert not state["exp_avg"][zero].count_nonzero() and not state["exp_avg_sq"][zero].count_nonzero()
        assert state["exp_avg"][~zero].count_nonzero()
        weight.data += 1e-3  # noise, however it came
    keeper.reapply()
    law(before, model)


# ---- cut off


def killed(bench: Path, **more: Any) -> None:
    """Run in another process, killed once it has a checkpoint."""

    def work() -> None:
        trainer.SAVE_SECONDS = 0.0  # a checkpoint every step
        recover_module.recover(bench / "sparse", work=bench / "work", **settings(bench, **more))

    process, until = Child(work), time.monotonic() + 120
    while process.runs and time.monotonic() < until and not schedule.checkpoints(bench / "work"):
        time.sleep(0.001)
    process.send(signal.SIGKILL)
    code, _, said = process.ended()
    assert code == -signal.SIGKILL, said


def cut_off(bench: Path, **more: Any) -> None:
    """Run in this process up to its twentieth step, which has no checkpoint yet; sooner done than a process is
    started."""

    def tick(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_module.recover(bench / "sparse", work=bench / "work", tick=tick, **settings(bench, **more))


@pytest.mark.parametrize(
    ("trainable", "end"), [("all", killed), ("lora", cut_off), pytest.param("spp", cut_off, marks=pytest.mark.whole)]
)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    trainable: str, end: Callable[..., None], bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.1)
    more = {"trainable": trainable, "tokens": (36 if end is killed else 26) * LENGTH}
    end(bench, **more)
    assert schedule.step_of(schedule.checkpoints(bench / "work")[-1]) < more["tokens"] // LENGTH
    lines: list[str] = []
    again = recover_module.recover(
        bench / "sparse", work=bench / "work", announce=lines.append, **settings(bench, **more)
    )
    whole = recover(bench, work="whole", **more)
    assert any("going on from" in line for line in lines)
    assert any("keeping all " in line for line in lines)
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.healing["losses"] == again.healing["losses"]
    law(load.load(bench / "sparse"), again.model)


def test_the_mask_is_the_students_not_a_checkpoints(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that happens to be zero in a checkpoint is not frozen by it."""
    first = recover(bench, trainable="decoder")
    seen: list[dict[str, Tensor]] = []
    true = keep_zeros.ZeroKeeper.on_optimizer_step

    def spy(self: keep_zeros.ZeroKeeper, *args: Any, **more: Any) -> None:
        seen.append({name: mask.clone() for name, mask in self.masks.items()})
        true(self, *args, **more)

    monkeypatch.setattr(keep_zeros.ZeroKeeper, "on_optimizer_step", spy)
    *_, before, last = schedule.checkpoints(bench / "work")
    (last / schedule.WHOLE).unlink()
    tensors = load_file(before / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, before / "model.safetensors", metadata={"format": "pt"})
    schedule.mark_whole(before)
    again = recover(bench, trainable="decoder")
    assert seen and all(
        torch.equal(seen[0][name], weight == 0) for name, weight in linears(load.load(bench / "sparse")).items()
    )
    assert again.healing["zeros"] == first.healing["zeros"]


# ---- refusals


def refused(bench: Path, student: str, *more: str, capsys: Any, monkeypatch: Any) -> str:
    """What the command says in its one line, and nothing is left of it."""
    before, given = sorted(bench.rglob("*")), settings(bench, keep_zeros=None, guard=None)
    line = ["billhook", "recover", str(bench / student), "-o", str(bench / "out"), "--no-guard", *more]
    for name, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            line += [] if one is None else [f"--{name.replace('_', '-')}", str(one)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert left.value.code == 2 and not said.out and sorted(bench.rglob("*")) == before
    (last,) = [one for one in said.err.strip().splitlines() if one.startswith("billhook: error: ")]
    return last


def test_zeros_are_not_filled_unasked(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(bench, "sparse", capsys=capsys, monkeypatch=monkeypatch)
    assert "50% of the decoder's linear weights" in said and "training would fill them" in said
    assert "--keep-zeros" in said and "--no-keep-zeros" in said


def test_there_must_be_zeros_to_keep(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tiny.model("llama"), bench / "dense")
    said = refused(bench, "dense", "--keep-zeros", capsys=capsys, monkeypatch=monkeypatch)
    assert "has no exact zero" in said and "nothing to keep" in said


def test_zeros_and_fsdp(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BillhookError, match="launch without --use_fsdp"):
        student._check_zeros(student_of(bench), recovery(**settings(bench)))


def student_of(bench: Path) -> student.Student:
    model = load.load(bench / "sparse")
    return student.Student("sparse", None, None, torch.float32, 258, "", None, keep_zeros.census(model), {})


def test_zeros_may_be_let_go(bench: Path) -> None:
    found = recover(bench, keep_zeros=False)
    assert found.healing["keep_zeros"] is False and found.healing["zeros"] is None
    assert keep_zeros.census(found.model).share < 0.01


def test_multipliers_need_no_asking(bench: Path) -> None:
    found = recover(bench, trainable="spp", keep_zeros=None)
    law(load.load(bench / "sparse"), found.model)
    assert found.healing["zeros"] and found.healing["rank"] == 4


def test_a_zero_that_was_filled_is_not_written(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: keep_zeros.ZeroKeeper, model: Any) -> None:
        self.masks, self.kept = {}, {}

    monkeypatch.setattr(keep_zeros.ZeroKeeper, "__init__", broken)
    with pytest.raises(BillhookError, match=r"zeros of .* were filled in training: nothing is written"):
        recover(bench)
