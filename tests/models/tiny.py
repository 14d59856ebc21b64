"""Tiny random towers, and folders of them as other tools leave them."""

from pathlib import Path
from typing import Any

import torch

SENTENCE = "the heart is enlarged normal no pleural effusion lungs are clear left right of size case"
WORDS = SENTENCE.split()

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "max_position_embeddings": 48,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES | {"pad_token_id": 1},
    "modernbert": SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    "t5": {"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "d_kv": 8, "pad_token_id": 0},
    "llama": SIZES | {"num_key_value_heads": 1},
    "qwen2": SIZES | {"num_key_value_heads": 1},
    "gpt2": {
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 48,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}
VIT = {"timm_model_name": "test_vit", "image_size": 32, "timm_pool": "avg"}
RESNET = {"timm_model_name": "test_resnet", "image_size": 32}
CONVNEXT = {"timm_model_name": "test_convnext", "image_size": 32}
CLIP_VIT = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 12, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}


def spec(vision: dict[str, Any] = CLIP_VIT, text: dict[str, Any] = TEXT) -> dict[str, Any]:
    return {"embed_dim": 8, "vision_cfg": dict(vision), "text_cfg": dict(text)}


def hf_text(family: str, **settings: Any) -> dict[str, Any]:
    """A `text_cfg` of a tiny transformer."""
    return {"context_length": 12, "hf_config": {"model_type": family} | FAMILIES[family]} | settings


def save_tokenizer(folder: Path, pad: str | None = "[PAD]", side: str = "right") -> Path:
    """A tokenizer of whole words, of thirty tokens and those that are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*special, *WORDS, ".", *"0123456789"])}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token=pad,
        padding_side=side,
    )
    wrapped.save_pretrained(str(folder))
    return folder


def save_transformer(folder: Path, family: str = "bert", seed: int = 1, head: bool = False, **settings: Any) -> Path:
    """A folder of transformers with config, weights and tokenizer; `head` saves the model with its language head, as
    most are."""
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForMaskedLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**FAMILIES[family] | settings)
    (AutoModelForMaskedLM if head else AutoModel).from_config(config).save_pretrained(folder)
    return save_tokenizer(folder)


def ids_of(length: int, rows: int = 3, seed: int = 0) -> torch.Tensor:
    """Token ids without padding."""
    return torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def pixels(rows: int = 2, channels: int = 1, size: int = 32) -> torch.Tensor:
    shape = (rows, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
