"""The models that small checks train: packaged ones by name, and a small Llama of our own.

`scratch`: 4 blocks of width 192, one token a byte, 1.9 million parameters, random weights of the cell's seed, which is what optimizers
start from. `tiny`: the same model after 400 steps of AdamW on `lm/tinyshakespeare`, made once in the folder of the cells; its weights
were never in 4 bits, unlike those of the packaged SmolLM2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import FileLock

WIDTH, BLOCKS = 192, 4
#: bases that are made here, with a width and blocks of their own
OWN = ("scratch", "tiny")


def characters() -> Any:
    """A tokenizer of one token a byte, with a padding token and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "<end>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def small_llama(vocabulary: int, seed: int, width: int = WIDTH, blocks: int = BLOCKS) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, width // 48)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3 // 16 * 16, num_hidden_layers=blocks,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, pad_token_id=0, bos_token_id=None,
            eos_token_id=1, tie_word_embeddings=False)).eval()


def base_folder(name: str, folder: Path, seed: int, *, width: int = WIDTH, blocks: int = BLOCKS, steps: int = 400) -> str:
    """What a recipe names as its model: a packaged name as it is, else the folder of the small model, made where it is not there yet."""
    if name not in OWN:
        return name
    from ..modeling.gguf_import import quiet_transformers

    folder.mkdir(parents=True, exist_ok=True)
    place = folder / (f"scratch-{width}x{blocks}-seed{seed}" if name == "scratch" else f"tiny-{width}x{blocks}-{steps}")
    with FileLock(folder / f".{place.name}.lock", timeout=None, what=f"the model in {place}"):
        if not (place / "config.json").exists():
            start = place if name == "scratch" else folder / f"start-{width}x{blocks}"
            tokenizer = characters()
            with quiet_transformers():
                tokenizer.save_pretrained(start)
                small_llama(len(tokenizer), seed if name == "scratch" else 0, width, blocks).save_pretrained(start)
            if name == "tiny":
                _train(start, place, folder, steps)
    return str(place)


def _train(start: Path, place: Path, folder: Path, steps: int) -> None:
    import shutil

    from ..training.run import train_recipe
    from .tasks import splits, task_of, write_split

    text = write_split(folder / "tiny.train.jsonl", splits(task_of("shakespeare"), 128)["train"], 10_000)
    made = train_recipe({"model": str(start), "adapter": None, "optimizer": {"method": "adamw", "lr": 1e-3},
                         "data": {"train": str(text), "format": "text", "max_length": 128},
                         "train": {"max_steps": steps, "batch_size": 8, "precision": "fp32", "warmup": 0.1, "save_steps": 0},
                         "output_dir": str(folder / f"{place.name}-run")}, quiet=True, overwrite=True, measure=False)
    characters().save_pretrained(place)
    shutil.copytree(made.graft, place, dirs_exist_ok=True)
