"""Where studies come from: a file a data set, each a `base.Source`.

A source is a frozen dataclass. Its fields are what `medclip-lab prepare NAME` takes: those without a default by
position, the others as flags, explained by `metadata={"help": ...}`; the first line of its file says what it is. The
files are imported whenever the command line is built, so they import nothing heavy at their top.
"""

from importlib import import_module
from typing import Any

SOURCES = {
    "phantom": "medclip_lab.data.sources.phantom:Phantom",
    "biomedica": "medclip_lab.data.sources.biomedica:Biomedica",
    "chexpert": "medclip_lab.data.sources.chexpert:Chexpert",
    "chexpert-plus": "medclip_lab.data.sources.chexpert_plus:ChexpertPlus",
    "ct-rate": "medclip_lab.data.sources.ct_rate:CtRate",
    "csv": "medclip_lab.data.sources.csv_pairs:CsvPairs",
    "dicom-folder": "medclip_lab.data.sources.dicom_folder:DicomFolder",
    "hf-dataset": "medclip_lab.data.sources.hf_dataset:HfDataset",
    "jsonl": "medclip_lab.data.sources.jsonl:Jsonl",
    "mimic-cxr": "medclip_lab.data.sources.mimic_cxr:MimicCxr",
    "nih-cxr14": "medclip_lab.data.sources.nih_cxr14:NihCxr14",
    "open-pmc": "medclip_lab.data.sources.pmc_oa:OpenPmc",
    "openi": "medclip_lab.data.sources.openi:OpenI",
    "padchest": "medclip_lab.data.sources.padchest:Padchest",
    "parquet": "medclip_lab.data.sources.parquet:Parquet",
    "pmc-oa": "medclip_lab.data.sources.pmc_oa:PmcOa",
    "rocov2": "medclip_lab.data.sources.rocov2:Rocov2",
    "rsna-pneumonia": "medclip_lab.data.sources.rsna_pneumonia:RsnaPneumonia",
    "siim-acr": "medclip_lab.data.sources.siim_acr:SiimAcr",
    "vindr-cxr": "medclip_lab.data.sources.vindr_cxr:VindrCxr",
}
"""Name -> "module:class"."""


def source_class(name: str) -> type[Any]:
    """The class of a source that `SOURCES` names."""
    module, _, cls = SOURCES[name].partition(":")
    found: type[Any] = getattr(import_module(module), cls)
    return found
