"""Train a demo model.

    python -m smelt.models.demo.train --size demo
    python -m smelt.models.demo.train --size draft

The data is generated on the fly and depends on the seed and the step only, so a run that was
stopped (by `--minutes` or by hand) goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from .data import BOS, END, packed_batch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """The shape of a model and how it is trained."""

    folder: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    cycles: tuple[int, ...]
    peak_rate: float
    tokens_per_step: int = 2048
    warm_up: int = 100
    decay_share: float = 1 / 3
    weight_decay: float = 0.1
    prompt_weight: float = 0.1

    @property
    def steps(self) -> int:
        """Steps in all: where the last cycle of the learning rate ends."""
        return self.cycles[-1]


RECIPES = {
    "demo": Recipe("smelt-demo", 256, 640, 5, 4, 2, cycles=(5400, 7200), peak_rate=4e-3),
    "draft": Recipe("smelt-demo-draft", 128, 384, 2, 2, 1, cycles=(9000,), peak_rate=4e-3),
}


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A freshly initialised model."""
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate: in each cycle a warm-up, a plateau, and a fall to zero at its end.

    A cycle more is how a finished model is trained further.
    """
    start = max((end for end in recipe.cycles if end <= step), default=0)
    end = min(end for end in recipe.cycles if end > step)
    left = (end - step) / (recipe.decay_share * (end - start))
    return recipe.peak_rate * min(1.0, (step - start + 1) / recipe.warm_up, left)


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    In short trials Muon took about half as many steps as AdamW, for a fifth more time per step.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() > 1]
    inner = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.peak_rate,
            momentum=0.95,
            weight_decay=recipe.weight_decay,
            # Scales the updates so that one learning rate suits both optimizers.
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Save the model in bfloat16 as an ordinary model folder."""
    rounded = copy.deepcopy(model).bfloat16()
    config = rounded.config
    rounded.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id],
        pad_token_id=config.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    rounded.save_pretrained(folder)


def train(recipe: Recipe, run: Path, folder: Path, minutes: float | None, seed: int = 0) -> None:
    """Train to the end of the recipe, or for `minutes`; the state in `run` lets it go on later."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = make_model(recipe, tokenizer)
    optimizers = make_optimizers(model, recipe)
    run.mkdir(parents=True, exist_ok=True)
    state_file = run / "state.pt"
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "seconds": spent,
        }
        part = state_file.with_suffix(".part")
        torch.save(state, part)
        part.replace(state_file)
        export(model, folder)

    print(f"{sum(p.numel() for p in model.parameters())} parameters, from step {step}", flush=True)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    mark, shown = time.monotonic(), 0.0
    while step < recipe.steps and (deadline is None or time.monotonic() < deadline):
        # Every fourth step takes longer rows, so that all positions of the context are trained.
        length = 512 if step % 4 == 3 else 256
        rows = recipe.tokens_per_step // length
        batch = packed_batch(tokenizer, f"{seed} {step}", rows, length, recipe.prompt_weight)
        ids, weights = torch.tensor(batch.ids), torch.tensor(batch.weights)[:, 1:].flatten()
        rate = rate_at(step, recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        answers = weights == 1.0
        shown += (losses.detach()[answers].mean().item() - shown) / (1 + (step - 1) % 50)
        now = time.monotonic()
        spent, mark = spent + now - mark, now
        if step % 50 == 0:
            prompts = losses.detach()[~answers].mean().item()
            print(
                f"step {step} answers {shown:.4f} prompts {prompts:.3f} {spent:.0f} s", flush=True
            )
            shown = 0.0
        if step % 250 == 0:
            save()
    save()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train a demo model.")
    parser.add_argument("--size", choices=sorted(RECIPES), required=True)
    parser.add_argument("--minutes", type=float, help="stop after this time; resume by rerunning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path, help="folder of the state; default: build/<model>")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.size]
    run = args.run or Path("build") / recipe.folder
    train(recipe, run, HERE / recipe.folder, args.minutes)


if __name__ == "__main__":
    main()
