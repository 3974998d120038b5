"""Small tokenizers of the real classes, trained here: with and without a start token, offsets, and bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

TEXTS = [
    "The answer is: yes or no, and nothing else.",
    "What is a kite? A thing that flies in the wind, as an oak does not.",
    "user asks and assistant answers; system says nothing at all.",
    "1 2 3 4 5 6 7 8 9 0 é 日本語 x y z A B C",
] * 10
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _trained(special: list[str], metaspace: bool, size: int = 420) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over TEXTS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False)
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    state = json.loads(backend.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def llama() -> Any:
    """SentencePiece's way: a space is in front of a text, bytes where a character is not known, <s> at the start."""
    vocabulary, merges = _trained(["<unk>", "<s>", "</s>", *BYTES], metaspace=True)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def gemma() -> Any:
    vocabulary, merges = _trained(["<pad>", "<eos>", "<bos>", "<unk>", *BYTES], metaspace=True)
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def unigram() -> Any:
    """A SentencePiece Unigram model, without bytes: what it has not seen is <unk>."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt2() -> Any:
    vocabulary, merges = _trained(["<|endoftext|>"], metaspace=False)
    return GPT2Tokenizer(vocab=vocabulary, merges=merges)


def qwen2() -> Any:
    vocabulary, merges = _trained(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], metaspace=False)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


def byt5() -> Any:
    """Without offsets, and without a file of a vocabulary."""
    return ByT5Tokenizer()


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": llama, "gemma": gemma, "unigram": unigram, "gpt2": gpt2, "qwen2": qwen2, "byt5": byt5,
}  # fmt: skip


def saved(name: str, folder: Path) -> Any:
    """As a checkpoint has it: written to a folder, and read by the class that is found for it."""
    MAKERS[name]().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
