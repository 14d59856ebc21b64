"""Tokenizers: the one a model spec names, a folder, or a small one trained on the reports at hand."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from medclip_lab.errors import UserError

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
FILES = ("tokenizer.json", "tokenizer_config.json")

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to int64 ids [B, context_length], padded and truncated, as open_clip's tokenizers do."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Train a lower-casing byte-level BPE on `texts` and write it to `folder` as Hugging Face files.

    Byte level: no report, whatever its language or its typing errors, has unknown tokens.

    Returns:
        The size of the vocabulary, at most `vocab_size`.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = Model(models.BPE(unk_token=UNK))
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS, padding_side="right"
    )
    wrapped.save_pretrained(str(folder))
    return len(wrapped)


def load_tokenizer(folder: str | Path, context_length: int, **options: Any) -> Any:
    """The tokenizer whose files lie in `folder`: a `Tokenizer` that can `save_pretrained`, and pads on the right.

    It is open_clip's own wrapper, so that ids are the same there.

    Args:
        options: of transformers' tokenizer, `text_cfg.tokenizer_kwargs` in a model config.

    Raises:
        UserError: there is none.
    """
    from open_clip.tokenizer import HFTokenizer

    # Loader processes are forked after the tokenizer was used; its threads would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = HFTokenizer(str(folder), context_length=context_length, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.tokenizer: no tokenizer in {folder}: {first}") from None
    words = tokenizer.tokenizer
    words.padding_side = "right"  # a text model's first word is where it was in pretraining
    if words.pad_token is None:  # those of generators have none
        words.pad_token = words.eos_token
    return tokenizer


def token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text as `tokenizer`, one of open_clip's, would have it if there was no end to its context."""
    words = getattr(tokenizer, "tokenizer", None)
    if words is None:  # CLIP's own
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    return [len(ids) for ids in words([tokenizer.clean_fn(text) for text in texts], verbose=False).input_ids]
