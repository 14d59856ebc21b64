"""Prompt learning on frozen towers: context vectors in the space of the text tower's token embeddings.

CoOp (Zhou et al., IJCV 2022) learns the words around a class name; for labels that are judged each on their own there
are two contexts, one for presence and one for absence, shared by all labels (DualCoOp, Sun et al., NeurIPS 2022). The
towers stay as they are: only `2 x context x width` numbers are learned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab import progress
from medclip_lab.errors import UserError
from medclip_lab.evaluation.gather import Labelled, refuse_shared_patients
from medclip_lab.evaluation.metrics import Floats, auroc
from medclip_lab.inference.encoder import Encoder


@dataclass(frozen=True)
class PromptLearning:
    """How contexts are learned."""

    context: int = 4
    """Number of learned vectors before a label's name."""
    steps: int = 100
    lr: float = 0.01
    batch_size: int = 256
    check_every: int = 10
    """Steps between two looks at the validation patients; the best contexts are kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.context, self.steps, self.batch_size, self.check_every) < 1 or self.lr <= 0:
            raise ValueError("prompt learning: context, steps, lr, batch_size and check_every must be positive")


class LearnedPrompts:
    """Two learned contexts, and the prompts that they make of label names."""

    def __init__(self, encoder: Encoder, names: list[str], context: int, seed: int) -> None:
        self.encoder, self.names = encoder, names
        self.embedding = _token_embedding(encoder)
        self.ids, self.start = _with_room(encoder, names, context)
        width = self.embedding.weight.shape[1]
        spread = float(self.embedding.weight.detach().std())
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.Parameter(
            (torch.randn(2, context, width, generator=generator) * spread).to(self.embedding.weight)
        )

    def features(self) -> tuple[Tensor, Tensor]:
        """Unit-norm features [K, D] of the prompts for presence and for absence, with a gradient to the contexts."""
        made = []
        for vectors in self.vectors:
            with self._context(vectors):
                made.append(self.encoder.model.encode_text(self.ids))
        return made[0], made[1]

    @torch.no_grad()
    def scores(self, image_features: Floats) -> Floats:
        """[N, K] differences of the scaled cosines to both prompts."""
        return self.logits(torch.from_numpy(image_features)).cpu().double().numpy()

    def logits(self, image_features: Tensor) -> Tensor:
        present, absent = self.features()
        images = image_features.to(present)
        return self.encoder.model.logit_scale.detach() * images @ (present - absent).T

    @contextmanager
    def _context(self, vectors: Tensor) -> Iterator[None]:
        """The text tower reads the vectors where the ids hold places for them."""
        stop = self.start + len(vectors)

        def put(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            middle = vectors.expand(len(output), -1, -1).to(output)
            return torch.cat([output[:, : self.start], middle, output[:, stop:]], dim=1)

        handle = self.embedding.register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()


def learn_prompts(
    encoder: Encoder, train: Labelled, val: Labelled, test: Labelled, config: PromptLearning | None = None
) -> tuple[LearnedPrompts, dict[str, Any]]:
    """Learn contexts on the features of the training patients; AUROC by label on the test patients.

    Binary cross-entropy over the labels that say something; the contexts with the best mean AUROC on the validation
    patients are kept. No weight of the model changes.

    Raises:
        UserError: a text tower without token embeddings of its own, names too long for its context, shared patients,
            or no label with both classes to learn and to choose by.
    """
    config = config or PromptLearning()
    refuse_shared_patients(train=train, val=val, test=test)
    columns = [column for column in range(len(train.names)) if not train.lacks(column) and not val.lacks(column)]
    if not columns:
        raise UserError("prompt learning: no label has both classes in train and in val")
    prompts = LearnedPrompts(encoder, [train.names[column] for column in columns], config.context, config.seed)
    wanted = {name: parameter.requires_grad for name, parameter in encoder.model.named_parameters()}
    encoder.model.requires_grad_(False)
    try:
        _descend(prompts, train, val, columns, config)
    finally:
        for name, parameter in encoder.model.named_parameters():
            parameter.requires_grad_(wanted[name])
    found = dict(zip(columns, _aurocs(prompts, test, columns), strict=True))
    labels = [
        {"name": name, "auroc": found.get(column)}
        | ({} if found.get(column) is not None else {"reason": _reason(train, val, test, column)})
        for column, name in enumerate(train.names)
    ]
    measured = [value for value in found.values() if value is not None]
    macro = {"auroc": float(np.mean(measured)) if measured else None, "labels": len(measured)}
    return prompts, {"labels": labels, "macro": macro, "context": config.context, "steps": config.steps}


def _descend(
    prompts: LearnedPrompts, train: Labelled, val: Labelled, columns: list[int], config: PromptLearning
) -> None:
    optimizer = torch.optim.Adam([prompts.vectors], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    images = torch.from_numpy(train.features)
    targets = torch.from_numpy(train.positive[:, columns]).float()
    used = torch.from_numpy(train.used[:, columns]).float()
    rng = np.random.default_rng(config.seed)
    best, kept = _mean(_aurocs(prompts, val, columns)), prompts.vectors.detach().clone()
    for step in progress.track(range(1, config.steps + 1), "prompt learning", config.steps):
        rows = torch.from_numpy(rng.permutation(len(images))[: config.batch_size])
        logits = prompts.logits(images[rows])
        weight = used[rows].to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, targets[rows].to(logits), reduction="none")
        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % config.check_every == 0 or step == config.steps:
            value = _mean(_aurocs(prompts, val, columns))
            if value > best:
                best, kept = value, prompts.vectors.detach().clone()
    with torch.no_grad():
        prompts.vectors.copy_(kept)


def _aurocs(prompts: LearnedPrompts, data: Labelled, columns: list[int]) -> list[float | None]:
    scores = prompts.scores(data.features)
    values: list[float | None] = []
    for number, column in enumerate(columns):
        used = data.used[:, column]
        lacks = data.lacks(column)
        values.append(None if lacks else auroc(scores[used, number], data.positive[used, column]))
    return values


def _mean(values: list[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _reason(train: Labelled, val: Labelled, test: Labelled, column: int) -> str:
    parts = (("train", train), ("val", val), ("test", test))
    return next(f"{name}: {lack}" for name, part in parts if (lack := part.lacks(column)))


def _token_embedding(encoder: Encoder) -> nn.Embedding:
    """The table of token embeddings of the text tower, open_clip's own or a Hugging Face one inside."""
    model: Any = getattr(encoder.model, "model", None)
    text: Any = getattr(model, "text", model)
    found = getattr(text, "token_embedding", None)
    if found is None and hasattr(getattr(text, "transformer", None), "get_input_embeddings"):
        found = text.transformer.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise UserError("prompt learning: this model's text tower has no table of token embeddings to write into")
    return found


def _with_room(encoder: Encoder, names: list[str], context: int) -> tuple[Tensor, int]:
    """Ids [K, L] of the names with `context` places before their words, and where the places begin."""
    device = encoder.model.mean.device
    ids: Tensor = encoder.tokenizer([f"{name}." for name in names]).to(device)
    probe = encoder.tokenizer(["lung", "heart"])
    start = 1 if int(probe[0, 0]) == int(probe[1, 0]) else 0  # a start token is the same before every word
    empty: Tensor = encoder.tokenizer([""])[0]
    fill = int(empty[-1])
    tail = ids[:, ids.shape[1] - context :]
    if context >= ids.shape[1] - start or bool((tail != fill).any()):
        raise UserError(
            f"prompt learning: {context} context vectors and the longest label do not fit the text tower's context of "
            f"{ids.shape[1]} tokens: take fewer"
        )
    places = ids[:, start : start + 1].expand(-1, context)  # any word: what stands here is never read
    return torch.cat([ids[:, :start], places, ids[:, start : ids.shape[1] - context]], dim=1), start
