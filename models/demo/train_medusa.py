"""Train Medusa heads for a demo model (Cai et al. 2024, arXiv:2401.10774, section 2.2.1).

    python -m smelt.models.demo.train_medusa --heads 3

The model is frozen; head i learns the token i + 2 places behind each hidden row of generated chats.
All heads share the model's output layer, so that a head is only its residual blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from .data import packed_batch

HERE = Path(__file__).parent
PEAK_RATE, WARM_UP, TOKENS_PER_STEP, PROMPT_WEIGHT = 3e-3, 50, 2048, 0.1
HEAD_DECAY = 0.8  # of a head's loss to that of the one before it, as in the paper


class Block(nn.Module):
    """x + silu(linear(x)); it begins as the identity, so a head begins as the output layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.silu(self.linear(x))


def make_heads(hidden: int, heads: int, layers: int) -> nn.ModuleList:
    """Heads whose state has the names of the authors' checkpoints: `i.j.linear.weight`."""
    return nn.ModuleList(
        nn.Sequential(*(Block(hidden) for _ in range(layers))) for _ in range(heads)
    )


def losses(
    model: LlamaForCausalLM, heads: nn.ModuleList, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """The weighted loss of ids [B, T], and of each head how often it is right on answers."""
    with torch.no_grad():
        rows = model.model(input_ids=ids, use_cache=False).last_hidden_state
    total, right = torch.zeros(()), []
    for i, head in enumerate(heads):
        ahead = i + 2
        targets, weight = ids[:, ahead:], weights[:, ahead:]
        logits = functional.linear(head(rows[:, :-ahead]), model.lm_head.weight).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        total = total + HEAD_DECAY**i * loss
        answers = weight == 1.0
        right.append((logits.argmax(-1) == targets)[answers].float().mean().item())
    return total, right


def train(folder: Path, out: Path, count: int, layers: int, steps: int, seed: int = 0) -> None:
    """Train heads for the model in `folder` and write them to `out`, in bfloat16."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    heads = make_heads(model.config.hidden_size, count, layers)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=PEAK_RATE, weight_decay=0.0)
    began, shown = time.monotonic(), [0.0] * count
    for step in range(steps):
        length = 256
        batch = packed_batch(
            tokenizer, f"medusa {seed} {step}", TOKENS_PER_STEP // length, length, PROMPT_WEIGHT
        )
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP, 2 * (steps - step) / steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, right = losses(model, heads, torch.tensor(batch.ids), torch.tensor(batch.weights))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        shown = [s + (r - s) / (1 + step % 50) for s, r in zip(shown, right, strict=True)]
        if step % 50 == 49 or step == steps - 1:
            said = ", ".join(f"{r:.1%}" for r in shown)
            print(f"step {step + 1} right {said} {time.monotonic() - began:.0f} s", flush=True)
    write(heads, out, layers, folder.name)


def write(heads: nn.ModuleList, out: Path, layers: int, base: str) -> None:
    """A folder as the authors' checkpoints have it; what is shared with the model is left out."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": base,
        "medusa_num_heads": len(heads),
        "medusa_num_layers": layers,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.bfloat16().contiguous() for name, value in heads.state_dict().items()}
    save_file(state, out / "medusa_lm_head.safetensors")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train Medusa heads for a demo model.")
    parser.add_argument("--model", type=Path, default=HERE / "smelt-demo")
    parser.add_argument("--out", type=Path, help="default: the model's folder with -medusa")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1, help="residual blocks of a head")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or args.model.with_name(f"{args.model.name}-medusa")
    train(args.model, out, args.heads, args.layers, args.steps)


if __name__ == "__main__":
    main()
