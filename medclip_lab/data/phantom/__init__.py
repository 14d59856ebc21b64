"""Synthetic chest radiographs with reports, drawn by our own code: data that anyone may have and pass on.

They are for trying, testing and teaching: a run on them shows that the whole path works and what its numbers look
like, and says nothing about patients. Labels are those of the report, `extra["truth"]` is what was drawn; the two
differ where a report hedges or overlooks something. A report states "Lung Opacity" where it uses the word or calls the
lungs clear, so also with a pneumonia or an edema described as opacity; the truth counts every consolidation and
pneumonia as one.
"""
