"""Kinds of labels: one file each, and the table that names them."""

from finetune.tasks.base import LabelKind
from finetune.tasks.classify import Classify

TASKS: dict[str, type[LabelKind]] = {"classify": Classify}
