"""Kinds of labels: one file each, and the table that names them."""

from finetune.tasks.base import LabelKind
from finetune.tasks.classify import Classify
from finetune.tasks.detect import Detect, Instances
from finetune.tasks.multilabel import Multilabel
from finetune.tasks.regress import Regress
from finetune.tasks.segment import Segment

TASKS: dict[str, type[LabelKind]] = {
    kind.task: kind for kind in (Classify, Multilabel, Regress, Segment, Detect, Instances)
}
