"""Name of a source -> where its class is: `medclip-lab prepare NAME FOLDER --out SHARDS`."""

SOURCES = {
    "biomedica": "medclip_lab.data.sources.biomedica:Biomedica",
    "chexpert": "medclip_lab.data.sources.chexpert:Chexpert",
    "chexpert-plus": "medclip_lab.data.sources.chexpert_plus:ChexpertPlus",
    "dicom-folder": "medclip_lab.data.sources.dicom_folder:DicomFolder",
    "hf-dataset": "medclip_lab.data.sources.hf_dataset:HfDataset",
    "jsonl": "medclip_lab.data.sources.jsonl:Jsonl",
    "mimic-cxr": "medclip_lab.data.sources.mimic_cxr:MimicCxr",
    "open-pmc": "medclip_lab.data.sources.pmc_oa:OpenPmc",
    "padchest": "medclip_lab.data.sources.padchest:Padchest",
    "parquet": "medclip_lab.data.sources.parquet:Parquet",
    "pmc-oa": "medclip_lab.data.sources.pmc_oa:PmcOa",
    "rocov2": "medclip_lab.data.sources.rocov2:Rocov2",
    "rsna-pneumonia": "medclip_lab.data.sources.rsna_pneumonia:RsnaPneumonia",
    "siim-acr": "medclip_lab.data.sources.siim_acr:SiimAcr",
    "vindr-cxr": "medclip_lab.data.sources.vindr_cxr:VindrCxr",
}
