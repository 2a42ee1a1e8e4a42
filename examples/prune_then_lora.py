"""Prune, then train adapters with peft: what billhook makes is an ordinary model.

    python examples/prune_then_lora.py [MODEL] [TEXT] [OUT]

TEXT is a text file, or demo.  This is the loop that one writes oneself, for a task of one's own; `billhook recover`
trains by distillation from the unpruned model, with a schedule, checkpoints and held-out text, adapters among them
(--trainable lora).
"""

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import billhook
from billhook import data


def main(model: str = "demo", text: str = "demo", out: str = "adapted", *, steps: int = 40, **settings: Any) -> None:
    result = billhook.prune(model, calibration=text, **{"ratio": 0.2, "samples": 16, **settings})
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    student = get_peft_model(result.model, config)
    student.print_trainable_parameters()

    length = settings.get("seq_len", 512)
    windows = data.windows(data.calibration_text(text), result.tokenizer, length, steps, seed=1).tokens
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-3)
    student.train()
    for step, window in enumerate(windows):
        loss = student(window[None], labels=window[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")

    student.eval().merge_and_unload().save_pretrained(out)
    result.tokenizer.save_pretrained(out)
    print(f"saved to {out}: adapters merged, {result.model.num_parameters():,} parameters as before")


if __name__ == "__main__":
    main(*sys.argv[1:])
