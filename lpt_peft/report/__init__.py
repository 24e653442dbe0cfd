"""An HTML page about one or several finished runs, in a single file that needs no network.

write.py       write_report, write_comparison
files.py       the files of a run
partial.py     an analysis without passes over images, from stored predictions
answers.py     sentences of the first screen
classes.py     the table of classes, and its CSV
gallery.py     thumbnails of the surest mistakes
curves.py      pictures of training curves and of several runs
pictures.py    captions, and texts for readers who do not see the pictures
facts.py       facts about data and settings
comparison.py  figures and paired differences of several runs
page.py        rendering
templates/     HTML, CSS and JavaScript

Not here: measuring a run (`lpt_peft.recipe.analyse`), and most pictures (`lpt_peft.analysis.plots`).
"""

from lpt_peft.report.write import WrittenReport, write_comparison, write_report

__all__ = ["WrittenReport", "write_comparison", "write_report"]
