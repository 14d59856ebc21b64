import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medclip_lab.data.augment import AugmentConfig
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.pipeline import (
    BatchStream,
    DataConfig,
    SourceConfig,
    loader,
    open_files,
    steps_once,
    steps_per_epoch,
)
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.data.sample import Sample
from medclip_lab.data.shards import write_shards
from medclip_lab.data.text import TextConfig
from medclip_lab.errors import UserError

from ..conftest import png, toy_samples


def tokenizer(texts: list[str]) -> Tensor:
    """Texts told apart by the sum of their characters."""
    return torch.tensor([[sum(map(ord, text)), len(text)] for text in texts])


def config(shards: Path | str, **changes: Any) -> DataConfig:
    defaults: dict[str, Any] = {
        "sources": {"toy": SourceConfig(str(shards))},
        "batch_size": 8,
        "preprocess": PreprocessConfig(size=32),
        "workers": 0,
        "shuffle_size": 50,
    }
    return DataConfig(**(defaults | changes))


def stream(data: DataConfig, steps: int = 12, **options: Any) -> BatchStream:
    return BatchStream(data, tokenizer, steps, **options)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(value, second[name], equal_nan=True) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_batches_are_what_they_say(toy_shards: Manifest) -> None:
    batch = next(iter(stream(config(toy_shards.folder))))
    assert batch["image"].shape == (8, 1, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["text"].shape == (8, 2)
    assert batch["image_labels"].shape == batch["text_labels"].shape == (8, 14)
    assert batch["image_id"] == batch["text_id"]
    bright = batch["image"].float().mean((1, 2, 3)) > 0.4 * 255
    assert (bright.float() == batch["image_labels"][:, 2]).all(), "image and labels are of the same study"
    assert batch["image_labels"][:, 5].isnan().all(), "what is not mentioned is NaN, not 0"


def test_two_views_of_the_texts(toy_shards: Manifest) -> None:
    def draw(views: int, **options: Any) -> dict[str, Any]:
        text = TextConfig(report=1, impression=1, findings=1, views=views)
        return next(iter(stream(config(toy_shards.folder, text=text, **options))))

    one, two = draw(1), draw(2)
    assert "second_text" not in one
    second = two.pop("second_text")
    assert same(one, two), "the first view is the text that one view draws"
    assert second.shape == two["text"].shape
    assert 0 < (second != two["text"]).any(1).sum() < 8
    texts = {sample.study_id: [sample.text, *sample.sections.values()] for sample in toy_samples()}
    for name, ids in zip(two["text_id"], second, strict=True):
        assert ids.tolist() in tokenizer(texts[name]).tolist(), "a text of the same study"
    moved = draw(2, control="shuffled_pairs")
    pairs = {(tuple(a), tuple(b)) for a, b in zip(two["text"].tolist(), second.tolist(), strict=True)}
    assert {
        (tuple(a), tuple(b)) for a, b in zip(moved["text"].tolist(), moved["second_text"].tolist(), strict=True)
    } == (pairs), "the views of a study stay together"
    data = config(toy_shards.folder, text=TextConfig(views=2))
    quiet = next(iter(stream(data, steps=1, training=False)))
    assert (quiet["text"] == quiet["second_text"]).all()


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The batches of all ranks as one."""
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(value, Tensor)
        else [identifier for part in parts for identifier in part[name]]
        for name, value in parts[0].items()
    }


AUGMENT = AugmentConfig(degrees=5, contrast=0.2)
TEXT = TextConfig(report=1, sentence=1, impression=1)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_the_same_on_any_number_of_ranks_and_workers(
    toy_shards: Manifest, world: int, workers: int
) -> None:
    data = config(toy_shards.folder, augment=AUGMENT, text=TEXT, lanes=4)
    expected = list(stream(data, start=3))
    assert len(expected) == 9
    data = config(toy_shards.folder, augment=AUGMENT, text=TEXT, lanes=4, workers=workers)
    ranks = [list(loader(stream(data, start=3, rank=rank, world_size=world))) for rank in range(world)]
    for parts, batch in zip(zip(*ranks, strict=True), expected, strict=True):
        assert same(joined(list(parts)), batch)


def test_a_resume_at_any_step_on_other_ranks_goes_on_as_if_nothing_had_been(toy_shards: Manifest) -> None:
    """Across the border of an epoch too: one has eleven steps here."""
    data = config(toy_shards.folder, text=TEXT, shuffle_size=20)
    whole = list(stream(data, steps=25))
    for start in range(25):
        world = (1, 2, 4)[start % 3]
        ranks = [list(stream(data, 25, start=start, rank=rank, world_size=world)) for rank in range(world)]
        for parts, batch in zip(zip(*ranks, strict=True), whole[start:], strict=True):
            assert same(joined(list(parts)), batch)


def test_epochs_and_seeds_differ_and_an_epoch_is_a_permutation(toy_shards: Manifest) -> None:
    data = config(toy_shards.folder, batch_size=2)
    steps = toy_shards.count("train") // 2
    ids = [study for batch in stream(data, steps=2 * steps) for study in batch["image_id"]]
    first, second = ids[: 2 * steps], ids[2 * steps :]
    assert len(set(first)) == len(first) == toy_shards.count("train")
    assert sorted(first) == sorted(second)
    assert first != second
    other = [study for batch in stream(data, steps=steps, seed=1) for study in batch["image_id"]]
    assert sorted(other) == sorted(first)
    assert other != first


def test_validation_is_in_order_and_unchanged(toy_shards: Manifest) -> None:
    data = config(toy_shards.folder, sources={"toy": SourceConfig(str(toy_shards.folder), "val")}, batch_size=5)
    data.augment = AugmentConfig(degrees=90)
    batches = list(stream(data, steps=6, training=False))
    ids = [study for batch in batches for study in batch["image_id"]]
    assert ids == sorted(ids, key=lambda study: int(study.split("-")[1]))
    assert len(ids) == toy_shards.count("val")


def test_shuffled_pairs_keep_no_pair(toy_shards: Manifest) -> None:
    true = next(iter(stream(config(toy_shards.folder))))
    control = next(iter(stream(config(toy_shards.folder, control="shuffled_pairs"))))
    assert torch.equal(true["image"], control["image"])
    assert sorted(true["text"].tolist()) == sorted(control["text"].tolist())
    assert not (true["text"] == control["text"]).all(1).any()


def texts_only(number: int, split: str = "train") -> Iterator[Sample]:
    for i in range(number):
        rare = i % 20 == 0
        labels = {"Pneumonia": 1} if rare else {"No Finding": 1}
        text = "Pneumonia." if rare else "Normal."
        sentences = [{"text": text, "labels": labels}, {"text": "Second sentence.", "labels": {}}]
        yield Sample(
            study_id=f"r{i}", patient_id=f"r{i}", split=split, text=text, labels=dict(labels), sentences=sentences
        )


def images_only(number: int) -> Iterator[Sample]:
    for sample in toy_samples(number):
        yield Sample(
            study_id=sample.study_id,
            patient_id=sample.patient_id,
            split="train",
            images=sample.images,
            labels=sample.labels,
        )


@pytest.fixture
def unpaired(tmp_path: Path) -> dict[str, SourceConfig]:
    write_shards(images_only(40), tmp_path / "images", "i", 10)
    write_shards(texts_only(200), tmp_path / "texts", "t", 50)
    return {"images": SourceConfig(str(tmp_path / "images")), "texts": SourceConfig(str(tmp_path / "texts"), weight=3)}


def test_unpaired_sources_share_a_batch(unpaired: dict[str, SourceConfig]) -> None:
    for batch in stream(config("", sources=unpaired), steps=8):
        assert len(batch["image"]) == len(batch["image_labels"]) == len(batch["image_id"]) == 2
        assert len(batch["text"]) == len(batch["text_labels"]) == len(batch["text_id"]) == 6


def test_balance_favours_rare_labels(unpaired: dict[str, SourceConfig]) -> None:
    def share(balance: float) -> float:
        unpaired["texts"].balance = balance
        data = config("", sources=unpaired, text=TextConfig(report=0, sentence=1))
        labels = torch.cat([batch["text_labels"] for batch in stream(data, steps=150)])
        return float((labels[:, 7] == 1).float().mean())

    assert share(0.0) == pytest.approx(0.025, abs=0.02)  # every twentieth report, every second sentence
    assert share(1.0) > 0.3


def test_denials_are_read_less_often_and_no_sentence_twice(tmp_path: Path) -> None:
    sentences = [
        {"text": "No pneumonia.", "labels": {"Pneumonia": 0}},
        {"text": "Cardiomegaly, no edema.", "labels": {"Cardiomegaly": 1, "Edema": 0}},
        {"text": "PA view.", "labels": {}},
    ]
    samples = [
        Sample(study_id=f"r{i}", patient_id=f"r{i}", split="train", text="Report.", sentences=sentences)
        for i in range(20)
    ]
    write_shards(samples, tmp_path, "t", 20)
    drawn: dict[float, Counter[int]] = {}
    for denials in (1.0, 0.1):
        text = TextConfig(report=0, sentence=1, sentences=2, denials=denials)
        data = config(tmp_path, text=text)
        drawn[denials] = Counter(int(ids[1]) for batch in stream(data, steps=400) for ids in batch["text"])
    lengths = {len(sentence["text"]) for sentence in sentences}
    pairs = {first + second + 1 for first in lengths for second in lengths if first != second}
    assert set(drawn[1.0]) == lengths | pairs, "no sentence stands twice in a text"

    def share_of_denial_among_single_sentences(counts: Counter[int]) -> float:
        return counts[len("No pneumonia.")] / sum(counts[length] for length in lengths)

    assert share_of_denial_among_single_sentences(drawn[1.0]) == pytest.approx(1 / 3, abs=0.04)
    assert share_of_denial_among_single_sentences(drawn[0.1]) == pytest.approx(0.1 / 2.1, abs=0.02)


def test_sentence_labels_are_those_of_the_sentence(unpaired: dict[str, SourceConfig]) -> None:
    data = config("", sources=unpaired, text=TextConfig(report=0, sentence=1))
    for batch in stream(data, steps=5):
        for ids, labels in zip(batch["text"], batch["text_labels"], strict=True):
            if ids[1] == len("Second sentence."):
                assert labels.isnan().all()
            else:
                assert (labels == 1).sum() == 1


@pytest.mark.parametrize("training", [True, False])
def test_unreadable_images_are_listed_and_in_training_stood_in_for(tmp_path: Path, training: bool) -> None:
    samples = list(toy_samples(300))
    bad = [sample for sample in samples if sample.split == "train"][5]
    bad.images = [("png", png(torch.zeros(4, 4, dtype=torch.uint8).numpy())[:30])]
    write_shards(samples, tmp_path / "s", "toy", 50)
    data = config(tmp_path / "s", batch_size=60)
    reader = stream(data, steps=3, training=training, quarantine_path=tmp_path / "quarantine.jsonl")
    batches = list(reader)
    assert [len(batch["image"]) for batch in batches] == ([60] * 3 if training else [59, 60, 60])
    assert all(batch["image_id"] == batch["text_id"] for batch in batches)
    seen = Counter(study for batch in batches for study in batch["image_id"])
    assert bad.study_id not in seen
    assert len(seen) == 179, "every other study came"
    assert reader.quarantines["toy"].causes == {"unreadable image": 1}
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (line["source"], line["key"]) == ("toy", bad.key)


def test_another_image_of_the_study_serves_before_another_study(tmp_path: Path) -> None:
    samples = [sample for sample in toy_samples(40) if sample.split == "train"]
    for sample in samples:
        sample.images = [("png", b"no image"), *sample.images]
    write_shards(samples, tmp_path / "s", "toy", 50)
    data = config(tmp_path / "s", batch_size=len(samples), max_bad=1.0)
    batch = next(iter(stream(data)))
    assert sorted(batch["image_id"]) == sorted(sample.study_id for sample in samples)


def test_a_study_that_stands_in_is_the_same_on_any_rank(tmp_path: Path) -> None:
    samples = list(toy_samples(100))
    for sample in samples[::7]:
        sample.images = [("png", b"no image")]
    write_shards(samples, tmp_path / "s", "toy", 10)
    data = config(tmp_path / "s", max_bad=1.0)
    whole = [batch["image_id"] for batch in stream(data)]
    halves = [[batch["image_id"] for batch in stream(data, rank=rank, world_size=2)] for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_the_ceiling_is_that_of_what_a_process_meets(tmp_path: Path) -> None:
    """Two bad samples of a hundred pass a ceiling of 2 %; four loader processes meet both in the end, and must not stop
    for being a quarter each."""
    samples = [sample for sample in toy_samples(170) if sample.split == "train"][:100]
    for sample in samples[10:12]:
        sample.images = [("png", b"no image")]
    write_shards(samples, tmp_path / "s", "toy", 10)
    data = config(tmp_path / "s", batch_size=10, max_bad=0.02, workers=4)
    assert sum(1 for _ in loader(stream(data, steps=60))) == 60


def test_too_many_bad_images_stop(tmp_path: Path) -> None:
    samples = list(toy_samples(50))
    for sample in samples[:6]:
        sample.images = [("png", b"no image")]
    write_shards(samples, tmp_path / "s", "toy", 50)
    with pytest.raises(UserError, match=r"unreadable image\), more than the ceiling of 1\.0%"):
        list(stream(config(tmp_path / "s"), steps=4))


def test_epochs_are_those_of_the_first_source(toy_shards: Manifest, unpaired: dict[str, SourceConfig]) -> None:
    assert steps_per_epoch(config(toy_shards.folder)) == toy_shards.count("train") // 8
    assert steps_per_epoch(config("", sources=unpaired)) == 40 // 2
    with pytest.raises(
        UserError, match=r"data\.sources\.images: too few studies in split 'train' to fill a batch of 200"
    ):
        steps_per_epoch(config("", sources=unpaired, batch_size=200))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_meets_every_study_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    """Also where the last batch has no row for some: else its loss would depend on the ranks."""
    write_shards(images_only(25), tmp_path, "i", 10)
    data = config(tmp_path)
    assert steps_once(data) == 4
    ids = []
    for rank in range(world):
        batches = list(stream(data, 4, rank=rank, world_size=world, training=False))
        assert len(batches) == 4
        assert all("image" in batch for batch in batches if batch["image_id"])
        ids += [study for batch in batches for study in batch["image_id"]]
    assert len(set(ids)) == len(ids) == 25


def test_config_refuses(toy_shards: Manifest) -> None:
    with pytest.raises(ValueError, match="name at least one source"):
        DataConfig()
    with pytest.raises(ValueError, match="batch_size"):
        config(toy_shards.folder, batch_size=1)
    with pytest.raises(ValueError, match="above 0"):
        TextConfig(report=0)
    with pytest.raises(ValueError, match="balance"):
        SourceConfig("x", balance=2)
    with pytest.raises(ValueError, match="lanes must divide batch_size 8, got 3"):
        config(toy_shards.folder, lanes=3)
    with pytest.raises(UserError, match="64 ranks need a row each"):
        stream(config(toy_shards.folder), world_size=64)
    with pytest.raises(UserError, match=r"data\.sources\.toy: 90 samples do not fill 256 lanes: lower data\.lanes"):
        stream(config(toy_shards.folder, batch_size=256, lanes=256))


def test_no_study_stands_in_for_many(tmp_path: Path) -> None:
    """Half a shard is gone: its rows are spread over what is left, not all given to what follows the gap."""
    samples = [sample for sample in toy_samples(700) if sample.split == "train"][:400]
    manifest = write_shards(samples, tmp_path / "s", "toy", 40)
    path = Path(manifest.of_split("train")[3].url)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = config(tmp_path / "s", batch_size=8, max_bad=1.0)
    seen = Counter(study for batch in stream(data, steps=50) for study in batch["image_id"])
    assert sum(seen.values()) == 400
    lost = 400 - len(seen)
    assert 15 < lost < 25
    assert max(seen.values()) <= 6


def test_whole_epochs_are_whole(tmp_path: Path) -> None:
    write_shards(texts_only(186), tmp_path, "t", 100)
    assert steps_per_epoch(config(tmp_path, batch_size=2)) == 93


def test_a_process_opens_no_more_files_than_the_system_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert open_files() == 128
    monkeypatch.setattr(resource, "getrlimit", lambda _: (-1, -1))
    assert open_files() == 512
