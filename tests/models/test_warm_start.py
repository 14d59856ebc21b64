"""What is loaded is what the source has, what is not is told, and what cannot be is refused."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.hub import RENAMED, find_folder, names_of
from medclip_lab.models.spec import build_spec
from medclip_lab.models.stems import Normalisation
from medclip_lab.models.warm_start import Report, WarmStartConfig, stretch, warm_start

from .tiny import (
    CLIP_VIT,
    CONVNEXT,
    FAMILIES,
    RESNET,
    TEXT,
    VIT,
    hf_text,
    ids_of,
    pixels,
    save_transformer,
    spec,
)

GREY = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Values = dict[str, Any]


def start(model: Any, source: Path | str, **settings: Any) -> list[Report]:
    return warm_start(model, [WarmStartConfig(str(source), **settings)], GREY, speak=False)


def contiguous(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "wrapped.pt", "plain CLIP.pt", "module.pt", "folder"])
def test_open_clip_checkpoints(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    if suffix == "plain CLIP.pt":
        # open_clip's first class has its text tower spread over the model.
        cfg = {key: value for key, value in spec().items() if key != "custom_text"}
        old: Any = open_clip.model.CLIP(**cfg)
    else:
        old = build_spec(spec())
    path = tmp_path / f"w{suffix}"
    if suffix == "folder":
        path.mkdir()
        save_file(contiguous(old), path / "open_clip_model.safetensors")
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": spec(), "preprocess_cfg": {}}))
    elif suffix == ".safetensors":
        save_file(contiguous(old), path)
    elif suffix == "wrapped.pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in old.state_dict().items()}}, path)
    elif suffix == "module.pt":
        torch.save({f"_orig_mod.{k}": v for k, v in old.state_dict().items()}, path)
    else:
        torch.save(old.state_dict(), path)
    torch.manual_seed(2)
    new: Any = build_spec(spec())
    before = new.logit_scale.clone()
    with torch.no_grad():
        old.logit_scale.fill_(7.0)
    image, text = warm_start(new, [WarmStartConfig(str(path))], GREY)
    assert (image.tower, text.tower) == ("image", "text")
    for report in (image, text):
        assert report.share == 1
        assert not report.missing
        assert not report.unused
        assert not report.misfit
        assert not report.reshaped
    assert len(image.loaded) + len(text.loaded) == len(new.state_dict()) - 1
    with torch.no_grad():
        torch.testing.assert_close(new.eval().encode_text(ids_of(12)), old.eval().encode_text(ids_of(12)))
        images = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(new.encode_image(images), old.encode_image(images))
    assert torch.equal(new.logit_scale, before), "the loss says how the scale starts"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"warm start of the image tower from {path}: {len(image.loaded)} loaded, 0 reshaped, 0 of another shape, "
        "0 missing, 0 unused"
    )


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_only(tmp_path: Path, tower: str) -> None:
    old, new = build_spec(spec()), build_spec(spec())
    torch.save(old.state_dict(), tmp_path / "w.pt")
    before = {name: value.clone() for name, value in new.state_dict().items()}
    (report,) = start(new, tmp_path / "w.pt", tower=tower)
    assert report.tower == tower
    prefix = {"image": "visual.", "text": "text."}[tower]
    for name, value in new.state_dict().items():
        expected = old.state_dict()[name] if name.startswith(prefix) else before[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_timm_weights(tmp_path: Path, kind: str) -> None:
    trunk = timm.create_model("test_vit")
    path = tmp_path / "model.safetensors"
    save_file(contiguous(trunk), path)
    if kind == "folder":
        facts = {"architecture": "test_vit", "pretrained_cfg": {"mean": IMAGENET.mean, "std": IMAGENET.std}}
        (tmp_path / "config.json").write_text(json.dumps(facts))
    new: Any = build_spec(spec({"timm_model_name": "test_vit", "image_size": 32, "timm_pool": "token"}))
    (report,) = start(new, path if kind == "file" else tmp_path)
    assert report.tower == "image"
    assert report.missing == ["visual.head.proj.weight"]
    assert report.unused == ["visual.trunk.head.bias", "visual.trunk.head.weight"]
    assert any("pixels were normalised by [0.485, 0.456, 0.406]" in note for note in report.notes) == (kind == "folder")
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        expected = trunk.eval().forward_head(trunk.forward_features(images), pre_logits=True)
        torch.testing.assert_close(new.eval().visual.trunk(images), expected)


def test_position_embeddings_of_other_image_sizes(tmp_path: Path) -> None:
    """As timm and open_clip do it: what an image twice as large sees is near what it saw before."""
    wide = spec(CLIP_VIT | {"image_size": 64})
    old, new = build_spec(wide), build_spec(spec())
    torch.save(old.state_dict(), tmp_path / "w.pt")
    report, _ = start(new, tmp_path / "w.pt")
    assert report.reshaped == {"visual.positional_embedding": "65x64 -> 17x64"}
    state = {"visual.positional_embedding": old.state_dict()["visual.positional_embedding"]}
    open_clip.model.resize_pos_embed(state, new)
    assert torch.equal(new.state_dict()["visual.positional_embedding"], state["visual.positional_embedding"])

    trunk = timm.create_model("test_vit")
    save_file(contiguous(trunk), tmp_path / "t.safetensors")
    resized = build_spec(spec(VIT | {"timm_input_size": 32}))
    (report,) = start(resized, tmp_path / "t.safetensors")
    assert report.reshaped == {"visual.trunk.pos_embed": "1x101x64 -> 1x5x64"}
    again = timm.create_model("test_vit", img_size=32)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(trunk.state_dict()), again)["pos_embed"]
    assert torch.equal(resized.state_dict()["visual.trunk.pos_embed"], expected)


@given(st.integers(1, 30), st.integers(1, 60), st.integers(0, 3))
def test_stretched_positions(places: int, wanted: int, kept: int) -> None:
    """A straight line stays one from end to end, and fewer positions are the first ones."""
    rows = torch.cat([torch.full((kept, 2), -9.0), torch.arange(places).float()[:, None].expand(-1, 2)])
    found = stretch(rows, wanted + kept, kept)
    assert found.shape == (wanted + kept, 2)
    assert torch.equal(found[:kept], rows[:kept])
    if wanted <= places:
        assert torch.equal(found, rows[: wanted + kept])
    else:
        centres = (torch.arange(wanted) + 0.5) * places / wanted - 0.5
        torch.testing.assert_close(found[kept:, 0], centres.clamp(0, places - 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["open_clip", "bert", "roberta"])
def test_longer_contexts(tmp_path: Path, kind: str) -> None:
    if kind == "open_clip":
        torch.save(build_spec(spec()).state_dict(), tmp_path / "w.pt")
        new = build_spec(spec(CLIP_VIT, TEXT | {"context_length": 30}))
        _, report = start(new, tmp_path / "w.pt")
        assert report.reshaped == {"text.positional_embedding": "12x16 -> 30x16"}
        return
    folder = save_transformer(tmp_path / "old", kind)
    new = build_spec(spec(CLIP_VIT, hf_text(kind, context_length=94)))
    (report,) = start(new, folder)
    rows = 94 if kind == "bert" else 96
    name = "text.transformer.embeddings.position_embeddings.weight"
    assert report.reshaped == {name: f"48x16 -> {rows}x16"}
    before = load_file(folder / "model.safetensors")["embeddings.position_embeddings.weight"]
    found = new.state_dict()[name]
    special = rows - 94  # rows that belong to no position
    assert torch.equal(found[: special + 1], before[: special + 1])
    assert torch.equal(found[-1], before[-1])
    with torch.no_grad():
        assert new.eval().encode_text(ids_of(94)).isfinite().all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_folders_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoModel

    folder = save_transformer(tmp_path / "old", family)
    new: Any = build_spec(spec(CLIP_VIT, hf_text(family)))
    (report,) = start(new, folder, tower="text")
    assert [name for name in report.missing if not name.startswith("text.proj")] == []
    assert all("pooler" in name for name in report.unused)
    theirs = AutoModel.from_pretrained(folder).eval()
    theirs = theirs.encoder if family == "t5" else theirs
    ids = ids_of(9)
    with torch.no_grad():
        torch.testing.assert_close(
            new.eval().text.transformer(ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state
        )


def test_a_folder_with_a_language_head_and_names_of_other_years(tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "old", "bert", head=True)
    (file,) = folder.glob("*.safetensors")
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in load_file(file).items()}
    state["bert.embeddings.position_ids"] = torch.arange(48)[None]
    torch.save({name.replace("LayerNorm.bias", "LayerNorm.beta"): v for name, v in state.items()}, folder / "old.bin")
    (folder / "old.bin").rename(folder / "pytorch_model.bin")
    file.unlink()
    new: Any = build_spec(spec(CLIP_VIT, hf_text("bert", hf_pooler_type="cls_pooler")))
    (report,) = start(new, folder)
    assert [name for name in report.missing if not name.startswith("text.proj")] == [
        "text.transformer.pooler.dense.weight",
        "text.transformer.pooler.dense.bias",
    ]
    layer = new.text.transformer.embeddings.LayerNorm
    assert torch.equal(layer.weight, state["bert.embeddings.LayerNorm.gamma"])


EXACT = {"ViT of timm": VIT, "ConvNeXt": CONVNEXT, "ViT of open_clip": CLIP_VIT}


@pytest.mark.parametrize("source", [IMAGENET, Normalisation((0.5, 0.5, 0.5), (0.2, 0.25, 0.3))], ids=["means", "stds"])
@pytest.mark.parametrize("name", [*EXACT, "ResNet"])
def test_one_channel_answers_as_three_repeated(tmp_path: Path, name: str, source: Normalisation) -> None:
    vision = EXACT.get(name, RESNET)
    old, new = build_spec(spec(vision)), build_spec(spec(vision | {"in_chans": 1}))
    # Positions and norms are trivial in a new model.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in old.visual.parameters():  # type: ignore[union-attr]
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    torch.save(old.state_dict(), tmp_path / "w.pt")
    image, _ = start(new, tmp_path / "w.pt", mean=source.mean, std=source.std)
    three = DualEncoder(old, PreprocessConfig(32, mean=source.mean, std=source.std)).eval()  # type: ignore[arg-type]
    one = DualEncoder(new, PreprocessConfig(32)).eval()
    with torch.no_grad():
        difference = (one.encode_image(pixels(4)) - three.encode_image(pixels(4))).abs().max()
    stem = [shapes for shapes in image.reshaped.values() if "x3x" in shapes]
    assert len(stem) == 1
    assert "x1x" in stem[0]
    if name == "ResNet" and source is IMAGENET:
        assert difference > 1e-4
        assert "nearest with data.preprocess.mean 0.449 and std 0.226" in image.notes[0]
    else:
        assert difference < 1e-5
        assert not image.notes


def test_folders_tell_how_pixels_were_normalised(tmp_path: Path) -> None:
    old = build_spec(spec(VIT))
    save_file(contiguous(old), tmp_path / "model.safetensors")
    record = {"model_cfg": spec(VIT), "preprocess_cfg": PreprocessConfig(32, mean=IMAGENET.mean).record()}  # type: ignore[arg-type]
    (tmp_path / "model.json").write_text(json.dumps(record))  # a run
    new = build_spec(spec(VIT | {"in_chans": 1}))
    image, _ = start(new, tmp_path)
    assert not image.notes
    three = DualEncoder(old, PreprocessConfig(32, mean=IMAGENET.mean)).eval()  # type: ignore[arg-type]
    one = DualEncoder(new, PreprocessConfig(32)).eval()
    with torch.no_grad():
        torch.testing.assert_close(one.encode_image(pixels()), three.encode_image(pixels()), rtol=0, atol=1e-5)


def test_what_fits_in_part_is_told(tmp_path: Path) -> None:
    old = build_spec(spec(CLIP_VIT, TEXT | {"vocab_size": 50}))
    state = old.state_dict() | {"text.extra": torch.zeros(1)}
    del state["text.ln_final.bias"]
    torch.save(state, tmp_path / "w.pt")
    new: Any = build_spec(spec())
    before = new.text.token_embedding.weight.clone()
    report = start(new, tmp_path / "w.pt", tower="text")[0]
    assert report.misfit == {"text.token_embedding.weight": "50x16, not 40x16"}
    assert report.missing == ["text.ln_final.bias"]
    assert report.unused == ["text.extra"]
    assert torch.equal(new.text.token_embedding.weight, before)
    total = sum(value.numel() for name, value in new.state_dict().items() if name.startswith("text."))
    assert report.share == pytest.approx(1 - (40 * 16 + 16) / total, abs=1e-4)
    assert report.line().endswith(
        "1 of another shape (text.token_embedding.weight 50x16, not 40x16), 1 missing (text.ln_final.bias), "
        "1 unused (text.extra)"
    )
    assert json.loads(json.dumps(report.record()))["unused"] == ["text.extra"]
    with pytest.raises(UserError, match=r"% of the text tower's weights are in .*, at_least is 99%"):
        start(new, tmp_path / "w.pt", tower="text", at_least=0.99)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_are_refused(tmp_path: Path) -> None:
    model = build_spec(spec(VIT, hf_text("bert")))

    def refused(name: str, content: bytes, message: str, **settings: Any) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            start(model, tmp_path / name, **settings)
        assert "\n" not in str(error.value)

    refused("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer, not the weights")
    refused("w.pt", b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer, not the weights")
    refused("harm.pt", pickle.dumps({"a": Harm()}), "holds more than tensors")
    refused("harm.bin", pickle.dumps(Harm()), "holds more than tensors")
    refused("short.safetensors", b"\x08\0\0\0", "cannot read")
    refused("w.npz", b"PK", r"w.npz is none of .safetensors, .pt")
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pt")
    refused("empty.pt", (tmp_path / "empty.pt").read_bytes(), "holds no tensors by name")
    torch.save({"bert.embeddings.word_embeddings.weight": torch.zeros(2)}, tmp_path / "bert.bin")
    refused("bert.bin", (tmp_path / "bert.bin").read_bytes(), "name its folder, with the config.json")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    alien = (tmp_path / "resnet.pth").read_bytes()
    near = r"0.0% of the image tower's weights .* is wanted, the nearest is visual.trunk"
    refused("resnet.pth", alien, near)
    refused("resnet.pth", alien, r"holds nothing for text: text\..* is wanted, the nearest is", tower="text")
    clip = build_spec(spec())
    with pytest.raises(UserError, match=r"if it is one of timm, set model.spec.vision_cfg.timm_model_name"):
        start(clip, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"the text tower is open_clip's own: set model.spec.text_cfg.hf_model_name"):
        start(clip, save_transformer(tmp_path / "bert"))
    assert math.isfinite(float(model.logit_scale.detach()))  # type: ignore[operator]


def test_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_spec(spec(VIT, hf_text("bert")))
    with pytest.raises(UserError, match=r"is no folder here.*`hf download some/model --local-dir FOLDER`"):
        start(model, "some/model")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds 0 files of weights"):
        start(model, tmp_path / "none")
    folder = save_transformer(tmp_path / "bert")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is a Git-LFS pointer"):
        start(model, folder)
    file.unlink()
    with pytest.raises(UserError, match="transformers cannot read"):
        start(model, folder)
    for kind in ("siglip2", "vision-text-dual-encoder"):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=f"holds a {kind} model .*take open_clip's version of it"):
            start(model, folder)
    for values, message in (
        ({"at_least": 0.0}, "at_least is a share"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std go together"),
    ):
        with pytest.raises(ValueError, match=message):
            WarmStartConfig("x", **values)  # type: ignore[arg-type]


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: by either name of a renamed repository, from the cache or beside."""
    old = "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract"
    new = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    assert names_of(old) == [old, new]
    assert names_of(new) == [new, old]
    assert len(set(RENAMED.values()) & set(RENAMED)) == 0, "an old name is nobody's new one"
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / f"models--{new.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_folder(old, "x") == find_folder(new, "x") == snapshot
    assert find_folder(f"hf-hub:{new}", "x") == snapshot, "offline the cache serves"
    with pytest.raises(UserError, match=r"x: cannot fetch some/model from the hub \(.*`hf download some/model"):
        find_folder("hf-hub:some/model", "x")
    beside = tmp_path / "models" / "BiomedNLP-BiomedBERT-base-uncased-abstract"
    beside.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "microsoft").symlink_to(tmp_path / "models")
    assert find_folder(old, "x").resolve() == beside.resolve()
