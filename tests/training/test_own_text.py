"""Text that a model writes itself: how it begins, how long it is, and where it stands among other text."""

import tiny
import torch
import transformers as T

from billhook.training.own_text import BEGUN, among, chat_start, own_windows

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def chatting(around: str = "$A") -> T.PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer(around)
    tokenizer.chat_template = CHAT
    return tokenizer


def test_windows_go_on_from_text_and_from_the_chat_template() -> None:
    model, tokenizer, begun = tiny.model("llama"), chatting(), tiny.tokens(5, 24)
    written = own_windows(model, tokenizer, begun, seed=3)
    start = torch.tensor(chat_start(tokenizer))
    assert tokenizer.decode(start) == "<s>user: "
    assert written.shape == begun.shape and written.dtype == torch.long
    assert torch.equal(written[::2, :BEGUN], begun[::2, :BEGUN])
    assert torch.equal(written[1::2, : len(start)], start.expand(2, -1))
    assert not torch.equal(written[:, -8:], begun[:, -8:])
    assert len({tuple(row) for row in written.tolist()}) == 5  # two that begin alike go on apart


def test_a_model_without_a_chat_template_goes_on_from_text_alone() -> None:
    begun = tiny.tokens(3, 24)
    written = own_windows(tiny.model("llama"), tiny.tokenizer(), begun, seed=3)
    assert torch.equal(written[:, :BEGUN], begun[:, :BEGUN])


def test_the_seed_decides_what_is_written() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (own_windows(tiny.model("llama"), chatting(), tiny.tokens(3, 24), n) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_begins_as_the_tokenizer_begins_texts() -> None:
    begun = chatting("<s> $A")
    plain = chatting("<s> $A")
    plain.chat_template = CHAT.replace("<s>", "")
    assert chat_start(begun) == chat_start(plain) and chat_start(plain).count(256) == 1 and chat_start(plain)[0] == 256


def test_own_text_is_spread_among_the_first_windows() -> None:
    windows, own = torch.arange(12)[:, None].expand(-1, 4), torch.full((4, 4), -1)
    mixed = among(windows, own)
    assert mixed[:, 0].tolist() == [-1, 0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7]
    assert torch.equal(among(windows, own[:0]), windows)
