"""Folders of Hugging Face models: on disk, in its cache, or on the hub where a user asks for that."""

from pathlib import Path

from medclip_lab.errors import UserError

HUB = "hf-hub:"
LFS_POINTER = b"version https://git-lfs"

RENAMED = {
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext": (
        "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
    ),
    "microsoft/BiomedNLP-PubMedBERT-large-uncased-abstract": "microsoft/BiomedNLP-BiomedBERT-large-uncased-abstract",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "xlm-roberta-large": "FacebookAI/xlm-roberta-large",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "distilroberta-base": "distilbert/distilroberta-base",
    "gpt2": "openai-community/gpt2",
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
}
"""Repositories that were renamed: the hub redirects the old name, a folder or a cache does not."""


def names_of(repository: str) -> list[str]:
    """The name itself first, then what else the repository is or was called."""
    new = RENAMED.get(repository, repository)
    return list(dict.fromkeys([repository, new, *(old for old, other in RENAMED.items() if other == new)]))


def find_folder(name: str, setting: str) -> Path:
    """The folder of a model.

    Args:
        name: a folder, the name of a repository whose files are in Hugging Face's cache, or "hf-hub:NAME", which alone
            may use the network (not if HF_HUB_OFFLINE is set).
        setting: what the name was given for, for the error.

    Raises:
        UserError: there is none, with the way to get it.
    """
    if name.startswith(HUB):
        return _download(name.removeprefix(HUB), setting)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    for known in names_of(name):
        beside = path.parent / Path(known).name  # a folder that was saved under the repository's other name
        if beside.is_dir() and known != name:
            return beside
        cached = _cached(known)
        if cached is not None:
            return cached
    raise UserError(
        f"{setting}: {name!r} is no folder here and not in Hugging Face's cache: where there is a network, "
        f"`hf download {RENAMED.get(name, name)} --local-dir FOLDER`, and name the folder; or say {HUB}{name} to fetch "
        "it now"
    )


def refuse_pointer(path: Path, setting: str) -> None:
    """Git without LFS leaves a few lines of text in the place of a large file.

    Raises:
        UserError: this is such a file.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{setting}: {path} is a Git-LFS pointer, not the weights: run `git lfs pull` in its folder"
            )


def _cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "open_clip_config.json"):
        try:
            found = try_to_load_from_cache(repository, file)
        except HFValidationError:  # a path that does not exist, not a name
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _download(repository: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download

    unwanted = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.tflite", "onnx/*", "openvino/*"]
    try:
        return Path(snapshot_download(repository, ignore_patterns=unwanted))
    except Exception as error:  # every way a network can fail has a class of its own there
        kind = "HF_HUB_OFFLINE is set" if "Offline" in type(error).__name__ else type(error).__name__
        cached = _cached(repository)
        if cached is not None:
            return cached
        raise UserError(
            f"{setting}: cannot fetch {repository} from the hub ({kind}): where there is a network, `hf download "
            f"{repository} --local-dir FOLDER`, and name the folder"
        ) from None
