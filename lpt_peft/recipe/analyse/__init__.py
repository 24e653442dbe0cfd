"""Measure what a trained model learned and where it fails: JSON and pictures.

run.py        analyse: the passes over images, and the result
probe.py      a pass: predictions, features and variants
sections.py   statistics of its tensors as JSON
subsets.py    subsets of images
files.py      analysis.json and pictures
"""

from lpt_peft.recipe.analyse.files import ANALYSIS, ANALYSIS_FOLDER, write_analysis
from lpt_peft.recipe.analyse.run import AnalysedImages, analyse

__all__ = ["ANALYSIS", "ANALYSIS_FOLDER", "AnalysedImages", "analyse", "write_analysis"]
