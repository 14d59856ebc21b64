"""Synthetic chest radiographs with reports, drawn by our own code: anyone may have them and pass them on."""

from dataclasses import dataclass, field

from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.errors import UserError


@dataclass(frozen=True)
class Phantom:
    """Drawn studies of one or two images each, patient by patient.

    A study depends on the seed, its patient and the size alone: more studies go on where fewer end (the last patient of
    the fewer may then have more).
    """

    studies: int = field(default=1000, metadata={"help": "number of studies", "example": "1000"})
    seed: int = field(default=0, metadata={"help": "another seed gives other patients, with other identifiers"})
    size: int = field(default=128, metadata={"help": "side of the images in pixels; thin things need about 96"})

    name = "phantom"
    license = "CC0-1.0"

    def records(self) -> list[Record]:
        """One a study.

        Raises:
            UserError: studies below 1, a size below 32, a negative seed.
        """
        from medclip_lab.data.phantom.study import patient_name, split_of, studies_of  # here, as it imports numpy

        if self.studies < 1:
            raise UserError(f"phantom: studies={self.studies}, at least 1 is needed")
        if self.size < 32:
            raise UserError(f"phantom: size={self.size} pixels, at least 32 are needed")
        if self.seed < 0:
            raise UserError(f"phantom: seed={self.seed}, 0 or more is needed")
        records: list[Record] = []
        patient = 0
        while len(records) < self.studies:
            patient_id = patient_name(self.seed, patient)
            records += [
                Record(
                    study_id=f"phantom-{self.seed}-{len(records) + number:06d}",
                    patient_id=patient_id,
                    split=split_of(patient_id),
                    content=(patient, number),
                )
                for number in range(min(studies_of(self.seed, patient), self.studies - len(records)))
            ]
            patient += 1
        return records

    def read(self, record: Record, note: Note) -> Sample:  # noqa: ARG002 - nothing is ever wrong with a drawing
        """Draw a study and write its report."""
        from medclip_lab.data.phantom.study import make_study

        patient, number = record.content
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            source=self.name,
            license=self.license,
            **make_study(self.seed, patient, number, self.size),
        )
